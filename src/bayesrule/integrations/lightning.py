"""PyTorch Lightning: a callback that draws in front of every training batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..optimizers.attaching import Attached
from ..optimizers.optimizer import BayesOptimizer


class DrawCallback(Callback):
    """Trains every batch under a draw of q, and evaluates and saves at its mean.

    All that a :class:`~lightning.pytorch.Trainer` needs beside an optimizer of this library in ``configure_optimizers``: the
    micro-batches of an accumulation bypass the optimizer's ``step``, so that it cannot draw for them. One step has one draw, also
    when a validation or a checkpoint comes between two of its micro-batches. Optimizers of others are left alone.

    Raises:
        TypeError: No optimizer is one of this library.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DrawCallback()], accumulate_grad_batches=4, logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._attached: list[Attached] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = _drawing(trainer)
        if not optimizers:
            found = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
            raise TypeError(
                f"DrawCallback: no optimizer of bayesrule is trained (configure_optimizers gave: {found}); return a bayesrule.IVON "
                "from it, or leave the callback out"
            )
        self._detach()
        self._attached = [optimizer.attach(pl_module) for optimizer in optimizers]

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        for optimizer in _drawing(trainer):
            optimizer.train()

    def on_validation_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        _to_mean(trainer)

    def on_test_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        _to_mean(trainer)

    def on_predict_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        _to_mean(trainer)

    def on_exception(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._end(trainer)

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        _to_mean(trainer)
        self._detach()

    def _detach(self) -> None:
        for attached in self._attached:
            attached.remove()
        self._attached = []


def _drawing(trainer: Trainer) -> list[BayesOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, BayesOptimizer)]


def _to_mean(trainer: Trainer) -> None:
    for optimizer in _drawing(trainer):
        optimizer.eval()
