"""Folders that appear whole or not at all."""

import pytest

from bayesrule.uses.merging.drafts import drafting


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with drafting(out, "a") as draft:
        (draft.folder / "file").write_text("x")
        draft.save(3, {})
        assert not out.exists() and draft.folder.parent == out.parent
    assert names(tmp_path / "deep") == ["file", "out"]


def test_takes_the_place_of_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with drafting(tmp_path / "out", "a") as draft:
        (draft.folder / "file").write_text("x")
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("failure", [ValueError("x"), OSError(28, "No space left on device"), KeyError("x")])
def test_a_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, drafting(tmp_path / "out", "a") as draft:
        draft.save(1, {})
        (draft.folder / "file").write_text("x")
        raise failure
    assert names(tmp_path) == []
    if isinstance(failure, OSError):
        assert caught.value.filename == str(tmp_path / "out") and caught.value.errno == 28


def test_an_error_of_another_file_names_that_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, drafting(tmp_path / "out", "a"):
        (tmp_path / "input").read_text()
    assert caught.value.filename == str(tmp_path / "input")


def interrupted(out, request="a", done=2):
    with pytest.raises(KeyboardInterrupt), drafting(out, request) as draft:
        (draft.folder / "file").write_text("half")
        if done:
            draft.save(done, {"seen": [1, 2]})
        raise KeyboardInterrupt
    return draft.folder


def test_an_interruption_is_gone_on_with(tmp_path):
    folder = interrupted(tmp_path / "out")
    assert (folder / "file").read_text() == "half" and not (tmp_path / "out").exists()
    with drafting(tmp_path / "out", "a") as draft:
        assert (draft.done, draft.notes) == (2, {"seen": [1, 2]}) and (draft.folder / "file").exists()
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("journal", [None, "{", "[]", '{"request": "a"}', '{"request": "a", "done": "x", "notes": {}}'])
def test_what_was_not_noted_is_thrown_away(tmp_path, journal):
    folder = interrupted(tmp_path / "out", done=0)
    if journal is not None:
        (folder / ".journal.json").write_text(journal)
    with drafting(tmp_path / "out", "a") as draft:
        assert draft.done == 0 and names(draft.folder) == [".lock"]


def test_a_draft_of_something_else_is_left_alone(tmp_path):
    folder = interrupted(tmp_path / "out")
    with pytest.raises(FileExistsError, match="is the unfinished merge of something else"), drafting(tmp_path / "out", "b"):
        pass
    assert (folder / "file").read_text() == "half"
    with drafting(tmp_path / "out", "a") as draft:
        assert draft.done == 2


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_left_alone(tmp_path, there):
    out = tmp_path / "out"
    out.write_text("x") if there == "file" else (out.mkdir(), (out / "x").write_text("x"))
    with pytest.raises(FileExistsError, match="already exists; choose another place"), drafting(out, "a"):
        pass
    assert out.exists() and len(names(tmp_path)) == (1 if there == "file" else 2)


def test_two_at_once(tmp_path):
    with (
        drafting(tmp_path / "out", "a") as draft,
        pytest.raises(FileExistsError, match="another process is making"),
        drafting(tmp_path / "out", "a"),
    ):
        pass
    assert draft.done == 0 and (tmp_path / "out").is_dir()


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError) as caught, drafting(tmp_path / "file" / "out", "a"):
        pass
    assert caught.value.filename == str(tmp_path / "file" / "out")
