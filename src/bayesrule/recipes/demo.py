"""The main job: AdamW, SGD and IVON side by side on real digits, at equal numbers of gradient evaluations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayesrule.recipes.folder import appearing, read_record, write, write_record
from bayesrule.recipes.image import Bars, Run, Settings, begin, describe, keep, read, silent
from bayesrule.recipes.image import summarize as summarize_run
from bayesrule.recipes.training import OPTIMIZERS
from bayesrule.uses.calibration import fit_temperature
from bayesrule.uses.report import Method, Report, render

DEMO = Settings(data="mnist5k", model="lenet", optimizer="", hyperparameters={}, epochs=30, batch_size=100, held_out=(8, 9))

# Folder: optimizer, settings. torch's own AdamW and SGD, because a rival should be the original.
CONTESTANTS: dict[str, tuple[str, dict[str, float]]] = {
    "adamw": ("torch-adamw", {"lr": 0.004, "weight_decay": 0.01}),
    "sgd": ("torch-sgd", {"lr": 0.01, "weight_decay": 5e-4}),
    "ivon": ("ivon", {"lr": 0.1, "hess_init": 0.1, "beta2": 0.999}),
}
CHOICE = (
    "Five settings of each optimizer were tried with one seed, and the one with the smallest NLL on the validation images was "
    "taken (of IVON, averaged): AdamW with lr 0.0005, 0.001, 0.002, 0.004, 0.008; SGD with lr 0.003, 0.01, 0.03, 0.1, 0.2; IVON "
    "with lr 0.1, 0.2, 0.4 (ess ten training sets, beta2 0.999), lr 0.2 (ess three training sets, beta2 0.999), lr 0.3 (ess one "
    "training set, beta2 0.9999)."
)


def is_complete(out: Path) -> bool:
    """Whether ``out`` holds a demo, so that there is nothing to train: a run folder appears only when it is finished."""
    return (out / "run.json").exists() and read_record(out)["kind"] == "demo"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the figures and the ratio of times then depend on no machine's number of cores, nor its load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def results(out: Path) -> dict[str, Any]:
    """What a finished demo came to: ``rows``, the table; ``ratio``, see :func:`ratio`; ``speed``, the same in words.

    Raises:
        FileNotFoundError: If there is no ``metrics.json``.
        ValueError: If it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{out / 'metrics.json'} is damaged: {error}") from error
    return found


def demo(out: Path, settings: Settings = DEMO, bars: Bars = silent) -> None:
    """Train the contestants, one epoch of each in turn, and leave the folder of the demo at ``out``; on failure, nothing.

    Raises:
        FileExistsError: If ``out`` holds something already.
        ValueError: If training diverges.
    """
    with appearing(out) as folder, one_thread():
        runs = {
            name: begin(replace(settings, optimizer=optimizer, hyperparameters=hyperparameters))
            for name, (optimizer, hyperparameters) in CONTESTANTS.items()
        }
        ticks = {
            name: bars(OPTIMIZERS[chosen.optimizer].title, chosen.epochs * training.steps)
            for name, (chosen, training) in runs.items()
        }
        order = list(runs)
        for _ in range(settings.epochs):
            for name in order:
                runs[name][1].epoch(ticks[name])
            order = [*order[1:], order[0]]  # nobody is always first
        tick = bars("report", len(runs) + 1)
        parts = {}
        for name, (chosen, training) in runs.items():
            (folder / name).mkdir()
            keep(chosen, training, folder / name)
            parts[name] = summarize_run(folder / name)
            write(folder / name / "report.html", render(parts[name]))
            tick()
        write_record(folder / "run.json", {"kind": "demo", "runs": list(runs)})
        report = _compare(folder, parts)
        cost = ratio(runs["ivon"][1].history, runs["adamw"][1].history)
        metrics = {"rows": report.rows, "ratio": cost, "speed": speed(cost) + "."}
        write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write(folder / "report.html", render(report))
        tick()


def summarize(folder: Path, num_samples: int = 32) -> Report:
    """The predictions of the run, or of all runs of the demo, in a folder, ready to be tabled or rendered.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged.
    """
    if read_record(folder)["kind"] != "demo":
        return summarize_run(folder, num_samples)
    return _compare(folder, {name: summarize_run(folder / name, num_samples) for name in CONTESTANTS}, num_samples)


