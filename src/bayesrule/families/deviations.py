r"""A Gaussian whose covariance is a diagonal and a few directions: :math:`\Sigma = \operatorname{diag}(c) + D D^T`.

The covariance's counterpart of :class:`~bayesrule.LowRank`, whose precision is of that form: the inverse of the one is not of the
form of the other, so it is a family of its own. It is that of SWAG.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..family import Gaussian
from ..rule import Look, Point
from ..vector import kept
from .low_rank import DiagonalPlusFactor, LowRank


@dataclass(frozen=True, eq=False)
class Deviations(Gaussian):
    r"""A Gaussian whose covariance is a diagonal and K directions, :math:`N(m, (\operatorname{diag}(c) + D D^T) / \text{ess})`.

    Costs P (K + 1) numbers, P K^2 operations once, P K a draw. No exponential family, and nothing steps in it: it is what
    statistics of a trajectory become.

    Args:
        mean: m, shape (P,).
        spread: A :class:`~bayesrule.DiagonalPlusFactor`, the covariance times ess; c > 0.
        ess: What the covariance is divided by.

    Raises:
        ValueError: Shapes do not agree. When it is used while c is not positive, a DomainError.
        TypeError: Something is asked for that only families which learn have.

    Example:
        >>> from bayesrule.families.low_rank import DiagonalPlusFactor
        >>> Deviations(torch.zeros(2), DiagonalPlusFactor(torch.ones(2), torch.tensor([[1.0], [0.0]]))).variance
        tensor([2., 1.])

    Source: W. Maddox et al. (2019), A simple baseline for Bayesian uncertainty in deep learning, arXiv:1902.02476.
    """

    mean: Tensor
    spread: DiagonalPlusFactor
    ess: float = 1.0

    weight_decay = 0.0
    reparameterizable: ClassVar[bool] = False
    matrices: ClassVar[None] = None
    """Neither matrices nor elements: other structures refuse it as a prior."""

    def __post_init__(self) -> None:
        if self.mean.dim() != 1 or self.spread.diagonal.shape != self.mean.shape:
            raise ValueError(
                f"mean and spread must be of one size, shape (P,), got {tuple(self.mean.shape)} and "
                f"{tuple(self.spread.diagonal.shape)}"
            )

    @kept
    def _inverse(self) -> LowRank:
        """The Gaussian whose precision is this one's covariance, times ess."""
        return LowRank(torch.zeros_like(self.mean), self.spread)

    @property
    def metric(self) -> NoReturn:
        raise TypeError("the precision of Deviations has no short form; use stretch, solve and precision_diagonal")

    hess = metric

    def stretch(self, v: Tensor) -> Tensor:
        return self._inverse.precondition(v)

    def precondition(self, v: Tensor) -> Tensor:
        return self.spread @ v

    def root_precondition(self, v: Tensor) -> Tensor:
        r"""R^-T v for the root R of the inverse, which is Sigma R v: as many normals as weights."""
        return self.spread @ self._inverse.root_precondition(v)

    @property
    def variance(self) -> Tensor:
        """Variance of every element, shape (P,)."""
        return (self.spread.diagonal + (self.spread.factor**2).sum(1)) / self.ess

    @property
    def precision_diagonal(self) -> Tensor:
        """The diagonal of the precision, shape (P,), without a matrix of shape (P, P)."""
        return self._inverse.variance * self.ess

    def log_det(self) -> Tensor:
        """Log determinant of the precision."""
        inverse: Tensor = self._inverse.log_det()
        return len(self.mean) * math.log(self.ess) - inverse

    # The distribution

    def to_torch(self) -> MultivariateNormal:
        """The same distribution of torch.distributions, with a covariance of shape (P, P)."""
        return MultivariateNormal(self.mean, self.spread.matrix / self.ess, validate_args=False)

    def entropy(self) -> Tensor:
        return (len(self.mean) * math.log(2 * math.pi * math.e) - self.log_det()) / 2

    def log_prob(self, theta: Tensor) -> Tensor:
        gap = theta - self.mean
        return (self.log_det() - len(gap) * math.log(2 * math.pi) - gap @ self.stretch(gap) * self.ess) / 2

    def kl(self, other: Any) -> Tensor:
        """KL(q || other) in nats, for another of these."""
        if not isinstance(other, Deviations):
            raise TypeError(f"no KL is offered of Deviations from a {type(other).__name__}; average log_prob over draws")
        theirs, gap = other._inverse, other.mean - self.mean
        trace = (theirs.variance * self.spread.diagonal).sum() + theirs.spread(self.spread.factor.mT).sum()
        far = gap @ other.stretch(gap)
        return (trace * (other.ess / self.ess) + far * other.ess - len(gap) + self.log_det() - other.log_det()) / 2

    # What it has not

    def moved(self, *, mean: Tensor | None = None, hess: Any = None) -> Self:
        if hess is not None:
            self.natural()
        return self if mean is None else replace(self, mean=mean)

    def natural(self) -> NoReturn:
        raise TypeError("Deviations are statistics of a trajectory, which nothing steps in; take LowRank, whose precision moves")

    def from_natural(self, natural: Point) -> NoReturn:
        self.natural()

    def expected(self) -> NoReturn:
        self.natural()

    def natural_gradient(self, look: Look) -> NoReturn:
        self.natural()

    def sandwich(self, d: Any) -> NoReturn:
        self.natural()

    def outer(self, a: Point, b: Point) -> NoReturn:
        self.natural()

    def project(self, matrix: Tensor) -> NoReturn:
        self.natural()
