"""One self-contained page about what a model depends on: its training examples, those with suspicious labels first.

The page fetches nothing, as that of :mod:`bayesrule.uses.report`, and a person can mark labels on it and save the list. The input
is plain data, so whatever :class:`~bayesrule.Sensitivity` scored can be shown: images, rows of tables, texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from bayesrule.uses import charts
from bayesrule.uses.curves import FIRST, ClassLoss, class_chart, concentration, concentration_chart, first, score_chart
from bayesrule.uses.galleries import Picture, draw
from bayesrule.uses.scores import Scores, ranked

TOP = 24  # suspicious labels that are shown
ENDS = 12  # examples shown of those that the model depends on most, and least
PICTURES = 60  # in a page, at most
COLUMNS = 12  # of a row that are shown
FAR = 1.5  # times a test loss: from there on an estimate is called far from it
APART = 0.15  # between accuracies, likewise
MANY = 0.05  # of the examples with a leverage of 1 or more: so many spoil the means

FAR_OFF = (
    " That is far from the estimate. If the test data are many and of the same kind, the posterior is too narrow for what was "
    "learned by heart, or too wide: trust the order of the examples more than the figure."
)
NAMES = {
    "loo_loss": "leave-one-out loss",
    "loss": "training loss",
    "gap": "leave-one-out loss less training loss",
    "sensitivity": "sensitivity",
    "self_influence": "self-influence",
    "cook": "Cook's distance",
    "leverage": "leverage",
}
CURVES = (("train_loss", "training"), ("validation_nll", "validation"), ("loo_nll", "leave-one-out"))


@dataclass(frozen=True)
class Dependence:
    """Everything the page shows, of n scored examples out of the training data.

    Args:
        title: Heading of the page.
        scores: Of the examples.
        indices: Their places in the training data, shape (n,), ascending.
        labels: Their given classes, shape (n,).
        predictions: What the model says, shape (n,).
        without: What it would say without the example, shape (n,); None if that is not known.
        classes: Names of the classes.
        total: Training examples in all.
        score: The score by which labels are suspicious, one of :data:`~bayesrule.uses.scores.SCORES`.
        estimates: Whether leave-one-out losses are estimates of losses; else they are of no scale and are not shown.
        test: ``nll`` and ``accuracy`` on the test data at the mean, if known.
        thing: What an example is called: "image", "row" or "text".
        names: Where training example i comes from.
        images: The training images, ``images[i]`` as for :class:`~bayesrule.uses.report.Report`; read for the few that are shown.
        words: What there is to read of training example i: the text, or the columns of a row and their values.
        history: A mapping an epoch with ``epoch``, ``train_loss``, ``validation_nll`` and, if it was tracked, ``loo_nll``.
        class_losses: What leaving out whole classes would do.
        warnings: What was warned of.
        identity: Of what is shown: marks of another page are not taken for those of this one.
    """

    title: str
    scores: Scores
    indices: Tensor
    labels: Tensor
    predictions: Tensor
    without: Tensor | None
    classes: Sequence[str]
    total: int
    score: str = "loo_loss"
    estimates: bool = True
    test: Mapping[str, float] | None = None
    thing: str = "image"
    names: Callable[[int], str] | None = None
    images: Any = None
    words: Callable[[int], str | Sequence[tuple[str, str]]] | None = None
    history: Sequence[Mapping[str, float]] = ()
    class_losses: Sequence[ClassLoss] = ()
    warnings: Sequence[str] = ()
    identity: str = ""
    top: int = field(default=TOP)

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: If there is no example, or a tensor is not of so many.
        """
        if not len(self.scores):
            raise ValueError("there are no examples to show")
        parts = {"indices": self.indices, "labels": self.labels, "predictions": self.predictions, "without": self.without}
        for name, part in parts.items():
            if part is not None and part.shape != (len(self.scores),):
                raise ValueError(f"{name} must have shape ({len(self.scores)},), got {tuple(part.shape)}")

    @cached_property
    def figures(self) -> dict[str, Any]:
        """What is known of all examples together, by name; the leave-one-out figures are None where they are of no scale."""
        scores, leverage = self.scores, self.scores.leverage
        loo = {"nll": scores.loo_loss, "accuracy": scores.loo_correct}
        mean = {key: value.double().mean().item() for key, value in loo.items()} if self.estimates else dict.fromkeys(loo)
        test = self.test or {}
        return {
            "examples": len(scores),
            "training_examples": self.total,
            "train_nll": scores.loss.double().mean().item(),
            "train_accuracy": scores.correct.double().mean().item(),
            "loo_nll": mean["nll"],
            "loo_accuracy": mean["accuracy"],
            "test_nll": test.get("nll"),
            "test_accuracy": test.get("accuracy"),
            "top_share": concentration(scores.sensitivity)[first(len(scores)) - 1].item(),
            "leverage_above_1": int((leverage >= 1).sum()),
        }

    @property
    def trusted(self) -> bool:
        """Whether leave-one-out means are worth anything: few examples have a leverage of 1 or more."""
        return self.estimates and self.figures["leverage_above_1"] <= MANY * len(self.scores)

    @property
    def far(self) -> bool:
        """Whether the leave-one-out figures are far from those on the test data."""
        figures = self.figures
        if not self.trusted or figures["test_nll"] is None:
            return False
        ratio = figures["test_nll"] / max(figures["loo_nll"], 1e-12)
        return not 1 / FAR <= ratio <= FAR or abs(figures["test_accuracy"] - figures["loo_accuracy"]) > APART

    def rows(self) -> list[dict[str, Any]]:
        """The losses of training, leave-one-out and test, those that are known: ``examples``, ``nll``, ``accuracy``."""
        named = {"training": "train", "leave-one-out": "loo", "test": "test"}
        rows = [
            {"examples": name, **{key: self.figures[f"{of}_{key}"] for key in ("nll", "accuracy")}} for name, of in named.items()
        ]
        return [row for row in rows if row["nll"] is not None]

    @cached_property
    def suspects(self) -> list[int]:
        """Positions among the scored examples, the most suspicious label first."""
        found: list[int] = ranked(self.scores.by(self.score), self.top).indices.tolist()
        return found

    def name(self, position: int) -> str:
        """Where a scored example comes from."""
        i = int(self.indices[position])
        return self.names(i) if self.names is not None else f"training {self.thing} {i}"

    def suggestion(self, position: int) -> str:
        """What a scored example is called by the model, without it if that is known."""
        said = self.predictions if self.without is None else self.without
        return self.classes[int(said[position])]

    def about(self, position: int) -> dict[str, Any]:
        """What is known of a scored example, as JSON has it."""
        values = {name: getattr(self.scores, name)[position].item() for name in ("loss", "loo_loss", "sensitivity")}
        if not self.estimates:
            values["loo_loss"] = None
        return {
            "index": int(self.indices[position]),
            "source": self.name(position),
            "label": self.classes[int(self.labels[position])],
            "prediction": self.classes[int(self.predictions[position])],
            "loo_prediction": None if self.without is None else self.classes[int(self.without[position])],
            **values,
        }


