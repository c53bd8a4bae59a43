"""The :class:`Wishart`, and joint families of a mean and a scale: what a Gaussian with both unknown is learned with.

One theta of a joint family is a :class:`~bayesrule.Vector` of the mean and the precision, variance or covariance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ..vector import Vector
from .exponential import Standard
from .positive import log_gamma_draw
from .special import concentration_of, df_of, digamma, multi_digamma


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v[..., None])[..., 0]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _inverse(matrix: Tensor) -> Tensor:
    """Of a symmetric positive definite matrix; of another, nan."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    crooked = (matrix - matrix.mT).abs().amax((-2, -1)) > 1e-4 * matrix.abs().amax((-2, -1))
    return torch.cholesky_inverse(torch.where(((failed == 0) & ~crooked)[..., None, None], root, torch.nan))


def _finite(x: Tensor) -> Tensor:
    """Draws kept inside of what their dtype can say."""
    kind = torch.finfo(x.dtype)
    return x.clamp(kind.tiny, kind.max)


def _log_det(matrix: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky_ex(matrix).L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _fits(loc: Tensor, name: str, matrix: Tensor) -> tuple[str, Tensor, str]:
    size = matrix.shape[-1]
    return "loc", torch.tensor(loc.shape[-1] == size), f"of {size} elements, as many as {name} has rows"


class _Located(Standard):
    """A joint family of x, shifted by ``loc``, and a scale."""

    loc: Any

    def _seen_from(self, other: Self) -> Self:
        values = zip(self.constraints, self._values, strict=True)
        return self._unchecked(*(value - other.loc if name == "loc" else value for name, value in values))

    def _theta_from(self, theta: Vector) -> Vector:
        return Vector([theta[0] - self.loc, theta[1]])


def _too_few(df: Tensor, scale: Tensor) -> tuple[str, Tensor, str]:
    size = scale.shape[-1]
    return "df", df.isfinite() & (df > size - 1), f"finite and above {size - 1}, for matrices of {size} rows"


@dataclass(frozen=True, eq=False)
class Wishart(Standard):
    r"""A positive definite matrix, such as a precision.

    .. math::  T = (W, \log |W|), \quad \lambda = (-\tfrac12 V^{-1}, \tfrac{\nu - p - 1}{2}), \quad
               \mu = (\nu V, \log |V| + p \log 2 + \textstyle\sum_{i<p} \psi(\tfrac{\nu - i}{2})).

    Draws are singular more often than not in single precision where df is below p + 1.

    Args:
        df: Degrees of freedom nu > p - 1, shape batch_shape.
        scale: V, shape (*batch_shape, p, p); the mean is df V.

    Example:
        >>> Wishart(4.0, torch.eye(2)).mean
        tensor([[4., 0.],
                [0., 4.]])
    """

    df: Any
    scale: Any

    constraints = {"df": "real", "scale": "positive definite"}  # noqa: RUF012
    dims = {"scale": 2}  # noqa: RUF012
    block_dims = (2, 0)
    torch_class = torch.distributions.Wishart

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        yield from super()._faults()
        yield _too_few(self.df, self.scale)

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return 2 * natural[1] + natural[0].shape[-1] + 1, _inverse(-2 * natural[0])

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        df = df_of(_log_det(expected[0]) - expected[1], expected[0].shape[-1])
        return df, expected[0] / df[..., None, None]

    def _natural(self) -> Vector:
        return Vector([_inverse(self.scale) / -2, (self.df - self.scale.shape[-1] - 1) / 2])

    def _expected(self) -> Vector:
        p = self.scale.shape[-1]
        return Vector([self.df[..., None, None] * self.scale, _log_det(self.scale) + p * math.log(2) + multi_digamma(self.df, p)])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta, _log_det(theta)])

    def _log_partition(self) -> Tensor:
        p = self.scale.shape[-1]
        return self.df / 2 * (_log_det(self.scale) + p * math.log(2)) + torch.mvlgamma(self.df / 2, p)

    @classmethod
    def _read(cls, distribution: Any) -> tuple[Any, ...]:
        return distribution.df, distribution.covariance_matrix

    def _make(self) -> Distribution:
        return torch.distributions.Wishart(self.df, covariance_matrix=self.scale, validate_args=False)

    def _sample(self, shape: Size) -> Tensor:
        factor = _bartlett(self.df, torch.linalg.cholesky(self.scale), shape)
        return _symmetric(factor @ factor.mT)


def _bartlett(df: Tensor, root: Tensor, shape: Size) -> Tensor:
    """A lower factor T of a draw T T^T of a Wishart with scale root root^T, by Bartlett's decomposition."""
    p = root.shape[-1]
    steps = torch.arange(p, dtype=root.dtype, device=root.device)
    chi = (2 * _finite(log_gamma_draw((df[..., None] - steps) / 2, shape).exp())).sqrt()
    return root @ (torch.randn(shape + root.shape, dtype=root.dtype, device=root.device).tril(-1) + torch.diag_embed(chi))


