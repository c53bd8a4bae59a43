import json
from pathlib import Path

import pytest
import torch
from tests.contracts import close, normal, positive
from torch.nn.functional import binary_cross_entropy_with_logits

import bayesrule as br

GOLDEN = {case["name"]: case for case in json.loads((Path(__file__).parents[1] / "golden" / "analytic.json").read_text())["cases"]}
CASE = GOLDEN["newton_logistic_delta_rho1"]
X, Y = (torch.tensor(CASE[name], dtype=torch.float64) for name in "xy")
PRIOR = br.Full(torch.zeros(3, dtype=torch.float64), CASE["prior_precision"])


def logistic(theta):
    return binary_cross_entropy_with_logits(X @ theta, Y, reduction="sum")


def bowl(seed=0, size=4):
    """A quadratic, its Hessian and its minimum."""
    A, c = positive(seed, size), normal(seed + 1, size)
    return lambda theta: (theta - c) @ A @ (theta - c) / 2, A, c


def rosenbrock(theta):
    return (1 - theta[0]) ** 2 + 100 * (theta[1] - theta[0] ** 2) ** 2


class TestGradientDescent:
    @pytest.mark.parametrize("loss", [bowl()[0], lambda theta: theta.exp().sum() - theta.sum()], ids=["bowl", "exp"])
    def test_is_torchs(self, loss):
        start = normal(2, 4)
        parameter = torch.nn.Parameter(start.clone())
        twin = torch.optim.SGD([parameter], lr=0.05)
        for steps in range(1, 21):
            twin.zero_grad()
            loss(parameter).backward()
            twin.step()
            close(br.gradient_descent(loss, start, 0.05, steps), parameter.detach(), 1e-14)

    def test_with_rate_one_over_the_largest_curvature_it_converges_linearly(self):
        loss, A, c = bowl()
        values = torch.linalg.eigvalsh(A)
        start, rate = normal(2, 4), 1 / values.max().item()
        distance = [(br.gradient_descent(loss, start, rate, steps) - c).norm() for steps in (0, 50, 100)]
        shrink = (1 - values.min() * rate) ** 50
        assert distance[1] <= shrink * distance[0] * (1 + 1e-9)
        assert distance[2] <= shrink * distance[1] * (1 + 1e-9)

    def test_no_step_stays(self):
        start = normal(2, 4)
        assert torch.equal(br.gradient_descent(bowl()[0], start, 0.1, 0), start)


