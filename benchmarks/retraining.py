"""Adapted models beside models that were trained again, with a tenth of the past in memory: Adult, USPS, digits in five tasks."""

from __future__ import annotations

import gzip
import statistics
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br
from benchmarks import child
from benchmarks.leaving_out import sklearn_digits
from benchmarks.ledger import Settings, Table
from benchmarks.timing import Spread, spread

DATA = Path(__file__).parents[2] / "shared" / "data"
SHARE = 10
"""One example in so many is remembered."""
METHODS = ("posterior_correction", "kprior", "prior", "replay")


class Split(NamedTuple):
    """Examples to learn from and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def adult() -> Split:
    """Adult, 123 binary inputs, in LIBSVM's format."""
    parts: list[Tensor] = []
    for name in ("a7a.gz", "a7a_test.gz"):
        lines = gzip.decompress((DATA / "uci_adult" / name).read_bytes()).decode().splitlines()
        x, y = torch.zeros(len(lines), 123), torch.zeros(len(lines), dtype=torch.long)
        for row, line in enumerate(lines):
            label, *entries = line.split()
            y[row] = int(float(label) > 0)
            for entry in entries:
                x[row, int(entry.split(":")[0]) - 1] = 1
        parts += [x, y]
    return Split(*parts)


def usps() -> Split:
    """Handwritten digits of 16 x 16 pixels."""
    with np.load(DATA / "usps" / "usps_16x16.npz", allow_pickle=False) as file:
        found = {name: torch.tensor(file[name].astype("float32" if name.startswith("x") else "int64")) for name in file}
    return Split(found["x_train"] / 2000, found["y_train"], found["x_test"] / 2000, found["y_test"])


def digits() -> Split:
    """Small digits."""
    x, y = sklearn_digits(1797)
    return Split(x[:1200].float(), y[:1200], x[1200:].float(), y[1200:])


