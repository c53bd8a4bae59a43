"""How a step is carried out: the rule recorded into programs, and whether these run eagerly or compiled.

A step is made of at most four programs, recorded from the slots of the rule when they are first wanted:

========  ===================================================================================================
draw      a sample of q into the parameters, the mean aside
close     the mean back, the offset of the sample aside
average   the gradient and curvature of one of several draws into running means; of a gradient without a draw, it alone
move      the equation itself: by the gradient at hand, by one without a draw (blindly), or by the running means
========  ===================================================================================================

Recordings differ by structure alone: by the slots that a group fills, and by the numbers 0 and infinity, on which slots may
depend. Every other number is an input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from ..estimators.oracle import Seen
from ..family import Gaussian
from ..lowering import Scratch
from ..noise import REMEMBER, CounterNoise, Noise, Where
from ..program import Named, Program, Runner, uncast
from ..rounding import stochastic
from ..rule import BayesRule, Look, Rates
from ..vector import BUCKET
from .cells import Cell

Compile = Literal["auto"] | bool
Flats = dict[str, Any]

COMPILED_BUCKET = 1 << 20
"""Elements of a bucket for compiled programs: their temporaries are registers, but for the noise."""

PATIENCE, WORTHWHILE = 50, 100_000
"""With ``compile="auto"``: after how many eager steps, and from how many parameters on, programs are compiled."""


MOVES = ("move", "move_blindly", "move_on_average")

SHARED: WeakKeyDictionary[type, dict[Any, Program]] = WeakKeyDictionary()
"""The programs of every class of optimizers, so that a second optimizer of a kind need not compile."""


def recorded_by(kind: type) -> dict[Any, Program]:
    """The programs of a class of optimizers."""
    return SHARED.setdefault(kind, {})


THEN = "then "
"""Before the names of numbers as they were when a draw was made whose offset is made again."""


class Author(Protocol):
    """What programs need of their optimizer: the slots, filled from a group."""

    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def rates(self, group: Mapping[str, Any], step: Any) -> Rates: ...
    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Gaussian, Gaussian]: ...
    def blocks(self, group: Mapping[str, Any], old: Any, new: Any) -> Flats: ...


def symbolic(group: Mapping[str, Any], symbols: Mapping[str, Any]) -> dict[str, Any]:
    """A group with symbols in the place of its numbers."""
    filled: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, list | tuple) and name != "params":
            filled[name] = tuple(symbols.get(f"{name}[{i}]", _plain(number)) for i, number in enumerate(value))
        else:
            filled[name] = symbols.get(name, _plain(value))
    return filled


def _plain(value: Any) -> Any:
    """A number that came as a tensor, as a number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