class Card(NamedTuple):
    """An example as it is shown."""

    place: int
    """In the training data."""
    source: str
    picture: Picture | None
    text: str
    values: list[tuple[str, str]]
    more: int
    """Values that are not shown."""
    label: str
    prediction: str
    suggestion: str
    loss: str
    loo_loss: str
    sensitivity: str


def cards(found: Dependence, chosen: Sequence[Sequence[int]]) -> list[list[Card]]:
    """Examples by position, group by group, with as many pictures as a page takes: those of the last group first."""
    drawn: list[tuple[int, int]] = []
    if found.images is not None:
        drawn = [(g, position) for g in reversed(range(len(chosen))) for position in chosen[g]][:PICTURES]
    pictures = draw(found.images, {int(found.indices[position]) for _, position in drawn})

    shown = set(drawn)

    def card(g: int, position: int) -> Card:
        about = found.about(position)
        said = found.words(about["index"]) if found.words is not None else ""
        values = [] if isinstance(said, str) else list(said)
        return Card(
            place=about["index"],
            source=about["source"],
            picture=pictures[about["index"]] if (g, position) in shown else None,
            text=said if isinstance(said, str) else "",
            values=values[:COLUMNS],
            more=max(len(values) - COLUMNS, 0),
            label=about["label"],
            prediction=about["prediction"],
            suggestion=found.suggestion(position),
            loss=number(about["loss"]),
            loo_loss=number(about["loo_loss"]) if found.estimates else "",
            sensitivity=number(about["sensitivity"]),
        )

    return [[card(g, position) for position in group] for g, group in enumerate(chosen)]


