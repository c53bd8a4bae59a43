"""The optimizer's own work: everything between a backward and the next forward. For IVON: draw, restore, update."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

from benchmarks import child
from benchmarks.contenders import BASELINE, CONTENDERS, PUBLISHED, Contender, tensors
from benchmarks.ledger import Settings, Table
from benchmarks.models import gpt_shapes, resnet20_shapes
from benchmarks.targets import COMPILED, EAGER
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

KEEP_PAGES = {  # glibc's malloc then never gives memory back to the system, so that only first touches fault
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**29),
}
WARMUP = 8  # rounds until a heap that is never trimmed has grown to its size
LISTS: dict[str, Callable[[], Sequence[Sequence[int]]]] = {
    "10M in 76 tensors": lambda: gpt_shapes(368),
    "0.27M in 59 tensors": resnet20_shapes,
}


class Rival:
    """One step's work for given parameters and gradients; how the gradients get there is not counted."""

    def __init__(self, contender: Contender, params: Sequence[Tensor], gradients: Sequence[Tensor], draws: int = 1) -> None:
        self.contender, self.gradients = contender, gradients
        self.params = [p.requires_grad_() for p in params]
        self.draws = draws if contender.draws else 1
        self.optimizer = contender.make(self.params)

    def __call__(self) -> Lap:
        faults, seconds = _faults(), -perf_counter()
        for _ in range(self.draws):
            with self.contender.draw(self.optimizer):
                seconds += perf_counter()
                for p, g in zip(self.params, self.gradients, strict=True):
                    p.grad = g
                seconds -= perf_counter()
        self.optimizer.step()
        return Lap(seconds + perf_counter(), _faults() - faults)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def race(
    shapes: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    rounds: int,
    warmup: int,
    seconds: float,
    least: int = 5,
    draws: int = 1,
) -> Laps:
    """In a process of its own: some contenders on the same shapes."""
    rivals = {name: Rival(CONTENDERS[name], tensors(shapes), tensors(shapes, scale=0.01), draws) for name in names}
    return interleave(rivals, rounds=rounds, warmup=warmup, seconds=seconds, least=least)


def tables(settings: Settings) -> list[Table]:
    effort: dict[str, Any] = dict(rounds=settings.rounds(41), warmup=WARMUP, seconds=settings.seconds(70))
    found = []
    for title, shapes in LISTS.items():
        for allocator, env in (("default allocator", {}), ("allocator that keeps pages", KEEP_PAGES)):
            if env and not title.startswith("10M"):
                continue
            neighbors = Neighbors()
            laps = child.call("optimizer_step:race", settings.threads, env=env, shapes=shapes(), names=list(CONTENDERS), **effort)
            key = f"optimizer work, {title}, {allocator}"
            found.append(table(key, {name: [Lap(*lap) for lap in each] for name, each in laps.items()}, neighbors.report()))
    return found


def table(key: str, laps: Laps, neighbors: str) -> Table:
    base, published = laps[BASELINE], laps[PUBLISHED]
    rows, figures = [], {}
    for name, each in laps.items():
        cost = figures[f"{key}: {name}"] = ratio(each, base)
        usual = typical(each)
        gain = ratio(published, each)
        if name in (COMPILED, EAGER):
            figures[f"{key}: {name}, against the published"] = gain
        rows.append((name, str(cost), f"{usual.seconds * 1e3:.3g}", f"{usual.faults:,}", str(gain)))
    head = ("optimizer", "ratio to AdamW (fused)", "ms a step", "page faults a step", "times faster than the published IVON")
    return Table(key, head, rows, figures, f"{len(base)} rounds; {neighbors}")
