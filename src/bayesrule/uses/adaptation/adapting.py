"""A trained model and its posterior, changed as if it had been trained with other data, another prior or other layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...drawing import kept, whole_number
from ...estimators.batches import outputs_of, pairs
from ...estimators.output_losses import OutputLoss, output_loss
from ...families.gaussian import Diagonal
from ...posterior import Posterior
from ..cautions import check_mode, checked, noise_of, of_the_sum
from ..journal import marks_of
from .anchors import Anchor, Named
from .memory import Memory
from .objectives import METHODS, Functions, Knowledge, Losses, Objective, Term
from .solving import SOLVERS, Solver, adam, descend, ivon, moving, newton

Mapped = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def adapt(
    model: nn.Module,
    posterior: Posterior,
    *,
    memory: Memory | None = None,
    add: Iterable[Any] | None = None,
    remove: Any = None,
    prior_precision: float | Mapping[str, float] | None = None,
    new_model: nn.Module | None = None,
    mapping: Mapped | None = None,
    method: str = "posterior_correction",
    loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    noise_variance: float | None = None,
    optimizer: Solver = "adam",
    lr: float | None = None,
    epochs: int = 50,
    batch_size: int = 64,
    seed: int = 0,
) -> Posterior:
    r"""Adapt a model to a change, at the cost of training on what changed and on a memory, not on all data.

    .. math::  \min_\theta \sum_{i \in A} \ell_i - \sum_{i \in D} \ell_i + \sum_{i \in M} w_i D_{\ell_i}(f_i, f_i^*)
               + \tfrac12 \| \theta - m \|^2_Q, \qquad Q = S - \sum_{i \in M} w_i J_i^T L_i J_i

    with A added, D removed and M remembered; :mod:`bayesrule.uses.adaptation.objectives` says how other methods differ. A step costs
    a forward and a backward for each example of a batch; beside them there are two passes over M with a backward for each output.
    The model ends with the adapted weights; where something fails, it and the posterior are as they were.

    Args:
        model: In eval mode; it takes the posterior's mean.
        posterior: What was learned from the past: of independent weights, or of the structure "full".
        memory: Examples of the past, by :meth:`Memory.select`. None is none, which leaves the posterior as the prior.
        add: Batches (inputs, labels), or mappings with ``labels``. They are held in memory.
        remove: Batches likewise; or numbers of examples, which must be in the memory. What is in the memory leaves it.
        prior_precision: Another precision of the prior, > 0, N times the weight decay; a number, or numbers by name.
        new_model: Of another architecture; it learns, and ``model`` stays as it is. Of a full precision the diagonal is taken over.
        mapping: From old tensors by name to those that the new model takes over, of its names and shapes; for means and for
            precisions, so it may select and order, not mix. None takes over what has the same name, where a tensor that
            has grown keeps the old one in its first rows and columns. Without any, the memory is distilled.
        method: "posterior_correction", "kprior", "prior", "replay" or "functional".
        loss: As for :class:`bayesrule.Sensitivity`.
        noise_variance: Likewise.
        optimizer: "adam" in batches; "newton" to the minimum, for data and models of which a few hundred passes are cheap; "ivon"
            with draws, whose posterior is then the result (with the method "prior" that is variational continual learning); or
            a function from parameters to an optimizer.
        lr: Learning rate of "adam" (0.003) or "ivon" (0.1), in the first step; it falls to zero as a cosine.
        epochs: How often added and remembered examples are seen.
        batch_size: Of them together.
        seed: Of their order, and of draws.

    Returns:
        The posterior of the changed data. Its precision is the old one with the curvature of added examples, without that of removed
        ones, and with that of remembered ones at the new weights; its ``ess`` and ``num_data`` are the new number of examples.

    Raises:
        ValueError: Nothing changes, an argument is none of the above, removed examples are not in the memory, labels have no
            outputs, or the precision would become negative.
        TypeError: The precision has a structure that curvature cannot be added to.
        RuntimeError: The model is in training mode, or the optimization diverged.

    Example:
        >>> import bayesrule as br
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
        >>> model = nn.Linear(1, 1, bias=False)
        >>> q = br.ridge(x[:2], y[:2, 0], penalty=1.0)
        >>> post = br.Posterior.of(q, {"weight": (1, 1)}, ess=2, num_data=2)
        >>> br.adapt(model, post, add=[(x[2:], y[2:])], loss="mse", optimizer="newton").mean["weight"]
        tensor([[1.8333]])
        >>> br.ridge(x, y[:, 0], penalty=1.0).mean
        tensor([1.8333])

    Source: see :mod:`bayesrule.uses.adaptation.objectives`; this form of the correction is derived in ``docs/decisions.md``, section 20.
    """
    if add is None and remove is None and prior_precision is None and new_model is None:
        raise ValueError("nothing changes: pass add, remove, prior_precision or new_model")
    _check(method, optimizer, epochs, batch_size, lr)
    how = METHODS[method]
    memory = None if how.memory is None else memory
    if memory is None and (new_model is not None or how.memory in ("labels", "functions")):
        raise ValueError(f"method={method!r} needs a memory here: pass Memory.select(model, posterior, loader, size)")
    for one in (model, new_model or model):
        check_mode(one)
    posterior = of_the_sum(posterior, "adaptation")
    found = output_loss(loss, noise_of(posterior, noise_variance))
    if prior_precision is not None:
        if posterior.prior_precision is None:
            raise ValueError("the posterior does not know its prior, so that it cannot get another; make it with one")
        _warn_of_few(method, memory, posterior)

    past = _past(model, posterior if new_model is None else posterior.independent(), found, memory, remove, how.memory)
    target = new_model or model
    pull, beside = how.pull(past.known), past.known.beside
    if new_model is not None:
        pull, beside = (_carried(anchor, new_model, mapping, posterior) for anchor in (pull, beside))
    if prior_precision is not None:
        delta = _prior(prior_precision, pull)
        pull, beside = pull.under(delta), beside.under(delta)
    exact = {name: m for name, m in posterior.mean.items() if name not in past.known.all.names}

    with moving(target, pull.names):
        _put(target, exact)
        _begin(target, beside, new_model)
        added = None if add is None else _seen(target, add, found)
        if add is not None and added is None:
            raise ValueError("there is nothing to add: the loader gave no example")
        data = (posterior.num_data or posterior.ess) + (len(added) if added else 0) - past.removed
        if data <= 0:
            raise ValueError(f"{past.removed} examples to remove, and the posterior is of {posterior.num_data or posterior.ess:g}")
        memory = past.memory
        _check_outputs(target, memory, how.memory)
        losses = [*past.losses, *([] if added is None else [Losses(found, added.inputs, added.labels, added.weights)])]
        objective = Objective(target, pull, Losses.joined(losses) if losses else None, past.whole, float(data))

        def here(anchor: Anchor) -> Anchor:
            """With the curvature of memory and added examples at the weights as they are."""
            known = [one for one in (memory, added) if one]
            return anchor.plus(sum((anchor.curvature(target, one.batches(target), found) for one in known), torch.zeros(())))

        result = _solved(objective, here, beside, optimizer, lr, epochs, batch_size, seed)
    _check_positive(result, "the adapted posterior")
    num_data = None if posterior.num_data is None else int(data)
    return result.posterior(posterior, {n: m for n, m in exact.items() if n in dict(target.named_parameters())}, ess=float(data), num_data=num_data)


def _solved(
    objective: Objective,
    here: Callable[[Anchor], Anchor],
    beside: Anchor,
    optimizer: Solver,
    lr: float | None,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Anchor:
    """The Gaussian at the minimum."""
    if optimizer == "newton":
        newton(objective, here(beside).q.solve)
        return here(beside).about(objective.theta)
    if optimizer != "ivon":
        descend(objective, adam(lr) if isinstance(optimizer, str) else optimizer, epochs, batch_size, seed)
        return here(beside).about(objective.theta)
    if not isinstance(objective.anchor.q, Diagonal):
        raise TypeError("IVON learns independent weights; take the posterior's independent() part")
    start = here(beside).plus(beside.q.precision, -1.0)
    pull = objective.anchor
    prior = Posterior(pull.named(pull.center), pull.named(pull.diagonal))
    named = list(zip(pull.names, objective.params, strict=True))
    make = ivon(lr, prior, start.named(start.diagonal), objective.examples, seed, named)
    learned = Posterior.from_optimizer(descend(objective, make, epochs, batch_size, seed, pulled=False), objective.model)
    return replace(beside, q=Diagonal(beside.row(learned.mean), beside.row(learned.precision)))


# The past


class Past:
    """What of the past enters an objective.

    Args:
        known: Of the data that stay.
        memory: Examples in memory that stay.
        losses: Terms of memory and of removed examples.
        whole: Terms that are taken whole.
        removed: How many examples go.
    """

    def __init__(
        self, known: Knowledge, memory: Memory | None, losses: Sequence[Losses], whole: Sequence[Term], removed: int
    ) -> None:
        self.known, self.memory, self.losses, self.whole, self.removed = known, memory, losses, whole, removed


def _past(
    model: nn.Module, posterior: Posterior, loss: OutputLoss, memory: Memory | None, remove: Any, remembers: str | None
) -> Past:
    """At the posterior's mean."""
    params = posterior.bind(model)
    old = Anchor.of(posterior, next(iter(params.values())))
    with kept(params.values()), moving(model, old.names):
        _put(model, posterior.mean)
        if memory is not None:
            _check_fresh(model, memory)
        gone = None
        if remove is not None:
            gone, memory = _parted(model, loss, memory, remove)
        losses: list[Losses] = []
        whole: list[Term] = []
        everything = old
        if gone is not None:
            everything = old.plus(old.curvature(model, gone.batches(model), loss), -1.0)
            _check_positive(everything, "removal")
            if remembers != "labels":
                errors = loss.residual(gone.outputs, loss.check(gone.outputs, gone.labels))
                losses.append(Losses(loss, gone.inputs, gone.labels, torch.zeros(len(gone)), errors))
        beside = everything
        if memory is not None and len(memory):
            beside = everything.plus(old.curvature(model, memory.batches(model), loss), -1.0).above_prior()
            if remembers == "functions":
                whole.append(Functions.of(memory, model, everything))
            else:
                pulls = None
                if remembers == "outputs":
                    errors = loss.residual(memory.outputs, memory.labels)
                    pulls = errors * memory.weights.to(errors).view(-1, *[1] * (errors.dim() - 1))
                losses.append(Losses(loss, memory.inputs, memory.labels, memory.weights, pulls))
    return Past(Knowledge(everything, beside), memory, losses, whole, 0 if gone is None else len(gone))


