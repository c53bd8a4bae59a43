"""One self-contained page about the predictions of one or several methods on the same test data.

The page fetches nothing: styles are in it, charts are SVG and images PNG inside ``data:`` addresses. The input is plain
data, so whatever yields class probabilities can be reported.
"""

import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from bayesrule.uses.metrics import auroc, classification_metrics, entropy, reliability, risk_coverage

BINS = 15  # of reliability diagrams and the ECE
TILES = 8  # images shown in a row

# Okabe and Ito's colors, told apart by color-blind readers; with dashes, also in gray.
STYLES = (
    ("#0072b2", "solid"),
    ("#56b4e9", "dashed"),
    ("#009e73", "dashdot"),
    ("#e69f00", "dotted"),
    ("#d55e00", "solid"),
    ("#cc79a7", "dashed"),
)


@dataclass(frozen=True)
class Column:
    """A column of the table of results."""

    key: str
    heading: str
    show: Callable[[float], str]
    best: Callable[..., str] | None = None  # min or max of the values as shown
    meaning: str = ""


COLUMNS = (
    Column(
        "accuracy",
        "accuracy",
        lambda x: f"{100 * x:.1f} %",
        max,
        "Share of test images named correctly. Larger is better.",
    ),
    Column(
        "nll",
        "NLL",
        "{:.3f}".format,
        min,
        "Negative log-likelihood: how surprising the true answers were to the method, in nats. It punishes confident mistakes "
        "most. Smaller is better.",
    ),
    Column(
        "ece",
        "ECE",
        "{:.3f}".format,
        min,
        f"Expected calibration error: the distance between what the method promised and what it kept, over {BINS} equal bins "
        "of confidence. Smaller is better.",
    ),
    Column("brier", "Brier", "{:.3f}".format, min, "Squared error of the probabilities, from 0 to 2. Smaller is better."),
    Column(
        "auroc_ood",
        "AUROC unknown",
        "{:.3f}".format,
        max,
        "The chance that an image of a class never learned is given more uncertainty (predictive entropy) than a test "
        "image. 0.5 is guessing, 1 is perfect. Larger is better.",
    ),
    Column("seconds", "seconds", "{:.1f}".format, meaning="Training time, without validation."),
)


@dataclass(frozen=True)
class Method:
    """What one method predicted.

    Args:
        name: As shown.
        test: Class probabilities of the test images, shape (examples, classes).
        unknown: Those of images whose class was never learned, shape (others, classes), if there are any.
        seconds: Training time, if known.
        history: One mapping per epoch with ``epoch``, ``train_loss``, ``validation_nll`` and ``validation_accuracy``; empty
            for a method that was not trained by itself.
    """

    name: str
    test: Tensor
    unknown: Tensor | None = None
    seconds: float | None = None
    history: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Args:
        title: Heading of the page.
        summary: Paragraphs that say what was trained on what.
        classes: Names of the classes.
        images: Test images, shape (examples, 1 or 3, height, width), any range.
        labels: Their classes, shape (examples,).
        methods: What each method predicted; the last one's certainty chooses the images that are shown.
        unknown_images: Images of classes never learned, shape (others, 1 or 3, height, width), if there are any.
        unknown_names: What they are, one name each.
        settings: Tables of settings by heading.
    """

    title: str
    summary: Sequence[str]
    classes: Sequence[str]
    images: Tensor
    labels: Tensor
    methods: Sequence[Method]
    unknown_images: Tensor | None = None
    unknown_names: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The table of results: one mapping a method, with its ``method`` name, metrics and seconds."""
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method.name, **classification_metrics(method.test, self.labels)}
            if method.unknown is not None:
                scores = entropy(torch.cat((method.test, method.unknown)))
                row["auroc_ood"] = auroc(scores, torch.arange(len(scores)) >= len(method.test)).item()
            if method.seconds is not None:
                row["seconds"] = method.seconds
            rows.append(row)
        return rows


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[list[tuple[str, bool]]]]:
    """The columns that apply, and every row's cells: the text, and whether no row shows a better value.

    Example:
        >>> columns, cells = table([{"accuracy": 0.9712, "nll": 0.1}, {"accuracy": 0.9713, "nll": 0.2}])
        >>> [column.heading for column in columns], cells
        (['accuracy', 'NLL'], [[('97.1 %', True), ('0.100', True)], [('97.1 %', True), ('0.200', False)]])
    """
    columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
    shown = [[column.show(row[column.key]) if column.key in row else "" for row in rows] for column in columns]
    best = [
        column.show(column.best(row[column.key] for row in rows if column.key in row)) if column.best else None  # type: ignore[arg-type]
        for column in columns
    ]
    cells = [[(text, text == top) for text, top in zip(row, best, strict=True)] for row in zip(*shown, strict=True)]
    return columns, cells


