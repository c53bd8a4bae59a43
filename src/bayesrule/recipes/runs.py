"""A run from its settings to its folder: whatever stops it, it goes on."""

import contextlib
import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesrule.recipes.data import Bars, Data, Scale, quiet
from bayesrule.recipes.folder import claim, locked, restore, save, write_lines, write_record
from bayesrule.recipes.optimizers import settle
from bayesrule.recipes.results import COMMANDS, Record, Run, describe, going_on, place, record_of
from bayesrule.recipes.settings import RunSettings
from bayesrule.recipes.training import Diverged, Training
from bayesrule.recipes.workers import ALONE, Elsewhere, Workers, is_loss

EVERY = 2.0  # seconds between checkpoints, at least
EFFORT = 0.02  # of the time, at most, for checkpoints
CHECKPOINT = "checkpoint.safetensors"
Watch = Callable[[int, Mapping[str, Any]], None]
"""Told the line of every epoch, with the seed of the run."""


class Paused(Exception):
    """A run was stopped and saved; the message says how to go on."""


def begin(settings: RunSettings, data: Data, workers: Workers = ALONE) -> tuple[RunSettings, Training]:
    """Model and optimizer, ready for the first epoch, and the settings with all defaults filled in.

    Raises:
        ValueError: If a name or value of the settings is wrong.
    """
    device = place(settings.device)
    hyperparameters = settle(settings.optimizer, settings.hyperparameters, len(data.train), settings.optimizers)
    model = settings.build(data).to(device)
    training = Training(
        model,
        settings.optimizers[settings.optimizer].make(model, hyperparameters, settings.seed),
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        schedule=settings.schedule,
        augment=getattr(settings, "augment", ()),
        bf16=settings.precision == "bf16",
        patience=settings.patience,
        loo=settings.loo,
        frozen=settings.frozen_weights,
        workers=workers,
    )
    return replace(settings, hyperparameters=hyperparameters), training


def check(settings: RunSettings) -> None:
    """Refuse what is wrong whatever the data are, before they are read.

    Raises:
        ValueError: If a name is unknown, or an optimizer has no such setting.
    """
    settle(settings.optimizer, settings.hyperparameters, 1, settings.optimizers)
    place(settings.device)
    settings.check()


def train(
    settings: RunSettings,
    out: Path,
    *,
    resume: bool = False,
    kind: str | None = None,
    started: Callable[[Data], object] = lambda data: None,
    bars: Bars = quiet,
    watch: Watch | None = None,
    workers: Workers = ALONE,
) -> None:
    """Train and leave a complete run folder at ``out``.

    The folder is there from the start: settings in ``run.json``, one line an epoch in ``metrics.jsonl``, and a checkpoint every
    few seconds. Killed at any moment, a run goes on from there with ``resume`` and ends bit-equal to one that was not.

    Args:
        settings: What to do.
        out: The folder.
        resume: Go on where a run of these settings was stopped; begin if there is none.
        kind: "image", "row" or "document": which data are wanted; None takes both.
        started: Called with the data when nothing is wrong with them or the settings, and the folder is ours.
        bars: Progress.
        watch: Told every line of the metrics.
        workers: The processes that train together; the first one writes, and is told and asked what is told and asked here.

    Raises:
        FileExistsError: If ``out`` holds something already and it is not to be resumed.
        ValueError: If a setting is wrong, the data cannot be learned from, training diverges, or ``out`` holds another run.
        Paused: If a signal came; everything is saved.
        Elsewhere: If another process failed.
    """
    there = workers.first(lambda: resume and (out / "run.json").exists())
    record = workers.together(lambda: _look(settings, out, there, workers))
    data = _data(settings, record, bars, workers)
    complete, training = workers.together(lambda: _ready(settings, record, data, kind, workers))
    with ExitStack() as stack:

        def enter() -> bool:
            """Take the folder; whether there is something to do."""
            stack.enter_context(locked(out))
            if record is None:
                claim(out)
            elif record_of(out).finished:
                return False
            started(data)
            if record is None:
                write_record(out / "run.json", describe(complete, data, workers.size))
            return True

        if workers.first(enter):
            if workers.first(lambda: record is not None and (out / CHECKPOINT).exists()):
                workers.together(lambda: go_on(out, training, identity(complete, data)))
            try:
                _learn(complete, training, out, bars, watch)
                workers.first(lambda: finish(complete, training, out, bars))
            except OSError as error:
                if error.errno is None:
                    raise
                words = f"{error.strerror}; mend that and go on with: {record_of(out).command}"
                raise OSError(error.errno, words, error.filename) from error
            except KeyboardInterrupt:
                raise Paused(f"stopped at once; go on from the last checkpoint with: {record_of(out).command}") from None
        workers.first(lambda: (out / CHECKPOINT).unlink(missing_ok=True))


