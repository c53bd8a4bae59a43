"""Ranks compare what they hold by a few bytes: equal numbers for equal bits, and for no others."""

from __future__ import annotations

import pytest
import torch

from bayesrule.optimizers.fingerprints import WIDTH, are_equal, digest, fingerprint, marks, odd_one

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 1023, 2 * WIDTH, 8 * WIDTH, 16 * WIDTH + 5]


def flipped(x: torch.Tensor, place: int) -> torch.Tensor:
    """The sign of one number changed, which is one bit."""
    y = x.clone()
    y[place] = -y[place]
    return y


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestFingerprint:
    def tensor(self, size, dtype):
        return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)

    def test_is_of_the_bits_wherever_they_lie(self, size, dtype):
        x = self.tensor(size, dtype)
        for offset in range(1, 5):
            room = torch.zeros(size + offset, dtype=dtype)
            room[offset:] = x
            assert fingerprint([room[offset:]]) == fingerprint([x])

    def test_differs_where_one_bit_does(self, size, dtype):
        x = self.tensor(size, dtype)
        found = {fingerprint([flipped(x, place)]) for place in {0, size // 3, size // 2, size - 1}}
        assert len(found) == len({0, size // 3, size // 2, size - 1}) and fingerprint([x]) not in found

    @pytest.mark.parametrize(
        "move", [lambda x: x.roll(1), lambda x: x.flip(0), lambda x: x.roll(2 * WIDTH - 2)], ids=["1", "flip", "row"]
    )
    def test_differs_where_the_order_does(self, size, dtype, move):
        x = self.tensor(size, dtype)
        assert (fingerprint([move(x)]) == fingerprint([x])) == torch.equal(move(x), x)


def test_the_fingerprint_of_several_tensors_knows_their_order():
    a, b = torch.ones(3), torch.zeros(3)
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([a, torch.zeros(0)]) != fingerprint([a])


@pytest.mark.parametrize("ranks", [2, 3, 64, 1000, 4227])
def test_marks_added_in_float32_tell_whether_all_are_equal(ranks):
    number = digest("a number") | 63 << 6 | 63 << 30  # two of the largest digits
    mine = torch.tensor(marks(number))
    same = (mine * ranks).tolist()
    assert sum([mine] * ranks).tolist() == same and are_equal(same, ranks)
    for bit in range(64):
        other = torch.tensor(marks(number ^ (1 << bit)))
        assert not are_equal((mine * (ranks - 1) + other).tolist(), ranks)


def test_marks_of_every_number_of_64_bits():
    for number in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert are_equal([2 * mark for mark in marks(number)], 2)
        assert not are_equal([a + b for a, b in zip(marks(number), marks(number ^ -(2**63)), strict=True)], 2)


@pytest.mark.parametrize(
    ("values", "found"),
    [([1, 1, 1], None), ([1, 2, 1], (1, 0)), ([2, 1, 1], (0, 1)), ([None, 1, None, 1, 3], (4, 1)), ([None, 3], None)],
    ids=str,
)
def test_the_odd_one_is_the_first_that_is_not_like_most(values, found):
    assert odd_one(values) == found
