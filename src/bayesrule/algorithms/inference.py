"""The rule run until it stands still: one loop for every iterative posterior of the library.

A step that leaves the family, or that lowers the evidence bound where the bound is known without noise, is taken back and
tried at half its rate. Nothing is clamped, and every such thing is in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..estimators.expectations import Delta
from ..family import DomainError
from ..noise import CounterNoise
from ..rule import BayesRule, Look, Rates
from ..vector import Vector, leaves

LEAST_RATE = 1e-6


class StepInfo(NamedTuple):
    """One accepted step.

    Attributes:
        bound: Evidence bound after it, in nats; for Delta minus loss and distance from the prior at the mean; None if unknown.
        rate: The rate it was taken with.
        backoffs: How many larger rates were taken back.
        change: Size of the step per unit of rate, relative to the natural parameter.
    """

    bound: float | None
    rate: float
    backoffs: int
    change: float


@dataclass(frozen=True)
class Inference:
    """Where the rule came to rest.

    Attributes:
        q: The posterior approximation.
        trace: Every accepted step, a list of :class:`StepInfo`.
        converged: Whether the last change was below the tolerance.
        look: The last look, taken at q.
    """

    q: Any
    trace: list[StepInfo]
    converged: bool
    look: Look = field(repr=False)

    @property
    def bound(self) -> float | None:
        """The evidence bound of q, in nats; None where values of the loss are not known."""
        return self.trace[-1].bound if self.trace else None

    @property
    def backoffs(self) -> int:
        """How many steps were taken back."""
        return sum(step.backoffs for step in self.trace)


def infer(
    rule: BayesRule,
    q: Any,
    prior: Any,
    loss: Callable[[Any], Any],
    *,
    rate: float = 1.0,
    steps: int = 200,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Inference:
    r"""Run a rule until it stands still.

    Costs a look and a move a step, and the same for each step that is taken back. The rate falls where steps alternate, to
    :math:`\rho / (1 - r)` with r the ratio of two steps in a row (which ends an oscillation), and recovers slowly.

    As an instance of the rule: the rule that it is given.

    Args:
        rule: The slots.
        q: Where to start.
        prior: The prior, a member of the same family.
        loss: From theta to what can be asked there; minus the log likelihood of all the data, where the family has ess = 1.
        rate: Largest step size, in (0, 1].
        steps: Most steps to take.
        tolerance: Relative change of the natural parameter, per unit of rate, at which to stop; rounding is the least.
        seed: Of the draws, where the rule draws.

    Returns:
        :class:`Inference`.

    Raises:
        DomainError: No rate keeps the step inside the family.

    Example:
        >>> import torch
        >>> import bayesrule as br
        >>> rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
        >>> start = br.Full(torch.zeros(1), 1.0)
        >>> infer(rule, start, start, br.Loss(lambda x: (x - 2).square().sum() / 2)).q.mean
        tensor([1.])

    Source: Khan and Rue (2023), equation 3; the rate of alternating steps is that of J. Barzilai and J. M. Borwein (1988).
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be a number in (0, 1], got {rate}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rounding = 10 * torch.finfo(leaves(q.natural())[0].dtype).eps
    tolerance = max(tolerance, rounding)
    noisy = bool(rule.expectation.spreads or rule.curvature.draws)
    still = isinstance(rule.expectation, Delta)

    def look_from(q: Any, step: int) -> tuple[Any, Look, float | None]:
        q = q.under(prior)
        look = rule.look(q, prior, loss, CounterNoise(seed, step=step) if noisy else None)
        if look.value is None or (still and look.value.dim()):
            return q, look, None
        return q, look, float(-look.value * getattr(q, "ess", 1) - q.distance(prior) if still else q.bound(look, prior))

    q, look, bound = look_from(q, 0)
    if bound is not None and not math.isfinite(bound):
        raise DomainError(f"the evidence bound is {bound} where it starts: start nearer, or with a prior that is not so wide")
    trace: list[StepInfo] = []
    largest, before = rate, None
    for step in range(1, steps + 1):
        backoffs = 0
        while True:
            try:
                moved, _ = rule.move(q, prior, look, Rates(rate, rate, step))
                moved, next_look, next_bound = look_from(moved, step)
                worse = not noisy and bound is not None and not _at_least(next_bound, bound, max(1e-9, rounding))
            except DomainError:
                if rate <= LEAST_RATE:
                    raise DomainError(f"no rate down to {rate:.0e} keeps step {step} inside the family: start nearer") from None
                worse = True
            if not worse or rate <= LEAST_RATE:
                break
            rate, backoffs = rate / 2, backoffs + 1
        if worse and not trace:
            raise DomainError(f"no rate down to {rate:.0e} raises the evidence bound from {bound}: start nearer")
        if worse:
            break  # rounding is all that is left to gain
        change = _difference(moved, q)
        size = float(change.dot(change)) ** 0.5 / rate
        scale = _size(moved)
        if not (math.isfinite(size) and math.isfinite(scale)):
            raise DomainError(f"the natural parameter is no longer finite in step {step}: start nearer, or take a smaller rate")
        trace.append(StepInfo(next_bound, rate, backoffs, size / scale))
        q, look, bound = moved, next_look, next_bound
        if not noisy and size <= tolerance * scale:
            return Inference(q, trace, True, look)
        ratio = 0.0 if before is None or not before[1] else float(change.dot(before[0])) / before[1] * before[2] / rate
        before = (change, float(change.dot(change)), rate)
        if not noisy:
            rate = max(rate / (1 - ratio), rate / 4) if ratio < -0.2 else min(largest, rate * 1.5)
    return Inference(q, trace, bool(trace) and trace[-1].change <= tolerance, look)


def _at_least(new: float | None, old: float, rounding: float) -> bool:
    """Whether a bound has not fallen, but for rounding."""
    return new is not None and math.isfinite(new) and new >= old - rounding * (1 + abs(old))


def _difference(a: Any, b: Any) -> Vector:
    pairs = zip(leaves(a.natural()), leaves(b.natural()), strict=True)
    return Vector([x - y for x, y in pairs])


def _size(q: Any) -> float:
    natural = Vector(leaves(q.natural()))
    return max(float(natural.dot(natural)) ** 0.5, 1e-300)