def _seen(model: nn.Module, batches: Iterable[Any], loss: OutputLoss) -> Memory | None:
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
        return memory.rows(here.nonzero()[:, 0]), memory.rows((~here).nonzero()[:, 0])
    gone = _seen(model, remove, loss)
    if gone is None:
        raise ValueError("there is nothing to remove: the loader gave no example")
    if memory is None:
        return gone, None
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


# Other architectures


def _carried(anchor: Anchor, model: nn.Module, mapping: Mapped | None, posterior: Posterior) -> Anchor:
    """An anchor of what a new model takes over; what is new has the prior."""
    params = dict(model.named_parameters())
    moving = {name: p for name, p in params.items() if name in anchor.names or name not in posterior.mean}
    take = partial(_taken_over, params=moving) if mapping is None else mapping
    fresh = anchor.prior_precision.mean()
    rows = []
    for row, default in (
        (anchor.center, 0.0),
        (anchor.diagonal, fresh),
        (anchor.prior_mean, 0.0),
        (anchor.prior_precision, fresh),
    ):
        old = take(anchor.named(row))
        each = []
        for name, p in moving.items():
            wide = row.new_zeros(p.shape) + default
            if name in old:
                if old[name].dim() != p.dim() or any(a > b for a, b in zip(old[name].shape, p.shape, strict=True)):
                    raise ValueError(f"{name!r} is taken over with shape {tuple(old[name].shape)}, and is {tuple(p.shape)} in the new model")
                wide[tuple(slice(n) for n in old[name].shape)] = old[name]
            each.append(wide.reshape(-1))
        rows.append(torch.cat(each))
    center, precision, prior_mean, prior_precision = rows
    sizes = tuple(p.shape for p in moving.values())
    return Anchor(tuple(moving), sizes, Diagonal(center, precision), prior_mean, prior_precision)


