r"""The matrix normal: a Gaussian over a matrix W, shape (n, p), whose precision is a Kronecker product.

.. math::  \operatorname{vec} W \sim N(\operatorname{vec} M, (S_R \otimes S_L)^{-1}), \qquad
           p(W) \propto \exp\bigl(-\tfrac12 \operatorname{tr} S_L (W - M)\, S_R (W - M)^T\bigr),

vec one column behind the other, S_L of shape (n, n), S_R of shape (p, p) with trace p. Between :class:`~bayesrule.Diagonal` and
:class:`~bayesrule.Full`: rows of W depend on rows, columns on columns, and both in one pattern. Tensors are flattened row by row,
:math:`S_L \otimes S_R`, wherever a matrix of shape (n p, n p) is told here.
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
from ..vector import holds, kept
from .low_rank import DiagonalPlusFactor


@dataclass(frozen=True, eq=False)
class KroneckerProduct:
    r"""The symmetric matrix :math:`R \otimes L`, as a map of matrices :math:`V \mapsto L V R`: a value that scales by numbers.

    Costs n^2 + p^2 numbers. Sums of two are none, and are refused. Of all pairs of factors with one product, it holds that with
    tr R = p.

    Args:
        left: L, shape (n, n), symmetric.
        right: R, shape (p, p), symmetric; what its trace has more than p goes into L.

    Raises:
        ValueError: A factor is no square matrix. When it is inverted while a factor is not positive definite, a DomainError.
        TypeError: Something is added or subtracted.

    Example:
        >>> KroneckerProduct(2 * torch.eye(2), torch.tensor([[3.0]])) @ torch.ones(2, 1)
        tensor([[6.],
                [6.]])
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape[0] != shape[1]:
                raise ValueError(f"{name} of a KroneckerProduct must be a square matrix, got shape {shape}")
        scale = self.right.diagonal().mean()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        object.__setattr__(self, "left", self.left * scale)
        object.__setattr__(self, "right", self.right / scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p): of the matrices that it maps."""
        return len(self.left), len(self.right)

    @property
    def matrix(self) -> Tensor:
        """All of it, shape (n p, n p), for matrices that are flattened row by row."""
        return torch.kron(self.left, self.right)

    def __mul__(self, scale: Any) -> KroneckerProduct:
        return KroneckerProduct(self.left * scale, self.right)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> KroneckerProduct:
        return self * (1 / scale)

    def __matmul__(self, v: Tensor) -> Tensor:
        """L V R, for V of shape (..., n, p)."""
        return self.left @ v @ self.right

    def __add__(self, other: Any) -> NoReturn:
        raise TypeError("a sum of Kronecker products is none; use the retraction Additive, without eps, and the prior as it is")

    __radd__ = __sub__ = __rsub__ = __add__

    @kept
    def roots(self) -> tuple[Tensor, Tensor]:
        """Lower Cholesky factors of L and R."""
        return _root(self.left, "left"), _root(self.right, "right")

    def inverse(self) -> KroneckerProduct:
        return KroneckerProduct(*map(torch.cholesky_inverse, self.roots))

    def log_det(self) -> Tensor:
        """Log determinant of all of it, shape ()."""
        left, right = (root.diagonal().log().sum() for root in self.roots)
        return 2 * (self.shape[1] * left + self.shape[0] * right)

    def towards(self, parts: tuple[Any, ...], weight: Any) -> KroneckerProduct:
        r"""One step of each factor, while the other stands still, towards the sum H of some matrices.

        .. math::  L \leftarrow (1 - w) L + \tfrac wp \textstyle\sum_{ij} (R^{-1})_{ij} H_{ij}, \qquad
                   R \leftarrow (1 - w) R + \tfrac wn \textstyle\sum_{kl} (L^{-1})_{kl} H^{kl},

        H_ij the block of columns i and j of W, H^kl that of rows k and l, and the second with the new L.
        """
        n, p = self.shape
        inverse = torch.cholesky_inverse(self.roots[1])
        seen = sum(traced(part, inverse) for part in parts) / p
        left = self.left * (1 - weight) + seen * weight
        inverse = torch.cholesky_inverse(_root(left, "left"))
        seen = sum(traced(flipped(part, n), inverse) for part in parts) / n
        return KroneckerProduct(left, self.right * (1 - weight) + seen * weight)


def _root(factor: Tensor, side: str) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(factor)
    if not holds(failed == 0):
        least = torch.linalg.eigvalsh(factor).min().item()
        raise DomainError(
            f"the {side} factor of a Kronecker is not positive definite (least eigenvalue {least:.3g}): use a prior with a "
            "precision, the curvature GaussNewton or a smaller rate"
        )
    return root


# Symmetric matrices over W are a KroneckerProduct, a DiagonalPlusFactor over W.flatten(), or dense, of shape (n, p, n, p)


def term(value: Any, like: Tensor) -> Any:
    """A precision or a curvature as one of the three: from a multiple of the identity, a diagonal, or shape (n p, n p), too."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        if isinstance(value, KroneckerProduct | DiagonalPlusFactor):
            return value
        left, right = (torch.eye(size, dtype=like.dtype, device=like.device) for size in like.shape)
        return KroneckerProduct(left * value, right)
    if value.numel() == like.numel() and value.shape in (like.shape, (like.numel(),)):
        return DiagonalPlusFactor(value.reshape(-1), value.new_zeros(like.numel(), 0))
    if value.numel() == like.numel() ** 2:
        return value.reshape(*like.shape, *like.shape)
    raise ValueError(f"a matrix over a mean of shape {tuple(like.shape)} cannot have shape {tuple(value.shape)}")


