"""Models whose per-example gradients are had in all the ways there are."""

import torch
from tests.contracts import normal
from torch import nn
from torch.nn import functional as F

DOUBLE, EXAMPLES = torch.float64, 5


class Residual(nn.Module):
    """With what is written in place behind a layer."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        y += x
        return F.relu_(y)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attend, self.gather = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.attend(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.gather(mixed.transpose(1, 2).flatten(2))


class Language(nn.Module):
    """A small transformer, the head tied to the embedding; places are embedded for each example, in a row, or for all at once."""

    def __init__(self, at_once=False, length=4, padding=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, padding_idx=padding), nn.Embedding(length, 6)
        self.block, self.norm, self.head = Attention(6), nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
        self.head.weight, self.at_once = self.tokens.weight, at_once

    def forward(self, text):
        places = torch.arange(text.shape[1])
        seen = {False: places.expand_as(text), "row": places[None], True: places}[self.at_once]
        x = self.tokens(text) + self.positions(seen)
        return self.head(self.norm(self.block(x))).mean(1)


class Twice(nn.Module):
    def __init__(self, times=2):
        super().__init__()
        self.layer, self.last, self.times = nn.Linear(4, 4), nn.Linear(4, 3), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return self.last(x)


class Scaled(nn.Module):
    """Has a parameter of its own, two outputs of which one is in the other's past, and an argument for all examples."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x, shift):
        first = self.inner(x) * self.scale
        return {"first": first, "second": (first * self.scale + shift).tanh()}


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.odd, self.after = nn.Linear(3, 4), Scaled(), nn.Linear(4, 2)

    def forward(self, x):
        both = self.odd(self.before(x), shift=torch.tensor(0.3))
        return self.after(both["first"].sin() + both["second"])


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0].sum(1)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.used = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x):
        return F.linear(self.inside(x), self.used.weight) + self.used(self.inside(x))


class Turned(nn.Module):
    """Positions lead in the middle, and there may be as many as examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh().transpose(0, 1).cumsum(0)).transpose(0, 1).mean(1)


class Flat(nn.Module):
    """Every position in a row of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).tanh().view(len(x), -1, 2).sum(1)


def frozen(model, *numbers):
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number not in numbers)
    return model


def sum_over(*dims):
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum(dims)

    return Sum()


def tokens(length=4, examples=EXAMPLES):
    return torch.randint(7, (examples, length), generator=torch.Generator().manual_seed(3))


MLP = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 3))  # noqa: E731
IMAGE = normal(1, EXAMPLES, 4, 7, 6)
CASES = {  # a model and its input
    "perceptron": (MLP, normal(1, EXAMPLES, 3)),
    "one example": (MLP, normal(1, 1, 3)),
    "no example": (MLP, normal(1, 0, 3)),
    "frozen": (lambda: frozen(MLP(), 0, 3), normal(1, EXAMPLES, 3)),
    "not contiguous": (MLP, normal(1, 3, 2 * EXAMPLES).T[::2]),
    "few positions": (lambda: nn.Sequential(MLP(), sum_over(1)), normal(1, EXAMPLES, 3, 3)),
    "many positions": (lambda: nn.Sequential(MLP(), sum_over(1, 2)), normal(1, EXAMPLES, 3, 4, 3)),
    "no position": (lambda: nn.Sequential(MLP(), sum_over(1)), normal(1, EXAMPLES, 0, 3)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.ReLU(True),
            nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(1, 2)),
            nn.Tanh(),
            nn.Conv2d(4, 2, 2, padding="valid", bias=False),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        IMAGE,
    ),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 2, groups=4), sum_over(2, 3)),
        IMAGE.to(memory_format=torch.channels_last),
    ),
    "circular": (lambda: nn.Sequential(nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), sum_over(2, 3)), IMAGE),
    "convolution to one pixel": (lambda: nn.Sequential(nn.Conv2d(4, 3, (7, 6)), nn.Flatten()), IMAGE),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, dilation=2), nn.Tanh(), nn.BatchNorm1d(6), sum_over(2), nn.BatchNorm1d(6)),
        normal(1, EXAMPLES, 4, 11),
    ),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), Residual(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        IMAGE,
    ),
    "other norms": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.RMSNorm(6), nn.LayerNorm((7, 6)), sum_over(2, 3)),
        IMAGE,
    ),
    "transformer": (Language, tokens()),
    "as long as examples": (lambda: Language(length=EXAMPLES), tokens(EXAMPLES)),
    "padding": (lambda: Language(padding=2), tokens()),
    "positions in a row": (lambda: Language("row"), tokens()),
    "positions in a row, as many as examples": (lambda: Language("row", EXAMPLES), tokens(EXAMPLES)),
    "a layer twice": (Twice, normal(1, EXAMPLES, 4)),
    "a layer many times": (lambda: Twice(6), normal(1, EXAMPLES, 4)),
}
FORMLESS = {  # those of which a module is differentiated example by example, and its type
    "unknown module": (Unknown, normal(1, EXAMPLES, 3), "Scaled"),
    "packed attention": (SelfAttention, normal(1, EXAMPLES, 3, 4), "MultiheadAttention"),
    "functional use": (Functional, normal(1, EXAMPLES, 3), "Functional"),
    "positions at once": (lambda: Language(at_once=True), tokens(), "Language"),
    "positions at once, as many as examples": (lambda: Language(True, EXAMPLES), tokens(EXAMPLES), "Language"),
    "turned": (Turned, normal(1, EXAMPLES, 3, 3), "Turned"),
    "turned, as many as examples": (Turned, normal(1, EXAMPLES, EXAMPLES, 3), "Turned"),
    "flat": (Flat, normal(1, EXAMPLES, 4, 3), "Flat"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), normal(1, EXAMPLES, 3), "ParametrizedLinear"),
}
NAMES = [*CASES, *FORMLESS]


def made(name):
    torch.manual_seed(0)
    make, x = {**CASES, **FORMLESS}[name][:2]
    model = make().to(DOUBLE).eval()
    for number, module in enumerate(model.modules()):
        if hasattr(module, "running_mean"):
            module.running_mean.copy_(normal(number, *module.running_mean.shape))
            module.running_var.copy_(normal(number, *module.running_var.shape).exp())
    for number, p in enumerate(model.parameters()):
        p.data.add_(0.1 * normal(number, *p.shape))
    return model, x
