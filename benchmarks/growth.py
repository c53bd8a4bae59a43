"""How the optimizer's own work grows: with parameters, with the number of tensors, with draws. One process a point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import child, plots
from benchmarks.contenders import BASELINE, PUBLISHED
from benchmarks.ledger import Settings, Table
from benchmarks.models import gpt_shapes
from benchmarks.targets import COMPILED, EAGER
from benchmarks.timing import Lap, Neighbors, digits, ratio, typical

NAMES = (BASELINE, "AdamW (foreach)", COMPILED, EAGER, PUBLISHED)
MILLION = 2**20


class Point(NamedTuple):
    """Where on a curve, and what is measured there."""

    x: int
    shapes: Sequence[Sequence[int]]
    draws: int = 1


class Curve(NamedTuple):
    """One plot: cost per step over x."""

    over: str
    about: str
    points: Callable[[], list[Point]]
    per_parameter: bool = False


def _sizes() -> list[Point]:
    lists = [gpt_shapes(width) for width in (60, 116, 204, 368, 640, 1176)]
    return [Point(sum(shape.numel() for shape in shapes), shapes) for shapes in lists]


CURVES: dict[str, Curve] = {
    "parameters": Curve("parameters", "76 tensors, as in a GPT", _sizes, per_parameter=True),
    "tensors": Curve(
        "tensors of equal size",
        "1M parameters",
        lambda: [Point(n, [(MILLION // n,)] * n) for n in (1, 4, 16, 64, 256, 1024)],
    ),
    "draws": Curve(
        "draws per step (AdamW takes one gradient)",
        "1M parameters in 76 tensors",
        lambda: [Point(draws, gpt_shapes(116), draws) for draws in (1, 2, 4, 8)],
    ),
}


def tables(settings: Settings) -> list[Table]:
    found = []
    for name, curve in CURVES.items():
        neighbors = Neighbors()
        points = curve.points()[:3] if settings.quick else curve.points()
        rows, lines = [], {contender: plots.Line() for contender in NAMES}
        for point in points:
            effort: dict[str, Any] = dict(rounds=settings.rounds(21), warmup=2, seconds=settings.seconds(6), least=3)
            arguments: dict[str, Any] = dict(shapes=point.shapes, draws=point.draws, names=NAMES, **effort)
            answer = child.call("optimizer_step:race", settings.threads, **arguments)
            laps = {contender: [Lap(*lap) for lap in each] for contender, each in answer.items()}
            size = sum(_product(shape) for shape in point.shapes)
            for contender, each in laps.items():
                unit = size / 1e9 if curve.per_parameter else 1e-3
                lines[contender].add(point.x, [lap.seconds / unit for lap in each])
            costs = (digits(ratio(laps[contender], laps[BASELINE]).median) for contender in NAMES[1:])
            rows.append((f"{point.x:,}", f"{typical(laps[BASELINE]).seconds * 1e3:.3g}", *costs))
        head = (curve.over, f"{BASELINE}: ms a step", *(f"{contender}: ratio" for contender in NAMES[1:]))
        kind = "ns per parameter" if curve.per_parameter else "ms"
        plots.draw(
            settings.plots / f"growth_{name}.png",
            title=f"Optimizer work per step ({curve.about})",
            x=curve.over,
            y=f"{kind}, median and quartiles",
            lines=lines,
        )
        found.append(Table(f"growth with {curve.over}", head, rows, {}, f"{curve.about}. {neighbors.report()}"))
    return found


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