@dataclass(frozen=True, eq=False)
class NormalGamma(_Located):
    r"""A mean x and a precision t: :math:`t \sim \text{Gamma}(a, b),\ x \mid t \sim N(m, 1 / (\kappa t))`.

    .. math::  T = (\log t, t, t x, t x^2), \quad
               \lambda = (a - \tfrac12, -b - \tfrac{\kappa m^2}{2}, \kappa m, -\tfrac{\kappa}{2}).

    A theta is ``Vector([x, t])``.

    Args:
        loc: m, shape batch_shape.
        kappa: How many observations the mean counts for, shape batch_shape.
        concentration: a, shape batch_shape.
        rate: b, shape batch_shape.

    Example:
        >>> NormalGamma(0.5, 1.2, 2.0, 1.0).mean
        Vector(tensor(0.5000), tensor(2.))
    """

    loc: Any
    kappa: Any
    concentration: Any
    rate: Any

    constraints = {"loc": "real", "kappa": "positive", "concentration": "positive", "rate": "positive"}  # noqa: RUF012
    block_dims = (0, 0, 0, 0)

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        kappa = -2 * natural[3]
        loc = natural[2] / kappa
        return loc, kappa, natural[0] + 0.5, -natural[1] - kappa * loc**2 / 2

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        log, precision, first, second = expected
        a = concentration_of(precision.log() - log)
        loc = first / precision
        return loc, 1 / (second - loc * first), a, a / precision

    def _natural(self) -> Vector:
        pull = self.kappa * self.loc
        return Vector([self.concentration - 0.5, -self.rate - pull * self.loc / 2, pull, self.kappa / -2])

    def _expected(self) -> Vector:
        precision = self.concentration / self.rate
        log = digamma(self.concentration) - self.rate.log()
        return Vector([log, precision, self.loc * precision, 1 / self.kappa + self.loc**2 * precision])

    def _statistics(self, theta: Any) -> Vector:
        x, t = theta
        return Vector([t.log(), t, t * x, t * x**2])

    def _log_partition(self) -> Tensor:
        a = self.concentration
        return a.lgamma() - a * self.rate.log() + (2 * math.pi / self.kappa).log() / 2

    @property
    def mean(self) -> Vector:
        return Vector([self.loc, self.concentration / self.rate])

    def _sample(self, shape: Size) -> Vector:
        t = _finite((log_gamma_draw(self.concentration, shape) - self.rate.log()).exp())
        return Vector([self.loc + torch.randn_like(t) * (self.kappa * t).rsqrt(), t])


@dataclass(frozen=True, eq=False)
class NormalInverseGamma(_Located):
    r"""Weights x and a variance v: :math:`v \sim \text{InvGamma}(a, b),\ x \mid v \sim N(m, v K^{-1})`, for regression.

    .. math::  T = (\log v, \tfrac1v, \tfrac{x}{v}, \tfrac{x x^T}{v}), \quad
               \lambda = (-a - 1 - \tfrac{D}{2}, -b - \tfrac12 m^T K m, K m, -\tfrac12 K).

    A theta is ``Vector([x, v])``.

    Args:
        loc: m, shape (*batch_shape, D).
        precision: K, in units of 1 / v, shape (*batch_shape, D, D).
        concentration: a, shape batch_shape.
        rate: b, shape batch_shape.

    Example:
        >>> NormalInverseGamma(torch.zeros(1), torch.eye(1), 3.0, 2.0).mean[1]
        tensor(1.)
    """

    loc: Any
    precision: Any
    concentration: Any
    rate: Any

    constraints = {  # noqa: RUF012
        "loc": "real",
        "precision": "positive definite",
        "concentration": "positive",
        "rate": "positive",
    }
    dims = {"loc": 1, "precision": 2}  # noqa: RUF012
    block_dims = (0, 0, 1, 2)

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        yield _fits(self.loc, "precision", self.precision)
        yield from super()._faults()

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        precision = -2 * natural[3]
        loc = _times(_inverse(precision), natural[2])
        rate = -natural[1] - (natural[2] * loc).sum(-1) / 2
        return loc, precision, -natural[0] - 1 - natural[2].shape[-1] / 2, rate

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        log, inverse, first, second = expected
        a = concentration_of(inverse.log() + log)
        loc = first / inverse[..., None]
        return loc, _inverse(second - _outer(loc, first)), a, a / inverse

    def _natural(self) -> Vector:
        pull = _times(self.precision, self.loc)
        half = self.loc.shape[-1] / 2
        return Vector([-self.concentration - 1 - half, -self.rate - (pull * self.loc).sum(-1) / 2, pull, self.precision / -2])

    def _expected(self) -> Vector:
        inverse = self.concentration / self.rate
        first = self.loc * inverse[..., None]
        log = self.rate.log() - digamma(self.concentration)
        return Vector([log, inverse, first, _inverse(self.precision) + _outer(self.loc, first)])

    def _statistics(self, theta: Any) -> Vector:
        x, v = theta
        return Vector([v.log(), 1 / v, x / v[..., None], _outer(x, x) / v[..., None, None]])

    def _log_partition(self) -> Tensor:
        a, size = self.concentration, self.loc.shape[-1]
        return a.lgamma() - a * self.rate.log() - _log_det(self.precision) / 2 + size / 2 * math.log(2 * math.pi)

    @property
    def mean(self) -> Vector:
        a = self.concentration
        return Vector([self.loc, torch.where(a > 1, self.rate / (a - 1).clamp(min=1e-30), torch.inf)])

    def _sample(self, shape: Size) -> Vector:
        v = _finite((self.rate.log() - log_gamma_draw(self.concentration, shape)).exp())
        normal = torch.randn(shape + self.loc.shape, dtype=v.dtype, device=v.device)
        spread = torch.linalg.solve_triangular(torch.linalg.cholesky(self.precision).mT, normal[..., None], upper=True)[..., 0]
        return Vector([self.loc + spread * v.sqrt()[..., None], v])


