"""Walking published trajectories again: the same problem, the same random numbers, our optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..optimizers.optimizer import BayesOptimizer

DRAWN = ("eps", "u", "eps_eigen")
"""Under which names draws were published: unit normals, uniforms, unit normals in a basis."""


@dataclass
class Trajectory:
    """What a published implementation did on a problem of a few weights, with every random number that it drew.

    Args:
        case: Hyper-parameters, and for every step the draws and the state after it.
        problem: Data, batches and first weights: of a network with one output, or of a quadratic.
    """

    case: dict[str, Any]
    problem: dict[str, Any]
    params: dict[str, nn.Parameter] = field(init=False)
    waiting: list[dict[str, Any]] = field(default_factory=list)  # draws that were not asked for yet

    def __post_init__(self) -> None:
        self.dtype: torch.dtype = getattr(torch, self.case["dtype"])
        self.params = {name: nn.Parameter(self.tensor(values)) for name, values in self.problem["init"].items()}

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters by their published names."""
        hyper: dict[str, Any] = self.case["hyper"]
        return hyper

    def tensor(self, values: object) -> Tensor:
        """Numbers of the file."""
        return torch.tensor(values, dtype=self.dtype)

    def rows(self, step: int) -> list[int]:
        """The examples of a step."""
        rows: list[int] = self.problem["batches"][step] if "batches" in self.problem else [0]
        return rows

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The loss of each example."""
        w = self.params
        if "A" in self.problem:
            gap = w["x"] - self.tensor(self.problem["c"])
            return (gap @ self.tensor(self.problem["A"]) @ gap / 2)[None]
        hidden = torch.tanh(self.tensor(self.problem["x"])[rows] @ w["w1"].T + w["b1"])
        logits = (hidden @ w["w2"].T + w["b2"]).squeeze(-1)
        return binary_cross_entropy_with_logits(logits, self.tensor(self.problem["y"])[rows], reduction="none")

    def noise(self, param: Tensor) -> Tensor:
        """What was drawn for a parameter: the ``noise=`` of an optimizer."""
        name = next(name for name, p in self.params.items() if p is param)
        values = self.waiting[0].pop(name)
        if not self.waiting[0]:
            self.waiting.pop(0)
        return self.tensor(values)

    def walk(
        self, optimizer: BayesOptimizer, at_each: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Take the steps; after each what was published of it, and the mean loss.

        Args:
            optimizer: Ours.
            at_each: Called wherever a gradient is taken.
        """
        first = optimizer.param_groups[0]["lr"]
        for number, step in enumerate(self.case["steps"]):
            optimizer.param_groups[0]["lr"] = first * step.get("lr_factor", 1.0)
            drawn = step["eps"] if "eps" in step else [next((s[d] for d in DRAWN if d in s), None) for s in step.get("samples", ())]
            self.waiting += [dict(draw) for draw in drawn if draw]
            yield step, optimizer.step(self.closure(optimizer, step.get("sub_batches", [self.rows(number)]), at_each))

    def closure(
        self, optimizer: BayesOptimizer, parts: Sequence[Sequence[int]], at_each: Callable[[], None]
    ) -> Callable[..., Tensor]:
        """What the optimizer calls: with the losses of all examples, or their mean and its gradient."""

        def closure(part: int = 0) -> Tensor:
            at_each()
            losses = self.losses(parts[part])
            if optimizer.squares_examples:
                return losses
            optimizer.zero_grad()
            losses.mean().backward()
            return losses.detach().mean()

        return closure
