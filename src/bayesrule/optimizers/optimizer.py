"""The rule with any slots as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..estimators.adversarial import Adversarial, Magnitude
from ..estimators.curvatures import EmpiricalFisher, Hutchinson, Reparameterized, SquaredGradient, Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..families.gaussian import Diagonal, Fixed
from ..family import Gaussian
from ..posterior import Posterior
from ..program import Program
from ..retractions import Additive, Riemannian, SquareRoot
from ..rule import BayesRule, Rates
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, WHOLE, Allowed, OneOf, Range
from .shell import Shell
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


SLOTS: dict[str, tuple[type, ...]] = {
    "expectation": (Delta, MonteCarlo, Adversarial),
    "curvature": (Zero, SquaredGradient, Reparameterized, EmpiricalFisher, Hutchinson, Magnitude),
    "retraction": (Additive, Riemannian, SquareRoot),
}
"""What a training loop can serve: it brings gradients, at one place at a time."""


class BayesOptimizer(Shell):
    r"""The rule as a ``torch.optim.Optimizer``: an algorithm in one line.

    Every optimizer of this library is one of these, whose constructor fills the slots. Outside a draw the parameters hold the
    mean of q. State is per parameter, tensors only, float32 or the parameter's dtype if wider: ``step``, the curvature and the
    memory under the names of :attr:`names`, and ``prior_mean`` and ``prior_precision`` where the prior is a posterior.

    Costs what its slots cost: a tensor of state for the curvature, unless that is :class:`bayesrule.Zero`, and one for the
    memory, if there is momentum.

    Args:
        params: Parameters or groups, as for any torch optimizer; named parameters are welcome. A group may set any of the numbers
            below, and ``noise_scale=0`` to be looked at in its mean.
        rule: The slots. Expectations are Delta, MonteCarlo and Adversarial; curvatures Zero, SquaredGradient, Reparameterized,
            EmpiricalFisher (with a closure that returns the loss of every example), Hutchinson (with one that returns the mean loss
            with its graph) and Magnitude; the retraction is Additive,
            Riemannian or SquareRoot.
        lr: Learning rate alpha of the mean, >= 0.
        ess: Effective sample size, > 0, in examples.
        hess_init: The curvature at the start, >= 0.
        beta2: 1 - rho, rho the rate of the precision, in [0, 1].
        weight_decay: delta, >= 0: the prior is N(0, 1 / (ess delta)).
        seed: Seed of the noise.
        prior: A Posterior to start from instead of the prior N(0, 1 / (ess weight_decay)).
        noise: Unit normals for tests: a function of a parameter, called once per parameter and draw in parameter order.
        compile: Whether steps are compiled by ``torch.compile``: False never, True from the first step, "auto" after 50 eager steps
            where there are at least 100,000 parameters and a compiler, and never with ``noise``. The result is the same up to
            rounding.
        sync: How ranks of ``torch.distributed`` train one model together: "auto" finds out in the first step whether gradients are
            averaged already (DistributedDataParallel, FSDP2) and averages them itself if not; True insists on other ranks; False
            leaves each rank alone.
        noise_per_rank: Whether each rank draws noise of its own, so that R ranks are R draws, for one more all-reduce of the size
            of the parameters; without, all draw the same at no cost.
        memory: "low" makes the noise of a draw again instead of keeping the mean aside, for parameters of at least 32 bits: the
            memory of Adam, three times the noise. The mean then returns rounded to the last place of the sample; only a draw
            with ``train=False`` still keeps it aside, so that looking changes nothing.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.
        TypeError: ``rule`` is no rule, or a parameter is complex.

    Example:
        IVON whose curvature is a squared gradient and whose precision is moved by plain averaging:

        >>> import torch
        >>> import bayesrule as br
        >>> rule = br.BayesRule(br.MonteCarlo(), br.SquaredGradient(100), br.Additive(), br.Momentum(0.9))
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = br.BayesOptimizer([w], rule, lr=0.1, ess=1000)
        >>> for _ in range(100):
        ...     with opt.sampled_params(train=True):
        ...         (w - 1).square().sum().backward()
        ...     opt.step()
        >>> (w - 1).abs().max().item() < 0.2
        True

    Source: Khan and Rue (2023), The Bayesian Learning Rule, JMLR 24(281).
    """

    names = Names("hess", "momentum", "mean")
    ranges: ClassVar[Mapping[str, Allowed]] = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf)"),
        "hess_init": AT_LEAST_ZERO,
        "beta2": Range("[0, 1]"),
        "weight_decay": AT_LEAST_ZERO,
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
    }

    def __init__(
        self,
        params: ParamsT,
        rule: BayesRule,
        lr: float,
        *,
        ess: float = 1.0,
        hess_init: float = 1.0,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        seed: int = 0,
        prior: Posterior | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
        memory: Literal["default", "low"] = "default",
        sync: Sync = "auto",
        noise_per_rank: bool = False,
    ) -> None:
        if not isinstance(rule, BayesRule):
            raise TypeError(f"BayesOptimizer: rule must be a BayesRule, got {rule!r}")
        for slot, kinds in SLOTS.items():
            if not isinstance(getattr(rule, slot), kinds):
                names = ", ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"BayesOptimizer: the {slot} must be one of {names}, got {getattr(rule, slot)!r}")
        self._fill(rule)
        self._set_up(params, locals())

    def _fill(self, rule: BayesRule) -> None:
        self._rule, self._curves = rule, rule.curvature.curves
        if not self._curves:
            self.names = BayesOptimizer.names._replace(hess=None)

    @property
    def recorded(self) -> dict[Any, Program]:
        return {} if type(self) is BayesOptimizer else super().recorded

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        return self._rule if group["noise_scale"] else replace(self._rule, expectation=Delta())

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["beta2"], step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        if self._curves:
            return Diagonal(mean, hess, weight_decay, group["ess"])
        return Fixed(mean, group["hess_init"], weight_decay, group["ess"])

    def start(self, group: Mapping[str, Any]) -> float:
        return float(group.get("hess_init", 0.0))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **({"rule": self._rule} if type(self) is BayesOptimizer else {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rule" in state:
            self._fill(state.pop("rule"))
        super().__setstate__(state)
