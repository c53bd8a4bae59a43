"""Where the parameters of an optimizer lie flat, and what one call of the rule works on.

A :class:`Plot` is a bucket of parameters with everything that is kept for them, each block one flat tensor. What belongs
to the optimizer's state shares memory with ``opt.state[p]``, so the state is per parameter for whoever looks, and flat for
the rule. A :class:`Cell` is a visit to a plot: those of its parameters that have made the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import BayesRule
from ..vector import Bucket, buckets


@dataclass
class Plot:
    """A bucket of parameters and the flat blocks that are kept for them."""

    params: list[Tensor]
    starts: tuple[int, ...]  # of each parameter, in the space of noise addresses
    bucket: Bucket
    dtype: torch.dtype
    flats: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, list[Tensor]] = field(default_factory=dict)

    def flat(self, name: str) -> Tensor:
        """A block of the plot's own, shape (size,); zeros at first."""
        if name not in self.flats:
            with torch.inference_mode(False):  # it must outlive an evaluation in inference mode
                self.flats[name] = self.params[0].new_zeros(self.bucket.size, dtype=self.dtype)
        return self.flats[name]

    def shared(self, name: str, states: Sequence[dict[str, Any]], fill: float = 0.0) -> Tensor:
        """A block of the state, shape (size,), in the memory of ``state[name]`` of every parameter.

        Whoever put another tensor into a state (a checkpoint, a tool) is obeyed: its values are taken over.
        """
        owners = self.owners.get(name, ())
        if len(owners) != len(states) or any(s.get(name) is not o for s, o in zip(states, owners, strict=True)):
            self._share(name, states, fill)
        return self.flats[name]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _share(self, name: str, states: Sequence[dict[str, Any]], fill: float) -> None:
        stretch, param = self.bucket.stretches[0], self.params[0]
        if stretch.count < param.numel():  # a piece of a large tensor: the tensor owns the memory
            held = states[0].get(name)
            if held is None or held.dtype != self.dtype or held.device != param.device or not held.is_contiguous():
                fresh = param.new_full(param.shape, fill, dtype=self.dtype)
                states[0][name] = fresh if held is None else fresh.copy_(held)
            self.flats[name] = states[0][name].view(-1)[stretch.start : stretch.start + stretch.count]
        else:
            flat = param.new_full((self.bucket.size,), fill, dtype=self.dtype)
            views = [v.view(p.shape) for v, p in zip(self.bucket.split(flat), self.params, strict=True)]
            for state, view in zip(states, views, strict=True):
                state[name] = view.copy_(state[name]) if name in state else view
            self.flats[name] = flat
        self.owners[name] = [state[name] for state in states]


class Cell(NamedTuple):
    """Parameters of one plot that have made the same number of steps: what one call of the rule works on.

    The rule computes the whole plot; only what belongs to the cell is kept.
    """

    plot: Plot
    group: dict[str, Any]
    rule: BayesRule
    step: int  # steps done
    remembers: bool  # whether there is a memory of earlier steps
    only: frozenset[int] | None  # the members that belong to the cell; None is all

    @property
    def params(self) -> list[Tensor]:
        """The parameters that belong to the cell."""
        return [p for i, p in enumerate(self.plot.params) if self.only is None or i in self.only]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One flat tensor out of one for each of the plot's parameters, in the dtype of their state; for reading."""
        return self.plot.bucket.gather(tensors, self.plot.dtype)

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a flat tensor back, in place."""
        self.plot.bucket.scatter(flat, tensors, self.only)

    def keep(self, flat: Tensor, block: Tensor) -> None:
        """Copy a flat tensor into a block of the plot."""
        if self.only is None:
            block.copy_(flat)
        else:
            for i, (new, old) in enumerate(zip(self.plot.bucket.split(flat), self.plot.bucket.split(block), strict=True)):
                if i in self.only:
                    old.copy_(new)


def plots(params: Sequence[tuple[int, Tensor]]) -> list[Plot]:
    """Deal parameters, each with its noise address, into plots of one dtype and device."""
    kinds: dict[Any, list[tuple[int, Tensor]]] = {}
    for start, p in params:
        kinds.setdefault((p.dtype, p.device), []).append((start, p))
    made = []
    for (dtype, _), members in kinds.items():
        for bucket in buckets([p for _, p in members]):
            within = [members[i] for i in bucket.members]
            wide = torch.promote_types(dtype, torch.float32)
            made.append(Plot([p for _, p in within], tuple(n for n, _ in within), bucket, wide))
    return made
