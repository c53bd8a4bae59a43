"""A prediction averaged over 64 draws of the weights, beside as many plain forwards."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule
from benchmarks import child
from benchmarks.contenders import CONTENDERS, PUBLISHED, Contender
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.models import mlp, resnet20
from benchmarks.targets import EAGER
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

DRAWS, TRAINING_STEPS = 64, 3
PLAIN, OURS = f"{DRAWS} plain forwards", f"bayesrule.predict, {DRAWS} draws"
WAYS: dict[str, dict[str, bool]] = {
    OURS: {},
    f"{OURS}, compiled": {"compile": True},
    f"{OURS}, antithetic": {"antithetic": True},
    f"{OURS}, antithetic, compiled": {"antithetic": True, "compile": True},
}

WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "ResNet-20, batch 16": (resnet20, as_cifar, 16),
    "MLP 0.86M, batch 32": (mlp, lambda x: x, 32),
}


def trained(contender: Contender, model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, object]:
    """A copy of a model after a few steps, in eval mode, and the optimizer that knows how sure it is."""
    model = deepcopy(model)
    optimizer = contender.make(list(model.parameters()))
    for _ in range(TRAINING_STEPS):
        with contender.draw(optimizer):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), optimizer


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: plain forwards, our prediction, and that of the published optimizer's documentation."""
    make, prepare, size = WORKLOADS[workload]
    pixels, labels = digits()
    x, y = prepare(pixels[:size]), labels[:size]
    model = make()
    model_a, optimizer_a = trained(CONTENDERS[EAGER], model, x, y)
    model_b, optimizer_b = trained(CONTENDERS[PUBLISHED], model, x, y)
    posterior = bayesrule.Posterior.from_optimizer(optimizer_a, model_a)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(DRAWS):
            model_a(x)

    def ours(how: dict[str, bool]) -> Callable[[], object]:
        return lambda: bayesrule.predict(model_a, posterior, x, method="mc", num_samples=DRAWS, **how)

    @torch.no_grad()
    def published() -> None:
        probs = []
        for _ in range(DRAWS):
            with optimizer_b.sampled_params():  # type: ignore[attr-defined]
                probs.append(model_b(x).softmax(dim=1))
        torch.stack(probs).mean(dim=0)

    rivals = {PLAIN: plain, **{name: ours(how) for name, how in WAYS.items()}, PUBLISHED: published}
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def timed(work: Callable[[], object]) -> Callable[[], Lap]:
    def lap() -> Lap:
        start = perf_counter()
        work()
        return Lap(perf_counter() - start)

    return lap


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(41), warmup=2, seconds=settings.seconds(40))
    for workload in WORKLOADS:
        neighbors = Neighbors()
        answer = child.call("prediction:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
        key, best = f"prediction, {workload}", f"prediction, {workload}, compiled"
        costs = {name: ratio(each, laps[PLAIN]) for name, each in laps.items()}
        rows = [(name, str(costs[name]), f"{typical(each).seconds * 1e3:.4g}") for name, each in laps.items()]
        note = f"{len(laps[PLAIN])} rounds; {neighbors.report()}"
        found.append(
            Table(key, ("way", f"ratio to {PLAIN}", "ms"), rows, {key: costs[OURS], best: costs[f"{OURS}, compiled"]}, note)
        )
    return found
