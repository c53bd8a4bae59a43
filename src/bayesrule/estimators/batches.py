"""Batches as training loops have them: a pair of inputs and labels, or a mapping of named ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .output_losses import IGNORED


def inputs_and_labels(batch: Any, model: nn.Module) -> tuple[Any, Tensor]:
    """The two parts of a batch: (inputs, labels), or a mapping with ``labels``.

    A language model of Hugging Face takes the text itself as labels; each place's is then the token that follows.

    Raises:
        TypeError: It is no such thing.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        labels = batch["labels"]
        if _follows(model):
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        return {name: x for name, x in batch.items() if name != "labels"}, labels
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    kind = f"a mapping of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(f"a batch is a pair (inputs, labels) or a mapping with 'labels', got {kind}")


def _follows(model: nn.Module) -> bool:
    """Whether a model of Hugging Face takes the text itself as labels: a causal language model, whatever wraps it."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(model, "loss_type"):
        return False
    return model.loss_type == "ForCausalLM" or (model.loss_type is None and type(model).__name__.endswith("LMHeadModel"))


def inputs_of(batch: Any) -> Any:
    """Those of a batch that may have labels: a tensor is inputs, of a pair they come first, of a mapping all but ``labels``."""
    if isinstance(batch, Mapping):
        return {name: x for name, x in batch.items() if name != "labels"}
    return batch if isinstance(batch, Tensor) else batch[0]


def pairs(batches: Iterable[Any], model: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and labels of each batch, on the device of the model's parameters; batches without an example are left out.

    Raises:
        TypeError: A batch is no such thing.
        ValueError: It has inputs and labels of different numbers of examples.
    """
    device = next(model.parameters()).device
    for batch in batches:
        inputs, labels = inputs_and_labels(batch, model)
        if (n := examples_in(inputs)) != len(labels):
            raise ValueError(f"a batch holds {n} inputs and {len(labels)} labels")
        if n:
            yield on_device(model, inputs), labels.to(device)


def examples_in(inputs: Any) -> int:
    """How many examples there are: the length of the inputs, or of the first with a name that have one."""
    return next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim())


def on_device(model: nn.Module, inputs: Any) -> Any:
    """Inputs where the model's parameters lie."""
    device = next(model.parameters()).device

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return (x.clone() if x.is_inference() else x).to(device)  # what goes backward may be kept

    return tree_map(moved, inputs)


def rows_of(inputs: Any, rows: Any, examples: int) -> Any:
    """Some examples of a batch."""
    return tree_map(lambda x: x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == examples else x, inputs)


def outputs_of(model: Callable[..., Any], inputs: Any) -> Tensor:
    """A model's outputs: the tensor that it returns, or the ``logits`` of what it returns.

    Raises:
        TypeError: There are none.
    """
    found = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise TypeError(f"the model must return a tensor, or something with logits; got {type(found).__name__}")
    return found


def joined(several: Sequence[Any], fill: float | None = None) -> Any:
    """Examples of several batches as one. Rows of different lengths are filled up at their ends.

    Args:
        several: Inputs of batches, or labels, or outputs.
        fill: What they are filled with; None is for inputs, which need an ``attention_mask`` that says what is text.

    Raises:
        ValueError: Inputs have different shapes, and no mask.
    """
    shapes = {tuple(x.shape[1:] for x in tree_leaves(inputs) if isinstance(x, Tensor)) for inputs in several}
    first = several[0]
    if fill is None and len(shapes) > 1 and not (isinstance(first, Mapping) and "attention_mask" in first):
        raise ValueError(f"inputs of different shapes, such as {sorted(map(str, shapes))[:2]}, need an 'attention_mask'")

    def join(*parts: Any) -> Any:
        if not (isinstance(parts[0], Tensor) and parts[0].dim()):
            return parts[0]
        sizes = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]
        return torch.cat([_filled(x, sizes, fill or 0) for x in parts])

    return tree_map(join, first, *several[1:])


def _filled(x: Tensor, sizes: Sequence[int], fill: float) -> Tensor:
    if list(x.shape[1:]) == list(sizes):
        return x
    wide = x.new_full((len(x), *sizes), fill)
    wide[tuple(slice(n) for n in x.shape)] = x
    return wide
