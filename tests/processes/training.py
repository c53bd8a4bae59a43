"""What ranks and the one process that does their work share: a model, its optimizer, batches and steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus

import bayesrule as br

EXAMPLES = 48
RESCALED: dict[str, Any] = dict(scale=1024.0, clip=0.05)


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
        model.named_parameters(),
        **{"lr": 0.05, "ess": 1e4, "hess_init": 0.5, "betas": (0.9, 0.95), "compile": False, "weight_decay": 1e-3, **hyper},
    )


def rows_of(step: int, part: int, parts: int, alike: bool = False) -> Tensor:
    """The share of a part in the batch of a step; in the first step, all parts may have the same."""
    batch = torch.arange(16) + 16 * (step % 3)
    return batch[0 if alike and step == 0 else part :: parts]


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
    unsynced: str | None = None,
) -> None:
    """Steps, each of some draws, each of some backward passes; of a DDP model some are not averaged over the ranks."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        draws = shares(step)
        for number, draw in enumerate(draws):
            quiet = {None: False, "all draws but the last": number < len(draws) - 1, "later steps": step > 0}[unsynced]
            with forward.no_sync() if quiet else nullcontext(), optimizer.sampled_params(train=True):
                for rows in draw:
                    (forward(rows) * scale / len(draw)).backward()
        for p in params:
            if p.grad is not None:
                p.grad.div_(scale)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def split(hyper: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Draws of a step, how to learn, and what is left for the optimizer."""
    how = {name: value for name, value in hyper.items() if name in ("steps", "scale", "clip", "unsynced")}
    rest = {name: value for name, value in hyper.items() if name not in (*how, "draws", "wrapped", "alike")}
    return hyper.get("draws", 1), how, rest


def one(parts: int, hyper: dict[str, Any], per_rank: bool = True) -> dict[str, Tensor]:
    """One process that does the work of several: draws of each, in the order of their numbers."""
    alike = hyper.get("alike", False)
    draws, how, hyper = split(hyper)
    how.pop("unsynced", None)
    model = Logistic()
    optimizer = ivon(model, **hyper)

    def shares(step: int) -> list[list[Tensor]]:
        rows = [rows_of(step, part, parts, alike) for part in range(parts)]
        return [[each] for _ in range(draws) for each in rows] if per_rank else [rows] * draws

    learn(model, optimizer, shares, **how)
    return everything(model, optimizer)
