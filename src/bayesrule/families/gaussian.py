r"""Gaussians :math:`N(m, (\text{ess}\,(h + \delta))^{-1})` whose precision is fixed, one number, a diagonal, or full.

Each takes the mean, ``hess`` (h, the curvature of the mean loss), ``weight_decay`` (:math:`\delta`, the prior's precision per
unit of ess) and ``ess``. With the last two left out, ``hess`` is the precision itself: ``Full(mean, precision)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, MultivariateNormal

from ..family import DomainError, Gaussian
from ..rule import Look, Point
from ..vector import Vector, equal, holds, kept
from .structure import ROWS, Elementwise, TwoBlocks, all_finite, gram


@dataclass(frozen=True)
class Fixed(Elementwise):
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

    def root_solve(self, v: Point) -> Point:
        return v * self.precision**-0.5  # of a number, too, whose kind a recording does not tell

    def bend(self, v: Point) -> Point:
        return self.stretch(v)

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

    def from_expected(self, expected: Point) -> Self:
        return self.moved(mean=expected)

    def as_look(self, natural_gradient: Point) -> Look:
        return Look(None, natural_gradient / self.ess, None)

    @classmethod
    def from_torch(cls, distribution: Distribution) -> Self:
        """The same distribution, from torch's Independent Normal."""
        return cls(*cls._normal(distribution))

    def in_domain(self, natural: Point) -> Tensor:
        return all_finite(natural)

    def statistics(self, theta: Point) -> Point:
        return theta

    def log_partition(self) -> Tensor:
        """A with all that does not move counted to h."""
        total: Tensor = (self.mean * self.mean * self.precision).sum() / 2
        return total

    def score(self, where: Point) -> Look:
        return Look(None, self.stretch(where) * self.ess, None)

    def natural_gradient(self, look: Look) -> Point:
        return look.gradient * self.ess

    def kl_gradient(self, prior: Gaussian) -> Point:
        return self.prior_gradient(prior) * self.ess


