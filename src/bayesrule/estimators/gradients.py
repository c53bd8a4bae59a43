r"""Gradients of single examples, in whatever form costs least.

For example i a layer's weights have the gradient :math:`G_i = \sum_t \delta_{it} a_{it}^T` over its positions t: delta is what
comes back to the layer's output, a went in. Everything that is asked of it is linear in it, but for the square:

.. math::  \text{total} = \sum_i G_i, \qquad \text{dot} = \langle G_i, u \rangle, \qquad
           G_i \odot G_i = \sum_{t, t'} (\delta_{it} \odot \delta_{it'}) (a_{it} \odot a_{it'})^T.

The square is a gradient of the same form over pairs of positions. So there are three forms, each of which can add up, take products
and square itself: :class:`Outer` (factors, for few positions never multiplied out), :class:`Rows` (of an embedding, those that
occur) and :class:`Dense` (numbers).

Shapes: n examples, K gradients each (of K outputs), T positions, O outputs, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 4
"""Positions up to which factors stay factors: they have T (T + 1) / 2 pairs, and a matrix an example is not written."""
NARROW = 64
"""Rows below which a product of matrices is faster turned around."""


class Gradients(ABC):
    """Of one parameter of shape S: for each of n examples K gradients, (n, K, *S)."""

    @abstractmethod
    def dense(self) -> Dense:
        """As numbers."""

    @abstractmethod
    def square(self) -> Gradients:
        """Element by element."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum over all of them, shape S."""

    @abstractmethod
    def dot(self, u: Tensor) -> Tensor:
        """The product of each with u of shape S, shape (n, K)."""

    def gram(self, s: Tensor) -> Tensor:
        """The product of each with each, weighted by s of shape S, element by element: shape (n, K, K)."""
        each = self.dense().each.flatten(2)
        return (each * s.reshape(-1)) @ each.mT

    def plus(self, other: Gradients) -> Gradients:
        """Of a parameter that is used twice."""
        return Dense(self.dense().each + other.dense().each)


@dataclass(frozen=True)
class Dense(Gradients):
    """Numbers.

    Args:
        each: Shape (n, K, *S).
    """

    each: Tensor

    def dense(self) -> Dense:
        return self

    def square(self) -> Gradients:
        return Dense(self.each.square())

    def total(self) -> Tensor:
        return self.each.sum((0, 1))

    def dot(self, u: Tensor) -> Tensor:
        n, outputs = self.each.shape[:2]
        return (self.each.reshape(n * outputs, u.numel()) @ u.reshape(-1)).view(n, outputs)


@dataclass(frozen=True)
class Outer(Gradients):
    """Sums of outer products over positions.

    Args:
        left: What came back, shape (n, K, T, O).
        right: What went in, shape (n, T, I).
        shape: S; O times I numbers.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def are_few(self) -> bool:
        """Whether the positions are so few that the factors cost less than their product."""
        return self.right.shape[1] <= FEW

    def dense(self) -> Dense:
        n, outputs, positions, width = self.left.shape
        left = self.left.mT.reshape(n, outputs * width, positions)
        each = (self.right.mT @ left.mT).mT.contiguous() if outputs * width < NARROW else left @ self.right
        return Dense(each.view(n, outputs, *self.shape))

    def square(self) -> Gradients:
        if not self.are_few:
            return Dense(self.dense().each.square_())
        if self.right.shape[1] == 1:
            return Outer(self.left.square(), self.right.square(), self.shape)
        first, second = torch.triu_indices(self.right.shape[1], self.right.shape[1], device=self.right.device)
        left, right = self.left[:, :, first] * self.left[:, :, second], self.right[:, first] * self.right[:, second]
        twice = 1 + (first != second).to(right.dtype)  # a pair and its mirror image
        return Outer(left, right * twice[:, None], self.shape)

    def total(self) -> Tensor:
        left = self.left.sum(1) if self.left.shape[1] > 1 else self.left[:, 0]
        return (left.flatten(0, 1).mT @ self.right.flatten(0, 1)).view(self.shape)

    def dot(self, u: Tensor) -> Tensor:
        if self.right.shape[1] > FEW * (FEW + 1) // 2:
            return self.dense().dot(u)
        through = F.linear(self.right, u.reshape(self.left.shape[-1], self.right.shape[-1]))
        return (self.left.flatten(2) @ through.flatten(1)[:, :, None]).squeeze(2)

    def gram(self, s: Tensor) -> Tensor:
        if self.right.shape[1] != 1:
            return super().gram(s)
        left = self.left[:, :, 0]
        return (left * F.linear(self.right[:, 0].square(), s.reshape(left.shape[-1], -1))[:, None]) @ left.mT

    def plus(self, other: Gradients) -> Gradients:
        if not isinstance(other, Outer):
            return super().plus(other)
        return Outer(torch.cat([self.left, other.left], 2), torch.cat([self.right, other.right], 1), self.shape)


@dataclass(frozen=True)
class Rows(Gradients):
    """Rows of a table, of which each example meets a few.

    Args:
        values: One for each pair of an example and a row that met, shape (pairs, K, D).
        example: The example's number, shape (pairs,).
        row: The row's, shape (pairs,).
        n: Number of examples.
        shape: S, (rows, D).
    """

    values: Tensor
    example: Tensor
    row: Tensor
    n: int
    shape: torch.Size

    def dense(self) -> Dense:
        each = self.values.new_zeros(self.n, self.shape[0], *self.values.shape[1:])
        each[self.example, self.row] = self.values
        return Dense(each.transpose(1, 2))

    def square(self) -> Gradients:
        return Rows(self.values.square(), self.example, self.row, self.n, self.shape)

    def total(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_add_(0, self.row, self.values.sum(1))

    def dot(self, u: Tensor) -> Tensor:
        products = (self.values @ u[self.row][:, :, None]).squeeze(2)
        return products.new_zeros(self.n, products.shape[1]).index_add_(0, self.example, products)

    def gram(self, s: Tensor) -> Tensor:
        products = (self.values * s[self.row][:, None]) @ self.values.mT
        return products.new_zeros(self.n, *products.shape[1:]).index_add_(0, self.example, products)


class Change(NamedTuple):
    """A change of weights for each example: its gradient times s, element by element.

    Args:
        gradients: With K = 1.
        s: Shape S; None is 1.
    """

    gradients: Gradients
    s: Tensor | None

    def dense(self) -> Tensor:
        """As numbers, shape (n, *S)."""
        each = self.gradients.dense().each[:, 0]
        return each if self.s is None else each * self.s
