"""IDX: the format of MNIST and of what was made after it, a file of images and a file of labels for each part."""

import math
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from bayesrule.recipes.formats.pieces import Piece, few, join, stream, take
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Collection, Refusal, shown

NAME = re.compile(r"(?P<stem>.*?)[-_.]?(?P<what>images|labels)[-.]idx(?P<dimensions>[13])-ubyte(\.gz)?", re.IGNORECASE)
BEGINNINGS = ((r"train", TRAIN), (r"test|t\d+k", TEST), (r"val", VALIDATION))
WORDS = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


def found(names: Iterable[str]) -> bool:
    """Whether a folder of such names is one of IDX files."""
    return any(NAME.fullmatch(name) for name in names)


def read(folder: Path, name: str, classes: Sequence[str] = ()) -> Collection:
    """Read the pairs of a folder.

    Args:
        folder: With STEM-images-idx3-ubyte and STEM-labels-idx1-ubyte, gzip or not; what STEM begins with (train, t10k, test,
            val) says the part.
        name: Of the data set.
        classes: Names of the labels from 0; by default the numbers.

    Raises:
        ValueError: If a partner is missing, or a file is no IDX or has another length than it says.
        OSError: If one cannot be opened.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # so that of x and x.gz, x is the one that stays
        if match := NAME.fullmatch(path.name):
            files.setdefault(match["stem"], {})[match["what"].lower()] = path
    stems = sorted(files)
    for stem in stems:
        for what, other, ending in (("images", "labels", "labels-idx1-ubyte"), ("labels", "images", "images-idx3-ubyte")):
            if other not in files[stem]:
                there = files[stem][what]
                raise Refusal(f"{shown(there)} has no partner: {shown(stem)}-{ending}(.gz) is missing in the folder; add it")
    parts = [ANY] if len(stems) == 1 else [_part(stem, folder) for stem in stems]
    for part in parts:
        if parts.count(part) > 1:
            both = few([other for other, its in zip(stems, parts, strict=True) if its == part])
            raise Refusal(f"{shown(folder)} has more than one {WORDS[part]} part: {both}; leave one pair of each in it")
    order = sorted(zip(parts, stems, strict=True))
    return join(
        name,
        "image",
        [_piece(files[stem]["images"], files[stem]["labels"], part, classes) for part, stem in order],
        "IDX files",
        classes,
    )


def _part(stem: str, folder: Path) -> int:
    for word in (stem.lower(), re.split(r"[-_.]", stem.lower())[-1]):  # EMNIST: emnist-letters-train
        for beginning, part in BEGINNINGS:
            if re.match(beginning, word):
                return part
    raise Refusal(
        f"{shown(stem)}-images in {shown(folder)} is of no known part; begin its name with train, val or test, or leave one pair"
    )


def _piece(images: Path, labels: Path, part: int, classes: Sequence[str]) -> Piece:
    pixels, numbers = _content(images, 3), _content(labels, 1)
    if len(pixels) != len(numbers):
        raise Refusal(f"{shown(labels)} has {len(numbers)} labels, {shown(images.name)} {len(pixels)} images; get both again")
    if classes and numbers.max() >= len(classes):
        raise Refusal(f"{shown(labels)} has label {numbers.max()}, but there are {len(classes)} classes; get it again")
    return Piece(part, shown(images.name), torch.from_numpy(pixels).unsqueeze(1), numbers)


def _content(path: Path, dimensions: int) -> np.ndarray:
    """The numbers in a file, after all that its header promises was checked against its length."""
    with stream(path) as (source, most):
        header = bytes(take(source, 4 + 4 * dimensions))
        magic = bytes((0, 0, 8, dimensions))
        if header[:4] != magic:
            raise Refusal(
                f"{shown(path)} is no IDX file of {'images' if dimensions == 3 else 'labels'}: it begins with "
                f"{header[:4].hex()}, not {magic.hex()}; get it again"
            )
        if len(header) < 4 + 4 * dimensions:
            raise Refusal(f"{shown(path)} is cut off in its header; get it again")
        shape = struct.unpack(f">{dimensions}I", header[4:])
        size, said = math.prod(shape), " x ".join(map(str, shape))
        if not size:
            raise Refusal(f"{shown(path)} holds nothing: its header says {said}; get it again")
        content = bytearray() if size > most else take(source, size + 1)
        if len(content) < size:
            there = f"has {len(content):,} of them" if content else "cannot hold them"
            raise Refusal(f"{shown(path)} is cut off: its header says {said}, {size:,} bytes, and it {there}; get it again")
        if len(content) > size:
            raise Refusal(f"{shown(path)} is too long: its header says {said}, {size:,} bytes, and more follow; get it again")
        return np.frombuffer(content, np.uint8).reshape(shape)