def traced(part: Any, weight: Tensor) -> Tensor:
    """The sum of weight_ij times the block of columns i and j, shape (n, n), for a weight of shape (p, p)."""
    if isinstance(part, KroneckerProduct):
        return part.left * (part.right * weight).sum()
    if isinstance(part, DiagonalPlusFactor):
        size = len(part.diagonal) // len(weight), len(weight)
        factor, diagonal = part.factor.view(*size, part.rank), part.diagonal.view(size) @ weight.diagonal()
        return torch.diag(diagonal) + torch.einsum("kic,ij,ljc->kl", factor, weight, factor)
    return torch.einsum("kilj,ij->kl", part, weight)


def flipped(part: Any, rows: int) -> Any:
    """The same matrix over the transpose of W, which has this many rows."""
    if isinstance(part, KroneckerProduct):
        return KroneckerProduct(part.right, part.left)
    if isinstance(part, DiagonalPlusFactor):
        order = torch.arange(len(part.diagonal), device=part.diagonal.device).view(rows, -1).mT.reshape(-1)
        return DiagonalPlusFactor(part.diagonal[order], part.factor[order])
    return part.permute(1, 0, 3, 2)


def _times(part: Any, v: Tensor) -> Tensor:
    return part @ v if isinstance(part, KroneckerProduct) else (part @ v.reshape(-1)).view(v.shape)


@dataclass(frozen=True, eq=False)
class _Rest:
    """A metric less what the prior put there: no Kronecker product, and nothing that this is moved to is either."""

    metric: KroneckerProduct
    weight_decay: Any

    def lerp(self, curvature: Any, weight: Any) -> _Rest:
        """By conditional steps of the factors towards a curvature and the prior."""
        parts = (term(curvature, torch.empty(self.metric.shape).to(self.metric.left)), self.weight_decay)
        return replace(self, metric=self.metric.towards(parts, weight))

    def __add__(self, other: Any) -> Tensor:
        """Dense, with something that is."""
        if not isinstance(other, Tensor) or other.dim() != 4:
            return self.metric + other
        prior = self.weight_decay if isinstance(self.weight_decay, Tensor) else self.weight_decay.matrix
        return other + (self.metric.matrix - prior.reshape(self.metric.matrix.shape)).view(other.shape)

    __radd__ = __add__

    def __rsub__(self, other: Any) -> NoReturn:
        raise TypeError("the precision of a Kronecker moves by its factors; use the retraction Additive")


