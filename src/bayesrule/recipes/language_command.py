"""``bayesrule train gpt``, and what ``evaluate`` and ``report`` do with its runs."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import tyro

from bayesrule.recipes.data import quiet
from bayesrule.recipes.gpt import GPTSettings
from bayesrule.recipes.language import KIND, SAMPLES, compare, read, sample
from bayesrule.recipes.language_runs import train
from bayesrule.recipes.names import lookup
from bayesrule.recipes.optimizers import TEXT_OPTIMIZERS, assignments
from bayesrule.recipes.runs import saying
from bayesrule.recipes.tensorboard import watching
from bayesrule.recipes.terminal import print_json, print_results, print_rows, progress
from bayesrule.recipes.tokens import NAMES
from bayesrule.recipes.workers import Workers
from bayesrule.storage import write_text
from bayesrule.uses.language import LanguageReport, render_language

SAMPLE = "sample.txt"


@dataclass(frozen=True, kw_only=True)
class TrainGPT(GPTSettings):
    """Train a GPT on text; by default a small one, in about two minutes, on the source of Python's standard library.

    Args:
        out: Folder for the run; must not exist or be empty, unless the run is to go on.
        resume: Go on with the run in --out where it was stopped; nothing else needs to be said again.
        config: A TOML file with any of these settings, and those of --set in a table [set]; what is said here as well goes first.
        set: A setting of the optimizer, key=value; may be given often.
        lr: Learning rate after the warm-up. None is the optimizer's default, here and below.
        weight_decay: Strength of the prior, or of the decay.
        beta2: Decay of the average of squares or curvatures.
        ess: Effective sample size, in tokens.
        hess_init: Curvature at the start: a number, or data for that of eight batches.
        sample: Tokens of text that the model writes at the end.
        prompt: What it begins with.
        temperature: Of what it writes; 0 is always the most probable token.
        draw: Write with the weights of this draw of the posterior; none is the mean.
        tensorboard: Write the metrics for TensorBoard, too.
        json: Print one JSON object instead of a table.
    """

    settings: ClassVar[type] = GPTSettings
    short: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta2", "ess", "hess_init")
    hyperparameters: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    out: Path = Path("runs/gpt")
    resume: bool = False
    config: Path | None = None
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    lr: float | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    ess: float | None = None
    hess_init: float | str | None = None
    sample: int = 0
    prompt: str = "\n"
    temperature: float = 0.8
    draw: int | None = None
    tensorboard: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Settings are checked when all of them are known."""

    def run(self, workers: Workers) -> None:
        """Train, then print the results, and perhaps some text."""
        given = {name: value for name in self.short if (value := getattr(self, name)) is not None}
        more = assignments(self.set)
        if twice := given.keys() & more.keys():
            raise ValueError(f"--{min(twice).replace('_', '-')} and --set both give {min(twice)}; drop one")
        plain = {one.name: getattr(self, one.name) for one in fields(GPTSettings)}
        plain["data"] = tuple(str(Path(d).resolve()) if Path(d).exists() and d not in NAMES else d for d in self.data)
        settings = GPTSettings(**{**plain, "hyperparameters": {**self.hyperparameters, **given, **more}})
        if self.sample < 0 or not self.temperature >= 0:
            raise ValueError(f"sample and temperature must be at least 0, got {self.sample} and {self.temperature}")
        if self.sample and not self.prompt:
            raise ValueError("prompt must not be empty; the text begins after it")
        if self.sample and self.draw is not None and not lookup("optimizer", self.optimizer, TEXT_OPTIMIZERS).variational:
            raise ValueError(f"{self.optimizer} leaves no posterior to draw from; leave --draw out")
        watched = watching(self.out) if self.tensorboard and workers.is_first else nullcontext()
        with watched as watch, progress() if workers.is_first else nullcontext(quiet) as bars, saying(self.out, KIND):
            train(settings, self.out, resume=self.resume, bars=bars, watch=watch, workers=workers)
        workers.first(self.show)

    def show(self) -> None:
        """Write and print the results."""
        report = compare([self.out])
        write_text(self.out / "report.html", render_language(report))
        text = None
        if self.sample:
            text = sample(read(self.out), self.sample, prompt=self.prompt, temperature=self.temperature, draw=self.draw)
            write_text(self.out / SAMPLE, text + "\n")
        show(report, self.json, {} if text is None else {"sample": text})
        if not self.json:
            print("" if text is None else f"{text}\n", end="")
            print(f"Report: {self.out / 'report.html'}")


def show(report: LanguageReport, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """The rows; as JSON that of the last run, with all of them in ``rows`` if there are several."""
    if not as_json:
        print_results(report, False)
        return
    rows = [{"perplexity_mc": None, **row} for row in report.rows]
    print_json({**rows[-1], **({"rows": rows} if len(rows) > 1 else {}), **(more or {})})


def measured(folder: Path, num_samples: int | None, as_json: bool) -> None:
    """Measure a run anew and print."""
    show(compare([folder], SAMPLES if num_samples is None else num_samples, again=True), as_json)


def written(folders: Sequence[Path], path: Path, num_samples: int | None, as_json: bool) -> None:
    """Write the page of runs side by side."""
    report = compare(folders, SAMPLES if num_samples is None else num_samples)
    write_text(path, render_language(report))
    if as_json:
        print_json({"report": str(path), "rows": report.rows})
    else:
        print_rows(report.rows, report.columns)
        print(f"Report: {path}")
