"""One score for each example: does it tell two kinds apart, and which answers are right?"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import average, check_scores, check_share, mean_over_ties, wide, width


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


def aupr(scores: Tensor, positives: Tensor) -> Tensor:
    r"""Area under the precision-recall curve, as average precision: equal scores are one step of the curve.

    .. math:: \sum_n (R_n - R_{n-1}) \, P_n

    over the distinct scores from the largest down, with precision P and recall R of what scores at least as much.

    Args:
        scores: One score per example, larger for more likely positives, shape (N,).
        positives: Which examples are positive, booleans or 0 and 1, shape (N,).

    Returns:
        A number in (0, 1], shape (); guessing gives the share of positives. NaN if there are none.

    Raises:
        ValueError: As :func:`auroc`.

    Example:
        >>> round(aupr(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True])).item(), 4)
        0.8333
    """
    check_scores("scores", scores, "positives", positives)
    _, hits, taken = from_the_top(scores, positives)
    steps = hits.diff(prepend=hits.new_zeros(1))
    return (steps * hits / taken).sum() / hits[-1]


def fpr_at_tpr(scores: Tensor, positives: Tensor, tpr: float = 0.95) -> Tensor:
    """Share of the negatives that are taken for positives where at least so large a share of the positives is found (FPR95).

    Args:
        scores: One score per example, larger for more likely positives, shape (N,).
        positives: Which examples are positive, booleans or 0 and 1, shape (N,). To judge the detection of unknown data, these
            are the unknown ones.
        tpr: Share of the positives to find, in (0, 1].

    Returns:
        A number in [0, 1], shape (), smaller is better; NaN if all examples are of one kind.

    Raises:
        ValueError: As :func:`auroc`, or ``tpr`` is no share.

    Example:
        >>> fpr_at_tpr(torch.tensor([0.1, 0.4, 0.3, 0.8]), torch.tensor([False, False, True, True])).item()
        0.5

    Source: as FPR95 in Hendrycks, Mazeika & Dietterich (2019), Deep anomaly detection with outlier exposure. arXiv:1812.04606.
    """
    check_share("tpr", tpr)
    check_scores("scores", scores, "positives", positives)
    _, hits, taken = from_the_top(scores, positives)
    false, enough = taken - hits, hits / hits[-1] >= tpr
    return (false / false[-1])[enough].amin() if enough.any() else false[-1] * float("nan")


def ood_metrics(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """How well a score tells unknown data from known data.

    Args:
        known: Scores of the known data, larger for what looks unknown, such as the predictive entropy; shape (N,).
        unknown: Scores of the unknown data, shape (M,).

    Returns:
        ``auroc_ood``; ``aupr_out``, with the unknown as positives; ``aupr_in``, with the known as positives, by the negated score;
        ``fpr95``, the share of the known that is flagged where 95 % of the unknown are.

    Raises:
        ValueError: If a score is NaN, or one of the two is empty.

    Example:
        >>> ood_metrics(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.9]))
        {'auroc_ood': 1.0, 'aupr_in': 1.0, 'aupr_out': 1.0, 'fpr95': 0.0}
    """
    for name, scores in (("known", known), ("unknown", unknown)):
        check_scores(name, scores, "scores", torch.ones_like(scores))
    scores = torch.cat([known, unknown])
    flagged = torch.arange(len(scores), device=scores.device) >= len(known)
    found = auroc(scores, flagged), aupr(-scores, ~flagged), aupr(scores, flagged), fpr_at_tpr(scores, flagged)
    return {name: value.item() for name, value in zip(("auroc_ood", "aupr_in", "aupr_out", "fpr95"), found, strict=True)}


def from_the_top(scores: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct scores from the largest down, and how many positives and how many examples score at least as much."""
    scores, order = scores.sort(descending=True)
    values, size = scores.unique_consecutive(return_counts=True)
    taken = size.cumsum(0)
    return values, wide(positives)[order].cumsum(0)[taken - 1], wide(taken)


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


def eaurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Excess AURC: what :func:`aurc` has over an oracle's that answers all right ones first; 0 is a perfect order.

    Args:
        confidence: One number per example, larger for those to answer first, shape (N,).
        correct: Which answers are right, booleans or 0 and 1, shape (N,).

    Returns:
        A number in [0, 1), shape (). Unlike AURC it does not reward fewer errors, only a better order.

    Raises:
        ValueError: As :func:`risk_coverage`.

    Example:
        >>> eaurc(torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True])).item()
        0.0

    Source: Geifman, Uziel & El-Yaniv (2019), Bias-reduced uncertainty estimation, section 3. arXiv:1805.08206.
    """
    return aurc(confidence, correct) - aurc(wide(correct), correct)


def coverage_at_risk(confidence: Tensor, correct: Tensor, risk: float = 0.05) -> Tensor:
    """The largest share of the examples that can be answered, most confident first, with at most so large a share wrong.

    Args:
        confidence: One number per example, larger for those to answer first, shape (N,).
        correct: Which answers are right, booleans or 0 and 1, shape (N,).
        risk: Share of wrong answers that is borne, in [0, 1].

    Returns:
        A number in [0, 1], shape (); 0 where even the surest answers are wrong too often.

    Raises:
        ValueError: As :func:`risk_coverage`, or ``risk`` is no share.

    Example:
        >>> coverage_at_risk(torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True]), risk=0.2).item()
        0.75

    Differs from: torch-uncertainty, which gives NaN where no coverage is possible.
    """
    check_share("risk", risk)
    curve = risk_coverage(confidence, correct)
    return torch.where(curve.risk <= risk + 1e-12, curve.coverage, 0).max()  # sums over ties are rounded
