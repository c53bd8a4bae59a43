"""The :class:`Normal`: one number a problem, in batches. A :class:`~bayesrule.Diagonal` is one theta of many elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ..vector import Vector
from .exponential import Standard


@dataclass(frozen=True, eq=False)
class Normal(Standard):
    r"""A real number.

    .. math::  T = (x, x^2), \quad \lambda = (s m, -\tfrac{s}{2}), \quad \mu = (m, m^2 + \tfrac1s), \quad
               A = \tfrac12 s m^2 + \tfrac12 \log \tfrac{2 \pi}{s}.

    Args:
        loc: Mean m, shape batch_shape.
        precision: s, shape batch_shape.

    Example:
        >>> Normal(1.0, 4.0).variance
        tensor(0.2500)
    """

    loc: Any
    precision: Any

    constraints = {"loc": "real", "precision": "positive"}  # noqa: RUF012
    torch_class = torch.distributions.Normal

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        precision = -2 * natural[1]
        return natural[0] / precision, precision

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return expected[0], 1 / (expected[1] - expected[0] ** 2)

    def _natural(self) -> Vector:
        return Vector([self.precision * self.loc, self.precision / -2])

    def _expected(self) -> Vector:
        return Vector([self.loc, self.loc**2 + 1 / self.precision])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta, theta**2])

    def _log_partition(self) -> Tensor:
        return (self.precision * self.loc**2 + (2 * math.pi / self.precision).log()) / 2

    def entropy(self) -> Tensor:
        return (2 * math.pi * math.e / self.precision).log() / 2

    def kl(self, other: Normal) -> Tensor:
        ratio, gap = other.precision / self.precision, self.loc - other.loc
        return (ratio - 1 - ratio.log() + other.precision * gap**2) / 2

    def log_prob(self, theta: Any) -> Tensor:
        return ((self.precision / (2 * math.pi)).log() - self.precision * (theta - self.loc) ** 2) / 2

    @classmethod
    def _read(cls, distribution: Any) -> tuple[Any, ...]:
        return distribution.loc, distribution.scale**-2

    def _make(self) -> Distribution:
        return torch.distributions.Normal(self.loc, self.precision.rsqrt(), validate_args=False)

    def _sample(self, shape: Size) -> Tensor:
        return self.to_torch().rsample(shape)
