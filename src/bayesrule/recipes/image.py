"""Train a classifier of small images, keep the run in a folder, and read it back for evaluation and report."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayesrule as br
from bayesrule.recipes.data import ImageData
from bayesrule.recipes.data import load as load_data
from bayesrule.recipes.folder import appearing, claim, read_lines, read_record, write, write_record
from bayesrule.recipes.models import build
from bayesrule.recipes.training import OPTIMIZERS, Training, settle
from bayesrule.uses.report import Method, Report, render

Bars = Callable[[str, int], Callable[[], object]]
"""Starts a progress bar, given a name and the number of steps; what it returns is called after every step."""


def silent(name: str, steps: int) -> Callable[[], object]:
    """No progress bar."""
    return lambda: None


@dataclass(frozen=True)
class Settings:
    """All that decides a run; kept in its ``run.json``.

    Args:
        data, model, optimizer: Names in the tables of data, models and optimizers.
        hyperparameters: The optimizer's settings, complete.
        epochs: Passes through the training data.
        batch_size: Examples a step.
        seed: Seed of the first weights, of the order of examples and of the optimizer's draws.
        held_out: Digits that are not learned, but kept to see how the model takes the unknown.
    """

    data: str
    model: str
    optimizer: str
    hyperparameters: Mapping[str, float]
    epochs: int = 30
    batch_size: int = 50
    seed: int = 0
    held_out: tuple[int, ...] = ()


def begin(settings: Settings) -> tuple[Settings, Training]:
    """Data, model and optimizer, ready for the first epoch, and the settings with all defaults filled in.

    Raises:
        ValueError: If a name or value of the settings is wrong.
    """
    data = load_data(settings.data, settings.held_out)
    model = build(settings.model, data.train[0], len(data.classes), settings.seed)
    hyperparameters = settle(settings.optimizer, settings.hyperparameters, len(data.train[1]))
    choice = OPTIMIZERS[settings.optimizer]
    seed = {"seed": settings.seed} if choice.variational else {}
    training = Training(
        model,
        choice.make(model.parameters(), **hyperparameters, **seed),
        data.train,
        data.validation,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return Settings(**{**asdict(settings), "hyperparameters": hyperparameters}), training


def keep(settings: Settings, training: Training, folder: Path) -> None:
    """Write a finished run, all but its report, into an existing folder."""
    save_file(training.model.state_dict(), folder / "model.safetensors")
    if OPTIMIZERS[settings.optimizer].variational:
        num_data = len(training.train[1])
        br.Posterior.from_optimizer(training.optimizer, training.model, num_data=num_data).save(folder / "posterior.safetensors")
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in training.history))
    write_record(folder / "run.json", {"kind": "image", "settings": asdict(settings)})


@dataclass(frozen=True)
class Run:
    """A run read back from its folder.

    Args:
        settings: What decided it.
        data: Its data, split as in training.
        model: The model at the mean.
        posterior: The posterior over its weights, or None if the optimizer leaves none.
        history: One line per epoch.
        versions: Of the packages that made it.
    """

    settings: Settings
    data: ImageData
    model: nn.Module
    posterior: br.Posterior | None
    history: list[dict[str, Any]]
    versions: dict[str, str]

    @property
    def title(self) -> str:
        """The optimizer's name in print."""
        return OPTIMIZERS[self.settings.optimizer].title

    @property
    def seconds(self) -> float:
        """Training time."""
        return sum(line["seconds"] for line in self.history)

    def probabilities(self, inputs: Tensor, num_samples: int | None = None) -> Tensor:
        """Class probabilities averaged over so many draws from the posterior; at the mean if None."""
        if num_samples is None:
            probs = br.predict(self.model, None, inputs).probs
        else:
            probs = br.predict(self.model, self.posterior, inputs, num_samples=num_samples).probs
        assert probs is not None
        return probs

    def methods(self, num_samples: int) -> list[Method]:
        """What the run predicts at its mean and, if it has a posterior, averaged over draws from it."""
        draws = [None, num_samples] if self.posterior is not None else [None]
        names = [f"{self.title}, mean", f"{self.title}, averaged"] if len(draws) > 1 else [self.title]
        return [
            Method(
                name,
                self.probabilities(self.data.test[0], count),
                None if self.data.unknown is None else self.probabilities(self.data.unknown[0], count),
                self.seconds,
                self.history if count is None else (),
            )
            for name, count in zip(names, draws, strict=True)
        ]


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged or does not fit the others; the message names it.
    """
    record = read_record(folder)
    if record["kind"] != "image":
        parts = [f"{folder / name}" for name in record.get("runs", ())]
        hint = f"; name one of its runs: {', '.join(parts)}" if parts else ""
        raise ValueError(f"{folder} holds a {record['kind']}, not a single run{hint}")
    try:
        settings = Settings(**record["settings"])
        data = load_data(settings.data, tuple(settings.held_out))
        model = build(settings.model, data.train[0], len(data.classes))
        variational = OPTIMIZERS[settings.optimizer].variational
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder / 'model.safetensors'} is damaged or of another model: {why}") from error
    posterior = None
    if variational:
        path = folder / "posterior.safetensors"
        posterior = br.Posterior.load(path)
        try:
            posterior.bind(model)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is of another model: {error.args[0]}") from error
    return Run(
        settings,
        data,
        model.eval(),
        posterior,
        read_lines(folder / "metrics.jsonl"),
        record.get("versions", {}),
    )


def summarize(folder: Path, num_samples: int = 32) -> Report:
    """The predictions of the run in a folder, ready to be tabled or rendered."""
    run = read(folder)
    methods = run.methods(num_samples)
    settings, data = run.settings, run.data
    weights = sum(p.numel() for p in run.model.parameters())
    summary = [
        f"A {settings.model} network with {weights:,} weights learned {len(data.classes)} classes of {data.name} from "
        f"{len(data.train[1]):,} images in {settings.epochs} epochs ({run.seconds:.0f} seconds) with {run.title}. All figures "
        f"here are on {len(data.test[1]):,} test images that played no part in training."
    ]
    if run.posterior is not None:
        summary.append(
            f"{run.title} learns a distribution over the weights. Its mean is a network like any other; averaged means the mean "
            f"of the probabilities of {num_samples} networks drawn from that distribution."
        )
    return Report(
        title=f"{run.title} on {data.name}",
        summary=summary,
        classes=data.classes,
        images=data.test[0],
        labels=data.test[1],
        methods=methods,
        unknown_images=None if data.unknown is None else data.unknown[0],
        unknown_names=() if data.unknown is None else [str(k) for k in data.unknown[1].tolist()],
        settings={"Run": describe(settings), "Versions": run.versions},
    )


def describe(settings: Settings) -> dict[str, Any]:
    """The settings as one flat table, in words."""
    flat = {**asdict(settings), **settings.hyperparameters, "schedule": "cosine to 0"}
    del flat["hyperparameters"]
    flat["held_out"] = ", ".join(map(str, settings.held_out)) or "none"
    return {name.replace("_", " "): f"{value:g}" if isinstance(value, float) else value for name, value in flat.items()}


def train(settings: Settings, out: Path, bars: Bars = silent) -> None:
    """Train and leave a complete run folder at ``out``; on failure, nothing.

    Raises:
        FileExistsError: If ``out`` holds something already.
        ValueError: If a setting is wrong, or training diverges.
    """
    claim(out)
    settings, training = begin(settings)
    with appearing(out) as folder:
        tick = bars(OPTIMIZERS[settings.optimizer].title, settings.epochs * training.steps)
        for _ in range(settings.epochs):
            training.epoch(tick)
        keep(settings, training, folder)
        write(folder / "report.html", render(summarize(folder)))
