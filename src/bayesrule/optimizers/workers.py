"""Several processes that train one model.

=====================  ========================================================================================================
gradients              what the optimizer does
=====================  ========================================================================================================
averaged by the host,  nothing, if all ranks draw the same noise: gradients, and so steps, are equal everywhere. With noise per
as DDP does            rank it listens to the gradient of this rank before it is averaged, for its product with this rank's noise,
                       and averages the curvature in ``step()``
not averaged           averages gradient and curvature in ``step()``, weighted by the draws of each rank
sharded, as FSDP2      nothing but to agree on what is finite: each rank works on its part, with noise by global index
=====================  ========================================================================================================

Which of the first two it is shows in the first step: gradients are equal on all ranks or they are not. So a gradient that was
averaged is never multiplied by one rank's noise.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..plots import Plot
from ..shards import here
from .cells import Layout

Sync = Literal["auto"] | bool

LOCAL = "local"
"""The block of the gradient of this rank alone."""

CHECK_EVERY = 100
"""Steps from one comparison of the ranks to the next; the first step is one."""


class Host(Protocol):
    """What workers need of their optimizer."""

    layout: Layout
    param_groups: list[dict[str, Any]]
    state: Any


class Workers:
    """The ranks, as the optimizer of one of them sees them.

    Args:
        host: The optimizer.
        name: Its name, for messages.
        sync: "auto" works together with the other ranks if there are any; True insists on them; False leaves them alone.
        noise_per_rank: Whether each rank draws noise of its own, so that R ranks are R draws.
    """

    def __init__(self, host: Host, name: str, sync: Sync, noise_per_rank: bool) -> None:
        if not (sync is True or sync is False or (isinstance(sync, str) and sync == "auto")):
            raise ValueError(f"{name}: sync must be True, False or 'auto', got {sync!r}")
        if noise_per_rank not in (True, False):
            raise ValueError(f"{name}: noise_per_rank must be True or False, got {noise_per_rank!r}")
        if noise_per_rank and sync is False:
            raise ValueError(f"{name}: noise_per_rank=True averages over ranks, which sync=False forbids; drop one of them")
        self.host, self.name, self.sync, self.noise_per_rank = host, name, sync, noise_per_rank
        self._averaged: bool | None = None  # whether somebody else averages the gradients; None until it shows
        self._steps = 0
        self._hooks: list[Any] = []

    # Who is there

    @property
    def active(self) -> bool:
        """Whether there are others to work with."""
        return self.sync is not False and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def size(self) -> int:
        """How many ranks draw noise of their own."""
        return dist.get_world_size() if self.noise_per_rank and self.active else 1

    def number(self, draw: int) -> int:
        """The number of this rank's draw among the draws of all ranks."""
        return draw * self.size + dist.get_rank() if self.size > 1 else draw

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the parameters."""
        return self.host.layout.sharded

    @property
    def listens(self) -> bool:
        """Whether the gradient of this rank alone is wanted, beside the one in ``p.grad``."""
        return self.size > 1 and self._averaged is not False

    @property
    def exchanges(self) -> bool:
        """Whether looks are to be averaged over the ranks."""
        return self.active and (self._averaged is False or self.size > 1)

    @property
    def exchanges_gradients(self) -> bool:
        """Whether nobody else averages them."""
        return self._averaged is False

    # Listening

    def listen(self, fresh: bool) -> None:
        """From here on, add up what backpropagation brings to this rank.

        Args:
            fresh: Whether to begin at zero.
        """
        if not self.listens:
            return
        targets: dict[Tensor, list[tuple[Tensor, Plot, int]]] = {}
        for plot in self.host.layout.plots():
            block = plot.flat(LOCAL)
            if fresh:
                block.zero_()
            for view, p, i in zip(plot.views(block), plot.params, range(len(plot.params)), strict=True):
                targets.setdefault(p, []).append((view, plot, i))
        self._hooks = [p.register_hook(_adder(views)) for p, views in targets.items() if p.requires_grad]

    def deafen(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # Agreeing

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the parts of the parameters, wherever they lie."""
        if not self.sharded:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        dist.all_reduce(tensor)
        return tensor.tolist()

    def _device(self) -> torch.device:
        return self.host.layout.trainable()[0].device

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks, in one all-reduce for each dtype and device."""
        sums: list[Tensor] = list(parts)
        kinds: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            kinds.setdefault((part.dtype, part.device), []).append(i)
        for members in kinds.values():
            fused = torch.cat([parts[i].reshape(-1) for i in members])
            dist.all_reduce(fused)
            for i, part in zip(members, fused.split([parts[i].numel() for i in members]), strict=True):
                sums[i] = part.view(parts[i].shape)
        return sums

    @torch.no_grad()
    def meet(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Before a step: compare the ranks when it is time, and see in the first step whether gradients are averaged.

        Args:
            gradients: Those of this step.

        Raises:
            RuntimeError: Ranks differ in what must be equal, or there are none where they were insisted on.
        """
        if self.sync is True and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{self.name}: sync=True, but torch.distributed is not initialized; call init_process_group first")
        if not self.active:
            return
        due = self._steps % CHECK_EVERY == 0
        self._steps += 1
        if due or self._averaged is None:
            self._compare(gradients)

    def _compare(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        params, sharded = self.host.layout.trainable(), self.sharded
        if sharded and self.noise_per_rank:
            raise RuntimeError(
                f"{self.name}: noise_per_rank=True needs whole parameters on every rank, and here they are sharded, so that all "
                "ranks see one sample; drop it"
            )
        self.host.layout.cells(params)  # a rank that had no draw has begun no state
        mine = [
            len(params),
            sum(p.numel() for p in params),
            _digest(self._hyperparameters()),
            0 if sharded else _fingerprint([t for p in params for t in (p, *self._kept(p))]),
            0 if sharded else _fingerprint(gradients()),
        ]
        tensor = torch.tensor(mine, device=self._device())
        every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(every, tensor)
        counts, sizes, hyper, states, looks = zip(*(t.tolist() for t in every), strict=True)
        if rank := _odd(list(zip(counts, sizes, strict=True))):
            raise RuntimeError(
                f"{self.name}: rank {rank[0]} trains {sizes[rank[0]]} numbers in {counts[rank[0]]} parameters, another rank "
                f"{sizes[rank[1]]} in {counts[rank[1]]}: ZeRO (DeepSpeed, ZeroRedundancyOptimizer) and FSDP1 are not supported; "
                "shard with FSDP2's fully_shard before the optimizer is made, or pass sync=False for independent processes"
            )
        for what, numbers in (("hyper-parameters", hyper), ("parameters or state", states)):
            if rank := _odd(numbers):
                raise RuntimeError(
                    f"{self.name}: the {what} of rank {rank[0]} differ from those of the other ranks: start all ranks from the "
                    "same weights and checkpoint, with the same settings, or pass sync=False for independent processes (of "
                    "parameters in parts only FSDP2's are supported, not those of ZeRO and FSDP1)"
                )
        if sharded or (self._averaged is None and any(looks)):
            self._averaged = sharded or len(set(looks)) == 1

    def _kept(self, param: Tensor) -> list[Tensor]:
        state: Mapping[str, Any] = self.host.state.get(param, {})
        return [state[name] for name in sorted(state)]

    def _hyperparameters(self) -> list[Any]:
        groups = self.host.param_groups
        return [{name: _plain(group[name]) for name in sorted(group) if name not in ("params", "param_names")} for group in groups]


class Share(NamedTuple):
    """What the draws of a step have shown: of one rank, times the weight of its draws; or summed over all."""

    weight: float
    square: float  # of the weight: summed over ranks it shows whether they differ
    drew: float  # how many draws there were
    seen: list[float]  # by plot: the weight of the draws that showed curvature
    aligned: list[float]  # by parameter: the inner product of this rank's gradient with the one in p.grad
    present: list[float]  # by parameter: the weight of the draws that gave a gradient
    curvatures: list[Tensor]  # by plot
    gradients: list[Tensor]  # by plot, where nobody else averages them

    def summed(self, workers: Workers) -> Share:
        """The sum over all ranks: one all-reduce for each dtype and device."""
        lists = (self.seen, self.aligned, self.present)
        numbers = [self.weight, self.square, self.drew, *(n for each in lists for n in each)]
        first, *blocks = workers.sum([self.curvatures[0].new_tensor(numbers), *self.curvatures, *self.gradients])
        weight, square, drew, *rest = first.tolist()
        cuts = list(accumulate(map(len, lists), initial=0))
        seen, aligned, present = (rest[i:j] for i, j in pairwise(cuts))
        return Share(weight, square, drew, seen, aligned, present, blocks[: len(seen)], blocks[len(seen) :])


def _adder(targets: list[tuple[Tensor, Plot, int]]) -> Callable[[Tensor], None]:
    """A hook that adds a gradient to the views that it belongs to."""

    @torch.no_grad()
    def add(gradient: Tensor) -> None:
        for view, plot, i in targets:
            view.add_(plot.bucket.piece(gradient, i))

    return add


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number that differs where a bit differs: sums of bit patterns, which no order of adding changes."""
    total = 0
    for number, tensor in enumerate(tensors):
        flat = here(tensor).detach().contiguous().view(-1)
        words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        total += (number + 1) * int(words.sum(dtype=torch.int64)) + 31 * int((words >> 7).sum(dtype=torch.int64))
    return (total + 2**63) % 2**64 - 2**63


def _odd(values: Sequence[Any]) -> tuple[int, int] | None:
    """The first rank whose value is not that of most, and one that has it; None where all agree."""
    most, times = Counter(values).most_common(1)[0]
    if times == len(values):
        return None
    return next(rank for rank, value in enumerate(values) if value != most), values.index(most)
