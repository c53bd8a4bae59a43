"""Headers of safetensors files, read strictly: what lies where, without a byte of the tensors.

A file is eight bytes (the length of the header, little-endian), the header (a JSON object: name -> dtype, shape and the two ends of
its bytes), and the bytes of the tensors, one behind the other.

Source: the format as https://github.com/huggingface/safetensors describes it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST = 100_000_000
"""Bytes of a header, at most: the bound of the safetensors library."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
"""By name in a header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Room:
    """Memory for one block of one tensor, used again for the next."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fill(self, file: Path, offset: int, count: int) -> Tensor:
        """So many bytes of a file from an offset on, shape (count,), until the next call. No page of the file is mapped."""
        if len(self._bytes) < count:
            self._bytes = torch.empty(count, dtype=torch.uint8)
        block = self._bytes[:count]
        free = memoryview(block.numpy())  # type: ignore[arg-type]
        with file.open("rb", buffering=0) as source:
            source.seek(offset)
            while free and (got := source.readinto(free)):
                free = free[got:]
        if free:
            raise ValueError(f"{str(file)!r} became shorter while it was read; start again")
        return block


class Stored(ABC):
    """A tensor that is read block by block, whatever lies behind it.

    Attributes:
        dtype: As it is stored.
        shape: Of the whole.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, start: int, stop: int, room: Room) -> Tensor:
        """The elements from ``start`` to before ``stop`` in the order of memory, shape (stop - start,); good until the next."""


@dataclass(frozen=True)
class Entry(Stored):
    """A tensor in a file.

    Args:
        file: Where it is.
        dtype: As it is stored.
        shape: Of the whole.
        offset: Of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int, room: Room) -> Tensor:
        size = self.dtype.itemsize
        return room.fill(self.file, self.offset + size * start, size * (stop - start)).view(self.dtype)


@dataclass(frozen=True)
class Constant(Stored):
    """A tensor of one number.

    Args:
        shape: Of the whole.
        number: The number.
    """

    shape: tuple[int, ...]
    number: float
    dtype: torch.dtype = torch.float32

    def read(self, start: int, stop: int, room: Room) -> Tensor:
        return torch.full((stop - start,), self.number, dtype=self.dtype)


@dataclass(frozen=True)
class Scaled(Stored):
    """A tensor times a number.

    Args:
        of: The tensor.
        factor: The number.
    """

    of: Stored
    factor: float

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    def read(self, start: int, stop: int, room: Room) -> Tensor:
        return self.of.read(start, stop, room) * self.factor


@dataclass(frozen=True)
class Average(Stored):
    """The mean of tensors of one shape.

    Args:
        of: The tensors.
    """

    of: tuple[Stored, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of[0].shape

    def read(self, start: int, stop: int, room: Room) -> Tensor:
        return torch.stack([each.read(start, stop, Room()) for each in self.of]).mean(0)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, no safetensors file, or holds what cannot be read here; the message says what.
    """
    with file.open("rb") as source:
        size = source.seek(0, 2)
        source.seek(0)
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST):
            raise _damaged(file, f"its header would have {length:,} bytes, and the file has {size:,}")
        text = source.read(length)
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is no JSON") from None
    if not isinstance(found, dict):
        raise _damaged(file, "its header is no JSON object")
    if twice:
        raise _damaged(file, f"its header names {twice[0]!r} twice")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its metadata are not words by name")
    places = {name: _place(file, name, about) for name, about in found.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise _damaged(
                file, f"{name!r} begins at byte {begin:,}, where {'a gap ends' if begin > end else 'another tensor lies'}"
            )
        end = stop
    if end != size - 8 - length:
        raise _damaged(file, f"its tensors take {end:,} bytes, and it holds {size - 8 - length:,}")
    return {name: Entry(file, dtype, shape, 8 + length + begin) for name, (dtype, shape, begin, _) in places.items()}, metadata


def _place(file: Path, name: str, about: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and the two ends of the bytes."""
    try:
        kind, shape, (begin, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        whole = isinstance(kind, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise _damaged(file, f"{name!r} has no dtype, shape and data_offsets as they should be")
    if kind not in DTYPES:
        raise ValueError(
            f"{str(file)!r} holds {name!r} in the dtype {kind!r}, which is none of {', '.join(DTYPES)}; convert it first"
        )
    if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise _damaged(file, f"{name!r} of shape {list(shape)} in {kind} has {end - begin:,} bytes")
    return DTYPES[kind], shape, begin, end


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{str(file)!r} is damaged or no safetensors file: {why[:300]}; take another copy")
