"""What the contract of exponential families is written in: drawn numbers, coordinates of blocks, members in other dtypes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any, Self

import hypothesis.strategies as st
import torch
from torch import Tensor

import bayesrule as br

NOISE = br.CounterNoise(seed=8128)

Shape = tuple[int, ...]


# Drawn numbers, all in float64


class Drawn:
    """Numbers for members, from a source of lists of numbers in [0, 1]: hypothesis, or a seed."""

    def __init__(self, source: Callable[[int], list[float]]) -> None:
        self.source = source

    @classmethod
    def by(cls, data: st.DataObject) -> Self:
        return cls(lambda count: data.draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count)))

    @classmethod
    def seeded(cls, seed: int) -> Self:
        generator = torch.Generator().manual_seed(seed)
        return cls(lambda count: torch.rand(count, generator=generator).tolist())

    def reals(self, shape: Shape, low: float = -2.0, high: float = 2.0) -> Tensor:
        """Numbers between bounds."""
        drawn = torch.tensor(self.source(torch.Size(shape).numel()), dtype=torch.float64)
        return (low + (high - low) * drawn).view(shape)

    def positives(self, shape: Shape, low: float = 0.1, high: float = 10.0) -> Tensor:
        """Positive numbers, even in their logarithm."""
        return self.reals(shape, math.log(low), math.log(high)).exp()

    def matrices(self, shape: Shape, size: int) -> Tensor:
        """Positive definite matrices with a condition below some hundred."""
        lower = self.reals((*shape, size, size), -1, 1).tril(-1)
        factor = lower + torch.diag_embed(self.positives((*shape, size), 0.5, 2))
        return factor @ factor.mT


# Points: a tensor, or a Vector of blocks


def blocks(point: Any) -> list[Tensor]:
    return list(point) if isinstance(point, br.Vector) else [point]


def rebuilt(parts: Sequence[Tensor], like: Any) -> Any:
    return br.Vector(parts) if isinstance(like, br.Vector) else parts[0]


def basis(size: int) -> Tensor:
    """An orthonormal basis of the symmetric matrices, upper triangle row by row, shape (size (size + 1) / 2, size, size)."""
    units = torch.zeros(size * (size + 1) // 2, size, size, dtype=torch.float64)
    for unit, (i, j) in zip(units, torch.triu_indices(size, size).T.tolist(), strict=True):
        unit[i, j] = unit[j, i] = 1.0 if i == j else 0.5**0.5
    return units


def to_numbers(point: Any, dims: Sequence[int]) -> Tensor:
    """The independent numbers of blocks, shape (*batch, n)."""
    columns = []
    for block, d in zip(blocks(point), dims, strict=True):
        if d == 2:
            columns.append(torch.einsum("...ij,nij->...n", block, basis(block.shape[-1]).to(block)))
        else:
            columns.append(block if d else block[..., None])
    return torch.cat(columns, dim=-1)


def to_point(numbers: Tensor, like: Any, dims: Sequence[int]) -> Any:
    """The reverse of `to_numbers`."""
    parts, at = [], 0
    for block, d in zip(blocks(like), dims, strict=True):
        size = block.shape[-1] if d else 1
        count = size * (size + 1) // 2 if d == 2 else size
        part = numbers[..., at : at + count]
        parts.append(torch.einsum("...n,nij->...ij", part, basis(size).to(part)) if d == 2 else part if d else part[..., 0])
        at += count
    return rebuilt(parts, like)


# Members


def tensors(q: Any) -> dict[str, Tensor]:
    """The fields of a member that are tensors."""
    return {f.name: getattr(q, f.name) for f in fields(q) if isinstance(getattr(q, f.name), Tensor)}


def cast(q: Any, dtype: torch.dtype) -> Any:
    """The same member in another dtype."""
    return replace(q, **{name: value.to(dtype) for name, value in tensors(q).items()})


def picked(q: Any, index: Any) -> Any:
    """Some of a batch of members."""
    return replace(q, **{name: value[index] for name, value in tensors(q).items()})


def indices(shape: Shape) -> list[tuple[int, ...]]:
    return list(product(*map(range, shape)))


def entries(q: Any) -> list[Any]:
    """Every single member of a batch."""
    return [picked(q, index) for index in indices(q.batch_shape)]


def split(point: Any, q: Any) -> list[Any]:
    """A point of each problem of a batch, one by one."""
    return [rebuilt([part[index] for part in blocks(point)], point) for index in indices(q.batch_shape)]


# Comparisons


def close(actual: Any, expected: Any, tolerance: float, scale: float | Tensor = 1.0) -> None:
    """Equal up to a tolerance, relative to the size of the numbers and to a scale."""
    for a, b in zip(blocks(actual), blocks(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {tuple(a.shape)} is not {b.dtype} {tuple(b.shape)}"
        allowed, off = tolerance * (b.abs() + scale), (a - b).abs()
        if not (off <= allowed).all():
            worst = (off / allowed).nan_to_num(torch.inf).argmax()
            pair = a.flatten()[worst].item(), b.flatten()[worst].item()
            raise AssertionError(f"{pair[0]!r} is not {pair[1]!r}: off by {off.flatten()[worst]:.2g}, {int(worst)} of {a.numel()}")
        assert a.isfinite().all(), "not finite"


def size_of(point: Any) -> float:
    """The largest number of a point."""
    return max((part.abs().max().item() for part in blocks(point) if part.numel()), default=1.0)
