"""What each rank does, and what one process does instead."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import bayesrule as br
from bayesrule.noise import TRAIN, CounterNoise
from bayesrule.optimizers.workers import Workers

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


def misused(case: str) -> None:
    """What trains wrong unless it is refused."""
    rank, model = dist.get_rank(), Logistic()
    hyper: dict[str, Any] = {}
    if case == "weights":
        with torch.no_grad():
            model.wide[0, 0] += 1e-6 * (rank == 1)
    elif case == "settings":
        hyper["lr"] = 0.1 * (1 + rank)
    elif case == "seeds":
        hyper["seed"] = rank
    elif case == "sharded later":
        optimizer = ivon(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif case == "noise per rank of a sharded model":
        model, hyper["noise_per_rank"] = sharded(), True
    elif case == "partly sharded":
        fully_shard(model.first, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        with torch.no_grad():
            model.x += rank
    elif case == "attached within a sharded model":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        ivon(model).attach(model.first)
    elif case == "attached after it was sharded":
        optimizer = ivon(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer.attach(model)
    elif case == "a scaler without a wrapper":
        optimizer, scaler = ivon(model), torch.amp.GradScaler("cpu")
        with optimizer.sampled_params(train=True):
            scaler.scale(model(torch.arange(16) + rank)).backward()
        scaler.step(optimizer)
        return
    elif case == "gradients by hand":
        optimizer = ivon(model, noise_per_rank=True)
        params = dict(model.named_parameters())
        with optimizer.sampled_params(train=True):
            found = torch.func.grad(lambda held: torch.func.functional_call(model, held, (torch.arange(16),)))(
                {name: p.detach() for name, p in params.items()}
            )
            for name, p in params.items():
                p.grad = found[name]
        optimizer.step()
        return
    elif case == "columns":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model.wide = nn.Parameter(distribute_tensor(model.wide.detach(), mesh, [Shard(1)]))
    elif case == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif case == "FSDP1 with original parameters":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif case == "weights of draws":
        optimizer = ivon(model, noise_per_rank=True)
        wrapped = DistributedDataParallel(model)
        with optimizer.sampled_params(train=True, weight=1.0 + 2 * rank):
            wrapped(torch.arange(16)).backward()
        optimizer.step()
        return
    if case == "ZeRO":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

        model = DistributedDataParallel(model)
        zero = ZeroRedundancyOptimizer(model.parameters(), br.IVON, lr=0.1, ess=100.0)
        model(torch.arange(16)).backward()
        zero.step()
        return
    if case != "sharded later":
        optimizer = ivon(model, **hyper)
    with optimizer.sampled_params(train=True):
        model(torch.arange(16)).backward()
    optimizer.step()


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
