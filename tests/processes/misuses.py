"""What trains wrong on several ranks unless it is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tests.processes.sharding import sharded
from tests.processes.training import Logistic, ivon
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import bayesrule as br


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
