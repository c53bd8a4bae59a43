"""What a merger presumes of its models, checked while blocks go by: nothing is kept of them but sums and counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .methods import Method, Piece, bin_of, bits_of

SCALES = 1e3
"""Ratio of two models' median precisions from which they are thought to be of another scale."""
SAMPLED = 16
"""Every so many elements of a block count for the median."""
APART = 0.1
"""Cosine of a model and its base under which they are thought to have nothing in common."""


def check_names(base: Iterable[str], models: Mapping[str, Iterable[str]]) -> None:
    """That all hold tensors of the same names.

    Raises:
        ValueError: A model has another.
    """
    wanted = set(base)
    for model, names in models.items():
        if odd := wanted ^ set(names):
            has, lacks = (model, "base") if min(odd) not in wanted else ("base", model)
            raise ValueError(f"{min(odd)!r} is in {has!r} and not in {lacks!r}; models to merge have the same tensors")


def check_shape(name: str, base: Sequence[int], models: Mapping[str, Sequence[int]]) -> None:
    """That a tensor has one shape.

    Raises:
        ValueError: In a model it has another.
    """
    for model, shape in models.items():
        if list(shape) != list(base):
            raise ValueError(
                f"{name!r} is {list(base)} in base and {list(shape)} in {model!r}; models to merge have the same shapes"
            )


