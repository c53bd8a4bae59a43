"""CSV and TSV tables: a header line, then one example a line, one column of which is its class."""

import csv
import io
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bayesrule.recipes.formats.pieces import PARTS, classify, few, nearest, part_of, stream
from bayesrule.recipes.sources import ANY, TRAIN, Collection, Refusal, Stored, shown

ENDINGS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}  # and what separates their columns
FORM = "rows of a table (CSV)"
MISSING = frozenset({"", "?", "NA", "N/A", "NaN", "nan", "NULL", "null"})
CATEGORIES = 100  # texts of a column, or numbers of a target
LINE = 4 << 20  # characters of a line
COLUMNS = 100_000
CHUNK, CHARACTERS = 4096, 16 << 20  # rows that are looked at together, and characters


def ending(name: str) -> str | None:
    """That of a table's file name, or None."""
    return next((each for each in sorted(ENDINGS, key=len, reverse=True) if name.lower().endswith(each)), None)


def split(names: Iterable[str]) -> dict[str, int]:
    """Those of a folder's files that are tables of a part, such as train.csv."""
    named = [(name, PARTS.get(name.lower().removesuffix(tail))) for name in names if (tail := ending(name))]
    return {name: part for name, part in named if part is not None}


class Column:
    """The cells of a column, as numbers as long as all are, and as texts as long as they are few.

    Args:
        where: The file, for messages.
        name: In the header.
        limit: The most texts that there may be.
    """

    def __init__(self, where: str, name: str, limit: float = CATEGORIES) -> None:
        self.where, self.name, self.limit = where, name, limit
        self.numbers: list[np.ndarray] | None = []
        self.codes: list[np.ndarray] | None = []
        self.texts: dict[str, int] = {}  # "" where the cell is missing

    def add(self, cells: Sequence[str]) -> None:
        """Take some more rows."""
        cells = ["" if cell in MISSING else cell for cell in cells]
        if self.numbers is not None:
            try:
                self.numbers.append(np.array([number(cell) for cell in cells]))
            except ValueError:
                self.numbers = None
        if self.codes is not None:
            texts = self.texts
            self.codes.append(np.array([texts.setdefault(cell, len(texts)) for cell in cells], np.int32))
            if len(texts) - ("" in texts) > self.limit:
                self.codes = None
        if self.numbers is None and self.codes is None:
            text = next(text for text in reversed(self.texts) if text)
            raise Refusal(
                f"{self.where} column {shown(self.name)!r} has more than {self.limit:,} different texts, such as "
                f"{shown(text[:40])!r}: it looks like an identifier; take it out"
            )


def number(cell: str) -> float:
    """A cell as a number, NaN where it is missing."""
    if "_" in cell:  # 1_000 is a number to Python only
        raise ValueError(cell)
    return float(cell) if cell else math.nan


def read(files: Sequence[tuple[Path, int]], name: str, target: str | None = None) -> Collection:
    """Read a table, or one for each part.

    Columns in which all cells are numbers are numbers, with the mean of the (training) column where one is missing; the others
    become a 0 or 1 for each of their texts. Columns without anything in them are dropped.

    Args:
        files: Tables and their parts.
        name: Of the data set.
        target: The column that holds the class; by default the last.

    Raises:
        ValueError: If a file is no such table; the message says which line or column is wrong.
        OSError: If one cannot be opened.
    """
    files = sorted(files, key=lambda file: file[1])
    for path, number_of in files:
        if [each for _, each in files].count(number_of) > 1:
            others = [other.name for other, its in files if its == number_of]
            raise Refusal(f"{shown(path.parent)} has more than one table of a part: {few(others)}; leave one")
    columns: dict[str, Column] = {}
    label, nameless = "", False
    lines: list[np.ndarray] = []
    for path, _ in files:
        with stream(path) as (source, _):
            rows = Rows(path, io.TextIOWrapper(source, "utf-8-sig", newline=""))
            if not columns:
                label = column_of(path, rows.header, target)
                columns = {
                    each: Column(shown(path), each, math.inf if each == label else CATEGORIES) for each in rows.header if each
                }
            _same(path, rows.header, files[0][0], columns)
            for cells in rows.chunks():
                for each, column in zip(rows.header, cells, strict=True):
                    if each:
                        columns[each].add(column)
            lines.append(np.array(rows.lines))
            nameless |= "" in rows.header
    starts = [0, *np.cumsum([len(each) for each in lines]).tolist()]
    origins = tuple("" if len(files) == 1 else f"{shown(path.name)} " for path, _ in files)
    naming = partial(row_of, origins, tuple(starts[:-1]), np.concatenate(lines))
    part = part_of([part for _, part in files], [len(each) for each in lines])

    place = files[0][0] if len(files) == 1 else files[0][0].parent
    labels = classes_of(columns.pop(label), place, naming)
    values, names, notes = _matrix(list(columns.values()), (part == TRAIN).numpy() | (part == ANY).numpy(), naming, place)
    if nameless:
        notes.insert(0, "dropped the first column, which has no name")
    return Collection(
        name, "row", Stored(torch.from_numpy(values), naming), *labels, part, FORM, notes=tuple(notes), columns=tuple(names)
    )


