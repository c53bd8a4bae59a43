"""The same run with several seeds: what is luck, and what is not."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bayesrule.recipes.data import Bars, Data, quiet
from bayesrule.recipes.folder import claim, read_record, write_record
from bayesrule.recipes.runs import Paused, Watch, train
from bayesrule.recipes.settings import RunSettings, settings_within
from bayesrule.recipes.workers import ALONE, Workers

MANY = "seeds"  # the kind of a folder of such runs


def train_seeds(
    settings: RunSettings,
    out: Path,
    count: int,
    *,
    resume: bool = False,
    kind: str | None = None,
    started: Callable[[Data], object] = lambda data: None,
    bars: Bars = quiet,
    watch: Watch | None = None,
    workers: Workers = ALONE,
) -> None:
    """Train with ``count`` seeds from ``settings.seed`` on, one after another, each into a folder of ``out``.

    Raises:
        ValueError: As :func:`bayesrule.recipes.runs.train`, or if there is to be no seed.
    """
    if count < 1:
        raise ValueError(f"seeds must be at least 1, got {count}")
    if count == 1:
        train(settings, out, resume=resume, kind=kind, started=started, bars=bars, watch=watch, workers=workers)
        return
    names = [f"seed-{settings.seed + i}" for i in range(count)]
    record = {"kind": MANY, "runs": names, "settings": settings.plain()}

    def look() -> None:
        if resume and (out / "run.json").exists():
            began = read_record(out)
            theirs = settings_within(out, began, type(settings))
            if began["kind"] != MANY or began.get("runs") != names:
                raise ValueError(f"{out} began with other seeds; give the same, or --resume and --out alone")
            if other := [
                *settings.differ(theirs),
                *["settings of the optimizer"] * (settings.hyperparameters != theirs.hyperparameters),
            ]:
                raise ValueError(f"{out} began with other {other[0]}; give the same, or --resume and --out alone")
        elif not resume or (out.is_dir() and {path.name for path in out.iterdir()} - {*names}):
            claim(out)

    def gather() -> None:
        if not (out / "run.json").exists():
            write_record(out / "run.json", record)

    def first(data: Data) -> None:
        gather()
        started(data)

    workers.first(look)
    for i, name in enumerate(names):
        one = replace(settings, seed=settings.seed + i)
        try:
            saying = first if name == names[0] else _again
            train(one, out / name, resume=resume, kind=kind, started=saying, bars=bars, watch=watch, workers=workers)
            workers.first(gather)  # a finished run starts nothing
        except Paused as stop:
            raise Paused(str(stop).replace(shlex.quote(str(out / name)), shlex.quote(str(out)))) from None


def _again(data: Data) -> None:
    """Nothing new is to be said of data that were said before."""


def members(folder: Path) -> list[tuple[str, Sequence[Path]]]:
    """The methods that a folder holds: a name and the runs of each, one a seed.

    Raises:
        FileNotFoundError: If it is no run folder.
        ValueError: If its record is damaged.
    """
    record = read_record(folder)
    if record["kind"] not in (MANY, "demo"):
        return [(str(folder), [folder])]
    names = record.get("runs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / 'run.json'} is damaged: it names no runs")
    runs = [folder / name for name in names]
    return [(str(folder), runs)] if record["kind"] == MANY else [(str(run), [run]) for run in runs]
