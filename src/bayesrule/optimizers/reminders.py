"""Warnings that are given once, and point at the line of the user's that they are about."""

from __future__ import annotations

import os
import sys
import warnings

import torch


class Reminders:
    """What an optimizer of this name has warned about.

    Args:
        name: The optimizer's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: set[str] = set()

    def of_draws(self, wanted: int, drawn: int, antithetic: bool) -> None:
        """Warn about a step without the draws that the algorithm needs.

        Args:
            wanted: Draws that make one look; 0 for an algorithm that does not draw.
            drawn: Draws that this step had.
            antithetic: Whether draws come in pairs.
        """
        if wanted and not drawn:
            self._warn(
                "a step without a draw: it is taken at the mean and the curvature stays as it is; call opt.attach(model) once, or "
                "opt.train() before every forward, or step(closure), or run forward and backward inside "
                "`with opt.sampled_params(train=True):`"
            )
        elif wanted > 1 and drawn != wanted:
            self._warn(
                f"mc_samples={wanted} acts in step(closure); this step had {drawn} draw{'s' * (drawn != 1)}: open as many "
                "sampled_params() contexts as you want draws, or pass a closure"
            )
        if drawn % 2 and antithetic:
            self._warn(f"antithetic draws come in pairs, but this step had {drawn}: open an even number")

    def of_mode(self) -> None:
        """Warn about an evaluation under a draw."""
        self._warn(
            "a forward without gradients in training mode sees the draw that is open, not the mean; call model.eval() before an "
            "evaluation"
        )

    def _warn(self, message: str) -> None:
        if message not in self.given:
            self.given.add(message)
            warnings.warn(f"{self.name}: {message}", UserWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stacklevel of the first caller outside torch and this library, for a warning given by the caller of this."""
    library = sys.modules[__name__.partition(".")[0]]
    inside = tuple(os.path.dirname(module.__file__ or "") for module in (torch, library))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
