import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tests.contracts import close, normal, positive

import bayesrule as br

GOLDEN = {case["name"]: case for case in json.loads((Path(__file__).parents[1] / "golden" / "analytic.json").read_text())["cases"]}
SHAPES = [(30, 4), (5, 5), (4, 9), (1, 3), (8, 1), (200, 20)]


def data(examples=30, features=4, seed=0):
    X = normal(seed, examples, features)
    return X, X @ normal(seed + 1, features) + 0.3 * normal(seed + 2, examples)


class TestRidge:
    @pytest.mark.parametrize("penalty", [1e-3, 1.0, 250.0])
    @pytest.mark.parametrize(("examples", "features"), SHAPES)
    def test_is_scikit_learns(self, examples, features, penalty):
        X, y = data(examples, features)
        twin = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(X.numpy(), y.numpy())
        close(br.ridge(X, y, penalty).mean, torch.from_numpy(np.atleast_1d(twin.coef_)), 1e-9)

    def test_with_an_intercept_as_a_column(self):
        """Only scikit-learn leaves the intercept unpenalized: centered data have none."""
        X, y = data()
        X, y = X - X.mean(dim=0), y - y.mean()
        twin = Ridge(alpha=2.0).fit(X.numpy(), y.numpy())
        q = br.ridge(torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1), y, 2.0)
        close(q.mean[:-1], torch.from_numpy(twin.coef_), 1e-9)
        close(q.mean[-1], torch.tensor(0.0, dtype=torch.float64), 1e-12)

    @pytest.mark.parametrize(("examples", "features"), [(30, 4), (5, 5), (200, 20)])
    def test_without_penalty_it_is_least_squares(self, examples, features):
        X, y = data(examples, features)
        close(br.ridge(X, y, 0.0).mean, torch.linalg.lstsq(X, y[:, None]).solution[:, 0], 1e-8)

    @pytest.mark.parametrize("variance", [0.1, 1.0, 4.0])
    def test_the_noise_scales_the_precision_and_leaves_the_mean(self, variance):
        X, y = data()
        q = br.ridge(X, y, 2.0, noise_variance=variance)
        close(q.mean, br.ridge(X, y, 2.0).mean)
        close(q.precision, (X.T @ X + 2.0 * torch.eye(4, dtype=X.dtype)) / variance)

    def test_minimizes_squares_and_penalty(self):
        X, y = data()

        def objective(theta):
            return (X @ theta - y).square().sum() + 2.0 * theta.square().sum()

        q = br.ridge(X, y, 2.0)
        close(torch.autograd.functional.jacobian(objective, q.mean), torch.zeros(4, dtype=X.dtype), 1e-9)

    def test_single_precision_stays(self):
        X, y = data()
        q = br.ridge(X.float(), y.float(), 2.0)
        assert q.mean.dtype == q.precision.dtype == torch.float32
        close(q.mean.double(), br.ridge(X, y, 2.0).mean, 1e-4)


class TestLinearRegression:
    def test_is_the_exact_posterior(self):
        case = GOLDEN["linear_regression_exact_posterior"]
        X, y = (torch.tensor(case[name], dtype=torch.float64) for name in "xy")
        prior = br.Full(torch.zeros(3, dtype=torch.float64), case["prior_precision"])
        q = br.linear_regression(X, y, prior, case["noise_variance"])
        close(q.mean, torch.tensor(case["posterior_mean"], dtype=torch.float64), 1e-9)
        close(q.precision, torch.tensor(case["posterior_precision"], dtype=torch.float64), 1e-9)
        close(q.covariance, torch.tensor(case["posterior_covariance"], dtype=torch.float64), 1e-9)

    def test_is_the_closed_form_under_any_gaussian_prior(self):
        (X, y), prior = data(), br.Full(normal(5, 4), positive(6, 4))
        q = br.linear_regression(X, y, prior, 0.25)
        S = prior.precision + X.T @ X / 0.25
        close(q.precision, S)
        close(q.mean, torch.linalg.solve(S, prior.precision @ prior.mean + X.T @ y / 0.25))

    @pytest.mark.parametrize("parts", [[30], [10, 20], [1] * 30, [7, 1, 22]], ids=["all", "two", "one by one", "three"])
    def test_learning_in_parts_is_learning_at_once(self, parts):
        """The posterior of earlier data is the prior of later ones."""
        (X, y), prior = data(), br.Full(normal(5, 4), positive(6, 4))
        at_once = br.linear_regression(X, y, prior, 0.25)
        q = prior
        for A, b in zip(X.split(parts), y.split(parts), strict=True):
            q = br.linear_regression(A, b, q, 0.25)
        close(q.mean, at_once.mean)
        close(q.precision, at_once.precision)

    def test_the_order_of_the_data_does_not_matter(self):
        (X, y), prior = data(), br.Full(normal(5, 4), positive(6, 4))
        close(br.linear_regression(X.flip(0), y.flip(0), prior).mean, br.linear_regression(X, y, prior).mean)

    def test_no_data_are_refused(self):
        prior = br.Full(normal(5, 4), positive(6, 4))
        with pytest.raises(ValueError, match=r"X and y are empty"):
            br.linear_regression(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), prior)

    def test_of_a_prior_its_precision_counts_whatever_its_ess(self):
        """A posterior of other algorithms holds the curvature of a mean loss and an ess."""
        (X, y), prior = data(), br.Full(normal(5, 4), positive(6, 4))
        same = br.Full(prior.mean, prior.metric / 10, ess=10.0)
        q, again = (br.linear_regression(X, y, p, 0.25) for p in (prior, same))
        close(again.precision, q.precision)
        close(again.mean, q.mean)

    def test_the_prior_is_left_as_it_was(self):
        (X, y), prior = data(), br.Full(normal(5, 4), positive(6, 4))
        br.linear_regression(X, y, prior)
        assert torch.equal(prior.mean, normal(5, 4))
        assert torch.equal(prior.precision, positive(6, 4))