def number(x: float) -> str:
    """A score, short.

    Example:
        >>> number(3.14159), number(0.0123456), number(1.2e-7), number(12345.6), number(0.0)
        ('3.14', '0.0123', '1.2e-07', '12,346', '0')
    """
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1e}" if 0 < abs(x) < 0.001 else f"{x:.3g}"


def words_of(found: Dependence) -> list[str]:
    """The headline figures in sentences."""
    figures, things = found.figures, f"{found.thing}s"
    scope = "all" if figures["examples"] == found.total else f"{figures['examples']:,} randomly chosen of the"
    said = [
        f"These are {scope} {found.total:,} {things} that the model was trained on. On them it loses {figures['train_nll']:.3f} "
        f"nats on average, and names {100 * figures['train_accuracy']:.1f} % as they are labelled."
    ]
    if found.estimates and not found.trusted:
        said.append(
            f"What it would say of each {found.thing} without it cannot be told from this posterior, which is too wide or not "
            f"converged: the equation fails for {figures['leverage_above_1']:,} of {figures['examples']:,} {things}. Rank by "
            "--scale data or by the training loss, or train with a smaller learning rate, for longer, or with an ess near the "
            "number of examples."
        )
    elif found.estimates:
        said.append(
            f"Asked about each {found.thing} as if it had been trained without it, it would lose {figures['loo_nll']:.3f} nats and "
            f"name {100 * figures['loo_accuracy']:.1f} % as labelled: an estimate of what it does on new {things} like these, made "
            "without any."
        )
    if found.test is not None:
        said.append(
            f"On the test {things} it {'really ' if found.trusted else ''}loses {figures['test_nll']:.3f} nats and names "
            f"{100 * figures['test_accuracy']:.1f} % right.{FAR_OFF if found.far else ''}"
        )
    top = first(figures["examples"])
    few = f"{top:,} {things if top > 1 else found.thing}"
    said.append(f"The most sensitive {100 * FIRST:.0f} % ({few}) carry {100 * figures['top_share']:.0f} % of all sensitivity.")
    return said


def render(found: Dependence) -> str:
    """The page as a string of HTML.

    Raises:
        ValueError: If tensors do not fit together.
    """
    found.check()
    environment = Environment(loader=PackageLoader("bayesrule", "uses"), autoescape=True, undefined=StrictUndefined)
    order: list[int] = ranked(found.scores.sensitivity, None).indices.tolist()
    groups = cards(found, [found.suspects, order[:ENDS], order[::-1][:ENDS]])
    things = f"{found.thing}s"
    known = {key: {line["epoch"]: line[key] for line in found.history if line.get(key) is not None} for key, _ in CURVES}
    lines = [(name, known[key], style) for (key, name), style in zip(CURVES, charts.styles(3), strict=True) if known[key]]
    with charts.looks():
        histograms = {
            name: score_chart(found.scores.by(name), NAMES[name], things) for name in dict.fromkeys([found.score, "sensitivity"])
        }
        return environment.get_template("dependence.html.j2").render(
            found=found,
            figures=found.figures,
            thing=found.thing,
            things=things,
            score=NAMES[found.score],
            names=NAMES,
            said=words_of(found),
            pictured=found.images is not None,
            suspects=groups[0],
            ends=[("most", groups[1]), ("least", groups[2])],
            concentration=concentration_chart(found.scores.sensitivity, things),
            histograms=histograms,
            curve=charts.training_chart([[line] for _, line, _ in lines], [style for *_, style in lines], "log")
            if known["loo_nll"]
            else None,
            lines=[(name, style, list(line.values())[-1]) for name, line, style in lines],
            class_bars=class_chart(found.class_losses) if found.class_losses else None,
        )
