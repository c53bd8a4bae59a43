"""Dropout that a model was trained with, as a posterior over its weights: who reads what a dropout layer lets through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..families.spike_slab import SpikeAndSlab
from ..joints import Joint

CHANNELS = {nn.Dropout1d: nn.Conv1d, nn.Dropout2d: nn.Conv2d, nn.Dropout3d: nn.Conv3d}
KEEP_MODULES = (nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.PReLU)
"""What commutes with factors z / pi >= 0 of single elements."""
KEEP_CALLS = {"flatten", "view", "reshape", "contiguous", "relu", "leaky_relu", "relu_"}
SHAPES = {"flatten", "view", "reshape"}


def dropout_parts(model: nn.Module) -> tuple[Joint, ...]:
    """For each dropout layer, the weights of the layers that read it, whose inputs are there or not.

    Raises:
        ValueError: There is no dropout, or a reader cannot be found or is none whose weights could tell.
    """
    sources = {name: m for name, m in model.named_modules() if _drops(m)}
    if not sources:
        raise ValueError(
            "the model has no nn.Dropout layer with p > 0; functional dropout cannot be seen from outside: make it a layer"
        )
    for name, module in sources.items():
        if not isinstance(module, (nn.Dropout, *CHANNELS)):
            raise ValueError(f"{name!r} is a {type(module).__name__}, whose dropout is no factor of the inputs of another layer")
    modules, weights = dict(model.named_modules()), {id(p): name for name, p in model.named_parameters()}
    parts: list[Joint] = []
    found: set[str] = set()
    for node in _graph(model).nodes:
        if node.op == "call_module" and node.target in sources:
            parts.append(_part(model, node, modules, weights))
            found.add(node.target)
    if lost := set(sources) - found:
        raise ValueError(
            f"the dropout {min(lost)!r} is called by no forward of the model's own modules, but inside of a layer of torch or "
            "never: its readers cannot be found"
        )
    together = [name for part in parts for name in part.names]
    if twice := next((name for name in together if together.count(name) > 1), None):
        raise ValueError(f"{twice!r} reads two dropouts, and has one set of weights")
    return tuple(parts)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rate = getattr(module, "dropout", 0)  # attention and recurrent layers
    return isinstance(rate, int | float) and rate > 0


def _graph(model: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(model)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the readers of dropout cannot be found, because torch.fx cannot trace {type(model).__name__} ({first}); train with "
            "bayesrule.Dropout, whose masks are on weights"
        ) from error


def _part(model: nn.Module, node: fx.Node, modules: dict[str, nn.Module], weights: dict[int, str]) -> Joint:
    source: Any = modules[str(node.target)]
    readers: list[Any] = [_checked(reader, source, node, modules) for reader in _readers(node, node, modules)]
    if not readers:
        raise ValueError(f"nothing reads the dropout {node.target!r}")
    names = tuple(weights[id(layer.weight)] for layer in readers)
    shapes = [layer.weight.shape for layer in readers]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(f"the layers that read the dropout {node.target!r} have inputs of different shapes: {', '.join(names)}")
    row = torch.cat([layer.weight.detach().reshape(-1) for layer in readers])
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return Joint(names, tuple(shapes), SpikeAndSlab(row, 1 - source.p, whole, axis=1))


def _readers(node: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """What reads the output of a node, through layers that leave single elements what they are, or change them one by one."""
    for user in node.users:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        called = user.op in ("call_method", "call_function")
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            yield user
        elif isinstance(module, KEEP_MODULES) or (called and name in KEEP_CALLS):
            if (isinstance(module, nn.Flatten) or name in SHAPES) and isinstance(modules[str(source.target)], tuple(CHANNELS)):
                raise ValueError(
                    f"the channels that {source.target!r} drops are flattened before they are read; put nn.Dropout behind"
                )
            yield from _readers(user, source, modules)
        elif not (called and name in ("getattr", "size", "dim")):
            what = (
                "the output of the model" if user.op == "output" else f"{type(module).__name__ if module else name} ({user.name})"
            )
            raise ValueError(
                f"the dropout {source.target!r} is read by {what}; a posterior over weights wants an nn.Linear, or behind "
                "nn.Dropout2d an nn.Conv2d"
            )


def _checked(reader: fx.Node, source: Any, node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    layer: Any = modules[str(reader.target)]
    kind = nn.Linear if isinstance(source, nn.Dropout) else CHANNELS[type(source)]
    if isinstance(layer, kind) and getattr(layer, "groups", 1) == 1:
        return layer
    why = f"has groups={layer.groups}" if isinstance(layer, kind) else f"is a {type(layer).__name__}"
    raise ValueError(
        f"the dropout {node.target!r} ({type(source).__name__}) is read by {reader.target!r}, which {why}: that drops no whole "
        f"inputs of its weight; take {'nn.Dropout2d' if isinstance(source, nn.Dropout) else f'it before a plain {kind.__name__}'}"
    )


def exact(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights that are known exactly, and their precisions."""
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return mean, {name: torch.full_like(m, math.inf) for name, m in mean.items()}