class TestNewton:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("size", [1, 4, 20])
    def test_reaches_the_minimum_of_a_quadratic_in_one_step(self, seed, size):
        loss, A, c = bowl(seed, size)
        q = br.newton(loss, 10 * normal(seed + 5, size), steps=1)
        close(q.mean, c, 1e-9)
        close(q.precision, A, 1e-9)

    def test_takes_the_published_steps(self):
        for steps, expected in enumerate(CASE["steps"], start=1):
            q = br.newton(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR, steps=steps, tolerance=0.0)
            close(q.mean, torch.tensor(expected["mean"], dtype=torch.float64), 1e-9)
            close(q.precision, torch.tensor(expected["precision_used"], dtype=torch.float64), 1e-9)

    def test_is_solving_with_the_hessian(self):
        m = normal(3, 3) / 2
        for _ in range(3):
            H = torch.autograd.functional.hessian(logistic, m) + PRIOR.precision
            g = torch.autograd.functional.jacobian(logistic, m) + PRIOR.precision @ (m - PRIOR.mean)
            stepped = br.newton(logistic, m, prior=PRIOR, steps=1)
            m = m - torch.linalg.solve(H, g)
            close(stepped.mean, m)

    def test_a_prior_is_a_quadratic_in_the_loss(self):
        prior = br.Full(normal(4, 3), positive(5, 3))

        def penalized(theta):
            gap = theta - prior.mean
            return logistic(theta) + gap @ prior.precision @ gap / 2

        start = torch.zeros(3, dtype=torch.float64)
        one, other = br.newton(logistic, start, prior=prior), br.newton(penalized, start)
        close(one.mean, other.mean)
        close(one.precision, other.precision)

    def test_of_a_prior_its_precision_counts_whatever_its_ess(self):
        start = torch.zeros(3, dtype=torch.float64)
        same = br.Full(PRIOR.mean, PRIOR.metric / 10, ess=10.0)
        close(br.newton(logistic, start, prior=same).mean, br.newton(logistic, start, prior=PRIOR).mean)

    def test_walks_down_a_curved_valley(self):
        q = br.newton(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        close(q.mean, torch.ones(2, dtype=torch.float64), 1e-9)

    def test_the_golden_path_through_the_valley(self):
        """The precision is the Hessian where the step began, and may be indefinite on the way: the rule does not mind."""
        case = json.loads((Path(__file__).parents[1] / "golden" / "newton_rosenbrock.json").read_text())
        path = torch.tensor(case["newton_iterates"], dtype=torch.float64)
        for steps in range(1, len(path)):
            q = br.newton(rosenbrock, path[0], steps=steps, tolerance=0.0)
            close(q.mean, path[steps])
            close(q.precision, torch.autograd.functional.hessian(rosenbrock, path[steps - 1]), 1e-9)

    @pytest.mark.parametrize("rate", [0.3, 0.8])
    def test_damped_it_ends_in_the_same_place(self, rate):
        start = torch.zeros(3, dtype=torch.float64)
        damped = br.newton(logistic, start, prior=PRIOR, rate=rate, steps=500, tolerance=1e-13)
        exact = br.newton(logistic, start, prior=PRIOR)
        close(damped.mean, exact.mean, 1e-9)
        close(damped.precision, exact.precision, 1e-9)

    def test_damped_its_precision_averages_hessians(self):
        """From the unit precision it starts with."""
        m, S = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        for steps in range(1, 5):
            S = 0.7 * S + 0.3 * (PRIOR.precision + torch.autograd.functional.hessian(logistic, m))
            q = br.newton(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR, rate=0.3, steps=steps, tolerance=0.0)
            close(q.precision, S)
            m = q.mean

    def test_stops_when_it_stands_still(self):
        seen = []

        def counted(theta):
            seen.append(theta)
            return logistic(theta)

        br.newton(counted, torch.zeros(3, dtype=torch.float64), prior=PRIOR, steps=1)
        calls = len(seen)
        seen.clear()
        br.newton(counted, torch.zeros(3, dtype=torch.float64), prior=PRIOR, steps=10_000)
        assert len(seen) <= 12 * calls

    def test_a_loose_tolerance_stops_sooner(self):
        ends = [
            br.newton(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR, tolerance=tolerance).mean
            for tolerance in (1e-1, 1e-12)
        ]
        gap = (ends[0] - ends[1]).abs().max()
        assert 0 < gap < 0.1

    def test_single_precision_stays(self):
        q = br.newton(lambda theta: (theta - 1).square().sum(), torch.zeros(2))
        assert q.mean.dtype == q.precision.dtype == torch.float32

    def test_the_start_is_left_alone(self):
        start = torch.zeros(3, dtype=torch.float64)
        br.newton(logistic, start, prior=PRIOR)
        assert torch.equal(start, torch.zeros(3, dtype=torch.float64))


class TestLaplace:
    def test_is_the_published_one(self):
        q = br.laplace(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR)
        close(q.mean, torch.tensor(CASE["steps"][-1]["mean"], dtype=torch.float64), 1e-9)
        close(q.precision, torch.tensor(CASE["laplace_precision_at_mode"], dtype=torch.float64), 1e-9)

    def test_gradient_vanishes_and_precision_is_the_hessian_at_the_mode(self):
        q = br.laplace(logistic, normal(3, 3) / 2, prior=PRIOR)
        close(torch.autograd.functional.jacobian(logistic, q.mean) + PRIOR.precision @ q.mean, torch.zeros_like(q.mean), 1e-9)
        close(q.precision, torch.autograd.functional.hessian(logistic, q.mean) + PRIOR.precision, 1e-9)

    def test_of_a_gaussian_it_is_that_gaussian(self):
        loss, A, c = bowl()
        q = br.laplace(loss, normal(2, 4))
        close(q.mean, c, 1e-9)
        close(q.precision, A, 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_finds_a_mode_at_the_origin(self, dtype):
        """Every input has both labels: all that is left of the gradient at the mode is rounding."""
        inputs = torch.cat([X, X]).to(dtype)
        labels = torch.cat([Y, 1 - Y]).to(dtype)
        q = br.laplace(
            lambda theta: binary_cross_entropy_with_logits(inputs @ theta, labels, reduction="sum"),
            torch.full((3,), 0.3, dtype=dtype),
            prior=br.Full(torch.zeros(3, dtype=dtype), 0.5),
        )
        close(q.mean, torch.zeros(3, dtype=dtype), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_finds_a_mode_in_either_precision(self, dtype):
        inputs, labels = X.to(dtype), Y.to(dtype)
        q = br.laplace(
            lambda theta: binary_cross_entropy_with_logits(inputs @ theta, labels, reduction="sum"),
            torch.zeros(3, dtype=dtype),
            prior=br.Full(torch.zeros(3, dtype=dtype), 0.5),
        )
        close(q.mean, torch.tensor(CASE["steps"][-1]["mean"], dtype=dtype), 1e-4)

    def test_says_when_the_steps_did_not_suffice(self):
        with pytest.raises(ValueError, match=r"still moves by \S+ after 1 steps; take more or another start"):
            br.laplace(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR, steps=1)


# Bad input


@pytest.mark.parametrize(
    "run",
    [
        lambda start: br.newton(logistic, start),
        lambda start: br.laplace(logistic, start),
        lambda start: br.gradient_descent(logistic, start, 0.1, 1),
    ],
    ids=["newton", "laplace", "gradient_descent"],
)
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_start_that_is_no_vector_is_refused_with_its_shape(run, shape):
    message = rf"start must have shape \(D,\), got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        run(torch.zeros(shape))


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
def test_a_rate_out_of_range_is_refused_with_its_value(rate):
    for run in (
        lambda: br.newton(logistic, torch.zeros(3), rate=rate),
        lambda: br.gradient_descent(logistic, torch.zeros(3), rate, 1),
    ):
        with pytest.raises(ValueError, match=f"rate must be .*{rate}"):
            run()


def test_newtons_rate_is_at_most_one():
    """Beyond it the old precision counts negatively."""
    with pytest.raises(ValueError, match=r"rate must be .*1\.5"):
        br.newton(logistic, torch.zeros(3, dtype=torch.float64), prior=PRIOR, rate=1.5)


@pytest.mark.parametrize("run", [br.newton, br.laplace])
def test_a_loss_without_a_minimum_is_refused(run):
    with pytest.raises(ValueError, match=r"not positive definite \(least eigenvalue -2"):
        run(lambda theta: -theta.square().sum(), torch.ones(2))
