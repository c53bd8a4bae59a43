"""Expectations over masks: dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..noise import Noise
from ..rule import Expectation, Look, Point, Sight
from .expectations import mean_of


@dataclass(frozen=True)
class Masks(Expectation):
    r"""The mean over draws of which units are there, for :class:`~bayesrule.SpikeAndSlab`.

    .. math::  \nabla_m E_q[\ell] = E\big[\tfrac{z}{\pi}\, \nabla \ell(z\, m / \pi)\big].

    Unbiased; one look a draw.

    Args:
        draws: Number of draws.
    """

    draws: int = 1

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        offset: Point = q.draw(noise.at(draw=draw))
        return offset

    def slope(self, q: Any, noise: Noise, draw: int) -> Point | None:
        masks: Point = q.masks(noise.at(draw=draw))
        return masks

    def __call__(self, q: Any, look_at: Sight, noise: Noise) -> Look:
        return mean_of((1.0, self._one(q, look_at, noise, draw)) for draw in range(self.draws))

    def _one(self, q: Any, look_at: Sight, noise: Noise, draw: int) -> Look:
        look = look_at(self.offset(q, noise, draw))
        return look._replace(gradient=look.gradient * self.slope(q, noise, draw))
