"""The command line: ``bayesrule demo | table | data | train | evaluate | sensitivity | precision | merge | adapt | report``.

Results go to stdout, progress to stderr. What a user can mend, recipes raise as ValueError or OSError: it becomes one
line on stderr and exit code 2. Anything else is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Union

ABSENT: str | None = None  # the package without which there is no command line
try:
    import tyro
    from rich.console import Console
    from rich.table import Table

    import bayesrule as br
    from bayesrule.recipes import demo, folder
    from bayesrule.recipes.adaptation_command import AdaptRun
    from bayesrule.recipes.beginnings import said_before
    from bayesrule.recipes.classifier_command import Command, TrainImage, TrainTabular, TrainText
    from bayesrule.recipes.classifiers import open_classifier
    from bayesrule.recipes.comparison import compare
    from bayesrule.recipes.describing import describe
    from bayesrule.recipes.endings import outcome
    from bayesrule.recipes.language import is_text
    from bayesrule.recipes.language_command import TrainGPT, measured, written
    from bayesrule.recipes.merge_command import MeasurePrecision, MergeModels
    from bayesrule.recipes.sensitivity import RankExamples
    from bayesrule.recipes.settings import Settings
    from bayesrule.recipes.terminal import print_data, print_json, print_results, print_rows, progress
    from bayesrule.recipes.workers import Workers, join
    from bayesrule.storage import write_text
    from bayesrule.uses.report import render
except ModuleNotFoundError as error:
    if not error.name or error.name.startswith("bayesrule"):
        raise
    ABSENT = error.name
    MeasurePrecision = MergeModels = AdaptRun = object  # type: ignore[misc,assignment]
    Settings = RankExamples = Command = TrainImage = TrainTabular = TrainText = TrainGPT = object  # type: ignore[misc,assignment]  # the classes below stand, and main says why they are of no use


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
            with progress() as bars:
                demo.demo(self.out, bars=bars)
        elif not page.exists():
            write_text(page, render(demo.summarize(self.out)))
        results = demo.results(self.out)
        if self.json:
            print_json(results)
            return
        print_rows(results["rows"])
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
            print_json({"algorithms": rows})
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
class ShowData:
    """Say what is in some data: kinds, counts, sizes, what occurs twice, what is uneven; before an hour is spent on them.

    Args:
        data: A name (digits, mnist5k, fashion-mnist, stdlib) or the path of data.
        size: Height and width that image files are resized to, or one number for both.
        target: The column of a table that holds the class; by default the last.
        held_out: Classes that are not to be learned.
        split: Shares of training and validation examples, where the data are not split.
        split_seed: Seed of the split.
        json: Print one JSON object instead of a table.
    """

    data: tyro.conf.Positional[str]
    size: tuple[int, ...] = ()
    target: str | None = None
    held_out: tuple[str, ...] = ()
    split: tuple[float, float] | None = None
    split_seed: int = 0
    json: bool = False

    def run(self) -> None:
        """Look and print."""
        asked = {name: getattr(self, name) for name in ("size", "target", "held_out", "split", "split_seed")}
        with progress() as bars:
            found, refusal = describe(Settings(self.data, "", **asked), bars)
        if self.json:
            print_json({**found, "refusal": refusal})
        else:
            print_data(found)
        if refusal is not None:
            raise ValueError(refusal)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run, several seeds of one, or the demo on the test data again; or a classifier of texts on other data.

    Args:
        dir: Folder of the run; with --data also a checkpoint of Hugging Face, such as a merged one.
        data: A .csv or .tsv of texts and labels to measure on, at the mean, in the place of the run's own test data.
        text_column: The column of texts of --data.
        label_column: The column of classes of --data.
        max_length: Tokens of a text of --data that are read; by default those of the run, else 128.
        num_samples: Networks to average over, where there is a posterior; by default 32, of documents 10, of a language model 8.
        ood: Data of another kind, to see whether the model notices.
        json: Print one JSON object instead of a table.
    """

    dir: tyro.conf.Positional[Path]
    data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_length: int | None = None
    num_samples: int | None = None
    ood: str | None = None
    json: bool = False

    def run(self) -> None:
        """Compute and print the metrics."""
        if self.data is not None:
            found = open_classifier(self.dir, self.data, self.text_column, self.label_column, self.max_length)
            with progress() as bars:
                print_results(found.report(self.dir.resolve().name, bars), self.json, detailed=True)
            return
        if is_text(self.dir):
            measured(self.dir, self.num_samples, self.json)
            return
        with progress() as bars:
            report = compare([self.dir], self.num_samples, self.ood, again=True, bars=bars)
        print_results(report, self.json, detailed=True)


