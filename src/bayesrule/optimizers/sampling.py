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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..estimators.oracle import Seen
from ..noise import EVALUATE, TRAIN, CounterNoise, Noise
from ..rule import Gaussian, Look
from .cells import Cell, Plot


class Host(Protocol):
    """What the draws need of their optimizer."""

    def trainable(self) -> list[Tensor]: ...
    def cells(self, params: Sequence[Tensor]) -> list[Cell]: ...
    def belief(self, cell: Cell) -> tuple[Gaussian, Gaussian]: ...


@dataclass
class Injected:
    """Unit normals from the user's function of a parameter, called once per parameter and draw, in parameter order."""

    function: Callable[[Tensor], Tensor]
    params: list[Tensor] = field(default_factory=list)
    held: tuple[tuple[int, int], dict[Tensor, Tensor]] | None = None

    def draw(self, stream: int, number: int) -> dict[Tensor, Tensor]:
        """The normals of a draw, parameter -> tensor."""
        if self.held is None or self.held[0] != (stream, number):
            values = {p: self.function(p) for p in self.params}
            for p, value in values.items():
                if value.shape != p.shape:
                    raise ValueError(f"noise returned shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}")
            self.held = ((stream, number), values)
        return self.held[1]


@dataclass(frozen=True)
class InjectedNoise(Noise):
    """The part of injected noise that belongs to one cell."""

    source: Injected
    cell: Cell
    stream: int
    number: int = 0

    def at(self, *, step: int | None = None, draw: int | None = None) -> InjectedNoise:
        return replace(self, number=self.number if draw is None else draw)

    def normal(self, like: Any) -> Tensor:
        values = self.source.draw(self.stream, self.number)
        return self.cell.gather([values[p] for p in self.cell.plot.params])

    uniform = normal


