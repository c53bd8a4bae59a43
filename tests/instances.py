"""The algorithms as data, and two small problems to run them on. A new algorithm adds one row."""

import gc
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import bayesrule as br


@dataclass(frozen=True)
class Algorithm:
    """One optimizer with its hyper-parameters, and what holds for it whatever the problem.

    Args:
        name: Of the row.
        make: The optimizer.
        hyper: Its hyper-parameters, which its twin shares.
        keeps: What is left beside the weights: nothing, the precision of every weight, one in a basis or of blocks, odds of
            signs, how likely units are there, or several means and precisions.
        closure: What ``step(closure)`` asks for: the loss and its gradients, once or twice, or the loss of every example.
        rule: The slots, for a :class:`bayesrule.BayesOptimizer`.
        twin: An optimizer of torch that takes the same steps.
        alone: Hyper-parameters that ours alone has, set so that it meets its twin.
        theirs: Those that the twin alone has.
        scales: Powers of c by which hyper-parameters change with a loss that is c times as large, so that no step changes.
        scaled_with: Hyper-parameters for which that holds.
        floor: The least curvature that a step leaves, from the group and the curvature before it.
        turns: Whether its path turns with the problem, of vectors.
    """

    name: str
    make: Callable[..., Optimizer]
    hyper: dict[str, Any]
    keeps: Literal["nothing", "precision", "basis", "blocks", "odds", "units", "several"] = "precision"
    closure: Literal["once", "twice", "examples"] = "once"
    rule: br.BayesRule | None = None
    twin: Callable[..., Optimizer] | None = None
    alone: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, int] | None = None
    scaled_with: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[Mapping[str, Any], Tensor], Tensor] | None = None
    turns: bool = False

    def __call__(self, params: Any, **overrides: Any) -> Any:
        slots = {} if self.rule is None else {"rule": self.rule}
        return self.make(params, **slots, **{**self.hyper, **self.alone, **overrides})

    def torch(self, params: Any) -> Optimizer:
        assert self.twin is not None
        return self.twin(params, **self.hyper, **self.theirs)

    def takes(self, argument: str) -> bool:
        """Whether the optimizer has an argument of that name."""
        return argument in inspect.signature(self.make).parameters

    def scaled(self, c: float) -> dict[str, Any]:
        """Hyper-parameters for c times the loss."""
        assert self.scales is not None
        plain = {**self.hyper, **self.alone, **self.scaled_with}
        return {name: plain[name] * c**power for name, power in self.scales.items()}


# Floors


def half(group: Mapping[str, Any], hess: Tensor) -> Tensor:
    """Of curvature and prior together a step of the improved rule leaves half."""
    return (hess - group["weight_decay"]) / 2


def share(group: Mapping[str, Any], hess: Tensor) -> Tensor:
    """Averaging with what is never negative, and at least the damping."""
    beta = group["betas"][1] if "betas" in group else group.get("alpha", group.get("beta2"))
    return beta * hess + (1 - beta) * group.get("damping", 0.0)


# Algorithms

SMALL_IVON = dict(lr=0.3, ess=50.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01)
SMALL_EVON = dict(
    lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01, precondition_frequency=3, eps=0.0, whiten=False
)
GAUSS_NEWTON = dict(lr=0.1, ess=64.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01, damping=0.05)
ROOTED = dict(lr=0.05, ess=500.0, hess_init=0.1, weight_decay=0.01)

OF_RATE = dict(lr=-1, weight_decay=1)
OF_POSTERIOR = dict(ess=-1, hess_init=1, weight_decay=1)
OF_SQUARES = dict(lr=1, ess=-2, hess_init=2, weight_decay=2, damping=2)
"""The prior's gradient does not go with the loss's square, so these want a prior that hardly pulls."""
FLAT = dict(weight_decay=1e-14)

FROZEN = dict(betas=(0.0, 1.0), hess_init=0.95)
"""With a decay of 0.05 the metric is 1, and stays so."""

