"""Steps of whole blocks: parameters whose elements vary together are moved as one theta of a family with matrices.

A block is a plot, all of whose elements stand in one row, shape (D,). Gradients, means and offsets lie flat in the plot as ever;
what the family keeps beside them is the optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..estimators.oracle import Seen
from ..family import DomainError
from ..noise import CounterNoise, Noise
from ..plots import Plot
from ..program import Named
from ..rule import Look
from ..vector import lerp
from .cells import Cell
from .examples import Examples
from .execution import Author, Flats, Unrecorded


class Believer(Author, Protocol):
    """What is asked of an optimizer."""

    examples: Examples

    def block(self, cell: Cell, flats: Flats) -> tuple[Any, Any]: ...
    def hold(self, cell: Cell, flats: Flats, q: Any) -> None: ...


@dataclass(frozen=True)
class InARow(Noise):
    """Noise of a plot for what belongs to its parameters, shape (D,)."""

    noise: Noise
    plot: Plot

    def at(self, *, step: int | None = None, draw: int | None = None) -> InARow:
        return InARow(self.noise.at(step=step, draw=draw), self.plot)

    def normal(self, like: Any) -> Tensor:
        return self.plot.joined(self.noise.normal(self._flat(like)))

    def uniform(self, like: Any) -> Tensor:
        return self.plot.joined(self.noise.uniform(self._flat(like)))

    def _flat(self, like: Tensor) -> Tensor:
        return like.new_empty(self.plot.bucket.size)


class Blockwise(Unrecorded):
    """Runs what :class:`~bayesrule.optimizers.execution.Execution` runs, for plots that are one theta each."""

    author: Believer

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._curvatures: WeakKeyDictionary[Plot, Any] = WeakKeyDictionary()  # running means, in the structure of the family
        self._slopes: WeakKeyDictionary[Plot, Tensor] = WeakKeyDictionary()  # of the last draw, where they are not 1

    def rescale(self, cell: Cell, factor: float) -> None:
        if cell.plot in self._curvatures:
            self._curvatures[cell.plot] = self._curvatures[cell.plot] * factor**cell.rule.curvature.degree

    def write(self, cell: Cell, flats: Flats, noise: Noise, method: str, draw: int) -> None:
        q, _ = self.author.block(cell, flats)
        row = InARow(noise, cell.plot)
        offset = getattr(cell.rule.expectation, method)(q, row, draw)
        slope = cell.rule.expectation.slope(q, row, draw) if method == "offset" else None
        if slope is not None:
            self._slopes[cell.plot] = slope
        if offset is not None:
            self.shift(cell, flats, self._flat(cell, offset))

    def _draw(self, cell: Cell, flats: Flats, numbers: Named, method: str = "offset") -> tuple[str, ...]:
        noise = CounterNoise(numbers["seed"], numbers["stream"], numbers["done"], where=cell.plot.where)
        self.write(cell, flats, noise, method, numbers["draw"])
        return "mean", "offset"

    def _look(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        return self._draw(cell, flats, numbers, "sample")

    def _close(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        offset = flats["mean"] - flats["offset"]
        cell.plot.keep(flats["offset"], flats["mean"], cell.only)
        cell.plot.keep(offset, flats["offset"], cell.only)
        return "mean", "offset"

    def _average(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        look, weight = self._seen(cell, flats), numbers["weight"]
        flats["mean_gradient"].lerp_(self._flat(cell, look.gradient), weight)
        if look.curvature is None:
            return ("mean_gradient",)
        first = weight == 1.0 or cell.plot not in self._curvatures
        self._curvatures[cell.plot] = look.curvature if first else lerp(self._curvatures[cell.plot], look.curvature, weight)
        return "mean_gradient", "mean_curvature"

    def _average_blindly(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        flats["mean_gradient"].lerp_(flats["gradient"], numbers["weight"])
        return ("mean_gradient",)

    def _move(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        return self._moved(cell, flats, numbers, self._seen(cell, flats))

    def _move_blindly(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        return self._moved(cell, flats, numbers, Look(None, cell.plot.joined(flats["gradient"]), None))

    def _move_on_average(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        curvature = self._curvatures.pop(cell.plot, None) if "mean_curvature" in flats else None
        return self._moved(cell, flats, numbers, Look(None, cell.plot.joined(flats["mean_gradient"]), curvature))

    def _seen(self, cell: Cell, flats: Flats) -> Look:
        """The look of the gradient at hand."""
        q, prior = self.author.block(cell, flats)
        offset = cell.plot.joined(flats["offset"]) if "offset" in flats else None
        gradient = cell.plot.joined(flats["gradient"])
        each = self._of_examples(cell) if cell.rule.curvature.keeps_examples else None
        curvature = cell.rule.curvature(q, prior, offset, Seen(gradient, None, each))
        if offset is not None and (slope := self._slopes.pop(cell.plot, None)) is not None:
            gradient = gradient * slope
        return Look(None, cell.rule.expectation.gradient(q, offset, gradient), curvature)

    def _of_examples(self, cell: Cell) -> Tensor:
        """The gradients of the examples, shape (n, D)."""
        found = self.author.examples.rows
        number = next(len(rows) for rows in found.values())
        rows = [found[p].reshape(number, -1) if p in found else p.new_zeros(number, p.numel()) for p in cell.plot.params]
        return torch.cat(rows, dim=1).to(cell.plot.dtype)

    def _moved(self, cell: Cell, flats: Flats, numbers: Named, look: Look) -> tuple[str, ...]:
        q, prior = self.author.block(cell, flats)
        memory = cell.plot.joined(flats["memory"]) if cell.remembers else None
        try:
            new, memory = cell.rule.move(q, prior, look, self.author.rates(cell.group, numbers["done"] + 1), memory)
        except DomainError as error:
            block = f"a block of {len(q.mean)} elements in {str(cell.plot.dtype).removeprefix('torch.')}"
            raise DomainError(
                f"{self.runner.name}: the precision of {block} is not positive definite any more: begin again with more "
                "hess_init or weight_decay, beta2 nearer to 1, or parameters of a wider dtype"
            ) from error
        cell.plot.keep(self._flat(cell, new.mean), flats["mean"], cell.only)
        self.author.hold(cell, flats, new)
        if memory is not None and "memory" in flats:
            flats["memory"].copy_(self._flat(cell, memory))
        return "mean", "hess", "memory"

    def _flat(self, cell: Cell, row: Tensor) -> Tensor:
        """A row as it lies in the plot; what is idle is zero."""
        flat = row.new_zeros(cell.plot.bucket.size)
        cell.plot.scatter(row, flat, [1.0] * len(cell.plot.params))
        return flat
