"""What a person sees in a terminal: results on stdout, progress on stderr."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bayesrule.recipes.data import Bars, some
from bayesrule.uses.dependence import NAMES, Dependence, number
from bayesrule.uses.language import LanguageReport
from bayesrule.uses.report import Report
from bayesrule.uses.tables import COLUMNS, DETAILS, Column, table

MOST = 40  # classes that are listed
SUSPECTS = 8  # suspicious labels that are listed


@contextmanager
def progress() -> Iterator[Bars]:
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


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line; what is not a number becomes null."""

    def sound(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: sound(part) for key, part in item.items()}
        if isinstance(item, list):
            return [sound(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(sound(value)))


def print_results(report: Report | LanguageReport, as_json: bool, detailed: bool = False) -> None:
    """The rows of a report; as JSON that of the last, which is the best that there is, with all of them in ``rows``."""
    rows = report.detailed if detailed else report.rows
    if as_json:
        print_json({**rows[-1], "rows": rows} if len(rows) > 1 else rows[0])
        return
    print_rows(rows, report.columns)
    if isinstance(report, LanguageReport):
        return
    for subject, columns in DETAILS.items() if detailed else ():
        if any(columns[-1].key in row for row in rows):
            print(subject)
            print_rows(rows, columns)


def print_data(found: Mapping[str, Any]) -> None:
    """What is in some data: a sentence, a table of classes, notes."""
    if found["kind"] == "text":
        parts = ", ".join(f"{count:,} {name}" for name, count in found["bytes"].items())
        print(f"{found['name']}: text of {found['files']:,} files; bytes: {parts}")
        return
    shape = " x ".join(map(str, found["shape"]))
    parts = ", ".join(f"{count:,} {name}" for name, count in found["examples"].items())
    print(f"{found['name']}: {found['form']}; {found['kind']}s of {shape}, {len(found['classes'])} classes; {parts}")
    if found["classes"]:
        _print_classes(found)
        if found["held_out"]:
            print(f"held out: {found['held_out']:,} {found['kind']}s")
    if found.get("columns"):
        print(f"columns: {some(found['columns'], 12)}")
    for note in found["notes"]:
        print(f"note: {note}")


def _print_classes(found: Mapping[str, Any]) -> None:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("class")
    for name in found["examples"]:
        grid.add_column(name, justify="right")
    classes = list(found["classes"].items())
    for label, counts in classes[:MOST]:
        grid.add_row(escape(label), *(f"{count:,}" for count in counts.values()))
    if len(classes) > MOST:
        grid.add_row(f"and {len(classes) - MOST} more")
    Console().print(grid)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COLUMNS) -> None:
    """The table of results."""
    columns, cells = table(rows, columns)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("method", no_wrap=True)
    for column in columns:
        grid.add_column(column.heading, justify="right", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        grid.add_row(escape(row["method"]), *(f"[bold]{text}[/]" if best else text for text, best in line))
    (Console() if sys.stdout.isatty() else Console(width=140)).print(grid)


def print_dependence(found: Dependence) -> None:
    """What a model depends on: losses, how sensitivity concentrates, labels to check."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("examples", "NLL", "accuracy"):
        grid.add_column(heading, justify="left" if heading == "examples" else "right")
    for row in found.rows():
        grid.add_row(row["examples"], f"{row['nll']:.3f}", f"{100 * row['accuracy']:.1f} %")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(grid)
    if found.estimates and not found.trusted:
        print("The leave-one-out figures are worth nothing here; rank by --scale data or --score loss.")
    print(f"The most sensitive 1 % of {len(found.scores):,} {found.thing}s carry {100 * found.figures['top_share']:.0f} % of all.")
    print(f"Labels to check first, by {NAMES[found.score]}:")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("index", found.thing, "label", "model" if found.without is None else "without it", NAMES[found.score])
    for heading in headings:
        grid.add_column(heading, justify="right" if heading in (headings[0], headings[-1]) else "left")
    for i in found.suspects[:SUSPECTS]:
        about, value = found.about(i), found.scores.by(found.score)[i].item()
        grid.add_row(*map(escape, (f"{about['index']}", about["source"], about["label"], found.suggestion(i), number(value))))
    console.print(grid)
