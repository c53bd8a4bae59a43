r"""Curvature of the sum of the losses over data, at a model's weights: :math:`\sum_i J_i^T L_i J_i`, and what a structure keeps.

One backward for each column of a root of L (K for K outputs), by the layer hooks of ``per_example.py``: no Jacobian is formed but
for :class:`Matrix`. Data stream through; what stays is the sum.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batches import outputs_of, pairs, rows_of
from .calls import Call
from .gradients import Gradients, Outer
from .layers import layer_of
from .output_losses import OutputLoss
from .per_example import CHUNK, sweep
from .tracing import Trace

Kind = Literal["ggn", "fisher", "empirical"]
KINDS = ("ggn", "fisher", "empirical")
READY = 2**27
"""Bytes that columns, or Jacobians, of some examples may take."""
MOST = 2**31
"""Bytes above which those of one example are refused."""
LONGEST = 10000
"""Elements of an axis that has a matrix of its own; longer ones keep the diagonal."""


class Sum(ABC):
    """What is kept of the curvature of some parameters, added up over examples.

    Args:
        params: The parameters, by name.

    Attributes:
        examples: How many there were.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.params = params
        self.names = {p: name for name, p in params.items()}
        self.examples = 0

    def bytes_each(self, columns: int) -> int:
        """That an example takes, beside its outputs."""
        return 0

    def begin(self, examples: int, columns: int) -> None:
        """Some examples come, with so many columns each."""
        self.examples += examples

    @abstractmethod
    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        """The products of columns with the Jacobian of a parameter, for some of the examples."""

    @abstractmethod
    def finish(self) -> None:
        """All of them have come."""


class Diagonals(Sum):
    """The diagonal, exactly.

    Attributes:
        sums: By name, of the parameter's shape.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__(params)
        self.sums = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in params.items()}

    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        self.sums[self.names[p]] += gradients.square().total()

    def finish(self) -> None:
        """Sums they are."""


class Factors(Sum):
    r"""Kronecker factors of the weights of linear and convolutional layers, exact blocks of their biases, diagonals of all else.

    For a weight of shape (O, I), what goes in a_it and what comes back b_itc, over examples i, positions t and columns c:

    .. math::  \sum_i J_i^T L_i J_i \approx B \otimes A, \qquad B = \sum_{itc} b_{itc} b_{itc}^T, \qquad
               A = \tfrac{1}{NT} \sum_{it} a_{it} a_{it}^T,

    the setting "expand" where there are several positions. Exact where all examples have the same a, or the same b.

    Attributes:
        rows: B by name of a weight, shape (O, O); by name of a bias its exact block. Of a long axis the diagonal, shape (O,).
        inner: A by name of a weight, shape (I, I) or (I,).
        sums: Diagonals of all others, by name.

    Source: J. Martens and R. Grosse (2015), arXiv:1503.05671; R. Eschenhagen et al. (2023), arXiv:2311.00636, for "expand".
    """

    def __init__(self, params: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        super().__init__(params)
        outer = [m for m in model.modules() if (kind := layer_of(m)) is not None and kind.is_outer]
        self._biases = {module.bias for module in outer if isinstance(module.bias, nn.Parameter)}
        self.rows: dict[str, Tensor] = {}
        self.inner: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        name = self.names[p]
        if isinstance(gradients, Outer):
            _add(self.rows, name, gradients.left)
            if columns.start == 0:
                _add(self.inner, name, gradients.right)
                self._seen[name] = self._seen.get(name, 0) + gradients.right.shape[:2].numel()
        elif p in self._biases:
            _add(self.rows, name, gradients.dense().each)
        else:
            self.sums[name] = self.sums.get(name, 0) + gradients.square().total()

    def finish(self) -> None:
        """Make A the mean that it is, and zero what no example reached.

        Raises:
            RuntimeError: A weight was used as a matrix by some batches, and otherwise by others.
        """
        for name, p in self.params.items():
            if name in self.sums and name in self.rows:
                raise RuntimeError(f"{name!r} is used in other ways from batch to batch; take structure='diag'")
            if name in self.inner:
                self.inner[name] = self.inner[name] / max(self._seen[name], 1)
            elif name not in self.rows and name not in self.sums:
                self.sums[name] = torch.zeros_like(p, dtype=wide(p))


class Matrix(Sum):
    """All of it, shape (P, P), parameters in a row one behind the other.

    Attributes:
        sum: The matrix.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__(params)
        ends = list(itertools.accumulate(p.numel() for p in params.values()))
        self.places: dict[Tensor, slice] = {p: slice(end - p.numel(), end) for p, end in zip(params.values(), ends, strict=True)}
        one = next(iter(params.values()))
        self.sum = torch.zeros(ends[-1], ends[-1], dtype=wide(one), device=one.device)
        self._jacobians = self._none = self.sum.new_zeros(0, 1, ends[-1])
        self._shape = (0, 0)

    def bytes_each(self, columns: int) -> int:
        return columns * len(self.sum) * self.sum.element_size()

    def begin(self, examples: int, columns: int) -> None:
        super().begin(examples, columns)
        self.finish()
        self._shape = (examples, columns)

    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        if not len(self._jacobians):
            self._jacobians = self.sum.new_zeros(*self._shape, len(self.sum))
        self._jacobians[rows, columns, self.places[p]] = gradients.dense().each.flatten(2)

    def finish(self) -> None:
        flat = self._jacobians.flatten(0, 1)
        self.sum.addmm_(flat.mT, flat)
        self._jacobians = self._none


