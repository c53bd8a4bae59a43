"""Gauss-Hermite nodes and weights."""

from __future__ import annotations

from functools import lru_cache

from numpy.polynomial.hermite_e import hermegauss


@lru_cache(maxsize=64)
def gauss_hermite(nodes: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of E[g(x)] under x ~ N(0, 1): plain numbers, which suit every dtype and device.

    Raises:
        ValueError: ``nodes`` is not a whole number from 1 to 200.
    """
    if not (isinstance(nodes, int) and 1 <= nodes <= 200):
        raise ValueError(f"nodes must be a whole number from 1 to 200, got {nodes!r}")
    at, weights = hermegauss(nodes)
    return tuple(zip(at.tolist(), (weights / weights.sum()).tolist(), strict=True))
