"""Checkpoints of the published package `ivon-opt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..optimizers.checkpoints import is_of_ivon_opt
from ..optimizers.variational import IVON


def load_ivon_opt(optimizer: IVON, state_dict: Mapping[str, Any], steps: int) -> None:
    """Go on from a checkpoint of the published package, where it would have gone without an interruption.

    Momentum and curvature are taken over, and of every group ``lr, ess, hess_init, weight_decay, mc_samples, clip_radius`` and the
    two betas. ``hess_approx, debias, rescale_lr`` are not saved there: give them to the constructor as they were.

    Args:
        optimizer: A new one over the same parameters, in the same order and groups.
        state_dict: What the package's ``state_dict()`` gave, as ``torch.load(path, weights_only=True)`` reads it.
        steps: Optimizer steps that had been made. They are not saved there, and the momentum at step t is divided by
            1 - beta1^t.

    Raises:
        TypeError: ``optimizer`` is no :class:`bayesrule.IVON`.
        ValueError: It is no such state, or one of other parameters. Nothing has changed then.

    Example:
        >>> import torch, bayesrule as br
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> group = dict(lr=0.1, ess=100.0, hess_init=0.5, beta1=0.9, beta2=0.999, weight_decay=1e-4, mc_samples=1)
        >>> flat = dict(numel=2, momentum=torch.tensor([0.1, 0.2]), hess=torch.tensor([0.5, 0.6]), clip_radius=float("inf"))
        >>> opt = br.IVON([w], lr=0.1, ess=100)
        >>> load_ivon_opt(opt, {"state": {"count": 0}, "param_groups": [{**group, **flat, "params": [0]}]}, steps=1000)
        >>> opt.state[w]["hess"]
        tensor([0.5000, 0.6000])

    Source: the state of `ivon-opt` 0.1.3, seen from outside.
    """
    if not isinstance(optimizer, IVON):
        raise TypeError(f"load_ivon_opt fills a bayesrule.IVON, got a {type(optimizer).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}; it is the number of optimizer steps that were made")
    if not is_of_ivon_opt(state_dict):
        raise ValueError(
            "this is no state_dict of ivon-opt, whose groups hold flat momentum and hess and two betas; a state of bayesrule is "
            "loaded by optimizer.load_state_dict"
        )
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved):
        raise ValueError(f"the state has {len(saved)} parameter groups, the optimizer {len(groups)}; make the same groups")
    own = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    filled = []
    for number, (group, mine, theirs) in enumerate(zip(groups, own["param_groups"], saved, strict=True)):
        sizes = [p.numel() for p in group["params"]]
        parts = {name: _split(number, name, theirs[name], sizes) for name in ("momentum", "hess")}
        for i, (index, p) in enumerate(zip(mine["params"], group["params"], strict=True)):
            state[index] = {name: each[i].view(p.shape) for name, each in parts.items()} | {"step": torch.tensor(float(steps))}
        same = {name: theirs[name] for name in ("lr", "ess", "hess_init", "weight_decay", "mc_samples", "clip_radius")}
        filled.append({**mine, **same, "betas": (theirs["beta1"], theirs["beta2"])})
    optimizer.load_state_dict({"state": state, "param_groups": filled})


def _split(number: int, name: str, flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """A flat tensor of a group, by parameter."""
    if flat.shape != (sum(sizes),):
        raise ValueError(
            f"{name} of group {number} has shape {tuple(flat.shape)}, its parameters have {sum(sizes)} numbers: other parameters"
        )
    if bad := int((~flat.isfinite()).sum()):
        raise ValueError(f"{name} of group {number} has {bad} entries that are not finite; take an earlier checkpoint")
    if name == "hess" and (bad := int((flat < 0).sum())):
        raise ValueError(
            f"hess of group {number} has {bad} entries below 0 (min {flat.min().item():.2g}); take an earlier checkpoint"
        )
    return flat.split(sizes)