@dataclass(frozen=True, eq=False)
class NormalInverseWishart(_Located):
    r"""A mean x and a covariance S: :math:`S \sim \text{InvWishart}(\nu, \Psi),\ x \mid S \sim N(m, S / \kappa)`.

    .. math::  T = (S^{-1} x, x^T S^{-1} x, S^{-1}, \log |S|), \quad
               \lambda = (\kappa m, -\tfrac{\kappa}{2}, -\tfrac12 (\Psi + \kappa m m^T), -\tfrac{\nu + D + 2}{2}).

    A theta is ``Vector([x, S])``.

    Args:
        loc: m, shape (*batch_shape, D).
        kappa: How many observations the mean counts for, shape batch_shape.
        df: nu > D - 1, shape batch_shape.
        scale: Psi, shape (*batch_shape, D, D).

    Example:
        >>> NormalInverseWishart(torch.zeros(1), 1.0, 4.0, torch.eye(1)).mean[1]
        tensor([[0.5000]])
    """

    loc: Any
    kappa: Any
    df: Any
    scale: Any

    constraints = {"loc": "real", "kappa": "positive", "df": "real", "scale": "positive definite"}  # noqa: RUF012
    dims = {"loc": 1, "scale": 2}  # noqa: RUF012
    block_dims = (1, 0, 2, 0)

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        yield _fits(self.loc, "scale", self.scale)
        yield from super()._faults()
        yield _too_few(self.df, self.scale)

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        kappa = -2 * natural[1]
        loc = natural[0] / kappa[..., None]
        return loc, kappa, -2 * natural[3] - loc.shape[-1] - 2, -2 * natural[2] - _outer(loc, natural[0])

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        first, second, inverse, log_det = expected
        size = first.shape[-1]
        loc = _times(_inverse(inverse), first)
        df = df_of(log_det + _log_det(inverse), size)
        return loc, size / (second - (loc * first).sum(-1)), df, df[..., None, None] * _inverse(inverse)

    def _natural(self) -> Vector:
        pull = self.kappa[..., None] * self.loc
        third = (self.scale + _outer(self.loc, pull)) / -2
        return Vector([pull, self.kappa / -2, third, (self.df + self.loc.shape[-1] + 2) / -2])

    def _expected(self) -> Vector:
        size = self.loc.shape[-1]
        inverse = self.df[..., None, None] * _inverse(self.scale)
        first = _times(inverse, self.loc)
        log_det = _log_det(self.scale) - size * math.log(2) - multi_digamma(self.df, size)
        return Vector([first, size / self.kappa + (first * self.loc).sum(-1), inverse, log_det])

    def _statistics(self, theta: Any) -> Vector:
        x, covariance = theta
        inverse = _inverse(covariance)
        first = _times(inverse, x)
        return Vector([first, (x * first).sum(-1), inverse, _log_det(covariance)])

    def _log_partition(self) -> Tensor:
        size, half = self.loc.shape[-1], self.df / 2
        total = torch.mvlgamma(half, size) + half * size * math.log(2) - half * _log_det(self.scale)
        return total + size / 2 * (2 * math.pi / self.kappa).log()

    @property
    def mean(self) -> Vector:
        free = (self.df - self.loc.shape[-1] - 1)[..., None, None]
        return Vector([self.loc, torch.where(free > 0, self.scale / free.clamp(min=1e-30), torch.inf)])

    def _sample(self, shape: Size) -> Vector:
        factor = _bartlett(self.df, torch.linalg.cholesky(_inverse(self.scale)), shape).mT
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        half = torch.linalg.solve_triangular(factor, eye, upper=True)  # half half^T is the covariance
        normal = torch.randn(shape + self.loc.shape, dtype=factor.dtype, device=factor.device)
        return Vector([self.loc + _times(half, normal) * self.kappa.rsqrt()[..., None], _symmetric(half @ half.mT)])
