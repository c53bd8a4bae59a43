"""Make predictions honest after training: the temperature of the logits, the scale of the posterior, the noise of the targets."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..posterior import Posterior
from .evaluation import evaluate, noise_of, of_outputs
from .metrics import check_labels
from .metrics.language import IGNORED
from .metrics.regression import gaussian_nll
from .prediction import Method, _How, _predict

_LIMIT = 1e4  # temperatures are sought in [1 / _LIMIT, _LIMIT]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature T > 0 whose probabilities ``softmax(logits / T)`` have the smallest NLL.

    The baseline that every Bayesian method has to face: one number fitted on validation data, no change of accuracy.
    It costs some ten passes over the logits, in float64 on the CPU, and always gives the same answer.

    .. math:: \min_T \; \frac1N \sum_i -\log \mathrm{softmax}(z_i / T)_{y_i}

    The NLL is convex in :math:`1/T`, with slope :math:`E_p[z] - z_y` and curvature :math:`\mathrm{Var}_p[z]`. The root
    of the slope is found by Newton's method in :math:`\log(1/T)`, inside a bracket that halves wherever Newton leaves.

    Args:
        logits: Outputs for the validation examples, before softmax, shape (N, K).
        labels: True classes, integers in [0, K), shape (N,).

    Returns:
        The temperature, dimensionless: above 1 where the network is too sure, below 1 where it is not sure enough.

    Raises:
        ValueError: If shapes disagree, labels are out of range, a logit is not finite or there are no examples.

    Warns:
        UserWarning: If no temperature in [1e-4, 1e4] is the best, as when every example is right or the logits are no
            better than chance; the nearer limit is returned.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 0, 1])  # as sure as sigmoid(2) = 0.88, but right in 0.75
        >>> round(fit_temperature(logits, labels), 4)
        1.8205

    Source: Guo et al. (2017), On calibration of modern neural networks, section 4.2. arXiv:1706.04599.
    """
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have shape (examples, classes), neither empty; got {tuple(logits.shape)}")
    check_labels(labels, *logits.shape)
    z = logits.detach().cpu().double()
    if not z.isfinite().all():
        raise ValueError(f"logits must be finite; got {z[~z.isfinite()][0].item()}")
    z = z - z.amax(1, keepdim=True)  # also keeps the largest logits exact
    label = z.gather(1, labels.cpu().long()[:, None])

    def slope(u: float) -> tuple[float, float]:  # of the NLL in 1/T = exp(u), and how it changes with u
        p = (z * math.exp(u)).softmax(1)
        expected = (p * z).sum(1, keepdim=True)
        variance = (p * (z - expected).square()).sum(1)
        return (expected - label).mean().item(), variance.mean().item() * math.exp(u)

    high = math.log(_LIMIT)
    low = -high
    for end, beyond in ((low, slope(low)[0] >= 0), (high, slope(high)[0] <= 0)):
        if beyond:
            temperature = math.exp(-end)
            cause = "the logits are no better than chance" if end < 0 else "every example is classified right"
            warnings.warn(
                f"the NLL has no minimum at a temperature in [{1 / _LIMIT:g}, {_LIMIT:g}], as when {cause}; "
                f"using {temperature:g}; check the validation data",
                stacklevel=2,
            )
            return temperature
    u = 0.0
    for _ in range(200):
        value, change = slope(u)
        low, high = (low, u) if value > 0 else (u, high)
        following = u - value / change if change > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        u, step = following, abs(following - u)
        if step < 1e-13:
            break
    return math.exp(-u)


_STEP = 4.0  # the scale is sought by factors of that,
_FARTHEST = _STEP**10  # at most so far from that of training
_MOST_BYTES = 2**31  # of outputs that are kept


