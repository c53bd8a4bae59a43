"""What an adaptation costs, in plain training steps on as many examples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.nn import functional as F

import bayesrule as br
from benchmarks import child
from benchmarks.ledger import Settings, Table
from benchmarks.prediction import timed
from benchmarks.sensitivity import WORKLOADS, learned
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

PLAIN, EPOCHS, BATCH = "forward, backward, Adam step", 5, 64
WAYS = ("posterior_correction", "kprior", "prior", "replay")


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: 128 digits are added to what was learned of 128 others, which are all in memory."""
    model, posterior, batches = learned(workload, 256)
    old, new = batches[:1], batches[1:]
    memory = br.Memory.of(*(torch.cat(each) for each in zip(*old, strict=True)), torch.zeros(128, 10)).refresh(model)
    every = tuple(torch.cat(each) for each in zip(*batches, strict=True))
    plain = deepcopy(model)

    def train(examples: tuple[torch.Tensor, ...]) -> None:
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-5)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(examples[0])).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(plain(examples[0][rows]), examples[1][rows]).backward()
                optimizer.step()

    def adapted(method: str) -> Callable[[], object]:
        return lambda: br.adapt(model, posterior, memory=memory, add=new, method=method, epochs=EPOCHS, lr=1e-5)

    rivals: dict[str, Callable[[], object]] = {PLAIN: lambda: train(every), **{way: adapted(way) for way in WAYS}}
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(7), warmup=1, seconds=settings.seconds(90))
    for workload in WORKLOADS:
        neighbors = Neighbors()
        answer = child.call("adaptation:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
        title = f"adaptation, {workload}"
        figures = {f"{title}: {name}": ratio(laps[name], laps[PLAIN]) for name in WAYS}
        rows = [(name, str(figures.get(f"{title}: {name}", "1")), f"{typical(of).seconds:.4g}") for name, of in laps.items()]
        note = (
            f"{EPOCHS} epochs over 128 digits that are added and 128 in memory, batches of {BATCH}, with all that comes before "
            f"and after; beside as many plain steps on all 256 (prior: half as many steps); {len(laps[PLAIN])} rounds; "
            f"{neighbors.report()}"
        )
        found.append(Table(title, ("work", "ratio to plain steps", "s"), rows, figures, note))
    return found
