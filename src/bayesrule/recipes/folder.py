"""Run folders: what is in them is whole, one process at a time writes there, and whatever is wrong is said in one line."""

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy
import safetensors
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import bayesrule
from bayesrule.storage import is_draft, write_tensors, write_text

FORMAT = 2  # of run.json; raised when an older reader would misunderstand it
LOCK = ".lock"
ABOUT = "bayesrule"  # the key of our metadata in a safetensors file


def claim(out: Path) -> None:
    """Refuse an ``out`` that would overwrite something.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder that holds more than a lock.
    """
    if out.is_dir() and any(path.name != LOCK and not is_draft(path) for path in out.iterdir()):
        if not (out / "run.json").exists():
            raise FileExistsError(f"{out} already holds other files; choose another --out or delete it first")
        raise FileExistsError(
            f"{out} already holds another run; go on with it by --resume, choose another --out or delete it first"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out must be a new or empty folder")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its name when the block succeeds and vanishes when it fails."""
    claim(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        draft = Path(temporary, out.name)
        draft.mkdir()
        yield draft
        claim(out)
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder, if there is none, and be the only process in it; a process that dies frees it, however it dies.

    Raises:
        ValueError: If another process is in it.
    """
    before = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is at work in {out}; wait for it, or choose another --out") from None
    try:
        for path in filter(is_draft, out.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # of a process that died
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()
        if not before and not any(out.iterdir()):
            out.rmdir()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write one JSON object with the format version and the versions of what made it."""
    packages = (bayesrule, torch, numpy, safetensors)
    versions = {"python": platform.python_version()} | {package.__name__: str(package.__version__) for package in packages}
    write_text(path, json.dumps({"format": FORMAT, **record, "versions": versions}, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The object in ``folder/run.json``.

    Raises:
        FileNotFoundError: If there is no such folder, or no ``run.json`` in it.
        ValueError: If ``run.json`` is damaged or of another format.
    """
    path = folder / "run.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}; make one with: bayesrule train image --out {folder}")
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it holds no run.json")
    record = _parse(path, path.read_bytes())
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"{path} is not the record of a run")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}; this version reads format {FORMAT}")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file, one a line.

    Raises:
        ValueError: If a line is damaged.
    """
    lines = [_parse(path, line) for line in path.read_bytes().splitlines()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} is damaged: a line is no JSON object")
    return lines


def _parse(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a ``.jsonl`` file."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and one JSON object into a safetensors file."""
    write_tensors(path, tensors, {ABOUT: json.dumps(about)})


def restore(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the object that :func:`save` wrote.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def digest(*paths: Path) -> str:
    """Of the content of files; those that are missing count as empty."""
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()
