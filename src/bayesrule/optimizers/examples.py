"""Gradients example by example, squared: where they come from in a draw, and where they are kept."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .cells import Layout

SQUARES = "squares"
"""The block of the mean over examples of squared gradients."""

BUDGET = 2**28
"""Bytes of gradients that are held at a time."""


class Host(Protocol):
    """What is asked of an optimizer."""

    layout: Layout

    @property
    def squares_examples(self) -> bool: ...


class Examples:
    """The squared gradients of the examples of a draw.

    Args:
        host: The optimizer.
        name: Its name, for messages.
    """

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.arrived = False

    def forget(self) -> None:
        """A new draw: no examples yet."""
        self.arrived = False

    def learn(self, losses: Any) -> Tensor:
        """Put the gradient of the mean of losses into ``p.grad``, and keep the mean of the squares; the mean loss.

        Args:
            losses: One for each example, shape (examples,), with their graph.

        Raises:
            TypeError: They are something else.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise TypeError(
                f"{self.name} squares gradients example by example: its closure returns one loss for each, shape (examples,), and "
                f"does not call backward(); got {got}"
            )
        params = self.host.layout.trainable()
        size = sum(p.numel() * p.element_size() for p in params)
        rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device).split(max(1, BUDGET // max(size, 1)))
        sums: dict[Tensor, Tensor] = {}
        squares: dict[Tensor, Tensor] = {}
        for number, chunk in enumerate(rows):
            last = number == len(rows) - 1
            found = torch.autograd.grad(losses, params, chunk, retain_graph=not last, allow_unused=True, is_grads_batched=True)
            for p, each in zip(params, found, strict=True):
                if each is not None:
                    sums[p] = sums.get(p, 0.0) + each.sum(0)
                    squares[p] = squares.get(p, 0.0) + each.square().sum(0)
        for p in params:
            p.grad = sums[p] / len(losses) if p in sums else None
        self._keep({p: total / len(losses) for p, total in squares.items()})
        return losses.detach().mean()

    @torch.no_grad()
    def _keep(self, squares: dict[Tensor, Tensor]) -> None:
        for plot in self.host.layout.plots():
            block = plot.flat(SQUARES)
            if not self.arrived:
                block.zero_()
            for i, (view, p) in enumerate(zip(plot.views(block), plot.params, strict=True)):
                if p in squares:
                    view.add_(plot.bucket.piece(squares[p], i))
        self.arrived = True

    def check(self) -> None:
        """Before the squares of a draw are read.

        Raises:
            RuntimeError: There are none.
        """
        if not self.arrived:
            raise RuntimeError(
                f"{self.name} squares gradients example by example, and saw none: pass step() a closure that returns one loss for "
                "each example, shape (examples,)"
            )
