"""Posteriors from what optimizers pass through: the second moments of Adam, the weights that SGD visits, ends of several runs."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..drawing import whole_number
from ..estimators.data_curvature import wide
from ..families.deviations import Deviations
from ..families.low_rank import DiagonalPlusFactor
from ..joints import Joint
from ..parts import Law, OneOf

Weights = nn.Module | Mapping[str, Tensor]
LEAST = 1e-30
"""Of a variance: weights that never moved."""


# Adam


def second_moments(optimizer: Any, model: nn.Module, num_data: int, prior_precision: float, debias: bool) -> dict[str, Any]:
    """The fields of a posterior from the state of Adam or RMSprop."""
    if not 0 < prior_precision < math.inf:
        raise ValueError(f"prior_precision must be a number > 0, got {prior_precision!r}")
    num_data = whole_number("num_data", num_data, 1)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    if strangers := [p for p in groups if p not in names]:
        raise ValueError(
            f"the optimizer trains {len(strangers)} tensors that are no parameters of the model; pass the model it trains"
        )
    if not any(_moment(optimizer.state.get(p, {})) is not None for p in groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no second moments (exp_avg_sq or square_avg): take steps before, or pass an Adam, "
            "AdamW or RMSprop"
        )
    mean, precision = {}, {}
    for p, name in names.items():
        mean[name] = p.detach().to(wide(p), copy=True)
        if p not in groups:
            precision[name] = torch.full_like(mean[name], math.inf)
            continue
        state = optimizer.state.get(p, {})
        moment = _moment(state)
        if moment is None:
            raise ValueError(f"{name!r} has no second moment: it never had a gradient; freeze it and leave it out of the optimizer")
        if not bool((moment >= 0).all() and moment.isfinite().all()):
            raise ValueError(f"the second moment of {name!r} has entries that are negative or not finite")
        moment = moment.to(mean[name])
        if debias:
            beta = groups[p]["betas"][1] if "betas" in groups[p] else groups[p]["alpha"]
            moment = moment / (1 - beta ** float(state["step"]))
        precision[name] = num_data * moment.sqrt() + prior_precision
    delta = {name: m.new_tensor(prior_precision) for name, m in mean.items()}
    zero = {name: m.new_zeros(()) for name, m in mean.items()}
    return dict(
        mean=mean,
        precision=precision,
        prior_mean=zero,
        prior_precision=delta,
        ess=float(num_data),
        num_data=num_data,
        method_hint="glm",
    )


def _moment(state: Mapping[str, Any]) -> Tensor | None:
    return next((state[key] for key in ("exp_avg_sq", "square_avg") if key in state), None)


# SWAG


class SWAG:
    r"""Collects the weights that a training passes through: their mean, their variances and their last deviations (SWAG).

    .. math::  \bar\theta = \tfrac1T \sum_t \theta_t, \qquad
               q = N\bigl(\bar\theta,\; s ( \operatorname{diag}(\operatorname{var} \theta_t) + \tfrac{1}{K-1} D D^T )\bigr),

    the columns of D the last K of theta_t minus the mean up to t, and s = 1/2, so that the two parts, each an estimate of the
    covariance, count half. Train with a constant or cyclic learning rate, large enough to move, and collect once an epoch.

    Moments are streamed by Welford's update, in float32 or the weights' dtype if wider. Costs 2 + K tensors of the weights.

    Args:
        rank: K, at least 2, or 0 for the diagonal alone.

    Attributes:
        count: How many moments there were.
        mean: Their mean, by name.
        squares: Sums of squared deviations from it, by name.
        deviations: The last ones.

    Raises:
        ValueError: ``rank`` is none.

    Example:
        >>> model, swag = nn.Linear(2, 1), SWAG(rank=3)
        >>> for step in range(5):
        ...     with torch.no_grad():
        ...         _ = model.weight.add_(torch.tensor([[step, -step]]))
        ...     swag.collect(model)
        >>> swag.count
        5

    Source: W. Maddox et al. (2019), arXiv:1902.02476, algorithm 1.
    """

    def __init__(self, rank: int = 20) -> None:
        self.rank = whole_number("rank", rank, 0)
        if rank == 1:
            raise ValueError("rank 1 has no covariance; take 2 or more, or 0 for the diagonal alone")
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.deviations: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def collect(self, weights: Weights, model: nn.Module | None = None) -> None:
        """Take in the weights as they are now.

        Args:
            weights: A model, or a state dict.
            model: Says which tensors of a state dict are weights.

        Raises:
            ValueError: Names or shapes are not those of before, or a weight is not finite.
        """
        now = named_weights(weights, model)
        if self.count and now.keys() != self.mean.keys():
            raise ValueError(f"the weights have other names than before: {min(now.keys() ^ self.mean.keys())!r}")
        for name, t in now.items():
            if self.count and t.shape != self.mean[name].shape:
                raise ValueError(f"{name!r} has shape {tuple(t.shape)}, and had {tuple(self.mean[name].shape)} before")
            if not bool(t.isfinite().all()):
                raise ValueError(f"the weights {name!r} are not finite; training has diverged")
        self.count += 1
        last = {}
        for name, t in now.items():
            value = t.detach().to(wide(t))
            if self.count == 1:
                self.mean[name], self.squares[name] = value.clone(), torch.zeros_like(value)
            gap = value - self.mean[name]
            self.mean[name].add_(gap, alpha=1 / self.count)
            last[name] = value - self.mean[name]
            self.squares[name].addcmul_(gap, last[name])
        if self.rank:
            self.deviations = [*self.deviations, last][-self.rank :]

    def state_dict(self) -> dict[str, Any]:
        """All that a later :meth:`load_state_dict` goes on from; tensors are those that are kept, not copies."""
        return {name: getattr(self, name) for name in ("rank", "count", "mean", "squares", "deviations")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was collected.

        Raises:
            ValueError: It was collected for another rank, or is no such state.
        """
        if lost := {"rank", "count", "mean", "squares", "deviations"} - state.keys():
            raise ValueError(f"this is no state of SWAG: it has no {min(lost)!r}")
        if state["rank"] != self.rank:
            raise ValueError(
                f"the state keeps {state['rank']} deviations, and rank is {self.rank}; take SWAG(rank={state['rank']})"
            )
        self.count, self.deviations = state["count"], [{n: t.clone() for n, t in last.items()} for last in state["deviations"]]
        self.mean, self.squares = ({n: t.clone() for n, t in state[name].items()} for name in ("mean", "squares"))


