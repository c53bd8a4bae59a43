"""Data by name."""

import os

import pytest
import torch
from tests.recipes.formats.test_idx import write

from bayesrule.recipes.formats import named
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN

DEBIAN = named.DEBIAN / "fashion-mnist"


@pytest.mark.parametrize(("name", "size", "shape", "most"), [("digits", 1797, (1, 8, 8), 16), ("mnist5k", 5000, (1, 28, 28), 255)])
def test_installed_sets(name, size, shape, most):
    data = read(name)
    values = data.source.read(torch.arange(size))
    assert len(data.source) == size and data.source.shape == shape and values.max() == most
    assert data.shares == (0.5, 0.15) and data.part.unique().tolist() == [ANY] and data.classes == tuple("0123456789")
    assert data.labels.dtype == torch.int64 and data.source.name(3) == f"{name}[3]"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist(monkeypatch):
    monkeypatch.delenv("BAYESRULE_DATA", raising=False)
    data = read("fashion-mnist")
    assert len(data.source) == 70000 and (data.part == TRAIN).sum() == 60000 and (data.part == TEST).sum() == 10000
    assert data.labels.bincount().tolist() == [7000] * 10 and data.classes[data.labels[0]] == "ankle boot"


def test_fashion_mnist_of_ones_own_comes_first(tmp_path, monkeypatch):
    (tmp_path / "fashion-mnist").mkdir()
    write(tmp_path / "fashion-mnist", "train", [0, 9])
    monkeypatch.setenv("BAYESRULE_DATA", str(tmp_path))
    assert read("fashion-mnist").classes == ("T-shirt", "ankle boot")
    write(tmp_path / "fashion-mnist", "train", [0, 10])
    with pytest.raises(ValueError, match="has label 10, but there are 10 classes"):
        read("fashion-mnist")


def test_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "DEBIAN", tmp_path)
    monkeypatch.delenv("BAYESRULE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist, or put its four IDX files"):
        read("fashion-mnist")


def test_the_standard_library_is_split_by_file():
    text, again = named.stdlib(), named.stdlib()
    assert min(text.files) > 10 and text.files[0] > 4 * max(text.files[1:])
    assert all(torch.equal(getattr(text, part), getattr(again, part)) for part in ("train", "validation", "test"))
    whole = b"".join(bytes(part.numpy()) for part in (text.train, text.validation, text.test))
    with open(os.__file__, "rb") as file:
        assert whole.count(file.read()) == 1
