"""Training parts with more examples, and with fewer."""

import numpy as np
import pytest
import torch

from bayesrule.recipes.amending import Together, amended
from bayesrule.recipes.data import load
from bayesrule.recipes.formats.documents import Documents
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import train
from bayesrule.recipes.sources import ANY, TEST, TRAIN, Collection, stored


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def collection(digits, labels, classes=("7", "3"), part=ANY):
    values = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, *digits.shape).to(torch.uint8)
    places = torch.full((len(labels),), part, dtype=torch.int8)
    return Collection("more", "image", stored(values, "more"), torch.tensor(labels), classes, places, "")


class TestTogether:
    @pytest.mark.parametrize("indices", [[0], [6], [6, 0, 5, 2], [3, 4]])
    def test_reads_each_from_its_source(self, indices):
        one, two = torch.randn(4, 3), torch.randn(3, 3)
        both = Together((stored(one, "a"), stored(two, "b")))
        assert torch.equal(both.read(torch.tensor(indices)), torch.cat([one, two])[indices])
        assert [both.name(i) for i in indices] == [f"a[{i}]" if i < 4 else f"b[{i - 4}]" for i in indices]
        assert both.lengths(torch.tensor(indices)) is None and len(both) == 7 and both.at_hand

    def test_bytes_beside_numbers_are_numbers(self):
        both = Together((stored(torch.full((1, 2), 200, dtype=torch.uint8), "a"), stored(torch.full((1, 2), 0.5), "b")))
        assert both.read(torch.tensor([1, 0])).tolist() == [[0.5, 0.5], [200.0, 200.0]]

    def test_documents_are_as_long_as_the_longest_can_be(self):
        short = Documents(torch.tensor([[5, 6], [7, -1]], dtype=torch.int32), "short {}".format, texts=["a", "b"])
        long = Documents(torch.tensor([[1, 2, 3]], dtype=torch.int32), "long {}".format, texts=["c"])
        both = Together((short, long))
        assert both.shape == (3,) and both.texts == ["a", "b", "c"]
        assert both.read(torch.tensor([2, 1])).tolist() == [[1, 2, 3], [7, -1, -1]]
        assert both.lengths(torch.tensor([0, 1, 2])).tolist() == [2, 1, 3]

    def test_three_are_two_and_one(self):
        a, b, c = (stored(torch.full((2, 1), float(k)), name) for k, name in enumerate("abc"))
        nested, flat = Together((Together((a, b)), c)), Together((a, b, c))
        everything = torch.tensor([5, 0, 3, 2, 4, 1])
        assert torch.equal(nested.read(everything), flat.read(everything))
        assert [nested.name(i) for i in range(6)] == [flat.name(i) for i in range(6)]


class TestAmended:
    def test_nothing_is_nothing(self, digits):
        assert amended(digits, [], []) is digits

    def test_some_come_and_some_go(self, digits):
        count = len(digits.train)
        data = amended(digits, [collection(digits, [0, 1, 0])], [0, count + 1])
        assert len(data.train) == count + 1
        assert data.train.labels[-2:].tolist() == [7, 7] and data.train.name(len(data.train) - 1) == "more[2]"
        assert torch.equal(data.train[0], digits.train[1]) and data.train[count].unique().tolist() == [2]
        assert data.validation is digits.validation and data.test is digits.test

    def test_what_is_kept_for_testing_stays_out(self, digits):
        more = collection(digits, [0, 1, 0])
        more.part[1] = TEST
        assert len(amended(digits, [more], []).train) == len(digits.train) + 2

    def test_each_has_a_fingerprint_of_its_own(self, digits):
        more = collection(digits, [0, 1])
        ways = [([], []), ([], [3]), ([], [4]), ([more], []), ([more], [3]), ([more, more], []), ([collection(digits, [1, 1])], [])]
        assert len({amended(digits, *way).fingerprint for way in ways}) == len(ways)

    @pytest.mark.parametrize(
        ("labels", "classes", "part", "without", "message"),
        [
            ([0], ("cat",), TRAIN, [], r"more has 1 classes that digits has not \(cat\), and the model no output for them"),
            ([0, -1], ("7",), ANY, [], "1 images of more have no class; give each one of 0, 1, 2"),
            ([0], ("7",), TEST, [], "more has no training images to add"),
            ([0], ("7",), ANY, [899], "digits has no training image 899 to leave out; they are 0 to 898"),
            ([0], ("7",), ANY, [-1], "no training image -1"),
            ([0], ("7",), ANY, range(899), "all 899 training images of digits are left out"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, digits, labels, classes, part, without, message):
        with pytest.raises(ValueError, match=message):
            amended(digits, [collection(digits, labels, classes, part)], without)


def test_a_run_learns_from_them_and_is_read_back(settings, world, tmp_path):
    with np.load(world / "small.npz") as found:
        np.savez(tmp_path / "more.npz", x=found["x"][:20], y=found["y"][:20])
    count = len(settings().load().train)
    train(settings("adamw", epochs=1, also=(str(tmp_path / "more.npz"),), without=(0, 2)), tmp_path / "run")
    run = read(tmp_path / "run")
    assert len(run.data.train) == count + 18 and run.settings.without == (0, 2)
    np.savez(tmp_path / "more.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.zeros(3, int))
    with pytest.raises(ValueError, match="no longer those that it began with"):
        read(tmp_path / "run")
