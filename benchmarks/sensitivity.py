"""What sensitivity to every training example costs, in training epochs over the same examples, and beside kronfluence."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.memory import highest, peak_since_reset
from benchmarks.models import mlp, resnet20
from benchmarks.prediction import timed
from benchmarks.rivals import kronfluence
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, spread, typical

EPOCH = "forward, backward, SGD step"
NEWTON, FIRST, LAYERS, SELF = (
    "scores, vjp_jvp, newton",
    "scores, vjp_jvp, first order",
    "scores, layerwise, newton",
    "self-influence",
)
BATCH = 128
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "MLP 0.86M": (mlp, lambda x: x, 512),
    "ResNet-20": (resnet20, as_cifar, 512),
}


def learned(workload: str, size: int) -> tuple[nn.Module, br.Posterior, list[tuple[Tensor, Tensor]]]:
    """A network, trained by IVON for two epochs over real digits, its posterior, and the digits in batches."""
    make, prepare, _ = WORKLOADS[workload]
    pixels, labels = digits()
    x, y = prepare(pixels[:size]), labels[:size]
    torch.manual_seed(0)
    model = make()
    optimizer = br.IVON(model.parameters(), lr=0.1, ess=size, hess_init=10.0, weight_decay=1e-3, betas=(0.9, 0.999))
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    for _ in range(2):
        for inputs, wanted in batches:
            with optimizer.sampled_params(train=True):
                F.cross_entropy(model(inputs), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
    posterior = optimizer.posterior(model, num_data=size)
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        torch.optim.swa_utils.update_bn([inputs for inputs, _ in batches], model)
    return model.eval(), posterior, batches


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own."""
    model, posterior, batches = learned(workload, WORKLOADS[workload][2])
    trained = deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)

    def epoch() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()

    def scores(**how: Any) -> Callable[[], object]:
        return lambda: br.Sensitivity(model, posterior, **how).scores(batches)

    rivals: dict[str, Callable[[], object]] = {
        EPOCH: epoch,
        NEWTON: scores(),
        FIRST: scores(correction="first_order"),
        LAYERS: scores(estimator="layerwise"),
        SELF: lambda: br.Sensitivity(model, posterior).self_scores(batches),
    }
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def peak(times: int) -> float:
    """In a process of its own: the peak of resident memory of scores of ResNet-20, over what stood before, in bytes.

    The same 512 digits come so many times: other batches may need other rounds of Newton's method, and so other temporaries.
    """
    model, posterior, batches = learned("ResNet-20", 512)
    br.Sensitivity(model, posterior).scores(batches[:1], subset=BATCH)
    before = peak_since_reset()
    br.Sensitivity(model, posterior).scores(batches * times)
    return highest() - before


OURS, FIT, THEIRS = "self-influence, ours", "kronfluence, factors", "kronfluence, self-influence"


def rivals(rounds: int, warmup: int, seconds: float) -> Laps | None:
    """In a process of its own: one perceptron, its self-influence by us and by kronfluence; None where that is not installed."""
    model, posterior, batches = learned("MLP 0.86M", 1024)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    theirs = kronfluence(model, x, y)
    if theirs is None:
        return None
    theirs.fit()  # scores are of factors
    runs = {
        OURS: lambda: br.Sensitivity(model, posterior).self_scores(batches),
        FIT: theirs.fit,
        THEIRS: theirs.score,
    }
    return interleave({name: timed(each) for name, each in runs.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(9), warmup=1, seconds=settings.seconds(120))
    for workload, (_, _, size) in WORKLOADS.items():
        neighbors = Neighbors()
        answer = child.call("sensitivity:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
        title = f"sensitivity, {workload}"
        figures = {f"{title}: {name}": ratio(each, laps[EPOCH]) for name, each in laps.items()}
        rows = [(n, str(figures[f"{title}: {n}"]), f"{typical(of).seconds:.4g}") for n, of in laps.items()]
        note = f"{size} digits, 10 classes, trained by IVON; {len(laps[EPOCH])} rounds; {neighbors.report()}"
        found.append(Table(title, ("work", "ratio to a training epoch", "s"), rows, figures, note))
    sizes = [512, 1024] if settings.quick else [1024, 4096]
    peaks = {size: child.call("sensitivity:peak", settings.threads, times=size // 512) for size in sizes}
    grown = (peaks[sizes[1]] - peaks[sizes[0]]) / (sizes[1] - sizes[0])
    figures = {"sensitivity, memory: KiB an example more": spread([max(grown, 0.0) / 1024], grown / 1024)}
    rows = [(str(size), f"{of / 2**20:.4g}") for size, of in peaks.items()]
    note = f"ResNet-20, vjp_jvp, newton, batches of {BATCH}: peak of a process over what stood before, 512 digits again and again"
    found.append(Table("sensitivity, memory", ("examples", "MiB"), rows, figures, note))
    neighbors = Neighbors()
    answer = child.call("sensitivity:rivals", settings.threads, **effort)
    title = "self-influence, MLP 0.86M, 1,024 digits"
    if answer is None:
        note = "kronfluence is not installed: pip install --no-deps kronfluence einconv einops opt_einsum"
        return [*found, Table(title, ("work", "ratio to ours", "s"), [], {}, note)]
    laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
    figures = {f"{title}: {name}": ratio(laps[name], laps[OURS]) for name in (FIT, THEIRS)}
    rows = [(n, str(figures.get(f"{title}: {n}", "1")), f"{typical(of).seconds:.4g}") for n, of in laps.items()]
    figures["self-influence: ours / kronfluence"] = ratio(laps[OURS], laps[THEIRS])
    found.append(Table(title, ("work", "ratio to ours", "s"), rows, figures, f"EK-FAC; {neighbors.report()}"))
    return found
