"""What metrics may be asked of, and how wide they count."""

from collections.abc import Iterable

import torch
from torch import Tensor


def check_labels(labels: Tensor, examples: int, classes: int) -> None:
    """Refuse labels that do not fit outputs of shape (examples, classes).

    Args:
        labels: What should be integers in [0, classes), shape (examples,).
        examples: Number of rows of the outputs.
        classes: Number of columns of the outputs.

    Raises:
        ValueError: If the shape, the dtype or a value does not fit.
    """
    if labels.shape != (examples,):
        raise ValueError(f"labels must have shape ({examples},), one per example; got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, one class index per example; got {labels.dtype}")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"labels must lie in [0, {classes}); got {outside[0].item()}")


def check_predictions(probs: Tensor, labels: Tensor) -> Tensor:
    """The probabilities, in float32 or wider, once they and the labels are known to be sound."""
    if probs.ndim != 2:
        raise ValueError(f"probs must have shape (examples, classes); got {tuple(probs.shape)}")
    check_probabilities(probs)
    check_labels(labels, *probs.shape)
    return probs.detach().to(torch.promote_types(probs.dtype, torch.float32))


def check_probabilities(probs: Tensor) -> None:
    """Refuse what is no distribution in every row."""
    if probs.ndim == 0 or probs.numel() == 0:
        raise ValueError(f"probs must hold at least one distribution; got shape {tuple(probs.shape)}")
    if not probs.is_floating_point():
        raise ValueError(f"probs must be floating point; got {probs.dtype}")
    rounding = 1e-3 if probs.element_size() >= 4 else 2e-2
    lowest = probs.min().item()
    if lowest < -rounding:
        raise ValueError(f"probs must not be negative; got {lowest:.6g}; pass softmax(logits) if these are logits")
    total = probs.sum(-1, dtype=torch.float32)
    worst = total.flatten()[(total - 1).abs().argmax()].item()  # argmax finds a NaN before any number
    if not abs(worst - 1) <= rounding:
        raise ValueError(f"probs must sum to 1 in every row; got a row that sums to {worst:.6g}")


def check_scores(name: str, scores: Tensor, kind_name: str, kinds: Tensor) -> None:
    """Refuse scores and kinds that do not fit together."""
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name} must have shape (examples,) with at least one example; got {tuple(scores.shape)}")
    if kinds.shape != scores.shape:
        raise ValueError(f"{kind_name} must have the shape of {name}, {tuple(scores.shape)}; got {tuple(kinds.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name} must not be NaN; got {int(scores.isnan().sum())} NaN of {len(scores)}")
    other = kinds[(kinds != 0) & (kinds != 1)]
    if len(other):
        raise ValueError(f"{kind_name} must be booleans or 0 and 1; got {other[0].item()}")


def check_share(name: str, value: float) -> None:
    """Refuse what is no number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value!r}")


def known_names(metrics: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names, if all are known.

    Raises:
        ValueError: One is not.
    """
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if odd := [name for name in wanted if name not in set(known)]:
        raise ValueError(f"unknown metric {odd[0]!r}; take of {', '.join(known)}")
    return wanted


def check_numbers(mean: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted and true numbers, wide, once they are known to be sound.

    Raises:
        ValueError: If the shapes differ, a number is not finite or there is none.
    """
    if mean.shape != targets.shape or mean.numel() == 0:
        raise ValueError(f"mean and targets must have one shape, not empty; got {tuple(mean.shape)} and {tuple(targets.shape)}")
    for name, x in (("mean", mean), ("targets", targets)):
        if bad := int((~x.isfinite()).sum()):
            raise ValueError(f"{name} must be finite; {bad} of {x.numel()} numbers are not")
    return wide(mean), wide(targets).to(mean.device)


def width(x: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """The numbers in that dtype, without their graph."""
    return x.detach().to(width(x))


def average(x: Tensor) -> Tensor:
    """The mean of all numbers, shape ()."""
    return wide(x).mean()


def mean_over_ties(keys: Tensor, values: Tensor) -> Tensor:
    """Replace the values of equal neighbouring keys by their mean: the expected value under a random order of ties."""
    _, group, size = keys.unique_consecutive(return_inverse=True, return_counts=True)
    return (values.new_zeros(len(size)).index_add_(0, group, values) / size)[group]
