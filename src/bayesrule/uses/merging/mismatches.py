"""How far a merger is from training on all tasks, where their data are at hand: the mismatch of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...estimators.batches import outputs_of, pairs
from ...estimators.output_losses import OutputLoss, output_loss
from ...posterior import Posterior, sampled
from .anchors import wide


class Mismatch(NamedTuple):
    """What a merger left undone."""

    gradient: dict[str, Tensor]
    """Gradient of the sum of all weighted losses that the merger did not foresee, by name."""
    distance: float
    """How far a Newton step would go from there, in standard deviations of the merged posterior over all weights: 0 is exact."""


def gradient_mismatch(
    model: nn.Module,
    merged: Posterior,
    posteriors: Sequence[Posterior],
    loaders: Sequence[Iterable[Any]],
    loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    *,
    base: Posterior | None = None,
    alphas: float | Sequence[float] = 1.0,
) -> Mismatch:
    r"""What the merged weights owe to losses that are no quadratics, or whose Hessians a diagonal does not tell.

    .. math::  \sum_t \alpha_t \bigl(\nabla \ell_t(\theta) - \nabla \ell_t(\theta_t) - H_t (\theta - \theta_t)\bigr).

    Costs two passes over the data of each task, forward and backward.

    Args:
        model: Of all tasks; in eval mode, and it comes back as it was.
        merged: What :func:`~bayesrule.merge` gave.
        posteriors: What was merged, of independent weights.
        loaders: The data of each: batches (inputs, labels), or mappings with ``labels``.
        loss: As for :class:`bayesrule.Sensitivity`; the sum over examples is taken.
        base: What all were fine-tuned from: H_t is S_t without its precision. None is the prior that each posterior knows.
        alphas: As for :func:`~bayesrule.merge`.

    Raises:
        ValueError: There are not as many loaders or alphas as posteriors, or a prior is not known.

    Example:
        >>> import bayesrule as br
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [5.0]])
        >>> model = nn.Linear(1, 1, bias=False)
        >>> one, two = (br.Posterior.of(br.ridge(x[i], y[i, 0], 1.0), {"weight": (1, 1)}) for i in ([0], [1]))
        >>> both = br.merge(None, [one, two], prior_precision=1.0)
        >>> prior = br.Posterior({"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)})
        >>> found = gradient_mismatch(model, both, [one, two], [[(x[:1], y[:1])], [(x[1:], y[1:])]], "mse", base=prior)
        >>> round(found.distance, 5)
        0.0
    """
    weights = [float(alphas)] * len(posteriors) if isinstance(alphas, int | float) else [float(a) for a in alphas]
    if not len(posteriors) == len(loaders) == len(weights):
        raise ValueError(
            f"there are {len(posteriors)} posteriors, {len(loaders)} loaders and {len(weights)} alphas; give one for each"
        )
    each = output_loss(loss)
    total = {name: torch.zeros_like(wide(m)) for name, m in merged.mean.items()}
    for number, (posterior, loader, a) in enumerate(zip(posteriors, loaders, weights, strict=True)):
        prior = posterior.prior_precision if base is None else base.precision
        if prior is None:
            raise ValueError(f"posteriors[{number}] does not know its prior; pass the base")
        here, there = (_gradient(model, at, loader, each) for at in (merged, posterior))
        for name, g in total.items():
            hessian = wide(posterior.precision[name]) - wide(prior[name])
            g += (here[name] - there[name] - hessian * (merged.mean[name] - posterior.mean[name])) * a
    distance = sum(float((g * step).sum()) for g, step in zip(total.values(), merged.matvec(total).values(), strict=True))
    return Mismatch(total, max(distance, 0.0) ** 0.5)


def _gradient(model: nn.Module, at: Posterior, loader: Iterable[Any], loss: OutputLoss) -> dict[str, Tensor]:
    """Of the sum of losses at the mean, by name."""
    params = at.bind(model)
    total = {name: torch.zeros_like(wide(p), requires_grad=False) for name, p in params.items()}
    with sampled(model, at.exact(), seed=0):
        for x, y in pairs(loader, model):
            f = outputs_of(model, x)
            value = loss.values(f, loss.check(f, y)).sum()
            found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for name, g in zip(params, found, strict=True):
                if g is not None:
                    total[name] += g
    return total
