r"""Losses of a model's outputs: their values, how they slope and bend, and how their gradients vary.

For outputs :math:`f_i`, shape (n, ..., K), and targets :math:`y_i`:

.. math::  \ell_i(f_i), \qquad e_i = \partial \ell_i / \partial f_i, \qquad L_i = \partial^2 \ell_i / \partial f_i^2 = R_i R_i^T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Callables = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100
"""The label of positions that do not count."""


def shaped_like(outputs: Tensor, targets: Tensor) -> Tensor:
    """One target for each output, in their shape; axes of length 1 may be left out of either.

    Raises:
        ValueError: They do not fit.
    """
    if [n for n in targets.shape if n > 1] != [n for n in outputs.shape if n > 1] or targets.numel() != outputs.numel():
        raise ValueError(f"targets have shape {tuple(targets.shape)} and the outputs {tuple(outputs.shape)}; they must agree")
    return targets.reshape(outputs.shape)


class Slopes(NamedTuple):
    """The derivatives of losses at outputs of n examples."""

    error: Tensor
    """e, shaped like the outputs."""
    half: Callable[[Tensor], Tensor]
    """R times vectors of each example; what it takes is shaped like what ``across`` gives."""
    across: Callable[[Tensor], Tensor]
    """The transpose of R times vectors shaped like the outputs."""


class OutputLoss(ABC):
    r"""The losses :math:`\ell_i(f_i)` of n examples as functions of their outputs, shape (n, ..., K).

    ``columns`` are vectors of outputs, shape (C, n, ..., K): the sum of their outer products over C is a curvature of each example.
    """

    @abstractmethod
    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses, shape (n,), in nats."""

    def slopes(self, outputs: Tensor, targets: Tensor) -> Slopes:
        """Their derivatives, with products instead of columns."""
        columns = self.root(outputs, targets)

        def half(v: Tensor) -> Tensor:
            return torch.einsum("nc,cn...->n...", v, columns)

        def across(v: Tensor) -> Tensor:
            return torch.einsum("cni,ni->nc", columns.flatten(2), v.flatten(1))

        return Slopes(self.residual(outputs, targets), half, across)

    def change(self, outputs: Tensor, moved: Tensor) -> Tensor:
        """How what is predicted changes, to first order, where outputs do: probabilities, or the outputs themselves."""
        return moved

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Whether each example is named right, shape (n,); None where nothing is named."""
        return None

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets on the device of the outputs, where they are of the right kind, else a ValueError."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradients of the losses in the outputs, shape (n, ..., K)."""

    @abstractmethod
    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Columns whose outer products make up the second derivatives of the losses."""

    @abstractmethod
    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """The gradients that the losses would have for targets that the model itself draws, shape (n, ..., K)."""


@dataclass(frozen=True)
class CrossEntropy(OutputLoss):
    r"""Minus the log probability of a class, :math:`-\log \operatorname{softmax}(f)_y`, summed over positions.

    .. math::  L = \operatorname{diag}(p) - p p^T = \sum_c r_c r_c^T, \qquad r_c = \sqrt{p_c}\, (p - e_c).

    Args:
        ignored: The label of positions that do not count, in sequences.
    """

    ignored: int = IGNORED

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() < 2 or outputs.shape[-1] < 2:
            raise ValueError(
                f"cross_entropy takes outputs of shape (n, ..., classes >= 2), got {tuple(outputs.shape)}; numbers have loss='mse'"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(
                f"cross_entropy takes whole numbers of classes as labels, got {targets.dtype}; numbers have loss='mse'"
            )
        if targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"labels have shape {tuple(targets.shape)}, and outputs of shape {tuple(outputs.shape)} want "
                f"{tuple(outputs.shape[:-1])}"
            )
        targets = targets.to(outputs.device).long()
        counted = targets[targets != self.ignored] if outputs.dim() > 2 else targets
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[-1]:
            raise ValueError(
                f"labels go from {int(counted.min())} to {int(counted.max())}, and there are {outputs.shape[-1]} classes"
            )
        sums = outputs.detach().sum(-1)
        if outputs.numel() and bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
            raise ValueError("outputs sum to 1 in every row; let the model give logits, not probabilities")
        return targets

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        flat = outputs.flatten(0, -2)
        return F.cross_entropy(flat, targets.flatten(), ignore_index=self.ignored, reduction="none").view(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probs = outputs.softmax(-1)
        return (probs - F.one_hot(targets.clamp_min(0), outputs.shape[-1]).to(probs)) * self._counts(outputs, targets)

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probs = outputs.softmax(-1)
        eye = torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        each = probs.sqrt()[..., :, None] * (probs[..., None, :] - eye)  # (n, ..., c, K)
        return _one_position_each(each * self._counts(outputs, targets)[..., None])

    def slopes(self, outputs: Tensor, targets: Tensor) -> Slopes:
        roots = outputs.softmax(-1).sqrt() * self._counts(outputs, targets)  # of length 1, so that R = diag(r) (1 - r r^T)

        def half(v: Tensor) -> Tensor:
            return roots * (v - roots * (roots * v).sum(-1, keepdim=True))

        def across(v: Tensor) -> Tensor:
            v = roots * v
            return v - roots * (roots * v).sum(-1, keepdim=True)

        return Slopes(self.residual(outputs, targets), half, across)

    def _counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where a position counts, shape (n, ..., 1)."""
        return (targets != self.ignored)[..., None].to(outputs.dtype)

    def change(self, outputs: Tensor, moved: Tensor) -> Tensor:
        probs = outputs.softmax(-1)
        return probs * (moved - (probs * moved).sum(-1, keepdim=True))

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return ((outputs.argmax(-1) == targets) | (targets == self.ignored)).view(len(outputs), -1).all(1)

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probs = outputs.softmax(-1)
        labels = torch.multinomial(probs.flatten(0, -2).cpu(), 1, True, generator=generator)[:, 0]
        return self.residual(outputs, labels.view(outputs.shape[:-1]).to(outputs.device))


