"""NumPy arrays in an .npz file: x and y, or x_train, y_train, x_test, y_test."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from bayesrule.recipes.formats.pieces import PARTS, Piece, damage, few, join, length, nearest, take
from bayesrule.recipes.sources import ANY, Collection, Refusal, shown

PAIRS = {"x": ANY} | {f"x_{part}": number for part, number in PARTS.items()}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
WANTED = "x and y, or x_train, y_train, x_test, y_test"


def read(path: Path, name: str) -> Collection:
    """Read the arrays of a file.

    x has shape (examples, height, width), with 1 or 3 channels after the examples or at the end, or (examples, features); y
    holds integers, bools or texts, shape (examples,) or (examples, 1), or a row of one 1 and 0s for each.

    Raises:
        ValueError: If it is no .npz, lacks an array, or one is empty, of another length, of objects, or not finite.
        OSError: If it cannot be opened.
    """
    length(path)
    with path.open("rb") as raw:
        if raw.read(6) == b"\x93NUMPY":
            raise Refusal(f"{shown(path)} holds one array without labels; write {WANTED} with numpy.savez")
    if not zipfile.is_zipfile(path):
        raise Refusal(f"{shown(path)} is no .npz file, or cut off; write {WANTED} with numpy.savez")
    notes: list[str] = []
    pieces: list[Piece] = []
    with damage(path), zipfile.ZipFile(path) as archive:
        keys: dict[str, zipfile.ZipInfo] = {}
        for info in sorted(archive.infolist(), key=lambda info: info.filename):  # X before x, so that x stays
            keys[info.filename.removesuffix(".npy").lower()] = info
        pairs = [key for key in PAIRS if key in keys]
        if not pairs:
            near = nearest("x_train" if any("train" in key for key in keys) else "x", keys)
            raise Refusal(f"{shown(path)} needs {WANTED}, and has {few(list(keys)) or 'nothing'}{near}")
        if ("x" in pairs and len(pairs) > 1) or len({PAIRS[key] for key in pairs}) < len(pairs):
            raise Refusal(f"{shown(path)} has {few(pairs)}: which is which? leave x, or one of each part")
        for key in pairs:
            target = "y" + key[1:]
            if target not in keys:
                raise Refusal(f"{shown(path)} has {key} but no {target}{nearest(target, set(keys) - set(pairs))}; add the labels")
            origin = f"{shown(path.name)} {key}"
            values = _values(_array(archive, keys[key], path), f"{shown(path)} {key}", notes)
            labels = _labels(_array(archive, keys[target], path), f"{shown(path)} {target}")
            if len(values) != len(labels):
                raise Refusal(f"{shown(path)} has {len(values)} examples in {key}, but {len(labels)} labels in {target}")
            pieces.append(Piece(PAIRS[key], origin, values, labels))
    if len({piece.values.dtype for piece in pieces}) > 1:
        notes.append("some arrays hold bytes and others wider numbers: check that their scale is the same")
        pieces = [Piece(piece.part, piece.origin, piece.values.float(), piece.labels) for piece in pieces]
    if len({piece.labels.dtype.kind for piece in pieces}) > 1:
        raise Refusal(f"{shown(path)} has numbers as labels in one part and texts in another; make them alike")
    kind = "row" if pieces[0].values.ndim == 2 else "image"
    return join(name, kind, pieces, "NumPy arrays (.npz)", notes=list(dict.fromkeys(notes)))


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """One array, after the size that its header promises was checked against the bytes there are; nothing is unpickled."""
    where = f"{shown(path)} {shown(info.filename.removesuffix('.npy'))}"
    with archive.open(info) as member:
        shape, fortran, kind, rest = _header(member, info, where)
        if kind.hasobject:
            raise Refusal(f"{where} holds Python objects, which would have to be unpickled; save numbers or texts")
        size = math.prod(shape) * kind.itemsize
        if not size:
            raise Refusal(f"{where} is empty, shape {shape}; save at least one example")
        if size != rest:
            raise Refusal(f"{where} is damaged: shape {shape} needs {size:,} bytes, and {rest:,} follow; save it again")
        content = take(member, size + 1)  # one more: at the end the checksum is compared
    if len(content) != size:
        raise Refusal(f"{where} is cut off: {len(content):,} of {size:,} bytes; save it again")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def _header(member: IO[bytes], info: zipfile.ZipInfo, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = np.lib.format.read_magic(member)
    if version not in HEADERS:
        raise Refusal(f"{where} has .npy version {version}; save plain numbers or texts")
    shape, fortran, kind = HEADERS[version](member)
    if any(side < 0 for side in shape):
        raise Refusal(f"{where} is damaged: shape {shape}; save it again")
    return shape, fortran, kind, info.file_size - member.tell()


def _values(x: np.ndarray, where: str, notes: list[str]) -> Tensor:
    if x.dtype.kind not in "buif":
        raise Refusal(f"{where} holds {x.dtype}, not numbers; save integers or floats")
    if x.ndim == 4:
        last, first = x.shape[3] in (1, 3), x.shape[1] in (1, 3)
        if not last and not first:
            raise Refusal(f"{where} has shape {x.shape}; there must be 1 or 3 channels, after the examples or at the end")
        if last and first:
            notes.append(f"x of shape (n, {', '.join(map(str, x.shape[1:]))}) is read as (n, height, width, channels)")
        x = x.transpose(0, 3, 1, 2) if last else x
    elif x.ndim == 3:
        x = x[:, None]
    elif x.ndim != 2:
        raise Refusal(f"{where} has shape {x.shape}; it must be (n, height, width), with channels too, or (n, features)")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x))
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(1)
    if bad.any():
        raise Refusal(
            f"{where}[{int(bad.argmax())}] is not finite (NaN, infinite or over 3e38), as {bad.sum():,} of {len(x):,} examples "
            "are; mend or remove them"
        )
    return torch.from_numpy(x)


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    """Shape (examples,), int64 or text."""
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "buif":
        if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
            raise Refusal(f"{where} has shape {y.shape}, but its rows are not one 1 and zeros; save one label an example")
        return y.argmax(1).astype(np.int64)
    if y.ndim != 1 and (y.ndim != 2 or y.shape[1] != 1):
        raise Refusal(f"{where} has shape {y.shape}; save one label an example, shape (n,)")
    y = y.reshape(-1)
    if y.dtype.kind == "S":
        y = np.array([text.decode("utf-8", "replace") for text in y.tolist()])
    if y.dtype.kind == "f":
        whole = np.isfinite(y) & (np.abs(y) < 2**53) & (np.trunc(y) == y)
        if not whole.all():
            place = int(whole.argmin())
            raise Refusal(f"{where}[{place}] is {y[place]}, no whole number; this learns classes, so save integers or texts")
    elif y.dtype.kind not in "buiU":
        raise Refusal(f"{where} holds {y.dtype}; save integers, bools or texts")
    if y.dtype.kind == "U":
        return np.array([shown(text) for text in y.tolist()])
    if y.dtype.kind == "u" and y.max() > 2**63 - 1:
        raise Refusal(f"{where} holds {y.max()}, too large for a label; save small integers or texts")
    return y.astype(np.int64)