class Execution:
    """The programs of one optimizer, and the way they are run.

    Args:
        author: The optimizer.
        name: Its name, for messages.
        shared: Programs: what one of the optimizers that share it has recorded and compiled serves all.
        compile: False never; True from the first step; "auto" after :data:`PATIENCE` eager steps of a model that is worth it,
            where there is a compiler.
    """

    def __init__(self, author: Author, name: str, shared: dict[Any, Program], compile: Compile) -> None:
        if not (compile is True or compile is False or (isinstance(compile, str) and compile == "auto")):
            raise ValueError(f"{name}: compile must be True, False or 'auto', got {compile!r}")
        self.author, self.compile = author, compile
        self.runner = Runner(name)
        self.programs: dict[Any, Program] = {}
        self._shared = shared
        self.limit = BUCKET  # elements of a bucket
        self.steps = 0

    @property
    def scratch(self) -> Scratch:
        """The memory that eager programs use in turn."""
        return self.runner.scratch

    @property
    def active(self) -> bool:
        """Whether programs run compiled."""
        return self.runner.compiled

    def resume(self, steps: int) -> None:
        """Go on after so many steps that were done elsewhere, so that a run is compiled from the same step on, stopped or not."""
        self.steps = steps

    def advance(self, params: Callable[[], int]) -> None:
        """Before a step, and never within one: switch to compiled programs when it is time.

        Args:
            params: How many parameters there are.
        """
        self.steps += 1
        if not (self.runner.compiled or self.runner.failed or self.compile is False):
            ready = self.compile is True or (self.steps > PATIENCE and params() >= WORTHWHILE and has_compiler())
            self.runner.compiled = ready
        self.limit = COMPILED_BUCKET if self.runner.compiled else BUCKET

    @uncast()
    def write(self, cell: Cell, flats: Flats, noise: Noise, method: str, draw: int) -> None:
        """Write a sample that is made of given noise, and keep the mean aside; ``method`` is "offset" or "sample"."""
        q, _ = self.author.belief(cell.group, flats)
        offset = getattr(cell.rule.expectation, method)(q, noise, draw)
        if offset is not None:
            self.shift(cell, flats, offset)

    def rescale(self, cell: Cell, factor: float) -> None:
        """Gradients became so many times as large: what is kept of curvatures beside the flats follows."""

    def shift(self, cell: Cell, flats: Flats, offset: Tensor) -> None:
        """Write a sample at an offset that is given, and keep the mean aside."""
        cell.plot.keep(flats["mean"], flats["offset"], cell.only)
        cell.plot.keep(flats["mean"] + offset, flats["mean"], cell.only)

    def run(self, kind: str, cell: Cell, flats: Flats, numbers: Named, drawn: Cell | None = None) -> tuple[str, ...]:
        """Run a program on a cell; what it writes and does not belong to the cell stays as it is.

        Args:
            kind: A method of the recording: "draw", "look", "close", "average", "move", ...
            cell: Whose structure the program is recorded from.
            flats: By name; those that the program writes are written in place.
            numbers: By name.
            drawn: The cell as it was when its offset was made, where that is made again.

        Returns:
            The names of the flats that were written.
        """
        first = kind in MOVES and cell.rule.momentum.remembers and not cell.remembers
        of_rule = (cell.structure, drawn and drawn.structure, tuple(numbers), first) if numbers else ()
        key = kind, of_rule, tuple(flats), cell.plot.dtype
        program = self.programs.get(key) or self._shared.get(key)
        if program is None:
            recorded = getattr(Recording(self.author, cell, drawn or cell), kind)
            program = self._shared[key] = Program.record(recorded, list(flats), list(numbers))
        self.programs[key] = program
        narrow = flats.get("memory")
        if narrow is not None and narrow.dtype != cell.plot.dtype:
            flats = {**flats, "memory": self.scratch.flat("wide", narrow.shape, cell.plot.dtype, narrow.device).copy_(narrow)}
        copies = flats if cell.only is None else {**flats, **{name: flats[name].clone() for name in program.targets}}
        for part in _parts(copies, self.limit):
            self.runner.run(program, part, numbers, once=first)
        if cell.only is not None:
            for name in program.targets:
                cell.plot.keep(copies[name], flats[name], cell.only)
        if narrow is not None and narrow is not flats["memory"]:
            uniform = CounterNoise(cell.inputs["seed"], REMEMBER, cell.step, where=cell.plot.where).uniform(flats["memory"])
            narrow.copy_(stochastic(flats["memory"], uniform, narrow.dtype))
        return program.targets


