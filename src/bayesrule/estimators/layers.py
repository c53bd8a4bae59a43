r"""Gradients of single examples, in whatever form costs least, and the layers that give them.

For example i a layer's weights have the gradient :math:`G_i = \sum_t \delta_{it} a_{it}^T` over its positions t: delta is what
comes back to the layer's output, a went in. Everything that is asked of it is linear in it, but for the square:

.. math::  \text{total} = \sum_i G_i, \qquad \text{dot} = \langle G_i, u \rangle, \qquad
           G_i \odot G_i = \sum_{t, t'} (\delta_{it} \odot \delta_{it'}) (a_{it} \odot a_{it'})^T.

The square is a gradient of the same form over pairs of positions. So there are three forms, each of which can add up, take products
and square itself: :class:`Outer` (factors, for few positions never multiplied out), :class:`Rows` (of an embedding, those that
occur) and :class:`Dense` (numbers). A layer says in one function which form its parameters have.

Shapes: n examples, K gradients each (of K outputs), T positions, O outputs, I inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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


class Layer(NamedTuple):
    """How a kind of module gives the gradients of its parameters.

    Args:
        gradients: From the module, what went in (n, ...) and what came back (n, K, ...), the gradient of each parameter by name.
        leads: From the module and what went in, whether that has a dimension of examples in front.
        places: The same, to the sizes of the dimensions that could be mistaken for it.
        is_outer: Whether the weight's are :class:`Outer`.
    """

    gradients: Callable[[Any, Tensor, Tensor], dict[str, Callable[[], Gradients]]]
    leads: Callable[[Any, Tensor], bool]
    places: Callable[[Any, Tensor], Sequence[int]]
    is_outer: bool = False


def layer_of(module: nn.Module) -> Layer | None:
    """The kind of a module; None where its gradients have no form here. A subclass with a forward of its own is another kind."""
    kind = LAYERS.get(type(module).forward)
    if kind is None or "forward" in vars(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None
    return None if isinstance(module, nn.Embedding) and module.scale_grad_by_freq else kind


def _linear(module: nn.Linear, a: Tensor, delta: Tensor) -> dict[str, Callable[[], Gradients]]:
    n, positions = len(a), math.prod(a.shape[1:-1])
    left, right = delta.reshape(n, delta.shape[1], positions, delta.shape[-1]), a.reshape(n, positions, a.shape[-1])
    return {
        "weight": lambda: Outer(left, right, module.weight.shape),
        "bias": lambda: Dense(left[:, :, 0] if positions == 1 else left.sum(2)),
    }


def _convolution(module: Any, a: Tensor, delta: Tensor) -> dict[str, Callable[[], Gradients]]:
    n, outputs, channels, *size = delta.shape
    groups, positions, inward = module.groups, math.prod(size), module.weight[0].numel()
    left = delta.reshape(n, outputs, channels, positions)

    def weight() -> Gradients:
        right = _windows(module, a, size).reshape(n, groups, inward, positions)
        if groups == 1:
            return Outer(left.mT, right[:, 0].mT, module.weight.shape)
        split = left.view(n, outputs, groups, channels // groups, positions).transpose(1, 2)
        each = split.reshape(n, groups, outputs * channels // groups, positions) @ right.mT
        each = each.view(n, groups, outputs, channels // groups, inward).transpose(1, 2)
        return Dense(each.reshape(n, outputs, *module.weight.shape))

    return {"weight": weight, "bias": lambda: Dense(left.sum(3))}


def _windows(module: Any, a: Tensor, size: Sequence[int]) -> Tensor:
    """What each output pixel of a convolution sees: (n, channels, *kernel, *size), a view."""
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(0, 0) if padding == "valid" else (padding[i], padding[i]) for i in range(len(kernel))]
    if any(map(any, ends)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, [pixels for end in reversed(ends) for pixels in end], mode)
    first, steps = a.stride()[:2], a.stride()[2:]
    inside = [s * d for s, d in zip(steps, dilation, strict=True)]
    between = [s * t for s, t in zip(steps, module.stride, strict=True)]
    return a.as_strided((*a.shape[:2], *kernel, *size), (*first, *inside, *between), a.storage_offset())


def _embedding(module: nn.Embedding, index: Tensor, delta: Tensor) -> dict[str, Callable[[], Gradients]]:
    n, outputs, rows, width = len(index), delta.shape[1], *module.weight.shape
    positions = math.prod(index.shape[1:])

    def weight() -> Gradients:
        came = delta.reshape(n, outputs, positions, width).transpose(1, 2).reshape(n * positions, outputs, width)
        pair = (index.reshape(n, positions) + torch.arange(n, device=index.device)[:, None] * rows).reshape(-1)
        if module.padding_idx is not None:
            kept = pair % rows != module.padding_idx
            came, pair = came[kept], pair[kept]
        met, inverse = pair.unique(return_inverse=True)
        values = came.new_zeros(len(met), outputs, width).index_add_(0, inverse, came)
        return Rows(values, met // rows, met % rows, n, module.weight.shape)

    return {"weight": weight}


def _norm(standardize: Callable[[Any, Tensor], Tensor], channels_first: bool) -> Layer:
    """Of a weight and a bias that scale and shift standardized inputs element by element."""

    def gradients(module: Any, a: Tensor, delta: Tensor) -> dict[str, Callable[[], Gradients]]:
        shape = module.weight.shape
        here = math.prod(a.shape[1:]) // max(shape.numel(), 1)

        def summed(x: Tensor) -> Gradients:
            if channels_first:
                return Dense(x.reshape(*x.shape[:2], *shape, here).sum(-1))
            return Dense(x.reshape(*x.shape[:2], here, *shape).sum(2))

        return {"weight": lambda: summed(delta * standardize(module, a)[:, None]), "bias": lambda: summed(delta)}

    def places(module: Any, a: Tensor) -> Sequence[int]:
        return a.shape[2:] if channels_first else a.shape[1 : a.dim() - module.weight.dim()]

    return Layer(gradients, lambda module, a: a.dim() > module.weight.dim(), places)


def _in_eval_mode(module: Any, a: Tensor) -> Tensor:
    return F.batch_norm(a, module.running_mean.to(a.dtype), module.running_var.to(a.dtype), eps=module.eps)


_BATCH = _norm(_in_eval_mode, channels_first=True)
_CONVOLUTION = Layer(_convolution, lambda module, a: a.dim() == module.weight.dim(), lambda _, a: a.shape[2:], is_outer=True)
LAYERS: dict[Any, Layer] = {
    nn.Linear.forward: Layer(_linear, lambda _, a: a.dim() > 1, lambda _, a: a.shape[1:-1], is_outer=True),
    nn.Conv1d.forward: _CONVOLUTION,
    nn.Conv2d.forward: _CONVOLUTION,
    nn.Conv3d.forward: _CONVOLUTION,
    nn.Embedding.forward: Layer(_embedding, lambda _, index: index.dim() > 0, lambda _, index: index.shape[1:] or index.shape),
    nn.LayerNorm.forward: _norm(lambda module, a: F.layer_norm(a, module.normalized_shape, eps=module.eps), False),
    nn.RMSNorm.forward: _norm(lambda module, a: F.rms_norm(a, module.normalized_shape, eps=module.eps), False),
    nn.GroupNorm.forward: _norm(lambda module, a: F.group_norm(a, module.num_groups, eps=module.eps), True),
    nn.modules.batchnorm._BatchNorm.forward: _BATCH,
}
"""By forward."""
