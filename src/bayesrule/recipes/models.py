"""Classifiers by name: of images, of rows of numbers, and whatever function of the user's own makes one."""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesrule.recipes.names import lookup
from bayesrule.recipes.residual import NORMS, RESIDUAL, Norm
from bayesrule.uses.prediction import as_found
from bayesrule.uses.prediction import has_batch_norm as has_batch_norm

Shape = tuple[int, ...]
"""Of one example: (channels, height, width) of an image, (features,) of a row of a table."""


def build(name: str, shape: Shape, classes: int, seed: int = 0, norm: str = "frn") -> nn.Module:
    """A freshly initialized model that gives logits, shape (n, classes), for examples of such a shape.

    Costs nothing but the weights; a model of the user's own is tried on two examples of zeros.

    Args:
        name: One of ``MODELS``, or ``package.module:function`` for ``function(shape, classes)``, found as from the current folder.
        shape: Of one example.
        classes: Number of outputs.
        seed: Decides on the first weights; torch's global generators stay as they were.
        norm: "frn" (filter response normalization and thresholds) or "batch" (batch norm and rectifiers); matters to the
            residual networks only.

    Raises:
        ValueError: Unknown name or norm, a shape that the model cannot take, or a function that fails or makes no classifier of
            such examples; says which, in one line.

    Example:
        >>> sum(p.numel() for p in build("lenet", (1, 28, 28), 10).parameters())
        37514
    """
    chosen = lookup("norm", norm, NORMS)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if ":" in name:
            return _own(name, tuple(shape), classes)
        return lookup("model", name, MODELS)(tuple(shape), classes, chosen)


def mlp(shape: Shape, classes: int, norm: Norm) -> nn.Module:
    """Two hidden layers of 128 units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def lenet(shape: Shape, classes: int, norm: Norm) -> nn.Module:
    """Three convolutions, each followed by max pooling, and a linear layer, after LeCun et al. (1998) with rectifiers."""
    channels, height, width = _image("lenet", shape, 8)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 8) * (width // 8), classes),
    )


def residual(name: str, shape: Shape, classes: int, norm: Norm) -> nn.Module:
    """One of the residual networks."""
    return RESIDUAL[name].network(_image(name, shape, 2), classes, norm)


MODELS: dict[str, Callable[[Shape, int, Norm], nn.Module]] = {
    "mlp": mlp,
    "lenet": lenet,
    **{name: partial(residual, name) for name in RESIDUAL},
}


def _image(name: str, shape: Shape, least: int) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"{name} needs images, and the data are rows of {math.prod(shape)} numbers; take --model mlp")
    channels, height, width = shape
    if min(height, width) < least:
        raise ValueError(f"{name} needs images of at least {least} x {least} pixels, got {height} x {width}; take mlp")
    return channels, height, width


def _own(name: str, shape: Shape, classes: int) -> nn.Module:
    make = _function(name)
    try:
        model = make(shape, classes)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}, called with ({shape}, {classes}), failed: {_why(error)}") from error
    wanted = "it must return a torch.nn.Module that gives logits"
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {type(model).__name__}, not a model; {wanted}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{name} returned a {type(model).__name__} without parameters to learn; give it some that require gradients"
        )
    _try(name, model, shape, classes, wanted)
    return model


def _function(name: str) -> Callable[[Shape, int], Any]:
    path, _, function = name.partition(":")
    if not all(path.split(".")) or not function.isidentifier():
        raise ValueError(f"{name!r} names no function; write package.module:function, such as nets.small:build")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (path == missing or path.startswith(f"{missing}.")):
            hint = f"; name the module, not its file: {path[:-3].replace('/', '.')}:{function}" if path.endswith(".py") else ""
            hint = hint or f"; looked in {here} and among the installed packages"
            raise ValueError(f"there is no module {path!r} for the model {name}{hint}") from error
        raise ValueError(f"the module of {name} cannot be imported: {_why(error)}") from error
    found = getattr(module, function, None)
    if callable(found):
        return found
    if found is not None:
        raise ValueError(f"{name} is no function but of type {type(found).__name__}; name one that makes a model")
    there = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == path and callable(value)]
    near = get_close_matches(function, there, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(there)) or 'none'}"
    raise ValueError(f"{path} has no function {function!r}; {hint}")


def _try(name: str, model: nn.Module, shape: Shape, classes: int, wanted: str) -> None:
    """Two examples of zeros must give finite logits; buffers and modes stay as they were."""
    given = (2, *shape)
    with torch.no_grad(), as_found(model):
        try:
            outputs = model.eval()(torch.zeros(given, device=next(model.parameters()).device))
        except Exception as error:
            raise ValueError(f"the model of {name} failed on inputs of shape {given}: {_why(error)}") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the model of {name} gave {type(outputs).__name__} for inputs of shape {given}, not a tensor; {wanted}")
    if outputs.shape != (2, classes):
        got = f"outputs of shape {tuple(outputs.shape)} for inputs of shape {given}"
        raise ValueError(f"the model of {name} gave {got}, not {(2, classes)}; {wanted}, one for each class")
    if not outputs.isfinite().all():
        raise ValueError(f"the model of {name} gave outputs that are not finite for inputs of zeros, shape {given}; {wanted}")
    if (outputs >= 0).all() and torch.allclose(outputs.sum(1), torch.ones(2, device=outputs.device)):
        raise ValueError(
            f"the model of {name} gave outputs that sum to 1 in every row; {wanted}, not probabilities: drop the softmax"
        )


def _why(error: BaseException) -> str:
    """Type, message and deepest place of an exception, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if frame.filename == __file__ or frame.filename[0] == "<" else f" ({frame.filename}:{frame.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
