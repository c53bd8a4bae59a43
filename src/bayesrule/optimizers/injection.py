"""Noise from the user instead of the counter: for tests against published numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..noise import Noise
from ..plots import Plot


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
    """The part of injected noise that belongs to one plot."""

    source: Injected
    plot: Plot
    stream: int
    number: int = 0

    def at(self, *, step: int | None = None, draw: int | None = None) -> InjectedNoise:
        return replace(self, number=self.number if draw is None else draw)

    def normal(self, like: Any) -> Tensor:
        values = self.source.draw(self.stream, self.number)
        return self.plot.read([values[p] for p in self.plot.params], "normal")

    uniform = normal
