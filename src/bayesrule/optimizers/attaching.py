"""Draws that open by themselves, in front of a model's training forward."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .draws import Draws
from .reminders import Reminders


class Drawing(Protocol):
    """What is asked of an optimizer."""

    param_groups: list[dict[str, Any]]
    draws: Draws
    reminders: Reminders

    def train(self) -> None: ...


class Attached:
    """The hooks of one model for one optimizer. A copy of the model, pickled or deep, has hooks that do nothing.

    Neither is kept alive by them.
    """

    def __init__(self, optimizer: Drawing | None = None, model: nn.Module | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._model = None if model is None else weakref.ref(model)
        self._handles: list[Any] = []

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        return Attached, ()

    def hook(self, model: nn.Module) -> None:
        """Put the hooks in place, before all others."""
        self._handles = [
            model.register_forward_pre_hook(self.before_forward, prepend=True),
            model.register_state_dict_pre_hook(self.before_saving),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _serves(self, model: nn.Module) -> Drawing | None:
        if self._optimizer is None or self._model is None or self._model() is not model:
            return None
        return self._optimizer()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, model: nn.Module, _: Any) -> None:
        """Open the draw of the step for training, and close it for a while for anything else."""
        optimizer = self._serves(model)
        if optimizer is None:
            return
        if not model.training:
            optimizer.draws.pause()
        elif not torch.is_grad_enabled():
            if optimizer.draws.is_automatic:
                optimizer.reminders.of_mode()
        elif not optimizer.draws.is_open:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{type(optimizer).__name__}: a model computed again in backward() (reentrant checkpointing) wants a draw, "
                    "which must be open before its first forward: call opt.train() there, or pass use_reentrant=False"
                )
            optimizer.train()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_saving(self, model: nn.Module, *_: Any) -> None:
        """A checkpoint holds the mean."""
        optimizer = self._serves(model)
        if optimizer is not None:
            optimizer.draws.pause()


def attach(optimizer: Drawing, model: nn.Module) -> Attached:
    """The hooks, in place.

    Raises:
        TypeError: It is not a module.
        ValueError: None of its parameters belongs to the optimizer, or it is attached already.
    """
    name = type(optimizer).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}.attach: expected a torch.nn.Module, got {model!r}")
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    if any(isinstance(hook, Attached) and hook._serves(model) is optimizer for hook in hooks):
        raise ValueError(f"{name}.attach: the model is attached already; remove() what the first attach() returned")
    own: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
    if own.isdisjoint(model.parameters()):
        raise ValueError(f"{name}.attach: it trains no parameter of this {type(model).__name__}; attach the model that it trains")
    attached = Attached(optimizer, model)
    attached.hook(model)
    return attached