def render(report: Report) -> str:
    """The page as a string of HTML.

    Raises:
        ValueError: If probabilities and labels do not fit together.
    """
    environment = Environment(loader=PackageLoader("bayesrule", "uses"), autoescape=True, undefined=StrictUndefined)
    environment.filters["zip"] = zip
    template = environment.get_template("report.html.j2")
    styles = [STYLES[i % len(STYLES)] for i in range(len(report.methods))]
    styled = list(zip(report.methods, styles, strict=True))
    columns, cells = table(report.rows)
    settings: Any = {"font.size": 10, "svg.hashsalt": "bayesrule", "svg.fonttype": "path", "axes.spines.top": False}
    with matplotlib.rc_context(settings | {"axes.spines.right": False, "axes.edgecolor": "#555", "font.family": "DejaVu Sans"}):
        return template.render(
            report=report,
            styled=styled,
            learners=[(method, style) for method, style in styled if method.history],
            shown=_ends(styled),
            columns=columns,
            cells=cells,
            error=math.sqrt(max(p := report.rows[-1]["accuracy"], 1e-9) * (1 - p) / len(report.labels)),
            bins=BINS,
            reliability=[_reliability(method.test, report.labels, color) for method, (color, _) in styled],
            risk=_risk(report, styled),
            histograms=[_confidences(method, color) for method, (color, _) in styled],
            curves=_curves(styled),
            galleries=_galleries(report, styled),
        )


Styled = Sequence[tuple[Method, tuple[str, str]]]


def _chart(width: float, height: float, draw: Callable[..., None], rows: Sequence[float] = (1,)) -> str:
    """The address of an SVG chart of so many inches; ``draw`` gets its axes, one a row."""
    figure = Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03))
    draw(*figure.subplots(len(rows), 1, height_ratios=rows, sharex=True, squeeze=False)[:, 0])
    file = BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(file.getvalue()).decode()


def _percent(axes: Axes, which: str = "xy") -> None:
    for name in which:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def _reliability(probs: Tensor, labels: Tensor, color: str) -> str:
    confidence, accuracy, count, edges = reliability(probs, labels, BINS)
    filled = count > 0
    x, y, n, left = (part[filled].double().numpy() for part in (confidence, accuracy, count, edges[:-1]))
    # Wilson's interval at one standard error: honest for few examples and for shares near 0 and 1
    center, half = (y + 0.5 / n) / (1 + 1 / n), (y * (1 - y) / n + 0.25 / n**2) ** 0.5 / (1 + 1 / n)

    def draw(above: Axes, below: Axes) -> None:
        above.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="dashed")
        above.vlines(x, center - half, center + half, color=color, alpha=0.45, linewidth=3)
        above.plot(x, y, color=color, marker="o", markersize=4.5, linewidth=1.2, clip_on=False)
        above.set(ylim=(-0.03, 1.03), ylabel="right", yticks=[0, 0.25, 0.5, 0.75, 1])
        _percent(above, "y")
        below.bar(left, n, width=1 / BINS, align="edge", color=color, edgecolor="white", linewidth=0.5)
        below.set(yscale="log", ylim=(0.7, max(10.0, 1.5 * len(labels))), ylabel="images")
        below.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="confidence")
        below.yaxis.set_major_formatter("{x:,.0f}")
        below.minorticks_off()
        _percent(below, "x")

    return _chart(3.2, 3.5, draw, rows=(3, 1))


def _risk(report: Report, styled: Styled) -> str:
    def draw(axes: Axes) -> None:
        for method, (color, dash) in styled:
            confidence, predicted = method.test.max(1)
            coverage, risk = risk_coverage(confidence, predicted == report.labels)
            axes.plot(coverage.numpy(), risk.numpy(), color=color, linestyle=dash, linewidth=1.8)
        axes.set(xlim=(0, 1), xlabel="share of images answered, most confident first", ylabel="wrong among those answered")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        _percent(axes)

    return _chart(4.8, 3.2, draw)


