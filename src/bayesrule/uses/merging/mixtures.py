r"""Mixtures merged: several trainings of each task, of which a merger of all tasks picks those that suit one another.

Of each task there is :math:`q_t = \sum_k \pi_{tk} N(m_{tk}, S_{tk}^{-1})`. The merged weights are where the product of the tasks'
likelihoods :math:`(q_t / p)^{\alpha_t}` and the anchor p is largest,

.. math::  \theta = \arg\min_\theta \; -\sum_t \alpha_t \log \frac{q_t(\theta)}{p(\theta)} - \log p(\theta).

A bound on each log of a sum, tight where one stands, is a sum of quadratics. Minimizing it is a merger of all components, each with
the weight :math:`\alpha_t g_{tk}`, where :math:`g_{tk} \propto \pi_{tk} N(\theta; m_{tk}, S_{tk}^{-1})` sum to 1 for each task:
EM on top of :func:`~bayesrule.merge`, and it itself if there is one component. Ours (``docs/decisions.md``, section 19).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ...drawing import whole_number
from ...parts import Named, OneOf
from ...posterior import Posterior
from .methods import METHODS
from .posteriors import Merger

SETTLED = 1e-10
"""Change of the responsibilities with which the search ends."""


class MergedMixtures(NamedTuple):
    """What :func:`merge_mixtures` found."""

    posterior: Posterior
    """Gaussian, around the weights that were found."""
    objective: tuple[float, ...]
    """Of the start and after each step, in nats; never larger than before, up to rounding."""
    responsibilities: tuple[Tensor, ...]
    """For each task the shares of its components in the result, shape (K,)."""


def merge_mixtures(
    base: Posterior | None,
    posteriors: Sequence[Posterior],
    alphas: float | Sequence[float] = 1.0,
    *,
    prior_precision: float | None = None,
    start: Mapping[str, Tensor] | None = None,
    max_steps: int = 100,
    names: Sequence[str] | None = None,
) -> MergedMixtures:
    """Several posteriors as one, each of them a Gaussian or a mixture of Gaussians, as of trainings from several starts.

    Costs a merger of all components for each step, and there are few: with many weights one component of each task soon has
    all responsibility. The objective has several minima, so ``start`` decides which is found.

    Args:
        base: As for :func:`~bayesrule.merge`.
        posteriors: Of :meth:`Posterior.mixture`, of a :class:`bayesrule.MultiIVON`, or Gaussians.
        alphas: A weight for all or one for each, >= 0.
        prior_precision: As for :func:`~bayesrule.merge`.
        start: Where to begin, name -> tensor; None is the base.
        max_steps: After which the search ends in any case.
        names: What to call the posteriors in messages.

    Raises:
        ValueError: As for :func:`~bayesrule.merge`; or a weight is negative, so that nothing bounds the objective.
        TypeError: Components are of different structures.

    Example:
        The second task was trained twice; one of its minima is near that of the first task:

        >>> base = Posterior({"w": torch.zeros(1)}, {"w": torch.ones(1)})
        >>> one, far, near = (Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([9.0])}) for m in (2.0, -2.0, 1.8))
        >>> found = merge_mixtures(base, [one, Posterior.mixture([far, near])], start=one.mean)
        >>> found.posterior.mean["w"], found.responsibilities[1].round(decimals=6).tolist()
        (tensor([2.0118]), [0.0, 1.0])
    """
    return Mixtures(base, posteriors, prior_precision=prior_precision, names=names).merged(alphas, start, max_steps)


@final
class Mixtures:
    """Mixtures that can be merged, with any weights. The arguments are those of :func:`merge_mixtures`."""

    def __init__(
        self,
        base: Posterior | None,
        posteriors: Sequence[Posterior],
        *,
        prior_precision: float | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.names = tuple(f"posteriors[{i}]" for i in range(len(posteriors))) if names is None else tuple(names)
        tasks = [components(posterior) for posterior in posteriors]
        each = [f"{name}[{k}]" for name, task in zip(self.names, tasks, strict=True) for k in range(len(task))]
        method = METHODS["gradient_matching"]
        self._merger = Merger(base, [q for task in tasks for q, _ in task], method, prior_precision=prior_precision, names=each)
        self._sizes = [len(task) for task in tasks]
        self._log_weights = torch.tensor([log_weight for task in tasks for _, log_weight in task], dtype=torch.float64)

    def merged(self, alphas: float | Sequence[float], start: Named | None = None, max_steps: int = 100) -> MergedMixtures:
        """The result with these weights."""
        weights = torch.tensor(self._merger.method.weights(alphas, self.names), dtype=torch.float64)
        if bool((weights < 0).any()):
            raise ValueError(f"alphas of mixtures must be >= 0, got {weights.tolist()}; merge takes a Gaussian out of a Gaussian")
        theta = self._merger.anchor.posterior.mean if start is None else start
        trace, shares = [], [torch.zeros(size, dtype=torch.float64) for size in self._sizes]
        posterior = self._merger.anchor.posterior
        for step in range(whole_number("max_steps", max_steps, 1) + 1):
            before = shares
            value, shares = self._look(theta, weights)
            trace.append(value)
            if step == max_steps or max(float((a - b).abs().max()) for a, b in zip(shares, before, strict=True)) < SETTLED:
                break
            each = torch.cat([share * a for share, a in zip(shares, weights, strict=True)])
            posterior = self._merger(each.tolist(), warn=step == 0)
            theta = posterior.mean
        return MergedMixtures(posterior, tuple(trace), tuple(shares))

    def _look(self, theta: Named, weights: Tensor) -> tuple[float, list[Tensor]]:
        """The objective, and the responsibilities of each task."""
        own = log_density(self._merger.anchor.posterior, theta)
        logs = torch.stack([log_density(q, theta) for q in self._merger.models]).cpu() + self._log_weights
        tasks = logs.split(self._sizes)
        value = -sum(a * (log.logsumexp(0) - own.cpu()) for a, log in zip(weights, tasks, strict=True)) - own.cpu()
        return float(value), [log.softmax(0) for log in tasks]


def components(posterior: Posterior) -> list[tuple[Posterior, float]]:
    """The posteriors that a mixture is made of, with the logarithms of their weights; of another posterior, itself."""
    if len(posterior.parts) != 1 or not isinstance(part := posterior.parts[0], OneOf):
        return [(posterior, 0.0)]
    prior = (posterior.prior_mean, posterior.prior_precision)
    about = (posterior.ess, posterior.num_data)
    laws = zip(part.laws, part.log_weights.tolist(), strict=True)
    return [(Posterior(law.mean, law.precision, *prior, *about, law.parts), log_weight) for law, log_weight in laws]


@torch.no_grad()
def log_density(posterior: Posterior, theta: Named) -> Tensor:
    """As :meth:`Posterior.log_prob`, summed in float64: responsibilities come from differences of sums over all weights."""
    together = {name for part in posterior.parts for name in part.names}
    total = sum((part.log_prob(theta).double() for part in posterior.parts), torch.zeros((), dtype=torch.float64))
    for name, m in posterior.mean.items():
        if name not in together:
            s, gap = posterior.precision[name], theta[name] - m
            total = total + ((s / (2 * torch.pi)).log() - s * gap * gap).sum(dtype=torch.float64) / 2
    return total
