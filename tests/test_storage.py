"""Files are written whole or not at all, and an error names the file that was meant."""

import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bayesrule.storage import is_draft, replacing, write_tensors, write_text


@pytest.fixture(params=["text", "tensors"])
def write(request):
    """Writes so many bytes or more."""
    if request.param == "text":
        return lambda path, size=8: write_text(path, "x" * size)
    return lambda path, size=8: write_tensors(path, {"a": torch.ones(size // 4 + 1)}, {"about": "x"})


def test_takes_the_place_of_what_was_there(tmp_path, write):
    (tmp_path / "a").write_text("old")
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() != b"old"


def test_text_is_utf8(tmp_path):
    write_text(str(tmp_path / "a"), "é\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_it_as_the_mask_says(tmp_path, write, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("failure", [KeyError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    (tmp_path / "a").write_text("old")
    with pytest.raises(failure), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise failure("x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old" and temporary.parent == tmp_path
    assert (tmp_path / "a").read_text() == "new"


def test_two_writers_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("1"), second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("nowhere/a", FileNotFoundError, "No such file"),
        ("file/a", NotADirectoryError, "Not a directory"),
        ("folder", OSError, "directory"),
    ],
)
def test_where_it_cannot_be_written_is_named(tmp_path, write, place, kind, words):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(kind, match=words) as refusal:
        write(tmp_path / place)
    assert refusal.value.filename == str(tmp_path / place)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, write):
    (tmp_path / "a").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            write(tmp_path / "a", 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_tensors_may_share_memory_be_views_and_of_any_kind(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    given = {
        "base": base, "turned": base.T, "part": base[:, 1:3], "same": base, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 2),
        "whole": torch.arange(3), "half": base.bfloat16(), "learned": torch.nn.Parameter(base), "bytes": torch.get_rng_state(),
    }  # fmt: skip
    write_tensors(tmp_path / "a", given, {"one": "1"})
    found = load_file(tmp_path / "a")
    assert set(found) == set(given)
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in given.items())
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"one": "1"}
    first = (tmp_path / "a").read_bytes()
    write_tensors(tmp_path / "a", given, {"one": "1"})
    assert (tmp_path / "a").read_bytes() == first


def test_temporary_files_can_be_told_from_others(tmp_path):
    with replacing(tmp_path / "a.b") as temporary:
        assert is_draft(temporary)
    names = (".lock", "a", ".a", ".a.b", "run.json", ".profile.d", "0" * 32, "." + "0" * 32, "a." + "0" * 32, ".a." + "0" * 31)
    assert not any(is_draft(tmp_path / name) for name in names)
