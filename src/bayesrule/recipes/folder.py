"""Run folders: they appear complete or not at all, and are read back with one clear line for whatever is wrong."""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

import bayesrule

FORMAT = 1  # of run.json; raised when an older reader would misunderstand it


def claim(out: Path) -> None:
    """Refuse an ``out`` that would overwrite something.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder that is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        holds = "another run" if (out / "run.json").exists() else "other files"
        raise FileExistsError(f"{out} already holds {holds}; choose another --out or delete it first")
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


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old text or the new, nothing between."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write one JSON object with the format version and the versions of what made it."""
    packages = (bayesrule, torch, numpy, safetensors)
    versions = {"python": platform.python_version()} | {package.__name__: str(package.__version__) for package in packages}
    write(path, json.dumps({"format": FORMAT, **record, "versions": versions}, indent=2) + "\n")


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
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError(f"{path} is not the record of a run")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}; this version reads format {FORMAT}")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file, one a line.

    Raises:
        ValueError: If a line is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
