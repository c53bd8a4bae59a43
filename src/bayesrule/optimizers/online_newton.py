"""Online Newton at draws: VON, with a curvature that needs no second derivatives, VOGN and OGN, with squares of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..estimators.curvatures import EmpiricalFisher, Hutchinson, Reparameterized, Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..families.gaussian import Diagonal
from ..family import Gaussian
from ..momentum import Momentum
from ..posterior import Posterior
from ..retractions import Additive
from ..rule import BayesRule, Curvature, Rates
from ..vector import equal
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, SWITCH, WHOLE, Count, OneOf, Pair, Range
from .learned import spreads
from .optimizer import BayesOptimizer
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_RANGES: dict[str, Any] = {
    "lr": AT_LEAST_ZERO,
    "ess": Range("(0, inf]"),
    "betas": Pair(FRACTION, Range("[0, 1]")),
    "weight_decay": POSITIVE,
    "hess_init": AT_LEAST_ZERO,
    "debias": SWITCH,
    "seed": WHOLE,
    "noise_scale": OneOf((0, 1, 0.0, 1.0)),
}


class _OnlineNewton(BayesOptimizer):
    """The rule in mean and precision, over a diagonal Gaussian."""

    names = Names("hess", "momentum", "mean")

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        return BayesRule(
            MonteCarlo(group["mc_samples"]) if spreads(group) and "mc_samples" in group else Delta(),
            self.curvature(group),
            Additive(mean_precision=group.get("mean_precision", "new")),
            Momentum(group["betas"][0], over="loss+prior", debias=group["debias"]),
        )

    def curvature(self, group: Mapping[str, Any]) -> Curvature:
        """What stands in for the Hessian."""
        return EmpiricalFisher(group["damping"])

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["betas"][1], step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess, weight_decay, group["ess"])


class VON(_OnlineNewton):
    r"""Variational online Newton: Newton's method on average, at draws of a diagonal Gaussian.

    Costs two tensors of state, and one more while a draw is open; one forward and backward a draw, and with
    ``hess_approx="hutchinson"`` about two backwards more for each probe.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\,(h + \delta)}, \qquad
        f = \text{ess}\,(h + \delta)(\theta - m)\, g(\theta), \qquad h \leftarrow \beta_2 h + (1 - \beta_2) f

        v \leftarrow \beta_1 v + (1 - \beta_1)(g(\theta) + \delta m), \qquad m \leftarrow m - \alpha\, \hat v / (h + \delta)

    As an instance of the rule: Diagonal · MonteCarlo · Reparameterized · Additive. It is the rule to the letter, but for the
    two rates and the momentum; its precision may turn negative where the loss curves down or an estimate is noisy, and then
    no draw is finite any more. :class:`bayesrule.IVON` has a second-order term that keeps it positive: use that, and this to
    see what the term is good for.

    With ``hess_approx="hutchinson"`` f is the mean of z (H z) over probes z of random signs, H the Hessian at the draw: far less
    noisy. The closure then returns the mean loss with its graph and does not call
    ``backward()``.

    The posterior is N(m, 1 / (ess (h + delta))).

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0.
        ess: Effective sample size, > 0, in examples. inf: no noise, and the curvature by "price" stays.
        hess_init: h at the start, >= 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        weight_decay: delta, > 0: the prior's precision over ess.
        mc_samples: Draws that ``step(closure)`` takes.
        hess_approx: "price" or "hutchinson", see above.
        probes: How many z make an estimate by "hutchinson".
        debias: Undo the start of the momentum at zero.
        prior, sync, noise_per_rank, memory, seed, noise, compile: As in :class:`bayesrule.IVON`.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = VON([w], lr=0.1, ess=1000)
        >>> for _ in range(100):
        ...     with opt.sampled_params(train=True):
        ...         (w - 1).square().sum().backward()
        ...     opt.step()
        >>> (w - 1).abs().max().item() < 0.1
        True

    Source: Khan and Rue (2023), section 3.3; Khan, Nielsen et al. (2018), arXiv:1806.04854.
    """

    ranges: ClassVar = {
        **_RANGES,
        "mc_samples": Count(1),
        "hess_approx": OneOf(("price", "hutchinson")),
        "probes": Count(1),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: Literal["price", "hutchinson"] = "price",
        probes: int = 1,
        debias: bool = True,
        prior: Posterior | None = None,
        sync: Sync = "auto",
        noise_per_rank: bool = False,
        memory: Literal["default", "low"] = "default",
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def curvature(self, group: Mapping[str, Any]) -> Curvature:
        if group["hess_approx"] == "hutchinson":
            return Hutchinson(group["probes"])
        return Zero() if equal(group["ess"], math.inf) else Reparameterized()


class VOGN(_OnlineNewton):
    r"""Variational online Gauss-Newton: the curvature is the mean square of the gradients of single examples, at draws.

    Costs two tensors of state and two more in a step. After ``attach(model)`` layers tell the squares beside one backward, for
    about half a backward more; without, there is a backward for each example, many at a time.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\,(s + \delta)}, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2) \big( \tfrac1n \textstyle\sum_i g_i(\theta)^2 + \gamma \big)

        v \leftarrow \beta_1 v + (1 - \beta_1) (g(\theta) + \delta m), \qquad m \leftarrow m - \alpha\, \hat v / (s + \delta)

    As an instance of the rule: Diagonal · MonteCarlo · EmpiricalFisher · Additive, with momentum over loss and prior. Squares
    are never negative, so the precision stays positive.

    Attached, the training loop stays as it is, with the mean of the losses of a batch going backward once in a draw. Else a step
    needs a closure that returns the loss of *every example*, shape (examples,), and does not call ``backward()``. A norm over the
    batch mixes examples: put it into eval mode.

    The posterior is N(m, 1 / (ess (s + delta))).

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0.
        ess: Effective sample size, > 0, in examples; N over the temperature. inf: no noise.
        hess_init: s at the start, >= 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        weight_decay: delta, > 0: the prior's precision over ess.
        damping: gamma, >= 0.
        mc_samples: Draws that ``step(closure)`` takes.
        debias: Undo the start of the momentum at zero.
        mean_precision: "new", as the rule demands, or "old": which precision moves the mean.
        prior, sync, noise_per_rank, seed, noise, compile: As in :class:`bayesrule.IVON`.

    Raises:
        TypeError: The closure returns something else than one loss for each example.
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> model = torch.nn.Linear(1, 1)
        >>> opt = VOGN(model.parameters(), lr=0.1, ess=100, damping=1.0)
        >>> for _ in range(200):
        ...     loss = opt.step(lambda: (model(x) - 3 * x).square().squeeze(1))
        >>> abs(model.weight.item() - 3) < 0.3
        True

    Differs from: the authors' codes scale the precision by N, count the prior into it or keep the deviation instead, and leave
    the last draw in the model.
    Source: Khan, Nielsen et al. (2018), arXiv:1806.04854; K. Osawa et al. (2019), arXiv:1906.02506.
    """

    ranges: ClassVar = {
        **_RANGES,
        "damping": AT_LEAST_ZERO,
        "mc_samples": Count(1),
        "mean_precision": OneOf(("new", "old")),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        damping: float = 0.0,
        mc_samples: int = 1,
        debias: bool = True,
        mean_precision: Literal["new", "old"] = "new",
        prior: Posterior | None = None,
        sync: Sync = "auto",
        noise_per_rank: bool = False,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())


class OGN(_OnlineNewton):
    r"""Online Gauss-Newton: VOGN at the mean, without noise.

    Costs two tensors of state, and the gradients of single examples.

    .. math::
        s \leftarrow \beta_2 s + (1 - \beta_2) \big( \tfrac1n \textstyle\sum_i g_i(m)^2 + \gamma \big), \qquad
        v \leftarrow \beta_1 v + (1 - \beta_1) (g(m) + \delta m), \qquad m \leftarrow m - \alpha\, \hat v / (s + \delta)

    As an instance of the rule: Diagonal · Delta · EmpiricalFisher · Additive. A step needs a closure as that of
    :class:`bayesrule.VOGN`. What is left, N(m, 1 / (ess (s + delta))), is Laplace's approximation with squares of examples.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter.
        lr: Learning rate alpha, >= 0.
        ess: Effective sample size, > 0, in examples: of the posterior only.
        hess_init: s at the start, >= 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        weight_decay: delta, > 0: the prior's precision over ess.
        damping: gamma, >= 0.
        debias: Undo the start of the momentum at zero.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`.
        compile: Whether steps are compiled, see there.

    Raises:
        TypeError: The closure returns something else than one loss for each example.
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> model = torch.nn.Linear(1, 1)
        >>> opt = OGN(model.parameters(), lr=0.1, ess=100, damping=1.0)
        >>> for _ in range(200):
        ...     loss = opt.step(lambda: (model(x) - 3 * x).square().squeeze(1))
        >>> abs(model.weight.item() - 3) < 0.3
        True

    Source: Khan, Nielsen et al. (2018), arXiv:1806.04854.
    """

    ranges: ClassVar = {**_RANGES, "damping": AT_LEAST_ZERO}

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        damping: float = 0.0,
        debias: bool = True,
        sync: Sync = "auto",
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())
