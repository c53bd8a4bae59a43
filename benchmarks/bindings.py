"""What the bindings cost beside the context: the same steps of the same optimizer, opened and closed by others."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule
from benchmarks import child
from benchmarks.contenders import BETA1, BETA2, ESS, HESS_INIT, LR, WEIGHT_DECAY
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.models import resnet20
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

CONTEXT = "context"


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, batch 32": (resnet20, 32),
    "perceptron 0.64M, batch 32": (perceptron, 32),
}


class Trainer:
    """A model of its own and its optimizer, trained through one binding."""

    def __init__(self, binding: str, model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.step = getattr(self, binding.replace(" ", "_"))
        self.model, self.batches, self.numbers = model, batches, count()
        self.optimizer = bayesrule.IVON(
            model.parameters(), LR, ESS, hess_init=HESS_INIT, weight_decay=WEIGHT_DECAY, betas=(BETA1, BETA2), compile=False
        )
        if binding == "attach":
            self.optimizer.attach(model)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def context(self, x: Tensor, y: Tensor) -> None:
        with self.optimizer.sampled_params(train=True):
            self.loss(x, y)
        self.optimizer.step()

    def closure(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.step(lambda: self.loss(x, y))

    def train_and_step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.train()
        self.loss(x, y)
        self.optimizer.step()

    def attach(self, x: Tensor, y: Tensor) -> None:
        self.loss(x, y)
        self.optimizer.step()

    def __call__(self) -> Lap:
        x, y = self.batches(next(self.numbers))
        start = perf_counter()
        self.step(x, y)
        return Lap(perf_counter() - start)


BINDINGS = (CONTEXT, "closure", "train and step", "attach")


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: all bindings train copies of one model on the same batches, and end with the same weights."""
    make, size = WORKLOADS[workload]
    model, (pixels, labels) = make(), digits()
    pixels = as_cifar(pixels)

    def batches(number: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(number * size, (number + 1) * size) % len(labels)
        return pixels[rows], labels[rows]

    trainers = {name: Trainer(name, deepcopy(model), batches) for name in BINDINGS}
    laps = interleave(trainers, rounds=rounds, warmup=warmup, seconds=seconds)
    weights = [torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]) for trainer in trainers.values()]
    if not all(torch.equal(each, weights[0]) for each in weights):
        raise RuntimeError("the bindings trained different weights")
    return laps


def tables(settings: Settings) -> list[Table]:
    found = []
    for workload in WORKLOADS:
        neighbors = Neighbors()
        effort: dict[str, Any] = dict(rounds=settings.rounds(301), warmup=5, seconds=settings.seconds(90))
        laps = child.call("bindings:race", settings.threads, workload=workload, **effort)
        each = {name: [Lap(*lap) for lap in of] for name, of in laps.items()}
        figures = {f"binding, {workload}: {name}": ratio(of, each[CONTEXT]) for name, of in each.items()}
        rows = [(n, str(figures[f"binding, {workload}: {n}"]), f"{typical(of).seconds * 1e3:.4g}") for n, of in each.items()]
        note = f"{len(each[CONTEXT])} rounds; all end with bit-equal weights; {neighbors.report()}"
        found.append(Table(f"bindings, {workload}", ("binding", "ratio to the context", "ms a step"), rows, figures, note))
    return found
