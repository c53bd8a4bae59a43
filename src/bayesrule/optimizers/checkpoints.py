"""The state of an optimizer, held against it and taken over exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..shards import is_shared_out, take_over
from .cells import Names
from .hyperparameters import validate


class Loading(Protocol):
    """What is asked of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def names(self) -> Names: ...
    @property
    def ranges(self) -> Mapping[str, Any]: ...
    def like_state(self, param: Tensor) -> Tensor: ...
    def lists(self, param: Tensor, name: str) -> list[tuple[int, ...]]: ...


def check(optimizer: Loading, saved: Mapping[str, Any]) -> None:
    """Refuse what was saved by another optimizer or for another model.

    Raises:
        ValueError: It does not fit, or a hyper-parameter in it is outside its range.
    """
    name, names = type(optimizer).__name__, optimizer.names
    if is_of_ivon_opt(saved):
        raise ValueError(
            f"{name}: this state was saved by the package ivon-opt; load it with bayesrule.integrations.ivon_opt.load_ivon_opt, "
            "which wants the number of steps, too"
        )
    for number, (mine, theirs) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=False)):
        names_of = mine.get("param_names", ()), theirs.get("param_names", ())
        if names_of[0] != names_of[1] and sorted(names_of[0]) == sorted(names_of[1]):  # else a wrapper may have renamed them
            here, there = next((a, b) for a, b in zip(*names_of, strict=True) if a != b)
            raise ValueError(
                f"{name}: in group {number} {there!r} was saved where {here!r} stands; give the parameters in the order in which "
                "they were"
            )
    for index, param, state in _pairs(optimizer, saved):
        if state and "prior_mean" in optimizer.state.get(param, {}) and "prior_mean" not in state:
            raise ValueError(
                f"{name}: the state was saved without a posterior as the prior, and this optimizer has one; make it without prior="
            )
        for key, value in state.items():
            if isinstance(value, list):
                _check_list(name, index, key, value, optimizer.lists(param, key))
                continue
            shape = tuple(torch.as_tensor(value).shape)
            if key != "step" and shape != param.shape:
                why = "it was saved for another model"
                if is_shared_out(param):
                    why += " or in parts: save and load sharded parameters with torch.distributed.checkpoint"
                raise ValueError(f"{name}: {key} of parameter {index} has shape {shape}, the parameter {tuple(param.shape)}: {why}")
    for index, state in saved["state"].items():
        if set(state) <= {"prior_mean", "prior_precision"}:  # not trained yet
            continue
        if "step" not in state or (names.hess is not None and names.hess not in state):
            raise ValueError(
                f"{name}: the state of parameter {index} holds {sorted(state)}, not step and {names.hess}: it was saved by another "
                "optimizer"
            )
    for number, group in enumerate(saved["param_groups"]):
        validate(name, number, group, optimizer.ranges)


def is_of_ivon_opt(saved: Mapping[str, Any]) -> bool:
    """Whether a state comes from the published package: flat tensors and two betas in its groups."""
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    flat = ("momentum", "hess", "beta1", "beta2")
    return bool(groups) and isinstance(groups, list | tuple) and all(isinstance(g, Mapping) and set(flat) <= set(g) for g in groups)


def restore(optimizer: Loading, saved: Mapping[str, Any]) -> None:
    """Take the tensors of a state over as they are: torch has cast them to the dtype of the parameters."""
    for _, param, state in _pairs(optimizer, saved):
        for key, value in state.items():
            optimizer.state[param][key] = _taken(optimizer, key, param, value)
        if param.dtype.itemsize >= 4:  # it holds its mean itself
            optimizer.state[param].pop(optimizer.names.mean, None)


def _check_list(name: str, index: int, key: str, tensors: list[Any], shapes: list[tuple[int, ...]]) -> None:
    found = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
    if len(found) != len(shapes) or any(shape not in (None, known) for shape, known in zip(found, shapes, strict=True)):
        raise ValueError(
            f"{name}: {key} of parameter {index} has shapes {found}, here they are {shapes}: it was saved for another model or "
            "another setting"
        )


def _taken(optimizer: Loading, key: str, param: Tensor, value: Any) -> Any:
    if isinstance(value, list):
        return [None if axis is None else axis.detach().to(param.device, copy=True) for axis in value]
    value = torch.as_tensor(value).detach()
    if key == "step":
        return value.clone()
    if key == optimizer.names.memory and value.dtype.itemsize < 4:
        return take_over(torch.empty_like(param, dtype=value.dtype), value)
    return take_over(optimizer.like_state(param), value)


def _pairs(optimizer: Loading, saved: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, Mapping[str, Any]]]:
    """Every parameter, with the number and the state that were saved for it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for param, index in zip(params, indices, strict=False):
        yield index, param, saved["state"].get(index, {})
