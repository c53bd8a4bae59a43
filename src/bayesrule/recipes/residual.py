"""Residual networks, normalized by filter response, which knows no batch, or by batch norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class FilterResponse(nn.Module):
    r"""Divide each channel of each example by the root of its mean square; no statistics of a batch are taken or kept.

    .. math:: y = \gamma x / \sqrt{\nu^2 + \epsilon} + \beta, \qquad \nu^2 = \tfrac{1}{HW} \textstyle\sum_{hw} x_{hw}^2.

    :math:`\epsilon` is fixed: as a weight of size 1e-6 it would drown in the noise of a posterior. Reckons in float32 or wider
    and returns the dtype of its input, shape (examples, channels, height, width).

    Source: Singh & Krishnan (2020), section 3.1.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean((2, 3), keepdim=True) + self.eps).rsqrt() * self.weight[:, None, None]
        return (wide * scale + self.bias[:, None, None]).to(x.dtype)


class Threshold(nn.Module):
    """Thresholded linear unit: max(y, tau), with a tau for each channel that is learned and starts at 0.

    Source: Singh & Krishnan (2020), section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.tau.to(x.dtype)[:, None, None])


class Norm(NamedTuple):
    """How a residual network normalizes and rectifies so many channels."""

    scale: Callable[[int], nn.Module]
    rectify: Callable[[int], nn.Module]


NORMS: dict[str, Norm] = {"frn": Norm(FilterResponse, Threshold), "batch": Norm(nn.BatchNorm2d, lambda _: nn.ReLU())}


class Block(nn.Module):
    """rectify(branch(x) + shortcut(x)): the branch ends with a norm, and the threshold or rectifier comes after the sum."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, rectify: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.rectify = branch, shortcut, rectify

    def forward(self, x: Tensor) -> Tensor:
        return self.rectify(self.branch(x) + self.shortcut(x))


class Pad(nn.Module):
    """The shortcut without weights (option A): averages where the branch has a stride, and fills up with channels of zeros."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = outward - inward, stride

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, self.stride, ceil_mode=True)
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.more))


def convolution(inward: int, outward: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, of such a padding that the stride alone decides the size; started after He et al. (2015)."""
    made = nn.Conv2d(inward, outward, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


@dataclass(frozen=True)
class Design:
    """What tells residual networks apart.

    Args:
        depths: Blocks in each stage; a stage has twice the channels of the one before, at half the height and width.
        width: Channels of the first stage's 3x3 convolutions.
        kernels: Of the convolutions of a block.
        expansion: Channels that leave a block, for each channel of its 3x3 convolutions.
        padded: Whether shortcuts have no weights (option A) instead of 1x1 convolutions (option B), and the stem is always small.
    """

    depths: Sequence[int]
    width: int
    kernels: Sequence[int] = (3, 3)
    expansion: int = 1
    padded: bool = False

    def network(self, image: tuple[int, int, int], classes: int, norm: Norm) -> nn.Module:
        """The network for such images.

        The stem is a 7x7 convolution of stride 2 and a 3x3 max pool from 96 pixels on (the shorter side), else a 3x3
        convolution. A map of two pixels' height or width is not halved further: over one pixel, filter response would leave
        nothing but signs.

        Args:
            image: Channels, height, width.
            classes: Number of outputs.
            norm: One of ``NORMS``.
        """
        channels, side = image[0], min(image[1:])
        large = side >= 96 and not self.padded
        layers = [*self._convolutions([channels, self.width], [7 if large else 3], [2 if large else 1], norm)]
        layers.append(norm.rectify(self.width))
        if large:
            layers.append(nn.MaxPool2d(3, 2, 1))
            side = -(-side // 4)
        inward = self.width
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage and not block and side > 2 else 1
                layers.append(self._block(inward, self.width * 2**stage, stride, norm))
                inward, side = self.width * 2**stage * self.expansion, -(-side // stride)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inward, classes))

    def _block(self, inward: int, width: int, stride: int, norm: Norm) -> Block:
        outward = width * self.expansion
        strides = [1] * len(self.kernels)
        strides[self.kernels.index(3)] = stride
        branch = self._convolutions([inward, *[width] * (len(self.kernels) - 1), outward], self.kernels, strides, norm)
        shortcut: nn.Module = nn.Identity()
        if self.padded and inward != outward:
            shortcut = Pad(inward, outward, stride)
        elif inward != outward or stride > 1:
            shortcut = self._convolutions([inward, outward], [1], [stride], norm)
        return Block(branch, shortcut, norm.rectify(outward))

    @staticmethod
    def _convolutions(widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int], norm: Norm) -> nn.Sequential:
        """Convolutions, a norm after each, and between them what rectifies."""
        layers: list[nn.Module] = []
        for inward, outward, kernel, stride in zip(widths, widths[1:], kernels, strides, strict=False):
            layers += [convolution(inward, outward, kernel, stride), norm.scale(outward), norm.rectify(outward)]
        return nn.Sequential(*layers[:-1])


RESIDUAL: dict[str, Design] = {
    "resnet20": Design((3, 3, 3), 16, padded=True),
    "resnet18": Design((2, 2, 2, 2), 64),
    "resnet50": Design((3, 4, 6, 3), 64, kernels=(1, 3, 1), expansion=4),
}
"""He et al. (2016): ResNet-20 for CIFAR, 18 of basic blocks and 50 of bottlenecks, with their stride in the 3x3 convolution."""
