"""What a step of an adaptation costs, beside a plain training step on as many examples; and what comes before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.nn import functional as F

import bayesrule as br
from bayesrule.estimators.output_losses import output_loss
from bayesrule.uses.adaptation.objectives import METHODS, Losses, Objective
from bayesrule.uses.adaptation.past import of_the_past
from benchmarks import child
from benchmarks.ledger import Settings, Table
from benchmarks.prediction import timed
from benchmarks.sensitivity import WORKLOADS, learned
from benchmarks.timing import Lap, Neighbors, interleave, ratio, typical

PLAIN, BATCH, SIZE = "forward, backward, Adam step", 64, 128
WAYS = ("posterior_correction", "kprior", "replay")


def race(workload: str, rounds: int, warmup: int, seconds: float) -> dict[str, Any]:
    """In a process of its own: digits are added to what was learned of as many others, which are all in memory."""
    model, posterior, batches = learned(workload, 2 * SIZE)
    loss, (old, new) = output_loss("cross_entropy"), (batches[0], batches[1])
    memory = br.Memory.of(*old, torch.zeros(SIZE, 10)).refresh(model)
    every = tuple(torch.cat(each) for each in zip(old, new, strict=True))

    def plain() -> Callable[[], object]:
        own = deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-6)

        def step() -> None:
            rows = torch.randperm(2 * SIZE)[:BATCH]
            optimizer.zero_grad()
            F.cross_entropy(own(every[0][rows]), every[1][rows]).backward()
            optimizer.step()

        return step

    def adapting(method: str) -> Callable[[], object]:
        own, how = deepcopy(model), METHODS[method]
        past = of_the_past(own, posterior, loss, memory, None, how.memory)
        losses = Losses.joined([*past.losses, Losses(loss, *new, torch.ones(SIZE))])
        objective = Objective(own, how.pull(past.known), losses, past.whole, 2.0 * SIZE)
        optimizer = br.Adam(objective.params, lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            objective.backward(torch.randperm(2 * SIZE)[:BATCH])
            optimizer.step()

        return step

    rivals = {PLAIN: plain(), **{way: adapting(way) for way in WAYS}}
    laps = interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)
    began = time.perf_counter()
    br.adapt(model, posterior, memory=memory, add=[new], epochs=1, lr=1e-6)
    return {"laps": laps, "whole": time.perf_counter() - began}


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(30), warmup=3, seconds=settings.seconds(120))
    for workload in WORKLOADS:
        neighbors = Neighbors()
        answer = child.call("adaptation:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer["laps"].items()}
        title, steps = f"adaptation, {workload}", 2 * SIZE // BATCH
        figures = {f"{title}: {name}": ratio(laps[name], laps[PLAIN]) for name in WAYS}
        rows = [(name, str(figures.get(f"{title}: {name}", "1")), f"{typical(of).seconds:.4g}") for name, of in laps.items()]
        beside = answer["whole"] / typical(laps[PLAIN]).seconds / steps - figures[f"{title}: {WAYS[0]}"].median
        note = (
            f"steps on {BATCH} of {2 * SIZE} digits, half of them in memory; {len(laps[PLAIN])} rounds; the curvature before and "
            f"after takes as long as {beside:.0f} epochs of plain steps on all of them; {neighbors.report()}"
        )
        found.append(Table(title, ("step", "ratio to a plain step", "s"), rows, figures, note))
    return found
