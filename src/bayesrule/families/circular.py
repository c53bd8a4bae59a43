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

TINY = 1e-300
"""So small that its root vanishes beside any concentration; it gives the length of a vector a derivative at zero."""


@dataclass(frozen=True, eq=False)
class VonMises(Standard):
    r"""An angle in radians.

    .. math::  T = (\cos x, \sin x), \quad \lambda = k (\cos m, \sin m), \quad
               \mu = \tfrac{I_1(k)}{I_0(k)} (\cos m, \sin m), \quad A = \log 2 \pi I_0(k).

    Args:
        loc: Mean direction m, shape batch_shape, in radians.
        concentration: k, shape batch_shape; 1 / k is about the variance where it is large, 0 is the
            uniform distribution, a prior that says nothing.

    Example:
        >>> VonMises(0.5, 1.2).entropy()
        tensor(1.5545)
    """

    loc: Any
    concentration: Any

    constraints = {"loc": "real", "concentration": "not negative"}  # noqa: RUF012
    torch_class = torch.distributions.VonMises
    reparameterizable = False

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return torch.atan2(natural[1], natural[0]), (natural[0] ** 2 + natural[1] ** 2 + TINY).sqrt() - TINY**0.5

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        r = torch.hypot(expected[0], expected[1])
        return torch.atan2(expected[1], expected[0]), resultant_inverse(r)

    def fisher(self) -> Tensor:
        """In closed form: R'(k) along the mean direction, R / k across it; 1 / 2 both where k is 0."""
        wide = self._wide
        k, r = wide.concentration, resultant(wide.concentration)
        across = torch.where(k > 1e-6, r / k.clamp(min=1e-6), 0.5)
        along = 1 - r**2 - across
        u = torch.stack([wide.loc.cos(), wide.loc.sin()], -1)
        outer = u[..., :, None] * u[..., None, :]
        eye = torch.eye(2, dtype=u.dtype, device=u.device)
        return self._narrow(outer * (along - across)[..., None, None] + eye * across[..., None, None])

    def fisher_mul(self, v: Vector) -> Vector:
        product = (self._wide.fisher() @ torch.stack(tuple(v), -1).double()[..., None])[..., 0]
        return self._narrow(Vector(product.unbind(-1)))

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