def calibrate(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[tuple[Tensor, Tensor]],
    what: Collection[str] = ("tau", "temperature"),
    *,
    method: Method | None = None,
    num_samples: int = 32,
    seed: int = 0,
    antithetic: bool = False,
    batch_norm: Iterable[Tensor] | None = None,
) -> Posterior:
    r"""Choose on validation data what training cannot know: how wide the posterior is, and how hot its probabilities.

    .. math:: \min_{\tau, T} \; -\frac1N \sum_i \log \frac1S \sum_s \mathrm{softmax}(f(x_i; \theta_s) / T)_{y_i},
              \qquad \theta_s \sim q^\tau

    Each tau that is looked at costs one prediction of the data, some 15 in all; the draws are those of ``seed`` for all of them, so
    that they can be compared. Temperatures are tried on outputs that are kept, ``num_samples`` times those of a forward pass.

    Args:
        model: As for :func:`bayesrule.predict`, in eval mode.
        posterior: What was learned.
        loader: Batches (inputs, labels) that played no part in training; labels that are floating point are the numbers of a
            regression with Gaussian noise. Read once.
        what: "tau": the scale of the posterior, ess -> tau ess; where nothing beats its mean, that is returned, known exactly, with
            a warning: its draws no longer say anything of unknown data. "temperature": of logits. "noise": the variance of each
            output's noise, of regressions. What is not named stays as it is.
        method: How the posterior will predict.
        num_samples: As for :func:`bayesrule.predict`, and better the same as there.
        seed: Which draws.
        antithetic: As for :func:`bayesrule.predict`.
        batch_norm: As for :func:`bayesrule.predict`.

    Returns:
        The posterior with another ``ess``, ``temperature`` or ``noise_variance``, which :func:`bayesrule.predict` and
        :func:`bayesrule.evaluate` use, and files keep. Accuracy is chosen for by nobody, but a scale may change it.

    Raises:
        ValueError: ``what`` names something else, nothing that these labels have, or only "tau" of a posterior that has no powers;
            there are no data, or they do not fit the model.
        RuntimeError: The outputs to keep are larger than 2 GiB; the message says how many examples would do.

    Warns:
        UserWarning: The posterior has no powers (a mixture, dropout), so that "tau" is left out; or the best value lies at a limit.

    Example:
        >>> model = nn.Linear(1, 2).eval()
        >>> x = torch.linspace(-2, 2, 64)[:, None]
        >>> post = Posterior({"weight": torch.tensor([[-9.0], [9.0]])}, {"weight": torch.full((2, 1), 4.0)})
        >>> labels = (torch.sin(40 * x[:, 0]) + 2 * x[:, 0] > 0).long()  # as sure of wrong answers as of right ones
        >>> calibrate(model, post, [(x, labels)], ("temperature",)).temperature > 2
        True

    Source: temperatures, Guo et al. (2017), arXiv:1706.04599; the scale, section 5 of Wenzel et al. (2020), arXiv:2002.02405.
    """
    if not isinstance(posterior, Posterior):
        raise ValueError(
            f"calibrate needs a posterior, got {type(posterior).__name__}; of a bare model take Posterior.point(model)"
        )
    what = (what,) if isinstance(what, str) else tuple(what)
    batches = [(batch[0], batch[1]) for batch in loader]
    if not batches:
        raise ValueError("there is nothing to calibrate on: the loader gave no batch")
    numbers = batches[0][1].is_floating_point()
    allowed = ("tau", "noise") if numbers else ("tau", "temperature")
    if not what or not set(what) <= set(allowed):
        kind = "floating point, those of a regression" if numbers else "classes"
        raise ValueError(f"what must name of {allowed}, for the labels are {kind}; got {what}")
    chosen = method or getattr(posterior, "method_hint", None) or "mc"
    how = _How(chosen, num_samples, seed, antithetic, None, False, None if batch_norm is None else list(batch_norm))
    free = "noise" in what or "temperature" in what
    data = (_Numbers if numbers else _Classes)(model, batches, how, free)
    if "tau" in what and _has_powers(posterior, only=not free):
        posterior = _scaled(data, posterior)
    return data.settled(posterior) if free else posterior


def _has_powers(posterior: Posterior, only: bool) -> bool:
    try:
        posterior.rescale(ess=posterior.ess)
    except TypeError as error:
        if only:
            raise ValueError(f"tau cannot be chosen: {error}; take what=('temperature',)") from error
        _warn(f"tau is left as it is: {error}")
        return False
    return True


