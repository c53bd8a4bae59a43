"""What one run of a program works on: parameters of one plot that have made the same number of steps.

A :class:`Layout` deals the parameters of an optimizer into cells, and begins and counts their state.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..lowering import Scratch
from ..noise import addresses
from ..plots import Plot, plots
from ..rule import BayesRule
from ..shards import here, is_shared_out
from ..vector import BLOCK, BUCKET, whole_blocks
from .hyperparameters import analyzed, validate

Unit = Literal["tensor", "group"] | None
"""What moves as one theta; None where every element moves alone, however parameters are cut."""


class Cell(NamedTuple):
    """A visit to a plot. A program computes the whole plot; only what belongs to the cell is kept."""

    plot: Plot
    group: dict[str, Any]
    rule: BayesRule
    inputs: Mapping[str, Any]  # numbers that programs take: the group's, steps done, the seed
    structure: Any  # all else that programs depend on
    kept: Mapping[str, Tensor]  # the state, flat
    step: int  # steps done
    remembers: bool  # whether there is a memory of earlier steps
    only: frozenset[int] | None  # the members that belong to the cell; None is all

    @property
    def draws(self) -> bool:
        """Whether q has a spread to draw from."""
        return self.rule.expectation.spreads

    @property
    def climbs(self) -> bool:
        """Whether a first look only says where to look."""
        return self.rule.expectation.climbs

    @property
    def squares_mean(self) -> bool:
        """Whether a curvature is the square of a gradient at the mean: then of the whole step's, however many contexts it has."""
        curvature = self.rule.curvature
        return not self.draws and curvature.degree == 2 and not curvature.squares_examples

    @property
    def params(self) -> list[Tensor]:
        """The parameters that belong to the cell."""
        return [p for i, p in enumerate(self.plot.params) if self.only is None or i in self.only]


class Names(NamedTuple):
    """Under which names a parameter's state is kept; None where there is nothing to keep."""

    hess: str | None
    memory: str
    mean: str | None = None  # of parameters of less than 32 bits, exactly