class Checks:
    """What is known of a merger while it goes on.

    Args:
        method: How it is merged.
        names: Of the models.
        alphas: Their weights.

    Example:
        >>> from .methods import METHODS, Place
        >>> method, base, task = (
        ...     METHODS["gradient_matching"],
        ...     Piece(torch.zeros(2), torch.ones(2)),
        ...     Piece(torch.ones(2), torch.ones(2) * 3),
        ... )
        >>> checks = Checks(method, ["toxic"], [-1.0])
        >>> checks.update(base, [task], method(base, [task], [-1.0], Place(0)))
        >>> checks.finish()
        Traceback (most recent call last):
        ValueError: removing 'toxic' leaves 2 of 2 precisions non-positive; ...
    """

    def __init__(self, method: Method, names: Sequence[str], alphas: Sequence[float]) -> None:
        self.method, self.names, self.alphas = method, tuple(names), tuple(alphas)
        self._count = self._bad = 0
        self._safe = math.inf  # factor of all alphas
        self._blame = [0.0] * len(self.names)
        self._scales = [torch.zeros(1 << 15, dtype=torch.int64) for _ in self.names]
        self._kinships = [torch.zeros(3, dtype=torch.float64) for _ in self.names]

    def update(self, base: Piece, models: Sequence[Piece], merged: Piece) -> None:
        """Take in a block: at least as many dimensions as the tensor has, up to two.

        Raises:
            ValueError: A model's precision is negative, or no number.
        """
        for name, model in zip(self.names, models, strict=True):
            if model.precision is not None:
                low, high = (end.item() for end in model.precision.aminmax())
                if not (low >= 0 and high < math.inf):
                    raise ValueError(f"the precision of {name!r} holds {low:.3g} to {high:.3g}; measure it again")
        if merged.precision is not None and base.precision is not None and not self.method.averages:
            self._see_signs(base.precision, models, merged.precision)
        for model, scale, kinship in zip(models, self._scales, self._kinships, strict=True):
            if model.precision is not None:
                some = model.precision.flatten()[::SAMPLED]
                scale += torch.bincount(bits_of(some[some > 0]) >> 16, minlength=1 << 15).cpu()
            if base.mean.dim() > 1:  # vectors, as of norms, begin alike in all models
                a, b = base.mean.flatten(), model.mean.flatten()
                kinship += torch.stack([a @ a, b @ b, a @ b]).cpu()

    def finish(self, stacklevel: int = 2) -> None:
        """:meth:`refuse` and :meth:`warn`."""
        self.refuse()
        self.warn(stacklevel + 1)

    def refuse(self) -> None:
        """Stop where a removal went too far.

        Raises:
            ValueError: Merged precisions are not positive.
        """
        if self._bad:
            raise ValueError(self._fault())

    def warn(self, stacklevel: int = 2) -> None:
        """Say what looks wrong.

        Warns:
            UserWarning: Precisions are of different scales, or a model is not fine-tuned from the base.
        """
        for message in [*self._of_scales(), *self._of_kinship()]:
            warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)

    def state(self) -> dict[str, Any]:
        """What was seen so far, as JSON has it."""
        tensors = {"scales": self._scales, "kinships": self._kinships}
        seen = {"count": self._count, "bad": self._bad, "safe": self._safe, "blame": self._blame}
        return seen | {key: [t.tolist() for t in each] for key, each in tensors.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._count, self._bad, self._safe, self._blame = (state[key] for key in ("count", "bad", "safe", "blame"))
        self._scales = [torch.tensor(each, dtype=torch.int64) for each in state["scales"]]
        self._kinships = [torch.tensor(each, dtype=torch.float64) for each in state["kinships"]]

    # Signs

    def _see_signs(self, anchor: Tensor, models: Sequence[Piece], merged: Tensor) -> None:
        self._count += merged.numel()
        loss = anchor - merged
        lost = loss > 0
        if not lost.any():
            return
        self._safe = min(self._safe, (anchor[lost] / loss[lost]).min().item())
        bad = lost & (merged <= 0)
        if found := int(bad.sum()):
            self._bad += found
            for t, (model, a) in enumerate(zip(models, self.alphas, strict=True)):
                if model.precision is not None:
                    self._blame[t] += float(a * (model.precision[bad] - anchor[bad]).sum())

    def _fault(self) -> str:
        worst = min(range(len(self.names)), key=lambda t: self._blame[t])
        name, alpha, factor = self.names[worst], self.alphas[worst], _under(self._safe)
        if alpha < 0:
            what, why = f"removing {name!r}", "its Hessian exceeds the total"
            remedy = "supply the precision of a base that has seen the task"
        else:
            what, why = f"adding {name!r}", "the base's precision exceeds its own"
            remedy = "give precisions that were both multiplied by their dataset sizes"
        found = f"{what} leaves {self._bad} of {self._count} precisions non-positive; {why}"
        if factor == 0:
            return f"{found}, and no smaller alpha would help: {remedy}"
        if len(self.names) == 1:
            return f"{found}. Lower alpha ({math.copysign(_under(self._safe * abs(alpha)), alpha):g} would be positive) or {remedy}"
        return f"{found}. Lower the alphas ({factor:g} times these would be positive) or {remedy}"

    # Scales

    def _of_scales(self) -> list[str]:
        medians = {name: _median(scale) for name, scale in zip(self.names, self._scales, strict=True) if scale.any()}
        if not medians:
            return []
        low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        ratio = medians[high] / medians[low]
        if ratio < SCALES:
            return []
        return [f"median precision of {high!r} is {ratio:.2g} x that of {low!r}; were both multiplied by their dataset size?"]

    def _of_kinship(self) -> list[str]:
        found = []
        for name, kinship in zip(self.names, self._kinships, strict=True):
            base, model, product = kinship.tolist()
            if base == 0 or model == 0:
                continue
            distance, cosine = math.sqrt(max(0.0, base + model - 2 * product) / base), product / math.sqrt(base * model)
            if distance > 1 and abs(cosine) < APART:
                found.append(
                    f"{name!r} has little to do with the base (relative distance {distance:.2g}, cosine {cosine:.2g}); was it "
                    "fine-tuned from another one? Then task vectors mean nothing"
                )
        return found


def _median(scale: Tensor) -> float:
    """Of counts by the upper bits of numbers in float32, to a hundredth."""
    number, _ = bin_of(scale, (int(scale.sum()) + 1) // 2)
    return torch.tensor(number << 16, dtype=torch.int32).view(torch.float32).item()


def _under(bound: float) -> float:
    """A number of three digits under a bound, by more than rounding."""
    if bound <= 0:
        return 0.0
    below = bound * (1 - 1e-6)
    unit = 10.0 ** (math.floor(math.log10(below)) - 2)
    return float(f"{math.floor(below / unit) * unit:.3g}")
