"""When a draw opens, closes and is read.

A draw puts a sample of q where the mean was, so that whoever runs forward and backward, and however, differentiates there.

==========  ==============================================  =========================================================
state       parameters hold                                 what happens next
==========  ==============================================  =========================================================
(none)      the mean                                        ``begin``: the next sample is written into the parameters
open        a sample; the stash holds the mean              ``end``: the mean returns bit-exactly -> pending;
                                                            ``discard`` (exception): as if the draw had not been
pending     the mean; the stash holds the offset,           ``read``, or ``take`` at the step
            ``p.grad`` the gradient, not yet read
read        the mean; running means of gradient and         further draws; ``hand_over`` puts the mean gradient into
            curvature are kept                              ``p.grad``, ``settle`` takes it back as it then stands
==========  ==============================================  =========================================================

A single draw is read by the step itself, straight from ``p.grad``; only a second draw costs memory for running means,
and no further draw costs more. Reading clears ``p.grad``: nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..estimators.oracle import Seen
from ..noise import EVALUATE, TRAIN, CounterNoise, Noise
from ..rule import BayesRule, Gaussian, Look
from ..vector import Bucket


class Cell(NamedTuple):
    """A bucket of parameters of one group that have made the same number of steps: what one call of the rule works on."""

    group: dict[str, Any]
    rule: BayesRule
    params: list[Tensor]
    numbers: tuple[int, ...]
    bucket: Bucket
    dtype: torch.dtype
    step: int

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One flat tensor of what belongs to the cell's parameters, in the dtype of their state."""
        return self.bucket.gather(tensors, self.dtype)

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a flat tensor back, in place."""
        self.bucket.scatter(flat, tensors)


class Host(Protocol):
    """What the draws need of their optimizer."""

    def trainable(self) -> list[Tensor]: ...
    def cells(self, params: Sequence[Tensor]) -> Iterator[Cell]: ...
    def belief(self, cell: Cell) -> tuple[Gaussian, Gaussian]: ...
    def like_state(self, param: Tensor) -> Tensor: ...


@dataclass
class Injected:
    """Unit normals from the user's function of a parameter, called once per parameter and draw, in parameter order."""

    function: Callable[[Tensor], Tensor]
    params: list[Tensor] = field(default_factory=list)
    held: tuple[int, dict[Tensor, Tensor]] | None = None

    def draw(self, number: int) -> dict[Tensor, Tensor]:
        if self.held is None or self.held[0] != number:
            self.held = (number, {p: self.function(p) for p in self.params})
            for p, values in self.held[1].items():
                if values.shape != p.shape:
                    raise ValueError(f"noise returned shape {tuple(values.shape)} for a parameter of {tuple(p.shape)}")
        return self.held[1]


@dataclass(frozen=True)
class InjectedNoise(Noise):
    """The part of injected noise that belongs to one cell."""

    source: Injected
    cell: Cell
    number: int = 0

    def at(self, *, step: int | None = None, draw: int | None = None) -> InjectedNoise:
        return replace(self, number=self.number if draw is None else draw)

    def normal(self, like: Any) -> Tensor:
        values = self.source.draw(self.number)
        return self.cell.gather([values[p] for p in self.cell.params])

    uniform = normal


@dataclass
class Written:
    """A sample written into the parameters: the mean while it is open, the offset from the mean once it is closed."""

    stash: dict[Tensor, Tensor] = field(default_factory=dict)
    params: dict[Tensor, None] = field(default_factory=dict)

    def of(self, cell: Cell) -> list[Tensor]:
        return [self.stash[p] for p in cell.params]


