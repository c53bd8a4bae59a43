r"""What the loss of an example says of its outputs: its value, its error and its curvature.

For outputs :math:`f_i`, shape (n, ...), and labels :math:`y_i`:

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

from .batches import IGNORED
from .metrics import check_labels


class Slopes(NamedTuple):
    """A loss at outputs of n examples."""

    error: Tensor
    """e, shaped like the outputs."""
    root: Callable[[Tensor], Tensor]
    """R times vectors."""
    across: Callable[[Tensor], Tensor]
    """The transpose of R times vectors."""

    def curve(self, v: Tensor) -> Tensor:
        """L v."""
        return self.root(self.across(v))


class OutputLoss(ABC):
    """A loss of examples: minus the log likelihood of their labels."""

    @abstractmethod
    def values(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss of each example, shape (n,)."""

    @abstractmethod
    def slopes(self, f: Tensor, y: Tensor) -> Slopes:
        """Its derivatives."""

    def correct(self, f: Tensor, y: Tensor) -> Tensor | None:
        """Whether each example is named right, shape (n,); None where nothing is named."""
        return None

    def change(self, f: Tensor, moved: Tensor) -> Tensor:
        """How probabilities change where outputs do, to first order; of what are no probabilities, outputs."""
        return moved

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> None:
        """Refuse labels that do not suit the outputs.

        Raises:
            ValueError: They do not.
        """


