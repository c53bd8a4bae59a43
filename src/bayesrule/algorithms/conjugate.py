r"""Bayes' rule in one step: conjugate pairs of a prior and a likelihood.

Where :math:`\log p(y | \theta) = \langle s(y), T(\theta) \rangle + c(y)` with the statistics T of the prior's family, the natural
gradient of the expected loss is :math:`-s(y)` for every q. One step of the rule with rate 1 is then Bayes' rule, from any start:

.. math::  \lambda = \lambda_0 + \textstyle\sum_i s(y_i), \qquad
           \log p(y) = A(\lambda) - A(\lambda_0) + \textstyle\sum_i c(y_i).

====================================  ================================  ==============================================
likelihood                            prior                             predictive
====================================  ================================  ==============================================
Bernoulli()                           Beta                              Bernoulli
Binomial(trials)                      Beta                              beta-binomial, as a Categorical
Poisson()                             Gamma (the rate)                  NegativeBinomial
Exponential()                         Gamma (the rate)                  Lomax, as a shifted Pareto
Categorical(), Multinomial()          Dirichlet                         Categorical
Normal(variance=)                     Normal (the mean)                 Normal
Normal(mean=)                         Gamma (precision)                 StudentT
Normal(mean=)                         InverseGamma (variance)           StudentT
Normal()                              NormalGamma (mean, precision)     StudentT
MultivariateNormal(covariance=)       Full (the mean)                   MultivariateNormal
MultivariateNormal(mean=)             Wishart (precision)               MultivariateStudentT
MultivariateNormal()                  NormalInverseWishart              MultivariateStudentT
LinearRegression()                    NormalInverseGamma                a function of X, StudentT
VonMises(concentration)               VonMises (the direction)          VonMisesPredictive
====================================  ================================  ==============================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..estimators.curvatures import Zero
from ..estimators.expectations import Exact
from ..families.exponential import Standard
from ..families.gaussian import Full
from ..retractions import Natural
from ..rule import BayesRule, Look, Oracle
from ..vector import Vector
from .pairs import (
    Bernoulli,
    Binomial,
    Categorical,
    Exponential,
    Likelihood,
    Multinomial,
    Normal,
    Poisson,
    VonMises,
)
from .vector_pairs import LinearRegression, MultivariateNormal

__all__ = [
    "BAYES",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Exponential",
    "Likelihood",
    "LinearRegression",
    "Multinomial",
    "MultivariateNormal",
    "Normal",
    "Poisson",
    "Sites",
    "Update",
    "VonMises",
    "update",
]

BAYES = BayesRule(Exact(), Zero(), Natural())
"""Conjugate Bayes as slots; with rate 1 it is Bayes' rule."""

NAMES: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "exponential": Exponential,
    "categorical": Categorical,
    "multinomial": Multinomial,
    "normal": Normal,
    "multivariate_normal": MultivariateNormal,
    "linear_regression": LinearRegression,
}


class Update(NamedTuple):
    """What :func:`update` returns.

    Attributes:
        posterior: A member of the prior's family.
        log_evidence: log p(data), in nats, shape batch_shape.
        predictive: Distribution of the next observation, in double precision; for regression a function from inputs to it.
    """

    posterior: Any
    log_evidence: Tensor
    predictive: Distribution | Callable[[Tensor], Distribution]


@dataclass(frozen=True)
class Sites:
    """The loss of conjugate observations: it knows its natural gradient, which is the same for every q.

    Args:
        natural: The sum of the observations' natural parameters, shaped like that of the family.
    """

    natural: Vector

    def __call__(self, theta: Any) -> Oracle:
        raise TypeError("Sites are looked at as a whole: use the expectation Exact")

    def expected(self, q: Any) -> Look:
        """The look of any q."""
        look: Look = q.as_look(-self.natural)
        return look


def update(prior: Any, likelihood: Likelihood | str, data: Any, *, start: Any = None, rate: float = 1.0) -> Update:
    r"""Bayes' rule for a conjugate pair: posterior, evidence and predictive in closed form.

    Costs a pass over the data; a batch of problems is one call.

    .. math::  \lambda = (1 - \rho) \lambda_\text{start} + \rho\, (\lambda_0 + \textstyle\sum_i s(y_i)).

    As an instance of the rule: the prior's family · Exact · Zero · Natural, one step of rate 1 from any start.

    Args:
        prior: A member of the family that the likelihood is conjugate to; yesterday's posterior, for instance.
        likelihood: One of this module, or the name of one without parameters, such as "bernoulli".
        data: Observations, shape (examples, \*batch_shape, \*event); ``(X, y)`` for LinearRegression.
        start: Where the step starts; the prior, if not given. With rate 1 it does not matter.
        rate: Step size in (0, 1]; below 1 the result lies on the way.

    Returns:
        :class:`Update`: posterior, log_evidence, predictive (the last two those of rate 1 only).

    Raises:
        ValueError: Data are empty, not finite, of a wrong shape, or outside the support.
        TypeError: Prior and likelihood are no pair.

    Example:
        Seven heads in ten throws of a coin:

        >>> import bayesrule as br
        >>> coin = br.conjugate.update(br.Beta(1.0, 1.0), "bernoulli", torch.tensor([1.0] * 7 + [0.0] * 3))
        >>> coin.posterior.mean
        tensor(0.6667)

    Source: Khan and Rue (2023), section 5.1.
    """
    if isinstance(likelihood, str):
        if likelihood not in NAMES:
            raise ValueError(
                f"likelihood must be one of {', '.join(NAMES)} or an object of bayesrule.conjugate, got {likelihood!r}"
            )
        likelihood = NAMES[likelihood]()
    if not isinstance(likelihood, Likelihood) or not isinstance(prior, Standard | Full):
        raise TypeError(f"update takes a family and a likelihood, got {type(prior).__name__} and {type(likelihood).__name__}")
    if not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ValueError(f"rate must be a number in (0, 1], got {rate}")
    if start is not None and type(start) is not type(prior):
        raise TypeError(f"start must be a {type(prior).__name__} like the prior, got a {type(start).__name__}")
    dtype, wide = prior.natural()[0].dtype, prior.to(torch.float64)  # sums over many examples need the digits
    pair = likelihood.of(wide)
    checked = pair.check(wide, data)
    found = BAYES.step(wide if start is None else start.to(torch.float64), wide, Sites(pair.site(wide, *checked)), rate)
    gained = found.log_partition() - wide.log_partition() + pair.constant(wide, *checked)
    return Update(found.to(dtype), gained.to(dtype), pair.predictive(found))
