"""How much of the noise of a draw is left when parameters hold it rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounding import place
from ..shards import computed_in, here
from .learned import Learner, marginal


@torch.no_grad()
def noise_visibility(optimizer: Learner, dtype: torch.dtype | None, below: int = 8) -> dict[str, float]:
    """The fraction of each parameter's elements whose spread is at least half a place of the mean.

    Args:
        optimizer: One that draws.
        dtype: In which parameters are held; None is their own, or the one that FSDP2 gathers them in.
        below: Only parameters whose dtype has at most so many bytes are looked at.
    """
    found: dict[str, float] = {}
    number, known = 0, dict[Tensor, tuple[Tensor, Tensor]]() if optimizer.is_diagonal else _together(optimizer)
    gathered = computed_in([p for group in optimizer.param_groups for p in group["params"]])
    for group in optimizer.param_groups:
        draws = optimizer.rule(group).expectation.spreads
        names = group.get("param_names") or [str(number + i) for i in range(len(group["params"]))]
        number += len(names)
        for name, p in zip(names, group["params"], strict=True):
            held = dtype or gathered.get(id(p), p.dtype)
            if draws and p.requires_grad and here(p).numel() and held.itemsize <= below:
                mean, precision = marginal(optimizer, group, p, here) if p not in known else known[p]
                found[name] = float((precision.rsqrt() >= place(mean, held) / 2).float().mean())
    return found


def _together(optimizer: Learner) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """Mean and one over the variance of every weight that is not independent."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    names = {p: str(number) for number, p in enumerate(params)}
    found: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for part in optimizer.together(names):
        means, variances = part.mean, part.variance
        found |= {p: (means[name], 1 / variances[name]) for p, name in names.items() if name in means}
    return found
