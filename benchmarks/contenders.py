"""Who competes: a name, how the optimizer is made, and whether its gradients are taken at a draw of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ivon
import torch
from torch import Tensor

import bayesrule
from benchmarks.targets import COMPILED, EAGER

LR, ESS, HESS_INIT, WEIGHT_DECAY, BETA1, BETA2 = 0.1, 1e6, 0.1, 1e-4, 0.9, 0.99999  # of IVON, ours and published

BASELINE = "AdamW (fused)"
COMPILED_LOW, EAGER_LOW = f"{COMPILED}, low memory", f"{EAGER}, low memory"
PUBLISHED = "published IVON"


class Contender(NamedTuple):
    """One optimizer in the race."""

    make: Callable[[Sequence[Tensor]], Any]
    draws: bool = False

    def draw(self, optimizer: Any) -> AbstractContextManager[None]:
        """What a gradient is taken in: a draw of the weights, or nothing at all."""
        return optimizer.sampled_params(train=True) if self.draws else nullcontext()


def _adamw(**how: Any) -> Contender:
    return Contender(lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=WEIGHT_DECAY, **how))


def _sgd(**how: Any) -> Contender:
    return Contender(lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=WEIGHT_DECAY, **how))


def _ivon(**how: Any) -> Contender:
    settings = dict(hess_init=HESS_INIT, weight_decay=WEIGHT_DECAY, betas=(BETA1, BETA2))
    return Contender(lambda params: bayesrule.IVON(params, LR, ESS, **settings, **how), draws=True)


def _published() -> Contender:
    settings = dict(hess_init=HESS_INIT, weight_decay=WEIGHT_DECAY, beta1=BETA1, beta2=BETA2)
    return Contender(lambda params: ivon.IVON(params, LR, ESS, **settings), draws=True)


CONTENDERS: dict[str, Contender] = {
    BASELINE: _adamw(fused=True),
    "AdamW (foreach)": _adamw(foreach=True),
    "AdamW (for loop)": _adamw(foreach=False),
    "SGD, momentum (fused)": _sgd(fused=True),
    "SGD, momentum (foreach)": _sgd(foreach=True),
    COMPILED: _ivon(compile=True),
    COMPILED_LOW: _ivon(compile=True, memory="low"),
    EAGER: _ivon(compile=False),
    EAGER_LOW: _ivon(compile=False, memory="low"),
    PUBLISHED: _published(),
}


def tensors(shapes: Iterable[Sequence[int]], scale: float = 1.0) -> list[Tensor]:
    """Ordinary separate tensors of random numbers."""
    return [torch.randn(tuple(shape)).mul_(scale) for shape in shapes]
