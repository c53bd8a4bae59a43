"""One self-contained page about the predictions of one or several methods, each with one or several seeds, on the same test data.

The page fetches nothing: styles are in it, charts are SVG and images PNG or JPEG inside ``data:`` addresses. The input is
plain data, so whatever yields class probabilities can be reported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from bayesrule.uses import charts
from bayesrule.uses.evaluation import OOD
from bayesrule.uses.galleries import Shown, galleries
from bayesrule.uses.metrics import classification_metrics, entropy, ood_metrics, risk_coverage
from bayesrule.uses.metrics.classification import STANDARD
from bayesrule.uses.tables import COLUMNS, DETAILS, SECONDS, Cells, Column, cells_of, table, undecided

SHARES = (1.0, 0.95, 0.9, 0.8)  # of the examples answered, in the table of what abstaining gains
FEW = 3  # seeds up to which a spread is called rough


@dataclass(frozen=True)
class Trial:
    """What one method predicted with one seed.

    Args:
        test: Class probabilities of the test examples, shape (examples, classes).
        unknown: Those of inputs whose class was never learned, shape (others, classes), if there are any.
        seconds: Training time, if known.
        history: One mapping per epoch with ``epoch``, ``train_loss``, ``validation_nll``, ``validation_accuracy`` and perhaps
            ``elbo``; empty for a method that was not trained by itself.
    """

    test: Tensor
    unknown: Tensor | None = None
    seconds: float | None = None
    history: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Method:
    """A method and its trials.

    Args:
        name: As shown.
        trials: One a seed, at least one.
        cost: Shown in the table of cost as it is, by heading.
    """

    name: str
    trials: Sequence[Trial]
    cost: Mapping[str, Any] = field(default_factory=dict)

    def times(self) -> list[float]:
        """The training times that are known."""
        return [trial.seconds for trial in self.trials if trial.seconds is not None]

    def unknowns(self) -> list[Tensor]:
        """What was predicted of the inputs whose class was never learned."""
        return [trial.unknown for trial in self.trials if trial.unknown is not None and len(trial.unknown)]

    def lines(self, key: str) -> list[dict[float, float]]:
        """A training curve a seed: the value by epoch."""
        found = [{line["epoch"]: line[key] for line in trial.history if key in line} for trial in self.trials]
        return [line for line in found if line]


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Args:
        title: Heading of the page.
        summary: Paragraphs that say what was trained on what.
        classes: Names of the classes.
        labels: True classes of the test examples, shape (examples,).
        methods: What each method predicted; the last one's certainty chooses the examples that are shown.
        images: The test images: ``images[i]`` has shape (1 or 3, height, width) and any range, and is read for the few that are
            shown only; none for tables, or if the data are gone.
        names: Where test example i comes from: a file name, "row 17".
        unknown_images: Likewise, the unknown inputs.
        unknown_names: What they are, one name each.
        unknown_title: What they are, all of them.
        warnings: Noticed in the data.
        settings: Tables of settings by heading.
        thing: What an example is called: "image" or "row".
        columns: Of the table of results, those that apply.
    """

    title: str
    summary: Sequence[str]
    classes: Sequence[str]
    labels: Tensor
    methods: Sequence[Method]
    images: Any = None
    names: Callable[[int], str] | None = None
    unknown_images: Any = None
    unknown_names: Sequence[str] = ()
    unknown_title: str = "images of classes never learned"
    warnings: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    thing: str = "image"
    columns: Sequence[Column] = COLUMNS

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The table of results: one mapping a method.

        It has ``method``, its name, and the means over its seeds of all metrics, ``auroc_ood`` and ``seconds``; for more than one
        seed also ``seeds``, their number, and ``spread``, the standard deviation of each mean's parts.
        """
        return self._measured(STANDARD)

    @cached_property
    def detailed(self) -> list[dict[str, Any]]:
        """The same with all that there is to say of calibration, selective prediction and unknown data."""
        told = [column.key for columns in DETAILS.values() for column in columns]
        return self._measured(tuple(dict.fromkeys([*STANDARD, *told])))

    def _measured(self, metrics: Sequence[str]) -> list[dict[str, Any]]:
        measured = [[_measure(trial, self.labels, metrics) for trial in method.trials] for method in self.methods]
        return [{"method": method.name, **averaged(found)} for method, found in zip(self.methods, measured, strict=True)]

    @cached_property
    def top(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each method, for each seed: the largest probability of every test example, and its class."""
        return [[(best.values, best.indices) for best in (t.test.max(1) for t in method.trials)] for method in self.methods]

    @cached_property
    def risks(self) -> list[Tensor]:
        """For each method and seed the error among the surest 1, 2, ..., N test examples, shape (seeds, N)."""
        return [torch.stack([risk_coverage(p, k == self.labels).risk for p, k in seeds]) for seeds in self.top]

    @property
    def seeds(self) -> list[int]:
        """The numbers of seeds that occur, in order."""
        return sorted({len(method.trials) for method in self.methods})

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: If there is no method or no trial, or if a number of classes is not that of ``classes``.
        """
        if not self.methods:
            raise ValueError("a report needs at least one method; got none")
        for method in self.methods:
            if not method.trials:
                raise ValueError(f"a method needs at least one trial; {method.name} has none")
            for probs in [*(trial.test for trial in method.trials), *method.unknowns()]:
                if probs.ndim != 2 or probs.shape[1] != len(self.classes):
                    raise ValueError(
                        f"probabilities must have one column for each of the {len(self.classes)} classes; {method.name} has shape "
                        f"{tuple(probs.shape)}"
                    )


class Costly(Protocol):
    """What is shown in the table of cost."""

    @property
    def cost(self) -> Mapping[str, Any]: ...
    def times(self) -> list[float]: ...


def _measure(trial: Trial, labels: Tensor, metrics: Sequence[str]) -> dict[str, float]:
    found = classification_metrics(trial.test, labels, [name for name in metrics if name not in OOD])
    if trial.unknown is not None and len(trial.unknown):
        told = ood_metrics(entropy(trial.test), entropy(trial.unknown))
        found |= {name: value for name, value in told.items() if name == "auroc_ood" or name in metrics}
    if trial.seconds is not None:
        found["seconds"] = trial.seconds
    return found


def averaged(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The means of what all seeds have and, of several, their number and standard deviations."""
    keys = [key for key in found[0] if all(key in part for part in found)]
    values = {key: torch.tensor([part[key] for part in found], dtype=torch.float64) for key in keys}
    row: dict[str, Any] = {key: value.mean().item() for key, value in values.items()}
    if len(found) > 1:
        row |= {"seeds": len(found), "spread": {key: value.std().item() for key, value in values.items()}}
    return row


