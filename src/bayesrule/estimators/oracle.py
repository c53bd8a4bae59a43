"""Oracles: what is known of a loss at one theta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rule import Oracle, Point
from ..vector import Vector


@dataclass(frozen=True)
class Seen(Oracle):
    """Only a gradient is known, what backpropagation left behind; perhaps squares or gradients of examples, or probes, too."""

    seen: Point
    squared: Point | None = None
    each: Tensor | None = None
    probes: Point | None = None

    def gradient(self) -> Point:
        return self.seen

    def squares(self) -> Point:
        return super().squares() if self.squared is None else self.squared

    def gradients(self) -> Tensor:
        return super().gradients() if self.each is None else self.each

    def probed(self) -> Point | None:
        return self.probes


@dataclass(frozen=True)
class Loss:
    """A mean loss as a function of theta, with everything that automatic differentiation can answer about it.

    Args:
        function: From theta, shape (D,), to the mean loss, shape (), by torch operations.

    Example:
        >>> Loss(lambda x: x.square().sum())(torch.tensor([3.0])).gradient()
        tensor([6.])
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, theta: Tensor) -> Oracle:
        return _At(self.function, theta)


@dataclass(frozen=True)
class ModelLoss:
    """A mean loss of a model's outputs: it also answers for single examples and for the Gauss-Newton matrix.

    Args:
        outputs: From theta, shape (D,), to the outputs, shape (examples, ...).
        losses: From one example's output, shape (...), and its target to its loss, shape ().
        targets: Targets, shape (examples, ...).

    Example:
        >>> X, y = torch.eye(2), torch.tensor([1.0, 2.0])
        >>> half_square = lambda f, target: (f - target).square() / 2
        >>> ModelLoss(lambda theta: X @ theta, half_square, y)(torch.zeros(2)).gauss_newton()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    outputs: Callable[[Tensor], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor

    def __call__(self, theta: Tensor) -> Oracle:
        return _ModelAt(self._mean, theta, self)

    def per_example(self, theta: Tensor) -> Tensor:
        """The loss of every example, shape (examples,)."""
        each: Tensor = torch.func.vmap(self.losses)(self.outputs(theta), self.targets)
        return each

    def _mean(self, theta: Tensor) -> Tensor:
        return self.per_example(theta).mean()


@dataclass(frozen=True)
class Quadratic:
    r"""The loss :math:`\tfrac12 \theta^T A \theta - b^T \theta` (up to a constant), with everything in closed form.

    Args:
        matrix: A, shape (D, D), symmetric.
        vector: b, shape (D,).

    Example:
        >>> Quadratic(torch.eye(2), torch.ones(2))(torch.zeros(2)).gradient()
        tensor([-1., -1.])
    """

    matrix: Tensor
    vector: Tensor

    def __call__(self, theta: Tensor) -> Oracle:
        return _QuadraticAt(self.matrix, self.vector, theta)


@dataclass(frozen=True)
class _QuadraticAt(Oracle):
    matrix: Tensor
    vector: Tensor
    theta: Tensor

    def value(self) -> Tensor:
        return self.theta @ (self.matrix @ self.theta / 2 - self.vector)

    def gradient(self) -> Tensor:
        return self.matrix @ self.theta - self.vector

    def product(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def hessian(self) -> Tensor:
        return self.matrix

    gauss_newton = hessian


@dataclass(frozen=True)
class _At(Oracle):
    function: Callable[[Any], Tensor]
    theta: Any

    def value(self) -> Tensor:
        return self.function(self.theta)

    def gradient(self) -> Point:
        if isinstance(self.theta, Vector):
            parts = tuple(self.theta)
            each = torch.func.grad(lambda *parts: self.function(Vector(parts)), argnums=tuple(range(len(parts))))
            return Vector(each(*parts))
        gradient: Tensor = torch.func.grad(self.function)(self.theta)
        return gradient

    def product(self, v: Tensor) -> Tensor:
        back: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(torch.func.grad(self.function), self.theta)[1]
        return back(v)[0]

    def hessian(self) -> Tensor:
        hessian: Tensor = torch.func.jacrev(torch.func.grad(self.function))(self.theta)
        return hessian


@dataclass(frozen=True)
class _ModelAt(_At):
    model: ModelLoss

    def gradients(self) -> Tensor:
        rows: Tensor = torch.func.jacrev(self.model.per_example)(self.theta)
        return rows

    def squares(self) -> Tensor:
        return self.gradients().square().mean(dim=0)

    def gauss_newton(self) -> Tensor:
        outputs: Any = self.model.outputs(self.theta)
        jacobian: Any = torch.func.jacrev(self.model.outputs)(self.theta)
        curve: Any = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(self.model.losses)))(outputs, self.model.targets)
        examples, size = len(outputs), outputs[0].numel()
        jacobian, curve = jacobian.reshape(examples, size, -1), curve.reshape(examples, size, size)
        total: Tensor = torch.einsum("nkd,nkl,nle->de", jacobian, curve, jacobian)
        return total / examples
