"""How an expectation under q is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..noise import Noise
from ..rule import Expectation, Look, Point
from ..vector import equal


@dataclass(frozen=True)
class Delta(Expectation):
    """The delta method: E_q[f(theta)] is taken to be f at the mean. One look, no noise."""

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        return None

    def __call__(self, q: Any, look_at: Callable[[Point | None], Look], noise: Noise) -> Look:
        return look_at(None)


@dataclass(frozen=True)
class MonteCarlo(Expectation):
    """The mean over draws of theta. Unbiased; one look a draw.

    A q without spread (infinite ess) is looked at in its mean.

    Args:
        draws: Number of draws where the rule itself looks; a host that opens the draws decides for itself.
        antithetic: Draws 2k and 2k + 1 are mirror images in the mean, which takes the gradient's noise out of the curvature.
    """

    draws: int = 1
    antithetic: bool = False

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        if equal(q.ess, math.inf):
            return None
        if not self.antithetic:
            return q.root_solve(noise.at(draw=draw).normal(q.mean))
        return q.root_solve(noise.at(draw=draw // 2).normal(q.mean)) * (1 - 2 * (draw % 2))

    def __call__(self, q: Any, look_at: Callable[[Point | None], Look], noise: Noise) -> Look:
        mean = look_at(self.offset(q, noise, 0))
        for draw in range(1, self.draws):
            mean = mean.lerp(look_at(self.offset(q, noise, draw)), 1 / (draw + 1))
        return mean
