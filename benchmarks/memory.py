"""Peak memory beyond parameters and gradients, in units of the parameters' bytes; a fresh process per optimizer."""

from __future__ import annotations

from pathlib import Path

from benchmarks import child
from benchmarks.contenders import CONTENDERS, tensors
from benchmarks.ledger import Settings, Table
from benchmarks.models import gpt_shapes
from benchmarks.optimizer_step import Rival
from benchmarks.timing import Neighbors, digits, spread

STEPS = 3
SELF = Path("/proc/self")


def peak(name: str, width: int) -> dict[str, float]:
    """In a process of its own: what the first step and the later ones took at their worst.

    The process has made steps with small tensors before, so that what is measured is not the loading of code.
    """
    contender = CONTENDERS[name]
    for _ in range(2):
        small = Rival(contender, tensors([(64, 64)] * 2), tensors([(64, 64)] * 2))
        small()
        small()
    del small
    shapes = gpt_shapes(width)
    params, gradients = tensors(shapes), tensors(shapes, scale=0.01)
    unit = sum(p.nbytes for p in params)
    before = peak_since_reset()
    rival = Rival(contender, params, gradients)
    rival()
    first = highest()
    peak_since_reset()
    for _ in range(STEPS - 1):
        rival()
    return {"parameters": unit / 4, "first": (first - before) / unit, "later": (highest() - before) / unit}


def peak_since_reset() -> int:
    """Forget the peak of resident memory and return what is resident now, in bytes."""
    if not (SELF / "clear_refs").exists():
        raise RuntimeError("peak memory is read from /proc/self, which only Linux has")
    (SELF / "clear_refs").write_text("5")
    return highest()


def highest() -> int:
    lines = (SELF / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def tables(settings: Settings) -> list[Table]:
    neighbors = Neighbors()
    rows, figures, parameters = [], {}, 0.0
    for name in CONTENDERS:
        found = child.call("memory:peak", settings.threads, name=name, width=368 if settings.quick else 1176)
        worst, parameters = max(found["first"], found["later"]), found["parameters"]
        figures[f"memory: {name}"] = spread([worst], worst)
        rows.append((name, digits(worst), digits(found["first"]), digits(found["later"])))
    head = ("optimizer", "peak", "first step (with compiling)", "later steps")
    size = f"{parameters / 1e6:.0f}M parameters in {len(gpt_shapes(1))} tensors"
    note = f"{size}; 1 is their bytes. One process per optimizer. {neighbors.report()}"
    return [Table("peak memory beyond parameters and gradients", head, rows, figures, note)]
