"""A trained model and its posterior, changed as if it had been trained with other data, another prior or other layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...drawing import whole_number
from ...estimators.batches import outputs_of
from ...estimators.output_losses import OutputLoss, output_loss
from ...families.gaussian import Diagonal
from ...posterior import Posterior
from ..cautions import check_mode, noise_of, of_the_sum
from .anchors import Anchor
from .architectures import Mapped, carried
from .memory import Memory
from .objectives import METHODS, Losses, Objective
from .past import check_positive, of_the_past, put, seen
from .solving import SOLVERS, Solver, adam, descend, ivon, moving, newton


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
    epochs: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    damping: float = 0.0,
) -> Posterior:
    r"""Adapt a model to a change, at the cost of training on what changed and on a memory, not on all data.

    .. math::  \min_\theta \sum_{i \in A} \ell_i - \sum_{i \in D} \ell_i + \sum_{i \in M} w_i D_{\ell_i}(f_i, f_i^*)
               + \tfrac12 \| \theta - m \|^2_Q, \qquad Q = S - \sum_{i \in M} w_i J_i^T L_i J_i

    with A added, D removed and M remembered; :mod:`bayesrule.uses.adaptation.objectives` says how other methods differ. A step
    costs a forward and a backward for each example of a batch; beside them there are two passes over M with a backward an output.
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
        lr: Learning rate of "adam" (0.005) or "ivon" (0.1), in the first step; it falls to zero as a cosine.
        epochs: How often added and remembered examples are seen.
        batch_size: Of them together.
        seed: Of their order, and of draws.
        damping: Precision of one more pull to the old weights, >= 0, as in Levenberg's and Marquardt's method: for models whose
            posterior says too little of where the quadratic ends, so that they run away. It is not in the result.

    Returns:
        The posterior of the changed data. Its precision is the old one with the curvature of added examples, without that of
        removed ones, and with that of remembered ones at the new weights; ``ess`` and ``num_data`` are the new number of examples.

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

    Source: see :mod:`bayesrule.uses.adaptation.objectives`; this form of the correction: ``docs/decisions.md``, section 20.
    """
    if add is None and remove is None and prior_precision is None and new_model is None:
        raise ValueError("nothing changes: pass add, remove, prior_precision or new_model")
    _check(method, optimizer, epochs, batch_size, lr)
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a number >= 0, got {damping!r}")
    how = METHODS[method]
    if (memory is None or how.memory is None) and (new_model is not None or how.memory in ("labels", "functions")):
        raise ValueError(f"method={method!r} needs a memory here: pass Memory.select(model, posterior, loader, size)")
    for one in (model, new_model or model):
        check_mode(one)
    posterior = of_the_sum(posterior, "adaptation")
    found = output_loss(loss, noise_of(posterior, noise_variance))
    if prior_precision is not None:
        if posterior.prior_precision is None:
            raise ValueError("the posterior does not know its prior, so that it cannot get another; make it with one")
        _warn_of_few(method, memory, posterior)

    past = of_the_past(model, posterior if new_model is None else posterior.independent(), found, memory, remove, how.memory)
    target = new_model or model
    pull, beside = how.pull(past.known), past.known.beside
    if new_model is not None:
        pull, beside = (carried(anchor, new_model, mapping, posterior) for anchor in (pull, beside))
    start = beside.center
    if prior_precision is not None:
        delta = _prior(prior_precision, pull)
        pull, beside = pull.under(delta), beside.under(delta)
    stiff = beside.damped(damping, start) if damping else beside
    pull = pull.damped(damping, start) if damping else pull
    exact = {name: m for name, m in posterior.mean.items() if name not in past.known.all.names}

    with moving(target, pull.names):
        put(target, exact)
        _begin(target, beside.about(start), new_model)
        added = None if add is None else seen(target, add, found)
        if add is not None and added is None:
            raise ValueError("there is nothing to add: the loader gave no example")
        fewer = past.removed - (len(added) if added else 0)
        data = posterior.ess - fewer
        if data <= 0:
            raise ValueError(f"{past.removed} examples to remove, and the posterior is of {posterior.ess:g}")
        memory = past.memory
        _check_outputs(target, memory, how.memory)
        losses = [*past.losses, *([] if added is None else [Losses(found, added.inputs, added.labels, added.weights)])]
        objective = Objective(target, pull, Losses.joined(losses) if losses else None, past.whole, data)

        def here(anchor: Anchor) -> Anchor:
            """With the curvature of memory and added examples at the weights as they are."""
            known = [one for one in (memory, added) if one]
            return anchor.plus(sum((anchor.curvature(target, one.batches(target), found) for one in known), torch.zeros(())))

        result = _solved(objective, here, beside, stiff, optimizer, lr, epochs, batch_size, seed)
        check_positive(result, "the adapted posterior")
    return result.posterior(posterior, {n: m for n, m in exact.items() if n in dict(target.named_parameters())}, fewer)


def _solved(
    objective: Objective,
    here: Callable[[Anchor], Anchor],
    beside: Anchor,
    stiff: Anchor,
    optimizer: Solver,
    lr: float | None,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Anchor:
    """The Gaussian at the minimum; ``stiff`` is what lies beside, with the damping."""
    if objective.losses is None and not objective.whole:  # a pull alone
        objective.put(objective.anchor.center)
        return here(beside).about(objective.theta)
    if optimizer == "newton":
        newton(objective, here(stiff).q.solve)
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


@torch.no_grad()
def _begin(target: nn.Module, anchor: Anchor, new_model: nn.Module | None) -> None:
    """Weights begin at the center; what has the prior's mean as its center begins as in the new model."""
    params = dict(target.named_parameters())
    for (name, center), held in zip(anchor.named(anchor.center).items(), anchor.named(anchor.prior_mean).values(), strict=True):
        p = params[name]
        p.copy_(center if new_model is None else torch.where(center == held, p.to(center), center))


def _prior(given: float | Mapping[str, float], anchor: Anchor) -> Tensor:
    """A precision for each weight, shape (P,)."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(anchor.names, given)
    if odd := next((name for name in anchor.names if name not in by_name), None):
        raise ValueError(f"prior_precision has no number for {odd!r}")
    if odd := next((name for name in anchor.names if not 0 < by_name[name] < float("inf")), None):
        raise ValueError(f"prior_precision must be a number > 0, got {by_name[odd]!r} for {odd!r}")
    return torch.cat(
        [anchor.center.new_full((size.numel(),), by_name[name]) for name, size in zip(anchor.names, anchor.shapes, strict=True)]
    )


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
