"""Classics of optimization: the rule at the mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..estimators.curvatures import Hessian, Zero
from ..estimators.expectations import Delta
from ..estimators.oracle import Loss
from ..families.gaussian import Fixed, Full
from ..retractions import Additive, Natural
from ..rule import BayesRule

GRADIENT_DESCENT = BayesRule(Delta(), Zero(), Additive())
NEWTON = BayesRule(Delta(), Hessian(), Natural())


def gradient_descent(loss: Callable[[Tensor], Tensor], start: Tensor, rate: float, steps: int) -> Tensor:
    r"""Gradient descent.

    Costs one gradient a step.

    .. math::  m \leftarrow m - \rho \nabla \ell(m).

    As an instance of the rule: Fixed Gaussian N(m, I) · Delta · Zero · Additive, without a prior.

    Args:
        loss: From theta, shape (D,), to a number, shape ().
        start: Where to begin, shape (D,).
        rate: Step size rho, > 0.
        steps: Number of steps.

    Returns:
        The last m, shape (D,).

    Example:
        >>> gradient_descent(lambda x: x.square().sum(), torch.ones(2), rate=0.25, steps=1)
        tensor([0.5000, 0.5000])

    Source: Khan and Rue (2023), section 3.1.
    """
    q, flat = Fixed(_checked(start, rate)), Fixed(start, 0.0)
    for _ in range(steps):
        q = GRADIENT_DESCENT.step(q, flat, Loss(loss), rate)
    return q.mean


def newton(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    prior: Full | None = None,
    rate: float = 1.0,
    steps: int = 100,
    tolerance: float = 1e-10,
) -> Full:
    r"""Newton's method, and the Gaussian it walks with.

    Costs one Hessian and one Cholesky factorization a step: D gradients and D^3 operations.

    .. math::  S \leftarrow (1-\rho) S + \rho\,(S_0 + \nabla^2 \ell(m)), \qquad
               m \leftarrow m - \rho\, S^{-1} (\nabla \ell(m) + S_0 (m - m_0)).

    As an instance of the rule: Full Gaussian · Delta · Hessian · Natural. With rate 1 Newton's method, below it online
    Newton, damped and with an average of Hessians.

    Args:
        loss: From theta, shape (D,), to the loss summed over examples, shape (): negative log-likelihood.
        start: Where to begin, shape (D,).
        prior: Gaussian prior; None is flat.
        rate: Step size rho, in (0, 1].
        steps: Number of steps at most.
        tolerance: Stop when no element of m moved by more than this, relative to the largest element and deviation.

    Returns:
        N(m, S^-1); ``.mean`` of shape (D,), ``.precision`` of shape (D, D): the Hessian where the last step began.

    Raises:
        ValueError: The Hessian (and prior) is not positive definite on the way.

    Example:
        >>> newton(lambda x: (x - 2).square().sum(), torch.zeros(1)).mean
        tensor([2.])

    Source: Khan and Rue (2023), sections 3.2-3.3.
    """
    q = Full(_checked(start, rate, most=1.0))
    prior = prior or Full(torch.zeros_like(start), 0.0)
    for _ in range(steps):
        before, q = q.mean, NEWTON.step(q, prior, Loss(loss), rate)
        if _still(before, q, tolerance):
            break
    return q


def laplace(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    prior: Full | None = None,
    steps: int = 100,
    tolerance: float = 1e-10,
) -> Full:
    """Laplace's approximation: Newton's method to its end, and the Gaussian there.

    As an instance of the rule: Newton; the precision is the Hessian at the mode.

    Args:
        loss: As for :func:`newton`.
        start: As for :func:`newton`.
        prior: As for :func:`newton`.
        steps: As for :func:`newton`.
        tolerance: As for :func:`newton`.

    Returns:
        N(mode, S^-1) with S the Hessian of loss and prior at the mode.

    Raises:
        ValueError: The Hessian is not positive definite, or the steps did not suffice.

    Example:
        >>> laplace(lambda x: 3 * (x - 2).square().sum(), torch.zeros(1)).precision
        tensor([[6.]])

    Source: Khan and Rue (2023), section 3.3.
    """
    q = newton(loss, start, prior=prior, steps=steps, tolerance=tolerance)
    last = NEWTON.step(q, prior or Full(torch.zeros_like(start), 0.0), Loss(loss))
    if not _still(q.mean, last, tolerance):
        moved = (last.mean - q.mean).abs().max().item()
        raise ValueError(f"Newton's method still moves by {moved:.2g} after {steps} steps; take more or another start")
    return last


def _still(before: Tensor, q: Full, tolerance: float) -> bool:
    size = q.mean.abs().max() + q.covariance.diagonal().max().sqrt()
    return bool((q.mean - before).abs().max() <= max(tolerance, 10 * torch.finfo(before.dtype).eps) * size)


def _checked(start: Tensor, rate: float, most: float = math.inf) -> Tensor:
    if start.dim() != 1:
        raise ValueError(f"start must have shape (D,), got {tuple(start.shape)}")
    if not 0 < rate <= most:
        raise ValueError(f"rate must be a number in (0, {most}], got {rate}")
    return start
