"""Checkpoints of the published package `ivon-opt`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..optimizers.checkpoints import is_of_ivon_opt
from ..optimizers.hyperparameters import validate
from ..optimizers.variational import IVON

SETTINGS = ("lr", "ess", "hess_init", "weight_decay", "mc_samples", "clip_radius")
"""What a group there calls by the same name as one here."""

FORMAT = frozenset({*SETTINGS, "beta1", "beta2", "numel", "momentum", "hess", "params"})
"""The keys that the package itself writes into a group."""


def load_ivon_opt(optimizer: IVON, state_dict: Mapping[str, Any], steps: int) -> None:
    """Go on from a checkpoint of the published package, where it would have gone without an interruption.

    Momentum and curvature are taken over, and of every group ``lr, ess, hess_init, weight_decay, mc_samples, clip_radius`` and the
    two betas, with what a scheduler left there (``initial_lr``). ``hess_approx, debias, rescale_lr`` are not saved there: give them
    to the constructor as they were.

    Args:
        optimizer: One over the same parameters, in the same order and groups.
        state_dict: What the package's ``state_dict()`` gave, as ``torch.load(path, weights_only=True)`` reads it.
        steps: Optimizer steps that had been made. They are not saved there, and the momentum at step t is divided by
            1 - beta1^t.

    Raises:
        TypeError: ``optimizer`` is no :class:`bayesrule.IVON`.
        ValueError: It is no such state, one of other parameters, one with impossible numbers, or one that was saved between a
            draw and its step; or ``steps`` cannot be right. Nothing has changed then.

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
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}; it is the number of optimizer steps that were made")
    saved = _groups(state_dict)
    groups = optimizer.param_groups
    if len(groups) != len(saved):
        raise ValueError(f"the state has {len(saved)} parameter groups, the optimizer {len(groups)}; make the same groups")
    state: dict[int, dict[str, Tensor]] = {}
    filled = []
    for number, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        group = _settings(optimizer, number, mine, theirs)
        momentum, hess = (_split(number, name, theirs[name], mine["params"]) for name in ("momentum", "hess"))
        _check(number, theirs, int(steps))
        group["params"] = list(range(len(state), len(state) + len(mine["params"])))
        for index, v, h in zip(group["params"], momentum, hess, strict=True):
            state[index] = {"step": torch.tensor(float(steps)), "momentum": v, "hess": h}
        filled.append(group)
    optimizer.load_state_dict({"state": state, "param_groups": filled})


def _groups(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of a state that is complete and of the package."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list) or not is_of_ivon_opt(state_dict):
        raise ValueError(
            "this is no state_dict of ivon-opt, whose groups hold flat momentum and hess and two betas; a state of bayesrule is "
            "loaded by optimizer.load_state_dict"
        )
    for number, group in enumerate(groups):
        if missing := sorted(FORMAT - set(group)):
            raise ValueError(f"group {number} of the state lacks {missing}; give the state_dict as ivon-opt saved it")
    gathered = state_dict.get("state")
    if isinstance(gathered, Mapping) and (count := gathered.get("count")):
        raise ValueError(f"the state was saved between a draw and its step, with {count} draws in it; take one saved after step()")
    return groups


def _settings(optimizer: IVON, number: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A group of ours with the settings of one of theirs; what they do not save, or do not heed, stays as it is."""
    here, there = len(mine["params"]), len(theirs["params"])
    if here != there:
        raise ValueError(f"group {number} of the state has {there} parameters, the optimizer's {here}; make the same groups")
    added = {name: value for name, value in theirs.items() if name not in FORMAT and name not in optimizer.defaults}
    same = {name: theirs[name] for name in SETTINGS}
    group = {**mine, **added, **same, "betas": (theirs["beta1"], theirs["beta2"])}
    validate(type(optimizer).__name__, number, group, optimizer.ranges)
    return group


def _split(number: int, name: str, flat: Any, params: list[Tensor]) -> list[Tensor]:
    """A flat tensor of a group, by parameter."""
    if not isinstance(flat, Tensor) or not flat.is_floating_point():
        got = f"{flat.dtype}" if isinstance(flat, Tensor) else type(flat).__name__
        raise ValueError(
            f"{name} of group {number} must be a tensor of real numbers, got {got}; give the state_dict as it was saved"
        )
    sizes = [p.numel() for p in params]
    if flat.shape != (sum(sizes),):
        raise ValueError(
            f"{name} of group {number} has shape {tuple(flat.shape)}, its parameters have {sum(sizes)} numbers: other parameters"
        )
    if bad := int((~flat.isfinite()).sum()):
        raise ValueError(f"{name} of group {number} has {bad} entries that are not finite; take an earlier checkpoint")
    return [part.view(p.shape) for part, p in zip(flat.split(sizes), params, strict=True)]


def _check(number: int, theirs: Mapping[str, Any], steps: int) -> None:
    """Refuse a curvature that leaves no posterior, and a momentum that comes from no steps."""
    hess, delta = theirs["hess"], theirs["weight_decay"]
    total = hess.to(torch.promote_types(hess.dtype, torch.float32)) + delta  # hess alone may be negative
    if bad := int((total <= 0).sum()):
        least = total.min().item()
        raise ValueError(
            f"hess + weight_decay of group {number} has {bad} entries not above 0 (min {least:.2g}); take an earlier checkpoint"
        )
    if not steps and theirs["momentum"].any():
        raise ValueError(f"steps is 0, but the momentum of group {number} has moved; give the number of steps that were made")
