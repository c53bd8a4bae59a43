"""What ``step(closure)`` asks of a closure: one call for every look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .draws import Draws
from .examples import Examples


class Asking(Protocol):
    """What is asked of an optimizer."""

    draws: Draws
    examples: Examples

    @property
    def climbs(self) -> bool: ...
    @property
    def squares_examples(self) -> bool: ...
    @property
    def asks_hessian(self) -> bool: ...
    def wanted_draws(self) -> int: ...


def evaluate(optimizer: Asking, closure: Callable[..., Any]) -> Any:
    """Call a closure for every draw of the step; the mean loss.

    A draw that climbs has two calls, and the second counts. Of several of these each has its part of the batch: the closure is
    then called with the number of the part.
    """
    wanted, draws = optimizer.wanted_draws(), optimizer.draws
    if not wanted:
        return look(optimizer, closure)
    losses = []
    for number in range(1 if draws.is_training or draws.goes_on else wanted):
        part = (number,) if optimizer.climbs and wanted > 1 else ()
        draws.begin(train=True, joinable=True, automatic=draws.goes_on)
        try:
            loss = look(optimizer, closure, *part)
            if optimizer.climbs:
                draws.climb()
                loss = look(optimizer, closure, *part)
        except BaseException:
            draws.discard()
            raise
        losses.append(loss)
        draws.close()
    return None if losses[0] is None else sum(losses) / len(losses)


@torch.enable_grad()
def look(optimizer: Asking, closure: Callable[..., Any], *part: int) -> Any:
    """One call: its loss, and the gradients in place."""
    told = optimizer.squares_examples or optimizer.asks_hessian
    return optimizer.examples.learn(closure, *part) if told else closure(*part)
