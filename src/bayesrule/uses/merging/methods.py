r"""Methods of merging, each a choice of precisions in one rule, on a block of one tensor.

Models :math:`\theta_t` were fine-tuned from an anchor :math:`\theta_0`. What task t added to it is a difference of natural
parameters, and weighted sums of these merge and remove,

.. math::  \Lambda = \Lambda_0 + \sum_t \alpha_t (\Lambda_t - \Lambda_0), \qquad \Lambda = (S \theta, S),

which for the mean is a sum of task vectors, each weighted by its share of the precision:

.. math::  \theta = \theta_0 + \sum_t \alpha_t \frac{S_t}{S} (\theta_t - \theta_0), \qquad
           S = S_0 + \sum_t \alpha_t (S_t - S_0).

==================  ======================================================================
gradient_matching   the precisions that the models have
fisher              the same, the weights shares that sum to 1; the anchor drops out
task_arithmetic     equal precisions: every share is 1
linear              equal precisions, the weights shares that sum to 1
ties                trimmed task vectors; precision 1 where one has the elected sign, else 0
dare_linear         task vectors of which a random part is kept and scaled up; equal precisions
dare_ties           the same; precisions as of ties
==================  ======================================================================

All is element by element, so a tensor may be merged in blocks: the result is the same bit by bit. Sums and products are separate
operations, as fused ones round otherwise at the end of a block.

Sources: N. Daheim, T. Moellenhoff, E. M. Ponti, I. Gurevych and M. E. Khan (2024), Model merging by uncertainty-based gradient
matching, arXiv:2310.12808; M. Matena and C. Raffel (2022), arXiv:2111.09832 (Fisher); G. Ilharco et al. (2023), arXiv:2212.04089
(task arithmetic); P. Yadav et al. (2023), arXiv:2306.01708 (TIES); L. Yu et al. (2024), arXiv:2311.03099 (DARE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from ...noise import DROPS, CounterNoise, Where
from ...vector import BLOCK, whole_blocks

FLOOR = 1e-12
"""Added to every precision of a share, so that where nothing is known shares are equal."""


_NONE = torch.zeros((), dtype=torch.int64)

CACHED = 1 << 16
"""Elements that are merged at once: they stay in a core's cache, so a large block takes half the time."""


class Piece(NamedTuple):
    """A block of one tensor of one model, in float32 or wider."""

    mean: Tensor
    precision: Tensor | None
    """Shaped like the mean, >= 0; None where it is not known."""


class Place(NamedTuple):
    """Where a block lies, and what a method knows of the whole tensor."""

    number: int
    """Of the tensor among those of the base, by sorted names."""
    start: int = 0
    """Number of the block's first element in the tensor, row by row."""
    thresholds: tuple[float, ...] = ()
    """The :func:`threshold` of each model's task vector; for methods that trim."""
    seed: int = 0
    """Which elements are dropped; for methods that drop."""


