"""What a draw tells beside its gradient, squares example by example or the Hessian's diagonal: where it comes from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..estimators.per_example import Squares
from ..noise import PROBE, CounterNoise
from ..rule import BayesRule
from ..vector import Vector
from .cells import Layout
from .workers import Workers

TOLD = "told"
"""The block of what is told beside a gradient: the mean over examples of their squares, or the diagonal of the Hessian."""

BUDGET = 2**28
"""Bytes of gradients of single examples that are held at a time, where no layer tells their squares."""


class Host(Protocol):
    """What is asked of an optimizer."""

    layout: Layout
    workers: Workers
    param_groups: list[dict[str, Any]]

    @property
    def squares_examples(self) -> bool: ...
    @property
    def asks_hessian(self) -> bool: ...
    def rule(self, group: Mapping[str, Any]) -> BayesRule: ...
    def place(self) -> tuple[int, int]: ...


class Teller(Protocol):
    """Hooks of a model by which an optimizer is attached to it."""

    squares: Squares | None

    @property
    def is_in_place(self) -> bool: ...


class Examples:
    """The squared gradients of the examples of a draw.

    The layers of attached models tell them beside one backward. Without, there is a backward for each example, many at a time.

    Args:
        host: The optimizer.
        name: Its name, for messages.
    """

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.arrived = False
        self.rows: dict[Tensor, Tensor] = {}  # gradients of examples, (examples, ...), where they are kept
        self.sizes: dict[Tensor, Tensor] = {}  # squared norms of gradients, as backpropagation left them
        self._watches: list[Any] = []
        self._attached: weakref.WeakSet[Teller] = weakref.WeakSet()
        self._recording: ExitStack | None = None

    def attach(self, attached: Teller, model: nn.Module) -> None:
        """Let the layers of a model tell, for as long as it is attached; neither keeps the other alive."""
        attached.squares = Squares(model)
        self._attached.add(attached)

    @property
    def _keeps(self) -> bool:
        """Whether squares of the gradients do not do."""
        return any(self.host.rule(group).curvature.keeps_examples for group in self.host.param_groups)

    @property
    def _told(self) -> list[Squares]:
        return [each.squares for each in self._attached if each.squares is not None and each.is_in_place]

    def forget(self) -> None:
        """No examples yet."""
        self.arrived, self.rows, self.sizes = False, {}, {}

    # Recording

    def open(self, fresh: bool = True) -> None:
        """A draw opens: forwards and backwards from here on are noted.

        Args:
            fresh: Whether it is a new one.
        """
        self.arrived = False
        if fresh:
            self.sizes = {}
        if self._told and self.host.squares_examples:
            self._recording = ExitStack()
            if not self.host.workers.active:  # who averages over ranks is no one who rescales
                params = self.host.layout.trainable()
                self._watches = [p.register_post_accumulate_grad_hook(self._measure) for p in params]
            for squares in self._told:
                if fresh:
                    squares.clear()
                self._recording.enter_context(squares.recording(1.0))

    def close(self, keep: bool = True) -> None:
        """It closes.

        Args:
            keep: Whether what was noted counts.
        """
        for watch in self._watches:
            watch.remove()
        recording, self._recording, self._watches = self._recording, None, []
        if recording is None:
            return
        if not keep:
            with suppress(_Lost), recording:
                raise _Lost
            return
        recording.close()
        # what goes backward in a draw, in however many parts, is the mean over its examples
        found = {p: total * squares.examples for squares in self._told for p, total in squares.sums.items() if squares.examples}
        if found:
            self._keep(found)

    def _measure(self, param: Tensor) -> None:
        if param.grad is not None:
            self.sizes[param] = param.grad.square().sum()

    def measure(self) -> None:
        """A draw is closed: note how large gradients are, where that was not seen when they arrived."""
        if self.arrived and not self.sizes and not self.host.workers.active:
            for p in self.host.layout.trainable():
                self._measure(p)

    # A closure

    def learn(self, closure: Callable[..., Any], *part: int) -> Tensor:
        """Call a closure, put the gradient of the mean of its losses into ``p.grad``, and keep their squares; the mean loss.

        Raises:
            TypeError: The closure returns something else than one loss for each example, with its graph.
        """
        alone = self._recording is None
        if alone:
            self.open()
        try:
            losses = (self._scalar if self.host.asks_hessian else self._checked)(closure(*part))
            params = self.host.layout.trainable()
            for p in params:
                p.grad = None
            if self.host.asks_hessian:
                self._by_probes(losses, params)
            elif self._tells(params) and not self._keeps:
                losses.mean().backward()
            else:
                self._one_by_one(losses, params)
        except BaseException:
            self.close(keep=False)
            raise
        if alone:
            self.close()
        return losses.detach().mean()

    def _checked(self, losses: Any) -> Tensor:
        if isinstance(losses, Tensor) and losses.dim() == 1 and not len(losses):
            raise ValueError(f"{self.name}: the closure returned the losses of no example; leave empty batches out")
        if isinstance(losses, Tensor) and losses.dim() == 1 and losses.requires_grad:
            return losses
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise TypeError(
            f"{self.name} squares gradients example by example: its closure returns one loss for each, shape (examples,), and does "
            f"not call backward(); got {got}"
        )

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            return loss
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.dim() else repr(loss)
        raise TypeError(
            f"{self.name} asks for second derivatives: its closure returns the mean loss, shape (), with its graph, and does not "
            f"call backward(); got {got}"
        )

    def _by_probes(self, loss: Tensor, params: list[Tensor]) -> None:
        """Hutchinson's estimate of the Hessian's diagonal: the mean of z (H z) over signs z."""
        found = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        gradients = {p: g for p, g in zip(params, found, strict=True) if g is not None}
        bent = [(p, g) for p, g in gradients.items() if g.requires_grad]  # what is linear in the loss has no curvature
        total = {p: torch.zeros_like(p) for p in gradients}
        count = max(self.host.rule(group).curvature.draws for group in self.host.param_groups)
        seed, (step, draw) = int(self.host.param_groups[0].get("seed", 0)), self.host.place()
        for probe in range(count):
            noise = CounterNoise(seed, PROBE, step, draw * count + probe)
            uniform = noise.uniform(Vector([p.detach() for p in params]))
            signs = {p: torch.where(u < 0.5, -1.0, 1.0).to(p.dtype) for p, u in zip(params, uniform, strict=True)}
            if bent:
                products = torch.autograd.grad(
                    [g for _, g in bent],
                    list(gradients),
                    [signs[p] for p, _ in bent],
                    retain_graph=probe < count - 1,
                    allow_unused=True,
                )
                for p, product in zip(gradients, products, strict=True):
                    if product is not None:
                        total[p] += signs[p] * product / count
        for p, g in gradients.items():
            p.grad = g.detach()
        self._keep(total)

    def _tells(self, params: list[Tensor]) -> bool:
        """Whether attached models hold all parameters."""
        told = {id(p) for squares in self._told for p in squares.model.parameters()}
        return all(id(p) in told for p in params)

    def _one_by_one(self, losses: Tensor, params: list[Tensor]) -> None:
        size = sum(p.numel() * p.element_size() for p in params)
        units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device).split(max(1, BUDGET // max(size, 1)))
        rows: dict[Tensor, list[Tensor]] = {}
        sums: dict[Tensor, Tensor] = {}
        squares: dict[Tensor, Tensor] = {}
        for number, chunk in enumerate(units):
            last = number == len(units) - 1
            try:
                found = torch.autograd.grad(losses, params, chunk, retain_graph=not last, allow_unused=True, is_grads_batched=True)
            except (RuntimeError, NotImplementedError) as error:
                if "Sparse" not in str(error):
                    raise
                raise RuntimeError("sparse gradients are not supported; make the embedding with sparse=False") from error
            for p, each in zip(params, found, strict=True):
                if each is not None:
                    sums[p] = sums.get(p, 0.0) + each.sum(0)
                    squares[p] = squares.get(p, 0.0) + each.square().sum(0)
                    if self._keeps:
                        rows.setdefault(p, []).append(each)
        for p, total in sums.items():
            p.grad = total / len(losses)
        if self._keeps:
            self.rows = {p: torch.cat(each) for p, each in rows.items()}
        self._keep({p: total / len(losses) for p, total in squares.items()})

    # Keeping

    @torch.no_grad()
    def _keep(self, squares: Mapping[Any, Tensor]) -> None:
        for plot in self.host.layout.plots():
            block = plot.flat(TOLD).zero_()
            for i, (view, p) in enumerate(zip(plot.views(block), plot.params, strict=True)):
                if p in squares:
                    view.copy_(plot.bucket.piece(squares[p], i))
        self.arrived = True

    def follow(self) -> None:
        """Before gradients are read: they may have been unscaled or clipped since their draw closed, and what it told follows."""
        factors: dict[Any, Tensor] = {}
        for p, before in self.sizes.items():
            if p.grad is not None:
                ratio = (p.grad.square().sum() / before).sqrt()
                factors[p] = torch.where(before > 0, ratio, torch.ones_like(ratio))
        self.sizes = {}  # once
        degree = 1 if self.host.asks_hessian else 2
        for plot in self.host.layout.plots() if factors else ():
            for view, p in zip(plot.views(plot.flat(TOLD)), plot.params, strict=True):
                if p in factors:
                    view.mul_(factors[p].to(view.dtype) ** degree)
        self.rows = {p: rows * factors[p] if p in factors else rows for p, rows in self.rows.items()}

    def check(self) -> None:
        """Before the squares of a draw are read.

        Raises:
            RuntimeError: There are none.
        """
        if not self.arrived and self.host.asks_hessian:
            raise RuntimeError(
                f"{self.name} asks for second derivatives, and saw none: pass step() a closure that returns the mean loss, shape "
                "(), with its graph"
            )
        if not self.arrived or (self._keeps and not self.rows):
            how = "pass step()" if self._keeps else "attach(model), or pass step()"
            raise RuntimeError(
                f"{self.name} {'takes' if self._keeps else 'squares'} gradients example by example, and saw none: {how} a closure "
                "that returns one loss for each example, shape (examples,)"
            )


class _Lost(Exception):
    """What was noted does not count."""
