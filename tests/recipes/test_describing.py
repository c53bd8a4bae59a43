"""What is in some data: counted, named, and refused where nothing can be learned from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes import describing
from bayesrule.recipes.describing import describe as describe_settings
from bayesrule.recipes.formats.named import Text
from bayesrule.recipes.settings import Settings


def describe(data, bars=None, **asked):
    return describe_settings(Settings(data, "", **asked), *([] if bars is None else [bars]))


def test_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (100, 5, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x[:60], y_train=np.arange(60) % 3 + 7, x_test=x[60:], y_test=np.arange(40) % 3 + 7)
    found, refusal = describe(str(tmp_path / "a.npz"))
    assert refusal is None and json.loads(json.dumps(found)) == found
    assert found["examples"] == {"training": 54, "validation": 6, "test": 40} and found["shape"] == [3, 5, 6]
    assert found["classes"]["7"] == {"training": 18, "validation": 2, "test": 14} and list(found["classes"]) == ["7", "8", "9"]
    assert found["kind"] == "image" and found["name"] == "a.npz" and found["notes"] == []


def test_rows_with_notes(tmp_path):
    (tmp_path / "t.csv").write_text("u,v,kind\n" + "\n".join(f"{i % 7},{'' if i == 3 else i},{'ab'[i % 2]}" for i in range(60)))
    found, refusal = describe(str(tmp_path / "t.csv"), target="kind")
    assert refusal is None and found["kind"] == "row" and found["shape"] == [2] and set(found["classes"]) == {"a", "b"}
    assert any("missing numbers" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"x": np.zeros(40, int)}, "has one class only, '0'"),
        ({"x": np.arange(40)}, "are of classes without|part of a.npz is empty"),
    ],
)
def test_what_nothing_can_be_learned_from_is_described_and_refused(tmp_path, labels, message):
    x = np.random.default_rng(0).integers(0, 255, (40, 5, 6), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=labels["x"])
    found, refusal = describe(str(tmp_path / "a.npz"))
    assert sum(found["examples"].values()) == 40 and len(refusal.splitlines()) == 1
    assert any(part in refusal for part in message.split("|"))


def test_constant_pixels_are_described_and_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.full((40, 5, 6), 9, np.uint8), y=np.arange(40) % 2)
    found, refusal = describe(str(tmp_path / "a.npz"))
    assert sum(found["examples"].values()) == 40 and "are the same" in refusal


def test_pictures_without_classes_are_counted(tmp_path):
    for i in range(5):
        Image.effect_noise((6, 6), 50).save(tmp_path / f"{i}.png")
    found, refusal = describe(str(tmp_path))
    assert found["examples"] == {"unlabeled": 5} and found["classes"] == {} and "can serve as --ood" in refusal


def test_pictures_are_resized(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.effect_noise((6 + i, 8), 50).save(tmp_path / label / f"{i}.png")
    with pytest.raises(ValueError, match="pass --size"):
        describe(str(tmp_path))
    found, refusal = describe(str(tmp_path), size=(4, 5))
    assert refusal is None and found["shape"] == [1, 4, 5]


def test_text(monkeypatch):
    parts = [torch.zeros(n, dtype=torch.uint8) for n in (900, 40, 3)]
    monkeypatch.setitem(describing.TEXTS, "stdlib", lambda: Text("stdlib", (9, 2, 1), *parts))
    found, refusal = describe("stdlib")
    assert refusal is None
    assert found == {"name": "stdlib", "kind": "text", "files": 12, "bytes": {"training": 900, "validation": 40, "test": 3}}


def test_what_is_not_there_is_raised(tmp_path):
    with pytest.raises(ValueError, match="there is no data"):
        describe(str(tmp_path / "nothing"))


def test_the_look_is_shown(tmp_path):
    said = []
    describe("digits", bars=lambda name, steps: said.append((name, steps)) or (lambda: said.append("tick")))
    assert said[0][0] == "look" and said[1:] == ["tick"] * said[0][1]
