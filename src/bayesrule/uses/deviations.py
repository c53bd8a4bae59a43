r"""What taking examples away does to outputs: the equation of deviations, solved with products alone.

For outputs f of examples whose loss has error e and curvature :math:`L = R R^T`, and the covariance V of the outputs, one step of
Newton's method on the rest of the data moves the outputs by

.. math::  x = (1 - V L)^{-1} V e = V w, \qquad w = e + R z, \qquad (1 - R^T V R)\, z = R^T V e,

and the weights by :math:`S J^T w`. The last system is symmetric and, as long as the rest of the data holds the weights, positive
definite; its matrix is 1 minus one of rank K, so that conjugate gradients end after K products with V, and mostly after one or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..estimators.output_losses import Slopes

Times = Callable[[Tensor, Tensor], Tensor]
"""V v of some examples: takes v, shape (n, ...), and the numbers of the examples, shape (n,)."""


class Deviation(NamedTuple):
    """Of n examples, each taken away alone."""

    outputs: Tensor
    """x: outputs without the example less outputs with it, shape (n, ...)."""
    weighted: Tensor
    """w: what goes backward to give the change of the weights, shaped like the outputs."""
    first: Tensor
    """V e, the first order."""
    leverage: Tensor
    """The largest curvature of R^T V R that was met, shape (n,): at 1 nothing holds the example but itself."""

    @property
    def refused(self) -> Tensor:
        """Which examples have a leverage of 1 or more, so that the first order stands for them, shape (n,)."""
        return self.leverage >= 1


def first_order(times: Times, slopes: Slopes) -> Deviation:
    """x = V e."""
    e = slopes.error
    moved = times(e, torch.arange(len(e), device=e.device))
    return Deviation(moved, e, moved, e.new_zeros(len(e)))


@torch.no_grad()
def newton(times: Times, slopes: Callable[[Tensor], Slopes], count: int, tolerance: float | None = None) -> Deviation:
    """x as above. Costs a product for all examples, then one in each round for those that are not there yet.

    Args:
        times: Products with V.
        slopes: The slopes of some examples, by their numbers.
        count: n.
        tolerance: How much of x may be missing. None is 1e-2 in 32 bits and less, and 1e-12 in 64.
    """
    every = slopes(torch.arange(count))
    e = every.error
    if tolerance is None:
        tolerance = 1e-12 if torch.finfo(e.dtype).eps < 1e-10 else 1e-2
    first = times(e, torch.arange(count, device=e.device))
    moved, weighted = first.clone(), e.clone()
    residual = every.across(first)
    leverage = _ratio(dot(residual, residual), dot(e, first))  # in the direction of the error
    start = dot(residual, residual)
    direction, size = residual.clone(), start.clone()

    def far(rows: Tensor) -> Tensor:
        """Those from which too much is missing: what the residual leaves out of z, times what z has in x."""
        return rows[(size[rows] * leverage[rows] ** 2 > tolerance**2 * start[rows]) & (leverage[rows] < 1)]

    live = far(torch.arange(count, device=e.device))
    for _ in range(2 * e[0].numel() + 1 if count else 0):
        if not len(live):
            break
        own, p = slopes(live), direction[live]
        up = own.half(p)
        product = times(up, live)
        image = p - own.across(product)
        inside = dot(p, image)
        leverage[live] = torch.maximum(leverage[live], 1 - _ratio(inside, dot(p, p)))
        step = _ratio(size[live], inside)
        step = torch.where(inside > 0, step, torch.zeros_like(step))
        weighted[live] += _times(step, up)
        moved[live] += _times(step, product)
        residual[live] -= _times(step, image)
        now = dot(residual[live], residual[live])
        direction[live] = residual[live] + _times(_ratio(now, size[live]), p)
        size[live] = now
        live = far(live)
    refused = leverage >= 1
    moved[refused], weighted[refused] = first[refused], e[refused]
    return Deviation(moved, weighted, first, leverage)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of what each example has, shape (n,)."""
    return (a * b).flatten(1).sum(1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros_like(a), a / b)


def _times(step: Tensor, v: Tensor) -> Tensor:
    return step.view(-1, *[1] * (v.dim() - 1)) * v
