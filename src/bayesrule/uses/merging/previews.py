"""Previews of training on several tasks: what each weighting of them would come to, by merging and without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from ...drawing import whole_number
from ...posterior import Posterior
from .methods import method_of
from .mixtures import Mixtures
from .posteriors import Merger


class Point(NamedTuple):
    """One weighting."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    """As ``evaluate`` gave them."""
    on_front: bool
    """Whether no other weighting is better in one loss and as good in all."""


@dataclass(frozen=True)
class Preview:
    """What :func:`preview` found.

    Attributes:
        names: Of the tasks.
        points: In the order of the weights.
    """

    names: tuple[str, ...]
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front: weightings that no other is better than."""
        return tuple(point for point in self.points if point.on_front)


def preview(
    base: Posterior | None,
    posteriors: Sequence[Posterior],
    evaluate: Callable[[Posterior], Sequence[float]],
    alphas: Sequence[Sequence[float]] | None = None,
    *,
    method: str = "gradient_matching",
    prior_precision: float | None = None,
    names: Sequence[str] | None = None,
) -> Preview:
    """What weightings of several tasks would come to: posteriors are merged with each, and nothing is trained.

    Costs for each weighting a merger and what ``evaluate`` costs; memory for one merged posterior. Posteriors may be mixtures of
    several trainings of each task, at the cost of :func:`~bayesrule.merge_mixtures`.

    Args:
        base: As for :func:`~bayesrule.merge`.
        posteriors: One for each task, Gaussians or mixtures.
        evaluate: Losses of a merged posterior, one for each task, smaller is better.
        alphas: The weightings, a weight for each task in each; None is :func:`weightings`, in steps of a fifth.
        method: As for :func:`~bayesrule.merge`; mixtures are merged by "gradient_matching".
        prior_precision: As for :func:`~bayesrule.merge`.
        names: Of the tasks.

    Raises:
        ValueError: As for :func:`~bayesrule.merge`; or ``evaluate`` gives anything but a finite number for each task.

    Example:
        >>> import torch
        >>> base = Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)})
        >>> one = Posterior({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])})
        >>> two = Posterior({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])})
        >>> losses = lambda post: [float((post.mean["w"] - task.mean["w"]).square().sum()) for task in (one, two)]
        >>> found = preview(base, [one, two], losses, alphas=[(1, 0), (0.5, 0.5), (0, 1), (0, 0)])
        >>> [point.on_front for point in found.points]
        [True, True, True, False]
    """
    mixed = any("mixture" in posterior.structure for posterior in posteriors)
    if mixed and method != "gradient_matching":
        raise ValueError(f"mixtures are merged by 'gradient_matching', got method={method!r}")
    rule = method_of(method)
    if mixed:
        mixtures = Mixtures(base, posteriors, prior_precision=prior_precision, names=names)
        titles = mixtures.names
    else:
        merger = Merger(base, posteriors, rule, prior_precision=prior_precision, names=names)
        titles = merger.names
    found = []
    for number, one in enumerate(weightings(len(posteriors)) if alphas is None else alphas):
        weights = rule.weights(one, titles)
        merged = mixtures.merged(weights).posterior if mixed else merger(weights, warn=number == 0)
        losses = tuple(float(loss) for loss in evaluate(merged))
        if len(losses) != len(titles) or not all(map(math.isfinite, losses)):
            raise ValueError(f"evaluate must give a finite loss for each of {len(titles)} tasks, got {losses} for {tuple(one)}")
        found.append((tuple(float(a) for a in one), losses))
    return Preview(titles, tuple(Point(one, losses, not _is_beaten(losses, found)) for one, losses in found))


def weightings(tasks: int, steps: int = 5) -> list[tuple[float, ...]]:
    """All in multiples of 1 / steps of which the largest weight is 1: between each task alone and all of them in full.

    Example:
        >>> weightings(2, 2)
        [(0.0, 1.0), (0.5, 1.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
    """
    whole_number("tasks", tasks, 1)
    shares = range(whole_number("steps", steps, 1) + 1)
    return [tuple(share / steps for share in one) for one in product(shares, repeat=tasks) if max(one) == steps]


def _is_beaten(losses: Sequence[float], others: Sequence[tuple[object, Sequence[float]]]) -> bool:
    """Whether others hold something as good in all, and better in one."""
    return any(all(a <= b for a, b in zip(other, losses, strict=True)) and tuple(other) != tuple(losses) for _, other in others)
