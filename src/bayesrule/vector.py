"""Tensors that add, scale and divide as one vector, and the buckets that lay many tensors out flat.

The algebra of the rule is written once, for anything with ``+ - * /``: a plain tensor, or a :class:`Vector` of several.
At scale the tensors of a model are worked through bucket by bucket: a :class:`Bucket` copies stretches of many tensors into
one flat tensor and back, so that a step costs few calls and its temporaries never exceed the bucket.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BUCKET = 1 << 16
"""Elements of a bucket; even, so that no pair of noise is cut. Its temporaries stay in a core's cache."""


class Vector:
    """A tuple of parts (tensors, or numbers that broadcast) with the arithmetic of one vector.

    Args:
        parts: The tensors, in a fixed order; shapes are free and need not agree.

    Example:
        >>> v = Vector([torch.ones(2), torch.tensor(3.0)])
        >>> (2 * v - v).dot(v).item()
        11.0
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Any:
        return self.parts[index]

    def __repr__(self) -> str:
        return f"Vector({', '.join(map(repr, self.parts))})"

    def map(self, function: Callable[..., Any], *others: Any) -> Vector:
        """Apply ``function`` part by part; an argument that is no Vector goes to every part."""
        columns = [other.parts if isinstance(other, Vector) else (other,) * len(self.parts) for other in others]
        if any(len(column) != len(self.parts) for column in columns):
            raise ValueError(f"vectors of {len(self.parts)} and {[len(c) for c in columns]} parts do not combine")
        return Vector([function(*arguments) for arguments in zip(self.parts, *columns, strict=True)])

    def __add__(self, other: Any) -> Vector:
        return self.map(operator.add, other)

    def __sub__(self, other: Any) -> Vector:
        return self.map(operator.sub, other)

    def __mul__(self, other: Any) -> Vector:
        return self.map(operator.mul, other)

    def __truediv__(self, other: Any) -> Vector:
        return self.map(operator.truediv, other)

    def __pow__(self, exponent: float) -> Vector:
        return self.map(operator.pow, exponent)

    def __radd__(self, other: Any) -> Vector:
        return self.map(lambda part, o: o + part, other)

    def __rsub__(self, other: Any) -> Vector:
        return self.map(lambda part, o: o - part, other)

    def __rmul__(self, other: Any) -> Vector:
        return self.map(lambda part, o: o * part, other)

    def __rtruediv__(self, other: Any) -> Vector:
        return self.map(lambda part, o: o / part, other)

    def __neg__(self) -> Vector:
        return self.map(operator.neg)

    def sqrt(self) -> Vector:
        return self.map(torch.sqrt)

    def log(self) -> Vector:
        return self.map(torch.log)

    def clamp(self, low: float, high: float) -> Vector:
        return self.map(lambda part: part.clamp(low, high))

    def sum(self) -> Tensor:
        """Sum over all elements, shape ()."""
        total: Tensor = sum(part.sum() for part in self.parts)  # type: ignore[assignment]
        return total

    def dot(self, other: Vector) -> Tensor:
        """Inner product over all elements, shape ()."""
        return (self * other).sum()

    def numel(self) -> int:
        return sum(part.numel() for part in self.parts)


class Stretch(NamedTuple):
    """Elements ``start .. start + count`` of tensor number ``tensor``, in row-major order, lying at ``at`` in a bucket."""

    tensor: int
    start: int
    count: int
    at: int


class Bucket:
    """A layout: stretches of several tensors behind one another in one flat tensor.

    Every stretch begins at an even place (an odd one is followed by one idle element), so that the noise of
    :mod:`bayesrule.noise`, which is made in pairs, is the same however tensors are dealt into buckets.

    Args:
        members: Which tensors of the list that was dealt have a stretch here.
        stretches: What lies where; ``tensor`` counts within the members.
    """

    def __init__(self, members: Sequence[int], stretches: Sequence[Stretch]) -> None:
        self.members = tuple(members)
        self.stretches = tuple(stretches)
        last = self.stretches[-1]
        self.size = last.at + last.count + last.count % 2

    def gather(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Copy the members' stretches into one new flat tensor, shape (size,); idle elements are zero."""
        pieces = []
        for stretch in self.stretches:
            pieces.append(_flat(tensors[stretch.tensor], stretch).to(dtype))
            if stretch.count % 2:
                pieces.append(pieces[-1].new_zeros(1))
        return torch.cat(pieces)

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a flat tensor back, in place: storage, memory format and tied views of the tensors stay as they are."""
        for stretch in self.stretches:
            tensor, piece = tensors[stretch.tensor], flat[stretch.at : stretch.at + stretch.count]
            if stretch.count == tensor.numel():
                tensor.copy_(piece.view(tensor.shape))
            else:
                _flat(tensor, stretch).copy_(piece)


def _flat(tensor: Tensor, stretch: Stretch) -> Tensor:
    return tensor.reshape(-1)[stretch.start : stretch.start + stretch.count]


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET) -> list[Bucket]:
    """Deal tensors into buckets of at most ``limit`` elements; contiguous ones may be cut, others stay whole."""
    made: list[Bucket] = []
    members: list[int] = []
    stretches: list[Stretch] = []
    at = 0
    for index, tensor in enumerate(tensors):
        whole, start = tensor.numel(), 0
        while start < whole:
            count = min(limit, whole - start) if tensor.is_contiguous() else whole
            if at and at + count > limit:
                made.append(Bucket(members, stretches))
                members, stretches, at = [], [], 0
            members.append(index)
            stretches.append(Stretch(len(members) - 1, start, count, at))
            at += count + count % 2
            start += count
    return [*made, Bucket(members, stretches)] if stretches else made