def _parts(flats: Flats, limit: int) -> Iterator[Flats]:
    """Flats in parts of at most a bucket: only a large parameter that is not contiguous is longer."""
    size = flats["mean"].numel()
    if size <= limit:
        yield flats
        return
    for start in range(0, size, limit):
        ends = {name: (start // 2, (start + limit) // 2) if name == "pairs" else (start, start + limit) for name in flats}
        yield {name: flat[slice(*ends[name])] for name, flat in flats.items()}


class Unrecorded(Execution):
    """Runs what :class:`Execution` runs, directly: for plots that are blocks, where nothing is gained by recording."""

    def advance(self, params: Callable[[], int]) -> None:
        self.steps += 1

    @uncast()
    def run(self, kind: str, cell: Cell, flats: Flats, numbers: Named, drawn: Cell | None = None) -> tuple[str, ...]:
        return tuple(getattr(self, f"_{kind}")(cell, flats, numbers))


class Recording:
    """The programs as functions of symbols."""

    def __init__(self, author: Author, cell: Cell, drawn: Cell) -> None:
        self.author, self.cell, self.drawn = author, cell, drawn

    def _slots(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[dict[str, Any], BayesRule, Gaussian, Gaussian]:
        group = symbolic(cell.group, numbers)
        return group, self.author.rule(group), *self.author.belief(group, flats)

    def _offset(self, flats: Flats, numbers: Named, method: str = "offset") -> Any:
        numbers = {name.removeprefix(THEN): n for name, n in numbers.items() if name.startswith(THEN)} or numbers
        _, rule, q, _ = self._slots(self.drawn, flats, numbers)
        where = Where(flats["pairs"], numbers["first"], self.cell.plot.dtype)
        noise: Noise = CounterNoise(numbers["seed"], numbers["stream"], numbers["done"], where=where)
        return getattr(rule.expectation, method)(q, noise, numbers["draw"])

    def look(self, flats: Flats, numbers: Named) -> Flats:
        return self.draw(flats, numbers, "sample")

    def draw(self, flats: Flats, numbers: Named, method: str = "offset") -> Flats:
        sample = flats["mean"] + self._offset(flats, numbers, method)
        return {"offset": flats["mean"], "mean": sample} if "offset" in flats else {"mean": sample}

    def climb(self, flats: Flats, numbers: Named) -> Flats:
        _, rule, q, _ = self._slots(self.cell, {**flats, "mean": flats["offset"]}, numbers)
        return {"mean": flats["offset"] + rule.expectation.ascent(q, flats["first"], numbers["size"])}

    def close(self, flats: Flats, numbers: Named) -> Flats:
        if "pairs" in flats:
            return {"mean": flats["mean"] - self._offset(flats, numbers)}
        return {"mean": flats["offset"], "offset": flats["mean"] - flats["offset"]}

    def average(self, flats: Flats, numbers: Named) -> Flats:
        look = self._look_at_hand(flats, numbers)
        mean = Look(None, flats["mean_gradient"], flats["mean_curvature"]).lerp(look, numbers["weight"])
        unseen = {} if look.curvature is None else {"mean_curvature": mean.curvature}
        return {"mean_gradient": mean.gradient, **unseen}

    def average_blindly(self, flats: Flats, numbers: Named) -> Flats:
        mean = Look(None, flats["mean_gradient"], None).lerp(Look(None, flats["gradient"], None), numbers["weight"])
        return {"mean_gradient": mean.gradient}

    def move(self, flats: Flats, numbers: Named) -> Flats:
        return self._moved(flats, numbers, self._look_at_hand(flats, numbers))

    def move_blindly(self, flats: Flats, numbers: Named) -> Flats:
        return self._moved(flats, numbers, Look(None, flats["gradient"], None))

    def move_on_average(self, flats: Flats, numbers: Named) -> Flats:
        return self._moved(flats, numbers, Look(None, flats["mean_gradient"], flats.get("mean_curvature")))

    def _look_at_hand(self, flats: Flats, numbers: Named) -> Look:
        _, rule, q, prior = self._slots(self.cell, flats, numbers)
        offset = self._offset(flats, numbers) if "pairs" in flats else flats.get("offset")
        own = next(flats[name] for name in ("first", "local", "gradient") if name in flats)  # what belongs to the offset
        seen = Seen(own, flats.get("squares"), probes=flats.get("probes"))
        gradient = rule.expectation.gradient(q, offset, flats["gradient"])
        return Look(None, gradient, rule.curvature(q, prior, offset, seen))

    def _moved(self, flats: Flats, numbers: Named, look: Look) -> Flats:
        group, rule, q, prior = self._slots(self.cell, flats, numbers)
        memory = flats["memory"] if self.cell.remembers else None
        new, memory = rule.move(q, prior, look, self.author.rates(group, numbers["done"] + 1), memory)
        written = {**self.author.blocks(group, q, new), "memory": memory}
        return {name: written[name] for name in written if name in flats}


def has_compiler() -> bool:
    """Whether torch.compile has a C++ compiler to call."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl"))
