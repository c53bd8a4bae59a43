"""Every algorithm of the library: its slots, read off its own rule, and how far it is from its twin, computed when asked."""

from __future__ import annotations

from typing import Any

from . import block_rows, inference_rows, optimizer_rows, published_rows

ROWS = [*optimizer_rows.ROWS, *published_rows.ROWS, *block_rows.ROWS, *inference_rows.ROWS]

BOUNDS = (1e-12, 1e-9, 1e-6, float("inf"))
HEAD = """# Every algorithm as an instance of the rule

Written by `make table`; `bayesrule table` computes it. The parts are read off the algorithm's own rule, and the family off what it
leaves behind; the other parts of EVON act in its basis. The difference is the largest from the twin, computed in float64.

"""


def table() -> list[dict[str, Any]]:
    """Every algorithm of the library as an instance of the rule.

    Costs a few seconds: each row runs the algorithm and its twin in float64.

    Returns:
        A list of dicts: algorithm, family, expectation, curvature, retraction, rates, twin, difference (the largest
        absolute difference to the twin), source.

    Example:
        >>> all(row["difference"] < 1e-6 for row in table())
        True
    """
    return [row.read() for row in ROWS]


def page() -> str:
    """The table as a page: with what holds on any machine, so that a difference is a bound of its size."""
    rows = table()
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys)]
    for row in rows:
        bound = next(bound for bound in BOUNDS if row["difference"] < bound)
        lines.append([f"< {bound:g}" if key == "difference" else row[key] for key in keys])
    return HEAD + "".join("| " + " | ".join(line) + " |\n" for line in lines)
