"""One way in: a name, a file or a folder becomes a ``Collection``, or one line says what is wrong with it."""

import os
import warnings
from pathlib import Path

from bayesrule.recipes.formats import arrays, cifar, folders, idx, tables
from bayesrule.recipes.formats.named import NAMES
from bayesrule.recipes.formats.pieces import KINDS, inventory, length, nearest
from bayesrule.recipes.sources import ANY, Collection, Refusal, reason, shown

PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
UNEXPECTED = "that should not happen: please report it"
SIDE = 1 << 14  # pixels


def read(spec: str, size: tuple[int, int] | None = None, target: str | None = None) -> Collection:
    """Read data by name or from a path.

    Args:
        spec: A name of ``NAMES``, else a file or folder.
        size: Height and width that image files are resized to.
        target: The column of a table that holds the class; by default the last.

    Raises:
        ValueError: If something is wrong with the data; one line says what, in which file, and what to do.
        OSError: If something is not there, or cannot be opened.

    Example:
        >>> data = read("digits")
        >>> data.kind, len(data.source), data.source.shape
        ('image', 1797, (1, 8, 8))
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is a note or an error
            data = _read(spec, size, target)
    except Refusal:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        name = shown(os.fsdecode(error.filename))
        raise type(error)(f"cannot read {name}: {error.strerror}; check that it is there and may be read") from error
    except MemoryError as error:
        raise Refusal(
            f"{shown(spec)} does not fit into memory; take less of it, or keep images as files in class folders"
        ) from error
    except Exception as error:
        raise Refusal(f"cannot read {shown(spec)}: {type(error).__name__}: {reason(error)}; {UNEXPECTED}") from error
    if size is not None and data.source.shape[1:] != size:
        raise Refusal(f"{shown(spec)} cannot be resized: its {data.form} are no image files; leave --size out")
    if target is not None and data.form != tables.FORM:
        raise Refusal(f"{shown(spec)} has no column {shown(target)!r}: it is no table; leave --target out")
    return data


def _read(spec: str, size: tuple[int, int] | None, target: str | None) -> Collection:
    if size is not None and not all(1 <= side <= SIDE for side in size):
        raise Refusal(f"cannot resize {shown(spec)} to {size[0]} x {size[1]} pixels; a side has 1 to {SIDE:,}")
    if spec in NAMES:
        return NAMES[spec]()
    if spec == "stdlib":
        raise Refusal("stdlib is text; image and table recipes cannot learn from it (see: bayesrule data stdlib)")
    path = Path(spec)
    if not spec or "\0" in spec or not _encodes(spec) or not os.path.lexists(path):
        names = sorted([*NAMES, "stdlib"])
        near = nearest(spec, names).removesuffix("?")
        raise Refusal(f"there is no data {shown(spec)!r}: neither a file or folder nor one of {', '.join(names)}{near}")
    name = shown(path.resolve().name) or shown(spec)
    return _folder(path, name, size, target) if path.is_dir() else _file(path, name, target)


def _encodes(spec: str) -> bool:
    try:
        return bool(os.fsencode(spec))
    except UnicodeEncodeError:
        return False


def _file(path: Path, name: str, target: str | None) -> Collection:
    length(path)
    low = path.name.lower()
    if low.endswith((".npz", ".npy")):
        return arrays.read(path, name)
    if tables.ending(low):
        return tables.read([(path, ANY)], name, target)
    if low.endswith(PACKED):
        raise Refusal(f"{shown(path)} is an archive; unpack it first and name the folder")
    if idx.found([path.name]) or low.endswith(".bin"):
        raise Refusal(f"{shown(path)} is one file of several; name the folder that it is in")
    raise Refusal(f"{shown(path)} is of no kind that can be read: {KINDS}")


def _folder(path: Path, name: str, size: tuple[int, int] | None, target: str | None) -> Collection:
    names = sorted(os.listdir(path))
    if idx.found(names):
        return idx.read(path, name)
    if cifar.found(path, names):
        return cifar.read(path, name)
    if parts := tables.split(names):
        return tables.read([(path / each, part) for each, part in parts.items()], name, target)
    if found := folders.index(path):
        return folders.collect(path, name, found, size)
    raise Refusal(f"{shown(path)} holds {inventory(path)}, and nothing to learn from{_inside(path, names)}: {KINDS}")


def _inside(path: Path, names: list[str]) -> str:
    """What was probably meant, of what lies in a folder."""
    for name in names:
        below = path / name
        if below.is_dir():
            inner = os.listdir(below)
            if idx.found(inner) or cifar.found(below, inner) or tables.split(inner):
                return f" (did you mean {shown(below)}?)"
        elif name.endswith(".npz") or tables.ending(name):
            return f" (did you mean {shown(below)}?)"
    return ""
