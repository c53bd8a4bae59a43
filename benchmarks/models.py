"""The networks that are trained: a GPT over bytes, the CIFAR ResNet-20, a multi-layer perceptron."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES, CONTEXT = 256, 256


class Layer(nn.Module):
    """Causal attention and a perceptron, each after a layer norm and around a shortcut, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.gather = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.gather(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """After nanoGPT: bytes as tokens, learned positions, a head tied to the embedding. Six layers have 76 tensors."""

    def __init__(self, width: int = 280, heads: int = 7, layers: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, length, 256) of the bytes that follow those in ``text`` (batch, length)."""
        x = self.tokens(text) + self.positions.weight[: text.shape[1]]
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


class Block(nn.Module):
    """Two normalized 3x3 convolutions around a shortcut without weights (option A: every other pixel, zeros for new channels)."""

    def __init__(self, inward: int, width: int) -> None:
        super().__init__()
        self.new = width - inward
        self.conv1 = nn.Conv2d(inward, width, 3, stride=2 if self.new else 1, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return torch.relu(x + y)


def resnet20() -> nn.Module:
    """The CIFAR ResNet-20 of He et al. (2016): 0.27 million weights in 59 tensors."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = (Block(inward, width) for inward, width in itertools.pairwise(widths))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Two hidden layers of 610 units on 28x28 pixels: 0.86 million weights in 6 tensors."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 610), nn.ReLU(), nn.Linear(610, 610), nn.ReLU(), nn.Linear(610, 10))


def gpt_shapes(width: int) -> list[torch.Size]:
    """The shapes of a six-layer GPT's 76 tensors, about 72 width^2 numbers, without making any of them."""
    with torch.device("meta"):
        return [p.shape for p in GPT(width, heads=1).parameters()]


def resnet20_shapes() -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in resnet20().parameters()]