@final
@dataclass(frozen=True)
class Method:
    """A way to merge.

    Args:
        name: As in mergekit, where it has the method.
        needs_precision: Whether means are weighted by the precisions of the models; else these count as equal.
        averages: Whether the weights of the models are shares, that sum to 1 and leave nothing to the anchor.
        trims: Whether only the largest elements of a task vector are kept.
        drops: Whether random elements of a task vector are dropped, and those kept scaled up.
        elects: Whether models that disagree with the sign of the sum are left out, element by element.
        density: The part of the elements that is kept, in (0, 1].

    Example:
        >>> base, one, two = (Piece(torch.tensor([m, m]), torch.tensor([s, 1.0])) for m, s in ((0.0, 1.0), (1.0, 4.0), (2.0, 1.0)))
        >>> METHODS["gradient_matching"](base, [one, two], [1.0, 1.0], Place(0))
        Piece(mean=tensor([1.5000, 3.0000]), precision=tensor([4., 1.]))
        >>> METHODS["task_arithmetic"](base, [one], [-1.0], Place(0)).mean
        tensor([-1., -1.])
    """

    name: str
    needs_precision: bool = False
    averages: bool = False
    trims: bool = False
    drops: bool = False
    elects: bool = False
    density: float = 1.0

    def __call__(self, base: Piece, models: Sequence[Piece], alphas: Sequence[float], place: Place) -> Piece:
        """Merge a block.

        Args:
            base: The anchor. Its precision is not looked at by a method that averages.
            models: Of the same shape.
            alphas: A weight for each, as :meth:`weights` gives them. With 0 a model is not looked at.
            place: Of the block.

        Returns:
            The merged mean, and S where all precisions are known. S may be negative after a removal: see ``checks``.
        """
        pieces = [_each(piece, lambda t: t.reshape(-1)) for piece in (base, *models)]
        found: list[Piece] = []
        for at in range(0, max(1, base.mean.numel()), CACHED):
            anchor, *others = (_each(piece, lambda t, at=at: t[at : at + CACHED]) for piece in pieces)  # type: ignore[misc]
            found.append(self._merged(anchor, others, alphas, place._replace(start=place.start + at)))
        known = [piece.precision for piece in found if piece.precision is not None]
        mean = torch.cat([piece.mean for piece in found]).view_as(base.mean)
        return Piece(mean, torch.cat(known).view_as(mean) if known else None)

    def _merged(self, base: Piece, models: Sequence[Piece], alphas: Sequence[float], place: Place) -> Piece:
        """The same of few elements."""
        used = [(t, model, a) for t, (model, a) in enumerate(zip(models, alphas, strict=True)) if a != 0]
        weights = [a for _, _, a in used]
        given = [model.precision for _, model, _ in used]
        total = _total(base.mean.new_zeros(()) if self.averages else base.precision, given, weights)
        if self.needs_precision and total is None:
            raise ValueError(f"{self.name} needs the precisions of all models; give them, or choose method='task_arithmetic'")
        steps = [self._thinned(model.mean - base.mean, t, place) for t, model, _ in used]
        shares = self._shares(steps, weights, given, total)
        mean = base.mean.clone()
        for step, share in zip(steps, shares, strict=True):
            mean += step if isinstance(share, float) and share == 1 else step * share
        return Piece(mean, total)

    def weights(self, alphas: float | Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
        """The weight of each model: a number is that of all. Those of a method that averages are divided by their sum.

        Args:
            alphas: Any sign; those of a method that averages >= 0 and not all 0.
            names: Of the models, for messages.

        Raises:
            ValueError: There are others than models, or one is no such number.
        """
        found = [float(alphas)] * len(names) if isinstance(alphas, int | float) else [float(a) for a in alphas]
        if len(found) != len(names):
            raise ValueError(f"there are {len(names)} models and {len(found)} alphas; give one for each, or one number for all")
        for name, a in zip(names, found, strict=True):
            if not math.isfinite(a) or (self.averages and a < 0):
                wanted = f"a number >= 0 for {self.name!r}, which takes shares" if self.averages else "a finite number"
                raise ValueError(f"alpha of {name!r} must be {wanted}, got {a!r}")
        if not self.averages:
            return tuple(found)
        if sum(found) == 0:
            raise ValueError(f"the alphas of {self.name!r} are shares and must not all be 0, got {found}")
        return tuple(a / sum(found) for a in found)

    def _thinned(self, step: Tensor, model: int, place: Place) -> Tensor:
        """A task vector, of which a part is kept."""
        if self.trims:
            return step * (step.abs().float() >= place.thresholds[model])
        if self.drops:
            return step * (_uniform(step, model, place) < self.density) / self.density
        return step

    def _shares(
        self, steps: list[Tensor], alphas: list[float], given: Sequence[Tensor | None], total: Tensor | None
    ) -> Sequence[Tensor | float]:
        """What each task vector is multiplied by."""
        if self.elects:
            scaled = [step * a for step, a in zip(steps, alphas, strict=True)]
            sign = sum(scaled, torch.zeros(())).sign()
            agree = [(step * sign > 0).to(sign) for step in scaled]
            count = sum(agree, torch.zeros(())).clamp(min=1)
            return [s * a / count for s, a in zip(agree, alphas, strict=True)]
        if self.needs_precision and total is not None:
            floored = total + FLOOR
            return [(s + FLOOR) / floored * a for s, a in zip(given, alphas, strict=True) if s is not None]
        return alphas


METHODS = {
    method.name: method
    for method in (
        Method("gradient_matching", needs_precision=True),
        Method("fisher", needs_precision=True, averages=True),
        Method("task_arithmetic"),
        Method("linear", averages=True),
        Method("ties", trims=True, elects=True, density=0.2),
        Method("dare_linear", drops=True, density=0.5),
        Method("dare_ties", drops=True, elects=True, density=0.5),
    )
}


def method_of(name: str, density: float | None = None) -> Method:
    """A method by its name.

    Args:
        name: One of :data:`METHODS`.
        density: The part of the elements of a task vector that is kept, in (0, 1]; None is 0.2 for ties, as its authors advise
            where nothing is tuned, and 0.5 for dare.

    Raises:
        ValueError: There is no such method, it thins nothing, or the density is no such number.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    if density is None:
        return method
    if not (method.trims or method.drops):
        raise ValueError(f"{name} keeps all of a task vector and takes no density, got {density!r}; ties and dare do")
    if not 0 < density <= 1:
        raise ValueError(f"density is the part of a task vector that is kept and must be in (0, 1], got {density!r}")
    return replace(method, density=float(density))


def _each(piece: Piece, change: Callable[[Tensor], Tensor]) -> Piece:
    """Both tensors, changed."""
    return Piece(change(piece.mean), None if piece.precision is None else change(piece.precision))


def _total(anchor: Tensor | None, given: Sequence[Tensor | None], alphas: Sequence[float]) -> Tensor | None:
    """S, if all precisions are known."""
    total = anchor
    for s, a in zip(given, alphas, strict=True):
        if total is None or s is None or anchor is None:
            return None
        total = total + (s - anchor) * a
    return total


def onto(anchor: Tensor, precision: Tensor, prior: Tensor) -> Tensor:
    """The precision of a model trained under a prior of its own, as if from the anchor: S_0 takes the prior's place."""
    return precision + (anchor - prior)


def threshold(blocks: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The size of the smallest element among the largest of a tensor, exactly; equal ones are kept together.

    Costs two passes and 1 MiB: bits of sizes in float32 are in the order of the sizes, so the upper half of the bits is counted
    first, then the lower half of those that have the upper half of the one that is sought.

    Args:
        blocks: Gives the blocks of the tensor, as often as it is called.
        density: The part that is kept, in (0, 1]; at least one element.

    Example:
        >>> step = torch.tensor([0.5, -3.0, 2.0, -0.1])
        >>> threshold(lambda: step.split(2), density=0.5)
        2.0
    """
    upper = sum((torch.bincount(bits_of(block) >> 16, minlength=1 << 15) for block in blocks()), _NONE)
    count = int(upper.sum())
    if count == 0:
        return 0.0
    high, rank = bin_of(upper, max(1, int(density * count)))
    lower = sum((torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16) for bits in map(bits_of, blocks())), _NONE)
    low, _ = bin_of(lower, rank)
    return torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32).item()


def bits_of(block: Tensor) -> Tensor:
    """Of the sizes of elements in float32, as whole numbers in the order of the sizes, shape (n,)."""
    return block.flatten().abs().float().view(torch.int32)


def bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of a rank from the top, counted from 1, and its rank in the bin."""
    above = counts.flip(0).cumsum(0)
    number = int((above < rank).sum())
    return len(counts) - 1 - number, rank - (int(above[number - 1]) if number else 0)


def _uniform(like: Tensor, model: int, place: Place) -> Tensor:
    """A number in (0, 1) for each element, whatever the block it is in."""
    lead = place.start % BLOCK
    numbers = torch.arange(whole_blocks(lead + like.numel()) // 2, dtype=torch.int32, device=like.device)
    where = Where(numbers, (place.start - lead) // 2, torch.float32)
    flat = torch.empty(lead + like.numel(), device=like.device)
    drawn: Tensor = CounterNoise(place.seed, DROPS, step=place.number, draw=model, where=where).uniform(flat)
    return drawn[lead:].view(like.shape)
