"""Data by name: real, split once and for all, normalized by the training part."""

import pytest
import torch

from bayesrule.recipes.data import load


def ids(images):
    return {tuple(image.flatten().tolist()) for image in images}


@pytest.mark.parametrize(
    ("name", "held_out", "classes", "counts"),
    [
        ("digits", (), 10, (898, 270, 629)),
        ("digits", (8, 9), 8, (721, 217, 505)),
        ("mnist5k", (), 10, (2500, 750, 1750)),
        ("mnist5k", (8, 9), 8, (2000, 600, 1400)),
    ],
)
def test_parts_are_whole_disjoint_and_stratified(name, held_out, classes, counts):
    data = load(name, held_out)
    parts = (data.train, data.validation, data.test)
    assert tuple(len(labels) for _, labels in parts) == counts
    assert len(data.classes) == classes
    for images, labels in parts:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        share = labels.bincount(minlength=classes) / len(labels)
        assert (share - 1 / classes).abs().max() < 0.02
    train, validation, test = (ids(images) for images, _ in parts)
    assert not train & test and not train & validation and not validation & test
    close = torch.stack([data.train[0].mean(), data.train[0].std() - 1])
    assert close.abs().max() < 1e-4


def test_held_out_digits_are_only_among_the_unknown():
    data = load("digits", held_out=(8, 9))
    assert set(data.unknown[1].tolist()) == {8, 9}
    assert len(data.unknown[1]) == 354
    assert data.classes == tuple("01234567")
    assert load("digits").unknown is None


def test_the_seed_decides_the_split():
    first, again, other = (load("digits", seed=seed).train[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "unknown data 'mnist'; did you mean 'mnist5k'"),
        (("digits", (8, 12)), r"held_out \[12\] not in digits, whose digits are 0 to 9"),
    ],
)
def test_what_is_not_there_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)
