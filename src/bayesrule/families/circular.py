"""A family on the circle: :class:`VonMises`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from ..vector import Vector
from .exponential import Standard
from .special import resultant, resultant_inverse


@dataclass(frozen=True, eq=False)
class VonMises(Standard):
    r"""An angle in radians.

    .. math::  T = (\cos x, \sin x), \quad \lambda = k (\cos m, \sin m), \quad
               \mu = \tfrac{I_1(k)}{I_0(k)} (\cos m, \sin m), \quad A = \log 2 \pi I_0(k).

    Args:
        loc: Mean direction m, shape batch_shape, in radians.
        concentration: k, shape batch_shape; 1 / k is about the variance where it is large, 0 is the
            uniform distribution, a prior that says nothing.
    """

    loc: Any
    concentration: Any

    constraints = {"loc": "real", "concentration": "not negative"}  # noqa: RUF012
    torch_class = torch.distributions.VonMises
    reparameterizable = False

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return torch.atan2(natural[1], natural[0]), torch.hypot(natural[0], natural[1])

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        r = torch.hypot(expected[0], expected[1])
        return torch.atan2(expected[1], expected[0]), resultant_inverse(r)

    def _natural(self) -> Vector:
        return Vector([self.concentration * self.loc.cos(), self.concentration * self.loc.sin()])

    def _expected(self) -> Vector:
        r = resultant(self.concentration)
        return Vector([r * self.loc.cos(), r * self.loc.sin()])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta.cos(), theta.sin()])

    def _log_partition(self) -> Tensor:
        return math.log(2 * math.pi) + torch.special.i0e(self.concentration).log() + self.concentration

    def _sample(self, shape: Size) -> Tensor:
        return torch.distributions.VonMises(self.loc, self.concentration.clamp(min=1e-6), validate_args=False).sample(shape)
