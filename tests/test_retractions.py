import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contracts import close, flat, normal, positive, symmetric

import bayesrule as br

GOLDEN = {case["name"]: case for case in json.loads((Path(__file__).parent / "golden" / "analytic.json").read_text())["cases"]}
BLR = [name for name in GOLDEN if name.startswith("blr_full_gaussian")]
IBLR = [name for name in GOLDEN if name.startswith("iblr_full_gaussian")]
LOGISTIC = [name for name in GOLDEN if "full_logistic" in name]
LETTER = {"natural": br.Natural(), "additive": br.Additive()}


def tensor(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gaussian(case, prefix="init") -> br.Full:
    return br.Full(tensor(case[f"{prefix}_mean"]), tensor(case[f"{prefix}_precision"]))


def wide(case) -> br.Full:
    """The prior of a case."""
    features = len(case["x"][0]) if "x" in case else len(case["c"])
    return br.Full(torch.zeros(features, dtype=torch.float64), case["prior_precision"])


def regression(case) -> br.Quadratic:
    X, y, variance = tensor(case["x"]), tensor(case["y"]), case["noise_variance"]
    return br.Quadratic(X.T @ X / variance, X.T @ y / variance)


@cache
def hermite() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return tensor(nodes), tensor(weights / weights.sum())


def expected_logistic(case, q: br.Full) -> br.Look:
    """E_q of gradient and Hessian of the summed logistic loss: an integral along each example's own logit."""
    X, y = tensor(case["x"]), tensor(case["y"])
    nodes, weights = hermite()
    deviation = ((X @ q.covariance) * X).sum(dim=1).sqrt()
    p = torch.sigmoid((X @ q.mean)[:, None] + deviation[:, None] * nodes)
    return br.Look(None, ((p @ weights) - y) @ X, X.T @ (X * ((p * (1 - p)) @ weights)[:, None]))


def logistic(case):
    X, y = tensor(case["x"]), tensor(case["y"])
    return lambda theta: torch.nn.functional.binary_cross_entropy_with_logits(X @ theta, y, reduction="sum")


def move(retraction, q, prior, look, alpha, rho=None, step=1):
    rates = br.Rates(alpha, alpha if rho is None else rho, step)
    return retraction.along(*retraction.direction(q, prior, look, rates), rates)


class TestGolden:
    """Closed forms and quadrature, computed apart from this library."""

    @pytest.mark.parametrize("retraction", LETTER.values(), ids=LETTER)
    @pytest.mark.parametrize("name", BLR)
    def test_the_rule_on_a_conjugate_model(self, name, retraction):
        case = GOLDEN[name]
        problem = GOLDEN[case["of"]]
        q, prior, loss = gaussian(case), wide(problem), regression(problem)
        rule = br.BayesRule(br.Delta(), br.Hessian(), retraction)
        for step in case["steps"]:
            q = rule.step(q, prior, loss, case["rho"])
            close(q.mean, tensor(step["mean"]), 1e-9)
            close(q.precision, tensor(step["precision"]), 1e-9)

    def test_one_step_of_rate_one_ends_at_the_exact_posterior(self):
        problem = GOLDEN["linear_regression_exact_posterior"]
        q = br.BayesRule(br.Delta(), br.Hessian(), br.Natural()).step(wide(problem), wide(problem), regression(problem))
        close(q.mean, tensor(problem["posterior_mean"]), 1e-9)
        close(q.precision, tensor(problem["posterior_precision"]), 1e-9)
        close(q.covariance, tensor(problem["posterior_covariance"]), 1e-9)

    @pytest.mark.parametrize("name", IBLR)
    def test_the_improved_rule_on_a_conjugate_model(self, name):
        case = GOLDEN[name]
        problem = GOLDEN[case["of"]]
        q, prior, loss = gaussian(case), wide(problem), regression(problem)
        rule = br.BayesRule(br.Delta(), br.Hessian(), br.Riemannian(mean_precision="old"))
        for step in case["steps"]:
            q = rule.step(q, prior, loss, case["rho"])
            close(q.mean, tensor(step["mean"]), 1e-9)
            close(q.precision, tensor(step["precision"]), 1e-9)
            close(torch.linalg.eigvalsh(q.precision).min(), tensor(step["min_eig"]), 1e-9)

    @pytest.mark.parametrize("retraction", LETTER.values(), ids=LETTER)
    def test_newtons_method_on_logistic_regression(self, retraction):
        case = GOLDEN["newton_logistic_delta_rho1"]
        q, prior = br.Full(tensor(case["init_mean"])), wide(case)
        rule = br.BayesRule(br.Delta(), br.Hessian(), retraction)
        for step in case["steps"]:
            q = rule.step(q, prior, br.Loss(logistic(case)))
            close(q.mean, tensor(step["mean"]), 1e-9)
            close(q.precision, tensor(step["precision_used"]), 1e-9)

    @pytest.mark.parametrize("name", LOGISTIC)
    def test_exact_expectations_on_logistic_regression(self, name):
        case = GOLDEN[name]
        retraction = br.Riemannian(mean_precision="old") if name.startswith("iblr") else br.Additive()
        prior = wide(case)
        q, done = br.Full(tensor(case["init_mean"]), tensor(case["init_precision"])).under(prior), 0
        for step in case["steps"]:
            while done < step["step"]:
                q, done = move(retraction, q, prior, expected_logistic(case, q), case["rho"]), done + 1
            close(q.mean, tensor(step["mean"]), 1e-9)
            close(q.precision, tensor(step["precision"]), 1e-9)
        assert done == 400

    @pytest.mark.parametrize("retraction", [br.Natural(), br.Additive(), br.Riemannian()], ids=lambda r: type(r).__name__)
    def test_the_mean_field_optimum_of_a_quadratic(self, retraction):
        """It has the posterior's mean and the diagonal of its precision."""
        case = GOLDEN["mean_field_quadratic_fixed_point"]
        A, ess = tensor(case["A"]), case["total_loss_scale"]
        prior = br.Diagonal(tensor([0, 0, 0]), tensor([case["prior_precision"] / ess] * 3), ess=ess)
        q = br.Diagonal(normal(0, 3), torch.ones(3, dtype=torch.float64), ess=ess)
        rule = br.BayesRule(br.Delta(), br.Hessian(), retraction)
        for _ in range(400):
            q = rule.step(q, prior, br.Quadratic(A, A @ tensor(case["c"])), 0.3)
        close(q.mean, tensor(case["mean"]), 1e-9)
        close(q.precision, tensor(case["precision"]), 1e-9)


class TestFixedPoints:
    @pytest.mark.parametrize("retraction", [br.Natural(), br.Additive(), br.Riemannian()], ids=lambda r: type(r).__name__)
    @pytest.mark.parametrize("rate", [0.1, 1.0])
    def test_all_retractions_rest_where_the_bound_is_stationary(self, retraction, rate):
        case = GOLDEN[LOGISTIC[0]]
        prior, end = wide(case), case["steps"][-1]
        q = br.Full(tensor(end["mean"]), tensor(end["precision"])).under(prior)
        moved = move(retraction, q, prior, expected_logistic(case, q), rate)
        close(moved.mean, q.mean, 1e-9)
        close(moved.precision, q.precision, 1e-9)

    def test_the_variational_optimum_is_not_the_mode(self):
        mode = tensor(GOLDEN["newton_logistic_delta_rho1"]["steps"][-1]["mean"])
        assert (tensor(GOLDEN[LOGISTIC[0]]["steps"][-1]["mean"]) - mode).abs().max() > 0.2


def full(seed, size=4, **more) -> br.Full:
    return br.Full(normal(seed, size), positive(seed + 10, size), **more)


def diagonal(seed, size=4, **more) -> br.Diagonal:
    return br.Diagonal(normal(seed, size), normal(seed + 10, size).abs() + 0.5, **more)


class TestRiemannian:
    @pytest.mark.parametrize("rho", [0.1, 0.7, 1.5])
    def test_a_full_precision_is_that_of_the_factor_form(self, rho):
        """S = L L^T, U = L^T + rho L^-1 E, S_new = (S + U^T U) / 2 with E the curvature less S."""
        q, curvature = full(0, weight_decay=0.25), symmetric(1, 4)
        L = torch.linalg.cholesky(q.metric)
        excess = curvature + q.weight_decay - q.metric
        U = L.T + rho * torch.linalg.solve_triangular(L, excess, upper=False)
        new = br.Riemannian().precision(q, curvature, rho).metric
        close(new, (q.metric + U.T @ U) / 2)
        close(new, new.T, 1e-14)

    @pytest.mark.parametrize("rho", [0.1, 0.7, 1.5])
    def test_a_diagonal_metric_is_half_itself_times_one_plus_a_square(self, rho):
        q, curvature = diagonal(0, weight_decay=0.25), 5 * normal(1, 4)
        e = (curvature - q.hess) / q.metric
        close(br.Riemannian().precision(q, curvature, rho).metric, q.metric / 2 * ((1 + rho * e) ** 2 + 1))

    def test_a_negative_curvature_that_breaks_additive_is_survived(self):
        q, curvature = full(0), -10 * torch.eye(4, dtype=torch.float64)
        with pytest.raises(ValueError, match="not positive definite"):
            br.Additive().precision(q, curvature, 0.5).entropy()
        assert br.Riemannian().precision(q, curvature, 0.5).entropy().isfinite()

    def test_a_conjugate_model_is_not_solved_in_one_step(self):
        q, A = full(0), positive(1, 4)
        left = br.Riemannian().precision(q, A, 1.0).metric - A
        close(left, (A - q.hess) @ q.metric.inverse() @ (A - q.hess) / 2)


SLOPED = {"additive": br.Additive, "riemannian": br.Riemannian}


@pytest.mark.parametrize("make", SLOPED.values(), ids=SLOPED)
class TestMean:
    """How mean and precision go together in the two retractions that scale by the precision."""

    @pytest.mark.parametrize("which", ["new", "old"])
    def test_is_moved_by_the_new_or_the_old_precision(self, make, which):
        q, prior = full(0, weight_decay=0.25), full(1)
        look = br.Look(None, normal(2, 4), positive(3, 4))
        moved = move(make(mean_precision=which), q, prior, look, 0.3, 0.2)
        by = moved.metric if which == "new" else q.metric
        close(moved.mean, q.mean - 0.3 * by.inverse() @ (look.gradient + prior.metric @ (q.mean - prior.mean)))

    def test_the_new_precision_is_the_default(self, make):
        assert make().mean_precision == "new"

    def test_each_rate_moves_its_own_part(self, make):
        q, prior, look = diagonal(0), diagonal(1), br.Look(None, normal(2, 4), normal(3, 4).abs())
        still = move(make(), q, prior, look, 0.0, 0.2)
        assert torch.equal(still.mean, q.mean)
        assert not torch.equal(still.metric, q.metric)
        frozen = move(make(), q, prior, look, 0.2, 0.0)
        close(frozen.metric, q.metric, 1e-15)
        close(frozen.mean, q.mean - 0.2 * (look.gradient + prior.metric * (q.mean - prior.mean)) / q.metric)

    def test_without_a_curvature_the_precision_stays(self, make):
        q, prior = diagonal(0), diagonal(1)
        moved = move(make(), q, prior, br.Look(None, normal(2, 4), None), 0.2)
        assert moved.hess is q.hess

    @pytest.mark.parametrize("radius", [1e-3, 0.5, 1.0])
    def test_clip_radius_bounds_each_element_before_the_rate(self, make, radius):
        q, prior, look = diagonal(0), diagonal(1), br.Look(None, 3 * normal(2, 4), normal(3, 4).abs())
        free, clipped = (move(make(radius), q, prior, look, 0.2, 0.1) for radius in (math.inf, radius))
        slope = (q.mean - free.mean) / 0.2
        assert (slope.abs() > radius).any()
        close(clipped.mean, q.mean - 0.2 * slope.clamp(-radius, radius))
        close(clipped.metric, free.metric, 0)

    def test_a_large_clip_radius_changes_nothing(self, make):
        q, prior, look = diagonal(0), diagonal(1), br.Look(None, normal(2, 4), normal(3, 4).abs())
        free, clipped = (move(make(radius), q, prior, look, 0.2) for radius in (math.inf, 1e6))
        assert torch.equal(free.mean, clipped.mean)

    def test_clipping_reaches_every_part_of_a_vector(self, make):
        def vector(seed):
            return br.Vector([normal(seed, 3), normal(seed + 50, 2, 2)])

        q = br.Diagonal(vector(0), vector(1) * 0 + 1)
        prior = br.Diagonal(vector(0) * 0, vector(1) * 0 + 1)
        moved = move(make(0.1), q, prior, br.Look(None, 100 * vector(2), None), 1.0)
        close(flat(q.mean - moved.mean).abs(), torch.full((7,), 0.1, dtype=torch.float64), 1e-14)

    def test_rates_may_be_tensors(self, make):
        """As compiled steps need them."""
        q, prior, look = diagonal(0), diagonal(1), br.Look(None, normal(2, 4), normal(3, 4).abs())
        one, other = (move(make(), q, prior, look, *rates) for rates in ((0.3, 0.2), (tensor(0.3), tensor(0.2))))
        close(one.mean, other.mean, 1e-14)
        close(one.metric, other.metric, 1e-14)


class TestSquareRoot:
    """s + rho (f - s), and a step against g / (sqrt(s) + eps)."""

    Q, PRIOR = diagonal(0), br.Diagonal(normal(1, 4), 0.3)
    LOOK = br.Look(None, normal(2, 4), normal(3, 4).square())
    PULL = 0.3 * (Q.mean - PRIOR.mean)
    S = 0.9 * Q.hess + 0.1 * LOOK.curvature

    def moved(self, retraction, step=1):
        return move(retraction, self.Q, self.PRIOR, self.LOOK, 0.2, 0.1, step)

    def test_plain(self):
        moved = self.moved(br.SquareRoot(eps=0.01))
        close(moved.hess, self.S)
        close(moved.mean, self.Q.mean - 0.2 * (self.LOOK.gradient + self.PULL) / (self.S.sqrt() + 0.01))

    @pytest.mark.parametrize("step", [1, 2, 10])
    def test_debiased(self, step):
        moved = self.moved(br.SquareRoot(eps=0.01, debias=True), step)
        close(moved.hess, self.S)  # what is stored stays raw
        scale = (self.S / (1 - 0.9**step)).sqrt() + 0.01
        close(moved.mean, self.Q.mean - 0.2 * (self.LOOK.gradient + self.PULL) / scale)

    def test_decoupled(self):
        moved = self.moved(br.SquareRoot(eps=0.01, decoupled=True))
        close(moved.mean, self.Q.mean - 0.2 * (self.LOOK.gradient / (self.S.sqrt() + 0.01) + self.PULL))

    def test_without_a_curvature_the_scale_stays(self):
        look = self.LOOK._replace(curvature=None)
        assert move(br.SquareRoot(), self.Q, self.PRIOR, look, 0.2).hess is self.Q.hess

    def test_debiasing_is_a_rate(self):
        """From zero, the debiased average is the one with rates (1 - beta) / (1 - beta^t), which forget the zero."""
        s = br.Diagonal(normal(0, 4), torch.zeros(4, dtype=torch.float64))
        average = torch.zeros(4, dtype=torch.float64)
        for step in range(1, 20):
            f = normal(step, 4).square()
            s = br.SquareRoot().precision(s, f, 0.1)
            average = average + 0.1 / (1 - 0.9**step) * (f - average)
            close(s.hess / (1 - 0.9**step), average)


class TestNatural:
    def test_one_rate_moves_both(self):
        q, prior = full(0), full(1)
        look = br.Look(None, normal(2, 4), positive(3, 4))
        one = move(br.Natural(), q, prior, look, 0.3, 0.3)
        other = move(br.Natural(), q, prior, look, 0.3, 0.9)
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.metric, other.metric)

    def test_rate_one_forgets_the_start(self):
        prior, loss = full(1), br.Quadratic(positive(3, 4), normal(2, 4))
        rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
        ends = [rule.step(full(seed), prior, loss) for seed in (20, 21)]
        close(ends[0].mean, ends[1].mean)
        close(ends[0].precision, ends[1].precision)

    def test_it_moves_along_the_natural_parameter(self):
        q, prior = full(0), full(1)
        look = br.Look(None, normal(2, 4), positive(3, 4))
        target = flat(prior.natural()) - flat(q.natural_gradient(look))
        moved = move(br.Natural(), q, prior, look, 0.3)
        close(flat(moved.natural()), 0.7 * flat(q.natural()) + 0.3 * target)

    def test_a_step_may_leave_the_family_and_says_so(self):
        q, prior = full(0), full(1)
        look = br.Look(None, normal(2, 4), -10 * torch.eye(4, dtype=torch.float64))
        with pytest.raises(ValueError, match="not positive definite"):
            move(br.Natural(), q, prior, look, 0.5)
