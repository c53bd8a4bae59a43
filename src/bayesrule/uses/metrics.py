r"""How good are predicted probabilities? Pure functions on tensors, on any device.

Everything takes class probabilities ``probs`` of shape (N, K) and integer ``labels`` of shape (N,), or one score per
example of shape (N,). Logarithms are natural, and averages run over the examples. Sums are taken in float64 (float32
on devices that have no float64), so a figure does not depend on the precision of the network.

The confidence of an example is its largest probability. Examples of equal confidence or score have no order of their
own; where an order is needed, the result is the mean over all orders, hence the same for every shuffling of the data.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """A reliability diagram: one entry per bin of confidence."""

    confidence: Tensor  # (bins,) mean confidence of the bin's examples; NaN in an empty bin
    accuracy: Tensor  # (bins,) share of them that is right; NaN in an empty bin
    count: Tensor  # type: ignore[assignment]  # (bins,) number of examples; hides tuple.count
    edges: Tensor  # (bins + 1,) borders of the bins


class RiskCoverage(NamedTuple):
    """The error among the most confident examples, as more and more of them are answered."""

    coverage: Tensor  # (N,) share of the examples that is answered: 1/N, 2/N, ..., 1
    risk: Tensor  # (N,) share of the answers that is wrong


def accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    """Share of the examples whose most probable class is the label; the first class wins a tie.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        A number in [0, 1], shape ().

    Raises:
        ValueError: If shapes disagree, labels are out of range, rows do not sum to 1 or there are no examples.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])).item()
        0.5
    """
    probs = _checked(probs, labels)
    return _mean(probs.argmax(1) == labels)


def nll(probs: Tensor, labels: Tensor) -> Tensor:
    r"""Negative log-likelihood: the mean of :math:`-\log p_y`, with :math:`p_y` at least the smallest normal float32.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        A number in [0, 87.4], in nats, shape ().

    Raises:
        ValueError: As :func:`accuracy`.

    Example:
        >>> round(nll(torch.tensor([[0.5, 0.5], [0.75, 0.25]]), torch.tensor([0, 1])).item(), 4)
        1.0397
    """
    probs = _checked(probs, labels)
    right = _wide(probs.gather(1, labels.long()[:, None]))
    return _mean(-right.clamp_min(torch.finfo(torch.float32).tiny).log())


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    r"""Brier score: the mean of :math:`\sum_k (p_k - 1[y = k])^2`, from 0 (best) to 2.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        A number in [0, 2], shape ().

    Raises:
        ValueError: As :func:`accuracy`.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1])).item()
        1.25

    Differs from: scikit-learn's binary score, which counts one class only and is half as large.

    Source: Brier (1950), Verification of forecasts expressed in terms of probability.
    """
    probs = _checked(probs, labels)
    errors = _wide(probs).clone()
    errors[torch.arange(len(labels), device=labels.device), labels.long()] -= 1
    return _mean(errors.square().sum(1))


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
    probs = _checked(probs, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    if closed not in ("right", "left"):
        raise ValueError(f"closed must be 'right' or 'left'; got {closed!r}")
    confidence, predicted = probs.max(1)
    right = _wide(predicted == labels)
    if adaptive:
        confidence, order = confidence.sort()
        right = _mean_over_ties(confidence, right[order])
        starts = _equal_mass_starts(len(labels), bins).to(probs.device)
        edges = torch.cat([confidence[starts.clamp_max(len(labels) - 1)], confidence[-1:]])
        index = torch.searchsorted(starts, torch.arange(len(labels), device=probs.device), right=True) - 1
    else:
        edges = torch.arange(bins + 1, dtype=probs.dtype, device=probs.device) / bins
        # With the inner borders alone, 0 falls into the first bin and 1 (or a rounding above it) into the last.
        index = torch.bucketize(confidence, edges[1:-1], right=closed == "left")
    ones = torch.ones_like(right)
    count, total, correct = (ones.new_zeros(bins).index_add_(0, index, x) for x in (ones, _wide(confidence), right))
    return Reliability(total / count, correct / count, count.long(), _wide(edges))


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


def entropy(probs: Tensor) -> Tensor:
    r"""Entropy :math:`-\sum_k p_k \log p_k` of each distribution: the total uncertainty of a prediction.

    Args:
        probs: Class probabilities, shape (..., K).

    Returns:
        Numbers in [0, log K], in nats, shape (...).

    Raises:
        ValueError: If rows do not sum to 1 or there are none.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    _check_probabilities(probs)
    return torch.special.entr(_wide(probs).clamp_min(0)).sum(-1)


