"""Tensors that lie on several processes, rows on each (``DTensor``, as FSDP2 makes them): what lies here, and where it begins.

A plain tensor lies here as a whole, so nothing that asks need know which of the two it has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_shared_out(tensor: Tensor) -> bool:
    """Whether a tensor lies on several processes. Asking imports nothing: without the module there are none."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Tensor) -> Tensor:
    """What lies on this process, in the same memory."""
    if not is_shared_out(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every process must ask."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def beginning(tensor: Tensor) -> int:
    """The number, in the whole tensor, of the first element that lies here.

    Raises:
        ValueError: It is cut otherwise than along its first dimension.
    """
    if not is_shared_out(tensor):
        return 0
    cut: Any = tensor
    shards = [(i, p) for i, p in enumerate(cut.placements) if not p.is_replicate()]
    if not shards:
        return 0
    number, placement = shards[0]
    if len(shards) > 1 or type(placement).__name__ != "Shard" or placement.dim != 0:
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as {tuple(cut.placements)}; supported are Replicate and one "
            "Shard(0), as FSDP2's fully_shard places them"
        )
    rows, parts = tensor.shape[0], cut.device_mesh.size(number)
    first = min(cut.device_mesh.get_coordinate()[number] * -(-rows // parts), rows)
    return int(first * (tensor.numel() // max(rows, 1)))


def shared_out(local: Tensor, like: Tensor) -> Tensor:
    """A local tensor as this process's part of one that is cut like another; itself where that is plain. Shares its memory."""
    if not is_shared_out(like):
        return local
    model: Any = like
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        local, model.device_mesh, model.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def take_over(target: Tensor, source: Tensor) -> Tensor:
    """Copy a tensor of the same whole shape into another, here.

    Raises:
        ValueError: They are cut into other parts.
    """
    into, given = here(target), here(source)
    if is_shared_out(target) and not is_shared_out(source):
        given = source.reshape(-1)[beginning(target) : beginning(target) + into.numel()].view(into.shape)
    elif is_shared_out(source) and not is_shared_out(target):
        given = whole(source)
    if given.shape != into.shape:
        raise ValueError(
            f"a state was saved in parts of {tuple(given.shape)}, and here lie {tuple(into.shape)}: for another number of "
            "processes save and load it with torch.distributed.checkpoint"
        )
    into.copy_(given)
    return target


def gather_anew(tensors: Sequence[Tensor]) -> None:
    """Have FSDP2's modules gather these parameters again before they compute: what they hold ready was written since."""
    for module in _gathering(tensors):
        module.reshard()


def gathered_around(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether a module of FSDP2's around this one gathers some of these, and so before this one runs."""
    inside = set(module.modules())
    return any(each not in inside and module in each.modules() for each in _gathering(tensors))


def computed_in(tensors: Sequence[Tensor]) -> dict[int, torch.dtype]:
    """By id, the dtype that FSDP2 gathers parameters in where it is another (``MixedPrecisionPolicy``)."""
    found: dict[int, torch.dtype] = {}
    for module in _gathering(tensors):
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if policy is not None and policy.param_dtype is not None:
            found |= {id(p): policy.param_dtype for p in _own(module)}
    return found


def _gathering(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The modules of FSDP2's ``fully_shard`` that gather some of these tensors."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    wanted = set(map(id, tensors))
    for module in list(states):
        if isinstance(module, kind) and any(id(p) in wanted for p in _own(module)):
            yield module


def _own(module: Any) -> Iterator[Tensor]:
    """The parameters that a module of FSDP2's gathers, as optimizers know them: those that it holds may be others by now."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        for each in () if group is None else group.fsdp_params:
            yield each.sharded_param


def replicas(tensor: Tensor, like: Tensor) -> int:
    """On how many processes of the mesh of ``like`` lies what lies here of a tensor."""
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    if not is_shared_out(tensor):
        return int(mesh.size())
    cut: Any = tensor
    parts = 1
    for i, placement in enumerate(cut.placements):
        parts *= 1 if placement.is_replicate() else cut.device_mesh.size(i)
    return int(mesh.size()) // parts
