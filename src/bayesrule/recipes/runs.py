"""A run from its settings to its folder: whatever stops it, it goes on."""

import contextlib
import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayesrule.recipes.data import Bars, Data, quiet
from bayesrule.recipes.folder import claim, locked, restore, save, write_lines, write_record
from bayesrule.recipes.models import MODELS, build
from bayesrule.recipes.names import lookup
from bayesrule.recipes.optimizers import OPTIMIZERS, settle
from bayesrule.recipes.residual import NORMS
from bayesrule.recipes.results import COMMANDS, Record, Run, describe, load_for, place, record_of
from bayesrule.recipes.settings import Settings
from bayesrule.recipes.training import Diverged, Training
from bayesrule.storage import write_tensors

EVERY = 2.0  # seconds between checkpoints, at least
EFFORT = 0.02  # of the time, at most, for checkpoints
CHECKPOINT = "checkpoint.safetensors"
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


def check(settings: Settings) -> None:
    """Refuse what is wrong whatever the data are, before they are read.

    Raises:
        ValueError: If a name is unknown, or an optimizer has no such setting.
    """
    settle(settings.optimizer, settings.hyperparameters, 1)
    place(settings.device)
    lookup("norm", settings.norm, NORMS)
    if ":" not in settings.model:
        lookup("model", settings.model, MODELS)


def train(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    kind: str | None = None,
    started: Callable[[Data], object] = lambda data: None,
    bars: Bars = quiet,
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
    record = record_of(out) if resume and (out / "run.json").exists() else None
    if record is None:
        check(settings)
        claim(out)
        data = load_for(settings, bars=bars)
    else:
        for name in settings.differ(record.settings):
            raise _other(record, name, getattr(settings, name), getattr(record.settings, name))
        check(settings)
        if record.threads not in (None, torch.get_num_threads()) and not record.finished:
            warnings.warn(
                f"{out} began with {record.threads} threads and goes on with {torch.get_num_threads()}: it will end like one that "
                "was not stopped only up to rounding; set OMP_NUM_THREADS for more",
                stacklevel=2,
            )
        record = replace(record, settings=replace(record.settings, data=settings.data))  # they may have moved
        data = record.load()
    if kind not in (None, data.kind):
        raise ValueError(f"{data.name} holds {data.kind}s, not {kind}s; take: bayesrule train {COMMANDS[data.kind]}")
    complete, training = begin(settings, data)
    if record is not None:
        mine, theirs = complete.hyperparameters, record.settings.hyperparameters
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise _other(record, name, mine.get(name), theirs.get(name))
        if record.failed:
            raise ValueError(f"{out} cannot go on: {record.failed}; train into another --out")
    with locked(out):
        if record is None:
            claim(out)
        if record is None or not record_of(out).finished:
            started(data)
            if record is None:
                write_record(out / "run.json", describe(complete, data))
            else:
                _go_on(out, complete, training)
            try:
                _learn(complete, training, out, bars, watch)
                finish(complete, training, out, bars)
            except OSError as error:
                if error.errno is None:
                    raise
                words = f"{error.strerror}; mend that and go on with: {record_of(out).command}"
                raise OSError(error.errno, words, error.filename) from error
            except KeyboardInterrupt:
                raise Paused(f"stopped at once; go on from the last checkpoint with: {record_of(out).command}") from None
        (out / CHECKPOINT).unlink(missing_ok=True)


def _other(record: Record, name: str, mine: Any, theirs: Any) -> ValueError:
    """The refusal to go on with another setting than a run began with."""
    return ValueError(
        f"{record.folder} began with {name} {theirs}, not {mine}; give the same settings, or --resume and --out alone"
    )


def identity(settings: Settings, data: Data) -> str:
    """Of all that decides a run."""
    words = json.dumps({**settings.plain(), "data": data.fingerprint}, sort_keys=True)  # wherever the data are
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _go_on(out: Path, settings: Settings, training: Training) -> None:
    """Bring back the last checkpoint, if there is one; without one the run starts anew."""
    path = out / CHECKPOINT
    if path.exists():
        try:
            tensors, numbers = restore(path)
            if numbers["run"] != identity(settings, training.data):
                raise ValueError("its settings or data are others")
            training.load_state(tensors, numbers)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged or of another run: {why}; delete it to start anew") from error


def _learn(settings: Settings, training: Training, out: Path, bars: Bars, watch: Watch | None) -> None:
    """All epochs that are left, with a checkpoint now and then."""
    advance = bars(OPTIMIZERS[settings.optimizer].title, settings.epochs * training.steps)
    for _ in range(training.done):
        advance()
    due, whose = time.monotonic() + EVERY, identity(settings, training.data)

    def keep() -> None:
        nonlocal due
        began = time.monotonic()
        tensors, numbers = training.state()
        save(out / CHECKPOINT, tensors, {**numbers, "run": whose})
        due = time.monotonic() + max(EVERY, (time.monotonic() - began) / EFFORT)

    with stopping() as stop:

        def tick() -> None:
            advance()
            if stop.is_set():
                keep()
                raise Paused(
                    f"stopped after step {training.done:,} of {settings.epochs * training.steps:,} and saved; "
                    f"go on with: {record_of(out).command}"
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
        except Exception as error:
            if training.between_steps and isinstance(error, ValueError):  # of the data
                with contextlib.suppress(OSError):
                    keep()  # what was learned until then
            if not training.between_steps and ":" in settings.model:
                raise ValueError(f"{settings.model} failed in training: {type(error).__name__}: {error}") from error
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


def finish(settings: Settings, training: Training, out: Path, bars: Bars = quiet) -> None:
    """Write what a finished run leaves; ``run.json`` says last that it is finished."""
    training.keep_best()
    model, posterior = training.model.eval(), None
    write_tensors(out / "model.safetensors", model.state_dict(), {})
    if OPTIMIZERS[settings.optimizer].variational:
        posterior = training.posterior()
        posterior.save(out / "posterior.safetensors")
    write_lines(out / "metrics.jsonl", training.history)
    seconds = {"seconds": training.seconds, "best_epoch": training.best_epoch if settings.patience else None}
    record = describe(settings, training.data) | seconds
    write_record(out / "run.json", record)
    Run(out, settings, training.data, model, posterior, training.history, record_of(out)).predictions(bars=bars)
    write_record(out / "run.json", record | {"finished": True})
