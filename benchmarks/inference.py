"""Posteriors beside scikit-learn's fits, small problems in one call beside a loop, and how the cost grows with the data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.image import imread, imsave

from benchmarks import child, plots, problems
from benchmarks.ledger import Settings, Table
from benchmarks.problems import BATCH, LOOP, OURS, SKLEARN
from benchmarks.targets import PAIRS
from benchmarks.timing import Lap, Laps, Neighbors, digits, interleave, ratio, spread, typical

REST = 0.05  # seconds before each lap: the threads of a library spin on for a while after its work is done

GAP = 48  # pixels between pictures


class Work(NamedTuple):
    """A problem of :mod:`benchmarks.problems` at one size."""

    maker: str
    about: str
    N: int
    D: int


WORKS = {
    "ridge": Work("ridge", "100 weights", 100_000, 100),
    "logistic regression": Work("logistic", "50 weights", 50_000, 50),
    "Gaussian process": Work("process", "classification in the plane, fixed kernel", 500, 2),
}
CURVES = {
    "logistic regression": (Work("logistic", "20 weights", 0, 20), (1_000, 3_000, 10_000, 30_000, 100_000)),
    "Gaussian process": (Work("process", "classification in the plane, fixed kernel", 0, 2), (50, 100, 200, 400, 800)),
}


def race(maker: str, arguments: Mapping[str, Any], *, rounds: int, warmup: int, seconds: float, least: int = 5) -> Laps:
    """In a process of its own: the contenders at one problem."""
    rivals = {name: rested(each) for name, each in getattr(problems, maker)(**arguments).items()}
    return interleave(rivals, rounds=rounds, warmup=warmup, seconds=seconds, least=least)


def rested(work: Callable[[], object]) -> Callable[[], Lap]:
    def lap() -> Lap:
        time.sleep(REST)
        start = time.perf_counter()
        work()
        return Lap(time.perf_counter() - start)

    return lap


def measure(settings: Settings, task: str, **arguments: Any) -> Any:
    """What a function finds there, with as many threads for numpy's and scipy's algebra as for torch's."""
    env = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(settings.threads))
    return child.call(task, settings.threads, env=env, **arguments)


def measured_laps(settings: Settings, maker: str, usual: float, least: int = 5, **arguments: Any) -> Laps:
    effort = dict(rounds=settings.rounds(41), warmup=2, seconds=settings.seconds(usual), least=least)
    answer = measure(settings, "inference:race", maker=maker, arguments=arguments, **effort)
    return {name: [Lap(*lap) for lap in each] for name, each in answer.items()}


def tables(settings: Settings) -> list[Table]:
    duels = [duel(settings, name, work) for name, work in WORKS.items()]
    return [*duels, batches(settings), *growth(settings)]


def duel(settings: Settings, name: str, work: Work) -> Table:
    """One problem, all contenders."""
    neighbors = Neighbors()
    N = work.N // 10 if settings.quick else work.N
    laps = measured_laps(settings, work.maker, 40, N=N, D=work.D)
    costs = {who: ratio(each, laps[SKLEARN]) for who, each in laps.items()}
    figures, error = {f"inference, {name}": costs[OURS]}, ""
    if name == "logistic regression":
        found = measure(settings, "problems:logistic_error", N=N, D=work.D)
        worst = max(found[OURS], found["bound"]) * 1e6
        figures[f"inference, {name}, error"] = spread([worst], worst)
        far = ", ".join(f"{who} {value:.1e}" for who, value in found.items() if who != "bound")
        error = f"Largest error of a weight: {far}; of the bound {found['bound']:.1e} of itself. "
    if name == "Gaussian process":
        found = measure(settings, "problems:process_error", N=N, D=work.D)
        far = ", ".join(f"{who} {value:.1e}" for who, value in found.items() if who != "bound")
        error = f"Largest error of a function value: {far}; of the bound {found['bound']:.1e} of itself. "
    rows = [(who, str(costs[who]), f"{typical(each).seconds * 1e3:.4g}") for who, each in laps.items()]
    about = f"{N:,} examples, {work.about}, float64, scikit-learn {version('scikit-learn')}"
    note = f"{about}. {error}{len(laps[SKLEARN])} rounds; {neighbors.report()}"
    return Table(f"inference, {name}", ("fit", f"ratio to {SKLEARN}", "ms"), rows, figures, note)


def batches(settings: Settings) -> Table:
    """Many small conjugate problems."""
    neighbors, count = Neighbors(), 100 if settings.quick else 1_000
    rows, figures = [], {}
    for pair in PAIRS:
        laps = measured_laps(settings, "conjugate", 30, pair=pair, problems=count)
        gain = figures[f"inference, conjugate, {pair}"] = ratio(laps[LOOP], laps[BATCH])
        rows.append((pair, *(f"{typical(laps[way]).seconds * 1e3:.4g}" for way in (LOOP, BATCH)), str(gain)))
    head = ("prior, likelihood", f"{LOOP}: ms", f"{BATCH}: ms", "times faster")
    note = f"{count:,} problems of {problems.COUNTS} observations, float64. {neighbors.report()}"
    return Table("inference, conjugate updates", head, rows, figures, note)


def growth(settings: Settings) -> list[Table]:
    """Time to fit over the number of examples: a table for each model, one picture for all."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        pieces = []
        for name, (work, sizes) in CURVES.items():
            neighbors = Neighbors()
            rows, lines = [], {}
            for N in sizes[:3] if settings.quick else sizes:
                laps = measured_laps(settings, work.maker, 10, least=3, N=N, D=work.D)
                for who, each in laps.items():
                    lines.setdefault(who, plots.Line()).add(N, [lap.seconds * 1e3 for lap in each])
                others = [who for who in laps if who != SKLEARN]
                costs = (digits(ratio(laps[who], laps[SKLEARN]).median) for who in others)
                rows.append((f"{N:,}", f"{typical(laps[SKLEARN]).seconds * 1e3:.3g}", *costs))
            head = ("examples", f"{SKLEARN}: ms", *(f"{who}: ratio" for who in others))
            found.append(Table(f"growth of inference, {name}", head, rows, {}, f"{work.about}. {neighbors.report()}"))
            pieces.append(Path(folder) / f"{work.maker}.png")
            title, y = f"{name[0].upper()}{name[1:]} ({work.about})", "ms a fit, median and quartiles"
            plots.draw(pieces[-1], title=title, x="examples", y=y, lines=lines)
        stack(pieces, settings.plots / "growth_inference.png")
    return found


def stack(pieces: Sequence[Path], path: Path) -> None:
    """Pictures of equal width below one another."""
    images = [np.pad(imread(piece), ((0, GAP), (0, 0), (0, 0)), constant_values=1.0) for piece in pieces]
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.concatenate(images), metadata={"Software": None})
