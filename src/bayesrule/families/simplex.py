"""Families of shares that sum to one: :class:`Beta` for two, :class:`Dirichlet` for any number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from ..noise import Noise
from ..vector import Vector
from .exponential import Standard
from .positive import log_gamma_draw
from .special import concentrations_of, digamma, dirichlet_solve


@dataclass(frozen=True, eq=False)
class Beta(Standard):
    r"""The probability of a coin.

    .. math::  T = (\log x, \log(1 - x)), \quad \lambda = (a - 1, b - 1), \quad
               \mu = (\psi(a) - \psi(a + b), \psi(b) - \psi(a + b)), \quad A = \log \Gamma(a) + \log \Gamma(b) - \log \Gamma(a + b).

    Args:
        concentration1: a, shape batch_shape; one more than the heads seen, from a flat start.
        concentration0: b, likewise for tails.

    Example:
        >>> Beta(3.0, 1.0).mean
        tensor(0.7500)
    """

    concentration1: Any
    concentration0: Any

    constraints = {"concentration1": "positive", "concentration0": "positive"}  # noqa: RUF012
    torch_class = torch.distributions.Beta

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return natural[0] + 1, natural[1] + 1

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return concentrations_of(torch.stack(tuple(expected), dim=-1)).unbind(-1)

    def _natural(self) -> Vector:
        return Vector([self.concentration1 - 1, self.concentration0 - 1])

    def _expected(self) -> Vector:
        total = digamma(self.concentration1 + self.concentration0)
        return Vector([digamma(self.concentration1) - total, digamma(self.concentration0) - total])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta.log(), (-theta).log1p()])

    def _log_partition(self) -> Tensor:
        return self.concentration1.lgamma() + self.concentration0.lgamma() - (self.concentration1 + self.concentration0).lgamma()

    def _supports(self, theta: Any) -> Tensor:
        return (theta >= 0) & (theta <= 1)

    def _logs(self, shape: Size) -> Tensor:
        """Log shares of a draw, the two in the last dimension."""
        logs = [log_gamma_draw(value, shape) for value in self._values]
        return torch.stack(logs, -1).log_softmax(-1)

    def _sample(self, shape: Size) -> Tensor:
        kind = torch.finfo(self.concentration1.dtype)
        return self._logs(shape)[..., 0].exp().clamp(kind.tiny, 1 - kind.eps / 2)

    def sample_statistics(self, noise: Noise, shape: Sequence[int] = ()) -> Vector:
        with noise.forked(self.concentration1):
            return Vector(self._logs(Size(shape)).unbind(-1))


@dataclass(frozen=True, eq=False)
class Dirichlet(Standard):
    r"""The probabilities of K classes.

    .. math::  T_k = \log x_k, \quad \lambda = \alpha - 1, \quad \mu_k = \psi(\alpha_k) - \psi(\textstyle\sum \alpha), \quad
               A = \textstyle\sum \log \Gamma(\alpha_k) - \log \Gamma(\sum \alpha).

    Args:
        concentration: alpha, shape (*batch_shape, K).

    Example:
        >>> Dirichlet(torch.tensor([1.0, 1.0, 2.0])).mean
        tensor([0.2500, 0.2500, 0.5000])
    """

    concentration: Any

    constraints = {"concentration": "positive"}  # noqa: RUF012
    dims = {"concentration": 1}  # noqa: RUF012
    block_dims = (1,)
    torch_class = torch.distributions.Dirichlet

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        yield from super()._faults()
        yield "concentration", torch.tensor(self.concentration.shape[-1] > 1), "of at least two classes"

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return (natural[0] + 1,)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return (concentrations_of(expected[0]),)

    def _natural(self) -> Vector:
        return Vector([self.concentration - 1])

    def _expected(self) -> Vector:
        return Vector([digamma(self.concentration) - digamma(self.concentration.sum(-1, keepdim=True))])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta.log()])

    def _log_partition(self) -> Tensor:
        return self.concentration.lgamma().sum(-1) - self.concentration.sum(-1).lgamma()

    def fisher_solve(self, v: Vector) -> Vector:
        wide = self._wide
        return self._narrow(Vector([dirichlet_solve(wide.concentration, v[0].to(wide.concentration.dtype))]))

    def _supports(self, theta: Any) -> Tensor:
        return (theta >= 0).all(-1) & ((theta.sum(-1) - 1).abs() < 1e-5)

    def _sample(self, shape: Size) -> Tensor:
        kind = torch.finfo(self.concentration.dtype)
        return log_gamma_draw(self.concentration, shape).softmax(-1).clamp(min=kind.tiny)

    def sample_statistics(self, noise: Noise, shape: Sequence[int] = ()) -> Vector:
        with noise.forked(self.concentration):
            return Vector([log_gamma_draw(self.concentration, Size(shape)).log_softmax(-1)])
