"""How a step of the rule stays inside the family.

:class:`Natural` is the rule to the letter, for any family. The others are for Gaussians: they move mean and precision at
rates of their own. Which precision moves the mean is a choice: the natural parameters demand the new one, some published
algorithms use the old one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from .family import Gaussian
from .rule import Look, Point, Rates, Retraction
from .vector import axpy, equal, lerp


@dataclass(frozen=True)
class Natural(Retraction):
    r"""The rule to the letter: :math:`\lambda \leftarrow \lambda - \rho\, \nabla_\mu (E_q[\ell] + KL(q \| q_0))`.

    One rate, that of the mean. With rate 1 it forgets where it stood: Bayes' rule for a conjugate loss, Newton's method for a
    Gaussian at its mean. A step may leave the family where curvature is negative.

    Source: Khan and Rue (2023), equation 3.
    """

    def direction(self, q: Any, prior: Any, look: Look, rates: Rates) -> tuple[Any, Point]:
        return q, q.kl_gradient(prior) + q.natural_gradient(look)

    def along(self, q: Any, direction: Point, rates: Rates) -> Any:
        return q.from_natural(q.natural() - direction * rates.mean)


class MeanAndPrecision(Retraction):
    """A Gaussian's precision is moved first, then its mean against the preconditioned gradient of loss and prior."""

    @abstractmethod
    def precision(self, q: Gaussian, curvature: Any, rho: Any) -> Gaussian:
        """q with its precision moved towards the curvature."""

    @abstractmethod
    def slope(self, old: Gaussian, new: Gaussian, prior: Gaussian, look: Look, rates: Rates) -> Point:
        """The preconditioned gradient."""

    def direction(self, q: Gaussian, prior: Gaussian, look: Look, rates: Rates) -> tuple[Gaussian, Point]:
        new = q if look.curvature is None else self.precision(q, look.curvature, rates.precision)
        return new, self.slope(q, new, prior, look, rates)

    def along(self, q: Gaussian, direction: Point, rates: Rates) -> Gaussian:
        return q.moved(mean=axpy(q.mean, direction, -rates.mean))


class _Preconditioned(MeanAndPrecision):
    clip_radius: float
    eps: float
    mean_precision: Literal["new", "old"]

    def slope(self, old: Gaussian, new: Gaussian, prior: Gaussian, look: Look, rates: Rates) -> Point:
        by = new if self.mean_precision == "new" else old
        slope = _damped(by, self.eps).precondition(look.gradient + old.prior_gradient(prior))
        return slope if equal(self.clip_radius, math.inf) else slope.clamp(-self.clip_radius, self.clip_radius)


def _damped(q: Gaussian, eps: Any) -> Gaussian:
    """q with more in its metric, for a division."""
    return q if equal(eps, 0.0) else q.moved(hess=q.hess + eps)


@dataclass(frozen=True)
class Additive(_Preconditioned):
    r"""The rule in mean and precision.

    .. math::  h \leftarrow h + \rho (f - h), \qquad
               m \leftarrow m - \alpha\, (h + \delta)^{-1} (g + \delta (m - m_0)).

    Equal to :class:`Natural` where alpha = rho and the mean is moved by the new precision.

    Args:
        clip_radius: Bound on each element of the preconditioned gradient, before the rate.
        mean_precision: Whether the new or the old precision moves the mean.
        eps: Added to the metric where it divides.
    """

    clip_radius: float = math.inf
    mean_precision: Literal["new", "old"] = "new"
    eps: float = 0.0

    def precision(self, q: Gaussian, curvature: Any, rho: Any) -> Gaussian:
        return q.moved(hess=lerp(q.hess, curvature, rho))


@dataclass(frozen=True)
class Riemannian(_Preconditioned):
    r"""The improved rule (iBLR): a second-order term keeps the precision positive for any curvature.

    .. math::  h \leftarrow h + \rho e + \tfrac{\rho^2}{2}\, e\, (h + \delta)^{-1} e, \qquad e = f - h.

    The metric can at most halve in a step, since the new one is
    :math:`\tfrac12 (h + \delta)\,[(1 + \rho e/(h+\delta))^2 + 1]`. The mean as in :class:`Additive`. A noisy curvature
    biases the precision upwards; a conjugate loss is not solved in one step.

    Args:
        clip_radius: Bound on each element of the preconditioned gradient, before the rate.
        mean_precision: Whether the new or the old precision moves the mean; "new" in IVON, "old" in the source.
        eps: Added to the metric where it divides.
        curvature_ratio: Bound on the curvature, in units of h; inf is none.

    Source: W. Lin, M. Schmidt and M. E. Khan (2020), arXiv:2002.10060.
    """

    clip_radius: float = math.inf
    mean_precision: Literal["new", "old"] = "new"
    eps: float = 0.0
    curvature_ratio: float = math.inf

    def precision(self, q: Gaussian, curvature: Any, rho: Any) -> Gaussian:
        damped = _damped(q, self.eps)
        if not equal(self.curvature_ratio, math.inf):
            curvature = ((curvature / damped.hess).clamp(-self.curvature_ratio, self.curvature_ratio)) * damped.hess
        correction = damped.sandwich(curvature - q.hess)
        return q.moved(hess=axpy(lerp(q.hess, curvature, rho), correction, 0.5 * rho**2))


@dataclass(frozen=True)
class SquareRoot(MeanAndPrecision):
    r"""Adam's scaling: the mean moves by the root of the curvature, a departure from the rule.

    .. math::  s \leftarrow s + \rho (f - s), \qquad m \leftarrow m - \alpha\, \hat g / (\sqrt{\hat s} + \epsilon).

    The root makes up for squared gradients, whose unit is not that of a curvature. It scales steps only; draws, where there are
    any, have the deviation of the family.

    Args:
        eps: Added to the root.
        debias: Undo the start of s at zero, as in Adam.
        decoupled: The prior pulls the mean apart from the scaled gradient, as in AdamW.
    """

    eps: float = 1e-8
    debias: bool = False
    decoupled: bool = False

    def precision(self, q: Gaussian, curvature: Any, rho: Any) -> Gaussian:
        return q.moved(hess=lerp(q.hess, curvature, rho))

    def slope(self, old: Gaussian, new: Gaussian, prior: Gaussian, look: Look, rates: Rates) -> Point:
        pull = old.prior_gradient(prior)
        scale = new.hess / (1 - (1 - rates.precision) ** rates.step) if self.debias else new.hess
        denominator = scale.sqrt() + self.eps
        if self.decoupled:
            return look.gradient / denominator + pull
        return (look.gradient + pull) / denominator
