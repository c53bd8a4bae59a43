"""Plots of cost: logarithmic axes, colors that color-blind readers tell apart, names beside the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.timing import spread

INK, GRID = "#333333", "#dddddd"
LOOKS = (  # color (Okabe and Ito), marker
    ("#000000", "o"),
    ("#E69F00", "s"),
    ("#0072B2", "D"),
    ("#009E73", "^"),
    ("#D55E00", "v"),
    ("#CC79A7", "P"),
)


@dataclass
class Line:
    """Medians and quartiles of one contender."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, x: float, values: Sequence[float]) -> None:
        found = spread(values, min(values))
        for series, value in ((self.x, x), (self.y, found.median), (self.low, found.low), (self.high, found.high)):
            series.append(value)


def draw(path: Path, *, title: str, x: str, y: str, lines: Mapping[str, Line]) -> None:
    """Write a PNG, 1200 pixels wide; the name of each contender stands at the right end of its curve."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, line), (color, marker) in zip(lines.items(), LOOKS, strict=False):
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
        axes.plot(line.x, line.y, color=color, marker=marker, markersize=6, linewidth=2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = next(iter(lines.values())).x
    axes.set_xticks(points, [short(value) for value in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _dress(axes, title, x, y)
    _names(figure, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def curves(path: Path, *, title: str, x: str, y: str, lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> None:
    """Write a PNG: for each name runs of (step, NLL) in nats, drawn as perplexities, thin, and their mean."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for (name, runs), color in zip(lines.items(), (*(color for color, _ in LOOKS), "#56B4E9", "#999999"), strict=False):
        for run in runs:
            axes.plot([step for step, _ in run], [math.exp(nll) for _, nll in run], color=color, linewidth=0.7, alpha=0.5)
        steps = [step for step, _ in runs[0]]
        middle = [math.exp(sum(run[i][1] for run in runs) / len(runs)) for i in range(len(steps))]
        (ends[name],) = axes.plot(steps, middle, color=color, linewidth=2, label=f"{name}  {middle[-1]:.2f}")
    axes.set_yscale("log")
    last = {name: line.get_ydata()[-1] for name, line in ends.items()}
    axes.set_ylim(0.95 * min(last.values()), 2.5 * max(last.values()))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _dress(axes, title, x, y)
    order = sorted(ends, key=lambda name: -last[name])
    axes.legend(handles=[ends[name] for name in order], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Words and lines that all plots share."""
    axes.set_xlabel(x, color=INK, fontsize=12)
    axes.set_ylabel(y, color=INK, fontsize=12)
    axes.set_title(title, color=INK, fontsize=13, loc="left")
    axes.tick_params(colors=INK, labelsize=11)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _names(figure: Figure, lines: Mapping[str, Line]) -> None:
    """A legend right of the plot, in the order in which the curves end."""
    axes = figure.axes[0]
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda index: -lines[names[index]].y[-1])
    axes.legend(
        [handles[index] for index in order],
        [names[index] for index in order],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=11,
        labelcolor=INK,
    )


def short(value: float) -> str:
    """A count in few characters: 1,024, 0.3M, 10M."""
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e6:.{int(value < 9e5)}f}M"


Panels = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
"""By panel, then by kind of points."""


def scatter(path: Path, *, title: str, x: str, y: str, panels: Panels) -> None:
    """Write a PNG of panels side by side, on the same logarithmic axes; in each, points of several kinds, and the diagonal."""
    figure = Figure(figsize=(3.1 * len(panels), 3.8), dpi=110, layout="constrained")
    every = [value for kinds in panels.values() for pair in kinds.values() for values in pair for value in values]
    ends = max(min(every), 1e-4) / 1.5, max(every) * 1.5
    for place, (name, kinds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.plot(ends, ends, color=GRID, linewidth=1.5, zorder=1)
        for (kind, (across, up)), (color, marker) in zip(kinds.items(), LOOKS[2:], strict=False):
            axes.scatter(across, up, s=16, color=color, marker=marker, alpha=0.75, linewidth=0, label=kind, zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_aspect("equal")
        axes.set_title(name, color=INK, fontsize=11, loc="left")
        axes.set_xlabel(x, color=INK, fontsize=10)
        axes.tick_params(colors=INK, labelsize=9)
        if place:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(y, color=INK, fontsize=10)
            axes.legend(fontsize=9, frameon=False, loc="upper left", labelcolor=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