def _taken_over(old: dict[str, Tensor], params: Named) -> dict[str, Tensor]:
    """Those of the same name that have not shrunk."""

    def fits(name: str, t: Tensor) -> bool:
        return t.dim() == params[name].dim() and all(a <= b for a, b in zip(t.shape, params[name].shape, strict=True))

    return {name: t for name, t in old.items() if name in params and fits(name, t)}


@torch.no_grad()
def _begin(target: nn.Module, anchor: Anchor, new_model: nn.Module | None) -> None:
    """Weights begin at the center; new ones as the new model has them."""
    params = dict(target.named_parameters())
    for (name, center), held in zip(anchor.named(anchor.center).items(), anchor.named(anchor.prior_mean).values(), strict=True):
        p = params[name]
        p.copy_(center if new_model is None else torch.where(center == held, p.to(center), center))


@torch.no_grad()
def _put(model: nn.Module, values: Named) -> None:
    params = dict(model.named_parameters())
    for name, value in values.items():
        if name in params and params[name].shape == value.shape:
            params[name].copy_(value)


def _prior(given: float | Mapping[str, float], anchor: Anchor) -> Tensor:
    """A precision for each weight, shape (P,)."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(anchor.names, given)
    if odd := next((name for name in anchor.names if name not in by_name), None):
        raise ValueError(f"prior_precision has no number for {odd!r}")
    if odd := next((name for name in anchor.names if not 0 < by_name[name] < float("inf")), None):
        raise ValueError(f"prior_precision must be a number > 0, got {by_name[odd]!r} for {odd!r}")
    return torch.cat([anchor.center.new_full((size.numel(),), by_name[name]) for name, size in zip(anchor.names, anchor.shapes, strict=True)])


# Checks


def _check(method: str, optimizer: Any, epochs: int, batch_size: int, lr: float | None) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; take {', '.join(map(repr, METHODS))}")
    if not callable(optimizer) and optimizer not in SOLVERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; take {', '.join(map(repr, SOLVERS))} or a function of parameters")
    whole_number("epochs", epochs, 1)
    whole_number("batch_size", batch_size, 1)
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr must be a number > 0, got {lr!r}")


def _check_positive(anchor: Anchor, what: str) -> None:
    if isinstance(anchor.q, Diagonal):
        for name, s in anchor.named(anchor.q.precision).items():
            if bad := int((~(s > 0)).sum()):
                raise ValueError(
                    f"{what} makes the precision of {name!r} negative ({bad} of {s.numel()} entries, the least {s.min().item():.2g}); "
                    "the posterior never saw these examples, or holds less curvature of them than they have"
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


def _check_outputs(target: nn.Module, memory: Memory | None, remembers: str | None) -> None:
    """Whether the memory has an output for each of the model's."""
    if memory is None or not len(memory) or remembers != "outputs":
        return
    with torch.no_grad():
        inputs, _, _ = next(memory.batches(target, 1))
        wide = outputs_of(target, inputs).shape[-1]
    if wide > memory.outputs.shape[-1]:
        new = list(range(memory.outputs.shape[-1], wide))
        raise ValueError(f"new classes {new} have no soft labels; pad old outputs with pad_value=-inf: memory.pad({wide})")
    if wide < memory.outputs.shape[-1]:
        raise ValueError(f"the model has {wide} outputs, and the memory {memory.outputs.shape[-1]}")


def _warn_of_few(method: str, memory: Memory | None, posterior: Posterior) -> None:
    """K-priors know of the past what is in memory; of a prior that changes, that is not enough."""
    data = posterior.num_data or posterior.ess
    stands = 0.0 if memory is None else float(memory.weights.sum())
    if method == "kprior" and stands < data / 2:
        warnings.warn(
            f"a K-prior with a memory for {stands:g} of {data:g} examples is far off when the prior changes; take "
            "method='posterior_correction', or Memory.select(..., by='random'), which stands for all",
            UserWarning,
            stacklevel=3,
        )
