"""Which layers ran, on what, and where their outputs hang in the graph: per-example gradients to be had when it goes backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calls import Call, Inseparable, Params, Whole, is_led
from .layers import Layer, layer_of


@dataclass(eq=False)
class Frame:
    """A module that runs."""

    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    is_foreign: bool = False  # weights were used in a way of which the layers inside know nothing
    is_certain: bool = True  # whether what looks like the dimension of examples can be no other


class Trace(TorchFunctionMode):
    """Watches a model's forward.

    Args:
        model: The model.
        wanted: Its parameters of interest, by name.
        ready: Called with the calls of an outermost forward.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, nn.Parameter], ready: Callable[[list[Call]], None]) -> None:
        super().__init__()
        self.model, self.ready = model, ready
        self.names = {id(p): name for name, p in wanted.items()}
        self.examples = 0
        self.formless: set[str] = set()
        self._stack: list[Frame] = []
        self._inside: dict[nn.Module, Params] = {}
        self._probe: list[bool] | None = None
        self._handles: list[Any] = []
        self._over = False

    def __enter__(self) -> Trace:
        for module in self.model.modules():
            own = {name: p for name, p in module.named_parameters() if id(p) in self.names}
            if own:
                self._inside[module] = own
            if own or isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                after = module.register_forward_hook(self._after, with_kwargs=True, prepend=True, always_call=True)
                self._handles.append(after)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._over = True  # for whoever removes hooks while they are being called
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Watching began in a hook of a module, before its forward but too late for a hook in front of that."""
        if module in self._inside and not self._stack:
            self._before(module, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and self._probe is None:
            for x in _flat_tensors((*args, *(kwargs or {}).values())):
                if id(x) in self.names and out is not x and any(y.requires_grad for y in _flat_tensors((out,))):
                    self._used(x)
        return out

    def _used(self, param: Tensor) -> None:
        """A function took a parameter: a layer of a known kind, or someone who was not foreseen."""
        top = self._stack[-1].module if self._stack else None
        if top is not None and layer_of(top) is not None and any(param is p for p in top._parameters.values()):
            return
        for frame in reversed(self._stack):
            if any(param is p for p in self._inside.get(frame.module, {}).values()):
                frame.is_foreign = True
                return
        raise Inseparable(
            f"the parameter {self.names[id(param)]!r} is used outside of the model's forward, where examples cannot be told apart: "
            "move that into a module, or leave it out of the loss"
        )

    @property
    def _rests(self) -> bool:
        return self._over or not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if self._rests or self._probe is not None:
            return
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise RuntimeError(
                f"{type(module).__name__} in training mode mixes the examples of a batch, so that none has a gradient of its own: "
                "call eval() on the norms, which freezes their statistics"
            )
        if not self._stack:
            self.examples = next((len(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()), 0)
        self._stack.append(Frame(module))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        if self._rests or not (self._stack or self._probe is not None):
            return None
        flat, structure = tree_flatten((args, kwargs))
        layer = layer_of(module) if module in self._inside else None
        if self._probe is not None:
            self._probe.append(layer is None or is_led(flat[0], 1))
            return None
        frame = self._stack.pop()
        while frame.module is not module and self._stack:  # those whose forward was given up
            frame = self._stack.pop()
        if output is not None:
            output = self._settle(frame, layer, flat, structure, output)
        if self._stack:
            above = self._stack[-1]
            above.calls += frame.calls
            above.is_foreign |= frame.is_foreign
            above.is_certain &= frame.is_certain
        elif frame.is_foreign and output is not None:
            raise Inseparable(
                f"the examples in a call of {type(module).__name__} cannot be told apart: the first dimension of its inputs and "
                f"outputs must be that of the {self.examples} examples"
            )
        else:
            self.ready(frame.calls)
        return output

    def _settle(self, frame: Frame, layer: Layer | None, flat: list[Any], structure: Any, output: Any) -> Any:
        """What a module that has run leaves for the way back."""
        module, params = frame.module, self._inside.get(frame.module, {})
        outputs, form = tree_flatten(output)
        asked = [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
        if not params or not asked:
            return output
        if layer is not None and not frame.is_foreign:
            a = flat[0]
            if self.examples > 1 and layer.is_shared(a):  # one for each, so that what comes back is each one's
                a, outputs = a.expand(self.examples, *a.shape[1:]), [y.expand(self.examples, *y.shape[1:]) for y in outputs]
                output = tree_unflatten(outputs, form)
            frame.is_foreign = len(asked) != 1 or not (is_led(a, self.examples) and layer.leads(module, a))
            frame.is_certain = frame.is_foreign or self.examples < 2 or self.examples not in layer.places(module, a)
            if not frame.is_foreign:
                frame.calls = [Call(module, params, self.examples, [a], *_edges(outputs, asked), layer)]
        if not self._stack and not frame.is_foreign and not frame.is_certain:
            frame.is_foreign = not self._leads_everywhere(module, flat, structure)
        if (
            frame.is_foreign
            and any(is_led(x, self.examples) for x in flat)
            and all(is_led(outputs[i], self.examples) for i in asked)
        ):
            self.formless.add(type(module).__name__)
            if len(asked) > 1:  # one may be part of another's past: an edge of its own sees only what comes from outside
                outputs = [y.view_as(y) if i in asked else y for i, y in enumerate(outputs)]
                output = tree_unflatten(outputs, form)
            kind = outputs[asked[0]].device.type
            cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            how: Any = dict(rebuild=lambda flat: tree_unflatten(flat, structure), places=asked, cast=cast)
            frame.calls = [Whole(module, params, self.examples, flat, *_edges(outputs, asked), **how)]
            frame.is_foreign, frame.is_certain = False, True
        return output

    def _leads_everywhere(self, module: nn.Module, flat: list[Any], structure: Any) -> bool:
        """Whether all layers see one example where the model is given one: else another dimension was just as long."""
        args, kwargs = tree_unflatten([x[:1] if is_led(x, self.examples) else x for x in flat], structure)
        self._probe = []
        devices = {x.device for x in flat if isinstance(x, Tensor) and x.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"
        try:
            with torch.random.fork_rng(devices, device_type=kind):
                module.forward(*args, **kwargs)
            return all(self._probe)
        except Exception:  # it takes no single example
            return False
        finally:
            self._probe = None

    def warn(self, stacklevel: int = 4) -> None:
        """Say which modules have no form, if any."""
        if self.formless:
            names = ", ".join(sorted(self.formless))
            warnings.warn(
                f"no closed form for {names}: the gradients of their examples are formed by torch.func.vmap, which is slower",
                stacklevel=stacklevel,
            )
            self.formless.clear()


def _edges(outputs: Sequence[Any], asked: Sequence[int]) -> tuple[list[GradientEdge], list[int]]:
    return [get_gradient_edge(outputs[i]) for i in asked], [outputs[i].numel() // max(len(outputs[i]), 1) for i in asked]


def _flat_tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (y for y in x if isinstance(y, Tensor))
