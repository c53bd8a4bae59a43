"""What an estimate of leaving out presumes of posterior and data, and what is said where it does not hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from ..estimators.output_losses import OutputLoss
from ..posterior import Posterior


def noise_of(posterior: Posterior | None, given: float | None) -> float:
    """The variance of a regression's noise: what is given, else what the posterior knows, else 1.

    Raises:
        ValueError: It knows another for each output.
    """
    known = None if posterior is None else posterior.noise_variance
    if given is not None or known is None:
        return 1.0 if given is None else given
    if len(set(known)) > 1:
        raise ValueError(
            f"the posterior knows another noise for each output, {known}; pass one noise_variance, or a loss of your own"
        )
    return known[0]


def of_the_sum(posterior: Posterior, purpose: str = "leave-one-out estimates") -> Posterior:
    """The posterior of the sum of the losses, with ess the number of examples.

    Args:
        posterior: Of whatever ess.
        purpose: What it is for, for the warning.

    Warns:
        UserWarning: It was another.
    """
    if posterior.num_data is None or posterior.ess == posterior.num_data or not posterior.is_gaussian:
        return posterior
    factor = posterior.ess / posterior.num_data
    warnings.warn(
        f"posterior was trained with ess={posterior.ess:g} but num_data={posterior.num_data}; variances are scaled by {factor:g} "
        f"for {purpose}",
        UserWarning,
        stacklevel=4,
    )
    return posterior.rescale(ess=float(posterior.num_data))


def check_mode(model: nn.Module) -> None:
    """Refuse what is no function of an example and the weights.

    Raises:
        RuntimeError: The model is in training mode, and has norms over the batch or dropout.
    """
    awake = [m for m in model.modules() if m.training]
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in awake):
        raise RuntimeError("the model is in training mode, in which batch norm mixes examples; call model.eval()")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in awake):
        raise RuntimeError("the model is in training mode, in which dropout is random; call model.eval()")


def warn_of_size(posterior: Posterior | None, examples: int) -> None:
    """Where the posterior is of other data."""
    known = None if posterior is None else posterior.num_data or posterior.ess
    if known is not None and known != examples and known != 1.0:
        warnings.warn(
            f"the data have {examples} examples, and the posterior is of {known:g}; estimates are those of a model trained on "
            "these data: rescale(ess=...), or pass all of them",
            UserWarning,
            stacklevel=4,
        )


def warn_of_certainty(uncertain: Collection[str]) -> None:
    """Where no weight can move."""
    if not uncertain:
        warnings.warn(
            "the posterior knows every weight exactly, so that leaving examples out changes nothing; pass one that training left",
            UserWarning,
            stacklevel=4,
        )


def warn_of_leverage(leverage: Tensor) -> None:
    """Where examples hold themselves."""
    refused = (leverage >= 1).nonzero()[:, 0]
    if len(refused):
        first = int(refused[0])
        others = f", as have {len(refused) - 1} of the {len(leverage) - 1} others" if len(refused) > 1 else ""
        warnings.warn(
            f"example {first} has leverage {leverage[first].item():.2f} >= 1{others}; falling back to first order (posterior "
            "too wide or not converged)",
            RuntimeWarning,
            stacklevel=4,
        )


def checked(loss: OutputLoss, values: Tensor, labels: Tensor) -> Tensor:
    """Labels as a loss takes them.

    Raises:
        RuntimeError: The outputs are not finite.
        ValueError: The labels do not suit them.
    """
    if not values.isfinite().all():
        bad = int((~values.flatten(1).isfinite()).any(1).sum())
        raise RuntimeError(f"the model gave outputs that are not finite for {bad} of {len(values)} examples")
    return loss.check(values, labels)


def check_order(loader: Iterable[Any]) -> None:
    """Where the order of the data will not come again."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        warnings.warn(
            "the loader shuffles, so the numbers of examples mean nothing after this pass; pass shuffle=False",
            UserWarning,
            stacklevel=4,
        )


def warn_of_motion(posterior: Posterior, slope: Mapping[str, Tensor]) -> None:
    """Where the mean is further than a deviation a weight from a minimum of the loss of its data.

    Args:
        posterior: Of the sum of the losses.
        slope: Its gradient at the mean, by name.
    """
    mean, prior = posterior.prior_mean, posterior.prior_precision
    whole = dict(slope)
    for name, g in slope.items():
        if prior is not None:
            gap = posterior.mean[name] - (0 if mean is None else mean[name])
            whole[name] = g + (prior[name] * gap).to(g)
    wanted = {name: whole.get(name, torch.zeros_like(m)).to(m) for name, m in posterior.mean.items()}
    step = posterior.matvec(wanted)
    size = sum(g.numel() for g in slope.values())
    away = math.sqrt(sum(float((wanted[name] * step[name]).sum()) for name in slope) / max(size, 1))
    if away > 1:
        lengths = [math.sqrt(sum(float(g.square().sum()) for g in each.values())) for each in (whole, slope)]
        warnings.warn(
            f"base model is not at a stationary point (grad norm {lengths[0] / max(lengths[1], 1e-30):.2g} of loss grad, "
            f"{away:.2g} deviations a weight); K-prior gradient reconstruction assumes it",
            UserWarning,
            stacklevel=3,
        )
