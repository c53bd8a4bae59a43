"""Calls of layers that were watched: the gradients of their parameters for each example once it went backward, piece by piece."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from .gradients import FEW, Change, Dense, Gradients
from .layers import Layer

Params = dict[str, nn.Parameter]


class Inseparable(RuntimeError):
    """The examples of a batch cannot be told apart; one at a time they can."""


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Args:
        module: The layer.
        params: Its parameters of interest, by name.
        examples: n.
        inputs: What went in, flat; tensors are detached.
        edges: Of the outputs, for whom there is a gradient.
        sizes: Numbers in each of these, an example.
        layer: Its kind.
    """

    module: nn.Module
    params: Params
    examples: int
    inputs: list[Any]
    edges: list[GradientEdge]
    sizes: list[int]
    layer: Layer | None = None
    scale: float = 1.0
    deltas: list[list[Tensor | None]] = field(default_factory=list)  # by output that is asked for (K), then by edge

    def __post_init__(self) -> None:
        self.versions = [x._version if isinstance(x, Tensor) and not x.is_inference() else 0 for x in self.inputs]
        self.inputs = [x.detach() if isinstance(x, Tensor) else x for x in self.inputs]

    @property
    def came_back(self) -> bool:
        """Whether any of what was asked for depends on it."""
        return any(delta is not None for deltas in self.deltas for delta in deltas)

    @property
    def is_light(self) -> bool:
        """Whether its gradients are no larger than what came back, with nothing in them that several outputs could share."""
        return self.layer is not None and not self.layer.is_outer

    def gradients(self, rows: slice) -> dict[nn.Parameter, Gradients]:
        """Of some examples, by parameter."""
        for x, version in zip(self.inputs, self.versions, strict=True):
            if isinstance(x, Tensor) and not x.is_inference() and x._version != version:
                name = type(self.module).__name__
                raise RuntimeError(f"the input of {name} was written since, so its gradients are lost: write to a copy of it")
        return self._form(rows)

    def push(self, rows: slice, changes: Mapping[nn.Parameter, Change]) -> list[Tensor]:
        """What changes of its parameters, one for each of some examples, do to its outputs, by edge."""
        assert self.layer is not None
        a = self.inputs[0][rows]
        own = {name: changes[p] for name, p in self.params.items() if p in changes}
        return [self.layer.push(self.module, a.to(self._wide()) if a.is_floating_point() else a, own)]

    def cost(self) -> tuple[float, int]:
        """Positions, and numbers that are made for an example beside its gradient."""
        outputs, size = len(self.deltas), sum(self.sizes)
        if self.layer is None:
            return math.inf, 4 * size * outputs
        if not self.layer.is_outer:
            return 0, 2 * size * outputs
        weight: Any = self.module.weight
        positions = size // max(len(weight), 1)
        return positions, size * outputs + positions * weight[0].numel() * getattr(self.module, "groups", 1)

    def _form(self, rows: slice) -> dict[nn.Parameter, Gradients]:
        assert self.layer is not None
        wide = self._wide()
        a = self.inputs[0][rows]
        made = self.layer.gradients(self.module, a.to(wide) if a.is_floating_point() else a, self._delta(0, rows).to(wide))
        return {p: made[name]() for name, p in self.params.items() if name in made}  # others have no part in it

    def _wide(self) -> torch.dtype:
        return torch.promote_types(next(iter(self.params.values())).dtype, torch.float32)

    def _delta(self, edge: int, rows: slice) -> Tensor:
        """What came back to an output, (n, K, ...)."""
        of = [deltas[edge] for deltas in self.deltas]
        if len(of) == 1 and of[0] is not None:
            stacked = of[0][rows][:, None]
            return stacked.to(self._wide()) * self.scale if self.scale != 1 else stacked
        like = next(delta for delta in of if delta is not None)
        stacked = torch.stack([torch.zeros_like(like[rows]) if delta is None else delta[rows] for delta in of], 1)
        return stacked.to(self._wide()) * self.scale if self.scale != 1 else stacked


