"""Texts and classes in columns of a table: found by name, split, encoded; whatever is wrong is one line."""

import csv

import pytest
import torch

from bayesrule.recipes.formats import documents
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION

ROWS = [("good food", "yes"), ("bad, bad food", "no"), ("so\nso", "yes"), ("x" * 100, "no")]


def table(path, rows=ROWS, header=("text", "label"), **how):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **how)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def lengths(texts):
    """As tokens: the length of each word."""
    ids = [[len(word) for word in text.split()] for text in texts]
    return torch.tensor([row + [-1] * (max(map(len, ids)) - len(row)) for row in ids], dtype=torch.int32)


def read(path, text="text", label="label", **more):
    return documents.read(str(path), lengths, text, label, **more)


@pytest.mark.parametrize(("name", "how"), [("a.csv", {}), ("a.tsv", {"delimiter": "\t"})])
def test_a_table(tmp_path, name, how):
    found = read(table(tmp_path / name, **how))
    assert (found.kind, found.classes, found.labels.tolist()) == ("document", ("no", "yes"), [1, 0, 1, 0])
    assert found.source.texts == [text for text, _ in ROWS]
    assert found.source.read(torch.tensor([0, 1])).tolist() == [[4, 4, -1], [4, 3, 4]]
    assert found.source.lengths(torch.tensor([1, 3])).tolist() == [3, 1]
    assert found.source.name(0) == "row 2: good food" and found.source.name(2) == "row 4: so\\nso"
    assert found.source.name(3) == f"row 6: {'x' * 67}..."  # row 4 takes two lines
    assert (found.part == ANY).all()


def test_columns_by_name_numbers_as_classes_and_no_classes(tmp_path):
    path = table(tmp_path / "a.csv", [("10", "a b", "1"), ("9", "c", "2")], ("stars", "body", "id"))
    found = read(path, "body", "stars")
    assert found.classes == ("9", "10") and found.labels.tolist() == [1, 0] and found.source.texts == ["a b", "c"]
    found = read(path, "body", None)
    assert found.classes == () and found.labels.tolist() == [-1, -1]


def test_parts(tmp_path):
    train, new = table(tmp_path / "train.csv"), table(tmp_path / "new.csv", ROWS[:1])
    table(tmp_path / "test.csv", ROWS[:2])
    assert read(train, validation=str(new)).part.tolist() == [TRAIN] * 4 + [VALIDATION]
    assert read(tmp_path).part.tolist() == [TRAIN] * 4 + [TEST] * 2
    assert read(tmp_path, validation=str(new)).part.tolist() == [TRAIN] * 4 + [VALIDATION] + [TEST] * 2
    assert read(tmp_path, validation=str(new)).source.name(4) == "new.csv row 2: good food"


@pytest.mark.parametrize(
    ("write", "more", "words"),
    [
        (lambda p: table(p), {"text": "texts"}, "has no column 'texts'; did you mean 'text'? there are: text, label"),
        (lambda p: table(p), {"label": "class"}, "has no column 'class'; there are: text, label"),
        (lambda p: table(p), {"label": "text"}, "the text and the label cannot both be column 'text'"),
        (lambda p: table(p, [("", "yes")]), {}, "row 2 has no 'text'; fill it in or take the row out"),
        (lambda p: table(p, [("a", "yes"), ("b", "")]), {}, "row 3 has no 'label', the class to learn"),
        (lambda p: table(p, []), {}, "has a header but no rows"),
        (lambda p: table(p, [("a", "b", "c")]), {}, "line 2 has 3 cells, the header 2"),
        (lambda p: table(p, [(f"a{i}", f"b{i}") for i in range(300)]), {}, "300 different texts; name another column"),
        (lambda p: p.write_bytes(b""), {}, "is empty"),
        (lambda p: p.write_bytes(bytes(range(256))), {}, "is no UTF-8 text"),
        (lambda p: p.write_bytes(b"text,label\na\0,b\n"), {}, "line 2 is no line of a table, but binary"),
        (lambda p: p.write_bytes(b"\x1f\x8bnot gzip"), {}, "is damaged"),
        (lambda p: p.mkdir(), {}, "holds nothing, and no train.csv"),
        (lambda p: table(p), {"validation": "notes.txt"}, "notes.txt is no table that can be read: its name must end in .csv"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(tmp_path, monkeypatch, write, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text,label\na,b\n")
    write(tmp_path / "a.csv")
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "a.csv", **more)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "a.csv")
    assert caught.value.filename.endswith("a.csv")


def test_two_tables_of_a_part_are_refused(tmp_path):
    for name in ("train.csv", "val.csv", "validation.csv"):
        table(tmp_path / name)
    with pytest.raises(ValueError, match=r"more than one table of a part: val.csv, validation.csv; leave one"):
        read(tmp_path)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(ValueError, match=r"holds validation.csv already; leave --validation out"):
        read(tmp_path, validation=str(tmp_path / "train.csv"))
