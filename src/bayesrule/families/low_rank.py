r"""A Gaussian whose precision is a diagonal and a few directions: :math:`S = \operatorname{diag}(d) + U U^T`, U of shape (D, K).

Between :class:`~bayesrule.Diagonal` and :class:`~bayesrule.Full`: it sees the K directions in which the loss curves most, and costs
D K numbers. Its members are no exponential family, so a step is taken among all precisions and then **truncated**: the K leading
directions stay, and of the others the diagonal. The diagonal of the precision is never touched by that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..family import DomainError, Gaussian
from ..rule import Look
from ..vector import equal, holds, kept


@dataclass(frozen=True, eq=False)
class DiagonalPlusFactor:
    r"""The symmetric matrix :math:`\operatorname{diag}(d) + U U^T`: a value that adds and scales by numbers that are not negative.

    Costs D (K + 1) numbers; a sum has the columns of both.

    Args:
        diagonal: d, shape (D,).
        factor: U, shape (D, K).

    Raises:
        ValueError: The shapes do not agree, or a negative number scales it.
        TypeError: Something with a factor is subtracted: the difference need not be such a matrix.

    Example:
        >>> one = DiagonalPlusFactor(torch.ones(2), torch.tensor([[1.0], [2.0]]))
        >>> (one + 1.0).matrix
        tensor([[3., 2.],
                [2., 6.]])
    """

    diagonal: Tensor
    factor: Tensor

    def __post_init__(self) -> None:
        if self.diagonal.dim() != 1 or self.factor.dim() != 2 or len(self.factor) != len(self.diagonal):
            shapes = f"{tuple(self.diagonal.shape)} and {tuple(self.factor.shape)}"
            raise ValueError(f"diagonal and factor must have shapes (D,) and (D, K), got {shapes}")

    @property
    def rank(self) -> int:
        """Number of columns of the factor."""
        return self.factor.shape[1]

    @property
    def matrix(self) -> Tensor:
        """All of it, shape (D, D)."""
        return torch.diag(self.diagonal) + self.factor @ self.factor.mT

    def __add__(self, other: Any) -> DiagonalPlusFactor:
        """The sum with another, or with a diagonal: a number or shape (D,)."""
        if isinstance(other, DiagonalPlusFactor):
            return DiagonalPlusFactor(self.diagonal + other.diagonal, torch.cat([self.factor, other.factor], dim=1))
        return replace(self, diagonal=self.diagonal + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> DiagonalPlusFactor:
        if isinstance(other, DiagonalPlusFactor):
            raise TypeError("the difference of two low-rank matrices may have negative directions; use the retraction Additive")
        return replace(self, diagonal=self.diagonal - other)

    def __mul__(self, scale: Any) -> DiagonalPlusFactor:
        return DiagonalPlusFactor(self.diagonal * scale, self.factor * _root(scale))

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> DiagonalPlusFactor:
        return self * (1 / scale)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The matrix times v, shape (D,) or (D, N)."""
        across = self.diagonal if v.dim() == 1 else self.diagonal[:, None]
        return across * v + self.factor @ (self.factor.mT @ v)

    def lerp(self, other: Any, weight: Any) -> DiagonalPlusFactor:
        r"""(1 - w) times this plus w times the other, for w in [0, 1]; U becomes :math:`[\sqrt{1-w}\, U, \sqrt{w}\, B]`."""
        return self * (1 - weight) + other * weight

    def truncated(self, rank: int) -> DiagonalPlusFactor:
        """The ``rank`` leading directions of the factor, by thin SVD, and of the others the diagonal: that of all is preserved."""
        if self.rank <= rank:
            return self
        if rank == 0:
            return DiagonalPlusFactor(self.diagonal + (self.factor**2).sum(1), self.factor[:, :0])
        vectors, values, _ = torch.linalg.svd(self.factor, full_matrices=False)
        directions = vectors * values
        return DiagonalPlusFactor(self.diagonal + (directions[:, rank:] ** 2).sum(1), directions[:, :rank])


def _root(scale: Any) -> Any:
    if isinstance(scale, Tensor):
        return scale.sqrt()
    if scale < 0:
        raise ValueError(f"a DiagonalPlusFactor scales by numbers >= 0, got {scale}")
    return math.sqrt(scale)


