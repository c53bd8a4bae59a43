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

With little memory there is no stash: the offset is made again from its noise wherever it is wanted, and the mean that
returns is the sample less the offset, rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from ..family import Gaussian
from ..noise import EVALUATE, TRAIN
from ..plots import Plot
from .cells import Cell, Layout
from .execution import THEN, Execution, Flats
from .injection import Injected, InjectedNoise

STASH = "offset"


class Host(Protocol):
    """What the draws need of their optimizer."""

    execution: Execution
    layout: Layout
    frugal: bool

    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Gaussian, Gaussian]: ...


@dataclass
class Written:
    """A sample written into the parameters of some cells.

    Its block holds the mean while the sample is open, and the offset from the mean once it is closed. Without a block, the
    offset is made again from the numbers that made it.
    """

    block: str | None
    cells: list[tuple[Cell, Mapping[str, Any]]] = field(default_factory=list)

    def of(self, cell: Cell) -> tuple[Cell, Mapping[str, Any]] | None:
        """The sample of a cell as it was made, and from what numbers; None if there is none."""
        return next(((c, numbers) for c, numbers in self.cells if c.plot is cell.plot and c.step == cell.step), None)


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
        self._train = Written(STASH)
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
        self._read: dict[Plot, Tensor] = {}  # gradients that lie flat at the moment
        self._copied: Plot | None = None  # whose gradient stands in scratch
        if self.injected:
            self.injected.held = None

    # Opening and closing

    def begin(self, *, train: bool, weight: float = 1.0, joinable: bool = False) -> bool:
        """Write a sample into the parameters; False if the caller joins a draw that is open already."""
        if self._open is not None:
            if train and self._joinable:
                return False
            raise RuntimeError("a draw is open already: leave its sampled_params() context before another one opens")
        if not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of a draw must be a number in (0, inf), got {weight!r}")
        if train:
            self.renew()
            self._weight = float(weight)
        try:
            if train:
                self._train.block = None if self.host.frugal else STASH
                self._write(self._train, TRAIN, self.begun)
            else:
                # the stash is free unless a closed draw still waits in it
                self._write(Written("looked" if self._pending or self.host.frugal else STASH), EVALUATE, self._looked)
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
            _clear(self.host.layout.trainable())
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, written: Written, stream: int, draw: int) -> None:
        params = self.host.layout.trainable()
        if self.injected:
            self.injected.params = params
        written.cells = []
        self._open = written
        for cell in self.host.layout.cells(params):
            if not cell.draws:
                continue
            plot = cell.plot
            numbers = {**cell.inputs, "stream": stream, "draw": draw, "first": plot.where.first}
            flats: Flats = {"mean": plot.mean(), **cell.kept}
            flats.pop("memory", None)
            if written.block:
                flats["offset"] = plot.flat(written.block)
            version = plot.params[0]._version
            written.cells.append((cell, numbers))
            try:
                if self.injected:
                    self._write_injected(self.injected, cell, flats, stream, draw)
                else:
                    self.host.execution.run("draw", cell, {**flats, "pairs": plot.where.numbers}, numbers)
            except BaseException:
                if plot.params[0]._version == version:  # nothing was written, so there is nothing to restore
                    written.cells.pop()
                raise
            plot.put(flats["mean"], cell.only)
        torch.clear_autocast_cache()

    def _write_injected(self, injected: Injected, cell: Cell, flats: Flats, stream: int, draw: int) -> None:
        q, _ = self.host.belief(cell.group, flats)
        cell.plot.keep(flats["mean"], flats["offset"], cell.only)
        offset = cell.rule.expectation.offset(q, InjectedNoise(injected, cell.plot, stream), draw)
        flats["mean"].add_(offset)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self, keep_offset: bool = False) -> None:
        written, self._open = self._open, None
        if written is None:
            return
        for cell, numbers in written.cells:
            plot = cell.plot
            if written.block and not keep_offset:
                plot.put(plot.flat(written.block), cell.only, written.block)
                continue
            flats = {"mean": plot.mean()}
            if written.block:
                self.host.execution.run("close", cell, {**flats, "offset": plot.flat(written.block)}, {})
            else:
                kept = {name: block for name, block in cell.kept.items() if name != "memory"}
                self.host.execution.run("close", cell, {**flats, **kept, "pairs": plot.where.numbers}, numbers)
            plot.put(flats["mean"], cell.only)
        torch.clear_autocast_cache()
        if written is not self._train:
            for cell, _ in written.cells:
                if written.block != STASH:
                    cell.plot.drop(written.block or "")

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
        elif self._finite(fresh):
            self._average(fresh)
        _clear(fresh)

    def _average(self, fresh: list[Tensor]) -> None:
        """A running mean over draws; a parameter without a gradient in one of them had the gradient zero there."""
        self._averaged.update(dict.fromkeys(fresh))
        self._total += self._weight
        for cell in self.host.layout.cells(list(self._averaged)):
            gradient, curvature = self._means(cell.plot)
            flats, numbers, drawn = self.at_hand(cell)
            flats = {**flats, "mean_gradient": gradient, "mean_curvature": curvature}
            numbers = {**numbers, "weight": self._weight / self._total}
            if "mean_curvature" in self.host.execution.run("average", cell, flats, numbers, drawn):
                self._curved.add(id(cell.plot))

    def _means(self, plot: Plot) -> tuple[Tensor, Tensor]:
        """The blocks of a plot's running means, zero when they are first asked for in a step."""
        means = plot.flat("mean_gradient"), plot.flat("mean_curvature")
        if id(plot) not in self._begun_means:
            self._begun_means.add(id(plot))
            for mean in means:
                mean.zero_()
        return means

    def _hand_over(self) -> None:
        """Put the mean gradient into ``p.grad``, so that unscaling and clipping act on the mean."""
        self._handed = {p: torch.empty_like(p) for p in self._averaged}
        for cell in self.host.layout.cells(list(self._handed)):
            gradients = [self._handed.get(p, p) for p in cell.plot.params]
            cell.plot.write(self._means(cell.plot)[0], gradients, cell.only, "mean_gradient")
        for p, gradient in self._handed.items():
            p.grad = gradient

    @torch.no_grad()
    def settle(self) -> bool:
        """Take the mean gradient back as it now stands; the curvature follows, element by element, whatever rescaled it.

        Where the mean is zero the curvature follows the common factor. Returns whether all is finite.
        """
        if not self._handed:
            return True
        handed, self._handed, self._read = self._handed, {}, {}
        for p in [p for p in handed if p.grad is None]:  # held back
            self._averaged.pop(p)
        back = [p for p in handed if p.grad is not None]
        changes = []
        for cell in self.host.layout.cells(back):
            before = self._means(cell.plot)[0]
            before = before.to(cell.plot.params[0].dtype).to(cell.plot.dtype)  # as it was handed over
            gradients = _gradients(cell.plot.params)
            if not cell.plot.holds(before, gradients):
                changes.append((cell, before, cell.plot.read(gradients, "gradient").clone()))
        size = sum(cell.plot.dot(before, before) for cell, before, _ in changes)
        common = sum(cell.plot.dot(before, after) for cell, before, after in changes) / size if size else 1.0
        for cell, before, after in changes:
            gradient, curvature = self._means(cell.plot)
            factor = torch.where(before == 0, common, after / before)
            cell.plot.keep(after, gradient, cell.only)
            cell.plot.keep(curvature * factor**cell.rule.curvature.degree, curvature, cell.only)
        finite = not back or self._finite(back)
        _clear(back)
        return finite

    def renew(self) -> None:
        """Before more draws: take everything into the running means; forget what was made not finite."""
        self.read()
        if not self.settle():
            self.forget()

    # The step

    @torch.no_grad()
    def take(self) -> tuple[list[Tensor], Callable[[Cell], Flats]] | None:
        """The parameters to move, and what moves a cell of them and returns its flats; None if every draw was dropped."""
        if self._averaged:
            self.read()
            finite = self.settle()
            return (list(self._averaged), self._on_average) if finite else None
        fresh = self._with_gradient()
        if self.begun and (not self._pending or (fresh and not self._finite(fresh))):
            _clear(fresh)
            return None
        return fresh, self._by_gradient

    def _on_average(self, cell: Cell) -> Flats:
        """Move by the mean over the draws that were read."""
        gradient, curvature = self._means(cell.plot)
        seen = {"mean_curvature": curvature} if id(cell.plot) in self._curved else {}
        flats = {"mean": cell.plot.mean(), **cell.kept, "mean_gradient": gradient, **seen}
        self.host.execution.run("move_on_average", cell, flats, cell.inputs)
        return flats

    def _by_gradient(self, cell: Cell) -> Flats:
        """Move by the gradient that stands in ``p.grad``; without a draw it tells no curvature to a rule that draws."""
        flats, numbers, drawn = self.at_hand(cell)
        kind = "move_blindly" if cell.rule.expectation.draws and not self.begun else "move"
        self.host.execution.run(kind, cell, flats, numbers, drawn)
        return flats

    def at_hand(self, cell: Cell) -> tuple[Flats, Mapping[str, Any], Cell | None]:
        """What makes a look of the gradient in ``p.grad``: flats, numbers, and the cell as it was drawn if that is made again."""
        plot, numbers = cell.plot, cell.inputs
        flats = {"mean": plot.mean(), **cell.kept, "gradient": self._gradient(plot)}
        made = self._train.of(cell)
        if made is None:
            return flats, numbers, None
        if self._train.block:
            return {**flats, "offset": plot.flat(self._train.block)}, numbers, None
        then = {THEN + name: n for name, n in made[1].items()}
        return {**flats, "pairs": plot.where.numbers}, {**numbers, **then}, made[0]

    def _with_gradient(self) -> list[Tensor]:
        given = [(p, p.grad) for p in self.host.layout.trainable()]
        fresh = [p for p, gradient in given if gradient is not None]
        if any(gradient is not None and gradient.layout != torch.strided for _, gradient in given):
            raise RuntimeError("sparse gradients are not supported; make the embedding with sparse=False")
        return fresh

    def _finite(self, params: Sequence[Tensor]) -> bool:
        """Whether all gradients are finite: one pass over each, and a second only where the sum of squares is not."""
        plots = {id(cell.plot): cell.plot for cell in self.host.layout.cells(params)}.values()
        self._read, sums = {}, []
        for plot in plots:
            flat = self._gradient(plot)
            sums.append(flat.dot(flat))
            self._read[plot] = flat
        finite = math.isfinite(sum(sums)) or all(bool(p.grad.isfinite().all()) for p in params if p.grad is not None)
        self.dropped += not finite
        return finite

    def _gradient(self, plot: Plot) -> Tensor:
        """The gradient in ``p.grad``, flat; what was read to see whether it is finite need not be read again."""
        if plot in self._read:
            return self._read.pop(plot)
        gradients = _gradients(plot.params)
        if not plot.sees(gradients):  # the copy takes the place of another's
            self._read = {other: flat for other, flat in self._read.items() if other is not self._copied}
            self._copied = plot
        return plot.read(gradients, "gradient")


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in params]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None
