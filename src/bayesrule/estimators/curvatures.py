"""What stands in for the Hessian of the mean loss, in the structure of the family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..rule import Curvature, Oracle, Point
from ..vector import equal


@dataclass(frozen=True)
class Zero(Curvature):
    """No curvature: the precision stays as it is. Free."""

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> None:
        return None


@dataclass(frozen=True)
class SquaredGradient(Curvature):
    r"""The gradient of the batch, squared: :math:`c\, g g^T`. Free, crude, never negative.

    Where gradients are mostly noise it is (c / examples in the batch) times the mean of the examples' squares.

    Args:
        scale: The c above.
        over: "loss", or "loss+prior": torch's RMSprop and Adam add the prior's gradient before they square.
    """

    scale: float = 1.0
    over: Literal["loss", "loss+prior"] = "loss"
    degree = 2

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        gradient = oracle.gradient()
        if self.over == "loss+prior":
            gradient = gradient + q.prior_gradient(prior)
        square = q.outer(gradient, gradient)
        return square if equal(self.scale, 1.0) else square * self.scale


@dataclass(frozen=True)
class Reparameterized(Curvature):
    r"""Price's theorem: :math:`E_q[\nabla^2 \ell] = E_q[S (\theta - m) \nabla \ell^T]`, S the precision.

    Unbiased from gradients alone, and free; the noise of an estimate grows with ess times the square of the gradient.
    It needs a spread: at the mean it says nothing and the precision stays as it is.

    Source: R. Price (1958); W. Lin, M. E. Khan and M. Schmidt (2019), arXiv:1910.13398.
    """

    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        return None if offset is None else q.outer(q.stretch(offset) * q.ess, oracle.gradient())


@dataclass(frozen=True)
class GaussNewton(Curvature):
    r"""The generalized Gauss-Newton matrix: :math:`\frac1n \sum_i J_i^T L_i J_i`, J of the outputs, L of the loss.

    Never negative for losses that are convex in the outputs; equal to the Hessian where outputs are linear in theta.
    """

    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        return q.project(oracle.gauss_newton())


@dataclass(frozen=True)
class Hessian(Curvature):
    """The Hessian itself. Costs D products for D parameters; may be indefinite."""

    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        return q.project(oracle.hessian())