@dataclass(frozen=True, eq=False)
class Kronecker(Gaussian):
    r"""A Gaussian over a matrix whose precision is a Kronecker product: one pattern across rows, one across columns.

    For one layer's weights, and for losses of :math:`x^T W z`, whose curvatures are sums of Kronecker products. Costs n^2 + p^2
    numbers and n^3 + p^3 operations a member; a step costs its curvature, which is (n p)^2 numbers if it is dense and n p for each
    example of :class:`~bayesrule.GaussNewtonFactor`. Of a matrix with one row or column it is :class:`~bayesrule.Full`.

    No exponential family, and its metric is kept whole: hess alone, without the prior, would be no Kronecker product. Step with the
    retraction :class:`~bayesrule.Additive`: each factor takes a step of the rule among the Gaussians in which the other stands
    still, S_L first, with H the curvature of the loss and the prior's precision,

    .. math::  S_L \leftarrow (1 - \rho) S_L + \tfrac \rho p \textstyle\sum_{ij} (S_R^{-1})_{ij} H_{ij}, \quad
               S_R \leftarrow (1 - \rho) S_R + \tfrac \rho n \textstyle\sum_{kl} (S_L^{-1})_{kl} H^{kl}, \quad
               M \leftarrow M - \alpha\, S_L^{-1} G S_R^{-1}.

    Their common scale moves twice. With rate 1 and H a Kronecker product, one step is all.

    Args:
        mean: M, shape (n, p).
        metric: A :class:`KroneckerProduct`, hess and weight_decay together; or a number, for that multiple of the identity.
        weight_decay: What of it is the prior's: a number, a diagonal of shape (n, p) or a KroneckerProduct.
        ess: Effective sample size.

    Raises:
        ValueError: Shapes do not agree. When it is used while a factor is not positive definite, a DomainError.
        TypeError: Natural or expectation parameters are asked for, or what its structure cannot hold.

    Example:
        >>> import bayesrule as br
        >>> rule = br.BayesRule(br.Delta(), br.Hessian(), br.Additive())
        >>> left, right = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.5, 0.5], [0.5, 0.5]])
        >>> loss = br.Loss(lambda W: ((W - 1) * (left @ (W - 1) @ right)).sum() / 2)
        >>> q = rule.step(br.Kronecker(torch.zeros(2, 2)), br.Isotropic(torch.zeros(2, 2), 0.0), loss)
        >>> q.metric.right
        tensor([[1.5000, 0.5000],
                [0.5000, 0.5000]])

    Source: G. Zhang, S. Sun, D. Duvenaud and R. Grosse (2018), Noisy natural gradient as variational inference, arXiv:1712.02390,
    for the family. Differs from: theirs takes K-FAC's two factors, each averaged by itself; here the other factor's inverse weighs
    what a factor sees.
    """

    mean: Tensor
    metric: Any = 1.0
    weight_decay: Any = 0.0
    ess: float = 1.0

    reparameterizable: ClassVar[bool] = False
    """Whether draws are differentiable in natural parameters: there are none."""
    matrices: ClassVar[None] = None
    """Neither matrices nor elements: other structures refuse it as a prior."""

    def __post_init__(self) -> None:
        if self.mean.dim() != 2:
            raise ValueError(f"the mean of a Kronecker must have shape (n, p), got {tuple(self.mean.shape)}")
        metric = term(self.metric, self.mean)
        if not isinstance(metric, KroneckerProduct) or metric.shape != self.mean.shape:
            shape = metric.shape if isinstance(metric, KroneckerProduct) else "another kind of matrix"
            raise ValueError(f"the metric must be a number or a KroneckerProduct over {tuple(self.mean.shape)}, got {shape}")
        object.__setattr__(self, "metric", metric)
        object.__setattr__(self, "weight_decay", term(self.weight_decay, self.mean))

    # The metric

    @property
    def hess(self) -> Any:
        """The metric without the prior's part: it moves towards curvatures, and adds to dense ones."""
        return _Rest(self.metric, self.weight_decay)

    def stretch(self, v: Tensor) -> Tensor:
        stretched: Tensor = self.metric @ v
        return stretched

    def bend(self, v: Tensor) -> Tensor:
        return self.stretch(v) - _times(self.weight_decay, v)

    def precondition(self, v: Tensor) -> Tensor:
        left, right = self.metric.roots
        return torch.cholesky_solve(torch.cholesky_solve(v, left).mT, right).mT

    def root_precondition(self, v: Tensor) -> Tensor:
        left, right = self.metric.roots
        across = torch.linalg.solve_triangular(right, v, upper=False, left=False)
        return torch.linalg.solve_triangular(left.mT, across, upper=True)

    def spread(self, X: Tensor) -> Tensor:
        """Variances of the sums of X_k * W, shape (N,) for X of shape (N, n, p) or (N, n p)."""
        whole = X.reshape(-1, *self.mean.shape)
        return (whole * self.precondition(whole)).sum((1, 2)) / self.ess

    @kept
    def _inverse(self) -> KroneckerProduct:
        inverse: KroneckerProduct = self.metric.inverse()
        return inverse / self.ess

    def log_det(self) -> Tensor:
        """Log determinant of the precision."""
        log_det: Tensor = self.metric.log_det()
        return log_det + self.mean.numel() * math.log(self.ess)

    @property
    def covariance(self) -> Tensor:
        """Of W.flatten(), shape (n p, n p)."""
        return self._inverse.matrix

    @property
    def variance(self) -> Tensor:
        """Variance of every element, shape (n, p); without a matrix of shape (n p, n p)."""
        return torch.outer(self._inverse.left.diagonal(), self._inverse.right.diagonal())

    # Curvatures: all of them are kept until the factors move

    def gather(self, factor: Tensor) -> DiagonalPlusFactor:
        """The matrix B B^T over W.flatten(), for a factor B of shape (n p, c)."""
        return DiagonalPlusFactor(factor.new_zeros(len(factor)), factor)

    def project(self, matrix: Tensor) -> Tensor:
        """A symmetric matrix over W.flatten(), shape (n p, n p) or (n, p, n, p), as the latter."""
        square = matrix.reshape(self.mean.numel(), -1)
        return ((square + square.mT) / 2).view(*self.mean.shape, *self.mean.shape)

    def keep_diagonal(self, diagonal: Tensor) -> DiagonalPlusFactor:
        """The matrix with this diagonal, shape (n, p) or (n p,), and nothing else."""
        return self.gather(diagonal.new_zeros(diagonal.numel(), 0)) + diagonal.reshape(-1)

    def project_weighted(self, X: Tensor, weights: Tensor) -> Tensor:
        """X^T diag(weights) X, for X of shape (N, n p)."""
        return self.project(X.mT * weights @ X)

    def outer(self, a: Tensor, b: Tensor) -> Any:
        flat = a.reshape(-1)
        return self.gather(flat[:, None]) if a is b else self.project(torch.outer(flat, b.reshape(-1)))

    def sandwich(self, d: Any) -> NoReturn:
        raise TypeError("what a Kronecker becomes in the retraction Riemannian is none; use the retraction Additive")

    # Members

    def moved(self, *, mean: Tensor | None = None, hess: Any = None) -> Self:
        if not isinstance(hess, _Rest | None):
            raise TypeError(
                "the precision of a Kronecker moves by its factors; use the retraction Additive, or Kronecker(mean, metric)"
            )
        return replace(self, mean=self.mean if mean is None else mean, metric=self.metric if hess is None else hess.metric)

    def under(self, prior: Any) -> Self:
        return replace(self, weight_decay=self._precision_of(prior) / self.ess)

    def _precision_of(self, other: Any) -> Any:
        """The precision of a Gaussian over matrices of this shape: diagonal, or a Kronecker product."""
        known = isinstance(other, Kronecker) or getattr(other, "matrices", True) is False
        if not known or other.mean.shape != self.mean.shape:
            raise TypeError(
                f"a Kronecker needs a prior over matrices of shape {tuple(self.mean.shape)}: Isotropic, Diagonal or Kronecker"
            )
        return term(other.precision, self.mean)

    def natural(self) -> NoReturn:
        raise TypeError("a Kronecker is no exponential family and has no natural parameters; use the retraction Additive")

    def from_natural(self, natural: Any) -> NoReturn:
        self.natural()

    def expected(self) -> NoReturn:
        raise TypeError("a Kronecker is no exponential family and has no expectation parameters; use mean and variance")

    def natural_gradient(self, look: Look) -> NoReturn:
        self.natural()

    def kl_gradient(self, prior: Any) -> NoReturn:
        self.natural()

    def score(self, where: Tensor) -> Look:
        pull = self.stretch(where) * self.ess
        return Look(None, pull, self.project(self.gather(pull.reshape(-1, 1)).matrix - self.precision.matrix))

    # The distribution

    def to_torch(self) -> MultivariateNormal:
        """The distribution of W.flatten(), of torch.distributions, with a precision of shape (n p, n p)."""
        return MultivariateNormal(self.mean.flatten(), precision_matrix=self.precision.matrix, validate_args=False)

    def entropy(self) -> Tensor:
        return (self.mean.numel() * math.log(2 * math.pi * math.e) - self.log_det()) / 2

    def kl(self, other: Any) -> Tensor:
        """KL(q || other) in nats, for a Kronecker or anything with a diagonal precision, over matrices of one shape."""
        p, gap, size = self._precision_of(other), other.mean - self.mean, self.mean.numel()
        trace = (traced(p, self._inverse.right) * self._inverse.left).sum()
        log_det = p.log_det() if isinstance(p, KroneckerProduct) else p.diagonal.log().sum()
        return (trace + (gap * _times(p, gap)).sum() - size + self.log_det() - log_det) / 2

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density, shape (...), at theta of shape (..., n, p)."""
        gap = theta - self.mean
        pull = (gap * self.stretch(gap)).sum((-2, -1)) * self.ess
        return (self.log_det() - self.mean.numel() * math.log(2 * math.pi) - pull) / 2
