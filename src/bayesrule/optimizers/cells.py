"""What one run of a program works on: parameters of one plot that have made the same number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..plots import Plot
from ..rule import BayesRule


class Cell(NamedTuple):
    """A visit to a plot. A program computes the whole plot; only what belongs to the cell is kept."""

    plot: Plot
    group: dict[str, Any]
    rule: BayesRule
    inputs: Mapping[str, Any]  # numbers that programs take: the group's, steps done, the seed
    structure: Any  # all else that programs depend on
    kept: Mapping[str, Tensor]  # the state, flat
    step: int  # steps done
    remembers: bool  # whether there is a memory of earlier steps
    only: frozenset[int] | None  # the members that belong to the cell; None is all

    @property
    def draws(self) -> bool:
        """Whether q has a spread to draw from."""
        return self.rule.expectation.draws > 0

    @property
    def params(self) -> list[Tensor]:
        """The parameters that belong to the cell."""
        return [p for i, p in enumerate(self.plot.params) if self.only is None or i in self.only]
