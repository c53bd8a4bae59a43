"""Sharpness-aware minimization as an instance of the rule: SAM and bSAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..estimators.adversarial import Adversarial, Magnitude
from ..estimators.curvatures import Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..families.gaussian import Diagonal, Fixed
from ..family import Gaussian
from ..momentum import HeavyBall, Momentum
from ..posterior import Posterior
from ..retractions import Additive
from ..rule import BayesRule, NoInertia, Rates
from ..vector import equal
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, WHOLE, Count, OneOf, Pair, Range
from .optimizer import BayesOptimizer
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class SAM(BayesOptimizer):
    r"""Sharpness-aware minimization: SGD by the gradient at the worst place nearby.

    Costs one tensor of state and one more in a step; two forwards and backwards a step.

    .. math::
        w' = w + \rho\, g(w) / \|g(w)\|, \qquad v \leftarrow \mu v + g(w') + \delta w, \qquad w \leftarrow w - \alpha v

    As an instance of the rule: Fixed · Adversarial · Zero · Additive, with a heavy ball over loss and prior. SGD is the same
    with rho = 0.

    A step needs a closure, which it calls twice; the loss that it returns is that of the second call. Norms with running
    statistics see both calls. The weights are the mean at all other times.

    Args:
        params: Parameters or groups. The norm is over all of them; a group may set any hyper-parameter, rho too.
        lr: Learning rate alpha, >= 0.
        momentum: mu, in [0, 1).
        rho: Radius of the perturbation, >= 0.
        weight_decay: delta, >= 0; it acts at w and has no part in the perturbation.
        m_sharpness: m, >= 1: parts of a batch, each perturbed by its own gradient. With m > 1 ``step(closure)`` calls
            ``closure(part)``, part = 0, ..., m - 1, twice each, for the loss of that part; the same in all groups.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`.
        compile: Whether steps are compiled, see there.

    Raises:
        TypeError: A step without a closure.
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = SAM([w], lr=0.1, momentum=0.0, rho=0.5)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = w.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)  # (|w| + rho)^2 / 2, at the worst place
        tensor(15.1250)
        >>> w.data
        tensor([2.6700, 3.5600])

    Differs from: common implementations keep a second optimizer inside and have two methods for the two halves of a step.
    Source: P. Foret, A. Kleiner et al. (2021), Sharpness-Aware Minimization, arXiv:2010.01412; as a relaxation of Bayes:
    T. Moellenhoff and M. E. Khan (2023), arXiv:2210.01620.
    """

    names = Names(None, "momentum_buffer")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "momentum": FRACTION,
        "rho": AT_LEAST_ZERO,
        "weight_decay": AT_LEAST_ZERO,
        "m_sharpness": Count(1),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        rho: float = 0.05,
        weight_decay: float = 0.0,
        m_sharpness: int = 1,
        sync: Sync = "auto",
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        ball = HeavyBall(group["momentum"]) if not equal(group["momentum"], 0.0) else NoInertia()
        return BayesRule(Adversarial(group["rho"], parts=group["m_sharpness"]), Zero(), Additive(), ball)

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 0.0, step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Fixed(mean)


class BSAM(BayesOptimizer):
    r"""Bayesian SAM: Adam's cousin that finds flat minima and leaves a posterior behind.

    Costs two tensors of state, as Adam, and two more in a step; two forwards and backwards a step.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\, s}, \qquad s = h + \delta, \qquad g_1 = g(\theta), \qquad
        g_2 = g(m + \rho\, g_1 / s)

        v \leftarrow \beta_1 v + (1 - \beta_1)(g_2 + \delta m), \qquad m \leftarrow m - \alpha\, v / s, \qquad
        h \leftarrow \beta_2 h + (1 - \beta_2)(\sqrt s\, |g_1| + \gamma)

    As an instance of the rule: Diagonal · Adversarial of MonteCarlo · Magnitude · Additive by the old precision, with momentum
    over loss and prior.

    A step needs a closure, which it calls twice, see :class:`bayesrule.SAM`. The posterior is N(m, 1 / (ess (h + delta))).

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0; 0.1 to 1.
        ess: Effective sample size, > 0, in examples. inf: no noise.
        betas: (beta1, beta2), each in [0, 1).
        rho: Radius of the perturbation, >= 0.
        weight_decay: delta, > 0: the prior's precision over ess.
        damping: gamma, >= 0.
        hess_init: h at the start, >= 0.
        m_sharpness: m, >= 1: parts of a batch, see :class:`bayesrule.SAM`; each has a draw of its own.
        prior, sync, seed, noise, compile: As in :class:`bayesrule.IVON`.

    Raises:
        TypeError: A step without a closure.
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = BSAM([w], lr=0.1, ess=1000)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (w - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure) for _ in range(200)]
        >>> (w - 1).abs().max().item() < 0.1
        True

    Differs from: the authors' code counts the prior into its s, which is hess + weight_decay here, and starts it at
    ``custominit``; it is for JAX.
    Source: T. Moellenhoff and M. E. Khan (2023), SAM as an Optimal Relaxation of Bayes, algorithm 1, arXiv:2210.01620.
    """

    names = Names("hess", "momentum", "mean")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf]"),
        "betas": Pair(FRACTION, FRACTION),
        "rho": AT_LEAST_ZERO,
        "weight_decay": POSITIVE,
        "damping": AT_LEAST_ZERO,
        "hess_init": AT_LEAST_ZERO,
        "m_sharpness": Count(1),
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.05,
        weight_decay: float = 1e-4,
        damping: float = 0.1,
        hess_init: float = 1.0,
        m_sharpness: int = 1,
        prior: Posterior | None = None,
        sync: Sync = "auto",
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        spreads = group["noise_scale"] and not equal(group["ess"], math.inf)
        first = MonteCarlo() if spreads else Delta()
        return BayesRule(
            Adversarial(group["rho"], first, normalized=False, parts=group["m_sharpness"]),
            Magnitude(group["damping"]),
            Additive(mean_precision="old"),
            Momentum(group["betas"][0], over="loss+prior", debias=False),
        )

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["betas"][1], step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess, weight_decay, group["ess"])
