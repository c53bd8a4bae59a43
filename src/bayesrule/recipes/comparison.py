"""Finished runs side by side, as a report: whatever folders are named, each a run or several seeds of one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesrule.recipes.data import Bars, Data, Part, quiet, some
from bayesrule.recipes.repeats import members
from bayesrule.recipes.results import Run, read
from bayesrule.recipes.settings import RunSettings
from bayesrule.uses.calibration import fit_temperature
from bayesrule.uses.report import Method, Report, Trial


@dataclass(frozen=True)
class Group:
    """The seeds of one method, read.

    Args:
        origin: The folder that was named.
        runs: One a seed.
    """

    origin: str
    runs: Sequence[Run]

    @property
    def title(self) -> str:
        """The optimizer's name in print."""
        return self.runs[0].title


def compare(
    folders: Sequence[Path],
    num_samples: int | None = None,
    ood: str | None = None,
    *,
    again: bool = False,
    bars: Bars = quiet,
) -> Report:
    """The predictions of runs on their common test data, ready to be tabled or rendered.

    Beside the mean of a posterior stands the average over it; beside weights without a posterior the same with one temperature,
    fitted on the validation data: the remedy that every posterior has to beat.

    Args:
        folders: Of runs, of several seeds of a run, or of the demo.
        num_samples: Networks that are averaged; None is what suits the runs.
        ood: Data of another kind, which a method should be unsure of; in the place of held-out classes.
        again: Predict anew, even where the predictions of these weights were kept.
        bars: Progress.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ValueError: If a run is not finished or damaged, or two were tested on different data.
    """
    memo: dict[Any, Data] = {}
    groups = [Group(name, [read(run, memo) for run in runs]) for folder in folders for name, runs in members(folder)]
    first = groups[0].runs[0]
    data = first.data
    for group in groups:
        for run in group.runs:
            if run.data.fingerprint != data.fingerprint:
                raise ValueError(
                    f"{first.folder} and {run.folder} were tested on different data ({data.name} and {run.data.name}, or other "
                    "splits or held-out classes); compare runs of the same"
                )
    num_samples = first.settings.draws if num_samples is None else num_samples
    unknown = None if ood is None else first.settings.strangers(ood, data)
    titles = Counter(group.title for group in groups)
    names = [group.title if titles[group.title] == 1 else f"{group.title} ({group.origin})" for group in groups]
    methods = [
        method
        for name, group in zip(names, groups, strict=True)
        for method in methods_of(name, group, num_samples, unknown, again, bars)
    ]
    shown: Part | None = data.unknown if unknown is None else unknown
    return Report(
        title=f"{', '.join(dict.fromkeys(names))} on {data.name}",
        summary=list(summary(groups, num_samples, methods)),
        classes=data.classes,
        labels=data.test.labels,
        methods=methods,
        images=data.test if data.kind == "image" else None,
        names=data.test.name,
        unknown_images=shown if data.kind == "image" else None,
        unknown_names=()
        if shown is None
        else data.unknown_names
        if unknown is None
        else [shown.name(i) for i in range(len(shown))],
        unknown_title=f"{data.kind}s of classes never learned" if ood is None else f"{data.kind}s of {Path(ood).name or ood}",
        warnings=list(dict.fromkeys(note for group in groups for run in group.runs for note in run.record.notes)),
        settings={name: describe(group.runs[0].settings) for name, group in zip(names, groups, strict=True)}
        | {"Versions": first.record.versions},
        thing=data.kind,
    )


