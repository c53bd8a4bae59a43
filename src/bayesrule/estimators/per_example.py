r"""Quantities of single examples from one pass over a batch, without a gradient of the weights for each example.

For the loss :math:`\ell_i` of example i, or its outputs :math:`f_{ik}`:

.. math::  \sum_i (\nabla_\theta \ell_i)^2, \qquad \langle \nabla_\theta \ell_i, u \rangle, \qquad
           v_{ik} = \sum_j s_j (\partial f_{ik} / \partial \theta_j)^2.

Hooks note what goes into a layer and what comes back to its output; these two say all (see ``layers.py``). Linear, convolution,
embedding and normalization have closed forms, whatever the dimensions between examples and features; a parameter that is used
twice is added up before it is squared. For anything else the smallest module around it is differentiated example by example with
``torch.func.vmap``; one warning names it. The first dimension of what a model takes must be that of the examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, reduce
from .gradients import Gradients
from .tracing import Trace

CHUNK = 2**23
"""Bytes of temporaries: what a processor's cache may hold, and its allocator need not hand out anew."""
KEPT = 128
"""Times as many bytes may lie ready of what comes back to all layers, of as many outputs as that holds and of one at least."""


class Squares:
    r"""Sums over examples of their squared gradients, noted beside an ordinary backward.

    .. math::  \text{sums} \leftarrow \text{sums} + \sum_i (\nabla_\theta \ell_i)^2

    Costs about one more product of matrices a layer, and the sums: a float32 tensor (or the parameter's dtype if wider) for each
    parameter. The gradients in ``p.grad`` are those of a backward without it, bit by bit.

    Within one recording a backward belongs to the forwards before it, whose examples are the same ones, in the same order; then
    others may come.

    Args:
        model: The model. Parameters that require a gradient when a recording begins are the ones that count.
        chunk: Bytes that temporaries may take; a single example may take more.

    Attributes:
        sums: By parameter.
        examples: How many they are the sums of.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> squares = Squares(model)
        >>> with squares.recording():
        ...     model(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).mean().backward()
        >>> squares.sums[model.weight], squares.examples
        (tensor([[10.,  4.]]), 2)

    Source: for a linear layer, I. Goodfellow (2015), Efficient per-example gradient computations, arXiv:1510.01799.
    """

    def __init__(self, model: nn.Module, *, chunk: int | None = None) -> None:
        self.model, self.chunk = model, _checked(chunk)
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.examples = 0
        self._told: set[str] = set()
        self._trace: Trace | None = None

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.examples = {}, 0

    @contextmanager
    def recording(self, scale: float | None = None) -> Iterator[None]:
        """Note a forward and a backward. After an exception, nothing of them has been noted.

        Args:
            scale: What goes backward, times this, is the sum of the losses: 1 where it is, B for the mean of B losses (None: of
                as many as went in), B over the factor where a GradScaler multiplies that mean.

        Raises:
            RuntimeError: The examples cannot be told apart; the message says where.
        """
        recording = _Recording(self.chunk, scale)
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            with Trace(self.model, trainable, recording.forwarded) as trace:
                self._trace = trace
                yield
                recording.finish()
        finally:
            self._trace = None
            recording.remove()
        trace.formless -= self._told
        self._told |= trace.formless
        for p in trainable.values():
            new = recording.sums.get(p)
            if p in self.sums:
                self.sums[p] += 0 if new is None else new
            else:
                self.sums[p] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if new is None else new
        self.examples += recording.examples
        trace.warn()

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A hook in front of a module's forward opened a recording: that forward belongs to it.

        Args:
            module: The model, or a part of it.
            args: What it is called with.
            kwargs: The same, by name.
        """
        if self._trace is not None:
            self._trace.entered(module, args, kwargs)


class _Recording:
    """The sums of one recording, and the hooks in its graph."""

    def __init__(self, chunk: int, scale: float | None) -> None:
        self.chunk, self.scale = chunk, scale
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.examples = 0
        self._handles: list[Any] = []
        self._begin()

    def _begin(self) -> None:
        self._calls: list[Call] = []
        self._uses: Counter[nn.Parameter] = Counter()
        self._done: set[nn.Parameter] = set()
        self._came = False

    def forwarded(self, calls: list[Call]) -> None:
        """A forward has ended: be there when it goes backward."""
        if self._came and torch._C._current_graph_task_id() == -1:
            self.finish()
        for call in calls:
            if self._calls and call.examples != self._calls[0].examples:
                raise RuntimeError(
                    f"the model was called with {self._calls[0].examples} and with {call.examples} examples before one backward: "
                    "go backward in between"
                )
            call.scale = call.examples if self.scale is None else self.scale
            call.deltas = [[None] * len(call.edges)]
            for place, edge in enumerate(call.edges):
                self._handles.append(edge.node.register_prehook(self._hook(call, place, edge.output_nr)))
            call.edges = []  # from here on the graph holds the call, not the call the graph
            self._calls.append(call)
            self._uses.update(call.params.values())

    def _hook(self, call: Call, place: int, number: int) -> Callable[[Any], None]:
        def came_back(gradients: Any) -> None:
            if gradients[number] is None:
                return
            if call.deltas[0][place] is not None or not self._done.isdisjoint(call.params.values()):
                raise RuntimeError(
                    f"{type(call.module).__name__} came back twice: go backward once for a forward, and checkpoint with "
                    "use_reentrant=False"
                )
            self._came = True
            call.deltas[0][place] = gradients[number].detach()
            if call.layer is not None and all(self._uses[p] == 1 for p in call.params.values()):
                self._add([call])
                self._done.update(call.params.values())

        return came_back

    def _add(self, calls: list[Call]) -> None:
        def visit(_: list[Call], rows: slice, found: dict[nn.Parameter, Gradients]) -> None:
            for p, gradients in found.items():
                total = gradients.square().total().clamp_(min=0)
                self.sums[p] = total if p not in self.sums else self.sums[p].add_(total)

        reduce(calls, self.chunk, visit)
        for call in calls:
            call.deltas, call.inputs, call.versions = [[None] * len(call.deltas[0])], [], []

    def finish(self) -> None:
        """Take in what waits for others of the same parameter; what comes next are other examples."""
        self._add([call for call in self._calls if call.came_back])
        if self._came:
            self.examples += self._calls[0].examples
        self._begin()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def inner_products(
    model: nn.Module, losses: Callable[[], Tensor], direction: Mapping[str, Tensor], *, chunk: int | None = None
) -> Tensor:
    r"""The product of each example's gradient with one direction, :math:`\langle \nabla_\theta \ell_i, u \rangle`.

    How fast each loss changes when the parameters move along u. Costs one forward, one backward, and a product of matrices a layer.

    Args:
        model: The model.
        losses: Calls the model, once or more, and returns the losses of the examples, shape (B,), or (B, K) for K numbers each.
        direction: u by name of the parameter, each of its shape. Parameters that are not named do not move.
        chunk: Bytes that temporaries may take; a single example may take more.

    Returns:
        Shape (B,), or (B, K).

    Raises:
        ValueError: A name, shape or frozen parameter does not suit, or ``losses`` returns another shape.
        RuntimeError: The examples cannot be told apart; the message says where.

    Example:
        >>> model, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> inner_products(model, lambda: model(x).squeeze(1), {"weight": torch.tensor([[1.0, 10.0]])})
        tensor([21.,  3.])
    """
    return _each(model, losses, direction, lambda gradients, u: gradients.dot(u), "direction", chunk)


def variances(
    model: nn.Module, outputs: Callable[[], Tensor], variance: Mapping[str, Tensor], *, chunk: int | None = None
) -> Tensor:
    r"""The variance of each output of each example, linearized, under a diagonal variance of the parameters.

    .. math::  v_{ik} = \sum_j s_j (\partial f_{ik} / \partial \theta_j)^2

    Costs one forward, K backwards for K outputs, and memory for what comes back to all layers: 128 chunks, or that of one output if
    more. For a single number of each example let ``outputs`` return that, shape (B,).

    Args:
        model: The model, with norms in eval mode.
        outputs: Calls the model, once or more, and returns its outputs, shape (B, K) or (B,).
        variance: s >= 0 by name of the parameter, each of its shape. Parameters that are not named are certain.
        chunk: Bytes that temporaries may take; a single example may take more.

    Returns:
        Shape (B, K), or (B,).

    Raises:
        ValueError: A name, shape or frozen parameter does not suit, or ``outputs`` returns another shape.
        RuntimeError: The examples cannot be told apart; the message says where.

    Example:
        >>> model, x = nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> variances(model, lambda: model(x), {"weight": torch.full((3, 2), 0.1)})
        tensor([[0.5000, 0.5000, 0.5000],
                [0.9000, 0.9000, 0.9000]])
    """
    return _each(model, outputs, variance, lambda gradients, s: gradients.square().dot(s), "variance", chunk).clamp_(min=0)


def _each(
    model: nn.Module,
    values: Callable[[], Tensor],
    weights: Mapping[str, Tensor],
    product: Callable[[Gradients, Tensor], Tensor],
    what: str,
    chunk: int | None,
) -> Tensor:
    """Products of gradients, or of their squares, with one tensor for each parameter."""
    budget, wanted = _checked(chunk), _named(model, weights, what)
    calls: list[Call] = []
    with torch.enable_grad(), Trace(model, wanted, calls.extend) as trace:
        found = values()
    if not isinstance(found, Tensor) or found.dim() not in (1, 2):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"there must be one number an example, shape (B,), or K, shape (B, K); got {got}")
    for call in calls:
        if call.examples != len(found):
            raise ValueError(f"the model was called with {call.examples} examples, and the numbers of {len(found)} came back")
    trace.warn()
    table = found if found.dim() == 2 else found[:, None]
    result = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32), requires_grad=False)
    if not (any(call.edges for call in calls) and table.requires_grad and table.numel()):
        return result.view(found.shape)
    of = {p: weights[name].to(p.device, torch.promote_types(p.dtype, torch.float32)) for name, p in wanted.items()}

    def visit(p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        result[rows, columns] += product(gradients, of[p])

    def one(k: int) -> Tensor:
        column = torch.zeros_like(table)
        column[:, k] = 1
        return column

    sweep(calls, table, one, table.shape[1], visit, budget)
    return result.view(found.shape)


def sweep(
    calls: list[Call],
    outputs: Tensor,
    column: Callable[[int], Tensor],
    count: int,
    visit: Callable[[nn.Parameter, Gradients, slice, slice], None],
    budget: int,
) -> None:
    """Go backward from outputs once for each of some columns, and show the gradients of every parameter.

    Args:
        calls: Of one forward.
        outputs: What it gave, shape (n, ...).
        column: From a number to what goes backward, shaped like the outputs.
        count: How many columns there are.
        visit: Called with the parameter, gradients, and which examples and columns they are of.
        budget: Bytes of temporaries; what comes back to all layers lies ready up to 128 times as many.
    """
    edges = [edge for call in calls for edge in call.edges]
    uses = Counter(p for call in calls for p in call.params.values())
    light = [
        call for call in calls if call.is_light and all(uses[p] == 1 for p in call.params.values())
    ]  # nothing gained by waiting
    heavy = [call for call in calls if call not in light]
    together = max(1, KEPT * budget // max(1, sum(sum(c.sizes) for c in heavy) * len(outputs) * outputs.element_size()))

    def show(calls: list[Call], at: slice) -> None:
        def each(_: list[Call], rows: slice, found: dict[nn.Parameter, Gradients]) -> None:
            for p, gradients in found.items():
                visit(p, gradients, rows, at)

        reduce(calls, budget, each)
        for call in calls:
            call.deltas = []

    for first in range(0, count, together):
        last = min(first + together, count)
        for k in range(first, last):
            back = iter(torch.autograd.grad(outputs, edges, column(k), retain_graph=k + 1 < count, allow_unused=True))
            for call in calls:
                call.deltas.append([next(back) for _ in call.edges])
            del back
            show(light, slice(k, k + 1))
        show(heavy, slice(first, last))


def _named(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> dict[str, nn.Parameter]:
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        if name not in params:
            raise ValueError(f"the {what} names {name!r}, which the model does not have: take names of model.named_parameters()")
        if value.shape != params[name].shape:
            raise ValueError(
                f"the {what} of {name!r} has shape {tuple(value.shape)}, and the parameter {tuple(params[name].shape)}"
            )
        if not params[name].requires_grad:
            raise ValueError(f"the {what} names {name!r}, which is frozen: call requires_grad_() on it, or leave it out")
    return {name: params[name] for name in weights}


def _checked(chunk: int | None) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 byte, got {chunk}")
    return CHUNK if chunk is None else chunk
