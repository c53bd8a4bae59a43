"""One way in: every kind of path that is nothing to learn from has its line."""

import os
import tempfile
from pathlib import Path

import pytest
from tests.recipes.formats.test_folders import put
from tests.recipes.formats.test_idx import write

from bayesrule.recipes.formats import reading
from bayesrule.recipes.formats.reading import read


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "there is no data 'mnist': neither .* one of digits, fashion-mnist, mnist5k, stdlib; did you mean 'mnist5k'$"),
        ("/no/such/folder", "there is no data '/no/such/folder'"),
        ("", "there is no data ''"),
        ("a\0b", r"there is no data 'a\\\\x00b'"),
        ("\ud800", "there is no data"),
        ("stdlib", r"stdlib is text; image and table recipes cannot learn from it \(see: bayesrule data stdlib\)"),
        (os.devnull, "is no regular file"),
    ],
)
def test_no_data(spec, message):
    with pytest.raises(ValueError, match=message):
        read(spec)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ([], "", "holds nothing, and nothing to learn from: there must be a folder of class folders"),
        (["a.txt", "b.txt", "c.txt", "d.md", "e/f.txt"], "", "holds 3 .txt files and 1 .md file and 1 folder"),
        (["raw/train-images-idx3-ubyte"], "", r"did you mean .*raw\?"),
        (["table.csv"], "", r"did you mean .*table.csv\?"),
        (["a.txt"], "a.txt", "a.txt is of no kind that can be read: there must be"),
        (["a.zip"], "a.zip", "a.zip is an archive; unpack it first"),
        (["a.tar.gz"], "a.tar.gz", "unpack it first"),
        (["train-images-idx3-ubyte.gz"], "train-images-idx3-ubyte.gz", "is one file of several; name the folder"),
        (["data_batch_1.bin"], "data_batch_1.bin", "is one file of several; name the folder"),
    ],
)
def test_paths_that_are_not_data(tmp_path, files, name, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("text")
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8, 8)}, "cannot be resized: its IDX files are no image files"),
        ({"size": (0, 8)}, "cannot resize .* to 0 x 8 pixels"),
        ({"target": "kind"}, "has no column 'kind': it is no table"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    write(tmp_path, "train", [0, 1])
    assert read(str(tmp_path), size=(4, 4)).source.shape == (1, 4, 4)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path), **options)


@pytest.fixture
def nobody():
    """Whoever runs the tests is not root meanwhile, who may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def test_what_may_not_be_read(nobody):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is its owner's alone
        put(Path(folder), "a/1.png")
        Path(folder, "a").chmod(0)
        with pytest.raises(PermissionError, match=r"cannot read .*a: Permission denied; check"):
            read(folder)
        Path(folder, "a").chmod(0o700)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError(13, "Permission denied", "a\nb"), PermissionError, r"cannot read a\\nb: Permission denied; check"),
        (FileNotFoundError(2, "No such file", b"caf\xe9"), FileNotFoundError, r"cannot read caf\\udce9: No such file; check"),
        (MemoryError(), ValueError, "digits does not fit into memory"),
        (KeyError("x"), ValueError, "cannot read digits: KeyError: 'x'; that should not happen"),
    ],
)
def test_nothing_else_escapes(monkeypatch, error, kind, message):
    def fail():
        raise error

    monkeypatch.setitem(reading.NAMES, "digits", fail)
    with pytest.raises(kind, match=message):
        read("digits")


def test_a_folder_has_its_name(tmp_path, monkeypatch):
    put(tmp_path / "pets", "a/1.png")
    monkeypatch.chdir(tmp_path / "pets")
    assert read(".").name == "pets"
