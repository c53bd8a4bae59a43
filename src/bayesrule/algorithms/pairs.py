"""Likelihoods and what they are conjugate to: sites, constants, predictives. See :mod:`bayesrule.algorithms.conjugate`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import one_hot

from ..families.circular import VonMises as VonMisesFamily
from ..families.matrices import NormalGamma
from ..families.normal import Normal as NormalFamily
from ..families.positive import Gamma, InverseGamma
from ..families.simplex import Beta, Dirichlet
from ..vector import Vector
from .inputs import numbers
from .predictives import VonMisesPredictive

LOG_2PI = math.log(2 * math.pi)


class Likelihood(ABC):
    """Observations y given theta, with log p = <site(y), T(theta)> + constant(y). Sums are over the first dimension."""

    prior: ClassVar[type]

    def of(self, prior: Any) -> Likelihood:
        """This likelihood with this kind of prior."""
        if not isinstance(prior, self.prior):
            raise TypeError(f"{type(self).__name__} is conjugate to {self.prior.__name__}, got a prior {type(prior).__name__}")
        return self

    def check(self, prior: Any, data: Any) -> tuple[Any, ...]:
        """The data as tensors in the prior's dtype, shape (examples, *batch_shape, *event)."""
        like = prior.natural()[0]
        data = numbers(data, "data").to(like)
        event = self._event(prior)
        wanted = (*prior.batch_shape, *event)
        if data.dim() == 0 or data.shape[1:] != wanted:
            names = ", ".join(["examples", *map(str, wanted)])
            raise ValueError(f"data must have shape ({names}{',' if not wanted else ''}), got {tuple(data.shape)}")
        if not len(data):
            raise ValueError("data is empty: give at least one observation")
        if not (finite := data.isfinite()).all():
            raise ValueError(f"data has {int((~finite).sum())} entries that are not finite; remove or impute them")
        self._support(prior, data)
        return (data,)

    def _event(self, prior: Any) -> tuple[int, ...]:
        return ()

    def _support(self, prior: Any, data: Tensor) -> None:
        """Raise ValueError for observations that cannot occur."""
        return

    @abstractmethod
    def site(self, prior: Any, *data: Any) -> Vector:
        """Natural parameter of all the observations."""

    def constant(self, prior: Any, *data: Any) -> Any:
        """What the log likelihood has beside the site, shape batch_shape."""
        return 0.0

    @abstractmethod
    def predictive(self, posterior: Any) -> Any:
        """Distribution of the next observation."""


def _demand(data: Tensor, valid: Tensor, words: str) -> None:
    if not valid.all():
        raise ValueError(f"data must be {words}, got {data[~valid][0].item():g}")


def _whole(data: Tensor) -> Tensor:
    return (data >= 0) & (data == data.round())


def as_known(name: str, value: Any, like: Tensor, batch: Any) -> Tensor:
    """A known parameter as a tensor that broadcasts over the batch."""
    tensor = numbers(value, name).to(like)
    try:
        if torch.broadcast_shapes(tensor.shape, batch) == torch.Size(batch):
            return tensor
    except RuntimeError:
        pass
    raise ValueError(f"{name} must be a number or have the batch shape {tuple(batch)} of the prior, got {tuple(tensor.shape)}")


def known(name: str, value: Any, positive: bool = False) -> None:
    """Raise ValueError unless a known parameter is finite, and positive where it must be."""
    tensor = numbers(value, name)
    if not tensor.isfinite().all() or (positive and not (tensor > 0).all()):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {tensor.tolist()}")


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Coins: y is 0 or 1."""

    prior = Beta

    def _support(self, prior: Any, data: Tensor) -> None:
        _demand(data, (data == 0) | (data == 1), "0 or 1")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([data[0].sum(0), (1 - data[0]).sum(0)])

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.Bernoulli(probs=posterior.mean)


@dataclass(frozen=True)
class Binomial(Likelihood):
    """Numbers of heads in a known number of throws.

    Args:
        trials: Throws of each observation.
    """

    trials: int
    prior = Beta

    def __post_init__(self) -> None:
        if not (
            isinstance(self.trials, int | float)
            and math.isfinite(self.trials)
            and self.trials >= 1
            and self.trials == int(self.trials)
        ):
            raise ValueError(f"trials must be a whole number of at least 1, got {self.trials}")

    def _support(self, prior: Any, data: Tensor) -> None:
        _demand(data, _whole(data) & (data <= self.trials), f"whole numbers from 0 to {self.trials} (trials)")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([data[0].sum(0), (self.trials - data[0]).sum(0)])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        return self._log_choose(data[0]).sum(0)

    def _log_choose(self, count: Tensor) -> Tensor:
        return math.lgamma(self.trials + 1) - torch.lgamma(count + 1) - torch.lgamma(self.trials - count + 1)

    def predictive(self, posterior: Any) -> td.Distribution:
        a, b = posterior.concentration1[..., None], posterior.concentration0[..., None]
        count = torch.arange(self.trials + 1, dtype=a.dtype, device=a.device)
        both = torch.lgamma(a + count) + torch.lgamma(b + self.trials - count)
        return td.Categorical(logits=self._log_choose(count) + both)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """Counts with an unknown rate."""

    prior = Gamma

    def _support(self, prior: Any, data: Tensor) -> None:
        _demand(data, _whole(data), "counts, whole and not negative")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([data[0].sum(0), -torch.ones_like(data[0]).sum(0)])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        return -torch.lgamma(data[0] + 1).sum(0)

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.NegativeBinomial(posterior.concentration, probs=1 / (posterior.rate + 1))


@dataclass(frozen=True)
class Exponential(Likelihood):
    """Waiting times with an unknown rate."""

    prior = Gamma

    def _support(self, prior: Any, data: Tensor) -> None:
        _demand(data, data >= 0, "waiting times, not negative")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([torch.ones_like(data[0]).sum(0), -data[0].sum(0)])

    def predictive(self, posterior: Any) -> td.Distribution:
        pareto = td.Pareto(posterior.rate, posterior.concentration)
        return td.TransformedDistribution(pareto, [td.AffineTransform(-posterior.rate, 1.0)])


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Class numbers from 0 to K - 1."""

    prior = Dirichlet

    def _support(self, prior: Any, data: Tensor) -> None:
        size = prior.concentration.shape[-1]
        _demand(data, _whole(data) & (data < size), f"class numbers from 0 to {size - 1}")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([one_hot(data[0].long(), prior.concentration.shape[-1]).to(data[0].dtype).sum(0)])

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.Categorical(probs=posterior.mean)