@dataclass
class Written:
    """A sample written into the parameters of some cells.

    Its block holds the mean while the sample is open, and the offset from the mean once it is closed.
    """

    block: str
    cells: list[Cell] = field(default_factory=list)


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
        self._train = Written("offset")
        self.forget()

    def forget(self) -> None:
        """Start a new step: no draws yet."""
        self.begun = 0
        self._pending = False
        self._weight, self._total = 1.0, 0.0
        self._averaged: dict[Tensor, None] = {}  # parameters that have running means
        self._begun_means: set[int] = set()  # plots whose running means belong to this step
        self._curved: set[int] = set()  # those whose curvature was seen
        self._handed: dict[Tensor, Tensor] = {}  # mean gradients that stand in p.grad
        self._train.cells = []
        if self.injected:
            self.injected.held = None

    # Opening and closing

    def begin(self, *, train: bool, weight: float = 1.0, joinable: bool = False) -> bool:
        """Write a sample into the parameters; False if the caller joins a draw that is open already."""
        if self._open is not None:
            if train and self._joinable:
                return False
            raise RuntimeError("a draw is open already: leave its sampled_params() context before another one opens")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of a draw must be a number in (0, inf), got {weight!r}")
        if train:
            self.renew()
            self._weight = float(weight)
        try:
            if train:
                self._write(self._train, TRAIN, self.begun)
            else:
                self._write(Written("looked"), EVALUATE, self._looked)
        except BaseException:
            self.discard()
            raise
        self._joinable = joinable
        self._looked += not train
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
        train = self._open is self._train
        self._restore()
        if train:
            _clear(self.host.trainable())
            if self._averaged:
                self._hand_over()

    def close(self) -> None:
        """End a draw if one is open."""
        if self._open is not None:
            self.end()

    @property
    def is_training(self) -> bool:
        """Whether the parameters hold a sample that is learned from."""
        return self._open is self._train

    @torch.no_grad()
    def _write(self, written: Written, stream: int, draw: int) -> None:
        params = self.host.trainable()
        if self.injected:
            self.injected.params = params
        written.cells = []
        self._open = written
        for cell in self.host.cells(params):
            q, _ = self.host.belief(cell)
            offset = cell.rule.expectation.offset(q, self._noise(cell, stream), draw)
            if offset is not None:
                cell.keep(q.mean, cell.plot.flat(written.block))
                written.cells.append(cell)  # from here on there is something to restore
                cell.scatter(q.mean + offset, cell.plot.params)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _restore(self, keep_offset: bool = False) -> None:
        written, self._open = self._open, None
        if written is None:
            return
        for cell in written.cells:
            block = cell.plot.flat(written.block)
            offset = cell.gather(cell.plot.params) - block if keep_offset else None
            cell.scatter(block, cell.plot.params)
            if offset is not None:
                cell.keep(offset, block)
        torch.clear_autocast_cache()
        if written is not self._train:
            for cell in written.cells:
                cell.plot.flats.pop(written.block, None)

    def _noise(self, cell: Cell, stream: int) -> Noise:
        if self.injected:
            return InjectedNoise(self.injected, cell, stream)
        return CounterNoise(cell.group.get("seed", 0), stream, cell.step).on(cell.plot.bucket, cell.plot.starts)

    # Reading

    @torch.no_grad()
    def read(self) -> None:
        """Take the gradient of a closed draw into the running means and clear ``p.grad``."""
        if not self._pending:
            return
        self._pending = False
        fresh = self._with_gradient()
        if not fresh:  # nobody ran backward: no draw
            self.begun -= 1
            self._train.cells = []
        elif self._finite([p.grad for p in fresh]):
            self._average(fresh)
        _clear(fresh)

    def _average(self, fresh: list[Tensor]) -> None:
        """A running mean over draws; a parameter without a gradient in one of them had the gradient zero there."""
        self._averaged.update(dict.fromkeys(fresh))
        self._total += self._weight
        for cell in {id(cell.plot): cell for cell in self.host.cells(list(self._averaged))}.values():
            plot, (gradient, curvature) = cell.plot, self._means(cell.plot)
            look = self._at_hand(cell, *self.host.belief(cell))
            mean = Look(None, gradient, curvature).lerp(look, self._weight / self._total)
            gradient.copy_(mean.gradient)
            if look.curvature is not None and mean.curvature is not None:
                curvature.copy_(mean.curvature)
                self._curved.add(id(plot))

    def _means(self, plot: Plot) -> tuple[Tensor, Tensor]:
        """The blocks of a plot's running means, zero when they are first asked for in a step."""
        means = plot.flat("gradient"), plot.flat("curvature")
        if id(plot) not in self._begun_means:
            self._begun_means.add(id(plot))
            for mean in means:
                mean.zero_()
        return means

    def _hand_over(self) -> None:
        """Put the mean gradient into ``p.grad``, so that unscaling and clipping act on the mean."""
        self._handed = {p: torch.empty_like(p) for p in self._averaged}
        for cell in self.host.cells(list(self._handed)):
            cell.scatter(self._means(cell.plot)[0], [self._handed.get(p, p) for p in cell.plot.params])
        for p, gradient in self._handed.items():
            p.grad = gradient

    @torch.no_grad()
    def settle(self) -> bool:
        """Take the mean gradient back as it now stands; the curvature follows, element by element, whatever rescaled it.

        Where the mean is zero the curvature follows the common factor. Returns whether all is finite.
        """
        handed, self._handed = self._handed, {}
        for p in [p for p in handed if p.grad is None]:  # held back
            self._averaged.pop(p)
        back = [p for p in handed if p.grad is not None]
        changes = []
        for cell in self.host.cells(back):
            before = self._means(cell.plot)[0].to(cell.plot.params[0].dtype).to(cell.plot.dtype)  # as it was handed over
            changes.append((cell, before, cell.gather(_gradients(cell.plot.params))))
        size = sum(float((before * before).sum()) for _, before, _ in changes)
        common = sum(float((before * after).sum()) for _, before, after in changes) / size if size else 1.0
        for cell, before, after in changes:
            gradient, curvature = self._means(cell.plot)
            factor = torch.where(before == 0, common, after / before)
            cell.keep(after, gradient)
            cell.keep(curvature * factor**cell.rule.curvature.degree, curvature)
        finite = not back or self._finite([p.grad for p in back])
        _clear(back)
        return finite

    def renew(self) -> None:
        """Before more draws: take everything into the running means; forget what was made not finite."""
        self.read()
        if not self.settle():
            self.forget()

    # The step

    @torch.no_grad()
    def take(self) -> tuple[list[Tensor], Callable[[Cell, Gaussian, Gaussian], Look]] | None:
        """The parameters to move, and the look that moves a cell of them; None if every draw was dropped."""
        if self._averaged:
            self.read()
            finite = self.settle()
            return (list(self._averaged), self._mean) if finite else None
        fresh = self._with_gradient()
        if not self.begun:
            return fresh, self._at_hand
        if not self._pending or (fresh and not self._finite([p.grad for p in fresh])):
            _clear(fresh)
            return None
        return fresh, self._at_hand

    def _mean(self, cell: Cell, q: Gaussian, prior: Gaussian) -> Look:
        """The mean over the draws that were read."""
        gradient, curvature = self._means(cell.plot)
        return Look(None, gradient, curvature if id(cell.plot) in self._curved else None)

    def _at_hand(self, cell: Cell, q: Gaussian, prior: Gaussian) -> Look:
        """The gradient that stands in ``p.grad``; without a draw it tells no curvature to a rule that draws."""
        gradient = cell.gather(_gradients(cell.plot.params))
        if cell.rule.expectation.draws and not self.begun:
            return Look(None, gradient, None)
        drawn = any(cell.plot is other.plot for other in self._train.cells)
        offset = cell.plot.flats["offset"] if drawn else None
        return Look(None, gradient, cell.rule.curvature(q, prior, offset, Seen(gradient)))

    def _with_gradient(self) -> list[Tensor]:
        fresh = [p for p in self.host.trainable() if p.grad is not None]
        if any(p.grad is not None and p.grad.layout != torch.strided for p in fresh):
            raise RuntimeError("sparse gradients are not supported; make the embedding with sparse=False")
        return fresh

    def _finite(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether all are finite: one pass over each, and a second only where a sum is not."""
        given = [g for g in gradients if g is not None]
        finite = all(math.isfinite(g.sum()) or bool(g.isfinite().all()) for g in given)
        self.dropped += not finite
        return finite


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None
