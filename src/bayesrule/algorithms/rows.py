"""A row of the table of algorithms: where its slots can be read, and what checks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from torch import Tensor

from ..rule import BayesRule


@dataclass(frozen=True)
class Row:
    """One algorithm: where its slots can be read, and the check against its twin."""

    algorithm: str
    rule: Callable[[], tuple[BayesRule, type]]
    rates: str
    twin: str
    difference: Callable[[], float]
    source: str

    def read(self) -> dict[str, Any]:
        """The row as a dict; the difference is computed now."""
        rule, family = self.rule()
        slots = {slot: type(getattr(rule, slot)).__name__ for slot in ("expectation", "curvature", "retraction")}
        difference = self.difference()
        return dict(
            algorithm=self.algorithm,
            family=family.__name__,
            **slots,
            rates=self.rates,
            twin=self.twin,
            difference=difference,
            source=self.source,
        )


def golden(name: str) -> dict[str, Any]:
    """Numbers that ship with the package: what published code and independent solvers gave."""
    text = resources.files(__package__).joinpath("golden.json").read_text()
    case: dict[str, Any] = json.loads(text)[name]
    return case


def largest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()
