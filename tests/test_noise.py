"""Noise: a pure function of its address, pinned to the bit, and as random as its statistics can tell.

Addresses are fixed, so every number below is the same in every run and no test is flaky. The bounds are in standard errors of a
perfect source, so they say something about the source: with 4.5 of them a perfect one has one chance in 150,000 to have been
outside, and some 1500 figures are looked at. `tests/test_program.py` holds the compiled noise against the eager one.
"""

import hashlib
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.sweeps import sweep

from bayesrule.noise import EVALUATE, POSTERIOR, TRAIN, CounterNoise, Where, addresses, pairs
from bayesrule.vector import BLOCK, BUCKET, Vector, buckets

MILLION, TEN_MILLION = 1 << 20, BLOCK * 39_063  # whole blocks
HERE = CounterNoise(seed=5, stream=TRAIN, step=3, draw=2)
ADDRESSES = [CounterNoise(), CounterNoise(seed=12345, stream=EVALUATE, step=7, draw=3), CounterNoise(seed=-(2**70), step=10**9)]
KINDS = pytest.mark.parametrize("kind", ["normal", "uniform"])

SIGMAS = 4.5
KS_BOUND = 2.23  # P(sqrt(n) D > x) is about 2 exp(-2 x^2): one in ten thousand


# A second implementation, of the formula as it is documented, in whole numbers without a limit

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(number):
    """The lower 64 bits as a signed number, so that Python's >> is arithmetic."""
    return (number + 2**63) % 2**64 - 2**63


