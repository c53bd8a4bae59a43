"""Where examples lie: in memory, or in files that are read when they are needed."""

import hashlib
import os
import stat
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import overload

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

TRAIN, VALIDATION, TEST, ANY = 0, 1, 2, -1  # the part that an example was given to; ANY: none yet
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what a picture may be, whatever its name ends in
GRAY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L"})  # PIL's modes without color
DEEP = frozenset({"I", "I;16", "I;16B", "I;16L"})  # 16 bits
ORIENTATION = 0x0112  # EXIF's number for how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset(turn for number, turn in TURNS.items() if number > 4)


class Refusal(ValueError):
    """What is wrong with data, in one line that names the file."""


def shown(name: object) -> str:
    r"""A file name as one printable line, whatever bytes it holds.

    Example:
        >>> shown("a\nb\udcff")
        'a\\nb\\udcff'
    """
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in str(name))


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    return shown(" ".join(str(error).split())) or type(error).__name__


class Source(ABC):
    """Examples of one shape, each with a name that a person can find it by. Reading from several threads is fine."""

    shape: tuple[int, ...]
    at_hand: bool  # in memory, so that reading costs next to nothing

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Examples as they are stored, shape (indices, *shape), uint8 or float32.

        Raises:
            ValueError: If one cannot be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Where one example comes from: a file, or its place in one."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data change; cheap."""

    def lengths(self, indices: Tensor) -> Tensor | None:
        """How long examples are, shape (indices,), where they are not all of one length."""
        return None


@dataclass(frozen=True, eq=False)
class Stored(Source):
    """Examples in memory.

    Args:
        values: Shape (examples, *shape), uint8 or float32.
        names: The name of example i.
    """

    values: Tensor
    names: Callable[[int], str]
    at_hand: bool = field(default=True, init=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one example."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Tensor) -> Tensor:
        return self.values[indices]

    def name(self, index: int) -> str:
        return self.names(index)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.values.dtype} {tuple(self.values.shape)}".encode(), digest_size=16)
        digest.update(self.values.contiguous().numpy().reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


class Paths(Sequence[str]):
    """File names, one after another in one string of bytes: half a million of them take some 15 MB.

    Args:
        names: As the file system has them.

    Example:
        >>> paths = Paths([b"cat/1.png", b"dog/2.png"])
        >>> len(paths), paths[1]
        (2, 'dog/2.png')
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._bytes = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "str | Paths":
        if isinstance(index, slice):
            return Paths([os.fsencode(self[i]) for i in range(*index.indices(len(self)))])
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} paths")
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])

    def shown(self, index: int) -> str:
        """One of them, printable."""
        return shown(self[index])


@dataclass(frozen=True, eq=False)
class Files(Source):
    """Image files, decoded when they are read.

    Args:
        root: The folder that names are relative to.
        paths: The files, relative to it.
        mode: "L" (gray) or "RGB": what every image is turned into.
        size: Height and width.
        resize: Whether an image of another size is resized (else it is refused).
    """

    root: Path
    paths: Sequence[str]
    mode: str
    size: tuple[int, int]
    resize: bool = False
    at_hand: bool = field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one image."""
        return (1 if self.mode == "L" else 3, *self.size)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        values = np.empty((len(indices), *self.shape), np.uint8)
        self.decode(indices.tolist(), values)
        return torch.from_numpy(values)

    def decode(self, indices: Iterable[int], out: np.ndarray) -> None:
        """Write images into an array, shape (indices, *shape), uint8."""
        for place, index in enumerate(indices):
            pixels = np.asarray(picture(self.root / self.paths[index], self.mode, self.size, self.resize))
            out[place] = pixels.reshape(*self.size, -1).transpose(2, 0, 1)

    def name(self, index: int) -> str:
        return shown(self.paths[index])

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.shape} {self.resize}".encode(), digest_size=16)
        for path in self.paths:
            digest.update(os.fsencode(path) + f"\0{(self.root / path).stat().st_size}\0".encode())
        return digest.hexdigest()


