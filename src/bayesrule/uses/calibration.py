"""Make predictions honest after training: the temperature of the logits, the scale of the posterior, the noise of the targets."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..estimators.batches import inputs_and_labels
from ..estimators.output_losses import shaped_like
from ..posterior import Posterior
from .evaluation import as_classes, noise_of, yes_or_no
from .metrics import check_labels
from .metrics.language import IGNORED
from .metrics.regression import gaussian_nll
from .prediction import How, LinkApprox, Method, Prediction, Variance, linearized, predict_batches

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
    loader: Iterable[Any],
    what: Collection[str] | None = None,
    *,
    method: Method | None = None,
    num_samples: int = 32,
    link: Literal["softmax", "sigmoid"] = "softmax",
    link_approx: LinkApprox = "probit",
    variance: Variance = "layerwise",
    seed: int = 0,
    antithetic: bool = False,
    batch_norm: Iterable[Tensor] | None = None,
) -> Posterior:
    r"""Choose on validation data what training cannot know: how wide the posterior is, and how hot its probabilities.

    .. math:: \min_{\tau, T} \; -\frac1N \sum_i \log \frac1S \sum_s \mathrm{softmax}(f(x_i; \theta_s) / T)_{y_i},
              \qquad \theta_s \sim q^\tau

    With "mc" each tau that is looked at costs one prediction of the data, some 15 in all; the draws are those of ``seed`` for all
    of them, so that they can be compared. "glm" linearizes once, and scales. Temperatures are tried on outputs that are kept,
    ``num_samples`` times those of a forward pass.

    Args:
        model: As for :func:`bayesrule.predict`, in eval mode.
        posterior: What was learned.
        loader: Batches (inputs, labels), or mappings with ``labels``, that played no part in training; labels that are floating
            point are the numbers of a regression with Gaussian noise, but for ``link="sigmoid"``. Read once.
        what: "tau": the scale of the posterior, ess -> tau ess; where nothing beats its mean, that is returned, known exactly, with
            a warning: its draws no longer say anything of unknown data. "temperature": of logits. "noise": the variance of each
            output's noise, of regressions. What is not named stays as it is. None is all that the labels have.
        method: How the posterior will predict.
        num_samples: As for :func:`bayesrule.predict`, and better the same as there.
        link: "sigmoid" for yes or no by one logit, with labels 0 and 1.
        link_approx: As for :func:`bayesrule.predict`, and the same as there.
        variance: As for :func:`bayesrule.predict`, and the same as there.
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
    if link not in ("softmax", "sigmoid"):
        raise ValueError(f"unknown link {link!r} of classes; take 'softmax' or 'sigmoid'; floating point labels are numbers")
    batches = [inputs_and_labels(batch, model) for batch in loader]
    if not batches:
        raise ValueError("there is nothing to calibrate on: the loader gave no batch")
    numbers = batches[0][1].is_floating_point() and link != "sigmoid"
    allowed = ("tau", "noise") if numbers else ("tau", "temperature")
    what = allowed if what is None else (what,) if isinstance(what, str) else tuple(what)
    if not what or not set(what) <= set(allowed):
        kind = "floating point, those of a regression" if numbers else "classes"
        raise ValueError(f"what must name of {allowed}, for the labels are {kind}; got {what}")
    chosen: Any = method or posterior.method_hint or "mc"
    statistics = None if batch_norm is None else list(batch_norm)
    how = How(chosen, num_samples, seed, antithetic, None, False, statistics, link_approx=link_approx, variance=variance)
    free = "noise" in what or "temperature" in what
    data = _Numbers(model, posterior, batches, how, free) if numbers else _Classes(model, posterior, batches, how, free, link)
    tau = _best_tau(data) if "tau" in what and _has_powers(posterior, only=not free) else 1.0
    return data.settled(tau)


