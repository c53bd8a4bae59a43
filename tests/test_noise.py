import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from bayesrule.noise import EVALUATE, POSTERIOR, TRAIN, CounterNoise, addresses
from bayesrule.vector import BUCKET, Vector, buckets

MILLION = 1 << 20
ADDRESSES = [CounterNoise(), CounterNoise(seed=12345, stream=EVALUATE, step=7, draw=3), CounterNoise(seed=-(2**70), step=10**9)]
HERE = CounterNoise(seed=5, stream=TRAIN, step=3, draw=2)

# Addresses are fixed, so every number below is the same in every run and no test is flaky. The bounds are in standard errors
# of a perfect source, so that they say something about the source: with 4.5 of them a perfect one has one chance in 150,000
# to have been outside, and some 300 figures are looked at.
SIGMAS = 4.5


def kolmogorov_smirnov(probabilities):
    """sqrt(n) times the largest gap between the empirical and the uniform distribution function."""
    ordered = probabilities.double().sort().values
    n = len(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((ranks[1:] - ordered).max().item(), (ordered - ranks[:-1]).max().item())


# P(sqrt(n) D > x) is about 2 exp(-2 x^2): 2 in ten thousand at 2.15.
KS_BOUND = 2.15

# The first two normals of two tensors and the first two uniform numbers at HERE, in double precision.
PINNED = [
    *(0.5913446821930087, -0.17108493789563367, 1.3831947457826357, 0.9162188571710934),
    *(0.8273898481857032, 0.9103558112401515),
]


def correlation(a, b):
    """In standard errors of independent numbers."""
    a, b = a - a.mean(), b - b.mean()
    return ((a @ b) / (a.norm() * b.norm())).item() * math.sqrt(len(a))


@pytest.fixture(scope="module", params=range(len(ADDRESSES)), ids=lambda i: f"address{i}")
def sample(request):
    return ADDRESSES[request.param].normal(torch.empty(MILLION, dtype=torch.float64))


class TestAddress:
    """A number depends on its address and on nothing else."""

    @pytest.mark.parametrize("kind", ["normal", "uniform"])
    def test_the_same_address_gives_the_same_numbers(self, kind):
        like = torch.empty(1001)
        first = getattr(HERE, kind)(like)
        again = getattr(CounterNoise(seed=5, stream=TRAIN, step=3, draw=2), kind)
        again(torch.empty(7))  # whatever was drawn before
        assert torch.equal(again(like), first)

    @pytest.mark.parametrize("kind", ["normal", "uniform"])
    @pytest.mark.parametrize(
        "other",
        [
            replace(HERE, seed=6),
            replace(HERE, seed=-5),
            replace(HERE, seed=5 + 2**32),
            replace(HERE, seed=5 + 2**64),
            replace(HERE, stream=EVALUATE),
            replace(HERE, stream=POSTERIOR),
            HERE.at(step=4),
            HERE.at(step=3 + 2**32),
            HERE.at(draw=3),
            CounterNoise(seed=5, stream=TRAIN, step=2, draw=3),  # step and draw are no sum
        ],
        ids=repr,
    )
    def test_another_seed_stream_step_or_draw_gives_other_numbers(self, kind, other):
        like = torch.empty(1000)
        assert (getattr(HERE, kind)(like) == getattr(other, kind)(like)).float().mean() < 0.01

    def test_parts_of_a_vector_have_numbers_of_their_own(self):
        parts = HERE.normal(Vector([torch.empty(1000)] * 3)).parts
        assert torch.equal(parts[0], HERE.normal(torch.empty(1000)))
        for a, b in [(0, 1), (1, 2), (0, 2)]:
            assert (parts[a] == parts[b]).sum() == 0

    def test_at_changes_what_it_is_told_and_keeps_the_rest(self):
        assert HERE.at(step=9) == replace(HERE, step=9)
        assert HERE.at(draw=9) == replace(HERE, draw=9)
        assert HERE.at() == HERE
        assert HERE.at(step=0, draw=0) == replace(HERE, step=0, draw=0)

    def test_the_stream_of_numbers_never_changes(self):
        """Runs are resumed and posteriors drawn again with these numbers: a change of them breaks what users saved."""
        two = Vector([torch.empty(2, dtype=torch.float64)] * 2)
        pinned = [v for part in HERE.normal(two) for v in part.tolist()] + HERE.uniform(two[0]).tolist()
        assert pinned == pytest.approx(PINNED, rel=1e-12)

    def test_torchs_own_generator_is_neither_read_nor_moved(self):
        torch.manual_seed(1)
        first, state = HERE.normal(torch.empty(100)), torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(HERE.normal(torch.empty(100)), first)
        torch.manual_seed(1)
        HERE.uniform(torch.empty(100))
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_number_of_threads_does_not_matter(self):
        like, before = torch.empty(300_001), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = HERE.normal(like), HERE.uniform(like)
            torch.set_num_threads(2)
            together = HERE.normal(like), HERE.uniform(like)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

    def test_an_element_does_not_depend_on_how_many_follow(self):
        for kind in (HERE.normal, HERE.uniform):
            assert torch.equal(kind(torch.empty(64))[:37], kind(torch.empty(37)))


class TestBuckets:
    """Noise made on flat buckets is that of the tensors, however they are dealt."""

    shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)
    examples = settings(max_examples=80, derandomize=True, deadline=None)

    @staticmethod
    def on_buckets(shapes, limit, kind):
        tensors = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        starts = addresses(tensor.numel() for tensor in tensors)
        for bucket in buckets(tensors, limit):
            here = [tensors[index] for index in bucket.members]
            noise = HERE.on(bucket, [starts[index] for index in bucket.members])
            bucket.scatter(getattr(noise, kind)(bucket.gather(here, torch.float64)), here)
        return tensors

    @staticmethod
    def one_by_one(shapes, kind):
        return getattr(HERE, kind)(Vector([torch.empty(shape, dtype=torch.float64) for shape in shapes])).parts

    @given(sizes=st.lists(st.integers(0, 50)))
    @examples
    def test_addresses_of_tensors_are_even_and_do_not_overlap(self, sizes):
        starts = addresses(sizes)
        assert len(starts) == len(sizes)
        assert all(start % 2 == 0 for start in starts)
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))

    @pytest.mark.parametrize("kind", ["normal", "uniform"])
    @pytest.mark.parametrize("limit", [2, 4, 6, 32, 128, BUCKET])
    @given(shapes=shapes)
    @examples
    def test_the_layout_does_not_matter(self, kind, limit, shapes):
        for bucketed, whole in zip(self.on_buckets(shapes, limit, kind), self.one_by_one(shapes, kind), strict=True):
            assert torch.equal(bucketed, whole)

    @pytest.mark.parametrize("limit", [3, 7, 33])
    def test_an_odd_limit_cuts_no_pair_or_is_refused(self, limit):
        shapes = [(5,), (50,), (), (9, 9)]
        try:
            tensors = self.on_buckets(shapes, limit, "normal")
        except ValueError as refusal:
            assert "even" in str(refusal)
        else:
            for bucketed, whole in zip(tensors, self.one_by_one(shapes, "normal"), strict=True):
                assert torch.equal(bucketed, whole)

    def test_a_tensor_across_many_buckets_is_one_tensor(self):
        assert torch.equal(self.on_buckets([(70_001,)], 1024, "normal")[0], self.one_by_one([(70_001,)], "normal")[0])


