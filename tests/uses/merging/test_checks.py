"""What is said of models that do not go together, and that blocks make no difference to it."""

import re
import warnings
from itertools import pairwise

import pytest
import torch

from bayesrule.uses.merging.checks import Checks, check_names, check_shape
from bayesrule.uses.merging.methods import METHODS, Piece, Place


def piece(mean, precision=None):
    return Piece(torch.as_tensor(mean), None if precision is None else torch.as_tensor(precision))


def checks_of(base, models, alphas, names=None, cuts=(), method="gradient_matching"):
    names = names or [f"model {i}" for i in range(len(models))]
    checks = Checks(METHODS[method], names, alphas)
    ends = [0, *cuts, len(base.mean)]
    for i, j in pairwise(ends):
        first, *rest = (Piece(p.mean[i:j], None if p.precision is None else p.precision[i:j]) for p in (base, *models))
        checks.update(first, rest, METHODS[method](first, rest, alphas, Place(0, i)))
    return checks


@pytest.mark.parametrize("method", ["gradient_matching", "fisher"])
@pytest.mark.parametrize("odd", [-0.01, float("nan"), float("inf")])
def test_precisions_that_are_none_are_named(method, odd):
    base, good = piece([0.0, 0.0], [1.0, 1.0]), piece([1.0, 1.0], [2.0, 2.0])
    with pytest.raises(ValueError, match=r"the precision of 'b' holds .*; measure it again"):
        checks_of(base, [good, piece([1.0, 1.0], [2.0, odd])], [0.9, 0.1], ["a", "b"], method=method)


class TestSigns:
    def random(self, seed=0, size=500):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(3, size, generator=generator, dtype=torch.float64)
        s = torch.rand(3, size, generator=generator, dtype=torch.float64)
        return Piece(means[0], 1 + s[0]), [Piece(means[1], 1 + s[0] + s[1]), Piece(means[2], 1 + s[0] + 2 * s[2])]

    @pytest.mark.parametrize("cuts", [(), (1,), (100, 101, 400)])
    def test_of_one_that_is_removed_the_largest_safe_weight_is_named(self, cuts):
        base, models = self.random()
        name, added = "toxic", models[1].precision - base.precision
        bad = int((base.precision <= 2 * added).sum())
        with pytest.raises(ValueError) as caught:
            checks_of(base, models[1:], [-2.0], [name], cuts).finish()
        message = str(caught.value)
        assert message.startswith(f"removing 'toxic' leaves {bad} of 500 precisions non-positive; its Hessian exceeds the total. ")
        safe = float(re.search(r"Lower alpha \((\S+) would be positive\)", message)[1])
        assert bad > 0 and (base.precision + safe * added > 0).all()
        assert not (base.precision + 1.01 * safe * added > 0).all()

    def test_of_several_the_factor_of_all(self):
        base, models = self.random()
        alphas = [0.5, -3.0]
        with pytest.raises(ValueError, match="removing 'b' leaves") as caught:
            checks_of(base, models, alphas, ["a", "b"]).finish()
        factor = float(re.search(r"Lower the alphas \((\S+) times these would be positive\)", str(caught.value))[1])
        change = sum(a * (m.precision - base.precision) for a, m in zip(alphas, models, strict=True))
        assert (base.precision + factor * change > 0).all() and not (base.precision + 1.01 * factor * change > 0).all()

    @pytest.mark.parametrize(
        ("base", "model", "alpha", "message"),
        [
            (1.0, 3.0, -0.5, r"removing 'a' leaves 1 of 1 .* \(-0.499 would be positive\) or supply the precision of a base"),
            (9.0, 3.0, 2.0, r"adding 'a' leaves 1 of 1 .*; the base's precision exceeds its own. Lower alpha \(1.49 would"),
            (0.0, 3.0, -1.0, "removing 'a' leaves 1 of 1 .* and no smaller alpha would help: supply the precision of a base"),
        ],
    )
    def test_messages(self, base, model, alpha, message):
        with pytest.raises(ValueError, match=message):
            checks_of(piece([0.0], [base]), [piece([1.0], [model])], [alpha], ["a"]).finish()

    @pytest.mark.parametrize(
        ("method", "base", "models", "alphas"),
        [
            ("gradient_matching", 5.0, [6.0, 7.0], [1.0, -1.0]),
            ("gradient_matching", 0.0, [0.0], [-1.0]),  # nothing was known, nothing is lost
            ("fisher", 9.0, [0.5, 0.0], [0.5, 0.5]),  # the base plays no part
            ("task_arithmetic", None, [None], [-1.0]),
        ],
    )
    def test_silent_where_all_is_well(self, method, base, models, alphas):
        first, *rest = (piece([0.5], None if s is None else [s]) for s in (base, *models))
        checks_of(first, rest, alphas, method=method).finish()


