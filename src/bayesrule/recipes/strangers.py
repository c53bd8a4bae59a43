"""Data of another kind than a model learned: does it notice?"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bayesrule.recipes.data import CHUNK, Data, Part, fitting
from bayesrule.recipes.formats.folders import ENDINGS
from bayesrule.recipes.formats.pieces import few
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import Collection, Source, Stored

BYTES = (0.0, 255.0)  # the range of stored images that are bytes


def strangers(spec: str, like: Data, target: str | None = None) -> Part:
    """Data of another kind, as unknown to a model of ``like``.

    Images are turned into the size, the colors and the range of values that the model takes; columns of tables are found by name.

    Args:
        spec: A name or path.
        like: What the model learned from.
        target: The column that held the class there.

    Raises:
        ValueError: If the data are of another kind, or cannot be read.
    """
    found = others(spec, like, target)
    return Part(found.source, torch.arange(len(found.source)), found.labels)


def others(spec: str, like: Data, target: str | None = None) -> Collection:
    """Other data with what classes they have, as a model of ``like`` takes them; as for :func:`strangers`."""
    files = (
        like.kind == "image" and Path(spec).is_dir() and any(p.suffix.lower().encode() in ENDINGS for p in Path(spec).rglob("*"))
    )
    size = (like.shape[1], like.shape[2]) if files else None  # image files may be of many sizes
    found = read(spec, size, target if spec.lower().endswith((".csv", ".tsv", ".gz")) else None)
    if found.kind != like.kind:
        raise ValueError(f"{found.name} holds {found.kind}s, and the model takes {like.kind}s; name others")
    if like.kind == "row":
        found = columns_of(found, like)
    if like.kind == "row":
        return found
    return replace(found, source=Fitted(found.source, like.shape, extent(found.source), extent(like.train.source)))


def columns_of(found: Collection, like: Data) -> Collection:
    """The columns that a model takes, in its order.

    Raises:
        ValueError: If there are others, or none of them.
    """
    if like.columns and found.columns:
        if missing := [name for name in like.columns if name not in found.columns]:
            raise ValueError(f"{found.name} lacks {len(missing)} columns that the model takes: {few(missing)}; add them")
        assert isinstance(found.source, Stored)
        order = [found.columns.index(name) for name in like.columns]
        found = replace(found, source=replace(found.source, values=found.source.values[:, order]), columns=like.columns)
    if found.source.shape != like.shape:
        raise ValueError(f"{found.name} holds rows of {found.source.shape[0]} numbers, and the model takes {like.shape[0]}")
    return found


def extent(source: Source) -> tuple[float, float]:
    """The range of values of images: that of bytes, or what the first ones show."""
    some = source.read(torch.arange(min(len(source), fitting(source.shape, CHUNK))))
    return BYTES if some.dtype == torch.uint8 else (some.min().item(), some.max().item())


@dataclass(frozen=True)
class Fitted(Source):
    """Images of another source in the size, colors and range of a model.

    Args:
        source: The images.
        shape: Channels, height and width as the model takes them.
        given, wanted: The ranges of their values, and of those that the model learned from.
    """

    source: Source
    shape: tuple[int, ...]
    given: tuple[float, float] = BYTES
    wanted: tuple[float, float] = BYTES

    @property
    def at_hand(self) -> bool:  # type: ignore[override]
        """As the source."""
        return self.source.at_hand

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Tensor) -> Tensor:
        values = self.source.read(indices)
        if values.shape[1:] != self.shape:
            values = values.float()
        if values.shape[1] != self.shape[0]:
            values = values.mean(1, keepdim=True).expand(-1, self.shape[0], -1, -1)
        if values.shape[2:] != self.shape[1:]:
            values = interpolate(values, self.shape[1:], mode="bilinear", antialias=True)
        (a, b), (low, high) = self.given, self.wanted
        if self.given != self.wanted and b > a:
            values = low + (values.float() - a) * ((high - low) / (b - a))
        return values

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()
