"""Class folders: layouts, what is skipped, sizes and modes, in memory or not."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes.formats import folders
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Files, Stored


def put(root, *names, size=(4, 4), mode="L"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size[::-1], 100).save(path)


@pytest.mark.parametrize(
    ("names", "classes", "labels", "parts"),
    [
        (["cat/1.png", "dog/2.JPG", "cat/10.jpeg"], ("cat", "dog"), [0, 0, 1], [ANY] * 3),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], ("a", "b"), [0, 1, 0], [TEST, TEST, TRAIN]),
        (["Train/a/1.png", "valid/b/1.png", "test/a/1.png"], ("a", "b"), [0, 0, 1], [TRAIN, TEST, VALIDATION]),
        (["train/a/1.png"], ("a",), [0], [ANY]),
        (["train/1.png", "car/1.png"], ("car", "train"), [0, 1], [ANY] * 2),
        (["a/deep/er/1.png", "a/0.png", "b/x/1.png"], ("a", "b"), [0, 0, 1], [ANY] * 3),
        (["1.png", "2.png"], (), [-1, -1], [ANY] * 2),
    ],
)
def test_layouts(tmp_path, names, classes, labels, parts):
    put(tmp_path, *names)
    data = read(str(tmp_path))
    assert data.classes == classes and data.labels.tolist() == labels and data.part.tolist() == parts
    assert [data.source.name(i) for i in range(len(names))] == sorted(names)
    assert data.kind == "image" and data.labels.dtype == torch.int64 and data.part.dtype == torch.int8 and not data.notes


@pytest.mark.parametrize(
    ("names", "others", "notes"),
    [
        (["a/1.png"], ["a/.hidden.png", "__MACOSX/a/1.png", ".git/x.png"], []),
        (
            ["a/1.png"],
            ["a/notes.txt", "a/b/more.txt", "readme.md"],
            ["skipped 3 files that are no PNG or JPEG, first a/b/more.txt"],
        ),
        (["a/1.png", "2.png"], [], ["skipped 1 picture in no class folder, first 2.png"]),
        (["a/1.png"], ["empty/x.txt"], ["no PNG or JPEG, first empty/x.txt", "1 class folder without a picture, first empty"]),
    ],
)
def test_what_is_skipped_is_noted(tmp_path, names, others, notes):
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    put(tmp_path, *names)
    data = read(str(tmp_path))
    assert len(data.notes) == len(notes) and all(part in note for part, note in zip(notes, data.notes, strict=True))
    assert data.classes == ("a",)


@pytest.mark.parametrize(
    ("modes", "channels", "note"),
    [
        (["L", "1", "LA"], 1, None),
        (["RGB", "RGBA", "P"], 3, None),
        (["L", "RGB", "RGB"], 3, "1 gray picture among color ones, first a/0.png; all are read as RGB"),
        (["L", "RGB", "L"], 3, "1 color picture among gray ones, first a/1.png; all are read as RGB"),
    ],
)
def test_modes(tmp_path, modes, channels, note):
    for i, mode in enumerate(modes):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("L", (4, 4), 255).convert(mode).save(tmp_path / f"a/{i}.png")
    data = read(str(tmp_path))
    assert data.source.shape == (channels, 4, 4) and data.notes == ((note,) if note else ())
    assert data.source.read(torch.arange(3)).unique().tolist() == [255]


def test_sizes_that_differ_are_named_or_made_alike(tmp_path):
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    put(tmp_path, "a/3.png", "b/0.png", size=(5, 6))
    with pytest.raises(ValueError, match=r"a/3.png has 5 x 6 .* most have 4 x 4; 2 of 5 differ: pass --size 32 \(or --size 32 48,"):
        read(str(tmp_path))
    assert read(str(tmp_path), size=(3, 2)).source.shape == (1, 3, 2)


def test_memory_decides_where_pictures_stay(tmp_path, monkeypatch):
    for i in range(200):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"c{i % 2}" / f"{i:03}.png")
    kept = read(str(tmp_path))
    monkeypatch.setattr(folders, "MEMORY", 200 * 16 - 1)
    streamed = read(str(tmp_path))
    assert isinstance(kept.source, Stored) and kept.source.at_hand
    assert isinstance(streamed.source, Files) and not streamed.source.at_hand and streamed.form.endswith("when they are needed")
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept.source.read(order), streamed.source.read(order))
    assert [kept.source.name(i) for i in range(200)] == [streamed.source.name(i) for i in range(200)]
    assert torch.equal(kept.labels, streamed.labels) and kept.source.name(101) == "c1/003.png"


@pytest.mark.parametrize("memory", [1 << 29, 0])
@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (b"text", "no PNG"), ("cut", "truncated")])
def test_a_bad_file_in_the_middle_is_named(tmp_path, monkeypatch, memory, content, message):
    monkeypatch.setattr(folders, "MEMORY", memory)
    put(tmp_path, *(f"a/{i:03}.png" for i in range(150)))
    bad = tmp_path / "a/100.png"
    if content == "cut":
        Image.effect_noise((4, 4), 50).save(bad)
        content = bad.read_bytes()[:-30]
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*a/100.png: .*{message}"):
        read(str(tmp_path)).source.read(torch.arange(150))


def test_links_in_a_circle_have_an_end(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b/self").symlink_to(tmp_path / "b")
    (tmp_path / "b/broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "b/pipe.png")
    data = read(str(tmp_path))
    assert len(data.source) == 2 and data.notes == (
        "skipped 2 files that are no PNG or JPEG, first b/broken.png",
        "skipped 2 links to folders that were read already, first a/loop",
    )


def test_names_of_any_bytes(tmp_path):
    put(tmp_path, os.fsdecode(b"caf\xe9/\xff\n.png"), "b/1.png")
    data = read(str(tmp_path))
    assert data.classes == ("b", r"caf\udce9") and data.source.name(1) == r"caf\udce9/\udcff\n.png"
    data.source.fingerprint()


def test_a_part_needs_class_folders(tmp_path):
    put(tmp_path, "train/a/1.png", "test/1.png")
    with pytest.raises(ValueError, match="test has pictures but no class folders"):
        read(str(tmp_path))
