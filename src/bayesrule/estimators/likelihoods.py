r"""Likelihoods p(y | f) of one number f per example, and their expectations under a Gaussian f.

A generalized linear model, a Gaussian process or a state-space model predicts each example by one number f. Under
:math:`f \sim N(m, v)` all that the rule wants of a likelihood are three numbers per example,

.. math::  E = E_q[\log p], \qquad a = E_q[\partial_f \log p] = \partial_m E, \qquad b = E_q[\partial_f^2 \log p] = 2 \partial_v E

(theorems of Bonnet and Price); the natural parameter of the example's Gaussian site is :math:`(a - b m, b / 2)`.
They are in closed form for :class:`Gaussian` and :class:`Poisson`, and taken by Gauss-Hermite quadrature for the others.

Source: M. E. Khan and W. Lin (2017), Conjugate-Computation Variational Inference, AISTATS. arXiv:1703.04265.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, distributions
from torch.nn.functional import logsigmoid

from .quadrature import gauss_hermite

Number = float | Tensor  # a hyper-parameter; a tensor of shape () where it is to be learned
Terms = tuple[Tensor, Tensor, Tensor]  # a log probability and its first and second derivative, or their expectations
LOG_ROOT_2PI = math.log(2 * math.pi) / 2


@dataclass(frozen=True)
class Likelihood(ABC):
    """p(y | f) of independent examples, each with one number f.

    Shapes: f, or its mean and its variance (>= 0), and all results (..., N); y, as :meth:`check` returns it, (N,).

    Attributes:
        nodes: Gauss-Hermite nodes of expectations that have no closed form, from 1 to 200.
        log_concave: Whether the second derivative is never positive, so that no site has negative precision.
        positive: Names of the hyper-parameters, all positive.
        reach: Radius of the Taylor series of log p(y | f) in f: pi for the logistic function.
    """

    nodes: int = field(default=50, kw_only=True)

    log_concave: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ()

    @property
    def reach(self) -> Number:
        """See above."""
        return math.pi

    def __post_init__(self) -> None:
        gauss_hermite(self.nodes)
        for name in self.positive:
            value = getattr(self, name)
            if (shape := tuple(getattr(value, "shape", ()))) or not 0 < value < math.inf:
                got = f"a tensor of shape {shape}" if shape else f"{value:g}"
                raise ValueError(f"{name} must be one number in (0, inf), got {got}")

    def check(self, y: Tensor, like: Tensor | None = None) -> Tensor:
        """y as floating-point numbers, once they are known to be possible.

        Args:
            y: Observations, shape (N,), of any real dtype.
            like: A tensor whose dtype and device the result takes; without it, integers take the default dtype.

        Raises:
            ValueError: The shape is another, there are no examples, or a value cannot occur under this likelihood.
        """
        y = torch.as_tensor(y)
        if y.dim() != 1 or not len(y):
            raise ValueError(f"y must have shape (examples,) with at least one example, got {tuple(y.shape)}")
        y = y.to(like if like is not None else y if y.is_floating_point() else torch.get_default_dtype())
        for possible, remedy in ((y.isfinite(), "remove or impute it"), self._support(y)):
            if not possible.all():
                first = int((~possible).int().argmax())
                raise ValueError(f"y[{first}] is {y[first].item():g}: {remedy}")
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f) with every normalizing constant."""
        return self._terms(f, y)[0] + self._constant(y)

    def derivatives(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of log p(y | f) with respect to f, in closed form."""
        return self._terms(f, y)[1:]

    def expected_log_prob(self, mean: Tensor, variance: Tensor, y: Tensor) -> Terms:
        """E, a, b: expectations of log p(y | f) and of its first and second derivative under f ~ N(mean, variance).

        Costs at most ``nodes`` evaluations, fewer where variances are small, and the memory of a few. Where the variance is not
        small, b is twice the derivative of E in the variance, of the very sum that is E: so a step of the rule never disagrees
        with the bound, however few the nodes. Differentiable; in the variance, if positive.
        """
        sd, value, slope, curve, lever = variance.sqrt(), *mean.new_zeros(4)
        for x, weight in gauss_hermite(self._enough(variance)):
            here = self._terms(mean + sd * x, y)
            value, slope, curve = value + weight * here[0], slope + weight * here[1], curve + weight * here[2]
            lever = lever + (weight * x) * here[1]
        large = variance > (self.reach / 8) ** 2
        return value + self._constant(y), slope, torch.where(large, lever / torch.where(large, sd, 1.0), curve)

    def _enough(self, variance: Tensor) -> int:
        """How many nodes leave an error of 1e-14 or so: with n of them it is about n! (variance / reach^2)^n."""
        try:
            share = float(variance.detach().max()) / float(torch.as_tensor(self.reach).detach()) ** 2 if variance.numel() else 0.0
        except RuntimeError:  # inside vmap nobody can ask
            return self.nodes
        error = share**2
        for n in range(3, self.nodes):
            error *= n * share
            if error < 1e-14:
                return n
        return self.nodes

    def start(self, y: Tensor) -> Tensor | None:
        """Predictors from the observations alone, for Newton's method to begin with; None where zero is as good."""
        return None

    @abstractmethod
    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        """The distribution of a new y: p(y | f) averaged over f ~ N(mean, variance)."""

    @abstractmethod
    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        """The part of log p(y | f) that depends on f, and its first and second derivative."""

    def _constant(self, y: Tensor) -> Tensor:
        """The other part of log p(y | f)."""
        return y.new_zeros(())

    def _support(self, y: Tensor) -> tuple[Tensor, str]:
        """Which values can occur, once they are finite, and what to do where one cannot."""
        return y.isfinite(), ""

    def _mixture(self, mean: Tensor, variance: Tensor, of: Callable[[Tensor], Any]) -> distributions.Distribution:
        """The mixture over the nodes of what ``of`` makes of f."""
        at, weights = zip(*gauss_hermite(self.nodes), strict=True)
        f = mean[..., None] + variance.sqrt()[..., None] * mean.new_tensor(at)
        logits = mean.new_tensor([math.log(weight) for weight in weights]).expand(f.shape)
        return distributions.MixtureSameFamily(distributions.Categorical(logits=logits), of(f))


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Real numbers, observed with Gaussian noise. Everything is in closed form, and one step of rate 1 is Bayes' rule.

    .. math::  \log p = -\tfrac12 (y - f)^2 / \sigma^2 - \tfrac12 \log 2 \pi \sigma^2

    Args:
        variance: sigma^2 of the noise, in units of y squared; a ValueError unless it is finite and > 0.

    Example:
        >>> Gaussian(variance=0.25).derivatives(torch.tensor([1.0]), torch.tensor([1.5]))
        (tensor([2.]), tensor([-4.]))
    """

    variance: Number = 1.0
    positive = ("variance",)

    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        slope = (y - f) / _tensor(self.variance, f)
        return (f - y) * slope / 2, slope, (-1 / _tensor(self.variance, f)).expand_as(slope)

    def _constant(self, y: Tensor) -> Tensor:
        return -_tensor(self.variance, y).log() / 2 - LOG_ROOT_2PI

    def expected_log_prob(self, mean: Tensor, variance: Tensor, y: Tensor) -> Terms:
        value, slope, curve = self._terms(mean, y)
        return value + curve * variance / 2 + self._constant(y), slope, curve

    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        return distributions.Normal(mean, (variance + _tensor(self.variance, mean)).sqrt())


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""Two classes, 0 and 1. By quadrature, but for the predictive probability of the probit link, :math:`\Phi(m / \sqrt{1 + v})`.

    .. math::  \log p = \log s(z), \quad z = (2 y - 1) f, \qquad s = \mathrm{sigmoid} \text{ or } \Phi

    Args:
        link: ``"logit"`` or ``"probit"``; a ValueError for anything else.

    Example:
        >>> Bernoulli("probit").predictive(torch.tensor([1.0]), torch.tensor([3.0])).probs
        tensor([0.6915])
    """

    link: Literal["logit", "probit"] = "logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.link not in _LINKS:
            raise ValueError(f"link must be one of {', '.join(_LINKS)}, got {self.link!r}")

    @property
    def reach(self) -> Number:
        return math.pi if self.link == "logit" else 2.8  # where the logistic function has a pole, and Phi a zero

    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        value, slope, curve = _LINKS[self.link]((2 * y - 1) * f)
        return value, (2 * y - 1) * slope, curve

    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        if self.link == "probit":
            z = mean / (1 + variance).sqrt()
            return distributions.Bernoulli(logits=_probit(z)[0] - _probit(-z)[0])
        sd, one, zero = variance.sqrt(), *mean.new_full((2,), -math.inf)
        for x, weight in gauss_hermite(self.nodes):
            one = torch.logaddexp(one, logsigmoid(mean + sd * x) + math.log(weight))
            zero = torch.logaddexp(zero, logsigmoid(-mean - sd * x) + math.log(weight))
        return distributions.Bernoulli(logits=one - zero)

    def _support(self, y: Tensor) -> tuple[Tensor, str]:
        remedy = "pass (y + 1) / 2 for labels -1 and 1" if (y.abs() == 1).all() else "recode the two classes as these"
        return (y == 0) | (y == 1), f"labels are 0 and 1; {remedy}"


class _Counts(Likelihood):
    def start(self, y: Tensor) -> Tensor:
        return (y + 0.5).log()  # exp of zero is far from large counts, and Newton's first step from there overflows

    def _support(self, y: Tensor) -> tuple[Tensor, str]:
        return (y >= 0) & (y == y.floor()), "counts are whole numbers >= 0; correct it, or use another likelihood"


@dataclass(frozen=True)
class Poisson(_Counts):
    r"""Counts whose variance is their mean, exp(f). Quadrature in the predictive distribution only.

    .. math::  \log p = y f - e^f - \log y!

    Example:
        >>> Poisson().expected_log_prob(torch.zeros(1), torch.ones(1), torch.tensor([2.0]))[1:]
        (tensor([0.3513]), tensor([-1.6487]))
    """

    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        rate = f.exp()
        return y * f - rate, y - rate, -rate

    def _constant(self, y: Tensor) -> Tensor:
        return -torch.lgamma(y + 1)

    def expected_log_prob(self, mean: Tensor, variance: Tensor, y: Tensor) -> Terms:
        rate = (mean + variance / 2).exp()
        return y * mean - rate + self._constant(y), y - rate, -rate

    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        largest = math.log(torch.finfo(mean.dtype).max) - 1
        return self._mixture(mean, variance, lambda f: distributions.Poisson(f.clamp(max=largest).exp()))


@dataclass(frozen=True)
class NegativeBinomial(_Counts):
    r"""Counts with mean exp(f) and variance mean + dispersion * mean^2: :class:`Poisson` as the dispersion goes to 0.

    .. math::  \log p = y \log s(z) + r \log s(-z) + \log \frac{\Gamma(y + r)}{\Gamma(r)\, y!}, \qquad
               r = 1 / \mathrm{dispersion}, \quad z = f - \log r, \quad s = \mathrm{sigmoid}

    Args:
        dispersion: 1 / r, dimensionless; a ValueError unless it is finite and > 0.

    Example:
        >>> NegativeBinomial(dispersion=0.5).predictive(torch.zeros(1), torch.zeros(1)).variance
        tensor([1.5000])
    """

    dispersion: Number = 1.0
    positive = ("dispersion",)

    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        r = 1 / _tensor(self.dispersion, f)
        z = f - r.log()
        above, below = z.sigmoid(), (-z).sigmoid()
        return y * logsigmoid(z) + r * logsigmoid(-z), y * below - r * above, -(y + r) * above * below

    def _constant(self, y: Tensor) -> Tensor:
        return _log_rising(1 / _tensor(self.dispersion, y), y) - torch.lgamma(y + 1)

    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        r = 1 / _tensor(self.dispersion, mean)
        return self._mixture(mean - r.log(), variance, lambda z: distributions.NegativeBinomial(r, logits=z))


@dataclass(frozen=True)
class StudentT(Likelihood):
    r"""Real numbers with outliers: f plus ``scale`` times a Student-t variable. An outlier's second derivative is positive.

    .. math::  \log p = -\tfrac{\nu + 1}{2} \log(1 + z^2) + \log \Gamma(\tfrac{\nu + 1}{2}) - \log \Gamma(\tfrac{\nu}{2})
               - \tfrac12 \log \pi \nu \sigma^2, \qquad z = (y - f) / (\sigma \sqrt \nu)

    Args:
        df: Degrees of freedom nu, dimensionless, the smaller the heavier the tails; a ValueError unless finite and > 0.
        scale: sigma, in units of y; a ValueError unless finite and > 0. Quadrature wants more nodes where it is small: twenty
            leave errors of 1e-6 if the standard deviation of f is ``scale``, of 1e-3 if it is twice that.

    Example:
        >>> StudentT(df=3.0).derivatives(torch.zeros(2), torch.tensor([1.0, 9.0]))
        (tensor([1.0000, 0.4286]), tensor([-0.5000,  0.0442]))
    """

    df: Number = 4.0
    scale: Number = 1.0
    log_concave = False
    positive = ("df", "scale")

    @property
    def reach(self) -> Number:
        return self.df**0.5 * self.scale

    def _terms(self, f: Tensor, y: Tensor) -> Terms:
        df = _tensor(self.df, f)
        width = df.sqrt() * _tensor(self.scale, f)
        z = (y - f) / width
        weight, steep = 1 / (1 + z.square()), (df + 1) / width
        return -(df + 1) / 2 * z.square().log1p(), steep * z * weight, steep / width * weight * (1 - 2 * weight)

    def _constant(self, y: Tensor) -> Tensor:
        df, scale = _tensor(self.df, y), _tensor(self.scale, y)
        return _log_rising(df / 2, torch.full_like(df, 0.5)) - (math.pi * df).log() / 2 - scale.log()

    def predictive(self, mean: Tensor, variance: Tensor) -> distributions.Distribution:
        return self._mixture(mean, variance, lambda f: distributions.StudentT(_tensor(self.df, f), f, _tensor(self.scale, f)))


def named(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of this name, with its defaults; a likelihood is returned as it is. A ValueError lists the names."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not (isinstance(likelihood, str) and likelihood in _NAMES):
        raise ValueError(f"likelihood must be a Likelihood or one of {', '.join(_NAMES)}, got {likelihood!r}")
    return _NAMES[likelihood]


def _tensor(value: Number, like: Tensor) -> Tensor:
    """A hyper-parameter in the dtype and on the device of a tensor, still within reach of automatic differentiation."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _log_rising(r: Tensor, y: Tensor) -> Tensor:
    """log Gamma(r + y) - log Gamma(r) for y >= 0, by Stirling's series where r is large and the two would cancel."""
    large = r.clamp(min=32.0)
    low, high = ((1 / 12 - (1 / 360 - x**-2 / 1260) * x**-2) / x for x in (large, large + y))
    stirling = (large - 0.5) * (y / large).log1p() + y * ((large + y).log() - 1) + high - low
    return torch.where(r > 32.0, stirling, torch.lgamma(r + y) - torch.lgamma(r))


def _logit(z: Tensor) -> Terms:
    """log sigmoid(z) and its derivatives."""
    down = (-z).sigmoid()
    return logsigmoid(z), down, -z.sigmoid() * down


_TAIL, _TERMS = -5.0, 20  # below, so many terms of Laplace's continued fraction give phi / Phi to 13 digits; above, erfc does


def _probit(z: Tensor) -> Terms:
    """log Phi(z) and its derivatives r and -r (r + z), r = phi / Phi; r + z would cancel in the tail, so it comes by itself."""
    tail, t, body, rest = z < _TAIL, -z.clamp(max=_TAIL), z.clamp(min=_TAIL), torch.zeros_like(z)
    for k in range(_TERMS, 0, -1):
        rest = k / (t + rest)
    below, above = torch.erfc(body * -math.sqrt(0.5)) / 2, torch.erfc(body.clamp(min=0.0) * math.sqrt(0.5)) / 2
    ratio = (-body.square() / 2 - LOG_ROOT_2PI).exp() / below
    value = torch.where(body < 0.0, below.log(), (-above).log1p())
    value = torch.where(tail, -t.square() / 2 - LOG_ROOT_2PI - (t + rest).log(), value)
    slope, plus_z = torch.where(tail, t + rest, ratio), torch.where(tail, rest, ratio + body)
    return value, slope, -slope * plus_z


_LINKS: dict[str, Callable[[Tensor], Terms]] = {"logit": _logit, "probit": _probit}
_NAMES: dict[str, Likelihood] = {
    "gaussian": Gaussian(),
    "bernoulli": Bernoulli(),
    "probit": Bernoulli("probit"),
    "poisson": Poisson(),
    "negative_binomial": NegativeBinomial(),
    "student_t": StudentT(),
}
