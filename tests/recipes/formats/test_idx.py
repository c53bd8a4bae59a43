"""IDX folders: every spelling and part, and everything that can be wrong with a pair."""

import gzip
import struct

import numpy as np
import pytest
import torch

from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION


def write(folder, stem, numbers, side=4, pack=False, dot=False, **wrong):
    """A pair whose image i is filled with i; ``wrong`` replaces the bytes of images or labels."""
    joint = "." if dot else "-"
    n = len(numbers)
    pixels = np.repeat(np.arange(n, dtype=np.uint8), side * side).tobytes()
    contents = {
        "images": (3, struct.pack(">IIII", 0x803, n, side, side) + pixels),
        "labels": (1, struct.pack(">II", 0x801, n) + bytes(numbers)),
    }
    for what, (dimensions, content) in contents.items():
        content = wrong.get(what, content)
        if content is not None:
            name = f"{stem}-{what}{joint}idx{dimensions}-ubyte" + (".gz" if pack else "")
            (folder / name).write_bytes(gzip.compress(content) if pack else content)


@pytest.mark.parametrize(
    ("stems", "parts"),
    [
        (["train", "t10k"], [TRAIN, TEST]),
        (["train-12k", "t3k", "val"], [TRAIN, VALIDATION, TEST]),
        (["emnist-letters-train", "emnist-letters-test"], [TRAIN, TEST]),
        (["t10k"], [ANY]),
        (["whatever"], [ANY]),
    ],
)
@pytest.mark.parametrize(("pack", "dot"), [(False, False), (True, False), (False, True)])
def test_parts_follow_the_names(tmp_path, stems, parts, pack, dot):
    for stem in stems:
        write(tmp_path, stem, [7, 2, 7], pack=pack, dot=dot)
    data = read(str(tmp_path))
    assert data.part.tolist() == [part for part in parts for _ in range(3)]
    assert data.classes == ("2", "7") and data.labels.tolist() == [1, 0, 1] * len(parts)
    assert data.source.read(torch.tensor([2])).unique().tolist() == [2] and data.source.shape == (1, 4, 4)
    assert data.source.name(1).endswith("[1]") and data.kind == "image"


def test_content_counts_not_the_name(tmp_path):
    write(tmp_path, "train", [0, 1])
    for path in list(tmp_path.iterdir()):
        path.rename(f"{path}.gz")  # not packed, though it says so
    write(tmp_path, "t10k", [0, 1], pack=True)
    for path in list(tmp_path.glob("t10k*")):
        path.rename(str(path).removesuffix(".gz"))
    assert len(read(str(tmp_path)).source) == 4


def test_packed_and_unpacked_are_one(tmp_path):
    write(tmp_path, "train", [0, 1])
    write(tmp_path, "train", [0, 1], pack=True)
    assert len(read(str(tmp_path)).source) == 2


IMAGES = struct.pack(">IIII", 0x803, 2, 4, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": None}, r"train-labels-idx1-ubyte has no partner: train-images-idx3-ubyte\(.gz\) is missing"),
        ({"labels": None}, "train-images-idx3-ubyte has no partner: train-labels"),
        ({"images": b""}, "train-images-idx3-ubyte is empty"),
        ({"images": IMAGES[:10]}, "is cut off in its header"),
        ({"images": b"\x00\x00\x08\x01" + IMAGES[4:]}, "no IDX file of images: it begins with 00000801, not 00000803"),
        ({"images": IMAGES + b"1" * 31}, "is cut off: its header says 2 x 4 x 4, 32 bytes, and it has 31"),
        ({"images": IMAGES + b"1" * 33}, "is too long: its header says 2 x 4 x 4, 32 bytes"),
        ({"images": struct.pack(">IIII", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"1"}, "is cut off: .* and it cannot hold them"),
        ({"images": struct.pack(">IIII", 0x803, 0, 4, 4)}, "holds nothing: its header says 0 x 4 x 4"),
        (
            {"labels": struct.pack(">II", 0x801, 3) + b"012"},
            "train-labels-idx1-ubyte has 3 labels, train-images-idx3-ubyte 2 images",
        ),
        ({"labels": b"\x1f\x8b" + b"0" * 20}, "train-labels-idx1-ubyte is damaged"),
        ({"images": gzip.compress(IMAGES + b"1" * 32)[:-9]}, "train-images-idx3-ubyte is damaged"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, wrong, message):
    write(tmp_path, "train", [0, 1], **wrong)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("stems", "message"),
    [
        (["train", "train-2"], "has more than one training part: train, train-2"),
        (["train", "other"], "other-images in .* is of no known part"),
    ],
)
def test_pairs_that_do_not_go_together(tmp_path, stems, message):
    for stem in stems:
        write(tmp_path, stem, [0, 1])
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path))


def test_parts_have_one_size(tmp_path):
    write(tmp_path, "train", [0, 1])
    write(tmp_path, "t10k", [0, 1], side=5)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte has shape \(1, 5, 5\), one of train-.*\(1, 4, 4\)"):
        read(str(tmp_path))


@pytest.mark.shared
@pytest.mark.parametrize(("name", "sizes"), [("mnist", {TRAIN: 12000, TEST: 3000}), ("notmnist", {ANY: 10000})])
def test_shared_sets(shared, name, sizes):
    data = read(str(shared / "data" / name))
    assert {part: int((data.part == part).sum()) for part in sizes} == sizes and len(data.source) == sum(sizes.values())
    assert data.source.shape == (1, 28, 28) and data.classes == tuple("0123456789")
