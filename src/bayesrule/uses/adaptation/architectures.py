"""What a model of another architecture takes over."""

from __future__ import annotations

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
    fresh = anchor.prior_precision.mean()
    rows = []
    for row, default in (
        (anchor.center, 0.0),
        (anchor.diagonal, fresh),
        (anchor.prior_mean, 0.0),
        (anchor.prior_precision, fresh),
    ):
        old = take(anchor.named(row))
        each = []
        for name, p in moving.items():
            wide = row.new_zeros(p.shape) + default
            if name in old:
                if old[name].dim() != p.dim() or any(a > b for a, b in zip(old[name].shape, p.shape, strict=True)):
                    raise ValueError(
                        f"{name!r} is taken over with shape {tuple(old[name].shape)}, and is {tuple(p.shape)} in the new model"
                    )
                wide[tuple(slice(n) for n in old[name].shape)] = old[name]
            each.append(wide.reshape(-1))
        rows.append(torch.cat(each))
    center, precision, prior_mean, prior_precision = rows
    sizes = tuple(p.shape for p in moving.values())
    return Anchor(tuple(moving), sizes, Diagonal(center, precision), prior_mean, prior_precision)


def _taken_over(old: dict[str, Tensor], params: Named) -> dict[str, Tensor]:
    """Those of the same name that have not shrunk."""

    def fits(name: str, t: Tensor) -> bool:
        return t.dim() == params[name].dim() and all(a <= b for a, b in zip(t.shape, params[name].shape, strict=True))

    return {name: t for name, t in old.items() if name in params and fits(name, t)}
