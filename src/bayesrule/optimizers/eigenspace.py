"""EVON: IVON in the coordinates in which gradients are least correlated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..bases import Bases, Basis, eigenvectors, followed, plain, whitened
from ..estimators.curvatures import Reparameterized, SquaredGradient, Zero
from ..estimators.expectations import Delta, MonteCarlo
from ..families.eigen import Eigen
from ..families.gaussian import Diagonal
from ..family import Gaussian
from ..joints import Joint
from ..momentum import Momentum
from ..parts import Part
from ..retractions import Additive, Riemannian, SquareRoot
from ..rule import BayesRule, Curvature, Rates
from ..vector import Vector, equal
from .cells import Cell, Names, Unit
from .hyperparameters import AT_LEAST_ZERO, FRACTION, POSITIVE, SWITCH, WHOLE, Count, OneOf, OrNone, Pair, Range
from .learned import marginal, spreads
from .optimizer import BayesOptimizer
from .turning import Turning
from .workers import Sync

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


ADAMW: dict[str, Any] = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, noise_scale=0)
"""What a group with ``adamw=True`` has where it sets nothing else."""
STRAIGHT: dict[str, Any] = dict(max_precond_dim=0, whiten=False, adjust_lr_fn=None, correct_bias=True, debias_beta2=False)
"""And what it has in any case."""


class EVON(BayesOptimizer):
    r"""Eigenspace variational online Newton: a posterior that is not diagonal, at the cost of SOAP.

    Costs two tensors of state, as Adam, and for a matrix (m, n) two of (m, m) and two of (n, n); one more while a draw is open.
    A step has five products of the matrix with its bases, and a QR decomposition of them every ``precondition_frequency`` steps.

    .. math::
        \Theta = M + Q_L N Q_R^T, \quad N_{ij} = \epsilon_{ij} / \sqrt{\text{ess}\,(h_{ij} + \delta)}, \qquad
        G' = Q_L^T\, g(\Theta)\, Q_R, \quad f = \text{ess}\,(h + \delta)\, N G'

        V \leftarrow \beta_1 V + (1 - \beta_1) G', \qquad
        h \leftarrow h + \rho (f - h) + \tfrac{\rho^2}{2} (f - h)^2 / (h + \delta)

        M \leftarrow M - \alpha\, W\big( Q_L\, (\hat V + \delta\, Q_L^T M Q_R) / (h + \delta)\, Q_R^T \big)

    The bases are the eigenvectors of averages of :math:`G G^T` and :math:`G^T G`, followed by one orthogonal iteration every
    few steps. W brings singular values near to 1 (``whiten``), as Muon does; without it this is the rule to the letter.

    As an instance of the rule: IVON over a Gaussian that is diagonal in a basis of each axis. A ``hess_init`` by element is turned
    to the first basis; after that h stays when the basis moves.

    Args:
        params: Parameters or groups; a group may set any hyper-parameter, and ``noise_scale=0`` for no noise. One with
            ``adamw=True`` and an ``lr`` of its own moves as :class:`bayesrule.AdamW` does and has no spread, as is usual for
            embeddings, heads and norms: see :func:`bayesrule.split_matrices`.
        lr: Learning rate alpha, >= 0; with ``whiten`` the size of a step in spectral norm.
        ess: Effective sample size, > 0, in examples. inf: no noise, and the curvature is the squared gradient in the basis. (With
            ``noise_scale=0`` there is no noise, and a curvature by "price" stays.)
        hess_init: h at the start, > 0.
        betas: (beta1, beta2): of the momentum in [0, 1), of the curvature in [0, 1].
        shampoo_beta: Of the averages that give the bases, in [0, 1); None is beta2. 0.995 in published runs.
        eps: Added to h + delta where it divides.
        weight_decay: delta, >= 0: the prior's precision is ess * delta.
        hess_approx: "price" (above) or "gradsq": f = ``gradsq_scale`` :math:`G'^2`, also in the clean steps of ``phasing``.
        gradsq_scale: None is ess; a number n is the examples that one mean loss averages over.
        clip_radius: Bound on each element of the preconditioned gradient in the basis.
        precondition_frequency: Steps from one basis to the next.
        max_precond_dim: Longer axes keep their coordinates; 0 is IVON.
        merge_dims: Merge neighbouring axes as long as none is longer than that.
        precondition_1d: Give vectors a basis, too.
        phasing: Every other step, the first among them, is taken at the mean: it moves the bases, the others the curvature.
        price_clip_ratio: Bound on f in units of h; None is none.
        whiten: The W above; of a vector, its length 1.
        adjust_lr_fn: The size of a whitened step: None is ``lr`` in spectral norm; "original" is that times
            sqrt(max(1, rows / columns)), "match_rms_adamw" times 0.2 sqrt(max(rows, columns)), both as in torch.optim.Muon.
        correct_bias: Undo the start of the momentum at zero.
        debias_beta2: Divide the step by 1 - beta2^t, as the published code does; for comparisons.
        mc_samples: Draws that ``step(closure)`` takes.
        compat: Take steps as the published code does: the first only finds the bases.
        sync: Whether and how ranks train together, see :class:`bayesrule.BayesOptimizer`. Sharded parameters are refused.
        seed: Seed of the noise.
        noise: Unit normals for tests, in the basis: see there.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x @ torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = EVON(model.parameters(), lr=0.1, ess=200, hess_init=1.0, whiten=False)
        >>> for _ in range(200):
        ...     with opt.sampled_params(train=True):
        ...         (model(x) - y).square().mean().backward()
        ...     opt.step()
        >>> round(model.weight[0, 1].item(), 1)
        0.5

    Differs from: the authors' code loses its first step, predicts at the mean in every other step if ``phasing``, casts its state
    to the parameters' dtype on loading and finds bases in float32.
    Source: B. Minut, N. Daheim et al. (2026), arXiv:2606.23357; N. Vyas et al. (2024), SOAP, arXiv:2409.11321.
    """

    names = Names("hess", "momentum", "mean")
    is_diagonal = False
    needs_whole = True
    runs = Turning
    ranges: ClassVar = {
        "lr": AT_LEAST_ZERO,
        "ess": Range("(0, inf]"),
        "hess_init": POSITIVE,
        "betas": Pair(FRACTION, Range("[0, 1]")),
        "shampoo_beta": OrNone(FRACTION),
        "eps": AT_LEAST_ZERO,
        "weight_decay": AT_LEAST_ZERO,
        "hess_approx": OneOf(("price", "gradsq")),
        "gradsq_scale": OrNone(POSITIVE),
        "clip_radius": Range("(0, inf]"),
        "precondition_frequency": Count(1),
        "max_precond_dim": Count(0),
        "merge_dims": SWITCH,
        "precondition_1d": SWITCH,
        "phasing": SWITCH,
        "price_clip_ratio": OrNone(POSITIVE),
        "whiten": SWITCH,
        "adjust_lr_fn": OneOf((None, "original", "match_rms_adamw")),
        "correct_bias": SWITCH,
        "debias_beta2": SWITCH,
        "mc_samples": Count(1),
        "compat": SWITCH,
        "seed": WHOLE,
        "noise_scale": OneOf((0, 1, 0.0, 1.0)),
        "adamw": SWITCH,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        hess_init: float,
        *,
        betas: tuple[float, float] = (0.95, 0.9999),
        shampoo_beta: float | None = None,
        eps: float = 1e-10,
        weight_decay: float = 1e-6,
        hess_approx: Literal["price", "gradsq"] = "price",
        gradsq_scale: float | None = None,
        clip_radius: float = math.inf,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        phasing: bool = False,
        price_clip_ratio: float | None = None,
        whiten: bool = True,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        correct_bias: bool = True,
        debias_beta2: bool = False,
        mc_samples: int = 1,
        compat: bool = False,
        sync: Sync = "auto",
        seed: int = 0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._set_up(params, locals(), compile=False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one warning where axes are too long for a basis."""
        if param_group.get("adamw"):
            if "lr" not in param_group or param_group.get("noise_scale", 0):
                raise ValueError("EVON: a group with adamw=True needs an lr of its own and draws nothing (noise_scale=0)")
            param_group = {**ADAMW, **param_group, **STRAIGHT}
        super().add_param_group(param_group)
        if self.param_groups[-1]["adjust_lr_fn"] and not self.param_groups[-1]["whiten"]:
            self.param_groups.pop()
            raise ValueError("EVON: adjust_lr_fn is of whitened steps; leave it out, or take whiten=True")
        limit = self.param_groups[-1]["max_precond_dim"]
        wide = [p for p in self.param_groups[-1]["params"] if p.dim() > 1]
        long = [(p, n) for p in wide for n in self.wide(p) if n > limit]
        if long and limit:
            count, most = f"{len({id(p) for p, _ in long})} of {len(wide)}", max(n for _, n in long)
            warnings.warn(
                f"EVON: {count} matrices have axes longer than max_precond_dim={limit}, up to {most}: these axes keep their "
                "coordinates",
                UserWarning,
                stacklevel=2,
            )

    def unit(self, group: Mapping[str, Any]) -> Unit:
        return "tensor" if self.turns(group) else None

    def turns(self, group: Mapping[str, Any]) -> bool:
        """Whether its tensors move one by one: in bases of their own, or whitened."""
        return bool(group["whiten"] or group["max_precond_dim"])

    # The slots

    def at(self, group: Mapping[str, Any], step: int) -> dict[str, Any]:
        clean = group["phasing"] and self._moves(group, step) % 2 == 0
        return {**group, "clean": clean}

    def looking(self, cell: Cell) -> Cell:
        group = {**cell.group, "clean": False}
        return cell._replace(group=group, rule=self.rule(group))

    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        momentum = Momentum(group["betas"][0], over="loss", debias=group["correct_bias"])
        if group["adamw"]:
            return BayesRule(Delta(), SquaredGradient(), SquareRoot(group["eps"], debias=True, decoupled=True), momentum)
        draws, cold = spreads(group) and not group.get("clean", False), equal(group["ess"], math.inf)
        shared: dict[str, Any] = dict(clip_radius=group["clip_radius"], eps=group["eps"])
        ratio = math.inf if group["price_clip_ratio"] is None else group["price_clip_ratio"]
        return BayesRule(
            MonteCarlo(group["mc_samples"]) if draws else Delta(),
            SquaredGradient() if cold else self._curvature(group, draws),
            Additive(**shared) if cold else Riemannian(curvature_ratio=ratio, **shared),
            momentum,
        )

    def _curvature(self, group: Mapping[str, Any], draws: bool) -> Curvature:
        if group["hess_approx"] == "gradsq":
            return SquaredGradient(group["ess"] if group["gradsq_scale"] is None else group["gradsq_scale"])
        return Reparameterized() if draws else Zero()

    def start(self, group: Mapping[str, Any]) -> float:
        return 0.0 if group["adamw"] else super().start(group)

    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        moves, beta2 = self._moves(group, step), group["betas"][1]
        scale = 1 - beta2**moves if group["correct_bias"] and group["debias_beta2"] else 1.0
        return Rates(group["lr"] / scale, 1 - beta2, moves)

    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        return Diagonal(mean, hess, weight_decay, group["ess"])

    # The basis

    def _moves(self, group: Mapping[str, Any], step: int) -> int:
        """Steps that moved the mean: all, but for the first of the published code."""
        return max(step - 1, 0) if group["compat"] and group["max_precond_dim"] else step

    def basis(self, cell: Cell) -> Basis:
        """The basis of the parameter of a cell; its own coordinates until one is found."""
        state = self.state[cell.plot.params[0]]
        shape, chosen = self._chosen(cell)
        return Basis(shape, state.get("basis", [None] * len(chosen)))

    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        turned: dict[str, tuple[Tensor, Tensor, Basis]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                axes = self.state.get(param, {}).get("basis", [])
                if param in names and spreads(group) and any(q is not None for q in axes):
                    turned[names[param]] = *marginal(self, group, param), Basis(self.wide(param), list(axes))
        if not turned:
            return ()
        means, spectra, bases = zip(*turned.values(), strict=True)
        return (Joint(tuple(turned), tuple(m.shape for m in means), Eigen(Vector(means), Bases(bases), Vector(spectra))),)

    def _chosen(self, cell: Cell) -> tuple[tuple[int, ...], list[bool]]:
        return self._plain(cell.group, cell.plot.params[0])

    def _plain(self, group: Mapping[str, Any], param: Tensor) -> tuple[tuple[int, ...], list[bool]]:
        return plain(param.shape, group["max_precond_dim"], group["merge_dims"], group["precondition_1d"])

    def wide(self, param: Tensor) -> tuple[int, ...]:
        """The shape of a parameter with its axes merged."""
        return self._plain(self.group_of(param), param)[0]

    def lists(self, param: Tensor, name: str) -> list[tuple[int, ...]]:
        return [(n, n) for n in self.wide(param)]

    def waits(self, cell: Cell) -> bool:
        """Whether the published code would let this step pass."""
        unknown = "basis" not in self.state[cell.plot.params[0]]
        return bool(unknown and cell.group["compat"] and cell.group["max_precond_dim"])

    def shaped(self, cell: Cell, direction: Tensor) -> Tensor:
        """The step that is taken along a direction."""
        group = cell.group
        if not group["whiten"]:
            return direction
        white = whitened(direction, group["eps"])
        if direction.dim() < 2 or group["adjust_lr_fn"] is None:
            return white
        rows, columns = len(direction), direction[0].numel()
        size = max(1, rows / columns) if group["adjust_lr_fn"] == "original" else 0.04 * max(rows, columns)
        return white * math.sqrt(size)

    def settle(self, cell: Cell, gradient: Tensor) -> None:
        """After a step: what the gradient says of the basis."""
        group, state = cell.group, self.state[cell.plot.params[0]]
        shape, chosen = self._chosen(cell)
        gradient = gradient.to(cell.plot.dtype)
        keep = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        step = self._moves(group, cell.step + 1)
        new, turns = "basis" not in state, step % group["precondition_frequency"] == 0
        if not any(chosen):
            state["basis"], state["statistics"] = [None] * len(chosen), [None] * len(chosen)
            return
        if not (new or turns or not group["phasing"] or group["clean"]):
            return
        of_axes = Basis(shape, [gradient.new_empty(0) if axis else None for axis in chosen]).moments(gradient)
        before = self.basis(cell)
        if new:
            state["statistics"] = [None if m is None else (1 - keep) * m for m in of_axes]
            state["basis"] = [None if s is None else eigenvectors(_lifted(s)) for s in state["statistics"]]
            state["hess"].copy_(self.basis(cell).squared().turn(state["hess"]))  # the diagonal of what it was, there
        else:
            for s, m in zip(state["statistics"], of_axes, strict=True):
                if s is not None and m is not None:
                    s.mul_(keep).add_(m, alpha=1 - keep)
            if turns:
                pairs = zip(state["statistics"], state["basis"], strict=True)
                state["basis"] = [None if s is None else followed(s, q) for s, q in pairs]
        if (new or turns) and "momentum" in state:
            momentum = state["momentum"]
            momentum.copy_(self.basis(cell).turn(before.back(momentum)))


def _lifted(moments: Tensor) -> Tensor:
    return moments + 1e-30 * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
