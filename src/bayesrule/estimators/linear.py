"""Losses of linear predictors: any Gaussian over weights may look at them, and the expectation over q needs one dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..rule import Look, Oracle
from .likelihoods import Likelihood, LikelihoodLoss


@dataclass(frozen=True)
class LinearLoss:
    r"""Minus the log likelihood of a generalized linear model, :math:`-\sum_n \log p(y_n | x_n^T w)`, as a function of w.

    Under a Gaussian q the predictors are Gaussian, so :meth:`expected` is exact but for quadrature in one dimension:

    .. math::  E_q[\nabla \ell] = -X^T a, \qquad E_q[\nabla^2 \ell] = -X^T \operatorname{diag}(b)\, X.

    Args:
        X: Inputs, shape (N, D).
        likelihood: Of a predictor.
        y: Observations, shape (N,).
    """

    X: Tensor
    likelihood: Likelihood
    y: Tensor

    def __call__(self, w: Tensor) -> Oracle:
        return _At(self.X, LikelihoodLoss(self.likelihood, self.y)(self.X @ w))

    def expected(self, q: Any) -> Look:
        """The look of a Gaussian q over the weights."""
        value, first, second = self.likelihood.expected_log_prob(self.X @ q.mean, q.spread(self.X), self.y)
        return Look(-value.sum(), -(self.X.mT @ first), q.project_weighted(self.X, -second))


@dataclass(frozen=True)
class _At(Oracle):
    X: Tensor
    inner: Any

    def value(self) -> Tensor:
        value: Tensor = self.inner.value()
        return value

    def gradient(self) -> Tensor:
        return self.X.mT @ self.inner.gradient()

    def diagonal(self) -> Tensor:
        return (self.X**2).mT @ self.inner.diagonal()

    def hessian(self) -> Tensor:
        return self.X.mT @ (self.inner.diagonal()[:, None] * self.X)

    def product(self, v: Tensor) -> Tensor:
        return self.X.mT @ (self.inner.diagonal() * (self.X @ v))

    gauss_newton = hessian

    def factor(self) -> Tensor:
        """B with B B^T the Hessian, shape (D, N), where no curvature is negative."""
        return (self.X * self.inner.diagonal().sqrt()[:, None]).mT
