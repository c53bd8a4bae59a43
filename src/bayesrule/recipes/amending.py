"""Training examples that are left out, and others that are added, whatever the data are."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayesrule.recipes.data import Data, Part, some
from bayesrule.recipes.sources import TEST, VALIDATION, Collection, Source

NOTHING = -1  # what stands behind the end of a document that is shorter than others


@dataclass(frozen=True, eq=False)
class Together(Source):
    """Sources of one kind, one after another.

    Args:
        sources: Of one shape, but for documents, which are padded to the longest.

    Example:
        >>> from bayesrule.recipes.sources import stored
        >>> both = Together((stored(torch.zeros(3, 1), "a"), stored(torch.ones(2, 1), "b")))
        >>> both.read(torch.tensor([4, 0])).tolist(), both.name(3)
        ([[1.0], [0.0]], 'b[0]')
    """

    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one example, the longest."""
        return max(source.shape for source in self.sources)

    @property
    def at_hand(self) -> bool:  # type: ignore[override]
        """Whether all are."""
        return all(source.at_hand for source in self.sources)

    @property
    def texts(self) -> list[str]:
        """Of documents, as they were written."""
        return list(chain.from_iterable(source.texts for source in self.sources))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read(self, indices: Tensor) -> Tensor:
        parts = [
            (chosen, pad(source.read(own), (0, self.shape[-1] - source.shape[-1]), value=NOTHING))
            for source, chosen, own in self._each(indices)
        ]
        values = torch.cat([values for _, values in parts])  # in the widest of their types
        return values[torch.cat([chosen for chosen, _ in parts]).argsort()]

    def name(self, index: int) -> str:
        which = bisect_right(self._starts, index) - 1
        return self.sources[which].name(index - self._starts[which])

    def fingerprint(self) -> str:
        return hashlib.blake2b(" ".join(source.fingerprint() for source in self.sources).encode(), digest_size=16).hexdigest()

    def lengths(self, indices: Tensor) -> Tensor | None:
        each = [source.lengths(indices[:0]) for source in self.sources]
        if any(lengths is None for lengths in each):
            return None
        found = torch.zeros(len(indices), dtype=torch.int64)
        for source, chosen, own in self._each(indices):
            found[chosen] = source.lengths(own)  # type: ignore[assignment]  # all have some
        return found

    @property
    def _starts(self) -> list[int]:
        return [0, *torch.tensor([len(source) for source in self.sources]).cumsum(0)[:-1].tolist()]

    def _each(self, indices: Tensor) -> list[tuple[Source, Tensor, Tensor]]:
        """The sources that are asked, with the places of what they give and the indices in them."""
        found = []
        for start, source in zip(self._starts, self.sources, strict=True):
            chosen = ((indices >= start) & (indices < start + len(source))).nonzero()[:, 0]
            if len(chosen):
                found.append((source, chosen, indices[chosen] - start))
        return found


def amended(data: Data, also: Sequence[Collection], without: Sequence[int]) -> Data:
    """Data whose training part has more examples, and lacks some.

    Args:
        data: As they are.
        also: More training examples, as the model takes them, with classes of the data; what they have as validation or test
            part stays out.
        without: Places of training examples that are left out; those of ``also`` come after the others.

    Raises:
        ValueError: A class is unknown, an example has none, or a place is none of the training part, or nothing is left.

    Example:
        >>> from bayesrule.recipes.data import load
        >>> len(amended(load("digits"), [], [3, 5]).train)
        896
    """
    if not also and not without:
        return data
    train, digest = data.train, hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
    for more in also:
        train = _joined(train, _labelled(more, data))
        digest.update(more.source.fingerprint().encode() + train.labels.numpy().tobytes())
    if without:
        if odd := [place for place in without if not 0 <= place < len(train)]:
            raise ValueError(f"{data.name} has no training {data.kind} {odd[0]} to leave out; they are 0 to {len(train) - 1}")
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[list(without)] = False
        if not kept.any():
            raise ValueError(f"all {len(train)} training {data.kind}s of {data.name} are left out; leave some")
        train = replace(train, indices=train.indices[kept], labels=train.labels[kept])
        digest.update(kept.numpy().tobytes())
    return replace(data, train=train, fingerprint=digest.hexdigest())


def _labelled(more: Collection, data: Data) -> Part:
    """The examples that are not for validation or testing, by the classes of the data."""
    if strange := sorted(set(more.classes) - set(data.classes)):
        raise ValueError(
            f"{more.name} has {len(strange)} classes that {data.name} has not ({some(strange)}), and the model no output for them; "
            "leave them out"
        )
    places = ((more.part != VALIDATION) & (more.part != TEST)).nonzero()[:, 0]
    numbers = torch.tensor([*(data.classes.index(name) for name in more.classes), -1])
    labels = numbers[more.labels[places]]
    if not len(places):
        raise ValueError(f"{more.name} has no training {data.kind}s to add")
    if lost := int((labels < 0).sum()):
        raise ValueError(f"{lost} {data.kind}s of {more.name} have no class; give each one of {some(data.classes)}")
    return Part(more.source, places, labels)


def _joined(first: Part, second: Part) -> Part:
    source = Together((first.source, second.source))
    return Part(source, torch.cat([first.indices, second.indices + len(first.source)]), torch.cat([first.labels, second.labels]))
