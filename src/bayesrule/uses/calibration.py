"""Make probabilities honest after training: one temperature for all logits."""

import math
import warnings

from torch import Tensor

from .metrics import check_labels

_LIMIT = 1e4  # temperatures are sought in [1 / _LIMIT, _LIMIT]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature T > 0 whose probabilities ``softmax(logits / T)`` have the smallest NLL.

    The baseline that every Bayesian method has to face: one number fitted on validation data, no change of accuracy.
    It costs some ten passes over the logits, in float64 on the CPU, and always gives the same answer.

    .. math:: \min_T \; \frac1N \sum_i -\log \mathrm{softmax}(z_i / T)_{y_i}

    The NLL is convex in :math:`1/T`, with slope :math:`E_p[z] - z_y` and curvature :math:`\mathrm{Var}_p[z]`. The root
    of the slope is found by Newton's method in :math:`\log(1/T)`, inside a bracket that halves wherever Newton leaves.

    Args:
        logits: Outputs for the validation examples, before softmax, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        The temperature, dimensionless: above 1 where the network is too sure, below 1 where it is not sure enough.

    Raises:
        ValueError: If shapes disagree, labels are out of range, a logit is not finite or there are no examples.

    Warns:
        UserWarning: If no temperature in [1e-4, 1e4] is the best, as when every example is right or the logits are no
            better than chance; the nearer limit is returned.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 0, 1])  # as sure as sigmoid(2) = 0.88, but right in 0.75
        >>> round(fit_temperature(logits, labels), 4)
        1.8205

    Source: Guo et al. (2017), On calibration of modern neural networks, section 4.2. arXiv:1706.04599.
    """
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have shape (examples, classes), neither empty; got {tuple(logits.shape)}")
    check_labels(labels, *logits.shape)
    z = logits.detach().cpu().double()
    if not z.isfinite().all():
        raise ValueError(f"logits must be finite; got {z[~z.isfinite()][0].item()}")
    z = z - z.amax(1, keepdim=True)  # also keeps the largest logits exact
    label = z.gather(1, labels.cpu().long()[:, None])

    def slope(u: float) -> tuple[float, float]:  # of the NLL in 1/T = exp(u), and how it changes with u
        p = (z * math.exp(u)).softmax(1)
        expected = (p * z).sum(1, keepdim=True)
        variance = (p * (z - expected).square()).sum(1)
        return (expected - label).mean().item(), variance.mean().item() * math.exp(u)

    high = math.log(_LIMIT)
    low = -high
    for end, beyond in ((low, slope(low)[0] >= 0), (high, slope(high)[0] <= 0)):
        if beyond:
            temperature = math.exp(-end)
            cause = "the logits are no better than chance" if end < 0 else "every example is classified right"
            warnings.warn(
                f"the NLL has no minimum at a temperature in [{1 / _LIMIT:g}, {_LIMIT:g}], as when {cause}; "
                f"using {temperature:g}; check the validation data",
                stacklevel=2,
            )
            return temperature
    u = 0.0
    for _ in range(200):
        value, change = slope(u)
        low, high = (low, u) if value > 0 else (u, high)
        following = u - value / change if change > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        u, step = following, abs(following - u)
        if step < 1e-13:
            break
    return math.exp(-u)
