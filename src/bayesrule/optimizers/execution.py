"""How a step is carried out: the rule recorded into programs, and whether these run eagerly or compiled.

A step is made of at most four programs, recorded from the slots of the rule when they are first wanted:

========  ===================================================================================================
draw      a sample of q into the parameters, the mean aside
close     the mean back, the offset of the sample aside
average   the gradient and curvature of one of several draws into running means
move      the equation itself: by the gradient at hand, by one without a draw (blindly), or by the running means
========  ===================================================================================================

Recordings differ by structure alone: by the slots that a group fills, and by the numbers 0 and infinity, on which slots may
depend. Every other number is an input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from ..estimators.oracle import Seen
from ..lowering import Scratch
from ..noise import CounterNoise, Noise, Where
from ..program import Program, Runner
from ..rule import BayesRule, Gaussian, Look, Rates
from ..vector import BUCKET
from .cells import Cell

Compile = Literal["auto"] | bool
Flats = dict[str, Any]

COMPILED_BUCKET = 1 << 19
"""Elements of a bucket for compiled programs: their temporaries are registers, but for the noise."""

PATIENCE, WORTHWHILE = 50, 100_000
"""With ``compile="auto"``: after how many eager steps, and from how many parameters on, programs are compiled."""


MOVES = ("move", "move_blindly", "move_on_average")

THEN = "then "
"""Before the names of numbers as they were when a draw was made whose offset is made again."""


class Author(Protocol):
    """What programs need of their optimizer: the slots, filled from a group."""

    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def rates(self, group: Mapping[str, Any], step: Any) -> Rates: ...
    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Gaussian, Gaussian]: ...


def symbolic(group: Mapping[str, Any], symbols: Mapping[str, Any]) -> dict[str, Any]:
    """A group with symbols in the place of its numbers."""
    filled: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, list | tuple) and name != "params":
            filled[name] = tuple(symbols.get(f"{name}[{i}]", number) for i, number in enumerate(value))
        else:
            filled[name] = symbols.get(name, value)
    return filled


class Execution:
    """The programs of one optimizer, and the way they are run.

    Args:
        author: The optimizer.
        compile: False never; True from the first step; "auto" after :data:`PATIENCE` eager steps of a model that is worth it,
            where there is a compiler.
    """

    def __init__(self, author: Author, compile: Compile) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")
        self.author, self.compile = author, compile
        self.runner = Runner(type(author).__name__)
        self.programs: dict[Any, Program] = {}
        self.limit = BUCKET  # elements of a bucket
        self._steps = 0

    @property
    def scratch(self) -> Scratch:
        """The memory that eager programs use in turn."""
        return self.runner.scratch

    @property
    def active(self) -> bool:
        """Whether programs run compiled."""
        return self.runner.compiled

    def advance(self, params: Callable[[], int]) -> None:
        """Before a step, and never within one: switch to compiled programs when it is time.

        Args:
            params: How many parameters there are.
        """
        self._steps += 1
        if not (self.runner.compiled or self.runner.failed or self.compile is False):
            ready = self.compile is True or (self._steps > PATIENCE and params() >= WORTHWHILE and has_compiler())
            self.runner.compiled = ready
        self.limit = COMPILED_BUCKET if self.runner.compiled else BUCKET

    def run(self, kind: str, cell: Cell, flats: Flats, numbers: Mapping[str, Any]) -> tuple[str, ...]:
        """Run a program on a cell; what it writes and does not belong to the cell stays as it is.

        Args:
            kind: A method of the recording: "draw", "close", "average", "move", ...
            cell: Whose structure the program is recorded from.
            flats: By name; those that the program writes are written in place.
            numbers: By name.

        Returns:
            The names of the flats that were written.
        """
        first = kind in MOVES and cell.rule.momentum.remembers and not cell.remembers
        of_rule = (cell.structure, tuple(numbers), first) if numbers else ()
        key = kind, of_rule, tuple(flats), cell.plot.dtype
        program = self.programs.get(key)
        if program is None:
            recorded = getattr(_Recording(self.author, cell), kind)
            program = self.programs[key] = Program.record(recorded, list(flats), list(numbers))
        if cell.only is None:
            self.runner.run(program, flats, numbers, once=first)
        else:
            copies = {**flats, **{name: flats[name].clone() for name in program.targets}}
            self.runner.run(program, copies, numbers, once=first)
            for name in program.targets:
                cell.plot.keep(copies[name], flats[name], cell.only)
        return program.targets


class _Recording:
    """The programs as functions of symbols."""

    def __init__(self, author: Author, cell: Cell) -> None:
        self.author, self.cell = author, cell

    def _slots(self, flats: Flats, numbers: Mapping[str, Any]) -> tuple[dict[str, Any], BayesRule, Gaussian, Gaussian]:
        group = symbolic(self.cell.group, numbers)
        return group, self.author.rule(group), *self.author.belief(group, flats)

    def _offset(self, flats: Flats, numbers: Mapping[str, Any]) -> Any:
        numbers = {name.removeprefix(THEN): n for name, n in numbers.items() if name.startswith(THEN)} or numbers
        _, rule, q, _ = self._slots(flats, numbers)
        where = Where(flats["pairs"], numbers["first"], self.cell.plot.dtype)
        noise: Noise = CounterNoise(numbers["seed"], numbers["stream"], numbers["done"], where=where)
        return rule.expectation.offset(q, noise, numbers["draw"])

    def draw(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        sample = flats["mean"] + self._offset(flats, numbers)
        return {"offset": flats["mean"], "mean": sample} if "offset" in flats else {"mean": sample}

    def close(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        if "pairs" in flats:
            return {"mean": flats["mean"] - self._offset(flats, numbers)}
        return {"mean": flats["offset"], "offset": flats["mean"] - flats["offset"]}

    def average(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        look = self._look_at_hand(flats, numbers)
        mean = Look(None, flats["mean_gradient"], flats["mean_curvature"]).lerp(look, numbers["weight"])
        unseen = {} if look.curvature is None else {"mean_curvature": mean.curvature}
        return {"mean_gradient": mean.gradient, **unseen}

    def move(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        return self._moved(flats, numbers, self._look_at_hand(flats, numbers))

    def move_blindly(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        return self._moved(flats, numbers, Look(None, flats["gradient"], None))

    def move_on_average(self, flats: Flats, numbers: Mapping[str, Any]) -> Flats:
        return self._moved(flats, numbers, Look(None, flats["mean_gradient"], flats.get("mean_curvature")))

    def _look_at_hand(self, flats: Flats, numbers: Mapping[str, Any]) -> Look:
        _, rule, q, prior = self._slots(flats, numbers)
        offset = self._offset(flats, numbers) if "pairs" in flats else flats.get("offset")
        return Look(None, flats["gradient"], rule.curvature(q, prior, offset, Seen(flats["gradient"])))

    def _moved(self, flats: Flats, numbers: Mapping[str, Any], look: Look) -> Flats:
        group, rule, q, prior = self._slots(flats, numbers)
        memory = flats["memory"] if self.cell.remembers else None
        new, memory = rule.move(q, prior, look, self.author.rates(group, numbers["done"] + 1), memory)
        written = {"mean": new.mean, "hess": new.hess, "memory": memory}
        return {name: written[name] for name in written if name in flats}


def has_compiler() -> bool:
    """Whether torch.compile has a C++ compiler to call."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl"))
