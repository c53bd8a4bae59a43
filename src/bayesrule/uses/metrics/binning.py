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
    probs = check_predictions(probs, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    if closed not in ("right", "left"):
        raise ValueError(f"closed must be 'right' or 'left'; got {closed!r}")
    confidence, predicted = probs.max(1)
    right = wide(predicted == labels)
    if adaptive:
        confidence, order = confidence.sort()
        right = mean_over_ties(confidence, right[order])
        starts = _equal_mass_starts(len(labels), bins).to(probs.device)
        edges = torch.cat([confidence[starts.clamp_max(len(labels) - 1)], confidence[-1:]])
        index = torch.searchsorted(starts, torch.arange(len(labels), device=probs.device), right=True) - 1
    else:
        edges = torch.arange(bins + 1, dtype=probs.dtype, device=probs.device) / bins
        # With the inner borders alone, 0 falls into the first bin and 1 (or a rounding above it) into the last.
        index = torch.bucketize(confidence, edges[1:-1], right=closed == "left")
    ones = torch.ones_like(right)
    count, total, correct = (ones.new_zeros(bins).index_add_(0, index, x) for x in (ones, wide(confidence), right))
    return Reliability(total / count, correct / count, count.long(), wide(edges))


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
    bin_ = reliability(probs, labels, bins, closed, adaptive)
    gap = (bin_.accuracy - bin_.confidence).abs().nan_to_num(0.0)  # an empty bin has no gap
    return gap.max() if norm == "max" else (gap * bin_.count).sum() / bin_.count.sum()


def _equal_mass_starts(examples: int, bins: int) -> Tensor:
    """First example of each of ``bins`` runs whose lengths differ by at most one, the longer runs first."""
    number = torch.arange(bins)
    return number * (examples // bins) + number.clamp_max(examples % bins)
