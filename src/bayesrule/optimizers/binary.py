"""Binary weights: the rule over Bernoulli distributions, and its limit, the straight-through estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..estimators.curvatures import Zero
from ..estimators.expectations import Delta
from ..estimators.relaxed import Relaxed
from ..families.signs import HardSigns, Signs, signs
from ..joints import Joint
from ..momentum import HeavyBall, Momentum
from ..parts import Part
from ..retractions import Natural
from ..rule import BayesRule, NoInertia, Rates
from ..shards import whole
from ..vector import equal
from .cells import Names
from .execution import Compile, Flats
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, SWITCH, WHOLE, Count, Range
from .optimizer import BayesOptimizer
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Binary(BayesOptimizer):
    """The natural parameter is the state, and the mean stands in the parameters."""

    is_diagonal = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its trainable parameters become binary: their signs are where they begin."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        with torch.no_grad():
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                natural = self.like_state(p).copy_(self.begin(group, p.detach()))
                self.state[p] = {"step": torch.tensor(0.0), self.names.hess: natural}
                p.copy_(self.member(group, natural).mean)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state. A model that was loaded before this optimizer was made has lost its mean, and gets it back."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                self._bring_back(group, p)

    def _bring_back(self, group: Mapping[str, Any], param: Tensor) -> None:
        """Put the mean into a parameter, but for where it is there up to rounding."""
        state = self.state[param]
        if self.names.mean in state:
            param.copy_(state[self.names.mean])
        elif self.names.hess in state and self.tells_mean(group):
            mean = self.member(group, state[self.names.hess]).mean.to(param.dtype)
            near = (param - mean).abs() <= 8 * torch.finfo(param.dtype).eps
            param.copy_(torch.where(near, param, mean))

    def tells_mean(self, group: Mapping[str, Any]) -> bool:
        """Whether parameters hold the mean of the natural parameter of today."""
        return True

    def begin(self, group: Mapping[str, Any], weights: Tensor) -> Tensor:
        """The first natural parameter."""
        raise NotImplementedError

    def member(self, group: Mapping[str, Any], natural: Any, mean: Any = None) -> Signs:
        """The member of the family."""
        raise NotImplementedError

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Any:
        return self.member(group, hess, mean)

    def blocks(self, group: Mapping[str, Any], old: Any, new: Any) -> Flats:
        return {"mean": new.mean, "hess": new.natural_parameter}

    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        naturals = [self.state[p][self.names.hess].clone() for p in names]
        natural = torch.cat([whole(t).reshape(-1) for t in naturals])
        return (Joint(tuple(names.values()), tuple(t.shape for t in naturals), Signs(natural)),)


class BayesBiNN(_Binary):
    r"""Binary weights, trained by the rule over Bernoulli distributions.

    Costs two tensors of state, and one more while a draw is open; one forward and backward a draw.

    .. math::
        w = \tanh((\lambda + d) / \tau), \quad d = \tfrac12 \log\tfrac{u}{1-u}, \qquad
        G = \text{ess}\; \frac{1 - w^2}{\tau (1 - \mu^2)}\, g(w), \quad \mu = \tanh \lambda

        v \leftarrow \beta v + (1 - \beta) (G + \lambda - \lambda_0), \qquad
        \lambda \leftarrow \lambda - \tfrac{\alpha}{\text{ess}}\, \hat v

    As an instance of the rule: Signs · Relaxed · Zero · Natural, with momentum over the whole step. The straight-through
    estimator, :class:`bayesrule.STE`, is its limit without noise and without the scale of the gradient.

    Between draws the parameters hold the mean, tanh(lambda); ``sampled_params(train=False)`` gives weights of -1 and 1, and so
    does the sign of the mean. All parameters of the optimizer become binary: leave norms and biases to another one.

    Args:
        params: Parameters or groups. Only the sign that they have at first counts.
        lr: Learning rate alpha, >= 0, for the gradient of the mean loss: ess times the published one. ess is the rate 1 of the
            rule.
        ess: Effective sample size, > 0, in examples. N / r is the published ``reweight`` r with N examples.
        beta: Of the momentum, in [0, 1).
        mc_samples: Draws that ``step(closure)`` takes; 0 looks at the mean instead.
        temperature: tau, > 0. Small is nearer to binary weights, and noisier.
        natural_init: |lambda| at the start, >= 0.
        prior_natural: lambda_0, the prior's natural parameter: 0 is even odds.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`.
        compat: Scale gradients by the mean before the last step, as the published code does.
        seed: Seed of the noise.
        noise: Uniforms in (0, 1) for tests, see :class:`bayesrule.BayesOptimizer`.
        compile: Whether steps are compiled, see there.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        >>> opt = BayesBiNN([w], lr=0.1, ess=100, natural_init=1.0)
        >>> for _ in range(300):
        ...     with opt.sampled_params(train=True):
        ...         (w @ torch.tensor([1.0, -1.0])).backward()
        ...     opt.step()
        >>> w.detach().sign()
        tensor([-1.,  1.])

    Differs from: the published code scales by a mean that is one step old, leaves the last draw in the model and draws first
    signs at random.
    Source: X. Meng, R. Bachmann and M. E. Khan (2020), Training Binary Neural Networks using the Bayesian Learning Rule,
    arXiv:2002.10778.
    """

    names = Names("natural", "momentum", "mean")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": POSITIVE,
        "beta": FRACTION,
        "mc_samples": Count(0),
        "temperature": POSITIVE,
        "natural_init": AT_LEAST_ZERO,
        "prior_natural": Range("(-inf, inf)"),
        "compat": SWITCH,
        "seed": WHOLE,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        beta: float = 0.0,
        mc_samples: int = 1,
        temperature: float = 1.0,
        natural_init: float = 10.0,
        prior_natural: float = 0.0,
        sync: Sync = "auto",
        compat: bool = False,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        draws = group["mc_samples"]
        expectation = Relaxed(draws, group["temperature"]) if draws else Delta()
        return BayesRule(expectation, Zero(), Natural(), Momentum(group["beta"], over="step"))

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"] / group["ess"], 0.0, step)

    def begin(self, group: Mapping[str, Any], weights: Tensor) -> Tensor:
        return signs(weights) * group["natural_init"]

    def member(self, group: Mapping[str, Any], natural: Any, mean: Any = None) -> Signs:
        return Signs(natural, group["ess"], mean)

    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Any, Any]:
        return self.member(group, flats["hess"], flats["mean"]), Signs(group["prior_natural"])

    def tells_mean(self, group: Mapping[str, Any]) -> bool:
        return not (group["compat"] and group["mc_samples"])

    def blocks(self, group: Mapping[str, Any], old: Any, new: Any) -> Flats:
        mean = new.mean if self.tells_mean(group) else old.natural().tanh()
        return {"mean": mean, "hess": new.natural_parameter}


class STE(_Binary):
    r"""The straight-through estimator: gradients at the signs of latent weights move the latent weights.

    Costs two tensors of state (one without momentum).

    .. math::
        v \leftarrow \beta v + g(\operatorname{sign} \lambda) + \delta \lambda, \qquad
        \lambda \leftarrow \operatorname{clamp}(\lambda - \alpha v, -c, c)

    As an instance of the rule: HardSigns · Delta · Zero · Natural, with a heavy ball over the step. It is
    :class:`bayesrule.BayesBiNN` without noise, at temperature 0, with the scale of the gradient left out.

    The parameters hold the signs, which is what training and evaluation use; the latent weights are the state ``natural``.
    All parameters of the optimizer become binary: leave norms and biases to another one.

    Args:
        params: Parameters or groups; what they hold at first are the latent weights.
        lr: Learning rate alpha, >= 0.
        momentum: beta, in [0, 1).
        weight_decay: delta, >= 0: decay of the latent weights.
        clip: c, > 0: bound of the latent weights; inf is none.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`.
        compile: Whether steps are compiled, see there.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        >>> opt = STE([w], lr=0.1, momentum=0.0)
        >>> for _ in range(5):
        ...     (w @ torch.tensor([1.0, -1.0])).backward()
        ...     opt.step()
        >>> w.data
        tensor([-1.,  1.])

    Source: Y. Bengio, N. Leonard and A. Courville (2013), arXiv:1308.3432; M. Courbariaux et al. (2016), arXiv:1602.02830; as
    a limit of the rule: Meng, Bachmann and Khan (2020), arXiv:2002.10778.
    """

    names = Names("natural", "momentum_buffer", "mean")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "momentum": FRACTION,
        "weight_decay": AT_LEAST_ZERO,
        "clip": Range("(0, inf]"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float = math.inf,
        sync: Sync = "auto",
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        ball = HeavyBall(group["momentum"], "step") if not equal(group["momentum"], 0.0) else NoInertia()
        return BayesRule(Delta(), Zero(), Natural(), ball)

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], group["lr"], step)

    def begin(self, group: Mapping[str, Any], weights: Tensor) -> Tensor:
        return weights.clamp(-group["clip"], group["clip"])

    def member(self, group: Mapping[str, Any], natural: Any, mean: Any = None) -> HardSigns:
        return HardSigns(natural, pull=group["weight_decay"], bound=group["clip"])

    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Any, Any]:
        return self.member(group, flats["hess"]), HardSigns(0.0)
