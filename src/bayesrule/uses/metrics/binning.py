"""Promise and truth of predictions, bin by bin of confidence."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .checks import check_predictions, mean_over_ties, wide


class Reliability(NamedTuple):
    """A reliability diagram: one entry per bin of confidence."""

    confidence: Tensor  # (bins,) mean confidence of the bin's examples; NaN in an empty bin
    accuracy: Tensor  # (bins,) share of them that is right; NaN in an empty bin
    count: Tensor  # type: ignore[assignment]  # (bins,) number of examples; hides tuple.count
    edges: Tensor  # (bins + 1,) borders of the bins


def reliability(
    probs: Tensor,
    labels: Tensor,
    bins: int = 15,
    closed: Literal["right", "left"] = "right",
    adaptive: bool = False,
) -> Reliability:
    """Mean confidence and accuracy of the examples in each bin of confidence.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).
        bins: Number of bins, at least 1.
        closed: ``"right"`` puts a confidence on a border into the lower bin, ``((b-1)/bins, b/bins]``; ``"left"``
            into the upper one. Adaptive bins do not use it.
        adaptive: Bins with equally many examples (up to one) instead of bins of equal width.

    Returns:
        Confidence, accuracy and count of every bin, and the borders.

    Raises:
        ValueError: As :func:`accuracy`, or if ``bins`` or ``closed`` is not one of the above.

    Example:
        >>> reliability(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), bins=2).count.tolist()
        [0, 2]

    Source: Niculescu-Mizil & Caruana (2005), Predicting good probabilities with supervised learning, section 4.
    """
    confidence, predicted = _checked(probs, labels, bins, closed).max(1)
    correct = predicted == labels
    if adaptive:
        totals, edges = equal_mass(confidence, correct, bins)
    else:
        totals, edges = equal_width(confidence, correct, bins, closed), _edges(confidence, bins)
    count, promised, kept = totals
    return Reliability(promised / count, kept / count, count.long(), wide(edges))


def equal_width(confidence: Tensor, correct: Tensor, bins: int, closed: Literal["right", "left"]) -> Tensor:
    """Of each bin of equal width the number of examples, and the sums of their confidences and of what is right, (..., 3, bins).

    Args:
        confidence: Numbers in [0, 1], shape (..., N).
        correct: Booleans or 0 and 1, shape (..., N).
        bins: Number of bins.
        closed: As in :func:`reliability`.
    """
    # With the inner borders alone, 0 falls into the first bin and 1 (or a rounding above it) into the last.
    index = torch.bucketize(confidence, _edges(confidence, bins)[1:-1], right=closed == "left")
    return _totals(index, confidence, wide(correct), bins)


def equal_mass(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The same sums of bins that hold equally many examples, up to one, shape (3, bins), and the borders, (bins + 1,)."""
    confidence, order = confidence.sort()
    right, examples = mean_over_ties(confidence, wide(correct)[order]), len(order)
    number = torch.arange(bins, device=order.device)
    starts = number * (examples // bins) + number.clamp_max(examples % bins)  # the longer bins first
    index = torch.searchsorted(starts, torch.arange(examples, device=order.device), right=True) - 1
    edges = torch.cat([confidence[starts.clamp_max(examples - 1)], confidence[-1:]])
    return _totals(index, confidence, right, bins), edges


def gap(totals: Tensor, norm: Literal["l1", "max"] = "l1") -> Tensor:
    """The calibration error that sums by bin, shape (..., 3, bins), come to; shape (...)."""
    count, promised, kept = totals.unbind(-2)
    if norm == "max":
        return ((kept - promised).abs() / count.clamp_min(1)).amax(-1)  # an empty bin has no gap
    return (kept - promised).abs().sum(-1) / count.sum(-1)


def _edges(confidence: Tensor, bins: int) -> Tensor:
    return torch.arange(bins + 1, dtype=confidence.dtype, device=confidence.device) / bins


def _totals(index: Tensor, confidence: Tensor, right: Tensor, bins: int) -> Tensor:
    parts = torch.stack([torch.ones_like(right), wide(confidence), right], -2)
    index = index.unsqueeze(-2).expand_as(parts)
    return parts.new_zeros((*parts.shape[:-1], bins)).scatter_add_(-1, index, parts)


def calibration_error(
    probs: Tensor,
    labels: Tensor,
    bins: int = 15,
    closed: Literal["right", "left"] = "right",
    norm: Literal["l1", "max"] = "l1",
    adaptive: bool = False,
) -> Tensor:
    r"""Expected calibration error (ECE): how far confidence and accuracy lie apart, averaged over bins of confidence.

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{acc}_b - \mathrm{conf}_b|

    ``norm="max"`` takes the largest gap of a bin instead (MCE), ``adaptive=True`` bins with equally many examples. Only
    figures with the same ``bins`` and ``closed`` can be compared: print them beside the number.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).
        bins: Number of bins, at least 1.
        closed: Which border belongs to a bin, as in :func:`reliability`.
        norm: ``"l1"`` for the mean gap, ``"max"`` for the largest.
        adaptive: Bins of equal mass instead of equal width.

    Returns:
        A number in [0, 1], shape ().

    Raises:
        ValueError: As :func:`reliability`, or if ``norm`` is not one of the above.

    Example:
        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1])).item(), 4)
        0.4

    Differs from: torchmetrics, whose bins are closed on the left; they differ for confidences on a border only.

    Source: Guo et al. (2017), On calibration of modern neural networks, section 2. arXiv:1706.04599.
    """
    if norm not in ("l1", "max"):
        raise ValueError(f"norm must be 'l1' or 'max'; got {norm!r}")
    if adaptive:
        confidence, predicted = _checked(probs, labels, bins, closed).max(1)
        return gap(equal_mass(confidence, predicted == labels, bins)[0], norm)
    return gap(bin_totals(probs, labels, bins, closed), norm)


def bin_totals(probs: Tensor, labels: Tensor, bins: int, closed: Literal["right", "left"]) -> Tensor:
    """The sums that :func:`calibration_error` needs, shape (3, bins); those of parts of the data add up."""
    confidence, predicted = _checked(probs, labels, bins, closed).max(1)
    return equal_width(confidence, predicted == labels, bins, closed)


def classwise_calibration_error(
    probs: Tensor, labels: Tensor, bins: int = 15, closed: Literal["right", "left"] = "right"
) -> Tensor:
    r"""Classwise ECE: the calibration error of the probability of each class by itself, averaged over the classes.

    .. math:: \frac1K \sum_k \sum_b \frac{n_{bk}}{N} \, |\mathrm{freq}_{bk} - \mathrm{conf}_{bk}|

    with bins of the probability :math:`p_k`, not of the largest one, and the frequency of the label k in them.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).
        bins: Number of bins, at least 1.
        closed: Which border belongs to a bin, as in :func:`reliability`.

    Returns:
        A number in [0, 1], shape (). With many classes most probabilities are near 0, and so is this: compare it for one K only.

    Raises:
        ValueError: As :func:`reliability`.

    Example:
        >>> round(classwise_calibration_error(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1])).item(), 4)
        0.4

    Source: Kull et al. (2019), Beyond temperature scaling, section 2. arXiv:1910.12656.
    """
    return gap(classwise_totals(probs, labels, bins, closed)).mean()


def classwise_totals(probs: Tensor, labels: Tensor, bins: int, closed: Literal["right", "left"]) -> Tensor:
    """The sums that :func:`classwise_calibration_error` needs, shape (K, 3, bins); those of parts of the data add up."""
    probs = _checked(probs, labels, bins, closed)
    is_label = labels == torch.arange(probs.shape[1], device=labels.device)[:, None]
    return equal_width(probs.T.contiguous(), is_label, bins, closed)


def _checked(probs: Tensor, labels: Tensor, bins: int, closed: str) -> Tensor:
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    if closed not in ("right", "left"):
        raise ValueError(f"closed must be 'right' or 'left'; got {closed!r}")
    return check_predictions(probs, labels)
