"""Expectations over binary weights by gradients: a relaxation that is smooth in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..noise import Noise
from ..rule import Expectation, Look, Point, Sight
from ..vector import logit
from .expectations import mean_of

SMALL = 1e-10
"""Added above and below in the scale of a gradient."""


@dataclass(frozen=True)
class Relaxed(Expectation):
    r"""Draws of binary weights, relaxed to the open interval (the concrete or Gumbel-softmax relaxation).

    .. math::  w = \tanh\big((\lambda + d) / \tau\big), \quad d = \tfrac12 \log \tfrac{u}{1 - u}, \qquad
               \nabla_\mu E_q[\ell] \approx \frac{1 - w^2}{\tau (1 - \mu^2)}\, \nabla \ell(w).

    Both sides of the fraction have 1e-10 added. With tau to 0 the draw is the binary weight itself. For :class:`Signs`.

    Args:
        draws: Number of draws.
        temperature: tau, > 0.

    Source: X. Meng, R. Bachmann and M. E. Khan (2020), Training binary neural networks using the Bayesian learning rule,
    arXiv:2002.10778; C. Maddison, A. Mnih and Y. W. Teh (2017).
    """

    draws: int = 1
    temperature: Any = 1.0

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        half_logistic = logit(noise.at(draw=draw).uniform(q.mean)) * 0.5
        return ((q.natural() + half_logistic) / self.temperature).tanh() - q.mean

    def sample(self, q: Any, noise: Noise, draw: int) -> Point | None:
        sample: Point = q.draw(noise.at(draw=draw))
        return sample

    def gradient(self, q: Any, offset: Point | None, gradient: Point) -> Point:
        if offset is None:
            return gradient
        w = q.mean + offset
        return gradient * ((1 - w**2 + SMALL) / ((1 - q.mean**2 + SMALL) * self.temperature))

    def __call__(self, q: Any, look_at: Sight, noise: Noise) -> Look:
        return mean_of((1.0, self._one(q, look_at, self.offset(q, noise, draw))) for draw in range(self.draws))

    def _one(self, q: Any, look_at: Sight, where: Point | None) -> Look:
        look = look_at(where)
        return look._replace(gradient=self.gradient(q, where, look.gradient))
