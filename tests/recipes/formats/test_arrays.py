"""Arrays in .npz files: shapes, types and labels, and everything that can be wrong with them."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION

Y = np.array([3, 1, 3])


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("shape", "kind", "wanted", "notes"),
    [
        ((3, 5, 6), "image", (1, 5, 6), 0),
        ((3, 5, 6, 3), "image", (3, 5, 6), 0),
        ((3, 3, 5, 6), "image", (3, 5, 6), 0),
        ((3, 1, 5, 6), "image", (1, 5, 6), 0),
        ((3, 3, 5, 1), "image", (1, 3, 5), 1),
        ((3, 7), "row", (7,), 0),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", ">i4", "f2", "f8", "?"])
@pytest.mark.parametrize("order", "CF")
def test_shapes_and_types(tmp_path, shape, kind, wanted, notes, dtype, order):
    x = np.asarray(np.arange(np.prod(shape)).reshape(shape) % 200, dtype, order=order)
    data = read(save(tmp_path / "a.npz", x=x, y=Y))
    values = data.source.read(torch.arange(3))
    assert data.kind == kind and data.source.shape == wanted and len(data.notes) == notes
    assert values.dtype == (torch.uint8 if dtype == "u1" else torch.float32)
    moved = x if x.ndim < 4 or shape[3] not in (1, 3) else np.moveaxis(x, 3, 1)
    assert np.array_equal(values.numpy().reshape(moved.shape), moved.astype(values.numpy().dtype))
    assert data.classes == ("1", "3") and data.labels.tolist() == [1, 0, 1] and data.source.name(2) == "a.npz x[2]"


@pytest.mark.parametrize(
    ("y", "classes", "labels"),
    [
        (np.array([[5], [4], [5]]), ("4", "5"), [1, 0, 1]),
        (np.array([True, False, True]), ("0", "1"), [1, 0, 1]),
        (np.array(["dog", "cat", "dog"]), ("cat", "dog"), [1, 0, 1]),
        (np.array([b"dog", b"cat", b"dog"]), ("cat", "dog"), [1, 0, 1]),
        (np.array([1.0, -1.0, 1.0]), ("-1", "1"), [1, 0, 1]),
        (np.eye(4)[[2, 0, 2]], ("0", "2"), [1, 0, 1]),
    ],
)
def test_labels(tmp_path, y, classes, labels):
    data = read(save(tmp_path / "a.npz", x=np.zeros((3, 2)), y=y))
    assert data.classes == classes and data.labels.tolist() == labels


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["x"], [ANY]),
        (["x_train"], [ANY]),
        (["X_train", "X_test"], [TRAIN, TEST]),
        (["x_train", "x_val", "x_test"], [TRAIN, VALIDATION, TEST]),
        (["x_train", "x_validation"], [TRAIN, VALIDATION]),
    ],
)
def test_parts(tmp_path, keys, parts):
    arrays = {key: np.full((3, 2), i) for i, key in enumerate(keys)} | {key.replace("x", "y").replace("X", "y"): Y for key in keys}
    data = read(save(tmp_path / "a.npz", **arrays))
    assert data.part.tolist() == [part for part in parts for _ in range(3)]
    assert data.source.read(torch.arange(3 * len(keys)))[:, 0].tolist() == [i for i in range(len(keys)) for _ in range(3)]


BAD = np.zeros((3, 2))
BAD[1:, 1] = np.nan, np.inf
X = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": BAD, "y": Y}, r"a.npz x\[1\] is not finite .* as 2 of 3 examples are"),
        ({"x": np.full((3, 2), 1e300), "y": Y}, r"x\[0\] is not finite"),
        ({"x": X}, "has x but no y; add the labels"),
        ({"x": X, "yy": Y}, "has x but no y; did you mean 'yy'"),
        ({"xs": X, "y": Y}, "needs x and y, or x_train, .* and has xs, y; did you mean 'xs'"),
        ({"x": X, "y": Y[:2]}, "has 3 examples in x, but 2 labels in y"),
        ({"x": X[:0], "y": Y[:0]}, r"x is empty, shape \(0, 2\)"),
        ({"x": np.zeros((3, 0)), "y": Y}, "x is empty"),
        ({"x": np.zeros(3), "y": Y}, r"x has shape \(3,\)"),
        ({"x": np.zeros((3, 2, 5, 4)), "y": Y}, "there must be 1 or 3 channels"),
        ({"x": np.array(["a", "b", "c"])[:, None], "y": Y}, "holds <U1, not numbers"),
        ({"x": np.zeros((3, 2), complex), "y": Y}, "holds complex128, not numbers"),
        ({"x": np.array([[None]] * 3), "y": Y}, "x holds Python objects"),
        ({"x": X, "y": np.array([None] * 3)}, "y holds Python objects"),
        ({"x": X, "y": np.array([1.0, 2.5, 3])}, r"y\[1\] is 2.5, no whole number"),
        ({"x": X, "y": np.array([1.0, np.nan, 3])}, r"y\[1\] is nan"),
        ({"x": X, "y": np.ones((3, 3))}, "rows are not one 1 and zeros"),
        ({"x": X, "y": np.zeros(3, "M8[s]")}, "y holds datetime64"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y}, "has x, x_test: which is which"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :1], "y_test": Y}, r"x_test has shape \(1,\), one of a.npz x_train \(2,\)"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y.astype(str)}, "numbers as labels in one part and texts in another"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read(save(tmp_path / "a.npz", **arrays))


def test_bytes_and_floats_together_are_noted(tmp_path):
    arrays = {"x_train": X.astype(np.uint8), "y_train": Y, "x_test": X, "y_test": Y}
    data = read(save(tmp_path / "a.npz", **arrays))
    assert "check that their scale is the same" in data.notes[0] and data.source.values.dtype == torch.float32


def member(shape, content=b"", version=1):
    """An .npy file with any header."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("(3000000000000, 1000000000)"), "needs 24,000,000,000,000,000,000,000 bytes, and 0 follow"),
        (member("(-3, 2)"), r"damaged: shape \(-3, 2\)"),
        (member("(1, 2)", b"1" * 17), "needs 16 bytes, and 17 follow"),
        (member("(1, 2)", version=9), "a.npz.* is damaged|version"),
        (member("(1, [2)"), "is damaged"),
        (b"hello", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_headers_that_lie(tmp_path, content, message):
    labels = io.BytesIO()
    np.save(labels, Y)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("y.npy", labels.getvalue())
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"hello", "a.npz is no .npz file, or cut off"),
        ("a.npz", b"", "a.npz is empty"),
        ("a.npy", member("(1, 2)", b"1" * 16), "holds one array without labels; write x and y"),
    ],
)
def test_no_archive(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / name))


@pytest.mark.shared
def test_usps(shared):
    data = read(str(shared / "data/usps/usps_16x16.npz"))
    assert data.kind == "row" and data.source.shape == (256,) and data.part.bincount().tolist() == [7291, 0, 2007]
