"""Who adds to gradients, and when: what belongs to other weights is noticed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shards import here


class Watch:
    """Notices gradients that are added to parameters.

    Args:
        params: The parameters; of none it notices nothing.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        self._seen = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in params]

    def _note(self, _: Tensor) -> None:
        self._seen = True

    def has_seen(self) -> bool:
        """Whether there were any; it looks no further."""
        for hook in self._hooks:
            hook.remove()
        return self._seen


class Strangers:
    """Gradients that are older than a draw: whoever adds to them would learn from other weights.

    Args:
        params: Those that are drawn.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        self._old = {p: p.grad for p in params if _stands(p)}
        self._stood: dict[Tensor, bool] = {}  # whether it did just before the first gradient came
        self._mixed = False
        before = [p.register_hook(lambda _, p=p: self._comes(p)) for p in self._old]
        after = [p.register_post_accumulate_grad_hook(self._added) for p in self._old]
        self._hooks = [*before, *after]

    def _comes(self, param: Tensor) -> None:
        if param in self._old:
            self._stood[param] = _stands(param)

    def _added(self, param: Tensor) -> None:
        old = self._old.pop(param, None)
        if old is not None:
            # a shard gets its gradient without the first hook: added to in place, or replaced
            self._mixed |= self._stood.get(param, param.grad is old)

    def are_in_the_way(self) -> bool:
        """Whether one of them was added to, or stands there still."""
        for hook in self._hooks:
            hook.remove()
        old, self._old = self._old, {}
        return self._mixed or any(p.grad is gradient and _stands(p) for p, gradient in old.items())


def _stands(param: Tensor) -> bool:
    """Whether a parameter has a gradient that is not zero."""
    gradient = param.grad
    return gradient is not None and gradient.layout == torch.strided and bool(here(gradient).any())