def _compare(folder: Path, parts: Mapping[str, Report], num_samples: int = 32) -> Report:
    """The reports of all contestants in one, and AdamW with a fitted temperature."""
    runs = {name: read(folder / name) for name in CONTESTANTS}
    adamw, _, ivon = runs.values()
    (plain,), sgd, averaged = (parts[name].methods for name in CONTESTANTS)
    temperature, tempered = temper(adamw, plain)
    data, settings = ivon.data, ivon.settings
    assert data.unknown is not None
    report = replace(
        parts["ivon"],
        title="AdamW, SGD and IVON on the same digits",
        methods=[plain, tempered, *sgd, *averaged],
        settings={run.title: describe(run.settings) for run in runs.values()} | {"Versions": ivon.versions},
    )
    cost = ratio(ivon.history, adamw.history)
    weights = sum(p.numel() for p in ivon.model.parameters())
    summary = [
        f"Three copies of one {settings.model} network ({weights:,} weights, the same start, the same order of images) learned "
        f"the digits {listing(data.classes)} from {len(data.train[1]):,} images of {data.name}: one with AdamW, one with SGD, one "
        f"with IVON, each for {settings.epochs} epochs and the same number of gradients. The figures are on "
        f"{len(data.test[1]):,} test images of these digits and on {len(data.unknown[1]):,} images of "
        f"{listing(settings.held_out)}, which no network has ever seen.",
        "IVON learns a distribution over the weights, not one set of them. Its mean is a network like the others; averaged "
        f"means the mean of the probabilities of {num_samples} networks drawn from the distribution. The usual remedy for AdamW "
        f"stands beside it: all its logits divided by one temperature, {temperature:.2f}, fitted on "
        f"{len(data.validation[1])} validation images.",
        findings(report.rows),
        speed(cost) + ".",
        CHOICE,
    ]
    return replace(report, summary=summary)


def temper(run: Run, plain: Method) -> tuple[float, Method]:
    """The temperature that fits a run's validation data best, and what the run, ``plain`` until then, predicts with it."""
    temperature = fit_temperature(run.probabilities(run.data.validation[0]).log(), run.data.validation[1])
    assert plain.unknown is not None
    test, unknown = ((probs.log() / temperature).softmax(1) for probs in (plain.test, plain.unknown))
    return temperature, Method(f"{plain.name}, temperature", test, unknown, run.seconds)


def findings(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says about averaged IVON against AdamW as it is and with a temperature, read off the numbers."""
    plain, tempered, averaged = rows[0], rows[1], rows[-1]

    def verdict(key: str, larger_is_better: bool, rival: Mapping[str, Any]) -> str:
        ours, theirs = (f"{row[key]:.3f}" for row in (averaged, rival))
        word = "equal" if ours == theirs else "better" if (ours > theirs) == larger_is_better else "worse"
        return f"{word} ({ours}, {theirs})"

    sentences = [
        f"Averaged IVON against {rival}: NLL {verdict('nll', False, row)}, ECE {verdict('ece', False, row)}, telling unknown "
        f"digits from known ones (AUROC) {verdict('auroc_ood', True, row)}."
        for rival, row in (("AdamW as it comes out of training", plain), ("AdamW with a temperature", tempered))
    ]
    return f"{' '.join(sentences)} This is one run on little data: it shows what the methods do, and does not rank them."


def ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> list[float]:
    """Seconds of our epochs over those of theirs, round by round, as quartiles: lower, median, upper."""
    rounds = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    quartiles: list[float] = torch.tensor(rounds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return quartiles


def speed(cost: Sequence[float]) -> str:
    """One line about the cost of an epoch.

    Example:
        >>> speed([1.05, 1.1, 1.2])[:50]
        'An epoch of IVON takes 1.10 times as long as one o'
    """
    lower, median, upper = cost
    return (
        f"An epoch of IVON takes {median:.2f} times as long as one of AdamW (fused): on one thread, median of interleaved rounds "
        f"[quartiles {lower:.2f}, {upper:.2f}]"
    )


def listing(names: Sequence[Any]) -> str:
    """Names in a sentence.

    Example:
        >>> listing([0, 1, 2])
        '0, 1 and 2'
    """
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last