class TestShape:
    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (3,), (2, 3, 5)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_numbers_have_the_shape_and_dtype_asked_for(self, shape, dtype):
        for kind in (HERE.normal, HERE.uniform):
            made = kind(torch.empty(shape, dtype=dtype))
            assert made.shape == shape
            assert made.dtype == dtype
            assert made.isfinite().all()

    def test_memory_layout_does_not_matter(self):
        like = torch.empty(6, 4)
        assert torch.equal(HERE.normal(like), HERE.normal(torch.empty(4, 6).T))
        assert torch.equal(HERE.normal(like).view(-1), HERE.normal(torch.empty(24)))

    def test_half_precision_is_single_precision_rounded(self):
        single = HERE.normal(torch.empty(1000))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(HERE.normal(torch.empty(1000, dtype=dtype)), single.to(dtype))

    def test_single_precision_is_double_precision_but_for_rounding(self):
        """Of the uniform number under the root, 6e-8 at most: that is 5e-4 of the radius where it is next to zero."""
        double = HERE.normal(torch.empty(MILLION, dtype=torch.float64))
        off = (HERE.normal(torch.empty(MILLION)) - double).abs()
        assert off.max() < 5e-4
        assert off.quantile(0.999) < 1e-5


class TestNormal:
    """A million numbers at each of three addresses against the unit normal distribution."""

    # E z^k, and the variance of z^k, E z^2k - (E z^k)^2
    MOMENTS = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10170))

    @pytest.mark.parametrize(("power", "expected", "variance"), MOMENTS)
    def test_moments(self, sample, power, expected, variance):
        error = math.sqrt(variance / len(sample))
        assert abs((sample**power).mean().item() - expected) < SIGMAS * error

    @pytest.mark.parametrize("side", [-1, 1])
    @pytest.mark.parametrize("beyond", [1.0, 2.0, 3.0, 4.0, 4.5])
    def test_tails(self, sample, beyond, side):
        """At 4.5 there are 3.6 numbers to be expected on a side; a Poisson count of that mean is above 15 once in 500,000."""
        expected = len(sample) * math.erfc(beyond / math.sqrt(2)) / 2
        found = (side * sample > beyond).sum().item()
        assert abs(found - expected) < SIGMAS * math.sqrt(expected) + 3

    def test_the_whole_distribution(self, sample):
        assert kolmogorov_smirnov(torch.special.ndtr(sample)) < KS_BOUND

    def test_the_largest_numbers_are_as_large_as_they_should_be(self, sample):
        """The largest of a million lies between 4.1 and 6.4 but for one time in a million; ours cannot exceed 6.7."""
        assert 4.1 < sample.max() < 6.4
        assert 4.1 < -sample.min() < 6.4

    def test_no_number_comes_twice(self, sample):
        """Pairs have 63 bits between them, but a radius has 31 and an angle 32: a few coincidences are to be expected."""
        assert len(sample) - len(sample.unique()) < 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes_have_the_same_moments(self, dtype):
        made = ADDRESSES[0].normal(torch.empty(MILLION, dtype=dtype)).double()
        assert abs(made.mean().item()) < SIGMAS / 1024
        assert abs(made.square().mean().item() - 1) < SIGMAS * math.sqrt(2) / 1024

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 16, 64, 255, 256, 1000, 65_536])
    def test_elements_are_uncorrelated(self, sample, lag):
        assert abs(correlation(sample[:-lag], sample[lag:])) < SIGMAS

    @pytest.mark.parametrize("lag", [1, 2, 16, 256])
    def test_sizes_of_elements_are_uncorrelated(self, sample, lag):
        size = sample.square()
        assert abs(correlation(size[:-lag], size[lag:])) < SIGMAS

    def test_the_two_of_a_pair_are_independent(self, sample):
        """The angle of a pair is uniform and its radius tells nothing of it."""
        a, b = sample[::2], sample[1::2]
        angle = torch.atan2(b, a) / (2 * math.pi) + 0.5
        assert kolmogorov_smirnov(angle) < KS_BOUND
        assert abs(correlation(angle, (a * a + b * b))) < SIGMAS
        assert kolmogorov_smirnov(-torch.expm1(-(a * a + b * b) / 2)) < KS_BOUND

    @pytest.mark.parametrize(
        "other",
        [
            *[HERE.at(step=step) for step in (2, 4, 5, 3 + 256)],
            *[HERE.at(draw=draw) for draw in (0, 1, 3)],
            *[replace(HERE, stream=stream) for stream in (EVALUATE, POSTERIOR)],
            *[replace(HERE, seed=seed) for seed in (4, 6, 5 + 2**16, -5)],
            HERE.at(step=2, draw=3),
        ],
        ids=repr,
    )
    def test_addresses_are_uncorrelated(self, other):
        like = torch.empty(MILLION // 4, dtype=torch.float64)
        a, b = HERE.normal(like), other.normal(like)
        assert abs(correlation(a, b)) < SIGMAS
        assert abs(correlation(a.square(), b.square())) < SIGMAS
        assert abs(correlation(a[1:], b[:-1])) < SIGMAS
        assert abs(correlation(a[::2], b[1::2])) < SIGMAS

    @pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 2), (0, 3), (2, 3)])
    def test_tensors_are_uncorrelated(self, a, b):
        parts = HERE.normal(Vector([torch.empty(MILLION // 4, dtype=torch.float64)] * 4))
        for lag in (0, 1, 2):
            n = len(parts[a]) - lag
            assert abs(correlation(parts[a][:n], parts[b][lag:])) < SIGMAS
        assert abs(correlation(parts[a].square(), parts[b].square())) < SIGMAS

    @pytest.mark.parametrize("axis", ["seed", "step", "draw", "tensor"])
    def test_one_element_over_many_addresses_is_normal_too(self, axis):
        """A bias has a number for every step: it must not be stuck."""
        count = 4000
        if axis == "tensor":
            made = torch.stack(HERE.normal(Vector([torch.empty((), dtype=torch.float64)] * count)).parts)
        else:
            one = torch.empty((), dtype=torch.float64)
            made = torch.stack([replace(HERE, **{axis: number}).normal(one) for number in range(count)])
        assert kolmogorov_smirnov(torch.special.ndtr(made)) < KS_BOUND
        for lag in (1, 2, 8):
            assert abs(correlation(made[:-lag], made[lag:])) < SIGMAS


class TestUniform:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_lies_strictly_between_zero_and_one(self, dtype):
        for noise in ADDRESSES:
            made = noise.uniform(torch.empty(MILLION, dtype=dtype))
            assert made.min() > 0
            assert made.max() < 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_whole_distribution(self, dtype):
        for noise in ADDRESSES:
            assert kolmogorov_smirnov(noise.uniform(torch.empty(MILLION, dtype=dtype))) < KS_BOUND

    def test_is_fine_near_zero(self):
        """The smallest of a million is about a millionth."""
        assert ADDRESSES[0].uniform(torch.empty(MILLION)).min() < 1e-5

    @pytest.mark.parametrize("lag", [1, 2, 3, 16, 256])
    def test_elements_are_uncorrelated(self, lag):
        made = HERE.uniform(torch.empty(MILLION, dtype=torch.float64))
        assert abs(correlation(made[:-lag], made[lag:])) < SIGMAS

    def test_two_of_a_pair_fill_the_square(self):
        """Chi-square over 32 x 32 cells, 1023 degrees of freedom."""
        made = HERE.uniform(torch.empty(MILLION, dtype=torch.float64)).view(-1, 2)
        cells = (made * 32).long()
        counts = torch.bincount(cells[:, 0] * 32 + cells[:, 1], minlength=1024).double()
        expected = len(made) / 1024
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(statistic - 1023) < SIGMAS * math.sqrt(2 * 1023)

    def test_bits_are_balanced(self):
        """Each of the leading 24 bits is one half of the time."""
        made = (HERE.uniform(torch.empty(MILLION, dtype=torch.float64)) * 2**24).long()
        for bit in range(24):
            ones = ((made >> bit) & 1).sum().item()
            assert abs(ones - MILLION / 2) < SIGMAS * math.sqrt(MILLION) / 2
