r"""Gaussian models of which a loss sees only predictors: :class:`WeightSpace` and :class:`FunctionSpace`.

With a Gaussian prior p and predictors f that are linear in theta, the family

.. math::  q_\lambda \propto p\, \exp(\textstyle\sum_n \lambda_{1n} f_n + \lambda_{2n} f_n^2)

is an exponential family with base measure p. Its natural parameters are the **sites**, two numbers for each example; those
of the prior are zero. So the rule writes conjugate-computation inference (CVI) by itself:

.. math::  \lambda_n \leftarrow (1 - \rho) \lambda_n + \rho\, \nabla_{\mu_n} E_q[\log p(y_n | f_n)].

:math:`W = -2 \lambda_2` are the precisions of pseudo-observations and :math:`\lambda_1 / W` their targets. The loss is a sum over
predictors, so only their marginals matter: ``mean`` and ``variance``, shape (N,). Theta, for the rule, is f.

Source: M. E. Khan and W. Lin (2017), arXiv:1703.04265.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..family import DomainError, Family
from ..noise import Noise
from ..rule import Look, Point
from ..vector import Vector, kept
from .gaussian import Full
from .structure import gram


class Latent(Family):
    """What both views share. Everything asked of one member is factorized once."""

    is_exponential_family = True
    sites: Vector | None
    ess = 1.0

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of predictors N."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Means of the predictors, shape (N,)."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Variances of the predictors, shape (N,)."""

    @abstractmethod
    def log_partition(self) -> Tensor:
        """A: the log of the mean of exp(sites) under the prior; with Gaussian sites, the evidence up to their constants."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """By how much the log determinant of the precision exceeds the prior's."""

    @abstractmethod
    def distance(self, prior: Self) -> Tensor:
        """Half the squared distance of the mean from the prior's, in its metric: what Newton's method pays for it."""

    @abstractmethod
    def _zeros(self) -> Tensor: ...

    def natural(self) -> Vector:
        if self.sites is None:
            return Vector([self._zeros(), self._zeros()])
        return self.sites

    def from_natural(self, natural: Vector) -> Self:
        return replace(self, sites=natural)  # type: ignore[type-var]

    @property
    def pull(self) -> Tensor:
        """First sites, shape (N,): precision times target of the pseudo-observations."""
        return self.natural()[0]

    @property
    def precisions(self) -> Tensor:
        """W, precisions of the pseudo-observations, shape (N,)."""
        return self.natural()[1] * -2

    def expected(self) -> Vector:
        return Vector([self.mean, self.mean**2 + self.variance])

    def natural_gradient(self, look: Look) -> Vector:
        if look.curvature is None:
            raise TypeError("sites need a curvature: use DiagonalHessian, or the expectation Exact")
        return Vector([look.gradient - look.curvature * self.mean, look.curvature / 2])

    def as_look(self, natural_gradient: Vector) -> Look:
        """The look that has this natural gradient."""
        first, second = natural_gradient
        return Look(None, first + 2 * second * self.mean, 2 * second)

    def place(self, where: Point | None) -> Tensor:
        return self.mean if where is None else self.mean + where

    def draw(self, noise: Noise) -> Tensor:
        """One draw of every predictor from its marginal, as offsets: what a sum over predictors needs."""
        return self.variance.sqrt() * noise.normal(self.mean)

    def grid(self, rule: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, Point]]:
        deviation = self.variance.sqrt()
        for node, weight in rule:
            yield weight, deviation * node

    def keep_diagonal(self, diagonal: Tensor) -> Tensor:
        """Curvatures of single predictors are all that sites hold."""
        return diagonal

    def kl(self, other: Self) -> Tensor:
        if other.sites is None:  # the prior; without differences of what sites of many counts make large
            return self.distance(other) + (self.log_det() - (self.precisions * self.variance).sum()) / 2
        gap = other.natural() - self.natural()
        return other.log_partition() - self.log_partition() - gap.dot(self.expected())

    def in_domain(self, natural: Vector) -> Tensor:
        """Whether these sites belong to a member, shape ()."""
        try:
            return self.from_natural(natural).variance.isfinite().all()
        except DomainError:
            return torch.zeros((), dtype=torch.bool)

    def _checked(self, matrix: Tensor) -> Tensor:
        """Lower Cholesky factor of a matrix made of the sites."""
        root, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not root.diagonal().isfinite().all():
            raise DomainError(
                f"the sites leave the posterior without a variance (least site precision {self.precisions.min().item():.3g}): "
                "take a smaller rate"
            )
        return root


