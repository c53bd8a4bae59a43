"""Finished runs, read back from their folders."""

import contextlib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import bayesrule as br
from bayesrule.recipes.data import FORWARD, Bars, Data, Part, Scale, fitting, quiet
from bayesrule.recipes.folder import digest, read_lines, read_record, restore, save
from bayesrule.recipes.settings import RunSettings, Settings, settings_within
from bayesrule.recipes.text import TextSettings
from bayesrule.recipes.training import anchor

PREDICTIONS = "predictions.safetensors"
COMMANDS = {"image": "image", "row": "tabular", "document": "text", "text": "gpt"}  # for each kind of data
SETTINGS: Mapping[str, type[RunSettings]] = {"image": Settings, "row": Settings, "document": TextSettings}
AT_ONCE = 4096  # examples predicted at once, at most


@dataclass(frozen=True)
class Record:
    """What ``run.json`` says of a run.

    Args:
        folder: Where it is.
        kind: Of the data, "image", "row" or "document".
        settings: What decided it.
        scale: Of the data.
        fingerprint: Of the data.
        notes: What was noticed in the data.
        seconds: Training time of every epoch, once it is finished.
        finished: Whether all files are there.
        failed: Why it cannot go on, if so.
        versions: Of what made it.
        threads: Of torch when it began: sums are rounded otherwise on another number.
        processes: That trained it together when it began.
    """

    folder: Path
    kind: str
    settings: RunSettings
    scale: Scale
    fingerprint: str
    notes: tuple[str, ...]
    seconds: tuple[float, ...] = ()
    finished: bool = False
    failed: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    processes: int = 1

    def load(self, memo: dict[Any, Data] | None = None) -> Data:
        """The data of the run, as they were.

        Args:
            memo: Data that were loaded before, so that many runs on the same load them once.

        Raises:
            OSError: If they are gone.
            ValueError: If they have changed.
        """
        key, memo = tuple(getattr(self.settings, name) for name in self.settings.of_data), {} if memo is None else memo
        if key not in memo:
            memo[key] = self.settings.load(self.scale)
        data = replace(memo[key], scale=memo[key].scale.kept(self.scale), notes=self.notes)
        if self.fingerprint != data.fingerprint:
            raise ValueError(f"the data of {self.folder} are no longer those that it began with ({data.name}); bring them back")
        if not data.scale.fits(data.shape):
            raise ValueError(f"{self.folder / 'run.json'} is damaged: the scale is not that of its data")
        return data

    @property
    def command(self) -> str:
        """What goes on with the run."""
        return going_on(self.kind, self.folder)


def going_on(kind: str, folder: Path) -> str:
    """The command that goes on with a run, or with several seeds of one."""
    return f"bayesrule train {COMMANDS[kind]} --resume --out {shlex.quote(str(folder))}"


