"""Linear maps between the blocks of natural and expectation parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..vector import Vector, leaves


def _rebuilt(tensors: Iterator[Tensor], like: Any) -> Any:
    return Vector([_rebuilt(tensors, part) for part in like]) if isinstance(like, Vector) else next(tensors)


def derivative(of: Callable[[Vector], Vector], at: Vector, v: Vector) -> Vector:
    """The derivative of a map between blocks, whose matrix is symmetric, times v: one backward pass."""

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return leaves(of(_rebuilt(iter(tensors), at)))

    back: Any = torch.func.vjp(flat, *leaves(at))[1]
    return _rebuilt(iter(back(leaves(v))), at)


def coordinates(blocks: Vector, dims: Sequence[int]) -> Tensor:
    """Blocks as vectors, shape (*batch, n): a symmetric matrix by its upper triangle, off the diagonal times root 2."""
    columns = []
    for block, d in zip(blocks, dims, strict=True):
        if d == 2:
            rows, cols, scale = _triangle(block)
            block = (block + block.mT)[..., rows, cols] / 2 * scale
        columns.append(block if d else block[..., None])
    return torch.cat(columns, dim=-1)


def blocks(columns: Tensor, like: Vector, dims: Sequence[int]) -> Vector:
    """The reverse of :func:`coordinates`."""
    made, at = [], 0
    for block, d in zip(like, dims, strict=True):
        if d == 2:
            rows, cols, scale = _triangle(block)
            part = columns[..., at : at + len(rows)] / scale
            index = torch.zeros(block.shape[-2:], dtype=torch.long, device=block.device)
            index[rows, cols] = index[cols, rows] = torch.arange(len(rows), device=block.device)
            made.append(part[..., index])
            at += len(rows)
        else:
            size = block.shape[-1] if d else 1
            part = columns[..., at : at + size]
            made.append(part if d else part[..., 0])
            at += size
    return Vector(made)


def _triangle(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = torch.triu_indices(block.shape[-1], block.shape[-1], device=block.device).unbind()
    return rows, cols, torch.where(rows == cols, 1.0, torch.tensor(2.0, dtype=block.dtype, device=block.device).sqrt())
