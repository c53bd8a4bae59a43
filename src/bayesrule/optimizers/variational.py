"""Variational learning at scale: the rule with draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..estimators.curvatures import Reparameterized, SquaredGradient, Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..families.gaussian import Diagonal
from ..family import Gaussian
from ..momentum import Momentum
from ..posterior import Posterior
from ..retractions import Riemannian
from ..rule import BayesRule, Curvature, Rates
from ..vector import equal
from .cells import Names
from .execution import Compile
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, SWITCH, WHOLE, Count, OneOf, OrNone, Pair, Range
from .learned import spreads
from .optimizer import BayesOptimizer
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class IVON(BayesOptimizer):
    r"""Improved Variational Online Newton: trains like Adam and leaves a posterior behind.

    Costs two tensors of state, as Adam, and one more to hold the mean while a draw is open; one forward and backward a draw.

    .. math::
        \theta = m + \epsilon / \sqrt{\text{ess}\,(h + \delta)}, \qquad
        f = \text{ess}\,(h + \delta)(\theta - m)\, g(\theta)

        v \leftarrow \beta_1 v + (1 - \beta_1) g, \qquad
        h \leftarrow h + \rho (f - h) + \tfrac{\rho^2}{2} (f - h)^2 / (h + \delta), \quad \rho = 1 - \beta_2

        m \leftarrow m - \alpha\, \operatorname{clip}\big( (\hat v + \delta m) / (h + \delta) \big)

    As an instance of the rule: Diagonal · MonteCarlo · Reparameterized · Riemannian, with momentum over the loss.

    The posterior is N(m, 1 / (ess (h + delta))): see :meth:`bayesrule.Posterior.from_optimizer`.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise (norms,
            embeddings).
        lr: Learning rate alpha, >= 0; about ten times that of SGD with momentum, since the momentum is an average.
        ess: Effective sample size, > 0, in examples: the number of training examples, or more for a colder posterior. inf:
            no noise, and the curvature stays.
        hess_init: Curvature h at the start, > 0; 0.01 to 1. Lower is more noise at the start.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1]; 1 freezes it.
        weight_decay: delta, >= 0: the prior's precision is ess * delta. It shapes noise and steps.
        mc_samples: Draws that ``step(closure)`` takes.
        hess_approx: "price" (above) or "gradsq": f = ``gradsq_scale`` g^2.
        gradsq_scale: None is ess, the published form; a number n is the examples that one mean loss averages over.
        clip_radius: Bound on each element of the preconditioned gradient, before the learning rate.
        debias: Undo the start of the momentum at zero.
        rescale_lr: alpha = lr (hess_init + delta), which makes the first steps those of SGD.
        antithetic: Draws come in mirrored pairs: two contexts, or ``mc_samples=2``. Curvature is far less noisy.
        prior: A Posterior to be the prior instead of N(0, 1 / (ess delta)), by name where ``params`` are named, else in order.
            ``weight_decay`` then becomes its mean precision per unit of ess, which only ``rescale_lr`` uses.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`.
        noise_per_rank: Whether R ranks are R draws, see there.
        memory: "low" needs no more memory than Adam: see :class:`bayesrule.BayesOptimizer`.
        momentum_dtype: torch.bfloat16 keeps the momentum in half the memory, rounded by chance; None is the dtype of the state.
        seed: Seed of the noise; two optimizers with the same seed draw the same.
        noise: Unit normals for tests, see :class:`bayesrule.BayesOptimizer`.
        compile: Whether steps are compiled, see there.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 200)[:, None]
        >>> y = 3 * x
        >>> model = torch.nn.Linear(1, 1)
        >>> opt = IVON(model.parameters(), lr=0.1, ess=200)
        >>> for _ in range(200):
        ...     with opt.sampled_params(train=True):
        ...         torch.nn.functional.mse_loss(model(x), y).backward()
        ...     opt.step()
        >>> round(model.weight.item(), 1)
        3.0

    Differs from: the authors' code keeps state in the parameters' dtype, loses its step count on resume, perturbs frozen
    parameters and takes ``beta1, beta2``; given the same noise the trajectories agree.
    Source: Y. Shen, N. Daheim et al. (2024), Variational Learning is Effective for Large Deep Networks, Algorithm 1,
    arXiv:2402.17641.
    """

    names = Names("hess", "momentum", "mean")
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf]"),
        "hess_init": POSITIVE,
        "betas": Pair(FRACTION, Range("[0, 1]")),
        "weight_decay": AT_LEAST_ZERO,
        "mc_samples": Count(1),
        "hess_approx": OneOf(("price", "gradsq")),
        "gradsq_scale": OrNone(POSITIVE),
        "clip_radius": Range("(0, inf]"),
        "debias": SWITCH,
        "rescale_lr": SWITCH,
        "antithetic": SWITCH,
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
        "momentum_dtype": OneOf((None, torch.bfloat16)),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: Literal["price", "gradsq"] = "price",
        gradsq_scale: float | None = None,
        clip_radius: float = math.inf,
        debias: bool = True,
        rescale_lr: bool = True,
        antithetic: bool = False,
        prior: Posterior | None = None,
        sync: Sync = "auto",
        noise_per_rank: bool = False,
        memory: Literal["default", "low"] = "default",
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
        compile: Compile = "auto",
    ) -> None:
        self._set_up(params, locals())

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        return BayesRule(
            MonteCarlo(group["mc_samples"], group["antithetic"]) if spreads(group) else Delta(),
            self._curvature(group),
            Riemannian(group["clip_radius"]),
            Momentum(group["betas"][0], over="loss", debias=group["debias"]),
        )

    def _curvature(self, group: Mapping[str, Any]) -> Curvature:
        if equal(group["ess"], math.inf):
            return Zero()
        if group["hess_approx"] == "price":
            return Reparameterized()
        return SquaredGradient(group["ess"] if group["gradsq_scale"] is None else group["gradsq_scale"])

    def rates(self, group: Mapping[str, Any], step: int) -> Rates:
        unit = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return Rates(group["lr"] * unit, 1 - group["betas"][1], step)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess, weight_decay, group["ess"])
