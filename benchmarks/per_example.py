"""The exact variance of predictions, and what VOGN asks for, in units of one training epoch over the same examples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesrule.estimators.per_example import Squares, inner_products, variances
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.models import mlp, resnet20
from benchmarks.prediction import timed
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

EPOCH, ALL, ONE = "forward, backward, SGD step", "variances of all 10 outputs", "variance of one output"
INNER, SQUARES = "inner products", "forward, backward, squares"
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "MLP 0.86M, 1,000 examples": (mlp, lambda x: x, 1000),
    "ResNet-20, 128 examples": (resnet20, as_cifar, 128),
}


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: an epoch of one batch, and what is asked of its examples."""
    make, prepare, size = WORKLOADS[workload]
    pixels, labels = digits()
    x, y = prepare(pixels[:size]), labels[:size]
    model = make()
    trained = deepcopy(model)
    model.eval()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    weights = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    squares = Squares(model)

    def epoch() -> None:
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()

    def recorded() -> None:
        model.zero_grad()
        squares.clear()
        with squares.recording():
            F.cross_entropy(model(x), y).backward()

    rivals: dict[str, Callable[[], object]] = {
        EPOCH: epoch,
        ALL: lambda: variances(model, lambda: model(x), weights),
        ONE: lambda: variances(model, lambda: model(x)[:, 0], weights),
        INNER: lambda: inner_products(model, lambda: F.cross_entropy(model(x), y, reduction="none"), weights),
        SQUARES: recorded,
    }
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(31), warmup=2, seconds=settings.seconds(90))
    for workload in WORKLOADS:
        neighbors = Neighbors()
        answer = child.call("per_example:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
        figures = {f"per example, {workload}: {name}": ratio(each, laps[EPOCH]) for name, each in laps.items()}
        rows = [(n, str(figures[f"per example, {workload}: {n}"]), f"{typical(of).seconds * 1e3:.4g}") for n, of in laps.items()]
        note = f"{len(laps[EPOCH])} rounds; {neighbors.report()}"
        found.append(Table(f"per example, {workload}", ("work", "ratio to a training epoch", "ms"), rows, figures, note))
    return found
