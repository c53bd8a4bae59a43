"""Settings of a run: checked, compared, kept as JSON, and read from run files."""

import json
import math
from pathlib import Path

import pytest

from bayesrule.recipes.settings import Settings, from_plain, read_toml, types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": -3}, "epochs must be at least 1, got -3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"size": (1, 2, 3)}, "size must be one number of pixels, or height and width; got 1 2 3"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"precision": "bf"}, "unknown precision 'bf'"),
        ({"augment": ("shift", "x")}, "unknown augmentation 'x'"),
    ],
)
def test_values_that_there_are_not_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings("digits", "sgd", **changes)


@pytest.mark.parametrize(("size", "expected"), [((), None), ((8,), (8, 8)), ((8, 12), (8, 12))])
def test_size_is_one_number_or_two(size, expected):
    assert Settings("digits", "sgd", size=size).height_width == expected


FULL = {
    "data": "a b", "optimizer": "ivon", "model": "m:f", "hyperparameters": {"lr": 0.1, "clip_radius": math.inf, "debias": False},
    "epochs": 3, "batch_size": 4, "seed": 5, "split_seed": 6, "split": (0.5, 0.1), "held_out": ("x", "é"), "size": (8, 9),
    "target": "t", "norm": "batch", "schedule": "step", "augment": ("flip",), "precision": "bf16", "patience": 7, "device": "cpu",
    "loo": 9, "also": ("c", "d"), "without": (3, 1),
}  # fmt: skip


def test_json_brings_all_of_them_back():
    settings = Settings(**FULL)
    assert set(FULL) == set(types(Settings)) and from_plain(json.loads(json.dumps(settings.plain()))) == settings
    assert from_plain(json.loads(json.dumps(Settings("a", "b").plain()))) == Settings("a", "b")


@pytest.mark.parametrize("name", FULL)
def test_what_differs_is_named(name):
    plain, settings = Settings("digits", "sgd"), Settings(**{"data": "digits", "optimizer": "sgd", name: FULL[name]})
    expected = [] if name in ("hyperparameters", "data") else [name]  # these depend on the data, and on where they are
    assert settings.differ(plain) == plain.differ(settings) == expected and settings.differ(settings) == []


@pytest.mark.parametrize(
    "plain", [{}, {"data": "x"}, {"data": "x", "optimizer": "y", "color": 1}, {"data": "x", "optimizer": "y", "epochs": "z"}]
)
def test_what_is_no_settings_is_refused(plain):
    with pytest.raises((TypeError, ValueError)):
        from_plain(plain)


KNOWN = types(Settings) | {"out": Path, "lr": float | None, "resume": bool, "files": tuple[Path, ...]}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("epochs = 3", {"epochs": 3}),
        ("batch-size = 3", {"batch_size": 3}),
        ("batch_size = 3", {"batch_size": 3}),
        ("lr = 1", {"lr": 1.0}),
        ("lr = 1e-3", {"lr": 0.001}),
        ("patience = 4", {"patience": 4}),
        ("split = [0.5, 0.2]", {"split": (0.5, 0.2)}),
        ("size = [8]", {"size": (8,)}),
        ("size = [8, 9]", {"size": (8, 9)}),
        ("size = []", {"size": ()}),
        ('held-out = ["8", "9"]', {"held_out": ("8", "9")}),
        ('out = "runs/a"', {"out": Path("runs/a")}),
        ('files = ["a", "b"]', {"files": ("a", "b")}),
        ("resume = true", {"resume": True}),
        ('data = "dígits"', {"data": "dígits"}),
    ],
)
def test_a_run_file_holds_settings(tmp_path, text, values):
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    found = read_toml(tmp_path / "run.toml", KNOWN)
    assert found == values and all(type(found[name]) is type(values[name]) for name in values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "run.toml has an unknown key 'epoch'; did you mean 'epochs'"),
        ("batch-sise = 3", "has an unknown key 'batch-sise'; did you mean 'batch_size'"),
        ("zzz = 3", "has an unknown key 'zzz'; known are data, optimizer"),
        ("[epochs]\na = 1", "epochs must be a whole number, got {'a': 1}"),
        ("epochs = true", "epochs must be a whole number, got True"),
        ("epochs = 1.0", "epochs must be a whole number, got 1.0"),
        ('epochs = "1"', "epochs must be a whole number, got '1'"),
        ("resume = 1", "resume must be true or false, got 1"),
        ('lr = "fast"', "lr must be a number, got 'fast'"),
        ("lr = true", "lr must be a number, got True"),
        ("lr = nan_", "is no TOML file"),
        ("data = ['x']", r"data must be text, got \['x'\]"),
        ("out = 3", "out must be a path, got 3"),
        ("size = 8", "size must be "),
        ("size = [8.5]", "size must be "),
        ("split = [0.5]", "split must be "),
        ("split = [0.5, 0.2, 0.3]", "split must be "),
        ("held-out = [8]", "held-out must be "),
        ("a = 1\na = 2", "is no TOML file"),
        ("= 3", "is no TOML file"),
        (b"\xff", "is no TOML file"),
    ],
)
def test_what_is_wrong_with_a_run_file_is_one_line(tmp_path, text, message):
    (tmp_path / "run.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as refusal:
        read_toml(tmp_path / "run.toml", KNOWN)
    assert "\n" not in str(refusal.value) and "run.toml" in str(refusal.value)


@pytest.mark.parametrize("text", ["size = 8", "split = [0.5]", "held-out = [8]"])
def test_a_list_that_is_wanted_is_called_a_list(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=r"must be .*(list|tuple)"):
        read_toml(tmp_path / "run.toml", KNOWN)


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.toml"):
        read_toml(tmp_path / "run.toml", KNOWN)
