"""The rule on blocks: every method by its definition, and the same whatever the blocks."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.contracts import close

from bayesrule.uses.merging import methods
from bayesrule.uses.merging.methods import METHODS, Piece, Place, method_of, onto, threshold

SIZE = 1500
ALL = list(METHODS)
FIXED = [name for name in ALL if not METHODS[name].drops]
examples = settings(derandomize=True, deadline=None, max_examples=20)
seeds = st.integers(0, 10**6)


def pieces(seed, count=3, size=SIZE, dtype=torch.float32, known=True):
    """A base and models whose precisions contain its."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(size, generator=generator, dtype=dtype)

    base = Piece(normal(), normal().square() + 0.1 if known else None)
    models = [Piece(base.mean + normal() / 8, base.precision + normal().square() if known else None) for _ in range(count)]
    return base, models


def place(name, base, models, number=3, seed=7):
    method = METHODS[name]
    steps = [[model.mean - base.mean] for model in models] if method.trims else []
    return Place(number, 0, tuple(threshold(lambda step=step: step, method.density) for step in steps), seed)


def merged(name, base, models, alphas, **options):
    return METHODS[name](base, models, alphas, place(name, base, models, **options))


def cut(piece, start, stop):
    return Piece(piece.mean[start:stop], None if piece.precision is None else piece.precision[start:stop])


def bits(t):
    return t.view(torch.int64 if t.dtype == torch.float64 else torch.int32)


def weights(name, *alphas):
    return METHODS[name].weights(alphas, [str(i) for i in range(len(alphas))])


class TestBlocks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("cuts", [(1,), (7, 256, 300), (1024,), (255, 513, 1499)])
    @pytest.mark.parametrize("name", ALL)
    def test_blocks_give_the_whole_bit_by_bit(self, name, cuts, dtype):
        base, models = pieces(1, dtype=dtype)
        alphas, at = weights(name, 0.7, 0.2, 1.1), place(name, base, models)
        whole = METHODS[name](base, models, alphas, at)
        ends = [0, *cuts, SIZE]
        blocks = [
            METHODS[name](cut(base, i, j), [cut(m, i, j) for m in models], alphas, at._replace(start=i)) for i, j in pairwise(ends)
        ]
        assert torch.equal(bits(torch.cat([b.mean for b in blocks])), bits(whole.mean))
        assert torch.equal(bits(torch.cat([b.precision for b in blocks])), bits(whole.precision))

    @pytest.mark.parametrize("name", ALL)
    def test_what_is_merged_at_once_does_not_matter(self, name, monkeypatch):
        base, models = pieces(2)
        alphas = weights(name, 0.7, 0.2, 1.1)
        whole = merged(name, base, models, alphas)
        monkeypatch.setattr(methods, "CACHED", 100)
        found = merged(name, base, models, alphas)
        assert torch.equal(bits(found.mean), bits(whole.mean)) and torch.equal(bits(found.precision), bits(whole.precision))

    @pytest.mark.parametrize("name", ALL)
    def test_tensors_of_no_and_of_one_element(self, name):
        for size in (0, 1):
            base, models = pieces(2, size=size)
            found = METHODS[name](base, models, weights(name, 1, 1, 1), Place(0, 0, (0.0,) * 3))
            assert found.mean.shape == found.precision.shape == (size,)

    @pytest.mark.parametrize("name", ALL)
    def test_shape_does_not_matter(self, name):
        base, models = pieces(2)
        alphas, at = weights(name, 0.7, 0.2, 1.1), place(name, base, models)
        shaped = [Piece(p.mean.view(30, 50), p.precision.view(30, 50)) for p in (base, *models)]
        assert torch.equal(
            METHODS[name](shaped[0], shaped[1:], alphas, at).mean.view(-1), METHODS[name](base, models, alphas, at).mean
        )

    @pytest.mark.parametrize("name", ALL)
    def test_nothing_given_is_changed(self, name):
        base, models = pieces(3)
        before = [p.mean.clone() for p in (base, *models)]
        merged(name, base, models, weights(name, 1, 1, 1))
        assert all(torch.equal(p.mean, b) for p, b in zip((base, *models), before, strict=True))


