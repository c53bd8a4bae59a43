r"""Predictions of a model that is linear in its weights around the posterior's mean: :math:`f(x; \theta) \sim N(f(x; m), V(x))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..drawing import Draws
from ..estimators.batches import examples_in, on_device, outputs_of, rows_of
from ..estimators.pushing import Push
from ..estimators.quadrature import gauss_hermite
from ..noise import OUTPUTS, CounterNoise
from ..parts import OneOf
from ..posterior import Posterior
from .averages import Averages, Prediction, entropy_of, log_probs_of, mixed, prediction_of
from .products import HELD, LIMIT, Products

VARIANCES = ("layerwise", "exact", "last_layer", "sampled")
APPROXIMATIONS = {
    "softmax": ("probit", "mc", "bridge", "bridge_norm"),
    "sigmoid": ("probit", "mc", "quadrature"),
    "identity": ("probit", "mc", "bridge", "bridge_norm", "quadrature"),  # not asked
}
NODES, BROAD, FAR = 32, 1.5, 22.0
"""Of the quadrature: nodes; the standard deviation from which on twice as many equal steps do better; where these end."""
WIDE = 64
"""Outputs of an image or a sequence from which on no matrix of all of them is formed."""


class Moments(NamedTuple):
    """Of the outputs for tau 1: N inputs, K outputs, M of them an input in a row, S draws."""

    mean: Tensor
    """Shape (N, ..., K)."""
    variance: Tensor
    """Shape (N, ..., K)."""
    covariance: Tensor | None = None
    """Shape (N, M, M), where it was formed."""
    by_position: Tensor | None = None
    """The covariance of the K outputs at each position, shape (N, ..., K, K), where draws gave it."""
    offsets: Tensor | None = None
    """What draws of the weights add to the outputs, shape (S, N, ..., K), where they are kept."""
    averaged: tuple[Prediction, float, float] | None = None
    """Where they are not kept: what they predict on average, for which tau and which temperature."""

    def narrowed(self, tau: float) -> Moments:
        """For another tau."""
        if tau == 1:
            return self
        covariance, by_position = (None if t is None else t / tau for t in (self.covariance, self.by_position))
        offsets = None if self.offsets is None else self.offsets / math.sqrt(tau)
        return Moments(self.mean, self.variance / tau, covariance, by_position, offsets, self.averaged)


class Linearization(NamedTuple):
    """The outputs of a model under a posterior, from which predictions follow for any tau and temperature."""

    of: Sequence[Moments]
    """By component of a mixture; of a Gaussian one."""
    weights: Sequence[float]
    """Their probabilities."""

    def prediction(self, how: Linear) -> Prediction:
        """Outputs and their variance, and the probabilities that follow."""
        found = [_through_link(moments, how) for moments in self.of]
        return found[0] if len(found) == 1 else mixed(found, self.weights, how.link)


class Linear(NamedTuple):
    """How to linearize; see :func:`bayesrule.predict` for most.

    Args:
        check: Refuses outputs that are no outputs.
        settle: Called when the mean stands in the model.
    """

    link: str
    variance: str
    link_approx: str
    tau: float
    temperature: float
    num_samples: int
    seed: int
    antithetic: bool
    compile: bool
    labels: Tensor | None
    check: Callable[[Tensor], None]
    settle: Callable[[], None]

    @property
    def asks_matrices(self) -> bool:
        """Whether variances alone do not do."""
        return self.variance == "exact" or (self.link == "softmax" and self.link_approx != "probit")

    def checked(self) -> Linear:
        """Itself.

        Raises:
            ValueError: The settings do not fit each other.
        """
        if self.variance not in VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}; take one of {', '.join(map(repr, VARIANCES))}")
        fits = APPROXIMATIONS[self.link]
        if self.link_approx not in fits:
            raise ValueError(
                f"unknown link_approx {self.link_approx!r} for link={self.link!r}; take one of {', '.join(map(repr, fits))}"
            )
        if self.labels is not None and (self.variance, self.link_approx) != ("sampled", "mc"):
            raise ValueError(
                "the probability of whole sequences needs draws that serve all positions; take variance='sampled' and "
                "link_approx='mc', or method='mc'"
            )
        return self


def linearization(model: nn.Module, posterior: Posterior, batches: Sequence[Any], how: Linear) -> Linearization:
    r"""Outputs and their variance by linearization.

    For J the Jacobian of the outputs at the mean m and S the covariance of the weights:

    .. math::  f \sim N(f(m), V / \tau), \qquad V = J S J^T.

    A mixture is linearized around the mean of each component, and the predictions are averaged.

    Raises:
        ValueError: The posterior is no Gaussian and no mixture of them, or the settings do not fit.
        RuntimeError: What is asked for takes too much memory, or outputs or variances are not finite.

    Source: A. Immer, M. Korzepa and M. Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
    arXiv:2008.08400; R. Eschenhagen et al. (2021), Mixtures of Laplace approximations, arXiv:2111.03577, for mixtures.
    """
    other = [part for part in posterior.parts if not part.is_gaussian]
    if not other:
        return Linearization([_of_gaussian(model, posterior, batches, how)], [1.0])
    first = other[0]
    if len(other) > 1 or not isinstance(first, OneOf):
        raise ValueError(
            "method 'glm' linearizes Gaussians and mixtures of them, and this posterior has the structure "
            f"{posterior.structure!r}; take method='mc'"
        )
    gaussian = [part for part in posterior.parts if part is not first]
    of = [
        replace(
            posterior,
            mean={**posterior.mean, **law.mean},
            precision={**posterior.precision, **law.precision},
            parts=(*law.parts, *gaussian),
        )
        for law in first.laws
    ]
    return Linearization([_of_gaussian(model, one, batches, how) for one in of], first.weights)


def _of_gaussian(model: nn.Module, posterior: Posterior, batches: Sequence[Any], how: Linear) -> Moments:
    products = Products(model, posterior, "last_layer" if how.variance == "last_layer" else "layerwise")
    products.cheaper = "variance='sampled'" if how.variance == "last_layer" else "variance='sampled' or variance='last_layer'"
    sizes = [examples_in(x) for x in batches]
    with torch.inference_mode(False), products.at_the_mean():
        how.settle()
        with torch.no_grad():
            one = outputs_of(model, on_device(model, rows_of(batches[0], slice(1), sizes[0])))
        _refuse_large(sum(sizes), one, how)
        if how.variance == "sampled":
            return _by_draws(model, posterior, batches, how)
        of = products.covariance if how.asks_matrices else products.variance
        found = []
        for x in batches:
            found.append(of(on_device(model, x)))
            how.check(found[-1][0])
    mean, spread = _wide(torch.cat([values for values, _ in found])), _wide(torch.cat([each for _, each in found]))
    if how.asks_matrices:
        return Moments(mean, spread.diagonal(dim1=1, dim2=2).reshape(mean.shape).clamp_min(0), spread)
    return Moments(mean, spread)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _refuse_large(examples: int, one: Tensor, how: Linear) -> None:
    """Before anything is allocated."""
    outputs = one.numel() // max(1, len(one))
    if how.variance == "exact" and one.dim() > 2 and outputs > WIDE:
        raise ValueError(
            f"variance='exact' forms a matrix of all {outputs} outputs of an input; outputs of shape {tuple(one.shape[1:])} take "
            "variance='sampled', or 'layerwise'"
        )
    if how.variance == "sampled":
        asked, ways = (
            outputs * (one.shape[-1] if one.dim() > 1 else 1) if how.asks_matrices and how.link_approx != "mc" else 0,
            "link_approx='mc'",
        )
    else:
        asked, ways = outputs**2 if how.asks_matrices else 0, "variance='sampled' or link_approx='probit'"
    if how.variance == "exact":
        ways = "variance='sampled' or variance='layerwise'"
    needed = examples * asked * max(4, one.element_size())
    if needed > LIMIT:
        raise RuntimeError(
            f"linearized predictive needs {_bytes(needed)} for covariances of outputs (N={examples}, K={outputs}); use {ways}"
        )


def _bytes(count: float) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {units[power]}"


# By draws of the weights


def _by_draws(model: nn.Module, posterior: Posterior, batches: Sequence[Any], how: Linear) -> Moments:
    """Draws of the linearized outputs; each is of all inputs together, so that covariances across inputs are right too."""
    device = next(model.parameters()).device
    with torch.no_grad():
        mean = _wide(torch.cat([outputs_of(model, on_device(model, x)) for x in batches]))
    how.check(mean)
    tangents = {name: torch.zeros_like(m, device=device) for name, m in posterior.mean.items()}
    draws, push = Draws(posterior, tangents, how.seed, how.compile, offsets=True), Push(model)
    averages = Averages(how.link, how.temperature, labels=how.labels)
    matrices = how.link == "softmax" and how.link_approx not in ("probit", "mc")
    keep = how.num_samples * mean.nbytes <= HELD
    squares, outer, kept, offsets = torch.zeros_like(mean), None, list[Tensor](), mean
    for number in range(how.num_samples):
        if how.antithetic and number % 2:
            offsets = -offsets
        else:
            draws.write(number)
            pushed = [push.along(tangents, partial(outputs_of, model, on_device(model, x))) for x in batches]
            offsets = torch.cat(pushed).to(mean.dtype)
        squares.addcmul_(offsets, offsets)
        if matrices:
            each = offsets[..., :, None] * offsets[..., None, :]
            outer = each if outer is None else outer.add_(each)
        if keep:
            kept.append(offsets)
        elif how.link_approx == "mc":
            averages.update(mean + offsets / math.sqrt(how.tau))
    return Moments(
        mean,
        squares / how.num_samples,
        by_position=None if outer is None else outer / how.num_samples,
        offsets=torch.stack(kept) if keep else None,
        averaged=(averages.prediction(), how.tau, how.temperature) if averages.count else None,
    )


# From moments to probabilities


def _through_link(f: Moments, how: Linear) -> Prediction:
    """What follows from the moments."""
    if f.averaged is not None and f.averaged[1:] != (how.tau, how.temperature):
        raise RuntimeError(
            f"draws of {f.mean.numel()} outputs were not kept ({how.num_samples} of them take more than {_bytes(HELD)}), so that "
            "there is no other tau or temperature; take fewer num_samples, or variance='layerwise'"
        )
    f = f.narrowed(how.tau)
    _refuse_infinite(f.variance)
    more: dict[str, Any] = dict(covariance=f.covariance, samples=None if f.offsets is None else f.mean + f.offsets)
    if how.link == "identity":
        return Prediction(None, f.mean, f.variance, None, None)._replace(**more)
    approximations: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
        "probit": lambda: (_probit(f, how), None),
        "quadrature": lambda: _quadrature(f, how),
        "bridge": lambda: _bridge(f, how, False),
        "bridge_norm": lambda: _bridge(f, how, True),
    }
    if how.link_approx == "mc":
        found = f.averaged[0] if f.averaged is not None else _averaged(f, how)
        found = found._replace(mean=f.mean, variance=f.variance)
    else:
        log_probs, aleatoric = approximations[how.link_approx]()
        found = prediction_of(log_probs, how.link, f.mean, f.variance, aleatoric)
    return found._replace(**more)


def _refuse_infinite(variance: Tensor) -> None:
    if not variance.isfinite().all():
        bad = int((~variance.isfinite()).flatten(1).any(1).sum()) if variance.dim() > 1 else int((~variance.isfinite()).sum())
        raise RuntimeError(
            f"linearized outputs have no finite variance in {bad} of {len(variance)} rows; posterior variance may be too large; "
            "try rescale(ess=...)"
        )


def _probit(f: Moments, how: Linear) -> Tensor:
    variance = f.variance / how.temperature**2
    return log_probs_of(f.mean / (1 + math.pi / 8 * variance).sqrt(), how.link, how.temperature)


def _quadrature(f: Moments, how: Linear) -> tuple[Tensor, Tensor]:
    """The exact integral, and that of the entropy. Narrow Gaussians and wide ones are smooth on different scales."""
    mean, std = f.mean / how.temperature, f.variance.sqrt() / how.temperature
    narrow, wide = _hermite(mean, std.clamp_max(BROAD)), _trapezium(mean, std.clamp_min(BROAD))
    chosen = std < BROAD
    return torch.where(chosen[..., None], narrow[0], wide[0]), torch.where(chosen, narrow[1], wide[1])


def _hermite(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """By nodes of the Gaussian."""
    total, noise = torch.full((*mean.shape, 2), -math.inf, dtype=mean.dtype, device=mean.device), torch.zeros_like(mean)
    for at, weight in gauss_hermite(NODES):
        logs = log_probs_of(mean + at * std, "sigmoid")
        total, noise = torch.logaddexp(total, logs + math.log(weight)), noise + weight * entropy_of(logs)
    return total, noise


def _trapezium(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """By equal steps of the logit: the sigmoid's slope times the Gaussian's distribution function."""
    total, noise = torch.full((*mean.shape, 2), -math.inf, dtype=mean.dtype, device=mean.device), torch.zeros_like(mean)
    logits = torch.linspace(-FAR, FAR, 2 * NODES, dtype=mean.dtype, device=mean.device)
    logs, step = log_probs_of(logits, "sigmoid"), 2 * FAR / (2 * NODES - 1)
    for u, slope, entropy in zip(logits, logs.sum(-1), entropy_of(logs), strict=True):
        z = (mean - u) / std
        below = torch.special.log_ndtr(torch.stack([-z, z], -1))
        total = torch.logaddexp(total, below + slope + math.log(step))
        noise = noise + step * entropy * (-(z**2) / 2).exp() / (std * math.sqrt(2 * math.pi))
    return total, noise


def _averaged(f: Moments, how: Linear) -> Prediction:
    """The average over draws of the weights, or of the outputs."""
    averages = Averages(how.link, how.temperature, labels=how.labels)
    for offsets in _drawn(f, how) if f.offsets is None else f.offsets:
        averages.update(f.mean + offsets)
    return averages.prediction()


def _drawn(f: Moments, how: Linear) -> Iterator[Tensor]:
    """Draws of the outputs about their mean."""
    if f.covariance is None:
        scaled: Callable[[Tensor], Tensor] = lambda z: f.variance.sqrt() * z  # noqa: E731
    else:
        roots, vectors = torch.linalg.eigh(f.covariance)
        root = vectors * roots.clamp_min(0).sqrt()[:, None]
        scaled = lambda z: (root @ z.flatten(1)[:, :, None]).view(z.shape)  # noqa: E731
    noise, offsets = CounterNoise(how.seed, OUTPUTS), f.mean
    for number in range(how.num_samples):
        fresh = not (how.antithetic and number % 2)
        offsets = scaled(noise.at(draw=number).normal(f.mean)) if fresh else -offsets
        yield offsets


def _bridge(f: Moments, how: Linear, normalized: bool) -> tuple[Tensor, Tensor]:
    r"""A Dirichlet that stands for the Gaussian of K logits: its mean, and the mean entropy under it.

    .. math::  \alpha_k = \frac1{V_{kk}} \Big(1 - \frac2K + \frac{e^{f_k}}{K^2} \sum_l e^{-f_l}\Big)

    for logits that were conditioned to sum to zero. ``normalized`` divides logits by the root of
    :math:`c = \bar V / \sqrt{K / 2}` and variances by c first. Where there is no variance, the classes' probabilities are known.
    """
    classes, by_position = f.mean.shape[-1], f.by_position
    if by_position is None:
        assert f.covariance is not None
        lead = f.mean.shape[1:-1]
        split = f.covariance.view(len(f.mean), math.prod(lead), classes, math.prod(lead), classes)
        by_position = split.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(*f.mean.shape, classes)
    mean, matrix = f.mean / how.temperature, by_position / how.temperature**2
    known = (matrix.diagonal(dim1=-2, dim2=-1) <= 0).any(-1)
    matrix = torch.where(known[..., None, None], torch.eye(classes, dtype=mean.dtype, device=mean.device), matrix)
    sums = matrix.sum(-1)
    whole = sums.sum(-1)[..., None]
    mean = mean - sums * mean.sum(-1, keepdim=True) / whole
    variance = (matrix.diagonal(dim1=-2, dim2=-1) - sums**2 / whole).clamp_min(torch.finfo(mean.dtype).tiny)
    if normalized:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    pairs = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(classes)
    rest = torch.full_like(pairs, math.log(1 - 2 / classes) if classes > 2 else -math.inf)
    log_alpha = torch.logaddexp(rest, pairs) - variance.log()
    logs = log_alpha.log_softmax(-1)
    alpha = log_alpha.clamp_max(math.log(torch.finfo(mean.dtype).max / (4 * classes))).exp()
    total = alpha.sum(-1, keepdim=True)
    own = -(alpha / total * (torch.digamma(alpha + 1) - torch.digamma(total + 1))).sum(-1)
    exact = log_probs_of(f.mean, how.link, how.temperature)
    return torch.where(known[..., None], exact, logs), torch.where(known, entropy_of(exact), own)