def _scaled(data: _Data, posterior: Posterior) -> Posterior:
    """The power of the posterior that predicts best."""

    def at(log_tau: float) -> float:
        return data.nll(posterior.rescale(ess=posterior.ess * math.exp(log_tau))) if log_tau else data.best(posterior, 1e-3)[0]

    limit = math.log(_FARTHEST)
    least, value = valley(at, 0.0, math.log(_STEP), limit, 0.05)
    if posterior.is_gaussian and data.nll(posterior.exact()) <= value:
        _warn("no scale of the posterior predicts these data better than its mean: what is returned is that mean, known exactly")
        return posterior.exact()
    if abs(least) == limit:
        _warn(f"the best tau lies at the limit {math.exp(least):.3g}; check the validation data")
    return posterior.rescale(ess=posterior.ess * math.exp(least))


class _Data(ABC):
    """Validation data, and how to predict them.

    Args:
        model: Predicts.
        batches: Inputs and labels.
        how: To predict.
        free: Whether the temperature, or the noise, is chosen for each posterior; else it is the posterior's.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], how: _How, free: bool) -> None:
        self.model, self.how, self.free = model, how, free
        self.inputs, self.labels = [x for x, _ in batches], [y for _, y in batches]

    def nll(self, posterior: Posterior) -> float:
        """Of the posterior, with its best temperature or noise if they are free; inf where a draw gives no numbers."""
        try:
            return self.best(posterior, 1e-3)[0]
        except RuntimeError as error:
            if "non-finite outputs" in str(error):
                return math.inf
            raise

    @abstractmethod
    def best(self, posterior: Posterior, tolerance: float = 1e-6) -> tuple[float, Any]:
        """The NLL and the temperature or noise that it is of."""

    @abstractmethod
    def settled(self, posterior: Posterior) -> Posterior:
        """The posterior with its best temperature or noise."""


class _Classes(_Data):
    def best(self, posterior: Posterior, tolerance: float = 1e-6) -> tuple[float, float]:
        at = self._nll_at(posterior)
        if not self.free:
            return at(posterior.temperature), posterior.temperature
        start, limit = math.log(posterior.temperature), math.log(_LIMIT)
        log_t, value = valley(lambda u: at(math.exp(u)), start, math.log(2), limit, tolerance)
        ends = {end: at(end) for end in (1 / _LIMIT, _LIMIT)}  # where all are right, it is 0 long before
        end = min(ends, key=lambda t: ends[t])
        return (ends[end], end) if ends[end] <= value else (value, math.exp(log_t))

    def settled(self, posterior: Posterior) -> Posterior:
        temperature = self.best(posterior)[1]
        if not 1 / _LIMIT < temperature < _LIMIT:
            _warn(f"the NLL has no minimum at a temperature in [{1 / _LIMIT:g}, {_LIMIT:g}]; using {temperature:g}; check the data")
        return replace(posterior, temperature=temperature)

    def _nll_at(self, posterior: Posterior) -> Callable[[float], float]:
        """The NLL as a function of the temperature."""
        if self.how.method in ("mean", "mc"):
            return partial(_averaged_nll, self._outputs(posterior), self._answers)
        pairs = list(zip(self.inputs, self.labels, strict=True))
        more: dict[str, Any] = dict(zip(_How._fields[:7], self.how[:7], strict=True))  # what evaluate takes
        return lambda t: evaluate(self.model, replace(posterior, temperature=t), pairs, metrics=("nll",), **more)["nll"]

    @cached_property
    def _answers(self) -> Tensor:
        return torch.cat([y.flatten() for y in self.labels]).cpu().long()

    def _outputs(self, posterior: Posterior) -> Tensor:
        """Of the model for each draw, shape (draws, labels, classes), on the CPU."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, _: Any, outputs: Tensor) -> None:
            if self.how.batch_norm is not None and module.training:
                return  # a pass for running statistics
            if not kept:
                self._check(outputs)
            kept.append(outputs.flatten(0, -2).to("cpu", torch.promote_types(outputs.dtype, torch.float32)))

        hook = self.model.register_forward_hook(keep)
        try:
            _predict(self.model, posterior, self.inputs, "softmax", self.how)
        finally:
            hook.remove()
        return torch.stack([torch.cat(kept[i : i + len(self.inputs)]) for i in range(0, len(kept), len(self.inputs))])

    def _check(self, outputs: Tensor) -> None:
        """Refuse, at the first batch, what does not fit or is too much to keep."""
        counted = self._answers != IGNORED
        if outputs.shape[:-1] != self.labels[0].shape:
            raise ValueError(f"the model gave outputs of shape {tuple(outputs.shape)} for labels {tuple(self.labels[0].shape)}")
        check_labels(self._answers[counted], int(counted.sum()), outputs.shape[-1])
        if not counted.any():
            raise ValueError(f"there is nothing to calibrate on: no label differs from {IGNORED}")
        draws = self.how.num_samples if self.how.method == "mc" else 1
        each = draws * outputs.shape[-1] * max(outputs.element_size(), 4)
        if (size := each * len(self._answers)) > _MOST_BYTES:
            raise RuntimeError(
                f"calibrate would keep {size / 2**30:.3g} GiB of outputs ({len(self._answers)} labels, {outputs.shape[-1]} "
                f"classes, {draws} draws); pass at most {_MOST_BYTES // each} labels, or take fewer num_samples"
            )


