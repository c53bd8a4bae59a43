"""The state of a model and its optimizer as tensors by name, and back; of weights that are shared out, whole."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def states(model: nn.Module, optimizer: Optimizer, frozen: bool = True) -> dict[str, Tensor]:
    """Of the model and the optimizer, by name, without weights that do not learn unless ``frozen``.

    Of shared-out weights all processes must ask at once.
    """
    still = set() if frozen else {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept = {
        f"optimizer.{i}.{name}": whole(t) for i, state in optimizer.state_dict()["state"].items() for name, t in _unfolded(state)
    }
    return {f"model.{name}": whole(t) for name, t in model.state_dict().items() if name not in still} | kept


def load_states(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`states` found; other names are left alone, and weights that do not learn may be missing.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: If it is of another model or optimizer.
    """
    weights, found = {}, dict[int, dict[str, Any]]()
    own, params = model.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        room, _, name = key.partition(".")
        if room == "model":
            weights[name] = _like(own.get(name), tensor)
        elif room == "optimizer":
            number, _, name = name.partition(".")
            state = found.setdefault(int(number), {})
            name, _, place = name.partition(".")
            if place:  # the lists of a state come in their order
                state.setdefault(name, []).append(tensor if tensor.numel() else None)
            else:
                state[name] = _like(params[int(number)], tensor)
    still = {name: p for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    model.load_state_dict({**still, **weights})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found})


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out over processes as all of it; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(own: Tensor | None, tensor: Tensor) -> Tensor:
    """Shared out as our own is, if that is."""
    if not isinstance(own, DTensor) or own.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


def _unfolded(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state by name; of a list by numbers, with nothing for None."""
    for name, value in state.items():
        if isinstance(value, list):
            for i, each in enumerate(value):
                yield f"{name}.{i:03}", torch.zeros(0) if each is None else each
        elif value is not None:
            yield name, value
