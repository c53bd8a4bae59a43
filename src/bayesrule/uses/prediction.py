"""Predict with a posterior: at its mean, or averaged over draws of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from ..drawing import Draws, kept, whole_number
from ..posterior import Posterior

Method = Literal["mean", "mc"]


class Prediction(NamedTuple):
    """What a posterior says about inputs. N inputs, K outputs each.

    In float32, or the outputs' dtype if that is wider. With ``link="identity"`` (regression) ``probs``, ``entropy``,
    ``mutual_information`` and ``log_probs`` are None.
    """

    probs: Tensor | None  # (N, ..., K) class probabilities, averaged over draws
    mean: Tensor  # (N, ..., K) mean of the model's outputs (logits) over draws
    variance: Tensor  # (N, ..., K) their variance over draws: zero at the mean
    entropy: Tensor | None  # (N, ...) total uncertainty in nats: entropy of probs
    mutual_information: Tensor | None  # (N, ...) its epistemic part: entropy of probs - mean entropy of the draws, >= 0
    log_probs: Tensor | None = None  # (N, ..., K) log of probs, finite where probs are too small for their dtype


class _How(NamedTuple):
    """The arguments of :func:`predict` that say how to draw."""

    method: Method | None
    num_samples: int
    seed: int
    antithetic: bool
    vmap: int | None
    compile: bool
    batch_norm: Iterable[Tensor] | None


def predict(
    model: nn.Module,
    posterior: Posterior | None,
    x: Tensor,
    method: Method | None = None,
    num_samples: int = 32,
    *,
    link: Literal["softmax", "identity"] = "softmax",
    seed: int = 0,
    batch_size: int = 512,
    antithetic: bool = False,
    vmap: int | None = None,
    compile: bool = False,
    batch_norm: Iterable[Tensor] | None = None,
) -> Prediction:
    r"""Predict for inputs, averaging **probabilities** over draws of the weights.

    .. math::  p(y | x) \approx \frac1S \sum_s p(y | f(x; \theta_s)), \qquad \theta_s \sim q.

    Costs one forward ("mean") or ``num_samples`` forwards and as much noise ("mc"), and three copies of the weights: the
    weights that come back bit by bit, the posterior's mean and its standard deviation. Each draw is written in place and
    serves all batches. Averages run, so memory does not grow with ``num_samples``; that of the probabilities is a running
    log-sum-exp, so that an improbable class keeps its log probability.

    Args:
        model: Gives logits (outputs, for regression), shape (n, ..., K), in eval mode; in training mode a forward also moves the
            running statistics of batch norm, and without ``batch_norm`` they stay moved.
        posterior: What was learned; None takes the model's weights as they are. Logits are divided by its ``temperature`` before
            they become probabilities, whatever the method.
        x: Inputs, shape (N, ...).
        method: "mean", "mc" (Monte Carlo), or None: "mc" where there is a posterior.
        num_samples: Draws S of "mc"; 32 is usual, under 4 is worse than the mean.
        link: "softmax" for classes, "identity" for regression.
        seed: Which draws; the same seed, the same answer. Draw s is that of ``bayesrule.sampled(..., seed, draw=s)``.
        batch_size: Inputs per forward.
        antithetic: Let draws 2k and 2k + 1 be mirror images, m + d and m - d, which saves half of the noise and cancels
            whatever is odd in d; take an even ``num_samples``.
        vmap: Evaluate this many draws at once (``torch.func``), for GPUs that one draw does not fill. Takes as many copies
            of the weights more. Slower on CPUs: products with a weight of their own for each draw are many small ones,
            convolutions become grouped, and the copies leave the cache.
        compile: Draw by ``torch.compile``: some seconds the first time in a process; pays where the noise costs as much as the
            forwards, as it does for wide layers and few inputs. Without a compiler, one warning, and draws as ever.
        batch_norm: Batches of training inputs (or (inputs, anything)), read once, on which each draw, or the mean, gets running
            statistics of its own before it predicts, as by ``torch.optim.swa_utils.update_bn``: statistics belong to the
            weights, and those of the mean are wrong for a draw. Costs one more pass over these batches per draw. All buffers
            and modes come back as they were. Of no effect on models without batch norm; not together with ``vmap``.

    Raises:
        ValueError: Unknown method or link, a number that is no size, fewer than two classes, or outputs that are
            probabilities already; ``batch_norm`` without a batch, or with ``vmap``.
        RuntimeError: A draw gave outputs that are not finite.

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> predict(model, Posterior.point(model), torch.zeros(5, 2), "mc", num_samples=4).probs.shape
        torch.Size([5, 3])

    Source: spelled out for IVON in Shen et al. (2024), section 3.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"predict takes inputs as one tensor, shape (N, ...), got {type(x).__name__}")
    batch_size = whole_number("batch_size", batch_size, 1)
    how = _How(method, num_samples, seed, antithetic, vmap, compile, batch_norm)
    return _predict(model, posterior, x.split(batch_size), link, how)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of the model keeps running statistics of its batches, which are right for one set of weights only."""
    return any(norm.track_running_stats for norm in _batch_norms(model))


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Leaving brings back every module's buffers and mode, and the momentum of batch norm, whatever happened inside."""
    modes = _modes(model)
    momenta = [(norm, norm.momentum) for norm in _batch_norms(model)]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    with kept(buffer for _, _, buffer in buffers if not is_lazy(buffer)):
        try:
            yield
        finally:
            _restore(modes)
            for norm, momentum in momenta:
                norm.momentum = momentum
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _inputs(batches: Iterable[Any]) -> list[Tensor]:
    return [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]


