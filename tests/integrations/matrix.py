"""What every cell of the matrix shares: a cell, one problem, a spy on forwards and steps, and the loop that hosts are held against.

A host trains six steps, an epoch is three, and it saves after the third. A run that is killed dies in the fifth step's last
micro-batch, so that a step and a half must be done again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import bayesrule as br

STEPS, EPOCH, SAVED, KILLED = 6, 3, 3, 4
HYPER = dict(lr=0.1, ess=64.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=1e-3, seed=3)
CLIP = 0.5
ROWS = 4  # of a micro-batch


@dataclass(frozen=True)
class Cell:
    """A row of the matrix."""

    accumulation: int
    precision: str  # fp32; bf16: autocast; scaler: autocast to fp16 and a gradient scaler

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=self.precision == "scaler")


CELLS = [Cell(accumulation, precision) for accumulation in (1, 4) for precision in ("fp32", "bf16", "scaler")]


class Killed(RuntimeError):
    """The process is gone."""


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(model: nn.Module) -> Tensor:
    """A copy of all that is trained, in one row."""
    with torch.no_grad():
        return torch.cat([p.detach().reshape(-1) for p in trained(model)])


def kept(optimizer: Any) -> list[dict[str, Tensor]]:
    """Copies of the state of every parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]


@dataclass
class Trace:
    """A run: the mean before every step and after the last, what every step drew, and the state at the end."""

    means: list[Tensor] = field(default_factory=list)
    draws: list[Tensor] = field(default_factory=list)
    state: list[dict[str, Tensor]] = field(default_factory=list)


class Spy:
    """Sees the weights that every forward of a model sees, and the mean after every step.

    Args:
        model: What the host is given.
        begun: Steps that were done before.
        kill: What ends the process, in the last micro-batch of the step ``KILLED``; None for a run that ends well.
        accumulation: Micro-batches of a step.
    """

    def __init__(self, model: nn.Module, *, begun: int = 0, kill: Callable[[], Any] | None = None, accumulation: int = 1) -> None:
        self.model, self.begun, self.kill, self.accumulation = model, begun, kill, accumulation
        self.means: list[Tensor] = []
        self.training: list[tuple[int, Tensor]] = []  # step, weights
        self.looking: list[tuple[int, Tensor]] = []
        self.inputs: list[dict[str, Any]] = []
        self.optimizer: Any = None
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            register_optimizer_step_post_hook(self._after_step),
        ]

    @property
    def step(self) -> int:
        return self.begun + len(self.means) - 1

    def start(self) -> None:
        """The mean at which training begins, or goes on."""
        self.means.append(flat(self.model))

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            if self.means:
                self.looking.append((self.step, flat(model)))
            return
        self.training.append((self.step, flat(model)))
        self.inputs.append(kwargs)
        done = sum(step == self.step for step, _ in self.training)
        if self.kill is not None and self.step == KILLED and done == self.accumulation:
            self.kill()

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, br.IVON):
            self.optimizer = optimizer
            self.means.append(flat(self.model))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Every training forward was under the one draw of its step, every other at the mean."""
        assert len(self.means) == STEPS - self.begun + 1
        for step in range(self.begun, STEPS):
            seen = [weights for when, weights in self.training if when == step]
            assert len(seen) == self.accumulation
            assert all(torch.equal(weights, seen[0]) for weights in seen)
            assert (seen[0] != self.means[step - self.begun]).all()
        assert self.looking
        for step, weights in self.looking:
            assert torch.equal(weights, self.means[step - self.begun])

    def trace(self) -> Trace:
        draws = [next(w for when, w in self.training if when == step) for step in range(self.begun, STEPS)]
        return Trace(self.means, draws, kept(self.optimizer))


@contextlib.contextmanager
def watched(model: nn.Module, cell: Cell, resume: bool, kill: Callable[[], Any] | None) -> Iterator[Spy]:
    spy = Spy(model, begun=SAVED if resume else 0, kill=kill, accumulation=cell.accumulation)
    try:
        yield spy
    finally:
        spy.remove()


class Host:
    """A framework that trains."""

    name: str

    def model(self, seed: int = 0) -> nn.Module:
        """What is trained, from a seed."""
        raise NotImplementedError

    def fit(self, folder: Path, cell: Cell, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Spy:
        """Train, evaluate on the way and save; or go on from what was saved, with other weights than at the start."""
        raise NotImplementedError

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        """The weights that were saved after the third step, read from the files."""
        raise NotImplementedError

    def reference(self, cell: Cell, spy: Spy) -> Trace:
        """The same training by the context."""
        raise NotImplementedError


def same(found: Trace, wanted: Trace, begun: int = 0) -> None:
    """Bit by bit the same run, or what of it comes after some steps."""
    for ours, theirs in [(found.means, wanted.means[begun:]), (found.draws, wanted.draws[begun:])]:
        assert len(ours) == len(theirs)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b), f"step {begun + k}: {(a - b).abs().max():.3g} apart"
    for a, b in zip(found.state, wanted.state, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)


# A problem without a framework of its own


class Net(nn.Module):
    """Six numbers, three classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data(cell: Cell) -> tuple[Tensor, Tensor]:
    """The examples of an epoch, in order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EPOCH * cell.accumulation * ROWS, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def micro_batches(cell: Cell, step: int) -> list[tuple[Tensor, Tensor]]:
    """Those of a step."""
    pairs = list(zip(*(t.split(ROWS) for t in data(cell)), strict=True))
    first = step % EPOCH * cell.accumulation
    return pairs[first : first + cell.accumulation]


def context_loop(
    model: nn.Module,
    params: Any,
    cell: Cell,
    loss: Callable[[int], Sequence[Callable[[], Tensor]]],
    *,
    clip: float = CLIP,
    schedule: Callable[[Any], Any] | None = None,
) -> Trace:
    """The plain loop: ``loss(step)`` gives what computes the loss of each micro-batch, divided as it is to be added."""
    optimizer = br.IVON(params, **HYPER)
    scheduler = schedule(optimizer) if schedule else None
    scaler = cell.scaler()
    trace = Trace([flat(model)])
    model.train()
    for step in range(STEPS):
        with optimizer.sampled_params(train=True):
            trace.draws.append(flat(model))
            for one in loss(step):
                with cell.autocast():
                    value = one()
                scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        trace.means.append(flat(model))
    trace.state = kept(optimizer)
    return trace


def net_reference(model: nn.Module, cell: Cell) -> Trace:
    def losses(step: int) -> list[Callable[[], Tensor]]:
        return [lambda x=x, y=y: F.cross_entropy(model(x), y) / cell.accumulation for x, y in micro_batches(cell, step)]

    return context_loop(model, trained(model), cell, losses)