@dataclass(frozen=True)
class Multinomial(Likelihood):
    """Counts of K classes; the predictive is that of one more trial."""

    prior = Dirichlet

    def _event(self, prior: Any) -> tuple[int, ...]:
        return (prior.concentration.shape[-1],)

    def _support(self, prior: Any, data: Tensor) -> None:
        _demand(data, _whole(data), "counts, whole and not negative")

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([data[0].sum(0)])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        return (torch.lgamma(data[0].sum(-1) + 1) - torch.lgamma(data[0] + 1).sum(-1)).sum(0)

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.Categorical(probs=posterior.mean)


@dataclass(frozen=True)
class Normal(Likelihood):
    """Real numbers with a normal distribution; what is known of it is given, what is not has the prior.

    Args:
        mean: Known mean.
        variance: Known variance.
    """

    mean: Any = None
    variance: Any = None

    def of(self, prior: Any) -> Likelihood:
        pairs = {
            (False, True): (NormalFamily,),
            (True, False): (Gamma, InverseGamma),
            (False, False): (NormalGamma,),
        }
        wanted = pairs.get((self.mean is not None, self.variance is not None), ())
        if not isinstance(prior, wanted):
            names = " or ".join(family.__name__ for family in wanted) or "nothing: one of mean and variance is to be unknown"
            raise TypeError(f"{self} is conjugate to {names}, got a prior {type(prior).__name__}")
        if self.variance is not None:
            known("variance", self.variance, positive=True)
            return _NormalMean(as_known("variance", self.variance, prior.natural()[0], prior.batch_shape))
        if self.mean is not None:
            known("mean", self.mean)
            return _NormalScale(as_known("mean", self.mean, prior.natural()[0], prior.batch_shape))
        return _NormalBoth()

    def site(self, prior: Any, *data: Any) -> Vector:
        return self.of(prior).site(prior, *data)

    def predictive(self, posterior: Any) -> Any:
        return self.of(posterior).predictive(posterior)


@dataclass(frozen=True)
class _NormalMean(Likelihood):
    variance: Any

    def site(self, prior: Any, *data: Any) -> Vector:
        ones = torch.ones_like(data[0])
        return Vector([(data[0] / self.variance).sum(0), (ones / self.variance).sum(0) / -2])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        variance = data[0] * 0 + self.variance
        return -(data[0] ** 2 / variance + variance.log() + LOG_2PI).sum(0) / 2

    def predictive(self, posterior: Any) -> td.Distribution:
        return td.Normal(posterior.loc, (1 / posterior.precision + self.variance).sqrt())


@dataclass(frozen=True)
class _NormalScale(Likelihood):
    """Variance (InverseGamma) or precision (Gamma) unknown: the two differ in the sign of log T."""

    mean: Any

    def site(self, prior: Any, *data: Any) -> Vector:
        half = torch.ones_like(data[0]).sum(0) / 2
        return Vector([half if isinstance(prior, Gamma) else -half, ((data[0] - self.mean) ** 2).sum(0) / -2])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        return torch.ones_like(data[0]).sum(0) * (-LOG_2PI / 2)

    def predictive(self, posterior: Any) -> td.Distribution:
        loc = posterior.rate * 0 + self.mean
        return td.StudentT(2 * posterior.concentration, loc, (posterior.rate / posterior.concentration).sqrt())


@dataclass(frozen=True)
class _NormalBoth(Likelihood):
    def site(self, prior: Any, *data: Any) -> Vector:
        half, (y,) = torch.ones_like(data[0]).sum(0) / 2, data
        return Vector([half, (y**2).sum(0) / -2, y.sum(0), -half])

    constant = _NormalScale.constant

    def predictive(self, posterior: Any) -> td.Distribution:
        spread = posterior.rate * (posterior.kappa + 1) / (posterior.concentration * posterior.kappa)
        return td.StudentT(2 * posterior.concentration, posterior.loc, spread.sqrt())


@dataclass(frozen=True)
class VonMises(Likelihood):
    """Angles in radians around an unknown direction.

    Args:
        concentration: Known concentration of the observations.
    """

    concentration: float
    prior = VonMisesFamily

    def __post_init__(self) -> None:
        known("concentration", self.concentration, positive=True)

    def site(self, prior: Any, *data: Any) -> Vector:
        return Vector([data[0].cos().sum(0) * self.concentration, data[0].sin().sum(0) * self.concentration])

    def constant(self, prior: Any, *data: Any) -> Tensor:
        k = torch.ones_like(data[0]) * self.concentration
        return -(LOG_2PI + torch.special.i0e(k).log() + k).sum(0)

    def predictive(self, posterior: Any) -> td.Distribution:
        return VonMisesPredictive(posterior.loc, posterior.concentration, self.concentration)
