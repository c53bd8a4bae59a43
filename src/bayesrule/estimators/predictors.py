"""Losses of predictors: of predictors themselves, or of the weights that they are linear in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from ..rule import Look, Oracle
from .likelihoods import Likelihood


@dataclass(frozen=True)
class LikelihoodLoss:
    """Minus the log likelihood of independent observations as a function of their predictors; a sum over examples.

    Args:
        likelihood: p(y | f).
        y: Observations as :meth:`Likelihood.check` returns them, shape (N,).

    Example:
        >>> import bayesrule as br
        >>> LikelihoodLoss(br.likelihoods.Poisson(), torch.tensor([3.0, 1.0]))(torch.zeros(2)).gradient()
        tensor([-2., -0.])
    """

    likelihood: Likelihood
    y: Tensor

    def __call__(self, f: Tensor) -> Oracle:
        """What is known of the loss at predictors f, shape (N,)."""
        slope, curve = self.likelihood.derivatives(f, self.y)
        return _LikelihoodAt(Look(-self.likelihood.log_prob(f, self.y).sum(), -slope, -curve))

    def expected(self, q: Any) -> Look:
        """The look under a q with ``mean`` and ``variance`` of shape (N,); the curvature is a diagonal, shape (N,)."""
        value, slope, curve = self.likelihood.expected_log_prob(q.mean, q.variance, self.y)
        return Look(-value.sum(), -slope, -curve)


@dataclass(frozen=True)
class _LikelihoodAt(Oracle):
    look: Look

    def value(self) -> Tensor | None:
        return self.look.value

    def gradient(self) -> Tensor:
        return self.look.gradient

    def diagonal(self) -> Any:
        """Diagonal of the Hessian of the loss, shape (N,); the Hessian has nothing else."""
        return self.look.curvature

    def hessian(self) -> Tensor:
        return torch.diag_embed(self.diagonal())


@dataclass(frozen=True)
class LinearLoss:
    r"""Minus the log likelihood of a generalized linear model, :math:`-\sum_n \log p(y_n | x_n^T w)`, as a function of w.

    w has shape (D,), or another with D elements: a matrix W counts as W.flatten(). Under a Gaussian q the predictors are
    Gaussian, so :meth:`expected` is exact but for quadrature in one dimension:

    .. math::  E_q[\nabla \ell] = -X^T a, \qquad E_q[\nabla^2 \ell] = -X^T \operatorname{diag}(b)\, X.

    Args:
        X: Inputs, shape (N, D).
        likelihood: Of a predictor.
        y: Observations, shape (N,).

    Example:
        >>> import bayesrule as br
        >>> loss = LinearLoss(torch.ones(2, 1), br.likelihoods.Gaussian(), torch.tensor([1.0, 3.0]))
        >>> loss.expected(br.Full(torch.zeros(1), 1.0)).gradient
        tensor([-4.])
    """

    X: Tensor
    likelihood: Likelihood
    y: Tensor

    def __call__(self, w: Tensor) -> Oracle:
        return _At(self.X, LikelihoodLoss(self.likelihood, self.y)(self.X @ w.reshape(-1)), w.shape)

    def expected(self, q: Any) -> Look:
        """The look of a Gaussian q over the weights."""
        value, first, second = self.likelihood.expected_log_prob(self.X @ q.mean.reshape(-1), q.spread(self.X), self.y)
        return Look(-value.sum(), -(self.X.mT @ first).view(q.mean.shape), q.project_weighted(self.X, -second))


@dataclass(frozen=True)
class _At(Oracle):
    X: Tensor
    inner: Any
    shape: Size

    def value(self) -> Tensor:
        value: Tensor = self.inner.value()
        return value

    def gradient(self) -> Tensor:
        return (self.X.mT @ self.inner.gradient()).view(self.shape)

    def diagonal(self) -> Tensor:
        return ((self.X**2).mT @ self.inner.diagonal()).view(self.shape)

    def hessian(self) -> Tensor:
        return self.X.mT @ (self.inner.diagonal()[:, None] * self.X)

    def product(self, v: Tensor) -> Tensor:
        return (self.X.mT @ (self.inner.diagonal() * (self.X @ v.reshape(-1)))).view(self.shape)

    gauss_newton = hessian

    def factor(self) -> Tensor:
        """B with B B^T the Hessian, shape (D, N), where no curvature is negative."""
        return (self.X * self.inner.diagonal().sqrt()[:, None]).mT
