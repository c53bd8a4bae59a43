r"""Noise as a pure function of (seed, stream, step, draw, tensor, element).

Nothing is stored and no generator moves on: the same address gives the same number whatever was drawn before, on any
number of threads, in any bucket, on CPU and GPU (integers to the bit; normals to a few units in the last place, as the
devices' ``log`` and ``cos`` round differently). So a run resumes exactly and a skipped step can be drawn again.

The tensors of a model lie behind one another in one space of addresses, each from an even address (:func:`addresses`).
The elements at :math:`2j` and :math:`2j+1` share two 32-bit words

.. math::  w_k = H(H(j + a) + b_k), \qquad k = 0, 1,

with :math:`a, b_0, b_1` hashed from (seed, stream, step, draw), and :math:`H` a 32-bit mixer (two multiplications, three
shifts; constants of the "lowbias32" family by C. Wellons and T. Ettinger). Box and Muller turn the pair into two unit
normals; their largest possible size is 6.6.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .vector import Bucket, Vector

TRAIN, EVALUATE, POSTERIOR = range(3)
"""Streams: draws that are learned from, draws that only look, draws from a :class:`~bayesrule.Posterior`."""


class Noise(ABC):
    """A source of random numbers, shaped like what it is asked for."""

    @abstractmethod
    def normal(self, like: Any) -> Any:
        """Unit normals with the shape, dtype and device of ``like`` (a tensor or a :class:`Vector`)."""

    @abstractmethod
    def uniform(self, like: Any) -> Any:
        """Uniform numbers in the open interval (0, 1), shaped like ``like``."""

    @abstractmethod
    def at(self, *, step: int | None = None, draw: int | None = None) -> Noise:
        """The same source at another step or draw."""


def addresses(sizes: Iterable[int]) -> list[int]:
    """Where tensors of these sizes begin in the space of addresses: one behind the other, each at an even address.

    Example:
        >>> addresses([3, 4, 1])
        [0, 4, 8]
    """
    return list(accumulate((size + size % 2 for size in sizes), initial=0))[:-1]


@dataclass(frozen=True)
class Run:
    """Consecutive addresses: ``count`` elements from ``address`` lie at ``at``; all even, but for the last count."""

    address: int
    at: int
    count: int


@dataclass(frozen=True)
class CounterNoise(Noise):
    """Counter-based noise; see the module.

    Args:
        seed: Any integer.
        stream: Keeps uses apart that share a seed (:data:`TRAIN`, :data:`EVALUATE`, :data:`POSTERIOR`).
        step: Steps done.
        draw: Draws done within the step.
        runs: Which addresses the elements of a flat tensor have; None: those of the first tensor of a model. The parts of a
            :class:`Vector` have the addresses of a model's tensors, in order.

    Example:
        >>> CounterNoise(seed=1).normal(torch.zeros(2))
        tensor([-0.1344, -0.2135])
    """

    seed: int = 0
    stream: int = TRAIN
    step: int = 0
    draw: int = 0
    runs: tuple[Run, ...] | None = None

    def at(self, *, step: int | None = None, draw: int | None = None) -> CounterNoise:
        return replace(self, step=self.step if step is None else step, draw=self.draw if draw is None else draw)

    def on(self, bucket: Bucket, starts: Sequence[int]) -> CounterNoise:
        """The noise of a flat bucket whose i-th member begins at the address ``starts[i]``."""
        runs: list[Run] = []
        for s in bucket.stretches:
            address, last = starts[s.tensor] + s.start, runs[-1] if runs else None
            if last is not None and address - last.address == s.at - last.at:
                runs[-1] = replace(last, count=s.at - last.at + s.count)
            else:
                runs.append(Run(address, s.at, s.count))
        return replace(self, runs=tuple(runs))

    def normal(self, like: Any) -> Any:
        if isinstance(like, Vector):
            return Vector([part.normal(tensor) for part, tensor in self._parts(like)])
        first, second = self._words(like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        radius = _unit(first, dtype).log_().mul_(-2).sqrt_()
        angle = second.to(dtype).mul_(math.pi * 2**-31)
        return _trim(angle.cos().mul_(radius), angle.sin_().mul_(radius), like)

    def uniform(self, like: Any) -> Any:
        if isinstance(like, Vector):
            return Vector([part.uniform(tensor) for part, tensor in self._parts(like)])
        dtype = torch.promote_types(like.dtype, torch.float32)
        kind = torch.finfo(like.dtype)
        first, second = (_unit(word, dtype).clamp_(kind.tiny, 1 - kind.eps / 2) for word in self._words(like))
        return _trim(first, second, like)

    def _parts(self, like: Vector) -> Iterator[tuple[CounterNoise, Tensor]]:
        for start, part in zip(addresses(part.numel() for part in like), like, strict=True):
            yield replace(self, runs=(Run(start, 0, part.numel()),)), part

    @cached_property
    def _key(self) -> tuple[int, ...]:
        numbers = repr((self.seed, self.stream, self.step, self.draw)).encode()
        return struct.unpack("<3i", hashlib.blake2b(numbers, digest_size=12).digest())

    def _words(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two int32 words for every pair of elements of ``like``, each of shape (pairs,)."""
        a, b0, b1 = self._key
        pairs = torch.arange((like.numel() + 1) // 2, dtype=torch.int32, device=like.device)
        for run in self.runs or (Run(0, 0, like.numel()),):
            pairs[run.at // 2 : (run.at + run.count + 1) // 2].add_(_wrap((run.address - run.at) // 2 + a))
        words, spare = torch.empty((2, 2, len(pairs)), dtype=torch.int32, device=like.device)
        common = _mix(pairs, spare[0])
        torch.add(common, b0, out=words[0])
        torch.add(common, b1, out=words[1])
        first, second = _mix(words, spare)
        return first, second


def _trim(even: Tensor, odd: Tensor, like: Tensor) -> Tensor:
    """The numbers of even and odd addresses in turn, as a tensor like another; the last is left over where that is odd."""
    flat = torch.view_as_real(torch.complex(even, odd)).view(-1)
    return flat[: like.numel()].view(like.shape).to(like.dtype)


def _wrap(number: int) -> int:
    """A whole number brought back to 32 signed bits, as int32 tensors do by themselves."""
    return (number + 2**31) % 2**32 - 2**31


def _mix(word: Tensor, spare: Tensor) -> Tensor:
    """A bijection of 32-bit words that changes each output bit with probability near a half for each input bit.

    Works in place, with a spare tensor of the same kind.
    """
    for shift, mask, factor in ((16, 0xFFFF, 0x21F0AAAD), (15, 0x1FFFF, 0xD35A2D97 - 2**32)):
        word.bitwise_xor_(torch.bitwise_right_shift(word, shift, out=spare).bitwise_and_(mask)).mul_(factor)
    return word.bitwise_xor_(torch.bitwise_right_shift(word, 15, out=spare).bitwise_and_(0x1FFFF))


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in (0, 1], fine near zero: 31 bits and a half."""
    return word.bitwise_and_(0x7FFFFFFF).to(dtype).add_(0.5).mul_(2**-31)
