"""What the structures of Gaussians share: element by element or by matrices, with a precision that moves or not."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ..family import DomainError, Gaussian
from ..rule import Look, Point
from ..vector import Vector, equal, holds, kept, leaves, rsqrt
from .exponential import ExponentialFamily


def _in(dtype: torch.dtype, point: Any) -> Any:
    """A point in another dtype; numbers stay."""
    if isinstance(point, Vector):
        return point.map(lambda part: _in(dtype, part))
    return point.to(dtype) if isinstance(point, Tensor) else point


ROWS = 4096
"""Rows that are worked on together: what is made of them stays in a core's cache."""


def gram(X: Tensor, weights: Tensor) -> Tensor:
    """X^T diag(weights) X, without a second X."""
    total = X.new_zeros(X.shape[1], X.shape[1])
    for rows, some in zip(X.split(ROWS), weights.split(ROWS), strict=True):
        total = torch.addmm(total, rows.mT, some[:, None] * rows)
    return total


class Structured(Gaussian, ExponentialFamily):
    """What all structures share: the log partition by way of the entropy, and digits for the Fisher matrix."""

    matrices = False
    """Whether precisions are matrices."""

    score = Gaussian.score

    def _inner(self, a: Point, b: Point) -> Tensor:
        """Inner product of two thetas."""
        total: Tensor = (a * b).sum()
        return total

    def log_partition(self) -> Tensor:
        return self.entropy() + (self._inner(self.mean, self.stretch(self.mean)) * self.ess - self._size) / 2

    @abstractmethod
    def spread(self, X: Tensor) -> Tensor:
        """Variances of x^T theta for rows x of X, shape (N,) for X of shape (N, D)."""

    @abstractmethod
    def gather(self, factor: Tensor) -> Any:
        """What the structure keeps of B B^T, for a factor B of shape (D, n)."""

    @abstractmethod
    def project_weighted(self, X: Tensor, weights: Tensor) -> Any:
        """What the structure keeps of X^T diag(weights) X."""

    @property
    @abstractmethod
    def _precisions(self) -> Point:
        """The precision of every element, shaped like the mean."""

    @abstractmethod
    def keep_diagonal(self, diagonal: Point) -> Any:
        """What the structure keeps of a matrix with this diagonal and nothing else."""

    @property
    def _size(self) -> int:
        """Number of elements of one theta."""
        size: int = self.mean.numel()
        return size

    def to(self, dtype: torch.dtype) -> Self:
        fields = {name: getattr(self, name) for name in ("mean", "hess", "weight_decay")}
        return replace(self, **{name: _in(dtype, value) for name, value in fields.items()})  # type: ignore[type-var]

    def fisher_mul(self, v: Vector) -> Vector:
        return self._narrow(ExponentialFamily.fisher_mul(self.to(torch.float64), _in(torch.float64, v)))

    def fisher_solve(self, v: Vector) -> Vector:
        wide = self.to(torch.float64)
        return self._narrow(ExponentialFamily.fisher_solve(wide, _in(torch.float64, v)))

    def _narrow(self, point: Any) -> Any:
        return _in(leaves(self.mean)[0].dtype, point)

    @property
    def variance(self) -> Any:
        """Variance of every element, shaped like the mean."""
        return self.mean * 0 + 1 / self.precision


