"""Orthogonal bases of the axes of a tensor: turning to them and back, and finding those in which second moments are diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from .vector import Vector


@dataclass(frozen=True)
class Basis:
    r"""A basis for each axis of a tensor, or None for the axis as it is.

    .. math::  \text{turn}(X) = Q_1^T X Q_2, \qquad \text{back}(X) = Q_1 X Q_2^T \qquad \text{for a matrix, and so on.}

    Costs a product of matrices for each axis that has a basis.

    Args:
        shape: Of the tensors, perhaps with neighbouring axes merged.
        axes: One for each axis of ``shape``, shape (n, n), with orthonormal columns.
    """

    shape: tuple[int, ...]
    axes: Sequence[Tensor | None]

    def turn(self, x: Tensor) -> Tensor:
        """A tensor in the basis."""
        return self._contract(x, 0)

    def back(self, x: Tensor) -> Tensor:
        """What :meth:`turn` gave, as it was."""
        return self._contract(x, 1)

    def _contract(self, x: Tensor, side: int) -> Tensor:
        if all(q is None for q in self.axes):
            return x
        y = x.reshape(self.shape)
        for q in self.axes:  # the leading axis goes to the end
            y = y.movedim(0, -1) if q is None else torch.tensordot(y, q, dims=([0], [side]))
        return y.reshape(x.shape)

    def squared(self) -> Basis:
        """The squares of its numbers: what turns variances of independent coordinates into those of elements, and back."""
        return Basis(self.shape, [None if q is None else q * q for q in self.axes])

    def to(self, other: Basis) -> Basis:
        """From this basis into another of the same shape: ``a.to(b).turn(a.turn(x))`` is ``b.turn(x)``."""
        pairs = zip(self.axes, other.axes, strict=True)
        return Basis(self.shape, [q if p is None else p.T if q is None else p.T @ q for p, q in pairs])

    def equals(self, other: Basis) -> bool:
        """Whether both turn to the same coordinates, bit by bit."""
        if self.shape != other.shape:
            return False
        pairs = zip(self.axes, other.axes, strict=True)
        return all(p is q or (p is not None and q is not None and torch.equal(p, q)) for p, q in pairs)

    def moments(self, x: Tensor) -> list[Tensor | None]:
        """For each axis that has a basis, the products of its slices, shape (n, n)."""
        y = x.reshape(self.shape)
        unfolded = [None if q is None else y.movedim(i, 0).reshape(y.shape[i], -1) for i, q in enumerate(self.axes)]
        return [None if u is None else u @ u.T for u in unfolded]


@dataclass(frozen=True)
class Bases:
    """The bases of several tensors, which are turned together."""

    parts: Sequence[Basis]

    def turn(self, x: Vector) -> Vector:
        """A vector in the bases."""
        return Vector([basis.turn(part) for basis, part in zip(self.parts, x, strict=True)])

    def back(self, x: Vector) -> Vector:
        """What :meth:`turn` gave, as it was."""
        return Vector([basis.back(part) for basis, part in zip(self.parts, x, strict=True)])

    def squared(self) -> Bases:
        """Each squared."""
        return Bases([basis.squared() for basis in self.parts])

    def to(self, other: Any) -> Bases:
        """From each into that of another."""
        return Bases([basis.to(into) for basis, into in zip(self.parts, other.parts, strict=True)])

    def equals(self, other: Bases) -> bool:
        """Whether each is that of another."""
        return len(self.parts) == len(other.parts) and all(a.equals(b) for a, b in zip(self.parts, other.parts, strict=True))


def merged(shape: Size, limit: int) -> tuple[int, ...]:
    """A shape whose neighbouring axes are merged, one after the other, as long as none is longer than the limit."""
    sizes: list[int] = []
    for size in shape:
        if sizes and sizes[-1] * size <= limit:
            sizes[-1] *= size
        else:
            sizes.append(size)
    return tuple(sizes)


def plain(shape: Size, limit: int, merge: bool, vectors: bool) -> tuple[tuple[int, ...], list[bool]]:
    """The shape that a tensor has for its basis, and which axes are to have one.

    Args:
        shape: Of the tensor.
        limit: Length of the longest axis that has one.
        merge: Whether neighbouring axes are merged up to that length.
        vectors: Whether tensors of one axis have one.
    """
    wide = merged(shape, limit) if merge and shape.numel() else tuple(shape)
    return wide, [size <= limit and (len(shape) > 1 or vectors) for size in wide]


def eigenvectors(moments: Tensor) -> Tensor:
    """Eigenvectors of a positive matrix as columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moments)[1].flip(-1).contiguous()  # as a checkpoint brings it: products round by strides


def followed(moments: Tensor, basis: Tensor) -> Tensor:
    """One orthogonal iteration: a basis that has come nearer to the eigenvectors."""
    return torch.linalg.qr(moments @ basis)[0].contiguous()


def whitened(x: Tensor, eps: float = 1e-10) -> Tensor:
    """A matrix with its singular values brought near to 1 (Newton-Schulz, in bfloat16); a vector of length 1.

    Five iterations, as of Muon: singular values land between about 0.5 and 1.5, but for those far below the largest.
    """
    if x.dim() < 2:
        length: Tensor = torch.linalg.vector_norm(x)
        return x / length.clamp_min(eps)
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.reshape(len(x), -1).to(torch.bfloat16)
    tall = y.shape[0] > y.shape[1]
    y = y.T if tall else y
    y = y / torch.linalg.matrix_norm(y).clamp_min(1e-7)
    for _ in range(5):
        square = y @ y.T
        y = a * y + (b * square + c * (square @ square)) @ y
    return (y.T if tall else y).reshape(x.shape).to(x.dtype)
