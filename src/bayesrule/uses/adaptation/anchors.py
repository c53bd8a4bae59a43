r"""What holds weights where they were: a Gaussian over those that may move, :math:`\tfrac12 (\theta - c)^T Q (\theta - c)`.

All that a posterior knows of past data enters an adaptation as such a pull, and all changes of it are arithmetic on Q: curvature of
examples is added or taken away, the prior's precision becomes another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Size, Tensor, nn

from ...estimators.batches import rows_of
from ...estimators.data_curvature import Diagonals, Matrix, accumulate
from ...estimators.output_losses import OutputLoss
from ...families.gaussian import Diagonal, Full
from ...joints import law_of
from ...posterior import Posterior

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Anchor:
    r"""A Gaussian :math:`N(c, Q^{-1})` over named weights, their P elements in a row, and their prior. A value.

    Args:
        names: Of the parameters.
        shapes: Of the parameters.
        q: Diagonal, with Q of shape (P,), or Full, with Q of shape (P, P).
        prior_mean: Shape (P,).
        prior_precision: Shape (P,); zero where the prior is flat.
    """

    names: tuple[str, ...]
    shapes: tuple[Size, ...]
    q: Diagonal | Full
    prior_mean: Tensor
    prior_precision: Tensor

    @classmethod
    def of(cls, posterior: Posterior, like: Tensor) -> Self:
        """A posterior as an anchor of the weights that it does not know exactly; on the device of a parameter.

        Raises:
            TypeError: Curvature cannot be added to a precision of its structure.
            ValueError: No weight may move, or a part of one.
        """
        known = {name: s.isinf() for name, s in posterior.precision.items()}
        if part := next((name for name, exact in known.items() if exact.any() and not exact.all()), None):
            raise ValueError(f"the posterior knows a part of {part!r} exactly, and not all of it; that cannot be adapted")
        names = tuple(name for name, exact in known.items() if not exact.all())
        if not names:
            raise ValueError("the posterior knows every weight exactly, so that nothing can adapt; pass one that training left")
        together = posterior.parts[0] if posterior.parts else None
        matrix = getattr(getattr(together, "q", None), "precision", None)
        if together is not None:
            if len(posterior.parts) > 1 or not isinstance(getattr(together, "q", None), Full) or set(together.names) != set(names):
                raise TypeError(
                    f"a precision of the structure {posterior.structure!r} cannot take up the curvature of other data; take the "
                    "posterior's independent() part, or one of the structure 'full'"
                )
            names = together.names
        shapes = tuple(posterior.mean[name].shape for name in names)
        wide = torch.promote_types(like.dtype, torch.float32)

        def row(named: Named | None) -> Tensor:
            each = [torch.zeros(()) if named is None else named[name] for name in names]
            return torch.cat([e.to(like.device, wide).expand(size).reshape(-1) for e, size in zip(each, shapes, strict=True)])

        mean = row(posterior.mean)
        q = Diagonal(mean, row(posterior.precision)) if together is None else Full(mean, matrix.to(mean))  # type: ignore[union-attr]
        return cls(names, shapes, q, row(posterior.prior_mean), row(posterior.prior_precision))

    # Rows and names

    def row(self, named: Named) -> Tensor:
        """All elements in a row, shape (P,)."""
        return torch.cat([named[name].detach().to(self.center).reshape(-1) for name in self.names])

    def named(self, row: Tensor) -> dict[str, Tensor]:
        """The reverse of :meth:`row`."""
        pieces = row.split([size.numel() for size in self.shapes])
        return {name: piece.view(size) for name, piece, size in zip(self.names, pieces, self.shapes, strict=True)}

    @property
    def center(self) -> Tensor:
        """c, shape (P,)."""
        return self.q.mean

    @property
    def diagonal(self) -> Tensor:
        """Of Q, shape (P,)."""
        return self.q._precisions

    # The pull

    def pull(self, theta: Tensor) -> Tensor:
        """Its gradient, Q (theta - c)."""
        return self.stretch(theta - self.center)

    def value(self, theta: Tensor) -> Tensor:
        """In nats, shape ()."""
        return (theta - self.center) @ self.pull(theta) / 2

    def stretch(self, v: Tensor) -> Tensor:
        """Q v."""
        return self.q.stretch(v)

    # Arithmetic

    def plus(self, curvature: Tensor, factor: float = 1.0) -> Self:
        """With curvature of the structure of Q added, times a factor; it may become negative."""
        return replace(self, q=self.q.moved(hess=self.q.precision + factor * curvature))

    def about(self, center: Tensor) -> Self:
        """With another c."""
        return replace(self, q=self.q.moved(mean=center))

    def prior(self, center: Tensor) -> Self:
        """The prior's precision, about some c."""
        return replace(self, q=Diagonal(center, self.prior_precision))

    def free(self) -> Self:
        """No pull at all."""
        return replace(self, q=Diagonal(self.center, torch.zeros_like(self.center)))

    def above_prior(self) -> Self:
        """With no less precision than the prior has in any direction, as data only add to it."""
        least = self.prior_precision.clamp_min(1e-6 * self.diagonal.abs().max())
        if isinstance(self.q, Diagonal):
            return replace(self, q=self.q.moved(hess=torch.maximum(self.q.precision, least)))
        values, vectors = torch.linalg.eigh(self.q.precision - least.diag())
        if bool(values.min() >= -1e-9 * values.abs().max()):
            return self
        return replace(self, q=self.q.moved(hess=(vectors * values.clamp_min(0)) @ vectors.mT + least.diag()))

    def under(self, prior_precision: Tensor) -> Self:
        """With another precision of the prior, shape (P,), about the same mean of the prior."""
        change = prior_precision - self.prior_precision
        wider = self.plus(self.q.keep_diagonal(change))
        moved = wider.about(self.center + wider.q.solve(change * (self.prior_mean - self.center)))
        return replace(moved, prior_precision=prior_precision)

    def damped(self, damping: float, center: Tensor) -> Self:
        """With a pull of so much precision to some weights beside its own."""
        stiffer = self.plus(self.q.keep_diagonal(torch.full_like(center, damping)))
        return stiffer.about(stiffer.q.solve(self.stretch(self.center) + damping * center))

    def curvature(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor, Tensor]], loss: OutputLoss) -> Tensor:
        """The curvature of examples at the model's weights, in the structure of Q. Costs a backward for each output.

        Args:
            model: In eval mode.
            batches: Inputs, labels, and weights of the examples, shape (n,).
            loss: Of an example.
        """
        params = {name: p for name, p in model.named_parameters() if name in self.names}
        params = {name: params[name] for name in self.names}
        total: Any = 0.0
        for weight, rows in by_weight(batches):
            kept: Diagonals | Matrix = Diagonals(params) if isinstance(self.q, Diagonal) else Matrix(params)
            accumulate(model, rows, loss, kept)
            total = total + weight * (self.row(kept.sums) if isinstance(kept, Diagonals) else kept.sum)
        return torch.zeros_like(self.q.precision) + total

    def times_covariance(self, rows: Tensor) -> Tensor:
        """Q^-1 times each row, shape (n, P)."""
        return rows / self.q.precision if isinstance(self.q, Diagonal) else self.q.solve_each(rows)

    # Back to posteriors

    def posterior(self, old: Posterior, others: Named, fewer: float) -> Posterior:
        """The Gaussian as a posterior.

        Args:
            old: Says all that has not changed.
            others: Weights that are known exactly, by name.
            fewer: By how many examples there are less.

        Raises:
            ValueError: None would be left.
        """
        blocks = {"mean": self.center, "precision": self.diagonal}
        if old.prior_precision is not None:
            blocks |= {"prior_mean": self.prior_mean, "prior_precision": self.prior_precision}
        found: dict[str, Any] = {block: self.named(row) for block, row in blocks.items()}
        for name, value in others.items():
            known = {"mean": value, "precision": torch.full_like(value, torch.inf)}
            for block, named in found.items():
                named[name] = known[block] if block in known else (getattr(old, block) or {}).get(name, torch.zeros_like(value))
        found["parts"] = law_of(self.q, dict(zip(self.names, self.shapes, strict=True))).parts
        found["num_data"] = None if old.num_data is None else old.num_data - int(fewer)
        return replace(old, ess=old.ess - fewer, **found)


def by_weight(batches: Iterable[tuple[Any, Tensor, Tensor]]) -> Sequence[tuple[float, Sequence[tuple[Any, Tensor]]]]:
    """Batches of examples that count alike."""
    found: dict[float, list[tuple[Any, Tensor]]] = {}
    for inputs, labels, weights in batches:
        for weight in weights.unique().tolist():
            rows = (weights == weight).nonzero()[:, 0]
            found.setdefault(weight, []).append((rows_of(inputs, rows, len(labels)), labels[rows]))
    return list(found.items())