ALGORITHMS = [
    Algorithm("sgd", br.SGD, dict(lr=0.1), "nothing", twin=torch.optim.SGD, scales=dict(lr=-1), turns=True),
    Algorithm("sgd-decay", br.SGD, dict(lr=0.1, weight_decay=0.05), "nothing", twin=torch.optim.SGD, scales=OF_RATE, turns=True),
    Algorithm(
        "sgd-momentum",
        br.SGD,
        dict(lr=0.05, momentum=0.9, weight_decay=0.01),
        "nothing",
        twin=torch.optim.SGD,
        scales=OF_RATE,
        turns=True,
    ),
    Algorithm(
        "sgd-dampening",
        br.SGD,
        dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
        "nothing",
        twin=torch.optim.SGD,
        scales=OF_RATE,
        turns=True,
    ),
    Algorithm(
        "sgd-nesterov",
        br.SGD,
        dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        "nothing",
        twin=torch.optim.SGD,
        scales=OF_RATE,
        turns=True,
    ),
    Algorithm(
        "rmsprop",
        br.RMSprop,
        dict(lr=0.01, eps=1e-8, weight_decay=0.01),
        "nothing",
        twin=torch.optim.RMSprop,
        scales=dict(eps=1, weight_decay=1),
        floor=share,
    ),
    Algorithm(
        "rmsprop-momentum",
        br.RMSprop,
        dict(lr=0.01, alpha=0.9, eps=1e-6, momentum=0.9, weight_decay=0.01),
        "nothing",
        twin=torch.optim.RMSprop,
        scales=dict(eps=1, weight_decay=1),
        floor=share,
    ),
    Algorithm("adam", br.Adam, dict(lr=0.01, eps=1e-8), "nothing", twin=torch.optim.Adam, scales=dict(eps=1), floor=share),
    Algorithm(
        "adam-decay",
        br.Adam,
        dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
        "nothing",
        twin=torch.optim.Adam,
        scales=dict(eps=1, weight_decay=1),
        floor=share,
    ),
    Algorithm(
        "adamw",
        br.AdamW,
        dict(lr=0.01, eps=1e-8, weight_decay=0.1),
        "nothing",
        twin=torch.optim.AdamW,
        scales=dict(eps=1),
        floor=share,
    ),
    Algorithm(
        "ivon-frozen-cold",
        br.IVON,
        dict(lr=0.1, weight_decay=0.05),
        twin=torch.optim.SGD,
        alone=dict(ess=1e30, betas=(0.0, 1.0), hess_init=0.3),
        scales=dict(OF_POSTERIOR, lr=-1),
        floor=half,
        turns=True,
    ),
    Algorithm("ivon-price", br.IVON, SMALL_IVON, scales=dict(OF_POSTERIOR, lr=-1), floor=half),
    Algorithm(
        "ivon-gradsq",
        br.IVON,
        dict(SMALL_IVON, hess_approx="gradsq", gradsq_scale=8.0),
        scales=dict(OF_POSTERIOR, lr=-1, gradsq_scale=-1),
        floor=half,
    ),
    Algorithm("ivon-total", br.IVON, dict(SMALL_IVON, hess_approx="gradsq"), scales=dict(OF_POSTERIOR, lr=-1), floor=half),
    Algorithm(
        "ivon-pairs",
        br.IVON,
        dict(SMALL_IVON, mc_samples=2, antithetic=True),
        scales=dict(OF_POSTERIOR, lr=-1),
        floor=half,
    ),
    Algorithm(
        "ivon-clipped",
        br.IVON,
        dict(SMALL_IVON, clip_radius=0.1, debias=False),
        scales=dict(OF_POSTERIOR, lr=-1),
        floor=half,
    ),
    Algorithm("ivon-unscaled", br.IVON, dict(SMALL_IVON, lr=0.2, rescale_lr=False), scales=OF_POSTERIOR, floor=half),
    Algorithm(
        "von",
        br.VON,
        dict(lr=0.05, ess=50.0, hess_init=0.5, betas=(0.9, 0.999), weight_decay=0.01),
        scales=OF_POSTERIOR,
    ),
    Algorithm(
        "von-frozen-cold",
        br.VON,
        dict(lr=0.1, weight_decay=0.05),
        twin=torch.optim.SGD,
        alone=dict(FROZEN, ess=math.inf),
        scales=OF_POSTERIOR,
        turns=True,
    ),
    Algorithm(
        "vogn",
        br.VOGN,
        GAUSS_NEWTON,
        closure="examples",
        scales=OF_SQUARES,
        scaled_with=FLAT,
        floor=share,
    ),
    Algorithm(
        "vogn-frozen-cold",
        br.VOGN,
        dict(lr=0.1, weight_decay=0.05),
        closure="examples",
        twin=torch.optim.SGD,
        alone=dict(FROZEN, ess=math.inf),
        scales=OF_POSTERIOR,
        floor=share,
        turns=True,
    ),
    Algorithm(
        "ogn",
        br.OGN,
        GAUSS_NEWTON,
        closure="examples",
        scales=OF_SQUARES,
        scaled_with=FLAT,
        floor=share,
    ),
    Algorithm("vadam", br.Vadam, dict(ROOTED, betas=(0.9, 0.9)), floor=share),
    Algorithm(
        "vadam-cold",
        br.Vadam,
        dict(lr=0.01, betas=(0.9, 0.99)),
        twin=torch.optim.Adam,
        alone=dict(ess=math.inf, weight_decay=1e-16),
        theirs=dict(eps=1e-16),
        floor=share,
    ),
    Algorithm("vprop", br.Vprop, dict(ROOTED, alpha=0.9), floor=share),
    Algorithm(
        "vprop-cold",
        br.Vprop,
        dict(lr=0.01, alpha=0.99),
        twin=torch.optim.RMSprop,
        alone=dict(ess=math.inf, weight_decay=1e-16),
        theirs=dict(eps=1e-16),
        floor=share,
    ),
    Algorithm(
        "evon",
        br.EVON,
        SMALL_EVON,
        "basis",
        scales=OF_POSTERIOR,
        floor=half,
    ),
    Algorithm(
        "evon-phasing",
        br.EVON,
        dict(SMALL_EVON, phasing=True, merge_dims=True, precondition_1d=True),
        "basis",
        scales=OF_POSTERIOR,
        floor=half,
    ),
    Algorithm(
        "evon-squares",
        br.EVON,
        dict(SMALL_EVON, hess_approx="gradsq", gradsq_scale=8.0, clip_radius=0.5),
        "basis",
        scales=dict(OF_POSTERIOR, gradsq_scale=-1),
        floor=half,
    ),
    Algorithm(
        "evon-squares-phasing",
        br.EVON,
        dict(SMALL_EVON, hess_approx="gradsq", gradsq_scale=8.0, phasing=True),
        "basis",
        scales=dict(OF_POSTERIOR, gradsq_scale=-1),
        floor=half,
    ),
    Algorithm("evon-whitened", br.EVON, dict(SMALL_EVON, whiten=True), "basis", scales=OF_POSTERIOR, floor=half),
    Algorithm(
        "evon-frozen-cold",
        br.EVON,
        dict(lr=0.1, weight_decay=0.05),
        "basis",
        twin=torch.optim.SGD,
        alone=dict(FROZEN, ess=1e30, eps=0.0, whiten=False, shampoo_beta=0.9, precondition_frequency=2),
        scales=OF_POSTERIOR,
        floor=half,
        turns=True,
    ),
    Algorithm(
        "sam", br.SAM, dict(lr=0.05, momentum=0.9, rho=0.1, weight_decay=0.01), "nothing", "twice", scales=OF_RATE, turns=True
    ),
    Algorithm(
        "sam-without-radius",
        br.SAM,
        dict(lr=0.05, momentum=0.9, weight_decay=0.01),
        "nothing",
        "twice",
        twin=torch.optim.SGD,
        alone=dict(rho=0.0),
        scales=OF_RATE,
        turns=True,
    ),
    Algorithm(
        "bsam",
        br.BSAM,
        dict(lr=0.1, ess=64.0, hess_init=0.5, betas=(0.9, 0.9), rho=0.05, weight_decay=0.01, damping=0.05),
        closure="twice",
        scales=dict(OF_SQUARES, rho=1),
        scaled_with=FLAT,
        floor=share,
    ),
    Algorithm("ste", br.STE, dict(lr=0.05, momentum=0.5, weight_decay=0.01, clip=1.0), "odds", scales=OF_RATE),
    Algorithm(
        "bayesbinn",
        br.BayesBiNN,
        dict(lr=0.3, ess=64.0, beta=0.5, natural_init=1.0, temperature=0.5),
        "odds",
        scales=dict(lr=-1, ess=-1),
    ),
    Algorithm(
        "iblr",
        br.IBLR,
        dict(lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01),
        "blocks",
        scales=OF_POSTERIOR,
    ),
    Algorithm(
        "iblr-frozen-cold",
        br.IBLR,
        dict(lr=0.1, weight_decay=0.05),
        "blocks",
        twin=torch.optim.SGD,
        alone=dict(FROZEN, ess=math.inf),
        scales=OF_POSTERIOR,
        turns=True,
    ),
    Algorithm(
        "slang",
        br.SLANG,
        dict(lr=0.1, ess=64.0, rank=2, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01),
        "blocks",
        "examples",
        scales={name: power for name, power in OF_SQUARES.items() if name != "damping"},
        scaled_with=FLAT,
    ),
    Algorithm(
        "slang-frozen-cold",
        br.SLANG,
        dict(lr=0.1, weight_decay=0.05),
        "blocks",
        "examples",
        twin=torch.optim.SGD,
        alone=dict(FROZEN, ess=math.inf, rank=2),
        scales=OF_POSTERIOR,
        turns=True,
    ),
    Algorithm("dropout", br.Dropout, dict(lr=0.1, p=0.3, momentum=0.5, weight_decay=0.01), "units", scales=OF_RATE, turns=True),
    Algorithm(
        "dropout-of-nothing",
        br.Dropout,
        dict(lr=0.05, momentum=0.9, weight_decay=0.01),
        "units",
        twin=torch.optim.SGD,
        alone=dict(p=0.0),
        scales=OF_RATE,
        turns=True,
    ),
    Algorithm("multi-ivon", br.MultiIVON, dict(SMALL_IVON, components=2), "several", scales=dict(OF_POSTERIOR, lr=-1)),
    Algorithm(
        "multi-ivon-of-one",
        br.MultiIVON,
        dict(lr=0.1, weight_decay=0.05),
        "several",
        twin=torch.optim.SGD,
        alone=dict(ess=1e30, betas=(0.0, 1.0), hess_init=0.3, components=1),
        scales=dict(OF_POSTERIOR, lr=-1),
        turns=True,
    ),
    Algorithm(
        "rule-sgd",
        br.BayesOptimizer,
        dict(lr=0.05, weight_decay=0.01),
        "nothing",
        rule=br.BayesRule(br.Delta(), br.Zero(), br.Additive(), br.HeavyBall(0.9)),
        twin=torch.optim.SGD,
        alone=dict(ess=10.0, hess_init=1.0),
        theirs=dict(momentum=0.9),
        scales=OF_POSTERIOR,
        turns=True,
    ),
    Algorithm(
        "rule-adam",
        br.BayesOptimizer,
        dict(lr=0.01, weight_decay=0.05),
        rule=br.BayesRule(
            br.Delta(),
            br.SquaredGradient(over="loss+prior"),
            br.SquareRoot(1e-6, debias=True),
            br.Momentum(0.8, over="loss+prior"),
        ),
        twin=torch.optim.Adam,
        alone=dict(hess_init=0.0, beta2=0.95),
        theirs=dict(betas=(0.8, 0.95), eps=1e-6),
        floor=share,
    ),
    Algorithm(
        "rule-squares",
        br.BayesOptimizer,
        dict(lr=0.1, ess=64.0, hess_init=0.5, beta2=0.9, weight_decay=0.01),
        rule=br.BayesRule(br.MonteCarlo(2), br.SquaredGradient(16.0), br.Additive(), br.Momentum(0.9)),
        floor=share,
    ),
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

    def losses(self, step: int) -> Tensor:
        """Of its one example."""
        return self.loss(step)[None]


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

    def loss(self, step: int, reduction: str = "mean") -> Tensor:
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        return cross_entropy(self(self.x[rows]), self.y[rows], reduction=reduction)

    def losses(self, step: int) -> Tensor:
        """Of every example of the minibatch."""
        return self.loss(step, "none")


PROBLEMS = {"quadratic": Quadratic, "network": Network}


# Running them


def closure_of(problem: Any, optimizer: Optimizer, step: int, scale: float = 1.0) -> Callable[..., Tensor]:
    """An ordinary closure, as any optimizer wants it; for some the loss of every example."""

    def closure(*part: int) -> Tensor:
        optimizer.zero_grad()
        if getattr(optimizer, "squares_examples", False):
            return problem.losses(step) * scale
        value = problem.loss(step) * scale
        value.backward()
        return value

    return closure


def train(problem: Any, optimizer: Optimizer, steps: int | Iterable[int], *, decay: float = 1.0, scale: float = 1.0) -> Tensor:
    """Take steps with an ordinary closure; where all weights were after each, shape (steps, weights)."""
    path = []
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.step(closure_of(problem, optimizer, step, scale))
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
