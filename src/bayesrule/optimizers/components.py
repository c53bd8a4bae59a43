"""Mixtures of Gaussians: one optimizer, several modes, each of which is trained by IVON in its turn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..noise import BEGIN, CounterNoise
from ..parts import Law, OneOf, Part
from ..program import Named
from .cells import Cell
from .execution import MOVES, Author, Execution, Flats
from .hyperparameters import Count, Range
from .learned import marginal, prior_of, spreads
from .variational import IVON

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class Several(Author, Protocol):
    """What is asked of an optimizer."""

    @property
    def components(self) -> int: ...
    def begin(self, cell: Cell) -> None: ...
    def component(self, cell: Cell, number: int) -> Flats: ...


class Turns(Execution):
    """Runs what :class:`Execution` runs on the component whose turn it is; the first one is what stands in the parameters."""

    author: Several

    def run(self, kind: str, cell: Cell, flats: Flats, numbers: Named, drawn: Cell | None = None) -> tuple[str, ...]:
        count = self.author.components
        number = numbers["draw"] % count if kind == "look" else (self.steps - 1) % count
        if kind in MOVES:
            numbers = {**numbers, "done": numbers["done"] // count}  # steps of its own
        if kind != "close":
            self.author.begin(cell)
        if not number:
            return super().run(kind, cell, flats, numbers, drawn)
        blocks = self.author.component(cell, number)
        if kind in ("draw", "look"):
            cell.plot.keep(flats["mean"], flats["offset"], cell.only)
            cell.plot.keep(blocks["mean"], flats["mean"], cell.only)
            there = {name: blocks.get(name, flat) if name != "mean" else flat for name, flat in flats.items() if name != "offset"}
            return super().run(kind, cell, there, numbers, drawn)
        if kind == "close":
            offset = flats["mean"] - blocks["mean"]
            cell.plot.keep(flats["offset"], flats["mean"], cell.only)
            cell.plot.keep(offset, flats["offset"], cell.only)
            return "mean", "offset"
        return super().run(kind, cell, {name: blocks.get(name, flat) for name, flat in flats.items()}, numbers, drawn)


class MultiIVON(IVON):
    r"""A mixture of Gaussians with several modes, each learned by :class:`bayesrule.IVON`.

    Costs 3 K - 1 tensors of state for K components, and one more while a draw is open; a step costs what one of IVON costs, and is
    one of one component: they take turns, so that K epochs are one of each.

    .. math::  q(\theta) = \tfrac1K \textstyle\sum_k N\big(\theta; m_k, 1 / (\text{ess}\,(h_k + \delta))\big)

    As an instance of the rule: a mixture over the joint of theta and component, whose components are Diagonal · MonteCarlo ·
    Reparameterized · Riemannian. Where components lie apart, as those of networks do from starts of their own, log q is that of one
    component alone, and the rule for the mixture is the rule for each. The weights stay equal: by their evidence, in nats of all
    examples, one would soon have all.

    Outside of draws the parameters hold the first component. ``sampled_params(train=False)`` draws from each in turn, and
    :func:`bayesrule.predict` from the mixture that :meth:`posterior` leaves behind.

    Args:
        params: As for IVON.
        lr: As for IVON.
        ess: As for IVON.
        components: K, >= 1. One is IVON.
        spread: How far apart components begin, in [0, 1]: 1 draws every tensor of at least two axes anew, as large as it was at
            first; 0 begins all at the same place. Vectors (biases, norms) begin alike.
        **ivon: All else as for IVON, but for ``memory``, ``momentum_dtype`` and ``noise``.

    Raises:
        ValueError: A hyper-parameter is outside its range; the message names group, value and range.
        TypeError: A keyword that IVON does not know, or that this has not.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.full((1, 8), 0.9))
        >>> opt = MultiIVON([w], lr=0.1, ess=1e4, components=2)
        >>> for _ in range(400):
        ...     with opt.sampled_params(train=True):
        ...         (w.square() - 1).square().sum().backward()
        ...     opt.step()
        >>> [m.detach().round().unique().tolist() for m in (w, opt.state[w]["mean_1"])]
        [[1.0], [-1.0, 1.0]]

    Source: Y. Shen et al. (2024), arXiv:2402.17641, section 4, for Multi-IVON; W. Lin, M. E. Khan and M. Schmidt (2019),
    arXiv:1906.02914, for the rule.
    """

    runs = Turns
    is_diagonal = False
    needs_whole = True
    ranges: ClassVar = {**IVON.ranges, "components": Count(1), "spread": Range("[0, 1]")}

    def __init__(self, params: ParamsT, lr: float, ess: float, *, components: int = 3, spread: float = 1.0, **ivon: Any) -> None:
        if own := {"memory", "noise", "momentum_dtype"} & set(ivon):
            raise TypeError(f"MultiIVON has no {min(own)}=; leave it out")
        known = inspect.signature(IVON).parameters
        if unknown := set(ivon) - set(known):
            raise TypeError(f"MultiIVON has no {min(unknown)}=; it takes components, spread and what IVON takes")
        self._own = {"components": components, "spread": spread}
        super().__init__(params, lr, ess, **ivon)

    def _set_up(self, params: ParamsT, arguments: Mapping[str, Any], **fixed: Any) -> None:
        super()._set_up(params, {**arguments, **self.__dict__.pop("_own")}, **fixed)

    @property
    def components(self) -> int:
        """K."""
        return int(self.param_groups[0]["components"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Raises:
            ValueError: It has another number of components than the first.
        """
        super().add_param_group(param_group)
        if (found := self.param_groups[-1]["components"]) != self.components:
            self.param_groups.pop()
            raise ValueError(f"MultiIVON: all groups have the same number of components, got {found} after {self.components}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, cell: Cell) -> None:
        """Begin all components, while the first one stands where it began."""
        for p in cell.plot.params:
            for number in range(1, self.components):
                if f"mean_{number}" not in self.state[p]:
                    self.state[p][f"mean_{number}"] = self._beginning(cell.group, p, number)

    def component(self, cell: Cell, number: int) -> Flats:
        """The flat blocks of a component but the first: mean, hess and memory."""
        states = [self.state[p] for p in cell.plot.params]
        return {
            "mean": cell.plot.shared(f"mean_{number}", states),
            "hess": cell.plot.shared(f"hess_{number}", states, self.start(cell.group)),
            "memory": cell.plot.shared(f"momentum_{number}", states),
        }

    def _beginning(self, group: Mapping[str, Any], param: Tensor, number: int) -> Tensor:
        """Where a component begins."""
        first = self.like_state(param).copy_(param.detach())
        if param.dim() < 2 or not group["spread"]:
            return first
        index = next(i for i, p in enumerate(p for g in self.param_groups for p in g["params"]) if p is param)
        eps = CounterNoise(int(group["seed"]), BEGIN, index, number).normal(first)
        size = first.square().mean().sqrt()
        share = float(group["spread"])
        return first * (1 - share**2) ** 0.5 + eps * size * share

    @torch.no_grad()
    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        first = {name: marginal(self, groups[p], p) for p, name in names.items()}
        laws = [Law({name: m for name, (m, _) in first.items()}, {name: s for name, (_, s) in first.items()})]
        for number in range(1, self.components):
            found = {name: self._marginal(groups[p], p, number) for p, name in names.items()}
            laws.append(Law({name: m for name, (m, _) in found.items()}, {name: s for name, (_, s) in found.items()}))
        if len(laws) == 1:
            return ()
        return (OneOf(tuple(laws), torch.zeros(len(laws), dtype=torch.float64).log_softmax(0)),)

    def _marginal(self, group: Mapping[str, Any], param: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Mean and precision of a parameter under a component but the first."""
        state = self.state[param]
        mean = state[f"mean_{number}"].clone() if f"mean_{number}" in state else self._beginning(group, param, number)
        hess = state.get(f"hess_{number}", torch.full_like(mean, self.start(group)))
        precision = hess * group["ess"] + prior_of(self, group, param)[1]
        return mean, precision if spreads(group) else torch.full_like(precision, math.inf)