def methods_of(name: str, group: Group, num_samples: int, unknown: Part | None, again: bool, bars: Bars) -> list[Method]:
    """What a group predicts, in its two ways."""
    plain, better, temperatures = [], [], []
    for run in group.runs:
        kept = run.predictions(num_samples, again=again, bars=bars)
        strange: dict[str, Tensor | None] = {side: kept.get(f"{side}unknown") for side in ("", "averaged ")}
        if unknown is not None:
            strange[""] = run.probabilities(unknown, None)
            strange["averaged "] = None if run.posterior is None else run.probabilities(unknown, num_samples)
        plain.append(Trial(kept["test"], strange[""], run.seconds, run.history))
        if run.posterior is not None:
            better.append(Trial(kept["averaged test"], strange["averaged "], run.seconds))
        else:
            t = fit_temperature(kept["validation"].clamp_min(1e-38).log(), run.data.validation.labels)
            temperatures.append(t)
            soft = [None if p is None else (p.clamp_min(1e-38).log() / t).softmax(1) for p in (kept["test"], strange[""])]
            assert soft[0] is not None
            better.append(Trial(soft[0], soft[1], run.seconds))
    cost = costs(group.runs[0])
    if temperatures:
        shown = f"{sum(temperatures) / len(temperatures):.2f}"  # the mean over seeds
        return [
            Method(name, plain, cost | {"networks a prediction": "1"}),
            Method(f"{name}, temperature", better, {"temperature": shown}),
        ]
    return [
        Method(f"{name}, mean", plain, cost | {"networks a prediction": "1"}),
        Method(f"{name}, averaged", better, cost | {"networks a prediction": f"{num_samples}"}),
    ]


def costs(run: Run) -> dict[str, str]:
    """What training took, in numbers that do not depend on the machine."""
    steps = -(-len(run.data.train) // run.settings.batch_size)
    draws = int(run.settings.hyperparameters.get("mc_samples", 1))
    weights, learned = (sum(p.numel() for p in run.model.parameters() if p.requires_grad or every) for every in (True, False))
    return {
        "weights": f"{weights:,}" if learned == weights else f"{weights:,}, of which {learned:,} learn",
        "epochs": f"{len(run.history)}",
        "gradients": f"{steps * len(run.history) * draws:,}",
    }


def summary(groups: Sequence[Group], num_samples: int, methods: Sequence[Method]) -> list[str]:
    """Paragraphs that say what was trained on what."""
    run = groups[0].runs[0]
    data, models = run.data, list(dict.fromkeys(group.runs[0].settings.model for group in groups))
    counts = sorted({len(group.runs) for group in groups})
    seeds = f", with {listing(counts)} seeds each" if counts[-1] > 1 else ""
    titles = list(dict.fromkeys(group.title for group in groups))
    said = [
        f"{listing(titles)} trained {listing(models)} to tell the {len(data.classes)} classes of {data.name} apart from "
        f"{len(data.train):,} {data.kind}s{seeds}. All figures here are on "
        f"{len(data.test):,} test {data.kind}s that played no part in training."
    ]
    if any(group.runs[0].posterior is not None for group in groups):
        names = listing([group.title for group in groups if group.runs[0].posterior is not None])
        said.append(
            f"{names} learns a distribution over the weights. Its mean is a network like any other; averaged means the mean of the "
            f"probabilities of {num_samples} networks drawn from that distribution."
        )
    if any("temperature" in method.cost for method in methods):
        said.append(
            "Temperature means that all logits of the trained network are divided by one number, fitted on "
            f"{len(data.validation):,} validation {data.kind}s: the usual remedy for probabilities that promise too much. It "
            "changes no answer and costs nothing."
        )
    return said


def describe(settings: RunSettings) -> dict[str, Any]:
    """The settings as one flat table, in words."""
    flat = {**asdict(settings), **settings.hyperparameters}
    del flat["hyperparameters"]
    words: Mapping[Any, str] = {None: "none", True: "yes", False: "no"}

    def word(value: Any) -> Any:
        if isinstance(value, tuple):
            return some(list(map(str, value)), 12) or "none"
        return words[value] if value is None or isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value

    return {name.replace("_", " "): word(value) for name, value in flat.items()}


def listing(names: Sequence[Any]) -> str:
    """Names in a sentence.

    Example:
        >>> listing([0, 1, 2])
        '0, 1 and 2'
    """
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last
