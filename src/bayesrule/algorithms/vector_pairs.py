"""Likelihoods of vectors and what they are conjugate to. See :mod:`bayesrule.algorithms.conjugate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..families.gaussian import Full
from ..families.matrices import NormalInverseGamma, NormalInverseWishart, Wishart
from ..vector import Vector
from .inputs import numbers
from .pairs import LOG_2PI, Likelihood, known
from .predictives import MultivariateStudentT


@dataclass(frozen=True)
class MultivariateNormal(Likelihood):
    """Vectors with a normal distribution; what is known of it is given, what is not has the prior.

    Args:
        mean: Known mean, shape (D,), or a number.
        covariance: Known covariance, shape (D, D).
    """

    mean: Any = None
    covariance: Any = None

    def of(self, prior: Any) -> Likelihood:
        wanted = {(False, True): Full, (True, False): Wishart, (False, False): NormalInverseWishart}.get(
            (self.mean is not None, self.covariance is not None)
        )
        if wanted is None or not isinstance(prior, wanted):
            name = wanted.__name__ if wanted else "nothing: one of mean and covariance is to be unknown"
            raise TypeError(f"MultivariateNormal is conjugate here to {name}, got a prior {type(prior).__name__}")
        like = prior.natural()[0]
        if self.covariance is not None:
            size, matrix = prior.mean.shape[-1], numbers(self.covariance, "covariance").to(like)
            if matrix.shape != (size, size) or not torch.equal(matrix, matrix.mT) or torch.linalg.cholesky_ex(matrix).info:
                raise ValueError(
                    f"covariance must be symmetric and positive definite, of shape {(size, size)}, got {matrix.tolist()}"
                )
            return _VectorMean(matrix)
        if self.mean is not None:
            known("mean", self.mean)
            mean = numbers(self.mean, "mean").to(like)
            if mean.shape not in ((), prior.scale.shape[-1:]):
                raise ValueError(f"mean must be a number or have shape {tuple(prior.scale.shape[-1:])}, got {tuple(mean.shape)}")
            return _VectorPrecision(mean)
        return _VectorBoth()

    def site(self, prior: Any, *data: Any) -> Vector:
        return self.of(prior).site(prior, *data)

    def predictive(self, posterior: Any) -> Any:
        return self.of(posterior).predictive(posterior)


def _scatter(y: Tensor) -> Tensor:
    """Sum of y y^T over the examples, shape (*batch_shape, D, D)."""
    return torch.einsum("n...i,n...j->...ij", y, y)


class _Vectors(Likelihood):
    def _event(self, prior: Any) -> tuple[int, ...]:
        return (prior.mean.shape[-1],) if isinstance(prior, Full) else (prior.scale.shape[-1],)

    def constant(self, prior: Any, *data: Any) -> Any:
        return -data[0].shape[0] * data[0].shape[-1] * LOG_2PI / 2


@dataclass(frozen=True)
class _VectorMean(_Vectors):
    covariance: Tensor

    def site(self, prior: Any, *data: Any) -> Vector:
        (y,) = data
        inverse = torch.linalg.inv(self.covariance.to(y))
        return Vector([y.sum(0) @ inverse, inverse.expand(*prior.batch_shape, *inverse.shape) * (len(y) / -2)])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        zero = td.MultivariateNormal(torch.zeros_like(data[0]), self.covariance.to(data[0]), validate_args=False)
        return zero.log_prob(data[0]).sum(0)

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.MultivariateNormal(posterior.mean, posterior.covariance + self.covariance, validate_args=False)


@dataclass(frozen=True)
class _VectorPrecision(_Vectors):
    mean: Any

    def site(self, prior: Any, *data: Any) -> Vector:
        half = torch.ones_like(data[0][..., 0]).sum(0) / 2
        return Vector([_scatter(data[0] - self.mean) / -2, half])

    def predictive(self, posterior: Any) -> td.Distribution:
        df = posterior.df - posterior.scale.shape[-1] + 1
        loc = posterior.scale[..., 0] * 0 + self.mean
        return MultivariateStudentT(df, loc, torch.linalg.inv(posterior.scale) / df[..., None, None])


@dataclass(frozen=True)
class _VectorBoth(_Vectors):
    def site(self, prior: Any, *data: Any) -> Vector:
        (y,), half = data, torch.ones_like(data[0][..., 0]).sum(0) / 2
        return Vector([y.sum(0), -half, _scatter(y) / -2, -half])

    def predictive(self, posterior: Any) -> td.Distribution:
        df = posterior.df - posterior.loc.shape[-1] + 1
        factor = (posterior.kappa + 1) / (posterior.kappa * df)
        return MultivariateStudentT(df, posterior.loc, posterior.scale * factor[..., None, None])


@dataclass(frozen=True)
class LinearRegression(Likelihood):
    """Targets y = X w + noise, weights and noise variance both unknown; the data are ``(X, y)``.

    X has shape (examples, ..., D), y (examples, ...), the batch shape in between.
    """

    prior = NormalInverseGamma

    def check(self, prior: Any, data: Any) -> tuple[Any, ...]:
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise ValueError(f"data must be a pair (X, y), got {type(data).__name__}")
        X = numbers(data[0], "X").to(prior.loc)
        if X.shape[1:] != prior.loc.shape:
            wanted = ("examples", *prior.loc.shape)
            raise ValueError(f"X must have shape ({', '.join(map(str, wanted))}), got {tuple(X.shape)}")
        if not (finite := X.isfinite()).all():
            raise ValueError(f"X has {int((~finite).sum())} entries that are not finite; remove or impute them")
        (y,) = super().check(prior, data[1])
        if len(X) != len(y):
            raise ValueError(f"X and y must have equally many examples, got {len(X)} and {len(y)}")
        return X, y

    def site(self, prior: Any, *data: Any) -> Vector:
        X, y = data
        half = torch.ones_like(y).sum(0) / 2
        return Vector([-half, (y**2).sum(0) / -2, (X * y[..., None]).sum(0), _scatter(X) / -2])

    def constant(self, prior: Any, *data: Any) -> Any:
        return -len(data[1]) * LOG_2PI / 2

    def predictive(self, posterior: Any) -> Any:
        def at(X: Tensor) -> td.Distribution:
            """The targets at inputs of shape (..., D)."""
            X = numbers(X, "X").to(posterior.loc)
            spread = (X * torch.linalg.solve(posterior.precision, X[..., None])[..., 0]).sum(-1)
            scale = (posterior.rate / posterior.concentration * (1 + spread)).sqrt()
            return td.StudentT(2 * posterior.concentration, (X * posterior.loc).sum(-1), scale)

        return at
