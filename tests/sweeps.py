"""Sweeps over many rows, of which the default suite takes a few."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(rows: Iterable[Any], *default: Any) -> list[Any]:
    """The rows, plain values or what ``pytest.param`` made of an id; all but the default ones are left to ``make slow``."""
    named = {getattr(row, "id", row): row if hasattr(row, "id") else pytest.param(row, id=str(row)) for row in rows}
    assert set(default) <= set(named), f"no rows {set(default) - set(named)}"
    return [
        row if name in default else pytest.param(*row.values, id=row.id, marks=(*row.marks, pytest.mark.slow))
        for name, row in named.items()
    ]