@dataclass(frozen=True, eq=False)
class LowRank(Gaussian):
    r"""A Gaussian whose precision is a diagonal and K directions.

    For losses that curve much in few directions. Costs D K numbers, D K^2 operations a member, D (K + n)^2 a step with n examples.
    Its metric is :math:`\operatorname{diag}(d) + U U^T`, hess and weight_decay together. With a QR decomposition,

    .. math::  \begin{pmatrix} V \\ I \end{pmatrix} = \begin{pmatrix} Q \\ L^{-T} \end{pmatrix} L^T, \qquad V = d^{-1/2} U, \qquad
               R = d^{-1/2} (I - Q\, (I + L)^{-1} L\, Q^T), \qquad R R^T = (\operatorname{diag}(d) + U U^T)^{-1},

    which is Woodbury's identity without the square of V. All else follows from R.

    No exponential family: step with the retraction :class:`~bayesrule.Additive`, and a curvature that is never negative, such as
    :class:`~bayesrule.GaussNewtonFactor`. The prior's precision is a diagonal and goes into d.

    Args:
        mean: Shape (D,).
        hess: A :class:`DiagonalPlusFactor`; or a diagonal alone, a number or shape (D,).
        weight_decay: A number or shape (D,).
        ess: Effective sample size.
        rank: K; None is the number of columns of ``hess``. A ``hess`` with more columns is truncated.

    Raises:
        ValueError: Shapes do not agree, or ``rank`` is negative. When it is used while d is not positive, a DomainError.
        TypeError: Natural or expectation parameters are asked for, or what its structure cannot hold.

    Example:
        >>> q = LowRank(torch.zeros(2), DiagonalPlusFactor(torch.ones(2), torch.tensor([[1.0], [0.0]])))
        >>> q.variance
        tensor([0.5000, 1.0000])

    Source: A. Mishkin, F. Kunstner, D. Nielsen, M. Schmidt and M. E. Khan (2018), SLANG, arXiv:1811.04504, for the family. Differs
    from: SLANG truncates by a randomized eigendecomposition, this by an SVD.
    """

    mean: Tensor
    hess: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0
    rank: int | None = None

    reparameterizable: ClassVar[bool] = False
    """Whether draws are differentiable in natural parameters: there are none."""
    matrices: ClassVar[None] = None
    """Neither matrices nor elements: other structures refuse it as a prior."""

    def __post_init__(self) -> None:
        if self.mean.dim() != 1:
            raise ValueError(f"the mean of a LowRank must have shape (D,), got {tuple(self.mean.shape)}")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        hess = self.hess if isinstance(self.hess, DiagonalPlusFactor) else self._of_diagonal(self.hess)
        if hess.diagonal.shape != self.mean.shape:
            raise ValueError(f"hess must have the size of the mean, {len(self.mean)}, got {len(hess.diagonal)}")
        rank = hess.rank if self.rank is None else self.rank
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "hess", hess.truncated(rank))

    def _of_diagonal(self, diagonal: Any) -> DiagonalPlusFactor:
        whole = diagonal + torch.zeros_like(self.mean)
        return DiagonalPlusFactor(whole, whole.new_zeros(len(whole), 0))

    # The metric

    @kept
    def metric(self) -> DiagonalPlusFactor:
        metric: DiagonalPlusFactor = self.hess + self.weight_decay
        return metric

    @property
    def precision(self) -> DiagonalPlusFactor:
        return self.metric * self.ess

    @kept
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What R is made of: d^-1/2, Q and L, shapes (D,), (D, K), (K, K)."""
        d, factor = self.metric.diagonal, self.metric.factor
        if not holds(d > 0):
            raise DomainError(
                f"the diagonal of a LowRank must be positive, the least is {d.min().item():.3g}: use a prior with a precision, the "
                "curvature GaussNewtonFactor or a smaller rate"
            )
        scale = d.rsqrt()
        eye = torch.eye(factor.shape[1], dtype=d.dtype, device=d.device)
        Q, upper = torch.linalg.qr(torch.cat([scale[:, None] * factor, eye]))
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(d)
        return scale, Q[: len(d)] * signs, (signs[:, None] * upper).mT

    def _across(self, v: Tensor, transposed: bool) -> Tensor:
        """I - Q (I + L)^-1 L Q^T, or its transpose, times v, shape (D, N)."""
        _, Q, L = self._parts
        below = L + torch.eye(len(L), dtype=L.dtype, device=L.device)
        inner = Q.mT @ v
        if transposed:
            return v - Q @ (L.mT @ torch.linalg.solve_triangular(below.mT, inner, upper=True))
        return v - Q @ torch.linalg.solve_triangular(below, L @ inner, upper=False)

    def _root(self, v: Tensor) -> Tensor:
        """R v, for v of shape (D, N)."""
        return self._parts[0][:, None] * self._across(v, transposed=False)

    def _root_transposed(self, v: Tensor) -> Tensor:
        """R^T v, for v of shape (D, N)."""
        return self._across(self._parts[0][:, None] * v, transposed=True)

    def stretch(self, v: Tensor) -> Tensor:
        return self.metric @ v

    def bend(self, v: Tensor) -> Tensor:
        bent: Tensor = self.hess @ v
        return bent

    def precondition(self, v: Tensor) -> Tensor:
        return self._root(self._root_transposed(v[:, None]))[:, 0]

    def root_precondition(self, v: Tensor) -> Tensor:
        return self._root(v[:, None])[:, 0]

    def spread(self, X: Tensor) -> Tensor:
        """Variances of x^T theta for rows x of X, shape (N,) for X of shape (N, D)."""
        return (self._root_transposed(X.mT) ** 2).sum(0) / self.ess

    def log_det(self) -> Tensor:
        """Log determinant of the precision."""
        scale, _, L = self._parts
        return 2 * (L.diagonal().log().sum() - scale.log().sum()) + len(scale) * math.log(self.ess)

    @property
    def covariance(self) -> Tensor:
        """Shape (D, D)."""
        root = self._root(torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device))
        return root @ root.mT / self.ess

    @property
    def variance(self) -> Tensor:
        """Variance of every element, shape (D,); without a matrix of shape (D, D)."""
        scale, Q, _ = self._parts
        return scale**2 * (1 - (Q**2).sum(1)) / self.ess

    # What its structure keeps

    def gather(self, factor: Tensor) -> DiagonalPlusFactor:
        """The matrix B B^T for a factor B of shape (D, n)."""
        return DiagonalPlusFactor(torch.zeros_like(self.mean), factor)

    def project(self, matrix: Tensor) -> DiagonalPlusFactor:
        """The K leading eigenvectors of a symmetric matrix, shape (D, D), as far as they are positive, and the others' diagonal."""
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        first = max(len(values) - self._rank, 0)  # of the leading ones: they come last
        kept = torch.cat([torch.zeros_like(values[:first]), values[first:].clamp(min=0)])
        leading = (vectors * kept.sqrt())[:, first:]
        rest = (vectors**2) @ (values - kept) if self._rank else matrix.diagonal()
        return DiagonalPlusFactor(rest, leading)

    def keep_diagonal(self, diagonal: Tensor) -> DiagonalPlusFactor:
        """The matrix with this diagonal, shape (D,), and nothing else."""
        return self._of_diagonal(diagonal)

    def project_weighted(self, X: Tensor, weights: Tensor) -> DiagonalPlusFactor:
        """X^T diag(weights) X, for X of shape (N, D) and weights that are not negative, shape (N,)."""
        if not holds(weights >= 0):
            raise DomainError(f"a LowRank holds no negative curvature, and the least weight is {weights.min().item():.3g}")
        return self.gather(X.mT * weights.sqrt())

    def outer(self, a: Tensor, b: Tensor) -> DiagonalPlusFactor:
        if a is not b:
            raise TypeError("a LowRank holds squares a a^T only; use the curvature GaussNewtonFactor or SquaredGradient")
        return self.gather(a[:, None])

    def sandwich(self, d: Any) -> NoReturn:
        raise TypeError("what a LowRank becomes in the retraction Riemannian is none; use the retraction Additive")

    @property
    def _rank(self) -> int:
        return self.rank or 0

    # Members

    def moved(self, *, mean: Tensor | None = None, hess: Any = None) -> Self:
        return replace(self, mean=self.mean if mean is None else mean, hess=self.hess if hess is None else hess)

    def under(self, prior: Any) -> Self:
        pull = self._diagonal_of(prior) / self.ess
        return self if equal(pull, self.weight_decay) else replace(self, hess=self.metric - pull, weight_decay=pull)

    def _diagonal_of(self, other: Any) -> Any:
        """The precision of a Gaussian that is diagonal."""
        precision = other.precision
        if isinstance(precision, DiagonalPlusFactor) and (precision.rank == 0 or holds(precision.factor == 0)):
            return precision.diagonal
        if isinstance(precision, DiagonalPlusFactor) or other.matrices is not False:
            raise TypeError("a LowRank needs a prior whose precision is diagonal: a Diagonal, an Isotropic or a LowRank of rank 0")
        return precision

    def natural(self) -> NoReturn:
        raise TypeError("a LowRank is no exponential family and has no natural parameters; use the retraction Additive")

    def from_natural(self, natural: Any) -> NoReturn:
        self.natural()

    def expected(self) -> NoReturn:
        raise TypeError("a LowRank is no exponential family and has no expectation parameters; use mean and variance")

    def natural_gradient(self, look: Look) -> NoReturn:
        self.natural()

    def kl_gradient(self, prior: Any) -> NoReturn:
        self.natural()

    def score(self, where: Tensor) -> NoReturn:
        raise TypeError("the score of a LowRank has negative curvature; use an expectation that asks for gradients")

    # The distribution

    def to_torch(self) -> MultivariateNormal:
        """The same distribution of torch.distributions, with a precision of shape (D, D)."""
        return MultivariateNormal(self.mean, precision_matrix=self.precision.matrix, validate_args=False)

    def entropy(self) -> Tensor:
        return (len(self.mean) * math.log(2 * math.pi * math.e) - self.log_det()) / 2

    def kl(self, other: Any) -> Tensor:
        """KL(q || other) in nats, for a LowRank or anything with a diagonal precision."""
        p = other if isinstance(other, LowRank) else LowRank(other.mean, self._of_diagonal(self._diagonal_of(other)))
        gap = p.mean - self.mean
        across = (self._root_transposed(p.precision.factor) ** 2).sum() / self.ess
        trace = (p.precision.diagonal * self.variance).sum() + across
        return (trace + gap @ (p.precision @ gap) - len(gap) + self.log_det() - p.log_det()) / 2

    def log_prob(self, theta: Tensor) -> Tensor:
        gap = theta - self.mean
        return (self.log_det() - len(gap) * math.log(2 * math.pi) - gap @ (self.precision @ gap)) / 2
