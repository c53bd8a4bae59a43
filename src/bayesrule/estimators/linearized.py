r"""A model's outputs as linear functions of its weights: products with their covariance, without a gradient for each example.

For outputs :math:`f_i` of example i, :math:`J_i = \partial f_i / \partial \theta` and a covariance S of the weights:

.. math::  V_i v_i = J_i S J_i^T v_i, \qquad V_i = J_i S J_i^T.

The first takes one backward, which brings :math:`J_i^T v_i` to every layer as factors, and one forward, in which every layer adds
to its output what S times these factors does there: no example's gradient of all weights is ever written. The second takes a
backward for each output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calls import Call, forward_derivatives, reduce
from .gradients import Change, Dense, Gradients
from .per_example import CHUNK, KEPT
from .tracing import Trace


class Block(NamedTuple):
    """Weights that vary together.

    Args:
        names: Of the parameters.
        solve_each: The covariance times each of n vectors, by name of shape (n, ...).
    """

    names: Sequence[str]
    solve_each: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Spread:
    """A covariance of named weights; those that are not named are certain.

    Args:
        variance: Of independent ones, by name, each of the parameter's shape.
        blocks: Of the others.
    """

    variance: Mapping[str, Tensor]
    blocks: Sequence[Block] = ()

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.variance, *(name for block in self.blocks for name in block.names)]


class Linearized:
    """One batch.

    Args:
        model: Holds the weights, which must require gradients; norms in eval mode.
        outputs: Calls the model on the batch and returns its outputs, shape (n, ...). It is called again for products.
        spread: The covariance.
        chunk: Bytes that temporaries may take; a single example may take more.

    Attributes:
        values: The outputs, shape (n, ...).

    Raises:
        RuntimeError: The examples cannot be told apart; the message says where.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], Tensor], spread: Spread, chunk: int = CHUNK) -> None:
        self.outputs, self.spread, self.chunk = outputs, spread, chunk
        params = dict(model.named_parameters(remove_duplicate=False))
        self._wanted = {name: params[name] for name in spread.names}
        self._calls: list[Call] = []
        with torch.enable_grad(), Trace(model, self._wanted, self._calls.extend) as trace:
            self._found = outputs()
        trace.warn()
        self.values = self._found.detach()
        for call in self._calls:
            if call.examples != len(self._found):
                raise ValueError(f"the model was called with {call.examples} examples, and outputs of {len(self._found)} came back")

    @property
    def _edges(self) -> list[Any]:
        return [edge for call in self._calls for edge in call.edges]

    @property
    def bytes(self) -> int:
        """What comes back to the layers of one example when every output is asked for, and gradients of blocks."""
        outputs = math.prod(self.values.shape[1:])
        held = sum(self._wanted[name].numel() for block in self.spread.blocks for name in block.names)
        return 4 * outputs * (sum(sum(call.sizes) for call in self._calls) + 2 * held)

    def _back(self, *directions: Tensor) -> list[Call]:
        """Go backward along directions of the outputs, one after another; the calls that any of them came back to."""
        for call in self._calls:
            call.deltas = []
        for v in directions:
            found = iter(torch.autograd.grad(self._found, self._edges, v, retain_graph=True, allow_unused=True))
            for call in self._calls:
                call.deltas.append([next(found) for _ in call.edges])
        return [call for call in self._calls if call.came_back]

    @property
    def _is_certain(self) -> bool:
        return not (self._calls and self._found.requires_grad and self._found.numel())

    @property
    def _variances(self) -> dict[nn.Parameter, Tensor]:
        wide = {p: torch.promote_types(p.dtype, torch.float32) for p in self._wanted.values()}
        return {p: self.spread.variance[n].to(p.device, wide[p]) for n, p in self._wanted.items() if n in self.spread.variance}

    # Matrices

    def covariance(self) -> Tensor:
        """V_i of every example, shape (n, K, K) for K outputs. Costs K backwards."""
        n, count = len(self.values), math.prod(self.values.shape[1:])
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        result = torch.zeros(n, count, count, dtype=dtype, device=self.values.device)
        if self._is_certain:
            return result
        variances, kept = self._variances, dict[nn.Parameter, Tensor]()

        def visit(_: list[Call], rows: slice, found: dict[nn.Parameter, Gradients]) -> None:
            for p, gradients in found.items():
                if p in variances:
                    result[rows] += gradients.gram(variances[p])
                else:
                    _keep(kept, p, rows, gradients, n)

        reduce(self._back(*self._units(slice(0, count))), self.chunk, visit)
        for names, solved in self._solved(kept):
            for name in names:
                if (each := kept.get(self._wanted[name])) is not None:
                    result += each.flatten(2) @ solved[name].reshape(n, count, -1).mT
        return (result + result.mT) / 2

    def variance(self, limit: int = KEPT * CHUNK) -> Tensor:
        """The diagonals of V_i, shape (n, ...). Costs K backwards.

        Args:
            limit: Bytes that may come back to the layers at once; that of one output may be more.
        """
        n, count = len(self.values), math.prod(self.values.shape[1:])
        result = torch.zeros(n, count, dtype=torch.promote_types(self.values.dtype, torch.float32), device=self.values.device)
        if self._is_certain:
            return result.view(self.values.shape)
        variances, step = self._variances, max(1, limit * count // max(1, n * self.bytes))
        for first in range(0, count, step):
            at, kept = slice(first, min(first + step, count)), dict[nn.Parameter, Tensor]()

            def visit(_: list[Call], rows: slice, found: dict[nn.Parameter, Gradients], at: slice = at, kept: Any = kept) -> None:
                for p, gradients in found.items():
                    if p in variances:
                        result[rows, at] += gradients.square().dot(variances[p])
                    else:
                        _keep(kept, p, rows, gradients, n)

            reduce(self._back(*self._units(at)), self.chunk, visit)
            for names, solved in self._solved(kept):
                for name in names:
                    if (each := kept.get(self._wanted[name])) is not None:
                        result[:, at] += (each * solved[name]).flatten(2).sum(2)
        return result.clamp_(min=0).view(self.values.shape)

    def _units(self, at: slice) -> Iterator[Tensor]:
        """Directions that ask for single outputs."""
        for place in range(at.start, at.stop):
            unit = torch.zeros_like(self.values).flatten(1) if self.values.dim() > 1 else torch.zeros_like(self.values)[:, None]
            unit[:, place] = 1
            yield unit.view(self.values.shape)

    def _solved(self, kept: Mapping[nn.Parameter, Tensor]) -> Iterator[tuple[Sequence[str], dict[str, Tensor]]]:
        """By block: its names, and the covariance times what was kept, of shape (n, K, ...)."""
        for names, solve_each in self.spread.blocks:
            like = next((kept[self._wanted[name]] for name in names if self._wanted[name] in kept), None)
            if like is None:
                continue
            lead = like.shape[:2]
            v = {name: kept.get(p, like.new_zeros(1).expand(*lead, *p.shape)) for name in names for p in [self._wanted[name]]}
            made = solve_each({name: each.flatten(0, 1) for name, each in v.items()})
            yield names, {name: each.unflatten(0, lead) for name, each in made.items()}

    # Products

    @torch.no_grad()
    def times(self, v: Tensor) -> Tensor:
        """V_i v_i of every example, shape (n, ...) as v and the outputs. Costs a backward and a forward."""
        if self._is_certain:
            return torch.zeros_like(v)
        variances, kept, n = self._variances, dict[nn.Parameter, Tensor](), len(v)
        pushed: dict[int, list[Tensor]] = {}
        waiting: list[Call] = []

        def push(call: Call, rows: slice, changes: Mapping[nn.Parameter, Change]) -> None:
            for edge, change in enumerate(call.push(rows, changes)):
                into = pushed.setdefault(id(call), [])
                if edge == len(into):
                    into.append(change.new_zeros(n, *change.shape[1:]))
                into[edge][rows] = change

        def visit(unit: list[Call], rows: slice, found: dict[nn.Parameter, Gradients]) -> None:
            if all(p in variances for p in found):
                changes = {p: Change(gradients, variances[p]) for p, gradients in found.items()}
                for call in unit:
                    push(call, rows, changes)
                return
            if not rows.start:
                waiting.extend(unit)
            for p, gradients in found.items():
                _keep(kept, p, rows, gradients, n)

        reduce(self._back(v), self.chunk, visit)
        moved: dict[nn.Parameter, Tensor] = {p: each * variances[p] for p, each in kept.items() if p in variances}
        for names, solved in self._solved(kept):
            moved |= {self._wanted[name]: solved[name] for name in names}
        for call in waiting:
            push(call, slice(0, n), {p: Change(Dense(moved[p]), None) for p in call.params.values()})
        with _pushing(self._calls, pushed) as unpacked:
            return unpacked(self.outputs()).to(v.dtype)


def _keep(kept: dict[nn.Parameter, Tensor], p: nn.Parameter, rows: slice, gradients: Gradients, n: int) -> None:
    """Write the gradients of some examples to those of all n, shape (n, K, ...)."""
    each = gradients.dense().each
    if p not in kept:
        kept[p] = each.new_zeros(n, *each.shape[1:])
    kept[p][rows] = each


CHANGED = "the model's forward is another one without gradients, so that products cannot be taken; let it call the same layers"


@contextmanager
def _pushing(calls: Sequence[Call], pushed: Mapping[int, list[Tensor]]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Layers add changes to what they give, as derivatives; what is yielded tells the derivative of an output.

    Args:
        calls: In the order in which the model makes them.
        pushed: Changes of the outputs by call (its id) and edge.
    """
    turn: dict[nn.Module, Iterator[Call]] = {}
    for call in calls:
        turn.setdefault(call.module, iter([other for other in calls if other.module is call.module]))

    def after(module: nn.Module, _: Any, output: Any) -> Any:
        call = next(turn[module], None)
        if call is None:
            raise RuntimeError(f"{CHANGED}: {type(module).__name__} ran once more")
        outputs, form = tree_flatten(output)
        places = getattr(call, "places", [0])
        for place, change in zip(places, pushed.get(id(call), ()), strict=False):
            change = change.to(outputs[place].dtype)
            outputs[place] = outputs[place] + forward_ad.make_dual(torch.zeros_like(change), change)
        return tree_unflatten(outputs, form)

    def derivative(output: Tensor) -> Tensor:
        tangent = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if tangent is None else tangent.clone()

    handles = [module.register_forward_hook(after) for module in turn]
    try:
        with forward_derivatives(), forward_ad.dual_level(), torch.no_grad():
            yield derivative
        for module, rest in turn.items():
            if next(rest, None) is not None:
                raise RuntimeError(f"{CHANGED}: {type(module).__name__} did not run again")
    finally:
        for handle in handles:
            handle.remove()
