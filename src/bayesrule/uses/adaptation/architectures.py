"""What a model of another architecture takes over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...families.gaussian import Diagonal
from ...posterior import Posterior
from .anchors import Anchor, Named

Mapped = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def carried(anchor: Anchor, model: nn.Module, mapping: Mapped | None, posterior: Posterior) -> Anchor:
    """An anchor of what a new model takes over; what is new has the prior."""
    params = dict(model.named_parameters())
    moving = {name: p for name, p in params.items() if name in anchor.names or name not in posterior.mean}
    take = partial(_taken_over, params=moving) if mapping is None else mapping
    fresh = float(anchor.prior_precision.mean())

    def row(old: Tensor, new: float) -> Tensor:
        known = take(anchor.named(old))
        return torch.cat([_embedded(name, known.get(name), old.new_full(p.shape, new)) for name, p in moving.items()])

    q = Diagonal(row(anchor.center, 0.0), row(anchor.diagonal, fresh))
    sizes = tuple(p.shape for p in moving.values())
    return Anchor(tuple(moving), sizes, q, row(anchor.prior_mean, 0.0), row(anchor.prior_precision, fresh))


def _embedded(name: str, old: Tensor | None, wide: Tensor) -> Tensor:
    """What is taken over in the first rows and columns of what is new, in a row."""
    if old is not None:
        if old.dim() != wide.dim() or any(a > b for a, b in zip(old.shape, wide.shape, strict=True)):
            raise ValueError(f"{name!r} is taken over with shape {tuple(old.shape)}, and has {tuple(wide.shape)} in the new model")
        wide[tuple(slice(n) for n in old.shape)] = old
    return wide.reshape(-1)


def _taken_over(old: dict[str, Tensor], params: Named) -> dict[str, Tensor]:
    """Those of the same name that have not shrunk."""

    def fits(name: str, t: Tensor) -> bool:
        return t.dim() == params[name].dim() and all(a <= b for a, b in zip(t.shape, params[name].shape, strict=True))

    return {name: t for name, t in old.items() if name in params and fits(name, t)}


def widened(model: nn.Module, outputs: int) -> nn.Module:
    """A copy of a model whose last linear layer gives more outputs: the new ones are 0.

    Raises:
        ValueError: It has no linear layer.
    """
    found = copy.deepcopy(model)
    name, layer = next(((n, m) for n, m in reversed(list(found.named_modules())) if isinstance(m, nn.Linear)), ("", None))
    if layer is None:
        raise ValueError("the model has no nn.Linear that could give more outputs; pass a new_model")
    wide = nn.Linear(layer.in_features, outputs, layer.bias is not None, layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        for new, old in zip(wide.parameters(), layer.parameters(), strict=True):
            new.zero_()[: len(old)] = old
    if not name:
        return wide.train(layer.training)
    parent, _, own = name.rpartition(".")
    setattr(found.get_submodule(parent), own, wide.train(layer.training))
    return found
