"""Time rivals in turn, and compare them round by round: a machine that slows down for a while slows all of them."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Lap(NamedTuple):
    """One step of one rival."""

    seconds: float
    faults: int = 0  # pages of 4 kB that the system had to hand out, about 2 microseconds each


class Spread(NamedTuple):
    """A figure and how sure it is."""

    median: float
    low: float  # first and third quartile
    high: float
    best: float  # the same figure from the best times alone

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.low)} to {digits(self.high)}) [{digits(self.best)}]"


Laps = dict[str, list[Lap]]


def interleave(rivals: Mapping[str, Callable[[], Lap]], *, rounds: int, warmup: int, seconds: float, least: int = 5) -> Laps:
    """Let every rival take one step a round, in another order each round.

    Args:
        rivals: By name: takes one step and says how long it took.
        rounds: How many rounds count.
        warmup: Rounds before them that do not: memory is handed out and graphs are compiled here.
        seconds: After so long no further round begins.
        least: Rounds that are run in any case.
    """
    laps: Laps = {name: [] for name in rivals}
    names, shuffle, end = list(rivals), random.Random(0).shuffle, float("inf")
    for number in range(-warmup, rounds):
        if number == 0:
            end = time.perf_counter() + seconds
        if number >= least and time.perf_counter() > end:
            break
        shuffle(names)
        for name in names:
            lap = rivals[name]()
            if number >= 0:
                laps[name].append(lap)
    return laps


def spread(values: Sequence[float], best: float) -> Spread:
    """Median and quartiles of some values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return Spread(median, low, high, best)


def ratio(of: Sequence[Lap], to: Sequence[Lap]) -> Spread:
    """Times of one rival in units of another's: round by round, then the ratio of the best times."""
    rounds = [a.seconds / b.seconds for a, b in zip(of, to, strict=True)]
    return spread(rounds, min(lap.seconds for lap in of) / min(lap.seconds for lap in to))


def typical(laps: Sequence[Lap]) -> Lap:
    """Medians over rounds."""
    return Lap(statistics.median(lap.seconds for lap in laps), round(statistics.median(lap.faults for lap in laps)))


def digits(value: float) -> str:
    """Three digits or so, which is what a ratio of times is worth; around one four."""
    decimals = next((decimals for bound, decimals in ((2, 3), (10, 2), (100, 1)) if abs(value) < bound), 0)
    return f"{value:,.{decimals}f}"


class Neighbors:
    """Who else computes: the load average before, and the cores that others keep busy meanwhile (Linux)."""

    BUSY_LOAD, BUSY_CORES = 1.5, 0.2

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.began, self.all, self.own = time.perf_counter(), _busy(), _own()

    def report(self) -> str:
        """One line; where others disturbed, it says so. The load includes our own tables of the last minutes."""
        load = f"load average {self.load:.2f} before"
        if self.all is None or (now := _busy()) is None:
            return f"{load}{self.warning(self.load > self.BUSY_LOAD)}"
        others = max(0.0, (now - self.all - (_own() - self.own)) / (time.perf_counter() - self.began))
        return f"{load}, others kept {others:.2f} cores busy meanwhile{self.warning(others > self.BUSY_CORES)}"

    @staticmethod
    def warning(busy: bool) -> str:
        return " (**a busy machine: figures may be off**)" if busy else ""


def _busy() -> float | None:
    """Seconds that all cores together have worked, or were withheld by the host, since the system started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupts, soft, stolen = (int(field) for field in fields[:8])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds of work of this process and the ones it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
