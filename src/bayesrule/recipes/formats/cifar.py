"""The binary CIFAR-10 and CIFAR-100: one or two label bytes, then 3 x 32 x 32 pixels, again and again."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from bayesrule.recipes.formats.pieces import Piece, join, length
from bayesrule.recipes.sources import TEST, TRAIN, Collection, Refusal, shown

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
PICKLES = frozenset({"test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))})


def found(folder: Path, names: Iterable[str]) -> bool:
    """Whether a folder of such names is one of CIFAR files, pickles among them."""
    there = set(names)
    ten = "test_batch.bin" in there or any(_batch(name) for name in there)
    files = {name for name in there & ({"train.bin", "test.bin", "train", "test", "meta"} | PICKLES) if (folder / name).is_file()}
    return ten or bool(files & {"train.bin", "test.bin"}) or bool(files & PICKLES) or {"train", "test", "meta"} <= files


def read(folder: Path, name: str) -> Collection:
    """Read data_batch_*.bin and test_batch.bin (CIFAR-10), or train.bin and test.bin (CIFAR-100, fine labels).

    Raises:
        ValueError: If the files are pickles, or hold no whole number of examples, or a label without a name.
        OSError: If one cannot be opened.
    """
    names = sorted(path.name for path in folder.iterdir())
    ten = [each for each in names if _batch(each) or each == "test_batch.bin"]
    hundred = [each for each in names if each in ("train.bin", "test.bin")]
    if not ten and not hundred:
        raise Refusal(
            f"{shown(folder)} holds CIFAR as Python pickles, which may run any code; take the binary version (.bin files)"
        )
    if ten and hundred:
        raise Refusal(f"{shown(folder)} holds both {ten[0]} and {hundred[0]}; leave CIFAR-10 or CIFAR-100 in it")
    listed = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
    classes = _names(listed) if listed.is_file() else ()
    pieces = [
        _piece(folder / each, TEST if each.startswith("test") else TRAIN, 1 if ten else 2, classes) for each in ten or hundred
    ]
    return join(name, "image", pieces, f"CIFAR-{10 if ten else 100} binary files", classes)


def _batch(name: str) -> bool:
    return name.startswith("data_batch_") and name.endswith(".bin")


def _names(path: Path) -> tuple[str, ...]:
    length(path)
    with path.open("rb") as lines:
        text = lines.read(1 << 16).decode("utf-8", "replace")
    return tuple(shown(line.strip()) for line in text.splitlines() if line.strip())


def _piece(path: Path, part: int, labels: int, classes: tuple[str, ...]) -> Piece:
    record, size = labels + PIXELS, length(path)
    if size % record:
        raise Refusal(f"{shown(path)} is cut off or no CIFAR file: {size:,} bytes are no multiple of {record:,}; get it again")
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    fine = records[:, labels - 1].astype(np.int64)
    most = len(classes) or (10 if labels == 1 else 100)
    if (wrong := fine >= most).any():
        place = int(wrong.argmax())
        raise Refusal(f"{shown(path)}[{place}] has label {fine[place]}, but there are {most} classes; get it again")
    return Piece(part, shown(path.name), torch.from_numpy(records[:, labels:].copy()).view(-1, *SHAPE), fine)