def _look(settings: RunSettings, out: Path, there: bool, workers: Workers) -> Record | None:
    """What is in the folder to go on with; refuse what is wrong before the data are read."""
    if not there:
        check(settings)
        workers.check(place(settings.device))
        if workers.is_first:
            claim(out)
        return None
    record = record_of(out)
    for name in settings.differ(record.settings):
        raise _other(record, name, getattr(settings, name), getattr(record.settings, name))
    check(settings)
    workers.check(place(settings.device))
    if record.finished:
        return record
    if record.threads not in (None, torch.get_num_threads()):
        warnings.warn(
            f"{out} began with {record.threads} threads and goes on with {torch.get_num_threads()}: it will end like one that "
            "was not stopped only up to rounding; set OMP_NUM_THREADS for more",
            stacklevel=3,
        )
    if record.processes != workers.size:
        warnings.warn(
            f"{out} began in {record.processes} processes and goes on in {workers.size}: it will not end bit-equal to one that was "
            f"not stopped; for that, start {record.processes}",
            stacklevel=3,
        )
    return record


def _data(settings: RunSettings, record: Record | None, bars: Bars, workers: Workers) -> Data:
    """The data; of several processes the first one looks through them."""
    if record is not None:
        moved = replace(record, settings=replace(record.settings, data=settings.data))
        return workers.together(moved.load)
    loaded: list[Data] = []

    def survey() -> tuple[str, Any, Any]:
        loaded.append(settings.load(bars=bars))
        return loaded[0].fingerprint, loaded[0].scale.center, loaded[0].scale.spread

    fingerprint, center, spread = workers.first(survey)

    def same() -> Data:
        data = loaded[0] if loaded else settings.load(Scale(tuple(center), tuple(spread)))
        if data.fingerprint != fingerprint:
            raise ValueError(f"process {workers.rank} finds other data in {data.name} than the first; give all processes the same")
        return data

    return workers.together(same)


def _ready(
    settings: RunSettings, record: Record | None, data: Data, kind: str | None, workers: Workers
) -> tuple[RunSettings, Training]:
    """All that is needed to begin, unless it does not fit the data or what was begun."""
    if kind not in (None, data.kind):
        raise ValueError(f"{data.name} holds {data.kind}s, not {kind}s; take: bayesrule train {COMMANDS[data.kind]}")
    complete, training = begin(settings, data, workers)
    if record is not None:
        mine, theirs = complete.hyperparameters, record.settings.hyperparameters
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise _other(record, name, mine.get(name), theirs.get(name))
        if record.failed:
            raise ValueError(f"{record.folder} cannot go on: {record.failed}; train into another --out")
    return complete, training


def _other(record: Record, name: str, mine: Any, theirs: Any) -> ValueError:
    """The refusal to go on with another setting than a run began with."""
    return ValueError(
        f"{record.folder} began with {name} {theirs}, not {mine}; give the same settings, or --resume and --out alone"
    )


def identity(settings: RunSettings, data: Data) -> str:
    """Of all that decides a run."""
    words = json.dumps({**settings.plain(), "data": data.fingerprint}, sort_keys=True)  # wherever the data are
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


