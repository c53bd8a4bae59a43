r"""The Bayesian learning rule, and the slots that turn it into an algorithm.

To learn from a loss :math:`\ell(\theta)` is to look for the member :math:`q_\lambda` of a family that minimizes
:math:`E_q[\ell] + KL(q \| q_0)`. The rule descends along the natural gradient, which for an exponential family is the
gradient with respect to the expectation parameter :math:`\mu`:

.. math::  \lambda \leftarrow (1 - \rho)\, \lambda + \rho\, (\lambda_0 - \nabla_\mu E_q[\ell]).

Two verbs. To **look** is to estimate :math:`E_q[\ell], E_q[\nabla \ell], E_q[\nabla^2 \ell]`: an :class:`Expectation`
says where, a :class:`Curvature` what stands in for the Hessian. To **move** is the equation: a :class:`Retraction` says how
a step stays inside the family, an :class:`Inertia` what is remembered from one step to the next. An algorithm is a choice
for each slot:

=================  ===============  ==============  =================  =============================  =====================
algorithm          family           expectation     curvature          retraction                     inertia
=================  ===============  ==============  =================  =============================  =====================
gradient descent   Fixed            Delta           Zero               Additive                       NoInertia
SGD                Fixed            Delta           Zero               Additive                       HeavyBall
Newton, ridge      Full             Delta           Hessian            Natural, rate 1                NoInertia
RMSprop            Diagonal         Delta           SquaredGradient    SquareRoot                     HeavyBall of the step
Adam, AdamW        Diagonal         Delta           SquaredGradient    SquareRoot                     Momentum
IVON               Diagonal         MonteCarlo      Reparameterized    Riemannian                     Momentum
conjugate Bayes    Gamma, ...       Exact           Zero               Natural, rate 1                NoInertia
CVI                WeightSpace      Exact           Zero               Natural                        NoInertia
=================  ===============  ==============  =================  =============================  =====================

The prior :math:`q_0` is a member of the family, so yesterday's posterior may be today's prior.

Scale, said once: a loss here is the **mean** over examples, and ``ess`` (effective sample size) is how often it counts. A
Gaussian keeps ``hess``, what the mean loss put into its precision, apart from ``weight_decay``, what the prior put there; its
**metric** is ``hess + weight_decay`` and its precision ``ess`` times that.

Source: M. E. Khan and H. Rue (2023), The Bayesian Learning Rule, JMLR 24(281).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .noise import CounterNoise, Noise
from .vector import lerp

Point = Any
"""A tensor or a Vector: something with + - * / and the shape of theta."""


class Look(NamedTuple):
    """What was seen: estimates of the mean loss, its gradient and its curvature under q. None where nobody asked."""

    value: Tensor | None  # ()
    gradient: Point  # like theta; for a family that is not Gaussian, grad_mu itself
    curvature: Point | None  # in the family's structure: (D,), (D, D), ...; of the loss alone, the prior is not in it

    def lerp(self, other: Look, weight: Any) -> Look:
        """This look moved towards another: a running mean of looks, whatever their number."""
        pairs = zip(self, other, strict=True)
        return Look(*(a if b is None else b if a is None else lerp(a, b, weight) for a, b in pairs))

    def scaled(self, factor: Any) -> Look:
        """This look times a number."""
        return Look(*(None if part is None else part * factor for part in self))


class Rates(NamedTuple):
    """Step sizes: of the mean (alpha), of the precision (rho), and how many steps there will have been (from 1)."""

    mean: Any
    precision: Any
    step: int = 1


class Oracle(ABC):
    """What can be asked of the mean loss at one theta. An oracle answers what it can and says what it cannot."""

    def value(self) -> Tensor | None:
        """Mean loss, shape (); None where it is not known."""
        return None

    @abstractmethod
    def gradient(self) -> Point:
        """Gradient of the mean loss, shaped like theta."""

    def squares(self) -> Point:
        """Mean over examples of the squared gradient of each, shaped like theta."""
        raise self._cannot("give the gradient of each example")

    def gradients(self) -> Tensor:
        """Gradient of the loss of every example, shape (n, D)."""
        raise self._cannot("give the gradient of each example")

    def diagonal(self) -> Point:
        """Diagonal of the Hessian of the mean loss, shaped like theta; all of it where the loss is a sum over elements."""
        raise self._cannot("give the diagonal of the Hessian")

    def probed(self) -> Point | None:
        """z (H z) for random signs z, averaged over probes that were drawn already; None where they are yet to be drawn."""
        return None

    def product(self, v: Point) -> Point:
        """Hessian of the mean loss times v, shaped like theta."""
        raise self._cannot("multiply by the Hessian")

    def hessian(self) -> Tensor:
        """Hessian of the mean loss, shape (D, D)."""
        raise self._cannot("give the Hessian")

    def gauss_newton(self) -> Tensor:
        """Generalized Gauss-Newton matrix of the mean loss, shape (D, D)."""
        raise self._cannot("give the Gauss-Newton matrix")

    def factor(self) -> Tensor:
        """B with B B^T the Gauss-Newton matrix of the mean loss, shape (D, n)."""
        raise self._cannot("give a factor of the Gauss-Newton matrix")

    def _cannot(self, what: str) -> TypeError:
        return TypeError(f"{type(self).__name__} cannot {what}; use another curvature or another oracle")


class Expectation(ABC):
    """How E_q[.] is taken.

    Attributes:
        draws: How many draws of theta make one look; 0 where the mean alone is looked at.
        climbs: Whether a first look only says where to look: see :class:`bayesrule.Adversarial`.
    """

    draws: int = 0
    climbs: bool = False

    @property
    def spreads(self) -> bool:
        """Whether the first place that is looked at is not the mean."""
        return self.draws > 0

    def offset(self, q: Any, noise: Noise, draw: int) -> Point | None:
        """Where draw number ``draw`` looks, as an offset from the mean; None is the mean itself."""
        raise TypeError(f"{type(self).__name__} does not look at single draws; an optimizer needs Delta or MonteCarlo")

    def sample(self, q: Any, noise: Noise, draw: int) -> Point | None:
        """A draw of q to predict with, as an offset from the mean."""
        return self.offset(q, noise, draw)

    def slope(self, q: Any, noise: Noise, draw: int) -> Point | None:
        """How fast a draw moves with the mean, element by element; None where it moves as the mean does."""
        return None

    def gradient(self, q: Any, offset: Point | None, gradient: Point) -> Point:
        """What the gradient that was seen at a draw says of E_q: itself, unless a draw is a relaxed one."""
        return gradient

    def ascent(self, q: Any, gradient: Point, size: Any) -> Point:
        """Where a first look leads, as an offset from the mean; ``size`` is the norm of its gradient."""
        raise TypeError(f"{type(self).__name__} looks once; to look twice an optimizer needs Adversarial")

    @abstractmethod
    def __call__(self, q: Any, look_at: Any, noise: Noise) -> Look:
        """E_q of the look; ``look_at`` is a :class:`Sight`."""


class Curvature(ABC):
    """What stands in for the Hessian of the mean loss.

    Attributes:
        degree: How many gradients are multiplied in it; what rescales the gradient rescales it to this power.
        draws: How many random probes make one estimate.
        squares_examples: Whether it asks for the gradient of every example, squared or not.
        keeps_examples: Whether squares alone do not do.
        asks_hessian: Whether it asks for second derivatives.
        curves: Whether there is any: without, the precision stays as it is.
    """

    degree: int = 0
    draws: int = 0
    squares_examples: bool = False
    keeps_examples: bool = False
    asks_hessian: bool = False
    curves: bool = True

    @abstractmethod
    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        """One estimate, in the structure of q; None leaves the precision alone."""

    def at(self, noise: Noise, draw: int) -> Curvature:
        """This curvature with the noise of one draw, for those that draw themselves."""
        return self


@dataclass(frozen=True)
class Sight:
    """How a loss is looked at from q: called with where a draw looked, it gives the look from there.

    Attributes:
        q: Who looks, with its prior.
        prior: The prior.
        loss: From theta to what can be asked there.
        curvature: What stands in for the Hessian.
        noise: For curvatures that draw.
    """

    q: Any
    prior: Any
    loss: Callable[[Point], Oracle]
    curvature: Curvature
    noise: Noise

    def __call__(self, where: Point | None, draw: int = 0) -> Look:
        oracle, curvature = self.oracle(where), self.curvature.at(self.noise, draw)
        return Look(oracle.value(), oracle.gradient(), curvature(self.q, self.prior, where, oracle))

    def oracle(self, where: Point | None) -> Oracle:
        """What can be asked there."""
        return self.loss(self.q.place(where))

    def value(self, where: Point | None) -> Tensor:
        """The mean loss there."""
        value = self.oracle(where).value()
        if value is None:
            raise TypeError(f"the value of the loss is needed, and {type(self.loss).__name__} does not know it")
        return value


class Retraction(ABC):
    """How a step stays inside the family: first a direction, then the way along it."""

    @abstractmethod
    def direction(self, q: Any, prior: Any, look: Look, rates: Rates) -> tuple[Any, Point]:
        """q with its precision moved, and the direction against which the rest of q is to move."""

    @abstractmethod
    def along(self, q: Any, direction: Point, rates: Rates) -> Any:
        """q moved against the direction."""


class Inertia(ABC):
    """What is remembered between steps: one vector, None before the first.

    Attributes:
        remembers: Whether there is anything to remember.
    """

    remembers: bool = True

    @abstractmethod
    def of_look(self, q: Any, prior: Any, look: Look, memory: Point | None, step: int) -> tuple[Look, Any, Point | None]:
        """The look and the prior that the retraction gets to see, and the memory."""

    @abstractmethod
    def of_direction(self, direction: Point, memory: Point | None, step: int) -> tuple[Point, Point | None]:
        """The direction in which q really moves, and the memory."""


@dataclass(frozen=True)
class NoInertia(Inertia):
    """Every step stands alone."""

    remembers = False

    def of_look(self, q: Any, prior: Any, look: Look, memory: Point | None, step: int) -> tuple[Look, Any, Point | None]:
        return look, prior, memory

    def of_direction(self, direction: Point, memory: Point | None, step: int) -> tuple[Point, Point | None]:
        return direction, memory


NO_INERTIA = NoInertia()


@dataclass(frozen=True)
class BayesRule:
    """The rule with its slots filled: an algorithm. Pure: nothing is changed in place, nothing kept.

    Args:
        expectation: How E_q is taken.
        curvature: What stands in for the Hessian.
        retraction: How a step stays inside the family.
        momentum: What is remembered between steps.

    Example:
        One step of Newton's method, from anywhere to the minimum of a quadratic:

        >>> import torch
        >>> import bayesrule as br
        >>> newton = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
        >>> start = br.Full(torch.zeros(2), torch.eye(2))
        >>> flat = br.Full(torch.zeros(2), torch.zeros(2, 2))
        >>> newton.step(start, flat, br.Loss(lambda x: (x - 1).square().sum())).mean
        tensor([1., 1.])

    Source: Khan and Rue (2023), equation 3.
    """

    expectation: Expectation
    curvature: Curvature
    retraction: Retraction
    momentum: Inertia = NO_INERTIA

    def look(self, q: Any, prior: Any, loss: Callable[[Point], Oracle], noise: Noise | None = None) -> Look:
        """Estimate E_q[loss], E_q[gradient], E_q[curvature]."""
        if noise is None and (self.expectation.spreads or self.curvature.draws):
            raise ValueError("this rule draws: pass noise=CounterNoise(seed, step=t) with another step t in every call")
        noise = noise or CounterNoise()
        sight = Sight(q, prior, q.objective(loss, prior), self.curvature, noise)
        return self.expectation(q, sight, noise)

    def move(self, q: Any, prior: Any, look: Look, rates: Rates, memory: Point | None = None) -> tuple[Any, Point | None]:
        """Take the step; return the new q and what is to be remembered. q is to be written under the prior."""
        q, direction, memory = self.head(q, prior, look, rates, memory)
        return self.retraction.along(q, direction, rates), memory

    def head(self, q: Any, prior: Any, look: Look, rates: Rates, memory: Point | None = None) -> tuple[Any, Point, Point | None]:
        """The first half of :meth:`move`: q with its precision moved, where the rest of it is to go, and the memory."""
        look, prior, memory = self.momentum.of_look(q, prior, look, memory, rates.step)
        q, direction = self.retraction.direction(q, prior, look, rates)
        direction, memory = self.momentum.of_direction(direction, memory, rates.step)
        return q, direction, memory

    def step(self, q: Any, prior: Any, loss: Callable[[Point], Oracle], rate: float = 1.0, noise: Noise | None = None) -> Any:
        """Look and move once with alpha = rho = rate, remembering nothing.

        Args:
            q: Where to start, a member of the family.
            prior: The prior, a member of the same family.
            loss: From theta to what can be asked there, such as :class:`bayesrule.Loss`.
            rate: Step size, in (0, 1].
            noise: Source of the draws, needed where the expectation draws: ``CounterNoise(seed, step=t)``, t counting the calls.
        """
        q = q.under(prior)
        return self.move(q, prior, self.look(q, prior, loss, noise), Rates(rate, rate))[0]
