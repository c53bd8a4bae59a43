"""Posteriors whose weights vary together: full covariances of small blocks, and a few directions of large ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..estimators.curvatures import Reparameterized, Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..estimators.factored import EmpiricalFisherFactor
from ..families.gaussian import Diagonal, Full
from ..families.low_rank import DiagonalPlusFactor, LowRank
from ..joints import Joint
from ..momentum import Momentum
from ..parts import Part
from ..plots import Plot
from ..posterior import Posterior
from ..retractions import Additive, Riemannian
from ..rule import BayesRule, Curvature, Rates
from ..vector import ALONE, equal
from .blockwise import Blockwise
from .cells import Cell, Names, Unit
from .execution import Flats
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, SWITCH, WHOLE, Count, OneOf, Pair, Range
from .learned import spreads
from .optimizer import BayesOptimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Covariance(BayesOptimizer):
    """Blocks of weights that vary together. Matrices have a row for each element, and each parameter's state holds its rows."""

    names = Names("hess", "momentum", "mean")
    is_diagonal = False
    needs_whole = True
    runs = Blockwise
    rows: ClassVar[str]  # under which name rows are kept

    def _prepare(self, *how: Any) -> None:
        super()._prepare(*how)
        self._held: WeakKeyDictionary[Plot, tuple[list[Tensor], Tensor]] = WeakKeyDictionary()

    # The slots

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        draws = MonteCarlo(group["mc_samples"], group.get("antithetic", False)) if spreads(group) else Delta()
        return BayesRule(draws, self.curvature(group), *self.way(group))

    def curvature(self, group: Mapping[str, Any]) -> Curvature:
        """What stands in for the Hessian."""
        raise NotImplementedError

    def way(self, group: Mapping[str, Any]) -> tuple[Any, Any]:
        """The retraction and the momentum."""
        raise NotImplementedError

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        return Rates(group["lr"], 1 - group["betas"][1], step)

    # Blocks

    def block(self, cell: Cell, flats: Flats) -> tuple[Any, Any]:
        """The q and the prior of a block, whose elements stand in a row."""
        plot, group = cell.plot, cell.group
        mean, ess = plot.joined(flats["mean"]), group["ess"]
        at, pull = mean.new_zeros(()), group["weight_decay"]
        if "prior_precision" in flats:
            at, pull = plot.joined(flats["prior_mean"]), plot.joined(flats["prior_precision"]) / ess
        return self.member(cell, flats, mean, pull), Diagonal(at, 0.0, pull, ess)

    def member(self, cell: Cell, flats: Flats, mean: Tensor, pull: Any) -> Any:
        """The member of the family."""
        raise NotImplementedError

    def hold(self, cell: Cell, flats: Flats, q: Any) -> None:
        """Keep what a step has made of the curvature."""
        raise NotImplementedError

    def matrix(self, cell: Cell, begin: Callable[[], Tensor]) -> Tensor:
        """The matrix of a block, shape (D, ...), in whose memory every parameter's state has its rows."""
        states = [self.state[p] for p in cell.plot.params]
        rows = [state[self.rows][0] for state in states if self.rows in state]
        size = sum(p.numel() for p in cell.plot.params)
        if rows and (len(rows) != len(states) or any(r.shape[1] != self.columns(cell.group, size) for r in rows)):
            found = [tuple(state[self.rows][0].shape) if self.rows in state else None for state in states]
            raise ValueError(
                f"{type(self).__name__}: the parameters of a block, or its rank, changed after steps (its {self.rows} has rows "
                f"{found}); give what is frozen or thawed a group of its own from the start, or make a new optimizer"
            )
        owners, whole = self._held.get(cell.plot, ([], torch.empty(0)))
        if rows and len(rows) == len(owners) and all(a is b for a, b in zip(rows, owners, strict=True)):
            return whole
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat(rows) if len(rows) == len(states) else begin()
            owners = list(whole.split([p.numel() for p in cell.plot.params]))
        for state, own in zip(states, owners, strict=True):
            state[self.rows] = [own]
        self._held[cell.plot] = owners, whole
        return whole

    def columns(self, group: Mapping[str, Any], size: int) -> int:
        """How many columns the matrix of a block of so many elements has."""
        raise NotImplementedError

    def lists(self, param: Tensor, name: str) -> list[tuple[int, ...]]:
        group, block = self.group_of(param), [param]
        if self.unit(group) == "group":
            block = [p for p in group["params"] if p.requires_grad and (p.dtype, p.device) == (param.dtype, param.device)]
        return [(param.numel(), self.columns(group, sum(p.numel() for p in block)))]

    @torch.no_grad()
    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for cell in self.layout.cells(list(names)):
            q, _ = self.block(cell, {"mean": cell.plot.mean(), **cell.kept})
            if spreads(cell.group) and not isinstance(q, Diagonal):
                shapes = tuple(p.shape for p in cell.plot.params)
                parts.append(Joint(tuple(names[p] for p in cell.plot.params), shapes, q))
        return tuple(parts)


