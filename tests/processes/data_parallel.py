"""Ranks that each hold the whole model: what each does, and what one process does instead."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tests.processes.training import RESCALED, Logistic, everything, ivon, learn, rows_of, split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bayesrule as br
from bayesrule.noise import TRAIN, CounterNoise
from bayesrule.optimizers.workers import Workers


def ddp(hyper: dict[str, Any]) -> dict[str, Tensor]:
    """One of several ranks."""
    wrapped, alike = hyper.get("wrapped", True), hyper.get("alike", False)
    draws, how, hyper = split(hyper)
    model = Logistic()
    optimizer = ivon(model, **hyper)
    rank, size = dist.get_rank(), dist.get_world_size()
    forward = DistributedDataParallel(model) if wrapped else model
    learn(forward, optimizer, lambda step: [[rows_of(step, rank, size, alike)] for _ in range(draws)], **how)
    return everything(model, optimizer)


def trapped() -> dict[str, Tensor]:
    """Noise per rank without listening to the gradient of the rank."""
    with mock.patch.object(Workers, "listens", False):
        return ddp(dict(noise_per_rank=True, sync="auto"))


def some_without_noise(hyper: dict[str, Any], rank_of: int | None) -> dict[str, Tensor]:
    """The first layer without noise: as one of several ranks, or as one process with a draw of each."""
    model, size = Logistic(), 2
    still = {"params": list(model.first.parameters()), "noise_scale": 0}
    rest = {"params": [model.wide, *model.second.parameters()]}
    optimizer = br.IVON([still, rest], lr=0.05, ess=1e4, hess_init=0.5, betas=(0.9, 0.95), compile=False, **hyper)
    forward = model if rank_of is None else DistributedDataParallel(model)
    parts = range(size) if rank_of is None else [rank_of]
    learn(forward, optimizer, lambda step: [[rows_of(step, part, size)] for part in parts], 4, **RESCALED)
    return everything(model, optimizer)


def some_without_noise_here(hyper: dict[str, Any]) -> dict[str, Tensor]:
    return some_without_noise(dict(noise_per_rank=True, **hyper), dist.get_rank())


def cancelling(ranks: int | None = None) -> dict[str, Tensor]:
    """Gradients of ranks that cancel in their mean but for 1e-6; of as many draws in one process with `ranks`."""
    w = nn.Parameter(torch.tensor([0.3]))
    model = nn.ParameterDict({"w": w})
    optimizer = br.IVON([w], 0.01, 100.0, betas=(0.9, 0.5), compile=False, noise_per_rank=ranks is None)
    size = dist.get_world_size() if ranks is None else ranks
    for part in [dist.get_rank()] if ranks is None else range(ranks):
        with optimizer.sampled_params(train=True):
            (w * ((1.0 if part else -1.0) + 1e-6 * part)).sum().backward()
        if ranks is None:
            dist.all_reduce(w.grad)
            w.grad /= size
    optimizer.step()
    return everything(model, optimizer)


def mended() -> list[int]:
    """A gradient that is not finite on one rank, and whose mean is mended before the step."""
    model = Logistic()
    optimizer = ivon(model, noise_per_rank=True)
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        with optimizer.sampled_params(train=True):
            loss = wrapped(rows_of(step, dist.get_rank(), 2))
            (loss + (model.wide[0, 0] * float("inf") if step == 1 and dist.get_rank() == 1 else 0)).backward()
        for p in model.parameters():
            torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
        optimizer.step()
    finite = all(bool(t.isfinite().all()) for t in everything(model, optimizer).values())
    return [int(optimizer.state[model.wide]["step"]), optimizer.dropped_draws, int(finite)]


def uneven(
    draws: tuple[int, ...], weights: tuple[float, ...] = (1.0, 1.0), nan: int | None = None, scale: float = 1.0, **hyper: Any
) -> dict[str, Tensor]:
    """A model without a wrapper: each rank has draws of its own number and weight, and one may have a NaN in its gradient."""
    model = Logistic()
    optimizer = ivon(model, noise_per_rank=True, **hyper)
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(3):
        for _ in range(draws[rank]):
            with optimizer.sampled_params(train=True, weight=weights[rank]):
                (model(rows_of(step, rank, size)) * scale).backward()
                if rank == nan:
                    model.wide.grad[0, 0] = float("nan")
        for p in model.parameters() if draws[rank] else ():
            p.grad.div_(scale)
        optimizer.step()
    return everything(model, optimizer)


def uneven_alone(
    draws: tuple[int, ...], weights: tuple[float, ...] = (1.0, 1.0), without: int | None = None, **hyper: Any
) -> dict[str, Tensor]:
    """What one process makes of the same draws, each with the noise of its number among the draws of all ranks."""
    model, size = Logistic(), len(draws)
    normals: dict[Tensor, Tensor] = {}
    optimizer = ivon(model, **hyper, noise=lambda p: normals[p])
    for step in range(3):
        for draw in range(max(draws)):
            for rank in range(size):
                if draw < draws[rank] and rank != without:
                    noise = CounterNoise(0, TRAIN, step, draw * size + rank)
                    normals.update(zip(model.parameters(), noise.normal(br.Vector(list(model.parameters()))), strict=True))
                    with optimizer.sampled_params(train=True, weight=weights[rank]):
                        model(rows_of(step, rank, size)).backward()
        optimizer.step()
    return everything(model, optimizer)


def lost(where: str) -> list[int]:
    """A model without a wrapper, in whose second step a gradient is not finite: steps, dropped draws, and what is not finite."""
    model = Logistic()
    optimizer = ivon(model, noise_per_rank=where == "after the draws of one rank")
    rank = dist.get_rank()
    for step in range(3):
        for _ in range(2 if where == "after the draws of one rank" else 1):
            with optimizer.sampled_params(train=True):
                loss = model(rows_of(step, rank, dist.get_world_size()))
                (loss * (float("nan") if where == "in the draws of all" and step == 1 else 1)).backward()
        if where == "in the draws of all":
            optimizer.zero_grad()
            if step != 1:  # nothing waits in p.grad any more
                assert model.wide.grad is None
        elif step == 1 and rank == 1:
            model.wide.grad[0, 0] = float("nan")
        optimizer.step()
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return [int(optimizer.state[model.wide]["step"]), optimizer.dropped_draws, int(finite)]


def drifting(when: int) -> list[int]:
    """A rank that goes astray before a step: the number of the step that notices."""
    model = Logistic()
    optimizer = ivon(model)
    wrapped = DistributedDataParallel(model)
    for step in range(1, 210):
        if step == when and dist.get_rank() == 1:
            optimizer.state[model.wide]["hess"][3, 3] *= 1.001
        with optimizer.sampled_params(train=True):
            wrapped(torch.arange(4)).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "rank 1" in str(error)
            return [step]
    return [0]


def apart() -> list[float]:
    """Independent processes."""
    model = Logistic()
    optimizer = ivon(model, sync=False, lr=0.01 * (1 + dist.get_rank()))
    for _ in range(2 + dist.get_rank()):
        with optimizer.sampled_params(train=True):
            model(torch.arange(16)).backward()
        optimizer.step()
    return [float(optimizer.state[model.wide]["step"])]


def resumed(folder: str, steps: int, dies: int | None = None, go_on: bool = False) -> dict[str, Tensor]:
    """Training that saves after every second step; one rank may be killed at a step, with the other in the midst of it."""
    model = Logistic()
    optimizer = ivon(model, noise_per_rank=True)
    wrapped = DistributedDataParallel(model)
    path, first = Path(folder) / "last.pt", 0
    if go_on:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first, steps):
        if step == dies and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with optimizer.sampled_params(train=True):
            wrapped(rows_of(step, dist.get_rank(), dist.get_world_size())).backward()
        optimizer.step()
        if step % 2 and dist.get_rank() == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
    return everything(model, optimizer)
