"""Numbers by which ranks find out, in few bytes, whether they hold the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shards import here

WIDTH = 512
"""Words in a row of a fingerprint."""


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """64 bits that differ where a bit differs, or the order.

    Word w of a tensor, times 2 w + 1, is summed modulo 2^64: sums of whole numbers do not depend on the order in which a device
    adds, and products with odd numbers lose no bit. As the highest bits only show whether their number is odd, the higher
    halves of the words are summed as well.
    """
    total = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        words = _words(here(tensor).detach())
        sums = _weighed(words) + 1_000_003 * _weighed(words >> 32)
        total = total.to(sums.device) * 1_000_003 + sums + number
    return int(total)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    pair = 8 // flat.element_size()
    if len(flat) % pair or flat.storage_offset() % pair:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % pair)).clone()
    return flat.view(torch.int64)


def _weighed(words: Tensor) -> Tensor:
    """The sum of each word times an odd number of its own, which is the number of its row plus that of its column."""
    if len(words) < 4 * WIDTH:
        return _sum(words, 1, 2)
    rows = len(words) // WIDTH
    block, rest = words[: rows * WIDTH].view(rows, WIDTH), words[rows * WIDTH :]
    return _sum(block.sum(0), 1, 2) + _sum(block.sum(1), 0, 2 * WIDTH) + _sum(rest, 2 * rows * WIDTH + 1, 2)


def _sum(words: Tensor, first: int, step: int) -> Tensor:
    """Their sum, times first, first + step, first + 2 step, ..."""
    return words.mul(torch.arange(first, first + step * len(words), step, device=words.device)).sum()


def digest(value: Any) -> int:
    """64 bits of anything that says by its repr what it is."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def marks(number: int) -> list[float]:
    """A number of 64 bits as numbers that float32 adds exactly over ranks, to tell whether it is the same on all.

    It is cut into digits of six bits, and their squares follow. Over R ranks (sum of h)^2 = R (sum of h^2) if and only if all h
    are equal (Cauchy and Schwarz); up to 4,227 ranks neither sum leaves the whole numbers of float32.
    """
    digits = [number >> shift & 63 for shift in range(0, 66, 6)]
    return [*map(float, digits), *(float(digit**2) for digit in digits)]


def are_equal(summed: Sequence[float], ranks: int) -> bool:
    """Whether all ranks had the same number, from the sums of its :func:`marks`."""
    half = len(summed) // 2
    return all(total**2 == ranks * squares for total, squares in zip(summed[:half], summed[half:], strict=True))


def odd_one(values: Sequence[Any]) -> tuple[int, int] | None:
    """The first rank whose value is not that of most, and one that has it; None where all agree. Ranks of None have no say."""
    said = [value for value in values if value is not None]
    most, times = Counter(said).most_common(1)[0]
    if times == len(said):
        return None
    return next(rank for rank, value in enumerate(values) if value not in (most, None)), values.index(most)
