r"""What an adaptation minimizes: losses of outputs, and a pull of the weights. Methods are choices of both.

Of past examples a model of weights m knows three things: their posterior :math:`N(m, S^{-1})`, the prior in it, and, of those in
memory, what it says of them, :math:`f_i^*`. With :math:`e_i^*` the error there,

.. math::  \ell_i(f) - e_i^* \cdot f = D_{\ell_i}(f, f_i^*) + \text{const},

is the loss with what the model says as its label (for classes the divergence from its probabilities): an example in memory. An
example that is taken away has :math:`-e_i^* \cdot f`, and what S holds of it is taken out of S. So there are one sum and one pull:

.. math::  \sum_i w_i \ell_i(f_i) - a_i \cdot f_i \;+\; \tfrac12 (\theta - c)^T Q (\theta - c).

======================  ==================================  =========================  ===================================
method                  Q                                   c                          examples in memory
======================  ==================================  =========================  ===================================
posterior_correction    S less what it holds of the memory  m                          what the model says
kprior                  the prior's                         m                          what the model says
prior                   S                                   m                          none: EWC, online Laplace, VCL
replay                  the prior's                         the prior's                their labels
functional              0                                                              joint Gaussian of outputs: FROMP's
======================  ==================================  =========================  ===================================

With the memory in full the first two are the loss of all data where the model is linear in its weights; with none the first is the
third. Source: M. E. Khan and S. Swaroop (2021), Knowledge-adaptation priors, arXiv:2106.08769; M. E. Khan (2025), Knowledge
adaptation as posterior correction, arXiv:2506.14262, for the principle; P. Pan et al. (2020), Continual deep learning by functional
regularisation of memorable past, arXiv:2004.14070.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...estimators.batches import joined, on_device, outputs_of, rows_of
from ...estimators.data_curvature import Sum, accumulate
from ...estimators.gradients import Gradients
from ...estimators.output_losses import IGNORED, OutputLoss, SquaredError
from ...estimators.pushing import Push
from .anchors import Anchor
from .memory import BATCH, Memory

LIMIT = 2**30
"""Bytes that the Jacobians of a memory may take."""


class Term(ABC):
    """A sum over examples that depends on their outputs.

    Attributes:
        inputs: Of the examples.
    """

    inputs: Any

    @abstractmethod
    def value(self, outputs: Tensor) -> Tensor:
        """In nats, up to a constant, shape ()."""

    @abstractmethod
    def bend(self, outputs: Tensor, v: Tensor) -> Tensor:
        """Its second derivative times v, shaped like the outputs."""


@dataclass(frozen=True)
class Losses(Term):
    r"""The sum of :math:`w_i \ell_i(f_i) - a_i \cdot f_i`.

    Args:
        loss: Of an example.
        inputs: Of n examples, on the CPU.
        labels: As the loss takes them.
        weights: w, shape (n,).
        pulls: a, shaped like the outputs; None is zero.
    """

    loss: OutputLoss
    inputs: Any
    labels: Tensor
    weights: Tensor
    pulls: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def rows(self, chosen: Tensor) -> Losses:
        """Some of the examples."""
        pulls = None if self.pulls is None else self.pulls[chosen]
        return Losses(self.loss, rows_of(self.inputs, chosen, len(self)), self.labels[chosen], self.weights[chosen], pulls)

    def value(self, outputs: Tensor) -> Tensor:
        f = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        found = (self.weights.to(f) * self.loss.values(f, self._labels(f))).sum()
        return found if self.pulls is None else found - (self.pulls.to(f) * f).sum()

    def bend(self, outputs: Tensor, v: Tensor) -> Tensor:
        slopes = self.loss.slopes(outputs, self._labels(outputs))
        return self.weights.to(v).view(-1, *[1] * (v.dim() - 1)) * slopes.half(slopes.across(v))

    def _labels(self, outputs: Tensor) -> Tensor:
        return self.labels.to(outputs) if self.labels.is_floating_point() else self.labels.to(outputs.device)

    @staticmethod
    def joined(several: Sequence[Losses]) -> Losses:
        """All of them as one."""
        if len(several) == 1:
            return several[0]
        pulls = None
        if any(one.pulls is not None for one in several):
            shape = next(one.pulls.shape[1:] for one in several if one.pulls is not None)
            pulls = joined([torch.zeros(len(one), *shape) if one.pulls is None else one.pulls for one in several], 0)
        labels, weights = joined([one.labels for one in several], IGNORED), torch.cat([one.weights for one in several])
        return Losses(several[0].loss, joined([one.inputs for one in several]), labels, weights, pulls)


@dataclass(frozen=True)
class Functions(Term):
    r"""The outputs of a memory as a Gaussian process: :math:`\tfrac12 \sum_k (f_k - f_k^*)^T K_k^{-1} (f_k - f_k^*)`.

    :math:`K_k = J_k S^{-1} J_k^T` is the covariance of output k of all M examples together, shape (M, M). Outputs are independent.

    Args:
        inputs: Of M examples, on the CPU.
        outputs: f*, shape (M, K), K of them finite.
        roots: Cholesky factors of K_k, shape (K, M, M).
    """

    inputs: Any
    outputs: Tensor
    roots: Tensor

    def value(self, outputs: Tensor) -> Tensor:
        gap = self._gap(outputs)
        return (gap * self._solve(gap)).sum() / 2

    def bend(self, outputs: Tensor, v: Tensor) -> Tensor:
        found = torch.zeros_like(v).flatten(1)
        found[:, : self.outputs.shape[1]] = self._solve(v.flatten(1)[:, : self.outputs.shape[1]])
        return found.view_as(v)

    def _gap(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(1)[:, : self.outputs.shape[1]].to(self.roots) - self.outputs.to(self.roots)

    def _solve(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v.to(self.roots).mT[..., None], self.roots)[..., 0].mT

    @classmethod
    def of(cls, memory: Memory, model: nn.Module, anchor: Anchor, jitter: float = 1e-5) -> Functions:
        """At a model's weights, by Jacobians of the whole memory."""
        flat = memory.outputs.flatten(1)
        flat = flat[:, flat.isfinite().all(0)]
        needed = len(memory) * flat.shape[1] * len(anchor.center) * anchor.center.element_size()
        if needed > LIMIT:
            raise RuntimeError(
                f"method='functional' needs {needed / 2**30:.1f} GiB for the Jacobians of {len(memory)} examples; take a smaller "
                "memory, or another method"
            )
        params = dict(model.named_parameters())
        kept = Jacobians({name: params[name] for name in anchor.names})
        batches = ((x, outputs_of(model, x).detach()) for x, _, _ in memory.batches(model))
        accumulate(model, batches, SquaredError(), kept)
        each = torch.cat(kept.found).transpose(0, 1)[: flat.shape[1]]  # (K, M, P)
        wide = [rows.double() @ anchor.times_covariance(rows).double().mT for rows in each]
        matrix = torch.stack(wide)
        matrix.diagonal(dim1=1, dim2=2).add_(jitter * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
        return cls(memory.inputs, flat, torch.linalg.cholesky((matrix + matrix.mT) / 2).to(anchor.center))


class Jacobians(Sum):
    """The derivatives of every output of every example, by columns that are unit vectors.

    Attributes:
        found: Of some examples after others, shape (n, K, P).
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__(params)
        self.found: list[Tensor] = []
        sizes = [p.numel() for p in params.values()]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._places = {p: slice(end - p.numel(), end) for p, end in zip(params.values(), ends, strict=True)}
        self._size = ends[-1]

    def bytes_each(self, columns: int) -> int:
        return columns * self._size * 4

    def begin(self, examples: int, columns: int) -> None:
        super().begin(examples, columns)
        like = next(iter(self.params.values()))
        wide = torch.promote_types(like.dtype, torch.float32)
        self.found.append(torch.zeros(examples, columns, self._size, dtype=wide, device=like.device))

    def visit(self, p: nn.Parameter, gradients: Gradients, rows: slice, columns: slice) -> None:
        self.found[-1][rows, columns, self._places[p]] = gradients.dense().each.flatten(2)

    def finish(self) -> None:
        """There they are."""


# Methods


class Knowledge(NamedTuple):
    """What is known of past data that stay."""

    all: Anchor
    """All of them: the posterior."""
    beside: Anchor
    """All but those in memory."""


class Method(NamedTuple):
    """See the table on top."""

    pull: Callable[[Knowledge], Anchor]
    memory: Literal["outputs", "labels", "functions"] | None


METHODS = {
    "posterior_correction": Method(lambda known: known.beside, "outputs"),
    "kprior": Method(lambda known: known.all.prior(known.all.center), "outputs"),
    "prior": Method(lambda known: known.all, None),
    "replay": Method(lambda known: known.all.prior(known.all.prior_mean), "labels"),
    "functional": Method(lambda known: known.all.free(), "functions"),
}


@dataclass(frozen=True)
class Objective:
    """All of it, as a function of the weights that stand in a model.

    Args:
        model: In eval mode.
        anchor: The pull of its weights.
        losses: Of examples, taken batch by batch; None where there are none.
        whole: Terms that are taken whole in every step.
        examples: How many the adapted posterior is of: the objective over this number is a mean loss.
    """

    model: nn.Module
    anchor: Anchor
    losses: Losses | None
    whole: Sequence[Term]
    examples: float

    @property
    def params(self) -> list[nn.Parameter]:
        """Those that move."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.anchor.names]

    @property
    def theta(self) -> Tensor:
        """The weights in a row, shape (P,)."""
        return self.anchor.row(dict(self.model.named_parameters()))

    @torch.no_grad()
    def put(self, theta: Tensor) -> None:
        """Write weights into the model."""
        for p, value in zip(self.params, self.anchor.named(theta).values(), strict=True):
            p.copy_(value)

    def terms(self, size: int = BATCH) -> Iterator[Term]:
        """All of them, batch by batch."""
        if self.losses is not None:
            yield from map(self.losses.rows, torch.arange(len(self.losses)).split(size))
        yield from self.whole

    def outputs(self, term: Term) -> Tensor:
        """Of a term's examples."""
        return outputs_of(self.model, on_device(self.model, term.inputs))

    @torch.no_grad()
    def value(self) -> float:
        """In nats, up to a constant."""
        return float(self.anchor.value(self.theta)) + sum(float(term.value(self.outputs(term))) for term in self.terms())

    def gradient(self) -> Tensor:
        """Shape (P,)."""
        total = self.anchor.pull(self.theta)
        for term in self.terms():
            total += self._back(term.value(self.outputs(term)))
        return total

    def product(self, v: Tensor, push: Push) -> Tensor:
        """The Gauss-Newton matrix times v, shape (P,): a forward derivative and a backward."""
        total = self.anchor.stretch(v)
        for term in self.terms():
            moved = push.along(self.anchor.named(v), lambda term=term: self.outputs(term))  # type: ignore[misc]
            f = self.outputs(term)
            total += self._back(f, term.bend(f.detach(), moved))
        return total

    def _back(self, outputs: Tensor, v: Tensor | None = None) -> Tensor:
        found = torch.autograd.grad(outputs, self.params, v, allow_unused=True)
        each = (torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True))
        return self.anchor.row(dict(zip(self.anchor.names, each, strict=True)))

    def backward(self, rows: Tensor, pulled: bool = True) -> float:
        """The gradient of the mean loss, as a batch of the examples has it, in ``grad``; and that loss.

        Args:
            rows: Numbers of the examples.
            pulled: Whether the pull of the weights is in it.
        """
        terms: list[tuple[Term, float]] = [(term, 1.0) for term in self.whole]
        if self.losses is not None:
            terms.append((self.losses.rows(rows), len(self.losses) / len(rows)))
        value = 0.0
        for term, factor in terms:
            loss = term.value(self.outputs(term)) * (factor / self.examples)
            loss.backward()
            value += float(loss.detach())
        if pulled:
            with torch.no_grad():
                pull = self.anchor.named(self.anchor.pull(self.theta) / self.examples)
                for p, g in zip(self.params, pull.values(), strict=True):
                    p.grad = g.to(p.dtype) if p.grad is None else p.grad.add_(g)
        return value
