r"""A Gaussian that is diagonal in a basis of its own, :math:`S = Q \operatorname{diag}(s) Q^T`: the family of EVON."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..rule import Point
from ..vector import Vector, equal, kept, leaves, rsqrt
from .structure import TwoBlocks


@dataclass(frozen=True)
class Eigen(TwoBlocks):
    r"""A Gaussian whose elements are independent in a basis.

    .. math::  \theta = Q \phi, \qquad \phi \sim N(Q^T m, \operatorname{diag}(s)^{-1}).

    For matrices W the basis has a factor for each axis, :math:`\operatorname{turn}(W) = Q_L^T W Q_R`, so that it costs m^2 + n^2
    numbers and not (m n)^2; the covariance of W is then full, with as many free numbers as W has. With one axis for all of theta
    and the eigenvectors of a precision it is any Gaussian there is.

    For a fixed basis this is an exponential family, the diagonal one in other coordinates: curvature and precision are in the
    basis, mean and gradients are not. A prior is isotropic, or has the same basis.

    Args:
        mean: Shape (...); a tensor, or a Vector with :class:`~bayesrule.bases.Bases`.
        basis: The basis of the mean.
        hess: In the basis, shaped like the mean, or a number.
        weight_decay: Likewise.
        ess: Effective sample size.

    Raises:
        TypeError: The prior is neither isotropic nor of the same basis.

    Example:
        >>> from bayesrule.bases import Basis
        >>> turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
        >>> q = Eigen(torch.zeros(2), Basis((2,), [turn]), torch.tensor([1.0, 100.0]))
        >>> q.variance
        tensor([0.5050, 0.5050])

    Source: B. Minut, N. Daheim et al. (2026), arXiv:2606.23357.
    """

    mean: Point
    basis: Any
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    matrices = None  # type: ignore[assignment]  # other structures refuse it as a prior

    # The metric, in the basis

    @kept
    def metric(self) -> Any:
        return self.hess + self.weight_decay

    def _apply(self, matrix: Any, v: Point) -> Point:
        return self.basis.back(self.basis.turn(v) * matrix)

    def stretch(self, v: Point) -> Point:
        return self._apply(self.metric, v)

    def bend(self, v: Point) -> Point:
        return self._apply(self.hess, v)

    def precondition(self, v: Point) -> Point:
        return self.basis.back(self.basis.turn(v) / self.metric)

    def root_precondition(self, v: Point) -> Point:
        """The deviations times v, which is in the basis, and back."""
        return self.basis.back(v * rsqrt(self.metric))

    def sandwich(self, d: Any) -> Any:
        return d * (d / self.metric)

    @property
    def _precisions(self) -> Point:
        """The precision of every coordinate in the basis, shaped like the mean."""
        return self.mean * 0 + self.precision

    @property
    def variance(self) -> Any:
        """Variance of every element, shaped like the mean."""
        return self.basis.squared().back(1 / self._precisions)

    @property
    def precision_diagonal(self) -> Any:
        """The diagonal of the precision, shaped like the mean."""
        return self.basis.squared().back(self._precisions)

    # What its structure keeps

    def outer(self, a: Point, b: Point) -> Any:
        return self.basis.turn(a) * self.basis.turn(b)

    def keep_diagonal(self, diagonal: Point) -> Any:
        return self.basis.squared().turn(diagonal)

    def project(self, matrix: Tensor) -> Tensor:
        columns = self._turned(matrix.mT)  # row j is the matrix's column j, turned
        whole: Tensor = self._turned(columns.mT).diagonal().reshape(self.mean.shape)
        return whole

    def project_weighted(self, X: Tensor, weights: Tensor) -> Tensor:
        kept: Tensor = (self._turned(X).square().mT @ weights).reshape(self.mean.shape)
        return kept

    def gather(self, factor: Tensor) -> Tensor:
        kept: Tensor = self._turned(factor.mT).square().sum(0).reshape(self.mean.shape)
        return kept

    def spread(self, X: Tensor) -> Tensor:
        return self._turned(X) ** 2 @ (1 / self._precisions).reshape(-1)

    def _turned(self, rows: Tensor) -> Tensor:
        """Every row of a matrix, shape (N, D), in the basis of a mean that is one tensor of D elements."""
        return torch.vmap(self.basis.turn)(rows.reshape(-1, *self.mean.shape)).reshape(rows.shape)

    # Members

    def under(self, prior: Any) -> Self:
        alike = isinstance(prior, Eigen) and prior.basis is self.basis
        if not alike and any(getattr(part, "dim", lambda: 0)() for part in leaves(prior.precision)):
            raise TypeError(f"an Eigen needs a prior that is isotropic or has the same basis, got a {type(prior).__name__}")
        pull = prior.precision / self.ess
        return self if equal(pull, self.weight_decay) else replace(self, hess=self.metric - pull, weight_decay=pull)

    def adds_to(self, other: Any) -> bool:
        return super().adds_to(other) and self.basis.equals(other.basis)

    def natural(self) -> Vector:
        precision = self._precisions
        return Vector([self._apply(precision, self.mean), precision * -0.5])

    def _second_moment(self) -> Any:
        return self.basis.turn(self.mean) ** 2 + 1 / self._precisions

    def statistics(self, theta: Point) -> Vector:
        return Vector([theta, self.basis.turn(theta) ** 2])

    def _precision_of(self, expected: Vector) -> Any:
        return 1 / (expected[1] - self.basis.turn(expected[0]) ** 2)

    # The distribution

    def to_torch(self) -> MultivariateNormal:
        """The same distribution of torch.distributions, over all elements in a row, with a precision of shape (D, D)."""
        eye = torch.eye(self._size, dtype=self.mean.dtype, device=self.mean.device)
        rows = self._turned(eye)
        precision = (rows * self._precisions.reshape(-1)) @ rows.mT
        return MultivariateNormal(self.mean.reshape(-1), precision_matrix=precision, validate_args=False)

    def entropy(self) -> Tensor:
        total: Tensor = ((2 * math.pi * math.e) / self._precisions).log().sum() / 2
        return total

    def kl(self, other: Any) -> Tensor:
        """KL(q || other) in nats, for another whose basis may differ, but not in which axes of theta it turns."""
        mine, theirs = self._precisions, other._precisions
        spread = self.basis.to(other.basis).squared().turn(1 / mine)
        gap = other.basis.turn(self.mean - other.mean)
        total: Tensor = (theirs * spread + theirs * gap * gap - 1 + mine.log() - theirs.log()).sum() / 2
        return total

    def log_prob(self, theta: Point) -> Tensor:
        precision, gap = self._precisions, self.basis.turn(theta - self.mean)
        total: Tensor = ((precision / (2 * math.pi)).log() - precision * gap * gap).sum() / 2
        return total
