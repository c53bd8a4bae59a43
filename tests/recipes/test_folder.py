"""Run folders: whole, one process at a time, and whatever is wrong with them is said in one line."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayesrule.recipes.folder import (
    FORMAT,
    LOCK,
    appearing,
    claim,
    digest,
    locked,
    read_lines,
    read_record,
    restore,
    save,
    write_lines,
    write_record,
)
from bayesrule.storage import write_text


def test_appears_whole(tmp_path):
    with appearing(tmp_path / "deep" / "run") as draft:
        write_text(draft / "a.txt", "a")
        assert not (tmp_path / "deep" / "run").exists()
    assert (tmp_path / "deep" / "run" / "a.txt").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), appearing(tmp_path / "run") as draft:
        write_text(draft / "a.txt", "a")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "run").mkdir()
    with appearing(tmp_path / "run") as draft:
        write_text(draft / "a.txt", "a")
    assert (tmp_path / "run" / "a.txt").exists()


def test_what_came_in_between_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="already holds other files"), appearing(tmp_path / "run") as draft:
        write_text(draft / "a.txt", "a")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("mine")
    assert [(p.name, p.read_text()) for p in (tmp_path / "run").iterdir()] == [("mine", "mine")]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run.json", "already holds another run; go on with it by --resume, choose another --out or delete it first"),
        ("thesis.tex", "already holds other files; choose another --out or delete it first"),
        (".profile", "already holds other files"),
        (LOCK, None),
    ],
)
def test_a_full_folder_is_refused_and_left_alone(tmp_path, name, message):
    (tmp_path / name).write_text("mine")
    if message is None:
        claim(tmp_path)
    else:
        with pytest.raises(FileExistsError, match=message):
            claim(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FileExistsError, match="is a file; --out must be a new or empty folder"):
        claim(tmp_path / "x")
    claim(tmp_path / "nothing")


class TestLock:
    def test_one_at_a_time_and_nothing_is_left(self, tmp_path):
        with locked(tmp_path / "deep" / "run"):
            with pytest.raises(ValueError, match="another process is at work in"), locked(tmp_path / "deep" / "run"):
                pass
            with locked(tmp_path / "other"):
                (tmp_path / "other" / "a").write_text("")
        assert not (tmp_path / "deep" / "run").exists() and [p.name for p in (tmp_path / "other").iterdir()] == ["a"]
        with locked(tmp_path / "deep" / "run"):
            pass

    def test_a_folder_that_was_there_stays(self, tmp_path):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
        assert tmp_path.exists() and not list(tmp_path.iterdir())

    def test_is_free_when_its_process_died(self, tmp_path):
        (tmp_path / LOCK).write_text("")
        with locked(tmp_path):
            pass

    def test_who_is_refused_takes_nothing_away(self, tmp_path):
        with locked(tmp_path):
            for _ in range(2):
                with pytest.raises(ValueError, match="another process"), locked(tmp_path):
                    pass
            assert (tmp_path / LOCK).exists()

    def test_sweeps_what_a_process_that_died_was_writing_and_nothing_else(self, tmp_path):
        draft = tmp_path / ".checkpoint.safetensors.0123456789abcdef0123456789abcdef"
        draft.write_text("half"), (tmp_path / ".mine").write_text("mine")
        with locked(tmp_path):
            assert not draft.exists() and (tmp_path / ".mine").exists()


def test_a_record_comes_back_with_versions(tmp_path):
    write_record(tmp_path / "run.json", {"kind": "image", "number": 0.1, "infinite": float("inf")})
    record = read_record(tmp_path)
    assert record["kind"] == "image" and record["number"] == 0.1 and record["format"] == FORMAT
    assert record["infinite"] == float("inf")
    assert {"python", "bayesrule", "torch", "numpy", "safetensors"} == set(record["versions"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "run.json is damaged"),
        (b"{", "run.json is damaged"),
        (b"\xff\xfe", "run.json is damaged"),
        (b"[" * 100_000, "run.json is damaged"),
        (b"[1]", "is not the record of a run"),
        (b"null", "is not the record of a run"),
        (json.dumps({"format": FORMAT}).encode(), "is not the record of a run"),
        (json.dumps({"format": FORMAT, "kind": 3}).encode(), "is not the record of a run"),
        (json.dumps({"format": 99, "kind": "image"}).encode(), f"has format 99; this version reads format {FORMAT}"),
        (json.dumps({"kind": "image"}).encode(), "has format None"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_record(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path / "run.json") in str(refusal.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*nowhere; make one with: bayesrule train image"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        read_record(tmp_path)


def test_lines_come_back(tmp_path):
    lines = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert read_lines(tmp_path / "metrics.jsonl") == lines
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    write_lines(tmp_path / "metrics.jsonl", [])
    assert read_lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("text", ['{"a": 1}\n{', '{"a": 1}\n\n{"a": 2}', "[1]\n", '{"a": 1}\nnull\n'])
def test_damaged_lines_are_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        read_lines(tmp_path / "metrics.jsonl")


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.get_rng_state(), "c": torch.tensor(4.0)}
    save(tmp_path / "a", tensors, {"done": 3, "total": 0.1 + 0.2})
    found, about = restore(tmp_path / "a")
    assert about == {"done": 3, "total": 0.1 + 0.2} and set(found) == set(tensors)
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:12]),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "nothing said": lambda path: save_file(load_file(path), path),
    "said badly": lambda path: save_file(load_file(path), path, {"bayesrule": "{"}),
    "text": lambda path: path.write_text("some text"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_of_tensors_is_named(tmp_path, how):
    save(tmp_path / "a", {"a": torch.randn(30)}, {"done": 3})
    DAMAGE[how](tmp_path / "a")
    with pytest.raises(ValueError, match=r"/a is damaged: .") as refusal:
        restore(tmp_path / "a")
    assert "\n" not in str(refusal.value)


def test_a_digest_is_of_content_and_place(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    found = [digest(first, second)]
    for a, b in (("x", None), ("x", "y"), ("y", "x"), ("xy", "")):
        first.write_text(a)
        second.unlink(missing_ok=True)
        if b is not None:
            second.write_text(b)
        found.append(digest(first, second))
        os.utime(first)
        assert digest(first, second) == found[-1]
    assert len(set(found)) == 5
