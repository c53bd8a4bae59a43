"""What is known of each training example, and what follows for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..drawing import whole_number


@dataclass(frozen=True)
class Scores:
    """What is known of each of N examples, in the order of the data; on the CPU. K outputs each.

    Attributes:
        loss: Its loss, shape (N,).
        loo_loss: Its loss by a model trained without it: the leave-one-out loss, shape (N,).
        sensitivity: How much its own probabilities change, summed over them: the published score, shape (N,).
        self_influence: How much its own loss grows to first order, :math:`e^T V e`, shape (N,).
        cook: Cook's distance, the squared change of the weights in the posterior's metric by their number, shape (N,).
        leverage: How much of its own prediction it makes up, in the directions that mattered; 1 is all, shape (N,).
        correct: Whether it is named right, as 0 or 1, shape (N,); -1 where nothing is named.
        loo_correct: The same without it.
        deviation: The change of its outputs, shape (N, ...), or (N, 0) where an example has more than 1,024.
        probability_deviation: The change of its probabilities, likewise.
    """

    loss: Tensor
    loo_loss: Tensor
    sensitivity: Tensor
    self_influence: Tensor
    cook: Tensor
    leverage: Tensor
    correct: Tensor
    loo_correct: Tensor
    deviation: Tensor
    probability_deviation: Tensor

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def gap(self) -> Tensor:
        """The leave-one-out loss less the loss, shape (N,)."""
        return self.loo_loss - self.loss

    def by(self, score: str) -> Tensor:
        """One of the scores by its name, shape (N,).

        Raises:
            ValueError: There is no such score.
        """
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; there are {', '.join(map(repr, SCORES))}")
        found: Tensor = getattr(self, score)
        return found

    @classmethod
    def average(cls, several: Sequence[Scores]) -> Scores:
        """The mean of scores of the same examples, as under random augmentation."""
        if odd := [len(one.loss) for one in several if len(one.loss) != len(several[0].loss)]:
            raise ValueError(f"one pass gave {len(several[0].loss)} examples and another {odd[0]}")
        return cls(**{one.name: torch.stack([getattr(each, one.name) for each in several]).mean(0) for one in fields(cls)})


SCORES = ("loo_loss", "loss", "gap", "sensitivity", "self_influence", "cook", "leverage")


class LOOEstimate(NamedTuple):
    """What leave-one-out cross-validation would say."""

    nll: float
    """Mean of the leave-one-out losses, in nats."""
    accuracy: float
    """Share named right; NaN where nothing is named."""
    per_example: Tensor
    """Leave-one-out losses in the order of the data, shape (N,)."""
    train_nll: float
    """Mean of the losses with all examples."""


class Ranked(NamedTuple):
    """Examples from the most suspicious on."""

    indices: Tensor
    """Their numbers in the data, shape (k,)."""
    scores: Tensor
    """Shape (k,)."""


def ranked(scores: Tensor, k: int | None) -> Ranked:
    """Examples by a score, the largest first; None is all."""
    k = None if k is None else whole_number("k", k, 0, "; it is how many examples to name")
    found = scores.sort(descending=True, stable=True)
    return Ranked(found.indices[:k], found.values[:k])
