"""EVON walks as the published code does, and turns with the problem."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import bayesrule as br
from bayesrule.algorithms.trajectories import Trajectory
from bayesrule.bases import Basis

GOLDEN = Path(__file__).parents[1] / "golden"
READ = [json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("evon", "evon_variants")]
CASES = {case["name"]: (case, read["problems"][case["problem"]]) for read in READ for case in read["cases"]}


def ours(t: Trajectory) -> br.EVON:
    """The optimizer of a case, in our names."""
    hyper = dict(t.hyper)
    if not hyper.pop("sampling"):
        hyper["ess"] = math.inf
    hyper["betas"] = tuple(hyper["betas"])
    hyper["shampoo_beta"] = None if hyper["shampoo_beta"] == -1 else hyper["shampoo_beta"]
    return br.EVON(t.params.values(), whiten=hyper.pop("whiten_prec_grad"), compat=True, noise=t.noise, **hyper)


def axes(t: Trajectory, values: list) -> list[torch.Tensor | None]:
    return [None if value is None else t.tensor(value) for value in values]


@pytest.mark.parametrize("name", CASES)
def test_same_places_weights_and_state_as_the_published_code(name):
    """Signs of eigenvectors are arbitrary, and the published ones have float32 accuracy: after a step they replace ours."""
    t = Trajectory(*CASES[name])
    optimizer = ours(t)
    samples = iter([sample for step in t.case["steps"] for sample in step["samples"]])
    near = dict(rtol=1e-7, atol=1e-7)

    def at_each() -> None:
        for key, place in next(samples)["theta"].items():
            torch.testing.assert_close(t.params[key].detach(), t.tensor(place), **near)

    for step, loss in t.walk(optimizer, at_each):
        published = sum(sample["loss"] for sample in step["samples"]) / len(step["samples"])
        torch.testing.assert_close(loss, t.tensor(published), **near)
        for key, p in t.params.items():
            state, expected = optimizer.state[p], step["after"]["state"][key]
            torch.testing.assert_close(p.detach(), t.tensor(step["after"]["params"][key]), **near)
            torch.testing.assert_close(state["hess"], t.tensor(expected["h"]), **near)
            assert int(state["step"]) - bool(t.hyper.get("max_precond_dim", 1)) == expected["step"]
            for found, wanted in zip(state.get("statistics", [None] * p.dim()), axes(t, expected["GG"]), strict=True):
                torch.testing.assert_close(found, wanted, **near) if wanted is not None else None
                assert (found is None) == (wanted is None)
            mine, theirs = (
                Basis(optimizer.wide(p), basis) for basis in (state.get("basis", [None] * p.dim()), axes(t, expected["Q"]))
            )
            for q, r in zip(mine.axes, theirs.axes, strict=True):
                if q is not None:  # of small eigenvalues float32 does not know the vectors
                    assert float((q[:, 0] @ r[:, 0]).abs()) > 1 - 1e-4
            state["momentum"].copy_(theirs.turn(mine.back(state["momentum"])))
            torch.testing.assert_close(state["momentum"], t.tensor(expected["exp_avg"]), **near)
            state["basis"] = list(theirs.axes)


def test_all_published_cases_are_here():
    assert len(CASES) == 6 + 6


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Network(torch.nn.Module):
    """Matrices, a tensor of four axes, vectors and a number."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = dict(inner=(5, 4), outer=(3, 5), kernel=(2, 3, 2, 2), bias=(3,), scale=())
        for name, shape in shapes.items():
            self.register_parameter(
                name, torch.nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype))
            )
        self.x = torch.randn(24, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(3, (24,), generator=generator)

    def loss(self, step: int = 0) -> torch.Tensor:
        rows = slice(step % 3 * 8, step % 3 * 8 + 8)
        logits = torch.tanh(self.x[rows] @ self.inner.T) @ self.outer.T * (1 + self.scale) + self.bias
        return torch.nn.functional.cross_entropy(logits, self.y[rows]) + (self.kernel - 0.3).square().mean()


HYPER = dict(lr=0.05, ess=100.0, hess_init=0.5, betas=(0.9, 0.95), weight_decay=0.01, precondition_frequency=3, whiten=False)


def learn(model: Network, optimizer: br.BayesOptimizer, steps: int, begin: int = 0) -> torch.Tensor:
    for step in range(begin, begin + steps):
        with optimizer.sampled_params(train=True):
            model.loss(step).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestInvariants:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rotating_the_problem_rotates_the_path(self, side):
        """loss(R W) or loss(W R), from a start that is rotated back, with the noise in the basis."""
        generator = torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        start, target = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        a, b = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))

        def loss(w: torch.Tensor) -> torch.Tensor:
            return (a @ (w - target) @ b).square().mean() + (w - target).pow(4).mean()

        def there(w: torch.Tensor) -> torch.Tensor:
            return turn @ w if side == "left" else w @ turn

        plain = torch.nn.Parameter(start.clone())
        turned = torch.nn.Parameter(turn.T @ start if side == "left" else start @ turn.T)
        paths = []
        for w, seen in ((plain, lambda w: w), (turned, there)):
            # until there is a basis, noise would be in coordinates that are not rotated
            optimizer = br.EVON([w], **{**HYPER, "phasing": True, "ess": 1e6, "lr": 0.02})
            path = []
            for _ in range(20):
                optimizer.step(lambda w=w, seen=seen: loss(seen(w)).backward())
                path.append(seen(w.detach()).clone())
                state = optimizer.state[w]
                for i, q in enumerate(state["basis"]):  # a sign for each vector, the same in both
                    other = turn @ q if seen is there and (i == 0) == (side == "left") else q
                    other = turn.T @ q if seen is there and side == "right" and i == 1 else other
                    sign = other.sum(0).sign()
                    state["basis"][i] = q * sign
                    shape = (-1, 1) if i == 0 else (1, -1)
                    state["momentum"].mul_(sign.view(shape))
            paths.append(torch.stack(path))
        torch.testing.assert_close(paths[0], paths[1], rtol=1e-6, atol=1e-6)

    def test_bases_stay_orthonormal_and_find_the_eigenvectors(self):
        model = Network()
        optimizer = br.EVON(model.parameters(), **{**HYPER, "shampoo_beta": 0.9, "precondition_frequency": 1})
        learn(model, optimizer, 60)
        state = optimizer.state[model.inner]
        for q, moments in zip(state["basis"], state["statistics"], strict=True):
            torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), rtol=0, atol=1e-12)
            turned = q.T @ moments @ q
            assert (turned - turned.diag().diag()).norm() < 0.2 * turned.norm()

    def test_a_new_basis_leaves_the_momentum_where_it_points(self):
        """A run whose bases move in its third step, and one whose bases stay."""
        momenta, bases = [], []
        for frequency in (3, 10**6):
            model = Network()
            optimizer = br.EVON(model.parameters(), **{**HYPER, "precondition_frequency": frequency, "shampoo_beta": 0.5})
            learn(model, optimizer, 3)
            state = optimizer.state[model.inner]
            bases.append(state["basis"][0])
            momenta.append(Basis(model.inner.shape, state["basis"]).back(state["momentum"]))
        assert (bases[0] - bases[1]).abs().max() > 0.1
        torch.testing.assert_close(momenta[0], momenta[1], rtol=1e-12, atol=1e-13)

    def test_of_a_kronecker_quadratic_it_recovers_the_full_covariance(self):
        """In the exact basis, at mirrored draws of one unit: there the estimate has no noise."""
        generator = torch.Generator().manual_seed(5)
        left, right = (
            factor @ factor.T + 0.2 * torch.eye(len(factor), dtype=factor.dtype)
            for factor in (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        )
        signs = itertools.cycle([1.0, -1.0])
        w = torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        hyper = {**HYPER, "precondition_frequency": 10**6, "eps": 0.0, "mc_samples": 2, "betas": (0.9, 0.5)}
        optimizer = br.EVON([w], **hyper, noise=lambda p: torch.full_like(p, next(signs)))
        for step in range(80):
            optimizer.step(lambda: ((w * (left @ w @ right)).sum() / 2).backward())
            if step == 0:
                optimizer.state[w]["basis"] = [torch.linalg.eigh(factor)[1] for factor in (left, right)]
        values = torch.outer(torch.linalg.eigvalsh(left), torch.linalg.eigvalsh(right))
        torch.testing.assert_close(optimizer.state[w]["hess"], values, rtol=1e-10, atol=1e-10)
        turn = torch.kron(*optimizer.state[w]["basis"])
        variances = 1 / (100.0 * (optimizer.state[w]["hess"] + 0.01))
        wanted = 100.0 * (torch.kron(left, right) + 0.01 * torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(turn @ variances.flatten().diag() @ turn.T, wanted.inverse(), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        "hyper",
        [{}, dict(phasing=True), dict(merge_dims=True, max_precond_dim=6), dict(precondition_1d=True), dict(whiten=True)],
        ids=str,
    )
    def test_a_run_goes_on_from_its_state_bit_by_bit(self, hyper):
        whole, first, second = Network(), Network(), Network()
        once, begun = (br.EVON(m.parameters(), **{**HYPER, **hyper}) for m in (whole, first))
        wanted = learn(whole, once, 10)
        learn(first, begun, 5)
        goes_on = br.EVON(second.parameters(), **{**HYPER, **hyper})
        file = io.BytesIO()
        torch.save((first.state_dict(), begun.state_dict()), file)
        file.seek(0)
        for part, state in zip((second, goes_on), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert torch.equal(learn(second, goes_on, 5, 5), wanted)

    def test_state_keeps_its_precision_where_weights_have_less(self):
        model = Network(torch.bfloat16)
        optimizer = br.EVON(model.parameters(), **HYPER)
        learn(model, optimizer, 4)
        again = br.EVON(model.parameters(), **HYPER)
        again.load_state_dict(optimizer.state_dict())
        for p in model.parameters():
            for name in ("hess", "momentum"):
                assert again.state[p][name].dtype == torch.float32
                assert torch.equal(again.state[p][name], optimizer.state[p][name])
            for mine, theirs in zip(again.state[p]["basis"], optimizer.state[p]["basis"], strict=True):
                assert mine is None if theirs is None else (mine.dtype == torch.float32 and torch.equal(mine, theirs))

    def test_a_look_is_never_at_the_mean(self):
        model = Network()
        optimizer = br.EVON(model.parameters(), **HYPER, phasing=True)
        for step in range(4):
            before = model.inner.detach().clone()
            with optimizer.sampled_params(train=False):
                assert not torch.equal(model.inner, before)
            assert torch.equal(model.inner, before)
            clean = step % 2 == 0
            with optimizer.sampled_params(train=True):
                assert torch.equal(model.inner, before) == clean
                model.loss(step).backward()
            optimizer.step()

    def test_draws_have_the_covariance_of_the_basis(self):
        """(Q_R x Q_L) diag(1 / (ess (h + delta))) (Q_R x Q_L)^T."""
        w = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        optimizer = br.EVON([w], **{**HYPER, "precondition_frequency": 1})
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            slope = torch.randn(2, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.3])
            optimizer.step(lambda slope=slope: (w * slope).sum().backward())
        state, draws = optimizer.state[w], []
        for _ in range(2000):
            with optimizer.sampled_params(train=False):
                draws.append(w.detach().flatten().clone())
        left, right = state["basis"]
        turn = torch.kron(left, right)
        wanted = turn @ (1 / (100.0 * (state["hess"] + 0.01))).flatten().diag() @ turn.T
        found = torch.stack(draws).T.cov()
        assert (found - wanted).norm() < 0.1 * wanted.norm()
        assert (wanted - wanted.diag().diag()).norm() > 0.05 * wanted.norm()


class TestMisuse:
    @pytest.mark.parametrize(
        "bad",
        [
            dict(hess_init=0.0),
            dict(precondition_frequency=0),
            dict(max_precond_dim=-1),
            dict(price_clip_ratio=0.0),
            dict(shampoo_beta=1.0),
        ],
    )
    def test_hyperparameters_are_held_to_their_ranges(self, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"EVON: parameter group 0: {name} must be .*, got"):
            br.EVON([torch.nn.Parameter(torch.ones(2, 2))], **{**HYPER, **bad})

    @pytest.mark.parametrize("hyper", [{}, dict(merge_dims=True, max_precond_dim=40), dict(precondition_1d=True)], ids=str)
    def test_the_posterior_draws_what_the_optimizer_draws(self, hyper, tmp_path):
        """The covariance of a weight in rows: that of steps through the bases, by unit normals in the basis."""
        model = Network()
        optimizer = br.EVON(model.parameters(), **HYPER, **hyper)
        learn(model, optimizer, 5)
        post = optimizer.posterior(model, num_data=7)
        assert "eigen" in post.structure and post.num_data == 7
        eps = {name: normal(3, *p.shape) for name, p in model.named_parameters()}
        offsets = post.sqrt_matvec(eps)
        for name, p in model.named_parameters():
            spread = (HYPER["ess"] * (optimizer.state[p]["hess"] + optimizer.defaults["weight_decay"])).rsqrt()
            axes = optimizer.state[p]["basis"]
            expected = Basis(optimizer.wide(p), axes).back(spread * eps[name])
            close(offsets[name], expected)
        post.save(tmp_path / "p.safetensors")
        again = br.Posterior.load(tmp_path / "p.safetensors")
        for name, value in post.sample(0).items():
            close(again.sample(0)[name], value)

    def test_without_noise_the_posterior_is_the_mean(self):
        model = Network()
        optimizer = br.EVON(model.parameters(), **{**HYPER, "ess": math.inf})
        learn(model, optimizer, 3)
        post = optimizer.posterior(model)
        assert all(s.isinf().all() for s in post.precision.values())
        assert all(torch.equal(value, post.mean[name]) for name, value in post.sample(0).items())

    def test_axes_that_are_too_long_keep_their_coordinates(self):
        model = Network()
        with pytest.warns(UserWarning, match=r"EVON: 2 of 3 matrices have axes longer than max_precond_dim=4, up to 5: these axes"):
            optimizer = br.EVON(model.parameters(), **HYPER, max_precond_dim=4)
        learn(model, optimizer, 3)
        assert [q is None for q in optimizer.state[model.inner]["basis"]] == [True, False]
        assert [q is None for q in optimizer.state[model.kernel]["basis"]] == [False, False, False, False]

    def test_state_of_another_shape_is_refused(self):
        model, wider = Network(), Network()
        optimizer = br.EVON(model.parameters(), **HYPER)
        learn(model, optimizer, 2)
        saved = optimizer.state_dict()
        saved["state"][0]["basis"] = [torch.eye(2), torch.eye(4)]
        with pytest.raises(ValueError, match="basis of parameter 0"):
            br.EVON(wider.parameters(), **HYPER).load_state_dict(saved)


@pytest.mark.parametrize("way", ["context", "attached", "step"])
def test_autocast_around_a_draw_or_a_step_changes_no_weight(way):
    """Products with bases are not of a forward pass."""

    def trained(way: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, x = torch.nn.Linear(6, 4), torch.randn(8, 6)
        optimizer = br.EVON(model.parameters(), lr=0.1, ess=100.0, hess_init=0.5, precondition_frequency=2)
        cast, plain = torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)
        if way == "attached":
            optimizer.attach(model)
        for _ in range(5):
            with cast if way == "context" else plain, optimizer.sampled_params(train=True) if way != "attached" else plain, cast:
                loss = model(x).square().mean()
            loss.backward()
            with cast if way == "step" else plain:
                optimizer.step()
        return [*model.parameters(), *(state["hess"] for state in optimizer.state.values())]

    assert all(map(torch.equal, trained(way), trained("outside")))


REST = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


class TestGroupsOfAdamW:
    """Embeddings and the rest move as in AdamW, in the same optimizer."""

    def model(self) -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 7)).double()

    def optimizer(self, model: torch.nn.Module, **more: object) -> br.EVON:
        groups = br.split_matrices(model, exclude=["2"], **REST)
        return br.EVON(groups, **{**HYPER, "ess": 1e30, "lr": 0.0, **more})

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, place: int) -> None:
        x = torch.arange(7) if place else torch.arange(3)
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True) if isinstance(optimizer, br.EVON) else contextlib.nullcontext():
            torch.nn.functional.cross_entropy(model(x), (x + 1) % 7).backward()
        optimizer.step()

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"phasing": True},
            {"compat": True},
            {"max_precond_dim": 0},
            {"debias_beta2": True, "correct_bias": False},
            {"whiten": True, "adjust_lr_fn": "original"},
            {"hess_approx": "gradsq", "clip_radius": 1e-3},
        ],
        ids=str,
    )
    def test_they_move_as_adamw_moves_them(self, more):
        ours, theirs = self.model(), self.model()
        optimizer = self.optimizer(ours, **more)
        decays, plain = [theirs[0].weight, theirs[2].weight], [theirs[1].bias, theirs[2].bias]
        twin = torch.optim.AdamW([{"params": decays}, {"params": plain, "weight_decay": 0.0}], **REST)
        for place in range(5):
            self.step(ours, optimizer, place)
            self.step(theirs, twin, place)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(p, q)

    def test_they_have_no_spread(self):
        model = self.model()
        optimizer = self.optimizer(model)
        self.step(model, optimizer, 1)
        known = {name: bool(s.isinf().all()) for name, s in optimizer.posterior(model).precision.items()}
        assert known == {"0.weight": True, "1.weight": False, "1.bias": True, "2.weight": True, "2.bias": True}

    def test_state_goes_on(self):
        one, two = self.model(), self.model()
        first, second = self.optimizer(one, lr=0.1), self.optimizer(two, lr=0.1)
        for place in range(3):
            self.step(one, first, place)
        two.load_state_dict(one.state_dict())
        second.load_state_dict(first.state_dict())
        for model, optimizer in ((one, first), (two, second)):
            self.step(model, optimizer, 3)
        assert all(map(torch.equal, one.parameters(), two.parameters()))

    @pytest.mark.parametrize("group", [{}, {"lr": 0.1, "noise_scale": 1}], ids=str)
    def test_they_need_a_rate_and_draw_nothing(self, group):
        params = list(self.model().parameters())
        with pytest.raises(ValueError, match="needs an lr of its own and draws nothing"):
            br.EVON([{"params": params, "adamw": True, **group}], **HYPER)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("size", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_one_curvature_for_all_in_the_coordinates_as_they_are_is_muon(size, shape):
    """Without Nesterov's step; both whiten in bfloat16, which has two to three digits."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = dict(hess_init=1.0, weight_decay=0.0, betas=(0.9, 1.0), ess=1e30, max_precond_dim=0, eps=0.0, correct_bias=False)
    optimizer = br.EVON([ours], lr=0.1, adjust_lr_fn=size, **one)
    twin = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=False, adjust_lr_fn=size or "original")
    scale = max(1, shape[0] / shape[1]) ** 0.5 if size is None else 1.0  # what "original" is in units of None
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad = None
        with optimizer.sampled_params(train=True):
            (ours * gradient).sum().backward()
        theirs.grad = gradient.clone()
        before = ours.detach().clone(), theirs.detach().clone()
        optimizer.step()
        twin.step()
        mine, muons = (ours.detach() - before[0]) * scale, theirs.detach() - before[1]
        assert (mine - muons).norm() < 0.06 * muons.norm()  # rounding, which five rounds amplify


@pytest.mark.parametrize("merge", [False, True])
def test_a_start_by_element_is_turned_to_the_first_basis(merge):
    """As the diagonal of the precision there; a number stays what it is."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(3, 4).double())
    starts = {"by element": {"w": torch.rand(3, 4).double()}, "a number": 0.7}
    for start in starts.values():
        one = dict(HYPER, merge_dims=merge, betas=(0.9, 1.0), hess_init=start, lr=0.0)
        optimizer = br.EVON([("w", w)], **one)
        with optimizer.sampled_params(train=True):
            (w * torch.randn(3, 4).double()).sum().backward()
        optimizer.step()
        basis, turned = optimizer.basis(next(iter(optimizer.layout.cells([w])))), []
        before = start["w"] if isinstance(start, dict) else torch.full((3, 4), start, dtype=torch.float64)
        for i in range(12):  # q^T diag(h) q of every direction of the basis
            unit = torch.zeros(12).double()
            unit[i] = 1
            direction = basis.back(unit.view(3, 4))
            turned.append((direction**2 * before).sum())
        close(optimizer.state[w]["hess"], torch.stack(turned).view(3, 4))


@pytest.mark.parametrize("how", [{}, dict(hess_approx="gradsq", gradsq_scale=8.0)], ids=str)
def test_a_group_without_noise_has_the_curvature_of_ivon_without_noise(how):
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3).double(), torch.randn(6, 4, 3).double()
    shared = dict(lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01, **how)
    mine, ivons = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = br.EVON([{"params": [mine], "noise_scale": 0}], max_precond_dim=0, whiten=False, eps=0.0, **shared)
    two = br.IVON([{"params": [ivons], "noise_scale": 0}], rescale_lr=False, **shared)
    for g in gradients:
        for w, optimizer in ((mine, one), (ivons, two)):
            with optimizer.sampled_params(train=True):
                (w * g).sum().backward()
            optimizer.step()
    close(mine, ivons)
    close(one.state[mine]["hess"], two.state[ivons]["hess"])


def test_a_size_of_whitened_steps_without_whitening_is_refused():
    with pytest.raises(ValueError, match="adjust_lr_fn is of whitened steps"):
        br.EVON([torch.nn.Parameter(torch.zeros(2, 2))], **HYPER, adjust_lr_fn="original")


def test_other_optimizers_have_no_groups_of_adamw():
    with pytest.raises(ValueError, match="IVON: parameter group 0 is for AdamW, which is a group of EVON's"):
        br.IVON([{"params": [torch.nn.Parameter(torch.zeros(2))], "adamw": True}], lr=0.1, ess=10.0)
