"""Adapters (LoRA) as changes of the weights that they were trained beside: W + scale B A.

The mean of some A times the mean of their B is not the mean of the products, and -B, -A say the same as B, A. So adapters of a full
model are merged as the weights that they make. Only where the base is an adapter itself, from whose A and B all others were
trained, are A and B weights like any others, with their own precisions.

Source: E. Hu et al. (2021), LoRA, arXiv:2106.09685; the files are those of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .folders import ADAPTER_CONFIG, Checkpoint, inside, read_json
from .headers import Entry, Room, Stored

LEADING = "base_model.model."
"""Of all names in the files of PEFT."""

PAIRS = {".lora_A.weight": (".lora_B.weight", False), ".lora_embedding_A": (".lora_embedding_B", True)}
"""How the names of A end: how that of B does, and whether the change is the transpose of B A."""

STEPS = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
"""What two adapters agree on whose A and B mean the same."""


@dataclass(frozen=True)
class Adapted(Stored):
    """A weight matrix with the change that an adapter makes, in float32 or wider.

    Args:
        base: The matrix, shape (O, I).
        a: Shape (R, I), or (R, O) if transposed.
        b: Shape (O, R), or (I, R) if transposed.
        scale: Of the change.
        transposed: Whether it is (B A)^T.
    """

    base: Entry
    a: Entry
    b: Entry
    scale: float
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    def read(self, start: int, stop: int, room: Room) -> Tensor:
        wide = torch.promote_types(self.base.dtype, torch.float32)
        a, b = (each.read(0, math.prod(each.shape), Room()).view(each.shape).to(wide) for each in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        columns = self.shape[1]
        first = start // columns
        change = (left[first : -(-stop // columns)] @ right).flatten()[start - first * columns : stop - first * columns]
        return self.base.read(start, stop, room).to(wide) + self.scale * change


def adapted(base: Checkpoint, adapter: Checkpoint) -> dict[str, Stored]:
    """The weights that an adapter makes of a full model, by the names that the adapted model has.

    Raises:
        ValueError: It is of another model, or of a kind that changes weights in another way.
    """
    config = _config(adapter)
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("alpha_pattern"):
        raise ValueError(f"{adapter} holds an adapter that is no plain LoRA; merge it into its model by PEFT's merge_and_unload()")
    own = {name.removeprefix(LEADING): entry for name, entry in adapter.tensors.items()}
    pairs = {name: end for name in own for end in PAIRS if name.endswith(end)}
    targets = {name: f"{name.removesuffix(end)}.weight" for name, end in pairs.items()}
    leading = _leading(targets.values(), base.tensors)
    found: dict[str, Stored] = {leading + name: entry for name, entry in base.tensors.items()}
    for name, end in pairs.items():
        weight, (other, is_transposed) = targets[name], PAIRS[end]
        matrix, b = found.get(weight), own.pop(name.removesuffix(end) + other, None)
        transposed = is_transposed or bool(config.get("fan_in_fan_out"))
        a = own.pop(name)
        if not isinstance(matrix, Entry) or b is None or not _fit(matrix, a, b, transposed):
            raise ValueError(
                f"{adapter} adapts {weight!r}, and {base} holds no matrix that fits; name the model that it was trained from"
            )
        rank = a.shape[0]
        scale = float(config.get("lora_alpha", rank)) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[weight] = Adapted(matrix, a, b, scale, transposed)
    if odd := sorted(name for name in own if "lora_" in name):
        raise ValueError(f"{adapter} holds {odd[0]!r}, which is no part of a plain LoRA; merge it by PEFT first")
    return found | own


def check_alike(base: Checkpoint, adapter: Checkpoint) -> None:
    """Refuse an adapter whose A and B do not mean what those of the base mean.

    Raises:
        ValueError: So it is; the message names the setting.
    """
    if not adapter.is_adapter:
        raise ValueError(f"{base} is an adapter and {adapter} is none; name a full model as base")
    ours, theirs = _config(base), _config(adapter)
    for name in STEPS:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {ours.get(name)!r} in {base} and {theirs.get(name)!r} in {adapter}, so that "
                "their A and B differ in meaning; name the full model as base"
            )


def _config(adapter: Checkpoint) -> dict[str, Any]:
    return read_json(inside(adapter.folder, ADAPTER_CONFIG))


def _leading(targets: Any, tensors: Mapping[str, Any]) -> str:
    """What adapted models put before the names of their encoder, where the base is an encoder alone."""
    target = next(iter(targets), "")
    first, _, rest = target.partition(".")
    return f"{first}." if target not in tensors and rest in tensors else ""


def _fit(matrix: Entry, a: Entry, b: Entry, transposed: bool) -> bool:
    left, right = (a.shape[::-1], b.shape[::-1]) if transposed else (b.shape, a.shape)
    return len(left) == len(right) == 2 and left[1] == right[0] and matrix.shape == (left[0], right[1])
