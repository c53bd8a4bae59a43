"""Tables: numbers and texts, what is missing, targets, parts, and everything that can be wrong with a line."""

import gzip

import pytest
import torch

from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION


def table(path, text):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def rows(data):
    return data.source.read(torch.arange(len(data.source))).tolist()


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.csv.gz", ","), ("a.tsv", "\t"), ("a.tsv.gz", "\t"), ("A.CSV", ",")]
)
def test_numbers_and_texts(tmp_path, name, separator):
    lines = ["age,color,size,kind", "1,red,1.5,yes", "", "2,blue,NA,no", '3,"red",2.5,yes', "4,,2e0,yes"]
    data = read(table(tmp_path / name, "\r\n".join(lines).replace(",", separator)))
    assert data.columns == ("age", "color=blue", "color=red", "color=missing", "size")
    assert rows(data) == [[1, 0, 1, 0, 1.5], [2, 1, 0, 0, 2], [3, 0, 1, 0, 2.5], [4, 0, 0, 1, 2]]
    assert data.classes == ("no", "yes") and data.labels.tolist() == [1, 0, 1, 1] and data.part.tolist() == [ANY] * 4
    assert [data.source.name(i) for i in range(4)] == ["row 2", "row 4", "row 5", "row 6"]
    assert data.notes == ("missing numbers became the mean of their column: size (1)",) and data.kind == "row"


@pytest.mark.parametrize(
    ("cells", "classes", "labels"),
    [
        (["10", "9", "10.0"], ("9", "10"), [1, 0, 1]),
        (["0.5", "-1", "0.5"], ("-1", "0.5"), [1, 0, 1]),
        (["True", "False", "True"], ("False", "True"), [1, 0, 1]),
        (["None", "b", "b"], ("None", "b"), [0, 1, 1]),
        (["1_0", "9", "9"], ("1_0", "9"), [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("target", [None, "t"])
def test_targets(tmp_path, cells, classes, labels, target):
    order = "{0},{1}\n" if target is None else "{1},{0}\n"
    text = order.format("a", "t") + "".join(order.format(i, cell) for i, cell in enumerate(cells))
    data = read(table(tmp_path / "a.csv", text), target=target)
    assert data.classes == classes and data.labels.tolist() == labels and rows(data) == [[0], [1], [2]]


def test_columns_that_go(tmp_path):
    data = read(table(tmp_path / "a.csv", ",a,void,t\n0,5,,x\n1,6,?,y\n"))
    assert data.columns == ("a",) and data.notes == (
        "dropped the first column, which has no name",
        "dropped columns without anything in them: void",
    )


def test_parts_share_their_columns_and_texts(tmp_path):
    table(tmp_path / "train.csv", "a,c,t\n1,red,x\n,red,y\n3,red,x\n")
    table(tmp_path / "test.csv.gz", "t,c,a\nz,blue,100\n")
    table(tmp_path / "validation.csv", "a,c,t\n,red,x\n")
    data = read(str(tmp_path))
    assert data.part.tolist() == [TRAIN] * 3 + [VALIDATION, TEST] and data.classes == ("x", "y", "z")
    assert data.columns == ("a", "c=blue", "c=red")
    assert rows(data) == [[1, 0, 1], [2, 0, 1], [3, 0, 1], [2, 0, 1], [100, 1, 0]], "the mean is that of the training part"
    assert [data.source.name(i) for i in (2, 3, 4)] == ["train.csv row 4", "validation.csv row 2", "test.csv.gz row 2"]


MANY = "".join(f"{i},name{i},{i % 2}\n" for i in range(101))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv is empty"),
        ("\n\n", "a.csv is empty"),
        ("a,t\n", "has a header but no rows"),
        ("a\n1\n", "has one column, 'a'; inputs and classes are separated by ','$"),
        ("a;t\n1;2\n", "has one column, 'a;t'; .* by ',', and ';' is not what separates them here"),
        ("1,2\n3,4\n", "has no header: its first line is all numbers"),
        ("a,,t\n1,2,3\n", "has no name for column 2"),
        ("a,b,a\n1,2,3\n", "has two columns named 'a'"),
        ("a,t\n1,2\n\n3\n", "line 4 has 1 cells, the header 2"),
        ("a,t\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ('a,t\n"1,2\n', "line 2 cannot be read"),
        ("a,t\n1,\0\n", "line 2 is no line of a table, but binary"),
        (b"a,t\n1,\xff\n", "is no UTF-8 text"),
        ("a,t\n1,x\n2,NA\n", "row 3 has no 't', the class to learn"),
        ("a,t\n1,x\ninf,y\n", "row 3 has an infinite 'a'"),
        ("a,t\n1e39,x\n", "row 2 has an infinite 'a'"),
        ("a,t\n1,inf\n", "row 2 has an infinite 't'"),
        ("a,t\n,x\n,y\n", "has no column with anything in it but the target"),
        ("a,id,t\n" + MANY, "column 'id' has more than 100 different texts, such as 'name100': it looks like an identifier"),
        (
            "a,id,price\n" + "".join(f"1,a,{i}.5\n" for i in range(101)),
            "this learns classes; target 'price' has 101 different numbers",
        ),
        ("a,t\n" + "".join(f"1,n{i}\n" for i in range(101)), "this learns classes; target 't' has 101 different texts"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(table(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": "a,b,t\n1,2,x\n", "test.csv": "a,t\n1,x\n"}, "test.csv lacks the columns b"),
        ({"train.csv": "a,t\n1,x\n", "test.csv": "a,c,t\n1,2,x\n"}, "test.csv has, unlike train.csv, the columns c"),
        ({"train.csv": "a,t\n1,x\n", "train.csv.gz": "a,t\n1,x\n"}, "more than one table of a part"),
        ({"train.csv": "a,t\n1,x\n", "test.csv": "a,t\n1,\n"}, "test.csv row 2 has no 't'"),
    ],
)
def test_parts_that_do_not_go_together(tmp_path, files, message):
    for name, text in files.items():
        table(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path))


def test_the_nearest_target_is_shown(tmp_path):
    path = table(tmp_path / "a.csv", "price,kind\n1,x\n")
    with pytest.raises(ValueError, match=r"has no column 'knd'; did you mean 'kind'\? there are: price, kind"):
        read(path, target="knd")


def test_chunks_make_no_difference(tmp_path):
    text = "a,c,t\n" + "".join(f"{i},{'ab'[i % 2]},{i % 3}\n" for i in range(9000)) + "x,a,1\n"
    with pytest.raises(ValueError, match="column 'a' has more than 100 different texts"):
        read(table(tmp_path / "a.csv", text))
    data = read(table(tmp_path / "a.csv", text.removesuffix("x,a,1\n")))
    assert rows(data) == [[i, 1 - i % 2, i % 2] for i in range(9000)] and data.labels.tolist() == [i % 3 for i in range(9000)]
    assert data.source.name(8999) == "row 9001"


@pytest.mark.shared
def test_weather(shared):
    data = read(str(next((shared / "data/streams").glob("weather.csv*"))))
    assert data.source.shape == (8,) and len(data.source) == 18159 and data.classes == ("0", "1")
