"""PyTorch Lightning: a callback that draws in front of every training batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ..optimizers.attaching import Attached, SavesMean
from ..optimizers.optimizer import BayesOptimizer
from ..uses.tracking import TrackSensitivity


class DrawCallback(Callback):
    """Trains every batch under a draw of q, and evaluates and saves at its mean.

    All that a :class:`~lightning.pytorch.Trainer` needs beside an optimizer of this library in ``configure_optimizers``: the
    micro-batches of an accumulation bypass the optimizer's ``step``, so that it cannot draw for them. One step has one draw, also
    when a validation or a checkpoint comes between two of its micro-batches. Optimizers of others are left alone.

    In manual optimization a training step may hold several optimizer steps, of several optimizers. Each of them has a draw of its
    own, which opens in front of whatever part of the module (``self.encoder(x)``) is called with gradients.

    The Trainer says what is training, not the mode of a module: what it leaves in eval mode, as pretrained networks come, is
    trained under draws like the rest.

    Raises:
        TypeError: No optimizer is one of this library.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DrawCallback()], accumulate_grad_batches=4, logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._attached: list[SavesMean] = []
        self.trains = False  # whether a batch is under way

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = _drawing(trainer)
        if not optimizers:
            found = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
            raise TypeError(
                f"DrawCallback: no optimizer of bayesrule is trained (configure_optimizers gave: {found}); return a bayesrule.IVON "
                "from it, or leave the callback out"
            )
        self._detach()
        self._attached = [SavesMean(optimizer, pl_module) for optimizer in optimizers]
        if not pl_module.automatic_optimization:
            self._attached += [Opens(self, optimizer, part) for optimizer in optimizers for part in _parts(pl_module, optimizer)]

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.trains = True
        for optimizer in _drawing(trainer):
            optimizer.train()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.trains = False

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
        self.trains = False
        _to_mean(trainer)
        self._detach()

    def _detach(self) -> None:
        for attached in self._attached:
            attached.remove()
        self._attached = []


class SensitivityCallback(Callback):
    """Leave-one-out estimates at the end of every training epoch, logged as ``loo_nll`` and ``loo_accuracy``.

    Where the tracker has patience, training stops when no smaller estimate has come for so long.

    Args:
        tracker: What estimates, and keeps what it found.
        part: Of the module, what takes inputs and gives outputs; None is the module itself, by its ``forward``.

    Example:
        >>> import bayesrule as br
        >>> tracker = br.TrackSensitivity([(torch.zeros(2, 4), torch.tensor([0, 1]))])
        >>> callback = SensitivityCallback(tracker, part=lambda module: module.net)
        >>> callbacks = [DrawCallback(), callback]  # for Trainer(callbacks=callbacks)
    """

    def __init__(self, tracker: TrackSensitivity, part: Callable[[LightningModule], nn.Module] | None = None) -> None:
        self.tracker, self.part = tracker, part

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        model = pl_module if self.part is None else self.part(pl_module)
        line = self.tracker.update(model, optimizer, trainer.current_epoch + 1)
        if line is not None:
            pl_module.log_dict({name: line[name] for name in ("loo_nll", "loo_accuracy")}, rank_zero_only=True)
        trainer.should_stop |= self.tracker.should_stop


class Opens(Attached):
    """Opens the draw of a step in front of a part of the module, in whatever mode it is."""

    def __init__(self, callback: DrawCallback, optimizer: BayesOptimizer, part: nn.Module) -> None:
        self._callback = callback
        super().__init__(optimizer, part)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        optimizer = self.serves(model)
        if self._callback.trains and optimizer is not None and torch.is_grad_enabled() and not optimizer.draws.is_open:
            self.open(optimizer, model, args, kwargs)


def _drawing(trainer: Trainer) -> list[BayesOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, BayesOptimizer)]


def _parts(module: nn.Module, optimizer: BayesOptimizer) -> Iterator[nn.Module]:
    """What a module calls that holds parameters of an optimizer; lists of modules are not called themselves."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    for child in module.children():
        if own.isdisjoint(child.parameters()):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child, optimizer)
        else:
            yield child


def _to_mean(trainer: Trainer) -> None:
    for optimizer in _drawing(trainer):
        optimizer.eval()
