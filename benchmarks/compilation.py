"""What compiling costs: with empty caches, with filled ones, and whether a schedule of learning rates compiles again."""

from __future__ import annotations

import math
import tempfile
from time import perf_counter
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from benchmarks import child
from benchmarks.contenders import CONTENDERS, tensors
from benchmarks.ledger import Settings, Table
from benchmarks.optimizer_step import LISTS, Rival
from benchmarks.targets import COMPILED
from benchmarks.timing import Neighbors, Spread, spread

SETTLING, SCHEDULE = 6, 20  # steps


def start(tensor_list: str) -> dict[str, float]:
    """In a process of its own: seconds that the first steps take too long, their graphs, and those that a schedule adds."""
    shapes = LISTS[tensor_list]()
    params, gradients = tensors(shapes), tensors(shapes, scale=0.01)
    begin = perf_counter()
    rival = Rival(CONTENDERS[COMPILED], params, gradients)
    rival()
    seconds = perf_counter() - begin
    later = [rival().seconds for _ in range(SETTLING - 1)]  # what still compiles here belongs to the cost as well
    seconds += sum(later) - SETTLING * min(later)
    graphs = _graphs()

    schedule = LambdaLR(rival.optimizer, lambda step: min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / SCHEDULE)) / 2)
    for _ in range(SCHEDULE):
        rival()
        schedule.step()
    return {"seconds": seconds, "graphs": graphs, "recompiles": _graphs() - graphs}


def _graphs() -> int:
    from torch._dynamo.utils import counters  # imported late: loading it is part of the time above

    return int(counters["stats"]["unique_graphs"])


def tables(settings: Settings) -> list[Table]:
    neighbors = Neighbors()
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Spread] = {}
    for tensor_list in LISTS:
        cold, warm = [], []
        for _ in range(1 if settings.quick else 2):
            with tempfile.TemporaryDirectory() as cache:

                def run(cache: str = cache, tensor_list: str = tensor_list) -> Any:
                    env = {"TORCHINDUCTOR_CACHE_DIR": cache}
                    return child.call("compilation:start", settings.threads, env=env, tensor_list=tensor_list)

                cold.append(run())
                warm += [run() for _ in range(1 if settings.quick else 2)]
        again = max(each["recompiles"] for each in cold + warm)
        for kind, each in (("cold", cold), ("warm", warm)):
            seconds = [one["seconds"] for one in each]
            figures[f"compilation, {kind}: {tensor_list}"] = spread(seconds, min(seconds))
        if cold[0]["graphs"]:
            figures[f"recompiles: {tensor_list}"] = spread([again], again)
        kinds = (str(figures[f"compilation, {kind}: {tensor_list}"]) for kind in ("cold", "warm"))
        rows.append((tensor_list, *kinds, f"{cold[0]['graphs']:g}", f"{again:g}"))
    head = ("tensors", "cold: s", "warm: s", "graphs", f"recompiled over {SCHEDULE} learning rates")
    note = (
        f"Seconds of the first {SETTLING} steps beyond the fastest of them, in a new process; cold with an empty cache, warm with "
        f"a filled one. Graphs of these steps; none: nothing was compiled. {neighbors.report()}"
    )
    return [Table("compiling", head, rows, figures, note)]
