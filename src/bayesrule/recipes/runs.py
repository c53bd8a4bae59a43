"""A run from its settings to its folder, and back."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import bayesrule as br
from bayesrule.recipes.data import Data, Part, Scale, Tick, load, quiet
from bayesrule.recipes.folder import (
    claim,
    digest,
    locked,
    read_lines,
    read_record,
    restore,
    save,
    write_lines,
    write_record,
)
from bayesrule.recipes.models import build
from bayesrule.recipes.optimizers import OPTIMIZERS, settle
from bayesrule.recipes.settings import Settings, from_plain
from bayesrule.recipes.training import Diverged, Training, anchor
from bayesrule.storage import write_tensors

EVERY = 2.0  # seconds between checkpoints, at least
EFFORT = 0.02  # of the time, at most, for checkpoints
CHECKPOINT, PREDICTIONS = "checkpoint.safetensors", "predictions.safetensors"
RECIPES = {"image": "image", "row": "tabular"}  # the command for each kind of data
AT_ONCE = 4096  # examples predicted at once: bounds memory
SAMPLES = 32

Watch = Callable[[int, Mapping[str, Any]], None]
"""Told the line of every epoch, with the seed of the run."""


class Paused(Exception):
    """A run was stopped and saved; the message says how to go on."""


def begin(settings: Settings, data: Data) -> tuple[Settings, Training]:
    """Model and optimizer, ready for the first epoch, and the settings with all defaults filled in.

    Raises:
        ValueError: If a name or value of the settings is wrong.
    """
    device = place(settings.device)
    hyperparameters = settle(settings.optimizer, settings.hyperparameters, len(data.train))
    if data.kind != "image" and settings.augment:
        raise ValueError(f"augment {' '.join(settings.augment)} changes images, and the data are {data.kind}s; leave it out")
    model = build(settings.model, data.shape, len(data.classes), settings.seed, settings.norm).to(device)
    training = Training(
        model,
        OPTIMIZERS[settings.optimizer].make(model, hyperparameters, settings.seed),
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        schedule=settings.schedule,
        augment=settings.augment,
        bf16=settings.precision == "bf16",
        patience=settings.patience,
    )
    return replace(settings, hyperparameters=hyperparameters), training


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


def load_for(settings: Settings, scale: Scale | None = None, bars: Tick = quiet) -> Data:
    """The data of a run."""
    held_out, seed, split = settings.held_out, settings.split_seed, settings.split
    return load(
        settings.data, held_out, seed, split=split, size=settings.height_width, target=settings.target, scale=scale, bars=bars
    )


def train(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    kind: str | None = None,
    started: Callable[[Data], object] = lambda data: None,
    bars: Tick = quiet,
    watch: Watch | None = None,
) -> None:
    """Train and leave a complete run folder at ``out``.

    The folder is there from the start: settings in ``run.json``, one line an epoch in ``metrics.jsonl``, and a checkpoint every
    few seconds. Killed at any moment, a run goes on from there with ``resume`` and ends bit-equal to one that was not.

    Args:
        settings: What to do.
        out: The folder.
        resume: Go on where a run of these settings was stopped; begin if there is none.
        kind: "image" or "row": which data are wanted; None takes both.
        started: Called with the data when nothing is wrong with them or the settings, and the folder is ours.
        bars: Progress.
        watch: Told every line of the metrics.

    Raises:
        FileExistsError: If ``out`` holds something already and it is not to be resumed.
        ValueError: If a setting is wrong, the data cannot be learned from, training diverges, or ``out`` holds another run.
        Paused: If a signal came; everything is saved.
    """
    if not resume:
        claim(out)
    record = read_record(out) if resume and (out / "run.json").exists() else None
    if record is None:
        claim(out)
    data = load_for(settings, None if record is None else _scale(out, record), bars)
    if record is not None:
        data = replace(data, notes=tuple(record["data"].get("notes", ())))
    if kind not in (None, data.kind):
        raise ValueError(f"{data.name} holds {data.kind}s, not {kind}s; take: bayesrule train {RECIPES[data.kind]}")
    complete, training = begin(settings, data)
    if record is not None:
        _compare(out, record, complete, data)
    with locked(out):
        if record is None:
            claim(out)
        elif read_record(out).get("finished"):
            return
        started(data)
        if record is None:
            write_record(out / "run.json", describe(complete, data))
        else:
            _go_on(out, training)
        try:
            _learn(complete, training, out, bars, watch)
            finish(complete, training, out, bars)
        except KeyboardInterrupt:
            raise Paused(f"stopped at once; go on from the last checkpoint with: {going_on(data.kind, out)}") from None
        (out / CHECKPOINT).unlink(missing_ok=True)


def describe(settings: Settings, data: Data) -> dict[str, Any]:
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
    return {"kind": data.kind, "settings": settings.plain(), "data": found}


def _scale(out: Path, record: Mapping[str, Any]) -> Scale:
    try:
        return Scale(*(tuple(map(float, record["data"][side])) for side in ("center", "spread")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{out / 'run.json'} is damaged: it has no scale of the data") from error


def _compare(out: Path, record: Mapping[str, Any], settings: Settings, data: Data) -> None:
    """Refuse to go on with other settings or data than a run began with."""
    began = settings_of(out, record)
    if (name := settings.differs(began)) is not None:
        mine, theirs = settings.plain()[name], began.plain()[name]
        raise ValueError(f"{out} began with {name} {theirs}, not {mine}; give the same settings, or --resume and --out alone")
    _same_data(out, record, data)
    if "failed" in record:
        raise ValueError(f"{out} cannot go on: {record['failed']}; train into another --out")


def _same_data(out: Path, record: Mapping[str, Any], data: Data) -> None:
    if record["data"].get("fingerprint") != data.fingerprint:
        raise ValueError(f"the data of {out} are no longer those that it began with ({data.name}); bring them back")


def _go_on(out: Path, training: Training) -> None:
    """Bring back the last checkpoint, if there is one; without one the run starts anew."""
    path = out / CHECKPOINT
    if path.exists():
        tensors, numbers = restore(path)
        try:
            training.load_state(tensors, numbers)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged or of another run: {why}; delete it to start anew") from error


def _learn(settings: Settings, training: Training, out: Path, bars: Tick, watch: Watch | None) -> None:
    """All epochs that are left, with a checkpoint now and then."""
    advance = bars(OPTIMIZERS[settings.optimizer].title, settings.epochs * training.steps)
    for _ in range(training.done):
        advance()
    due = time.monotonic() + EVERY

    def keep() -> None:
        nonlocal due
        began = time.monotonic()
        save(out / CHECKPOINT, *training.state())
        due = time.monotonic() + max(EVERY, (time.monotonic() - began) / EFFORT)

    with stopping() as stop:

        def tick() -> None:
            advance()
            if stop.is_set():
                keep()
                raise Paused(
                    f"stopped after step {training.done:,} of {settings.epochs * training.steps:,} and saved; "
                    f"go on with: {going_on(training.data.kind, out)}"
                )
            if time.monotonic() >= due:
                keep()

        try:
            for line in training.history:
                if watch:
                    watch(settings.seed, line)
            while not training.finished:
                known = len(training.history)
                try:
                    training.epoch(tick)
                finally:
                    if len(training.history) > known:
                        write_lines(out / "metrics.jsonl", training.history)
                        if watch:
                            watch(settings.seed, training.history[-1])
            keep()
        except Diverged as error:
            write_record(out / "run.json", {**describe(settings, training.data), "failed": str(error)})
            raise
        except ValueError:  # of the data; what was learned until then is worth keeping
            with contextlib.suppress(OSError):
                keep()
            raise


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set inside, once; the next one interrupts as ever."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def note(*_: object) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def going_on(kind: str, out: Path) -> str:
    """The command that goes on with a run."""
    return f"bayesrule train {RECIPES.get(kind, 'image')} --resume --out {out}"


def finish(settings: Settings, training: Training, out: Path, bars: Tick = quiet) -> None:
    """Write what a finished run leaves; ``run.json`` says last that it is finished."""
    training.keep_best()
    model, posterior = training.model, None
    if training.best is not None:
        training._validate()  # running statistics of batch norm, at the mean that is kept
    model.eval()
    write_tensors(out / "model.safetensors", model.state_dict(), {})
    if OPTIMIZERS[settings.optimizer].variational:
        posterior = training.posterior()
        posterior.save(out / "posterior.safetensors")
    write_lines(out / "metrics.jsonl", training.history)
    seconds = {"seconds": training.seconds, "best_epoch": training.best_epoch if settings.patience else None}
    record = describe(settings, training.data) | seconds | {"finished": True}
    Run(out, settings, training.data, model, posterior, training.history, record).predictions(bars=bars)
    write_record(out / "run.json", record)


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
        record: All of its run.json.
    """

    folder: Path
    settings: Settings
    data: Data
    model: nn.Module
    posterior: br.Posterior | None
    history: list[dict[str, Any]]
    record: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The optimizer's name in print."""
        return OPTIMIZERS[self.settings.optimizer].title

    @property
    def seconds(self) -> float:
        """Training time, without validation."""
        return math.fsum(self.record["seconds"])

    def probabilities(self, part: Part, num_samples: int | None, tick: Callable[[], object] = lambda: None) -> Tensor:
        """Class probabilities averaged over so many draws from the posterior, at the mean if None; shape (examples, classes)."""
        device = next(self.model.parameters()).device
        found = []
        batches = torch.arange(len(part)).split(AT_ONCE)
        anchors = anchor(self.data, device) if num_samples is not None else None
        for stored in part.stream(batches):
            inputs = self.data.scale(stored.to(device))
            try:
                if num_samples is None:
                    probs = br.predict(self.model, None, inputs).probs
                else:
                    probs = br.predict(self.model, self.posterior, inputs, num_samples=num_samples, batch_norm=anchors).probs
            except RuntimeError as error:
                raise ValueError(f"{self.folder}: {error}") from error
            assert probs is not None
            found.append(probs.float().cpu())
            tick()
        return torch.cat(found)

    def predictions(self, num_samples: int = SAMPLES, *, again: bool = False, bars: Tick = quiet) -> dict[str, Tensor]:
        """Probabilities by what was asked: "validation", "test", "unknown", and "averaged test", "averaged unknown".

        Those that were kept beside these weights are read, unless ``again``; else they are computed and kept.
        """
        path = self.folder / PREDICTIONS
        weights = digest(self.folder / "model.safetensors", self.folder / "posterior.safetensors")
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
        tick = bars("predict", sum(-(-len(part) // AT_ONCE) for _, part, _ in wanted))
        found = {name: self.probabilities(part, count, tick) for name, part, count in wanted}
        with contextlib.suppress(OSError):
            save(path, found, about)
        return found


def settings_of(folder: Path, record: Mapping[str, Any]) -> Settings:
    """The settings of a run.

    Raises:
        ValueError: If they are damaged.
    """
    try:
        return from_plain(record["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error


def read(folder: Path, memo: dict[Any, Data] | None = None) -> Run:
    """The finished run in a folder.

    Args:
        folder: Where it is.
        memo: Data that were loaded before, so that many runs on the same load them once.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If it is not finished, or a file is damaged or does not fit the others; the message names it.
    """
    record = read_record(folder)
    settings = settings_of(folder, record)
    if not record.get("finished"):
        raise ValueError(f"{folder} is not finished: " + record.get("failed", f"go on with: {going_on(record['kind'], folder)}"))
    scale, memo = _scale(folder, record), {} if memo is None else memo
    key = tuple(getattr(settings, name) for name in ("data", "held_out", "split_seed", "split", "size", "target"))
    data = replace(memo[key], scale=scale) if key in memo else memo.setdefault(key, load_for(settings, scale))
    _same_data(folder, record, data)
    try:
        model = build(settings.model, data.shape, len(data.classes), settings.seed, settings.norm)
        model.to(place(settings.device))
        variational = OPTIMIZERS[settings.optimizer].variational
        seconds = [float(one) for one in record["seconds"]]
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
    history = read_lines(folder / "metrics.jsonl")
    return Run(folder, settings, data, model.eval(), posterior, history, {**record, "seconds": seconds})
