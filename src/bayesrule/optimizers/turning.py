"""Steps in coordinates of their own: each parameter is turned to its basis, moved there, and turned back.

Groups that stay in the coordinates of their weights take steps as everywhere, all parameters of a group together.

The rule is the same, and so is what calls it: what is kept is flat as ever, gradients and means as they stand in the
parameters, curvature, momentum and offsets in the basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..bases import Basis
from ..estimators.oracle import Seen
from ..program import Named, Program
from ..rule import Look
from .cells import Cell
from .execution import Author, Compile, Execution, Flats, Recording, Unrecorded

TURNED = "turned"
"""The block of an offset in the basis, while the sample is open."""


class Turner(Author, Protocol):
    """What is asked of an optimizer."""

    def turns(self, group: Mapping[str, Any]) -> bool: ...
    def basis(self, cell: Cell) -> Basis: ...
    def waits(self, cell: Cell) -> bool: ...
    def settle(self, cell: Cell, gradient: Tensor) -> None: ...
    def shaped(self, cell: Cell, direction: Tensor) -> Tensor: ...


class Turning(Unrecorded):
    """Runs what :class:`~bayesrule.optimizers.execution.Execution` runs, for plots of one parameter each where groups turn."""

    author: Turner

    def __init__(self, author: Author, name: str, shared: dict[Any, Program], compile: Compile) -> None:
        super().__init__(author, name, shared, compile)
        self.straight = Execution(author, name, shared, compile)

    def run(self, kind: str, cell: Cell, flats: Flats, numbers: Named, drawn: Cell | None = None) -> tuple[str, ...]:
        if self.author.turns(cell.group):
            return super().run(kind, cell, flats, numbers, drawn)
        return self.straight.run(kind, cell, flats, numbers, drawn)

    def shift(self, cell: Cell, flats: Flats, offset: Tensor) -> None:
        if not self.author.turns(cell.group):
            return super().shift(cell, flats, offset)
        (mean,), (turned,) = cell.plot.views(flats["mean"]), cell.plot.views(offset)
        cell.plot.flat(TURNED).copy_(offset)
        flats["offset"].copy_(flats["mean"])
        mean.add_(self.author.basis(cell).back(turned))

    def _draw(self, cell: Cell, flats: Flats, numbers: Named, method: str = "offset") -> tuple[str, ...]:
        self.shift(cell, flats, Recording(self.author, cell, cell)._offset(flats, numbers, method))
        return "mean", "offset"

    def _look(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        return self._draw(cell, flats, numbers, "sample")

    def _close(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        flats["mean"].copy_(flats["offset"])
        flats["offset"].copy_(cell.plot.flat(TURNED))
        cell.plot.drop(TURNED)
        return "mean", "offset"

    def _average(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        curvature = self._curvature(cell, flats, numbers, self._turned(cell, flats["gradient"]))
        flats["mean_gradient"].lerp_(flats["gradient"], numbers["weight"])
        if curvature is None:
            return ("mean_gradient",)
        flats["mean_curvature"].lerp_(curvature, numbers["weight"])
        return "mean_gradient", "mean_curvature"

    def _average_blindly(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        flats["mean_gradient"].lerp_(flats["gradient"], numbers["weight"])
        return ("mean_gradient",)

    def _move(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        turned = self._turned(cell, flats["gradient"])
        return self._moved(cell, flats, numbers, flats["gradient"], turned, self._curvature(cell, flats, numbers, turned))

    def _move_blindly(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        return self._moved(cell, flats, numbers, flats["gradient"], self._turned(cell, flats["gradient"]), None)

    def _move_on_average(self, cell: Cell, flats: Flats, numbers: Named) -> tuple[str, ...]:
        gradient = flats["mean_gradient"]
        return self._moved(cell, flats, numbers, gradient, self._turned(cell, gradient), flats.get("mean_curvature"))

    def _curvature(self, cell: Cell, flats: Flats, numbers: Named, turned: Tensor) -> Tensor | None:
        """What the gradient, turned, says of the curvature; with noise per rank it is that of this rank."""
        own = self._turned(cell, flats["local"]) if "local" in flats else turned
        _, rule, q, prior = Recording(self.author, cell, cell)._slots(cell, flats, numbers)
        curvature: Tensor | None = rule.curvature(q, prior, flats.get("offset"), Seen(own))
        return curvature

    def _turned(self, cell: Cell, flat: Tensor) -> Tensor:
        """A flat tensor in the basis; what is idle is zero."""
        (view,) = cell.plot.views(flat)
        turned = self.author.basis(cell).turn(view)
        if turned.numel() == flat.numel():
            return turned.reshape(-1)
        whole = torch.zeros_like(flat)
        cell.plot.views(whole)[0].copy_(turned)
        return whole

    def _moved(
        self, cell: Cell, flats: Flats, numbers: Named, gradient: Tensor, turned: Tensor, curvature: Tensor | None
    ) -> tuple[str, ...]:
        (raw,) = cell.plot.views(gradient)
        if not self.author.waits(cell):
            pulls = cell.group["weight_decay"] != 0.0  # else the mean has no part in the direction
            there = {**flats, "mean": self._turned(cell, flats["mean"]) if pulls else flats["mean"]}
            group, rule, q, prior = Recording(self.author, cell, cell)._slots(cell, there, numbers)
            rates = self.author.rates(group, numbers["done"] + 1)
            memory = flats["memory"] if cell.remembers else None
            look = Look(None, turned, curvature)
            new, direction, memory = rule.head(q, prior, look, rates, memory)
            flats["hess"].copy_(new.hess)
            flats["memory"].copy_(memory)
            (along,), (mean,) = cell.plot.views(direction), cell.plot.views(flats["mean"])
            mean.sub_(self.author.shaped(cell, self.author.basis(cell).back(along)), alpha=rates.mean)
        self.author.settle(cell, raw)
        return "mean", "hess", "memory"
