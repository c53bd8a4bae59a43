"""Covariance functions of others: kernels of scikit-learn, modules (gpytorch's kernels) and plain functions, made alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Kernel(ABC):
    """A covariance function of inputs of shape (N, D) and (M, D).

    Attributes:
        source: What it was made of; with the hyper-parameters found, after tuning.
    """

    source: Any

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Covariances, shape (N, M); among the inputs themselves where b is None."""

    def diagonal(self, X: Tensor) -> Tensor:
        """Variances, shape (N,)."""
        return torch.cat([self(x[None], x[None]).flatten() for x in X])

    def parameters(self) -> list[Tensor]:
        """Leaves to be tuned, on a scale without bounds."""
        return []


@dataclass(frozen=True)
class FunctionKernel(Kernel):
    """Any function of two tensors."""

    source: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.source(a, a if b is None else b)

    def diagonal(self, X: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: self.source(x[None], x[None])[0, 0])(X)


@dataclass(frozen=True)
class ModuleKernel(Kernel):
    """A module, such as a kernel of gpytorch, whose lazy results are made dense."""

    source: nn.Module

    def __call__(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        found = self.source(a, a if b is None else b)
        return found.to_dense() if hasattr(found, "to_dense") and not isinstance(found, Tensor) else found

    def diagonal(self, X: Tensor) -> Tensor:
        try:
            found: Tensor = self.source(X, X, diag=True)
        except TypeError:
            return super().diagonal(X)
        return found

    def parameters(self) -> list[Tensor]:
        return [p for p in self.source.parameters() if p.requires_grad]


class SklearnKernel(Kernel):
    """A kernel of scikit-learn: computed by numpy, with its own gradients in the logarithms of its hyper-parameters.

    Hyper-parameters that it holds "fixed" stay; other bounds of it are not looked at.
    """

    def __init__(self, source: Any) -> None:
        self._first = source
        self.theta = torch.tensor(source.theta, dtype=torch.float64, requires_grad=True)

    @property
    def source(self) -> Any:
        """The kernel with the present hyper-parameters."""
        return self._first.clone_with_theta(self.theta.detach().numpy())

    def __call__(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        if b is None and torch.is_grad_enabled():
            found: Tensor = _WithGradient.apply(self.theta, self, a)
            return found
        return _tensor(self.source(_array(a), None if b is None else _array(b)), a)

    def diagonal(self, X: Tensor) -> Tensor:
        return _tensor(self.source.diag(_array(X)), X)

    def parameters(self) -> list[Tensor]:
        return [self.theta] if len(self.theta) else []


class _WithGradient(torch.autograd.Function):
    """K(X) as a function of theta."""

    @staticmethod
    def forward(context: Any, theta: Tensor, kernel: SklearnKernel, X: Tensor) -> Tensor:
        K, slopes = kernel.source(_array(X), eval_gradient=True)
        context.slopes = _tensor(slopes, X)
        return _tensor(K, X)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return torch.einsum("nm,nmk->k", gradients[0], context.slopes).double(), None, None


def _array(X: Tensor) -> Any:
    return X.detach().cpu().numpy()


def _tensor(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def as_kernel(kernel: Any) -> Kernel:
    """A kernel of scikit-learn or gpytorch, or a function of two tensors, as a :class:`Kernel`."""
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, type):
        raise TypeError(f"kernel must be an object, got the class {kernel.__name__}: call it with its hyper-parameters")
    if hasattr(kernel, "clone_with_theta"):
        return SklearnKernel(kernel)
    if isinstance(kernel, nn.Module):
        return ModuleKernel(kernel)
    if callable(kernel):
        return FunctionKernel(kernel)
    raise TypeError(
        f"kernel must be a kernel of scikit-learn or gpytorch or a function of two tensors, got {type(kernel).__name__}"
    )
