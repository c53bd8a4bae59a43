"""What two processes say to each other: bytes over the loopback for a step, by the system's own count."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bayesrule
from benchmarks import child
from benchmarks.ledger import Settings, Table
from benchmarks.timing import spread

COUNTER = Path("/sys/class/net/lo/statistics/rx_bytes")
ADAMW = "AdamW"
STEPS, WIDTH = 20, 1000
CONTENDERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    ADAMW: lambda params: torch.optim.AdamW(params, lr=1e-3),
    "IVON, same noise": lambda params: bayesrule.IVON(params, 0.01, 1e5, compile=False),
    "IVON, noise per rank": lambda params: bayesrule.IVON(params, 0.01, 1e5, noise_per_rank=True, compile=False),
}


def _rank(rank: int, name: str, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))
    optimizer = CONTENDERS[name](model.parameters())
    before = 0
    for step in range(STEPS + 3):
        if step == 3:  # the first steps compare the ranks, and lay out buckets
            dist.barrier()
            before = int(COUNTER.read_text())
        if isinstance(optimizer, bayesrule.IVON):
            optimizer.train()
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
    dist.barrier()
    sent = int(COUNTER.read_text()) - before
    if rank == 0:
        Path(folder, "bytes").write_text(str(sent))
    dist.barrier()
    os._exit(0)


def traffic(name: str) -> float:
    """Bytes that arrive for a step and parameter, of both ranks together."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(name, folder), nprocs=2)
        count = sum(p.numel() for p in nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).parameters())
        return int(Path(folder, "bytes").read_text()) / STEPS / count


def tables(settings: Settings) -> list[Table]:
    if not COUNTER.exists():
        raise RuntimeError(f"{COUNTER} counts the bytes, and is not here: run on Linux")
    rounds = settings.rounds(5)
    found = {name: [child.call("processes:traffic", 1, name=name) for _ in range(rounds)] for name in CONTENDERS}
    figures = {}
    for name, each in found.items():
        ratios = [mine / theirs for mine, theirs in zip(each, found[ADAMW], strict=True)]
        figures[f"traffic: {name}"] = spread(ratios, min(each) / min(found[ADAMW]))
    rows = [(name, str(figures[f"traffic: {name}"]), f"{sorted(each)[len(each) // 2]:.3f}") for name, each in found.items()]
    note = f"DDP over gloo, two ranks, 2M parameters in 4 tensors, {STEPS} steps, {rounds} runs; everything on the loopback counts."
    return [Table("traffic of two processes", ("optimizer", "ratio to AdamW", "bytes a step and parameter"), rows, figures, note)]
