r"""Noise as a pure function of (seed, stream, step, draw, tensor, element).

Nothing is stored and no generator moves on: the same address gives the same number whatever was drawn before, on any
number of threads, in any bucket or shard, eager or compiled, on CPU and GPU. The words are the same to the bit; normals
agree to a few units in the last place (2e-6 for the largest), as ``log``, ``cos`` and ``sin`` round differently.
So a run resumes exactly, a skipped step can be drawn again, and noise can be made anew instead of kept.

The tensors of a model lie behind one another in one space of addresses, each from a whole block of 256
(:func:`addresses`). The elements k and k + 128 of a block are a pair. Pair number j of the space gets the 64-bit word

.. math::  w_j = \operatorname{mix}(\gamma j + \text{key}),

SplitMix64 as a function of its counter; the key is hashed from (seed, stream, step, draw). Box and Muller turn the upper and the
lower half of the word into two unit normals; their largest possible size is 6.66. Shifts are arithmetic here, which costs
one bit of 64 in each round and saves a mask: torch has no unsigned shift.

Source: G. Steele, D. Lea and C. Flood (2014), Fast splittable pseudorandom number generators; the constants of the mixer are
D. Stafford's variant 13.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .vector import BLOCK, Bucket, Vector, convert, head, whole_blocks

TRAIN, EVALUATE, POSTERIOR, PROBE, DITHER, REMEMBER, TOGETHER, BEGIN, OUTPUTS, DROPS = range(10)
"""Streams: draws that are learned from, draws that only look, draws from a :class:`~bayesrule.Posterior`, probes of a Hessian,
the rounding of a sample, the rounding of the momentum, draws of weights that vary together, where components begin, draws of
outputs, elements of a task vector that are dropped."""

_HALF = BLOCK // 2
_GAMMA, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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

    def apart(self, stream: int) -> Noise:
        """The same address in another stream."""
        raise TypeError(f"{type(self).__name__} has one stream only; use CounterNoise")

    def forked(self, like: Tensor) -> AbstractContextManager[None]:
        """torch's own generator on the device of ``like``, seeded from this address for a while, then put back.

        For samplers that reject (gamma and what is made of it): numbers repeat on one kind of device, not across kinds.
        """
        raise TypeError(f"{type(self).__name__} gives normals and uniforms only; use CounterNoise")


def addresses(sizes: Iterable[int]) -> list[int]:
    """Where tensors of these sizes begin in the space of addresses: one behind the other, each at a whole block.

    Example:
        >>> addresses([3, 400, 1])
        [0, 256, 768]
    """
    return list(accumulate(map(whole_blocks, sizes), initial=0))[:-1]


def pairs(bucket: Bucket, starts: Sequence[int]) -> tuple[int, list[int] | None]:
    """Which pairs the blocks of a flat bucket are made of, if its i-th member begins at the address ``starts[i]``.

    Returns:
        The number of the first pair; and, unless all follow from there, the number of every block's first pair, counted from
        that one.
    """
    begins = [(starts[s.tensor] + s.start) // BLOCK * _HALF for s in bucket.stretches]
    first, blocks = begins[0], list[int]()
    for s, begin in zip(bucket.stretches, begins, strict=True):
        blocks += range(begin - first, begin - first + whole_blocks(s.at % BLOCK + s.count) // 2, _HALF)
    blocks += [blocks[-1] + _HALF] * (whole_blocks(bucket.size) // BLOCK - len(blocks))
    return first, None if blocks == list(range(0, len(blocks) * _HALF, _HALF)) else blocks


class Where(NamedTuple):
    """The pairs of a flat tensor: numbers counted from the first, shape (128 blocks,), whole; the first; the tensor's dtype."""

    numbers: Any
    first: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class CounterNoise(Noise):
    """Counter-based noise; see the module.

    Args:
        seed: Any integer.
        stream: Keeps uses apart that share a seed (:data:`TRAIN`, :data:`EVALUATE`, :data:`POSTERIOR`).
        step: Steps done.
        draw: Draws done within the step.
        where: The pairs of a flat tensor that begins at a block; None: what is asked for is the first tensor of a model. The
            parts of a :class:`Vector` have the addresses of a model's tensors, in order.

    Example:
        >>> CounterNoise(seed=1).normal(torch.zeros(2))
        tensor([-2.9049, -0.7524])
    """

    seed: int = 0
    stream: int = TRAIN
    step: int = 0
    draw: int = 0
    where: Where | None = None

    def at(self, *, step: int | None = None, draw: int | None = None) -> CounterNoise:
        return replace(self, step=self.step if step is None else step, draw=self.draw if draw is None else draw)

    def apart(self, stream: int) -> CounterNoise:
        return replace(self, stream=stream)

    def normal(self, like: Any) -> Any:
        return self._shaped(like, _normals)

    def uniform(self, like: Any) -> Any:
        return self._shaped(like, _uniforms)

    @contextmanager
    def forked(self, like: Tensor) -> Iterator[None]:
        kind, seed = like.device.type, key(self.seed, self.stream, self.step, self.draw, 0)
        with torch.random.fork_rng([] if kind == "cpu" else [like.device], device_type="cuda" if kind == "cpu" else kind):
            if kind == "cpu":
                torch.default_generator.manual_seed(seed)
            else:
                with torch.device(like.device):
                    getattr(torch, kind).manual_seed(seed)
            yield

    def _shaped(self, like: Any, kind: Callable[[Any, torch.dtype], Any], first: int = 0) -> Any:
        if self.where is not None:
            return head(kind(self._word(self.where.numbers, self.where.first), self.where.dtype), like)
        if isinstance(like, Vector):
            starts = addresses(part.numel() for part in like)
            return Vector([self._shaped(part, kind, start // 2) for start, part in zip(starts, like, strict=True)])
        numbers = torch.arange(whole_blocks(like.numel()) // 2, dtype=torch.int32, device=like.device)
        flat = kind(self._word(numbers, first), torch.promote_types(like.dtype, torch.float32))
        found = flat[: like.numel()].view(like.shape).to(like.dtype)
        return _inside(found, like.dtype) if kind is _uniforms else found

    def _word(self, numbers: Any, first: Any) -> Any:
        """SplitMix64 of pair numbers counted from the first: int64, shape (blocks, pairs of a block), not negative."""
        word = convert(numbers.view(-1, _HALF), torch.int64) * _GAMMA + key(self.seed, self.stream, self.step, self.draw, first)
        word = (word ^ (word >> 30)) * _FIRST
        word = (word ^ (word >> 27)) * _SECOND
        return word ^ (word >> 31)


def key(seed: Any, stream: Any, step: Any, draw: Any, first: Any) -> Any:
    """What is added to the counters of a draw: 64 bits hashed from its address, moved on to the first pair."""
    numbers = (seed, stream, step, draw, first)
    if has_torch_function(numbers):
        return handle_torch_function(key, numbers, *numbers)
    digest = hashlib.blake2b(repr(numbers[:4]).encode(), digest_size=8).digest()
    return _wrap(int.from_bytes(digest, "little") + first * _GAMMA)


def _wrap(number: int) -> int:
    """A whole number brought back to 64 signed bits, as int64 tensors do by themselves."""
    return (number + 2**63) % 2**64 - 2**63


def _normals(word: Any, dtype: torch.dtype) -> Any:
    radius = (_unit(word, dtype).log() * -2).sqrt()
    angle = convert(convert(word, torch.int32), dtype) * (math.pi * 2**-31)
    return _paired(angle.cos() * radius, angle.sin() * radius)


def _uniforms(word: Any, dtype: torch.dtype) -> Any:
    second = convert(convert(word, torch.int32), dtype) * 2**-32 + 0.5
    return _paired(_inside(_unit(word, dtype), dtype), _inside(second, dtype))


def _inside(u: Any, dtype: torch.dtype) -> Any:
    """Numbers in [0, 1] kept strictly between: a dtype rounds to its ends."""
    kind = torch.finfo(dtype)
    return u.clamp(kind.tiny, 1 - kind.eps / 2)


def _unit(word: Any, dtype: torch.dtype) -> Any:
    """The upper half of a word as a number in (0, 1], fine near zero: 31 bits and a half."""
    return (convert(convert(word >> 32, torch.int32), dtype) + 0.5) * 2**-31


def _paired(first: Any, second: Any) -> Any:
    """The two numbers of every pair, in the order of their elements."""
    return torch.stack([first, second], 1).view(-1)
