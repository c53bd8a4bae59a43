r"""Families of counts and choices: :class:`Bernoulli`, :class:`SignedBernoulli`, :class:`Categorical`, :class:`Poisson`.

Finite ones know their ``support``. A batch of them is one theta of independent elements there, so a function of all elements
together is looked at in every combination: 2^n of them for n Bernoullis.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import AffineTransform, Distribution, TransformedDistribution
from torch.nn.functional import logsigmoid, one_hot

from ..rule import Look
from ..vector import Vector
from .exponential import Standard


class _Finite(Standard):
    """A family with finitely many values, equally many for each element."""

    reparameterizable = False
    values: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    def _supports(self, theta: Any) -> Tensor:
        return torch.stack([theta == value for value in self._choices()]).any(0)

    def _choices(self) -> tuple[float, ...]:
        return self.values

    def support(self) -> Iterator[tuple[Tensor, Tensor, Vector]]:
        like = self._values[0]
        for combination in product(self._choices(), repeat=self.batch_shape.numel()):
            point = torch.tensor(combination, dtype=like.dtype, device=like.device).view(self.batch_shape)
            own = self.log_prob(point)
            others = (own.sum() - own).exp()  # of all elements but one: what changes with the probability of that one
            yield own.sum().exp(), point, Vector([self._lever(point) * (others[..., None] if self.block_dims[0] else others)])

    def score(self, where: Tensor) -> Look:
        inverse = (-self.log_prob(where)).exp()
        return Look(None, Vector([self._lever(where) * (inverse[..., None] if self.block_dims[0] else inverse)]), None)

    @abstractmethod
    def _lever(self, point: Tensor) -> Tensor:
        """How the probability of each element's value changes with its mu."""


@dataclass(frozen=True, eq=False)
class Bernoulli(_Finite):
    r"""A coin with values 0 and 1.

    .. math::  T = x, \quad \lambda = \log \tfrac{p}{1-p}, \quad \mu = p, \quad A = \log(1 + e^\lambda).

    Args:
        logits: Log odds of a 1, shape batch_shape.

    Example:
        >>> Bernoulli(torch.tensor(0.8)).expected()[0]
        tensor(0.6900)
    """

    logits: Any

    constraints = {"logits": "real"}  # noqa: RUF012
    block_dims = (0,)
    torch_class = torch.distributions.Bernoulli

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return (natural[0],)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return (expected[0].logit(),)

    def _natural(self) -> Vector:
        return Vector([self.logits])

    def _expected(self) -> Vector:
        return Vector([self.logits.sigmoid()])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta])

    def _log_partition(self) -> Tensor:
        return -logsigmoid(-self.logits)

    def _lever(self, point: Tensor) -> Tensor:
        return 2 * point - 1

    def fisher_solve(self, v: Vector) -> Vector:
        return v / (self.logits.sigmoid() * (-self.logits).sigmoid())

    def _make(self) -> Distribution:
        return torch.distributions.Bernoulli(logits=self.logits, validate_args=False)


