"""Tensors that add, scale and divide as one vector, and the buckets that lay many tensors out flat.

The algebra of the rule is written once, for anything with ``+ - * /``: a plain tensor, or a :class:`Vector` of several.
At scale the tensors of a model are worked through bucket by bucket: a :class:`Bucket` says where stretches of many tensors lie
in one flat tensor, so that a step costs few calls and its temporaries never exceed the bucket.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

BLOCK = 256
"""Elements that belong together: noise is made block by block, so every stretch of a bucket begins at one."""

BUCKET = 1 << 17
"""Elements of a bucket, a multiple of the block. Its temporaries stay in a core's cache."""

ALONE = 1 << 16
"""From this many elements on a tensor shares a bucket with no other: a call costs less than copying it."""


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

    def rsqrt(self) -> Vector:
        return self.map(rsqrt)

    def abs(self) -> Vector:
        return self.map(abs)

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


def leaves(point: Any) -> tuple[Any, ...]:
    """The tensors of a point, part by part: of a Vector, or of Vectors in a Vector."""
    return tuple(leaf for part in point for leaf in leaves(part)) if isinstance(point, Vector) else (point,)


def equal(a: Any, b: Any) -> bool:
    """Whether two numbers are known to be equal; of a symbol or a tensor nothing is known."""
    return a is b or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; True inside vmap or a compiled graph, where nobody can ask. Waits for the device."""
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # what torch.func.vmap raises
        return True


class kept:
    """A property that is computed once, unless somebody differentiates or maps: what is made inside of torch.func belongs there.

    Nor is it kept without gradients where its owner has some, for then they would be lost to later uses.
    """

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        value = self.compute(owner)
        lost = not torch.is_grad_enabled() and any(getattr(part, "requires_grad", False) is True for part in vars(owner).values())
        if not lost and torch._C._functorch.peek_interpreter_stack() is None:
            vars(owner)[self.name] = value  # from now on found before this property
        return value


def axpy(a: Any, b: Any, scale: Any) -> Any:
    """The sum a + scale b in one pass over memory."""
    if isinstance(a, Vector):
        return a.map(axpy, b, scale)
    if has_torch_function((a, b, scale)):
        return handle_torch_function(axpy, (a, b, scale), a, b, scale)
    return a.add(b, alpha=scale) if isinstance(a, Tensor) and isinstance(scale, int | float) else a + b * scale


def lerp(a: Any, b: Any, weight: Any) -> Any:
    """The point a + weight (b - a) between two vectors in one pass over memory."""
    if isinstance(a, Vector):
        return a.map(lerp, b, weight)
    if has_torch_function((a, b, weight)):
        return handle_torch_function(lerp, (a, b, weight), a, b, weight)
    return a.lerp(b, weight) if hasattr(a, "lerp") else a + (b - a) * weight


def rsqrt(x: Any) -> Any:
    """One over the square root, of a tensor, a vector or a number."""
    return x**-0.5 if isinstance(x, int | float) else x.rsqrt()


def logit(u: Any) -> Any:
    """log u - log(1 - u), for u in (0, 1)."""
    return u.log() - (1 - u).log()


def head(x: Any, like: Any) -> Any:
    """The first elements of a flat tensor, as many as another has."""
    if has_torch_function((x, like)):
        return handle_torch_function(head, (x, like), x, like)
    return x[: like.numel()]


def convert(x: Any, dtype: torch.dtype) -> Any:
    """A tensor in another dtype."""
    if has_torch_function((x,)):
        return handle_torch_function(convert, (x,), x, dtype)
    return x.to(dtype)


@dataclass(frozen=True)
class Stretch:
    """Elements ``start .. start + count`` of tensor number ``tensor``, row by row, lying at ``at`` in a bucket."""

    tensor: int
    start: int
    count: int
    at: int


class Bucket:
    """A layout: several whole tensors behind one another in one flat tensor, or one piece of a large tensor.

    Every tensor begins at a block, so the noise of :mod:`bayesrule.noise` is the same however tensors are dealt into buckets. One
    that is itself the rest of a larger tensor, cut within a block, begins as far behind a block as it did there. What lies
    between two stretches is idle.

    Args:
        members: Which tensors of the list that was dealt have a stretch here.
        stretches: What lies where; ``tensor`` counts within the members.
        alone: Whether this is a piece of a large tensor, without anything idle.
    """

    def __init__(self, members: Sequence[int], stretches: Sequence[Stretch], alone: bool = False) -> None:
        self.members = tuple(members)
        self.stretches = tuple(stretches)
        last = self.stretches[-1]
        end = last.at + last.count
        self.size = end if alone else max(2 * BLOCK, whole_blocks(end))

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """A flat tensor, shape (size,), cut into stretches; one that is a whole tensor has the shape of that in ``like``."""
        views = []
        for s in self.stretches:
            view, shape = flat[s.at : s.at + s.count], like[s.tensor].shape
            views.append(view.view(shape) if s.count == shape.numel() else view)
        return views

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The stretches of tensors, shaped like :meth:`views`."""
        if self.stretches[0].count == tensors[0].numel():
            return list(tensors)
        return [self.piece(tensors[0], 0)]

    def piece(self, tensor: Tensor, member: int) -> Tensor:
        """The stretch of one tensor."""
        s = self.stretches[member]
        return tensor if s.count == tensor.numel() else tensor.reshape(-1)[s.start : s.start + s.count]

    def within(self, tensor: Tensor) -> Tensor | None:
        """The one stretch of a tensor as a flat view, where it is all of the bucket and lies in one run of memory."""
        s = self.stretches[0]
        return tensor.view(-1)[s.start : s.start + s.count] if s.count == self.size and tensor.is_contiguous() else None


def whole_blocks(count: int) -> int:
    """A number of elements, rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET, leads: Sequence[int] | None = None) -> list[Bucket]:
    """Deal tensors into buckets of at most ``limit`` elements.

    Small ones share buckets. A large one is alone, and cut where it is larger than the limit; if it is not contiguous, it
    stays whole.

    Args:
        tensors: To be dealt, in order.
        limit: Elements of a bucket.
        leads: How far behind a block each begins, less than a block; None is 0 for all.

    Raises:
        ValueError: The limit is not a multiple of the block, or below two blocks.
    """
    if limit < 2 * BLOCK or limit % BLOCK:
        raise ValueError(f"the limit of a bucket must be a multiple of {BLOCK} and at least two of them, got {limit}")
    made: list[Bucket] = []
    members: list[int] = []
    stretches: list[Stretch] = []
    at = 0
    for index, tensor in enumerate(tensors):
        count, lead = tensor.numel(), leads[index] if leads else 0
        if count >= min(ALONE, limit):
            length = whole_blocks(-(-count // -(-count // limit))) if tensor.is_contiguous() else count + lead
            cuts = [0, *range(length - lead, count, length), count]
            pieces = [Stretch(0, i, j - i, 0 if i else lead) for i, j in pairwise(cuts)]
            made += [Bucket([index], [piece], alone=True) for piece in pieces]
        elif count:
            if stretches and at + lead + count > limit:
                made.append(Bucket(members, stretches))
                members, stretches, at = [], [], 0
            members.append(index)
            stretches.append(Stretch(len(stretches), 0, count, at + lead))
            at += whole_blocks(lead + count)
    return [*made, Bucket(members, stretches)] if stretches else made
