"""Losses of a model's outputs, as far as curvature asks: how they bend, and how their gradients vary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Callables = Callable[[Tensor, Tensor], Tensor]


class OutputLoss(ABC):
    r"""The losses :math:`\ell_i(f_i)` of n examples as functions of their outputs, shape (n, ..., K).

    ``columns`` are vectors of outputs, shape (C, n, ..., K): the sum of their outer products over C is a curvature of each example.
    """

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
    """

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
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[-1]:
            raise ValueError(
                f"labels go from {int(targets.min())} to {int(targets.max())}, and there are {outputs.shape[-1]} classes"
            )
        sums = outputs.detach().sum(-1)
        if outputs.numel() and bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
            raise ValueError("outputs sum to 1 in every row; let the model give logits, not probabilities")
        return targets

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probs = outputs.softmax(-1)
        return probs - torch.nn.functional.one_hot(targets, outputs.shape[-1]).to(probs)

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probs = outputs.softmax(-1)
        eye = torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        each = probs.sqrt()[..., :, None] * (probs[..., None, :] - eye)  # (n, ..., c, K)
        return _one_position_each(each)

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probs = outputs.softmax(-1)
        labels = torch.multinomial(probs.flatten(0, -2).cpu(), 1, True, generator=generator)[:, 0]
        return self.residual(outputs, labels.view(outputs.shape[:-1]).to(outputs.device))


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
        if targets.shape != outputs.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)} and the outputs {tuple(outputs.shape)}; they must agree")
        if bad := int((~targets.isfinite()).sum()):
            raise ValueError(f"{bad} of {targets.numel()} targets are not finite")
        return targets.to(outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.noise_variance

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs[0].numel()
        eye = torch.eye(count, dtype=outputs.dtype, device=outputs.device) / self.noise_variance**0.5
        return eye.view(count, 1, *outputs.shape[1:]).expand(count, *outputs.shape)

    def drawn(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        normals = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return normals.to(outputs.device) / self.noise_variance**0.5


@dataclass(frozen=True)
class Custom(OutputLoss):
    """A user's loss, by automatic differentiation in the outputs.

    Args:
        function: From outputs (n, ...) and targets to the losses of the examples, shape (n,); each of its own example alone.
    """

    function: Callables

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
        return torch.func.vmap(torch.func.grad(self._one))(outputs, targets)

    def root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs[0].numel()
        # reverse over reverse: forward mode warns about its own deprecations
        bends = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(self._one)))(outputs, targets).reshape(-1, count, count)
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


def output_loss(loss: str | Callables | OutputLoss, noise_variance: float = 1.0) -> OutputLoss:
    """The loss of a name, or of a function.

    Raises:
        ValueError: There is none of this name, or ``noise_variance`` is no positive number.
    """
    if isinstance(loss, OutputLoss):
        return loss
    if not 0 < noise_variance < float("inf"):
        raise ValueError(f"noise_variance must be a number > 0, got {noise_variance!r}")
    if loss == "cross_entropy":
        return CrossEntropy()
    if loss == "mse":
        return SquaredError(noise_variance)
    if callable(loss):
        return Custom(loss)
    raise ValueError(f"unknown loss {loss!r}; take 'cross_entropy', 'mse' or a function of outputs and targets")


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
