"""Run folders appear whole or not at all, and say in one line what is wrong with them."""

import json

import pytest

from bayesrule.recipes.folder import appearing, claim, read_lines, read_record, write, write_record


def test_appears_whole(tmp_path):
    with appearing(tmp_path / "deep" / "run") as draft:
        write(draft / "a.txt", "a")
        assert not (tmp_path / "deep" / "run").exists()
    assert (tmp_path / "deep" / "run" / "a.txt").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), appearing(tmp_path / "run") as draft:
        write(draft / "a.txt", "a")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "run").mkdir()
    with appearing(tmp_path / "run") as draft:
        write(draft / "a.txt", "a")
    assert (tmp_path / "run" / "a.txt").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("run.json", "already holds another run"), ("thesis.tex", "already holds other files")]
)
def test_a_full_folder_is_refused_and_left_alone(tmp_path, name, message):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=message):
        claim(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        claim(tmp_path / "x")


def test_a_record_comes_back_with_versions(tmp_path):
    write_record(tmp_path / "run.json", {"kind": "image"})
    record = read_record(tmp_path)
    assert record["kind"] == "image"
    assert {"python", "bayesrule", "torch"} <= set(record["versions"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.json is damaged"),
        ("{", "run.json is damaged"),
        ("[1]", "is not the record of a run"),
        (json.dumps({"format": 1}), "is not the record of a run"),
        (json.dumps({"format": 99, "kind": "image"}), "has format 99; this version reads format 1"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        read_record(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        read_lines(tmp_path / "metrics.jsonl")
