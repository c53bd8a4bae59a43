"""`python -m benchmarks [names...] [--rounds N] [--quick] [--threads N]`: measure, print, append to the ledger."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shlex
import sys
import time
from pathlib import Path

from benchmarks import machine
from benchmarks.ledger import LEDGER, Settings, Table, append, section
from benchmarks.timing import Neighbors

BENCHMARKS = {  # name: module whose tables(settings) measures
    "training": "training_step",
    "optimizer": "optimizer_step",
    "memory": "memory",
    "compilation": "compilation",
    "prediction": "prediction",
    "inference": "inference",
    "growth": "growth",
    "loading": "loading",
    "bindings": "bindings",
    "processes": "processes",
    "eigenspace": "eigenspace",
    "per_example": "per_example",
    "sensitivity": "sensitivity",
    "leaving_out": "leaving_out",
    "linearized": "linearized",
    "language": "language",
    "perplexity": "perplexity",
    "merging": "merging",
    "adaptation": "adaptation",
    "retraining": "retraining",
}
LONG = ("leaving_out", "perplexity", "retraining")
"""Those of an hour or so, which must be asked for."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"which of {', '.join(BENCHMARKS)}; by default all but {', '.join(LONG)}"
    )
    parser.add_argument("--rounds", type=int, help="rounds a table, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="a few minutes: to see that everything runs; never appended")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--no-append", action="store_true", help="print only")
    asked = parser.parse_args()
    if stray := [name for name in asked.names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {stray[0]!r}; there are: {', '.join(BENCHMARKS)}")
    if asked.threads < 1 or (asked.rounds is not None and asked.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")
    return asked


def main() -> int:
    asked = arguments()
    names = asked.names or [name for name in BENCHMARKS if name not in LONG]
    keep = not (asked.quick or asked.no_append)
    plots = LEDGER.parent if keep else Path("runs") / "benchmarks"
    settings = Settings(asked.threads, asked.quick, asked.rounds, plots)
    commit, load, began = machine.commit(), os.getloadavg()[0], time.perf_counter()
    tables: list[Table] = []
    failed: list[str] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found = importlib.import_module(f"benchmarks.{BENCHMARKS[name]}").tables(settings)
        except Exception as error:  # the other benchmarks are worth having all the same
            failed.append(f"**{name} failed**: {error}")
            print(failed[-1], file=sys.stderr)
            continue
        tables += found
        print(*found, sep="\n", flush=True)

    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    title = f"{datetime.date.today()}, commit {commit}" + (" (QUICK: figures are not to be quoted)" if asked.quick else "")
    loaded = f"load average {load:.2f} before the first table{Neighbors.warning(load > Neighbors.BUSY_LOAD)}"
    about = [*machine.describe(asked.threads), f"`{command}`, {(time.perf_counter() - began) / 60:.1f} minutes", loaded, *failed]
    text = section(title, about, tables)
    print("\n" + text.split("\n### ")[0], *(["### " + text.split("\n### ")[1]] if tables else []), sep="\n")
    if keep and tables:
        append(text)
        print(f"appended to {LEDGER.relative_to(LEDGER.parents[1])}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
