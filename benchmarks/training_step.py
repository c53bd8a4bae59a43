"""The whole training step: forward, backward and optimizer, on real data, ready in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import child
from benchmarks.contenders import BASELINE, CONTENDERS, PUBLISHED, Contender
from benchmarks.data import as_cifar, digits, standard_library, windows
from benchmarks.ledger import Settings, Table
from benchmarks.models import CONTEXT, GPT, resnet20
from benchmarks.targets import COMPILED, EAGER
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

Batch = tuple[Tensor, Tensor]
ENTRANTS = (BASELINE, "AdamW (foreach)", "SGD, momentum (fused)", COMPILED, EAGER, PUBLISHED)


def text(batch: int) -> Iterator[Batch]:
    source = standard_library()
    return (windows(source, batch, CONTEXT, seed) for seed in count())


def images(batch: int) -> Iterator[Batch]:
    pixels, labels = digits()
    pixels = as_cifar(pixels)
    places = (torch.arange(start, start + batch) % len(labels) for start in count(0, batch))
    return ((pixels[place], labels[place]) for place in places)


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Iterator[Batch]], int]] = {
    "GPT 5.8M, 2048 tokens": (GPT, text, 8),
    "GPT 5.8M, 512 tokens": (GPT, text, 2),
    "ResNet-20, batch 128": (resnet20, images, 128),
}


class Trainer:
    """A model of its own, its optimizer, and the batches that all contenders see in the same order."""

    def __init__(self, contender: Contender, model: nn.Module, batches: Callable[[int], Batch]) -> None:
        self.contender, self.model, self.batches = contender, model, batches
        self.optimizer = contender.make(list(model.parameters()))
        self.steps = 0

    def __call__(self) -> Lap:
        x, y = self.batches(self.steps)
        self.steps += 1
        start = perf_counter()
        with self.contender.draw(self.optimizer):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
            loss.backward()
        self.optimizer.step()
        lap = Lap(perf_counter() - start)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of step {self.steps} is {loss.item()}: this was no training")
        return lap


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: all entrants train copies of one model on the same batches."""
    make, stream, size = WORKLOADS[workload]
    model, source = make(), stream(size)
    made: list[Batch] = []

    def batches(number: int) -> Batch:
        while len(made) <= number:
            made.append(next(source))
        return made[number]

    trainers = {name: Trainer(CONTENDERS[name], deepcopy(model), batches) for name in ENTRANTS}
    return interleave(trainers, rounds=rounds, warmup=warmup, seconds=seconds)


def tables(settings: Settings) -> list[Table]:
    found = []
    for workload in WORKLOADS:
        neighbors = Neighbors()
        effort: dict[str, Any] = dict(rounds=settings.rounds(41), warmup=3, seconds=settings.seconds(110))
        laps = child.call("training_step:race", settings.threads, workload=workload, **effort)
        key = f"training step, {workload}"
        found.append(table(key, {name: [Lap(*lap) for lap in each] for name, each in laps.items()}, neighbors.report()))
    return found


def table(key: str, laps: Laps, neighbors: str) -> Table:
    figures = {f"{key}: {name}": ratio(each, laps[BASELINE]) for name, each in laps.items()}
    rows = [(name, str(figures[f"{key}: {name}"]), f"{typical(each).seconds * 1e3:.4g}") for name, each in laps.items()]
    head = ("optimizer", "ratio to AdamW (fused)", "ms a step")
    return Table(key, head, rows, figures, f"{len(laps[BASELINE])} rounds; {neighbors}")