class IBLR(_Covariance):
    r"""The improved Bayesian learning rule over full Gaussians, one for each block of parameters.

    Costs D^2 numbers for a block of D elements and some D^3 operations a step: for small networks, last layers and adapters.

    .. math::
        \theta = m + (\text{ess}\, S)^{-1/2} \epsilon, \quad S = H + \delta I, \qquad
        F = \tfrac12 \big( \text{ess}\, S (\theta - m)\, g^T + \text{transposed} \big)

        v \leftarrow \beta_1 v + (1 - \beta_1)\, g, \qquad
        H \leftarrow H + \rho E + \tfrac{\rho^2}{2} E S^{-1} E, \quad E = F - H, \qquad
        m \leftarrow m - \alpha\, S^{-1} (\hat v + \delta m)

    The precision is positive definite after every step, whatever the gradients, as far as numbers of the parameters' dtype can
    tell: where they cannot, a step says so. With ``hess_approx="ggn"`` F is the mean product of
    the gradients of the examples, and the closure returns the loss of every one.

    As an instance of the rule: Full · MonteCarlo · Reparameterized · Riemannian. Over a Diagonal it is :class:`bayesrule.IVON`
    without ``rescale_lr``, which is what tensors larger than ``max_block`` have.

    A group is one block if it has at most ``max_block`` elements, so a group for each layer makes a block of each; else each of its
    tensors is one, as far as it is no larger.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0; 1 is Newton's.
        ess: Effective sample size, > 0, in examples. inf: no noise, and the curvature stays.
        hess_init: H at the start, that number times the identity, > 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        weight_decay: delta, >= 0: the prior's precision is ess * delta.
        hess_approx: "price" or "ggn", see above. An estimate by "price" has a variance that grows with D: take many draws, or
            beta2 near 1.
        max_block: The largest D, at most 65,535; 0 is IVON.
        mc_samples: Draws that ``step(closure)`` takes.
        antithetic: Draws 2k and 2k + 1 are mirror images.
        debias: Undo the start of the momentum at zero.
        prior: A Posterior to start from, over independent weights.
        seed: Seed of the noise.
        noise: Unit normals for tests, see :class:`bayesrule.BayesOptimizer`.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> opt = IBLR([w], lr=0.2, ess=1000, betas=(0.9, 0.99), antithetic=True, mc_samples=2)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (w - 1) @ A @ (w - 1) / 2
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(500):
        ...     loss = opt.step(closure)
        >>> correlated = opt.state[w]["matrix"][0]
        >>> bool((correlated - A).abs().max() < 0.5)
        True

    Source: W. Lin, M. Schmidt and M. E. Khan (2020), arXiv:2002.10060, appendix E.
    """

    rows = "matrix"
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf]"),
        "hess_init": POSITIVE,
        "betas": Pair(FRACTION, Range("[0, 1]")),
        "weight_decay": AT_LEAST_ZERO,
        "hess_approx": OneOf(("price", "ggn")),
        "max_block": Count(0),
        "mc_samples": Count(1),
        "antithetic": SWITCH,
        "debias": SWITCH,
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
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
        hess_approx: Literal["price", "ggn"] = "price",
        max_block: int = 1000,
        mc_samples: int = 1,
        antithetic: bool = False,
        debias: bool = True,
        prior: Posterior | None = None,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._set_up(params, locals(), compile=False, sync=False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one warning where tensors are too large for a covariance."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        large = [p for p in group["params"] if p.requires_grad and p.numel() > self._most(group)]
        if large and group["max_block"]:
            most, count = max(p.numel() for p in large), f"{len(large)} of {len(group['params'])}"
            warnings.warn(
                f"IBLR: {count} tensors have more than max_block={group['max_block']} elements, up to {most}: their weights stay "
                "independent",
                UserWarning,
                stacklevel=2,
            )

    def _most(self, group: Mapping[str, Any]) -> int:
        return min(int(group["max_block"]), ALONE - 1)

    def unit(self, group: Mapping[str, Any]) -> Unit:
        return "group" if sum(p.numel() for p in group["params"] if p.requires_grad) <= self._most(group) else "tensor"

    def columns(self, group: Mapping[str, Any], size: int) -> int:
        return size

    def curvature(self, group: Mapping[str, Any]) -> Curvature:
        if equal(group["ess"], math.inf) and group["hess_approx"] == "price":
            return Zero()
        return Reparameterized() if group["hess_approx"] == "price" else EmpiricalFisherFactor()

    def way(self, group: Mapping[str, Any]) -> tuple[Any, Any]:
        return Riemannian(), Momentum(group["betas"][0], over="loss", debias=group["debias"])

    def member(self, cell: Cell, flats: Flats, mean: Tensor, pull: Any) -> Any:
        hess, group = cell.plot.joined(flats["hess"]), cell.group
        if len(mean) > self._most(group):
            return Diagonal(mean, hess, pull, group["ess"])
        pull = torch.diag(pull) if isinstance(pull, Tensor) and pull.dim() else pull
        return Full(mean, self.matrix(cell, lambda: torch.diag(hess)).clone(), pull, group["ess"])

    def hold(self, cell: Cell, flats: Flats, q: Any) -> None:
        whole = isinstance(q, Full)
        if whole:
            self.matrix(cell, lambda: q.hess.clone()).copy_(q.hess)
        diagonal = q.hess.diagonal() if whole else q.hess
        cell.plot.scatter(diagonal, flats["hess"], [1.0] * len(cell.plot.params))


class SLANG(_Covariance):
    r"""Variational online Gauss-Newton with a precision of a diagonal and a few directions.

    Costs L + 2 tensors of state for L directions, the gradients of all examples of a batch in a step, and some D (L + n)^2
    operations for a block of D elements and n examples.

    .. math::
        \theta \sim N\big(m, (\text{ess}\,(\operatorname{diag}(d) + U U^T + \delta I))^{-1}\big), \qquad
        G = \tfrac{1}{\sqrt n} [g_1(\theta), \dots, g_n(\theta)]

        d \leftarrow \beta_2 d, \quad U \leftarrow \big[\sqrt{\beta_2}\, U, \sqrt{1 - \beta_2}\, G\big],
        \text{ of which the L leading directions stay, and of the others the diagonal, in } d

    The mean moves as in :class:`bayesrule.VOGN`, against the inverse of the new precision; with L = 0 it is VOGN. The diagonal of
    the precision is that of VOGN whatever L is.

    As an instance of the rule: LowRank · MonteCarlo · EmpiricalFisherFactor · Additive, with momentum over loss and prior.

    A step needs a closure that returns the loss of *every example*, shape (examples,), and does not call ``backward()``. The small
    tensors of a group are one block; those of 65,536 elements or more have directions of their own.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise.
        lr: Learning rate alpha, >= 0.
        ess: Effective sample size, > 0, in examples. inf: no noise.
        rank: L, >= 0.
        hess_init: d at the start, >= 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        weight_decay: delta, > 0: the prior's precision over ess.
        mc_samples: Draws that ``step(closure)`` takes.
        debias: Undo the start of the momentum at zero.
        prior: A Posterior to start from, over independent weights.
        seed: Seed of the noise.
        noise: Unit normals for tests, see :class:`bayesrule.BayesOptimizer`.

    Raises:
        TypeError: The closure returns something else than one loss for each example.
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> model = torch.nn.Linear(1, 1)
        >>> opt = SLANG(model.parameters(), lr=0.1, ess=100, rank=1, weight_decay=0.1)
        >>> for _ in range(200):
        ...     loss = opt.step(lambda: (model(x) - 3 * x).square().squeeze(1))
        >>> abs(model.weight.item() - 3) < 0.5
        True

    Differs from: the authors truncate by a randomized eigendecomposition, this by an SVD; they keep one set of directions for all
    weights, however large.
    Source: A. Mishkin, F. Kunstner, D. Nielsen, M. Schmidt and M. E. Khan (2018), arXiv:1811.04504.
    """

    rows = "factor"
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf]"),
        "rank": Count(0),
        "hess_init": AT_LEAST_ZERO,
        "betas": Pair(FRACTION, Range("[0, 1]")),
        "weight_decay": POSITIVE,
        "mc_samples": Count(1),
        "debias": SWITCH,
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        rank: int = 5,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        debias: bool = True,
        prior: Posterior | None = None,
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._set_up(params, locals(), compile=False, sync=False)

    def unit(self, group: Mapping[str, Any]) -> Unit:
        return "group"

    def columns(self, group: Mapping[str, Any], size: int) -> int:
        return int(group["rank"])

    def curvature(self, group: Mapping[str, Any]) -> Curvature:
        return EmpiricalFisherFactor()

    def way(self, group: Mapping[str, Any]) -> tuple[Any, Any]:
        return Additive(), Momentum(group["betas"][0], over="loss+prior", debias=group["debias"])

    def member(self, cell: Cell, flats: Flats, mean: Tensor, pull: Any) -> Any:
        diagonal, rank = cell.plot.joined(flats["hess"]), cell.group["rank"]
        factor = self.matrix(cell, lambda: mean.new_zeros(len(mean), rank))
        return LowRank(mean, DiagonalPlusFactor(diagonal, factor.clone()), pull, cell.group["ess"], rank)

    def hold(self, cell: Cell, flats: Flats, q: Any) -> None:
        whole = self.matrix(cell, lambda: q.hess.factor.new_zeros(len(q.mean), cell.group["rank"])).zero_()
        whole[:, : q.hess.rank].copy_(q.hess.factor)
        cell.plot.scatter(q.hess.diagonal, flats["hess"], [1.0] * len(cell.plot.params))
