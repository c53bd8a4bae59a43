"""The contracts of a family of distributions q, and of the Gaussians among them.

A family says how its members are named (natural and expectation parameters), how a look becomes a natural gradient, and
how its draws are told. The rule of :mod:`bayesrule.rule` asks no more of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .noise import Noise
from .rule import Look, Oracle, Point
from .vector import equal, rsqrt


class DomainError(ValueError):
    """A parameter that belongs to no member of the family: a step went too far."""


class Family(ABC):
    """A family of distributions q over theta, and one member of it.

    Attributes:
        is_exponential_family: Whether natural and expectation parameters name its members; without them, use a retraction in mean
            and precision.
    """

    is_exponential_family: ClassVar[bool] = False
    mean: Any

    @abstractmethod
    def natural(self) -> Point:
        """Natural parameter lambda, one block per sufficient statistic."""

    @abstractmethod
    def from_natural(self, natural: Point) -> Self:
        """The member with this natural parameter."""

    def adds_to(self, other: Family) -> bool:
        """Whether sums of the natural parameters of both mean something: they belong to the same statistics."""
        return self.is_exponential_family and type(self) is type(other)

    @abstractmethod
    def expected(self) -> Point:
        """Expectation parameter mu = E_q[T(theta)], block by block."""

    @abstractmethod
    def natural_gradient(self, look: Look) -> Point:
        """grad_mu E_q[total loss], block by block."""

    def kl_gradient(self, prior: Self) -> Point:
        """grad_mu KL(q || prior) = lambda - lambda_0."""
        return self.natural() - prior.natural()

    def under(self, prior: Self) -> Self:
        """The same distribution, written relative to a prior where the family keeps the two apart."""
        return self

    def objective(self, loss: Callable[[Point], Oracle], prior: Self) -> Callable[[Point], Oracle]:
        """What is looked at: the loss; and log q - log prior too, in a family whose KL has no closed form."""
        return loss

    def bound(self, look: Look, prior: Self) -> Tensor:
        """The evidence bound, minus (E_q[loss] + KL(q || prior)), from a look at the objective; for ess = 1."""
        if look.value is None:
            raise TypeError("the evidence bound needs the value of the loss; this look has none")
        return -look.value - self.kl(prior).sum()

    def place(self, where: Point | None) -> Point:
        """The theta that a draw stands for: where it looked, or the mean. A Gaussian tells its draws as offsets."""
        return self.mean if where is None else where

    def draw(self, noise: Noise) -> Point:
        """One draw of theta, as :meth:`place` takes it."""
        return self.sample(noise)

    def score(self, where: Point) -> Look:
        """What the number 1 seen there says of the look: E_q[f score] is the look of f, without any derivative of f."""
        raise TypeError(f"a {type(self).__name__} has no score; use an expectation that asks for gradients")

    def grid(self, rule: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, Point]]:
        """Weights and places of a quadrature, made of nodes and weights for one unit normal."""
        raise TypeError(f"a {type(self).__name__} has no quadrature grid; use Enumerate if it is finite, else Pathwise or Score")

    def support(self) -> Iterator[tuple[Tensor, Point, Point]]:
        """Every possible theta where there are finitely many: its probability, itself, and the derivative of the first in mu."""
        raise TypeError(f"a {type(self).__name__} takes infinitely many values; use Pathwise or Score, for a Gaussian GaussHermite")

    @abstractmethod
    def sample(self, noise: Noise) -> Point:
        """One draw of theta."""

    def solve(self, v: Point) -> Point:
        """The covariance times v."""
        raise TypeError(f"a {type(self).__name__} offers no product with its covariance; average over draws")

    def solve_each(self, v: Tensor) -> Tensor:
        """The covariance times each of n vectors, shape (n, ...); for a mean that is a tensor."""
        found: Tensor = torch.func.vmap(self.solve)(v)
        return found

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats, shape ()."""

    @abstractmethod
    def kl(self, other: Self) -> Tensor:
        """KL(q || other) in nats, shape ()."""

    @abstractmethod
    def log_prob(self, theta: Point) -> Tensor:
        """Log density at theta, shape ()."""


