"""A trained model without some of its examples, and what says how far it forgot them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...estimators.batches import outputs_of, pairs
from ...estimators.output_losses import OutputLoss, output_loss
from ...posterior import Posterior
from ..cautions import check_mode, noise_of, of_the_sum
from ..products import Products
from ..removal import Group
from .adapting import adapt
from .anchors import Anchor
from .memory import Memory
from .past import check_positive, put, seen
from .solving import moving

Way = Literal["deviation", "adaptation", "negation"]
WAYS = ("deviation", "adaptation", "negation")


class Account(NamedTuple):
    """What a model says of the removed examples, and how near it is to a minimum of what remains."""

    loss: float
    """Mean loss of the removed examples, in nats."""
    gradient: float | None
    """Norm of the gradient of the summed loss of the remaining examples and the prior, which is zero for a model that was trained
    on them to the end; None where they are not given."""
    agreement: float | None
    """Share of the removed examples that it names as a retrained model does; None without one, or where nothing is named."""


@dataclass(frozen=True)
class Forgotten:
    """What forgetting did: measured, not proved.

    Attributes:
        posterior: Without the removed examples; the model holds its mean.
        removed: How many they are.
        change: How far their predictions moved: the mean of the absolute changes of probabilities, or of outputs in units of the
            noise's variance.
        before: Of the old weights.
        after: Of the new ones.
    """

    posterior: Posterior
    removed: int
    change: float
    before: Account
    after: Account


def forget(
    model: nn.Module,
    posterior: Posterior,
    remove: Iterable[Any],
    *,
    remaining: Iterable[Any] | None = None,
    method: Way = "deviation",
    retrained: nn.Module | None = None,
    memory: Memory | None = None,
    loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    noise_variance: float | None = None,
    **how: Any,
) -> Forgotten:
    r"""Change a model as if some examples had not been in its data, and measure how far that went.

    ============ ======================================================================= ================================
    method       the weights become                                                      costs
    ============ ======================================================================= ================================
    deviation    :math:`m + (S - H_D)^{-1} J_D^T e_D`, one step of Newton's method       a few passes over D
    adaptation   the minimum of :func:`bayesrule.adapt`, with or without a memory        its epochs over D and memory
    negation     the mean of :math:`2 \lambda - \lambda_D` in natural parameters,        its epochs over D
                 where :math:`\lambda_D` has learned D once more
    ============ ======================================================================= ================================

    Args:
        model: In eval mode; it takes the posterior's mean, and ends with the new weights.
        posterior: What was learned from all data.
        remove: D: batches (inputs, labels), or mappings with ``labels``, that can be read several times.
        remaining: The other data, likewise, for the gradient that is left.
        method: See above.
        retrained: A model that was trained without D, to compare with.
        memory: Of "adaptation".
        loss: As for :class:`bayesrule.Sensitivity`.
        noise_variance: Likewise.
        **how: Of "adaptation" and "negation": what :func:`bayesrule.adapt` takes, such as ``optimizer`` and ``epochs``.

    Raises:
        ValueError: There are no such examples, or the precision would become negative.

    Example:
        >>> import bayesrule as br
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
        >>> model = nn.Linear(1, 1, bias=False)
        >>> post = br.Posterior.of(br.ridge(x, y[:, 0], penalty=1.0), {"weight": (1, 1)}, ess=3, num_data=3)
        >>> found = forget(model, post, [(x[2:], y[2:])], loss="mse")
        >>> found.posterior.mean["weight"], br.ridge(x[:2], y[:2, 0], penalty=1.0).mean
        (tensor([[0.5000]]), tensor([0.5000]))

    Source: P. Nickl et al. (2023), arXiv:2310.19273, for the deviation; N. Daheim et al. (2023), arXiv:2310.12808, for
    negation with curvature.
    """
    if method not in WAYS:
        raise ValueError(f"unknown method {method!r}; take {', '.join(map(repr, WAYS))}")
    if extra := [*(["memory"] if memory is not None and method != "adaptation" else []), *(how if method == "deviation" else [])]:
        raise ValueError(f"method={method!r} takes no {extra[0]!r}; take method='adaptation'")
    check_mode(model)
    posterior = of_the_sum(posterior, "unlearning")
    measure = output_loss(loss, noise_of(posterior, noise_variance))
    old = Anchor.of(posterior, next(iter(posterior.bind(model).values())))
    with moving(model, old.names):
        put(model, posterior.mean)
        gone = seen(model, remove, measure)
        if gone is None:
            raise ValueError("there is nothing to remove: the loader gave no example")
        theirs = None if retrained is None else gone.refresh(retrained).outputs
        names = measure.correct(gone.outputs, gone.labels) is not None

        def account(f: Tensor, known: Posterior) -> Account:
            same = None if theirs is None or not names else float((_named(f) == _named(theirs)).double().mean())
            left = None if remaining is None else residual_gradient(model, known, remaining, measure)
            return Account(float(measure.values(f, gone.labels).mean()), left, same)

        before = account(gone.outputs, posterior)
        if method == "adaptation":
            found = adapt(model, posterior, memory=memory, remove=remove, loss=measure, **how)
        else:
            if method == "deviation":
                left = old.plus(old.curvature(model, gone.batches(model), measure), -1.0)
                check_positive(left, "removal")
                parts = [(x, y) for x, y, _ in gone.batches(model)]
                moved = Group(Products(model, posterior, "vjp_jvp"), measure, "newton").removal(gone.indices, parts)
                left = left.about(old.center + old.row(moved.weights))
            else:
                twice = Anchor.of(adapt(model, posterior, add=remove, method="prior", loss=measure, **how), old.center)
                left = old.plus(old.q.precision).plus(twice.q.precision, -1.0)
                check_positive(left, "negation")
                left = left.about(left.q.solve(2 * old.stretch(old.center) - twice.stretch(twice.center)))
            put(model, left.named(left.center))
            exact = {name: m for name, m in posterior.mean.items() if name not in old.names}
            found = left.posterior(posterior, exact, len(gone))
        now = gone.refresh(model).outputs
        change = measure.residual(now, gone.labels) - measure.residual(gone.outputs, gone.labels)
        return Forgotten(found, len(gone), float(change.abs().mean()), before, account(now, found))


def _named(f: Tensor) -> Tensor:
    """The class that outputs name."""
    return f.argmax(-1) if f.dim() > 1 and f.shape[-1] > 1 else f > 0


def residual_gradient(model: nn.Module, posterior: Posterior, data: Iterable[Any], loss: OutputLoss) -> float:
    """Norm of the gradient of a summed loss and the prior, at the weights of a model: zero where training would end.

    Args:
        model: In eval mode.
        posterior: Knows the prior; of the sum of the losses.
        data: Batches (inputs, labels), or mappings with ``labels``; all that is to be known.
        loss: As made by ``output_loss``.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in params.items()}
    for inputs, labels in pairs(data, model):
        f = outputs_of(model, inputs)
        found = torch.autograd.grad(loss.values(f, loss.check(f.detach(), labels)).sum(), list(params.values()), allow_unused=True)
        for name, g in zip(params, found, strict=True):
            total[name] += 0 if g is None else g
    for name, p in params.items():
        if posterior.prior_precision is not None:
            center = 0 if posterior.prior_mean is None else posterior.prior_mean[name].to(p.device)
            total[name] += posterior.prior_precision[name].to(p.device) * (p.detach() - center)
    return math.sqrt(sum(float(g.square().sum()) for g in total.values()))