def _statistics(model: nn.Module, batch_norm: Iterable[Tensor] | None, vmap: int | None) -> list[Tensor]:
    """The batches that running statistics are taken from; none where the model keeps no statistics."""
    if batch_norm is None or not has_batch_norm(model):
        return []
    if vmap is not None:
        raise ValueError(
            f"batch_norm re-estimates statistics draw by draw, and vmap={vmap!r} evaluates draws at once; take vmap=None"
        )
    if isinstance(batch_norm, Tensor):
        raise ValueError(f"batch_norm takes batches of inputs, got one tensor {tuple(batch_norm.shape)}; pass x.split(batch_size)")
    batches = _inputs(batch_norm)
    if not batches:
        raise ValueError("batch_norm has no batch to take statistics from; pass batches of training inputs, or None")
    return batches


def _predict(
    model: nn.Module,
    posterior: Posterior | None,
    batches: Sequence[Tensor],
    link: str,
    how: _How,
) -> Prediction:
    method, num_samples, seed, antithetic, vmap, compile, batch_norm = how
    if not isinstance(compile, bool):
        raise ValueError(f"compile must be True or False, got {compile!r}")
    method = method or ("mean" if posterior is None else "mc")
    if link not in ("softmax", "identity"):
        raise ValueError(f"unknown link {link!r}; take 'softmax' or 'identity'")
    if method not in ("mean", "mc"):
        raise ValueError(f"unknown method {method!r}; take 'mean' or 'mc'")
    if method == "mc" and posterior is None:
        raise ValueError("method 'mc' draws from a posterior, and there is none; pass one or take method='mean'")
    if method == "mc":
        num_samples = whole_number("num_samples", num_samples, 1)
    chunk = 0 if vmap is None else whole_number("vmap", vmap, 1, "; it is how many draws are evaluated at once, or None")
    chunk = min(chunk, num_samples) if method == "mc" else 0
    if model.training:
        warnings.warn(
            "model is in training mode; batch-norm statistics and dropout will disturb the posterior predictive",
            UserWarning,
            stacklevel=3,
        )
    if method == "mc" and num_samples < 4:
        warnings.warn(f"an average over {num_samples} draws may be worse than the mean", UserWarning, stacklevel=3)
    statistics = _statistics(model, batch_norm, vmap)
    params = {} if posterior is None else posterior.bind(model)
    averages = _Averages(link, 1.0 if posterior is None else posterior.temperature)
    with torch.no_grad(), kept(params.values()), as_found(model) if statistics else nullcontext():
        numbers: Iterator[int] = iter(range(1))
        if posterior is not None and method == "mc":
            numbers = _written(Draws(posterior, params, seed, compile), num_samples, antithetic)
        elif posterior is not None:
            for name, p in params.items():
                p.copy_(posterior.mean[name])
            torch.clear_autocast_cache()
        if statistics:
            numbers = _settled(model, statistics, numbers, seed)
        outputs = _stacked(model, batches, params, numbers, chunk) if chunk else (_forward(model, batches) for _ in numbers)
        for number, found in enumerate(outputs):
            _check(found, number, posterior, link)
            averages.update(found)
    return averages.prediction()


