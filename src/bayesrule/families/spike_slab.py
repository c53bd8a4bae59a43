r"""Weights that are there or not, unit by unit: the mixture of two spikes that dropout is inference over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from ..family import Family
from ..noise import Noise
from ..rule import Look, Point


@dataclass(frozen=True, eq=False)
class SpikeAndSlab(Family):
    r"""Two spikes for each unit: its weights are at m / pi with probability pi, and all zero otherwise.

    .. math::  q(\theta_j) = \pi\, N(\theta_j; m_j / \pi, \varepsilon I) + (1 - \pi)\, N(\theta_j; 0, \varepsilon I),
               \quad \varepsilon \to 0, \qquad \theta_j = z_j m_j / \pi, \quad E_q[\theta] = m.

    pi is fixed and the second spike stays at zero, so the mean is all that moves. It is no exponential family: step with the
    retraction :class:`~bayesrule.Additive`.

    Args:
        mean: m, shape (D,).
        keep: pi, in (0, 1].
        units: The number of the unit that each element belongs to, shape (D,); None where each is its own.

    Raises:
        TypeError: A density or a KL divergence is asked for: spikes have none.

    Example:
        >>> import bayesrule as br
        >>> q = SpikeAndSlab(torch.ones(4), 0.5, torch.tensor([0, 0, 1, 1]))
        >>> q.sample(br.CounterNoise(seed=1))
        tensor([2., 2., 0., 0.])

    Source: Khan and Rue (2023), The Bayesian Learning Rule, section 4.3.
    """

    mean: Tensor
    keep: Any = 1.0
    units: Tensor | None = None

    is_exponential_family: ClassVar[bool] = False
    ess: ClassVar[float] = 1.0
    hess: ClassVar[float] = 0.0
    """Nothing curves: the spikes keep their width."""

    @property
    def variance(self) -> Tensor:
        """Of each element, shape (D,)."""
        return self.mean**2 * ((1 - self.keep) / self.keep)

    def solve(self, v: Tensor) -> Tensor:
        """The covariance times v: weights of a unit come and go together."""
        pull = self.mean * v
        if self.units is not None:
            pull = pull.new_zeros(len(pull)).index_add_(0, self.units, pull)[self.units]
        return self.mean * pull * ((1 - self.keep) / self.keep)

    def masks(self, noise: Noise) -> Tensor:
        """0 or 1 / pi for every element, the same for all of a unit, shape (D,)."""
        u = noise.uniform(self.mean)
        return ((u if self.units is None else u[self.units]) < self.keep).to(self.mean.dtype) / self.keep

    def sample(self, noise: Noise) -> Tensor:
        return self.mean * self.masks(noise)

    def draw(self, noise: Noise) -> Tensor:
        """A draw as an offset from the mean."""
        return self.sample(noise) - self.mean

    def place(self, where: Point | None) -> Point:
        return self.mean if where is None else self.mean + where

    # What the retraction asks

    def moved(self, *, mean: Tensor | None = None, hess: Any = None) -> Self:
        return self if mean is None else replace(self, mean=mean)

    def precondition(self, v: Point) -> Point:
        """v: both spikes are as wide in all directions."""
        return v

    def prior_gradient(self, prior: Any) -> Point:
        """Gradient of -log prior at the mean."""
        return 0.0 if prior.mean is self.mean else prior.stretch(self.mean - prior.mean)

    # What it has not

    def natural(self) -> NoReturn:
        raise TypeError("a SpikeAndSlab is no exponential family and has no natural parameters; use the retraction Additive")

    def from_natural(self, natural: Point) -> NoReturn:
        self.natural()

    def expected(self) -> NoReturn:
        raise TypeError("a SpikeAndSlab is no exponential family and has no expectation parameters; use mean and variance")

    def natural_gradient(self, look: Look) -> NoReturn:
        self.natural()

    def kl_gradient(self, prior: Any) -> NoReturn:
        self.natural()

    def log_prob(self, theta: Point) -> NoReturn:
        raise TypeError("a SpikeAndSlab has no density: its spikes have no width")

    def entropy(self) -> NoReturn:
        self.log_prob(self.mean)

    def kl(self, other: Any) -> NoReturn:
        self.log_prob(self.mean)


def units_of(shape: tuple[int, ...] | torch.Size, axis: int | None) -> Tensor | None:
    """For every element of a tensor, in a row, its place along an axis, shape (D,); None without an axis."""
    if axis is None or len(shape) <= axis:
        return None
    place = torch.arange(shape[axis]).view(*([1] * axis), -1, *([1] * (len(shape) - axis - 1)))
    return place.expand(shape).reshape(-1)