@dataclass(frozen=True, eq=False)
class WeightSpace(Latent):
    r"""A linear model f = X w, in the space of its D weights.

    .. math::  S = S_0 + X^T W X, \qquad m = S^{-1} (S_0 m_0 + X^T \lambda_1).

    Costs N D^2 + D^3 a member.

    Args:
        X: Inputs, shape (N, D).
        prior: Gaussian prior of the weights.
        sites: Natural parameters, two blocks of shape (N,); None is the prior.

    Example:
        >>> q = WeightSpace(torch.ones(1, 1), Full(torch.zeros(1), 1.0), Vector([torch.ones(1), -torch.ones(1) / 2]))
        >>> q.mean, q.variance  # one observation 1 of precision 1
        (tensor([0.5000]), tensor([0.5000]))
    """

    X: Tensor
    prior: Full
    sites: Vector | None = None

    @property
    def size(self) -> int:
        return len(self.X)

    def _zeros(self) -> Tensor:
        return self.X.new_zeros(len(self.X))

    @kept
    def posterior(self) -> Full:
        """The Gaussian over the weights."""
        if self.sites is None:
            return self.prior
        precision = self.prior.precision + gram(self.X, self.precisions)
        root = self._checked(precision)
        pull = self.prior.precision @ self.prior.mean + self.X.mT @ self.pull
        q = Full(torch.cholesky_solve(pull[:, None], root)[:, 0], precision)
        vars(q)["_root"] = root  # factorized once
        return q

    @kept
    def mean(self) -> Tensor:
        return self.X @ self.posterior.mean

    @kept
    def variance(self) -> Tensor:
        return self.posterior.spread(self.X)

    def log_det(self) -> Tensor:
        return self.posterior.log_det() - self.prior.log_det()

    def log_partition(self) -> Tensor:
        q, p = self.posterior, self.prior
        return (q.mean @ q.precision @ q.mean - p.mean @ p.precision @ p.mean - self.log_det()) / 2

    def distance(self, prior: Self) -> Tensor:
        gap = self.posterior.mean - self.prior.mean
        return gap @ self.prior.precision @ gap / 2

    def entropy(self) -> Tensor:
        return self.posterior.entropy()

    def sample(self, noise: Noise) -> Tensor:
        return self.X @ self.posterior.sample(noise)

    def log_prob(self, theta: Tensor) -> Tensor:
        raise TypeError("predictors have no density in weight space; ask .posterior.log_prob(weights)")

    def predict(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the predictors at new inputs, shape (M,) each, for X of shape (M, D)."""
        return X @ self.posterior.mean, self.posterior.spread(X)


@dataclass(frozen=True, eq=False)
class FunctionSpace(Latent):
    r"""The values f of a Gaussian process with mean zero at N inputs.

    .. math::  V = K - K W^{1/2} B^{-1} W^{1/2} K, \qquad B = I + W^{1/2} K W^{1/2}, \qquad m = V \lambda_1.

    K is never inverted. Where some W are negative, the same is said with a root R of K: :math:`V = R (I + R^T W R)^{-1} R^T`.
    Costs N^3 a member, once more N^3 for that root.

    Args:
        K: Covariance of the prior, shape (N, N).
        sites: Natural parameters, two blocks of shape (N,); None is the prior.

    Example:
        >>> q = FunctionSpace(torch.eye(1), Vector([torch.ones(1), -torch.ones(1) / 2]))
        >>> q.mean, q.variance
        (tensor([0.5000]), tensor([0.5000]))
    """

    K: Tensor
    sites: Vector | None = None

    @property
    def size(self) -> int:
        return len(self.K)

    def _zeros(self) -> Tensor:
        return self.K.new_zeros(len(self.K))

    @kept
    def _definite(self) -> bool:
        return bool((self.precisions >= 0).all())

    @kept
    def _half(self) -> Tensor:
        """W^1/2, shape (N, 1); or, where W is negative somewhere, R with R R^T = K, shape (N, N)."""
        if self._definite:
            return self.precisions.sqrt().clamp(min=1e-150)[:, None]  # a site of precision zero may still pull
        values, vectors = torch.linalg.eigh(self.K)
        return vectors * values.clamp(min=0).sqrt()  # rounding aside, K has no negative eigenvalues

    @kept
    def _root(self) -> Tensor:
        """Lower Cholesky factor of B; or of I + R^T W R, which has the same determinant."""
        half = self._half
        B = half * self.K * half.mT if self._definite else half.mT @ (self.precisions[:, None] * half)
        B.diagonal().add_(1.0)
        return self._checked(B)

    @kept
    def _factor(self) -> Tensor:
        """G with V = K - G^T G; or, where W is negative somewhere, V = G^T G."""
        right = self._half * self.K if self._definite else self._half.mT
        return torch.linalg.solve_triangular(self._root, right, upper=False)

    @kept
    def mean(self) -> Tensor:
        if self.sites is None:
            return self._zeros()
        return self.K @ self._dual

    @kept
    def _dual(self) -> Tensor:
        """K^-1 mean, which is the pull less precisions times mean: by a formula that does not take this difference."""
        half, pull = self._half, self.pull[:, None]
        if self._definite:
            return (half * torch.cholesky_solve(pull / half, self._root))[:, 0]
        return (pull - self.precisions[:, None] * (half @ torch.cholesky_solve(half.mT @ pull, self._root)))[:, 0]

    @kept
    def variance(self) -> Tensor:
        if self.sites is None:
            return self.K.diagonal()
        inner = (self._factor**2).sum(0)
        return self.K.diagonal() - inner if self._definite else inner

    @property
    def covariance(self) -> Tensor:
        """Of the function values, shape (N, N)."""
        if self.sites is None:
            return self.K
        inner = self._factor.mT @ self._factor
        return self.K - inner if self._definite else inner

    def log_partition(self) -> Tensor:
        if self.sites is None:
            return self.K.new_zeros(())
        return (self.pull @ self.mean - self.log_det()) / 2

    def log_det(self) -> Tensor:
        return self.K.new_zeros(()) if self.sites is None else 2 * self._root.diagonal().log().sum()

    def distance(self, prior: Self) -> Tensor:
        return self.mean @ self._dual / 2 if self.sites is not None else self.K.new_zeros(())

    def entropy(self) -> Tensor:
        root = torch.linalg.cholesky(self.covariance)
        return root.diagonal().log().sum() + self.size / 2 * math.log(2 * math.pi * math.e)

    def sample(self, noise: Noise) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance)
        return self.mean + vectors @ (values.clamp(min=0).sqrt() * noise.normal(self.mean))

    def log_prob(self, theta: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance).log_prob(theta)

    def predict(self, cross: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances at M new inputs, shape (M,) each.

        Args:
            cross: Covariance of the prior between the inputs and the new ones, shape (N, M).
            own: Its variance at the new ones, shape (M,).
        """
        if self.sites is None:
            return torch.zeros_like(own), own
        W = self.precisions
        mean = cross.mT @ self._dual
        if not self._definite:
            inside = W[:, None] * cross
            return mean, own - (cross * inside).sum(0) + (inside * (self.covariance @ inside)).sum(0)
        half = torch.linalg.solve_triangular(self._root, self._half * cross, upper=False)
        return mean, own - (half**2).sum(0)
