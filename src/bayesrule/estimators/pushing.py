r"""What a small move of the weights does to a model's outputs, :math:`J u`, for a whole batch: one product a layer, no Jacobian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .calls import forward_derivatives


class Push:
    """Derivatives of outputs along directions of the weights.

    A forward derivative where the model has one, costing about three forwards and no graph. Else two backwards, the second through
    the first; this is said once.

    Args:
        model: Holds the weights.

    Example:
        >>> model, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0]])
        >>> Push(model).along({"weight": torch.tensor([[1.0, 10.0]])}, lambda: model(x))
        tensor([[21.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._forward = model, True

    @torch.inference_mode(False)
    def along(self, direction: Mapping[str, Tensor], outputs: Callable[[], Tensor]) -> Tensor:
        """J u, shaped like the outputs.

        Args:
            direction: u by name of the parameter, each of its shape; those that are not named do not move.
            outputs: Calls the model.
        """
        if self._forward:
            try:
                return self._by_forward(direction, outputs)
            except (RuntimeError, NotImplementedError) as error:
                found = self._by_backwards(direction, outputs)
                first = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"{type(self.model).__name__} has no forward derivatives ({first}); two backwards take their place, "
                    "which is slower",
                    UserWarning,
                    stacklevel=2,
                )
                self._forward = False
                return found
        return self._by_backwards(direction, outputs)

    @torch.no_grad()
    def _by_forward(self, direction: Mapping[str, Tensor], outputs: Callable[[], Tensor]) -> Tensor:
        with forward_derivatives(), forward_ad.dual_level(), _moving(self.model, direction):
            primal, tangent = forward_ad.unpack_dual(outputs())
            return torch.zeros_like(primal) if tangent is None else tangent.clone()

    @torch.enable_grad()
    def _by_backwards(self, direction: Mapping[str, Tensor], outputs: Callable[[], Tensor]) -> Tensor:
        params = dict(self.model.named_parameters(remove_duplicate=False))
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            found = outputs()
            v = torch.zeros_like(found, requires_grad=True)
            asked = [params[name] for name in direction]
            back = (
                torch.autograd.grad(found, asked, v, create_graph=True, allow_unused=True) if asked and found.requires_grad else ()
            )
            pairs = [(g, u) for u, g in zip(direction.values(), back, strict=False) if g is not None and g.requires_grad]
            if not pairs:
                return torch.zeros_like(found.detach())
            return torch.autograd.grad([g for g, _ in pairs], v, [u.to(g) for g, u in pairs])[0]


@contextmanager
def _moving(model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters move along a direction, under every name that they have."""
    params = dict(model.named_parameters(remove_duplicate=False))
    along: dict[Tensor, Tensor] = {params[name]: u.to(params[name]) for name, u in direction.items()}
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p in along]
    held: list[tuple[Any, str, Any]] = [(m._parameters, name, p) for m, name, p in places]
    moving = {p: forward_ad.make_dual(p.detach(), u) for p, u in along.items()}
    try:
        for module, name, p in places:
            own: Any = module._parameters
            own[name] = _without_padding(module, along[p]) if isinstance(module, nn.Embedding) else moving[p]
        yield
    finally:
        for into, name, p in held:
            into[name] = p


def _without_padding(module: nn.Embedding, u: Tensor) -> Tensor:
    """The row of padding has no gradient, so it does not move."""
    if module.padding_idx is not None:
        u = u.index_fill(0, torch.tensor(module.padding_idx, device=u.device), 0)
    return forward_ad.make_dual(module.weight.detach(), u)