class _Numbers(_Data):
    def best(self, posterior: Posterior, tolerance: float = 1e-6) -> tuple[float, tuple[float, ...] | None]:
        found = _predict(self.model, posterior, self.inputs, "identity", self.how)
        mean, variance = found.mean.cpu().double(), found.variance.cpu().double()
        targets = of_outputs(torch.cat(self.labels), mean).double()
        if not self.free:
            return gaussian_nll(mean, variance + noise_of(posterior, None, mean), targets).item(), posterior.noise_variance
        columns = [x.reshape(-1, mean.shape[-1] if mean.ndim > 1 else 1).unbind(-1) for x in (mean, variance, targets)]
        each = [_noise(m, v, y, tolerance) for m, v, y in zip(*columns, strict=True)]
        return sum(value for value, _ in each) / len(each), tuple(noise for _, noise in each)

    def settled(self, posterior: Posterior) -> Posterior:
        return replace(posterior, noise_variance=self.best(posterior)[1])


def _noise(mean: Tensor, variance: Tensor, targets: Tensor, tolerance: float) -> tuple[float, float]:
    """The NLL of one output, and the variance of the noise that it is of."""
    size = (targets - mean).square().mean().item()
    if not size > 0:
        raise ValueError("every target is predicted exactly, so that its noise has no variance; calibrate on data not learned from")
    start, limit = 0.0, math.log(_LIMIT**2)
    u, value = valley(
        lambda u: gaussian_nll(mean, variance + size * math.exp(u), targets).item(), start, math.log(4), limit, tolerance
    )
    return value, size * math.exp(u)


def _averaged_nll(outputs: Tensor, labels: Tensor, temperature: float) -> float:
    """Of probabilities at a temperature that are averaged over draws; outputs (draws, N, K)."""
    counted = labels != IGNORED
    right = labels[counted][:, None]
    logs = [(one[counted].double() / temperature).log_softmax(-1).gather(-1, right) for one in outputs]
    return -(torch.stack(logs).logsumexp(0) - math.log(len(outputs))).mean().item()


def valley(function: Callable[[float], float], start: float, step: float, limit: float, tolerance: float) -> tuple[float, float]:
    """Where a function of one valley in [-limit, limit] is least, and how much that is.

    Walks downhill from the start until it rises or ends, then narrows by golden sections.

    Example:
        >>> x, y = valley(lambda x: (x - 2) ** 2, 0.0, 1.0, 10.0, 1e-6)
        >>> round(x, 5), valley(lambda x: x, 0.0, 1.0, 10.0, 1e-6)
        (2.0, (-10.0, -10.0))
    """
    at = cache(function)
    low, middle, high = max(start - step, -limit), start, min(start + step, limit)
    while at(low) < at(middle) and low > -limit:
        low, middle, high = max(low - step, -limit), low, middle
    while at(high) < at(middle) and high < limit:
        low, middle, high = middle, high, min(high + step, limit)
    seen, golden = [middle, low, high], (math.sqrt(5) - 1) / 2
    while high - low > tolerance:
        left, right = high - golden * (high - low), low + golden * (high - low)
        seen += [left, right]
        low, high = (low, right) if at(left) <= at(right) else (left, high)
    return min(((x, at(x)) for x in seen), key=lambda pair: pair[1])


def _warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=4)
