"""Predictive distributions of conjugate models that torch.distributions does not have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, VonMises, constraints


class MultivariateStudentT(Distribution):
    """Student's t of vectors.

    Args:
        df: Degrees of freedom, shape batch_shape.
        loc: Shape (*batch_shape, D).
        scale: Scale matrix (the covariance is df / (df - 2) times it), shape (*batch_shape, D, D).
    """

    arg_constraints = {  # noqa: RUF012
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale": constraints.positive_definite,
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        self._root = torch.linalg.cholesky(scale)
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.df[..., None] > 1, self.loc, torch.nan)

    @property
    def covariance_matrix(self) -> Tensor:
        """Shape (*batch_shape, D, D); infinite for df of at most 2."""
        df = self.df[..., None, None]
        return torch.where(df > 2, self.scale * df / (df - 2).clamp(min=1e-30), torch.inf)

    @property
    def variance(self) -> Tensor:
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        size = self.loc.shape[-1]
        z = torch.linalg.solve_triangular(self._root, (value - self.loc)[..., None], upper=False)[..., 0]
        half = (self.df + size) / 2
        const = torch.lgamma(half) - torch.lgamma(self.df / 2) - size / 2 * (self.df * math.pi).log()
        log_det = self._root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return const - log_det - half * ((z**2).sum(-1) / self.df).log1p()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            chi = torch._standard_gamma((self.df / 2).expand(shape[:-1])) * 2
            return self.loc + (self._root @ normal[..., None])[..., 0] * (self.df / chi).sqrt()[..., None]


class VonMisesPredictive(Distribution):
    """The next angle: von Mises around a direction that is itself von Mises.

    Args:
        loc: Mean direction, shape batch_shape.
        concentration: Of the direction, shape batch_shape.
        noise: Concentration of an angle around the direction.
    """

    arg_constraints = {"loc": constraints.real, "concentration": constraints.positive}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc: Tensor, concentration: Tensor, noise: float) -> None:
        self.loc, self.concentration, self.noise = loc, concentration, noise
        super().__init__(loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        k, noise = self.concentration, torch.as_tensor(self.noise, dtype=self.loc.dtype, device=self.loc.device)
        angle = value - self.loc
        joint = torch.hypot(k + noise * angle.cos(), noise * angle.sin())
        return _log_i0(joint) - _log_i0(k) - _log_i0(noise) - math.log(2 * math.pi)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        direction = VonMises(self.loc, self.concentration, validate_args=False).sample(Size(sample_shape))
        noise = torch.as_tensor(self.noise, dtype=direction.dtype, device=direction.device)
        return VonMises(direction, noise, validate_args=False).sample()


def _log_i0(k: Tensor) -> Tensor:
    return torch.special.i0e(k).log() + k