class TestScales:
    @pytest.mark.parametrize("factor", [1e6, 1e-6])
    @pytest.mark.parametrize("cuts", [(), (160, 320)])
    def test_precisions_of_another_scale(self, factor, cuts):
        s = torch.linspace(1, 2, 480)
        base, models = piece(torch.zeros(480), s * 0), [piece(torch.ones(480), s), piece(torch.ones(480), s * factor)]
        high, low = ("b", "a") if factor > 1 else ("a", "b")
        wanted = rf"median precision of '{high}' is 1e\+06 x that of '{low}'; were both multiplied by their dataset size\?"
        with pytest.warns(UserWarning, match=wanted):
            checks_of(base, models, [1.0, 1.0], ["a", "b"], cuts).finish()

    def test_the_median_does_not_mind_a_few(self):
        s = torch.ones(480)
        other = s.clone()
        other[:200] = 1e9
        checks_of(piece(s * 0, s), [piece(s, s), piece(s, other)], [1.0, 1.0]).finish()

    def test_medians_are_exact_to_a_hundredth(self):
        s = torch.ones(1600)
        checks = checks_of(
            piece(s * 0, s), [piece(s, s * 3), piece(s, torch.linspace(0, 2 * 4567, 1600) + 3)], [1.0, 1.0], ["a", "b"]
        )
        with pytest.warns(UserWarning, match=r"median precision of 'b' is 1.5e\+03 x that of 'a'"):
            checks.finish()


class TestKinship:
    def base(self, seed=0):
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))

    def test_a_model_from_another_base(self):
        base = piece(self.base())
        checks = checks_of(base, [piece(self.base(0) * 1.1), piece(self.base(1))], [1.0, 1.0], ["a", "b"], method="task_arithmetic")
        wanted = (
            r"'b' has little to do with the base \(relative distance 1.5, cosine -0.082\); was it fine-tuned from another one\?"
        )
        with pytest.warns(UserWarning, match=wanted) as caught:
            checks.finish()
        assert len(caught) == 1

    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(lambda base: base + torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) / 4, id="tuned"),
            pytest.param(lambda base: base * 3, id="far but alike"),
            pytest.param(torch.zeros_like, id="zero"),
        ],
    )
    def test_silent_where_it_is_related(self, model):
        base = self.base()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checks_of(piece(base), [piece(model(base))], [1.0], method="task_arithmetic").finish()

    def test_vectors_say_nothing(self):
        base, other = self.base(0)[0], self.base(1)[0]
        checks_of(piece(base), [piece(other * 9)], [1.0], method="task_arithmetic").finish()


class TestNamesAndShapes:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["w"], "'v' is in 'base' and not in 'a'; models to merge have the same tensors"),
            (["v", "w", "x"], "'x' is in 'a' and not in 'base'"),
        ],
    )
    def test_names(self, names, message):
        with pytest.raises(ValueError, match=message):
            check_names(["v", "w"], {"a": names})

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"'embed.weight' is \[32000, 4096\] in base and \[32016, 4096\] in 'b'"):
            check_shape("embed.weight", (32000, 4096), {"a": torch.Size((32000, 4096)), "b": (32016, 4096)})

    def test_silent_where_they_agree(self):
        check_names(["v", "w"], {"a": {"w": 1, "v": 2}})
        check_shape("w", [2, 3], {"a": torch.Size((2, 3))})
