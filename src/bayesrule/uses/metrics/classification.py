"""Probabilities of classes against the true ones."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from .binning import calibration_error, classwise_calibration_error
from .checks import average, check_predictions, check_probabilities, known_names, wide
from .ranking import aurc, auroc, coverage_at_risk, eaurc


def accuracy(probs: Tensor, labels: Tensor, top_k: int = 1) -> Tensor:
    """Share of the examples whose label is the most probable class, or among the ``top_k``; the first class wins a tie.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).
        top_k: How many answers may be given, from 1 to K.

    Returns:
        A number in [0, 1], shape ().

    Raises:
        ValueError: If shapes disagree, labels are out of range, rows do not sum to 1, there are no examples, or K are fewer
            than ``top_k``.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])).item()
        0.5
    """
    probs = check_predictions(probs, labels)
    if not 1 <= top_k <= probs.shape[1]:
        raise ValueError(f"top_k must lie between 1 and the number of classes, {probs.shape[1]}; got {top_k}")
    if top_k == 1:
        return average(probs.argmax(1) == labels)
    number = labels.long()[:, None]
    own, place = probs.gather(1, number), torch.arange(probs.shape[1], device=probs.device)
    before = (probs > own) | ((probs == own) & (place < number))
    return average(before.sum(1) < top_k)


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
    probs = check_predictions(probs, labels)
    right = wide(probs.gather(1, labels.long()[:, None]))
    return average(-right.clamp_min(torch.finfo(torch.float32).tiny).log())


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
    probs = check_predictions(probs, labels)
    errors = wide(probs).clone()
    errors[torch.arange(len(labels), device=labels.device), labels.long()] -= 1
    return average(errors.square().sum(1))


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
    check_probabilities(probs)
    return torch.special.entr(wide(probs).clamp_min(0)).sum(-1)


STANDARD = ("accuracy", "nll", "ece", "brier", "auroc", "aurc")
"""What is measured of a classifier unless something else is asked for."""

CLASSIFICATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": accuracy,
    "top5_accuracy": partial(accuracy, top_k=5),
    "nll": nll,
    "brier": brier,
    "ece": calibration_error,
    "adaptive_ece": partial(calibration_error, adaptive=True),
    "classwise_ece": classwise_calibration_error,
    "mce": partial(calibration_error, norm="max"),
    "auroc": lambda probs, labels: auroc(*_answers(probs, labels)),
    "aurc": lambda probs, labels: aurc(*_answers(probs, labels)),
    "eaurc": lambda probs, labels: eaurc(*_answers(probs, labels)),
    "coverage_at_1_risk": lambda probs, labels: coverage_at_risk(*_answers(probs, labels), risk=0.01),
    "coverage_at_5_risk": lambda probs, labels: coverage_at_risk(*_answers(probs, labels), risk=0.05),
}
"""Figures of a classifier by name; those at a risk are at so many percent of wrong answers."""


def classification_metrics(probs: Tensor, labels: Tensor, metrics: Iterable[str] = STANDARD) -> dict[str, float]:
    """Several metrics of a classifier at once, by the names that ``evaluate`` reports.

    Args:
        probs: Class probabilities, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).
        metrics: Names, of those of ``CLASSIFICATION``.

    Returns:
        Unless others are asked for: ``accuracy``, ``nll``, ``ece`` (15 bins of equal width, closed on the right), ``brier``,
        ``auroc`` (how well the confidence separates right from wrong predictions; NaN if there is only one kind) and ``aurc``.

    Raises:
        ValueError: As :func:`accuracy`, or a name is unknown.

    Example:
        >>> metrics = classification_metrics(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> metrics["accuracy"], metrics["auroc"], metrics["aurc"]
        (0.5, 1.0, 0.25)
    """
    wanted = known_names(metrics, CLASSIFICATION)
    check_predictions(probs, labels)
    return {name: CLASSIFICATION[name](probs, labels).item() for name in wanted}


def _answers(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence in each answer, and whether it is right."""
    confidence, predicted = check_predictions(probs, labels).max(1)
    return confidence, predicted == labels
