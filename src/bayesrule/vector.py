"""Tensors that add, scale and divide as one vector, and the buckets that lay many tensors out flat.

The algebra of the rule is written once, for anything with ``+ - * /``: a plain tensor, or a :class:`Vector` of several.
At scale the tensors of a model are worked through bucket by bucket: a :class:`Bucket` copies stretches of many tensors into
one flat tensor and back, so that a step costs few calls and its temporaries never exceed the bucket.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUCKET = 1 << 17
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
        total: Tensor = sum(part.sum() for part in self.parts)
        return total

    def dot(self, other: Vector) -> Tensor:
        """Inner product over all elements, shape ()."""
        return (self * other).sum()

    def numel(self) -> int:
        return sum(part.numel() for part in self.parts)


def axpy(a: Any, b: Any, scale: Any) -> Any:
    """The sum a + scale b in one pass over memory."""
    if isinstance(a, Vector):
        return a.map(axpy, b, scale)
    return a.add(b, alpha=scale) if isinstance(a, Tensor) and isinstance(scale, int | float) else a + b * scale


def lerp(a: Any, b: Any, weight: Any) -> Any:
    """The point a + weight (b - a) between two vectors in one pass over memory."""
    if isinstance(a, Vector):
        return a.map(lerp, b, weight)
    return a.lerp(b, weight) if isinstance(a, Tensor) else a + (b - a) * weight


@dataclass(frozen=True)
class Stretch:
    """Elements ``start .. start + count`` of tensor number ``tensor``, row by row, lying at ``at`` in a bucket."""

    tensor: int
    start: int
    count: int
    at: int


class Bucket:
    """A layout: several whole tensors behind one another in one flat tensor, or one piece of a large tensor.

    Every stretch begins at an even place (one idle element goes before it where need be), so that the noise of
    :mod:`bayesrule.noise`, which is made in pairs, is the same however tensors are dealt into buckets.

    Args:
        members: Which tensors of the list that was dealt have a stretch here.
        stretches: What lies where; ``tensor`` counts within the members.
    """

    def __init__(self, members: Sequence[int], stretches: Sequence[Stretch]) -> None:
        self.members = tuple(members)
        self.stretches = tuple(stretches)
        ends = [following.at for following in self.stretches[1:]]
        self.size = self.stretches[-1].at + self.stretches[-1].count
        self._idle = [s.at + s.count < end for s, end in zip(self.stretches, [*ends, self.size], strict=True)]
        self._sizes = [
            n for s, idle in zip(self.stretches, self._idle, strict=True) for n in ((s.count, 1) if idle else (s.count,))
        ]

    def gather(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The members' stretches as one flat tensor, shape (size,), idle elements zero: for reading, it may be a view."""
        pieces = []
        for stretch, idle in zip(self.stretches, self._idle, strict=True):
            pieces.append(_piece(tensors[stretch.tensor], stretch))
            if idle:
                pieces.append(pieces[-1].new_zeros(1))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(dtype)

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor], only: Container[int] | None = None) -> None:
        """Copy a flat tensor back, in place: storage, memory format and tied views of the tensors stay as they are.

        Args:
            flat: Shape (size,).
            tensors: One for each member.
            only: The members to be written; None is all of them.
        """
        for number, (tensor, stretch, piece) in enumerate(zip(tensors, self.stretches, self.split(flat), strict=True)):
            if only is None or number in only:
                if stretch.count == tensor.numel():
                    tensor.copy_(piece.view(tensor.shape))
                else:
                    _piece(tensor, stretch).copy_(piece)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one for each stretch, shape (count,)."""
        pieces = iter(flat.split(self._sizes))
        views = []
        for idle in self._idle:
            views.append(next(pieces))
            if idle:
                next(pieces)
        return views


def _piece(tensor: Tensor, stretch: Stretch) -> Tensor:
    """The stretch of a tensor, flat: a view where the tensor is contiguous."""
    flat = tensor.reshape(-1)
    return flat if stretch.count == tensor.numel() else flat[stretch.start : stretch.start + stretch.count]


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET) -> list[Bucket]:
    """Deal tensors into buckets of at most ``limit`` elements.

    Small ones share a bucket. A larger one is cut and shares with nobody; if it is not contiguous, it stays whole.

    Raises:
        ValueError: The limit is odd or not positive.
    """
    if limit < 2 or limit % 2:
        raise ValueError(f"the limit of a bucket must be an even number >= 2, got {limit}")
    made: list[Bucket] = []
    members: list[int] = []
    stretches: list[Stretch] = []
    at = 0
    for index, tensor in enumerate(tensors):
        count = tensor.numel()
        if count > limit:
            length = limit if tensor.is_contiguous() else count
            made += [Bucket([index], [Stretch(0, i, min(length, count - i), 0)]) for i in range(0, count, length)]
        elif count:
            if stretches and at + count > limit:
                made.append(Bucket(members, stretches))
                members, stretches, at = [], [], 0
            members.append(index)
            stretches.append(Stretch(len(stretches), 0, count, at))
            at += count + count % 2
    return [*made, Bucket(members, stretches)] if stretches else made