class Gaussian(Family):
    """N(mean, (ess * metric)^-1) with metric = hess + weight_decay, in some structure of matrices.

    A structure says how its metric acts on vectors, and which part of a matrix it keeps.
    """

    mean: Point
    hess: Any
    weight_decay: Any
    ess: Any

    @property
    @abstractmethod
    def metric(self) -> Any:
        """Precision per unit of ess, hess + weight_decay."""

    @property
    def precision(self) -> Any:
        """Precision of q."""
        return self.metric * self.ess

    @abstractmethod
    def stretch(self, v: Point) -> Point:
        """metric v."""

    @abstractmethod
    def precondition(self, v: Point) -> Point:
        """metric^-1 v."""

    @abstractmethod
    def root_precondition(self, v: Point) -> Point:
        """R v with R R^T = metric^-1."""

    @abstractmethod
    def sandwich(self, d: Any) -> Any:
        """d metric^-1 d for a symmetric d of the structure."""

    @abstractmethod
    def outer(self, a: Point, b: Point) -> Any:
        """The part of (a b^T + b a^T) / 2 that the structure keeps."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Any:
        """The part of a symmetric matrix, shape (D, D), that the structure keeps; for a mean of shape (D,)."""

    @abstractmethod
    def moved(self, *, mean: Point | None = None, hess: Any = None) -> Self:
        """The same Gaussian with another mean or another curvature."""

    def bend(self, v: Point) -> Point:
        """hess v: what a quadratic loss with the curvature of q adds to its gradient at the offset v."""
        return self.stretch(v) - self.weight_decay * v

    def solve(self, v: Point) -> Point:
        """precision^-1 v."""
        return self.precondition(v) / self.ess

    def root_solve(self, v: Point) -> Point:
        """R v with R R^T = precision^-1: unit normals become offsets of q."""
        return self.root_precondition(v) * rsqrt(self.ess)

    def power(self, factor: float) -> Self:
        """Proportional to q raised to a power: as much data so many times."""
        changed: Self = replace(self, ess=self.ess * factor)  # type: ignore[type-var]
        return changed

    def bound(self, look: Look, prior: Self) -> Tensor:
        if look.value is None:
            raise TypeError("the evidence bound needs the value of the loss; this look has none")
        return -look.value * self.ess - self.kl(prior)

    def distance(self, prior: Gaussian) -> Any:
        """Half the squared distance of the mean from the prior's, in its metric: what Newton's method pays for the prior."""
        gap = self.mean - prior.mean
        return (gap * prior.stretch(gap)).sum() * (prior.ess / 2)

    def prior_gradient(self, prior: Gaussian) -> Point:
        """Gradient of -log prior at the mean, per unit of ess: zero once the prior is centered on q."""
        if prior.mean is self.mean:
            return 0.0
        pull = prior.stretch(self.mean if equal(prior.mean, 0.0) else self.mean - prior.mean)
        return pull if equal(prior.ess, self.ess) else pull * (prior.ess / self.ess)

    def place(self, where: Point | None) -> Point:
        return self.mean if where is None else self.mean + where

    def draw(self, noise: Noise) -> Point:
        return self.root_solve(noise.normal(self.mean))

    def sample(self, noise: Noise) -> Point:
        return self.mean + self.draw(noise)

    def grid(self, rule: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, Point]]:
        size = self.mean.numel()
        if size > 3:
            raise ValueError(f"a grid of {len(rule)} nodes in each of {size} dimensions is too large: use MonteCarlo, or Exact")
        for corner in product(rule, repeat=size):
            z = self.mean.new_tensor([node for node, _ in corner]).view(self.mean.shape)
            yield math.prod(weight for _, weight in corner), self.root_solve(z)

    def score(self, where: Point) -> Look:
        pull = self.stretch(where) * self.ess
        return Look(None, pull, self.outer(pull, pull) - self.precision)
