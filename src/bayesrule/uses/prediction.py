"""Predict with a posterior: at its mean, or averaged over draws of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from ..drawing import Draws, kept, whole_number
from ..estimators.batches import examples_in, inputs_of, on_device, outputs_of, rows_of
from ..posterior import Posterior
from .averages import LINKS, Averages, Link
from .averages import Prediction as Prediction
from .linear_prediction import Linear, linearization

Method = Literal["mean", "mc", "glm"]
LinkApprox = Literal["probit", "mc", "bridge", "bridge_norm", "quadrature"]
Variance = Literal["layerwise", "exact", "last_layer", "sampled"]


class How(NamedTuple):
    """The arguments of :func:`predict` that say how to draw."""

    method: Method | None
    num_samples: int
    seed: int
    antithetic: bool
    vmap: int | None
    compile: bool
    batch_norm: Iterable[Tensor] | None
    combine: str = "probs"
    link_approx: str = "probit"
    variance: str = "layerwise"
    tau: float = 1.0
    temperature: float | None = None
    noise_variance: float | Tensor | Sequence[float] | None = None
    labels: Tensor | None = None


def predict(
    model: nn.Module,
    posterior: Posterior | None,
    x: Tensor | Mapping[str, Tensor],
    method: Method | None = None,
    num_samples: int = 32,
    *,
    link: Link = "softmax",
    combine: Literal["probs", "logits"] = "probs",
    link_approx: LinkApprox = "probit",
    variance: Variance = "layerwise",
    tau: float = 1.0,
    temperature: float | None = None,
    noise_variance: float | Tensor | None = None,
    labels: Tensor | None = None,
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

    "glm" makes the model linear in its weights around their mean, so that outputs are Gaussian,

    .. math::  f(x) \sim N(f(x; m), V(x)), \qquad V = J S J^T,

    for a forward and K backwards for K outputs ("layerwise" and "exact"), one forward ("last_layer"), or about three forwards a
    draw ("sampled"). A posterior that training did not see, as Laplace's, predicts well only so.

    Args:
        model: Gives logits (outputs, for regression), shape (n, ..., K), or something with ``logits``, in eval mode; in training
            mode a forward also moves the running statistics of batch norm, and without ``batch_norm`` they stay moved.
        posterior: What was learned; None takes the model's weights as they are. Logits are divided by its ``temperature`` before
            they become probabilities, whatever the method.
        x: Inputs, shape (N, ...), or by name, as a tokenizer gives them: the model is called as ``model(**x)``.
        method: "mean", "mc" (Monte Carlo), "glm" (linearized), or None: what the posterior asks for, "mc" if nothing.
        num_samples: Draws S of "mc" and of what else draws; 32 is usual, under 4 is worse than the mean.
        link: "softmax" for classes, "sigmoid" for yes or no by one logit (each output is one), "identity" for regression.
        combine: What "mc" averages: "probs", or "logits", which forgets how far the draws disagree.
        link_approx: How "glm" gets from logits to probabilities: "probit", "mc" (draws of logits), "bridge" and "bridge_norm" (a
            Dirichlet), or "quadrature" (exact, ``link="sigmoid"`` only). All but "probit" know the mutual information.
        variance: How "glm" gets V: "layerwise", exactly, of it what the link needs; "exact", all of it, into ``covariance``;
            "last_layer", as if the other weights were certain; "sampled", by draws, for any number of outputs: a variance is
            off by a share of sqrt(2 / S).
        tau: Draw, or linearize, as if the posterior's ``ess`` were tau times as large; inf is the mean.
        temperature: What logits are divided by; None is the posterior's, or 1.
        noise_variance: Of a regression's targets, a number >= 0 or one for each output; None is the posterior's, or not known.
        labels: Of sequences, shape (N, T), -100 where none counts: gives ``sequence_log_probs``, the log of the mean over draws of
            the probability of each whole sequence.
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
            probabilities already; ``batch_norm`` without a batch, or with ``vmap``; settings that do not fit each other.
        RuntimeError: A draw gave outputs that are not finite; "glm" would take too much memory (the message says what takes less).

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> predict(model, Posterior.point(model), torch.zeros(5, 2), "mc", num_samples=4).probs.shape
        torch.Size([5, 3])

    Source: spelled out for IVON in Shen et al. (2024), section 3; "glm" in Immer et al. (2021), arXiv:2008.08400; "probit" in
    MacKay (1992), Neural Computation 4(5); "bridge" in Hobbhahn et al. (2022), arXiv:2003.01227.
    """
    if not isinstance(x, Tensor | Mapping):
        raise TypeError(f"predict takes inputs as one tensor, shape (N, ...), or tensors by name, got {type(x).__name__}")
    batch_size = whole_number("batch_size", batch_size, 1)
    options = (combine, link_approx, variance, tau, temperature, noise_variance, labels)
    how = How(method, num_samples, seed, antithetic, vmap, compile, batch_norm, *options)
    inputs, count = inputs_of(x), examples_in(x if isinstance(x, Tensor) else dict(x))
    parts = [rows_of(inputs, slice(at, at + batch_size), count) for at in range(0, max(count, 1), batch_size)]
    return predict_batches(model, posterior, parts, link, how)


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
    batches = [inputs_of(batch) for batch in batch_norm]
    if odd := next((batch for batch in batches if not isinstance(batch, Tensor)), None):
        raise TypeError(f"batch_norm takes batches of inputs that are tensors, got {type(odd).__name__}")
    if not batches:
        raise ValueError("batch_norm has no batch to take statistics from; pass batches of training inputs, or None")
    return batches