def network(inputs: int, hidden: int, classes: int) -> nn.Module:
    """A perceptron; without hidden units a linear model."""
    if not hidden:
        return nn.Sequential(nn.Linear(inputs, classes))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def train(model: nn.Module, x: Tensor, y: Tensor, delta: float, seed: int, epochs: int = 60) -> nn.Module:
    """By Adam, with the prior's precision delta over the sum of the losses."""
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.005), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            penalty = delta / 2 / len(x) * sum(p.square().sum() for p in model.parameters())
            (F.cross_entropy(model(x[rows]), y[rows]) + penalty).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def names(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (names(model, x) == y).double().mean().item()


def agreement(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    return 100 * (names(a, x) == names(b, x)).double().mean().item()


class Case(NamedTuple):
    """A change of some data."""

    data: Callable[[], Split]
    hidden: int
    delta: float
    change: str  # "add", "remove", "prior"
    chosen: Callable[[Tensor], Tensor]  # which examples are added or removed, by labels


def _tenth(y: Tensor) -> Tensor:
    return torch.arange(len(y)) % 10 == 0


CASES: dict[str, Case] = {
    "Adult, linear: add a tenth": Case(adult, 0, 5.0, "add", _tenth),
    "Adult, linear: remove a tenth": Case(adult, 0, 5.0, "remove", _tenth),
    "Adult, linear: prior of 50 becomes 5": Case(adult, 0, 50.0, "prior", _tenth),
    "USPS, 100 units: add class 9": Case(usps, 100, 1.0, "add", lambda y: y == 9),
    "USPS, 100 units: remove class 9": Case(usps, 100, 1.0, "remove", lambda y: y == 9),
    "USPS, 100 units: remove a tenth": Case(usps, 100, 1.0, "remove", _tenth),
    "USPS, 100 units: prior of 50 becomes 5": Case(usps, 100, 50.0, "prior", _tenth),
}


def compared(name: str, seed: int) -> dict[str, dict[str, float]]:
    """In a process of its own: test accuracy, and agreement with retraining on test data and on what was removed."""
    warnings.simplefilter("ignore")
    case = CASES[name]
    data = case.data()
    classes, x, y = int(data.y.max()) + 1, data.x, data.y
    chosen, stay = case.chosen(y), ~case.chosen(y)
    torch.manual_seed(seed)
    start = network(x.shape[1], case.hidden, classes)
    first = stay if case.change == "add" else torch.ones_like(stay)
    after = torch.ones_like(stay) if case.change in ("add", "prior") else stay
    delta = 5.0 if case.change == "prior" else case.delta
    base = train(deepcopy(start), x[first], y[first], case.delta, seed)
    again = train(deepcopy(start), x[after], y[after], delta, seed)
    old = list(zip(x[first].split(500), y[first].split(500), strict=True))
    posterior = br.Posterior.laplace(base, old, prior_precision=case.delta)
    memory = br.Memory.select(base, posterior, old, int(first.sum()) // SHARE, seed=seed)
    some = list(zip(x[chosen].split(500), y[chosen].split(500), strict=True))
    how: dict[str, Any] = {"add": {"add": some}, "remove": {"remove": some}, "prior": {"prior_precision": delta}}[case.change]

    def figures(model: nn.Module) -> dict[str, float]:
        found = {
            "accuracy": accuracy(model, data.test_x, data.test_y),
            "agreement": agreement(model, again, data.test_x),
        }
        return found | ({"removed": agreement(model, again, x[chosen])} if case.change == "remove" else {})

    found = {"retraining": figures(again), "nothing": figures(base)}
    for method in METHODS:
        model = deepcopy(base)
        try:
            br.adapt(model, posterior, memory=memory, method=method, seed=seed, **how)
        except (ValueError, RuntimeError) as error:
            print(f"{name}, {method}: {error}")
            continue
        found[method] = figures(model)
    if case.change == "remove":
        for method in ("deviation", "negation"):
            model = deepcopy(base)
            try:
                br.forget(model, posterior, some, method=method)
            except (ValueError, RuntimeError) as error:
                print(f"{name}, {method}: {error}")
                continue
            found[method] = figures(model)
    return found


def in_tasks(seed: int) -> dict[str, dict[str, float]]:
    """In a process of its own: digits, two classes at a time; mean accuracy over all tasks after the last."""
    warnings.simplefilter("ignore")
    data, delta = digits(), 1.0
    tasks = [[(data.x[data.y // 2 == task], data.y[data.y // 2 == task])] for task in range(5)]
    torch.manual_seed(seed)
    start = network(64, 50, 10)
    again = train(deepcopy(start), data.x, data.y, delta, seed)
    base = train(deepcopy(start), *tasks[0][0], delta, seed)

    def mean(model: nn.Module) -> dict[str, float]:
        of = [data.test_y // 2 == task for task in range(5)]
        return {"accuracy": statistics.mean(accuracy(model, data.test_x[rows], data.test_y[rows]) for rows in of)}

    found = {"retraining": mean(again)}
    for method in (*METHODS, "functional"):
        model = deepcopy(base)
        posterior = br.Posterior.laplace(model, tasks[0], prior_precision=delta)
        learner = br.ContinualLearner(model, posterior, len(data.x) // 5 // SHARE, method=method, seed=seed)
        learner.remember(tasks[0])
        for task in tasks[1:]:
            learner.fit(task)
        found[method] = mean(model)
    return found


def _mean(runs: list[Mapping[str, Mapping[str, float]]], method: str, figure: str) -> tuple[float, float] | None:
    values = [run[method][figure] for run in runs if figure in run.get(method, {})]
    return (statistics.mean(values), statistics.pstdev(values)) if values else None


def _table(title: str, runs: list[Mapping[str, Mapping[str, float]]], note: str) -> Table:
    methods = list(dict.fromkeys(method for run in runs for method in run))
    rows, figures = [], dict[str, Spread]()
    for method in methods:
        cells = [_mean(runs, method, figure) for figure in ("accuracy", "agreement", "removed")]
        rows.append((method, *("" if cell is None else f"{cell[0]:.2f} ± {cell[1]:.2f}" for cell in cells)))
    lost = [run["retraining"]["accuracy"] - run["posterior_correction"]["accuracy"] for run in runs]
    figures[f"points below retraining: {title}"] = spread(lost, min(lost))
    head = ("method", "accuracy, %", "names as retraining, %", "removed ones as retraining, %")
    return Table(title, head, rows, figures, note)


def tables(settings: Settings) -> list[Table]:
    seeds = range(1 if settings.quick else 3)
    found = []
    for name in CASES:
        runs = [child.call("retraining:compared", settings.threads, name=name, seed=seed) for seed in seeds]
        note = f"mean ± deviation over {len(seeds)} seeds; a tenth of the past in memory, at random; no setting was tuned"
        found.append(_table(name, runs, note))
    runs = [child.call("retraining:in_tasks", settings.threads, seed=seed) for seed in seeds]
    found.append(
        _table("digits in five tasks", runs, f"mean over tasks, {len(seeds)} seeds; 24 of 240 digits of each task in memory")
    )
    return found
