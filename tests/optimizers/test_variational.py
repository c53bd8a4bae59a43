"""IVON against its published trajectories, and what must hold for any problem."""

import json
import math
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.instances import ALGORITHMS, PROBLEMS, SMALL_IVON, Network, Quadratic, draw, flat, named, replay, state, train
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bayesrule as br

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    case["name"]: (json.loads(path.read_text())["problems"], case)
    for path in (GOLDEN / "ivon_price.json", GOLDEN / "ivon_gradsq.json")
    for case in json.loads(path.read_text())["cases"]
}
APPROXIMATIONS = [
    pytest.param(dict(hess_approx="price"), id="price"),
    pytest.param(dict(hess_approx="gradsq", gradsq_scale=8.0), id="gradsq"),
]
SIGNS = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
"""Four draws of three normals with exactly zero mean and unit covariance: E_q is exact on a quadratic."""


def one_weight(value: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=dtype))


def step_with(optimizer: br.IVON, *gradients: Tensor) -> None:
    """One step whose draws bring these gradients, each for all weights in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for gradient in gradients:
        with optimizer.sampled_params(train=True):
            for p, piece in zip(params, gradient.split([p.numel() for p in params]), strict=True):
                p.grad = piece.to(p.dtype).reshape(p.shape).clone()
    optimizer.step()


def seen_curvature(before: float, after: Tensor, decay: float, rho: float) -> Tensor:
    """The f that moved h from `before` to `after`: the retraction solved for it."""
    before = torch.as_tensor(before, dtype=after.dtype)
    metric = before + decay
    return before + metric / rho * ((1 + 2 * (after - before) / metric).sqrt() - 1)


class TestGolden:
    """The published code's trajectories, with its own draws of noise."""

    @pytest.mark.parametrize("name", CASES)
    def test_same_weights_momentum_curvature_and_samples(self, name):
        problems, case = CASES[name]
        dtype = getattr(torch, case["dtype"])
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        problem = problems[case["problem"]]

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        params = {name: nn.Parameter(tensor(values)) for name, values in problem["init"].items()}
        optimizer, hand_noise = self.optimizer(case, params)

        def loss(step: int) -> Tensor:
            if case["problem"] == "quadratic":
                gap = params["x"] - tensor(problem["c"])
                return gap @ tensor(problem["A"]) @ gap / 2
            rows = problem["batches"][step]
            hidden = torch.tanh(tensor(problem["x"])[rows] @ params["w1"].T + params["b1"])
            logits = (hidden @ params["w2"].T + params["b2"]).squeeze(-1)
            return binary_cross_entropy_with_logits(logits, tensor(problem["y"])[rows])

        def check(found: Tensor, expected: object) -> None:
            torch.testing.assert_close(found.detach(), tensor(expected), rtol=tolerance, atol=tolerance)

        for number, step in enumerate(case["steps"]):
            for group in optimizer.param_groups:
                group["lr"] = step.get("lr", group["lr"])
            for sample in step["samples"]:
                hand_noise(sample["eps"])
                with optimizer.sampled_params(train=True):
                    for key, p in params.items():
                        check(p, sample["theta"][key])
                    optimizer.zero_grad()
                    loss(number).backward()
            optimizer.step()
            for key, p in params.items():
                check(p, step["after"]["params"][key])
                check(optimizer.state[p]["momentum"], step["after"]["momentum"][key])
                check(optimizer.state[p]["hess"], step["after"]["hess"][key])

    @staticmethod
    def optimizer(case, params):
        """IVON as the case says, and where to put the next draw's unit normals."""

        def ours(hyper: dict) -> dict:
            hyper = {key: math.inf if value == "inf" else value for key, value in hyper.items()}
            betas = hyper.pop("beta1", default[0]), hyper.pop("beta2", default[1])
            return {**hyper, "betas": betas}

        default = case["hyper"].get("beta1", 0.9), case["hyper"].get("beta2", 0.99999)
        hyper = {"hess_init": 1.0, **ours(case["hyper"])}
        groups = [{**ours(g), "params": [params[key] for key in g["params"]]} for g in case.get("groups", [])]
        normals: dict[int, Tensor] = {}

        def hand_noise(eps: dict) -> None:
            normals.update({id(params[key]): params[key].new_tensor(values) for key, values in eps.items()})

        return br.IVON(groups or params.values(), noise=lambda p: normals[id(p)], **hyper), hand_noise