class _Quiet:
    """Silences what PIL warns of, from the first thread that comes in until the last one leaves.

    A picture is taken or refused; ``warnings.catch_warnings`` alone would have threads restore one another's filters.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong with it, here or in the body, becomes a line that names it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if not status.st_size:
            raise OSError("it is empty")
        with _QUIET, Image.open(path, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are too many")
            yield image
    except Exception as error:  # PIL lets through whatever its decoders run into
        unknown = isinstance(error, UnidentifiedImageError)
        why = "it is no PNG, JPEG, WebP, GIF or BMP image" if unknown else getattr(error, "strerror", None) or reason(error)
        raise Refusal(f"cannot read {shown(path)}: {why}; mend or remove it") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image must be turned to stand upright."""
    if image.format not in ("JPEG", "MPO") and "exif" not in image.info:
        return None  # PNG would decode the pixels to look behind them
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged block says nothing, in many ways
        return None


def measure(path: Path) -> tuple[int, int, str]:
    """Height and width (upright), and PIL's mode, of an image file: reads its header only.

    Raises:
        ValueError: If it cannot be read.
    """
    with _opened(path) as image:
        height, width = image.height, image.width
        return (width, height, image.mode) if _turn(image) in SIDEWAYS else (height, width, image.mode)


def _plain(image: Image.Image) -> Image.Image:
    """With 16 bits as 8, and on white where it is transparent."""
    if image.mode in DEEP:
        return Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def picture(path: Path, mode: str, size: tuple[int, int], resize: bool) -> Image.Image:
    """A file as an image of a mode and size: upright, on white where it is transparent, 8 bits.

    Raises:
        ValueError: If it cannot be read, or has another size and is not to be resized.
    """
    height, width = size
    with _opened(path) as image:
        turn = _turn(image)
        found = (image.width, image.height) if turn in SIDEWAYS else (image.height, image.width)
        if found == size or resize:
            if found != size:  # JPEG: decode no more than is needed
                image.draft(mode, (height, width) if turn in SIDEWAYS else (width, height))
            upright = _plain(image) if turn is None else _plain(image).transpose(turn)
            upright = upright.convert(mode)
            return upright if found == size else upright.resize((width, height), Image.Resampling.BILINEAR)
    raise Refusal(
        f"{shown(path)} has {found[0]} x {found[1]} pixels (height x width), the others {height} x {width}; "
        "pass --size 32 (or --size 32 48, height and width) to resize all"
    )


def numbered(origin: str, index: int) -> str:
    """The name of an example by its place, from 0."""
    return f"{origin}[{index}]"


def placed(origins: tuple[str, ...], starts: tuple[int, ...], index: int) -> str:
    """The name of an example by its place in one of several origins, which begin at ``starts``."""
    which = bisect_right(starts, index) - 1
    return numbered(origins[which], index - starts[which])


@dataclass(frozen=True, eq=False)
class Collection:
    """Data as they were found, before they are split.

    Args:
        name: Of the data set.
        kind: "image", "row" or "document".
        source: The examples.
        labels: Their classes, shape (examples,), int64; -1 where there is none.
        classes: Names of the classes; label k means ``classes[k]``.
        part: TRAIN, VALIDATION, TEST or ANY, shape (examples,), int8.
        form: How they are stored, in words.
        shares: The share of training and of validation examples among those that were given to no part.
        notes: What was noticed while reading.
        columns: Of rows: what each number is, or () where they have no names.
    """

    name: str
    kind: str
    source: Source
    labels: Tensor
    classes: tuple[str, ...]
    part: Tensor
    form: str
    shares: tuple[float, float] = (0.7, 0.15)
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def stored(values: Tensor, origin: str) -> Stored:
    """Examples in memory, named by their place."""
    return Stored(values, partial(numbered, origin))
