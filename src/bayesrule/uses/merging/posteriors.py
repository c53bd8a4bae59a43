"""Posteriors merged in memory: sums and differences of natural parameters.

Independent weights go through :mod:`~bayesrule.uses.merging.methods`, tensor by tensor; weights that vary together through their
family's own natural parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from ...family import DomainError
from ...joints import Joint
from ...parts import Named
from ...posterior import Posterior
from ...program import uncast
from ..cautions import of_the_sum
from .anchors import anchor_of, has_precision, is_exact, wide
from .checks import Checks, check_names, check_shape
from .methods import Method, Piece, Place, method_of, onto, threshold


def merge(
    base: Posterior | None,
    posteriors: Sequence[Posterior],
    alphas: float | Sequence[float] = 1.0,
    method: str = "gradient_matching",
    *,
    density: float | None = None,
    seed: int = 0,
    prior_precision: float | None = None,
    names: Sequence[str] | None = None,
) -> Posterior:
    r"""Several posteriors, fine-tuned apart from one base, as one; or a base from which some are taken out.

    With ``gradient_matching`` this is arithmetic on natural parameters: exact for quadratic losses if posteriors are full, or
    precisions are diagonal in truth. No data are looked at. Costs some passes over the weights, and the memory of the result and
    of a precision for each posterior that knows its prior.

    .. math::  S = S_0 + \sum_t \alpha_t (S_t - S_0), \qquad
               \theta = \theta_0 + \sum_t \alpha_t S^{-1} S_t (\theta_t - \theta_0).

    The precisions are those of sums of losses: a posterior whose ``ess`` is not its ``num_data`` is rescaled, with a warning. S_t
    contains S_0. Of a posterior that knows its prior, as those of optimizers do, the prior's precision is replaced by S_0. S_0 is
    the base's; if there is no base, or it knows weights exactly (:meth:`Posterior.point`), it is the precision of the prior
    under which the posteriors were trained, and the base itself the prior.

    The precision of what comes out is S with all methods, if all precisions are known, else infinite. It has the base's prior,
    :math:`N_0 + \sum_t \alpha_t N_t` examples where these are known, and no temperature.

    Args:
        base: What all were fine-tuned from. None is the prior: for models trained on their own, and for averages.
        posteriors: Gaussians over the same names and shapes.
        alphas: A weight for all or one for each; -1 takes one out. For "linear" and "fisher" shares, divided by their sum.
        method: "gradient_matching", "fisher", "task_arithmetic", "linear", "ties", "dare_linear" or "dare_ties", see
            :mod:`bayesrule.uses.merging.methods`. Weights that vary together are merged by the first two.
        density: The part of each tensor's task vector that "ties" and the "dare" methods keep.
        seed: Which elements the "dare" methods drop.
        prior_precision: S_0 where the base has none, > 0; None is the mean of the priors' of the posteriors.
        names: What to call the posteriors in messages.

    Returns:
        Posterior, in float32 or wider.

    Raises:
        ValueError: An argument is none of the above; names or shapes differ; a method lacks a precision; or after a removal
            precisions are not positive: the message names the largest weight that is safe.
        TypeError: A posterior is no Gaussian, or sums of its natural parameters are of another structure.

    Warns:
        UserWarning: Precisions are of different scales, or a model is not fine-tuned from the base.

    Example:
        Two tasks that agree on the first weight and not on the second, which the second task knows better:

        >>> base = Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)})
        >>> one = Posterior({"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([5.0, 2.0])})
        >>> two = Posterior({"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([5.0, 8.0])})
        >>> both = merge(base, [one, two])
        >>> both.mean["w"], both.precision["w"]
        (tensor([1.1111, 2.4444]), tensor([9., 9.]))

        Taking the first out again leaves the second:

        >>> merge(base, [both, one], [1.0, -1.0]).mean["w"]
        tensor([1., 3.])

    Source: N. Daheim, T. Moellenhoff, E. M. Ponti, I. Gurevych and M. E. Khan (2024), arXiv:2310.12808, for the rule; as arithmetic
    on posteriors and without a base it is ours (``docs/decisions.md``, section 19).
    """
    rule = method_of(method, density)
    merger = Merger(base, posteriors, rule, seed=seed, prior_precision=prior_precision, names=names)
    return merger(rule.weights(alphas, merger.names))


@final
class Merger:
    """Posteriors that can be merged, with any weights. The arguments are those of :func:`merge`."""

    def __init__(
        self,
        base: Posterior | None,
        posteriors: Sequence[Posterior],
        method: Method,
        *,
        seed: int = 0,
        prior_precision: float | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.method, self.seed = method, seed
        self.names = tuple(f"posteriors[{i}]" for i in range(len(posteriors))) if names is None else tuple(names)
        if not posteriors or len(self.names) != len(posteriors):
            raise ValueError(f"merging takes at least one posterior, and a name for each; got {len(posteriors)} and {self.names}")
        if prior_precision is not None and not 0 < prior_precision < math.inf:
            raise ValueError(f"prior_precision must be a number > 0, got {prior_precision!r}")
        _check(base, dict(zip(self.names, posteriors, strict=True)), method)
        models: list[Posterior] = []
        for posterior in posteriors:
            models.append(of_the_sum(posterior, "merging"))
        self.anchor = anchor_of(base, models, method, prior_precision)
        with torch.no_grad(), uncast():
            self.models = models if method.averages else [self._rebased(model) for model in models]

    def __call__(self, alphas: Sequence[float], *, warn: bool = True) -> Posterior:
        """Merged with these weights, as :meth:`Method.weights` gives them."""
        anchor = self.anchor.posterior
        checks = Checks(self.method, self.names, alphas)
        together = {name for part in self.models[0].parts for name in part.names}
        mean: dict[str, Tensor] = dict.fromkeys(anchor.mean, torch.empty(()))  # in this order
        precision: dict[str, Tensor] = {}
        with torch.no_grad(), uncast():
            for number, name in enumerate(sorted(anchor.mean)):
                if name in together:
                    continue
                base = _piece(anchor, name)
                models = [_piece(model, name) for model in self.models]
                merged = self.method(base, models, alphas, self._place(number, base, models))
                checks.update(base, models, merged)
                mean[name] = merged.mean
                precision[name] = torch.full_like(merged.mean, math.inf) if merged.precision is None else merged.precision
            checks.refuse()
            parts = tuple(self._joined(number, alphas) for number in range(len(self.models[0].parts)))
        if warn:
            checks.warn(stacklevel=3)
        for part in parts:
            mean, precision = mean | part.mean, precision | part.precision
        prior = (None, None) if self.method.averages else (anchor.prior_mean, anchor.prior_precision)
        num_data = self._summed("num_data", alphas)
        return Posterior(
            mean,
            precision,
            *prior,
            ess=self._summed("ess", alphas) or 1.0,
            num_data=None if num_data is None else round(num_data) or None,
            parts=parts,
            method_hint=self.models[0].method_hint,
        )

    def _place(self, number: int, base: Piece, models: Sequence[Piece]) -> Place:
        steps = [[model.mean - base.mean] for model in models] if self.method.trims else []
        return Place(number, 0, tuple(threshold(step.__iter__, self.method.density) for step in steps), self.seed)

    def _summed(self, field: str, alphas: Sequence[float]) -> float | None:
        """What ess or the numbers of examples add up to; None where one is not known or the sum is not positive."""
        values = [0 if self.method.averages else getattr(self.anchor, field), *(getattr(model, field) for model in self.models)]
        if any(value is None for value in values):
            return None
        total: float = sum(value * a for value, a in zip(values, [1.0, *alphas], strict=True))
        return total if total > 0 else None

    # Weights that vary together

    def _joined(self, number: int, alphas: Sequence[float]) -> Joint:
        """Those of one part, by the natural parameters of the family."""
        joints: list[Any] = [model.parts[number] for model in self.models]
        first, taken = joints[0], [repr(name) for name, a in zip(self.names, alphas, strict=True) if a < 0]
        anchor = 0.0 if self.method.averages else self._anchor_of(first).natural()
        total: Any = anchor
        for joint, a in zip(joints, alphas, strict=True):
            total = (joint.q.natural() - anchor) * a + total
        try:
            return replace(first, q=first.q.from_natural(total))
        except DomainError as error:
            what = f"removing {', '.join(taken)}" if taken else "merging"
            raise ValueError(f"{what} leaves no posterior: {error}. Lower alpha or supply the base precision") from error

    def _anchor_of(self, like: Joint) -> Any:
        """The anchor, as a member of the family of a part."""
        anchor = self.anchor.posterior
        for part in anchor.parts:
            if part.names == like.names and isinstance(part, Joint):
                return part.q
        mean, precision = (like.point({name: block[name] for name in like.names}) for block in (anchor.mean, anchor.precision))
        return _with_precision(like.q.moved(mean=mean), like.q.keep_diagonal(precision))

    def _rebased(self, model: Posterior) -> Posterior:
        """A model as if trained from the anchor: where it knows the precision of its prior, S_0 takes its place."""
        if model.prior_precision is None:
            return model
        anchor = self.anchor.posterior.precision
        prior = {name: wide(s).expand_as(anchor[name]) for name, s in model.prior_precision.items()}
        precision = {
            name: onto(wide(anchor[name]), wide(s), prior[name]) if has_precision(s) and has_precision(anchor[name]) else s
            for name, s in model.precision.items()
        }
        parts = tuple(self._rebased_part(part, prior) if isinstance(part, Joint) else part for part in model.parts)
        return replace(model, precision=precision, prior_mean=None, prior_precision=None, parts=parts)

    def _rebased_part(self, part: Joint, prior: Named) -> Joint:
        own = part.q.keep_diagonal(part.point({name: prior[name] for name in part.names}))
        return replace(part, q=_with_precision(part.q, part.q.precision + (self._anchor_of(part).precision - own)))


def _with_precision(q: Any, precision: Any) -> Any:
    return q.moved(hess=precision / q.ess - q.weight_decay)


def _check(base: Posterior | None, models: Mapping[str, Posterior], method: Method) -> None:
    """That posteriors can be merged."""
    whole = models if base is None or is_exact(base) else {"base": base, **models}
    for name, model in whole.items():
        if not model.is_gaussian:
            raise TypeError(f"{name!r} has the structure {model.structure!r} and is no Gaussian; merge_mixtures takes mixtures")
    wanted = next(iter(models.values())).mean if base is None else base.mean
    check_names(wanted, {name: model.mean for name, model in models.items()})
    for tensor, m in wanted.items():
        check_shape(tensor, m.shape, {name: model.mean[tensor].shape for name, model in models.items()})
    if not any(model.parts for model in whole.values()):
        return
    (first, one), *others = whole.items()
    odd = next((name for name, model in others or [(first, one)] if not _adds(one, model)), None)
    if odd is not None or not method.needs_precision:
        what = " and ".join(f"{name!r} ({whole[name].structure})" for name in dict.fromkeys([first, odd or first]))
        raise TypeError(f"{method.name} of {what} has no posterior of one structure and basis; take independent() of all")


def _adds(one: Posterior, other: Posterior) -> bool:
    """Whether the same weights of both vary together, in families whose natural parameters add up."""
    if len(one.parts) != len(other.parts):
        return False
    pairs = zip(one.parts, other.parts, strict=True)
    return all(isinstance(a, Joint) and isinstance(b, Joint) and a.names == b.names and a.q.adds_to(b.q) for a, b in pairs)


def _piece(posterior: Posterior, name: str) -> Piece:
    """One tensor; a weight that is known exactly has no precision to reckon with."""
    precision = wide(posterior.precision[name])
    return Piece(wide(posterior.mean[name]), precision if has_precision(precision) else None)
