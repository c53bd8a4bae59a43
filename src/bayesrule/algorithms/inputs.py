"""What users give: arrays of numbers, whoever made them, as tensors that are known to be finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def numbers(values: Any, name: str) -> Tensor:
    """An array of numbers, whoever made it, as a tensor; of Python's numbers, in double precision."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        if array.dtype == object:  # numbers of several kinds, or none at all
            raise TypeError
        return torch.as_tensor(array)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers, got {type(values).__name__}") from None


def demand_finite(values: Tensor, name: str) -> None:
    """Raise ValueError unless all numbers are finite. One pass: what is not finite shows in the sum."""
    if not values.sum().isfinite() and (bad := int((~values.isfinite()).sum())):
        raise ValueError(f"{name} has {bad} entries that are not finite; remove or impute them")
