"""Ranges of hyper-parameters, as data; every group is held to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..posterior import Posterior
from ..shards import is_shared_out


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, each inside or outside; "(0, inf]" prints as it reads."""

    text: str

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            return False
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        number = float(value)
        above = number > low or (self.text[0] == "[" and number == low)
        below = number < high or (self.text[-1] == "]" and number == high)
        return above and below and not math.isnan(number)

    def __str__(self) -> str:
        return f"a number in {self.text}"


@dataclass(frozen=True)
class Pair:
    """Two numbers, each in its range."""

    first: Range
    second: Range

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 2 and value[0] in self.first and value[1] in self.second

    def __str__(self) -> str:
        return f"two numbers in {self.first.text} and {self.second.text}"


@dataclass(frozen=True)
class Count:
    """Whole numbers from a least one."""

    least: int

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= self.least

    def __str__(self) -> str:
        return f"a whole number >= {self.least}"


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return any(value is v or (type(value) is type(v) and value == v) for v in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class OrNone:
    """None, or what another range holds."""

    inner: Range

    def __contains__(self, value: Any) -> bool:
        return value is None or value in self.inner

    def __str__(self) -> str:
        return f"None or {self.inner}"


SWITCH = OneOf((True, False))
AT_LEAST_ZERO = Range("[0, inf)")
POSITIVE = Range("(0, inf)")
FRACTION = Range("[0, 1)")
WHOLE = Count(-(2**63))

Allowed = Range | Pair | Count | OneOf | OrNone


HOW: dict[str, Any] = dict(prior=None, noise=None, compile="auto", memory="default", sync="auto", noise_per_rank=False)
"""Arguments that are no hyper-parameters, as they are where a constructor does not have them."""

OF_GROUPS: dict[str, Any] = dict(seed=0, noise_scale=1, adamw=False)
"""Hyper-parameters that no constructor need have."""


def is_numeric(allowed: Allowed) -> bool:
    """Whether any number between two bounds is allowed."""
    return isinstance(allowed, Range | Pair) or (isinstance(allowed, OrNone) and isinstance(allowed.inner, Range))


def needed(optimizer: str, name: str, value: Any, what: str) -> Any:
    """A hyper-parameter without a default, though it stands behind one that has one.

    Raises:
        TypeError: It was not given.
    """
    if value is None:
        raise TypeError(f"{optimizer} needs {name}: {what}")
    return value


def check_arguments(optimizer: str, prior: Any, noise: Any, memory: Any, noise_per_rank: bool) -> None:
    """Raise a TypeError or ValueError for arguments that are nothing of the kind, or that exclude one another."""
    if memory not in ("default", "low"):
        raise ValueError(f"{optimizer}: memory must be 'default' or 'low', got {memory!r}")
    if noise is not None and not callable(noise):
        raise TypeError(f"{optimizer}: noise must be a function of a parameter, got {noise!r}")
    if prior is not None and not isinstance(prior, Posterior):
        raise TypeError(f"{optimizer}: prior must be a Posterior, got {prior!r}")
    if memory == "low" and noise:
        raise ValueError(f"{optimizer}: memory='low' makes its noise again, so it takes no noise=; drop one of them")
    if memory == "low" and noise_per_rank:
        raise ValueError(
            f"{optimizer}: with memory='low' the mean returns rounded by the noise, which noise_per_rank=True makes another on "
            "every rank; drop one of them"
        )


def validate(optimizer: str, number: int, group: Mapping[str, Any], ranges: Mapping[str, Allowed]) -> None:
    """Raise a ValueError that names optimizer, group, hyper-parameter, value and range, if one is outside its range."""
    if "betas" in ranges and (strange := {"beta1", "beta2"} & set(group)):
        raise ValueError(f"{optimizer}: parameter group {number}: {min(strange)} is not read; write betas=(beta1, beta2)")
    if group.get("adamw") and "adamw" not in ranges:
        raise ValueError(f"{optimizer}: parameter group {number} is for AdamW, which is a group of EVON's; drop adamw=True")
    for name, allowed in ranges.items():
        if name not in group:
            raise ValueError(f"{optimizer}: parameter group {number} has no {name}: it belongs to another optimizer")
        if group[name] not in allowed:
            raise ValueError(f"{optimizer}: parameter group {number}: {name} must be {allowed}, got {group[name]!r}")


def check_group(optimizer: str, number: int, group: Mapping[str, Any], ranges: Mapping[str, Allowed], whole: bool) -> None:
    """Raise a ValueError or TypeError for a group whose hyper-parameters or parameters cannot be used.

    With ``whole``, parameters must not lie on several processes in parts.
    """
    validate(optimizer, number, group, ranges)
    if whole and any(map(is_shared_out, group["params"])):
        raise ValueError(
            f"{optimizer} needs whole tensors, and these lie on several processes in parts; use IVON, or DistributedDataParallel"
        )
    if any(p.layout != torch.strided for p in group["params"]):
        raise TypeError(f"{optimizer}: parameter group {number} has sparse parameters; make them dense")
    if any(p.is_complex() for p in group["params"]):
        raise TypeError(f"{optimizer}: parameter group {number} has complex parameters; split them into real ones")


def analyzed(group: Mapping[str, Any], ranges: Mapping[str, Allowed]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The numbers of a group that are inputs, and its structure: everything else.

    A schedule may lead the learning rate through 0, so it is always an input.
    """
    numbers: dict[str, Any] = {}
    structure: list[Any] = []
    for name, allowed in ranges.items():
        value = group[name]
        if name == "seed":  # an input of its own
            continue
        for index, number in enumerate(value) if isinstance(value, list | tuple) else ((None, value),):
            if is_numeric(allowed) and number is not None and (name == "lr" or float(number) not in (0.0, math.inf)):
                numbers[name if index is None else f"{name}[{index}]"] = float(number)
            else:
                structure.append((name, index, float(number) if isinstance(number, Tensor) else number))
    return numbers, tuple(structure)
