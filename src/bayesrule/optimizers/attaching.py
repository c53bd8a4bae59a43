"""Draws that open by themselves, in front of a model's training forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..estimators.per_example import Squares
from ..shards import gathered_around, is_shared_out
from .draws import Draws
from .reminders import Reminders


class Drawing(Protocol):
    """What is asked of an optimizer."""

    param_groups: list[dict[str, Any]]
    draws: Draws
    reminders: Reminders

    def train(self) -> None: ...


ATTACHED: weakref.WeakKeyDictionary[Drawing, weakref.WeakSet[Attached]] = weakref.WeakKeyDictionary()
"""By optimizer."""


class SavesMean:
    """The hooks of one model for one optimizer by which whatever is saved of the model is at the mean.

    A copy of the model, pickled or deep, has hooks that do nothing. Neither model nor optimizer is kept alive by them.
    """

    def __init__(self, optimizer: Drawing | None = None, model: nn.Module | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._root = None if model is None else weakref.ref(model)
        self._models = weakref.WeakSet[nn.Module]([] if model is None else model.modules())
        self._handles: list[Any] = [] if model is None else list(self.hooks(model))
        if optimizer is not None:
            weakref.finalize(optimizer, _remove, self._handles).atexit = False

    def __reduce__(self) -> tuple[type[SavesMean], tuple[()]]:
        return SavesMean, ()

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        """Put the hooks in place; their handles."""
        for each in model.modules():  # whichever of them is saved or loaded
            yield each.register_state_dict_pre_hook(self.before_saving)
            yield each.register_load_state_dict_pre_hook(self.before_loading)

    def remove(self) -> None:
        """Take the hooks away; the mean returns."""
        optimizer = self._optimizer() if self._optimizer else None
        if optimizer is not None and self._handles:
            optimizer.draws.pause()
        _remove(self._handles)

    @property
    def is_in_place(self) -> bool:
        """Whether it was not removed."""
        return bool(self._handles)

    def serves(self, model: nn.Module) -> Drawing | None:
        """The optimizer, where the model is attached and no copy."""
        return self._optimizer() if self._optimizer is not None and model in self._models else None

    def is_root(self, model: nn.Module) -> bool:
        """Whether it is the model itself, and no part of it."""
        return self._root is not None and self._root() is model

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_saving(self, model: nn.Module, *_: Any) -> None:
        """A checkpoint holds the mean."""
        optimizer = self.serves(model)
        if optimizer is not None:
            optimizer.draws.pause()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_loading(self, model: nn.Module, *_: Any) -> None:
        """What is loaded stays: it takes the place of the mean, and an open draw is lost."""
        optimizer = self.serves(model)
        if optimizer is not None and optimizer.draws.is_automatic:
            optimizer.draws.discard()


class Attached(SavesMean):
    """Beside these, the hooks that open the draw of a step in front of a training forward, and close it for any other."""

    squares: Squares | None = None  # where the layers of the model tell an optimizer the squares of examples
    _looked_around = False
    _running = False  # whether the model itself is in a training forward: what it calls is part of that, in whatever mode

    def __reduce__(self) -> tuple[type[SavesMean], tuple[()]]:
        return Attached, ()

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        for each in _called(model):
            yield each.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True)
        yield model.register_forward_hook(self.after_forward, always_call=True)
        yield from super().hooks(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Open the draw of the step for training, and close it for a while for anything else."""
        optimizer = self.serves(model)
        if optimizer is None or torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func has weights of its own
            return
        root = self._root() if self._root is not None else None
        if model is root:
            self._running = model.training
        elif self._running and root is not None and root.training:  # an interrupted forward does not say that it is over
            return
        if not model.training:
            optimizer.draws.pause()
            optimizer.reminders.trained_in_eval_mode = torch.is_grad_enabled()
        elif not torch.is_grad_enabled():
            if optimizer.draws.is_automatic:
                optimizer.reminders.of_mode()
        elif optimizer.draws.is_open or optimizer.draws.rivals():
            return
        elif optimizer.draws.goes_on or not optimizer.draws.looks.begun:  # else the step has its contexts
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    f"{type(optimizer).__name__}: a model computed again in backward() (reentrant checkpointing) wants a draw, "
                    "which must be open before its first forward: call opt.train() there, or pass use_reentrant=False"
                )
            self._warn_of_others(optimizer)
            self.open(optimizer, model, args, kwargs)

    def open(self, optimizer: Drawing, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a draw in front of a forward, which belongs to it."""
        optimizer.train()
        for each in ATTACHED.get(optimizer, ()):
            if each.squares is not None:
                each.squares.entered(model, args, kwargs)

    def _warn_of_others(self, optimizer: Drawing) -> None:
        """Once: parameters outside of all attached models see a draw only if their forward comes later."""
        if not self._looked_around:
            self._looked_around = True
            inside = {p for each in ATTACHED.get(optimizer, ()) for model in each._models for p in model.parameters(recurse=False)}
            params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            optimizer.reminders.of_others(sum(p not in inside for p in params), len(params))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, model: nn.Module, *_: Any) -> None:
        """The forward is over, whatever ended it."""
        if self.is_root(model):
            self._running = False


def _called(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it wraps if it is a wrapper; not what is compiled in a wrapper."""
    while True:
        yield model
        inner = list(model.children())
        if type(model).__name__ == "OptimizedModule" or len(inner) != 1 or model._parameters:
            return
        (model,) = inner


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def attach(optimizer: Drawing, model: nn.Module) -> Attached:
    """The hooks, in place.

    Raises:
        TypeError: It is not a module.
        ValueError: None of its parameters belongs to the optimizer, or it is attached already.
    """
    name = type(optimizer).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}.attach: expected a torch.nn.Module, got {model!r}")
    own: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
    for hook in (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()):
        other = hook.serves(model) if isinstance(hook, Attached) and hook.is_root(model) else None
        if other is optimizer:
            raise ValueError(f"{name}.attach: the model is attached already; remove() what the first attach() returned")
        if other is not None and not own.isdisjoint(p for group in other.param_groups for p in group["params"]):
            raise ValueError(
                f"{name}.attach: another optimizer of these parameters is attached to this model; remove() what its attach() gave"
            )
    if own.isdisjoint(model.parameters()):
        late = "; if it was sharded after the optimizer was made, make the optimizer after it"
        raise ValueError(
            f"{name}.attach: it trains no parameter of this {type(model).__name__}; attach the model that it trains"
            + late * any(map(is_shared_out, model.parameters()))
        )
    if gathered_around(model, list(own)):
        raise ValueError(
            f"{name}.attach: this {type(model).__name__} lies within a model that FSDP2 has sharded and that gathers parameters "
            "before this part runs, so that they would be at the mean; attach the whole model"
        )
    attached = Attached(optimizer, model)
    ATTACHED.setdefault(optimizer, weakref.WeakSet()).add(attached)
    return attached
