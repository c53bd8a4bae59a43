"""Changes of training images: what they do, and that the generator alone decides."""

import pytest
import torch

from bayesrule.recipes.augmentation import CHANGES, augmentation, flip, shift


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, *shape):
    return torch.randn(count, *shape, generator=generator(9))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 16), (2, 9, 20), (1, 2, 2)])
@pytest.mark.parametrize("names", [["shift"], ["flip"], ["shift", "flip"], []])
def test_the_generator_decides_alone(names, shape):
    given, change = images(20, *shape), augmentation(names)
    before, state = given.clone(), torch.get_rng_state()
    first, again, other = (change(given, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == given.shape and first.dtype == given.dtype and torch.equal(first, again)
    assert torch.equal(first, other) == (names == [] or (names == ["shift"] and shape[1] < 8))
    assert torch.equal(given, before) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 16), (7, 24)])
def test_a_shift_moves_by_up_to_an_eighth_and_repeats_the_border(height, width):
    rows, columns = torch.arange(height), torch.arange(width)
    given = (rows[:, None] * 100 + columns).expand(400, 2, height, width)
    seen = set()
    for image in shift(given, generator()):
        down, right = int(image[0, height // 2, width // 2]) // 100 - height // 2, int(image[0, 0, width // 2]) % 100 - width // 2
        expected = (rows + down).clamp(0, height - 1)[:, None] * 100 + (columns + right).clamp(0, width - 1)
        assert torch.equal(image, expected.expand(2, -1, -1))
        seen.add((down, right))
    most = height // 8, width // 8
    assert seen == {(i, j) for i in range(-most[0], most[0] + 1) for j in range(-most[1], most[1] + 1)}


def test_a_flip_mirrors_about_half_of_them():
    given = images(400, 3, 4, 5)
    found = flip(given, generator())
    mirrored = (found == given.flip(3)).flatten(1).all(1)
    assert ((found == given).flatten(1).all(1) ^ mirrored).all() and 150 < mirrored.sum() < 250


def test_changes_are_made_one_after_another():
    given, one, two = images(10, 1, 16, 16), generator(), generator()
    assert torch.equal(augmentation(["shift", "flip"])(given, one), flip(shift(given, two), two))


def test_an_unknown_change_is_named():
    with pytest.raises(ValueError, match="unknown augmentation 'flop'; did you mean 'flip'"):
        augmentation(["shift", "flop"])
    assert set(CHANGES) == {"shift", "flip"}