@dataclass(frozen=True)
class WriteReport:
    """Write the report of finished runs side by side; each is a run, several seeds of one, or the demo.

    Args:
        dirs: Folders of runs.
        out: The page; by default report.html in the folder of a single run, or beside the first of several.
        num_samples: Networks to average over, where there is a posterior; by default 32, of documents 10, of a language model 8.
        ood: Data of another kind, to see whether the models notice.
        json: Print one JSON object instead of a sentence.
    """

    dirs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None
    num_samples: int | None = None
    ood: str | None = None
    json: bool = False

    def run(self) -> None:
        """Compute and write the page."""
        if not self.dirs:
            raise ValueError("report takes the folder of at least one run")
        path = self.out or (self.dirs[0] if len(self.dirs) == 1 else self.dirs[0].parent) / "report.html"
        if is_text(self.dirs[0]):
            written(self.dirs, path, self.num_samples, self.json)
            return
        with progress() as bars:
            if len(self.dirs) == 1 and self.ood is None and folder.read_record(self.dirs[0])["kind"] == "demo":
                report = demo.summarize(self.dirs[0], self.num_samples, bars)
            else:
                report = compare(self.dirs, self.num_samples, self.ood, bars=bars)
        write_text(path, render(report))
        if self.json:
            print_json({"report": str(path), "rows": report.rows})
        else:
            print_rows(report.rows)
            print(f"Report: {path}")


COMMANDS = {
    "demo": Demo,
    "table": ShowTable,
    "data": ShowData,
    "train": Command,
    "evaluate": Evaluate,
    "sensitivity": RankExamples,
    "precision": MeasurePrecision,
    "merge": MergeModels,
    "adapt": AdaptRun,
    "report": WriteReport,
}
RECIPES: dict[str, Any] = {"image": TrainImage, "tabular": TrainTabular, "text": TrainText, "gpt": TrainGPT}


def required(command: Any) -> dict[str, Any]:
    """What must be said, not said yet."""
    return {one.name: tyro.MISSING for one in fields(command) if one.default is MISSING and one.default_factory is MISSING}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments ask for.

    Raises:
        ValueError: If they ask for none; the message is tyro's, on one line.
        SystemExit: With code 0, after ``--help``.
    """
    about, complaint = "The Bayesian learning rule: one rule, many algorithms, one posterior.", StringIO()
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    prog, offered, before = "bayesrule", COMMANDS, dict[str, Any]()
    if arguments[:1] == ["train"]:
        prog, offered, arguments = "bayesrule train", RECIPES, arguments[1:]
        about = "Train a model on real data and keep the run in a folder."
        recipe: Any = RECIPES.get(next(iter(arguments), ""))
        before = said_before(arguments, recipe, recipe.settings) if recipe else {}
        said = {f"--{name.replace('_', '-')}" for name, value in before.items() if value is True}
        arguments = [word for word in arguments if word not in said]  # a switch that is on already
    known: dict[Any, Any] = {recipe: {"default": recipe(**(required(recipe) | before))}} if before else {}
    commands = [Annotated[kind, tyro.conf.subcommand(name, **known.get(kind, {}))] for name, kind in offered.items()]
    any_command: Any = Union[tuple(commands)]  # noqa: UP007 (made from a table)
    try:
        with redirect_stderr(complaint):
            return tyro.cli(any_command, prog=prog, description=about, args=arguments, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = complaint.getvalue().translate(dict.fromkeys(map(ord, "╭╮╰╯│─"), " "))
        words = " ".join(re.sub(r"-{5,}", ";", text).split())
        for end in (" Argument helptext", " For full helptext"):
            words = words.partition(end)[0]
        raise ValueError(f"{words.rstrip('.')}; see {prog} --help") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 if interrupted."""
    if ABSENT:
        return _refuse(f'the command line needs {ABSENT}, which is not installed: pip install "bayesrule[cli]"')
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` leaves as little behind as Ctrl-C
    try:
        workers = join()
    except ValueError as error:
        return _refuse(str(error))
    with (
        open(os.devnull, "w", encoding=sys.stdout.encoding) as nothing,
        redirect_stdout(sys.stdout if workers.is_first else nothing),
        workers,
    ):
        code = outcome(lambda: run(arguments, workers), workers)
        if workers.size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another has failed; this one ends by itself
        return code


def run(arguments: Sequence[str], workers: Workers) -> None:
    """Do what the arguments ask for."""
    command = parse(list(arguments))
    if type(command) in RECIPES.values():
        command.run(workers)
    elif workers.size > 1:
        raise ValueError(f"only bayesrule train runs in several processes, and these are {workers.size}; start this one alone")
    else:
        command.run()


def _refuse(reason: str) -> int:
    print("bayesrule:", reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
