"""Folders of class folders with image files, split into train, validation and test folders or not."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bayesrule.recipes.formats.pieces import PARTS, count
from bayesrule.recipes.sources import ANY, GRAY, Collection, Files, Paths, Refusal, Source, Stored, measure, shown

MEMORY = 256 << 20  # bytes: images that take no more when decoded are decoded once and kept
ENDINGS = (b".png", b".jpg", b".jpeg")
TOGETHER = 64  # files that a thread takes at once
MODES = {"L": "gray", "RGB": "color"}


@dataclass
class Index:
    """The image files of a folder, in the order of their names byte by byte, and what else was found.

    Args:
        paths: Relative to the folder.
        labels: The class of each, or -1.
        parts: The part of each.
        classes: Names of the classes.
        notes: What was noticed.
    """

    paths: Paths
    labels: np.ndarray
    parts: np.ndarray
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


class _Walk:
    """Goes through folders, each once, so that links in a circle have an end; remembers what is no picture."""

    def __init__(self, root: bytes) -> None:
        self.root, self.seen = root, set[tuple[int, int]]()
        self.others: list[bytes] = []
        self.again: list[bytes] = []

    def list(self, relative: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Names in a folder: folders, pictures and other files; hidden ones are left out."""
        folders, pictures, others = [], [], []
        with os.scandir(os.path.join(self.root, relative)) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(ENDINGS) and entry.is_file():
                    pictures.append(entry.name)
                else:
                    others.append(entry.name)
        return sorted(folders), sorted(pictures), sorted(others)

    def enter(self, relative: bytes) -> bool:
        """Whether a folder is entered for the first time."""
        status = os.stat(os.path.join(self.root, relative))
        key = (status.st_dev, status.st_ino)
        new = key not in self.seen
        self.seen.add(key)
        return new

    def pictures(self, top: bytes) -> Iterator[bytes]:
        """Every picture at or below a folder that was entered."""
        waiting = [top]
        while waiting:
            here = waiting.pop()
            folders, pictures, others = self.list(here)
            yield from (os.path.join(here, name) for name in pictures)
            self.others += [os.path.join(here, name) for name in others]
            for name in folders:
                below = os.path.join(here, name)
                (waiting if self.enter(below) else self.again).append(below)


def index(root: Path) -> Index | None:
    """Find the pictures of a folder, or None if there is none.

    ROOT/CLASS/*.png, ROOT/{train,val,validation,valid,test}/CLASS/*.jpg, at any depth below CLASS; or pictures and no class
    folders, which have no labels.

    Raises:
        ValueError: If a folder for a part has pictures outside of class folders.
        OSError: If a folder cannot be read.
    """
    walk = _Walk(os.fsencode(root))
    folders, pictures, others = walk.list(b"")
    walk.others += others
    tops = {name: PARTS.get(os.fsdecode(name).lower()) for name in folders}
    split = bool(folders) and all(part is not None for part in tops.values())
    stray: list[bytes] = list(pictures)
    places: list[tuple[bytes, bytes, int]] = []  # folder, class, part
    if split:
        for top in folders:
            inner, outside, others = walk.list(top)
            if outside and not inner:
                raise Refusal(
                    f"{shown(root / os.fsdecode(top))} has pictures but no class folders; put each into a folder of its class"
                )
            stray += [os.path.join(top, name) for name in outside]
            walk.others += [os.path.join(top, name) for name in others]
            places += [(os.path.join(top, name), name, tops[top] or 0) for name in inner]
    else:
        places = [(name, name, ANY) for name in folders]
    for entered in (b"", *(folders if split else ()), *(place for place, _, _ in places)):
        walk.enter(entered)

    found: list[tuple[bytes, bytes, int]] = []
    empty: list[bytes] = []
    for place, name, part in places:
        before = len(found)
        found += [(path, name, part) for path in walk.pictures(place)]
        if len(found) == before:
            empty.append(place)
    if not found and not pictures:
        return None
    unlabeled = not found
    if unlabeled:
        found, stray = [(path, b"", ANY) for path in pictures], []
    found.sort()
    names = sorted({name for _, name, _ in found})
    numbers = {name: -1 if unlabeled else i for i, name in enumerate(names)}
    labels = np.array([numbers[name] for _, name, _ in found], np.int64)
    notes = [
        f"{text}, first {shown(os.fsdecode(min(which)))}"
        for which, text in (
            (
                walk.others,
                f"skipped {count(len(walk.others), 'file')} that {'is' if len(walk.others) == 1 else 'are'} no PNG or JPEG",
            ),
            (stray, f"skipped {count(len(stray), 'picture')} in no class folder"),
            (walk.again, f"skipped {count(len(walk.again), 'link')} to folders that were read already"),
            (empty, f"{count(len(empty), 'class folder')} without a picture"),
        )
        if which
    ]
    parts = np.array([part for _, _, part in found], np.int8)
    classes = () if unlabeled else tuple(shown(os.fsdecode(name)) for name in names)
    return Index(Paths([path for path, _, _ in found]), labels, parts, classes, notes)


