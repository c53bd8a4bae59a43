"""The two ways in which a recorded program runs: planned calls in place, and one compiled function.

Both take the same line of operations apart into what computes with numbers and what computes with tensors.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils.dlpack import from_dlpack

from .vector import axpy, convert, head, lerp


def _axpy(a: Tensor, b: Tensor, scale: float, *, out: Tensor) -> Tensor:
    return torch.add(a, b, alpha=scale, out=out)


def _convert(x: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(x)


_METHODS = {
    name: getattr(torch, name) for name in ("abs", "clamp", "cos", "exp", "log", "rsqrt", "sign", "sin", "sqrt", "square", "tanh")
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.pow: torch.pow,
    operator.neg: torch.neg,
    operator.and_: torch.bitwise_and,
    operator.or_: torch.bitwise_or,
    operator.xor: torch.bitwise_xor,
    operator.rshift: torch.bitwise_right_shift,
    lerp: torch.lerp,
    convert: _convert,
    axpy: _axpy,
}
_COMMUTE = (operator.add, operator.mul)


class Scratch:
    """Memory that every program of an optimizer uses in turn; it grows to the largest request and stays.

    Attributes:
        version: Another one whenever memory was replaced by larger memory; no two scratches share one.
    """

    _versions = itertools.count()

    def __init__(self) -> None:
        self._slots: dict[tuple[Any, Any], Tensor] = {}
        self._counts: dict[Any, Tensor] = {}
        self.version = next(self._versions)

    def flat(self, name: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The slot of a name as a tensor; what is in it is whatever was left there, zeros at first."""
        size = torch.Size(shape).numel() * dtype.itemsize
        slot = self._slots.get((name, device))
        if slot is None or slot.numel() < size:
            self.version = next(self._versions)
            with torch.inference_mode(False):
                slot = self._slots[name, device] = torch.zeros(size, dtype=torch.uint8, device=device)
        return slot[:size].view(dtype).view(tuple(shape))

    def count(self, size: int, device: torch.device) -> Tensor:
        """The numbers 0 to size - 1, shape (size,), of int32."""
        held = self._counts.get(device)
        if held is None or len(held) < size:
            most = max(1 << 16, 1 << (size - 1).bit_length())  # it is to be replaced seldom, as views keep the old one
            held = self._counts[device] = torch.arange(most, dtype=torch.int32, device=device)
        return held[:size]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for held in (self._slots, self._counts) for t in held.values())