def _written(draws: Draws, count: int, antithetic: bool) -> Iterator[int]:
    """Numbers of draws; each stands in the parameters when its number comes."""
    for number in range(count):
        if antithetic and number % 2:
            draws.mirror()
        else:
            draws.write(number)
        yield number


def _settled(model: nn.Module, batches: Sequence[Tensor], numbers: Iterator[int], seed: int) -> Iterator[int]:
    """Numbers of draws; when its number comes, the running statistics are those of the draw. The seed decides on dropout."""
    device, modes = next(model.parameters()).device, _modes(model)
    for number in numbers:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(whole_number("seed", seed) % 2**64)
            update_bn(batches, model, device)
        _restore(modes)
        yield number


def _forward(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    device = next(model.parameters()).device
    outputs = [model(x.to(device)) for x in batches]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _stacked(
    model: nn.Module, batches: Sequence[Tensor], params: Mapping[str, Tensor], numbers: Iterator[int], chunk: int
) -> Iterator[Tensor]:
    """The model's outputs for all batches, draw by draw, evaluated for ``chunk`` draws at once."""
    device = next(model.parameters()).device
    stacks = {name: p.new_empty((chunk, *p.shape)) for name, p in params.items()}
    forward = torch.vmap(lambda weights, x: functional_call(model, weights, (x,)), in_dims=(0, None), randomness="different")
    while True:
        rows = 0
        for rows, _ in enumerate(islice(numbers, chunk), start=1):
            for name, p in params.items():
                stacks[name][rows - 1].copy_(p)
        if not rows:
            return
        weights = {name: stack[:rows] for name, stack in stacks.items()}
        yield from torch.cat([forward(weights, x.to(device)) for x in batches], dim=1)


class _Averages:
    """Running means over draws; memory does not grow with their number.

    That of the probabilities is kept as ``top``, the largest log probability so far, and ``total``, the sum of
    exp(log probability - top).
    """

    def __init__(self, link: str, temperature: float = 1.0) -> None:
        self.link, self.temperature, self.count = link, temperature, 0
        self.mean = self.squares = self.top = self.total = self.noise = torch.zeros(())

    def update(self, outputs: Tensor) -> None:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        self.count += 1
        logs = None
        if self.link == "softmax":
            logs = (outputs if self.temperature == 1 else outputs / self.temperature).log_softmax(dim=-1)
        if self.count == 1:
            self.mean, self.squares = outputs.clone(), torch.zeros_like(outputs)
            if logs is not None:
                self.top, self.total, self.noise = logs, torch.ones_like(logs), _entropy(logs)
            return
        gap = outputs - self.mean
        self.mean.add_(gap, alpha=1 / self.count)
        self.squares.addcmul_(gap, outputs - self.mean)
        if logs is not None:
            self.noise.add_(_entropy(logs))
            top = torch.maximum(self.top, logs)
            self.total.mul_(self.top.sub_(top).exp_()).add_(logs.sub_(top).exp_())
            self.top = top

    def prediction(self) -> Prediction:
        variance = self.squares / self.count
        if self.link == "identity":
            return Prediction(None, self.mean, variance, None, None)
        log_probs = self.top + (self.total / self.count).log()
        total = _entropy(log_probs)
        information = (total - self.noise / self.count).clamp_min(0)
        return Prediction(log_probs.exp(), self.mean, variance, total, information, log_probs)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def _check(outputs: Tensor, number: int, posterior: Posterior | None, link: str) -> None:
    if link == "softmax" and (outputs.dim() < 2 or outputs.shape[-1] < 2):
        raise ValueError(
            f"the model gave outputs of shape {tuple(outputs.shape)}; class probabilities need (inputs, classes >= 2), "
            "numbers link='identity'"
        )
    if not outputs.isfinite().all():
        rows = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
        bad = int((~rows.isfinite()).any(dim=1).sum())
        where = ""
        if posterior is not None:
            name = min(posterior.precision, key=lambda n: posterior.precision[n].min().item())
            widest = 1 / math.sqrt(posterior.precision[name].min().item())
            where = f"; posterior variance may be too large (max std {widest:.2g} at {name!r}); try rescale(ess=...)"
        raise RuntimeError(f"draw {number} gave non-finite outputs in {bad} of {len(rows)} rows{where}")
    if link == "softmax" and number == 0 and outputs.numel() and (outputs >= 0).all():
        sums = outputs.sum(dim=-1)
        if torch.allclose(sums, torch.ones_like(sums)):
            raise ValueError("outputs sum to 1 in every row; let the model give logits, not probabilities")