class TestAlgebra:
    @pytest.mark.parametrize("name", [name for name in ALL if not METHODS[name].averages])
    def test_weights_of_0_give_the_base_bit_by_bit(self, name):
        base, models = pieces(4)
        base.mean[::3] = -0.0
        found = merged(name, base, models, [0.0] * 3)
        assert torch.equal(bits(found.mean), bits(base.mean)) and torch.equal(found.precision, base.precision)
        assert found.mean is not base.mean

    @given(seed=seeds, alphas=st.lists(st.floats(-2, 2), min_size=1, max_size=4))
    @examples
    def test_equal_precisions_are_task_arithmetic_bit_by_bit(self, seed, alphas):
        base, models = pieces(seed, len(alphas))
        models = [Piece(model.mean, base.precision) for model in models]
        found, plain = (merged(name, base, models, alphas) for name in ("gradient_matching", "task_arithmetic"))
        assert torch.equal(bits(found.mean), bits(plain.mean))
        assert torch.equal(found.precision, base.precision)

    @pytest.mark.parametrize("name", FIXED)
    @given(seed=seeds, order=st.permutations(range(3)))
    @examples
    def test_order_does_not_matter(self, name, seed, order):
        base, models = pieces(seed, dtype=torch.float64)
        alphas = [0.3, 1.2, 0.5]
        found = merged(name, base, models, weights(name, *alphas))
        other = merged(name, base, [models[i] for i in order], weights(name, *[alphas[i] for i in order]))
        close(other.mean, found.mean, 1e-12)
        close(other.precision, found.precision, 1e-12)

    @pytest.mark.parametrize("name", [name for name in FIXED if name != "ties"])
    @given(seed=seeds, alphas=st.lists(st.floats(0.1, 2), min_size=1, max_size=4))
    @examples
    def test_a_model_and_itself_with_weights_that_sum_to_1_is_itself(self, name, seed, alphas):
        base, (model,) = pieces(seed, 1, dtype=torch.float64)
        alphas = [a / sum(alphas) for a in alphas]
        found = merged(name, base, [model] * len(alphas), alphas)
        close(found.mean, model.mean, 1e-12)
        close(found.precision, model.precision, 1e-12)

    @given(seed=seeds)
    @examples
    def test_what_is_added_and_removed_leaves_the_base(self, seed):
        base, models = pieces(seed, dtype=torch.float64)
        everything = merged("gradient_matching", base, models, [1.0, 1.0, 1.0])
        again = merged("gradient_matching", base, [everything, *models], [1.0, -1.0, -1.0, -1.0])
        close(again.mean, base.mean, 1e-10)
        close(again.precision, base.precision, 1e-10)

    @given(seed=seeds)
    @examples
    def test_removing_twice_gives_the_model_back(self, seed):
        base, (model,) = pieces(seed, 1, dtype=torch.float64)
        model = Piece(model.mean, base.precision * 1.5)
        removed = merged("gradient_matching", base, [model], [-1.0])
        again = merged("gradient_matching", base, [removed], [-1.0])
        close(again.mean, model.mean, 1e-10)
        close(again.precision, model.precision, 1e-10)

    def test_where_nothing_is_known_models_are_equal(self):
        base, models = pieces(5)
        unknown = [Piece(p.mean, torch.zeros(SIZE)) for p in (base, *models)]
        for weighted, plain in (("gradient_matching", "task_arithmetic"), ("fisher", "linear")):
            alphas = weights(plain, 0.3, 0.4, 0.5)
            close(merged(weighted, unknown[0], unknown[1:], alphas).mean, merged(plain, base, models, alphas).mean, 1e-6)

    def test_gradient_matching_is_a_sum_of_natural_parameters(self):
        """Up to the floor, relative to precisions of 0.1 and more."""
        base, models = pieces(6, dtype=torch.float64)
        alphas = [0.7, 0.2, 0.4]
        found = merged("gradient_matching", base, models, alphas)
        first = base.precision * base.mean
        total = first + sum(a * (m.precision * m.mean - first) for m, a in zip(models, alphas, strict=True))
        close(found.precision * found.mean, total, 1e-10)

    def test_a_prior_of_its_own_gives_way_to_the_anchor(self):
        anchor, precision = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])
        assert onto(anchor, precision, torch.tensor(1.0)).tolist() == [5.0, 4.0]
        assert onto(anchor, precision, anchor) is not precision and torch.equal(onto(anchor, precision, anchor), precision)


