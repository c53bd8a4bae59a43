"""How an expectation under q is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..noise import Noise
from ..rule import Expectation, Look, Point, Sight
from ..vector import Vector, equal
from .quadrature import gauss_hermite


@dataclass(frozen=True)
class Delta(Expectation):
    """The delta method: E_q[f(theta)] is taken to be f at the mean. One look, no noise."""

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        return None

    def __call__(self, q: Any, look_at: Callable[[Point | None], Look], noise: Noise) -> Look:
        return look_at(None)


@dataclass(frozen=True)
class MonteCarlo(Expectation):
    r"""The mean over draws of theta from a Gaussian. Unbiased; one look a draw.

    A q without spread (infinite ess) is looked at in its mean.

    Args:
        draws: Number of draws where the rule itself looks; a host that opens the draws decides for itself.
        antithetic: Draws 2k and 2k + 1 are mirror images in the mean, which takes the gradient's noise out of the curvature.
        control_variate: "stl" subtracts from every gradient what a quadratic with the curvature of q would show there,
            :math:`g - h (\theta - m)`. The mean stays, and the noise is gone where q is the posterior of a quadratic loss.
            :class:`~bayesrule.Reparameterized` has the same option for the curvature.

    Source: G. Roeder, Y. Wu and D. Duvenaud (2017), arXiv:1703.09194.
    """

    draws: int = 1
    antithetic: bool = False
    control_variate: Literal["stl"] | None = None

    def __post_init__(self) -> None:
        known_control(self.control_variate)

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        if not hasattr(q, "ess"):
            raise TypeError(f"MonteCarlo draws offsets of a Gaussian; for a {type(q).__name__} use Pathwise, Enumerate or Score")
        if equal(q.ess, math.inf):
            return None
        if not self.antithetic:
            return q.draw(noise.at(draw=draw))
        return q.draw(noise.at(draw=draw // 2)) * (1 - 2 * (draw % 2))

    def __call__(self, q: Any, look_at: Callable[[Point | None], Look], noise: Noise) -> Look:
        return mean_of((1.0, self._one(q, look_at, self.offset(q, noise, draw), draw)) for draw in range(self.draws))

    def _one(self, q: Any, look_at: Any, offset: Point | None, draw: int) -> Look:
        look: Look = look_at(offset, draw) if isinstance(look_at, Sight) else look_at(offset)
        if self.control_variate is None or offset is None:
            return look
        return look._replace(gradient=look.gradient - q.bend(offset))


def known_control(name: str | None) -> None:
    """Raise ValueError for a control variate that there is none of."""
    if name not in (None, "stl"):
        raise ValueError(f"control_variate must be 'stl' or None, got {name!r}")


def mean_of(looks: Iterable[tuple[float | Tensor, Look]]) -> Look:
    """The mean of looks with positive weights, one held at a time."""
    mean: Look | None = None
    total: float | Tensor = 0.0
    for weight, look in looks:
        total = total + weight
        mean = look if mean is None else mean.lerp(look, weight / total)
    if mean is None:
        raise ValueError("no look was taken: draws must be at least 1")
    return mean


def _sum(looks: Iterable[tuple[Any, Look]]) -> Look:
    """The sum of looks, each times its weight."""
    total: list[Any] = [None, None, None]
    for weight, look in looks:
        parts = look.scaled(weight)
        total = [b if a is None else a if b is None else a + b for a, b in zip(total, parts, strict=True)]
    return Look(*total)


@dataclass(frozen=True)
class GaussHermite(Expectation):
    """Gauss-Hermite quadrature: exact for polynomials of degree below twice the nodes, no noise.

    Costs nodes^D looks for D <= 3 elements of theta. Latent families, whose losses are sums over predictors, need only
    ``nodes`` looks: all predictors move together.

    Args:
        nodes: Nodes in each dimension.

    Example:
        >>> import bayesrule as br
        >>> q = br.Full(torch.zeros(1), 1.0)
        >>> rule = br.BayesRule(GaussHermite(3), br.Hessian(), br.Natural())
        >>> rule.look(q, q, br.Loss(lambda x: x.square().sum())).value.round(decimals=4)
        tensor(1.)
    """

    nodes: int = 20

    def __post_init__(self) -> None:
        gauss_hermite(self.nodes)

    def __call__(self, q: Any, look_at: Callable[[Point | None], Look], noise: Noise) -> Look:
        return mean_of((weight, look_at(where)) for weight, where in q.grid(gauss_hermite(self.nodes)))


@dataclass(frozen=True)
class Exact(Expectation):
    """The expectation that the loss itself knows, in closed form or by quadrature: conjugate sites, likelihoods of a predictor.

    Asks ``loss.expected(q)``. No curvature is asked: the look has what the loss says.
    """

    def __call__(self, q: Any, look_at: Any, noise: Noise) -> Look:
        expected = getattr(getattr(look_at, "loss", None), "expected", None)
        if expected is None:
            raise TypeError("Exact needs a loss that knows its expectation; use GaussHermite, Enumerate or MonteCarlo")
        look: Look = expected(q)
        return look


@dataclass(frozen=True)
class Enumerate(Expectation):
    r"""The sum over all values of a discrete theta: exact, 2^n values for n Bernoullis.

    .. math::  \nabla_\mu E_q[f] = F^{-1} \textstyle\sum_x q(x)\, (T(x) - \mu)\, f(x), \quad
               \text{for one coin } f(1) - f(0).

    Only values of the loss are asked.

    Example:
        >>> import bayesrule as br
        >>> coin, rule = br.Bernoulli(0.0), br.BayesRule(Enumerate(), br.Zero(), br.Natural())
        >>> rule.look(coin, coin, br.Loss(lambda x: 3 * x)).gradient
        Vector(tensor(3.))
    """

    def __call__(self, q: Any, look_at: Any, noise: Noise) -> Look:
        value: Any = 0.0
        gradient: Any = 0.0
        for probability, point, lever in q.support():
            seen = look_at.value(point)
            value, gradient = value + probability * seen, lever * seen + gradient
        return Look(value, gradient, None)


@dataclass(frozen=True)
class Score(Expectation):
    r"""The score function estimator (REINFORCE): only values of the loss are asked, which need not be differentiable.

    .. math::  \nabla_\mu E_q[f] = F^{-1} E_q[(T - \mu) (f - b)].

    For a Gaussian the look has gradient :math:`S d\, (f - b)` and curvature :math:`(S d d^T S - S)(f - b)`, d = theta - m.
    Unbiased, and far noisier than gradients: for discrete theta, or losses without gradients.

    Args:
        draws: Number of draws; at least 2 for the baseline "leave-one-out".
        baseline: The b above: the mean of the other draws, a number, or None for 0.

    Source: W. Kool, H. van Hoof and M. Welling (2019), Buy 4 REINFORCE samples, get a baseline for free.
    """

    draws: int = 2
    baseline: Literal["leave-one-out"] | float | None = "leave-one-out"

    def __call__(self, q: Any, look_at: Any, noise: Noise) -> Look:
        least = 2 if self.baseline == "leave-one-out" else 1
        if self.draws < least:
            raise ValueError(f"draws must be at least {least} for the baseline {self.baseline}, got {self.draws}")
        places = [q.draw(noise.at(draw=draw)) for draw in range(self.draws)]
        values = [look_at.value(where) for where in places]
        mean: Any = sum(values) / self.draws
        if self.baseline == "leave-one-out":
            above = [(value - mean) * (self.draws / (self.draws - 1)) for value in values]
        else:
            above = [value - (self.baseline or 0.0) for value in values]
        looks = (q.score(where).scaled(value / self.draws) for value, where in zip(above, places, strict=True))
        return _sum((1.0, look) for look in looks)._replace(value=mean)


@dataclass(frozen=True)
class Pathwise(Expectation):
    r"""The mean over draws that are differentiable in the parameters: Gamma, Beta, Dirichlet, Wishart and what is made of them.

    .. math::  \nabla_\mu E_q[f] = F^{-1} E_q[(\partial \theta / \partial \lambda)^T \nabla f(\theta)].

    Implicit reparameterization gives the inner derivative. Unbiased.

    Args:
        draws: Number of draws.

    Source: M. Figurnov, S. Mohamed and A. Mnih (2018), Implicit reparameterization gradients.
    """

    draws: int = 1

    def __call__(self, q: Any, look_at: Any, noise: Noise) -> Look:
        if not q.reparameterizable:
            raise TypeError(f"draws of a {type(q).__name__} are not differentiable; use Enumerate or Score")
        return mean_of((1.0, self._one(q, look_at, noise.at(draw=draw))) for draw in range(self.draws))

    def _one(self, q: Any, look_at: Any, noise: Noise) -> Look:
        def draw(*natural: Tensor) -> Any:
            theta = q.from_natural(Vector(natural)).sample(noise)
            return tuple(theta) if isinstance(theta, Vector) else theta

        theta: Any
        back: Any
        theta, back = torch.func.vjp(draw, *q.natural())[:2]
        oracle = look_at.oracle(Vector(theta) if isinstance(theta, tuple) else theta)
        gradient = oracle.gradient()
        pulled = back(tuple(gradient) if isinstance(gradient, Vector) else gradient)
        look: Look = q.as_look(q.fisher_solve(Vector(pulled)))
        return look._replace(value=oracle.value())
