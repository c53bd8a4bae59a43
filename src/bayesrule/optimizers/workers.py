"""Several processes that train one model.

=====================  ========================================================================================================
gradients              what the optimizer does
=====================  ========================================================================================================
averaged by the host,  nothing, if all ranks draw the same noise: gradients, and so steps, are equal everywhere. With noise per
as DDP does            rank it averages the curvature in ``step()``
not averaged           averages gradient and curvature in ``step()``, weighted by the draws of each rank
sharded, as FSDP2      nothing but to agree on what is finite: each rank works on its part, with noise by global index
=====================  ========================================================================================================

Which of the first two it is, the gradients show: they are equal on all ranks or they are not, and once they are not, they are
averaged in every step from there on, which leaves what is equal as it is. With noise per rank they are compared in every step.

Noise of a rank is multiplied by the gradient that backpropagation brought to that rank, which a hook adds up before anybody
averages it, and by no other: what stands in ``p.grad`` may be the mean over ranks, or partly so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..plots import Plot
from ..shards import beginning, here, is_shared_out, replicas
from .cells import Layout
from .fingerprints import digest, fingerprint, odd_one

Sync = Literal["auto"] | bool

LOCAL = "local"
"""The block of the gradient of this rank alone."""

CHECK_EVERY = 100
"""Steps from one look at what could go wrong silently to the next; the first step is looked at."""


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
        self._apart = False  # whether gradients were seen to differ
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
        return self.size > 1

    @property
    def apart(self) -> bool:
        """Whether gradients are to be averaged over the ranks."""
        return self._apart and self.active

    @property
    def exchanges(self) -> bool:
        """Whether looks are to be averaged over the ranks."""
        return self.apart or self.size > 1

    def allow_scaling(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Before somebody decides, on this rank alone, whether to skip a step.

        Raises:
            RuntimeError: The step of the other ranks would wait for this one's.
        """
        if self._steps == 0:
            self.meet(gradients)
        if self.apart:
            raise RuntimeError(
                f"{self.name}: gradients are averaged in step(), and a GradScaler that skips it on one rank makes the others wait "
                "for ever; wrap the model in DistributedDataParallel"
            )

    def part(self) -> None:
        """From here on, nobody else is trusted to average gradients."""
        self._apart = True

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
        """Sums over all that holds parts of the parameters."""
        if not self.sharded:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        mesh: Any = self._shard().device_mesh  # type: ignore[attr-defined]
        for dimension in range(mesh.ndim):
            dist.all_reduce(tensor, group=mesh.get_group(dimension))
        return tensor.tolist()

    def dot(self, plot: Plot, a: Tensor, b: Tensor) -> float:
        """The inner product of two flat tensors, whose :meth:`total` counts every element once."""
        if not self.sharded:
            return plot.dot(a, b)
        shard = self._shard()
        pieces = zip(plot.params, plot.views(a), plot.views(b), strict=True)
        return float(sum(x.reshape(-1).dot(y.reshape(-1)) / replicas(p, shard) for p, x, y in pieces))

    def _shard(self) -> Tensor:
        return next(p for p in self.host.layout.trainable() if is_shared_out(p))

    def _device(self) -> torch.device:
        return self.host.layout.trainable()[0].device

    def summed(self, parts: Sequence[Tensor]) -> list[Tensor]:
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
        """Before a step: compare the ranks when it is time, often at first.

        Args:
            gradients: Those of this step, of parameters that lie here as a whole.

        Raises:
            RuntimeError: Ranks differ in what must be equal, or there are none where they were insisted on.
        """
        if self.sync is True and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{self.name}: sync=True, but torch.distributed is not initialized; call init_process_group first")
        if self.active:
            self._steps += 1
            if self._steps & (self._steps - 1) == 0 or self._steps % CHECK_EVERY == 1:
                self._compare(gradients)

    def _compare(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        params = self.host.layout.trainable()
        if self.sharded and self.noise_per_rank:
            raise RuntimeError(
                f"{self.name}: noise_per_rank=True needs whole parameters on every rank, and here they are sharded, so that all "
                "ranks see one sample; drop it"
            )
        self.host.layout.cells(params)  # a rank that had no draw has begun no state
        parts = [p for p in params if is_shared_out(p)]
        wholes = [p for p in params if not is_shared_out(p)] if parts else params
        counts, sizes, settings, states, looks, places, shards = self._everywhere(
            len(params),
            sum(p.numel() for p in params),
            digest(self._hyperparameters()),
            self._state(wholes),
            fingerprint(gradients()),
            digest([(beginning(p), here(p).numel()) for p in parts]),
            self._state(parts),
        )
        if rank := odd_one(list(zip(counts, sizes, strict=True))):
            raise RuntimeError(
                f"{self.name}: rank {rank[0]} trains {sizes[rank[0]]} numbers in {counts[rank[0]]} parameters, another rank "
                f"{sizes[rank[1]]} in {counts[rank[1]]}: ZeRO (DeepSpeed, ZeroRedundancyOptimizer) and FSDP1 are not supported; "
                "shard with FSDP2's fully_shard before the optimizer is made"
            )
        self._differ("hyper-parameters", settings)
        self._differ("parameters or state", states)
        for place in dict.fromkeys(places):  # whoever holds the same part holds the same numbers
            self._differ(
                "sharded parameters or their state", [n if at == place else None for n, at in zip(shards, places, strict=True)]
            )
        if len(set(looks)) > 1 and parts and wholes:
            raise RuntimeError(
                f"{self.name}: some parameters are sharded, and {len(wholes)} others are not and have another gradient on each "
                "rank, which nobody averages; shard the whole model with fully_shard, or average their gradients before step()"
            )
        self._apart |= len(set(looks)) > 1

    def _everywhere(self, *numbers: int) -> list[list[int]]:
        """For each number, what it is on every rank."""
        mine = torch.tensor(numbers, device=self._device())
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        return torch.stack(every, 1).tolist()

    def _differ(self, what: str, numbers: Sequence[int | None]) -> None:
        if rank := odd_one(numbers):
            raise RuntimeError(
                f"{self.name}: the {what} of rank {rank[0]} differ from those of the other ranks: start all ranks from the same "
                "weights and checkpoint, with the same settings, or pass sync=False for independent processes (of parameters in "
                "parts only FSDP2's are supported, not those of ZeRO and FSDP1)"
            )

    def _state(self, params: Sequence[Tensor]) -> int:
        return fingerprint([t for p in params for t in (p, *self._kept(p))])

    def _kept(self, param: Tensor) -> list[Tensor]:
        state: Mapping[str, Any] = self.host.state.get(param, {})
        held = [state[name] for name in sorted(state)]
        return [t for each in held for t in (each if isinstance(each, list) else [each]) if t is not None]

    def _hyperparameters(self) -> list[Any]:
        groups = self.host.param_groups
        return [{name: _plain(group[name]) for name in sorted(group) if name not in ("params", "param_names")} for group in groups]


class Share(NamedTuple):
    """What the draws of a step have shown: of one rank, times the weight of its draws; or summed over all."""

    weight: float
    square: float  # of the weight: summed over ranks it shows whether they differ
    drew: float  # how many draws there were
    marks: list[float]  # of the mean gradient, not weighted; see `marks`
    seen: list[float]  # by plot: the weight of the draws that showed curvature
    aligned: list[float]  # by parameter: the inner product of this rank's gradient with the one in p.grad
    sizes: list[float]  # by parameter: the square of the one in p.grad
    heard: list[float]  # by parameter: the square of this rank's gradient
    present: list[float]  # by parameter: the weight of the draws that gave a gradient
    curvatures: list[Tensor]  # by plot
    gradients: list[Tensor]  # by plot, where nobody else averages them

    def summed(self, workers: Workers) -> Share:
        """The sum over all ranks: one all-reduce for each dtype and device."""
        lists = (self.marks, self.seen, self.aligned, self.sizes, self.heard, self.present)
        numbers = [self.weight, self.square, self.drew, *(n for each in lists for n in each)]
        first, *blocks = workers.summed([self.curvatures[0].new_tensor(numbers), *self.curvatures, *self.gradients])
        weight, square, drew, *rest = first.tolist()
        cuts = list(accumulate(map(len, lists), initial=0))
        marked, seen, aligned, sizes, heard, present = (rest[i:j] for i, j in pairwise(cuts))
        plots = len(self.curvatures)
        return Share(weight, square, drew, marked, seen, aligned, sizes, heard, present, blocks[:plots], blocks[plots:])

    def factors(self, params: Sequence[Tensor]) -> dict[Tensor, float]:
        """Of a sum: by what each parameter's gradient was rescaled after backpropagation, where it was.

        The gradients of the ranks may cancel in their mean, so that little but rounding is left of it, and of its product with
        each: what it says of the factor is then worth less than what all parameters say together.

        Raises:
            RuntimeError: Gradients came that backpropagation did not bring.
        """
        eps = max(torch.finfo(p.dtype).eps for p in params)
        whole = _factor(sum(self.sizes), sum(self.aligned), sum(self.heard), eps) or 1.0
        found = {}
        for p, size, aligned, heard in zip(params, self.sizes, self.aligned, self.heard, strict=True):
            if size and not heard:
                raise RuntimeError(
                    "with noise_per_rank=True the gradient of a rank is what backward() brings to it, and here p.grad came "
                    "otherwise (torch.func, or by hand): take gradients by backward(), or drop noise_per_rank"
                )
            factor = _factor(size, aligned, heard, torch.finfo(p.dtype).eps) or whole
            if size and abs(factor - 1) > 1e-5:  # else it is 1, but for rounding
                found[p] = factor
        return found


def _factor(size: float, aligned: float, heard: float, eps: float) -> float | None:
    """The factor that squares and products tell; None where it differs from 1 by no more than their rounding may make it."""
    rounding = 16 * eps * (size * heard) ** 0.5
    unsure = abs(size - aligned) <= rounding and rounding >= 1e-5 * abs(aligned)
    return None if unsure or not aligned else size / aligned


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
