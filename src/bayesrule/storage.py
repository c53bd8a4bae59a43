"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The temporary name of a file that takes the place of ``path`` when the block succeeds, and is removed when it fails.

    What was written is on the disk before the name changes: readers see the old file or the new, whatever dies when.

    Raises:
        OSError: If it cannot be written; it names ``path``.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers keep files to their owner
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


def is_draft(path: Path) -> bool:
    """Whether a file has the temporary name of one that was being written.

    Example:
        >>> is_draft(Path(".run.json.0123456789abcdef0123456789abcdef")), is_draft(Path(".profile"))
        (True, False)
    """
    return re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name) is not None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        path: The file.
        tensors: By name; they may share memory.
        about: Its metadata.
    """
    apart = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(apart, temporary, dict(about))
        except SafetensorError as error:  # an error of the system, in words alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
