"""When a draw opens and closes.

A draw puts a sample of q where the mean was, so that whoever runs forward and backward, and however, differentiates there.

==========  ==============================================  =========================================================
state       parameters hold                                 what happens next
==========  ==============================================  =========================================================
(none)      the mean                                        ``begin``: the next sample is written into the parameters
open        a sample; the stash holds the mean              ``end``: the mean returns bit-exactly -> waiting;
                                                            ``discard`` (exception): as if the draw had not been
waiting     the mean; the stash holds the offset,           read by the step, before the next draw, or by
            ``p.grad`` the gradient, not yet read           ``zero_grad``; an automatic draw may go on instead
==========  ==============================================  =========================================================

There is one automatic draw in a step (``opt.train()``, ``opt.attach(model)``): closed before its step, for an evaluation or a
checkpoint between two micro-batches, it is written again, bit by bit, by whatever would open it.

With little memory there is no stash: the offset is made again from its noise wherever it is wanted, and the mean that
returns is the sample less the offset, rounded.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import torch

from ..family import Gaussian
from ..noise import DITHER, EVALUATE, TRAIN, CounterNoise
from ..shards import gather_anew, here
from .cells import Cell, Layout
from .examples import Examples
from .execution import Execution, Flats
from .injection import Injected, InjectedNoise
from .looking import FIRST, Looks, Written
from .reminders import Reminders
from .watching import Strangers, Watch
from .workers import Workers

STASH = "offset"
LOOKS_TWICE = "pass step() a function that clears the gradients, runs forward and backward and returns the loss"

OPEN: weakref.WeakSet[Draws] = weakref.WeakSet()
"""All that have a draw open, of all optimizers."""


class Host(Protocol):
    """What the draws need of their optimizer."""

    execution: Execution
    layout: Layout
    workers: Workers
    reminders: Reminders
    examples: Examples
    frugal: bool

    @property
    def climbs(self) -> bool: ...
    def looking(self, cell: Cell) -> Cell: ...
    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Gaussian, Gaussian]: ...


class Draws:
    """The draws of one optimizer step."""

    def __init__(self, host: Host, injected: Injected | None) -> None:
        self.host, self.injected = host, injected
        self._looked = 0  # draws without training, which number their noise
        self._open: Written | None = None
        self._joinable = self._automatic = False
        self._weight = 1.0
        self._strangers = Strangers()
        self._watch = Watch()
        self._left: list[tuple[Cell, Mapping[str, Any]]] = []  # cells of the open draw that hold a sample
        self._will: weakref.finalize[Any, Any] | None = None
        self._train = Written(STASH)
        self.looks = Looks(host, self._train)

    def forget(self) -> None:
        """Start a new step: no draws yet."""
        self.looks.forget()
        self.host.examples.forget()
        self._automatic = False
        if self.injected:
            self.injected.held = None

    # Opening and closing

    @property
    def is_open(self) -> bool:
        """Whether the parameters hold a sample."""
        return self._open is not None

    @property
    def is_training(self) -> bool:
        """Whether the parameters hold a sample that is learned from."""
        return self._open is self._train

    @property
    def is_automatic(self) -> bool:
        """Whether an automatic draw is open."""
        return self.is_training and self._automatic

    @property
    def goes_on(self) -> bool:
        """Whether an automatic draw is closed, but only for a while."""
        return not self.is_open and self._automatic and self.looks.waiting

    def begin(self, *, train: bool, weight: float = 1.0, joinable: bool = False, automatic: bool = False) -> bool:
        """Write a sample into the parameters; False if the caller joins a draw that is open already.

        Args:
            train: Whether it is learned from.
            weight: Among the draws of the step.
            joinable: Whether others may join it.
            automatic: Whether it lasts until the step: it then may be joined, be closed for a while, and go on.
        """
        if not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of a draw must be a number in (0, inf), got {weight!r}")
        if train and not joinable and self.host.climbs:
            raise TypeError(f"this optimizer looks twice in a step, which no single draw can do: {LOOKS_TWICE}")
        if self.is_automatic and not train:
            self.pause()
        if self._open is not None:
            if not (train and self._joinable):
                raise RuntimeError("a draw is open already: leave its sampled_params() context before another one opens")
            if weight != 1.0:
                raise RuntimeError(f"a draw of weight {weight} cannot join the draw that is open; call opt.eval() before it")
            return False
        self.be_alone()
        if train:
            self.check()
        if not train:
            # the stash is free unless a closed draw still waits in it
            self._write(Written("looked" if self.looks.waiting or self.host.frugal else STASH), EVALUATE, self._looked)
            self._looked += 1
        elif automatic and self.goes_on:
            self.looks.reopen()
            self._write(self._train, TRAIN, self.looks.begun, again=True)
            self.host.workers.listen(fresh=False)
            self.host.examples.open(fresh=False)
        else:
            if self.looks.waiting and self.looks.is_empty and not self._automatic:
                self.host.reminders.of_backward()
            self.renew()
            self._strangers = Strangers(self.host.layout.trainable())
            self._weight, self._automatic = float(weight), automatic
            self._train.block = None if self.host.frugal else STASH
            self._write(self._train, TRAIN, self.looks.begun)
            self.host.workers.listen(fresh=True)
            self.host.examples.open()
        self._joinable = joinable or automatic
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def climb(self) -> None:
        """Go from the gradient that stands in ``p.grad`` to where it leads; cells that climb keep it as their first look."""
        written, looks = self._open, self.looks
        if written is not self._train:
            raise RuntimeError(
                "the draw was closed within the closure, by opt.eval(), state_dict() or posterior(); call them after step()"
            )
        numbers = {"size": looks.first_look()}
        drawn = {id(cell.plot) for cell, _ in written.cells}
        for cell in self.host.layout.cells(self.host.layout.trainable()):
            if cell.climbs:
                stash = cell.plot.flat(STASH)
                if id(cell.plot) not in drawn:
                    cell.plot.keep(cell.plot.mean(), stash, cell.only)
                    written.cells.append((cell, {}))
                    self._left.append((cell, {}))
                flats = {"mean": cell.plot.mean(), **cell.kept, "offset": stash, "first": cell.plot.flat(FIRST)}
                flats.pop("memory", None)
                self.host.execution.run("climb", cell, flats, {**cell.inputs, **numbers})
                cell.plot.put(flats["mean"], cell.only)
        self.written_to()

    def end(self) -> None:
        """Bring the mean back; what backpropagation left in ``p.grad`` waits to be read.

        Raises:
            RuntimeError: A gradient stands there that is older than the draw; the draw is lost.
        """
        train = self.is_training
        self._restore(keep_offset=train)
        self.host.examples.close()
        if train and self._strangers.are_in_the_way():
            self.looks.lose()
            raise RuntimeError(
                "gradients from before this draw stood in p.grad and were added to: they belong to other weights, and are cleared; "
                "open the draw before the first backward() of the step (in Lightning by DrawCallback), or call zero_grad() before "
                "backward()"
            )
        if train:
            self.looks.add(self._weight)

    def discard(self) -> None:
        """Bring the mean back and forget the draw with its gradient."""
        train = self.is_training
        self._restore()
        self.host.examples.close(keep=False)
        if train:
            self._strangers.are_in_the_way()
            self.looks.lose()

    def close(self) -> None:
        """End a draw if one is open."""
        if self._open is not None:
            self.end()

    def interrupt(self) -> None:
        """End a draw if one is open, before its time: gradients that come from here on are not its."""
        train = self.is_training
        self.close()
        if train:
            self._watch = Watch(self.host.layout.trainable())

    def pause(self) -> None:
        """Interrupt an automatic draw if one is open."""
        if self.is_automatic:
            self.interrupt()

    def check(self) -> None:
        """Before a draw that was interrupted goes on or is read.

        Raises:
            RuntimeError: Gradients came meanwhile; the draw is lost.
        """
        watch, self._watch = self._watch, Watch()
        if watch.has_seen() and self.looks.waiting:
            self.looks.reopen()
            self.looks.lose()
            self._automatic = False
            raise RuntimeError(
                "backward() ran at the mean while the draw of this step was interrupted (by opt.eval(), state_dict(), posterior() "
                "or a forward in eval mode), and added to its gradients: they belong to other weights, and are cleared; run it "
                "before the draw opens or after step(), or take its gradients by torch.autograd.grad"
            )

    def be_alone(self) -> None:
        """Draws of other optimizers over the same parameters: automatic ones are interrupted.

        Raises:
            RuntimeError: One is open in a context.
        """
        for other in self.rivals():
            if not other.is_automatic:
                raise RuntimeError("another optimizer has a draw open in these parameters; leave its context first")
            other.pause()

    def rivals(self) -> list[Draws]:
        """Those of other optimizers that are open in the same parameters."""
        others = [other for other in OPEN if other is not self]
        mine = set(map(id, self.host.layout.trainable())) if others else set()
        return [other for other in others if any(id(p) in mine for cell, _ in other._left for p in cell.plot.params)]

    def cleared(self) -> None:
        """Somebody clears the gradients: what a closed draw left there is read first, and not lost."""
        if not self.is_training:
            self._watch.has_seen()
            self._watch = Watch()
            self.renew()
            self.looks.give_up()

    def renew(self) -> None:
        """Before more draws."""
        if not self.looks.renew():
            self.forget()

    # Writing

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, written: Written, stream: int, draw: int, again: bool = False) -> None:
        params = self.host.layout.trainable()
        draw = self.host.workers.number(draw) if stream == TRAIN else draw
        if self.injected:
            self.injected.params = params
        if again:  # from the numbers that made it, whatever has become of them
            cells = written.cells
        else:
            found = self.host.layout.cells(params)
            found = list(map(self.host.looking, found)) if stream == EVALUATE else found
            cells = [(cell, self._numbers(cell, stream, draw)) for cell in found if cell.draws]
        written.cells, self._left = [], []
        self._open = written
        OPEN.add(self)
        try:
            for cell, numbers in cells:
                self._write_cell(written, cell, numbers)
        except BaseException:
            self.discard()
            raise
        self.written_to()
        if self.is_automatic and written.block:  # an optimizer that is dropped leaves the mean behind
            self._will = weakref.finalize(self, _put_back, [(cell, _versions(cell)) for cell, _ in written.cells])
            self._will.atexit = False

    def _numbers(self, cell: Cell, stream: int, draw: int) -> dict[str, Any]:
        return {**cell.inputs, "stream": stream, "draw": draw, "first": cell.plot.where.first}

    def written_to(self) -> None:
        """Nobody may compute with what was in the parameters before."""
        torch.clear_autocast_cache()
        if self.host.workers.sharded:
            gather_anew(self.host.layout.trainable())

    def _write_cell(self, written: Written, cell: Cell, numbers: Mapping[str, Any]) -> None:
        plot, stream, draw = cell.plot, numbers["stream"], numbers["draw"]
        flats: Flats = {"mean": plot.mean(), **cell.kept}
        flats.pop("memory", None)
        if written.block:
            flats["offset"] = plot.flat(written.block)
        version = here(plot.params[0])._version
        written.cells.append((cell, numbers))
        self._left.append((cell, numbers))
        try:
            if self.injected:
                self._write_injected(self.injected, cell, flats, stream, draw)
            else:
                kind = "look" if stream == EVALUATE else "draw"
                self.host.execution.run(kind, cell, {**flats, "pairs": plot.where.numbers}, numbers)
        except BaseException:
            if here(plot.params[0])._version == version:  # nothing was written, so there is nothing to restore
                written.cells.pop()
                self._left.pop()
            raise
        dither = None
        if plot.rounds:
            dither = CounterNoise(cell.inputs["seed"], DITHER, cell.step, 2 * draw + (stream == EVALUATE), plot.where)
        plot.put(flats["mean"], cell.only, dither=dither)

    def _write_injected(self, injected: Injected, cell: Cell, flats: Flats, stream: int, draw: int) -> None:
        method = "sample" if stream == EVALUATE else "offset"
        self.host.execution.write(cell, flats, InjectedNoise(injected, cell.plot, stream), method, draw)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self, keep_offset: bool = False) -> None:
        """The mean, cell by cell: called again after an interruption it goes on with those that are left."""
        written = self._open
        self.host.workers.deafen()
        if written is None:
            return
        while self._left:
            self._restore_cell(written, *self._left[-1], keep_offset)
            self._left.pop()
        self._open = None
        OPEN.discard(self)
        if self._will is not None:
            self._will.detach()
        self.written_to()
        if written is not self._train:
            for cell, _ in written.cells:
                if written.block != STASH:
                    cell.plot.drop(written.block or "")

    def _restore_cell(self, written: Written, cell: Cell, numbers: Mapping[str, Any], keep_offset: bool) -> None:
        plot = cell.plot
        if written.block and not keep_offset:
            plot.put(plot.flat(written.block), cell.only, written.block)
            return
        flats = {"mean": plot.mean()}
        if written.block:
            self.host.execution.run("close", cell, {**flats, "offset": plot.flat(written.block)}, {})
        else:
            kept = {name: block for name, block in cell.kept.items() if name != "memory"}
            self.host.execution.run("close", cell, {**flats, **kept, "pairs": plot.where.numbers}, numbers)
        plot.put(flats["mean"], cell.only)


def _versions(cell: Cell) -> list[int]:
    return [t._version for t in cell.plot.local]


def _put_back(written: Sequence[tuple[Cell, list[int]]]) -> None:
    """The mean, into parameters that nobody has written into since."""
    with torch.inference_mode(False), torch.no_grad():
        for cell, versions in written:
            if _versions(cell) == versions:
                cell.plot.put(cell.plot.flat(STASH), cell.only, STASH)