def test_all_golden_cases_are_here():
    assert len(CASES) == 13 + 5
    assert {case["dtype"] for _, case in CASES.values()} == {"float32", "float64"}


class TestHalfBound:
    """h + delta at most halves in a step, whatever gradients come."""

    @staticmethod
    def check(gradients: list[list[float]], *, beta2: float, dtype: torch.dtype, **hyper: object) -> None:
        w = nn.Parameter(torch.zeros(3, dtype=dtype))
        decay, hess_init = 0.01, 0.3
        options = dict(lr=0.0, ess=1e4, hess_init=hess_init, betas=(0.9, beta2), weight_decay=decay)
        optimizer = br.IVON([w], **{**options, **hyper})
        before = torch.full((3,), hess_init, dtype=dtype) + decay
        for gradient in gradients:
            step_with(optimizer, torch.tensor(gradient, dtype=dtype))
            after = optimizer.state[w]["hess"] + decay
            assert (after >= before / 2 - 1e-6 * (before + decay)).all()
            assert after.isfinite().all()
            before = after

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(
        gradients=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
        beta2=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]),
        approximation=st.sampled_from(["price", "gradsq"]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 100),
    )
    def test_holds_for_arbitrary_gradients(self, gradients, beta2, approximation, dtype, seed):
        self.check(gradients, beta2=beta2, dtype=dtype, hess_approx=approximation, seed=seed)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rho", [1.0, 0.5, 0.1, 1e-3])
    def test_holds_where_it_is_tight(self, rho, dtype):
        """The worst f is h - (h + delta) / rho; gradients against the noise reach it, again and again."""
        w = nn.Parameter(torch.zeros(4, dtype=dtype))
        decay, ess = 0.01, 1e4
        hyper = dict(lr=0.0, ess=ess, hess_init=0.3, betas=(0.9, 1 - rho), weight_decay=decay)
        optimizer = br.IVON([w], noise=torch.ones_like, **hyper)
        metric = torch.full((4,), 0.3, dtype=dtype) + decay
        first = metric.clone()
        for _ in range(20):
            worst = (metric - decay) - metric / rho
            step_with(optimizer, worst / (ess * metric).sqrt())  # f = sqrt(ess (h + delta)) eps g
            after = optimizer.state[w]["hess"] + decay
            assert (after >= metric / 2 - 1e-6 * (metric + decay)).all()
            assert (after > 0).all()
            metric = after
        assert (metric < first / 1000).all()  # so the bound was reached


class TestTwins:
    @pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
    @pytest.mark.parametrize("hess_init", [0.3, 1.0, 20.0])
    def test_is_sgd_when_curvature_is_frozen_and_noise_vanishes(self, problem, hess_init):
        ours, theirs = problem(), problem()
        hyper = dict(ess=1e30, betas=(0.0, 1.0), weight_decay=0.05, hess_init=hess_init)
        path = train(ours, br.IVON(ours.parameters(), lr=0.1, **hyper), 50, decay=0.99)
        twin = train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.05), 50, decay=0.99)
        torch.testing.assert_close(path, twin, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("debias", [True, False])
    def test_momentum_is_an_average_of_the_loss_gradient_that_starts_at_zero(self, debias):
        problem, beta, lr, decay = Network(), 0.8, 0.1, 0.05
        hyper = dict(lr=lr, ess=math.inf, betas=(beta, 1.0), weight_decay=decay, hess_init=0.3, debias=debias)
        path = train(problem, br.IVON(problem.parameters(), **hyper), 30)
        by_hand = Network()
        average = torch.zeros_like(path[0])
        for step in range(30):
            gradient = flat(torch.autograd.grad(by_hand.loss(step), list(by_hand.parameters())))
            average = beta * average + (1 - beta) * gradient
            seen = average / (1 - beta ** (step + 1)) if debias else average
            weights = flat(by_hand.parameters())
            nn.utils.vector_to_parameters(weights - lr * (seen + decay * weights), by_hand.parameters())
            torch.testing.assert_close(path[step], flat(by_hand.parameters()), rtol=1e-12, atol=1e-12)

    def test_momentum_without_debiasing_differs_from_torch_dampening_in_the_first_step(self):
        """torch starts its buffer at g, IVON at zero."""
        ours, theirs = Network(), Network()
        hyper = dict(ess=math.inf, betas=(0.8, 1.0), weight_decay=0.0, debias=False)
        start = flat(ours.parameters())
        mine = train(ours, br.IVON(ours.parameters(), lr=0.1, **hyper), 1)[0] - start
        dampened = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, dampening=0.2)
        torch.testing.assert_close(mine, 0.2 * (train(theirs, dampened, 1)[0] - start))


