"""The algorithms as data, and two small problems to run them on. A new algorithm adds one row."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import bayesrule as br


@dataclass(frozen=True)
class Algorithm:
    """One optimizer with its hyper-parameters; `twin` must take the same steps without any noise.

    `alone` are hyper-parameters that ours alone has, set so that it meets its twin.
    """

    name: str
    make: Callable[..., Optimizer]
    hyper: dict[str, Any]
    kind: Literal["first-order", "variational"]
    twin: Callable[..., Optimizer] | None = None
    alone: dict[str, Any] | None = None

    def __call__(self, params: Any, **overrides: Any) -> Optimizer:
        return self.make(params, **{**self.hyper, **(self.alone or {}), **overrides})

    def torch(self, params: Any) -> Optimizer:
        assert self.twin is not None
        return self.twin(params, **self.hyper)


# Algorithms

SMALL_IVON = dict(lr=0.3, ess=50.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01)

ALGORITHMS = [
    Algorithm("sgd", br.SGD, dict(lr=0.1), "first-order", torch.optim.SGD),
    Algorithm("sgd-decay", br.SGD, dict(lr=0.1, weight_decay=0.05), "first-order", torch.optim.SGD),
    Algorithm("sgd-momentum", br.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), "first-order", torch.optim.SGD),
    Algorithm(
        "sgd-dampening",
        br.SGD,
        dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
        "first-order",
        torch.optim.SGD,
    ),
    Algorithm(
        "sgd-nesterov",
        br.SGD,
        dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        "first-order",
        torch.optim.SGD,
    ),
    Algorithm("rmsprop", br.RMSprop, dict(lr=0.01, weight_decay=0.01), "first-order", torch.optim.RMSprop),
    Algorithm(
        "rmsprop-momentum",
        br.RMSprop,
        dict(lr=0.01, alpha=0.9, eps=1e-6, momentum=0.9, weight_decay=0.01),
        "first-order",
        torch.optim.RMSprop,
    ),
    Algorithm("adam", br.Adam, dict(lr=0.01), "first-order", torch.optim.Adam),
    Algorithm(
        "adam-decay",
        br.Adam,
        dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
        "first-order",
        torch.optim.Adam,
    ),
    Algorithm("adamw", br.AdamW, dict(lr=0.01, weight_decay=0.1), "first-order", torch.optim.AdamW),
    Algorithm(
        "ivon-frozen-cold",
        br.IVON,
        dict(lr=0.1, weight_decay=0.05),
        "variational",
        torch.optim.SGD,
        dict(ess=1e30, betas=(0.0, 1.0), hess_init=0.3),
    ),
    Algorithm("ivon-price", br.IVON, SMALL_IVON, "variational"),
    Algorithm("ivon-gradsq", br.IVON, dict(SMALL_IVON, hess_approx="gradsq", gradsq_scale=8.0), "variational"),
    Algorithm("ivon-pairs", br.IVON, dict(SMALL_IVON, mc_samples=2, antithetic=True), "variational"),
    Algorithm("ivon-clipped", br.IVON, dict(SMALL_IVON, clip_radius=0.1, debias=False), "variational"),
    Algorithm("ivon-unscaled", br.IVON, dict(SMALL_IVON, lr=0.2, rescale_lr=False), "variational"),
    Algorithm("von", br.VON, dict(lr=0.05, ess=50.0, hess_init=0.5, betas=(0.9, 0.999), weight_decay=0.01), "variational"),
    Algorithm("vadam", br.Vadam, dict(lr=0.05, ess=500.0, hess_init=0.1, betas=(0.9, 0.9), weight_decay=0.01), "variational"),
    Algorithm("vprop", br.Vprop, dict(lr=0.05, ess=500.0, hess_init=0.1, alpha=0.9, weight_decay=0.01), "variational"),
]

TWINS = [a for a in ALGORITHMS if a.twin is not None]


def named(algorithm: Algorithm) -> str:
    """The name of a row, as pytest's `ids` wants it."""
    return algorithm.name


# Problems


class Quadratic(nn.Module):
    """loss = (x - c)^T A (x - c) / 2 over two parameters that together are x; the same in every step."""

    A = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.tensor([0.2, 0.1], dtype=dtype))
        self.tail = nn.Parameter(torch.tensor([-0.4], dtype=dtype))

    def loss(self, step: int) -> Tensor:
        gap = torch.cat([self.head, self.tail]) - self.c.to(self.head.dtype)
        return gap @ self.A.to(gap.dtype) @ gap / 2


class Network(nn.Module):
    """A small network that sorts fixed points into three classes, in minibatches of 16."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normals(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x = normals(64, 5)
        self.y = (self.x @ normals(5, 3) + 0.5 * normals(64, 3)).argmax(-1)
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3)
        self.to(dtype)
        for p in self.parameters():
            p.data = normals(*p.shape) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))

    def loss(self, step: int) -> Tensor:
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        return cross_entropy(self(self.x[rows]), self.y[rows])


PROBLEMS = {"quadratic": Quadratic, "network": Network}


# Running them


def train(
    problem: Any,
    optimizer: Optimizer,
    steps: int | Iterable[int],
    *,
    decay: float = 1.0,
    loss: Callable[[Any, int], Tensor] = lambda problem, step: problem.loss(step),
) -> Tensor:
    """Take steps with an ordinary closure; where all weights were after each, shape (steps, weights)."""
    path = []
    for step in range(steps) if isinstance(steps, int) else steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(problem, step)
            value.backward()
            return value

        optimizer.step(closure)
        for group in optimizer.param_groups:
            group["lr"] *= decay
        path.append(flat(problem.parameters()))
    return torch.stack(path)


def draw(optimizer: Any, problem: Any, step: int = 0, scale: float = 1.0, **context: Any) -> Tensor:
    """One draw that is learned from: forward and backward in a context; where it looked, flat."""
    with optimizer.sampled_params(train=True, **context):
        where = flat(problem.parameters())
        (problem.loss(step) * scale).backward()
    return where


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all elements in one row."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def state(optimizer: Optimizer, name: str) -> Tensor:
    """One name of the state, of all parameters, flat."""
    return flat(optimizer.state[p][name] for group in optimizer.param_groups for p in group["params"])


def replay(values: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """A source of noise that gives what it was told, in order, whatever the parameter."""
    queue = iter(values)
    return lambda parameter: next(queue).to(parameter.dtype).reshape(parameter.shape)


def living_bytes() -> int:
    """Bytes of all tensors that anyone holds, but for those that the compiler only imagines."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not issubclass(type(t), FakeTensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided and t.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