def predict_batches(
    model: nn.Module,
    posterior: Posterior | None,
    batches: Sequence[Any],
    link: str,
    how: How,
    read: Callable[[Tensor], Tensor] = lambda outputs: outputs,
) -> Prediction:
    """What :func:`predict` does, for inputs in batches.

    Args:
        model: As there.
        posterior: As there.
        batches: Of inputs.
        link: As there.
        how: The rest.
        read: What is predicted, from the outputs for a batch; the batches come in order, draw by draw. "mean" and "mc" only.
    """
    how = _checked(model, posterior, link, how)
    if how.method == "glm":
        assert posterior is not None
        return _linearized(model, posterior, batches, link, how)(how.tau, how.temperature or 1.0).with_noise(how.noise_variance)
    statistics = _statistics(model, how.batch_norm, how.vmap)
    if how.method == "mc" and how.tau != 1:
        assert posterior is not None
        if how.tau == math.inf and posterior.is_gaussian:
            how = how._replace(method="mean")
        else:
            posterior = posterior.rescale(ess=how.tau * posterior.ess)
    params = {} if posterior is None else posterior.bind(model)
    averages = Averages(link, how.temperature or 1.0, how.combine, how.labels)
    with torch.no_grad(), kept(params.values()), as_found(model) if statistics else nullcontext():
        numbers: Iterator[int] = iter(range(1))
        if posterior is not None and how.method == "mc":
            numbers = _written(Draws(posterior, params, how.seed, how.compile), how.num_samples, how.antithetic)
        elif posterior is not None:
            for name, p in params.items():
                p.copy_(posterior.mean[name])
            torch.clear_autocast_cache()
        if statistics:
            numbers = _settled(model, statistics, numbers, how.seed)
        outputs: Iterator[Tensor]
        if how.vmap is None or how.method == "mean":
            outputs = (_forward(model, batches, read) for _ in numbers)
        else:
            outputs = _stacked(model, batches, params, numbers, min(how.vmap, how.num_samples))
        for number, found in enumerate(outputs):
            check_outputs(found, number, posterior, link)
            averages.update(found)
    return averages.prediction().with_noise(how.noise_variance)


def linearized(
    model: nn.Module, posterior: Posterior, batches: Sequence[Any], link: str, how: How
) -> Callable[[float, float], Prediction]:
    """Linearize once, as :func:`predict` with "glm"; then predictions for any tau and temperature."""
    return _linearized(model, posterior, batches, link, _checked(model, posterior, link, how._replace(method="glm")))


def _linearized(
    model: nn.Module, posterior: Posterior, batches: Sequence[Any], link: str, how: How
) -> Callable[[float, float], Prediction]:
    statistics = _statistics(model, how.batch_norm, how.vmap)
    posterior.bind(model)

    def settle() -> None:
        if statistics:
            next(_settled(model, statistics, iter(range(1)), how.seed))

    check = partial(check_outputs, number=0, posterior=posterior, link=link)
    numbered = (how.tau, how.temperature or 1.0, how.num_samples, how.seed, how.antithetic, how.compile, how.labels)
    linear = Linear(link, how.variance, how.link_approx, *numbered, check, settle).checked()
    with as_found(model) if statistics else nullcontext():
        found = linearization(model, posterior, batches, linear)
    return lambda tau, temperature: found.prediction(linear._replace(tau=tau, temperature=temperature))