class TestUnknownPrecisions:
    @pytest.mark.parametrize("name", [name for name in ALL if not METHODS[name].needs_precision])
    def test_means_alone_give_means_alone(self, name):
        base, models = pieces(7)
        alphas = weights(name, 0.7, 0.2, 1.1)
        blind = merged(name, Piece(base.mean, None), [Piece(m.mean, None) for m in models], alphas)
        assert blind.precision is None
        assert torch.equal(blind.mean, merged(name, base, models, alphas).mean)

    @pytest.mark.parametrize("missing", [0, 1])
    def test_what_needs_them_says_so(self, missing):
        both = list(pieces(8, 1)[1] * 2)
        both[missing] = Piece(both[missing].mean, None)
        with pytest.raises(ValueError, match="gradient_matching needs the precisions of all models; give them, or choose method="):
            METHODS["gradient_matching"](both[0], both[1:], [1.0], Place(0))

    def test_an_average_does_not_look_at_that_of_the_base(self):
        base, models = pieces(9)
        alphas = weights("fisher", 1, 1, 1)
        assert torch.equal(
            merged("fisher", Piece(base.mean, None), models, alphas).mean, merged("fisher", base, models, alphas).mean
        )


class TestTies:
    base = Piece(torch.zeros(6), None)
    steps = torch.tensor([[9.0, -8.0, 1.0, 7.0, 0.5, 5.0], [3.0, 4.0, -9.0, 8.0, 0.1, -5.0]])

    @pytest.mark.parametrize(
        ("thresholds", "alphas", "expected"),
        [
            ((0.0, 0.0), (1.0, 1.0), [6.0, -8.0, -9.0, 7.5, 0.3, 0.0]),  # all kept: the mean of those that agree
            ((7.0, 4.0), (1.0, 1.0), [9.0, -8.0, -9.0, 7.5, 0.0, -5.0]),  # small ones do not vote
            ((0.0, 0.0), (0.5, 0.5), [3.0, -4.0, -4.5, 3.75, 0.15, 0.0]),  # alpha scales
            ((0.0, 0.0), (1.0, 4.0), [10.5, 16.0, -36.0, 19.5, 0.45, -20.0]),  # and it votes
            ((0.0, 0.0), (0.0, 1.0), [3.0, 4.0, -9.0, 8.0, 0.1, -5.0]),  # 0 does not count
            ((0.0, 0.0), (-1.0, 0.0), [-9.0, 8.0, -1.0, -7.0, -0.5, -5.0]),
        ],
    )
    def test_by_hand(self, thresholds, alphas, expected):
        found = METHODS["ties"](self.base, [Piece(step, None) for step in self.steps], alphas, Place(0, 0, thresholds))
        close(found.mean, torch.tensor(expected), 1e-6)

    def test_keeps_the_given_part_of_a_tensor(self):
        base, (model,) = pieces(10, 1)
        found = merged("ties", base, [model], [1.0])
        assert int((found.mean != base.mean).sum()) == 0.2 * SIZE