def _has_powers(posterior: Posterior, only: bool) -> bool:
    try:
        posterior.rescale(ess=posterior.ess)
    except TypeError as error:
        if only:
            raise ValueError(f"tau cannot be chosen: {error}; take what=('temperature',)") from error
        _warn(f"tau is left as it is: {error}")
        return False
    return True


def _best_tau(data: _Data) -> float:
    """The power of the posterior that predicts best; inf is its mean."""

    def at(log_tau: float) -> float:
        return data.nll(math.exp(log_tau)) if log_tau else data.best(1.0, 1e-3)[0]

    limit = math.log(_FARTHEST)
    least, value = valley(at, 0.0, math.log(_STEP), limit, 0.05)
    if data.posterior.is_gaussian and data.nll(math.inf) <= value:
        _warn("no scale of the posterior predicts these data better than its mean: what is returned is that mean, known exactly")
        return math.inf
    if abs(least) == limit:
        _warn(f"the best tau lies at the limit {math.exp(least):.3g}; check the validation data")
    return math.exp(least)


class _Data(ABC):
    """Validation data, and how to predict them.

    Args:
        model: Predicts.
        posterior: For tau 1.
        batches: Inputs and labels.
        how: To predict.
        free: Whether the temperature, or the noise, is chosen for each tau; else it is the posterior's.
        link: Of the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        batches: Sequence[tuple[Any, Tensor]],
        how: How,
        free: bool,
        link: str = "identity",
    ) -> None:
        self.model, self.posterior, self.how, self.free, self.link = model, posterior, how, free, link
        self.inputs, self.labels = [x for x, _ in batches], [y for _, y in batches]

    def nll(self, tau: float) -> float:
        """For a tau, with its best temperature or noise if they are free; inf where a draw gives no numbers."""
        try:
            return self.best(tau, 1e-3)[0]
        except RuntimeError as error:
            if "non-finite outputs" in str(error):
                return math.inf
            raise

    @abstractmethod
    def best(self, tau: float, tolerance: float = 1e-6) -> tuple[float, Any]:
        """The NLL and the temperature or noise that it is of."""

    @abstractmethod
    def settled(self, tau: float) -> Posterior:
        """The posterior with this tau, and its best temperature or noise."""

    def scaled(self, tau: float) -> Posterior:
        """The posterior with this tau."""
        if tau == 1:
            return self.posterior
        return self.posterior.exact() if tau == math.inf else self.posterior.rescale(ess=self.posterior.ess * tau)

    @cached_property
    def linear(self) -> Callable[[float, float], Prediction]:
        """Predictions for a tau and a temperature."""
        return linearized(self.model, self.posterior, self.inputs, self.link, self.how)


class _Classes(_Data):
    def best(self, tau: float, tolerance: float = 1e-6) -> tuple[float, float]:
        at = self._nll_at(tau)
        if not self.free:
            return at(self.posterior.temperature), self.posterior.temperature
        start, limit = math.log(self.posterior.temperature), math.log(_LIMIT)
        log_t, value = valley(lambda u: at(math.exp(u)), start, math.log(2), limit, tolerance)
        ends = {end: at(end) for end in (1 / _LIMIT, _LIMIT)}  # where all are right, it is 0 long before
        end = min(ends, key=lambda t: ends[t])
        return (ends[end], end) if ends[end] <= value else (value, math.exp(log_t))

    def settled(self, tau: float) -> Posterior:
        if not self.free:
            return self.scaled(tau)
        temperature = self.best(tau)[1]
        if not 1 / _LIMIT < temperature < _LIMIT:
            _warn(f"the NLL has no minimum at a temperature in [{1 / _LIMIT:g}, {_LIMIT:g}]; using {temperature:g}; check the data")
        return replace(self.scaled(tau), temperature=temperature)

    def _nll_at(self, tau: float) -> Callable[[float], float]:
        """The NLL as a function of the temperature."""
        if self.how.method != "glm":
            return partial(_averaged_nll, self._outputs(tau), self._answers)
        self._check(self.linear(tau, 1.0).mean, len(self._answers))
        return lambda t: _nll(as_classes(self.linear(tau, t)), self._answers)

    @cached_property
    def _answers(self) -> Tensor:
        labels = torch.cat([y.flatten() for y in self.labels]).cpu()
        return yes_or_no(labels) if self.link == "sigmoid" else labels.long()

    def _outputs(self, tau: float) -> Tensor:
        """Logits for each draw, shape (draws, labels, classes), on the CPU; those of yes or no are 0 and f."""
        kept: list[Tensor] = []

        def keep(outputs: Tensor) -> Tensor:
            f = outputs.flatten(0, -2) if self.link == "softmax" else outputs.reshape(-1, 1)
            f = f.to("cpu", torch.promote_types(f.dtype, torch.float32))
            kept.append(f if self.link == "softmax" else torch.cat([torch.zeros_like(f), f], -1))
            if len(kept) == 1:
                self._check(outputs, len(self.labels[0]))
            return outputs

        predict_batches(self.model, self.posterior, self.inputs, self.link, self.how._replace(tau=tau), keep)
        return torch.stack([torch.cat(kept[i : i + len(self.inputs)]) for i in range(0, len(kept), len(self.inputs))])

    def _check(self, outputs: Tensor, examples: int) -> None:
        """Refuse what does not fit or is too much to keep."""
        counted, classes = self._answers != IGNORED, 2 if self.link == "sigmoid" else outputs.shape[-1]
        lead = outputs.shape[:1] if self.link == "sigmoid" else outputs.shape[:-1]
        if lead != (examples, *self.labels[0].shape[1:])[: len(lead)]:
            raise ValueError(f"the model gave outputs of shape {tuple(outputs.shape)} for labels {tuple(self.labels[0].shape)}")
        check_labels(self._answers[counted], int(counted.sum()), classes)
        if not counted.any():
            raise ValueError(f"there is nothing to calibrate on: no label differs from {IGNORED}")
        draws = self.how.num_samples if self.how.method == "mc" else 1
        each = draws * classes * max(outputs.element_size(), 4)
        if (size := each * len(self._answers)) > _MOST_BYTES:
            raise RuntimeError(
                f"calibrate would keep {size / 2**30:.3g} GiB of outputs ({len(self._answers)} labels, {classes} classes, {draws} "
                f"draws); pass at most {_MOST_BYTES // each} labels, or take fewer num_samples"
            )


class _Numbers(_Data):
    def best(self, tau: float, tolerance: float = 1e-6) -> tuple[float, tuple[float, ...] | None]:
        if self.how.method == "glm":
            found = self.linear(tau, 1.0)
        else:
            found = predict_batches(self.model, self.posterior, self.inputs, "identity", self.how._replace(tau=tau))
        mean, variance = found.mean.cpu().double(), found.variance.cpu().double()
        targets = shaped_like(mean, torch.cat(self.labels)).cpu().double()
        known = self.posterior.noise_variance
        if not self.free:
            return gaussian_nll(mean, variance + noise_of(self.posterior, None, mean), targets).item(), known
        columns = [x.reshape(-1, mean.shape[-1] if mean.ndim > 1 else 1).unbind(-1) for x in (mean, variance, targets)]
        each = [_noise(m, v, y, tolerance) for m, v, y in zip(*columns, strict=True)]
        return sum(value for value, _ in each) / len(each), tuple(noise for _, noise in each)

    def settled(self, tau: float) -> Posterior:
        return replace(self.scaled(tau), noise_variance=self.best(tau)[1]) if self.free else self.scaled(tau)


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


def _nll(found: Prediction, labels: Tensor) -> float:
    assert found.log_probs is not None
    logs, counted = found.log_probs.flatten(0, -2).cpu().double(), labels != IGNORED
    return -logs[counted].gather(-1, labels[counted][:, None]).mean().item()


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