def abstaining(report: Report) -> tuple[list[Column], Cells]:
    """The error of each method among the surest 100 %, 95 %, 90 % and 80 % of the test examples."""
    decimals = 1 if len(report.labels) < 10_000 else 2
    columns = [Column(f"{share}", f"surest {100 * share:.0f}\u00a0%", decimals, True, min) for share in SHARES]
    last = {f"{share}": max(round(share * len(report.labels)), 1) - 1 for share in SHARES}
    rows = [
        averaged([{key: risk[place].item() for key, place in last.items()} for risk in seeds.double()]) for seeds in report.risks
    ]
    return columns, cells_of(columns, rows)


def costs(methods: Sequence[Costly]) -> tuple[list[str], list[list[str]]]:
    """The table of cost: headings, and a row a method; no headings if nothing is known.

    Example:
        >>> fast, slow = (Method(str(s), [Trial(torch.ones(1, 1), seconds=s)], {"weights": "9"}) for s in (2.0, 3.0))
        >>> costs([fast, slow])
        (['seconds', 'times the first', 'weights'], [['2.0', '1.00', '9'], ['3.0', '1.50', '9']])
    """
    times = [averaged([{"seconds": s} for s in method.times()]) if method.times() else {} for method in methods]
    first = times[0].get("seconds") if len(methods) > 1 else None
    given = list(dict.fromkeys(key for method in methods for key in method.cost))
    rows = []
    for method, time in zip(methods, times, strict=True):
        row = [SECONDS.show(time["seconds"], time.get("spread", {}).get("seconds")) if time else ""] if any(times) else []
        row += [f"{time['seconds'] / first:.2f}" if time else ""] if first else []
        rows.append(row + [str(method.cost.get(key, "")) for key in given])
    return ["seconds"] * any(map(bool, times)) + ["times the first"] * bool(first) + given, rows


