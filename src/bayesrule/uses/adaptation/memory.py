r"""Examples that are kept of the past, with what the model said of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...drawing import whole_number
from ...estimators.batches import joined, on_device, outputs_of, pairs, rows_of
from ...estimators.output_losses import IGNORED, BinaryCrossEntropy, Custom, OutputLoss, output_loss
from ...posterior import Posterior
from ...storage import write_tensors
from ..cautions import check_mode, checked, noise_of, of_the_sum, warn_of_motion
from ..deviations import first_order
from ..products import Products

FORMAT, VERSION = "bayesrule-memory", 1
BATCH = 256
"""Examples that go through a model at once."""
By = Literal["surrogate_error", "curvature", "sensitivity", "random"]


@dataclass(frozen=True)
class Memory:
    """Examples of the past, and what a model says of them: what K-priors and posterior correction remember. A value, on the CPU.

    Attributes:
        inputs: A tensor, or a mapping of tensors; M examples.
        labels: Shape (M, ...).
        outputs: Logits, or numbers, of the model that adapts, shape (M, ...); -inf for classes that it did not know.
        weights: How many examples of the past each stands for, shape (M,).
        indices: Their numbers in the data, shape (M,).

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> data = [(torch.randn(8, 2), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))]
        >>> post = Posterior.laplace(model, data, num_data=100)  # of which these are a part
        >>> memory = Memory.select(model, post, data, 3)
        >>> memory.labels.sort().values
        tensor([0, 1, 2])
    """

    inputs: Any
    labels: Tensor
    outputs: Tensor
    weights: Tensor
    indices: Tensor

    @classmethod
    def select(
        cls,
        model: nn.Module,
        posterior: Posterior,
        loader: Iterable[Any],
        size: int,
        by: By = "random",
        *,
        balanced: bool = True,
        loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        noise_variance: float | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> Memory:
        r"""Choose examples of the data that a model learned from. Data stream through, once; memory is that of some batches.

        ================= ============================================================ ==================================
        by                score of an example                                          costs, forwards (K outputs)
        ================= ============================================================ ==================================
        surrogate_error   :math:`|\nabla_f \operatorname{tr} L(f) V|_1`, V of the       2K + 3
                          outputs: where the curvature does not stay what it is
        curvature         :math:`\operatorname{tr} L`: where the model is unsure        3
        sensitivity       :math:`|L V e|_1`: what the model knows from it alone         8
        random            none; each stands for N / M                                  3
        ================= ============================================================ ==================================

        Args:
            model: In eval mode; it is looked at in the posterior's mean, and comes back as it was.
            posterior: What was learned from the data.
            loader: Batches (inputs, labels), or mappings with ``labels``.
            size: M, how many; all where there are fewer.
            by: See above. The surrogate error of "mse" is 0.
            balanced: As many of each class as there are; classes are whole numbers, or labels of one output of "bce".
            loss: As for :class:`bayesrule.Sensitivity`.
            noise_variance: Likewise.
            seed: Of the random choice, which also depends on how the data are batched.
            first: Number of the first example in the data.

        Raises:
            ValueError: An argument is none of the above, or there are no data.
            RuntimeError: The model is in training mode, or its outputs are not finite.

        Warns:
            UserWarning: These are all the data, and the posterior's mean is no minimum of their loss.

        Source: M. E. Khan and S. Swaroop (2021), Knowledge-adaptation priors, arXiv:2106.08769, for "curvature"; P. Nickl et al.
        (2023), arXiv:2310.19273, for "sensitivity"; the surrogate's error is derived here.
        """
        size = whole_number("size", size, 1, "; it is how many examples to keep")
        if by not in SCORES:
            raise ValueError(f"unknown way {by!r} to select; take {', '.join(map(repr, SCORES))}")
        check_mode(model)
        posterior = of_the_sum(posterior, "adaptation")
        found = output_loss(loss, noise_of(posterior, noise_variance))
        products, score = Products(model, posterior, "vjp_jvp"), SCORES[by]
        generator = torch.Generator().manual_seed(seed)
        slope: dict[str, Tensor] = {}
        kept: Memory | None = None
        scores, classes, seen = torch.zeros(0), torch.zeros(0), 0
        with products.at_the_mean():
            for inputs, labels in pairs(loader, model):
                f = outputs_of(model, inputs)
                loss_sum = found.values(f, checked(found, f.detach(), labels)).sum()
                own = {name: products.params[name] for name in products.spread.names}
                for name, g in zip(own, torch.autograd.grad(loss_sum, list(own.values()), allow_unused=True), strict=True):
                    slope[name] = slope.get(name, 0) + (torch.zeros_like(own[name]) if g is None else g)
                each = (
                    score(products, found, inputs, labels).float().cpu() if score else torch.rand(len(labels), generator=generator)
                )
                numbers = torch.arange(first + seen, first + seen + len(labels))
                batch = cls.of(inputs, labels, f.detach(), numbers)
                kept = batch if kept is None else kept.extend(batch)
                scores = torch.cat([scores, each])
                classes = torch.cat([classes, _classes(batch.labels, found)])
                seen += len(labels)
                if len(kept) > 4 * size:
                    best = _chosen(scores, _classes(kept.labels, found), size, balanced)
                    kept, scores = kept.rows(best), scores[best]
        if kept is None:
            raise ValueError("there is nothing to remember: the loader gave no example")
        if seen == posterior.num_data:
            warn_of_motion(posterior, slope)
        best = _chosen(scores, _classes(kept.labels, found), size, balanced)
        kept = kept.rows(best[kept.indices[best].argsort()])
        return kept if score else replace(kept, weights=_shares(_classes(kept.labels, found), classes, balanced))

    @classmethod
    def of(cls, inputs: Any, labels: Tensor, outputs: Tensor, indices: Tensor | None = None) -> Memory:
        """Examples that each stand for themselves.

        Args:
            inputs: Of M examples.
            labels: Shape (M, ...).
            outputs: What the model says of them, shape (M, ...).
            indices: Their numbers in the data; None is 0, 1, ...
        """
        indices = torch.arange(len(labels)) if indices is None else indices
        inputs = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, inputs)
        wide = outputs.detach().to("cpu", torch.promote_types(outputs.dtype, torch.float32))
        return cls(inputs, labels.detach().cpu(), wide, torch.ones(len(labels), dtype=torch.float64), indices.cpu())

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor) -> Memory:
        """Some of the examples."""
        others = (self.labels, self.outputs, self.weights, self.indices)
        return Memory(rows_of(self.inputs, chosen, len(self)), *(x[chosen] for x in others))

    def extend(self, *others: Memory) -> Memory:
        """These examples and others, which the same model has seen.

        Raises:
            ValueError: It gave them other outputs: more classes, say.
        """
        every: list[Memory] = [self, *others]
        widths = sorted({one.outputs.shape[-1] for one in every}) if self.outputs.dim() > 1 else [1]
        if len(widths) > 1:
            few, many = widths[0], widths[-1]
            raise ValueError(f"{few} outputs are remembered of some examples and {many} of others; pad({many}) the fewer")
        inputs, outputs = joined([one.inputs for one in every]), joined([one.outputs for one in every], 0)
        labels = joined([one.labels for one in every], IGNORED)
        return Memory(inputs, labels, outputs, torch.cat([m.weights for m in every]), torch.cat([m.indices for m in every]))

    def pad(self, outputs: int, pad_value: float = -math.inf) -> Memory:
        """Outputs for classes that the model did not know, behind those that it did.

        Args:
            outputs: How many there are with them.
            pad_value: -inf is a probability of zero.
        """
        more = outputs - self.outputs.shape[-1]
        if more < 0:
            raise ValueError(f"{self.outputs.shape[-1]} outputs are remembered, which cannot be padded to {outputs}")
        padding = self.outputs.new_full((*self.outputs.shape[:-1], more), pad_value)
        return replace(self, outputs=torch.cat([self.outputs, padding], -1))

    def refresh(self, model: nn.Module) -> Memory:
        """The same examples, and what a model says of them now: after each adaptation, before the next."""
        check_mode(model)
        found = []
        with torch.no_grad():
            for inputs, _, _ in self.batches(model):
                f = outputs_of(model, inputs)
                found.append(f.to("cpu", torch.promote_types(f.dtype, torch.float32)))
        return replace(self, outputs=torch.cat(found) if found else self.outputs)

    def batches(self, model: nn.Module, size: int = BATCH) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Inputs, labels and weights, on the model's device."""
        device = next(model.parameters()).device
        for rows in torch.arange(len(self)).split(size):
            inputs = on_device(model, rows_of(self.inputs, rows, len(self)))
            yield inputs, self.labels[rows].to(device), self.weights[rows]

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        named = self.inputs if isinstance(self.inputs, Mapping) else {"": self.inputs}
        tensors = {f"input.{name}": x for name, x in named.items() if isinstance(x, Tensor)}
        if len(tensors) < len(named):
            raise TypeError("a file keeps inputs that are a tensor, or a mapping of tensors")
        rest = {name: getattr(self, name) for name in KEPT}
        write_tensors(path, {**tensors, **rest}, {"bayesrule": json.dumps({"format": FORMAT, "version": VERSION})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Memory:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or is no memory.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no memory at {os.fspath(path)!r}")
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("bayesrule", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            known = isinstance(about, dict) and about.get("format") == FORMAT and about.get("version") == VERSION
            rest = [tensors.pop(name) for name in KEPT]
            inputs = {key.removeprefix("input."): x for key, x in tensors.items() if key.startswith("input.")}
            sizes = {len(x) if x.dim() else -1 for x in (*inputs.values(), *rest)}
            if not known or not inputs or len(sizes) != 1:
                raise ValueError("it is another kind of file, or of a later release")
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged or no memory ({error}); take another copy") from error
        return cls(inputs[""] if list(inputs) == [""] else inputs, *rest)


KEPT = ("labels", "outputs", "weights", "indices")


# Scores


def _surrogate_error(products: Products, loss: OutputLoss, inputs: Any, labels: Tensor) -> Tensor:
    if isinstance(loss, Custom):
        raise ValueError("by='surrogate_error' needs third derivatives, which a loss of your own may lack; take by='curvature'")
    values, covariance = products.covariance(inputs)
    with torch.enable_grad():
        f = values.detach().requires_grad_()
        columns = loss.root(f, loss.check(values, labels)).flatten(2)
        bend = torch.einsum("cni,nij,cnj->", columns, covariance, columns)
        if not bend.requires_grad:  # the curvature is the same everywhere
            return torch.zeros(len(f))
        (slope,) = torch.autograd.grad(bend, f)
    return torch.nan_to_num(slope, 0, 0, 0).abs().flatten(1).sum(1)  # NaN where a probability is 0 to all digits


@torch.no_grad()
def _curvature(products: Products, loss: OutputLoss, inputs: Any, labels: Tensor) -> Tensor:
    values = outputs_of(products.model, inputs)
    return loss.root(values, loss.check(values, labels)).square().flatten(2).sum((0, 2))


def _sensitivity(products: Products, loss: OutputLoss, inputs: Any, labels: Tensor) -> Tensor:
    values, times = products.of(inputs)
    found = first_order(times, loss.slopes(values, loss.check(values, labels)))
    return loss.change(values, found.outputs).abs().flatten(1).sum(1)


Score = Callable[[Products, OutputLoss, Any, Tensor], Tensor]
SCORES: dict[str, Score | None] = {
    "surrogate_error": _surrogate_error,
    "curvature": _curvature,
    "sensitivity": _sensitivity,
    "random": None,
}


def _classes(labels: Tensor, loss: OutputLoss) -> Tensor:
    """The class of each example, shape (n,); the same for all where there are none."""
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] != 1 or (flat.is_floating_point() and not isinstance(loss, BinaryCrossEntropy)):
        return torch.zeros(len(labels))
    return flat[:, 0].float()


def _chosen(scores: Tensor, classes: Tensor, size: int, balanced: bool) -> Tensor:
    """The places of the best; balanced, the best of every class, then the second best, and so on."""
    order = scores.argsort(descending=True, stable=True)
    if not balanced:
        return order[:size]
    place = torch.zeros(len(scores), dtype=torch.long)
    for label in classes.unique():
        own = order[classes[order] == label]
        place[own] = torch.arange(len(own))
    return order[place[order].argsort(stable=True)][:size]


def _shares(kept: Tensor, classes: Tensor, balanced: bool) -> Tensor:
    """How many examples each of a random choice stands for: all, or those of its class."""
    if not balanced:
        return torch.full((len(kept),), len(classes) / len(kept), dtype=torch.float64)
    shares = {label: (classes == label).sum() / (kept == label).sum() for label in kept.unique().tolist()}
    return torch.tensor([float(shares[label]) for label in kept.tolist()], dtype=torch.float64)
