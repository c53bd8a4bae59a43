"""What a run found, as Markdown, and how it gets into the ledger: behind all older sections, which are never touched."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.targets import TARGETS, Target
from benchmarks.timing import Spread

LEDGER = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Settings:
    """How much effort a run makes."""

    threads: int = 2
    quick: bool = False
    asked_rounds: int | None = None
    plots: Path = LEDGER.parent

    def rounds(self, usual: int) -> int:
        return self.asked_rounds or (min(usual, 5) if self.quick else usual)

    def seconds(self, usual: float) -> float:
        return usual / 10 if self.quick else usual


@dataclass(frozen=True)
class Table:
    """One table of a section."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Mapping[str, Spread] = field(default_factory=dict)  # what a target can ask for, by key
    note: str = ""

    def __str__(self) -> str:
        return f"### {self.title[0].upper()}{self.title[1:]}\n\n{markdown(self.head, self.rows)}\n\n{self.note}\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def verdict(target: Target, figure: Spread) -> str:
    """Whether the median keeps a target."""
    if not target.kept(figure.median, target.bound):
        return "**missed**"
    return "met, stretch too" if target.stretch is not None and target.kept(figure.median, target.stretch) else "met"


def against_targets(figures: Mapping[str, Spread], targets: Sequence[Target] = TARGETS) -> Table | None:
    """The figures that have a target; None if none was measured."""
    rows = [
        (target.words, target.bounds, str(figures[target.key]), verdict(target, figures[target.key]))
        for target in targets
        if target.key in figures
    ]
    note = "Medians (quartiles) [best]: ratios are taken round by round, then of the best times. The median decides."
    return Table("targets", ("figure", "target (stretch)", "measured", ""), rows, {}, note) if rows else None


def section(title: str, about: Sequence[str], tables: Sequence[Table]) -> str:
    """All of a run: where and how, the figures that have targets, then every table."""
    figures = {key: figure for table in tables for key, figure in table.figures.items()}
    found = against_targets(figures)
    parts = [f"## {title}\n", "".join(f"- {line}\n" for line in about), *map(str, [found, *tables] if found else tables)]
    return "\n".join(parts)


def append(text: str, path: Path = LEDGER) -> None:
    """Put a section behind the others. A run that dies here leaves the ledger as it was."""
    older = path.read_text(encoding="utf-8") if path.exists() else ""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{older.rstrip()}\n\n{text.rstrip()}\n" if older else f"{text.rstrip()}\n")
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
