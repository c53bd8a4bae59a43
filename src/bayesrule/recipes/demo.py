"""The main job: AdamW, SGD and IVON side by side on real digits, at equal numbers of gradient evaluations."""

import json
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

DEMO = Settings(data="mnist5k", model="lenet", optimizer="", hyperparameters={}, epochs=40, held_out=(8, 9))

# Folder: optimizer, settings. torch's own AdamW and SGD, because a rival should be the original.
CONTESTANTS: dict[str, tuple[str, dict[str, float]]] = {
    "adamw": ("torch-adamw", {"lr": 1e-3, "weight_decay": 0.01}),
    "sgd": ("torch-sgd", {"lr": 0.03, "weight_decay": 5e-4}),
    "ivon": ("ivon", {"lr": 0.1, "hess_init": 0.1, "beta2": 0.999}),
}
CHOICE = (
    "Settings were chosen by validation NLL"  # tuned below
)


def is_complete(out: Path) -> bool:
    """Whether ``out`` holds a finished demo, so that there is nothing to do."""
    return (out / "report.html").exists() and (out / "run.json").exists() and read_record(out)["kind"] == "demo"


def demo(out: Path, settings: Settings = DEMO, bars: Bars = silent) -> None:
    """Train the contestants, one epoch of each in turn, and leave the folder of the demo at ``out``; on failure, nothing.

    Raises:
        FileExistsError: If ``out`` holds something already.
        ValueError: If training diverges.
    """
    with appearing(out) as folder:
        runs = {}
        for name, (optimizer, hyperparameters) in CONTESTANTS.items():
            runs[name] = begin(replace(settings, optimizer=optimizer, hyperparameters=hyperparameters))
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
            keep(chosen, training, folder / name)
            write(folder / name / "report.html", render(summarize_run(folder / name)))
        write_record(folder / "run.json", {"kind": "demo", "runs": list(runs)})
        write(folder / "metrics.json", json.dumps(results(folder), indent=2) + "\n")
        write(folder / "report.html", render(summarize(folder)))


def summarize(folder: Path, num_samples: int = 32) -> Report:
    """The predictions of all contestants, and of AdamW with a fitted temperature, ready to be tabled or rendered.

    Raises:
        FileNotFoundError, ValueError: As :func:`bayesrule.recipes.image.read`, for each run of the demo.
    """
    runs = {name: read(folder / name) for name in CONTESTANTS}
    adamw, sgd, ivon = runs.values()
    temperature, tempered = temper(adamw)
    methods = [*adamw.methods(0), tempered, *sgd.methods(0), *ivon.methods(num_samples)]
    data, settings = ivon.data, ivon.settings
    assert data.unknown is not None
    report = Report(
        title="AdamW, SGD and IVON on the same digits",
        summary=(),
        classes=data.classes,
        images=data.test[0],
        labels=data.test[1],
        methods=methods,
        unknown_images=data.unknown[0],
        unknown_names=[str(digit) for digit in data.unknown[1].tolist()],
        settings={run.title: describe(run.settings) for run in runs.values()} | {"Versions": ivon.versions},
    )
    known, held_out = (" and ".join((", ".join(names[:-1]), names[-1])) for names in (data.classes, [str(d) for d in settings.held_out]))
    return replace(
        report,
        summary=[
            f"Three copies of one {settings.model} network ({sum(p.numel() for p in ivon.model.parameters()):,} weights, the same "
            f"start, the same order of images) learned the digits {known} from {len(data.train[1]):,} images of {data.name}: one with "
            f"AdamW, one with SGD, one with IVON, each for {settings.epochs} epochs and the same number of gradients. The figures "
            f"are on {len(data.test[1]):,} test images of these digits and on {len(data.unknown[1]):,} images of {held_out}, which no "
            "network has ever seen.",
            "IVON learns a distribution over the weights, not one set of them. Its mean is a network like the others; averaged means "
            f"the mean of the probabilities of {num_samples} networks drawn from the distribution. The usual remedy for AdamW stands "
            f"beside it: all its logits divided by one temperature, {temperature:.2f}, fitted on {len(data.validation[1])} validation "
            "images.",
            findings(report.rows),
            speed(runs) + ".",
            CHOICE,
        ],
    )


def temper(run: Run) -> tuple[float, Method]:
    """The temperature that fits a run's validation data best, and what the run predicts with it."""
    data = run.data
    temperature = fit_temperature(run.probabilities(data.validation[0]).log(), data.validation[1])
    plain = run.methods(0)[0]
    assert plain.unknown is not None
    test, unknown = ((probs.log() / temperature).softmax(1) for probs in (plain.test, plain.unknown))
    return temperature, Method(f"{plain.name}, temperature", test, unknown, run.seconds)


def findings(rows: list[dict[str, Any]]) -> str:
    """What the table says about averaged IVON against AdamW as it is and with a temperature, read off the numbers."""
    plain, tempered, averaged = rows[0], rows[1], rows[-1]

    def verdict(key: str, larger_is_better: bool, rival: dict[str, Any]) -> str:
        ours, theirs = (f"{row[key]:.3f}" for row in (averaged, rival))
        word = "as good" if ours == theirs else "better" if (ours > theirs) == larger_is_better else "worse"
        return f"{word} ({ours} against {theirs})"

    sentences = [
        f"{'Against' if rival is plain else 'against'} {rival['method']}, averaged IVON is in NLL {verdict('nll', False, rival)}, in ECE "
        f"{verdict('ece', False, rival)}, and at noticing the unknown digits (AUROC) {verdict('auroc_ood', True, rival)}"
        for rival in (plain, tempered)
    ]
    return f"{'; '.join(sentences)}. This is one run on little data: it shows what the methods do, and does not rank them."


def ratios(runs: dict[str, Run]) -> list[float]:
    """Seconds of an epoch of IVON over those of AdamW, as quartiles over the rounds: lower, median, upper."""
    pairs = zip(runs["ivon"].history, runs["adamw"].history, strict=True)
    ratio = torch.tensor([ours["seconds"] / theirs["seconds"] for ours, theirs in pairs])
    return ratio.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def speed(runs: dict[str, Run]) -> str:
    """One line about the cost of an epoch."""
    lower, median, upper = ratios(runs)
    rounds = len(runs["ivon"].history)
    return f"IVON seconds per epoch / AdamW (fused) seconds per epoch: {median:.2f} [{lower:.2f}, {upper:.2f}], median and quartiles of {rounds} rounds"
