"""Light changes of training images that leave their class as it is."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Generator, Tensor

from bayesrule.recipes.names import lookup

REACH = 8  # a shift goes up to this part of a side


class Change(Protocol):
    """A change of images, each by chance.

    Args:
        images: Those to change, shape (images, channels, height, width).
        generator: Where chance comes from.
        share: The whole batch's number of images, and which of them these are; None is all. What befalls an image depends on its
            place in the batch alone, so that processes that share a batch change it as one would.
    """

    def __call__(self, images: Tensor, generator: Generator, share: tuple[int, slice] | None = None) -> Tensor:
        """The changed images."""


def shift(images: Tensor, generator: Generator, share: tuple[int, slice] | None = None) -> Tensor:
    """Each image moved by up to an eighth of its sides, the border repeated."""
    count, _, height, width = images.shape
    every, mine = share or (count, slice(None))
    moved = []
    for side in (height, width):
        most = side // REACH
        steps = torch.randint(-most, most + 1, (every, 1), generator=generator)[mine]
        moved.append((torch.arange(side) + steps).clamp(0, side - 1).to(images.device))
    rows, columns = moved
    return images[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def flip(images: Tensor, generator: Generator, share: tuple[int, slice] | None = None) -> Tensor:
    """Each image mirrored left to right, or not."""
    every, mine = share or (len(images), slice(None))
    chosen = torch.rand(every, generator=generator)[mine].lt(0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


CHANGES: dict[str, Change] = {"shift": shift, "flip": flip}


def augmentation(names: Iterable[str]) -> Change:
    """The changes of these names, one after another.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> augmentation(["shift", "flip"])(torch.zeros(2, 3, 32, 32), Generator()).shape
        torch.Size([2, 3, 32, 32])
    """
    changes = [lookup("augmentation", name, CHANGES) for name in names]

    def augment(images: Tensor, generator: Generator, share: tuple[int, slice] | None = None) -> Tensor:
        for change in changes:
            images = change(images, generator, share)
        return images

    return augment
