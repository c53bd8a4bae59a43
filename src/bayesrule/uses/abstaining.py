"""Say less than one sure answer: sets of classes that hold the true one as often as promised, or no answer where it is risky."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .metrics.checks import check_labels, check_predictions, check_probabilities, check_scores, check_share, wide
from .metrics.ranking import from_the_top

Score = Literal["lac", "aps"]


def conformity_scores(probs: Tensor, score: Score = "lac", uniform: Tensor | None = None) -> Tensor:
    r"""How little each class conforms to a prediction; sets take the classes of small scores.

    Least ambiguous sets ("lac") take :math:`1 - p_k`. Adaptive ones ("aps") the probability of all more probable classes and of
    this one, :math:`\sum_{j: p_j > p_k} p_j + u \, p_k`: larger sets where the model is unsure, the same promise for all.

    Args:
        probs: Class probabilities, shape (N, K).
        score: "lac" or "aps".
        uniform: u in [0, 1] for each example, shape (N,), of "aps" only; None is 1.

    Returns:
        Scores in [0, 1], shape (N, K).

    Raises:
        ValueError: Unknown score, or rows that are no distributions.

    Example:
        >>> conformity_scores(torch.tensor([[0.5, 0.25, 0.25]]), "aps").tolist()
        [[0.5, 0.75, 1.0]]

    Source: Sadinle, Lei & Wasserman (2019), arXiv:1609.00451, for "lac"; Romano, Sesia & Candès (2020),
        arXiv:2006.02544, for "aps".
    """
    if score not in ("lac", "aps"):
        raise ValueError(f"unknown score {score!r}; take 'lac' or 'aps'")
    check_probabilities(probs)
    if probs.ndim != 2:
        raise ValueError(f"probs must have shape (examples, classes); got {tuple(probs.shape)}")
    p = wide(probs)
    if score == "lac":
        return 1 - p
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    own = ordered if uniform is None else ordered * wide(uniform).to(p.device)[:, None]
    return torch.zeros_like(p).scatter_(1, order, ordered.cumsum(1) - ordered + own)


def conformal_quantile(scores: Tensor, level: float) -> float:
    r"""The score that a new one exceeds with probability at most 1 - level, if it comes from where these do.

    The :math:`\lceil (n + 1) \, \mathrm{level} \rceil`-th smallest of n; inf where that is more than n.

    Args:
        scores: Of the true classes of examples that were not learned from, shape (n,).
        level: The promise, in [0, 1].

    Raises:
        ValueError: A score is NaN, there are none, or ``level`` is no share.

    Example:
        >>> conformal_quantile(torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.6), conformal_quantile(torch.tensor([0.1, 0.2]), 0.9)
        (0.30000001192092896, inf)

    Source: Vovk, Gammerman & Shafer (2005), Algorithmic learning in a random world.
    """
    check_share("level", level)
    if scores.ndim != 1 or not len(scores) or scores.isnan().any():
        raise ValueError(f"scores must be numbers of shape (examples,), at least one; got {tuple(scores.shape)}")
    number = math.ceil((len(scores) + 1) * level - 1e-9)  # 0.7 x 10 is not more than 7
    return math.inf if number > len(scores) else scores.kthvalue(max(number, 1)).values.item()


class ConformalSets:
    """Sets of classes that hold the true one with at least a given probability, whatever the model is worth.

    The promise is of examples that come from where those of :meth:`fit` do, and on average over them: not for each class or group.

    Args:
        level: The probability, in (0, 1); 0.9 is "the truth is missing in one of ten".
        score: "lac" for the smallest sets on average, if the probabilities are right, "aps" for sets that grow with doubt; see
            :func:`conformity_scores`.
        seed: Of the uniform numbers u of "aps", as it was published; None does without, u = 1.

    Attributes:
        threshold: Of scores in the set; None before :meth:`fit`.

    Raises:
        ValueError: ``level`` is no probability, or the score is unknown.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]])
        >>> sets = ConformalSets(level=0.75).fit(probs, torch.tensor([0, 0, 0, 1]))
        >>> sets(torch.tensor([[0.95, 0.05], [0.5, 0.5]])).tolist()
        [[True, False], [True, True]]

    Source: Angelopoulos & Bates (2021), A gentle introduction to conformal prediction. arXiv:2107.07511.
    """

    def __init__(self, level: float = 0.9, score: Score = "lac", seed: int | None = None) -> None:
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level!r}")
        if score not in ("lac", "aps"):
            raise ValueError(f"unknown score {score!r}; take 'lac' or 'aps'")
        self.level, self.score, self.threshold = level, score, None
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    threshold: float | None

    def fit(self, probs: Tensor, labels: Tensor) -> ConformalSets:
        """Set the threshold by examples that played no part in training, nor in the choice of a temperature.

        Args:
            probs: Class probabilities, shape (N, K).
            labels: True classes, shape (N,).
        """
        check_predictions(probs, labels)
        scores = self._scores(probs).gather(1, labels.long()[:, None])[:, 0]
        self.threshold = conformal_quantile(scores, self.level)
        return self

    def __call__(self, probs: Tensor) -> Tensor:
        """Which classes are in the set of each prediction, booleans of shape (N, K); a set may be empty.

        Raises:
            ValueError: Before :meth:`fit`.
        """
        if self.threshold is None:
            raise ValueError("the sets have no threshold yet; fit(probs, labels) sets it on validation data")
        return self._scores(probs) <= self.threshold

    def _scores(self, probs: Tensor) -> Tensor:
        drawn = None if self._random is None else torch.rand(len(probs), generator=self._random, dtype=torch.float64)
        return conformity_scores(probs, self.score, drawn)


def set_metrics(sets: Tensor, labels: Tensor) -> dict[str, float]:
    """How good sets of classes are.

    Args:
        sets: Booleans, shape (N, K).
        labels: True classes, shape (N,).

    Returns:
        ``coverage``, the share of sets that hold the true class; ``size``, their mean size; ``single``, the share that names one.

    Raises:
        ValueError: If shapes disagree or labels are out of range.

    Example:
        >>> set_metrics(torch.tensor([[True, False], [True, True]]), torch.tensor([1, 1]))
        {'coverage': 0.5, 'size': 1.5, 'single': 0.5}
    """
    if sets.ndim != 2 or not sets.numel() or sets.dtype != torch.bool:
        raise ValueError(f"sets must be booleans of shape (examples, classes), not empty; got {sets.dtype} {tuple(sets.shape)}")
    check_labels(labels, *sets.shape)
    sizes = wide(sets).sum(1)
    held = sets.gather(1, labels.long()[:, None])
    return {"coverage": wide(held).mean().item(), "size": sizes.mean().item(), "single": wide(sizes == 1).mean().item()}


def selective_threshold(confidence: Tensor, correct: Tensor, risk: float) -> float:
    """The confidence from which on to answer, so that at most so large a share of the answers is wrong on these data.

    The lowest such confidence, hence the most answers. On new data the risk is near it, not under it for certain: with n answers
    it scatters by about sqrt(risk / n).

    Args:
        confidence: One number for each validation example, shape (N,).
        correct: Which answers are right, booleans or 0 and 1, shape (N,).
        risk: Share of wrong answers that is borne, in [0, 1].

    Returns:
        The threshold: answer where ``confidence >= threshold``; inf where no threshold has so small a risk.

    Raises:
        ValueError: If shapes disagree, a confidence is NaN, ``correct`` holds another value, there are no examples, or ``risk``
            is no share.

    Example:
        >>> selective_threshold(torch.tensor([0.9, 0.6, 0.8, 0.7]), torch.tensor([True, False, True, True]), risk=0.1)
        0.699999988079071

    Source: Geifman & El-Yaniv (2017), Selective classification for deep neural networks. arXiv:1705.08500.
    """
    check_share("risk", risk)
    check_scores("confidence", confidence, "correct", correct)
    values, right, answered = from_the_top(confidence, correct)
    able = values[(answered - right) / answered <= risk]
    return able.min().item() if len(able) else math.inf
