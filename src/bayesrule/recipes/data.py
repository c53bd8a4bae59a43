"""Data to learn from: found, split, looked through once, and scaled by the training part."""

import hashlib
import math
import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any

import torch
from torch import Tensor

from bayesrule.recipes.formats.pieces import nearest
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.scaling import Scale as Scale
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Collection, Source

PARTS = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}
TAKEN = {VALIDATION: 0.1, TEST: 0.15}  # of the given training part, where only that part is missing
CHUNK = 1024  # examples looked through at once
NUMBERS = 1 << 25  # of examples that are held at once, at most, whatever their size: bounds memory
FORWARD = 1 << 23  # of examples that a model sees at once, which makes many times as many of them
DOCUMENT, TOKEN = "document", 2048  # the kind, and numbers that count for a token
READERS = min(8, cpu_count() or 1)  # threads that decode files; decoding frees the interpreter
GROUP = 16  # batches that are sorted by length together
UNEVEN = 10  # times as many examples of one class as of another are worth a word


def fitting(shape: Sequence[int], most: int, numbers: int = NUMBERS) -> int:
    """How many examples of a shape are taken at once: at most ``most``, and fewer where they are large.

    Example:
        >>> fitting((1, 28, 28), 4096), fitting((3, 224, 224), 4096)
        (4096, 222)
    """
    return max(1, min(most, numbers // math.prod(shape)))


@dataclass(frozen=True)
class Part:
    """Some examples of a source.

    Args:
        source: All examples.
        indices: Which of them, shape (examples,).
        labels: Their classes, shape (examples,), int64.
    """

    source: Source
    indices: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        """One example as it is stored."""
        return self.source.read(self.indices[position : position + 1])[0]

    def name(self, position: int) -> str:
        """Where one example comes from."""
        return self.source.name(int(self.indices[position]))

    def by_length(self) -> Tensor:
        """Positions, the shortest example first, or as they are where all are of one length."""
        lengths = self.source.lengths(self.indices)
        return torch.arange(len(self)) if lengths is None else lengths.argsort(stable=True)

    def batches(self, order: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
        """Positions in a random order, batch by batch.

        Where examples differ in length, those of a batch are about as long as one another, and little of it is padding: every
        ``GROUP`` batches are sorted by length, then batches are shuffled.
        """
        lengths = self.source.lengths(self.indices[order])
        if lengths is None:
            return list(order.split(size))
        groups = zip(order.split(GROUP * size), lengths.split(GROUP * size), strict=True)
        found = [batch for group, its in groups for batch in group[its.argsort(stable=True)].split(size)]
        return [found[i] for i in torch.randperm(len(found), generator=generator)]

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The examples at the positions of each batch, as stored. Files are decoded ahead of time, in threads."""
        chosen = (self.indices[batch] for batch in batches)
        if self.source.at_hand:
            yield from map(self.source.read, chosen)
            return
        with ThreadPoolExecutor(READERS) as pool:
            coming: deque[Any] = deque()
            try:
                for indices in chosen:
                    coming.append(pool.submit(self.source.read, indices))
                    if len(coming) > READERS:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()


@dataclass(frozen=True)
class Data:
    """What a run learns from, chooses with and is tested on, and examples of classes that it never learns.

    Args:
        name: The data set's name.
        kind: "image", "row" or "document".
        form: How it is stored, in words.
        classes: Names of the classes; label k means ``classes[k]``.
        train, validation, test: Disjoint parts.
        unknown: Examples of the held-out classes, in no other part, or None.
        unknown_names: What they are, one name each.
        scale: From the training part.
        fingerprint: Of all examples, labels and the split: changes when they do.
        notes: What was noticed.
        columns: Of rows: what each number is.
    """

    name: str
    kind: str
    form: str
    classes: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    unknown: Part | None
    unknown_names: tuple[str, ...]
    scale: Scale
    fingerprint: str
    notes: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: (channels, height, width) or (columns,)."""
        return self.train.source.shape

    @property
    def extent(self) -> tuple[int, ...]:
        """Of what a model makes of one input, for :func:`fitting`: each token of a document becomes many numbers at once."""
        return (*self.shape, TOKEN) if self.kind == DOCUMENT else self.shape

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {"training": self.train, "validation": self.validation, "test": self.test}


Bars = Callable[[str, int], Callable[[], object]]
"""Starts a progress bar, given a name and the number of steps; what it returns is called after every step."""


def quiet(name: str, steps: int) -> Callable[[], object]:
    """No progress bar."""
    return lambda: None


def load(
    spec: str,
    held_out: Sequence[str] = (),
    seed: int = 0,
    *,
    split: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    target: str | None = None,
    scale: Scale | None = None,
    bars: Bars = quiet,
) -> Data:
    """Load data and split them, class by class, into training, validation and test parts where they are not split.

    Every example is read once, to find what cannot be read and what occurs twice, and to measure the scale.

    Args:
        spec: A name, or the path of a file or folder: see :func:`bayesrule.recipes.formats.reading.read`.
        held_out: Names of classes that are not learned; their examples become ``unknown``.
        seed: Seed of the split.
        split: Shares of training and validation examples, the rest is for testing; None is what suits the data.
        size: Height and width that image files are resized to.
        target: The column of a table that holds the class.
        scale: As measured before; then nothing is read now but what must be.
        bars: Progress.

    Raises:
        ValueError: If something is wrong with the data, or nothing can be learned from them.
        OSError: If they are not there.

    Example:
        >>> data = load("digits", held_out=("8", "9"))
        >>> data.classes, len(data.train), len(data.unknown)
        (('0', '1', '2', '3', '4', '5', '6', '7'), 721, 354)
    """
    data = arrange(read(spec, size, target), held_out, seed, split)
    check(data)
    return survey(data, bars) if scale is None else replace(data, scale=scale)


def arrange(found: Collection, held_out: Sequence[str] = (), seed: int = 0, split: tuple[float, float] | None = None) -> Data:
    """Split a collection; nothing of it is read yet, and the scale is none.

    Raises:
        ValueError: If a held-out class does not exist, or shares are none.
    """
    for name in held_out:
        if name not in found.classes:
            near = nearest(name, found.classes) or f"; its classes are {some(found.classes)}"
            raise ValueError(f"there is no class {name!r} in {found.name} to hold out{near}")
    if split is not None and not (0 < split[0] < 1 and 0 < split[1] < 1 and sum(split) < 1):
        raise ValueError(f"split must be two shares > 0 with a sum < 1, for training and validation; got {split[0]:g} {split[1]:g}")
    kept = [k for k, name in enumerate(found.classes) if name not in held_out]
    renumber = torch.full((len(found.classes) + 1,), -1)
    renumber[kept] = torch.arange(len(kept))
    labels = renumber[found.labels]  # a label of -1 finds the last, which is -1

    part = found.part.clone()
    generator = torch.Generator().manual_seed(seed)
    if (part == ANY).any():
        shares = split or found.shares
        _deal(part, labels, ANY, {TRAIN: shares[0], VALIDATION: shares[1], TEST: 1 - sum(shares)}, generator)
    else:
        taken = {which: share for which, share in TAKEN.items() if not ((part == which) & (labels >= 0)).any()}
        _deal(part, labels, TRAIN, {TRAIN: 1 - sum(taken.values())} | taken, generator)

    def members(chosen: Tensor) -> Part:
        indices = chosen.nonzero().squeeze(1)
        return Part(found.source, indices, labels[indices])

    unknown = members(torch.isin(found.labels, torch.tensor([found.classes.index(name) for name in held_out])))
    digest = hashlib.blake2b(found.source.fingerprint().encode(), digest_size=16)
    digest.update(labels.numpy().tobytes() + part.numpy().tobytes())
    return Data(
        name=found.name,
        kind=found.kind,
        form=found.form,
        classes=tuple(found.classes[k] for k in kept),
        train=members((part == TRAIN) & (labels >= 0)),
        validation=members((part == VALIDATION) & (labels >= 0)),
        test=members((part == TEST) & (labels >= 0)),
        unknown=unknown if held_out else None,
        unknown_names=tuple(found.classes[k] for k in found.labels[unknown.indices].tolist()),
        scale=Scale((), ()),
        fingerprint=digest.hexdigest(),
        notes=found.notes,
        columns=found.columns,
    )


def _deal(part: Tensor, labels: Tensor, which: int, shares: dict[int, float], generator: torch.Generator) -> None:
    """Deal the examples of one part among parts, class by class; each gets one of every class, the first ones first."""
    for k in range(int(labels.max()) + 1):
        members = ((part == which) & (labels == k)).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        ends, so_far = [0], 0.0
        for number, share in enumerate(list(shares.values())[:-1], start=1):
            so_far += share
            last = max(len(members) - len(shares) + number, number)  # one is left for each that follows, if there are so many
            ends.append(min(max(round(so_far * len(members)), ends[-1] + 1), last))
        for to, dealt in zip(shares, members.tensor_split(ends[1:]), strict=True):
            part[dealt] = to


def check(data: Data) -> None:
    """Refuse what nothing can be learned from.

    Raises:
        ValueError: If there are no classes, fewer than two, an empty part, or classes in a part that training does not show.
    """
    if not data.classes:
        raise ValueError(f"{data.name} has no classes to learn: its {data.kind}s lie in no class folders; they can serve as --ood")
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has one class only, {data.classes[0]!r}; there is nothing to tell it from")
    counts = {name: Counter(part.labels.tolist()) for name, part in data.parts.items()}
    for name, part in data.parts.items():
        if not len(part):
            raise ValueError(f"the {name} part of {data.name} is empty; give more {data.kind}s or other shares (--split 0.7 0.15)")
    for name in ("test", "validation"):
        strange = sorted(set(counts[name]) - set(counts["training"]))
        if strange:
            classes = [data.classes[k] for k in strange]
            raise ValueError(
                f"{sum(counts[name][k] for k in strange)} {name} {data.kind}s of {data.name} are of classes without any training "
                f"{data.kind} ({some(classes)}); add some, or hold these classes out: --held-out {shlex.join(classes[:3])}"
            )


def survey(data: Data, bars: Bars = quiet) -> Data:
    """Read every example once: the scale, and notes of what occurs twice, is blank, or is uneven.

    Raises:
        ValueError: If an example cannot be read, or nothing differs between training examples.
    """
    channels = 1 if data.kind == DOCUMENT else data.shape[0]
    seen: dict[bytes, tuple[str, int]] = {}
    twice: dict[str, list[tuple[int, str, int]]] = {name: [] for name in data.parts}
    blank: list[str] = []
    binary = torch.ones(channels, dtype=torch.bool)
    total = squares = torch.zeros(channels, dtype=torch.float64)
    width = fitting(data.shape, CHUNK if data.train.source.at_hand else 64, FORWARD)
    tick = bars("look", sum(-(-len(part) // width) for part in data.parts.values()))
    for name, part in data.parts.items():
        for start, values in zip(range(0, len(part), width), part.stream(torch.arange(len(part)).split(width)), strict=True):
            rows = values.reshape(len(values), -1)
            blank += [part.name(start + int(i)) for i in (rows == rows[:, :1]).all(1).nonzero()]
            for i, row in enumerate(rows.numpy()):
                digest = hashlib.blake2b(memoryview(row).cast("B"), digest_size=12).digest()
                where = seen.setdefault(digest, (name, start + i))
                if where != (name, start + i):
                    twice[name].append((start + i, *where))
            if name == "training":
                wide = values.double().transpose(0, 1).reshape(channels, -1)
                total, squares = total + wide.sum(1), squares + wide.square().sum(1)
                binary &= ((wide == 0) | (wide == 1)).all(1)
            tick()
    count = len(data.train) * (data.train[0].numel() // channels)
    center = total / count
    spread = ((squares - count * center.square()).clamp_min(0) / max(count - 1, 1)).sqrt()
    flat = (spread <= 1e-6 * center.abs().clamp_min(1e-30)) & (data.kind != DOCUMENT)
    copies = sum(origin == "training" for _, origin, _ in twice["training"])
    if flat.all() or copies == len(data.train) - 1:
        raise ValueError(f"all training {data.kind}s of {data.name} are the same; there is nothing to learn")
    as_is = binary if data.kind == "row" else torch.zeros_like(binary)  # yes or no stays 1 or 0
    center, spread = center.masked_fill(as_is, 0.0), spread.masked_fill(as_is | flat, 1.0)
    notes = [*data.notes, *_repeats(data, twice), *_oddities(data, blank)]
    scale = data.scale if data.kind == DOCUMENT else Scale(tuple(center.tolist()), tuple(spread.tolist()))
    return replace(data, scale=scale, notes=tuple(notes))


def _repeats(data: Data, twice: dict[str, list[tuple[int, str, int]]]) -> Iterator[str]:
    """Notes of examples that occur twice."""
    for name, other in (("test", "training"), ("test", "validation"), ("validation", "training")):
        leaked = [(i, j) for i, origin, j in twice[name] if origin == other]
        if leaked:
            i, j = leaked[0]
            flatter = f"; figures on the {name} part flatter" if other == "training" else ""
            yield (
                f"{len(leaked):,} of {len(data.parts[name]):,} {name} {data.kind}s also occur in the {other} part (the first: "
                f"{data.parts[name].name(i)} is {data.parts[other].name(j)}){flatter}"
            )
    again = [(i, j) for i, origin, j in twice["training"] if origin == "training"]
    odd = [(i, j) for i, j in again if data.train.labels[i] != data.train.labels[j]]
    same = sum(origin == "test" for _, origin, _ in twice["test"])
    if same:
        yield f"{same:,} test {data.kind}s occur more than once in the test part"
    if again:
        yield f"{len(again):,} training {data.kind}s occur more than once"
    if odd:
        i, j = odd[0]
        yield f"{len(odd):,} of them under different classes (the first: {data.train.name(i)} and {data.train.name(j)})"


def _oddities(data: Data, blank: Sequence[str]) -> Iterator[str]:
    """Notes of blank images and uneven classes."""
    if blank and data.kind == "image":
        yield f"{len(blank):,} image{'s are' if len(blank) > 1 else ' is'} of one color throughout (the first: {blank[0]})"
    counts = data.train.labels.bincount(minlength=len(data.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] >= UNEVEN * counts[least]:
        yield (
            f"classes are uneven: {int(counts[most]):,} training {data.kind}s of {data.classes[most]!r}, {int(counts[least]):,} of "
            f"{data.classes[least]!r}; accuracy says little of rare classes"
        )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> some("abcdefg", 2)
        'a, b and 5 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
