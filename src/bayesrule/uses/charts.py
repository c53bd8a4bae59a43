"""The figures of the report: from plain tensors to SVG inside ``data:`` addresses, and counts of confusions to a heat map."""

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from bayesrule.uses.metrics import reliability

BINS = 15  # of reliability diagrams and the ECE
POINTS = 400  # of a curve, at most
HEAT = 20  # classes at most for a heat map
FREQUENT = 12  # confusions listed where there are more

# Okabe and Ito's colors, told apart by color-blind readers; with dashes, also in gray. Twelve pairs before one comes again.
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
DASHES = ("solid", "dashed", "dashdot", "dotted")

Style = tuple[str, str]  # color, dash
Line = Mapping[float, float]  # a value by epoch


def styles(count: int) -> list[Style]:
    """A color and a dash for each of so many methods."""
    return [(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(count)]


@contextmanager
def looks() -> Iterator[None]:
    """What all charts share; the same data give the same bytes."""
    settings: Any = {"font.size": 10, "svg.hashsalt": "bayesrule", "svg.fonttype": "path", "axes.spines.top": False}
    with matplotlib.rc_context(settings | {"axes.spines.right": False, "axes.edgecolor": "#555", "font.family": "DejaVu Sans"}):
        yield


def chart(width: float, height: float, draw: Callable[..., None], rows: Sequence[float] = (1,)) -> str:
    """The address of an SVG chart of so many inches; ``draw`` gets its axes, one a row."""
    return "data:image/svg+xml;base64," + b64encode(svg(width, height, draw, rows).encode()).decode()


def svg(width: float, height: float, draw: Callable[..., None], rows: Sequence[float] = (1,)) -> str:
    """The same as the text of an SVG file."""
    figure = Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03))
    draw(*figure.subplots(len(rows), 1, height_ratios=rows, sharex=True, squeeze=False)[:, 0])
    file = BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return file.getvalue().decode()


def percent(axes: Axes, which: str = "xy") -> None:
    """Shares on the axes as percentages."""
    for name in which:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def reliability_chart(probs: Sequence[Tensor], labels: Tensor, color: str, things: str) -> str:
    """Share of right answers and number of examples against confidence, the seeds of one method pooled.

    The examples of all seeds are the same, so the numbers, and the errors that follow from them, are those of one seed.

    Args:
        probs: Class probabilities, one tensor of shape (examples, classes) a seed.
        labels: True classes, shape (examples,).
        color: Of the method.
        things: What examples are called.
    """
    confidence, accuracy, count, _ = reliability(torch.cat(list(probs)), labels.repeat(len(probs)), BINS)
    return _reliability(confidence, accuracy, count / len(probs), len(labels), color, things)


def binned_reliability_chart(bins: Tensor, color: str, things: str) -> str:
    """The same of bins: the numbers of things, sums of their confidence and numbers of right answers, shape (3, bins)."""
    count, promised, kept = bins.double()
    return _reliability(promised / count, kept / count, count, int(count.sum()), color, things)


def _reliability(confidence: Tensor, accuracy: Tensor, count: Tensor, total: int, color: str, things: str) -> str:
    filled = count > 0
    edges = torch.arange(len(count), dtype=torch.float64) / len(count)
    x, y, n, left = (part[filled].double().numpy() for part in (confidence, accuracy, count, edges))
    # Wilson's interval at one standard error: honest for few examples and for shares near 0 and 1
    center, half = (y + 0.5 / n) / (1 + 1 / n), (y * (1 - y) / n + 0.25 / n**2) ** 0.5 / (1 + 1 / n)

    def draw(above: Axes, below: Axes) -> None:
        above.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="dashed")
        above.vlines(x, center - half, center + half, color=color, alpha=0.45, linewidth=3)
        above.plot(x, y, color=color, marker="o", markersize=4.5, linewidth=1.2, clip_on=False)
        above.set(ylim=(-0.03, 1.03), ylabel="right", yticks=[0, 0.25, 0.5, 0.75, 1])
        percent(above, "y")
        below.bar(left, n, width=1 / BINS, align="edge", color=color, edgecolor="white", linewidth=0.5)
        below.set(yscale="log", ylim=(0.7, max(10.0, 1.5 * total)), ylabel=things)
        below.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="confidence")
        below.yaxis.set_major_formatter("{x:,.0f}")
        below.minorticks_off()
        percent(below, "x")

    return chart(3.2, 3.5, draw, rows=(3, 1))


def thinned(length: int, points: int = POINTS) -> Tensor:
    """Which points of a curve to draw: at most so many, evenly spaced, the first and the last among them.

    Example:
        >>> thinned(7, points=3).tolist(), thinned(3).tolist()
        ([0, 3, 6], [0, 1, 2])
    """
    return torch.linspace(0, length - 1, min(points, length), dtype=torch.float64).round().long()