@dataclass(frozen=True)
class Isotropic(TwoBlocks, Elementwise):
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

    def under(self, prior: Any) -> Self:
        if getattr(prior.precision, "dim", lambda: 0)() or isinstance(prior.precision, Vector):
            raise TypeError("an Isotropic needs a prior of one precision for all elements; use a Diagonal")
        return super().under(prior)

    def outer(self, a: Point, b: Point) -> Any:
        return (a * b).sum() / self.mean.numel()

    def project(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal().mean()

    def keep_diagonal(self, diagonal: Point) -> Tensor:
        return diagonal.sum() / self.mean.numel()

    def _apply(self, matrix: Any, v: Point) -> Point:
        return v * matrix

    def _second_moment(self) -> Any:
        return (self.mean * self.mean).sum() + self.mean.numel() / self.precision

    def statistics(self, theta: Point) -> Vector:
        return Vector([theta, (theta * theta).sum()])

    def _precision_of(self, expected: Vector) -> Any:
        return self.mean.numel() / (expected[1] - (expected[0] * expected[0]).sum())

    @classmethod
    def from_torch(cls, distribution: Distribution) -> Self:
        """The same distribution, from torch's Independent Normal of one scale."""
        mean, precision = cls._normal(distribution)
        if not holds(precision == precision.flatten()[0]):
            raise ValueError(f"an {cls.__name__} has one variance, got scales from {precision.min()} to {precision.max()}")
        return cls(mean, precision.flatten()[0])


@dataclass(frozen=True)
class Diagonal(TwoBlocks, Elementwise):
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

    def statistics(self, theta: Point) -> Vector:
        return Vector([theta, theta * theta])

    def _precision_of(self, expected: Vector) -> Any:
        return 1 / (expected[1] - expected[0] * expected[0])

    @classmethod
    def from_torch(cls, distribution: Distribution) -> Self:
        """The same distribution, from torch's Independent Normal."""
        return cls(*cls._normal(distribution))


@dataclass(frozen=True)
class Full(TwoBlocks):
    """A Gaussian with any precision. Costs D^2 numbers and D^3 operations a step.

    Args:
        mean: Shape (D,), or (..., D) for a batch of problems.
        hess: Shape (..., D, D), symmetric; a number stands for that multiple of the identity.
        weight_decay: Shape (..., D, D), or a number likewise.
        ess: Effective sample size.

    Raises:
        ValueError: When it is used while its precision is not positive definite.

    Example:
        >>> q = Full(torch.zeros(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> q.solve(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    matrices = True

    mean: Tensor
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.mean, Tensor) or not self.mean.dim():
            raise ValueError("the mean of a Full must be a tensor of shape (D,) or (..., D)")
        eye = torch.eye(self._size, dtype=self.mean.dtype, device=self.mean.device)
        for name in ("hess", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() == 0:
                object.__setattr__(self, name, value * eye)
            elif value.shape[-2:] != eye.shape:
                raise ValueError(f"{name} of a Full must have shape (..., {self._size}, {self._size}), got {tuple(value.shape)}")
        if self.mean.shape[:-1] != self.batch_shape:
            object.__setattr__(self, "mean", self.mean.expand(*self.batch_shape, self._size))

    @property
    def batch_shape(self) -> Size:
        return torch.broadcast_shapes(self.mean.shape[:-1], self.hess.shape[:-2], self.weight_decay.shape[:-2])

    @property
    def _size(self) -> int:
        return self.mean.shape[-1]

    @property
    def _precisions(self) -> Tensor:
        return self.precision.diagonal(dim1=-2, dim2=-1)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)

    @kept
    def metric(self) -> Tensor:
        metric: Tensor = self.hess + self.weight_decay
        return metric

    @property
    def covariance(self) -> Tensor:
        """Shape (..., D, D)."""
        return torch.cholesky_inverse(self._root) / self.ess

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    @kept
    def _root(self) -> Tensor:
        """Lower Cholesky factor of the metric."""
        root, failed = torch.linalg.cholesky_ex(self.metric)
        if not holds(failed == 0):
            least = torch.linalg.eigvalsh(self.metric).min().item()
            raise DomainError(
                f"the precision is not positive definite (least eigenvalue {least * self.ess:.3g}): "
                "use the retraction Riemannian, the curvature GaussNewton or a smaller rate"
            )
        return root

    def stretch(self, v: Tensor) -> Tensor:
        return self._apply(self.metric, v)

    def bend(self, v: Tensor) -> Tensor:
        return self._apply(self.hess, v)

    def precondition(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[..., None], self._root)[..., 0]

    def root_precondition(self, v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._root.mT, v[..., None], upper=True)[..., 0]

    def solve_each(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v.mT, self._root).mT / self.ess

    def spread(self, X: Tensor) -> Tensor:
        inverse = torch.linalg.inv_ex(self._root).inverse.mT
        return torch.cat([(rows @ inverse).square().sum(-1) for rows in X.split(ROWS)]) / self.ess

    def project_weighted(self, X: Tensor, weights: Tensor) -> Tensor:
        return gram(X, weights)

    def gather(self, factor: Tensor) -> Tensor:
        return factor @ factor.mT

    def keep_diagonal(self, diagonal: Tensor) -> Tensor:
        return torch.diag_embed(diagonal)

    def sandwich(self, d: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._root, d, upper=False)
        return half.mT @ half

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return self.project(a[..., :, None] * b[..., None, :])

    def project(self, matrix: Tensor) -> Tensor:
        return (matrix + matrix.mT) / 2

    def _apply(self, matrix: Tensor, v: Tensor) -> Tensor:
        return (matrix @ v[..., None])[..., 0]

    def _second_moment(self) -> Tensor:
        return self.covariance + self.outer(self.mean, self.mean)

    def statistics(self, theta: Tensor) -> Vector:
        return Vector([theta, self.outer(theta, theta)])

    def _precision_of(self, expected: Vector) -> Tensor:
        root, failed = torch.linalg.cholesky_ex(expected[1] - self.outer(expected[0], expected[0]))
        if not holds(failed == 0):
            raise DomainError("expected is outside the domain of Full: its second moment is less than its mean squared")
        return torch.cholesky_inverse(root)

    def in_domain(self, natural: Vector) -> Tensor:
        finite = natural[0].isfinite().all(-1) & natural[1].isfinite().all(-1).all(-1)
        return finite & (torch.linalg.cholesky_ex(torch.nan_to_num(natural[1] * -2)).info == 0)

    def to_torch(self) -> MultivariateNormal:
        return MultivariateNormal(self.mean, precision_matrix=self.precision, validate_args=False)

    @classmethod
    def from_torch(cls, distribution: Distribution) -> Self:
        """The same distribution, from torch's MultivariateNormal."""
        if not isinstance(distribution, MultivariateNormal):
            raise TypeError(f"a {cls.__name__} is made from a MultivariateNormal, got {distribution}")
        return cls(distribution.loc, distribution.precision_matrix)

    def log_det(self) -> Tensor:
        """Log determinant of the precision."""
        return 2 * self._root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self._size * math.log(self.ess)

    def entropy(self) -> Tensor:
        return (self._size * math.log(2 * math.pi * math.e) - self.log_det()) / 2

    def kl(self, other: Self) -> Tensor:
        gap = self.mean - other.mean
        trace = (other.precision * self.covariance).sum((-2, -1))
        pull = self._inner(gap, self._apply(other.precision, gap))
        return (trace + pull - self._size + self.log_det() - other.log_det()) / 2

    def log_prob(self, theta: Tensor) -> Tensor:
        gap = theta - self.mean
        return (self.log_det() - self._size * math.log(2 * math.pi) - self._inner(gap, self._apply(self.precision, gap))) / 2
