"""Folders of checkpoints as Hugging Face and PEFT lay them out, and how sure each of their weights is.

Weights are model.safetensors, or files that model.safetensors.index.json names, or adapter_model.safetensors. Their precisions
are precision.safetensors, which :func:`bayesrule.save_precision` writes, or posterior.safetensors of a run. Only headers are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...archive import about_of
from .headers import Constant, Entry, Room, Scaled, Stored, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PRECISION, POSTERIOR = "precision.safetensors", "posterior.safetensors"
SIDECAR = "bayesrule-precision"
"""The format that the metadata of a file of precisions name."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Args:
        folder: Where it is.
        tensors: The weights, by name.
        precision: Of the weights, by name, of the sum of the losses of all examples; of those that are known exactly none.
        prior: Precision of the prior, by name, where it is known.
        files: Those that hold weights and precisions.
    """

    folder: Path
    tensors: Mapping[str, Entry]
    precision: Mapping[str, Stored] = field(default_factory=dict)
    prior: Mapping[str, Stored] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return repr(str(self.folder))

    @property
    def is_adapter(self) -> bool:
        """Whether it holds adapters alone."""
        return any(file.name == ADAPTER for file in self.files)


def open_checkpoint(folder: str | os.PathLike[str], precisions: bool = True) -> Checkpoint:
    """What a folder holds, by the headers of its files.

    A link in the folder is followed inside of it, or into the blobs of the Hugging Face cache that it is a snapshot of; the folder
    itself may be a link.

    Args:
        folder: The folder.
        precisions: Whether to look for them.

    Raises:
        FileNotFoundError: There are no such weights.
        ValueError: A file is damaged, or leads out of the folder; the message says which and why.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {str(place)!r}; name one that holds {WEIGHTS}")
    files = _weights(place)
    tensors: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file)[0].items():
            if name in tensors:
                raise ValueError(f"{str(place)!r} holds {name!r} twice, in {tensors[name].file.name} and {file.name}; remove one")
            tensors[name] = entry
    _check_index(place, tensors)
    if not precisions:
        return Checkpoint(place, tensors, files=tuple(files))
    for name, find in ((PRECISION, _sidecar), (POSTERIOR, _posterior)):
        if (place / name).exists():
            file = inside(place, name)
            precision, prior = find(file)
            _check_precision(file, precision, tensors)
            return Checkpoint(place, tensors, precision, prior, (*files, file))
    return Checkpoint(place, tensors, files=tuple(files))


def inside(folder: Path, name: str) -> Path:
    """A file of a folder, by its bare name.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The name has parts, or it is a link that leads elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{str(folder)!r} has an index that names {name!r}, which is no file of the folder")
    file, home = folder / name, folder.resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no file {name!r}")
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target := file.resolve()).is_relative_to(home) and target.parent != blobs:
        raise ValueError(f"{str(file)!r} is a link that leads out of its folder, to {str(target)!r}; put the file itself there")
    return file


def _weights(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        raise ValueError(f"{str(folder)!r} holds both {WEIGHTS} and {INDEX}; remove the one that is not meant")
    for name in (WEIGHTS, ADAPTER):
        if (folder / name).exists():
            return [inside(folder, name)]
    if not (folder / INDEX).exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        there = f" (it holds {others[0]}, which is not read; save the model as safetensors)" if others else ""
        raise FileNotFoundError(f"{str(folder)!r} holds neither {WEIGHTS} nor {INDEX} nor {ADAPTER}{there}")
    return [inside(folder, name) for name in sorted(set(_index(folder).values()))]


def _index(folder: Path) -> dict[str, str]:
    """The file of every tensor."""
    found = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{str(folder / INDEX)!r} is damaged: it has no weight_map from tensors to files; take another copy")
    return found


def _check_index(folder: Path, tensors: Mapping[str, Entry]) -> None:
    if not (folder / INDEX).exists():
        return
    index = _index(folder)
    if odd := sorted(
        name for name in index.keys() | tensors.keys() if name not in tensors or tensors[name].file.name != index.get(name)
    ):
        raise ValueError(f"{str(folder / INDEX)!r} and the files beside it disagree on {odd[0]!r}; take another copy")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: It holds none.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: it is no JSON ({error}); take another copy") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} is damaged: it is no JSON object; take another copy")
    return found


# Precisions


def short(name: str) -> str:
    """What the files of PEFT call a weight that its models call by the adapter's name, too.

    Example:
        >>> short("model.query.lora_A.default.weight"), short("model.classifier.modules_to_save.default.bias")
        ('model.query.lora_A.weight', 'model.classifier.bias')
    """
    for part in (".modules_to_save.default", ".default"):
        name = name.replace(f"{part}.", ".").removesuffix(part)
    return name


def sidecar_metadata(method: str, prior: Mapping[str, float]) -> dict[str, str]:
    """What a file of precisions says of them.

    Args:
        method: How they were found.
        prior: The prior's precision, by name, where it is one number.
    """
    return {"bayesrule": json.dumps({"format": SIDECAR, "version": 1, "method": method, "prior_precision": dict(prior)})}


def _sidecar(file: Path) -> tuple[dict[str, Stored], dict[str, Stored]]:
    entries, metadata = read_header(file)
    try:
        about = json.loads(metadata["bayesrule"])
        known = about["format"] == SIDECAR and about["version"] == 1
        prior = {name: Constant(entries[name].shape, float(number)) for name, number in about["prior_precision"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        known, prior = False, {}
    if not known:
        raise ValueError(f"{str(file)!r} is no file of precisions that this release reads; make one with bayesrule precision")
    return dict(entries), dict(prior)


def _posterior(file: Path) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Scaled to the sum over all examples, where their number is known."""
    entries, metadata = read_header(file)
    about = about_of(file, metadata)
    if about.get("parts"):
        raise ValueError(
            f"{str(file)!r} has the structure {about['structure']!r}, and weights of checkpoints count as independent; save its "
            "independent()"
        )
    factor = (about["num_data"] or about["ess"]) / about["ess"]
    found: dict[str, dict[str, Stored]] = {"precision": {}, "prior_precision": {}}
    room = Room()
    for key, entry in entries.items():
        block, _, name = key.partition(".")
        if block in found and not _is_exact(entry, room):
            found[block][short(name)] = Scaled(entry, factor)
    precision, prior = found.values()
    for name, stored in prior.items():
        if name in precision and not stored.shape:
            prior[name] = Constant(precision[name].shape, stored.read(0, 1, room).item())
    return precision, {name: stored for name, stored in prior.items() if name in precision}


def _is_exact(entry: Entry, room: Room) -> bool:
    """Whether the first element is infinite: a weight that was not learned."""
    return entry.shape.count(0) == 0 and bool(entry.read(0, 1, room).isinf())


def _check_precision(file: Path, precision: Mapping[str, Stored], tensors: Mapping[str, Entry]) -> None:
    for name, stored in precision.items():
        if name not in tensors:
            raise ValueError(f"{str(file)!r} holds {name!r}, which is no weight of its folder; make it again")
        if stored.shape != tensors[name].shape:
            raise ValueError(f"{name!r} is {list(tensors[name].shape)}, and {list(stored.shape)} in {str(file)!r}; make it again")
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{str(file)!r} holds {name!r} as {stored.dtype}, which is no precision; make it again")
