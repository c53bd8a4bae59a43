"""Posteriors merged in memory: against training on everything, where that is a closed form."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.contracts import close

import bayesrule as br
from bayesrule.bases import Basis
from bayesrule.uses.merging.methods import METHODS, Place, threshold
from bayesrule.uses.merging.posteriors import Merger, _piece

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "merge_quadratic.json").read_text())
CASES = [name for name, case in GOLDEN.items() if "H_anchor" in case]
DELTA = GOLDEN["data"]["delta"]
examples = settings(derandomize=True, deadline=None, max_examples=15)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def full(mean, precision, **known):
    return br.Posterior.of(br.Full(tensor(mean), tensor(precision)), {"w": (4,)}, **known)


def diagonal(mean, precision, **known):
    return br.Posterior({"w": tensor(mean)}, {"w": tensor(precision).diagonal().clone()}, **known)


def problem(name, make):
    """Base, posteriors and weights of a golden case."""
    case = GOLDEN[name]
    anchor = tensor(case["H_anchor"])
    tasks = zip(case["theta_tasks"], case["H_tasks"], strict=True)
    return (
        make(case["theta_anchor"], case["H_anchor"]),
        [make(mean, (anchor + tensor(hessian)).tolist()) for mean, hessian in tasks],
        case["alphas"],
    )


def random(seed, **known):
    """Two tensors, around 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (6, 7), "a.bias": (5,)}
    mean = {name: torch.randn(shape, generator=generator, dtype=torch.float64) + 2 for name, shape in shapes.items()}
    precision = {name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for name, shape in shapes.items()}
    return br.Posterior(mean, precision, **known)


def one(mean=0.0, precision=1.0, **known):
    return br.Posterior({"w": torch.tensor([mean])}, {"w": torch.tensor([precision])}, **known)


def under(prior, mean, precision, **known):
    """One that knows the precision of its prior."""
    return one(mean, precision, prior_precision={"w": torch.tensor(prior)}, **known)


def of(name, size):
    return br.Posterior({name: torch.zeros(size)}, {name: torch.ones(size)})


class TestGolden:
    @pytest.mark.parametrize("kind", [full, diagonal])
    @pytest.mark.parametrize("case", CASES)
    def test_gradient_matching(self, case, kind):
        found = br.merge(*problem(case, kind))
        key = "gradient_matching_full" if kind is full else "gradient_matching_diag"
        close(found.mean["w"], tensor(GOLDEN[case][key]), 1e-9)

    @pytest.mark.parametrize("case", CASES)
    def test_full_precisions_give_the_joint_solution(self, case):
        base, posteriors, alphas = problem(case, full)
        found = br.merge(base, posteriors, alphas)
        close(found.mean["w"], tensor(GOLDEN[case]["target"]), 1e-9)
        total = sum(a * tensor(h) for a, h in zip(alphas, GOLDEN[case]["H_tasks"], strict=True))
        close(found.parts[0].q.precision, tensor(GOLDEN[case]["H_anchor"]) + total, 1e-9)

    def test_diagonals_are_exact_where_hessians_are_diagonal(self):
        found = br.merge(*problem("orthogonal_add_two", diagonal))
        close(found.mean["w"], tensor(GOLDEN["orthogonal_add_two"]["target"]), 1e-9)

    def test_what_is_removed_might_never_have_been_there(self):
        found = br.merge(*problem("remove_one", full))
        close(found.mean["w"], tensor(GOLDEN["remove_one"]["retrained_without"]), 1e-9)

    @pytest.mark.parametrize("kind", [full, diagonal])
    @pytest.mark.parametrize("case", CASES)
    def test_fisher(self, case, kind):
        base, posteriors, _ = problem(case, kind)
        key = "fisher_average_full" if kind is full else "fisher_average_diag"
        for anchor in (base, None):
            close(br.merge(anchor, posteriors, method="fisher").mean["w"], tensor(GOLDEN[case][key]), 1e-9)

    @pytest.mark.parametrize("case", CASES)
    def test_methods_without_precisions(self, case):
        base, posteriors, alphas = problem(case, lambda *given: diagonal(*given).exact())
        close(br.merge(base, posteriors, alphas, "task_arithmetic").mean["w"], tensor(GOLDEN[case]["task_arithmetic"]), 1e-9)
        close(br.merge(None, posteriors, method="linear").mean["w"], tensor(GOLDEN[case]["simple_average"]), 1e-9)

    def no_anchor(self, make, **known):
        case = GOLDEN["no_anchor"]
        return case, [make(m, s, **known) for m, s in zip(case["m"], case["S"], strict=True)]

    def test_without_an_anchor_the_prior_counts_once(self):
        case, posteriors = self.no_anchor(full)
        found = br.merge(None, posteriors, prior_precision=DELTA)
        close(found.mean["w"], tensor(case["target"]), 1e-9)
        close(found.parts[0].q.precision, tensor(case["precision_joint"]), 1e-9)

    def test_posteriors_may_know_their_prior(self):
        case, posteriors = self.no_anchor(full, ess=1.0)
        posteriors = [replace(p, prior_precision={"w": tensor(DELTA)}) for p in posteriors]
        found = br.merge(None, posteriors)
        close(found.mean["w"], tensor(case["target"]), 1e-9)
        assert found.prior_precision["w"].tolist() == [DELTA] * 4 and found.prior_mean["w"].tolist() == [0.0] * 4

    def test_an_average_of_posteriors_counts_the_prior_for_each(self):
        case, posteriors = self.no_anchor(full)
        close(br.merge(None, posteriors, method="fisher").mean["w"], tensor(case["fisher_average_full_keeps_extra_prior"]), 1e-9)


