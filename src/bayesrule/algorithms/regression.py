"""Conjugate models: one step of the rule, from any start, is Bayes' rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..estimators.oracle import Quadratic
from ..families.gaussian import Full
from .inputs import demand_finite, numbers
from .newton import NEWTON


def linear_regression(X: Tensor, y: Tensor, prior: Full, noise_variance: float = 1.0) -> Full:
    r"""Bayesian linear regression: the exact posterior of the weights.

    Costs N D^2 + D^3 operations for N examples.

    .. math::  S = S_0 + X^T X / \sigma^2, \qquad m = S^{-1} (S_0 m_0 + X^T y / \sigma^2).

    As an instance of the rule: Full Gaussian · Delta · Hessian · Natural, one step of rate 1 from the prior.

    Args:
        X: Inputs, shape (examples, features); a column of ones, if an intercept is wanted.
        y: Targets, shape (examples,).
        prior: Gaussian prior over the weights; the posterior of earlier data goes on learning.
        noise_variance: sigma^2 of the targets, > 0, in units of y squared.

    Returns:
        The posterior; ``.mean`` of shape (features,), ``.precision`` of shape (features, features).

    Raises:
        ValueError: Shapes do not agree, numbers are not finite, or the posterior is improper.

    Example:
        >>> import torch
        >>> linear_regression(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]), Full(torch.zeros(1), 1.0)).mean
        tensor([1.5000])

    Source: Khan and Rue (2023), section 2.
    """
    X, y = numbers(X, "X"), numbers(y, "y")
    if X.dim() != 2 or not X.shape[1] or y.shape != X.shape[:1]:
        raise ValueError(f"X must have shape (examples, features) and y (examples,), got {tuple(X.shape)} and {tuple(y.shape)}")
    if not len(X):
        raise ValueError("X and y are empty: give at least one example")
    X, y = X.to(prior.mean), y.to(prior.mean)
    demand_finite(X, "X")
    demand_finite(y, "y")
    if len(prior.mean) != X.shape[1]:
        raise ValueError(f"X has {X.shape[1]} features, the prior is over {len(prior.mean)}")
    _check_variance(noise_variance)
    if not isinstance(prior, Full):
        raise TypeError(f"prior must be a Full Gaussian over the weights, got a {type(prior).__name__}")
    loss = Quadratic(X.mT @ X / noise_variance, X.mT @ y / noise_variance)
    if (column := _dependent(prior.precision + loss.matrix)) is not None:
        constant = int((X[0] == X).all(0).sum())
        raise ValueError(
            f"the posterior is improper: column {column} of X adds nothing to those before it ({len(X)} rows, "
            f"{X.shape[1]} columns, {constant} of them constant); drop it, or give a prior of positive precision (a larger penalty)"
        )
    return NEWTON.step(Full(prior.mean, prior.precision), prior, loss)


def _dependent(precision: Tensor) -> int | None:
    """A weight that data and prior leave free, if there is one: what those before it do not explain of it is rounding."""
    size = precision.diagonal().clamp(min=0).sqrt()
    if not (size > 0).all():
        return int(size.argmin())
    slack = 10 * len(size) * torch.finfo(size.dtype).eps
    root, failed = torch.linalg.cholesky_ex(precision / size / size[:, None] + slack * torch.eye(len(size)).to(size))
    if failed:
        return int(failed) - 1
    free = root.diagonal() ** 2
    least = int(free.argmin())
    return least if free[least] <= 4 * slack else None


def ridge(X: Tensor, y: Tensor, penalty: float, noise_variance: float = 1.0) -> Full:
    r"""Ridge regression, with its uncertainty.

    Costs N D^2 + D^3 operations for N examples.

    .. math::  m = \arg\min_\theta \|X \theta - y\|^2 + \lambda \|\theta\|^2.

    As an instance of the rule: :func:`linear_regression` under the prior N(0, sigma^2 / penalty), one step of rate 1.

    Args:
        X: Inputs, shape (examples, features).
        y: Targets, shape (examples,).
        penalty: lambda >= 0.
        noise_variance: sigma^2 of the targets, > 0; it scales the precision and leaves the mean.

    Returns:
        The posterior; ``.mean`` of shape (features,), ``.precision`` of shape (features, features).

    Raises:
        ValueError: As :func:`linear_regression`, or the penalty is negative.

    Example:
        >>> import torch
        >>> ridge(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]), penalty=1.0).mean
        tensor([1.5000])

    Source: Khan and Rue (2023), section 2.
    """
    _check_variance(noise_variance)
    if not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be a number in [0, inf), got {penalty}")
    X = numbers(X, "X")
    if not X.is_floating_point():
        X = X.to(torch.get_default_dtype())
    return linear_regression(X, y, Full(X.new_zeros(X.shape[-1]), penalty / noise_variance), noise_variance)


def _check_variance(noise_variance: float) -> None:
    if not 0 < noise_variance < math.inf:
        raise ValueError(f"noise_variance must be a number in (0, inf), got {noise_variance}")
