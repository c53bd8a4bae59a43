"""Gradient descent, RMSprop and Adam: the rule without draws.

Each is equal to its twin in ``torch.optim`` up to rounding, and there to show it; in production take torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..estimators.curvatures import SquaredGradient, Zero
from ..estimators.expectations import Delta
from ..families.gaussian import Diagonal, Fixed
from ..family import Gaussian
from ..momentum import HeavyBall, Momentum
from ..retractions import Additive, SquareRoot
from ..rule import BayesRule, NoInertia, Rates
from ..vector import equal
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, FRACTION, SWITCH, Pair
from .optimizer import BayesOptimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class SGD(BayesOptimizer):
    r"""Stochastic gradient descent with momentum.

    Costs no state (one tensor with momentum).

    .. math::  v \leftarrow \mu v + (1 - d)(g + \delta m), \qquad m \leftarrow m - \alpha v.

    As an instance of the rule: Fixed Gaussian N(m, I), looked at in its mean, moved by the KL heavy ball.

    Args:
        params: Parameters or groups.
        lr: Learning rate alpha, >= 0.
        momentum: mu, in [0, 1).
        dampening: d, in [0, 1).
        weight_decay: delta, >= 0.
        nesterov: Nesterov's momentum.
        compile: Whether steps are compiled, see :class:`bayesrule.BayesOptimizer`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> opt = SGD([w], lr=0.25)
        >>> w.square().backward()
        >>> opt.step()
        >>> w.item()
        0.5

    Differs from: torch.optim.SGD has ``maximize``; a step without any gradient raises here.
    Source: Khan and Rue (2023), section 3.
    """

    names = Names(None, "momentum_buffer")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "momentum": FRACTION,
        "dampening": FRACTION,
        "weight_decay": AT_LEAST_ZERO,
        "nesterov": SWITCH,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        beta = group["momentum"]
        ball = HeavyBall(beta, "loss+prior", group["dampening"], group["nesterov"]) if not equal(beta, 0.0) else NoInertia()
        return BayesRule(Delta(), Zero(), Additive(), ball)

    def rates(self, group: Mapping[str, Any], step: int) -> Rates:
        return Rates(group["lr"], 0.0, step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Fixed(mean)


class _Rooted(BayesOptimizer):
    """A diagonal Gaussian whose curvature is the squared gradient, and whose root scales the step."""

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess)


class _TwoMoments(_Rooted):
    """Adam, with the prior before the square (Adam) or apart from it (AdamW)."""

    names = Names("exp_avg_sq", "exp_avg")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "betas": Pair(FRACTION, FRACTION),
        "eps": AT_LEAST_ZERO,
        "weight_decay": AT_LEAST_ZERO,
    }
    decoupled: ClassVar[bool]

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        over: Literal["loss", "loss+prior"] = "loss" if self.decoupled else "loss+prior"
        return BayesRule(
            Delta(),
            SquaredGradient(over=over),
            SquareRoot(group["eps"], debias=True, decoupled=self.decoupled),
            Momentum(group["betas"][0], over=over),
        )

    def rates(self, group: Mapping[str, Any], step: int) -> Rates:
        return Rates(group["lr"], 1 - group["betas"][1], step)


class RMSprop(_Rooted):
    r"""RMSprop.

    Costs one tensor of state (two with momentum).

    .. math::  g \leftarrow g + \delta m, \quad s \leftarrow \beta s + (1 - \beta) g^2, \quad
               v \leftarrow \mu v + g / (\sqrt s + \epsilon), \quad m \leftarrow m - \alpha v.

    As an instance of the rule: Diagonal Gaussian, looked at in its mean, the Hessian taken to be the squared gradient. The
    square root is a departure from the rule.

    Args:
        params: Parameters or groups.
        lr: Learning rate alpha, >= 0.
        alpha: The beta above, in [0, 1): torch's name.
        eps: epsilon, >= 0.
        weight_decay: delta, >= 0.
        momentum: mu, in [0, 1).
        compile: Whether steps are compiled, see :class:`bayesrule.BayesOptimizer`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> opt = RMSprop([w], lr=0.1, alpha=0.0)
        >>> w.square().backward()
        >>> opt.step()
        >>> round(w.item(), 4)
        0.9

    Differs from: torch.optim.RMSprop has ``centered`` and ``maximize``.
    Source: Khan and Rue (2023), section 4.2.
    """

    names = Names("square_avg", "momentum_buffer")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "alpha": FRACTION,
        "eps": AT_LEAST_ZERO,
        "weight_decay": AT_LEAST_ZERO,
        "momentum": FRACTION,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        *,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        ball = HeavyBall(group["momentum"], "step") if not equal(group["momentum"], 0.0) else NoInertia()
        return BayesRule(Delta(), SquaredGradient(over="loss+prior"), SquareRoot(group["eps"]), ball)

    def rates(self, group: Mapping[str, Any], step: int) -> Rates:
        return Rates(group["lr"], 1 - group["alpha"], step)


class Adam(_TwoMoments):
    r"""Adam.

    Costs two tensors of state.

    .. math::  g \leftarrow g + \delta m, \quad v \leftarrow \beta_1 v + (1 - \beta_1) g, \quad
               s \leftarrow \beta_2 s + (1 - \beta_2) g^2, \quad
               m \leftarrow m - \alpha\, \hat v / (\sqrt{\hat s} + \epsilon).

    As an instance of the rule: RMSprop with debiased momentum, the prior inside it.

    Args:
        params: Parameters or groups.
        lr: Learning rate alpha, >= 0.
        betas: (beta1, beta2), each in [0, 1).
        eps: epsilon, >= 0.
        weight_decay: delta, >= 0; added to the gradient before it is squared.
        compile: Whether steps are compiled, see :class:`bayesrule.BayesOptimizer`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> opt = Adam([w], lr=0.1)
        >>> w.square().backward()
        >>> opt.step()
        >>> round(w.item(), 4)
        0.9

    Differs from: torch.optim.Adam has ``amsgrad`` and ``maximize``.
    Source: Khan and Rue (2023), section 4.2; D. Kingma and J. Ba (2015), arXiv:1412.6980.
    """

    decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())


class AdamW(_TwoMoments):
    r"""Adam with decoupled weight decay.

    Costs two tensors of state.

    .. math::  m \leftarrow m - \alpha (\hat v / (\sqrt{\hat s} + \epsilon) + \delta m), \quad v, s \text{ of } g \text{ alone.}

    As an instance of the rule: Adam whose prior pulls apart from the scaled gradient; not derivable from the rule.

    Args:
        params: Parameters or groups.
        lr: Learning rate alpha, >= 0.
        betas: (beta1, beta2), each in [0, 1).
        eps: epsilon, >= 0.
        weight_decay: delta, >= 0.
        compile: Whether steps are compiled, see :class:`bayesrule.BayesOptimizer`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> opt = AdamW([w], lr=0.1, weight_decay=1.0)
        >>> w.square().backward()
        >>> opt.step()
        >>> round(w.item(), 4)
        0.8

    Differs from: torch.optim.AdamW has ``amsgrad`` and ``maximize``.
    Source: I. Loshchilov and F. Hutter (2019), arXiv:1711.05101.
    """

    decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())