class Draws:
    """The draws of one optimizer step.

    Attributes:
        dropped: Draws thrown away for a gradient that was not finite, since the optimizer was made.
        begun: Training draws closed in this step.
    """

    def __init__(self, host: Host, injected: Injected | None) -> None:
        self.host, self.injected = host, injected
        self.dropped = 0
        self._looked = 0  # draws without training, which number their noise
        self._open: Written | None = None
        self._joinable = False
        self._train = Written()
        self._gradient: dict[Tensor, Tensor] = {}
        self._curvature: dict[Tensor, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Start a new step: no draws yet."""
        self.begun = 0
        self._pending = False
        self._weight, self._total = 1.0, 0.0
        self._averaged: dict[Tensor, None] = {}  # parameters that have running means
        self._curved: dict[Tensor, None] = {}  # those whose curvature was seen
        self._handed: dict[Tensor, Tensor] = {}  # largest element of the mean gradients that stand in p.grad
        self._train.params.clear()
        if self.injected:
            self.injected.held = None

    # Opening and closing

    def begin(self, *, train: bool, weight: float = 1.0, joinable: bool = False) -> bool:
        """Write a sample into the parameters; False if the caller joins a draw that is open already."""
        if self._open is not None:
            if train and self._joinable:
                return False
            raise RuntimeError("a draw is open already: leave its sampled_params() context before another one opens")
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of a draw must be a number in (0, inf), got {weight!r}")
        if train:
            self.read()
            self.settle()
            self._weight, self._joinable = float(weight), joinable
            self._write(self._train, TRAIN, self.begun)
        else:
            self._joinable = False
            self._write(Written(), EVALUATE, self._looked)
            self._looked += 1
        return True

    def end(self) -> None:
        """Bring the mean back; what backpropagation left in ``p.grad`` waits to be read."""
        train = self._open is self._train
        self._restore(keep_offset=train)
        if not train:
            return
        self.begun += 1
        self._pending = True
        if self._averaged:
            self.read()
            self._hand_over()

    def discard(self) -> None:
        """Bring the mean back and forget the draw with its gradient."""
        if self._open is self._train:
            _clear(self.host.trainable())
        self._restore()

    def close(self) -> None:
        """End a draw if one is open."""
        if self._open is not None:
            self.end()

    @property
    def is_open(self) -> bool:
        return self._open is not None

    @torch.no_grad()
    def _write(self, written: Written, stream: int, draw: int) -> None:
        params = self.host.trainable()
        if self.injected:
            self.injected.params = params
        written.params.clear()
        self._open = written
        for cell in self.host.cells(params):
            q, _ = self.host.belief(cell)
            offset = cell.rule.expectation.offset(q, self._noise(cell, stream), draw)
            if offset is None:
                continue
            for p in cell.params:
                written.params[p] = None
                written.stash.setdefault(p, self.host.like_state(p))
            cell.scatter(q.mean, written.of(cell))
            cell.scatter(q.mean + offset, cell.params)

    @torch.no_grad()
    def _restore(self, keep_offset: bool = False) -> None:
        written, self._open = self._open, None
        if written is None:
            return
        for cell in self.host.cells(list(written.params)):
            mean = cell.gather(written.of(cell))
            if keep_offset:
                cell.scatter(cell.gather(cell.params) - mean, written.of(cell))
            cell.scatter(mean, cell.params)

    def _noise(self, cell: Cell, stream: int) -> Noise:
        if self.injected:
            return InjectedNoise(self.injected, cell)
        return CounterNoise(cell.group["seed"], stream, cell.step).on(cell.bucket, cell.numbers)

    # Reading

    @torch.no_grad()
    def read(self) -> None:
        """Take the gradient of a closed draw into the running means and clear ``p.grad``."""
        if not self._pending:
            return
        self._pending = False
        fresh = self._with_gradient()
        if fresh and self._finite([p.grad for p in fresh]):
            self._average(fresh)
        _clear(fresh)

    def _average(self, fresh: list[Tensor]) -> None:
        self._total += self._weight
        for p in fresh:
            if p not in self._averaged:
                self._averaged[p] = None
                for means in (self._gradient, self._curvature):
                    means.setdefault(p, self.host.like_state(p)).zero_()
        for cell in self.host.cells(list(self._averaged)):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in cell.params]
            look = self._look(cell, *self.host.belief(cell), cell.gather(gradients))
            means = [self._gradient[p] for p in cell.params], [self._curvature[p] for p in cell.params]
            mean = Look(None, *(cell.gather(tensors) for tensors in means)).lerp(look, self._weight / self._total)
            for flat, tensors in zip(mean[1:], means, strict=True):
                cell.scatter(flat, tensors)
            if look.curvature is not None:
                self._curved.update(dict.fromkeys(cell.params))

    def _hand_over(self) -> None:
        """Put the mean gradient into ``p.grad``, so that unscaling and clipping act on the mean."""
        for p in self._averaged:
            self._handed[p] = torch.linalg.vector_norm(self._gradient[p], float("inf"))
            p.grad = self._gradient[p].to(p.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Take the mean gradient back as it now stands; the curvature follows whatever rescaled it."""
        degree = {p: cell.rule.curvature.degree for cell in self.host.cells(list(self._handed)) for p in cell.params}
        for p, before in self._handed.items():
            if p.grad is None:
                continue
            after = torch.linalg.vector_norm(p.grad, float("inf")).to(before.dtype)
            self._gradient[p].copy_(p.grad)
            self._curvature[p].mul_(torch.where(before > 0, after / before, 1.0) ** degree[p])
            p.grad = None
        self._handed = {}

    # The step

    @torch.no_grad()
    def take(self) -> tuple[list[Tensor], Callable[[Cell, Gaussian, Gaussian], Look]] | None:
        """The parameters to move, and the look that moves a cell of them; None if every draw was dropped."""
        if self._averaged:
            self.read()
            self.settle()
            kept = list(self._averaged)
            return (kept, self._mean) if self._finite([self._gradient[p] for p in kept]) else None
        fresh = self._with_gradient()
        if not self.begun:
            return fresh, self._at_hand
        if not self._pending or (fresh and not self._finite([p.grad for p in fresh])):
            _clear(fresh)
            return None
        return fresh, self._at_hand

    def _mean(self, cell: Cell, q: Gaussian, prior: Gaussian) -> Look:
        """The mean over the draws that were read."""
        gradient = cell.gather([self._gradient[p] for p in cell.params])
        curved = all(p in self._curved for p in cell.params)
        return Look(None, gradient, cell.gather([self._curvature[p] for p in cell.params]) if curved else None)

    def _at_hand(self, cell: Cell, q: Gaussian, prior: Gaussian) -> Look:
        """The gradient that stands in p.grad; without a draw it says nothing about a curvature that needs one."""
        gradient = cell.gather([_dense(p) for p in cell.params])
        if cell.rule.expectation.draws and not self.begun:
            return Look(None, gradient, None)
        return self._look(cell, q, prior, gradient)

    def _look(self, cell: Cell, q: Gaussian, prior: Gaussian, gradient: Tensor) -> Look:
        drawn = all(p in self._train.params for p in cell.params)
        offset = cell.gather(self._train.of(cell)) if drawn else None
        return Look(None, gradient, cell.rule.curvature(q, prior, offset, Seen(gradient)))

    def _with_gradient(self) -> list[Tensor]:
        return [p for p in self.host.trainable() if p.grad is not None]

    def _finite(self, gradients: Sequence[Tensor | None]) -> bool:
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None], float("inf"))
        finite = bool(norm.isfinite())
        self.dropped += not finite
        return finite


def _dense(param: Tensor) -> Tensor:
    gradient = param.grad
    assert gradient is not None
    return gradient


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None