def _confidences(method: Method, color: str) -> str:
    edges = torch.linspace(0, 1, 21)

    def share(probs: Tensor) -> Tensor:
        return torch.histogram(probs.max(1).values.clamp(0, 1).float(), edges).hist / len(probs)

    def draw(axes: Axes) -> None:
        axes.stairs(share(method.test).numpy(), edges.numpy(), fill=True, color=color, alpha=0.8)
        if method.unknown is not None:
            axes.stairs(share(method.unknown).numpy(), edges.numpy(), color="#222", linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set(xlabel="confidence", ylabel="share of images")
        _percent(axes)

    return _chart(3.2, 2.5, draw)


def _curves(styled: Styled) -> list[tuple[str, str]]:
    """Charts of the training curves with their captions."""

    def chart(key: str, share: bool) -> str:
        def draw(axes: Axes) -> None:
            for method, (color, dash) in styled:
                if method.history:
                    x, y = ([line[k] for line in method.history] for k in ("epoch", key))
                    axes.plot(x, y, color=color, linestyle=dash, linewidth=1.6, marker="" if len(x) > 1 else "o")
            axes.set(xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            if share:
                _percent(axes, "y")
            else:
                axes.set_yscale("log")

        return _chart(3.2, 2.5, draw)

    if not any(method.history for method, _ in styled):
        return []
    return [
        ("training loss, in nats", chart("train_loss", False)),
        ("validation NLL at the mean weights, in nats", chart("validation_nll", False)),
        ("validation accuracy at the mean weights", chart("validation_accuracy", True)),
    ]


def _ends(styled: Styled) -> Styled:
    """The first and the last method: those whose answers stand under the images."""
    return [styled[0], styled[-1]] if len(styled) > 1 else styled


@dataclass(frozen=True)
class Tile:
    """An image, what it is, and the answers: color, class and probability by method."""

    image: str
    truth: str
    answers: list[tuple[str, str, str]]


def _galleries(report: Report, styled: Styled) -> list[tuple[str, str, list[Tile]]]:
    """Rows of images: heading, explanation, tiles."""
    shown = _ends(styled)
    chooser = styled[-1][0]

    def tiles(images: Tensor, names: Sequence[str], part: str, chosen: Tensor) -> list[Tile]:
        lowest, highest = images.min().item(), images.max().item()
        made = []
        for i in chosen[:TILES].tolist():
            answers = []
            for method, (color, _) in shown:
                p, k = getattr(method, part)[i].max(0)
                answers.append((color, report.classes[int(k)], f"{100 * p:.0f} %"))
            made.append(Tile(_picture(images[i], lowest, highest), names[i], answers))
        return made

    confidence, predicted = chooser.test.max(1)
    wrong = predicted != report.labels
    order = confidence.argsort(descending=True, stable=True)
    names = [report.classes[k] for k in report.labels.tolist()]
    by = f"by {chooser.name}"
    rows = [
        (
            "Most certain",
            f"Test images with the largest top probability {by}.",
            tiles(report.images, names, "test", order),
        ),
        (
            "Least certain",
            "The smallest: here a person should look.",
            tiles(report.images, names, "test", order.flip(0)),
        ),
    ]
    if wrong.any():
        mistakes = order[wrong[order]]
        rows.append(("Most confident mistakes", f"Wrong answers {by}.", tiles(report.images, names, "test", mistakes)))
    if report.unknown_images is not None:
        for method, _ in shown:
            assert method.unknown is not None
            chosen = method.unknown.max(1).values.argsort(descending=True, stable=True)
            fooled = tiles(report.unknown_images, report.unknown_names, "unknown", chosen)
            rows.append((f"Unknown, yet confident: {method.name}", "No answer can be right; small confidence would be.", fooled))
    return rows


def _picture(image: Tensor, lowest: float, highest: float) -> str:
    """The address of a PNG."""
    pixels = (255 * (image - lowest) / (highest - lowest)).round().clamp(0, 255).to(torch.uint8).movedim(0, -1).squeeze(-1)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