def row_of(origins: tuple[str, ...], starts: tuple[int, ...], lines: np.ndarray, index: int) -> str:
    """The name of a row by its place: the line of the file at which it begins."""
    return f"{origins[bisect_right(starts, index) - 1]}row {lines[index]}"


class Rows:
    """The records of a table, with the line at which each begins; each is as long as the header."""

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self.path, self.text, self.read_lines = path, text, 0
        self.lines: list[int] = []
        separator = ENDINGS[ending(path.name) or ".csv"]
        self.records = csv.reader(self._lines(), delimiter=separator, strict=True, skipinitialspace=True)
        self.header: list[str] = []
        for _, record in self._records():
            self.header = [cell.strip() for cell in record]
            break
        self._check(separator)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self.text.readline(LINE)
            except UnicodeDecodeError as error:
                raise Refusal(f"{shown(self.path)} is no UTF-8 text; save it as CSV UTF-8") from error
            if not line:
                return
            self.read_lines += 1
            if "\0" in line or len(line) == LINE:
                raise Refusal(
                    f"{shown(self.path)} line {self.read_lines} is no line of a table, but binary or endless; save it as CSV"
                )
            yield line

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each that is not blank, and the line that it begins at."""
        while True:
            line = self.read_lines + 1
            try:
                record = next(self.records, None)
            except csv.Error as error:
                raise Refusal(f"{shown(self.path)} line {line} cannot be read: {shown(error)}; mend its quotes") from error
            if record is None:
                return
            if len(record) > 1 or (record and record[0].strip()):
                yield line, record

    def _check(self, separator: str) -> None:
        path, header = shown(self.path), self.header
        if not header:
            raise Refusal(f"{path} is empty; it needs a header line and a line for each example")
        if len(header) > COLUMNS:
            raise Refusal(f"{path} has {len(header):,} columns, more than {COLUMNS:,}; take some out")
        if len(header) == 1:
            other = next((f", and {mark!r} is not what separates them here" for mark in (";", "\t", ",") if mark in header[0]), "")
            raise Refusal(
                f"{path} has one column, {shown(header[0][:60])!r}; inputs and classes are separated by {separator!r}{other}"
            )
        if all(_numeric(cell) for cell in header if cell) and any(header):
            raise Refusal(f"{path} has no header: its first line is all numbers; put the names of the columns there")
        if nameless := [i + 1 for i, cell in enumerate(header) if not cell and i]:
            raise Refusal(f"{path} has no name for column {nameless[0]}; put one into the header line")
        if len(set(header)) < len(header):
            twice = next(cell for i, cell in enumerate(header) if cell in header[:i])
            raise Refusal(f"{path} has two columns named {shown(twice)!r}; rename or remove one")

    def chunks(self) -> Iterator[list[tuple[str, ...]]]:
        """The cells of some rows at a time, column by column."""
        rows: list[list[str]] = []
        size = 0
        for line, record in self._records():
            if len(record) != len(self.header):
                raise Refusal(f"{shown(self.path)} line {line} has {len(record)} cells, the header {len(self.header)}; mend it")
            cells = [cell.strip() for cell in record]
            self.lines.append(line)
            rows.append(cells)
            size += sum(map(len, cells))
            if len(rows) == CHUNK or size > CHARACTERS:
                yield list(zip(*rows, strict=True))
                rows, size = [], 0
        if rows:
            yield list(zip(*rows, strict=True))
        if not self.lines:
            raise Refusal(f"{shown(self.path)} has a header but no rows; it needs a line for each example")


def _numeric(cell: str) -> bool:
    try:
        return not math.isnan(number(cell))
    except ValueError:
        return False


def column_of(path: Path, header: Sequence[str], target: str | None) -> str:
    """The column of a name, by default the last.

    Raises:
        ValueError: If there is none; the message has the nearest one and all of them.
    """
    if target is None:
        return header[-1]
    if target not in header or not target:
        there = few([name for name in header if name], 20)
        raise Refusal(f"{shown(path)} has no column {shown(target)!r}{nearest(target, header) or ';'} there are: {there}")
    return target


def _same(path: Path, header: Sequence[str], first: Path, columns: Iterable[str]) -> None:
    """The columns of a part are those of the first."""
    there, wanted = {name for name in header if name}, set(columns)
    for some, what, do in ((wanted - there, "lacks", "add"), (there - wanted, "has, unlike", "remove")):
        if some:
            other = "" if what == "lacks" else f" {shown(first.name)},"
            raise Refusal(f"{shown(path)} {what}{other} the columns {few(sorted(some))}; {do} them")


def classes_of(column: Column, path: Path, naming: partial[str]) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The class of each row, and the names of all: texts in their order, or numbers in theirs.

    Raises:
        ValueError: If one has none, or there are so many that the column holds something else.
    """
    codes = np.concatenate(column.codes or [])
    name = shown(column.name)
    if (missing := codes == column.texts.get("", -1)).any():
        raise Refusal(
            f"{shown(path)} {naming(int(missing.argmax()))} has no {name!r}, the class to learn; fill it in or take the row out"
        )
    if column.numbers is None:
        if len(column.texts) > max(CATEGORIES, len(codes) // 2):
            texts = f"{len(column.texts):,} different texts"
            raise Refusal(f"{shown(path)}: this learns classes; target {name!r} has {texts}; name another column")
        return classify(np.array([shown(text) for text in column.texts])[codes])
    numbers = np.concatenate(column.numbers)
    if not (finite := np.isfinite(numbers)).all():
        raise Refusal(f"{shown(path)} {naming(int(finite.argmin()))} has an infinite {name!r}, the class to learn; mend it")
    distinct, labels = np.unique(numbers, return_inverse=True)
    if len(distinct) > CATEGORIES:
        raise Refusal(
            f"{shown(path)}: this learns classes; target {name!r} has {len(distinct):,} different numbers; name another column"
        )
    return torch.from_numpy(labels.astype(np.int64)), tuple(
        str(int(value)) if value == int(value) else repr(value) for value in distinct.tolist()
    )


def _matrix(
    columns: Sequence[Column], training: np.ndarray, naming: partial[str], path: Path
) -> tuple[np.ndarray, list[str], list[str]]:
    """Numbers, shape (rows, features), float32; what each is; notes."""
    names: list[str] = []
    empty, filled = [], []
    features: list[np.ndarray] = []
    for column in columns:
        if column.numbers is not None:
            cells = np.concatenate(column.numbers)
            missing = np.isnan(cells)
            if missing.all():
                empty.append(column.name)
                continue
            with np.errstate(over="ignore"):
                narrow = cells.astype(np.float32)
            if (infinite := np.isinf(narrow)).any():
                where = naming(int(infinite.argmax()))
                raise Refusal(
                    f"{shown(path)} {where} has an infinite {shown(column.name)!r} (over 3e38); mend it or take the row out"
                )
            if missing.any():
                known = ~missing & training
                narrow[missing] = cells[known if known.any() else ~missing].mean()
                filled.append(f"{shown(column.name)} ({missing.sum():,})")
            names.append(shown(column.name))
            features.append(narrow)
        else:
            codes = np.concatenate(column.codes or [])
            for text in sorted(column.texts, key=lambda text: (not text, text)):
                names.append(f"{shown(column.name)}={shown(text) or 'missing'}")
                features.append(codes == column.texts[text])
    if not features:
        raise Refusal(f"{shown(path)} has no column with anything in it but the target; there is nothing to learn from")
    values = np.empty((len(features[0]), len(features)), np.float32)
    for place, feature in enumerate(features):
        values[:, place] = feature
    notes = []
    if empty:
        notes.append(f"dropped columns without anything in them: {few(empty)}")
    if filled:
        notes.append(f"missing numbers became the mean of their column: {few(filled)}")
    return values, names, notes