PANELS = (
    ("train_loss", "training loss, in nats", "log"),
    ("validation_nll", "validation NLL at the mean weights, in nats", "log"),
    ("validation_accuracy", "validation accuracy at the mean weights", "percent"),
    ("elbo", "ELBO, nats per example", "linear"),
)


def render(report: Report) -> str:
    """The page as a string of HTML.

    Raises:
        ValueError: If probabilities, classes and labels do not fit together.
    """
    report.check()
    environment = Environment(loader=PackageLoader("bayesrule", "uses"), autoescape=True, undefined=StrictUndefined)
    environment.filters["zip"] = zip
    template = environment.get_template("report.html.j2")
    methods, labels, things = report.methods, report.labels, f"{report.thing}s"
    styles = charts.styles(len(methods))
    colors = [color for color, _ in styles]
    columns, cells = table(report.rows, report.columns)
    right = (report.rows[-1]["accuracy"] * len(labels) + 1) / (len(labels) + 2)  # Laplace's, so that 0 and 1 have an error too
    error = math.sqrt(right * (1 - right) / len(labels))
    ends = sorted({0, len(methods) - 1})  # the first and the last method: those that are looked at closely
    shown = [Shown(methods[i].name, colors[i], methods[i].trials[0].test, next(iter(methods[i].unknowns()), None)) for i in ends]
    counts = [charts.count_confusions([k for _, k in report.top[i]], labels, len(report.classes)) for i in ends]
    confusions = charts.heat_map if len(report.classes) <= charts.HEAT else charts.frequent
    lines = {key: [method.lines(key) for method in methods] for key, _, _ in PANELS}
    with charts.looks():
        return template.render(
            report=report,
            things=things,
            seeds=" to ".join(map(str, report.seeds[:1] + report.seeds[1:][-1:])),
            repeated=report.seeds[-1] > 1,
            rough=report.seeds[-1] <= FEW,
            styled=list(zip(methods, styles, strict=True)),
            learners=[
                (method, style) for method, style in zip(methods, styles, strict=True) if any(t.history for t in method.trials)
            ],
            columns=columns,
            cells=cells,
            error=error,
            undecided=undecided(columns, report.rows, error),
            others=next((len(method.unknowns()[0]) for method in methods if method.unknowns()), 0),
            reliability=[
                charts.reliability_chart([t.test for t in method.trials], labels, color, things)
                for method, color in zip(methods, colors, strict=True)
            ],
            risk=charts.risk_chart([risk.mean(0) for risk in report.risks], styles, things),
            abstaining=abstaining(report),
            histograms=[
                charts.confidence_chart(
                    torch.cat([p for p, _ in seeds]),
                    torch.cat([probs.max(1).values for probs in method.unknowns()]) if method.unknowns() else None,
                    color,
                    things,
                )
                for method, seeds, color in zip(methods, report.top, colors, strict=True)
            ],
            heat=len(report.classes) <= charts.HEAT,
            confusions=[
                (methods[i], styles[i], confusions(count, report.classes), bool((count.sum() - count.diagonal().sum()) < 1e-9))
                for i, count in zip(ends, counts, strict=True)
            ],
            shown=shown,
            galleries=galleries(
                shown,
                report.classes,
                labels,
                report.thing,
                report.images,
                report.names,
                report.unknown_images,
                report.unknown_names,
            ),
            costs=costs(methods),
            curves=[
                (key, caption, charts.training_chart(lines[key], styles, scale))
                for key, caption, scale in PANELS
                if any(lines[key])
            ],
        )
