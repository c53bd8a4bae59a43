"""What each rank does, and what one process does instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import bayesrule as br

EXAMPLES = 48


class Logistic(nn.Module):
    """A small network: tensors of several shapes, one of them larger than a bucket shares."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(30, 20)
        self.second = nn.Linear(20, 1)
        self.wide = nn.Parameter(torch.empty(257, 300))
        self.x = torch.randn(EXAMPLES, 30, generator=generator)
        self.y = torch.randn(EXAMPLES, generator=generator).sign()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 10)

    def forward(self, rows: Tensor) -> Tensor:
        margins = self.y[rows] * self.second(torch.tanh(self.first(self.x[rows]))).squeeze(1)
        return softplus(-margins).mean() + (self.wide - 0.3).square().mean()


def ivon(model: nn.Module, **hyper: Any) -> br.IVON:
    return br.IVON(
        model.named_parameters(), **{"lr": 0.05, "ess": 1e4, "hess_init": 0.5, "betas": (0.9, 0.95), "compile": False, "weight_decay": 1e-3, **hyper}
    )


def rows_of(step: int, part: int, parts: int) -> Tensor:
    """The share of a part in the batch of a step."""
    batch = torch.arange(16) + 16 * (step % 3)
    return batch[part::parts]


def everything(model: nn.Module, optimizer: br.IVON) -> dict[str, Tensor]:
    """Parameters and state, whole."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def learn(
    forward: Callable[[Tensor], Tensor],
    optimizer: br.IVON,
    shares: Callable[[int], list[list[Tensor]]],
    steps: int = 6,
    scale: float = 1.0,
    clip: float | None = None,
) -> None:
    """Steps, each of some draws, each of some backward passes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for draw in shares(step):
            with optimizer.sampled_params(train=True):
                for rows in draw:
                    (forward(rows) * scale / len(draw)).backward()
        for p in params:
            if p.grad is not None:
                p.grad.div_(scale)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def one(parts: int, draws: int = 1, per_rank: bool = True, **hyper: Any) -> dict[str, Tensor]:
    """One process that does the work of several: draws of each, in the order of their numbers."""
    how = {name: hyper.pop(name) for name in ("steps", "scale", "clip") if name in hyper}
    model = Logistic()
    optimizer = ivon(model, **hyper)
    if per_rank:
        learn(model, optimizer, lambda step: [[rows_of(step, part, parts)] for _ in range(draws) for part in range(parts)], **how)
    else:
        learn(model, optimizer, lambda step: [[rows_of(step, part, parts) for part in range(parts)] for _ in range(draws)], **how)
    return everything(model, optimizer)


def ddp(draws: int = 1, wrapped: bool = True, **hyper: Any) -> dict[str, Tensor]:
    """One of several ranks."""
    how = {name: hyper.pop(name) for name in ("steps", "scale", "clip") if name in hyper}
    model = Logistic()
    optimizer = ivon(model, **hyper)
    rank, size = dist.get_rank(), dist.get_world_size()
    forward = DistributedDataParallel(model) if wrapped else model
    learn(forward, optimizer, lambda step: [[rows_of(step, rank, size)] for _ in range(draws)], **how)
    return everything(model, optimizer)


def sharded() -> Logistic:
    model = Logistic()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(draws: int = 1, **hyper: Any) -> dict[str, Tensor]:
    """One of several ranks that hold parts of the parameters."""
    how = {name: hyper.pop(name) for name in ("steps", "scale", "clip") if name in hyper}
    model = sharded()
    optimizer = ivon(model, **hyper)
    rank, size = dist.get_rank(), dist.get_world_size()
    learn(model, optimizer, lambda step: [[rows_of(step, rank, size)] for _ in range(draws)], **how)
    return everything(model, optimizer)
