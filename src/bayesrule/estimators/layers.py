"""Layers of a known kind: the gradients of their weights for single examples, and what a change of weights for each does.

Shapes: n examples, K gradients each (of K outputs), T positions, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gradients import Change, Dense, Gradients, Outer, Rows


class Layer(NamedTuple):
    """How a kind of module gives the gradients of its parameters.

    Args:
        gradients: From the module, what went in (n, ...) and what came back (n, K, ...), the gradient of each parameter by name.
        push: From the module, what went in, and changes of parameters by name, the change of what comes out (n, ...).
        leads: From the module and what went in, whether that has a dimension of examples in front.
        places: The same, to the sizes of the dimensions that could be mistaken for it.
        is_outer: Whether the weight's are :class:`Outer`.
        is_shared: Whether something of one row, (1, T), is the same for all examples, as positions are.
    """

    gradients: Callable[[Any, Tensor, Tensor], dict[str, Callable[[], Gradients]]]
    push: Callable[[Any, Tensor, Mapping[str, Change]], Tensor]
    leads: Callable[[Any, Tensor], bool]
    places: Callable[[Any, Tensor], Sequence[int]]
    is_outer: bool = False
    is_shared: Callable[[Tensor], bool] = lambda a: False


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


def _linear_push(module: nn.Linear, a: Tensor, changes: Mapping[str, Change]) -> Tensor:
    n, positions = len(a), math.prod(a.shape[1:-1])
    right, out = a.reshape(n, positions, a.shape[-1]), a.new_zeros(n, positions, module.weight.shape[0])
    if "weight" in changes:
        out = out + _through(changes["weight"], right)
    if "bias" in changes:
        out = out + changes["bias"].dense()[:, None]
    return out.view(*a.shape[:-1], out.shape[-1])


def _through(change: Change, right: Tensor) -> Tensor:
    """Inputs times changed matrices, shape (n, T, O)."""
    outer, s = change
    if not isinstance(outer, Outer) or s is None or not outer.are_few:
        dense = change.dense()
        return right @ dense.reshape(len(dense), len(dense[0]), right.shape[-1]).mT
    weight = s.reshape(outer.left.shape[-1], -1)
    met = right[:, :, None] * outer.right[:, None]  # of every position here with every position there
    return (F.linear(met, weight) * outer.left).sum(2)


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


def _convolution_push(module: Any, a: Tensor, changes: Mapping[str, Change]) -> Tensor:
    size = _positions(module, a)
    n, groups, positions, inward = len(a), module.groups, math.prod(size), module.weight[0].numel()
    out = a.new_zeros(n, module.weight.shape[0], positions)
    if "weight" in changes:
        weight = changes["weight"].dense().reshape(n, groups, -1, inward)
        out = out + (weight @ _windows(module, a, size).reshape(n, groups, inward, positions)).view_as(out)
    if "bias" in changes:
        out = out + changes["bias"].dense()[:, :, None]
    return out.view(n, -1, *size)


def _ends(module: Any) -> list[tuple[int, int]]:
    """How many pixels are added in front of each dimension and behind it."""
    if module.padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    return [(pixels, pixels) for pixels in ([0] * len(module.kernel_size) if module.padding == "valid" else module.padding)]


def _positions(module: Any, a: Tensor) -> list[int]:
    """The pixels of a convolution's output, by dimension."""
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    around = zip(a.shape[2:], _ends(module), spans, module.stride, strict=True)
    return [(length + sum(end) - span) // stride + 1 for length, end, span, stride in around]


def _windows(module: Any, a: Tensor, size: Sequence[int]) -> Tensor:
    """What each output pixel of a convolution sees: (n, channels, *kernel, *size), a view."""
    kernel, dilation, ends = module.kernel_size, module.dilation, _ends(module)
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


def _embedding_push(module: nn.Embedding, index: Tensor, changes: Mapping[str, Change]) -> Tensor:
    rows, s = changes["weight"]
    flat, example = index.reshape(len(index), -1), torch.arange(len(index), device=index.device)[:, None]
    if not isinstance(rows, Rows):
        out = changes["weight"].dense()[example, flat]
    elif len(rows.row):
        values = rows.values[:, 0] if s is None else rows.values[:, 0] * s[rows.row]
        known, wanted = rows.example * len(module.weight) + rows.row, example * len(module.weight) + flat
        place = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        out = values[place] * (known[place] == wanted)[..., None]
    else:
        out = rows.values.new_zeros(*flat.shape, module.weight.shape[1])
    if module.padding_idx is not None:
        out = out * (flat != module.padding_idx)[..., None]
    return out.view(*index.shape, module.weight.shape[1])


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

    def push(module: Any, a: Tensor, changes: Mapping[str, Change]) -> Tensor:
        shape = module.weight.shape
        ones = [1] * (a.dim() - 1 - len(shape))
        wide = {
            name: c.dense().view(len(a), *([*shape, *ones] if channels_first else [*ones, *shape])) for name, c in changes.items()
        }
        out = torch.zeros_like(a)
        if "weight" in wide:
            out = out + standardize(module, a) * wide["weight"]
        return out + wide["bias"] if "bias" in wide else out

    def places(module: Any, a: Tensor) -> Sequence[int]:
        return a.shape[2:] if channels_first else a.shape[1 : a.dim() - module.weight.dim()]

    return Layer(gradients, push, lambda module, a: a.dim() > module.weight.dim(), places)


def _in_eval_mode(module: Any, a: Tensor) -> Tensor:
    return F.batch_norm(a, module.running_mean.to(a.dtype), module.running_var.to(a.dtype), eps=module.eps)


_BATCH = _norm(_in_eval_mode, channels_first=True)
_CONVOLUTION = Layer(
    _convolution, _convolution_push, lambda module, a: a.dim() == module.weight.dim(), lambda _, a: a.shape[2:], is_outer=True
)
LAYERS: dict[Any, Layer] = {
    nn.Linear.forward: Layer(_linear, _linear_push, lambda _, a: a.dim() > 1, lambda _, a: a.shape[1:-1], is_outer=True),
    nn.Conv1d.forward: _CONVOLUTION,
    nn.Conv2d.forward: _CONVOLUTION,
    nn.Conv3d.forward: _CONVOLUTION,
    nn.Embedding.forward: Layer(
        _embedding,
        _embedding_push,
        lambda _, index: index.dim() > 0,
        lambda _, index: index.shape[1:] or index.shape,
        is_shared=lambda index: index.dim() > 1 and len(index) == 1,
    ),
    nn.LayerNorm.forward: _norm(lambda module, a: F.layer_norm(a, module.normalized_shape, eps=module.eps), False),
    nn.RMSNorm.forward: _norm(lambda module, a: F.rms_norm(a, module.normalized_shape, eps=module.eps), False),
    nn.GroupNorm.forward: _norm(lambda module, a: F.group_norm(a, module.num_groups, eps=module.eps), True),
    nn.modules.batchnorm._BatchNorm.forward: _BATCH,
}
"""By forward."""