# Bad input: the message names the argument and its value

X, Y = data()
FLAT = br.Full(torch.zeros(4, dtype=torch.float64), 1.0)
HOLE = X.clone()
HOLE[3, 1] = float("nan")
ENDLESS = Y.clone()
ENDLESS[:2] = float("inf")


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (X[0], Y, r"X must have shape \(examples, features\).*got \(4,\) and \(30,\)"),
        (X, Y[:-1], r"y \(examples,\), got \(30, 4\) and \(29,\)"),
        (X, Y[:, None], r"got \(30, 4\) and \(30, 1\)"),
        (HOLE, Y, "X has 1 entries that are not finite"),
        (X, ENDLESS, "y has 2 entries that are not finite"),
    ],
)
def test_data_that_do_not_fit_are_refused(X, y, message):
    for run in (lambda: br.ridge(X, y, 1.0), lambda: br.linear_regression(X, y, FLAT)):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_a_noise_variance_out_of_range_is_refused(variance):
    message = rf"noise_variance must be a number in \(0, inf\), got {variance}"
    for run in (lambda: br.ridge(X, Y, 1.0, variance), lambda: br.linear_regression(X, Y, FLAT, variance)):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("penalty", [-1.0, -1e-9, float("inf"), float("nan")])
def test_a_penalty_out_of_range_is_refused(penalty):
    with pytest.raises(ValueError, match=rf"penalty must be a number in \[0, inf\), got {penalty}"):
        br.ridge(X, Y, penalty)


def test_a_prior_of_another_size_is_refused():
    for features in (1, 3):
        with pytest.raises(ValueError, match="prior"):
            br.linear_regression(X, Y, br.Full(torch.zeros(features, dtype=torch.float64), 1.0))


def singular(name: str) -> torch.Tensor:
    design = X.clone()
    if name == "idle":
        design[:, 2] = 0
    elif name == "constant":
        design[:, 1:3] = torch.tensor([1.0, 2.0], dtype=torch.float64)
    elif name == "repeated":
        design[:, 3] = design[:, 0] - 2 * design[:, 1]
    elif name == "short":
        design = design[:3]
    return design


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("idle", r"column 2 of X.*30 rows, 4 columns, 1 of them constant"),
        ("constant", r"column 2 of X.*2 of them constant"),
        ("repeated", r"column 3 of X adds nothing to those before it"),
        ("short", r"column 3 of X.*3 rows"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_directions_that_neither_data_nor_prior_determine_are_refused(name, words, scale):
    design = singular(name) * torch.tensor([1.0, scale, 1.0, scale], dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"improper.*{words}.*penalty"):
        br.ridge(design, Y[: len(design)], 0.0)
    assert br.ridge(design, Y[: len(design)], 1.0).mean.isfinite().all()


def test_a_badly_scaled_design_is_not_singular():
    design = X * torch.tensor([1.0, 1e-7, 1e7, 1.0], dtype=torch.float64)
    expected = torch.linalg.lstsq(X, Y).solution / torch.tensor([1.0, 1e-7, 1e7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(br.ridge(design, Y, 0.0).mean, expected, rtol=1e-8, atol=0)
