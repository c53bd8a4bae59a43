"""What an optimizer has learned, as a posterior, and a posterior as what it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..posterior import Posterior
from ..rounding import followed
from ..rule import BayesRule
from .cells import Layout, Names


class Learner(Protocol):
    """What is asked of an optimizer."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any

    layout: Layout

    @property
    def names(self) -> Names: ...
    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def like_state(self, param: Tensor) -> Tensor: ...


def learned(optimizer: Learner, model: nn.Module, num_data: int | None) -> Posterior:
    """The posterior over the parameters that an optimizer trains, by the model's names."""
    name = type(optimizer).__name__
    if "ess" not in optimizer.defaults:
        raise TypeError(f"{name} learns no posterior; train with bayesrule.IVON, or take Posterior.point(model)")
    ess = sorted({float(group["ess"]) for group in optimizer.param_groups})
    if len(ess) > 1:
        raise ValueError(f"{name}: parameter groups differ in ess {ess}; a Posterior has one")
    blocks: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    names = {id(p): own for own, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if id(p) not in names:
                raise ValueError(f"{name} trains a parameter of shape {tuple(p.shape)} that the model does not hold")
            for block, tensor in zip(blocks, marginal(optimizer, group, p), strict=True):
                block[names[id(p)]] = tensor
    mean, precision, prior_mean, prior_precision = blocks
    return Posterior(mean, precision, prior_mean, prior_precision, ess[0], num_data)


@torch.no_grad()
def marginal(optimizer: Learner, group: Mapping[str, Any], param: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, precision and prior (mean, precision) of one parameter."""
    state, ess = optimizer.layout.state(group, param), group["ess"]
    mean = optimizer.like_state(param).copy_(param)
    if optimizer.names.mean in state and param.dtype.itemsize < mean.dtype.itemsize:
        mean = followed(state[optimizer.names.mean], param.detach())
    pull = ess * group["weight_decay"] if group["weight_decay"] else 0.0  # where ess may be infinite
    prior_mean = state.get("prior_mean", mean.new_zeros(()))
    prior_precision = state.get("prior_precision", mean.new_tensor(pull))
    precision = state[optimizer.names.hess or ""] * ess + prior_precision
    if not group["noise_scale"] or math.isinf(ess):
        precision = torch.full_like(precision, math.inf)
    return mean, precision, prior_mean.clone(), prior_precision.clone()


def adopt(optimizer: Learner, prior: Posterior) -> None:
    """Keep a posterior's mean and precision as every parameter's prior."""
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, (mean, precision) in zip(params, prior.match(names, params), strict=True):
        optimizer.state[p]["prior_mean"] = optimizer.like_state(p).copy_(mean)
        optimizer.state[p]["prior_precision"] = optimizer.like_state(p).copy_(precision)
    for group in optimizer.param_groups:
        total = sum(float(optimizer.state[p]["prior_precision"].sum()) for p in group["params"])
        group["weight_decay"] = total / sum(p.numel() for p in group["params"]) / group["ess"]
