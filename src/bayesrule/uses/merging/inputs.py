"""What of several checkpoints is merged with what: by names and shapes alone, whatever the architecture."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .adapters import adapted, check_alike
from .folders import Checkpoint
from .headers import Average, Constant, Stored
from .methods import METHODS, Method

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What is merged. Whole numbers and truth values are those of the base."""


@dataclass(frozen=True)
class Meeting:
    """One tensor of all checkpoints.

    Args:
        base: The anchor, or zeros where the base has no such tensor.
        models: Of the same shape.
        method: How it is merged; None copies it.
        precisions: Of the base and of the models, where the method takes them.
        priors: Precisions of the models' priors, which that of the base replaces; None where it is not known.
        like: Whose dtype the result has, and which is copied: the base's, or the first model's.
        is_anchored: Whether the base has such a tensor.
    """

    base: Stored
    models: tuple[Stored, ...]
    method: Method | None
    precisions: tuple[Stored, ...]
    priors: tuple[Stored | None, ...]
    like: Stored
    is_anchored: bool

    @cached_property
    def wide(self) -> torch.dtype:
        """In which it is merged: float32 or wider."""
        kinds = (stored.dtype for stored in (self.base, *self.models))
        return functools.reduce(torch.promote_types, kinds, torch.float32)


def meet(base: Checkpoint, models: Sequence[Checkpoint], method: Method, prior_precision: float | None) -> dict[str, Meeting]:
    r"""All tensors of the result, by sorted names.

    They are those of the models, which must agree. The base may call them without the first part of their names, as an encoder
    does that was trained further in a classifier. A tensor that it lacks, such as a new head, has the prior as its anchor:
    :math:`N(0, I / \delta)`; methods without precisions average it. Tensors without a precision in any model, such as running
    averages, have equal ones.

    Raises:
        FileNotFoundError: A method needs precisions that there are not.
        ValueError: Names or shapes differ.
    """
    held = [_weights(base, model, method) for model in models]
    for model, its in zip(models, held, strict=True):
        if odd := sorted(held[0].keys() ^ its.keys()):
            here, there = (models[0], model) if odd[0] in held[0] else (model, models[0])
            raise ValueError(f"{odd[0]!r} is in {here} and not in {there}; merge models of one architecture")
        if method.needs_precision and not model.precision:
            raise FileNotFoundError(
                f"no precision for model {model}; run bayesrule precision {model.folder} --data ... or choose "
                "method='task_arithmetic'"
            )
    ours = {name: _of_base(name, base.tensors) for name in sorted(held[0])}
    weights = (name for name, entry in base.tensors.items() if entry.dtype.is_floating_point)
    if lost := sorted(set(weights) - set(ours.values())):
        some = f"{len(lost)} tensors of {base} are in no model and are left out, such as {lost[0]!r}"
        warnings.warn(some, stacklevel=3)
    found = {}
    for name, origin in ours.items():
        anchor = None if origin is None else base.tensors[origin]
        found[name] = _meeting(name, origin, anchor, base, models, [its[name] for its in held], method, prior_precision)
    return found


def _weights(base: Checkpoint, model: Checkpoint, method: Method) -> Mapping[str, Stored]:
    if base.is_adapter:
        check_alike(base, model)
        return model.tensors
    if not model.is_adapter:
        return model.tensors
    if method.needs_precision:
        raise ValueError(
            f"{model} is an adapter: the precisions of its A and B are none of the weights that they make. Choose "
            "method='task_arithmetic', or name as base the adapter that all were trained from"
        )
    return adapted(base, model)


def _of_base(name: str, tensors: Mapping[str, Stored]) -> str | None:
    """What the base calls a tensor."""
    rest = name.partition(".")[2]
    return name if name in tensors else rest if rest in tensors else None


def _meeting(
    name: str,
    origin: str | None,
    anchor: Stored | None,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    held: Sequence[Stored],
    method: Method,
    prior_precision: float | None,
) -> Meeting:
    like, shape = anchor or held[0], held[0].shape
    for model, stored in ((base, like), *zip(models, held, strict=True)):
        if stored.shape != like.shape:
            whose = base if anchor else models[0]
            raise ValueError(
                f"{name!r} is {list(like.shape)} in {whose} and {list(stored.shape)} in {model}; merge "
                "models of one architecture and vocabulary"
            )
    floats = [stored.dtype.is_floating_point for stored in (like, *held)]
    if any(floats) and not all(floats):
        raise ValueError(f"{name!r} is {like.dtype} in one checkpoint and {held[floats.index(not floats[0]) - 1].dtype} in another")
    start = anchor or Constant(shape, 0.0)
    if not floats[0] or 0 in shape:
        return Meeting(start, tuple(held), None, (), (), like, anchor is not None)
    known = [model.precision.get(name) for model in models]
    if not method.needs_precision or not any(known):
        plain = METHODS["linear" if method.averages or anchor is None else "task_arithmetic"]
        return Meeting(
            start, tuple(held), plain if method.needs_precision or anchor is None else method, (), (), like, anchor is not None
        )
    if None in known:
        lacks = models[known.index(None)]
        raise ValueError(f"no precision of {name!r} for model {lacks}, and one for others; run bayesrule precision again")
    priors = tuple(model.prior.get(name) for model in models)
    first = base.precision.get(origin or "")
    if first is None and prior_precision is not None:
        first = Constant(shape, prior_precision)
    if first is None and None not in priors:
        first = Average(tuple(filter(None, priors)))
    if first is None and not method.averages:
        raise FileNotFoundError(
            f"no precision for the base {base}, and the models do not say which prior they had; run bayesrule precision, pass "
            "prior_precision, or choose method='fisher'"
        )
    precisions = (first or Constant(shape, 0.0), *filter(None, known))
    return Meeting(start, tuple(held), method, precisions, priors, like, anchor is not None)
