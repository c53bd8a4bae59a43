"""Learning rates as a function of the share of training that is done: nothing to save, nothing to lose."""

import math
from collections.abc import Callable


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """From 1 to 0 along a line."""
    return 1.0 - done


def step(done: float) -> float:
    """A tenth from half of the training on, a hundredth from three quarters on (He et al., 2016)."""
    return 0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0


def constant(done: float) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "step": step, "constant": constant}


def warmed(step: int, steps: int, warmup: int | None, floor: float) -> float:
    """A linear rise, then half a cosine to a floor; at a step, from 0, of so many.

    Args:
        step: The step.
        steps: All of them.
        warmup: Steps of the rise; None is a twentieth of all.
        floor: The factor at the end.

    Example:
        >>> [warmed(step, 12, 3, 0.5) for step in (0, 1, 2, 3, 12)]
        [0.25, 0.5, 0.75, 1.0, 0.5]
    """
    rise = steps // 20 if warmup is None else warmup
    if step < rise:
        return (step + 1) / (rise + 1)
    return floor + (1 - floor) * cosine((step - rise) / (steps - rise))
