"""Draws of a posterior in the parameters of a model, in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .noise import DITHER, POSTERIOR, TOGETHER, CounterNoise, Where, addresses
from .parts import Part
from .plots import Plot, plots
from .program import Program, Runner, uncast
from .rounding import stochastic
from .vector import BUCKET


class Drawn(Protocol):
    """What is asked of a posterior."""

    @property
    def mean(self) -> Mapping[str, Tensor]: ...
    @property
    def precision(self) -> Mapping[str, Tensor]: ...
    @property
    def parts(self) -> Sequence[Part]: ...


class Draws:
    r"""Draws of a posterior, written in place into the same tensors one after another: theta = m + S^-1/2 eps.

    Weights that vary together are drawn by their parts. For independent ones S^-1/2 is computed once and kept, as is the mean
    where it does not lie ready. A draw takes scratch of a few buckets beyond.

    Args:
        posterior: What to draw from.
        into: Name -> tensor of the mean's shape, for every name; reckoned in float32, or theirs if wider.
        seed: Which draws, any whole number.
        compile: Whether ``torch.compile`` makes the noise: some seconds the first time, three times as fast from then on.
        offsets: Write how far draws lie from the mean, S^-1/2 eps, instead of the draws.
    """

    @torch.no_grad()
    def __init__(
        self, posterior: Drawn, into: Mapping[str, Tensor], seed: int, compile: bool = False, *, offsets: bool = False
    ) -> None:
        self.seed, self._offsets = whole_number("seed", seed), offsets
        self._runner = Runner("predict", compile)
        self._parts, self._into = posterior.parts, into
        together = {name for part in posterior.parts for name in part.names}
        mean = {name: m for name, m in posterior.mean.items() if name not in together}
        precision = posterior.precision
        self._plots: list[tuple[Plot, Tensor, Tensor]] = []
        if not mean:
            return
        starts = addresses(m.numel() for m in mean.values())
        names = {id(into[name]): name for name in mean}
        written = {t.untyped_storage().data_ptr() for t in into.values()}
        limit = 4 * BUCKET if compile else BUCKET
        for plot in plots([(start, into[name]) for start, name in zip(starts, mean, strict=True)], self._runner.scratch, limit):
            members, device = [names[id(p)] for p in plot.params], plot.params[0].device
            center = plot.read([mean[name].to(device) for name in members], "draw")
            if offsets:
                center = torch.zeros_like(center)
            elif center.untyped_storage().data_ptr() in written or plot.own is None:
                center = center.clone()
            spread = plot.read([precision[name].to(device) for name in members], "draw").rsqrt()
            self._plots.append((plot, center, spread))

    @torch.inference_mode(False)
    @torch.no_grad()
    @uncast()
    def write(self, draw: int) -> None:
        """Write draw number ``draw``."""
        numbers: dict[str, Any] = {"seed": self.seed, "draw": whole_number("draw", draw)}
        for plot, mean, spread in self._plots:
            flats = {"sample": plot.blank(), "mean": mean, "spread": spread, "pairs": plot.where.numbers}
            self._runner.run(_sample(plot.dtype), flats, {**numbers, "first": plot.where.first})
            plot.put(flats["sample"], dither=CounterNoise(self.seed, DITHER, draw=draw, where=plot.where))
        for number, part in enumerate(self._parts):
            drawn = part.sample(CounterNoise(self.seed, TOGETHER, step=number, draw=draw))
            if self._offsets:
                drawn = {name: t - part.mean[name] for name, t in drawn.items()}
            self._put(drawn, number, draw)
        torch.clear_autocast_cache()

    def _put(self, named: Mapping[str, Tensor], number: int, draw: int) -> None:
        """Write tensors by name; parameters that round do so by chance."""
        for index, (name, value) in enumerate(named.items()):
            p = self._into[name]
            if p.dtype.itemsize < min(4, value.dtype.itemsize):
                chance = CounterNoise(self.seed, DITHER, step=number + 1 + index * 64, draw=draw).uniform(value)
                value = stochastic(value, chance, p.dtype)
            p.copy_(value)

    @torch.inference_mode(False)
    @torch.no_grad()
    def mirror(self) -> None:
        """Turn what stands in the tensors over to the other side of the mean: m + d becomes m - d. Draws no noise."""
        for plot, mean, _ in self._plots:
            flat = plot.mean()
            plot.put(flat.lerp_(mean, 2.0))
        for part in self._parts:
            if not part.is_gaussian:
                raise ValueError(f"draws of a {part.structure!r} have no mirror images; take antithetic=False")
            for name, mean in part.mean.items():
                p = self._into[name]
                p.copy_(-p if self._offsets else 2 * mean.to(p.device) - p.to(mean.dtype))
        torch.clear_autocast_cache()


@cache
def _sample(dtype: torch.dtype) -> Program:
    """One draw of a flat Gaussian."""

    def sample(flats: Mapping[str, Any], numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        where = Where(flats["pairs"], numbers["first"], dtype)
        noise = CounterNoise(numbers["seed"], POSTERIOR, draw=numbers["draw"], where=where)
        return {"sample": flats["mean"] + noise.normal(flats["mean"]) * flats["spread"]}

    return Program.record(sample, ["sample", "mean", "spread", "pairs"], ["seed", "draw", "first"])


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Whatever is written into tensors inside, leaving brings back what was there, in place and bit by bit."""
    before = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, old in before:
                t.copy_(old)
        torch.clear_autocast_cache()


def whole_number(name: str, value: Any, least: int | None = None, remedy: str = "") -> int:
    """A setting as Python's own whole number, whichever kind it came as (numpy's, say); ValueError where it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"{name} must be a whole number{'' if least is None else f' >= {least}'}, got {value!r}{remedy}")
    return number
