"""What stands in for the Hessian of the mean loss, in the structure of the family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..noise import PROBE, Noise
from ..rule import Curvature, Oracle, Point
from ..vector import Vector, equal
from .expectations import known_control


@dataclass(frozen=True)
class Zero(Curvature):
    """No curvature: the precision stays as it is. Free."""

    curves = False

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
class EmpiricalFisher(Curvature):
    r"""The mean square of the gradients of the examples: :math:`\tfrac1n \sum_i g_i^2 + \gamma`. Never negative.

    The diagonal of the generalized Gauss-Newton matrix where the model is right about its own errors, as a classifier near the end
    of its training; for squared errors it is off by the squared residuals. Costs what the gradients of single examples cost.

    Args:
        damping: gamma, >= 0.

    Source: K. Osawa et al. (2019), Practical Deep Learning with Bayesian Principles, arXiv:1906.02506.
    """

    damping: Any = 0.0
    degree = 2
    squares_examples = True

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        squares = q.keep_diagonal(oracle.squares())
        return squares if equal(self.damping, 0.0) else squares + self.damping


@dataclass(frozen=True)
class Reparameterized(Curvature):
    r"""Price's theorem: :math:`E_q[\nabla^2 \ell] = E_q[S (\theta - m) \nabla \ell^T]`, S the precision.

    Unbiased from gradients alone, and free; the noise of an estimate grows with ess times the square of the gradient.
    It needs a spread: at the mean it says nothing and the precision stays as it is.

    Args:
        control_variate: "stl" puts :math:`\nabla \ell + \delta (m - m_0) - h (\theta - m)` in the place of the gradient and adds
            h. The mean stays, and the noise is gone where q is the posterior of a quadratic loss.

    Source: R. Price (1958); W. Lin, M. E. Khan and M. Schmidt (2019), arXiv:1910.13398.
    """

    control_variate: Literal["stl"] | None = None
    degree = 1

    def __post_init__(self) -> None:
        known_control(self.control_variate)

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        if offset is None:
            return None
        if self.control_variate is None:
            return q.outer(q.stretch(offset) * q.ess, oracle.gradient())
        rest = oracle.gradient() + q.prior_gradient(prior) - q.bend(offset)
        return q.outer(q.stretch(offset) * q.ess, rest) + q.hess


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


@dataclass(frozen=True)
class DiagonalHessian(Curvature):
    """The Hessian's diagonal, from an oracle that knows it; all of the Hessian where the loss is a sum over elements."""

    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        return q.keep_diagonal(oracle.diagonal())


@dataclass(frozen=True)
class Hutchinson(Curvature):
    r"""The Hessian's diagonal by random probes: :math:`E[z \odot (H z)]`, z = ±1. For families without matrices.

    Costs one product with the Hessian a probe. Unbiased; the variance of element i is
    :math:`\sum_{j \neq i} H_{ij}^2` over the number of probes.

    Args:
        draws: Number of probes.
        noise: Where the probes come from, and the number of the first; set by the rule in every look.
        first: See above.

    Source: M. F. Hutchinson (1990); C. Bekas, E. Kokiopoulou and Y. Saad (2007).
    """

    draws: int = 1
    noise: Noise | None = None
    first: int = 0
    degree = 1
    asks_hessian = True

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    def at(self, noise: Noise, draw: int) -> Curvature:
        return replace(self, noise=noise.apart(PROBE), first=draw * self.draws)

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        if (probed := oracle.probed()) is not None:
            return q.keep_diagonal(probed)
        if self.noise is None:
            raise ValueError("Hutchinson draws: look through BayesRule.look(..., noise=CounterNoise(seed, step=t))")
        total: Any = 0.0
        for probe in range(self.draws):
            signs = _signs(self.noise.at(draw=self.first + probe).uniform(q.mean))
            total = total + q.outer(signs, oracle.product(signs))
        return total / self.draws


def _signs(u: Any) -> Any:
    return u.map(_signs) if isinstance(u, Vector) else (u - 0.5).sign() + (u == 0.5)
