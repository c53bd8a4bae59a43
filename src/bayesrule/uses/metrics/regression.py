r"""Predicted numbers against the true ones: points, and Gaussians :math:`N(m, v)`.

Everything takes the predicted ``mean`` and the ``targets``, both of one shape (N, ...), and where it applies the total predicted
``variance``, epistemic and aleatoric, of a shape that broadcasts to theirs. Averages run over all numbers. Units are those of the
targets (their square, for variances).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import average, check_numbers, check_share, wide


def rmse(mean: Tensor, targets: Tensor) -> Tensor:
    """Root of the mean squared error.

    Args:
        mean: Predicted numbers, shape (N, ...).
        targets: True numbers, of the same shape.

    Returns:
        A number >= 0, in units of the targets, shape ().

    Raises:
        ValueError: If shapes differ, a number is not finite or there are none.

    Example:
        >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 5.0])).item() ** 2
        9.0
    """
    mean, targets = check_numbers(mean, targets)
    return average((mean - targets).square()).sqrt()


def gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    r"""Negative log-likelihood of Gaussian predictions: the mean of :math:`\frac12 \log 2 \pi v + (y - m)^2 / 2v`.

    Args:
        mean: Predicted means, shape (N, ...).
        variance: Total predicted variances > 0, of a shape that broadcasts to that.
        targets: True numbers, of the shape of ``mean``.

    Returns:
        A number in nats for each target, shape (); it depends on the unit of the targets.

    Raises:
        ValueError: As :func:`rmse`, or a variance is not positive.

    Example:
        >>> round(gaussian_nll(torch.tensor([0.0]), torch.tensor(1.0), torch.tensor([1.0])).item(), 4)
        1.4189
    """
    mean, variance, targets = _checked(mean, variance, targets, least=False)
    return average(((2 * math.pi * variance).log() + (targets - mean).square() / variance) / 2)


def crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    r"""Continuous ranked probability score of Gaussian predictions, in closed form.

    .. math:: \int (F(t) - 1[t \ge y])^2 \, dt = \sigma \big( z (2 \Phi(z) - 1) + 2 \varphi(z) - \pi^{-1/2} \big),
              \qquad z = (y - m) / \sigma

    Args:
        mean: Predicted means, shape (N, ...).
        variance: Total predicted variances >= 0, of a shape that broadcasts to that; 0 gives the absolute error.
        targets: True numbers, of the shape of ``mean``.

    Returns:
        The mean over the targets, >= 0, in their units, shape ().

    Raises:
        ValueError: As :func:`rmse`, or a variance is negative.

    Example:
        >>> round(crps(torch.tensor([0.0]), torch.tensor(1.0), torch.tensor([0.0])).item(), 4)
        0.2337

    Source: Gneiting & Raftery (2007), Strictly proper scoring rules, prediction, and estimation, section 4.2.
    """
    mean, variance, targets = _checked(mean, variance, targets, least=True)
    gap, spread = targets - mean, variance.sqrt()
    z = torch.where(spread > 0, gap / spread, gap.sign() * math.inf).nan_to_num(0.0, math.inf, -math.inf)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return average(gap * torch.erf(z / math.sqrt(2)) + spread * (2 * density - 1 / math.sqrt(math.pi)))


def quantile_coverage(
    mean: Tensor, variance: Tensor, targets: Tensor, levels: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
) -> Tensor:
    """Share of the targets at or under each predicted quantile: a reliability diagram of regression.

    Args:
        mean: Predicted means, shape (N, ...).
        variance: Total predicted variances > 0, of a shape that broadcasts to that.
        targets: True numbers, of the shape of ``mean``.
        levels: Of the quantiles, in [0, 1].

    Returns:
        Shares in [0, 1], shape (levels,); of a calibrated prediction they are the levels.

    Raises:
        ValueError: As :func:`gaussian_nll`, or a level is no share.

    Example:
        >>> quantile_coverage(torch.zeros(4), torch.ones(()), torch.tensor([-2.0, -0.1, 0.1, 2.0]), (0.5, 0.9)).tolist()
        [0.5, 0.75]

    Source: Kuleshov, Fenner & Ermon (2018), Accurate uncertainties for deep learning using calibrated regression. arXiv:1807.00263.
    """
    for level in levels:
        check_share("a level", level)
    mean, variance, targets = _checked(mean, variance, targets, least=False)
    reached = torch.special.ndtr((targets - mean) / variance.sqrt())
    return torch.stack([average(reached <= level) for level in levels])


def coverage(mean: Tensor, variance: Tensor, targets: Tensor, level: float = 0.95) -> Tensor:
    """Share of the targets inside the central interval that should hold a share ``level`` of them.

    Args:
        mean: Predicted means, shape (N, ...).
        variance: Total predicted variances >= 0, of a shape that broadcasts to that.
        targets: True numbers, of the shape of ``mean``.
        level: Probability of the interval, in [0, 1].

    Returns:
        A number in [0, 1], shape (); of a calibrated prediction it is ``level``.

    Raises:
        ValueError: As :func:`crps`, or ``level`` is no share.

    Example:
        >>> coverage(torch.zeros(4), torch.ones(()), torch.tensor([-2.0, -0.1, 0.1, 1.9])).item()
        0.75
    """
    mean, variance, targets = _checked(mean, variance, targets, least=True)
    return average((targets - mean).abs() <= _half_width(variance, level))


def interval_width(variance: Tensor, level: float = 0.95) -> Tensor:
    """Mean width of the central intervals of :func:`coverage`: of two calibrated predictions the narrower is the better.

    Args:
        variance: Total predicted variances >= 0, shape (N, ...).
        level: Probability of the interval, in [0, 1].

    Returns:
        A number >= 0, in units of the targets, shape ().

    Raises:
        ValueError: A variance is negative or not a number, there is none, or ``level`` is no share.

    Example:
        >>> round(interval_width(torch.tensor([1.0, 4.0])).item(), 4)
        5.8799
    """
    _check_variance(variance, least=True)
    return 2 * average(_half_width(wide(variance), level))


def _half_width(variance: Tensor, level: float) -> Tensor:
    check_share("level", level)
    return variance.sqrt() * torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=variance.dtype, device=variance.device))


def _checked(mean: Tensor, variance: Tensor, targets: Tensor, least: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_variance(variance, least)
    mean, targets = check_numbers(mean, targets)
    try:
        return mean, wide(variance).to(mean.device).expand(mean.shape), targets
    except RuntimeError:
        raise ValueError(f"variance must broadcast to the shape {tuple(mean.shape)} of mean; got {tuple(variance.shape)}") from None


def _check_variance(variance: Tensor, least: bool) -> None:
    if variance.numel() == 0 or not ((variance >= 0) if least else (variance > 0)).all():
        lowest = f"got {variance.min().item():.6g}" if variance.numel() else "got none"
        raise ValueError(
            f"variance must be {'>= 0' if least else '> 0'} everywhere; {lowest}; the total is the variance over draws and that "
            "of the noise, noise_variance"
        )