class TestCurvature:
    """What is averaged over noise estimates the diagonal of the Hessian of the mean loss."""

    def test_is_the_hessian_diagonal_of_a_quadratic_when_the_noise_averages_out(self):
        problem = Quadratic()
        hyper = dict(lr=0.0, ess=10.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.05, mc_samples=4)
        pieces = [piece for row in SIGNS for piece in (row[:2], row[2:])]
        optimizer = br.IVON(problem.parameters(), noise=replay(pieces), **hyper)
        train(problem, optimizer, 1)
        found = seen_curvature(0.5, state(optimizer, "hess"), 0.05, 0.1)
        torch.testing.assert_close(found, problem.A.diagonal(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("draws", [50, 800])
    def test_error_falls_with_the_root_of_the_draws(self, draws):
        problem, ess, decay, hess = Quadratic(), 10.0, 0.05, 0.5
        gap = flat(problem.parameters()) - problem.c
        hyper = dict(lr=0.0, ess=ess, hess_init=hess, betas=(0.9, 0.99), weight_decay=decay, mc_samples=draws)
        optimizer = br.IVON(problem.parameters(), **hyper, seed=5)
        train(problem, optimizer, 1)
        found = seen_curvature(hess, state(optimizer, "hess"), decay, 0.01)
        # f_i = eps_i (A gap)_i / sigma + sum_j A_ij eps_i eps_j, all sigma equal
        A, diagonal = problem.A, problem.A.diagonal()
        variance = (A @ gap) ** 2 * ess * (hess + decay) + (A**2).sum(1) + diagonal**2
        assert ((found - diagonal).abs() < 4 * (variance / draws).sqrt()).all()
        assert ((found - diagonal).abs() > 0).all()

    def test_gradsq_is_the_squared_gradient_times_ess_or_the_given_scale(self):
        gradient = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64)
        for scale, expected in ((None, 40.0), (8.0, 8.0)):
            w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            hyper = dict(lr=0.1, ess=40.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.05)
            optimizer = br.IVON([w], hess_approx="gradsq", gradsq_scale=scale, **hyper)
            step_with(optimizer, gradient)
            found = seen_curvature(0.5, optimizer.state[w]["hess"], 0.05, 0.1)
            torch.testing.assert_close(found, expected * gradient**2, rtol=1e-12, atol=1e-12)

    def test_gradsq_averages_squares_over_draws_and_does_not_square_the_average(self):
        w = one_weight()
        hyper = dict(lr=0.1, ess=40.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.05)
        optimizer = br.IVON([w], hess_approx="gradsq", gradsq_scale=2.0, **hyper)
        step_with(optimizer, torch.tensor([3.0]), torch.tensor([-1.0]))
        found = seen_curvature(0.5, optimizer.state[w]["hess"], 0.05, 0.1)
        assert found.item() == pytest.approx(2.0 * (9 + 1) / 2)

    def test_antithetic_pairs_are_mirror_images(self):
        problem = Network()
        optimizer = br.IVON(problem.parameters(), **SMALL_IVON, antithetic=True)
        mean = flat(problem.parameters())
        offsets = [draw(optimizer, problem) - mean for _ in range(4)]
        torch.testing.assert_close(offsets[0], -offsets[1], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(offsets[2], -offsets[3], rtol=1e-13, atol=1e-15)
        assert (offsets[0] - offsets[2]).abs().min() > 0

    @pytest.mark.slow
    def test_antithetic_pairs_make_the_curvature_far_less_noisy(self):
        def spread(antithetic: bool) -> Tensor:
            problem = Quadratic()
            hyper = dict(lr=0.0, ess=1e4, hess_init=0.5, weight_decay=0.05, mc_samples=2, antithetic=antithetic)
            found = []
            for seed in range(60):
                optimizer = br.IVON(problem.parameters(), betas=(0.9, 0.999), **hyper, seed=seed)
                train(problem, optimizer, 1)
                found.append(seen_curvature(0.5, state(optimizer, "hess"), 0.05, 0.001))
            return torch.stack(found).var(0)

        assert spread(True).sum() < spread(False).sum() / 100


class TestConvergence:
    def test_reaches_the_regularized_solution_of_a_quadratic(self):
        problem, decay = Quadratic(), 0.1
        optimizer = br.IVON(problem.parameters(), lr=0.3, ess=math.inf, weight_decay=decay, betas=(0.5, 0.9))
        train(problem, optimizer, 500)
        solution = torch.linalg.solve(problem.A + decay * torch.eye(3, dtype=torch.float64), problem.A @ problem.c)
        torch.testing.assert_close(flat(problem.parameters()), solution, rtol=1e-10, atol=1e-10)

    def test_reaches_it_with_noise_too_and_curvature_near_the_diagonal(self):
        problem, decay = Quadratic(), 0.1
        hyper = dict(lr=0.3, ess=100.0, weight_decay=decay, betas=(0.9, 0.995), mc_samples=2, antithetic=True)
        optimizer = br.IVON(problem.parameters(), **hyper)
        train(problem, optimizer, 800, decay=0.99)
        solution = torch.linalg.solve(problem.A + decay * torch.eye(3, dtype=torch.float64), problem.A @ problem.c)
        torch.testing.assert_close(flat(problem.parameters()), solution, rtol=0, atol=2e-3)
        torch.testing.assert_close(state(optimizer, "hess"), problem.A.diagonal(), rtol=0.2, atol=0.1)

    def test_its_fixed_point_is_the_best_mean_field_posterior(self):
        """analytic.json, mean_field_quadratic_fixed_point: the diagonal of the true precision, and the true mean."""
        problem = Quadratic()  # has the same A and c
        hyper = dict(lr=0.2, ess=10.0, weight_decay=0.05, betas=(0.5, 0.9), mc_samples=4)
        pieces = (piece for _ in range(300) for row in SIGNS for piece in (row[:2], row[2:]))
        optimizer = br.IVON(problem.parameters(), noise=replay(pieces), **hyper)
        train(problem, optimizer, 300)
        post = br.Posterior.from_optimizer(optimizer, problem)
        mean = torch.tensor([0.8959145617901338, -1.8128496355314458, 0.3297169011696896], dtype=torch.float64)
        precision = torch.tensor([20.5, 10.5, 5.5], dtype=torch.float64)
        torch.testing.assert_close(flat(post.mean.values()), mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flat(post.precision.values()), precision, rtol=1e-10, atol=1e-10)


class TestSteps:
    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(
        gradient=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
        clip_radius=st.floats(1e-6, 10),
        lr=st.floats(0, 10),
        rescale_lr=st.booleans(),
        hess_init=st.floats(1e-3, 10),
    )
    def test_no_weight_moves_further_than_rate_times_clip_radius(self, gradient, clip_radius, lr, rescale_lr, hess_init):
        w = nn.Parameter(torch.tensor([1.0, -3.0, 1e3], dtype=torch.float64))
        before = w.detach().clone()
        hyper = dict(ess=100.0, hess_init=hess_init, weight_decay=0.01)
        optimizer = br.IVON([w], lr=lr, clip_radius=clip_radius, rescale_lr=rescale_lr, **hyper)
        step_with(optimizer, torch.tensor(gradient, dtype=torch.float64))
        rate = lr * (hess_init + 0.01) if rescale_lr else lr
        assert ((w - before).abs() <= rate * clip_radius * (1 + 1e-12) + 1e-12).all()

    def test_beta2_one_freezes_the_curvature(self):
        problem = Network()
        optimizer = br.IVON(problem.parameters(), **{**SMALL_IVON, "betas": (0.9, 1.0)})
        train(problem, optimizer, 3)
        assert (state(optimizer, "hess") == SMALL_IVON["hess_init"]).all()

    def test_rescaling_uses_the_groups_own_curvature_and_decay(self):
        w, v = one_weight(), one_weight()
        groups = [{"params": [w], "hess_init": 0.5, "weight_decay": 0.1}, {"params": [v], "hess_init": 4.0}]
        optimizer = br.IVON(groups, lr=0.1, ess=math.inf, weight_decay=0.2, betas=(0.0, 1.0))
        step_with(optimizer, torch.tensor([1.0, 1.0]))
        # at init lr (hess_init + delta) g / (hess_init + delta) = lr g, whatever the group's numbers
        assert w.item() == pytest.approx(-0.1, rel=1e-12)
        assert v.item() == pytest.approx(-0.1, rel=1e-12)

    def test_infinite_ess_draws_no_noise_and_keeps_the_curvature(self):
        problem, quiet = Network(), Network()
        optimizer = br.IVON(problem.parameters(), **{**SMALL_IVON, "ess": math.inf})
        mean = flat(problem.parameters())
        assert torch.equal(draw(optimizer, problem), mean)
        optimizer.step()
        train(problem, optimizer, range(1, 10))
        assert (state(optimizer, "hess") == SMALL_IVON["hess_init"]).all()
        cold = br.IVON(quiet.parameters(), **{**SMALL_IVON, "ess": 1e30, "betas": (0.9, 1.0)})
        train(quiet, cold, 10)
        torch.testing.assert_close(flat(problem.parameters()), flat(quiet.parameters()), rtol=1e-11, atol=1e-12)

    def test_infinite_ess_keeps_the_curvature_with_gradsq(self):
        problem = Network()
        optimizer = br.IVON(problem.parameters(), **{**SMALL_IVON, "ess": math.inf}, hess_approx="gradsq")
        train(problem, optimizer, 5)
        assert flat(problem.parameters()).isfinite().all()
        assert (state(optimizer, "hess") == SMALL_IVON["hess_init"]).all()

    def test_a_group_with_noise_scale_zero_is_not_perturbed_but_learns(self):
        problem = Network()
        groups = [
            {"params": list(problem.inner.parameters())},
            {"params": list(problem.outer.parameters()), "noise_scale": 0},
        ]
        optimizer = br.IVON(groups, **SMALL_IVON)
        inner, outer = flat(problem.inner.parameters()), flat(problem.outer.parameters())
        with optimizer.sampled_params(train=True):
            assert torch.equal(flat(problem.outer.parameters()), outer)
            assert (flat(problem.inner.parameters()) != inner).all()
            problem.loss(0).backward()
        optimizer.step()
        assert (flat(problem.outer.parameters()) != outer).all()
        assert (optimizer.state[problem.outer.weight]["hess"] == SMALL_IVON["hess_init"]).all()
        post = optimizer.posterior(problem)
        assert post.precision["outer.bias"].isinf().all()
        assert post.precision["inner.bias"].isfinite().all()

    def test_a_quiet_group_takes_the_noise_of_no_other(self):
        """The noise of a tensor is its own: silencing one leaves the draws of the others."""
        loud, half = Network(), Network()
        both = br.IVON([{"params": [p]} for p in loud.parameters()], **SMALL_IVON)
        quiet = br.IVON([{"params": [p], "noise_scale": i % 2} for i, p in enumerate(half.parameters())], **SMALL_IVON)
        with both.sampled_params(train=False), quiet.sampled_params(train=False):
            assert torch.equal(loud.inner.bias, half.inner.bias)
            assert torch.equal(loud.outer.bias, half.outer.bias)
            assert not torch.equal(loud.outer.weight, half.outer.weight)


class TestNoise:
    def test_offsets_have_the_posteriors_spread(self):
        w = nn.Parameter(torch.zeros(20000, dtype=torch.float64))
        optimizer = br.IVON([w], lr=0.1, ess=50.0, hess_init=0.3, weight_decay=0.02)
        with optimizer.sampled_params(train=False):
            offset = w.detach().clone()
        sigma = 1 / math.sqrt(50 * 0.32)
        assert offset.mean().abs() < 4 * sigma / math.sqrt(20000)
        assert offset.std().item() == pytest.approx(sigma, rel=0.02)

    def test_the_seed_alone_decides_the_noise(self):
        def where(seed: int, disturb: int) -> Tensor:
            problem = Network()
            optimizer = br.IVON(problem.parameters(), **SMALL_IVON, seed=seed)
            torch.manual_seed(disturb)
            return draw(optimizer, problem)

        assert torch.equal(where(1, 0), where(1, 99))
        assert not torch.equal(where(1, 0), where(2, 0))

    def test_global_random_numbers_are_left_alone(self):
        problem = Network()
        optimizer = br.IVON(problem.parameters(), **SMALL_IVON)
        before = torch.get_rng_state()
        train(problem, optimizer, 2)
        assert torch.equal(torch.get_rng_state(), before)

    def test_every_step_draw_and_tensor_has_noise_of_its_own(self):
        a, b = (nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2))
        optimizer = br.IVON([a, b], lr=0.0, ess=1.0)
        rows = []
        for _ in range(2):
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    rows += [a.detach().clone(), b.detach().clone()]
                    (a.sum() + b.sum()).backward()
            optimizer.step()
        assert len({tuple(row.sign().tolist() + row.tolist()) for row in rows}) == 8
        assert len({x for row in rows for x in row.tolist()}) == 48


class TestPrior:
    """A Posterior as the prior."""

    @staticmethod
    def belief(problem: nn.Module, center: float, precision: float) -> br.Posterior:
        shapes = {name: p.detach() for name, p in problem.named_parameters()}
        return br.Posterior(
            {name: torch.full_like(p, center) for name, p in shapes.items()},
            {name: torch.full_like(p, precision) for name, p in shapes.items()},
        )

    @pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
    def test_an_isotropic_posterior_at_zero_is_the_isotropic_prior(self, problem):
        plain, other = problem(), problem()
        hyper = {**SMALL_IVON, "mc_samples": 2}
        one = br.IVON(plain.parameters(), **hyper)
        prior = self.belief(other, 0.0, hyper["ess"] * hyper["weight_decay"])
        two = br.IVON(other.parameters(), **{**hyper, "weight_decay": 7.0}, prior=prior)
        torch.testing.assert_close(train(plain, one, 30), train(other, two, 30), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state(one, "hess"), state(two, "hess"), rtol=1e-11, atol=1e-12)

    def test_without_data_it_pulls_the_mean_to_its_own(self):
        w = one_weight(5.0)
        prior = br.Posterior({"w": torch.tensor([2.0])}, {"w": torch.tensor([30.0])})
        optimizer = br.IVON([("w", w)], lr=0.1, ess=10.0, betas=(0.0, 0.9), hess_init=0.1, prior=prior)
        gaps = []
        for _ in range(200):
            step_with(optimizer, torch.zeros(1))
            gaps.append(abs(w.item() - 2.0))
        assert gaps[-1] < 1e-6
        assert all(later < earlier for earlier, later in pairwise(gaps[:50]))

    def test_the_second_task_ends_where_both_together_would(self):
        """Two quadratics with diagonal Hessians: there the mean-field posterior is exact, so Bayes adds up."""
        curves = torch.tensor([[2.0, 1.0, 0.5], [0.3, 3.0, 1.0]], dtype=torch.float64)
        centers = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 2.0]], dtype=torch.float64)
        sizes, decay = (10.0, 40.0), 0.05

        def learn(task: int, prior: br.Posterior | None) -> br.Posterior:
            model = nn.Module()
            model.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            hyper = dict(lr=0.2, ess=sizes[task], weight_decay=decay, betas=(0.5, 0.9), mc_samples=4)
            noise = replay(row for _ in range(250) for row in SIGNS)
            optimizer = br.IVON(model.named_parameters(), **hyper, prior=prior, noise=noise)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = (curves[task] * (model.w - centers[task]) ** 2).sum() / 2
                loss.backward()
                return loss

            for _ in range(250):
                optimizer.step(closure)
            return optimizer.posterior(model)

        both = learn(1, learn(0, None))
        precision = sizes[0] * decay + sizes[0] * curves[0] + sizes[1] * curves[1]
        mean = (sizes[0] * curves[0] * centers[0] + sizes[1] * curves[1] * centers[1]) / precision
        torch.testing.assert_close(both.precision["w"], precision, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(both.mean["w"], mean, rtol=1e-9, atol=1e-9)

    def test_is_matched_by_name_not_by_order(self):
        model = Network()
        named_prior = self.belief(model, 0.0, 1.0)
        shuffled = {name: torch.full_like(m, i) for i, (name, m) in enumerate(reversed(named_prior.mean.items()))}
        prior = br.Posterior(shuffled, {name: named_prior.precision[name] for name in shuffled})
        optimizer = br.IVON(model.named_parameters(), **SMALL_IVON, prior=prior)
        post = optimizer.posterior(model)
        for name, m in shuffled.items():
            assert torch.equal(post.prior_mean[name], m)

    def test_survives_saving_and_loading(self):
        straight, resumed = Network(), Network()
        prior = self.belief(straight, 0.3, 5.0)
        one = br.IVON(straight.parameters(), **SMALL_IVON, prior=prior)
        train(straight, one, 10)
        two = br.IVON(resumed.parameters(), **SMALL_IVON, prior=prior)
        train(resumed, two, 5)
        fresh = br.IVON(resumed.parameters(), **SMALL_IVON)
        fresh.load_state_dict(two.state_dict())
        train(resumed, fresh, range(5, 10))
        assert torch.equal(flat(straight.parameters()), flat(resumed.parameters()))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda mean: {k: v for k, v in mean.items() if k != "inner.bias"}, "3 tensors but the optimizer 4|inner"),
            (lambda mean: {**mean, "inner.bias": torch.zeros(9)}, "inner.bias.*shape"),
            (lambda mean: {k.replace("inner", "other"): v for k, v in mean.items()}, "no tensor 'inner.weight'"),
        ],
        ids=["missing", "shape", "name"],
    )
    def test_that_does_not_fit_is_refused(self, change, message):
        model = Network()
        mean = change({name: p.detach() for name, p in model.named_parameters()})
        prior = br.Posterior(mean, {name: torch.ones_like(m) for name, m in mean.items()})
        with pytest.raises(ValueError, match=message):
            br.IVON(model.named_parameters(), **SMALL_IVON, prior=prior)

    def test_that_is_certain_is_refused(self):
        model = Network()
        with pytest.raises(ValueError, match="infinite precision"):
            br.IVON(model.named_parameters(), **SMALL_IVON, prior=br.Posterior.point(model))


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.keeps == "precision"], ids=named)
def test_posterior_precision_is_ess_times_curvature_plus_decay(algorithm):
    problem = Network()
    optimizer = algorithm(problem.parameters())
    train(problem, optimizer, 3)
    group = optimizer.param_groups[0]
    expected = group["ess"] * (state(optimizer, optimizer.names.hess) + group["weight_decay"])
    torch.testing.assert_close(flat(optimizer.posterior(problem).precision.values()), expected, rtol=1e-14, atol=0)


VISIBLE = {
    "evon": lambda p: br.EVON(p, 0.1, 50.0, 1.0),
    "bayesbinn": lambda p: br.BayesBiNN(p, 0.1, 50.0, natural_init=1.0),
    "iblr": lambda p: br.IBLR(p, 0.1, 50.0),
    "slang": lambda p: br.SLANG(p, 0.1, 50.0),
    "multi-ivon": lambda p: br.MultiIVON(p, 0.1, 50.0),
    "dropout": lambda p: br.Dropout(p, 0.1, p=0.5),
}


@pytest.mark.parametrize("kind", VISIBLE)
def test_visibility_is_by_the_variance_of_every_weight_where_weights_vary_together(kind):
    problem = Network(torch.float32)
    optimizer = VISIBLE[kind](problem.named_parameters())
    found = optimizer.noise_visibility(torch.bfloat16)
    assert set(found) <= {name for name, _ in problem.named_parameters()} and "inner.weight" in found
    assert found["inner.weight"] > 0.9
