"""One self-contained page about language models on the same text: figures, curves, and whether probabilities are to be believed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from bayesrule.posterior import Posterior
from bayesrule.uses import charts
from bayesrule.uses.metrics.binning import equal_width, gap
from bayesrule.uses.prediction import predict
from bayesrule.uses.report import FEW, averaged, costs
from bayesrule.uses.tables import TOKENS, Column, table

CURVES = (
    ("train_loss", "training loss, in nats a token", "log"),
    ("validation_nll", "validation NLL at the mean weights, in nats a token", "log"),
)


def token_calibration(
    model: nn.Module, posterior: Posterior | None, tokens: Tensor, following: Tensor, num_samples: int = 8, seed: int = 0
) -> dict[str, Any]:
    """How far the probability of the most probable token is to be believed.

    Costs ``num_samples`` forwards, and memory for the probabilities of all tokens at all places.

    Args:
        model: Gives logits, shape (N, T, K), in eval mode.
        posterior: What was learned; None takes the model's weights as they are.
        tokens: Shape (N, T).
        following: The tokens that came, shape (N, T).
        num_samples: Draws that are averaged over.
        seed: Which draws.

    Returns:
        accuracy (share of the most probable tokens that came), ece (15 equal-width bins), and bins: for each its number of tokens,
        the sum of their confidence and the number that came.

    Example:
        >>> found = token_calibration(nn.Embedding(5, 5).eval(), None, torch.arange(4)[None], torch.arange(4)[None])
        >>> len(found["bins"][0]), found["bins"][0][0] + sum(found["bins"][0][1:])
        (15, 4.0)
    """
    how: dict[str, Any] = {} if posterior is None else {"num_samples": num_samples, "seed": seed}
    probs = predict(model, posterior, tokens, batch_size=64, **how).probs
    assert probs is not None
    confidence, chosen = probs.flatten(0, -2).float().cpu().max(-1)
    right = chosen == following.flatten().cpu()
    bins = equal_width(confidence, right, charts.BINS, "right")
    return {"accuracy": right.double().mean().item(), "ece": gap(bins).item(), "bins": bins.tolist()}


@dataclass(frozen=True)
class Trial:
    """What one method came to with one seed.

    Args:
        figures: nll, perplexity, bits_per_byte, accuracy, ece and bins at the mean; with ``_mc`` at the end, averaged over draws.
        seconds: Training time.
        history: One mapping per evaluation with ``step``, ``train_loss`` and ``validation_nll``.
    """

    figures: Mapping[str, Any]
    seconds: float
    history: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Method:
    """A method and its trials, one a seed; ``cost`` is shown as it is, by heading."""

    name: str
    trials: Sequence[Trial]
    cost: Mapping[str, Any] = field(default_factory=dict)

    def times(self) -> list[float]:
        """The training times."""
        return [trial.seconds for trial in self.trials]

    def lines(self, key: str) -> list[dict[float, float]]:
        """A training curve a seed: the value by step."""
        return [{line["step"]: line[key] for line in trial.history} for trial in self.trials if trial.history]


@dataclass(frozen=True)
class LanguageReport:
    """Everything the page shows.

    Args:
        title: Heading of the page.
        summary: Paragraphs that say what was trained on what.
        methods: What each method came to.
        settings: Tables of settings by heading.
    """

    title: str
    summary: Sequence[str]
    methods: Sequence[Method]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Sequence[Column] = TOKENS

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The table of results, one mapping a method: its name and means over its seeds; of several, their number and spread."""
        found = []
        for method in self.methods:
            trials = [{k: v for k, v in t.figures.items() if isinstance(v, float)} | {"seconds": t.seconds} for t in method.trials]
            found.append({"method": method.name, **averaged(trials)})
        return found

    @property
    def detailed(self) -> list[dict[str, Any]]:
        """The same."""
        return self.rows


def render_language(report: LanguageReport) -> str:
    """The page as a string of HTML."""
    environment = Environment(loader=PackageLoader("bayesrule", "uses"), autoescape=True, undefined=StrictUndefined)
    environment.filters["zip"] = zip
    styles = charts.styles(len(report.methods))
    columns, cells = table(report.rows, report.columns)
    most = max(len(method.trials) for method in report.methods)
    with charts.looks():
        believed = [
            (name, style, ece, charts.binned_reliability_chart(bins, style[0], "tokens"))
            for method, style in zip(report.methods, styles, strict=True)
            for name, ece, bins in _bins(method)
        ]
        lines = {key: [method.lines(key) for method in report.methods] for key, _, _ in CURVES}
        return environment.get_template("language.html.j2").render(
            report=report,
            styled=list(zip(report.methods, styles, strict=True)),
            columns=columns,
            cells=cells,
            repeated=most > 1,
            rough=most <= FEW,
            believed=believed,
            costs=costs(report.methods),
            curves=[
                (caption, charts.training_chart(lines[key], styles, scale, "step"))
                for key, caption, scale in CURVES
                if any(lines[key])
            ],
        )


def _bins(method: Method) -> list[tuple[str, float, Tensor]]:
    """The ways of a method, with the calibration error and the bins of each; seeds are pooled."""
    found = []
    for ending, words in (("", "mean"), ("_mc", "averaged")):
        if all(f"bins{ending}" in trial.figures for trial in method.trials):
            bins = torch.stack([torch.tensor(trial.figures[f"bins{ending}"], dtype=torch.float64) for trial in method.trials]).sum(
                0
            )
            alone = not any("bins_mc" in trial.figures for trial in method.trials)
            found.append((method.name if alone else f"{method.name}, {words}", gap(bins).item(), bins))
    return found
