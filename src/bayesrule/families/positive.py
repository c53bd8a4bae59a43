"""Families of positive numbers: :class:`Gamma`, :class:`InverseGamma`, :class:`Exponential`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from ..noise import Noise
from ..vector import Vector
from .exponential import Standard
from .special import concentration_of, digamma

SMALL = 0.5
"""Below this concentration a draw of a Gamma is made as a logarithm: most draws of a concentration of 0.01 underflow."""


def log_gamma_draw(concentration: Tensor, shape: Size) -> Tensor:
    """The logarithm of a draw of Gamma(concentration, 1), also where the draw itself underflows."""
    a = concentration.expand(shape + concentration.shape)
    small = a < SMALL
    log_draw = torch._standard_gamma(torch.where(small, a + 1, a)).log()
    return torch.where(small, log_draw + (1 - torch.rand_like(a)).log() / a, log_draw)


class _GammaLike(Standard):
    """Two fields, concentration a and rate b; a draw goes by its logarithm where a is small."""

    concentration: Any
    rate: Any
    sign = 1

    def _log_partition(self) -> Tensor:
        return self.concentration.lgamma() - self.concentration * self.rate.log()

    def _supports(self, theta: Any) -> Tensor:
        return theta >= 0

    def _log_draw(self, shape: Size) -> Tensor:
        return self.sign * (log_gamma_draw(self.concentration, shape) - self.rate.log())

    def _sample(self, shape: Size) -> Tensor:
        kind = torch.finfo(self.concentration.dtype)
        return self._log_draw(shape).exp().clamp(kind.tiny, kind.max)

    def sample_statistics(self, noise: Noise, shape: Sequence[int] = ()) -> Vector:
        with noise.forked(self.concentration):
            log = self._log_draw(Size(shape))
        return Vector([log, (self.sign * log).exp()])


@dataclass(frozen=True, eq=False)
class Gamma(_GammaLike):
    r"""A positive number, such as a rate or a precision.

    .. math::  T = (\log x, x), \quad \lambda = (a - 1, -b), \quad \mu = (\psi(a) - \log b, a / b), \quad
               A = \log \Gamma(a) - a \log b.

    Args:
        concentration: Shape parameter a, shape batch_shape.
        rate: b, shape batch_shape.

    Example:
        >>> Gamma(2.0, 4.0).mean
        tensor(0.5000)
    """

    concentration: Any
    rate: Any

    constraints = {"concentration": "positive", "rate": "positive"}  # noqa: RUF012
    torch_class = torch.distributions.Gamma

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return natural[0] + 1, -natural[1]

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        a = concentration_of(expected[1].log() - expected[0])
        return a, a / expected[1]

    def _natural(self) -> Vector:
        return Vector([self.concentration - 1, -self.rate])

    def _expected(self) -> Vector:
        return Vector([digamma(self.concentration) - self.rate.log(), self.concentration / self.rate])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta.log(), theta])


@dataclass(frozen=True, eq=False)
class InverseGamma(_GammaLike):
    r"""One over a Gamma number, such as a variance.

    .. math::  T = (\log x, 1 / x), \quad \lambda = (-a - 1, -b), \quad \mu = (\log b - \psi(a), a / b), \quad
               A = \log \Gamma(a) - a \log b.

    Args:
        concentration: a, shape batch_shape.
        rate: b (a scale of x), shape batch_shape.

    Example:
        >>> InverseGamma(3.0, 2.0).mean
        tensor(1.)
    """

    concentration: Any
    rate: Any

    constraints = {"concentration": "positive", "rate": "positive"}  # noqa: RUF012
    torch_class = torch.distributions.InverseGamma
    sign = -1

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return -natural[0] - 1, -natural[1]

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        a = concentration_of(expected[1].log() + expected[0])
        return a, a / expected[1]

    def _natural(self) -> Vector:
        return Vector([-self.concentration - 1, -self.rate])

    def _expected(self) -> Vector:
        return Vector([self.rate.log() - digamma(self.concentration), self.concentration / self.rate])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta.log(), 1 / theta])

    @property
    def mean(self) -> Any:
        """E_q[theta], infinite for a concentration of at most 1."""
        return torch.where(self.concentration > 1, self.rate / (self.concentration - 1).clamp(min=1e-30), torch.inf)

    @property
    def variance(self) -> Any:
        """Variance, infinite for a concentration of at most 2."""
        return torch.where(self.concentration > 2, self.mean**2 / (self.concentration - 2).clamp(min=1e-30), torch.inf)


@dataclass(frozen=True, eq=False)
class Exponential(Standard):
    r"""A waiting time.

    .. math::  T = x, \quad \lambda = -b, \quad \mu = 1 / b, \quad A = -\log b.

    Args:
        rate: b, shape batch_shape.

    Example:
        >>> Exponential(2.0).kl(Exponential(3.0))
        tensor(0.0945)
    """

    rate: Any

    constraints = {"rate": "positive"}  # noqa: RUF012
    block_dims = (0,)
    torch_class = torch.distributions.Exponential

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return (-natural[0],)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return (1 / expected[0],)

    def _natural(self) -> Vector:
        return Vector([-self.rate])

    def _expected(self) -> Vector:
        return Vector([1 / self.rate])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta])

    def _log_partition(self) -> Tensor:
        return -self.rate.log()

    def _supports(self, theta: Any) -> Tensor:
        return theta >= 0