class Head(Matrix):
    r"""The same for one linear layer that sees one vector an example, in closed form, without Jacobians.

    .. math::  \sum_i J_i^T L_i J_i = \sum_i L_i \otimes \varphi_i \varphi_i^T, \qquad \varphi = (a, 1),

    L_i of the layer's outputs, shape (O, O): O times fewer operations.

    Args:
        weight: Of the layer.
        bias: Of the layer, if it has one and that is asked for.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(params)
        self._weight, self._bias = weight, bias
        self._left = self._right = self.sum.new_zeros(0)
        self._is_closed = False

    def begin(self, examples: int, columns: int) -> None:
        super().begin(examples, columns)
        self._is_closed = False

    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        if p is self._weight and isinstance(gradients, Outer) and gradients.right.shape[1] == 1:
            if not self._is_closed:
                (n, count), (rows_, width) = self._shape, p.shape
                self._left, self._right = (
                    self.sum.new_zeros(n, count, rows_),
                    self.sum.new_ones(n, width + (self._bias is not None)),
                )
                self._is_closed = True
            self._left[rows, columns] = gradients.left[:, :, 0]
            self._right[rows, : p.shape[1]] = gradients.right[:, 0]
        elif not self._is_closed:
            super().visit(p, gradients, rows, columns)

    def finish(self) -> None:
        if not self._is_closed:
            super().finish()
            return
        bends = self._left.mT @ self._left  # (n, O, O)
        at = [self._row(o) for o in range(len(self._weight))]
        for one in range(len(at)):
            for other in range(one + 1):
                block = (self._right * bends[:, one, other, None]).mT @ self._right
                for a, b in {(one, other), (other, one)}:
                    for mine, rows in at[a]:
                        for theirs, columns in at[b]:
                            self.sum[rows, columns] += block[mine, theirs]
        self._is_closed = False

    def _row(self, o: int) -> list[tuple[slice, slice]]:
        """Of output o: places of its weights and its bias in phi, and in a row of all parameters."""
        width, first = self._weight.shape[1], self.places[self._weight].start
        found = [(slice(width), slice(first + o * width, first + (o + 1) * width))]
        if self._bias is not None:
            last = self.places[self._bias].start + o
            found.append((slice(width, width + 1), slice(last, last + 1)))
        return found


def wide(p: Tensor) -> torch.dtype:
    """float32, or the parameter's dtype if wider."""
    return torch.promote_types(p.dtype, torch.float32)