def collect(root: Path, name: str, found: Index, size: tuple[int, int] | None = None) -> Collection:
    """The pictures of an index: decoded at once where ``MEMORY`` allows, else when they are read.

    Args:
        root: The folder.
        name: Of the data set.
        found: Its pictures.
        size: Height and width that each is resized to; by default they must be of one size.

    Raises:
        ValueError: If a picture cannot be read, or sizes differ and none is given.
    """
    paths = found.paths
    sizes, gray = np.empty((len(paths), 2), np.int32), np.empty(len(paths), bool)

    def look(start: int) -> None:
        for i in range(start, min(start + TOGETHER, len(paths))):
            height, width, mode = measure(root / paths[i])
            sizes[i], gray[i] = (height, width), mode in GRAY

    _spread(look, len(paths))
    shape = size or _common(root, paths, sizes)
    mode, notes = "L" if gray.all() else "RGB", list(found.notes)
    if gray.any() and not gray.all():
        rare = gray if gray.sum() * 2 <= len(gray) else ~gray
        kind, usual = ("gray", "color") if rare is gray else ("color", "gray")
        which = f"{count(int(rare.sum()), f'{kind} picture')} among {usual} ones, first {paths.shown(int(rare.argmax()))}"
        notes.append(f"{which}; all are read as RGB")
    files = Files(root, paths, mode, shape, resize=size is not None)
    source: Source = files
    form = f"{MODES[mode]} image files"
    if len(files) * int(np.prod(files.shape, dtype=np.int64)) <= MEMORY:
        values = np.empty((len(files), *files.shape), np.uint8)

        def decode(start: int) -> None:
            stop = min(start + TOGETHER, len(paths))
            files.decode(range(start, stop), values[start:stop])

        _spread(decode, len(paths))
        source = Stored(torch.from_numpy(values), partial(_entry, paths))
    else:
        form += ", decoded when they are needed"
    part = torch.from_numpy(found.parts if len(np.unique(found.parts)) > 1 else np.full_like(found.parts, ANY))
    return Collection(name, "image", source, torch.from_numpy(found.labels), found.classes, part, form, notes=tuple(notes))


def _entry(paths: Paths, index: int) -> str:
    return paths.shown(index)


def _spread(task: Callable[[int], None], size: int) -> None:
    """Run a task for each ``TOGETHER`` places in threads; of what they raise, the first in order counts."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(task, start) for start in range(0, size, TOGETHER)]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _common(root: Path, paths: Sequence[str], sizes: np.ndarray) -> tuple[int, int]:
    """The one size of all, or what differs."""
    counted = Counter(map(tuple, sizes.tolist()))
    (height, width), most = counted.most_common(1)[0]
    if len(counted) == 1:
        return height, width
    first = int((sizes != (height, width)).any(1).argmax())
    other = tuple(sizes[first].tolist())
    raise Refusal(
        f"{shown(root / paths[first])} has {other[0]} x {other[1]} pixels (height x width), most have {height} x {width}; "
        f"{len(sizes) - most:,} of {len(sizes):,} differ: pass --size 32 (or --size 32 48, height and width) to resize all"
    )
