"""The main job: AdamW, SGD and IVON side by side on real digits, at equal numbers of gradient evaluations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayesrule.recipes.comparison import compare, listing
from bayesrule.recipes.data import Bars, quiet
from bayesrule.recipes.folder import appearing, read_record, write_record
from bayesrule.recipes.optimizers import OPTIMIZERS
from bayesrule.recipes.runs import begin, finish
from bayesrule.recipes.settings import Settings
from bayesrule.storage import write_text
from bayesrule.uses.report import Report, render

DEMO = Settings(data="mnist5k", optimizer="", model="lenet", epochs=30, batch_size=100, held_out=("8", "9"))

# Folder: optimizer, settings. torch's own AdamW and SGD, because a rival should be the original.
CONTESTANTS: dict[str, tuple[str, dict[str, float]]] = {
    "adamw": ("torch-adamw", {"lr": 0.004, "weight_decay": 0.01}),
    "sgd": ("torch-sgd", {"lr": 0.01, "weight_decay": 5e-4}),
    "ivon": ("ivon", {"lr": 0.1, "ess": 20_000, "hess_init": 0.1, "beta2": 0.999}),  # ten training sets
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


def demo(out: Path, settings: Settings = DEMO, bars: Bars = quiet) -> None:
    """Train the contestants, one epoch of each in turn, and leave the folder of the demo at ``out``; on failure, nothing.

    Raises:
        FileExistsError: If ``out`` holds something already.
        ValueError: If training diverges.
    """
    with appearing(out) as folder, one_thread():
        data = settings.load()
        runs = {
            name: begin(replace(settings, optimizer=optimizer, hyperparameters=hyperparameters), data)
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
        for name, (chosen, training) in runs.items():
            (folder / name).mkdir()
            finish(chosen, training, folder / name, bars)
            write_text(folder / name / "report.html", render(compare([folder / name])))
        write_record(folder / "run.json", {"kind": "demo", "runs": list(runs)})
        report = summarize(folder)
        cost = ratio(runs["ivon"][1].seconds, runs["adamw"][1].seconds)
        metrics = {"rows": report.rows, "ratio": cost, "speed": speed(cost) + "."}
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_text(folder / "report.html", render(report))


def summarize(folder: Path, num_samples: int | None = None, bars: Bars = quiet, *, again: bool = False) -> Report:
    """The predictions of all runs of the demo, ready to be tabled or rendered.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged.
    """
    report = compare([folder], num_samples, again=again, bars=bars)
    records = {name: read_record(folder / name) for name in CONTESTANTS}
    data, settings = records["ivon"]["data"], records["ivon"]["settings"]
    cost = ratio(records["ivon"]["seconds"], records["adamw"]["seconds"])
    about = [
        f"Three copies of one {settings['model']} network ({report.methods[0].cost['weights']} weights, the same start, the same "
        f"order of images) learned the digits {listing(data['classes'])} from {data['examples']['training']:,} images of "
        f"{data['name']}: one with AdamW, one with SGD, one with IVON, each for {settings['epochs']} epochs and the same number of "
        f"gradients. The figures are on {len(report.labels):,} test images of these digits and on "
        f"{len(report.unknown_names):,} images of {listing(settings['held_out'])}, which no network has ever seen.",
        *report.summary[1:],
        findings(report.rows),
        speed(cost) + ".",
        CHOICE,
    ]
    return replace(report, title="AdamW, SGD and IVON on the same digits", summary=about)


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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seconds of our epochs over those of theirs, round by round, as quartiles: lower, median, upper."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
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