def key(noise):
    digest = hashlib.blake2b(repr((noise.seed, noise.stream, noise.step, noise.draw)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def word(noise, pair):
    w = signed(GAMMA * pair + key(noise))
    w = signed((w ^ (w >> 30)) * FIRST)
    w = signed((w ^ (w >> 27)) * SECOND)
    return w ^ (w >> 31)


def undone(y, shift):
    """What y may be the mix of, if it is any: w and its complement mix alike, as the shifts are arithmetic."""
    w = y
    for _ in range(3):
        w = y ^ (w >> shift)
    return (w, ~w) if y >= 0 else ()


def pairs_with(noise, wanted):
    """The pairs whose word is the one wanted: the mixer undone. There may be none."""
    for third in undone(wanted, 31):
        for second in undone(signed(third * pow(SECOND, -1, 2**64)), 27):
            for first in undone(signed(second * pow(FIRST, -1, 2**64)), 30):
                yield signed((first - key(noise)) * pow(GAMMA, -1, 2**64))


def halves(w):
    return w >> 32, (w + 2**31) % 2**32 - 2**31


def unit_normals(w):
    upper, lower = halves(w)
    radius, angle = math.sqrt(-2 * math.log((upper + 0.5) * 2**-31)), math.pi * lower * 2**-31
    return radius * math.cos(angle), radius * math.sin(angle)


def uniforms(w):
    upper, lower = halves(w)
    return (upper + 0.5) * 2**-31, lower * 2**-32 + 0.5


# Reading the library


def at_pairs(noise, numbers, dtype=torch.float64, first=0):
    """The same noise at pairs of any number; the numbers are filled up to a block."""
    filled = torch.zeros(-(-len(numbers) // 128) * 128, dtype=torch.int64)
    filled[: len(numbers)] = torch.as_tensor(numbers)
    return replace(noise, where=Where(filled, first, dtype))


def words(noise, count=None):
    """The words behind double precision uniform numbers, which hold all of their 63 bits."""
    count = len(noise.where.numbers) if count is None else count
    upper, lower = noise.uniform(torch.empty(2 * count, dtype=torch.float64)).view(-1, 2, 128).unbind(1)
    upper, lower = (upper * 2**31 - 0.5).round().long(), ((lower - 0.5) * 2**32).round().long()
    return ((upper << 32) + (lower & (2**32 - 1))).view(-1)


# Statistics


def kolmogorov_smirnov(probabilities):
    """sqrt(n) times the largest gap between the empirical and the uniform distribution function."""
    ordered = torch.from_numpy(probabilities.contiguous().clone().numpy())
    ordered.numpy().sort()
    n = len(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((ranks[1:] - ordered).max().item(), (ordered - ranks[:-1]).max().item())


def correlation(a, b):
    """In standard errors of independent numbers."""
    a, b = a - a.mean(), b - b.mean()
    return ((a @ b) / (a.norm() * b.norm())).item() * math.sqrt(len(a))


def related(a, b):
    """The largest correlation of the numbers, their squares, their sizes and across."""
    forms = [(a, b), (a.square(), b.square()), (a.abs(), b.abs()), (a, b.square()), (a.square(), b)]
    return max(abs(correlation(x, y)) for x, y in forms)


def uneven(first, second, cells=32):
    """Chi-square of points in the unit square over cells, in standard deviations."""
    place = (first * cells).long().clamp(max=cells - 1) * cells + (second * cells).long().clamp(max=cells - 1)
    counts, expected = torch.bincount(place, minlength=cells**2).double(), len(first) / cells**2
    freedom = cells**2 - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def chance(found, expected):
    """How likely a count is that far out, on its side, if so many are expected (Poisson)."""
    mean = torch.tensor(expected, dtype=torch.float64)
    at_most = torch.special.gammaincc(torch.tensor(found + 1.0, dtype=torch.float64), mean).item()
    at_least = torch.special.gammainc(torch.tensor(float(found), dtype=torch.float64), mean).item() if found else 1.0
    return min(at_most, at_least)


UNLIKELY = math.erfc(SIGMAS / math.sqrt(2)) / 2


class TestAddress:
    """A number depends on its address and on nothing else."""

    @KINDS
    def test_the_same_address_gives_the_same_numbers(self, kind):
        like = torch.empty(1001)
        first = getattr(HERE, kind)(like)
        again = getattr(CounterNoise(seed=5, stream=TRAIN, step=3, draw=2), kind)
        again(torch.empty(7))  # whatever was drawn before
        assert torch.equal(again(like), first)

    OTHERS = (
        *[replace(HERE, seed=seed) for seed in (6, -5, 5 + 2**32, 5 + 2**64)],
        *[replace(HERE, stream=stream) for stream in (EVALUATE, POSTERIOR)],
        *[HERE.at(step=step) for step in (4, 3 + 2**32)],
        HERE.at(draw=3),
        HERE.at(step=2, draw=3),  # step and draw are no sum
    )

    @pytest.mark.parametrize("other", OTHERS, ids=repr)
    def test_another_seed_stream_step_or_draw_gives_other_numbers(self, other):
        assert not torch.isin(words(HERE, 1024), words(other, 1024)).any()

    def test_parts_of_a_vector_have_numbers_of_their_own(self):
        parts = HERE.normal(Vector([torch.empty(1000)] * 3)).parts
        assert torch.equal(parts[0], HERE.normal(torch.empty(1000)))
        for a, b in [(0, 1), (1, 2), (0, 2)]:
            assert (parts[a] == parts[b]).sum() == 0

    def test_at_changes_what_it_is_told_and_keeps_the_rest(self):
        where = Where(torch.arange(128), 5, torch.float32)
        for noise in (HERE, replace(HERE, where=where)):
            assert noise.at(step=9) == replace(noise, step=9)
            assert noise.at(draw=9) == replace(noise, draw=9)
            assert noise.at() == noise
            assert noise.at(step=0, draw=0) == replace(noise, step=0, draw=0)

    def test_torchs_own_generator_is_neither_read_nor_moved(self):
        torch.manual_seed(1)
        first, state = HERE.normal(torch.empty(100)), torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(HERE.normal(torch.empty(100)), first)
        torch.manual_seed(1)
        HERE.uniform(torch.empty(100))
        assert torch.equal(torch.get_rng_state(), state)

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [1, 70_001, 300_001])
    def test_the_number_of_threads_does_not_matter(self, kind, dtype, size):
        """Ragged sizes: threads take pieces of different lengths, with and without vector instructions."""
        made, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                made.append(getattr(HERE, kind)(torch.empty(size, dtype=dtype)))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])

    @KINDS
    @pytest.mark.parametrize("size", [1, 37, 128, 129, 255, 256, 257])
    def test_an_element_does_not_depend_on_how_many_follow(self, kind, size):
        make = getattr(HERE, kind)
        assert torch.equal(make(torch.empty(1000))[:size], make(torch.empty(size)))


UPPER_ENDS, LOWER_ENDS = (0, 2**31 - 1), (-(2**31), 0, 2**31 - 1)  # an upper half has 31 bits, a lower one a sign as well


@pytest.fixture(scope="module")
def extreme():
    """Pairs at HERE with every extreme half, beside whatever makes such a word one that there is."""
    sought = [[(upper << 32) + k for k in range(100)] for upper in UPPER_ENDS]
    sought += [[(k << 32) + lower % 2**32 for k in range(100)] for lower in LOWER_ENDS]
    return [next(pair for w in some for pair in pairs_with(HERE, w)) for some in sought]


class TestPinned:
    """Runs are resumed and posteriors drawn again with these numbers: a change of them breaks what users saved."""

    WORDS = (
        # noise, pair -> word
        (CounterNoise(), 0, 367_046_284_269_725_217),
        (CounterNoise(), 1, 8_159_638_757_119_258_389),
        (HERE, 0, 6_398_475_690_791_264_796),
        (HERE, 127, 6_739_997_206_261_084_549),
        (HERE, 128, 7_963_393_369_879_367_788),
        (HERE, 2**31, 2_605_491_329_288_144_283),
        (CounterNoise(seed=-(2**70), stream=POSTERIOR, step=10**9, draw=7), 2**40 + 3, 386_767_073_766_903_060),
    )

    @pytest.mark.parametrize(("noise", "pair", "pinned"), WORDS)
    def test_the_stream_of_numbers_never_changes(self, noise, pair, pinned):
        assert word(noise, pair) == pinned
        assert words(at_pairs(noise, [pair]))[0] == pinned
        assert words(at_pairs(noise, [0], first=pair))[0] == pinned

    # The elements 0, 1, 128 and 129 of two tensors at HERE
    NORMALS = (
        *(-0.8536957118060536, 0.8220509700235267, 0.050650340875173464, -0.25098784099809157),
        *(0.5368229010194063, -0.5706304210772332, -0.07478069735325261, 0.311382225616454),
    )
    UNIFORMS = (
        *(0.6937241244595498, 0.6911617878358811, 0.9905682867392898, 0.4528376942034811),
        *(0.8633928389754146, 0.8095400889869779, 0.47797110211104155, 0.9204987164121121),
    )

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 4e-15), (torch.float32, 5e-7)])
    def test_the_numbers_themselves_never_change(self, dtype, tolerance):
        two = Vector([torch.empty(200, dtype=dtype)] * 2)
        for kind, pinned in (("normal", self.NORMALS), ("uniform", self.UNIFORMS)):
            made = [part[i].item() for part in getattr(HERE, kind)(two) for i in (0, 1, 128, 129)]
            assert made == pytest.approx(pinned, rel=tolerance, abs=tolerance)

    @pytest.mark.parametrize("noise", [*ADDRESSES, HERE], ids=repr)
    def test_the_formula_is_the_documented_one(self, noise):
        """Every element of three tensors that fill blocks, or do not, against whole numbers of Python."""
        sizes = [300, 1, 256]
        like = Vector([torch.empty(size, dtype=torch.float64) for size in sizes])
        normal, uniform = noise.normal(like), noise.uniform(like)
        for start, size, n, u in zip([0, 512, 768], sizes, normal, uniform, strict=True):
            for i in range(size):
                block, within = divmod(start + i, 256)
                w = word(noise, 128 * block + within % 128)
                assert u[i] == uniforms(w)[within // 128]
                assert abs(n[i] - unit_normals(w)[within // 128]) < 4e-15

    def test_words_reach_the_ends_of_their_halves(self, extreme):
        found = [halves(w) for w in words(at_pairs(HERE, extreme))[: len(extreme)].tolist()]
        assert found == [halves(word(HERE, pair)) for pair in extreme]
        assert (*[upper for upper, _ in found[:2]], *[lower for _, lower in found[2:]]) == (*UPPER_ENDS, *LOWER_ENDS)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_uniform_numbers_never_reach_an_end_and_normals_never_infinity(self, extreme, dtype):
        noise, like = at_pairs(HERE, extreme, dtype), torch.empty(256, dtype=dtype)
        assert noise.uniform(like).min() > 0
        assert noise.uniform(like).max() < 1
        assert noise.normal(like).isfinite().all()
        assert 6.66 < noise.normal(like).abs().max() < 6.67


class TestLayout:
    """Noise made on flat buckets is that of the tensors, however they are dealt."""

    shapes = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 7, 40, 300]), max_size=2).map(tuple), min_size=1, max_size=8)
    examples = settings(max_examples=40, derandomize=True, deadline=None)

    @staticmethod
    def on_buckets(shapes, limit, kind):
        tensors = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        starts = addresses(tensor.numel() for tensor in tensors)
        for bucket in buckets(tensors, limit):
            here = [tensors[index] for index in bucket.members]
            first, blocks = pairs(bucket, [starts[index] for index in bucket.members])
            begins = torch.arange(0, -(-bucket.size // BLOCK) * 128, 128) if blocks is None else torch.tensor(blocks)
            numbers = (begins[:, None] + torch.arange(128)).view(-1)
            flat = getattr(replace(HERE, where=Where(numbers, first, torch.float64)), kind)(torch.empty(bucket.size))
            assert flat.shape == (bucket.size,)
            for piece, view in zip(bucket.pieces(here), bucket.views(flat, here), strict=True):
                piece.copy_(view)
        return tensors

    @staticmethod
    def one_by_one(shapes, kind):
        return getattr(HERE, kind)(Vector([torch.empty(shape, dtype=torch.float64) for shape in shapes])).parts

    @given(sizes=st.lists(st.integers(0, 600)))
    @settings(max_examples=80, derandomize=True, deadline=None)
    def test_addresses_begin_blocks_and_do_not_overlap(self, sizes):
        starts = addresses(sizes)
        assert len(starts) == len(sizes)
        assert all(start % BLOCK == 0 for start in starts)
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        assert all(end <= start < end + BLOCK for end, start in zip(ends, starts[1:], strict=False))

    @KINDS
    @pytest.mark.parametrize("limit", [512, 768, 1024, 2560, BUCKET])
    @given(shapes=shapes)
    @examples
    def test_the_layout_does_not_matter(self, kind, limit, shapes):
        for bucketed, whole in zip(self.on_buckets(shapes, limit, kind), self.one_by_one(shapes, kind), strict=True):
            assert torch.equal(bucketed, whole)

    @KINDS
    @pytest.mark.parametrize("limit", [512, 1024, 65_536])
    def test_a_tensor_across_many_buckets_is_one_tensor(self, kind, limit):
        shapes = [(3,), (70_001,), (5,)]
        for bucketed, whole in zip(self.on_buckets(shapes, limit, kind), self.one_by_one(shapes, kind), strict=True):
            assert torch.equal(bucketed, whole)

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 4096), (256, 256), (512, 300), (69_888, 113)])
    def test_the_noise_of_a_shard_is_that_slice_of_the_whole(self, kind, dtype, start, count):
        whole = getattr(HERE, kind)(torch.empty(70_001, dtype=dtype))
        numbers = torch.arange(-(-count // 256) * 128, dtype=torch.int32)
        shard = getattr(replace(HERE, where=Where(numbers, start // 2, dtype)), kind)(torch.empty(count))
        assert torch.equal(shard, whole[start : start + count])

    def test_far_tensors_are_reached_by_their_first_pair(self):
        """Beyond 2^32 pairs, with numbers of 32 bits."""
        far = replace(HERE, where=Where(torch.arange(256, dtype=torch.int32), 2**33, torch.float64))
        assert words(far).tolist() == [word(HERE, 2**33 + k) for k in range(256)]


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


@pytest.fixture(scope="module")
def many():
    return [noise.normal(torch.empty(TEN_MILLION)) for noise in ADDRESSES]


@pytest.fixture(scope="module")
def sample():
    return HERE.normal(torch.empty(4 * MILLION, dtype=torch.float64))


class TestNormal:
    """Ten million numbers at each of three addresses against the unit normal distribution."""

    # E z^k, and the variance of z^k, E z^2k - (E z^k)^2
    MOMENTS = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10170))

    def test_moments(self, many):
        for made in many:
            made, power = made.double(), torch.ones(len(made), dtype=torch.float64)
            for _, expected, variance in self.MOMENTS:
                power *= made
                assert abs(power.mean().item() - expected) < SIGMAS * math.sqrt(variance / len(made))

    @pytest.mark.parametrize("beyond", [1.0, 2.0, 3.0, 4.0, 4.5, 5.0])
    def test_tails(self, many, beyond):
        """On either side at each address, and all together: at 5 there are 3 to be expected on a side, and 17 together."""
        expected = TEN_MILLION * math.erfc(beyond / math.sqrt(2)) / 2
        found = [count for made in many for count in ((made > beyond).sum().item(), (made < -beyond).sum().item())]
        assert all(chance(count, expected) > UNLIKELY for count in found)
        assert chance(sum(found), len(found) * expected) > UNLIKELY

    def test_the_largest_numbers(self, many):
        """The largest of ten million is below 4.6 once in a billion; ours cannot exceed 6.67."""
        for made in many:
            assert 4.6 < made.max() < 6.67
            assert 4.6 < -made.min() < 6.67

    def test_the_whole_distribution(self, many):
        for made in many:
            assert kolmogorov_smirnov(torch.special.ndtr(made.double())) < KS_BOUND

    @pytest.mark.slow
    @pytest.mark.parametrize("beyond", [5.0, 5.5, 6.0])
    def test_far_tails(self, beyond):
        """A billion numbers: 287, 19 and 1 are to be expected on a side."""
        found = [0, 0]
        for step in range(100):
            made = HERE.at(step=step).normal(torch.empty(TEN_MILLION))
            found = [found[0] + (made > beyond).sum().item(), found[1] + (made < -beyond).sum().item()]
        expected = 100 * TEN_MILLION * math.erfc(beyond / math.sqrt(2)) / 2
        assert all(chance(count, expected) > UNLIKELY for count in found)

    def test_no_number_comes_twice(self, sample):
        """Pairs have 63 bits between them, but a radius has 31 and an angle 32: a few coincidences are to be expected."""
        some = sample[:MILLION]
        assert len(some) - len(some.unique()) < 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes_have_the_same_moments(self, dtype):
        made = ADDRESSES[0].normal(torch.empty(MILLION, dtype=dtype)).double()
        assert abs(made.mean().item()) < SIGMAS / 1024
        assert abs(made.square().mean().item() - 1) < SIGMAS * math.sqrt(2) / 1024


class TestIndependence:
    @pytest.mark.parametrize("lag", sweep((1, 2, 3, 4, 16, 64, 127, 128, 129, 255, 256, 257, 1000, 65_536), 1, 2, 128, 256, 65_536))
    def test_elements(self, sample, lag):
        assert related(sample[:-lag], sample[lag:]) < SIGMAS

    def test_the_two_of_a_pair(self, sample):
        """Which share a radius and an angle: the angle is uniform, and the radius tells nothing of it."""
        a, b = (half.reshape(-1) for half in sample.view(-1, 2, 128).unbind(1))
        angle = torch.atan2(b, a) / (2 * math.pi) + 0.5
        radius = -torch.expm1(-(a * a + b * b) / 2)
        assert kolmogorov_smirnov(angle) < KS_BOUND
        assert kolmogorov_smirnov(radius) < KS_BOUND
        assert related(angle, radius) < SIGMAS
        assert related(a, b) < SIGMAS
        assert uneven(angle, radius) < SIGMAS
        assert uneven(torch.special.ndtr(a), torch.special.ndtr(b)) < SIGMAS

    @pytest.mark.parametrize("lag", [1, 128, 256])
    def test_neighbors_fill_the_square(self, sample, lag):
        """So that no relation is left, linear or not."""
        p = torch.special.ndtr(sample[:MILLION])
        assert abs(uneven(p[:-lag], p[lag:])) < SIGMAS

    OTHERS = (
        *[(HERE, HERE.at(step=step)) for step in (2, 4, 5, 3 + 256)],
        *[(HERE, HERE.at(draw=draw)) for draw in (0, 1, 3)],
        *[(HERE, replace(HERE, stream=stream)) for stream in (EVALUATE, POSTERIOR)],
        *[(HERE, replace(HERE, seed=seed)) for seed in (4, 6, 5 + 2**16, -5)],
        *[(CounterNoise(a), CounterNoise(b)) for a, b in ((0, 1), (1, 2), (0, 2))],
        (CounterNoise(0, step=1), CounterNoise(1, step=0)),
        (HERE, HERE.at(step=2, draw=3)),
    )

    @pytest.mark.parametrize(("one", "other"), OTHERS, ids=repr)
    def test_steps_draws_streams_and_seeds(self, one, other):
        like = torch.empty(MILLION // 4, dtype=torch.float64)
        a, b = one.normal(like), other.normal(like)
        assert related(a, b) < SIGMAS
        for lag in (1, 128):
            assert abs(correlation(a[:-lag], b[lag:])) < SIGMAS
            assert abs(correlation(b[:-lag], a[lag:])) < SIGMAS
        assert abs(uneven(torch.special.ndtr(a), torch.special.ndtr(b))) < SIGMAS

    @pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 2), (0, 3), (2, 3)])
    def test_tensors(self, a, b):
        parts = HERE.normal(Vector([torch.empty(MILLION // 4, dtype=torch.float64)] * 4))
        for lag in (0, 1, 128):
            n = len(parts[a]) - lag
            assert related(parts[a][:n], parts[b][lag:]) < SIGMAS

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
            assert related(made[:-lag], made[lag:]) < SIGMAS


class TestWords:
    """The 63 bits that are random; the top one is 0, as shifts are arithmetic."""

    @pytest.mark.parametrize("axis", ["seed", "step", "draw", "stream", "pair"])
    def test_one_bit_of_an_address_changes_half_of_the_bits(self, axis):
        """Avalanche: whichever bit of the address is flipped, and whichever bit of the word is looked at."""
        flipped = []
        for bit in range(48):
            if axis == "pair":
                numbers = torch.arange(1024) * 0x12345671 % 2**48
                before, after = words(at_pairs(HERE, numbers)), words(at_pairs(HERE, numbers ^ (1 << bit)))
            else:
                before, after = words(HERE, 1024), words(replace(HERE, **{axis: getattr(HERE, axis) ^ (1 << bit)}), 1024)
            flipped.append(((before ^ after)[:, None] >> torch.arange(64)) & 1)
        flips = torch.stack(flipped).double()  # flipped bit, word, looked at
        assert (flips[..., 63] == 0).all()
        share = flips[..., :63]
        for mean, count in ((share.mean((1, 2)), 1024 * 63), (share.mean((0, 1)), 48 * 1024)):
            assert ((mean - 0.5).abs().max() * 2 * math.sqrt(count)).item() < SIGMAS
        assert ((share.mean(1) - 0.5).abs().max() * 2 * math.sqrt(1024)).item() < 5.5  # each bit by each: 3000 figures

    def test_bits_are_balanced_and_tell_nothing_of_one_another(self):
        """In a word, and from one to the next, the next block's and the next step's: 14,000 figures within 6 standard errors."""
        made = words(HERE, MILLION // 4)
        bits = (((made[:, None] >> torch.arange(63)) & 1) * 2 - 1).float()
        n = len(bits)
        assert (bits.mean(0).abs() * math.sqrt(n)).max() < SIGMAS
        within = (bits.T @ bits).fill_diagonal_(0)
        later = (((words(HERE.at(step=4), n)[:, None] >> torch.arange(63)) & 1) * 2 - 1).float()
        across = [bits[:-1].T @ bits[1:], bits[:-128].T @ bits[128:], bits.T @ later]
        assert max(c.abs().max().item() / math.sqrt(n) for c in (within, *across)) < 6

    def test_no_word_comes_twice(self):
        """Within a draw or in the next ones: two words of two million coincide once in a million such tests."""
        made = torch.cat([words(HERE.at(step=step), MILLION // 4) for step in range(8)])
        assert len(made.unique()) == len(made)


class TestUniform:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_lies_strictly_between_zero_and_one(self, dtype):
        for noise in ADDRESSES:
            made = noise.uniform(torch.empty(MILLION, dtype=dtype))
            assert made.min() > 0
            assert made.max() < 1

    def test_the_whole_distribution(self):
        assert kolmogorov_smirnov(HERE.uniform(torch.empty(TEN_MILLION)).double()) < KS_BOUND

    def test_moments(self):
        """E u^k = 1 / (k + 1), with the variance 1 / (2k + 1) - 1 / (k + 1)^2."""
        made = HERE.uniform(torch.empty(TEN_MILLION)).double()
        for k in range(1, 7):
            error = math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / len(made))
            assert abs(made.pow(k).mean().item() - 1 / (k + 1)) < SIGMAS * error

    def test_is_fine_near_zero(self):
        """The smallest of ten million is about a ten-millionth."""
        assert HERE.uniform(torch.empty(TEN_MILLION)).min() < 1e-6

    @pytest.mark.parametrize("lag", [1, 2, 127, 128, 129, 256])
    def test_elements_fill_the_square(self, lag):
        made = HERE.uniform(torch.empty(MILLION, dtype=torch.float64))
        assert related(made[:-lag], made[lag:]) < SIGMAS
        assert abs(uneven(made[:-lag], made[lag:])) < SIGMAS