class TestDare:
    def step(self, number=0, seed=0, model=0, density=0.5):
        base, method = Piece(torch.zeros(SIZE), None), method_of("dare_linear", density)
        models = [Piece(torch.ones(SIZE), None)] * (model + 1)
        return method(base, models, [0.0] * model + [1.0], Place(number, seed=seed)).mean

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
    def test_keeps_a_part_and_scales_it_up(self, density):
        step = self.step(density=density)
        assert set(step.unique().tolist()) == {0.0, (torch.ones(1) / density).item()}
        kept = float((step > 0).float().mean())
        assert abs(kept - density) < 4 * math.sqrt(density * (1 - density) / SIZE)

    def test_all_is_kept_bit_by_bit_with_density_1(self):
        base, models = pieces(11)
        alphas = [0.7, 0.2, 1.1]
        found = method_of("dare_linear", 1)(base, models, alphas, Place(0))
        assert torch.equal(bits(found.mean), bits(merged("task_arithmetic", base, models, alphas).mean))

    @pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}, {"model": 1}])
    def test_tensors_models_and_seeds_drop_others(self, other):
        same = (self.step() == self.step(**other)).float().mean()
        assert abs(float(same) - 0.5) < 4 * math.sqrt(0.25 / SIZE)

    def test_dare_ties_averages_those_that_agree(self):
        base = Piece(torch.zeros(SIZE), None)
        models = [Piece(torch.full((SIZE,), s), None) for s in (3.0, 1.0, -1.0)]
        found = METHODS["dare_ties"](base, models, [1.0] * 3, Place(0))
        assert set(found.mean.unique().tolist()) == {-2.0, 0.0, 2.0, 4.0, 6.0}  # sizes 6, 2, -2; -2 only where it is alone


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "alphas", "expected"),
        [
            ("gradient_matching", 1.0, (1.0, 1.0)),
            ("task_arithmetic", [0.5, -1], (0.5, -1.0)),
            ("linear", 1.0, (0.5, 0.5)),
            ("linear", 0.3, (0.5, 0.5)),
            ("fisher", [3, 1], (0.75, 0.25)),
        ],
    )
    def test_table(self, name, alphas, expected):
        assert METHODS[name].weights(alphas, ["a", "b"]) == expected

    @pytest.mark.parametrize(
        ("name", "alphas", "message"),
        [
            ("ties", [1.0], "there are 2 models and 1 alphas; give one for each, or one number for all"),
            ("linear", [1.0, -1.0], "alpha of 'b' must be a number >= 0 for 'linear', which takes shares, got -1.0"),
            ("fisher", [0, 0], "alphas of 'fisher' are shares and must not all be 0"),
            ("ties", [math.nan, 1], "alpha of 'a' must be a finite number, got nan"),
        ],
    )
    def test_refusals(self, name, alphas, message):
        with pytest.raises(ValueError, match=message):
            METHODS[name].weights(alphas, ["a", "b"])

    @pytest.mark.parametrize(
        ("name", "density", "message"),
        [
            ("slerp", None, "unknown method 'slerp'; there are 'gradient_matching', 'fisher'"),
            ("linear", 0.5, "linear keeps all of a task vector and takes no density, got 0.5"),
            ("ties", 0.0, r"must be in \(0, 1\], got 0.0"),
            ("dare_ties", 1.5, r"must be in \(0, 1\], got 1.5"),
            ("dare_ties", math.nan, r"must be in \(0, 1\], got nan"),
        ],
    )
    def test_methods_that_are_none(self, name, density, message):
        with pytest.raises(ValueError, match=message):
            method_of(name, density)


class TestThreshold:
    @given(
        values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=80),
        density=st.floats(0.001, 1),
        parts=st.integers(1, 9),
    )
    @examples
    def test_is_the_size_of_the_last_that_is_kept(self, values, density, parts):
        tensor = torch.tensor(values)
        kept = max(1, int(density * len(values)))
        assert threshold(lambda: tensor.chunk(parts), density) == tensor.abs().sort(descending=True).values[kept - 1].item()

    def test_of_a_wider_dtype_is_that_of_its_float32(self):
        tensor = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
        assert threshold(lambda: [tensor], 0.5) == tensor.float()[1].item()

    def test_more_elements_than_float32_counts(self):
        ones = torch.ones(1 << 20)
        blocks = [*[ones] * 16, torch.tensor([1.0, 0.0])]
        assert threshold(lambda: blocks, (2**24 + 1.5) / (2**24 + 2)) == 1.0

    def test_of_nothing(self):
        assert threshold(lambda: [torch.empty(0)], 0.5) == 0.0
