"""One self-contained page about a model that was changed without training it again, and how near that comes to doing so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from torch import Tensor

from bayesrule.uses import charts
from bayesrule.uses.charts import COLORS, DASHES, Style, chart, percent, thinned
from bayesrule.uses.metrics import classification_metrics
from bayesrule.uses.tables import Column, table

DOTS = 2000  # of a picture, at most


@dataclass(frozen=True)
class Examples:
    """Some examples, and what each of several models says of them.

    Args:
        name: What they are, such as "removed".
        labels: Their classes, shape (examples,).
        probs: Class probabilities by model, each of shape (examples, classes).
    """

    name: str
    labels: Tensor
    probs: Sequence[Tensor]

    def figures(self, number: int) -> dict[str, float]:
        """What a model comes to on them."""
        return classification_metrics(self.probs[number], self.labels, ("accuracy", "nll"))

    def agreement(self, number: int, other: int) -> tuple[float, float]:
        """How a model agrees with another: the share of equal answers, and the mean total variation of their probabilities.

        Example:
            >>> import torch
        >>> two = [torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])]
            >>> same, apart = Examples("", torch.zeros(2), two).agreement(0, 1)
            >>> round(same, 3), round(apart, 3)
            (0.5, 0.2)
        """
        mine, theirs = self.probs[number], self.probs[other]
        same = (mine.argmax(1) == theirs.argmax(1)).double().mean().item()
        return same, (mine - theirs).abs().sum(1).double().mean().item() / 2


@dataclass(frozen=True)
class Changes:
    """Everything the page shows.

    Args:
        title: Heading of the page.
        summary: Paragraphs that say what was changed how.
        models: Their names: the one before, the one after, and perhaps one that was trained again.
        examples: At least the test examples.
        seconds: What each model took.
        notes: What is to be kept in mind.
        settings: As one flat table.
        thing: What an example is called.
    """

    title: str
    summary: Sequence[str]
    models: Sequence[str]
    examples: Sequence[Examples]
    seconds: Sequence[float]
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    thing: str = "image"

    @property
    def columns(self) -> list[Column]:
        """Of the table of results."""
        found = []
        for part in self.examples:
            found.append(Column(f"{part.name} accuracy", part.name, 1, True))
            found.append(Column(f"{part.name} nll", "NLL", 3))
        return [*found, Column("seconds", "seconds", 1)]

    @property
    def nearness(self) -> list[Column]:
        """Of the table of agreement."""
        found = []
        for part in self.examples:
            found.append(Column(f"{part.name} same", part.name, 1, True, max))
            found.append(Column(f"{part.name} apart", "distance", 3, best=min))
        return found

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping a model: its name, accuracy and NLL on each kind of examples, and seconds."""
        rows = []
        for number, name in enumerate(self.models):
            each = {part.name: part.figures(number) for part in self.examples}
            flat = {f"{part} {key}": value for part, found in each.items() for key, value in found.items()}
            rows.append({"method": name, **flat, "seconds": self.seconds[number]})
        return rows

    @cached_property
    def agreement(self) -> list[dict[str, Any]]:
        """One mapping a model but the last: how it agrees with the last, on each kind of examples."""
        rows = []
        for number, name in enumerate(self.models[:-1]):
            each = {part.name: part.agreement(number, len(self.models) - 1) for part in self.examples}
            same = {f"{part} same": found for part, (found, _) in each.items()}
            rows.append({"method": name, **same, **{f"{part} apart": found for part, (_, found) in each.items()}})
        return rows

    @property
    def is_compared(self) -> bool:
        """Whether there is a model that was trained again."""
        return len(self.models) > 2

    @property
    def detailed(self) -> list[dict[str, Any]]:
        """The rows of results, with those of agreement."""
        more = {row["method"]: row for row in self.agreement} if self.is_compared else {}
        return [{**row, **more.get(row["method"], {})} for row in self.rows]


def agreement_chart(part: Examples, styles: Sequence[Style], things: str) -> str:
    """The probability of each example's own class by models before and after, against that of the model that was trained again."""
    kept = thinned(len(part.labels), DOTS)
    own = [probs[kept].gather(1, part.labels[kept].long()[:, None])[:, 0].double().numpy() for probs in part.probs]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="dashed")
        for (color, _), values in zip(styles, own[:-1], strict=False):
            axes.plot(own[-1], values, linestyle="none", marker="o", markersize=3.2, color=color, alpha=0.45, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="trained again", ylabel="not trained again", title=f"{part.name} {things}")
        percent(axes)

    return chart(3.4, 3.5, draw)


def render_changes(changes: Changes) -> str:
    """The page as a string of HTML."""
    environment = Environment(loader=PackageLoader("bayesrule", "uses"), autoescape=True, undefined=StrictUndefined)
    environment.filters["zip"] = zip
    styles = [(COLORS[i], dash) for i, dash in zip((0, 4, 2), DASHES, strict=False)][: len(changes.models)]
    columns, cells = table(changes.rows, changes.columns)
    nearness = table(changes.agreement, changes.nearness) if changes.is_compared else ([], [])
    things = f"{changes.thing}s"
    named = [_Named(name) for name in changes.models]
    with charts.looks():
        pictures = [agreement_chart(part, styles, things) for part in changes.examples] if changes.is_compared else []
    return environment.get_template("changes.html.j2").render(
        report=changes,
        styled=list(zip(named, styles, strict=True)),
        columns=columns,
        cells=cells,
        nearness=nearness,
        pictures=list(zip((part.name for part in changes.examples), pictures, strict=False)),
        things=things,
    )


@dataclass(frozen=True)
class _Named:
    """What a table calls a row."""

    name: str
