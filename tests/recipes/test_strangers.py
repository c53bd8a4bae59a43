"""Data of another kind, in the size and colors that a model takes."""

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes.data import load
from bayesrule.recipes.sources import stored
from bayesrule.recipes.strangers import Fitted, strangers


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def images(*shape, count=6):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("found", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 5, 9)])
@pytest.mark.parametrize("wanted", [(1, 8, 8), (3, 8, 8), (3, 12, 10)])
def test_images_get_the_size_and_colors(found, wanted):
    values = images(*found)
    fitted = Fitted(stored(values, "x"), wanted)
    got = fitted.read(torch.tensor([4, 1]))
    assert got.shape == (2, *wanted) and fitted.shape == wanted and len(fitted) == 6 and fitted.at_hand
    if found == wanted:
        assert torch.equal(got, values[[4, 1]]) and got.dtype == torch.uint8
    elif found[1:] == wanted[1:]:
        gray = values[[4, 1]].float().mean(1, keepdim=True)
        assert torch.equal(got, gray.expand(-1, wanted[0], -1, -1))
    assert got.float().amin() >= 0 and got.float().amax() <= 255
    assert got.float().mean((1, 2, 3)).allclose(values[[4, 1]].float().mean((1, 2, 3)), atol=12)
    assert fitted.name(4) == "x[4]" and fitted.fingerprint() == stored(values, "y").fingerprint()


def test_each_is_fitted_by_itself():
    fitted = Fitted(stored(images(3, 9, 7), "x"), (1, 8, 8))
    assert torch.equal(fitted.read(torch.arange(6))[2:3], fitted.read(torch.tensor([2])))


def test_all_examples_are_strangers_whatever_their_part(tmp_path, digits):
    x, y = images(28, 28, count=20).numpy(), np.arange(20) % 3
    np.savez(tmp_path / "a.npz", x_train=x[:12], y_train=y[:12], x_test=x[12:], y_test=y[12:])
    part = strangers(str(tmp_path / "a.npz"), digits)
    assert len(part) == 20 and part[7].shape == (1, 8, 8) and part.name(13) == "a.npz x_test[1]"


@pytest.mark.parametrize("inner", ["", "a", "deep/er"])
def test_pictures_of_any_sizes_with_and_without_classes(tmp_path, digits, inner):
    for i in range(4):
        path = tmp_path / inner / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((6 + i, 20), 50).convert("RGB" if i else "L").save(path)
    part = strangers(str(tmp_path), digits)
    assert len(part) == 4 and torch.cat([part[i][None] for i in range(4)]).shape == (4, 1, 8, 8)


def test_an_archive_of_one_class_is_fine(tmp_path, digits):
    np.savez(tmp_path / "a.npz", x=images(20, 20).numpy(), y=np.zeros(6, int))
    assert len(strangers(str(tmp_path / "a.npz"), digits)) == 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "t.csv").write_text("u,v,kind\n" + "\n".join(f"{i % 7},{i},{'ab'[i % 2]}" for i in range(60)))
    (folder / "two.csv").write_text("u,v,kind\n" + "\n".join(f"{i % 5},{i * 3},{'cd'[i % 2]}" for i in range(30)))
    (folder / "three.csv").write_text("w,v,kind,u\n" + "\n".join(f"{i},{i * 3},{'cd'[i % 2]},{i % 5}" for i in range(30)))
    (folder / "other.csv").write_text("u,w,kind\n" + "\n".join(f"{i % 5},{i * 3},{'cd'[i % 2]}" for i in range(30)))
    return folder


def test_rows_of_the_same_columns(rows):
    data = load(str(rows / "t.csv"))
    part = strangers(str(rows / "two.csv"), data)
    assert len(part) == 30 and part[3].tolist() == [3.0, 9.0]


def test_columns_are_found_by_name_and_the_target_is_that_of_the_run(rows):
    part = strangers(str(rows / "three.csv"), load(str(rows / "t.csv")), target="kind")
    assert len(part) == 30 and part[3].tolist() == [3.0, 9.0]


@pytest.mark.parametrize(("stored", "scaled"), [(np.uint8, 1.0), (np.float32, 1 / 255)])
def test_images_come_in_the_range_that_was_learned(tmp_path, digits, stored, scaled):
    values = np.zeros((4, 8, 8), np.uint8)
    values[:, 2:5] = 255
    np.savez(tmp_path / "a.npz", x=(values * scaled).astype(stored), y=np.arange(4) % 2)
    seen = strangers(str(tmp_path / "a.npz"), digits)[0]
    assert seen.min() == 0 and seen.max() == 16


@pytest.mark.parametrize("spec", ["other.csv", "digits"])
def test_rows_of_others_are_refused(rows, spec):
    data = load(str(rows / "t.csv"))
    with pytest.raises(ValueError, match=r"lacks 1 columns that the model takes: v; add them|the model takes rows"):
        strangers(str(rows / spec) if spec != "digits" else spec, data)


def test_rows_are_no_images(rows, digits):
    with pytest.raises(ValueError, match=r"two.csv holds rows, and the model takes images"):
        strangers(str(rows / "two.csv"), digits)


def test_what_is_not_there_is_named(digits, tmp_path):
    with pytest.raises(ValueError, match="there is no data"):
        strangers(str(tmp_path / "nothing"), digits)
