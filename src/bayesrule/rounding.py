"""Numbers in fewer bits: rounded to one of their two neighbours by chance, so that they stay right on average.

A sample that differs from its mean by less than half of the last place would be rounded back to it; rounded by chance it is
m + n in expectation, given the offset n, so what is learned from a gradient at it has no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic(x: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of a 16-bit dtype, in the dtype of ``x``: one of the two neighbours of each, the nearer the likelier.

    What the dtype holds is left as it is. What is finite stays finite.

    Args:
        x: In float32.
        uniform: As many numbers in (0, 1).
        dtype: bfloat16 or float16.

    Example:
        >>> x = torch.full((4,), 1 + 2**-9)
        >>> stochastic(x, torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.bfloat16)
        tensor([1.0078, 1.0078, 1.0000, 1.0000])
    """
    most = torch.finfo(dtype).max
    bounded = torch.where(x.isfinite(), x.clamp(-most, most), x)
    near = bounded.to(dtype)
    rest = bounded - near.to(x.dtype)
    other = _neighbour(near, rest > 0).to(x.dtype)
    near = near.to(x.dtype)
    return torch.where(uniform * (other - near).abs() < rest.abs(), other, near)


def _neighbour(x: Tensor, up: Tensor) -> Tensor:
    """The next number above or below, of a dtype of 16 bits: bit patterns count numbers away from zero."""
    bits = x.view(torch.int16)
    away = (bits >= 0) == up
    moved = torch.where(away, bits + 1, bits - 1)
    least = torch.where(up, 1, -(2**15) + 1).to(torch.int16)  # beside zero, of either sign
    return torch.where(x == 0, least, moved).view(x.dtype)


def followed(exact: Tensor, held: Tensor) -> Tensor:
    """Numbers that are held rounded: the exact ones where they are held, and what is held wherever somebody changed it."""
    wide = held.to(exact.dtype)
    return torch.where(exact.to(held.dtype).to(exact.dtype) == wide, exact, wide)


def place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each number to the next larger one in a dtype."""
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp_min(kind.tiny))
    return torch.ldexp(torch.full_like(x, kind.eps / 2), exponent)
