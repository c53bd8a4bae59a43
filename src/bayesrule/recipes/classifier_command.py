"""``bayesrule train image | tabular | text``."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import tyro

from bayesrule.recipes.comparison import compare
from bayesrule.recipes.data import Data, quiet
from bayesrule.recipes.endings import say
from bayesrule.recipes.formats.named import NAMES
from bayesrule.recipes.optimizers import assignments
from bayesrule.recipes.repeats import train_seeds
from bayesrule.recipes.runs import saying
from bayesrule.recipes.settings import RunSettings, Settings
from bayesrule.recipes.tensorboard import watching
from bayesrule.recipes.terminal import print_results, progress
from bayesrule.recipes.text import TextSettings
from bayesrule.recipes.workers import Workers
from bayesrule.storage import write_text
from bayesrule.uses.report import Report, render


@dataclass(frozen=True, kw_only=True)
class Command:
    """Train a model on real data and keep the run in a folder: bayesrule train image | tabular | text | gpt.

    Args:
        out: Folder for the run; must not exist or be empty, unless the run is to go on.
        resume: Go on with the run in --out where it was stopped; nothing else needs to be said again.
        seeds: Train so many times, with seeds from --seed on, each in a folder of --out.
        config: A TOML file with any of these settings, and those of --set in a table [set]; what is said here as well goes first.
        set: A setting of the optimizer, key=value; may be given often.
        lr: Learning rate of the first step. None is the optimizer's default, here and below.
        weight_decay: Strength of the prior, or of the decay.
        beta2: Decay of the average of squares or curvatures.
        ess: Effective sample size, in examples (ivon; by default the number of training examples).
        hess_init: Curvature at the start (ivon).
        tensorboard: Write the metrics for TensorBoard, too.
        json: Print one JSON object instead of a table.
    """

    settings: ClassVar[type[RunSettings]]
    kind: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ("data",)
    hyperparameters: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    out: Path
    resume: bool = False
    seeds: int = 1
    config: Path | None = None
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    lr: float | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    ess: float | None = None
    hess_init: float | None = None
    tensorboard: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Settings are checked when all of them are known."""

    def run(self, workers: Workers) -> None:
        """Train, then print the results on the test data."""
        given = {name: value for name in SHORT if (value := getattr(self, name)) is not None}
        more = assignments(self.set)
        if twice := given.keys() & more.keys():
            raise ValueError(f"--{min(twice).replace('_', '-')} and --set both give {min(twice)}; drop one")
        plain = {one.name: getattr(self, one.name) for one in fields(self.settings)}
        for name in self.paths:
            plain[name] = settled(plain[name])
        plain["also"] = tuple(map(settled, plain["also"]))
        settings = self.settings(**{**plain, "hyperparameters": {**self.hyperparameters, **given, **more}})
        reports: list[Report] = []
        watched = watching(self.out) if self.tensorboard else nullcontext()
        with watched as watch, progress() if workers.is_first else nullcontext(quiet) as bars, saying(self.out, self.kind):
            told: dict[str, Any] = {"started": _notes, "bars": bars, "watch": watch if workers.is_first else None}
            train_seeds(settings, self.out, self.seeds, resume=self.resume, kind=self.kind, workers=workers, **told)
            workers.first(lambda: reports.append(compare([self.out], bars=bars)))
        workers.first(lambda: self.show(*reports))

    def show(self, report: Report) -> None:
        """Write and print the results."""
        write_text(self.out / "report.html", render(report))
        print_results(report, self.json)
        if not self.json:
            print(f"Report: {self.out / 'report.html'}")


def settled(place: str | None) -> str | None:
    """A path as it is from anywhere, since a run may be looked at from elsewhere; names of data stay."""
    return place if place is None or place in NAMES or not Path(place).exists() else str(Path(place).resolve())


def _notes(data: Data) -> None:
    """What was noticed in the data, before time is spent on them."""
    for note in data.notes:
        say(f"note: {note}")


SHORT = ("lr", "weight_decay", "beta2", "ess", "hess_init")  # settings of optimizers with a flag of their own


@dataclass(frozen=True, kw_only=True)
class TrainImage(Command, Settings):
    """Train a classifier of images."""

    settings = Settings
    kind = "image"


@dataclass(frozen=True, kw_only=True)
class TrainTabular(Command, Settings):
    """Train a classifier of the rows of a table."""

    settings = Settings
    kind = "row"
    model: str = "mlp"


@dataclass(frozen=True, kw_only=True)
class TrainText(Command, TextSettings):
    """Fine-tune a checkpoint of Hugging Face on a CSV of texts and labels, by LoRA or all of it.

    The prior of IVON is a Gaussian around zero, of precision ess * weight_decay; weight_decay must be above 0, or nothing bounds
    the posterior where the data say nothing. ess is 1e7 unless it is given: far above the number of documents, since fine-tuning
    wants a cold posterior (1e6 to 1e8 in the papers); weights are drawn with deviation 1 / sqrt(ess * (hess_init + weight_decay)).
    Too small an ess shows as a training loss that stays high; a larger one is nearer to a single model. A step moves a weight by
    up to lr * clip_radius: longer runs take a smaller lr (0.03 for 10,000 steps). See docs/text_classification.md.

    Args:
        lora: Train adapters and the head alone: the default, said aloud.
        ess: Effective sample size, in documents (ivon).
    """

    settings = TextSettings
    kind = "document"
    paths = ("data", "model", "validation", "test")
    lora: bool = False

    def run(self, workers: Workers) -> None:
        if self.lora and self.full:
            raise ValueError("--lora and --full exclude each other; drop one")
        super().run(workers)
