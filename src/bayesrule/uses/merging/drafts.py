"""Folders that appear whole or not at all, and whose making goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from ...storage import write_text

JOURNAL, LOCK = ".journal.json", ".lock"


@dataclass
class Draft:
    """A folder in the making, beside the place where it will be.

    Args:
        folder: Where it is now.
        request: What is being made; a later process goes on only if it asks for the same.
        done: How much of it is on the disk.
        notes: What else is to be known to go on, as JSON has it.
    """

    folder: Path
    request: str
    done: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, done: int, notes: Mapping[str, Any]) -> None:
        """Note what is on the disk."""
        self.done, self.notes = done, notes
        write_text(self.folder / JOURNAL, json.dumps({"request": self.request, "done": done, "notes": notes}))


@contextmanager
def drafting(out: Path, request: str) -> Iterator[Draft]:
    """A draft that takes the name ``out`` when the block succeeds.

    Where the block is interrupted, by Ctrl-C or by the death of the process, the draft stays, and a later one with the same request
    goes on with it. Where it fails, by a full disk or anything else, nothing stays.

    Raises:
        FileExistsError: ``out`` holds something, or its draft is of another request.
        OSError: It cannot be written; the message names ``out``.
    """
    folder = out.with_name(f".{out.name}.draft")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} already exists; choose another place or delete it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, os.strerror(error.errno or 0), str(out)) from error
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FileExistsError(f"another process is making {out}; wait for it, or choose another place") from None
    try:
        yield _draft(folder, request)
        for name in (JOURNAL, LOCK):
            (folder / name).unlink(missing_ok=True)
        os.replace(folder, out)
    except Exception as error:
        if not isinstance(error, Another):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and str(error.filename or folder).startswith(str(folder)):
            raise type(error)(error.errno, os.strerror(error.errno), str(out)) from error
        raise
    finally:
        lock.release()


class Another(FileExistsError):
    """The draft is of another request."""


def _draft(folder: Path, request: str) -> Draft:
    try:
        found = json.loads((folder / JOURNAL).read_text())
        draft = Draft(folder, found["request"], int(found["done"]), dict(found["notes"]))
    except (OSError, ValueError, KeyError, TypeError):  # nothing was noted
        for path in folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        return Draft(folder, request)
    if draft.request != request:
        raise Another(f"{folder} is the unfinished merge of something else; repeat that, or delete the folder")
    return draft
