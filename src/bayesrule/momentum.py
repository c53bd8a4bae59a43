"""What is remembered between steps.

Where the prior's gradient goes is decided here too. With ``over="loss"`` only the loss is averaged and the prior acts at
full strength in the retraction (IVON, EVON). With ``over="loss+prior"`` the prior is part of what is averaged (SGD, Adam,
Vadam, SAM); what is left of it for the retraction is then centered on q, where it pulls no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .rule import Inertia, Look, Point
from .vector import axpy, lerp


def _seen(q: Any, prior: Any, look: Look, over: str) -> tuple[Point, Any]:
    """The gradient to be averaged, and the prior that is left for the retraction."""
    if over == "loss":
        return look.gradient, prior
    return look.gradient + q.prior_gradient(prior), prior.moved(mean=q.mean)


@dataclass(frozen=True)
class Momentum(Inertia):
    r"""Exponential average of the gradient, begun at zero.

    .. math::  v \leftarrow \beta v + (1 - \beta) g, \qquad \hat v = v / (1 - \beta^t) \text{ if debiased.}

    Debiasing is a rate: :math:`\hat v` is the average with weight :math:`(1-\beta)/(1-\beta^t)`. The memory stays raw.

    Args:
        beta: Share of the old average kept, in [0, 1).
        over: "loss", "loss+prior", or "step": what the retraction made of the gradient.
        debias: Undo the start at zero.
    """

    beta: float
    over: Literal["loss", "loss+prior", "step"] = "loss"
    debias: bool = True

    def of_look(self, q: Any, prior: Any, look: Look, memory: Point | None, step: int) -> tuple[Look, Any, Point | None]:
        if self.over == "step":
            return look, prior, memory
        gradient, prior = _seen(q, prior, look, self.over)
        average, memory = self._average(gradient, memory, step)
        return look._replace(gradient=average), prior, memory

    def of_direction(self, direction: Point, memory: Point | None, step: int) -> tuple[Point, Point | None]:
        return self._average(direction, memory, step) if self.over == "step" else (direction, memory)

    def _average(self, gradient: Point, memory: Point | None, step: int) -> tuple[Point, Point]:
        memory = gradient * (1 - self.beta) if memory is None else lerp(memory, gradient, 1 - self.beta)
        return memory * (1 / (1 - self.beta**step)) if self.debias else memory, memory


@dataclass(frozen=True)
class HeavyBall(Inertia):
    r"""Heavy ball: a sum of past gradients, or of past steps, that fades.

    .. math::  v \leftarrow \beta v + (1 - d) g, \qquad v = g \text{ at first.}

    With a fixed precision this is the KL heavy ball of the rule, in natural parameters.

    Args:
        beta: Share of the old sum kept, in [0, 1).
        over: "loss", "loss+prior", or "step": what the retraction made of the gradient (torch's RMSprop).
        dampening: The d above.
        nesterov: Look ahead: act by g + beta v.
    """

    beta: float
    over: Literal["loss", "loss+prior", "step"] = "loss+prior"
    dampening: float = 0.0
    nesterov: bool = False

    def of_look(self, q: Any, prior: Any, look: Look, memory: Point | None, step: int) -> tuple[Look, Any, Point | None]:
        if self.over == "step":
            return look, prior, memory
        gradient, prior = _seen(q, prior, look, self.over)
        force, memory = self._push(gradient, memory)
        return look._replace(gradient=force), prior, memory

    def of_direction(self, direction: Point, memory: Point | None, step: int) -> tuple[Point, Point | None]:
        return self._push(direction, memory) if self.over == "step" else (direction, memory)

    def _push(self, force: Point, memory: Point | None) -> tuple[Point, Point]:
        memory = force if memory is None else axpy(memory * self.beta, force, 1 - self.dampening)
        return (axpy(force, memory, self.beta) if self.nesterov else memory), memory