def swag_posterior(snapshots: SWAG | Iterable[Weights], model: nn.Module | None, rank: int, scale: float) -> dict[str, Any]:
    """The fields of a posterior from weights that a training passed through."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a number > 0, got {scale!r}")
    swag = snapshots
    if not isinstance(swag, SWAG):
        swag = SWAG(rank)
        for weights in snapshots:  # type: ignore[union-attr]
            swag.collect(weights, model)
    if swag.count < 2:
        raise ValueError(f"SWAG needs the weights at 2 moments or more, got {swag.count}; collect once an epoch")
    moved = [name for name, squares in swag.squares.items() if bool((squares > 0).any())]
    if not moved:
        raise ValueError("the weights are the same at all moments; collect while training moves them")
    mean = dict(swag.mean)
    exact = {name: torch.full_like(m, math.inf) for name, m in mean.items() if name not in moved}
    row = torch.cat([mean[name].reshape(-1) for name in moved])
    variance = torch.cat([swag.squares[name].reshape(-1) for name in moved]) / swag.count
    columns = [torch.cat([last[name].reshape(-1) for name in moved]) for last in swag.deviations]
    factor = torch.stack(columns, 1) * math.sqrt(scale / (len(columns) - 1)) if len(columns) > 1 else row.new_zeros(len(row), 0)
    q = Deviations(row, DiagonalPlusFactor((variance * scale).clamp(min=LEAST), factor))
    part = Joint(tuple(moved), tuple(mean[name].shape for name in moved), q)
    return dict(mean=mean, precision=exact, parts=(part,), method_hint="mc")


# Several ends


def one_of(models: Sequence[Weights], model: nn.Module | None) -> OneOf:
    """Each of some weights, as likely as any other.

    Raises:
        ValueError: There are fewer than two, or they disagree on names or shapes.
    """
    if isinstance(models, nn.Module | Mapping) or len(models) < 2:
        raise ValueError("an ensemble takes two models or state dicts at least; of one model take Posterior.point(model)")
    if _statistics_differ(models):
        warnings.warn(
            "the members have running statistics of batch norm that differ, and a posterior keeps weights only; predict with "
            "batch_norm=batches of training inputs",
            stacklevel=4,
        )
    means = [{name: t.detach().clone() for name, t in named_weights(one, model).items()} for one in models]
    for number, mean in enumerate(means):
        if odd := mean.keys() ^ means[0].keys():
            raise ValueError(f"member {number} of the ensemble disagrees on the name {min(odd)!r}")
        for name, m in mean.items():
            if m.shape != means[0][name].shape:
                raise ValueError(f"member {number} of the ensemble has {name!r} of shape {tuple(m.shape)}, others do not")
    laws = [Law(mean, {name: torch.full_like(m, math.inf) for name, m in mean.items()}) for mean in means]
    return OneOf(tuple(laws), torch.full((len(laws),), -math.log(len(laws)), dtype=torch.float64))


def named_weights(weights: Weights, model: nn.Module | None) -> dict[str, Tensor]:
    """The parameters among the tensors of a model or a state dict."""
    if isinstance(weights, nn.Module):
        return dict(weights.named_parameters())
    if model is None:
        if odd := next((name for name, t in weights.items() if _looks_like_statistics(name, t)), None):
            raise ValueError(f"the state dict holds {odd!r}, which is no weight; pass model= to say which are")
        return dict(weights)
    names = [name for name, _ in model.named_parameters()]
    if lost := next((name for name in names if name not in weights), None):
        raise ValueError(f"the state dict has no {lost!r}, which the model has")
    return {name: weights[name] for name in names}


def _looks_like_statistics(name: str, t: Tensor) -> bool:
    return not t.is_floating_point() or name.split(".")[-1].startswith("running_")


def _statistics_differ(models: Sequence[Weights]) -> bool:
    tables = [dict(one.named_buffers()) if isinstance(one, nn.Module) else dict(one) for one in models]
    running = [[t for name, t in table.items() if name.split(".")[-1].startswith("running_")] for table in tables]
    return any(not torch.equal(a, b) for one, two in itertools.pairwise(running) for a, b in zip(one, two, strict=False))
