"""Data of another kind than a model learned: does it notice?"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bayesrule.recipes.data import Data, Part
from bayesrule.recipes.formats.folders import ENDINGS
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import Source


def strangers(spec: str | Path, like: Data) -> Part:
    """Data of another kind, as unknown to a model of ``like``: images are turned into its size and colors.

    Raises:
        ValueError: If the data are of another kind, or cannot be read.
    """
    files = (
        like.kind == "image"
        and Path(spec).is_dir()
        and any(path.suffix.lower().encode() in ENDINGS for path in Path(spec).rglob("*"))
    )
    found = read(str(spec), (like.shape[1], like.shape[2]) if files else None)  # image files may be of many sizes
    if found.kind != like.kind or (like.kind == "row" and found.source.shape != like.shape):
        raise ValueError(
            f"{found.name} holds {found.kind}s of shape {found.source.shape}, the model takes {like.kind}s of shape {like.shape}"
        )
    return Part(Fitted(found.source, like.shape), torch.arange(len(found.source)), found.labels)


@dataclass(frozen=True)
class Fitted(Source):
    """Images of another source in the size and colors of a model.

    Args:
        source: The images.
        shape: Channels, height and width as the model takes them.
    """

    source: Source
    shape: tuple[int, ...]

    @property
    def at_hand(self) -> bool:  # type: ignore[override]
        """As the source."""
        return self.source.at_hand

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Tensor) -> Tensor:
        values = self.source.read(indices)
        if values.shape[1:] == self.shape:
            return values
        values = values.float()
        if values.shape[1] != self.shape[0]:
            values = values.mean(1, keepdim=True).expand(-1, self.shape[0], -1, -1)
        if values.shape[2:] != self.shape[1:]:
            values = interpolate(values, self.shape[1:], mode="bilinear", antialias=True)
        return values

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()