class Elementwise(Structured):
    """A metric that multiplies element by element: a number, or something shaped like the mean."""

    def stretch(self, v: Point) -> Point:
        return v * self.metric

    def precondition(self, v: Point) -> Point:
        return v / self.metric

    def root_precondition(self, v: Point) -> Point:
        return v * rsqrt(self.metric)

    def root_solve(self, v: Point) -> Point:
        return v * rsqrt(self.precision)

    def sandwich(self, d: Any) -> Any:
        return d * (d / self.metric)

    @kept
    def metric(self) -> Any:
        return self.hess + self.weight_decay

    @abstractmethod
    def outer(self, a: Point, b: Point) -> Any: ...

    def spread(self, X: Tensor) -> Tensor:
        return X**2 @ (1 / self._precisions)

    def project_weighted(self, X: Tensor, weights: Tensor) -> Any:
        return self.keep_diagonal((X**2).mT @ weights)

    def gather(self, factor: Tensor) -> Any:
        return self.keep_diagonal((factor**2).sum(1))

    def keep_diagonal(self, diagonal: Point) -> Any:
        return diagonal

    def to_torch(self) -> Distribution:
        return Independent(Normal(self.mean, self._precisions.rsqrt(), validate_args=False), self.mean.dim(), validate_args=False)

    @classmethod
    def _normal(cls, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """Mean and precision of a distribution of torch that is one theta of independent normals."""
        normal = distribution.base_dist if isinstance(distribution, Independent) else distribution
        if not isinstance(normal, Normal) or distribution.batch_shape:
            raise TypeError(f"a {cls.__name__} is made from an Independent Normal without a batch, got {distribution}")
        return normal.loc, normal.scale**-2

    @property
    def _precisions(self) -> Point:
        """The precision of every element, shaped like the mean."""
        return self.mean * 0 + self.precision

    def entropy(self) -> Tensor:
        total: Tensor = ((2 * math.pi * math.e) / self._precisions).log().sum() / 2
        return total

    def kl(self, other: Self) -> Tensor:
        mine, theirs = self._precisions, other._precisions
        gap = self.mean - other.mean
        total: Tensor = (theirs / mine + theirs * gap * gap - 1 + (mine / theirs).log()).sum() / 2
        return total

    def log_prob(self, theta: Point) -> Tensor:
        precision, gap = self._precisions, theta - self.mean
        total: Tensor = ((precision / (2 * math.pi)).log() - precision * gap * gap).sum() / 2
        return total


class TwoBlocks(Structured):
    """Natural parameters (S m, -S / 2) of a Gaussian whose precision S is free within its structure."""

    def as_look(self, natural_gradient: Vector) -> Look:
        first, second = natural_gradient
        return Look(None, (first + self._apply(second, self.mean) * 2) / self.ess, second * (2 / self.ess))

    @abstractmethod
    def _apply(self, matrix: Any, v: Point) -> Point:
        """A matrix of the structure times a vector."""

    @abstractmethod
    def _second_moment(self) -> Any:
        """What the structure keeps of E[theta theta^T]."""

    def moved(self, *, mean: Point | None = None, hess: Any = None) -> Self:
        return replace(self, mean=self.mean if mean is None else mean, hess=self.hess if hess is None else hess)  # type: ignore[type-var]

    def under(self, prior: Any) -> Self:
        if prior.matrices != self.matrices:
            raise TypeError(f"a {type(self).__name__} needs a prior of its own structure, got a {type(prior).__name__}")
        pull = prior.precision / self.ess
        return self if equal(pull, self.weight_decay) else replace(self, hess=self.metric - pull, weight_decay=pull)  # type: ignore[type-var]

    def natural(self) -> Vector:
        precision = self.precision
        if not isinstance(precision, Tensor | Vector):  # a number stands for all elements
            precision = self.keep_diagonal(self._precisions)
        return Vector([self._apply(precision, self.mean), precision * -0.5])

    def from_natural(self, natural: Point) -> Self:
        moved = self.moved(hess=natural[1] * (-2 / self.ess) - self.weight_decay)
        try:
            if not self.matrices and not holds(all_positive(natural[1] * -2)):
                raise DomainError("a precision is not positive; take a smaller step")
            return moved.moved(mean=moved.solve(natural[0]))
        except DomainError as error:
            raise DomainError(f"natural is outside the domain of {type(self).__name__}: {error}") from None

    def expected(self) -> Vector:
        return Vector([self.mean, self._second_moment()])

    @abstractmethod
    def _precision_of(self, expected: Vector) -> Any:
        """The precision of the member with this expectation parameter."""

    def from_expected(self, expected: Vector) -> Self:
        return self.moved(mean=expected[0], hess=self._precision_of(expected) / self.ess - self.weight_decay)

    def in_domain(self, natural: Vector) -> Tensor:
        return all_finite(natural) & all_positive(natural[1] * -2)

    def natural_gradient(self, look: Look) -> Vector:
        if look.curvature is None:
            raise TypeError(f"the natural gradient of a {type(self).__name__} needs a curvature; the look has none")
        gradient = look.gradient - self._apply(look.curvature, self.mean)
        return Vector([gradient * self.ess, look.curvature * (self.ess / 2)])


def all_finite(point: Any) -> Tensor:
    """Whether all numbers of a point are finite, shape ()."""
    return torch.stack([all_finite(part) for part in point]).all() if isinstance(point, Vector) else point.isfinite().all()


def all_positive(point: Any) -> Tensor:
    """Whether all numbers of a point are positive, shape ()."""
    return torch.stack([all_positive(part) for part in point]).all() if isinstance(point, Vector) else (point > 0).all()
