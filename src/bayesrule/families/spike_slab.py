r"""Weights that are there or not, unit by unit: the mixture of two spikes that dropout is inference over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

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
        shape: Of the tensor whose elements stand in a row; None where each element is a unit of its own.
        axis: Along which axis of the shape the units are: the inputs of a layer are axis 1 of its weight.

    Raises:
        TypeError: A density or a KL divergence is asked for: spikes have none.

    Example:
        >>> import torch
        >>> import bayesrule as br
        >>> q = SpikeAndSlab(torch.ones(4), 0.5, (2, 2), axis=1)
        >>> q.sample(br.CounterNoise(seed=0)).view(2, 2)
        tensor([[2., 0.],
                [2., 0.]])

    Source: Khan and Rue (2023), The Bayesian Learning Rule, section 4.3.
    """

    mean: Tensor
    keep: Any = 1.0
    shape: tuple[int, ...] | None = None
    axis: int = 1

    is_exponential_family: ClassVar[bool] = False
    ess: ClassVar[float] = 1.0
    hess: ClassVar[float] = 0.0
    """Nothing curves: the spikes keep their width."""

    def __post_init__(self) -> None:
        if self.shape is not None and (not 0 <= self.axis < len(self.shape) or math.prod(self.shape) != len(self.mean)):
            raise ValueError(f"a SpikeAndSlab of {len(self.mean)} elements has no axis {self.axis} of shape {self.shape}")

    @property
    def variance(self) -> Tensor:
        """Of each element, shape (D,)."""
        return self.mean**2 * ((1 - self.keep) / self.keep)

    def solve(self, v: Tensor) -> Tensor:
        """The covariance times v: weights of a unit come and go together."""
        pull = self.mean * v
        if self.shape is not None:
            others = [i for i in range(len(self.shape)) if i != self.axis]
            pull = pull.view(self.shape).sum(others, keepdim=True).expand(self.shape).reshape(-1)
        return self.mean * pull * ((1 - self.keep) / self.keep)

    def root_solve(self, v: Tensor) -> NoReturn:
        raise TypeError("a draw of a SpikeAndSlab is no linear function of normals; use sample")

    def power(self, factor: float) -> NoReturn:
        raise TypeError("a power of weights that are there or not is none; retrain with another p")

    def masks(self, noise: Noise) -> Tensor:
        """0 or 1 / pi for every element, the same for all of a unit, shape (D,)."""
        masks = (noise.uniform(self.mean) < self.keep).to(self.mean.dtype) / self.keep
        if self.shape is None:
            return masks
        along = [-1 if i == self.axis else 1 for i in range(len(self.shape))]
        return masks[: self.shape[self.axis]].view(along).expand(self.shape).reshape(-1)

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