def risk_chart(risks: Sequence[Tensor], styles: Sequence[Style], things: str) -> str:
    """Error among the surest examples against their share.

    Args:
        risks: The error among the surest 1, 2, ..., N examples, one tensor of shape (N,) a method.
        styles: Color and dash of each.
        things: What examples are called.
    """

    def draw(axes: Axes) -> None:
        for risk, (color, dash) in zip(risks, styles, strict=True):
            kept = thinned(len(risk))
            axes.plot(((kept + 1) / len(risk)).numpy(), risk[kept].numpy(), color=color, linestyle=dash, linewidth=1.8)
        axes.set(xlim=(0, 1), xlabel=f"share of {things} answered, most confident first", ylabel="wrong among those answered")
        axes.set_ylim(bottom=0, top=None if any(risk.any() for risk in risks) else 0.1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        percent(axes)

    return chart(4.8, 3.2, draw)


def confidence_chart(known: Tensor, unknown: Tensor | None, color: str, things: str) -> str:
    """Histogram of the confidence in examples of known classes, filled, and in others, if there are any, as an outline."""
    edges = torch.linspace(0, 1, 21)

    def share(confidence: Tensor) -> Any:
        return (torch.histogram(confidence.clamp(0, 1).float(), edges).hist / len(confidence)).numpy()

    def draw(axes: Axes) -> None:
        axes.stairs(share(known), edges.numpy(), fill=True, color=color, alpha=0.8)
        if unknown is not None:
            axes.stairs(share(unknown), edges.numpy(), color="#222", linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set(xlabel="confidence", ylabel=f"share of {things}")
        percent(axes)

    return chart(3.2, 2.5, draw)


def mean_line(lines: Sequence[Line]) -> dict[float, float]:
    """The mean over the lines, epoch by epoch, of those that reach it.

    Example:
        >>> mean_line([{1: 0.5, 2: 0.25}, {1: 0.25}])
        {1: 0.375, 2: 0.25}
    """
    epochs = sorted(set().union(*lines))
    values = [[line[epoch] for line in lines if epoch in line] for epoch in epochs]
    return {epoch: sum(reached) / len(reached) for epoch, reached in zip(epochs, values, strict=True)}


def training_chart(lines: Sequence[Sequence[Line]], styles: Sequence[Style], scale: str, unit: str = "epoch") -> str:
    """Training curves: the mean over the seeds of each method, and behind it the seeds.

    Args:
        lines: For each method one line a seed; none if there is nothing to show of it.
        styles: Color and dash of each method.
        scale: ``"percent"``, ``"linear"``, or ``"log"``, which is linear where a value is not positive.
        unit: What the values are given by.
    """
    positive = all(value > 0 for seeds in lines for line in seeds for value in line.values())

    def draw(axes: Axes) -> None:
        for seeds, (color, dash) in zip(lines, styles, strict=True):
            for line in seeds if len(seeds) > 1 else ():
                axes.plot(*_xy(line), color=color, linewidth=0.7, alpha=0.35)
            if seeds:
                mean = mean_line(seeds)
                axes.plot(*_xy(mean), color=color, linestyle=dash, linewidth=1.6, marker="" if len(mean) > 1 else "o")
        axes.set(xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        if scale == "percent":
            percent(axes, "y")
        elif scale == "log" and positive:
            axes.set_yscale("log")
            _few_decimals(axes)

    return chart(3.2, 2.5, draw)


def _xy(line: Line) -> tuple[list[float], list[float]]:
    return list(line.keys()), list(line.values())


def _few_decimals(axes: Axes) -> None:
    """Plain numbers on a logarithmic axis; those between the powers of ten only where few powers are in sight."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high / low < 8 else NullFormatter())


@dataclass(frozen=True)
class Heat:
    """A heat map of confusions: for each true class its name, its number of examples and the cells of its row."""

    rows: list[tuple[str, str, list[tuple[str, float, bool]]]]  # a cell: the count, how strongly it is colored, right or not


@dataclass(frozen=True)
class Confusion:
    """A frequent confusion, in words."""

    truth: str
    answer: str
    count: str
    share: str  # of the examples of the class


def count_confusions(answers: Sequence[Tensor], labels: Tensor, classes: int) -> Tensor:
    """How often each class was taken for each, the mean over the seeds: truth by row, answer by column.

    Example:
        >>> count_confusions([torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])], torch.tensor([0, 0, 1]), 2).tolist()
        [[1.5, 0.5], [0.0, 1.0]]
    """
    pairs = torch.cat([labels.long() * classes + answer for answer in answers])
    return (pairs.bincount(minlength=classes**2).double() / len(answers)).reshape(classes, classes)


def heat_map(counts: Tensor, classes: Sequence[str]) -> Heat:
    """The confusions as a table with colors; what was right stays pale, so that mistakes stand out."""
    wrong = counts.clone().fill_diagonal_(0) / counts.sum(1, keepdim=True).clamp_min(1)
    strength = (wrong / wrong.max().clamp_min(1e-12)).sqrt().mul(0.62).add(0.08) * (wrong > 0)
    rows = []
    for i, (name, row, strong) in enumerate(zip(classes, counts.tolist(), strength.tolist(), strict=True)):
        cells = [(_count(n) if n else "", s, i == j) for j, (n, s) in enumerate(zip(row, strong, strict=True))]
        rows.append((name, _count(sum(row)), cells))
    return Heat(rows)


def frequent(counts: Tensor, classes: Sequence[str]) -> list[Confusion]:
    """The most frequent confusions, the most frequent first."""
    wrong = counts.clone().fill_diagonal_(0)
    total = counts.sum(1)
    chosen = wrong.flatten().argsort(descending=True, stable=True)[:FREQUENT].tolist()
    pairs = [divmod(i, len(classes)) for i in chosen]
    return [
        Confusion(classes[i], classes[j], _count(wrong[i, j].item()), f"{100 * wrong[i, j] / total[i]:.1f} %")
        for i, j in pairs
        if wrong[i, j] > 0
    ]


def _count(x: float) -> str:
    """A number of examples that may be a mean: a decimal only where it says something."""
    return f"{x:,.0f}" if x >= 10 or abs(x - round(x)) < 0.05 else f"{x:.1f}"
