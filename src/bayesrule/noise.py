r"""Noise as a pure function of (seed, stream, step, draw, tensor, element).

Nothing is stored and no generator moves on: the same address gives the same number whatever was drawn before, on any
number of threads, in any bucket, on CPU and GPU (integers to the bit; normals to a few units in the last place, as the
devices' ``log`` and ``cos`` round differently). So a run resumes exactly and a skipped step can be drawn again.

Elements :math:`2j` and :math:`2j+1` of a tensor share two 32-bit words

.. math::  w_k = H(H(j \oplus (a_k + t_0)) + (b_k \oplus t_1)), \qquad k = 0, 1,

with :math:`a, b` hashed from (seed, stream, step, draw), :math:`t` from the tensor's number, and :math:`H` a 32-bit mixer
(two multiplications, three shifts; constants by C. Wellons and T. Ettinger, "lowbias32" family). Box and Muller turn the pair into two
unit normals; their largest possible size is 6.6.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .vector import Bucket, Stretch, Vector

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


@dataclass(frozen=True)
class CounterNoise(Noise):
    """Counter-based noise; see the module.

    Args:
        seed: Any integer.
        stream: Keeps uses apart that share a seed (:data:`TRAIN`, :data:`EVALUATE`, :data:`POSTERIOR`).
        step: Steps done.
        draw: Draws done within the step.
        places: What the elements of a flat tensor are, as stretches of numbered tensors; None: tensor number 0, whole.
            The parts of a :class:`Vector` are numbered in order.

    Example:
        >>> CounterNoise(seed=1).normal(torch.zeros(2))
        tensor([0.1006, 0.1107])
    """

    seed: int = 0
    stream: int = TRAIN
    step: int = 0
    draw: int = 0
    places: tuple[Stretch, ...] | None = None

    def at(self, *, step: int | None = None, draw: int | None = None) -> CounterNoise:
        return replace(self, step=self.step if step is None else step, draw=self.draw if draw is None else draw)

    def on(self, bucket: Bucket, numbers: tuple[int, ...]) -> CounterNoise:
        """The noise of a flat bucket whose i-th tensor has the number ``numbers[i]``."""
        return replace(self, places=tuple(s._replace(tensor=numbers[s.tensor]) for s in bucket.stretches))

    def normal(self, like: Any) -> Any:
        if isinstance(like, Vector):
            return Vector([self._part(number, part).normal(part) for number, part in enumerate(like)])
        first, second = self._words(like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        radius = (-2 * _unit(first, dtype).log()).sqrt()
        angle = second.to(dtype) * (math.pi * 2**-31)
        return self._pairs(radius * angle.cos(), radius * angle.sin(), like)

    def uniform(self, like: Any) -> Any:
        if isinstance(like, Vector):
            return Vector([self._part(number, part).uniform(part) for number, part in enumerate(like)])
        dtype = torch.promote_types(like.dtype, torch.float32)
        below_one = 1 - torch.finfo(like.dtype).eps / 2
        first, second = (_unit(word, dtype).clamp(max=below_one) for word in self._words(like))
        return self._pairs(first, second, like)

    def _part(self, number: int, part: Tensor) -> CounterNoise:
        return replace(self, places=(Stretch(number, 0, part.numel(), 0),))

    @staticmethod
    def _pairs(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
        flat = torch.stack((first, second), dim=-1).view(-1)
        return flat[: like.numel()].view(like.shape).to(like.dtype)

    @cached_property
    def _key(self) -> tuple[int, ...]:
        return _hash(self.seed, self.stream, self.step, self.draw)

    def _words(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two int32 words for every pair of elements of ``like``, each of shape (pairs,)."""
        places = self.places or (Stretch(0, 0, like.numel(), 0),)
        pairs = torch.arange((like.numel() + 1) // 2, dtype=torch.int32, device=like.device)
        rows: Any = [(s.start // 2 - s.at // 2, *_hash(s.tensor)[:2]) for s in places]
        if len(places) == 1:
            offset, t0, t1 = rows[0]
        else:
            counts = torch.tensor([(s.count + 1) // 2 for s in places], device=like.device)
            table = torch.tensor(rows, dtype=torch.int32, device=like.device)
            offset, t0, t1 = table.repeat_interleave(counts, dim=0, output_size=len(pairs)).unbind(dim=1)
        pairs = pairs + offset
        a0, a1, b0, b1 = self._key
        return _mix(_mix(pairs ^ _wrap(a0 + t0)) + (b0 ^ t1)), _mix(_mix(pairs ^ _wrap(a1 + t0)) + (b1 ^ t1))


@cache
def _hash(*numbers: int) -> tuple[int, ...]:
    """Four signed 32-bit words from whole numbers of any size."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=16).digest()
    return struct.unpack("<4i", digest)


def _wrap(word: Any) -> Any:
    """An integer sum brought back to 32 signed bits; int32 tensors wrap by themselves."""
    return (word + 2**31) % 2**32 - 2**31 if isinstance(word, int) else word


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words that changes each output bit with probability near a half for each input bit."""
    word = (word ^ ((word >> 16) & 0xFFFF)) * 0x21F0AAAD
    word = (word ^ ((word >> 15) & 0x1FFFF)) * (0xD35A2D97 - 2**32)
    return word ^ ((word >> 15) & 0x1FFFF)


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in (0, 1], fine near zero: 31 bits and a half."""
    return ((word & 0x7FFFFFFF).to(dtype) + 0.5) * 2**-31
