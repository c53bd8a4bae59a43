"""Examples that are taken away together, and the influence of one on another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..estimators.batches import on_device, outputs_of, pairs, rows_of
from ..estimators.output_losses import OutputLoss, Slopes
from ..estimators.per_example import inner_products
from ..estimators.pushing import Push
from .cautions import checked
from .deviations import first_order, newton
from .products import Products

Parts = Sequence[tuple[Any, Tensor]]
"""Inputs and labels, batch by batch."""


class Effect(NamedTuple):
    """What taking examples away does to others. N of them."""

    outputs: Tensor
    """The change of their outputs, shape (N, ...)."""
    loss: Tensor
    """Their losses before, shape (N,)."""
    loss_without: Tensor
    """And after, shape (N,)."""


@dataclass(frozen=True)
class Removal:
    """What taking some examples away would change.

    Attributes:
        indices: Their numbers in the data, shape (M,).
        deviation: The change of their outputs, shape (M, ...).
        loss: Their losses before, shape (M,).
        loss_without: Their losses after, shape (M,).
        weights: The change of the weights, by name.
        leverage: How much of their own predictions they make up, in the directions that mattered; at 1 or more the estimate is
            the first order.
    """

    indices: Tensor
    deviation: Tensor
    loss: Tensor
    loss_without: Tensor
    weights: dict[str, Tensor]
    leverage: float
    _group: Group

    def effect(self, loader: Iterable[Any]) -> Effect:
        """What it does to other examples. Costs a forward and two backwards.

        Args:
            loader: Batches (inputs, labels), or mappings with ``labels``.
        """
        return self._group.effect(self.weights, loader)


class Group:
    """Examples together.

    Args:
        products: The model and its posterior.
        loss: Of an example.
        correction: "newton" or "first_order".
    """

    def __init__(self, products: Products, loss: OutputLoss, correction: str) -> None:
        self.products, self.loss, self.correction = products, loss, correction
        self.params = {name: products.params[name] for name in products.spread.names}
        self._pushes = Push(products.model)

    def removal(self, indices: Tensor, parts: Parts) -> Removal:
        """What taking these away would change."""
        with self.products.at_the_mean():
            parts = [(on_device(self.products.model, x), y.to(next(self.products.model.parameters()).device)) for x, y in parts]
            with torch.no_grad():
                values = [outputs_of(self.products.model, x) for x, _ in parts]
            f = torch.cat(values)
            f = f.to(torch.promote_types(f.dtype, torch.float32))
            y = self.loss.check(f, torch.cat([y for _, y in parts]))
            sizes = [len(v) for v in values]
            one = _together(self.loss.slopes(f, y))

            def times(v: Tensor, _: Tensor) -> Tensor:
                return self._push(parts, self._solve(self._pull(parts, v[0].split(sizes))))[None]

            found = newton(times, lambda _: one, 1) if self.correction == "newton" else first_order(times, one)
            leverage = found.leverage.item()
            if leverage >= 1:
                warnings.warn(
                    f"these {len(f)} examples together have leverage {leverage:.2f} >= 1; falling back to first order "
                    "(posterior too wide or not converged)",
                    RuntimeWarning,
                    stacklevel=4,
                )
            weights = self._solve(self._pull(parts, found.weighted[0].split(sizes)))
        moved = found.outputs[0]
        before, after = (self.loss.values(at, y).cpu() for at in (f, f + moved))
        return Removal(indices, moved.cpu(), before, after, weights, leverage, self)

    def effect(self, weights: dict[str, Tensor], loader: Iterable[Any]) -> Effect:
        """What a change of the weights does."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with self.products.at_the_mean():
            for x, y in pairs(loader, self.products.model):
                with torch.no_grad():
                    f = outputs_of(self.products.model, x)
                y = self.loss.check(f, y)
                moved = self._push([(x, y)], weights)
                found.append((moved.cpu(), self.loss.values(f, y).cpu(), self.loss.values(f + moved, y).cpu()))
        if not found:
            raise ValueError("there are no examples: the loader gave no batch")
        return Effect(*map(torch.cat, zip(*found, strict=True)))

    def influence(self, query: Iterable[tuple[Any, Tensor]], train: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """What each training example does to the loss of each query, shape (queries, N)."""
        model, loss = self.products.model, self.loss
        with self.products.at_the_mean():
            directions = []
            for x, y in query:
                for i in range(len(y)):
                    one, own = rows_of(x, slice(i, i + 1), len(y)), y[i : i + 1]
                    f = outputs_of(model, one).detach()
                    directions.append(self._solve(self._pull([(one, own)], [loss.residual(f, loss.check(f, own))])))
            if not directions:
                raise ValueError("there are no queries: the loader gave no batch")
            columns = []
            for x, y in train:
                losses = partial(losses_of, model, loss, x, y)
                columns.append(torch.stack([inner_products(model, losses, u) for u in directions]).cpu())
        if not columns:
            raise ValueError("there are no examples: the loader gave no batch")
        return torch.cat(columns, 1)

    def width(self, data: Callable[[], Iterable[tuple[Any, Tensor]]], probes: int, seed: int) -> float:
        """By how much to multiply all variances, see :meth:`bayesrule.Sensitivity.width`."""
        if not self.params:  # all is certain
            return 1.0
        gained = paid = 0.0
        generator = torch.Generator().manual_seed(seed)
        with self.products.at_the_mean():
            for _ in range(probes):
                pull: dict[str, Tensor] = {}
                for x, y in data():
                    f = outputs_of(self.products.model, x).detach()
                    signs = torch.randint(0, 2, (len(f),), generator=generator).to(f) * 2 - 1
                    error = self.loss.residual(f, self.loss.check(f, y)) * signs.view(-1, *[1] * (f.dim() - 1))
                    for name, g in self._pull([(x, y)], [error]).items():
                        pull[name] = pull[name] + g if name in pull else g
                step = self._solve(pull)
                gained += sum(float((pull[name] * u).sum()) for name, u in step.items())
                paid += self._stiffness(step)
                for x, y in data():
                    f = outputs_of(self.products.model, x).detach()
                    across = self.loss.slopes(f, self.loss.check(f, y)).across
                    paid += float(across(self._push([(x, y)], step)).square().sum())
        return gained / paid if paid > 0 else 1.0

    def _stiffness(self, u: dict[str, Tensor]) -> float:
        """What the prior makes of a change of the weights, times two."""
        prior = self.products.posterior.prior_precision if self.products.posterior is not None else None
        return sum(float((prior[name] * each.square()).sum()) for name, each in u.items()) if prior else 0.0

    # Products of a group

    def _pull(self, parts: Parts, directions: Sequence[Tensor]) -> dict[str, Tensor]:
        """J^T v, summed over the examples."""
        total = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in self.params.items()}
        for (x, _), v in zip(parts, directions, strict=True):
            with torch.enable_grad():
                f = outputs_of(self.products.model, x)
                found = torch.autograd.grad(f, list(self.params.values()), v.to(f.dtype), allow_unused=True)
            for name, g in zip(self.params, found, strict=True):
                if g is not None:
                    total[name] += g
        return total

    @torch.no_grad()
    def _solve(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """The covariance times v."""
        return self.products.solve(v)

    def _push(self, parts: Parts, u: dict[str, Tensor]) -> Tensor:
        """J u of every example."""
        model = self.products.model
        found = torch.cat([self._pushes.along(u, partial(outputs_of, model, x)) for x, _ in parts])
        return found.to(torch.promote_types(found.dtype, torch.float32))


def losses_of(model: nn.Module, loss: OutputLoss, x: Any, y: Tensor) -> Tensor:
    """Of each example, shape (n,)."""
    f = outputs_of(model, x)
    return loss.values(f, checked(loss, f.detach(), y))


def _together(slopes: Slopes) -> Slopes:
    """Those of one example that is all of them."""

    def as_one(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: of(v[0])[None]

    return Slopes(slopes.error[None], as_one(slopes.half), as_one(slopes.across))