@dataclass(frozen=True)
class CrossEntropy(OutputLoss):
    r"""Of classes: :math:`\ell = -\log p_y`, :math:`e = p - \text{one-hot}(y)`, :math:`L = \operatorname{diag}(p) - p p^T`.

    Outputs are logits, shape (n, K), or (n, T, K) for sequences, whose loss is the sum over tokens.

    Args:
        ignored: The label of tokens that do not count.
    """

    ignored: int = IGNORED

    def values(self, f: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(f.flatten(0, -2), y.long().flatten(), ignore_index=self.ignored, reduction="none")
        return each.view(len(f), -1).sum(1)

    def slopes(self, f: Tensor, y: Tensor) -> Slopes:
        p = f.softmax(-1)
        counts = (y != self.ignored)[..., None].to(p.dtype)
        label = F.one_hot(y.long().clamp_min(0), f.shape[-1]).to(p.dtype)
        half = p.sqrt() * counts  # R = diag(sqrt p) (1 - sqrt p sqrt p^T), for sqrt p has length 1

        def root(v: Tensor) -> Tensor:
            return half * (v - half * (half * v).sum(-1, keepdim=True))

        def across(v: Tensor) -> Tensor:
            v = half * v
            return v - half * (half * v).sum(-1, keepdim=True)

        return Slopes((p - label) * counts, root, across)

    def correct(self, f: Tensor, y: Tensor) -> Tensor | None:
        return ((f.argmax(-1) == y) | (y == self.ignored)).view(len(f), -1).all(1)

    def change(self, f: Tensor, moved: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * (moved - (p * moved).sum(-1, keepdim=True))

    def check(self, f: Tensor, y: Tensor) -> None:
        if f.dim() < 2 or f.shape[-1] < 2:
            raise ValueError(f"class probabilities need outputs of shape (inputs, classes >= 2), got {tuple(f.shape)}")
        wanted = y[y != self.ignored] if f.dim() > 2 else y
        if y.shape != f.shape[:-1]:
            raise ValueError(f"labels must have shape {tuple(f.shape[:-1])}, got {tuple(y.shape)}")
        check_labels(wanted.reshape(-1), wanted.numel(), f.shape[-1])


@dataclass(frozen=True)
class BinaryCrossEntropy(OutputLoss):
    r"""Of labels 0 and 1, one for each output: :math:`e = \sigma(f) - y`, :math:`L = \operatorname{diag}(p (1 - p))`."""

    def values(self, f: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(f, y.to(f.dtype).view_as(f), reduction="none").view(len(f), -1).sum(1)

    def slopes(self, f: Tensor, y: Tensor) -> Slopes:
        half = (f.sigmoid() * (-f).sigmoid()).sqrt()
        return Slopes(f.sigmoid() - y.to(f.dtype).view_as(f), lambda v: half * v, lambda v: half * v)

    def correct(self, f: Tensor, y: Tensor) -> Tensor | None:
        return ((f > 0) == (y.view_as(f) > 0.5)).view(len(f), -1).all(1)

    def change(self, f: Tensor, moved: Tensor) -> Tensor:
        return f.sigmoid() * (-f).sigmoid() * moved

    def check(self, f: Tensor, y: Tensor) -> None:
        if y.numel() != f.numel():
            raise ValueError(f"there must be one label for each output, shape {tuple(f.shape)}; got {tuple(y.shape)}")
        if bad := int(((y < 0) | (y > 1)).sum()):
            raise ValueError(f"labels must be 0 or 1, or between them; {bad} of {y.numel()} are not")


@dataclass(frozen=True)
class SquaredError(OutputLoss):
    r"""Of numbers with Gaussian noise: :math:`e = (f - y) / s^2`, :math:`L = 1 / s^2`.

    Args:
        noise_variance: s^2. Whoever trained with ``torch.nn.functional.mse_loss`` on one output had 0.5.
    """

    noise_variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise_variance > 0:
            raise ValueError(f"noise_variance must be > 0, got {self.noise_variance!r}")

    def values(self, f: Tensor, y: Tensor) -> Tensor:
        constant = math.log(2 * math.pi * self.noise_variance)
        return ((f - y.view_as(f)) ** 2 / self.noise_variance + constant).view(len(f), -1).sum(1) / 2

    def slopes(self, f: Tensor, y: Tensor) -> Slopes:
        half = self.noise_variance**-0.5
        return Slopes((f - y.view_as(f)) / self.noise_variance, lambda v: half * v, lambda v: half * v)

    def check(self, f: Tensor, y: Tensor) -> None:
        if y.numel() != f.numel():
            raise ValueError(f"there must be one number for each output, shape {tuple(f.shape)}; got {tuple(y.shape)}")


@dataclass(frozen=True)
class Function(OutputLoss):
    """Of a function of one example's outputs and label, convex in the outputs.

    Args:
        function: Takes outputs and labels of n examples, gives n losses, shape (n,).
        error: The derivative of their sum in the outputs; None is torch's.
        hessian: The second derivatives by example, shape (n, K, K); None is torch's.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor] | None = None
    hessian: Callable[[Tensor, Tensor], Tensor] | None = None

    def check(self, f: Tensor, y: Tensor) -> None:
        """That is the function's own matter."""

    def values(self, f: Tensor, y: Tensor) -> Tensor:
        found = self.function(f, y)
        if found.shape != (len(f),):
            raise ValueError(f"the loss must give one number for each example, shape ({len(f)},); got {tuple(found.shape)}")
        return found

    def slopes(self, f: Tensor, y: Tensor) -> Slopes:
        n = len(f)
        with torch.enable_grad():
            at = f.detach().requires_grad_()
            error = self.error(f, y) if self.error else torch.autograd.grad(self.values(at, y).sum(), at)[0]
        if self.hessian:
            curve = self.hessian(f, y).reshape(n, f[0].numel(), f[0].numel())
        else:
            second = torch.func.vmap(torch.func.hessian(lambda a, b: self.function(a[None], b[None])[0]))
            curve = second(f.detach(), y).reshape(n, f[0].numel(), f[0].numel())
        values, vectors = torch.linalg.eigh(curve)
        half = vectors * values.clamp_min(0).sqrt()[:, None]

        def root(v: Tensor) -> Tensor:
            return (half @ v.reshape(n, -1, 1)).view_as(v)

        def across(v: Tensor) -> Tensor:
            return (half.mT @ v.reshape(n, -1, 1)).view_as(v)

        return Slopes(error, root, across)


LOSSES: dict[str, type[OutputLoss]] = {"cross_entropy": CrossEntropy, "bce": BinaryCrossEntropy, "mse": SquaredError}


def loss_of(
    loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor],
    noise_variance: float = 1.0,
    error: Callable[[Tensor, Tensor], Tensor] | None = None,
    hessian: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> OutputLoss:
    """A loss from what users say.

    Raises:
        ValueError: Nobody knows it.
    """
    if isinstance(loss, OutputLoss):
        return loss
    if callable(loss):
        return Function(loss, error, hessian)
    if loss not in LOSSES:
        known = ", ".join(map(repr, LOSSES))
        raise ValueError(
            f"unknown loss {loss!r}; there are {known}, and any function of outputs and labels that gives one loss each"
        )
    return SquaredError(noise_variance) if loss == "mse" else LOSSES[loss]()
