"""Where the parameters of a model lie flat.

A :class:`Plot` is a bucket of parameters with everything that is kept for them, each block one flat tensor. A large parameter is
worked on where it lies; small ones are copied together into scratch, and back. State that belongs to single parameters
shares memory with the blocks, so it is per parameter for whoever looks, and flat for the rule.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .lowering import Scratch
from .noise import Noise, Where, pairs
from .rounding import followed, stochastic
from .shards import beginning, here, is_shared_out, shared_out
from .vector import BLOCK, Bucket, buckets, whole_blocks


@dataclass(eq=False)
class Plot:
    """A bucket of parameters and the flat blocks that are kept for them.

    Parameters that do not lie in one run of whole blocks are copied to scratch, which plots use in turn.
    """

    params: list[Tensor]
    starts: tuple[int, ...]  # of what lies here of each parameter, in the space of noise addresses
    bucket: Bucket
    dtype: torch.dtype
    scratch: Scratch
    shared_out: bool = False  # whether the parameters lie on several processes
    flats: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, list[Tensor]] = field(default_factory=dict)
    _views: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    _where: Where | None = None
    _own: tuple[Any, Tensor | None] | None = None

    @property
    def where(self) -> Where:
        """The pairs of noise that belong to the plot."""
        if self._where is None:
            first, blocks = pairs(self.bucket, self.starts)
            device = self.params[0].device
            if blocks is None:
                numbers = self.scratch.count(whole_blocks(self.bucket.size) // 2, device)
            else:
                begins = torch.tensor(blocks, dtype=torch.int32 if blocks[-1] < 2**31 - BLOCK else torch.int64)
                numbers = (begins[:, None] + torch.arange(BLOCK // 2, dtype=begins.dtype)).view(-1).to(device)
            self._where = Where(numbers, first, self.dtype)
        return self._where

    @property
    def local(self) -> Sequence[Tensor]:
        """What lies here of the parameters."""
        return self._here(self.params)

    def _here(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [here(t) for t in tensors] if self.shared_out else tensors

    @property
    def own(self) -> Tensor | None:
        """The parameters as one flat view of their memory, where there is one."""
        (p,) = self._here(self.params[:1])
        place = p.data_ptr(), p.dtype, p.shape, p.is_contiguous()  # somebody may have given the parameter other memory
        if self._own is None or self._own[0] != place:
            within = self.bucket.within(p) if p.dtype == self.dtype else None
            self._own = place, within if within is None else within.detach()
        return self._own[1]

    def sees(self, tensors: Sequence[Tensor]) -> bool:
        """Whether :meth:`read` gives a view of these tensors."""
        return tensors[0].dtype == self.dtype and self.bucket.within(self._here(tensors[:1])[0]) is not None

    def blank(self) -> Tensor:
        """Where to write what is to be :meth:`put`: whatever stands in it."""
        return self.scratch.flat("mean", (self.bucket.size,), self.dtype, self.params[0].device) if self.own is None else self.own

    @property
    def rounds(self) -> bool:
        """Whether the parameters hold less than what is reckoned with."""
        return self.params[0].dtype.itemsize < self.dtype.itemsize

    @property
    def exact(self) -> Tensor | None:
        """The block that holds exactly what the parameters hold rounded, where there is one."""
        return self.flats.get("mean") if self.rounds else None

    def follow(self) -> None:
        """Whoever wrote into the parameters is obeyed: what they hold is exact where it is not what was rounded."""
        if self.exact is not None:
            self.exact.copy_(followed(self.exact, self.read(self.params, "mean").to(self.params[0].dtype)))

    def mean(self) -> Tensor:
        """What stands in the parameters, flat, shape (size,): a view of them, or a copy in scratch; see :meth:`put`."""
        if self.exact is not None:
            return self.exact
        return self.read(self.params, "mean") if self.own is None else self.own

    def put(self, flat: Tensor, only: frozenset[int] | None = None, name: str = "mean", dither: Noise | None = None) -> None:
        """Write a flat tensor into the parameters, or into some of them; nothing is to be done for :meth:`mean` of a view.

        Args:
            flat: Shape (size,).
            only: The numbers of the parameters to be written; None is all.
            name: Under which the cut of this tensor is remembered.
            dither: By which numbers are rounded by chance where parameters round; None rounds to the nearest.
        """
        if self.exact is not None and flat is not self.exact:
            self.keep(flat, self.exact, only)
        if self.rounds and dither is not None:
            rounded = self.scratch.flat("rounded", flat.shape, self.dtype, flat.device)
            flat, name = rounded.copy_(stochastic(flat, dither.uniform(flat), self.params[0].dtype)), "rounded"
        if self.own is None:
            self.write(flat, self.params, only, name)
        elif flat is not self.own:
            self.own.copy_(flat)

    def read(self, tensors: Sequence[Tensor], name: str) -> Tensor:
        """One flat tensor, shape (size,), out of one for each parameter: a view of it, or a copy in the scratch of that name."""
        tensors = self._here(tensors)
        within = self.bucket.within(tensors[0]) if tensors[0].dtype == self.dtype else None
        if within is not None:
            return within
        flat = self.scratch.flat(name, (self.bucket.size,), self.dtype, self.params[0].device)
        torch._foreach_copy_(self._cut(name, flat), self.bucket.pieces(tensors))
        return flat

    def write(self, flat: Tensor, tensors: Sequence[Tensor], only: frozenset[int] | None, name: str) -> None:
        """Copy a flat tensor back, in place: storage, memory format and tied views of the tensors stay as they are.

        Args:
            flat: Shape (size,).
            tensors: One for each parameter.
            only: The numbers of those to be written; None is all.
            name: Under which the cut of this tensor is remembered.
        """
        pieces, views = self.bucket.pieces(self._here(tensors)), self._cut(name, flat)
        if only is not None:
            pieces, views = [pieces[i] for i in sorted(only)], [views[i] for i in sorted(only)]
        torch._foreach_copy_(pieces, views)

    def holds(self, flat: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether a flat tensor is equal to one tensor for each parameter, element by element."""
        tensors = self._here(tensors)
        return all(map(torch.equal, self.bucket.views(flat, tensors), (t.to(self.dtype) for t in self.bucket.pieces(tensors))))

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two flat tensors over what belongs to parameters."""
        pieces = zip(self.views(a), self.views(b), strict=True)
        return float(sum(x.reshape(-1).dot(y.reshape(-1)) for x, y in pieces))

    def keep(self, flat: Tensor, block: Tensor, only: frozenset[int] | None) -> None:
        """Copy a flat tensor into a block of the plot, or what of it belongs to some parameters."""
        if only is None:
            block.copy_(flat)
        else:
            new, old = self.views(flat), self.views(block)
            for i in only:
                old[i].copy_(new[i])

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor, shape (size,), cut into what belongs to each parameter."""
        return self.bucket.views(flat, self.local)

    def joined(self, flat: Tensor) -> Tensor:
        """A copy of what of a flat tensor belongs to parameters, without anything idle."""
        return torch.cat([view.reshape(-1) for view in self.views(flat)])

    def scatter(self, joined: Tensor, flat: Tensor, scales: Sequence[float]) -> None:
        """Put what :meth:`joined` gave back into a flat tensor, times a factor for each parameter."""
        views = self.views(flat)
        for view, part, scale in zip(views, joined.split([view.numel() for view in views]), scales, strict=True):
            torch.mul(part.view(view.shape), scale, out=view)

    def _cut(self, name: str, flat: Tensor) -> list[Tensor]:
        known = self._views.get(name)
        if known is None or known[0].data_ptr() != flat.data_ptr():
            known = self._views[name] = flat, self.views(flat)
        return known[1]

    def flat(self, name: str) -> Tensor:
        """A block of the plot's own, shape (size,); zeros at first."""
        if name not in self.flats:
            with torch.inference_mode(False):  # it must outlive an evaluation in inference mode
                self.flats[name] = here(self.params[0]).new_zeros(self.bucket.size, dtype=self.dtype)
        return self.flats[name]

    def drop(self, name: str) -> None:
        """Give the memory of a block of the plot's own back."""
        self.flats.pop(name, None)
        self._views.pop(name, None)

    def shared(self, name: str, states: Sequence[dict[str, Any]], fill: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """A block of the state, shape (size,), in the memory of ``state[name]`` of every parameter.

        Whoever put another tensor into a state (a checkpoint, a tool) is obeyed: its values are taken over.
        """
        held, owners, dtype = [state.get(name) for state in states], self.owners.get(name, ()), dtype or self.dtype
        if len(owners) != len(held) or not all(map(operator.is_, owners, held)) or self.flats[name].dtype != dtype:
            self._share(name, states, fill, dtype)
        return self.flats[name]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _share(self, name: str, states: Sequence[dict[str, Any]], fill: float, dtype: torch.dtype) -> None:
        stretch, param = self.bucket.stretches[0], self.params[0]
        local = here(param)
        if stretch.count < local.numel():  # a piece of a large tensor: the tensor owns the memory, with room before it
            held = here(states[0][name]) if name in states[0] else None
            fits = held is not None and held.dtype == dtype and held.device == local.device and held.is_contiguous()
            if held is None or not fits or held.storage_offset() < stretch.at:
                fresh = local.new_full((stretch.at + local.numel(),), fill, dtype=dtype)[stretch.at :].view(local.shape)
                states[0][name] = shared_out(fresh if held is None else fresh.copy_(held), param)
                held = fresh
            begin = held.storage_offset() + stretch.start - stretch.at
            self.flats[name] = held.as_strided((self.bucket.size,), (1,), begin)
        else:
            flat = local.new_full((self.bucket.size,), fill, dtype=dtype)
            for p, state, view in zip(self.params, states, self.views(flat), strict=True):
                state[name] = shared_out(view.copy_(here(state[name])) if name in state else view, p)
            self.flats[name] = flat
        self.owners[name] = [state[name] for state in states]


def plots(params: Sequence[tuple[int, Tensor]], scratch: Scratch, limit: int, apart: bool = False) -> list[Plot]:
    """Deal parameters, each with its noise address, into plots of one dtype and device; or each into one of its own."""
    if apart:
        whole = max(2 * BLOCK, *(2 * whole_blocks(p.numel()) for _, p in params), limit)
        return [plot for member in params for plot in plots([member], scratch, whole)]
    kinds: dict[Any, list[tuple[int, Tensor]]] = {}
    for start, p in params:
        kinds.setdefault((p.dtype, p.device), []).append((start + beginning(p), p))
    made = []
    for (dtype, _), members in kinds.items():
        for bucket in buckets([here(p) for _, p in members], limit, [start % BLOCK for start, _ in members]):
            within = [members[i] for i in bucket.members]
            wide = torch.promote_types(dtype, torch.float32)
            cut = any(is_shared_out(p) for _, p in within)
            made.append(Plot([p for _, p in within], tuple(n for n, _ in within), bucket, wide, scratch, cut))
    return made
