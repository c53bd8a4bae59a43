"""The figures of the page about training examples: scores, how dependence concentrates, and classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from bayesrule.uses.charts import COLORS, chart, percent, thinned

BARS = 40  # of a histogram
FIRST = 0.01  # the share of examples that is spoken of


class ClassLoss(NamedTuple):
    """The examples of a class, in the training data and without them."""

    name: str
    examples: int
    loss: float
    """Their mean loss."""
    loss_without: float
    """Their mean loss by a model that was trained on the other classes alone."""


def concentration(values: Tensor) -> Tensor:
    """The share of the sum of absolute values in the largest 1, 2, ..., N of them, shape (N,); where all are 0, equal shares.

    Example:
        >>> concentration(torch.tensor([1.0, -6.0, 3.0])).tolist(), concentration(torch.zeros(2)).tolist()
        ([0.6, 0.9, 1.0], [0.5, 1.0])
    """
    size = values.double().abs()
    if not size.any():
        size = torch.ones_like(size)
    return size.sort(descending=True).values.cumsum(0) / size.sum()


def first(count: int, share: float = FIRST) -> int:
    """How many of so many examples are a share, rounded up.

    Example:
        >>> first(250), first(3)
        (3, 1)
    """
    return max(-int(-count * share // 1), 1)


def concentration_chart(values: Tensor, things: str) -> str:
    """Share of all dependence against share of examples, those that are depended on most first."""
    shares, count = concentration(values), len(values)
    kept, top = thinned(count), first(count)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="dashed")
        x, y = ((kept + 1) / count).tolist(), shares[kept].tolist()
        axes.plot([0.0, *x], [0.0, *y], color=COLORS[0], linewidth=1.8)
        axes.plot([top / count], [shares[top - 1].item()], color=COLORS[4], marker="o", markersize=6, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=f"share of {things}, most sensitive first", ylabel="share of sensitivity")
        percent(axes)

    return chart(4.8, 3.2, draw)


def score_chart(values: Tensor, caption: str, things: str, color: str = COLORS[0]) -> str:
    """Histogram of a score; numbers of examples on a logarithmic axis, for a few of them matter."""
    low, high = values.min().item(), values.max().item()
    edges = torch.linspace(low, max(high, low + 1e-6 * max(abs(low), 1.0)), BARS + 1, dtype=torch.float64)
    counts = torch.histogram(values.double().clamp(edges[0].item(), edges[-1].item()), edges).hist

    def draw(axes: Axes) -> None:
        axes.bar(edges[:-1].numpy(), counts.numpy(), width=edges.diff().numpy(), align="edge", color=color, alpha=0.85)
        axes.set(xlabel=caption, ylabel=things, yscale="log", ylim=(0.7, max(10.0, 1.5 * counts.max().item())))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()

    return chart(4.0, 2.8, draw)


def class_chart(found: Sequence[ClassLoss]) -> str:
    """The mean loss of each class, before and after all of it is taken away, as bars; the one that loses most is on top."""
    rows = sorted(found, key=lambda row: row.loss_without - row.loss)

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        axes.barh([i + 0.2 for i in places], [row.loss_without for row in rows], height=0.38, color=COLORS[4])
        axes.barh([i - 0.2 for i in places], [row.loss for row in rows], height=0.38, color=COLORS[1])
        names = [row.name if len(row.name) <= 24 else f"{row.name[:23]}\u2026" for row in rows]
        axes.set_yticks(list(places), names, parse_math=False)
        axes.set(xlabel="mean loss of the class, in nats", ylim=(-0.6, len(rows) - 0.4))

    return chart(5.2, 0.9 + 0.36 * len(rows), draw)
