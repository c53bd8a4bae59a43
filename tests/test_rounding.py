"""Rounding by chance, and what it is used for."""

import pytest
import torch

from bayesrule.rounding import followed, place, stochastic

NARROW = [torch.bfloat16, torch.float16]
GENERATOR = torch.Generator().manual_seed(0)
WIDE = torch.cat(
    [
        torch.randn(2000, generator=GENERATOR) * 10.0 ** torch.randint(-9, 5, (2000,), generator=GENERATOR),
        torch.tensor([0.0, -0.0, 1e-30, -1e-8, 6e-8, 65504.0, 65519.0, 65530.0, 1e6, -1e6, 3.4e38, -3.4e38, 1.0, -1.0]),
    ]
)


def uniform(seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
class TestStochastic:
    def test_gives_numbers_of_the_dtype_within_one_place(self, dtype):
        most = torch.finfo(dtype).max
        bounded = WIDE.clamp(-most, most)
        for seed in range(20):
            rounded = stochastic(WIDE, uniform(seed, WIDE), dtype)
            assert torch.equal(rounded.to(dtype).float(), rounded)
            assert ((rounded - bounded).abs() < place(bounded, dtype)).all()

    def test_is_right_on_average(self, dtype):
        most, times = torch.finfo(dtype).max, 2000
        bounded = WIDE.clamp(-most, most)
        total = torch.zeros_like(WIDE, dtype=torch.float64)
        for seed in range(times):
            total += stochastic(WIDE, uniform(seed, WIDE), dtype).double()
        deviations = (total / times - bounded).abs() / (place(bounded, dtype).double() / 2 / times**0.5)
        assert deviations.max() < 4.5  # of 2,014, in units of the largest standard deviation there is

    def test_leaves_what_the_dtype_holds(self, dtype):
        held = WIDE.to(dtype).float()
        held = held[held.isfinite()]
        assert torch.equal(stochastic(held, uniform(0, held), dtype), held)

    def test_keeps_what_is_not_finite(self, dtype):
        strange = torch.tensor([float("inf"), float("-inf"), float("nan")])
        found = stochastic(strange, torch.full((3,), 0.5), dtype)
        torch.testing.assert_close(found, strange, equal_nan=True)

    def test_a_place_is_the_distance_to_the_next_larger_number(self, dtype):
        x = torch.tensor([1.0, 1.5, 2.0, 3.0, 1e-3, -4.0, 1000.0]).to(dtype)
        above = (x.abs().view(torch.int16) + 1).view(dtype)
        assert torch.equal(place(x.float(), dtype), above.float() - x.abs().float())


def test_what_somebody_changed_is_followed():
    exact = torch.tensor([1 + 2**-12, -3.0, 5 + 2**-9])
    held = exact.to(torch.bfloat16)
    held[1] = 7.0
    assert torch.equal(followed(exact, held), torch.tensor([1 + 2**-12, 7.0, 5 + 2**-9]))
