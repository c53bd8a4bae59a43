"""Light changes of training images that leave their class as it is."""

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from bayesrule.recipes.names import lookup

REACH = 8  # a shift goes up to this part of a side


def shift(images: Tensor, generator: Generator) -> Tensor:
    """Each image moved by up to an eighth of its sides, the border repeated."""
    count, _, height, width = images.shape
    moved = []
    for side in (height, width):
        most = side // REACH
        steps = torch.randint(-most, most + 1, (count, 1), generator=generator)
        moved.append((torch.arange(side) + steps).clamp(0, side - 1).to(images.device))
    rows, columns = moved
    return images[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image mirrored left to right, or not."""
    chosen = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


CHANGES: dict[str, Callable[[Tensor, Generator], Tensor]] = {"shift": shift, "flip": flip}


def augmentation(names: Iterable[str]) -> Callable[[Tensor, Generator], Tensor]:
    """The changes of these names, one after another.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> augmentation(["shift", "flip"])(torch.zeros(2, 3, 32, 32), Generator()).shape
        torch.Size([2, 3, 32, 32])
    """
    changes = [lookup("augmentation", name, CHANGES) for name in names]

    def augment(images: Tensor, generator: Generator) -> Tensor:
        for change in changes:
            images = change(images, generator)
        return images

    return augment
