"""One score for each example: does it tell two kinds apart, and which answers are right?"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import average, check_scores, mean_over_ties, wide, width


class RiskCoverage(NamedTuple):
    """The error among the most confident examples, as more and more of them are answered."""

    coverage: Tensor  # (N,) share of the examples that is answered: 1/N, 2/N, ..., 1
    risk: Tensor  # (N,) share of the answers that is wrong


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
    check_scores("scores", scores, "positives", positives)
    _, group, size = scores.unique(return_inverse=True, return_counts=True)
    twice_rank = (2 * size.cumsum(0) - size + 1)[group]
    chosen = positives.bool()
    positive = int(chosen.sum())
    pairs = positive * (len(scores) - positive)
    twice_won = int(twice_rank[chosen].sum()) - positive * (positive + 1)  # whole numbers, so nothing is rounded
    area = twice_won / (2 * pairs) if pairs else float("nan")
    return torch.tensor(area, dtype=width(scores), device=scores.device)


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
    check_scores("confidence", confidence, "correct", correct)
    confidence, order = confidence.sort(descending=True)
    wrong = mean_over_ties(confidence, 1 - wide(correct)[order])
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
    return average(risk_coverage(confidence, correct).risk)
