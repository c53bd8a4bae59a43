"""Ranks that each hold parts of the model: what each does, and what one process does instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.processes.training import Logistic, everything, ivon, learn, rows_of, split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import bayesrule as br


def sharded() -> Logistic:
    model = Logistic()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(hyper: dict[str, Any]) -> dict[str, Tensor]:
    """One of several ranks that hold parts of the parameters."""
    draws, how, hyper = split(hyper)
    model = sharded()
    optimizer = ivon(model, **hyper)
    rank, size = dist.get_rank(), dist.get_world_size()
    learn(model, optimizer, lambda step: [[rows_of(step, rank, size)] for _ in range(draws)], **how)
    return everything(model, optimizer)


def saved_in_parts(folder: str, save: bool) -> None:
    """Each rank saves and loads what it has, in a file of its own."""
    model = sharded()
    optimizer = ivon(model)
    path = Path(folder) / f"{min(dist.get_rank(), 1)}.state"
    if save:
        learn(model, optimizer, lambda step: [[rows_of(step, dist.get_rank(), dist.get_world_size())]], 1)
        state = optimizer.state_dict()
        state["state"] = {
            i: {k: t.to_local() if isinstance(t, DTensor) else t for k, t in s.items()} for i, s in state["state"].items()
        }
        torch.save(state, path)
    else:
        optimizer.load_state_dict(torch.load(path, weights_only=True))


def checkpointed(folder: str, steps: int, save: bool) -> dict[str, Tensor]:
    """Sharded training that saves by torch.distributed.checkpoint, or goes on from what was saved."""
    model = sharded()
    optimizer = ivon(model)
    if not save:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    learn(model, optimizer, lambda step: [[rows_of(step, dist.get_rank(), dist.get_world_size())]], steps)
    if save:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=folder)
    return everything(model, optimizer)


def sharded_after_looks(look: bool, reshard: bool | int | None = None) -> Tensor:
    """The losses of a sharded model in training and evaluation, with more evaluations in between or without."""
    model = Logistic()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = ivon(model)
    losses = []
    for _ in range(3):
        if look:
            with torch.no_grad():
                model.eval()(torch.arange(16))
        with optimizer.sampled_params(train=True):
            loss = model.train()(torch.arange(16))
            loss.backward()
        if look:
            with torch.no_grad():
                model.eval()(torch.arange(16))
        optimizer.step()
        with torch.no_grad():
            losses += [loss.detach(), model.eval()(torch.arange(16))]
    optimizer.posterior(model)
    return torch.stack(losses)


def climbing(model: nn.Module, shares: Callable[[int], list[Tensor]], forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    optimizer = br.SAM(model.parameters(), 0.05, rho=0.1, compile=False)
    for step in range(3):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            for rows in shares(step):
                (forward(rows) / len(shares(step))).backward()

        optimizer.step(closure)
    return everything(model, optimizer)


def climbing_replicated() -> dict[str, Tensor]:
    """SAM on four ranks of which two hold the same parts."""
    model = Logistic()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return climbing(model, lambda step: [rows_of(step, dist.get_rank(), 4)], model)


def two_jobs() -> list[int]:
    """Two sharded models on two ranks each, left alone; a gradient of the second is not finite, and it makes more steps."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("job", "shard"))["shard"]
    model = Logistic()
    fully_shard(model, mesh=mesh)
    optimizer = ivon(model, sync=False)
    for step in range(3 if rank < 2 else 5):
        with optimizer.sampled_params(train=True):
            model(torch.arange(16)).backward()
            if step == 1 and rank == 3:
                model.wide.grad.to_local()[-1, -1] = float("nan")
        optimizer.step()
    return [int(optimizer.state[model.wide]["step"]), optimizer.dropped_draws]


def stale(added: bool) -> int:
    """A sharded model with gradients from before the draw, cleared before the draw's own come, or added to."""
    model = sharded()
    optimizer = ivon(model)
    model(torch.arange(16)).backward()
    with optimizer.sampled_params(train=True):
        loss = model(torch.arange(16))
        if not added:
            optimizer.zero_grad()  # the model itself would clear those that it has gathered
        loss.backward()
    optimizer.step()
    return int(optimizer.state[model.wide]["step"])


def sharded_nans() -> list[int]:
    """A gradient that is not finite in one part of one rank."""
    model = sharded()
    optimizer = ivon(model)
    for step in range(3):
        with optimizer.sampled_params(train=True):
            model(torch.arange(16)).backward()
            if step == 1 and dist.get_rank() == 1:
                model.wide.grad.to_local()[-1, -1] = float("nan")
        optimizer.step()
    return [optimizer.dropped_draws, *(int(optimizer.state[p]["step"]) for p in model.parameters())]


def partly_sharded_later() -> list[str]:
    """Warnings of an optimizer that was made before one layer was sharded."""
    model = Logistic()
    optimizer = ivon(model)
    fully_shard(model.first, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(101):
            with optimizer.sampled_params(train=True):
                model(torch.arange(4)).backward()
            optimizer.step()
    return [str(warning.message) for warning in caught]


def gathered_in_bfloat16() -> list[str]:
    """Warnings of a model that computes with samples rounded to the nearest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 1))
    fully_shard(model[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    fully_shard(model)
    optimizer = ivon(model, ess=1e8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with optimizer.sampled_params(train=True):
            model(torch.ones(4, 30)).square().mean().backward()
        optimizer.step()
    visible = optimizer.noise_visibility()
    assert visible["0.weight"] < 0.5 and visible.get("1.weight", 1.0) == 1.0  # whose one row lies on the first rank
    return [str(warning.message) for warning in caught]


def replicated(drifts: str) -> list[int]:
    """Four ranks of which two hold the same parts, one of whom goes astray: the step that notices."""
    model = Logistic()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    optimizer = ivon(model)
    for step in range(1, 9):
        if step == 3 and dist.get_rank() == 3:
            held = {"state": optimizer.state[model.wide]["hess"], "weights": model.wide.detach()}[drifts]
            held.to_local()[0, 0] += 1e-3
        with optimizer.sampled_params(train=True):
            model(torch.arange(4)).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "the sharded parameters or their state of rank" in str(error), error
            return [step]
    return [0]
