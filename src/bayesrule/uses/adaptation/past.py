"""What of the past enters an adaptation: at the posterior's mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...drawing import kept
from ...estimators.batches import outputs_of, pairs
from ...estimators.output_losses import OutputLoss
from ...families.gaussian import Diagonal
from ...posterior import Posterior
from ..cautions import checked
from ..journal import marks_of
from .anchors import Anchor, Named
from .memory import Memory
from .objectives import Functions, Knowledge, Losses, Term
from .solving import moving


class Past(NamedTuple):
    """What of the past enters an objective."""

    known: Knowledge
    """Of the data that stay."""
    memory: Memory | None
    """Examples in memory that stay."""
    losses: Sequence[Losses]
    """Of memory and of removed examples."""
    whole: Sequence[Term]
    """Terms that are taken whole."""
    removed: int
    """How many examples go."""


def of_the_past(
    model: nn.Module, posterior: Posterior, loss: OutputLoss, memory: Memory | None, remove: Any, remembers: str | None
) -> Past:
    """At the posterior's mean.

    Args:
        model: Holds the posterior's weights, and comes back as it was.
        posterior: Of the sum of the losses.
        loss: Of an example.
        memory: All of it.
        remove: Examples, or their numbers.
        remembers: What of the memory enters, see :class:`~bayesrule.uses.adaptation.objectives.Method`.
    """
    params = posterior.bind(model)
    old = Anchor.of(posterior, next(iter(params.values())))
    gone: Memory | None = None
    losses: list[Losses] = []
    whole: list[Term] = []
    with kept(params.values()), moving(model, old.names):
        put(model, posterior.mean)
        if memory is not None:
            _check_fresh(model, memory)
        if remove is not None:
            gone, memory = _parted(model, loss, memory, remove)
        if remembers is None or memory is None or not len(memory):
            memory = None
        everything = old
        if gone is not None:
            everything = old.plus(old.curvature(model, gone.batches(model), loss), -1.0)
            check_positive(everything, "removal")
            if remembers != "labels":
                padded = gone if memory is None else gone.pad(memory.outputs.shape[-1])
                losses.append(Losses(loss, gone.inputs, gone.labels, torch.zeros(len(gone)), _errors(loss, padded)))
        beside = everything
        if memory is not None:
            beside = everything.plus(old.curvature(model, memory.batches(model), loss), -1.0).above_prior()
            if remembers == "functions":
                whole.append(Functions.of(memory, model, everything))
            else:
                pulls = _errors(loss, memory) if remembers == "outputs" else None
                losses.append(Losses(loss, memory.inputs, memory.labels, memory.weights, pulls))
    return Past(Knowledge(everything, beside), memory, losses, whole, 0 if gone is None else len(gone))


def _errors(loss: OutputLoss, of: Memory) -> Tensor:
    """The errors of what a model said, each as often as it counts."""
    errors = loss.residual(of.outputs, of.labels)
    return errors * of.weights.to(errors).view(-1, *[1] * (errors.dim() - 1))


def seen(model: nn.Module, batches: Iterable[Any], loss: OutputLoss) -> Memory | None:
    """Examples with what a model says of them."""
    found = []
    with torch.no_grad():
        for inputs, labels in pairs(batches, model):
            f = outputs_of(model, inputs)
            found.append(Memory.of(inputs, checked(loss, f, labels), f))
    return found[0].extend(*found[1:]) if found else None


def _parted(model: nn.Module, loss: OutputLoss, memory: Memory | None, remove: Any) -> tuple[Memory, Memory | None]:
    """Examples that go, and the memory without them."""
    numbers = _numbers(remove)
    if numbers is not None:
        wanted = numbers.unique()
        here = torch.zeros(0, dtype=torch.bool) if memory is None else torch.isin(memory.indices, wanted)
        missing = len(wanted) - int(here.sum())
        if missing or memory is None:
            raise ValueError(
                f"{missing} examples to remove are not in the memory; K-prior removal needs them (add with memory.extend), or "
                "pass the examples themselves"
            )
        going = memory.rows(here.nonzero()[:, 0])
        return replace(going, weights=torch.ones_like(going.weights)), memory.rows((~here).nonzero()[:, 0])
    gone = seen(model, remove, loss)
    if gone is None:
        raise ValueError("there is nothing to remove: the loader gave no example")
    if memory is None or not len(memory):
        return gone, memory
    leaving = Counter(_marks(gone))
    stay = []
    for place, mark in enumerate(_marks(memory)):
        leaving[mark] -= 1
        if leaving[mark] < 0:
            stay.append(place)
    return gone, memory.rows(torch.tensor(stay, dtype=torch.long))


def _numbers(remove: Any) -> Tensor | None:
    """Numbers of examples, if that is what they are."""
    if isinstance(remove, Tensor) or hasattr(remove, "__array__"):
        found = torch.as_tensor(remove).reshape(-1)
        return found.nonzero()[:, 0] if found.dtype == torch.bool else found.long()
    if isinstance(remove, Sequence) and all(isinstance(one, int) for one in remove):
        return torch.tensor(list(remove), dtype=torch.long)
    return None


def _marks(memory: Memory) -> list[tuple[float, ...]]:
    """By which examples are known again."""
    marks = marks_of(memory.inputs, len(memory)).tolist()
    labels = memory.labels.reshape(len(memory), -1).double().sum(1).tolist()
    return [(round(mark, 6), round(label, 6)) for mark, label in zip(marks, labels, strict=True)]


@torch.no_grad()
def put(model: nn.Module, values: Named) -> None:
    """Write weights into a model, where it has them of this name and shape."""
    params = dict(model.named_parameters())
    for name, value in values.items():
        if name in params and params[name].shape == value.shape:
            params[name].copy_(value)


def check_positive(anchor: Anchor, what: str) -> None:
    """Refuse a precision that is none.

    Raises:
        ValueError: It says what made it so.
    """
    if isinstance(anchor.q, Diagonal):
        for name, s in anchor.named(anchor.q.precision).items():
            if bad := int((~(s > 0)).sum()):
                raise ValueError(
                    f"{what} makes the precision of {name!r} negative ({bad} of {s.numel()} entries, the least "
                    f"{s.min().item():.2g}); the posterior never saw these examples, or holds less curvature of them than they have"
                )
    elif float(least := torch.linalg.eigvalsh(anchor.q.precision).min()) <= 0:
        raise ValueError(
            f"{what} makes the precision of {', '.join(map(repr, anchor.names))} negative (the least eigenvalue {least:.2g}); the "
            "posterior never saw these examples, or holds less curvature of them than they have"
        )


@torch.no_grad()
def _check_fresh(model: nn.Module, memory: Memory) -> None:
    now = memory.refresh(model).outputs
    then = memory.outputs[..., : now.shape[-1]]
    if now.shape != then.shape:
        raise ValueError(f"the memory holds outputs of shape {tuple(memory.outputs.shape)}, and the model gives {tuple(now.shape)}")
    gap = (now - then).abs().max() if len(memory) else now.new_zeros(())
    if float(gap) > 1e-3 + 0.02 * float(now.std() if now.numel() > 1 else 1):
        raise ValueError(
            f"the memory holds outputs of another model than that of the posterior (they differ by {gap:.2g}); take "
            "memory.refresh(model) after each adaptation"
        )
