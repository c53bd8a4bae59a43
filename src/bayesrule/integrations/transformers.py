"""Hugging Face's Trainer: a callback that saves the posterior beside the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizers.attaching import SavesMean
from ..optimizers.optimizer import BayesOptimizer
from ..uses.tracking import TrackSensitivity

FILE = "posterior.safetensors"


class PosteriorCallback(TrainerCallback):
    """Writes ``posterior.safetensors`` into every checkpoint, and into ``output_dir`` when training ends.

    The Trainer trains under draws and evaluates at the mean without it: it calls ``optimizer.train()`` and ``optimizer.eval()``
    itself. What is saved after a step is at the mean; with the callback also what is saved in the middle of one
    (``enable_jit_checkpoint``, or ``save_model()`` after an interruption).

    With PEFT the posterior is over the adapters alone and lies beside them. With ``load_best_model_at_end`` the one in
    ``output_dir`` is the best checkpoint's.

    Args:
        num_data: Number of training examples, kept with the posterior; None is the length of the training set where it has one.

    Raises:
        TypeError: The Trainer's optimizer is not one of this library.

    Example:
        >>> import bayesrule as br
        >>> arguments = dict(
        ...     optimizer_cls_and_kwargs=(br.IVON, {"lr": 0.1, "ess": 10_000}),
        ...     callbacks=[PosteriorCallback(num_data=10_000)],
        ... )  # for Trainer(model, args, train_dataset=..., **arguments)
    """

    def __init__(self, num_data: int | None = None) -> None:
        self.num_data = num_data
        self._attached: SavesMean | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._detach()
        self._attached = SavesMean(_own(optimizer), model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = Path(state.best_model_checkpoint or "") / FILE
        if args.load_best_model_at_end and state.best_model_checkpoint and best.exists():
            if state.is_world_process_zero:
                shutil.copyfile(best, Path(args.output_dir) / FILE)
        else:
            self._write(Path(args.output_dir), state, **kwargs)
        self._detach()

    def _write(
        self, folder: Path, state: TrainerState, *, model: nn.Module, optimizer: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        posterior = _own(optimizer).posterior(model, num_data=self.num_data or _examples(train_dataloader))
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            posterior.save(folder / FILE)

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


class SensitivityCallback(TrainerCallback):
    """Leave-one-out estimates at the end of every epoch, in the Trainer's logs as ``loo_nll`` and ``loo_accuracy``.

    Where the tracker has patience, training stops when no smaller estimate has come for so long.

    Args:
        tracker: What estimates, and keeps what it found; its loader gives the mappings that the model takes, with ``labels``.

    Example:
        >>> import bayesrule as br, torch
        >>> batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
        >>> callbacks = [SensitivityCallback(br.TrackSensitivity([batch]))]  # for Trainer(..., callbacks=callbacks)
    """

    def __init__(self, tracker: TrackSensitivity) -> None:
        self.tracker = tracker

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        line = self.tracker.update(model, optimizer, round(state.epoch or 0))
        if line is not None:
            found = {name: line[name] for name in ("loo_nll", "loo_accuracy")}
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **found})
        control.should_training_stop |= self.tracker.should_stop


def _own(optimizer: Any) -> BayesOptimizer:
    """The optimizer itself, out of what Accelerate wraps it in."""
    inner = optimizer
    while not isinstance(inner, BayesOptimizer):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"PosteriorCallback: the Trainer's optimizer is {type(optimizer).__name__}, which learns no posterior; pass "
                "optimizer_cls_and_kwargs=(bayesrule.IVON, {...})"
            )
        inner = inner.optimizer
    return inner


def _examples(train_dataloader: Any) -> int | None:
    try:
        return len(train_dataloader.dataset)
    except (AttributeError, TypeError):
        return None
