"""A computation on flat tensors, recorded once and run many times, in place.

The rule is ordinary arithmetic on anything with ``+ - * /``. :func:`Program.record` calls it once with symbols
(``torch.fx`` proxies) and keeps the straight line of operations that came by. That one recording is run in two ways:

* **eagerly**, call by call: every result goes by ``out=`` into scratch that is planned once and used again, or straight
  to where it is to lie, so a run allocates nothing;
* **compiled**, by ``torch.compile`` of the same line: one kernel, one pass over memory.

Numbers (rates, decays, the step, the key of the noise) are inputs: no schedule records or compiles anew. Only what an
algorithm may branch on is fixed in the recording; a branch on a number raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

from .lowering import Compiled, Line, Plan, Scratch, planned

Named = Mapping[str, Any]


@contextmanager
def uncast() -> Iterator[None]:
    """Autocast, which is for forward passes, is off inside: what is done to weights is done in their own precision."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Program:
    """A recorded computation.

    Args:
        graph: Placeholders for flats, then for numbers; the output is a tuple of values.
        flats: Names of the flat tensors.
        numbers: Names of the numbers.
        targets: Which flat each value of the output is written to.
    """

    def __init__(self, graph: fx.Graph, flats: Sequence[str], numbers: Sequence[str], targets: Sequence[str]) -> None:
        self.graph, self.flats, self.numbers, self.targets = graph, tuple(flats), tuple(numbers), tuple(targets)
        self._plans: dict[Any, Plan] = {}
        self._compiled: Compiled | None = None

    @classmethod
    def record(cls, function: Callable[[Named, Named], Named], flats: Sequence[str], numbers: Sequence[str]) -> Program:
        """Record a function of flat tensors and numbers.

        Args:
            function: From symbols by name (flats, numbers) to values by name: each value is written to the flat of that name,
                as if all were written at once.
            flats: Names of the flats: shape (size,), or (size / 2,) for what belongs to pairs.
            numbers: Names of the numbers.

        Raises:
            torch.fx.proxy.TraceError: The function branches on a number or on a tensor.

        Example:
            >>> descend = Program.record(lambda f, n: {"x": f["x"] - n["rate"] * f["g"]}, ["x", "g"], ["rate"])
            >>> from bayesrule.lowering import Scratch
            >>> x = torch.ones(512)
            >>> descend.run({"x": x, "g": torch.ones(512)}, {"rate": 0.25}, Scratch())
            >>> x[:2]
            tensor([0.7500, 0.7500])
        """
        graph = fx.Graph()
        tracer = GraphAppendingTracer(graph)
        symbols = [Proxy(graph.placeholder(f"flat_{name}"), tracer) for name in flats]
        symbolic = [Proxy(graph.placeholder(f"number_{i}"), tracer) for i in range(len(numbers))]
        own = dict(zip(flats, symbols, strict=True))
        values = function(own, dict(zip(numbers, symbolic, strict=True)))
        changed = {name: value.node for name, value in values.items() if value.node is not own[name].node}
        graph.output(tuple(changed.values()))
        graph.eliminate_dead_code()
        return cls(graph, flats, numbers, list(changed))

    def run(self, flats: Named, numbers: Named, scratch: Scratch) -> None:
        """Run call by call, in place."""
        given, values = [flats[name] for name in self.flats], [numbers[name] for name in self.numbers]
        kinds = tuple(t.dtype for t in given)
        if kinds not in self._plans:
            self._plans[kinds] = planned(self._line(), given, values)
        plan = self._plans[kinds]
        plan.module.forward(*given, *values, *plan.tensors(scratch, self.graph, given, values))

    def run_compiled(self, flats: Named, numbers: Named) -> None:
        """Run as one compiled kernel, in place. The first run is held against the eager one.

        Raises:
            Exception: Whatever the compiler raises, or that its results are wrong; the flats are as they were before.
        """
        if self._compiled is None:
            self._compiled = self._checked(flats, numbers)
        else:
            self._compiled([flats[name] for name in self.flats], [numbers[name] for name in self.numbers])
        for name in self.targets:  # autograd is to know that they were written
            torch.autograd.graph.increment_version(flats[name])

    def _checked(self, flats: Named, numbers: Named) -> Compiled:
        """Compile and run, once the compiled program does to copies what the eager one does."""
        values = [numbers[name] for name in self.numbers]
        compiled = Compiled(self._line(), values)
        copies = [{**flats, **{name: flats[name].clone() for name in self.targets}} for _ in range(2)]
        self.run(copies[0], numbers, Scratch())
        compiled([copies[1][name] for name in self.flats], values)
        for name in self.targets:
            wanted, got = copies[0][name], copies[1][name]
            near = 100 * torch.finfo(wanted.dtype).eps
            size = wanted.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
            if not torch.allclose(got, wanted, rtol=near, atol=near * size, equal_nan=True):
                raise RuntimeError(f"the compiled {name} is not what the eager step makes")
        for name in self.targets:
            flats[name].copy_(copies[1][name])
        return compiled

    @property
    def is_compiled(self) -> bool:
        """Whether a compiled kernel has run and is trusted."""
        return self._compiled is not None

    def _line(self) -> Line:
        return Line(self.graph, self.flats, self.targets)


class Runner:
    """Runs programs eagerly, in scratch of its own, or compiled for as long as the compiler does not fail.

    Args:
        name: Who runs them, for a warning.
        compiled: Whether they are compiled.
    """

    def __init__(self, name: str, compiled: bool = False) -> None:
        self.name, self.compiled, self.failed = name, compiled, False
        self.scratch = Scratch()

    def run(self, program: Program, flats: Named, numbers: Named, once: bool = False) -> None:
        """Run a program in place; what runs only once is not worth compiling."""
        if not self.compiled or once:
            program.run(flats, numbers, self.scratch)
            return
        try:
            with uncast():
                program.run_compiled(flats, numbers)
        except Exception as error:
            if program.is_compiled and not type(error).__module__.startswith("torch._dynamo"):  # that is of compiling anew
                raise
            self.compiled, self.failed = False, True
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            warnings.warn(
                f"{self.name}: torch.compile failed ({reason[:200]}); going on eagerly, with the same result: install a C++ "
                "compiler (on a GPU, triton) or pass compile=False",
                UserWarning,
                stacklevel=2,
            )
            program.run(flats, numbers, self.scratch)