class TestAlgebra:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_rule_tensor_by_tensor_bit_by_bit(self, method):
        base, posteriors = random(0), [random(i) for i in (1, 2, 3)]
        rule = METHODS[method]
        alphas = rule.weights([0.2, 0.3, 0.1], "abc")
        found = br.merge(base, posteriors, alphas, method, seed=5)
        for number, name in enumerate(sorted(base.mean)):
            pieces = [_piece(p, name) for p in (base, *posteriors)]
            limits = tuple(threshold(lambda p=p: [p.mean - pieces[0].mean], rule.density) for p in pieces[1:])  # noqa: B023
            wanted = rule(pieces[0], pieces[1:], alphas, Place(number, 0, limits, 5))
            assert torch.equal(found.mean[name], wanted.mean) and torch.equal(found.precision[name], wanted.precision)
        assert list(found.mean) == list(base.mean)

    @given(seeds=st.lists(st.integers(0, 10**6), min_size=2, max_size=4), full_ones=st.booleans())
    @examples
    def test_adding_one_by_one_is_adding_at_once(self, seeds, full_ones):
        """The task is then what each added to the first base."""
        base, posteriors = random(0), [random(seed) for seed in seeds]
        posteriors = [replace(p, precision={n: s + base.precision[n] for n, s in p.precision.items()}) for p in posteriors]
        if full_ones:
            base, *posteriors = map(dense, (base, *posteriors))
        step = base
        for posterior in posteriors:
            step = br.merge(base, [step, posterior])
        close_posteriors(step, br.merge(base, posteriors))

    @given(seed=st.integers(0, 10**6), full_ones=st.booleans())
    @examples
    def test_removing_and_adding_is_the_identity(self, seed, full_ones):
        base, posterior = random(seed), random(seed + 1)
        posterior = replace(posterior, precision={n: base.precision[n] * (1 + s / 4) for n, s in posterior.precision.items()})
        if full_ones:
            base, posterior = dense(base), dense(posterior)
        removed = br.merge(base, [posterior], -1.0)
        close_posteriors(br.merge(base, [removed, posterior]), base)
        close_posteriors(br.merge(base, [removed], -1.0), posterior)

    @pytest.mark.parametrize("kind", [lambda p: p, lambda p: dense(p)])
    def test_weights_of_0_give_the_base(self, kind):
        base, posterior = kind(random(0)), kind(random(1))
        close_posteriors(br.merge(base, [posterior], 0.0), base, 1e-12)

    def test_dense_diagonals_are_diagonals(self):
        base, posteriors = random(0), [random(i) for i in (1, 2)]
        whole = br.merge(dense(base), [dense(p) for p in posteriors], [0.3, 0.4])
        apart = br.merge(base, posteriors, [0.3, 0.4])
        close_posteriors(whole.independent(), apart)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_reckons_in_float32_or_wider(self, dtype):
        base, posterior = (random(i) for i in (0, 1))
        narrow = [
            br.Posterior(*({n: t.to(dtype) for n, t in block.items()} for block in (p.mean, p.precision)))
            for p in (base, posterior)
        ]
        found = br.merge(narrow[0], narrow[1:])
        assert found.mean["b.weight"].dtype == torch.promote_types(dtype, torch.float32)


