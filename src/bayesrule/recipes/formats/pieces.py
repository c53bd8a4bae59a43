"""What the readers share: bytes that are read no further than they should, and parts that become a ``Collection``."""

import gzip
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Collection, Refusal, Stored, placed, reason, shown

KINDS = (
    "there must be a folder of class folders with PNG or JPEG files, a folder of IDX or CIFAR binary files, "
    "an .npz with x and y, or a .csv or .tsv with a header line"
)
PARTS = {"train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}
GZIP = b"\x1f\x8b"
DEFLATE = 1032  # no byte of a gzip file becomes more bytes than this
STEP = 1 << 20


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever decoders raise while they read a file becomes one line that names it; a Refusal passes as it is."""
    try:
        yield
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # zlib, struct, zipfile, NumPy: they share no class
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it could not even be opened
        raise Refusal(f"{shown(path)} is damaged: {reason(error)}; get it again") from error


def length(path: Path) -> int:
    """Of a regular file, in bytes; of a pipe or device, reading which may never end, a ValueError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Refusal(f"{shown(path)} is no regular file; name a file or folder")
    if not status.st_size:
        raise Refusal(f"{shown(path)} is empty; get it again")
    return status.st_size


@contextmanager
def stream(path: Path) -> Iterator[tuple[gzip.GzipFile | BinaryIO, int]]:
    """The bytes of a file, unpacked if they are gzip whatever its name, and the most that there can be."""
    size = length(path)
    with damage(path), path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked, size * DEFLATE
        else:
            yield raw, size


def take(source: gzip.GzipFile | IO[bytes], size: int) -> bytearray:
    """At most ``size`` bytes; memory grows with what there is, not with what was promised."""
    taken = bytearray()
    while len(taken) < size and (more := source.read(min(STEP, size - len(taken)))):
        taken += more
    return taken


def nearest(word: str, names: Iterable[str]) -> str:
    """What was probably meant, as the end of a message."""
    near = get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {shown(near[0])!r}?" if near else ""


def few(names: Sequence[str], most: int = 5) -> str:
    """A list for a person: its beginning, and how many more there are."""
    rest = len(names) - most
    return ", ".join(map(shown, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def count(number: int, thing: str) -> str:
    """A number with its noun: 1 file, 2 files."""
    return f"{number:,} {thing}" + ("" if number == 1 else "es" if thing.endswith("s") else "s")


def inventory(folder: Path) -> str:
    """What a folder holds, in words."""
    with os.scandir(folder) as entries:
        kinds = Counter(
            "folder" if entry.is_dir() else f"{shown(Path(entry.name).suffix)} file".strip()
            for entry in entries
            if not entry.name.startswith(".")
        )
    return (
        " and ".join(count(number, kind) for kind, number in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:4])
        or "nothing"
    )


def classify(labels: np.ndarray, names: Sequence[str] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as they were found, as numbers from 0 without holes, and the names of the classes that occur.

    Args:
        labels: Integers or texts, shape (examples,).
        names: The names of integer labels; by default the numbers themselves.
    """
    found, places = np.unique(labels, return_inverse=True)
    return torch.from_numpy(places.astype(np.int64)), tuple(names[label] if names else str(label) for label in found.tolist())


def part_of(parts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The part of each example; where there is one part only, it is still to be split."""
    one = len(set(parts)) == 1
    return torch.cat([torch.full((n,), ANY if one else part, dtype=torch.int8) for part, n in zip(parts, sizes, strict=True)])


@dataclass(frozen=True)
class Piece:
    """Examples of one file.

    Args:
        part: TRAIN, VALIDATION, TEST or ANY.
        origin: What names of examples begin with.
        values: Shape (examples, *shape), uint8 or float32.
        labels: Integers or texts, shape (examples,).
    """

    part: int
    origin: str
    values: Tensor
    labels: np.ndarray


def join(
    name: str, kind: str, pieces: Sequence[Piece], form: str, names: Sequence[str] = (), notes: Sequence[str] = ()
) -> Collection:
    """Pieces as one collection.

    Raises:
        ValueError: If their examples have different shapes.
    """
    first, sizes = pieces[0], [len(piece.values) for piece in pieces]
    for piece in pieces:
        if piece.values.shape[1:] != first.values.shape[1:]:
            raise Refusal(
                f"an example of {piece.origin} has shape {tuple(piece.values.shape[1:])}, "
                f"one of {first.origin} {tuple(first.values.shape[1:])}; they must be alike"
            )
    labels, classes = classify(np.concatenate([piece.labels for piece in pieces]), names)
    starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    naming: Callable[[int], str] = partial(placed, tuple(piece.origin for piece in pieces), starts)
    values = first.values if len(pieces) == 1 else torch.cat([piece.values for piece in pieces])
    part = part_of([piece.part for piece in pieces], sizes)
    return Collection(name, kind, Stored(values, naming), labels, classes, part, form, notes=tuple(notes))
