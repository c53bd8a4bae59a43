"""What is found batch by batch, kept in a file from which a later call goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..storage import write_tensors

EVERY = 30.0
"""Seconds between two writes."""


class Column:
    """A tensor that grows by rows, in place: many small ones would each hold a page of what was freed around them.

    Args:
        rows: The first of them.
    """

    def __init__(self, rows: Tensor) -> None:
        self._held, self._count = rows, len(rows)

    @property
    def rows(self) -> Tensor:
        """All so far."""
        return self._held[: self._count]

    def append(self, rows: Tensor) -> None:
        """More of them."""
        count = self._count + len(rows)
        if count > len(self._held):
            held = self._held.new_empty(max(count, 2 * len(self._held)), *self._held.shape[1:])
            held[: self._count] = self.rows
            self._held = held
        self._held[self._count : count] = rows
        self._count = count


class Journal:
    """Tensors with a row for each example, found in order.

    Args:
        path: Where they are kept; None is nowhere.
        about: What they belong to.
        names: Of the tensors.

    Raises:
        ValueError: The file is no such thing, or belongs to something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any], names: Sequence[str]) -> None:
        self.path, self.about = None if path is None else Path(path), dict(about)
        self._names = (*names, "labels", "marks")
        self._columns: dict[str, Column] = {}
        self._rows, self._written = 0, time.monotonic()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "null"))
                found = {name: file.get_tensor(name) for name in self._names}
        except Exception as error:
            raise ValueError(f"{str(path)!r} is no file of scores ({error}); remove it, or name another") from error
        if odd := [key for key, value in self.about.items() if (about or {}).get(key) != value]:
            raise ValueError(f"{str(path)!r} holds scores of another {odd[0]}; remove it, or name another file")
        self._columns = {name: Column(tensor) for name, tensor in found.items()}
        self._rows = len(found["labels"])

    def known(self, first: int, labels: Tensor, marks: Tensor) -> int:
        """How many of the examples from ``first`` on were found before.

        Raises:
            ValueError: They were others.
        """
        count = min(max(self._rows - first, 0), len(labels))
        here = {"labels": labels[:count].cpu(), "marks": marks[:count]}
        if count and not all(torch.equal(self._columns[name].rows[first : first + count], t) for name, t in here.items()):
            raise ValueError(f"{str(self.path)!r} holds scores of other data; remove it, or name another file")
        return count

    def add(self, found: Mapping[str, Tensor], labels: Tensor, marks: Tensor) -> None:
        """The next examples."""
        for name, tensor in {**found, "labels": labels.detach().cpu(), "marks": marks}.items():
            if name in self._columns:
                self._columns[name].append(tensor)
            else:
                self._columns[name] = Column(tensor.clone())
        self._rows += len(labels)
        if self.path is not None and time.monotonic() - self._written > EVERY:
            self._write()

    def finish(self, examples: int) -> dict[str, Tensor]:
        """All of them."""
        if self._rows != examples:
            raise ValueError(f"{str(self.path)!r} holds scores of {self._rows} examples, and the data have {examples}; remove it")
        if self.path is not None:
            self._write()
        return {name: column.rows.clone() for name, column in self._columns.items() if name not in ("labels", "marks")}

    def _write(self) -> None:
        assert self.path is not None
        write_tensors(
            self.path, {n: column.rows.contiguous() for n, column in self._columns.items()}, {"about": json.dumps(self.about)}
        )
        self._written = time.monotonic()


def marks_of(inputs: Any, examples: int) -> Tensor:
    """A number for each example by which its inputs are known again, shape (n,)."""
    total = torch.zeros(examples, dtype=torch.float64)
    for x in tree_leaves(inputs):
        if isinstance(x, Tensor) and x.dim() and len(x) == examples:
            flat = x.detach().cpu().reshape(examples, math.prod(x.shape[1:])).double()
            total += flat @ torch.arange(1, flat.shape[1] + 1, dtype=torch.float64).cos()
    return total
