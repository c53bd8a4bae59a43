"""Learning rates as a function of the share of training that is done: nothing to save, nothing to lose."""

import math
from collections.abc import Callable


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done))


def step(done: float) -> float:
    """A tenth from half of the training on, a hundredth from three quarters on (He et al., 2016)."""
    return 0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0


def constant(done: float) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "step": step, "constant": constant}
