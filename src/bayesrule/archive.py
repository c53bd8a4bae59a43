"""Files of posteriors: safetensors with what is no tensor as JSON in their metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .joints import of_tensors
from .parts import Law, Named, Part
from .storage import write_tensors

FORMAT = "bayesrule-posterior"
VERSION, WITH_PARTS, CALIBRATED = 1, 2, 3
"""Of files: without weights that vary together, with them, and with what predictions need to know beside the weights."""

BLOCKS = ("mean", "precision", "prior_mean", "prior_precision")
"""What is kept of every weight, name -> tensor."""
HINTS = (None, "mean", "mc", "glm")
"""How to predict, where nobody says."""

CALIBRATION = ("temperature", "noise_variance")
"""What predictions need to know beside the weights; left out where there is nothing to say."""


def write(path: str | os.PathLike[str], blocks: Mapping[str, Named], said: Mapping[str, Any], law: Law | None) -> None:
    """Write one file, whole or not at all.

    Args:
        path: The file.
        blocks: By block and name.
        said: What is no tensor.
        law: How weights vary together, where they do.
    """
    tensors = {f"{block}.{name}": t for block, named in blocks.items() for name, t in named.items()}
    calibrated = not said.keys().isdisjoint(CALIBRATION)  # an earlier release would predict without
    version = CALIBRATED if calibrated else WITH_PARTS if law else VERSION
    about: dict[str, Any] = dict(format=FORMAT, version=version, **said)
    if law is not None:
        together, about["parts"] = law.tensors()
        tensors |= together
    write_tensors(path, tensors, {"bayesrule": json.dumps(about)})


def read(
    path: str | os.PathLike[str], device: str, strip_prefix: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], tuple[Part, ...]]:
    """Blocks, what is no tensor, and parts of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no posterior, or is of a later format, or two names become one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no posterior file at {os.fspath(path)!r}")
    blocks: dict[str, dict[str, Tensor]] = {block: {} for block in BLOCKS}
    together: dict[str, Tensor] = {}
    prefix = strip_prefix and f"{strip_prefix.removesuffix('.')}."
    try:
        with safe_open(path, framework="pt", device=device) as file:
            about = about_of(path, file.metadata())
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                block, _, name = key.partition(".")
                if about.get("parts"):
                    together[key] = file.get_tensor(key)
                if about.get("parts") and block.removeprefix("part").isdecimal():
                    continue
                if block not in blocks:
                    raise ValueError(f"{os.fspath(path)!r} is no posterior file: it holds a tensor {key!r}")
                if (short := name.removeprefix(prefix)) in blocks[block]:
                    raise ValueError(f"{os.fspath(path)!r} holds {short!r} twice without {prefix!r}; take no strip_prefix")
                blocks[block][short] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file ({error}); take another copy") from error
    names = about.get("names", [])
    for block, found in blocks.items():
        order = [name.removeprefix(prefix) for name in names]
        blocks[block] = {**{name: found[name] for name in order if name in found}, **found}
    parts = _parts(path, names, together, about.get("parts", ()), prefix)
    said = {key: about[key] for key in ("ess", "num_data", "method_hint", *CALIBRATION) if key in about}
    if said.get("noise_variance") is not None:
        said["noise_variance"] = tuple(said["noise_variance"])
    return blocks, said, parts


def _parts(path: Any, names: Any, tensors: Named, about: Any, prefix: str) -> tuple[Part, ...]:
    if not about:
        return ()
    try:
        parts = of_tensors(names, tensors, about).parts
    except (KeyError, TypeError, AttributeError, IndexError, NotImplementedError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is damaged: of its parts something is missing ({error}); take another copy"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    return tuple(part.renamed(lambda name: name.removeprefix(prefix)) for part in parts)


def about_of(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the metadata of a file say of its posterior.

    Raises:
        ValueError: It is no posterior, or of a later format.
    """
    about: dict[str, Any] = {}
    try:
        about = json.loads((metadata or {})["bayesrule"])
        known = about["format"] == FORMAT and isinstance(about["version"], int)
    except (KeyError, TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{os.fspath(path)!r} is no posterior file: its metadata does not say {FORMAT!r} and a version")
    if about["version"] > CALIBRATED:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {about['version']}, this release reads {CALIBRATED}; upgrade bayesrule"
        )
    parts = about.get("parts", [])
    fits = {
        "structure": isinstance(about.get("structure"), str) and (bool(parts) or about["structure"] == "diag"),
        "ess": isinstance(about.get("ess"), int | float),
        "num_data": about.get("num_data") is None or isinstance(about["num_data"], int),
        "names": isinstance(about.get("names", []), list) and all(isinstance(name, str) for name in about.get("names", [])),
        "temperature": isinstance(about.get("temperature", 1.0), int | float),
        "noise_variance": _numbers(about.get("noise_variance")),
        "method_hint": about.get("method_hint") is None or isinstance(about["method_hint"], str),
        "parts": isinstance(parts, list) and all(isinstance(part, dict) for part in parts),
    }
    for key, fit in fits.items():
        if not fit:
            raise ValueError(f"{os.fspath(path)!r} has a {key} that this release cannot read: {about.get(key)!r}")
    return about


def _numbers(found: Any) -> bool:
    return found is None or (isinstance(found, list) and all(isinstance(one, int | float) for one in found))
