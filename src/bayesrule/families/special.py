"""Special functions to full double precision, and their inverses by a fixed number of Newton steps.

torch's trigamma, which its digamma differentiates to, is off by 1e-9. Above 8 it is exact, and the recurrence leads there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SHIFT = 8


def digamma(x: Tensor) -> Tensor:
    """Digamma, differentiable to 1e-12."""
    return (x + _SHIFT).digamma() - sum(1 / (x + i) for i in range(_SHIFT))


def trigamma(x: Tensor) -> Tensor:
    """The derivative of digamma: Hurwitz's zeta function."""
    return torch.special.zeta(2.0, x)


def multi_digamma(df: Tensor, size: int) -> Tensor:
    """The sum of digamma((df - i) / 2) over i < size."""
    total: Any = sum(digamma((df - i) / 2) for i in range(size))
    return total


def concentration_of(gap: Tensor) -> Tensor:
    """The a with log a - digamma(a) = gap, for a gap > 0: six steps of Newton in 1 / a.

    Source: T. Minka (2002), Estimating a Gamma distribution.
    """
    a = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(6):
        slope = a**2 * (1 / a - trigamma(a))
        a = 1 / (1 / a + (a.log() - digamma(a) - gap) / slope)
    return a


def df_of(gap: Tensor, size: int) -> Tensor:
    """The df with size log(df / 2) - multi_digamma(df, size) = gap > 0: Newton in u = 1 / (df - size + 1)."""
    u = gap
    for _ in range(12):
        df = size - 1 + 1 / u
        found = size * (df / 2).log() - multi_digamma(df, size)
        bend: Any = sum(trigamma((df - i) / 2) for i in range(size))
        step = (found - gap) / ((bend / 2 - size / df) / u**2)
        u = torch.where(step < u, u - step, u / 2)
    return size - 1 + 1 / u


def inverse_digamma(y: Tensor) -> Tensor:
    """The x with digamma(x) = y: five steps of Newton from Minka's start."""
    x = torch.where(y >= -2.22, y.clamp(min=-2.22, max=300.0).exp() + 0.5, -1 / (y.clamp(max=-2.22) + 0.57721566490153286))
    for _ in range(5):
        x = x - (digamma(x) - y) / trigamma(x)
    return x


def concentrations_of(expected: Tensor) -> Tensor:
    """The Dirichlet concentrations with these expected logarithms, shape (..., K).

    With the total s known, each is psi^-1(expected + psi(s)); the s for which they sum to s is found between bounds, by Newton's
    method in log s or else by halving. Three Newton steps of all concentrations together finish, and make it differentiable.

    Source: T. Minka (2000), Estimating a Dirichlet distribution.
    """
    goal = expected.detach()
    low = torch.full_like(goal[..., :1], -30.0)
    high, t = -low, torch.zeros_like(low)
    for _ in range(25):
        s = t.exp()
        alpha = inverse_digamma(goal + digamma(s))
        surplus = alpha.sum(-1, keepdim=True).log() - t
        low, high = torch.where(surplus > 0, t, low), torch.where(surplus > 0, high, t)
        slope = (trigamma(s) / trigamma(alpha)).sum(-1, keepdim=True) * s / alpha.sum(-1, keepdim=True) - 1
        step = t - surplus / slope
        t = torch.where((step > low) & (step < high), step, (low + high) / 2)
    alpha = inverse_digamma(goal + digamma(t.exp()))
    for _ in range(3):
        step = dirichlet_solve(alpha, digamma(alpha) - digamma(alpha.sum(-1, keepdim=True)) - expected)
        alpha = torch.where(step < alpha, alpha - step, alpha / 2)
    return alpha


def dirichlet_solve(alpha: Tensor, v: Tensor) -> Tensor:
    """(diag trigamma(alpha) - trigamma(sum alpha))^-1 v by Sherman and Morrison; costs K."""
    inverse = 1 / trigamma(alpha)
    common = trigamma(alpha.sum(-1, keepdim=True))
    pull = (v * inverse).sum(-1, keepdim=True) / (1 / common - inverse.sum(-1, keepdim=True))
    return (v + pull) * inverse


def resultant(k: Tensor) -> Tensor:
    """Mean length of a sum of unit vectors of a von Mises distribution, I_1(k) / I_0(k)."""
    return torch.special.i1e(k) / torch.special.i0e(k)


def resultant_inverse(r: Tensor) -> Tensor:
    """The k of a mean length r in [0, 1): eight steps of Newton."""
    k = (r * (2 - r**2) / (1 - r**2)).clamp(min=1e-300)
    for _ in range(8):
        found = resultant(k)
        k = (k - (found - r) / (1 - found**2 - found / k)).clamp(min=1e-300)
    return torch.where(r < 1, k, torch.nan)
