"""What an optimizer has learned, as a posterior, and a posterior as what it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..parts import Part
from ..posterior import Posterior
from ..rounding import followed
from ..rule import BayesRule
from ..shards import gather_anew, here, take_over, whole
from ..vector import equal
from .cells import Layout, Names


class Learner(Protocol):
    """What is asked of an optimizer."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any

    layout: Layout

    @property
    def names(self) -> Names: ...
    @property
    def is_diagonal(self) -> bool: ...
    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def start(self, group: Mapping[str, Any]) -> float: ...
    def like_state(self, param: Tensor) -> Tensor: ...
    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]: ...


def learned(optimizer: Learner, model: nn.Module, num_data: int | None) -> Posterior:
    """The posterior over the parameters that an optimizer trains, by the model's names."""
    name = type(optimizer).__name__
    if "ess" not in optimizer.defaults:
        raise TypeError(f"{name} learns no posterior; train with bayesrule.IVON, or take Posterior.point(model)")
    ess = sorted({float(group["ess"]) for group in optimizer.param_groups})
    if len(ess) > 1:
        raise ValueError(f"{name}: parameter groups differ in ess {ess}; a Posterior has one")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gather_anew(trained)  # the model names its sharded parameters only while it does not hold them gathered
    names: dict[Tensor, str] = {}
    own = {id(p): own for own, p in model.named_parameters()}
    groups: dict[Tensor, Mapping[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if id(p) not in own:
                raise ValueError(f"{name} trains a parameter of shape {tuple(p.shape)} that the model does not hold")
            names[p], groups[p] = own[id(p)], group
    parts = optimizer.together(names)
    joined = {name for part in parts for name in part.names}
    blocks: list[dict[str, Tensor]] = [{name: t for part in parts for name, t in part.mean.items()}, {}, {}, {}]
    blocks[0] = {name: blocks[0].get(name, torch.empty(0)) for name in names.values()}  # in the model's order
    for p, name in names.items():
        if name not in joined:
            blocks[0][name], blocks[1][name], *_ = marginal(optimizer, groups[p], p)
        for block, tensor in zip(blocks[2:], prior_of(optimizer, groups[p], p), strict=False):
            block[name] = tensor
    mean, precision, prior_mean, prior_precision = blocks
    return Posterior(mean, precision, prior_mean or None, prior_precision or None, ess[0], num_data, parts)


@torch.no_grad()
def marginal(
    optimizer: Learner, group: Mapping[str, Any], param: Tensor, part: Callable[[Tensor], Tensor] = whole
) -> tuple[Tensor, Tensor]:
    """Mean and precision of one parameter: of the whole, or of the part that lies here; the precision in its basis, if any."""
    state, ess = {name: part(t) for name, t in optimizer.layout.state(group, param).items() if isinstance(t, Tensor)}, group["ess"]
    held = part(param.detach())
    mean = held.to(torch.promote_types(held.dtype, torch.float32), copy=True)
    if optimizer.names.mean in state and held.dtype.itemsize < mean.dtype.itemsize:
        mean = followed(state[optimizer.names.mean], held)
    if not param.numel():
        precision = torch.ones_like(mean)
    elif optimizer.names.hess is None:  # what nothing is learned of stays as it began
        precision = torch.full_like(mean, ess * group["hess_init"])
    else:
        precision = state[optimizer.names.hess] * ess + prior_of(optimizer, group, param, part)[1]
    return mean, precision if spreads(group) else torch.full_like(precision, math.inf)


def spreads(group: Mapping[str, Any]) -> bool:
    """Whether q has a spread over the parameters of a group; an ess that is a symbol is finite."""
    ess = group["ess"]
    return bool(group["noise_scale"]) and not equal(ess.item() if isinstance(ess, Tensor) else ess, math.inf)


def prior_of(
    optimizer: Learner, group: Mapping[str, Any], param: Tensor, part: Callable[[Tensor], Tensor] = whole
) -> tuple[Tensor, ...]:
    """Mean and precision of the prior of one parameter; nothing where it is no Gaussian."""
    if "weight_decay" not in group:
        return ()
    like = optimizer.like_state(part(param.detach()).new_zeros(()))
    pull = group["ess"] * group["weight_decay"] if group["weight_decay"] else 0.0  # where ess may be infinite
    state = optimizer.state.get(param, {})
    mean, precision = state.get("prior_mean"), state.get("prior_precision")
    return (
        like if mean is None else part(mean).clone(),
        like.new_tensor(pull) if precision is None else part(precision).clone(),
    )


def begin(optimizer: Learner, prior: Posterior | None, starts: Mapping[str, Tensor] | None) -> None:
    """What a new optimizer is given by name: a prior, and curvatures to start from."""
    if prior is not None:
        _adopt(optimizer, prior)
    if starts is not None:
        _start(optimizer, starts)


def _start(optimizer: Learner, starts: Mapping[str, Tensor]) -> None:
    """Let every curvature start where a mapping says, by name; ``hess_init`` of a group becomes their mean."""
    name = type(optimizer).__name__
    if optimizer.names.hess is None:
        raise ValueError(f"{name} keeps no curvature, so hess_init must be a number")
    for group in optimizer.param_groups:
        if not optimizer.start(group):  # a curvature that begins at zero
            continue
        if "param_names" not in group:
            raise ValueError(f"{name}: hess_init by name needs names: pass model.named_parameters()")
        named = [(key, p) for key, p in zip(group["param_names"], group["params"], strict=True) if p.requires_grad]
        for key, p in named:
            h = starts.get(key)
            if not isinstance(h, Tensor) or h.shape != p.shape or not (here(h).isfinite() & (here(h) >= 0)).all():
                held = f"a tensor of {tuple(h.shape)}" if isinstance(h, Tensor) else repr(h)
                wanted = f"finite numbers >= 0, shape {tuple(p.shape)}"
                raise ValueError(f"{name}: hess_init must hold {wanted}, for {key!r}, got {held}")
            optimizer.layout.state(group, p)[optimizer.names.hess] = take_over(optimizer.like_state(p), h)
        if count := sum(p.numel() for _, p in named):
            group["hess_init"] = sum(float(whole(starts[key].double().sum())) for key, _ in named) / count


def _adopt(optimizer: Learner, prior: Posterior) -> None:
    """Keep a posterior's mean and precision as every parameter's prior."""
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, (mean, precision) in zip(params, prior.match(names, params), strict=True):
        optimizer.state[p]["prior_mean"] = take_over(optimizer.like_state(p), mean)
        optimizer.state[p]["prior_precision"] = take_over(optimizer.like_state(p), precision)
    for group in optimizer.param_groups:
        total = sum(float(whole(optimizer.state[p]["prior_precision"]).sum()) for p in group["params"])
        group["weight_decay"] = total / sum(p.numel() for p in group["params"]) / group["ess"]