def auroc(scores: Tensor, positives: Tensor) -> Tensor:
    r"""Area under the ROC curve: the chance that a positive scores higher than a negative, ties counted half.

    Computed from the ranks of the scores in :math:`O(N \log N)`, exactly: with mean ranks for ties,

    .. math:: \Big(\sum_{i \in P} \mathrm{rank}_i - \tfrac12 n_P (n_P + 1)\Big) \Big/ (n_P \, n_N)

    Args:
        scores: One score per example, larger for more likely positives, shape (N,).
        positives: Which examples are positive, booleans or 0 and 1, shape (N,).

    Returns:
        A number in [0, 1], shape (); NaN if all examples are positive or all are negative.

    Raises:
        ValueError: If shapes disagree, a score is NaN, ``positives`` holds another value or there are no examples.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True])).item()
        0.875

    Source: Hanley & McNeil (1982), The meaning and use of the area under a ROC curve. Radiology 143.
    """
    _check_scores("scores", scores, "positives", positives)
    _, group, size = scores.unique(return_inverse=True, return_counts=True)
    twice_rank = (2 * size.cumsum(0) - size + 1)[group]
    chosen = positives.bool()
    positive = int(chosen.sum())
    pairs = positive * (len(scores) - positive)
    twice_won = int(twice_rank[chosen].sum()) - positive * (positive + 1)  # whole numbers, so nothing is rounded
    area = twice_won / (2 * pairs) if pairs else float("nan")
    return torch.tensor(area, dtype=_width(scores), device=scores.device)


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """Risk-coverage curve: answer the most confident examples first and abstain on the rest.

    Args:
        confidence: One number per example, larger for those to answer first, shape (N,).
        correct: Which answers are right, booleans or 0 and 1, shape (N,).

    Returns:
        The N coverages 1/N, ..., 1 and the error among the examples answered at each.

    Raises:
        ValueError: If shapes disagree, a confidence is NaN, ``correct`` holds another value or there are no examples.

    Example:
        >>> risk_coverage(torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True])).risk.tolist()
        [0.0, 0.0, 0.0, 0.25]

    Source: Geifman & El-Yaniv (2017), Selective classification for deep neural networks. arXiv:1705.08500.
    """
    _check_scores("confidence", confidence, "correct", correct)
    confidence, order = confidence.sort(descending=True)
    wrong = _mean_over_ties(confidence, 1 - _wide(correct)[order])
    answered = torch.arange(1, len(wrong) + 1, device=wrong.device)
    return RiskCoverage(answered.to(wrong.dtype) / len(wrong), wrong.cumsum(0) / answered)


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve: the mean of its N risks; smaller is better.

    Args:
        confidence: One number per example, larger for those to answer first, shape (N,).
        correct: Which answers are right, booleans or 0 and 1, shape (N,).

    Returns:
        A number in [0, 1], shape (). With equal confidences throughout it is the error rate.

    Raises:
        ValueError: As :func:`risk_coverage`.

    Example:
        >>> aurc(torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True])).item()
        0.0625

    Source: Geifman, Uziel & El-Yaniv (2019), Bias-reduced uncertainty estimation. arXiv:1805.08206.
    """
    return _mean(risk_coverage(confidence, correct).risk)


def classification_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of a classifier at once, by the names that ``evaluate`` reports.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        ``accuracy``, ``nll``, ``ece`` (15 bins of equal width, closed on the right), ``brier``, ``auroc`` (how well the
        confidence separates right from wrong predictions; NaN if there is only one kind) and ``aurc``.

    Raises:
        ValueError: As :func:`accuracy`.

    Example:
        >>> metrics = classification_metrics(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> metrics["accuracy"], metrics["auroc"], metrics["aurc"]
        (0.5, 1.0, 0.25)
    """
    confidence, predicted = _checked(probs, labels).max(1)
    correct = predicted == labels
    return {
        "accuracy": accuracy(probs, labels).item(),
        "nll": nll(probs, labels).item(),
        "ece": calibration_error(probs, labels).item(),
        "brier": brier(probs, labels).item(),
        "auroc": auroc(confidence, correct).item(),
        "aurc": aurc(confidence, correct).item(),
    }


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


def _checked(probs: Tensor, labels: Tensor) -> Tensor:
    """The probabilities, in float32 or wider, once they and the labels are known to be sound."""
    if probs.ndim != 2:
        raise ValueError(f"probs must have shape (examples, classes); got {tuple(probs.shape)}")
    _check_probabilities(probs)
    check_labels(labels, *probs.shape)
    return probs.detach().to(torch.promote_types(probs.dtype, torch.float32))


def _check_probabilities(probs: Tensor) -> None:
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


def _check_scores(name: str, scores: Tensor, kind_name: str, kinds: Tensor) -> None:
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name} must have shape (examples,) with at least one example; got {tuple(scores.shape)}")
    if kinds.shape != scores.shape:
        raise ValueError(f"{kind_name} must have the shape of {name}, {tuple(scores.shape)}; got {tuple(kinds.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name} must not be NaN; got {int(scores.isnan().sum())} NaN of {len(scores)}")
    other = kinds[(kinds != 0) & (kinds != 1)]
    if len(other):
        raise ValueError(f"{kind_name} must be booleans or 0 and 1; got {other[0].item()}")


def _width(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(_width(x))


def _mean(x: Tensor) -> Tensor:
    return _wide(x).mean()


def _mean_over_ties(keys: Tensor, values: Tensor) -> Tensor:
    """Replace the values of equal neighbouring keys by their mean: the expected value under a random order of ties."""
    _, group, size = keys.unique_consecutive(return_inverse=True, return_counts=True)
    return (values.new_zeros(len(size)).index_add_(0, group, values) / size)[group]


def _equal_mass_starts(examples: int, bins: int) -> Tensor:
    """First example of each of ``bins`` runs whose lengths differ by at most one, the longer runs first."""
    number = torch.arange(bins)
    return number * (examples // bins) + number.clamp_max(examples % bins)
