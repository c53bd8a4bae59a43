"""The exact variance of predictions, and what VOGN asks for, in units of one training epoch over the same examples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.estimators.per_example import Squares, inner_products, variances
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.memory import highest, peak_since_reset
from benchmarks.models import mlp, resnet20
from benchmarks.prediction import timed
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, spread, typical

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


STEP, VOGN = "SGD step", "VOGN step, attached"


def _steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """A plain step, and one of VOGN that layers tell the squares of the examples; batch norms in eval mode in both."""
    plain, ours = deepcopy(model).eval(), model.eval()
    sgd, vogn = torch.optim.SGD(plain.parameters(), 1e-3, momentum=0.9), br.VOGN(ours.parameters(), 1e-3, 1e5)

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()

    def learn() -> None:
        vogn.zero_grad()
        with vogn.sampled_params(train=True):
            F.cross_entropy(ours(x), y).backward()
        vogn.step()

    vogn.attach(ours)
    return {STEP: step, VOGN: learn}


def steps(rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: steps of ResNet-20."""
    pixels, labels = digits()
    rivals = _steps(resnet20(), as_cifar(pixels[:128]), labels[:128])
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def peak(name: str) -> float:
    """In a process of its own: the peak of resident memory of a step, over what stood before the first, in bytes."""
    pixels, labels = digits()
    x, y = as_cifar(pixels[:128]), labels[:128]
    small = _steps(resnet20(), x[:2], y[:2])[name]
    small()
    del small
    run = _steps(resnet20(), x, y)[name]
    before = peak_since_reset()
    for _ in range(3):
        run()
    return highest() - before


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
    neighbors = Neighbors()
    answer = child.call("per_example:steps", settings.threads, **effort)
    laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
    title = "VOGN, ResNet-20, 128 examples"
    figures = {f"{title}: time": ratio(laps[VOGN], laps[STEP])}
    peaks = {name: child.call("per_example:peak", settings.threads, name=name) for name in laps}
    figures[f"{title}: memory"] = spread([peaks[VOGN] / peaks[STEP]], peaks[VOGN] / peaks[STEP])
    rows = [(name, f"{typical(of).seconds * 1e3:.4g}", f"{peaks[name] / 2**20:.4g}") for name, of in laps.items()]
    note = f"{len(laps[STEP])} rounds; peak of a step over what stood before, one process each; {neighbors.report()}"
    found.append(Table(title, ("step", "ms", "MiB"), rows, figures, note))
    return found
