"""Adam and RMSprop at draws of a Gaussian: Vadam and Vprop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..estimators.curvatures import SquaredGradient
from ..estimators.expectations import Delta, MonteCarlo
from ..families.gaussian import Diagonal
from ..family import Gaussian
from ..momentum import Momentum
from ..posterior import Posterior
from ..retractions import SquareRoot
from ..rule import BayesRule, Curvature, Expectation, Inertia, NoInertia, Rates
from ..vector import equal
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, WHOLE, Count, OneOf, Pair, Range, needed
from .optimizer import BayesOptimizer
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Perturbed(BayesOptimizer):
    """The root of squared gradients scales the step; draws have the deviation of the Gaussian."""

    debias: ClassVar[bool]

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        expectation: Expectation = Delta()
        curvature: Curvature = SquaredGradient()
        if group["noise_scale"] and not equal(group["ess"], math.inf):
            expectation = MonteCarlo(group["mc_samples"])
        return BayesRule(expectation, curvature, SquareRoot(group["weight_decay"], debias=self.debias), self.inertia(group))

    def inertia(self, group: Mapping[str, Any]) -> Inertia:
        """What is remembered."""
        return NoInertia()

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess, weight_decay, group["ess"])


_RANGES: dict[str, Any] = {
    "lr": AT_LEAST_ZERO,
    "ess": Range("(0, inf]"),
    "weight_decay": POSITIVE,
    "hess_init": AT_LEAST_ZERO,
    "mc_samples": Count(1),
    "seed": WHOLE,
    "noise_scale": OneOf((0, 1, 0.0, 1.0)),
}


class Vadam(_Perturbed):
    r"""Variational Adam: Adam whose gradients are taken at draws, and whose squared gradients are read as a precision.

    Costs two tensors of state, as Adam, and one more while a draw is open; one forward and backward a draw.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\,(s + \delta)}, \qquad
        v \leftarrow \beta_1 v + (1 - \beta_1)(g(\theta) + \delta m), \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2)\, g(\theta)^2

        m \leftarrow m - \alpha\, \hat v / (\sqrt{\hat s} + \delta)

    As an instance of the rule: Diagonal · MonteCarlo · SquaredGradient · SquareRoot, with momentum over loss and prior. The
    root is Adam's, a departure from the rule; it scales steps, not draws.

    The posterior is N(m, 1 / (ess (s + delta))). Where gradients are mostly noise, s is the squares' mean over the number of
    examples in a batch, so that the posterior comes out too wide by about that factor; :class:`bayesrule.VOGN` squares example
    by example instead.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0.
        ess: Effective sample size N, > 0, in examples. inf: no noise, which is Adam with eps = ``weight_decay``.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: delta, > 0: the prior's precision over N, and what is added to the root.
        hess_init: s at the start, >= 0: the precision at the start is ess (hess_init + weight_decay).
        mc_samples: Draws that ``step(closure)`` takes.
        prior, sync, noise_per_rank, memory, seed, noise, compile: As in :class:`bayesrule.IVON`.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = Vadam([w], lr=0.1, ess=1000)
        >>> for _ in range(200):
        ...     with opt.sampled_params(train=True):
        ...         (w - 1).square().sum().backward()
        ...     opt.step()
        >>> (w - 1).abs().max().item() < 0.1
        True

    Differs from: the authors' code names N ``train_set_size``, the prior's precision N delta ``prior_prec`` and the first
    precision ``prec_init``, which is N (hess_init + delta); it needs a closure, leaves the last draw in the parameters, and
    shifts its state where a gradient is missing.
    Source: M. E. Khan, D. Nielsen et al. (2018), Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam,
    arXiv:1806.04854.
    """

    debias = True
    names = Names("exp_avg_sq", "exp_avg", "mean")
    ranges: ClassVar = {**_RANGES, "betas": Pair(FRACTION, FRACTION)}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        ess: float | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        hess_init: float = 0.0,
        mc_samples: int = 1,
        prior: Posterior | None = None,
        sync: Sync = "auto",
        noise_per_rank: bool = False,
        memory: Literal["default", "low"] = "default",
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        ess = needed(type(self).__name__, "ess", ess, "the number of training examples")
        self._set_up(params, locals())

    def inertia(self, group: Mapping[str, Any]) -> Inertia:
        return Momentum(group["betas"][0], over="loss+prior")

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["betas"][1], step)


class Vprop(_Perturbed):
    r"""Variational RMSprop: Vadam without momentum and without debiasing.

    Costs one tensor of state, and one more while a draw is open; one forward and backward a draw.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\,(s + \delta)}, \qquad
        s \leftarrow \alpha s + (1 - \alpha)\, g(\theta)^2, \qquad
        m \leftarrow m - \text{lr}\, (g(\theta) + \delta m) / (\sqrt s + \delta)

    As an instance of the rule: Diagonal · MonteCarlo · SquaredGradient · SquareRoot.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate, >= 0.
        ess: Effective sample size, > 0, in examples. inf: no noise, which is RMSprop with eps = ``weight_decay``.
        alpha: Share of the old squares kept, in [0, 1): torch's name.
        weight_decay: delta, > 0: the prior's precision over ess, and what is added to the root.
        hess_init: s at the start, >= 0.
        mc_samples: Draws that ``step(closure)`` takes.
        prior, sync, noise_per_rank, memory, seed, noise, compile: As in :class:`bayesrule.IVON`.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = Vprop([w], lr=0.01, ess=1000)
        >>> for _ in range(200):
        ...     opt.train()
        ...     (w - 1).square().sum().backward()
        ...     opt.step()
        >>> (w - 1).abs().max().item() < 0.1
        True

    Differs from: as :class:`bayesrule.Vadam`.
    Source: Khan, Nielsen et al. (2018), arXiv:1806.04854, appendix.
    """

    debias = False
    names = Names("square_avg", "momentum_buffer", "mean")
    ranges: ClassVar = {**_RANGES, "alpha": FRACTION}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        ess: float | None = None,
        *,
        alpha: float = 0.999,
        weight_decay: float = 1e-4,
        hess_init: float = 0.0,
        mc_samples: int = 1,
        prior: Posterior | None = None,
        sync: Sync = "auto",
        noise_per_rank: bool = False,
        memory: Literal["default", "low"] = "default",
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        ess = needed(type(self).__name__, "ess", ess, "the number of training examples")
        self._set_up(params, locals())

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["alpha"], step)