@dataclass(eq=False)
class Whole(Call):
    """A module without a form: the gradients of its examples are formed one by one, by ``torch.func``.

    Args:
        rebuild: From flat inputs to arguments.
        places: Where among its flat outputs those with edges are.
        cast: The dtype of autocast, if that was on.
    """

    rebuild: Callable[[list[Any]], tuple[Any, Any]] = field(kw_only=True)
    places: list[int] = field(kw_only=True)
    cast: torch.dtype | None = field(kw_only=True)

    def push(self, rows: slice, changes: Mapping[nn.Parameter, Change]) -> list[Tensor]:
        led = [i for i, x in enumerate(self.inputs) if is_led(x, self.examples)]
        params = {name: p.detach() for name, p in self.params.items()}
        moved = {name: changes[p].dense().to(p.dtype) for name, p in self.params.items() if p in changes}

        def pushed(tangents: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
            def outputs(moving: dict[str, Tensor]) -> list[Tensor]:
                found = self._outputs({**params, **moving}, led, inputs)
                return [found[place][0] for place in self.places]

            point: Any = {name: params[name] for name in tangents}
            found, back, *_ = torch.func.vjp(outputs, point)
            _, forth, *_ = torch.func.vjp(lambda v: back(v)[0], found)  # of what is linear in v
            made: list[Tensor] = forth(tangents)[0]
            return made

        with self._as_called(), forward_derivatives():
            made: list[Tensor] = torch.func.vmap(pushed)(moved, [self.inputs[i][rows] for i in led])
        return [each.to(self._wide()) for each in made]

    def _outputs(self, params: Mapping[str, Tensor], led: Sequence[int], inputs: Sequence[Tensor]) -> list[Any]:
        """For a single example."""
        flat = list(self.inputs)
        for i, x in zip(led, inputs, strict=True):
            flat[i] = x[None]
        args, kwargs = self.rebuild(flat)
        return tree_flatten(torch.func.functional_call(self.module, dict(params), args, kwargs))[0]

    @contextmanager
    def _as_called(self) -> Iterator[None]:
        """In the precision in which it was called; what vmap cannot do is said in one line."""
        kind = next(iter(self.params.values())).device.type
        try:
            with torch.autocast(kind, self.cast, enabled=self.cast is not None), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # that it is slower has been said
                yield
        except (RuntimeError, ValueError, NotImplementedError) as error:
            first = shorten(str(error).strip().partition("\n")[0], 120, placeholder=" ...")
            raise Inseparable(
                f"{type(self.module).__name__} has no per-example gradients: it has no closed form here, and torch.func.vmap "
                f"fails ({first}); write it so that vmap takes it, turn its randomness off, or freeze its parameters"
            ) from error

    def _form(self, rows: slice) -> dict[nn.Parameter, Gradients]:
        led = [i for i, x in enumerate(self.inputs) if is_led(x, self.examples)]
        back = [edge for edge in range(len(self.places)) if any(deltas[edge] is not None for deltas in self.deltas)]

        def weighted(params: dict[str, Tensor], inputs: list[Tensor], deltas: list[Tensor]) -> Tensor:
            outputs = self._outputs(params, led, inputs)
            products = [(outputs[self.places[edge]][0] * delta).sum() for edge, delta in zip(back, deltas, strict=True)]
            return torch.stack(products).sum()

        params = {name: p.detach() for name, p in self.params.items()}
        each = torch.func.vmap(torch.func.grad(weighted), (None, 0, 0))  # one vmap: two nested ones are wrong for nn.PReLU
        with self._as_called():
            inputs, deltas = [self.inputs[i][rows] for i in led], [self._delta(edge, rows) for edge in back]
            made = self._each_column(each, params, inputs, deltas)
        return {p: Dense(made[name].to(self._wide())) for name, p in self.params.items()}

    @staticmethod
    def _each_column(
        each: Callable[..., dict[str, Tensor]], params: dict[str, Tensor], inputs: list[Tensor], deltas: list[Tensor]
    ) -> dict[str, Tensor]:
        """The gradients for every example and every column of deltas, shape (rows, columns, ...)."""
        columns = deltas[0].shape[1]
        many = [x.repeat_interleave(columns, 0) for x in inputs]
        found = each(params, many, [delta.flatten(0, 1) for delta in deltas])
        return {name: t.unflatten(0, (-1, columns)) for name, t in found.items()}


@contextmanager
def forward_derivatives() -> Iterator[None]:
    """What has forward derivatives takes the place of what has none: fused attention, and a way around layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how torch makes some of them
        import_module("torch._decomp.decompositions_for_jvp")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def is_led(x: Any, examples: int) -> bool:
    """Whether the first dimension is that of the examples."""
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == examples


def reduce(calls: Iterable[Call], chunk: int, visit: Callable[[list[Call], slice, dict[nn.Parameter, Gradients]], None]) -> None:
    """Show the gradients of every parameter, some examples at a time; those of a parameter that is used twice are added before.

    Args:
        calls: With what came back to them.
        chunk: Bytes of temporaries, at least those of one example.
        visit: Called with the calls that share parameters, the rows of the examples, and the gradients by parameter.
    """
    for unit in _units(call for call in calls if call.came_back):
        params = {id(p): p for call in unit for p in call.params.values()}
        one = next(iter(params.values()))
        with torch.no_grad(), torch.autocast(one.device.type, enabled=False):
            examples = unit[0].examples
            step = max(1, chunk // max(1, _numbers(unit, params.values()) * max(4, one.element_size())))
            for start in range(0, examples, step):
                rows = slice(start, min(start + step, examples))
                found: dict[nn.Parameter, Gradients] = {}
                for call in unit:
                    for p, gradients in call.gradients(rows).items():
                        found[p] = found[p].plus(gradients) if p in found else gradients
                visit(unit, rows, found)


def _numbers(unit: Sequence[Call], params: Iterable[nn.Parameter]) -> int:
    """How many are made for an example."""
    positions, made = map(sum, zip(*(call.cost() for call in unit), strict=True))
    mixed = len({None if call.layer is None else call.layer.is_outer for call in unit}) > 1
    split = any(getattr(call.module, "groups", 1) > 1 for call in unit)
    dense = sum(p.numel() for p in params) * len(unit[0].deltas) if positions > FEW or mixed or split else 0
    return made + dense


def _units(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls that share parameters belong together."""
    units: list[list[Call]] = []
    for call in calls:
        mine = set(map(id, call.params.values()))
        touched = [unit for unit in units if any(id(p) in mine for other in unit for p in other.params.values())]
        units = [unit for unit in units if unit not in touched]
        units.append([*(other for unit in touched for other in unit), call])
    return units
