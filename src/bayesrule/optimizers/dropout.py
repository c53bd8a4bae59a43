"""Dropout as what it is an instance of: inference over which units are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..estimators.curvatures import Zero
from ..estimators.expectations import Delta
from ..estimators.masks import Masks
from ..families.gaussian import Diagonal
from ..families.spike_slab import SpikeAndSlab
from ..joints import Joint
from ..momentum import HeavyBall
from ..parts import Part
from ..retractions import Additive
from ..rule import NO_INERTIA, BayesRule, Rates
from ..vector import equal
from .blockwise import Blockwise
from .cells import Cell, Names, Unit
from .execution import Flats
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, WHOLE, Count, OneOf
from .learned import spreads
from .optimizer import BayesOptimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class Dropout(BayesOptimizer):
    r"""SGD with dropout in the weights: units are there or not, for all examples of a batch alike.

    Costs no state (one tensor with momentum), and one tensor while a draw is open; one forward and backward a draw.

    .. math::
        \theta_j = z_j\, m_j / \pi, \quad z_j \sim \text{Bernoulli}(\pi), \quad \pi = 1 - p, \qquad
        v \leftarrow \beta v + \tfrac{z}{\pi}\, g(\theta) + \delta m, \qquad m \leftarrow m - \alpha v

    As an instance of the rule: SpikeAndSlab · Masks · Zero · Additive, with a heavy ball: a mixture of two components for each
    unit, one of which stays at zero. A network whose layers have ``torch.nn.Dropout(p)`` in front of them takes the same steps
    if all examples of a batch have the same mask; there each has its own, which is less noisy.

    A unit is an input of a layer: axis 1 of its weight. Biases, norms and other tensors of one axis have no masks. Inputs of the
    first layer are units, too: give it a group with ``p=0`` where they should stay.

    Between draws the parameters hold the mean, which is what dropout predicts with; :func:`bayesrule.predict` averages over masks
    (MC dropout).

    Args:
        params: Parameters or groups; a group may set any hyper-parameter.
        lr: Learning rate alpha, >= 0.
        p: Probability that a unit is not there, in [0, 1).
        ess: Effective sample size, in examples, of the posterior that is left behind; no step depends on it.
        momentum: beta, in [0, 1).
        weight_decay: delta, >= 0.
        mc_samples: Draws that ``step(closure)`` takes.
        seed: Seed of the masks.
        noise: Uniforms in (0, 1) for tests, see :class:`bayesrule.BayesOptimizer`; unit j of a tensor is there where element j of
            its noise, in a row, is below pi.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = Dropout(model.parameters(), lr=0.1, p=0.1)
        >>> for _ in range(300):
        ...     with opt.sampled_params(train=True):
        ...         (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        ...     opt.step()
        >>> bool((model.weight > 0.5).all())
        True

    Source: Khan and Rue (2023), The Bayesian Learning Rule, section 4.3; N. Srivastava et al. (2014), Dropout; Y. Gal and Z.
    Ghahramani (2016), arXiv:1506.02142, for predictions.
    """

    names = Names(None, "momentum_buffer", "mean")
    is_diagonal = False
    needs_whole = True
    runs = Blockwise
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "p": FRACTION,
        "ess": POSITIVE,
        "momentum": FRACTION,
        "weight_decay": AT_LEAST_ZERO,
        "mc_samples": Count(1),
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        p: float = 0.1,
        ess: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        mc_samples: int = 1,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._set_up(params, locals(), compile=False, sync=False)

    def unit(self, group: Mapping[str, Any]) -> Unit:
        return "tensor"

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        masks = Masks(group["mc_samples"]) if group["p"] and spreads(group) else Delta()
        ball = NO_INERTIA if equal(group["momentum"], 0.0) else HeavyBall(group["momentum"])
        return BayesRule(masks, Zero(), Additive(), ball)

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 0.0, step)

    def block(self, cell: Cell, flats: Flats) -> tuple[Any, Any]:
        """The q and the prior of a tensor, whose elements stand in a row."""
        mean, (param,) = cell.plot.joined(flats["mean"]), cell.plot.params
        return self._member(cell.group, param, mean), Diagonal(mean.new_zeros(()), 0.0, cell.group["weight_decay"])

    def _member(self, group: Mapping[str, Any], param: Tensor, mean: Tensor) -> SpikeAndSlab:
        masked = group["p"] and param.dim() > 1 and spreads(group)
        return SpikeAndSlab(mean, 1 - group["p"], tuple(param.shape)) if masked else SpikeAndSlab(mean)

    def hold(self, cell: Cell, flats: Flats, q: Any) -> None:
        """Nothing is kept but the mean."""

    @torch.no_grad()
    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for cell in self.layout.cells(list(names)):
            (param,) = cell.plot.params
            q = self._member(cell.group, param, cell.plot.joined(cell.plot.mean()))
            parts.append(Joint((names[param],), (param.shape,), q))
        return tuple(parts)
