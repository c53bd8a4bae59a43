"""Probabilities of classes against the true ones."""

import torch
from torch import Tensor

from .binning import calibration_error
from .checks import average, check_predictions, check_probabilities, wide
from .ranking import aurc, auroc


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
    probs = check_predictions(probs, labels)
    return average(probs.argmax(1) == labels)


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
    confidence, predicted = check_predictions(probs, labels).max(1)
    correct = predicted == labels
    return {
        "accuracy": accuracy(probs, labels).item(),
        "nll": nll(probs, labels).item(),
        "ece": calibration_error(probs, labels).item(),
        "brier": brier(probs, labels).item(),
        "auroc": auroc(confidence, correct).item(),
        "aurc": aurc(confidence, correct).item(),
    }
