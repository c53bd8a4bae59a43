r"""Weights that are -1 or 1, element by element: what :class:`SignedBernoulli` is for one problem, for the weights of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor
from torch.nn.functional import softplus

from ..family import Family
from ..noise import Noise
from ..rule import Look, Point
from ..vector import equal, logit


@dataclass(frozen=True)
class Signs(Family):
    r"""Independent weights in {-1, 1}.

    .. math::  \mu = \tanh \lambda = E_q[\theta], \qquad \lambda \leftarrow \lambda - \rho\,(\text{ess}\, \nabla_\mu E_q[\ell] +
               \lambda - \lambda_0).

    Args:
        natural_parameter: lambda, half the log odds of a 1, shaped like the weights.
        ess: How often the mean loss counts.
        expected_value: mu, if it is at hand; None is tanh(lambda).
        pull: How much of the prior's pull there is; 1 by the rule.

    Example:
        >>> import torch
        >>> Signs(torch.tensor([0.0, 10.0])).mean
        tensor([0., 1.])
    """

    natural_parameter: Point
    ess: Any = 1.0
    expected_value: Point | None = None
    pull: Any = 1.0

    is_exponential_family: ClassVar[bool] = True

    @property
    def mean(self) -> Any:
        """E_q[theta]."""
        return self.natural_parameter.tanh() if self.expected_value is None else self.expected_value

    @property
    def variance(self) -> Any:
        """Of each weight."""
        return 1 - self.mean**2

    def solve(self, v: Point) -> Point:
        """The covariance times v."""
        return v * self.variance

    def root_solve(self, v: Point) -> NoReturn:
        """Not offered: a draw is no linear function of normals."""
        raise TypeError("a draw of Signs is no linear function of normals; use sample")

    def power(self, factor: float) -> Self:
        """Proportional to q raised to a power."""
        return replace(self, natural_parameter=self.natural_parameter * factor, expected_value=None)

    def natural(self) -> Point:
        return self.natural_parameter

    def from_natural(self, natural: Point) -> Self:
        return replace(self, natural_parameter=natural, expected_value=None)

    def expected(self) -> Point:
        return self.mean

    def natural_gradient(self, look: Look) -> Point:
        return look.gradient * self.ess

    def kl_gradient(self, prior: Self) -> Point:
        return (self.natural_parameter - prior.natural_parameter) * self.pull

    def place(self, where: Point | None) -> Point:
        return self.mean if where is None else self.mean + where

    def draw(self, noise: Noise) -> Point:
        """A draw as an offset from the mean; 0 counts as 1."""
        return self.sample(noise) - self.mean

    def sample(self, noise: Noise) -> Point:
        return signs(self.natural_parameter + half_logistic(noise, self.mean))

    def log_prob(self, theta: Point) -> Tensor:
        log_prob: Tensor = -softplus(-2 * self.natural_parameter * theta).sum()
        return log_prob

    def entropy(self) -> Tensor:
        twice = 2 * self.natural_parameter
        entropy: Tensor = (softplus(twice) - twice * twice.sigmoid()).sum()
        return entropy

    def kl(self, other: Self) -> Tensor:
        gap = self.natural_parameter - other.natural_parameter
        kl: Tensor = (gap * self.mean - self._log_partition() + other._log_partition()).sum()
        return kl

    def _log_partition(self) -> Tensor:
        return softplus(2 * self.natural_parameter) - self.natural_parameter


@dataclass(frozen=True)
class HardSigns(Signs):
    """The limit of no temperature: every weight is the likelier of its two values, and gradients pass straight through.

    Args:
        natural_parameter: The latent weights.
        ess: 1; the scale of the latent weights means nothing.
        expected_value: Not used.
        pull: Decay of the latent weights.
        bound: They are kept in [-bound, bound].
    """

    bound: Any = math.inf

    @property
    def mean(self) -> Any:
        """Their signs."""
        return signs(self.natural_parameter)

    def from_natural(self, natural: Point) -> Self:
        inside = natural if equal(self.bound, math.inf) else natural.clamp(-self.bound, self.bound)
        return replace(self, natural_parameter=inside)


def half_logistic(noise: Noise, like: Any) -> Any:
    """Draws that lambda plus them is positive with the probability of a 1."""
    return logit(noise.uniform(like)) * 0.5


def signs(x: Any) -> Any:
    """-1 or 1; 1 for 0."""
    return x.sign() + (1 - x.sign().abs())
