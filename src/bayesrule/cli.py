"""The command line: ``bayesrule demo | table | train image | evaluate | report``.

Results go to stdout, progress to stderr. What a user can mend, recipes raise as ValueError or OSError: it becomes one
line on stderr and exit code 2. Anything else is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Union

ABSENT: str | None = None  # the package without which there is no command line
try:
    import tyro
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    import bayesrule as br
    from bayesrule.recipes import demo, folder, image
    from bayesrule.uses.report import render, table
except ModuleNotFoundError as error:
    if not error.name or error.name.startswith("bayesrule"):
        raise
    ABSENT = error.name


@dataclass(frozen=True)
class Demo:
    """Train AdamW, SGD and IVON side by side on real digits and compare them: the main job.

    Args:
        out: Folder for the three runs and their report.
        json: Print one JSON object instead of tables.
    """

    out: Path = Path("runs/demo")
    json: bool = False

    def run(self) -> None:
        """Do it, unless it is done."""
        page = self.out / "report.html"
        done = demo.is_complete(self.out)
        if not done:
            with _progress() as bars:
                demo.demo(self.out, bars=bars)
        elif not page.exists():
            folder.write(page, render(demo.summarize(self.out)))
        results = demo.results(self.out)
        if self.json:
            _print_json(results)
            return
        _print_rows(results["rows"])
        print(results["speed"])
        if done:
            print(f"Nothing to do: {self.out} holds the finished demo. To run it again, delete the folder.")
        print(f"Report: {page}")


@dataclass(frozen=True)
class ShowTable:
    """Show every algorithm, the parts it is made of, and how far it is from its twin.

    Args:
        json: Print one JSON object instead of a table.
    """

    json: bool = False

    def run(self) -> None:
        """Compute and print the table."""
        rows = br.table()
        if self.json:
            _print_json({"algorithms": rows})
            return
        console = Console() if sys.stdout.isatty() else Console(width=180)
        words = () if console.width >= 140 else ("rates", "twin", "source")  # a narrow terminal shows the slots
        grid = Table(
            *(key for key in rows[0] if key not in words), box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
        )
        for row in rows:
            shown = {key: f"{value:.0e}" if isinstance(value, float) else value for key, value in row.items() if key not in words}
            grid.add_row(*shown.values())
        console.print(grid)
        if words:
            console.print(f"(a terminal of 140 columns or --json also shows {', '.join(words)})", style="dim")


@dataclass(frozen=True)
class TrainImage:
    """Train a classifier of small images.

    Args:
        data: mnist5k or digits.
        optimizer: sgd, rmsprop, adam, adamw, ivon; torch-sgd, torch-adamw for torch's own.
        out: Folder for the run; must not exist or be empty.
        model: mlp, lenet or resnet20.
        epochs: Passes through the training data.
        batch_size: Examples a step.
        seed: Seed of everything random.
        lr: Learning rate of the first step; it falls to 0 along a cosine. None is the optimizer's default, here and below.
        weight_decay: Strength of the prior, or of the decay.
        beta2: Decay of the average of squares or curvatures.
        ess: Effective sample size, in examples (ivon; default ten training sets).
        hess_init: Curvature at the start (ivon).
        json: Print one JSON object instead of a table.
    """

    data: str
    optimizer: str
    out: Path
    model: str = "lenet"
    epochs: int = 30
    batch_size: int = 50
    seed: int = 0
    lr: float | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    ess: float | None = None
    hess_init: float | None = None
    json: bool = False

    def run(self) -> None:
        """Train, then print the results on the test data."""
        names = ("lr", "ess", "hess_init", "weight_decay", "beta2")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        settings = image.Settings(
            self.data, self.model, self.optimizer, given, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed
        )
        with _progress() as bars:
            image.train(settings, self.out, bars)
        Evaluate(self.out, json=self.json).run()
        if not self.json:
            print(f"Report: {self.out / 'report.html'}")


@dataclass(frozen=True)
class Train:
    """Train a model on real data and keep the run in a folder."""

    recipe: Annotated[TrainImage, tyro.conf.subcommand("image")] | Annotated[None, tyro.conf.Suppress]

    def run(self) -> None:
        """Run the recipe."""
        assert self.recipe is not None
        self.recipe.run()


@dataclass(frozen=True)
class Evaluate:
    """Measure a run, or the demo, on its test data again.

    Args:
        dir: Folder of the run.
        num_samples: Networks to average over, where there is a posterior.
        json: Print one JSON object instead of a table.
    """

    dir: tyro.conf.Positional[Path]
    num_samples: int = 32
    json: bool = False

    def run(self) -> None:
        """Compute and print the metrics."""
        rows = demo.summarize(self.dir, self.num_samples).rows
        if self.json:
            _print_json(rows[0] if len(rows) == 1 else {**rows[-1], "rows": rows})
        else:
            _print_rows(rows)


@dataclass(frozen=True)
class WriteReport:
    """Write the report of a run, or of the demo, again.

    Args:
        dir: Folder of the run.
        json: Print one JSON object instead of a sentence.
    """

    dir: tyro.conf.Positional[Path]
    json: bool = False

    def run(self) -> None:
        """Compute and write the page."""
        path = self.dir / "report.html"
        folder.write(path, render(demo.summarize(self.dir)))
        if self.json:
            _print_json({"report": str(path)})
        else:
            print(f"Report: {path}")


@contextmanager
def _progress() -> Iterator[image.Bars]:
    """Progress bars with the time left, on stderr."""
    columns = (TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    progress = Progress(*columns, *times, console=Console(stderr=True))

    def start(name: str, steps: int) -> Callable[[], object]:
        progress.start()  # not before: what is refused shows no bars
        task = progress.add_task(name, total=steps)
        return lambda: progress.advance(task)

    try:
        yield start
    finally:
        if progress.tasks:
            progress.stop()


def _print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line; what is not a number becomes null."""

    def sound(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: sound(part) for key, part in item.items()}
        if isinstance(item, list):
            return [sound(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(sound(value)))


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of results."""
    columns, cells = table(rows)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("method", no_wrap=True)
    for column in columns:
        grid.add_column(column.heading, justify="right")
    for row, line in zip(rows, cells, strict=True):
        grid.add_row(row["method"], *(f"[bold]{text}[/]" if best else text for text, best in line))
    Console().print(grid)


COMMANDS = {
    "demo": Demo,
    "table": ShowTable,
    "train": Train,
    "evaluate": Evaluate,
    "report": WriteReport,
}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments ask for.

    Raises:
        ValueError: If they ask for none; the message is tyro's, on one line.
        SystemExit: With code 0, after ``--help``.
    """
    commands = [Annotated[command, tyro.conf.subcommand(name)] for name, command in COMMANDS.items()]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    any_command: Any = Union[tuple(commands)]  # noqa: UP007 (made from a table)
    about, complaint = "The Bayesian learning rule: one rule, many algorithms, one posterior.", StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(any_command, prog="bayesrule", description=about, args=arguments, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        words = complaint.getvalue().translate(dict.fromkeys(map(ord, "╭╮╰╯│"), " ")).replace("─", "").split()
        raise ValueError(" ".join(words)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 if interrupted."""
    if ABSENT:
        return _refuse(f'the command line needs {ABSENT}, which is not installed: pip install "bayesrule[cli]"')
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` leaves as little behind as Ctrl-C
    try:
        parse(arguments).run()
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        _refuse("interrupted; nothing was kept")
        return 130
    return 0


def _refuse(reason: str) -> int:
    print("bayesrule:", " ".join(reason.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