class Host(Protocol):
    """What a layout needs of its optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any
    frugal: bool

    @property
    def names(self) -> Names: ...
    @property
    def ranges(self) -> Mapping[str, Any]: ...
    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def start(self, group: Mapping[str, Any]) -> float: ...
    def at(self, group: Mapping[str, Any], step: int) -> dict[str, Any]: ...
    def like_state(self, param: Tensor) -> Tensor: ...
    def unit(self, group: Mapping[str, Any]) -> Unit: ...


class Layout:
    """The parameters of an optimizer, dealt into cells.

    Args:
        host: The optimizer.
        scratch: Where small parameters are copied together.
    """

    def __init__(self, host: Host, name: str, scratch: Scratch) -> None:
        self.host, self.name, self.scratch, self.limit = host, name, scratch, BUCKET
        self._plots: dict[int, tuple[Any, list[Plot], list[Tensor]]] = {}  # by group
        self._stale: set[int] = set()  # groups whose plots may be dealt anew
        self._counters: dict[int, tuple[list[Tensor], Tensor]] = {}  # by group: "step" of every parameter, and all in one
        self._valid: dict[int, tuple[list[Any], Any]] = {}  # by group: hyper-parameters found in their ranges, analyzed
        self.sharded = False  # whether parameters lie on several processes
        self._plan: tuple[Any, list[Cell]] | None = None  # what was dealt last (parameters, hyper-parameters), and the cells

    def renew(self, limit: int) -> None:
        """Before a step: steps and state may have changed, and the number of elements a bucket may have."""
        self._plan, self.limit, self._stale = None, limit, set(self._plots)

    def forget(self) -> None:
        """Deal everything anew: parameters or their state were replaced."""
        self._plan, self._plots, self._counters = None, {}, {}

    def trainable(self) -> list[Tensor]:
        """The parameters that want a gradient, over all groups in order."""
        return [p for group in self.host.param_groups for p in group["params"] if p.requires_grad]

    def cells(self, params: Sequence[Tensor]) -> list[Cell]:
        """Trainable parameters, dealt into cells, each of one plot and number of steps.

        Raises:
            ValueError: A hyper-parameter has left its range, or a parameter has another shape than its state.
        """
        groups = range(len(self.host.param_groups))
        wanted = list(map(id, params)), [self._analyzed(index) for index in groups]
        if self._plan is None or self._plan[0] != wanted:
            chosen = set(wanted[0])
            self._plan = wanted, [cell for index in groups for cell in self._visit(index, chosen, *wanted[1][index])]
        return self._plan[1]

    def _analyzed(self, index: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The numbers and the structure of a group, once all are in their ranges."""
        group = self.host.param_groups[index]
        known = [group.get(name) for name in self.host.ranges]
        if any(isinstance(value, Tensor) for value in known) or index not in self._valid or self._valid[index][0] != known:
            validate(self.name, index, group, self.host.ranges)
            self._valid[index] = known, analyzed(group, self.host.ranges)
        return self._valid[index][1]

    def _visit(self, index: int, chosen: set[int], numbers: dict[str, Any], structure: tuple[Any, ...]) -> Iterator[Cell]:
        """The cells of a group."""
        group = self.host.param_groups[index]
        dealt = self._plot(index)
        params = {id(p): p for p in self._members(index)}
        states = {key: self.state(group, p) for key, p in params.items()}
        steps = dict(zip(states, self._steps(index, list(states.values())), strict=True))
        seed, together = int(group.get("seed", 0)), self.host.unit(group) is not None
        for plot in dealt:
            within = [states[id(p)] for p in plot.params]
            own = [steps[id(p)] if id(p) in chosen else -1 for p in plot.params]
            if together and max(own) >= 0:  # a block moves as one
                own = [max(steps[id(p)] for p in plot.params)] * len(own)
            for step in sorted(set(own) - {-1}):
                only = None if len(set(own)) == 1 else frozenset(i for i, n in enumerate(own) if n == step)
                known = (state for state, n in zip(within, own, strict=True) if n == step)
                inputs = {**numbers, "done": step, "seed": seed}
                now = self.host.at(group, step)
                rule = self.host.rule(now)
                remembers = rule.momentum.remembers and step > 0 and any(self.host.names.memory in state for state in known)
                kept = self._kept(group, rule, plot, within)
                yield Cell(plot, now, rule, inputs, (*structure, "prior_mean" in kept), kept, step, remembers, only)
        for key, p in params.items():
            if not here(p).numel():
                self._keep_nothing(group, self.host.rule(group), p, states[key])

    def _keep_nothing(self, group: Mapping[str, Any], rule: BayesRule, param: Tensor, state: dict[str, Any]) -> None:
        """The state of a parameter of which nothing lies here: a checkpoint wants the same names and dtypes on every process."""
        kept = self.host.like_state(param)
        if rule.momentum.remembers and self.host.names.memory not in state:
            state[self.host.names.memory] = kept.to(group.get("momentum_dtype") or kept.dtype)
        if self.host.names.mean and param.dtype.itemsize < kept.dtype.itemsize:
            state.setdefault(self.host.names.mean, kept)

    def _members(self, index: int) -> list[Tensor]:
        """The parameters of a group that were dealt: trainable ones that have elements, if only on other processes."""
        self._plot(index)
        return self._plots[index][2]

    def follow(self) -> None:
        """Whoever wrote into parameters that are held rounded is obeyed."""
        for plot in self.plots():
            plot.follow()

    def left_out(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Those that were dealt into no plot: they became trainable within a step."""
        dealt = {id(p) for index in range(len(self.host.param_groups)) for p in self._members(index)}
        return [p for p in params if id(p) not in dealt and p.numel()]

    def plots(self) -> list[Plot]:
        """All plots, in an order that is the same on every process."""
        return [plot for index in range(len(self.host.param_groups)) for plot in self._plot(index)]

    def _plot(self, index: int) -> list[Plot]:
        """The plots of a group, dealt anew when its parameters have changed in kind, place or number; never within a step."""
        if index in self._plots and index not in self._stale:
            return self._plots[index][1]
        self._stale.discard(index)
        group = self.host.param_groups[index]
        params = group["params"]
        kinds = ((p, here(p)) for p in params)
        key = [(id(p), t.data_ptr(), t.shape, t.dtype, p.requires_grad, t.is_contiguous()) for p, t in kinds], self.limit
        if index not in self._plots or self._plots[index][0] != key:
            every = [p for group in self.host.param_groups for p in group["params"]]
            starts = dict(zip(map(id, every), addresses(p.numel() for p in every), strict=True))
            wanted = [(starts[id(p)], p) for p in params if p.requires_grad]
            for _, p in wanted:
                self._check(p)
            self.sharded = any(is_shared_out(p) for p in every)
            self._plots[index] = key, self._deal(group, wanted), [p for _, p in wanted if p.numel()]
        return self._plots[index][1]

    def _deal(self, group: Mapping[str, Any], wanted: Sequence[tuple[int, Tensor]]) -> list[Plot]:
        unit = self.host.unit(group)
        limit = self.limit if unit is None else max(2 * BLOCK, sum(2 * whole_blocks(p.numel()) for _, p in wanted))
        return plots(wanted, self.scratch, limit, unit == "tensor")

    def _check(self, param: Tensor) -> None:
        if param.dtype.itemsize >= 4 and param in self.host.state:  # it holds its mean itself
            self.host.state[param].pop(self.host.names.mean, None)
        for name, tensor in self.host.state.get(param, {}).items():
            if name != "step" and isinstance(tensor, Tensor) and tensor.shape != param.shape:
                raise ValueError(
                    f"{self.name}: a parameter has shape {tuple(param.shape)}, its {name} shape {tuple(tensor.shape)}: it was "
                    "given another shape after steps; make a new optimizer"
                )

    def _steps(self, index: int, states: Sequence[dict[str, Any]]) -> list[int]:
        """How many steps each trainable parameter of a group has made; the counters share one tensor."""
        counters = [state["step"] for state in states]
        held, flat = self._counters.get(index, ([], torch.zeros(0)))
        if len(held) != len(counters) or not all(map(operator.is_, held, counters)):
            with torch.inference_mode(False), torch.no_grad():
                flat = torch.tensor([float(counter) for counter in counters])
                held = list(flat.unbind())
            self._counters[index] = held, flat
            for state, counter in zip(states, held, strict=True):
                state["step"] = counter
        return list(map(int, flat.tolist()))

    def count(self, params: Sequence[Tensor]) -> None:
        """One step more for parameters."""
        moved = set(map(id, params))
        for index in self._counters:
            if self.host.unit(self.host.param_groups[index]) is not None:
                blocks = [set(map(id, plot.params)) for plot in self._plot(index)]
                moved |= {own for block in blocks if block & moved for own in block}
        for index, (_, flat) in self._counters.items():
            own = [id(p) in moved for p in self._members(index)]
            flat.add_(1.0 if all(own) else torch.tensor(own, dtype=flat.dtype))

    def idle(self) -> tuple[int, int]:
        """How many parameters have made no step, and of how many."""
        counters = [flat for _, flat in self._counters.values()]
        return sum(int((flat == 0).sum()) for flat in counters), sum(map(len, counters))

    def _kept(self, group: Mapping[str, Any], rule: BayesRule, plot: Plot, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What is kept for a plot, by the names that programs use."""
        of_prior = [name for name in ("prior_mean", "prior_precision") if name in states[0]]
        flats: dict[str, Tensor] = {name: plot.shared(name, states) for name in of_prior}
        if self.host.names.hess:
            flats["hess"] = plot.shared(self.host.names.hess, states, self.host.start(group))
        if rule.momentum.remembers:
            flats["memory"] = plot.shared(self.host.names.memory, states, dtype=group.get("momentum_dtype"))
        if self.host.names.mean and plot.rounds:
            plot.shared("mean", states)
            plot.follow()
        return flats

    def state(self, group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """The state of a parameter, begun where it is not."""
        state: dict[str, Any] = self.host.state[param]
        if "step" not in state or (self.host.names.hess is not None and self.host.names.hess not in state):
            with torch.inference_mode(False), torch.no_grad():
                state.setdefault("step", torch.tensor(0.0))
                if self.host.names.hess is not None and self.host.names.hess not in state:
                    state[self.host.names.hess] = self.host.like_state(param).fill_(self.host.start(group))
        return state
