"""Every algorithm of the library: its slots, read off its own rule, and how far it is from its twin, computed when asked."""

from __future__ import annotations

from typing import Any

from . import inference_rows, optimizer_rows, published_rows

ROWS = [*optimizer_rows.ROWS, *published_rows.ROWS, *inference_rows.ROWS]


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
