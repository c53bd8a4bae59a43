"""The expectation at its worst place nearby: sharpness-aware minimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..noise import Noise
from ..rule import Curvature, Expectation, Look, Point, Sight
from .expectations import Delta, MonteCarlo, mean_of

AT_THE_MEAN = Delta()
TINY = 1e-12
"""Added to the norm of a gradient, which may be zero."""


@dataclass(frozen=True)
class Adversarial(Expectation):
    r"""The loss where one step of ascent leads: first a look, then the look that counts.

    .. math::  \theta' = m + \rho\, g_1 / \|g_1\| \quad \text{or} \quad m + \rho\, (h + \delta)^{-1} g_1, \qquad
               \text{gradient } g(\theta').

    E_q[loss] is a function of the mean. Its tightest convex lower bound (for minus the loss) is a maximum over
    perturbations of the loss less a price for their size; one linearized step takes its place. The curvature is of the first
    look.

    Costs two looks a draw.

    Args:
        radius: rho, >= 0.
        first: Where the first look is taken: :class:`Delta`, the mean, or :class:`MonteCarlo`, a draw.
        normalized: Whether the step has length rho, over all elements, or goes by the inverse metric of q.
        parts: How many looks of each kind make one, each on its part of the batch (m-sharpness).

    Source: P. Foret et al. (2021), arXiv:2010.01412; T. Moellenhoff and M. E. Khan (2023), SAM as an optimal relaxation of
    Bayes, arXiv:2210.01620.
    """

    radius: Any
    first: Delta | MonteCarlo = AT_THE_MEAN
    normalized: bool = True
    parts: int = 1
    climbs = True

    @property
    def draws(self) -> int:  # type: ignore[override]
        """How many looks make one."""
        return self.parts

    @property
    def spreads(self) -> bool:
        return self.first.spreads

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        return self.first.offset(q, noise, draw)

    def ascent(self, q: Any, gradient: Point, size: Any) -> Point:
        """Where to look next, as an offset from the mean.

        Args:
            q: Who looks.
            gradient: That of the first look.
            size: Its norm over all elements.
        """
        return gradient * (self.radius / (size + TINY)) if self.normalized else q.precondition(gradient) * self.radius

    def __call__(self, q: Any, look_at: Sight, noise: Noise) -> Look:
        return mean_of((1.0, self._one(q, look_at, noise, draw)) for draw in range(self.parts))

    def _one(self, q: Any, look_at: Sight, noise: Noise, draw: int) -> Look:
        where = self.offset(q, noise, draw)
        first = look_at.oracle(where)
        gradient = first.gradient()
        worst = look_at.oracle(self.ascent(q, gradient, (gradient * gradient).sum() ** 0.5))
        return Look(worst.value(), worst.gradient(), look_at.curvature(q, look_at.prior, where, first))


@dataclass(frozen=True)
class Magnitude(Curvature):
    r"""The magnitude of the gradient: :math:`\sqrt{h + \delta}\, |g| + \gamma`. Free, crude, never negative.

    Its fixed point is :math:`h + \delta = (E |g|)^2` without prior and damping: a squared gradient that is never squared. For
    diagonal Gaussians.

    Args:
        damping: gamma, >= 0.

    Source: Moellenhoff and Khan (2023), arXiv:2210.01620, algorithm 1.
    """

    damping: Any = 0.0
    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Any) -> Any:
        return q.metric.sqrt() * oracle.gradient().abs() + self.damping
