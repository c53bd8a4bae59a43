"""Scores that should be larger for data of a kind that was never learned, one number for each example."""

import torch
from torch import Tensor

from .checks import check_probabilities, wide


def max_probability(probs: Tensor) -> Tensor:
    """One minus the largest probability.

    Args:
        probs: Class probabilities, shape (..., K).

    Returns:
        Numbers in [0, 1 - 1/K], shape (...).

    Raises:
        ValueError: If rows do not sum to 1 or there are none.

    Example:
        >>> max_probability(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [0.5, 0.0]

    Source: Hendrycks & Gimpel (2017), A baseline for detecting misclassified and out-of-distribution examples. arXiv:1610.02136.
    """
    check_probabilities(probs)
    return 1 - wide(probs).amax(-1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Free energy :math:`-T \log \sum_k e^{z_k / T}` of the logits.

    Args:
        logits: Outputs before softmax, shape (..., K).
        temperature: T > 0.

    Returns:
        Numbers in nats, shape (...), of any sign.

    Raises:
        ValueError: If the temperature is not positive, or a logit is NaN.

    Example:
        >>> energy(torch.zeros(2, 4)).round(decimals=4).tolist()
        [-1.3863, -1.3863]

    Source: Liu et al. (2020), Energy-based out-of-distribution detection, section 3. arXiv:2010.03759.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be a number > 0; got {temperature!r}")
    if logits.isnan().any():
        raise ValueError(f"logits must not be NaN; got {int(logits.isnan().sum())} NaN of {logits.numel()}")
    return -temperature * torch.logsumexp(wide(logits) / temperature, -1)
