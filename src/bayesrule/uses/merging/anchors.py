"""What models are merged around: the base that all were fine-tuned from, or the prior under which all were trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...posterior import Posterior
from ..cautions import of_the_sum
from .methods import Method


class Anchor(NamedTuple):
    """A posterior, whose precision is infinite where it is not known, and what is in it."""

    posterior: Posterior
    ess: float
    """Of the data it has seen; 0 for a prior."""
    num_data: int | None


def anchor_of(base: Posterior | None, models: Sequence[Posterior], method: Method, prior_precision: float | None) -> Anchor:
    """The base; where it has no precision, the prior's.

    Args:
        base: None is the prior. Weights that it knows exactly have no precision.
        models: What is merged.
        method: How.
        prior_precision: Of the prior; None is the mean over the models of what they know of it.

    Raises:
        ValueError: The method needs a base or a precision, and there is none; or models have priors of different means.
    """
    if base is None and not (method.needs_precision or method.averages):
        raise ValueError(f"{method.name} adds task vectors to a base; pass one, or choose method='linear'")

    def filled(name: str, known: Tensor) -> Tensor:
        return torch.where(known.isinf(), _prior_precision(models, name, known, prior_precision), known)

    if base is None:
        mean = {name: _prior_mean(models, name, prior_precision) for name in models[0].mean}
        precision = {name: filled(name, torch.full_like(m, torch.inf)) for name, m in mean.items()}
    else:
        base = of_the_sum(base, "merging")
        mean, precision = {name: wide(m) for name, m in base.mean.items()}, dict(base.precision)
        if not base.parts:
            precision = {name: filled(name, wide(s)) for name, s in precision.items()}
    known = all(has_precision(s) for s in precision.values())
    if not known and method.needs_precision and not method.averages:
        raise ValueError(
            f"{method.name} needs the precision of the base, which has none; pass prior_precision, or a base with one, or choose "
            "method='task_arithmetic'"
        )
    if base is not None and not is_exact(base):
        return Anchor(replace(base, mean=mean, precision=precision), base.ess, base.num_data)
    return Anchor(Posterior(mean, precision, *((mean, precision) if known else ())), 0.0, 0)


def _prior_precision(models: Sequence[Posterior], name: str, like: Tensor, given: float | None) -> Tensor:
    """Shaped like a tensor; infinite where nobody knows."""
    known = [model.prior_precision[name] for model in models if model.prior_precision is not None]
    if given is not None or len(known) < len(models):
        return torch.full_like(like, torch.inf if given is None else given)
    return torch.stack([wide(s).expand(like.shape) for s in known]).mean(0)


def _prior_mean(models: Sequence[Posterior], name: str, given: float | None) -> Tensor:
    """That of all; 0 where nobody knows, and of a prior that is given."""
    zero = torch.zeros_like(wide(models[0].mean[name]))
    known = [None if given is not None else model.prior_mean for model in models]
    first, *others = [zero if mean is None else wide(mean[name]).expand_as(zero) for mean in known]
    if any(not torch.equal(first, other) for other in others):
        raise ValueError(f"the posteriors were trained under priors with different means of {name!r}; pass a base")
    return first


def is_exact(posterior: Posterior) -> bool:
    """Whether all weights are known exactly."""
    return not posterior.parts and all(bool(s.isinf().all()) for s in posterior.precision.values())


def has_precision(precision: Tensor) -> bool:
    """Whether no weight of a tensor is known exactly: there is nothing to reckon with then."""
    return not bool(precision.isinf().any())


def wide(t: Tensor) -> Tensor:
    """In float32 or wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