def cast(tensors, dtype):
    return {name: t.to(dtype) for name, t in tensors.items()}


def row(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def dense(posterior):
    return br.Posterior.of(br.Full(row(posterior.mean), row(posterior.precision).diag()), posterior.mean)


def close_posteriors(actual, expected, tolerance=1e-9):
    for name in expected.mean:
        close(actual.mean[name], expected.mean[name], tolerance)
        close(actual.precision[name], expected.precision[name], tolerance)
    assert actual.structure == expected.structure


class TestStructures:
    def eigen(self, seed, basis):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(6, generator=generator, dtype=torch.float64)
        q = br.Eigen(mean, basis, torch.rand(6, generator=generator, dtype=torch.float64) + 1 + seed)
        return br.Posterior.of(q, {"w": (6,)})

    def basis(self, seed):
        square = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Basis((6,), [torch.linalg.qr(square)[0]])

    def test_of_one_basis(self):
        base, *posteriors = [self.eigen(seed, self.basis(0)) for seed in range(3)]  # equal bases, not the same object
        found = br.merge(base, posteriors, [0.5, 1.0])
        as_full = []
        for post in (base, *posteriors):
            q = post.parts[0].q
            axis = q.basis.parts[0].axes[0]
            as_full.append(br.Posterior.of(br.Full(q.mean[0], axis @ q._precisions[0].diag() @ axis.T), {"w": (6,)}))
        wanted = br.merge(as_full[0], as_full[1:], [0.5, 1.0])
        assert found.structure == "eigen"
        close(found.mean["w"], wanted.mean["w"])
        close(found.precision["w"], wanted.precision["w"])

    def test_around_a_prior(self):
        posteriors = [self.eigen(seed, self.basis(0)) for seed in range(2)]
        found = br.merge(None, posteriors, prior_precision=0.5)
        close(found.parts[0].q.natural()[0][0], sum(p.parts[0].q.natural()[0][0] for p in posteriors))
        close(found.parts[0].q._precisions[0], sum(p.parts[0].q._precisions[0] for p in posteriors) - 0.5)

    def test_partly_together(self):
        base = br.Posterior(
            {"v": torch.zeros(2), "w": torch.zeros(1)},
            {"v": torch.ones(2), "w": torch.ones(1)},
            parts=br.Posterior.of(br.Full(torch.zeros(2), torch.eye(2)), {"v": (2,)}).parts,
        )
        model = br.Posterior(
            {"w": torch.ones(1)},
            {"w": torch.full((1,), 3.0)},
            parts=br.Posterior.of(br.Full(torch.ones(2), torch.eye(2) + 1), {"v": (2,)}).parts,
        )
        found = br.merge(base, [model], 1.0)
        assert found.structure == "full+diag"
        close(found.mean["v"], torch.ones(2), 1e-6)
        close(found.mean["w"], torch.ones(1), 1e-6)

    @pytest.mark.parametrize(
        ("others", "method", "message"),
        [
            (
                "another basis",
                "gradient_matching",
                r"'base' \(eigen\) and 'posteriors\[0\]' \(eigen\) has no posterior of one structure",
            ),
            ("diag", "fisher", r"fisher of 'base' \(eigen\) and 'posteriors\[0\]' \(diag\) .* take independent\(\) of all"),
            ("low_rank", "gradient_matching", r"'base' \(low_rank\) and 'posteriors\[0\]' \(low_rank\)"),
            ("same", "ties", r"ties of 'base' \(eigen\) has no posterior of one structure and basis"),
        ],
    )
    def test_sums_that_are_of_none(self, others, method, message):
        base = self.eigen(0, self.basis(0))
        other = self.eigen(1, self.basis(1 if others == "another basis" else 0))
        if others == "diag":
            other = other.independent()
        elif others == "low_rank":
            q = br.LowRank(torch.zeros(6), br.DiagonalPlusFactor(torch.ones(6), torch.ones(6, 1)))
            base = other = br.Posterior.of(q, {"w": (6,)})
        with pytest.raises(TypeError, match=message):
            br.merge(base, [other], method=method)

    def test_mixtures_are_sent_elsewhere(self):
        mixture = br.Posterior.mixture([one(0.0), one(1.0)])
        with pytest.raises(TypeError, match=r"'posteriors\[0\]' has the structure 'mixture' and is no Gaussian; merge_mixtures"):
            br.merge(one(), [mixture])

    def test_a_removal_that_goes_too_far(self):
        base, posteriors, _ = problem("remove_one", full)
        with pytest.raises(
            ValueError, match=r"removing 'toxic' leaves no posterior: .*not positive definite \(least eigenvalue -.*Lower alpha"
        ):
            br.merge(base, posteriors, -2.0, names=["toxic"])


class TestWhatIsKnown:
    def test_examples_and_ess_add_up(self):
        base, task = one(num_data=100, ess=100.0), one(1.0, 12.0, num_data=20, ess=20.0)
        for alphas, count in (([1.0, 1.0], 140), ([0.5, 0.0], 110), ([-1.0, 0.0], 80)):
            found = br.merge(replace(base, precision={"w": torch.tensor([9.0])}), [task, task], alphas)
            assert (found.num_data, found.ess) == (count, float(count))
        assert br.merge(base, [task, one(num_data=60, ess=60.0)], method="linear").num_data == 40
        assert br.merge(base, [one(num_data=None, precision=2.0)]).num_data is None

    def test_a_posterior_of_another_ess_is_rescaled(self):
        with pytest.warns(UserWarning, match="ess=40 but num_data=20; variances are scaled by 2 for merging"):
            found = br.merge(one(), [one(1.0, 4.0, num_data=20, ess=40.0)])
        assert found.precision["w"].item() == 2.0

    def test_the_prior_is_that_of_the_base(self):
        prior = {"w": torch.tensor(0.5)}
        found = br.merge(one(prior_precision=prior, prior_mean={"w": torch.tensor(2.0)}), [one(1.0, 3.0)])
        assert (found.prior_precision["w"].item(), found.prior_mean["w"].item()) == (0.5, 2.0)
        assert br.merge(one(prior_precision=prior), [one(1.0, 3.0)], method="fisher").prior_precision is None

    def test_a_calibration_is_not_passed_on(self):
        assert br.merge(one(temperature=2.0), [one(1.0, 3.0, temperature=2.0)]).temperature == 1.0

    def test_a_base_known_exactly_takes_the_prior_of_the_posteriors(self):
        """They then add what their data say to it: 10 - 2 and 7 - 1, around 1.5."""
        base = one(0.0).exact()
        models = [
            one(1.0, 10.0, prior_precision={"w": torch.tensor(2.0)}),
            one(-1.0, 7.0, prior_precision={"w": torch.tensor(1.0)}),
        ]
        found = br.merge(base, models)
        assert found.precision["w"].item() == pytest.approx(1.5 + 8 + 6)
        assert found.mean["w"].item() == pytest.approx((9.5 - 7.5) / 15.5)
        assert br.merge(base, models, prior_precision=4.0).precision["w"].item() == pytest.approx(4 + 8 + 6)
        assert br.merge(base, models, method="task_arithmetic").precision["w"].item() == pytest.approx(15.5)

    def test_a_base_with_a_precision_takes_the_place_of_another_prior(self):
        found = br.merge(one(0.0, 100.0), [under(2.0, 1.0, 10.0)])
        assert found.precision["w"].item() == pytest.approx(108.0)

    def test_the_same_of_full_posteriors(self):
        rows = [[3.0, 1.0], [1.0, 2.0]]
        q = br.Full(torch.ones(2), torch.tensor(rows))
        model = replace(br.Posterior.of(q, {"w": (2,)}), prior_precision={"w": torch.tensor(0.5)})
        base = br.Posterior({"w": torch.zeros(2)}, {"w": torch.full((2,), math.inf)})
        found = br.merge(base, [model], prior_precision=4.0)
        close(found.parts[0].q.precision, torch.tensor(rows) + 3.5 * torch.eye(2), 1e-6)

    def test_learned_posteriors_know_what_is_asked(self):
        """Two halves of a regression, each learned by IVON, against the merger of what they hold."""
        torch.manual_seed(0)
        posts = []
        for start in (0, 16):
            model = torch.nn.Linear(2, 1, bias=False)
            x = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))[start : start + 16]
            optimizer = br.IVON(model.named_parameters(), lr=0.1, ess=16, weight_decay=0.1, hess_init=1.0)
            for _ in range(20):
                with optimizer.sampled_params(train=True):
                    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
            posts.append(optimizer.posterior(model, num_data=16))
        found = br.merge(None, posts)
        assert found.num_data == 32 and found.prior_precision["weight"].flatten().tolist() == pytest.approx([1.6] * 2)
        close(found.precision["weight"], posts[0].precision["weight"] + posts[1].precision["weight"] - 1.6, 1e-4)

    def test_exact_posteriors_are_merged_by_means_alone(self):
        found = br.merge(one(0.0).exact(), [one(1.0).exact(), one(3.0).exact()], 0.5, "task_arithmetic")
        assert found.mean["w"].item() == 2.0 and found.precision["w"].isinf().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: br.merge(one(), []), "takes at least one posterior, and a name for each; got 0"),
            (lambda: br.merge(one(), [one()], names=["a", "b"]), "got 1 and ('a', 'b')"),
            (lambda: br.merge(one(), [one()], [1.0, 1.0]), "there are 1 models and 2 alphas"),
            (lambda: br.merge(one(), [one()], method="soup"), "unknown method 'soup'"),
            (lambda: br.merge(one(), [one()], prior_precision=0.0), "prior_precision must be a number > 0, got 0.0"),
            (
                lambda: br.merge(None, [one()]),
                "gradient_matching needs the precision of the base, which has none; pass prior_precision",
            ),
            (lambda: br.merge(one().exact(), [one()]), "gradient_matching needs the precision of the base"),
            (lambda: br.merge(one(), [one().exact()]), "gradient_matching needs the precisions of all models"),
            (
                lambda: br.merge(None, [one()], method="ties"),
                "ties adds task vectors to a base; pass one, or choose method='linear'",
            ),
            (
                lambda: br.merge(
                    None, [one(prior_mean={"w": torch.tensor(m)}, prior_precision={"w": torch.ones(1)}) for m in (0.0, 1.0)]
                ),
                "trained under priors with different means of 'w'; pass a base",
            ),
            (
                lambda: br.merge(one(), [one(), of("w", 2)], names=["a", "b"]),
                "'w' is [1] in base and [2] in 'b'",
            ),
            (
                lambda: br.merge(one(), [br.Posterior({"v": torch.zeros(1)}, {"v": torch.ones(1)})]),
                "'v' is in 'posteriors[0]' and not",
            ),
            (
                lambda: br.merge(one(0.0, 1.0), [one(1.0, 3.0)], -1.0, names=["toxic"]),
                "removing 'toxic' leaves 1 of 1 precisions non-positive; its Hessian exceeds the total. Lower alpha (-0.499 would",
            ),
        ],
    )
    def test_messages(self, call, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()

    def test_warnings_come_once_and_from_the_call(self):
        models = [one(1.0, 2.0), one(1.0, 1e9)]
        with pytest.warns(UserWarning, match="were both multiplied by their dataset size") as caught:
            br.merge(one(), models)
        assert [w.filename for w in caught] == [__file__]

    def test_a_merger_takes_any_weights(self):
        merger = Merger(one(), [one(1.0, 3.0)], METHODS["gradient_matching"])
        assert [merger([a]).mean["w"].item() for a in (0.0, 1.0)] == [0.0, 1.0]