class Job(Protocol):
    """A training that stops between steps, is saved, and goes on."""

    workers: Workers
    done: int
    history: list[dict[str, Any]]
    between_steps: bool
    sharded: bool
    """Whether all processes must ask for the state at once."""

    @property
    def total(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    def epoch(self, tick: Callable[[], object]) -> object: ...
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None: ...


def go_on(out: Path, training: Job, whose: str) -> None:
    """Bring back the last checkpoint.

    Raises:
        ValueError: If it is damaged, or another run's.
    """
    path = out / CHECKPOINT
    try:
        tensors, numbers = restore(path)
        if numbers["run"] != whose:
            raise ValueError("its settings or data are others")
        training.load_state(tensors, numbers)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or of another run: {why}; delete it to start anew") from error


def learn(
    training: Job,
    out: Path,
    whose: str,
    command: Callable[[], str],
    fail: Callable[[str], object],
    advance: Callable[[], object],
    watch: Callable[[Mapping[str, Any]], object],
) -> None:
    """All that is left of a training, with a checkpoint now and then.

    Args:
        training: What is to be trained.
        out: The folder.
        whose: Identity of the run.
        command: What goes on with it.
        fail: Notes that it cannot go on, and why.
        advance: Told every step.
        watch: Told every line of the metrics.

    Raises:
        Diverged: If it diverged.
        Paused: If a signal came; everything is saved.
        Elsewhere: If another process has gone.
    """
    workers = training.workers
    for _ in range(training.done):
        advance()
    due = time.monotonic() + EVERY

    def keep() -> None:
        nonlocal due
        if not (workers.is_first or training.sharded):
            return
        began = time.monotonic()
        tensors, numbers = training.state()
        if workers.is_first:
            save(out / CHECKPOINT, tensors, {**numbers, "run": whose})
        due = time.monotonic() + max(EVERY, (time.monotonic() - began) / EFFORT)

    with stopping() as stop:

        def tick() -> None:
            advance()
            stopped, late = stop.is_set(), workers.is_first and time.monotonic() >= due
            if workers.size > 1:
                stopped, late = (count > 0 for count in workers.total(stopped, late))
            if stopped:
                workers.together(keep)
                raise Paused(
                    f"stopped after step {training.done:,} of {training.total:,} and saved; go on with: {workers.first(command)}"
                )
            if late:
                keep()

        try:
            for line in training.history:
                watch(line)
            while not training.finished:
                known = len(training.history)
                try:
                    training.epoch(tick)
                finally:
                    if len(training.history) > known and workers.is_first:
                        write_lines(out / "metrics.jsonl", training.history)
                        watch(training.history[-1])
            keep()
        except Diverged as error:
            why = str(error)
            workers.first(lambda: fail(why))
            raise
        except Exception as error:
            if workers.size > 1 and is_loss(error):
                raise Elsewhere(f"another process of the run has ended; go on with: {command()}") from error
            if training.between_steps and not training.sharded and isinstance(error, ValueError):  # of the data
                with contextlib.suppress(OSError):
                    keep()  # what was learned until then
            raise


def _learn(settings: RunSettings, training: Training, out: Path, bars: Bars, watch: Watch | None) -> None:
    """All epochs that are left; a model of the user's own that fails is said to."""

    def fail(why: str) -> None:
        write_record(out / "run.json", {**describe(settings, training.data, training.workers.size), "failed": why})

    try:
        learn(
            training,
            out,
            identity(settings, training.data),
            lambda: record_of(out).command,
            fail,
            bars(settings.optimizers[settings.optimizer].title, training.total),
            lambda line: watch(settings.seed, line) if watch else None,
        )
    except Exception as error:
        if training.between_steps or ":" not in settings.model or isinstance(error, Diverged | Elsewhere):
            raise
        raise ValueError(f"{settings.model} failed in training: {type(error).__name__}: {error}") from error


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


@contextmanager
def saying(out: Path, kind: str) -> Iterator[None]:
    """Whatever interrupts, what was kept is not called lost."""
    try:
        yield
    except KeyboardInterrupt:
        if not (out / "run.json").exists():
            raise
        raise Paused(f"interrupted; what was saved is kept; go on with: {going_on(kind, out)}") from None


def finish(settings: RunSettings, training: Training, out: Path, bars: Bars = quiet) -> None:
    """Write what a finished run leaves; ``run.json`` says last that it is finished."""
    training.keep_best()
    model, posterior = training.model.eval(), None
    settings.write_weights(model, out)
    if settings.optimizers[settings.optimizer].variational:
        posterior = training.posterior()
        posterior.save(out / "posterior.safetensors")
    write_lines(out / "metrics.jsonl", training.history)
    seconds = {"seconds": training.seconds, "best_epoch": training.best_epoch if settings.patience else None}
    record = describe(settings, training.data, training.workers.size) | seconds
    write_record(out / "run.json", record)
    Run(out, settings, training.data, model, posterior, training.history, record_of(out)).predictions(bars=bars)
    write_record(out / "run.json", record | {"finished": True})