def _checked(model: nn.Module, posterior: Posterior | None, link: str, how: How) -> How:
    """The arguments with what the posterior says where they are None.

    Raises:
        ValueError: They do not fit each other.
    """
    if not isinstance(how.compile, bool):
        raise ValueError(f"compile must be True or False, got {how.compile!r}")
    method: Any = how.method or ("mean" if posterior is None else posterior.method_hint or "mc")
    temperature, noise = how.temperature, how.noise_variance
    if posterior is not None:
        temperature = posterior.temperature if temperature is None else temperature
        noise = posterior.noise_variance if noise is None else noise
    temperature = 1.0 if temperature is None else temperature
    _refuse(method, posterior, link, temperature, how)
    samples, vmap = how.num_samples, how.vmap
    if method != "mean":
        samples = whole_number("num_samples", samples, 1)
    if vmap is not None:
        vmap = whole_number("vmap", vmap, 1, "; it is how many draws are evaluated at once, or None")
    if model.training:
        warnings.warn(
            "model is in training mode; batch-norm statistics and dropout will disturb the posterior predictive",
            UserWarning,
            stacklevel=4,
        )
    draws = method == "mc" or (method == "glm" and (how.variance == "sampled" or how.link_approx == "mc"))
    if draws and samples < 4:
        warnings.warn(f"an average over {samples} draws may be worse than the mean", UserWarning, stacklevel=4)
    return how._replace(method=method, num_samples=samples, vmap=vmap, temperature=temperature, noise_variance=noise)


def _refuse(method: str, posterior: Posterior | None, link: str, temperature: float, how: How) -> None:
    """What does not fit."""
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; take 'softmax', 'sigmoid' or 'identity'")
    if method not in ("mean", "mc", "glm"):
        raise ValueError(f"unknown method {method!r}; take 'mean', 'mc' or 'glm'")
    if method != "mean" and posterior is None:
        verb = "draws from" if method == "mc" else "linearizes under"
        raise ValueError(f"method {method!r} {verb} a posterior, and there is none; pass one or take method='mean'")
    if not how.tau > 0:
        raise ValueError(f"tau must be a number > 0, or inf for the mean, got {how.tau!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    if how.combine not in ("probs", "logits"):
        raise ValueError(f"unknown combine {how.combine!r}; take 'probs' or 'logits'")
    if how.combine == "logits" and method == "glm":
        raise ValueError("combine='logits' of linearized outputs is the mean; take method='mean'")
    if method == "glm" and how.vmap is not None:
        raise ValueError(f"vmap={how.vmap!r} evaluates draws of 'mc' at once; take vmap=None for 'glm'")
    if how.labels is not None and (link != "softmax" or how.combine == "logits"):
        raise ValueError("labels of sequences need probabilities of classes by draw: link='softmax' and combine='probs'")
    if how.noise_variance is not None:
        if link != "identity":
            raise ValueError(f"noise_variance is that of a regression, link='identity'; got link={link!r}")
        if not (torch.as_tensor(how.noise_variance) >= 0).all():
            raise ValueError(f"noise_variance must be >= 0, got {how.noise_variance!r}")


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


def _forward(model: nn.Module, batches: Sequence[Any], read: Callable[[Tensor], Tensor]) -> Tensor:
    outputs = [read(outputs_of(model, on_device(model, x))) for x in batches]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _stacked(
    model: nn.Module, batches: Sequence[Any], params: Mapping[str, Tensor], numbers: Iterator[int], chunk: int
) -> Iterator[Tensor]:
    """The model's outputs for all batches, draw by draw, evaluated for ``chunk`` draws at once."""
    stacks = {name: p.new_empty((chunk, *p.shape)) for name, p in params.items()}

    def once(weights: Mapping[str, Tensor], x: Any) -> Tensor:
        return outputs_of(lambda *args, **named: functional_call(model, dict(weights), args, named), x)

    forward = torch.vmap(once, in_dims=(0, None), randomness="different")
    while True:
        rows = 0
        for rows, _ in enumerate(islice(numbers, chunk), start=1):
            for name, p in params.items():
                stacks[name][rows - 1].copy_(p)
        if not rows:
            return
        weights = {name: stack[:rows] for name, stack in stacks.items()}
        yield from torch.cat([forward(weights, on_device(model, x)) for x in batches], dim=1)


def check_outputs(outputs: Tensor, number: int, posterior: Posterior | None, link: str) -> None:
    """Refuse what a draw of this number gave where it is no logits, or not finite."""
    if link == "softmax" and (outputs.dim() < 2 or outputs.shape[-1] < 2):
        raise ValueError(
            f"the model gave outputs of shape {tuple(outputs.shape)}; class probabilities need (inputs, classes >= 2), "
            "numbers link='identity', one logit for yes or no link='sigmoid'"
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