class _Recode(AffineTransform):
    """Other names for the same values: no density is stretched."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class SignedBernoulli(_Finite):
    r"""A coin with values -1 and 1: binary weights.

    .. math::  T = x, \quad \lambda = \tfrac12 \log \tfrac{p}{1-p}, \quad \mu = \tanh \lambda, \quad A = \log 2 \cosh \lambda.

    Args:
        logits: Log odds of a 1, shape batch_shape; twice the natural parameter.

    Example:
        >>> SignedBernoulli(torch.tensor(0.0)).mean
        tensor(0.)
    """

    logits: Any

    constraints = {"logits": "real"}  # noqa: RUF012
    block_dims = (0,)
    values = (-1.0, 1.0)

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return (natural[0] * 2,)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return (expected[0].log1p() - (-expected[0]).log1p(),)

    def _natural(self) -> Vector:
        return Vector([self.logits / 2])

    def _expected(self) -> Vector:
        return Vector([(self.logits / 2).tanh()])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta])

    def _log_partition(self) -> Tensor:
        return self.logits / 2 - logsigmoid(self.logits)

    def _lever(self, point: Tensor) -> Tensor:
        return point / 2

    def fisher_solve(self, v: Vector) -> Vector:
        return v / (4 * self.logits.sigmoid() * (-self.logits).sigmoid())

    def _make(self) -> Distribution:
        coin = torch.distributions.Bernoulli(logits=self.logits, validate_args=False)
        return TransformedDistribution(coin, [_Recode(-1.0, 2.0)], validate_args=False)

    @classmethod
    def from_torch(cls, distribution: Distribution) -> SignedBernoulli:
        transforms = getattr(distribution, "transforms", [])
        base = getattr(distribution, "base_dist", None)
        flips = [t for t in transforms if isinstance(t, AffineTransform) and (t.loc, t.scale) == (-1.0, 2.0)]
        if not isinstance(base, torch.distributions.Bernoulli) or len(flips) != 1 or len(transforms) != 1:
            raise TypeError("a SignedBernoulli is made from a Bernoulli transformed by AffineTransform(-1, 2)")
        return cls(base.logits)

    @property
    def mean(self) -> Any:
        return self.expected()[0]

    @property
    def variance(self) -> Any:
        return 1 - self.mean**2


@dataclass(frozen=True, eq=False)
class Categorical(_Finite):
    r"""One of K classes, numbered from 0; the last is the reference, so the parameter is minimal.

    .. math::  T = \text{one-hot without the last}, \quad \lambda_k = \log \tfrac{p_k}{p_K}, \quad \mu_k = p_k, \quad
               A = \log \textstyle\sum_k e^{\lambda_k}.

    Args:
        logits: Log probabilities up to a constant, shape (*batch_shape, K).

    Example:
        >>> Categorical(torch.tensor([0.0, 0.0])).entropy()
        tensor(0.6931)
    """

    logits: Any

    constraints = {"logits": "real"}  # noqa: RUF012
    dims = {"logits": 1}  # noqa: RUF012
    block_dims = (1,)
    torch_class = torch.distributions.Categorical

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        yield from super()._faults()
        yield "logits", torch.tensor(self.logits.shape[-1] > 1), "of at least two classes"

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        free = natural[0]
        return (torch.cat([free, torch.zeros_like(free[..., :1])], dim=-1),)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        free = expected[0]
        return (torch.cat([free, 1 - free.sum(-1, keepdim=True)], dim=-1).log(),)

    def _natural(self) -> Vector:
        return Vector([self.logits[..., :-1] - self.logits[..., -1:]])

    def _expected(self) -> Vector:
        return Vector([self.logits.softmax(-1)[..., :-1]])

    def _statistics(self, theta: Any) -> Vector:
        hot = one_hot(theta.long().clamp(0, self.logits.shape[-1] - 1), self.logits.shape[-1])[..., :-1]
        return Vector([hot.to(self.logits.dtype)])

    def _log_partition(self) -> Tensor:
        return self.logits.logsumexp(-1) - self.logits[..., -1]

    def _make(self) -> Distribution:
        return torch.distributions.Categorical(logits=self.logits, validate_args=False)

    def _choices(self) -> tuple[float, ...]:
        return tuple(range(self.logits.shape[-1]))

    def _lever(self, point: Tensor) -> Tensor:
        hot = one_hot(point.long(), self.logits.shape[-1]).to(self.logits.dtype)
        return hot[..., :-1] - hot[..., -1:]

    def fisher_solve(self, v: Vector) -> Vector:
        shares = self.logits.softmax(-1)
        return Vector([v[0] / shares[..., :-1] + v[0].sum(-1, keepdim=True) / shares[..., -1:]])

    @property
    def mean(self) -> Any:
        """The classes' probabilities: a class number has no mean."""
        return self.logits.softmax(-1)

    @property
    def variance(self) -> Any:
        return self.mean * (1 - self.mean)


@dataclass(frozen=True, eq=False)
class Poisson(Standard):
    r"""Counts; the one family here whose base measure h = 1 / x! is not constant.

    .. math::  T = x, \quad \lambda = \log r, \quad \mu = r, \quad A = e^\lambda.

    The entropy is a sum up to a rate of 100, beyond it Stirling's series, right to 1e-11.

    Args:
        rate: Mean count r, shape batch_shape.

    Example:
        >>> Poisson(3.0).entropy()
        tensor(1.9315)
    """

    rate: Any

    constraints = {"rate": "positive"}  # noqa: RUF012
    block_dims = (0,)
    torch_class = torch.distributions.Poisson
    reparameterizable = False

    @classmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        return (natural[0].exp(),)

    @classmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        return (expected[0],)

    def _natural(self) -> Vector:
        return Vector([self.rate.log()])

    def _expected(self) -> Vector:
        return Vector([self.rate])

    def _statistics(self, theta: Any) -> Vector:
        return Vector([theta])

    def _log_partition(self) -> Tensor:
        return self.rate

    def log_base_measure(self, theta: Any) -> Any:
        return -torch.lgamma(theta + 1)

    def _mean_log_base_measure(self) -> Tensor:
        small, large = self.rate.clamp(max=_SUMMED), self.rate.clamp(min=_SUMMED)
        counts = torch.arange(int(_SUMMED + 15 * math.sqrt(_SUMMED) + 30), dtype=self.rate.dtype, device=self.rate.device)
        factorial = torch.lgamma(counts + 1)
        total = torch.zeros_like(self.rate)
        for count, log_factorial in zip(counts, factorial, strict=True):
            total = total + (count * small.log() - small - log_factorial).exp() * log_factorial
        entropy = (2 * math.pi * math.e * large).log() / 2
        for power, coefficient in enumerate((1 / 12, 1 / 24, 19 / 360, 9 / 80, 863 / 2520), start=1):
            entropy = entropy - coefficient / large**power
        return torch.where(self.rate <= _SUMMED, -total, large - large * large.log() - entropy)

    def _supports(self, theta: Any) -> Tensor:
        return (theta >= 0) & (theta == theta.round())

    def _sample(self, shape: Size) -> Tensor:
        return self.to_torch().sample(shape)


_SUMMED = 100.0
