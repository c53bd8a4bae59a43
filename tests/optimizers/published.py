"""Trajectories of published implementations, with every random number that they drew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass
class Published:
    """One trajectory, and the problem that it is on, ready to be walked again."""

    name: str
    case: dict[str, Any]
    problem: dict[str, Any]
    params: dict[str, nn.Parameter] = field(init=False)
    waiting: list[dict[str, Any]] = field(default_factory=list)  # draws that were not asked for yet

    def __post_init__(self) -> None:
        self.dtype = getattr(torch, self.case["dtype"])
        self.tolerance = 1e-9 if self.dtype == torch.float64 else 1e-5
        self.params = {name: nn.Parameter(self.tensor(values)) for name, values in self.problem["init"].items()}

    @property
    def hyper(self) -> dict[str, Any]:
        return self.case["hyper"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.case["steps"]

    def tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=self.dtype)

    def rows(self, step: int) -> list[int]:
        return self.problem["batches"][step] if "batches" in self.problem else [0]

    def losses(self, rows: list[int]) -> Tensor:
        """The loss of each example."""
        if "A" in self.problem:
            gap = self.params["x"] - self.tensor(self.problem["c"])
            return (gap @ self.tensor(self.problem["A"]) @ gap / 2)[None]
        w = self.params
        hidden = torch.tanh(self.tensor(self.problem["x"])[rows] @ w["w1"].T + w["b1"])
        logits = (hidden @ w["w2"].T + w["b2"]).squeeze(-1)
        return binary_cross_entropy_with_logits(logits, self.tensor(self.problem["y"])[rows], reduction="none")

    def noise(self, param: Tensor) -> Tensor:
        """What the published code drew for a parameter, as the `noise=` of an optimizer."""
        name = next(name for name, p in self.params.items() if p is param)
        values = self.waiting[0].pop(name)
        if not self.waiting[0]:
            self.waiting.pop(0)
        return self.tensor(values)

    def hand(self, *draws: dict[str, Any]) -> None:
        """The next draws, each by parameter."""
        self.waiting += map(dict, draws)

    def check(self, found: Tensor, expected: object) -> None:
        torch.testing.assert_close(found.detach(), self.tensor(expected), rtol=self.tolerance, atol=self.tolerance)

    def check_params(self, expected: dict[str, Any]) -> None:
        for name, p in self.params.items():
            self.check(p, expected[name])


def published(*files: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, case and problem of every trajectory of some files."""
    for file in files:
        read = json.loads((GOLDEN / f"{file}.json").read_text())
        for case in read["cases"]:
            yield case["name"], case, read["problems"][case["problem"]]
