r"""Gaussians :math:`N(m, (\text{ess}\,(h + \delta))^{-1})` whose precision is fixed, one number, a diagonal, or full.

Each takes the mean, ``hess`` (h, the curvature of the mean loss), ``weight_decay`` (:math:`\delta`, the prior's precision per
unit of ess) and ``ess``. With the last two left out, ``hess`` is the precision itself: ``Full(mean, precision)``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..rule import Gaussian, Look, Point
from ..vector import Vector, equal, rsqrt


class _Elementwise(Gaussian):
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

    @cached_property
    def metric(self) -> Any:
        return self.hess + self.weight_decay

    @abstractmethod
    def outer(self, a: Point, b: Point) -> Any: ...

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


@dataclass(frozen=True)
class Fixed(_Elementwise):
    """A Gaussian whose precision never moves: gradient descent and SGD.

    Its entropy is constant, so the rule's pull towards the prior is the prior's own gradient.

    Args:
        mean: Shape (...).
        hess: The metric, a number or shaped like the mean.
        weight_decay: Ignored by the metric; there so that all Gaussians are alike.
        ess: Effective sample size.
    """

    mean: Point
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    @property
    def metric(self) -> Any:
        return self.hess

    def precondition(self, v: Point) -> Point:
        return v if equal(self.hess, 1.0) else v / self.hess

    def outer(self, a: Point, b: Point) -> Any:
        return a * b

    def project(self, matrix: Tensor) -> Any:
        return matrix.diagonal()

    def moved(self, *, mean: Point | None = None, hess: Any = None) -> Self:
        if hess is not None:
            raise TypeError("the precision of a Fixed Gaussian does not move; use the curvature Zero or another family")
        return self if mean is None else replace(self, mean=mean)

    def natural(self) -> Point:
        return self.mean * self.precision

    def from_natural(self, natural: Point) -> Self:
        return self.moved(mean=natural / self.precision)

    def expected(self) -> Point:
        return self.mean

    def natural_gradient(self, look: Look) -> Point:
        return look.gradient * self.ess

    def kl_gradient(self, prior: Gaussian) -> Point:
        return self.prior_gradient(prior) * self.ess


class _TwoBlocks(Gaussian):
    """Natural parameters (S m, -S / 2) of a Gaussian whose precision S is free within its structure."""

    @abstractmethod
    def _apply(self, matrix: Any, v: Point) -> Point:
        """A matrix of the structure times a vector."""

    @abstractmethod
    def _second_moment(self) -> Any:
        """What the structure keeps of E[theta theta^T]."""

    def moved(self, *, mean: Point | None = None, hess: Any = None) -> Self:
        return replace(self, mean=self.mean if mean is None else mean, hess=self.hess if hess is None else hess)  # type: ignore[type-var]

    def under(self, prior: Gaussian) -> Self:
        if isinstance(prior, Full) != isinstance(self, Full):
            raise TypeError(f"a {type(self).__name__} needs a prior of its own structure, got a {type(prior).__name__}")
        pull = prior.precision / self.ess
        return self if equal(pull, self.weight_decay) else replace(self, hess=self.metric - pull, weight_decay=pull)  # type: ignore[type-var]

    def natural(self) -> Vector:
        precision = self.precision
        return Vector([self._apply(precision, self.mean), precision * -0.5])

    def from_natural(self, natural: Point) -> Self:
        moved = self.moved(hess=natural[1] * (-2 / self.ess) - self.weight_decay)
        return moved.moved(mean=moved.solve(natural[0]))

    def expected(self) -> Vector:
        return Vector([self.mean, self._second_moment()])

    def natural_gradient(self, look: Look) -> Vector:
        if look.curvature is None:
            raise TypeError(f"the natural gradient of a {type(self).__name__} needs a curvature; the look has none")
        gradient = look.gradient - self._apply(look.curvature, self.mean)
        return Vector([gradient * self.ess, look.curvature * (self.ess / 2)])


@dataclass(frozen=True)
class Isotropic(_TwoBlocks, _Elementwise):
    """A Gaussian with one variance for all elements.

    Args:
        mean: Shape (...).
        hess: Shape ().
        weight_decay: A number or shape ().
        ess: Effective sample size.
    """

    mean: Point
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    def outer(self, a: Point, b: Point) -> Any:
        return (a * b).sum() / self.mean.numel()

    def project(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal().mean()

    def _apply(self, matrix: Any, v: Point) -> Point:
        return v * matrix

    def _second_moment(self) -> Any:
        return (self.mean * self.mean).sum() + self.mean.numel() / self.precision


@dataclass(frozen=True)
class Diagonal(_TwoBlocks, _Elementwise):
    """A Gaussian whose elements are independent: the family of Adam, IVON and everything at scale.

    Args:
        mean: Shape (...); a tensor or a Vector.
        hess: Shaped like the mean, or a number.
        weight_decay: Shaped like the mean, or a number.
        ess: Effective sample size.
    """

    mean: Point
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    def outer(self, a: Point, b: Point) -> Any:
        return a * b

    def project(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal()

    def _apply(self, matrix: Any, v: Point) -> Point:
        return v * matrix

    def _second_moment(self) -> Any:
        return self.mean * self.mean + 1 / self.precision


@dataclass(frozen=True)
class Full(_TwoBlocks):
    """A Gaussian with any precision. Costs D^2 numbers and D^3 operations a step.

    Args:
        mean: Shape (D,).
        hess: Shape (D, D), symmetric; a number stands for that multiple of the identity.
        weight_decay: Shape (D, D), or a number likewise.
        ess: Effective sample size.

    Raises:
        ValueError: When it is used while its precision is not positive definite.

    Example:
        >>> q = Full(torch.zeros(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> q.solve(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    mean: Tensor
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    def __post_init__(self) -> None:
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        for name in ("hess", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() == 0:
                object.__setattr__(self, name, value * eye)

    @cached_property
    def metric(self) -> Tensor:
        metric: Tensor = self.hess + self.weight_decay
        return metric

    @property
    def covariance(self) -> Tensor:
        """Shape (D, D)."""
        return torch.cholesky_inverse(self._root) / self.ess

    @cached_property
    def _root(self) -> Tensor:
        """Lower Cholesky factor of the metric."""
        root, failed = torch.linalg.cholesky_ex(self.metric)
        if failed:
            least = torch.linalg.eigvalsh(self.metric).min().item()
            raise ValueError(
                f"the precision is not positive definite (least eigenvalue {least * self.ess:.3g}): "
                "use the retraction Riemannian, the curvature GaussNewton or a smaller rate"
            )
        return root

    def stretch(self, v: Tensor) -> Tensor:
        return self.metric @ v

    def precondition(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[:, None], self._root)[:, 0]

    def root_precondition(self, v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._root.T, v[:, None], upper=True)[:, 0]

    def sandwich(self, d: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._root, d, upper=False)
        return half.T @ half

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        product = torch.outer(a, b)
        return (product + product.T) / 2

    def project(self, matrix: Tensor) -> Tensor:
        return (matrix + matrix.T) / 2

    def _apply(self, matrix: Tensor, v: Tensor) -> Tensor:
        return matrix @ v

    def _second_moment(self) -> Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)

    def _log_det(self) -> Tensor:
        """Log determinant of the precision."""
        return 2 * self._root.diagonal().log().sum() + len(self.mean) * math.log(self.ess)

    def entropy(self) -> Tensor:
        return (len(self.mean) * math.log(2 * math.pi * math.e) - self._log_det()) / 2

    def kl(self, other: Self) -> Tensor:
        gap = self.mean - other.mean
        trace = (other.precision * self.covariance).sum()
        return (trace + gap @ other.precision @ gap - len(self.mean) + self._log_det() - other._log_det()) / 2

    def log_prob(self, theta: Tensor) -> Tensor:
        gap = theta - self.mean
        return (self._log_det() - len(self.mean) * math.log(2 * math.pi) - gap @ self.precision @ gap) / 2
