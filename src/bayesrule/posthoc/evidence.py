"""The precision of an isotropic prior that makes the data most probable, by Laplace's approximation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_precision(spectra: Sequence[Tensor], squared_norm: float) -> float:
    r"""Where Laplace's log evidence is largest in the precision delta of a prior N(0, 1/delta), for given mean and curvature.

    .. math::  \log Z(\delta) = \tfrac12 \Bigl( P \log \delta - \sum_j \log(h_j + \delta) - \delta |m|^2 \Bigr) + \ldots, \quad
               \sum_j \frac{h_j}{h_j + \delta} = \delta |m|^2,

    h_j the eigenvalues of the curvature. The left side of the second falls in delta and the right rises, so that there is one
    maximum; it is bisected in float64. Costs 200 sums over the spectrum.

    Args:
        spectra: The h_j >= 0, in tensors of any shape.
        squared_norm: |m|^2 of the weights that the curvature is of.

    Raises:
        ValueError: There is no maximum: all weights or all curvatures are zero.

    Example:
        >>> round(best_precision([torch.tensor([3.0, 3.0])], 1.0), 6)
        1.372281

    Source: D. MacKay (1992), Bayesian interpolation; A. Immer et al. (2021), arXiv:2104.04975.
    """
    h = torch.cat([s.reshape(-1).double().cpu() for s in spectra]).clamp(min=0)
    if not squared_norm > 0 or not float(h.sum()) > 0:
        raise ValueError(
            "the marginal likelihood has no maximum in prior_precision: all weights, or all curvatures, are zero; pass a number"
        )
    low, high = math.log(1e-30), math.log(len(h) / squared_norm) + 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        delta = math.exp(middle)
        if float((h / (h + delta)).sum()) > delta * squared_norm:
            low = middle
        else:
            high = middle
        if high - low < 1e-12:
            break
    return math.exp((low + high) / 2)