class Line:
    """What both ways of running ask of a recording."""

    def __init__(self, graph: fx.Graph, flats: Sequence[str], targets: Sequence[str]) -> None:
        self.graph, nodes = graph, list(graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.nodes = nodes[:-1]
        self.calls = [node for node in nodes if node.op.startswith("call")]
        self.flats = dict(zip(flats, inputs, strict=False))
        self.numbers = set(inputs[len(flats) :])
        for node in self.calls:  # a number is what is made of numbers alone
            if set(node.all_input_nodes) <= self.numbers:
                self.numbers.add(node)
        self.roots: dict[fx.Node, fx.Node] = {}  # whose memory a node sees: views see that of what they are views of
        for node in self.nodes:
            self.roots[node] = self.roots[node.args[0]] if node.target in ("view", head) else node
        values = list(zip(nodes[-1].args[0], (self.flats[name] for name in targets), strict=True))
        self.copies = [(value, target) for value, target in values if self.roots[value] in inputs]
        self.results = [(value, target) for value, target in values if self.roots[value] not in inputs]

    def is_tensor(self, argument: Any) -> bool:
        """Whether an argument of a call is a tensor."""
        return isinstance(argument, fx.Node) and argument not in self.numbers


class _Recorder(fx.Interpreter):
    """Runs a recording and remembers what every node gave."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule({}, graph))
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


def _shapes(graph: fx.Graph, given: Sequence[Tensor], numbers: Sequence[Any]) -> dict[str, Any]:
    """The values of a recording by node, as tensors without storage."""
    recorder = _Recorder(graph)
    recorder.run(*[torch.empty_like(t, device="meta") for t in given], *numbers)
    return recorder.found


class _Place(NamedTuple):
    """Where a result lies in scratch: a slot seen as the value of a node, or as one part of a stack."""

    slot: int
    node: str
    part: int | None = None


@dataclass
class Plan:
    """An eager program: a module of flats, numbers and the tensors of its places."""

    module: fx.GraphModule
    places: list[_Place]
    held: WeakKeyDictionary[Scratch, dict[Any, list[Tensor]]] = field(default_factory=WeakKeyDictionary)

    def tensors(self, scratch: Scratch, graph: fx.Graph, given: Sequence[Tensor], numbers: Sequence[Any]) -> list[Tensor]:
        """The places in scratch, for flats like these."""
        held = self.held.setdefault(scratch, {})
        key = given[0].numel(), given[0].device, scratch.version
        if key not in held:
            found = _shapes(graph, given, numbers)
            with torch.inference_mode(False):
                for _ in range(2):  # a slot that grows moves: only the second time all lie where they stay
                    values = [(p, found[p.node]) for p in self.places]
                    whole = [scratch.flat(p.slot, v.shape, v.dtype, given[0].device) for p, v in values]
                parts = [t if p.part is None else t[:, p.part] for t, p in zip(whole, self.places, strict=True)]
            for old in [k for k in held if k[-1] != scratch.version]:
                del held[old]
            held[given[0].numel(), given[0].device, scratch.version] = parts
            return parts
        return held[key]


class _Planner:
    """Turns a recording into the same line of calls with every ``out=`` filled in, in as few slots as lifetimes allow."""

    def __init__(self, line: Line, given: Sequence[Tensor], numbers: Sequence[Any]) -> None:
        self.line, self.found = line, _shapes(line.graph, given, numbers)
        self.roots = line.roots
        self.last = self._last_uses()
        self.halves = self._halves()
        self.targets = {value: target for value, target in self.line.results}
        self.graph = fx.Graph()
        self.mapped: dict[fx.Node, fx.Node] = {}
        self.kept: dict[fx.Node, fx.Node] = {}  # copies of what is overwritten before it is copied
        self.places: dict[_Place, fx.Node] = {}
        self.slots: dict[fx.Node, int] = {}  # of what lies in scratch and is still needed
        self.free: list[int] = []
        self.made = 0

    def _last_uses(self) -> dict[fx.Node, int]:
        """The number of the call that reads a memory last; the end for what is copied at the end."""
        last: dict[fx.Node, int] = {}
        for number, call in enumerate(self.line.calls):
            for node in call.all_input_nodes:
                last[self.roots[node]] = number
            if not self._is_known(call):  # what it gives may see its operands
                last.update((self.roots[node], len(self.line.calls)) for node in call.all_input_nodes)
        sources = {self.roots[value] for value, _ in self.line.copies}
        self.early = [(v, t) for v, t in self.line.copies if t not in last and t not in sources and v is self.roots[v]]
        self.late = [pair for pair in self.line.copies if pair not in self.early]
        for value, _ in [*self.late, *self.line.results]:
            last[self.roots[value]] = len(self.line.calls)
        return last

    def _is_known(self, node: fx.Node) -> bool:
        return node in self.line.numbers or node.target in ("view", head, torch.stack) or self._into(node) is not None

    def _halves(self) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Results that are needed only to be stacked: they are written to their part of the stack at once."""
        halves: dict[fx.Node, tuple[fx.Node, int]] = {}
        for call in self.line.calls:
            if call.target is torch.stack and call.args[1] == 1:
                parts = call.args[0]
                if len(set(parts)) == len(parts) and all(len(part.users) == 1 and self._into(part) for part in parts):
                    halves.update({part: (call, k) for k, part in enumerate(parts)})
        return halves

    def plan(self) -> Plan:
        """The line of calls, and the places that it wants."""
        inputs = [node for node in self.line.nodes if node.op == "placeholder"]
        self.mapped = {node: self.graph.placeholder(node.name) for node in inputs}
        for value, target in self.early:
            self._copy(value, target)
        for number, node in enumerate(self.line.calls):
            self._call(number, node)
            for used in dict.fromkeys(self.roots[n] for n in node.all_input_nodes):
                if self.last[used] == number and used in self.slots:
                    self.free.append(self.slots.pop(used))
        overwritten = {target for _, target in self.late}
        for value, _ in self.late:  # all are written at once
            if self.roots[value] in overwritten:
                self.kept[value] = self.graph.call_method("clone", (self.mapped[value],))
        for value, target in [*self.late, *self.line.results]:
            if value not in self.targets or self.mapped[value] is not self.mapped[target]:
                self._copy(value, target)
        self.graph.output(None)
        return Plan(fx.GraphModule({}, self.graph), list(self.places))

    def _copy(self, value: fx.Node, target: fx.Node) -> None:
        self.graph.call_method("copy_", (self.mapped[target], self.kept.get(value, self.mapped[value])))

    def _into(self, node: fx.Node) -> Callable[..., Any] | None:
        """The call with ``out=`` that computes a node; None where there is none."""
        if node in self.line.numbers or (node.target is axpy and self.line.is_tensor(node.args[2])):  # alpha= is a number
            return None
        if node.op == "call_method":
            return _METHODS.get(str(node.target))
        first, swapped = (self.line.is_tensor(a) for a in (*node.args[:2], None)[:2])
        return _FUNCTIONS.get(node.target) if first or (swapped and node.target in _COMMUTE) else None

    def _call(self, number: int, node: fx.Node) -> None:
        into = self._into(node)
        if node in {stack for stack, _ in self.halves.values()}:
            self.mapped[node] = self._at(node, self.slots[node])
        elif into is None:
            self.mapped[node] = self.graph.node_copy(node, self.mapped.__getitem__)
        else:
            args = node.args if self.line.is_tensor(node.args[0]) else node.args[::-1]
            out = self._out(number, node)
            kwargs = {**fx.map_arg(node.kwargs, self.mapped.__getitem__), "out": out}
            self.graph.call_function(into, fx.map_arg(args, self.mapped.__getitem__), kwargs)
            self.mapped[node] = out

    def _out(self, number: int, node: fx.Node) -> fx.Node:
        """Where a result goes: its part of a stack, its target, the memory of an operand that dies here, or a free slot."""
        if node in self.halves:
            stack, half = self.halves[node]
            if stack not in self.slots:
                self.slots[stack] = self._slot()
            return self._at(stack, self.slots[stack], half)
        target = self.targets.get(node)
        if target is not None and self.last.get(target, -1) <= number:
            return self.mapped[target]
        for operand in node.all_input_nodes:
            root = self.roots[operand]
            if root in self.slots and self.last[root] == number and self._nbytes(operand) == self._nbytes(node):
                self.slots[node] = self.slots.pop(root)
                return self._at(node, self.slots[node])
        self.slots[node] = self._slot()
        return self._at(node, self.slots[node])

    def _nbytes(self, node: fx.Node) -> int:
        value = self.found[node.name]
        return value.numel() * value.element_size()

    def _slot(self) -> int:
        if self.free:
            return self.free.pop()
        self.made += 1
        return self.made - 1

    def _at(self, node: fx.Node, slot: int, half: int | None = None) -> fx.Node:
        """A slot, seen as the value of a node or as a part of it."""
        place = _Place(slot, node.name, half)
        if place not in self.places:
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self.places[place] = self.graph.placeholder(f"place_{len(self.places)}")
        return self.places[place]


def planned(line: Line, given: Sequence[Tensor], numbers: Sequence[Any]) -> Plan:
    """A line of operations on flats and numbers like these as calls in place."""
    return _Planner(line, given, numbers).plan()


class Compiled:
    """The same line for ``torch.compile``: numbers come in two small tensors, results leave by ``copy_``."""

    def __init__(self, line: Line, numbers: Sequence[Any]) -> None:
        wanted = [n for n in line.nodes if n in line.numbers and not line.numbers.issuperset(n.users)]
        self._numbers = _of_numbers(line, wanted)
        self._whole = whole = [isinstance(value, int) for value in self._numbers(*numbers)]
        self._function = torch.compile(_functional(line, wanted, whole).forward, fullgraph=True, dynamic=True)
        self._floats: tuple[Any, Tensor] | None = None

    def __call__(self, given: Sequence[Tensor], numbers: Sequence[Any]) -> None:
        values = self._numbers(*numbers)
        if any(whole and not isinstance(value, int) for whole, value in zip(self._whole, values, strict=True)):
            raise TypeError(f"numbers that were whole when this was compiled are {values} now")
        device, dtype = given[0].device, reduce(torch.promote_types, (t.dtype for t in given if t.dtype.is_floating_point))
        floats = [float(v) for whole, v in zip(self._whole, values, strict=True) if not whole], device, dtype
        if self._floats is None or self._floats[0] != floats:
            self._floats = floats, torch.tensor([*floats[0], 1.0], dtype=dtype).to(device)
        ints = torch.tensor([v for whole, v in zip(self._whole, values, strict=True) if whole] or [0], dtype=torch.int64)
        self._function(*map(_plain, given), self._floats[1], ints.to(device))


def _plain(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that is no view: the compiler makes a graph for each kind of view."""
    return tensor if tensor._base is None and tensor.storage_offset() == 0 else from_dlpack(tensor.detach())


def _of_numbers(line: Line, wanted: Sequence[fx.Node]) -> Callable[..., Sequence[Any]]:
    """The part of a recording that computes with numbers, as a function of the numbers."""
    graph, mapped = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in line.nodes:
        if node in line.numbers:
            is_input = node.op == "placeholder"
            mapped[node] = graph.placeholder(node.name) if is_input else graph.node_copy(node, mapped.__getitem__)
    graph.output(tuple(mapped[node] for node in wanted))
    return fx.GraphModule({}, graph).forward


def _functional(line: Line, wanted: Sequence[fx.Node], whole: Sequence[bool]) -> fx.GraphModule:
    """The part that computes with tensors, given the flats, the floats and the whole numbers that it wants."""
    graph = fx.Graph()
    mapped: dict[Any, Any] = {node: graph.placeholder(name) for name, node in line.flats.items()}
    packs = [graph.placeholder(name) for name in ("floats", "ints")]
    counts = [0, 0]
    for node, kind in zip(wanted, whole, strict=True):
        mapped[node] = graph.call_function(operator.getitem, (packs[kind], counts[kind]))
        counts[kind] += 1
    for node in line.calls:
        if node in line.numbers:
            continue
        args = fx.map_arg(node.args, mapped.__getitem__)
        if node.target is axpy:  # alpha= takes no tensor
            mapped[node] = graph.call_function(operator.add, (args[0], graph.call_function(operator.mul, args[1:])))
        elif node.target is lerp:
            mapped[node] = graph.call_function(torch.lerp, args)
        elif node.target is convert:
            mapped[node] = graph.call_method("to", args)
        elif node.target is head:
            size = graph.call_method("numel", args[1:])
            mapped[node] = graph.call_function(operator.getitem, (args[0], slice(None, size)))
        else:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
    one = graph.call_function(operator.getitem, (packs[0], counts[0]))
    for value, _ in line.copies:  # the compiler may read a bare copy of an input after that was overwritten
        mapped[value, one] = graph.call_function(operator.mul, (mapped[value], one))
    for value, target in line.copies:
        graph.call_method("copy_", (mapped[target], mapped[value, one]))
    for value, target in line.results:
        graph.call_method("copy_", (mapped[target], mapped[value]))
    graph.output(None)
    return fx.GraphModule({}, graph)
