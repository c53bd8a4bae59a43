"""Warnings that are given once, and point at the line of the user's that they are about."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import torch
import torch.utils.checkpoint


class Reminders:
    """What an optimizer of this name has warned about.

    Args:
        name: The optimizer's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: set[str] = set()
        self._lost = 0  # steps in a row
        self.trained_in_eval_mode = False  # whether an attached model's last forward could have been a training one but for that

    def of_draws(self, wanted: int, drawn: int, antithetic: bool, ranks: int) -> None:
        """Warn about a step without the draws that the algorithm needs.

        Args:
            wanted: Draws that make one look; 0 for an algorithm that does not draw.
            drawn: Draws that this step had.
            antithetic: Whether draws come in pairs.
            ranks: How many ranks had draws of their own.
        """
        if wanted and not drawn and self.trained_in_eval_mode:
            self._warn(
                "a step without a draw: the attached model is in eval mode, so that its forward sees the mean; call model.train(), "
                "or opt.train() before every forward"
            )
        elif wanted and not drawn:
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
        if drawn * ranks % 2 and antithetic:
            self._warn(f"antithetic draws come in pairs, but this step had {drawn}: open an even number")

    def of_lost(self, lost: bool, dropped: int) -> None:
        """Warn where nothing is learned any more, which takes longer than a scaler needs to find its scale."""
        self._lost = self._lost + 1 if lost else 0
        if self._lost == 10:
            self._warn(
                f"ten steps in a row changed nothing, as their gradients were not finite ({dropped} draws dropped so far, see "
                "dropped_draws); lower the learning rate, clip, or use a GradScaler with float16",
                "lost",
            )

    def of_others(self, count: int, all_: int) -> None:
        """Warn about parameters that lie outside of what is attached."""
        if count:
            self._warn(
                f"{count} of {all_} parameters are in no attached model: what is computed with them before its forward sees the "
                "mean, and their curvature is wrong; attach the model that holds all, or call opt.train() first in every step"
            )

    def of_idle(self, count: int, all_: int, steps: int) -> None:
        """Warn about parameters that learn nothing."""
        if count:
            self._warn(
                f"{count} of {all_} parameters had no gradient in {steps} steps: if part of the model was sharded (fully_shard) "
                "after this optimizer was made, make the optimizer after it; freeze what is not to be trained"
            )

    def of_nothing(self) -> None:
        """Warn about a step of no gradients."""
        self._warn("a step whose closure returned None and left no gradient changes nothing")

    def of_backward(self) -> None:
        """Warn about a draw that shows nothing."""
        self._warn(
            "no gradient arrived in a draw that is to be learned from; run backward() inside the context, or pass "
            "train=False to only look"
        )

    def of_mode(self) -> None:
        """Warn about an evaluation under a draw, unless it is a forward that backward() will repeat."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                return
            frame = frame.f_back
        self._warn(
            "a forward without gradients in training mode sees the draw that is open, not the mean; call model.eval() before an "
            "evaluation"
        )

    def of_thawed(self, count: int) -> None:
        """Warn about parameters that no draw knew."""
        if count:
            self._warn(
                f"{count} parameter{'s' * (count > 1)} became trainable while a draw was open, and stayed out of this "
                "step; unfreeze between step() and the next draw",
                "thawed",
            )

    def of_decay(self, default: float, groups: Sequence[float]) -> None:
        """Warn where every group overrides the weight decay of the constructor by zero."""
        if default and not any(groups):
            self._warn(
                f"every parameter group sets weight_decay=0, over the {default:g} that was asked for: the prior is flat; Hugging "
                "Face's Trainer does so unless TrainingArguments(weight_decay=...) is given"
            )

    def of_visibility(self, fractions: Callable[[], Mapping[str, float]]) -> None:
        """Warn about noise that is mostly rounding."""
        if "visibility" not in self.given:
            hidden = {name: part for name, part in fractions().items() if part < 0.5}
            if hidden:
                worst = min(hidden, key=lambda name: hidden[name])
                others = f" ({len(hidden)} parameters are under 50%)" if len(hidden) > 1 else ""
                self._warn(
                    f"only {hidden[worst]:.0%} of the noise of {worst!r} is above the rounding of its dtype{others}: draws and "
                    "curvature are noisier than the posterior; keep such parameters in float32, or lower ess",
                    "visibility",
                )

    def _warn(self, message: str, key: str = "") -> None:
        key = key or message
        if key not in self.given:
            self.given.add(key)
            warnings.warn(f"{self.name}: {message}", UserWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stacklevel of the first caller outside torch and this library, for a warning given by the caller of this."""
    library = sys.modules[__name__.partition(".")[0]]
    inside = tuple(os.path.dirname(module.__file__ or "") for module in (torch, library))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def why_no_gradient(drew: bool, unsharded: bool) -> str:
    """What a step without any gradient may come from.

    Args:
        drew: Whether a draw was opened.
        unsharded: Whether there are other ranks, and parameters lie on this one as a whole.
    """
    late = "; if the model was sharded (fully_shard) after this optimizer was made, make the optimizer after it"
    lost = "a draw was opened, but backward() did not run in it or reached no parameter of this optimizer"
    why = lost if drew else "call backward() before step(), on a loss that depends on this optimizer's parameters"
    return why + (late if unsharded else "")