def _add(sums: dict[str, Tensor], name: str, vectors: Tensor) -> None:
    """Outer products of vectors with themselves, shape (..., D); their squares where D is long."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    new = flat.square().sum(0) if flat.shape[1] > LONGEST else flat.mT @ flat
    sums[name] = sums[name] + new if name in sums else new


def accumulate(
    model: nn.Module, batches: Iterable[Any], loss: OutputLoss, into: Sum, curvature: Kind = "ggn", seed: int = 0
) -> None:
    """Add up the curvature of all examples.

    Args:
        model: The model, with dropout and batch norm in eval mode.
        batches: Pairs (inputs, targets), or mappings with ``labels``; read once.
        loss: Of its outputs.
        into: What is kept.
        curvature: "ggn": exact, one backward an output; "fisher": with targets drawn from the model, one backward, unbiased;
            "empirical": with the targets themselves, one backward.
        seed: Of the targets that are drawn.

    Raises:
        TypeError: A batch is no pair and no mapping with labels.
        ValueError: There are none, or targets do not suit the loss.
        RuntimeError: Outputs are not finite, too large for so many columns, or examples cannot be told apart.
    """
    generator = torch.Generator().manual_seed(seed)
    step, formless = 0, set[str]()
    for inputs, targets in pairs(batches, model):
        first, examples = 0, len(targets)
        while first < examples:
            rows = slice(first, min(first + step, examples) if step else examples)
            calls, outputs, trace = _forward(model, rows_of(inputs, rows, examples), rows.stop - first, into)
            formless |= trace.formless
            columns = outputs[0].numel() if curvature == "ggn" else 1
            fits = _fitting(outputs, columns, into)
            if fits < len(outputs):
                step = fits
                continue
            _backward(calls, outputs, targets[rows], loss, into, curvature, generator)
            first += len(outputs)
    if not into.examples:
        raise ValueError("there is nothing to learn from: the loader gave no example")
    trace.formless = formless
    trace.warn(stacklevel=5)
    into.finish()


def _forward(model: nn.Module, inputs: Any, examples: int, into: Sum) -> tuple[list[Call], Tensor, Trace]:
    calls: list[Call] = []
    with torch.enable_grad(), Trace(model, into.params, calls.extend) as trace:
        outputs = outputs_of(model, inputs)
    if not outputs.dim() or len(outputs) != examples:
        raise ValueError(f"the model must give a row for each of {examples} inputs, got outputs of shape {tuple(outputs.shape)}")
    if bad := int((~outputs.isfinite()).reshape(len(outputs), -1).any(1).sum()):
        raise RuntimeError(f"the model gave outputs that are not finite in {bad} of {len(outputs)} rows")
    return calls, outputs, trace


def _fitting(outputs: Tensor, columns: int, into: Sum) -> int:
    """How many examples go at once."""
    each = max(1, columns * outputs[0].numel() * outputs.element_size() + into.bytes_each(columns))
    if each > MOST:
        raise RuntimeError(
            f"{columns} columns of curvature take {each / 1e9:.3g} GB an example; take curvature='fisher', which has one, or a "
            "structure that keeps less"
        )
    return max(1, READY // each)


def _backward(
    calls: list[Call], outputs: Tensor, targets: Tensor, loss: OutputLoss, into: Sum, curvature: Kind, generator: torch.Generator
) -> None:
    f = outputs.detach().to(wide(outputs))
    targets = loss.check(f, targets)
    if curvature == "ggn":
        columns = loss.root(f, targets)
    else:
        columns = (loss.residual(f, targets) if curvature == "empirical" else loss.drawn(f, generator))[None]
    if not outputs.requires_grad:
        raise ValueError("no parameter that requires a gradient has a part in the outputs")
    into.begin(len(outputs), len(columns))
    sweep(calls, outputs, lambda k: columns[k].to(outputs.dtype), len(columns), into.visit, CHUNK)
