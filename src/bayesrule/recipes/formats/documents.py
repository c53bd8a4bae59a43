"""Texts and their classes, in two columns of a CSV or TSV table."""

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesrule.recipes.formats.pieces import damage, inventory, part_of, stream
from bayesrule.recipes.formats.tables import Column, Rows, classes_of, column_of, ending, row_of, split
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Collection, Refusal, Stored, shown

FORM = "texts in a column of a table (CSV)"
SHOWN = 70  # characters of a text in its name


@dataclass(frozen=True, eq=False)
class Documents(Stored):
    """Texts in memory, as tokens and as they were written.

    Args:
        texts: As they were written.
    """

    texts: Sequence[str] = ()

    def lengths(self, indices: Tensor) -> Tensor:
        return (self.values[indices] >= 0).sum(1)


def read(
    data: str,
    encode: Callable[[Sequence[str]], Tensor],
    text: str,
    label: str | None,
    validation: str | None = None,
    test: str | None = None,
    notes: Callable[[Tensor], Sequence[str]] = lambda tokens: (),
) -> Collection:
    """Read a table of texts, or one for each part.

    Args:
        data: A file, or a folder with train.csv and perhaps validation.csv and test.csv.
        encode: From texts to tokens, shape (texts, longest), int32, with -1 behind the end of each.
        text: The column of texts.
        label: The column of classes; None looks at no classes, and leaves them out.
        validation: A file of examples to validate on.
        test: A file of examples to test on.
        notes: What is to be said of the tokens.

    Raises:
        ValueError: If a file is no such table; the message says which line or column is wrong.
        OSError: If one cannot be opened.
    """
    files = _files(data, validation, test)
    texts: list[str] = []
    lines, labels = [], Column("", label or "", math.inf)
    for path, _ in files:
        with damage(path), stream(path) as (source, _):
            rows = Rows(path, io.TextIOWrapper(source, "utf-8-sig", newline=""))
            places = [rows.header.index(column_of(path, rows.header, name)) for name in (text, *([label] if label else []))]
            if len(set(places)) < len(places):
                raise Refusal(f"{shown(path)}: the text and the label cannot both be column {shown(text)!r}; name two columns")
            for cells in rows.chunks():
                texts += cells[places[0]]
                if label:
                    labels.add(cells[places[1]])
            lines.append(np.array(rows.lines))
    starts = [0, *np.cumsum([len(each) for each in lines]).tolist()]
    origins = tuple("" if len(files) == 1 else f"{shown(path.name)} " for path, _ in files)
    naming = partial(row_of, origins, tuple(starts[:-1]), np.concatenate(lines))
    place = Path(data)
    if (empty := next((i for i, each in enumerate(texts) if not each), None)) is not None:
        raise Refusal(f"{shown(place)} {naming(empty)} has no {shown(text)!r}; fill it in or take the row out")
    if label:
        numbers, classes = classes_of(labels, place, naming)
    else:
        numbers, classes = torch.full((len(texts),), -1), ()
    part = part_of([part for _, part in files], [len(each) for each in lines])
    tokens = encode(texts)

    def name(index: int) -> str:
        said = shown(texts[index])
        return f"{naming(index)}: {said if len(said) <= SHOWN else said[: SHOWN - 3] + '...'}"

    source_of = Documents(tokens, name, texts)
    found = tuple(notes(tokens))
    return Collection(shown(place.resolve().name), "document", source_of, numbers, classes, part, FORM, notes=found)


def _files(data: str, validation: str | None, test: str | None) -> list[tuple[Path, int]]:
    """Each with its part, in their order."""
    place = Path(data)
    found: dict[int, Path] = {}
    if place.is_dir():
        for name, part in split(sorted(os.listdir(place))).items():
            if part in found:
                raise Refusal(f"{shown(place)} has more than one table of a part: {found[part].name}, {shown(name)}; leave one")
            found[part] = place / name
        if not found:
            raise Refusal(f"{shown(place)} holds {inventory(place)}, and no train.csv; name a .csv or .tsv file")
    else:
        found[TRAIN if validation or test else ANY] = place
    for given, part, flag in ((validation, VALIDATION, "--validation"), (test, TEST, "--test")):
        if given and part in found:
            raise Refusal(f"{shown(place)} holds {found[part].name} already; leave {flag} out")
        if given:
            found[part] = Path(given)
    for path in found.values():
        if path.exists() and not ending(path.name):
            raise Refusal(f"{shown(path)} is no table that can be read: its name must end in .csv, .tsv, .csv.gz or .tsv.gz")
    return [(path, part) for part, path in sorted(found.items())]
