"""Safetensors files that are written tensor by tensor, block by block, and never held."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .headers import NAMES


class Planned(NamedTuple):
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """One file whose header is written first, and then its tensors in the order of the plan.

    Args:
        file: Where to write. What a writer of the same plan left there is kept as far as ``done`` says.
        plan: The tensors in their order: those of larger elements first, so that each is aligned.
        metadata: Of the file.
        done: How many tensors are there already.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, file: Path, plan: Mapping[str, Planned], metadata: Mapping[str, str], done: int = 0) -> None:
        self.file, self.plan = file, plan
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        ends = []
        for name, planned in plan.items():
            header[name] = {"dtype": NAMES[planned.dtype], "shape": planned.shape, "data_offsets": (end, end + planned.size)}
            end += planned.size
            ends.append(end)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = len(text) + 8
        self._out = open(file, "r+b" if done else "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        if done:
            self._out.truncate(begin + ends[done - 1])
            self._out.seek(0, os.SEEK_END)
        else:
            self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def append(self, block: Tensor) -> None:
        """The next elements, shape (n,), in the dtype of their tensor."""
        self._write(memoryview(block.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def sync(self) -> None:
        """Have the disk hold what was written."""
        os.fsync(self._out.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def _write(self, waiting: memoryview) -> None:
        while waiting:
            waiting = waiting[self._out.write(waiting) :]


def shards(plan: Mapping[str, Planned], most: float) -> dict[str, dict[str, Planned]]:
    """The files of a plan, in order, each of at most so many bytes of tensors, or of one tensor.

    Example:
        >>> one = Planned(torch.float32, (2,))
        >>> {file: list(part) for file, part in shards({"a": one, "b": one, "c": one}, most=16).items()}
        {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    parts: list[dict[str, Planned]] = [{}]
    for name, planned in plan.items():
        if parts[-1] and sum(each.size for each in parts[-1].values()) + planned.size > most:
            parts.append({})
        parts[-1][name] = planned
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{k:05}-of-{len(parts):05}.safetensors": part for k, part in enumerate(parts, 1)}


def check_written(file: Path, plan: Mapping[str, Planned]) -> None:
    """Have the safetensors library read what was written.

    Raises:
        OSError: It does not hold what was planned: the disk has lost something.
    """
    try:
        with safe_open(file, framework="pt") as found:
            there = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise OSError(f"{file} was not written as it should be ({error}); the disk may be failing") from error
    if there != {name: planned.shape for name, planned in plan.items()}:
        raise OSError(f"{file} was not written as it should be; the disk may be failing")


def index_of(files: Mapping[str, Mapping[str, Planned]]) -> dict[str, Any]:
    """What the index of several files says."""
    total = sum(planned.size for part in files.values() for planned in part.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for file, part in files.items() for name in part}}


def ordered(plan: Mapping[str, Planned]) -> Sequence[str]:
    """The names of a plan as they are written: larger elements first, so that each tensor is aligned, then by name."""
    return sorted(plan, key=lambda name: (-plan[name].dtype.itemsize, name))
