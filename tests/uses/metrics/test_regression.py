import math

import pytest
import torch
from scipy import integrate, stats
from sklearn.metrics import root_mean_squared_error

from bayesrule.uses.metrics import coverage, crps, gaussian_nll, interval_width, quantile_coverage, rmse


def problem(examples: int = 400, columns: int = 2):
    """Targets that are drawn from what is predicted."""
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, examples, columns, generator=generator, dtype=torch.float64)
    variance = 0.1 + torch.rand(examples, columns, generator=generator, dtype=torch.float64)
    return mean, variance, mean + variance.sqrt() * noise


def test_root_mean_squared_error_is_scikit_learns():
    mean, _, targets = problem()
    theirs = root_mean_squared_error(targets.flatten(), mean.flatten())
    assert rmse(mean, targets).item() == pytest.approx(theirs, rel=1e-12)


def test_nll_is_torchs():
    mean, variance, targets = problem()
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(targets).mean()
    assert gaussian_nll(mean, variance, targets).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("m", "v", "y"), [(0.0, 1.0, 0.0), (0.3, 0.25, 2.0), (-1.0, 9.0, -4.5), (5.0, 0.01, 5.02)])
def test_crps_is_the_integral(m, v, y):
    def squared(t: float, right: float) -> float:
        return (stats.norm.cdf(t, m, math.sqrt(v)) - right) ** 2

    reach, exact = 12 * math.sqrt(v), dict(epsabs=1e-13, limit=200)
    below = integrate.quad(squared, min(m, y) - reach, y, (0.0,), points=[m] if m < y else None, **exact)[0]
    above = integrate.quad(squared, y, max(m, y) + reach, (1.0,), points=[m] if m > y else None, **exact)[0]
    found = crps(*(torch.tensor([x], dtype=torch.float64) for x in (m, v, y)))
    assert found.item() == pytest.approx(below + above, abs=1e-9)


def test_crps_without_variance_is_the_absolute_error_and_its_limit():
    mean, _, targets = problem()
    exact = (mean - targets).abs().mean().item()
    assert crps(mean, torch.zeros(()), targets).item() == pytest.approx(exact, rel=1e-12)
    assert crps(mean, torch.tensor(1e-20).double(), targets).item() == pytest.approx(exact, rel=1e-8)
    assert crps(mean, torch.zeros(()), mean).item() == 0


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_intervals_are_scipys(level):
    mean, variance, targets = problem()
    low, high = stats.norm.interval(level, mean.numpy(), variance.sqrt().numpy())
    inside = (targets.numpy() >= low) & (targets.numpy() <= high)
    assert coverage(mean, variance, targets, level).item() == inside.mean()
    assert abs(inside.mean() - level) < 4 * math.sqrt(level * (1 - level) / inside.size)
    assert interval_width(variance, level).item() == pytest.approx((high - low).mean(), rel=1e-12)


def test_quantiles_are_passed_as_often_as_they_say():
    mean, variance, targets = problem(examples=2000)
    levels = torch.tensor([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95], dtype=torch.float64)
    found = quantile_coverage(mean, variance, targets)
    by_hand = torch.stack([(targets <= torch.distributions.Normal(mean, variance.sqrt()).icdf(q)).double().mean() for q in levels])
    torch.testing.assert_close(found, by_hand)
    assert ((found - levels).abs() < 4 * (levels * (1 - levels) / 4000).sqrt()).all()
    assert (quantile_coverage(mean, 0.1 * variance, targets) - levels)[0] > 0.1


def test_one_variance_serves_all_and_one_serves_each_output():
    mean, _, targets = problem()
    each = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for metric in (gaussian_nll, crps, coverage):
        assert metric(mean, each, targets).item() == metric(mean, each.expand(mean.shape), targets).item()
        assert metric(mean, each[:1], targets).item() == metric(mean, each[0], targets).item()


X, V = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmse(X, X[:, None]), r"one shape, not empty; got \(2,\) and \(2, 1\)"),
        (lambda: rmse(X[:0], X[:0]), "not empty"),
        (lambda: rmse(X, X + math.inf), "targets must be finite; 2 of 2 numbers are not"),
        (lambda: crps(X * math.nan, V, X), "mean must be finite; 2 of 2"),
        (lambda: gaussian_nll(X, 0 * V, X), "variance must be > 0 everywhere; got 0; .* noise_variance"),
        (lambda: quantile_coverage(X, 0 * V, X), "variance must be > 0 everywhere"),
        (lambda: crps(X, -V, X), "variance must be >= 0 everywhere; got -1"),
        (lambda: coverage(X, V * math.nan, X), "variance must be >= 0 everywhere; got nan"),
        (lambda: gaussian_nll(X, torch.ones(3), X), r"variance must broadcast to the shape \(2,\) of mean; got \(3,\)"),
        (lambda: interval_width(V[:0]), "got none"),
        (lambda: coverage(X, V, X, level=95), r"level must lie in \[0, 1\]; got 95"),
        (lambda: quantile_coverage(X, V, X, (0.5, 1.5)), r"a level must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