@dataclass(frozen=True)
class BinaryCrossEntropy(OutputLoss):
    r"""Minus the log probability of labels 0 and 1, one for each output.

    .. math::  p = \sigma(f), \qquad e = p - y, \qquad L = \operatorname{diag}(p (1 - p)).
    """

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = shaped_like(outputs, targets)
        if bad := int(((targets < 0) | (targets > 1)).sum()):
            raise ValueError(f"bce takes labels 0 and 1, or between them; {bad} of {targets.numel()} are not")
        return targets.to(outputs)

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").view(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _each_alone((outputs.sigmoid() * (-outputs).sigmoid()).sqrt())

    def slopes(self, outputs: Tensor, targets: Tensor) -> Slopes:
        roots = (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()
        return Slopes(self.residual(outputs, targets), lambda v: roots * v, lambda v: roots * v)

    def change(self, outputs: Tensor, moved: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid() * moved

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return ((outputs > 0) == (targets > 0.5)).view(len(outputs), -1).all(1)

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
        return self.residual(outputs, (uniform < outputs.sigmoid()).to(outputs))


@dataclass(frozen=True)
class SquaredError(OutputLoss):
    r"""Minus the log density of Gaussian noise, :math:`|f - y|^2 / (2 \sigma^2)`, a sum over outputs.

    Args:
        noise_variance: sigma^2, in squared units of y.
    """

    noise_variance: float = 1.0

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point():
            raise ValueError(f"mse takes real numbers as targets, got {targets.dtype}; classes have loss='cross_entropy'")
        if bad := int((~targets.isfinite()).sum()):
            raise ValueError(f"{bad} of {targets.numel()} targets are not finite")
        return shaped_like(outputs, targets).to(outputs)

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        constant = math.log(2 * math.pi * self.noise_variance)
        return ((outputs - targets) ** 2 / self.noise_variance + constant).view(len(outputs), -1).sum(1) / 2

    def slopes(self, outputs: Tensor, targets: Tensor) -> Slopes:
        scale = self.noise_variance**-0.5
        return Slopes(self.residual(outputs, targets), lambda v: scale * v, lambda v: scale * v)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.noise_variance

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _each_alone(torch.full_like(outputs, self.noise_variance**-0.5))

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        normals = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return normals.to(outputs.device) / self.noise_variance**0.5


@dataclass(frozen=True)
class Custom(OutputLoss):
    """A user's loss, by automatic differentiation in the outputs.

    Args:
        function: From outputs (n, ...) and targets to the losses of the examples, shape (n,); each of its own example alone.
        error: Their derivatives in the outputs, shaped like these; None is torch's.
        hessian: Their second derivatives, shape (n, K, K); None is torch's.
    """

    function: Callables
    error: Callables | None = None
    hessian: Callables | None = None

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.device)
        losses = self.function(outputs.detach(), targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss must return one number for each of {len(outputs)} examples, got {got}; take reduction='none'")
        return targets

    def _one(self, output: Tensor, target: Tensor) -> Tensor:
        return self.function(output[None], target[None])[0]

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.error is not None:
            return self.error(outputs, targets)
        return torch.func.vmap(torch.func.grad(self._one))(outputs, targets)

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs[0].numel()
        # reverse over reverse: forward mode warns about its own deprecations
        second = self.hessian or torch.func.vmap(torch.func.jacrev(torch.func.jacrev(self._one)))
        bends = second(outputs, targets).reshape(-1, count, count)
        values, vectors = torch.linalg.eigh((bends + bends.mT) / 2)
        if values.numel() and float(values.min()) < -1e-4 * max(float(values.max()), 1e-30):
            raise ValueError(
                f"the loss is not convex in the outputs (an eigenvalue is {float(values.min()):.3g}), so its Gauss-Newton matrix "
                "is no precision; take curvature='empirical'"
            )
        columns = (vectors * values.clamp(min=0).sqrt()[:, None, :]).permute(2, 0, 1)
        return columns.reshape(count, *outputs.shape)

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        raise ValueError("curvature='fisher' draws labels from the model, and a loss of your own does not say how; take 'ggn'")


NAMES = ("cross_entropy", "bce", "mse")


def output_loss(
    loss: str | Callables | OutputLoss,
    noise_variance: float = 1.0,
    error: Callables | None = None,
    hessian: Callables | None = None,
) -> OutputLoss:
    """The loss of a name, or of a function.

    Args:
        loss: A name, or a function of outputs and targets.
        noise_variance: Of "mse".
        error: Of a function, see :class:`Custom`.
        hessian: Likewise.

    Raises:
        ValueError: There is none of this name, or ``noise_variance`` is no positive number.
    """
    if isinstance(loss, OutputLoss):
        return loss
    if not 0 < noise_variance < float("inf"):
        raise ValueError(f"noise_variance must be a number > 0, got {noise_variance!r}")
    if callable(loss):
        return Custom(loss, error, hessian)
    if loss not in NAMES:
        raise ValueError(f"unknown loss {loss!r}; take {', '.join(map(repr, NAMES))} or a function of outputs and targets")
    kinds: dict[str, OutputLoss] = {"cross_entropy": CrossEntropy(), "bce": BinaryCrossEntropy()}
    return kinds.get(loss, SquaredError(noise_variance))


def _each_alone(scales: Tensor) -> Tensor:
    """Columns of which each is one output, times a number, shape (K, n, ...) for K outputs."""
    flat = scales.flatten(1)
    return torch.diag_embed(flat).transpose(0, 1).reshape(flat.shape[1], *scales.shape)


def _one_position_each(each: Tensor) -> Tensor:
    """Columns of every position, shape (n, ..., c, K), as columns of all outputs (C, n, ..., K), zero at other positions."""
    n, *positions, count, width = each.shape
    flat = each.reshape(n, -1, count, width)
    if flat.shape[1] == 1:
        return flat[:, 0].transpose(0, 1).reshape(count, n, *positions, width)
    places = flat.shape[1]
    made = flat.new_zeros(places, count, n, places, width)
    for t in range(places):
        made[t, :, :, t] = flat[:, t].transpose(0, 1)
    return made.reshape(places * count, n, *positions, width)
