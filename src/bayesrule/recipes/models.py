"""Small classifiers of images of any size. None keeps batch statistics: every prediction depends on the weights alone."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesrule.recipes.names import lookup


def mlp(channels: int, size: int, classes: int) -> nn.Module:
    """Two hidden layers of 128 units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def lenet(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions, each followed by max pooling, and a linear layer, after LeCun et al. (1998) with rectifiers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 8) ** 2, classes),
    )


class Block(nn.Module):
    """Two normalized 3x3 convolutions around a shortcut, which averages and pads where the width doubles (option A)."""

    def __init__(self, inward: int, width: int) -> None:
        super().__init__()
        self.widen = width - inward
        self.conv1 = nn.Conv2d(inward, width, 3, stride=2 if self.widen else 1, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(width // 8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(width // 8, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.widen:
            x = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.widen))
        return torch.relu(x + y)


def resnet20(channels: int, size: int, classes: int) -> nn.Module:
    """The CIFAR ResNet-20 of He et al. (2016), 0.27 million weights, with group norm (groups of 8) for batch norm."""
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.GroupNorm(2, 16), nn.ReLU())
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = (Block(inward, width) for inward, width in itertools.pairwise(widths))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {"mlp": mlp, "lenet": lenet, "resnet20": resnet20}


def build(name: str, images: Tensor, classes: int, seed: int = 0) -> nn.Module:
    """A freshly initialized model for such images, shape (examples, channels, size, size).

    Example:
        >>> sum(p.numel() for p in build("lenet", torch.zeros(1, 1, 28, 28), 10).parameters())
        37514
    """
    make = lookup("model", name, MODELS)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make(images.shape[1], images.shape[-1], classes)