def record_of(folder: Path) -> Record:
    """The record of a single run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of something else.
    """
    found = read_record(folder)
    if found["kind"] == "text":
        raise ValueError(f"{folder} holds a language model, and this is for classifiers")
    if found["kind"] not in COMMANDS:
        raise ValueError(f"{folder} holds {found['kind']!r}, not a single run; name one of its folders")
    try:
        data = found["data"]
        center, spread = (tuple(float(one) for one in data[side]) for side in ("center", "spread"))
        if len(center) != len(spread):
            raise ValueError("center and spread differ in length")
        return Record(
            folder,
            found["kind"],
            settings_within(folder, found, SETTINGS[found["kind"]]),
            Scale(center, spread),
            str(data.get("fingerprint")),
            tuple(map(str, data.get("notes", ()))),
            tuple(float(one) for one in found.get("seconds", ())),
            found.get("finished") is True,
            found.get("failed"),
            {str(name): str(version) for name, version in dict(found.get("versions", {})).items()},
            found.get("threads"),
            int(found.get("processes", 1)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {type(error).__name__}: {error}") from error


def describe(settings: RunSettings, data: Data, processes: int = 1) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins."""
    found = {
        "name": data.name,
        "form": data.form,
        "classes": data.classes,
        "shape": data.shape,
        "examples": {name: len(part) for name, part in data.parts.items()},
        "center": data.scale.center,
        "spread": data.scale.spread,
        "fingerprint": data.fingerprint,
        "notes": data.notes,
    }
    alike = {"threads": torch.get_num_threads(), "processes": processes}
    return {"kind": data.kind, "settings": settings.plain(), "data": found, **alike}


def place(device: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no device {device!r} here ({reason}); take auto, cpu or cuda") from error
    return found


@dataclass(frozen=True)
class Run:
    """A run read back from its folder.

    Args:
        folder: Where it is.
        settings: What decided it.
        data: Its data, split as in training.
        model: The model at the mean, in eval mode.
        posterior: The posterior over its weights, or None if the optimizer leaves none.
        history: One line per epoch.
        record: What its run.json says.
    """

    folder: Path
    settings: RunSettings
    data: Data
    model: nn.Module
    posterior: br.Posterior | None
    history: list[dict[str, Any]]
    record: Record

    @property
    def title(self) -> str:
        """The optimizer's name in print."""
        return self.settings.optimizers[self.settings.optimizer].title

    @property
    def seconds(self) -> float:
        """Training time, without validation."""
        return math.fsum(self.record.seconds)

    @property
    def at_once(self) -> int:
        """How many examples are predicted at once."""
        return fitting(self.data.extent, AT_ONCE)

    def probabilities(self, part: Part, num_samples: int | None, tick: Callable[[], object] = lambda: None) -> Tensor:
        """Class probabilities averaged over so many draws from the posterior, at the mean if None; shape (examples, classes)."""
        device = next(self.model.parameters()).device
        found = []
        order = part.by_length()
        batches = order.split(self.at_once)
        how: dict[str, Any] = {"batch_size": fitting(self.data.extent, 512, FORWARD)}
        if num_samples is not None:
            how |= {"num_samples": num_samples, "batch_norm": anchor(self.data, device)}
        posterior = None if num_samples is None else self.posterior
        for stored in part.stream(batches):
            inputs = self.data.scale(stored.to(device))
            try:
                probs = br.predict(self.model, posterior, inputs, **how).probs
            except RuntimeError as error:
                raise ValueError(f"{self.folder}: {error}") from error
            assert probs is not None
            found.append(probs.float().cpu())
            tick()
        return torch.cat(found)[order.argsort()]

    def predictions(self, num_samples: int | None = None, *, again: bool = False, bars: Bars = quiet) -> dict[str, Tensor]:
        """Probabilities by what was asked: "validation", "test", "unknown", and "averaged test", "averaged unknown".

        Averages are over ``num_samples`` draws, by default what suits the settings. Those that were kept beside these weights are
        read, unless ``again``; else they are computed and kept.
        """
        path, num_samples = self.folder / PREDICTIONS, self.settings.draws if num_samples is None else num_samples
        weights = digest(self.folder / self.settings.weights_file, self.folder / "posterior.safetensors")
        about = {"weights": weights, "num_samples": num_samples, "fingerprint": self.data.fingerprint}
        with contextlib.suppress(ValueError, OSError):
            kept, known = restore(path)
            if known == about and not again:
                return kept
        parts = {"validation": self.data.validation, "test": self.data.test}
        wanted: list[tuple[str, Part, int | None]] = [(name, part, None) for name, part in parts.items()]
        if self.data.unknown is not None:
            wanted.append(("unknown", self.data.unknown, None))
        if self.posterior is not None:
            wanted += [(f"averaged {name}", part, num_samples) for name, part, _ in wanted if name != "validation"]
        tick = bars("predict", sum(-(-len(part) // self.at_once) for _, part, _ in wanted))
        found = {name: self.probabilities(part, count, tick) for name, part, count in wanted}
        with contextlib.suppress(OSError):
            save(path, found, about)
        return found


def read(folder: Path, memo: dict[Any, Data] | None = None) -> Run:
    """The finished run in a folder.

    Args:
        folder: Where it is.
        memo: As for :meth:`Record.load`.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If it is not finished, or a file is damaged or does not fit the others; the message names it.
    """
    record = record_of(folder)
    settings = record.settings
    if not record.finished:
        raise ValueError(f"{folder} is not finished: {record.failed or f'go on with: {record.command}'}")
    history = read_lines(folder / "metrics.jsonl")
    if len(record.seconds) != len(history):
        raise ValueError(f"{folder / 'run.json'} is damaged: it has seconds of {len(record.seconds)} epochs, not {len(history)}")
    data = record.load(memo)
    try:
        model = settings.build(data)
        variational = settings.optimizers[settings.optimizer].variational
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error
    model.to(place(settings.device))
    posterior = load_learned(folder, model, variational, settings)
    return Run(folder, settings, data, model.eval(), posterior, history, record)


def load_learned(folder: Path, model: nn.Module, variational: bool, settings: RunSettings | None = None) -> br.Posterior | None:
    """Put the weights of a run into its model; the posterior beside them, if there is to be one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged, or of another model.
    """
    file = "model.safetensors" if settings is None else settings.weights_file
    try:
        if settings is None:
            model.load_state_dict(load_file(folder / file))
        else:
            settings.read_weights(model, folder)
    except (SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder / file} is damaged or of another model: {why}") from error
    if not variational:
        return None
    path = folder / "posterior.safetensors"
    posterior = br.Posterior.load(path)
    try:
        posterior.bind(model)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is of another model: {error.args[0]}") from error
    return posterior
