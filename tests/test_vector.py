import math
import operator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.contracts import close, flat, normal

from bayesrule.vector import ALONE, BLOCK, BUCKET, Vector, axpy, buckets, convert, equal, head, lerp, rsqrt, whole_blocks

SHAPES = [(2, 3), (), (4,)]


def vector(seed: int, positive: bool = False) -> Vector:
    parts = [normal(seed + 10 * index, *shape) for index, shape in enumerate(SHAPES)]
    return Vector([part.abs() + 0.5 for part in parts] if positive else parts)


class TestAlgebra:
    """A Vector computes as the one long tensor of its elements does."""

    @pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv])
    def test_with_a_vector(self, operation):
        a, b = vector(0), vector(1, positive=True)
        close(flat(operation(a, b)), operation(flat(a), flat(b)), 0)

    @pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv])
    @pytest.mark.parametrize("other", [3, 0.7, torch.tensor(1.3, dtype=torch.float64)], ids=["int", "float", "0-d tensor"])
    def test_with_a_number_on_either_side(self, operation, other):
        a = vector(0, positive=True)
        close(flat(operation(a, other)), operation(flat(a), other), 0)
        close(flat(operation(other, a)), operation(other, flat(a)), 0)

    @pytest.mark.parametrize(
        ("mine", "theirs"),
        [
            (operator.neg, operator.neg),
            (lambda v: v**2, lambda t: t**2),
            (lambda v: v**-0.5, lambda t: t**-0.5),
            (Vector.sqrt, torch.sqrt),
            (Vector.rsqrt, torch.rsqrt),
            (rsqrt, torch.rsqrt),
            (Vector.log, torch.log),
            (lambda v: v.clamp(-0.9, 1.1), lambda t: t.clamp(-0.9, 1.1)),
            (lambda v: v.map(torch.exp), torch.exp),
        ],
    )
    def test_element_by_element(self, mine, theirs):
        a = vector(0, positive=True)
        close(flat(mine(a)), theirs(flat(a)), 0)

    def test_sum_dot_and_numel_go_over_all_elements(self):
        a, b = vector(0), vector(1)
        close(a.sum(), flat(a).sum())
        close(a.dot(b), flat(a) @ flat(b))
        assert a.sum().shape == a.dot(b).shape == ()
        assert a.numel() == 11

    @pytest.mark.parametrize("weight", [0.3, 0.8, torch.tensor(0.3, dtype=torch.float64)], ids=["0.3", "0.8", "tensor"])
    def test_axpy_and_lerp_are_what_they_say_for_tensors_and_vectors(self, weight):
        a, b = vector(0), vector(1)
        close(flat(axpy(a, b, weight)), flat(a) + weight * flat(b), 1e-14)
        close(axpy(flat(a), flat(b), weight), flat(a) + weight * flat(b), 1e-14)
        close(flat(lerp(a, b, weight)), flat(a) + weight * (flat(b) - flat(a)), 1e-14)
        close(lerp(flat(a), flat(b), weight), flat(a) + weight * (flat(b) - flat(a)), 1e-14)

    def test_parts_may_be_numbers(self):
        half = Vector([0.5, 2.0, 1.0]) * vector(0)
        close(flat(half), torch.cat([0.5 * normal(0, 6), 2 * normal(10, 1), normal(20, 4)]), 0)

    def test_operands_are_left_as_they_are(self):
        a, b = vector(0, positive=True), vector(1)
        for operation in (operator.add, operator.mul, lerp_half, axpy_half):
            operation(a, b)
        close(flat(a), flat(vector(0, positive=True)), 0)
        close(flat(b), flat(vector(1)), 0)

    def test_axpy_and_lerp_of_numbers(self):
        assert axpy(1.0, 2.0, 3.0) == 7.0
        assert lerp(1.0, 3.0, 0.25) == 1.5

    def test_rsqrt_of_a_number(self):
        assert rsqrt(4) == rsqrt(4.0) == 0.5

    @pytest.mark.parametrize(
        ("a", "b", "known"), [(1, 1.0, True), (0.5, 0.5, True), (1, 2, False), (math.nan, 1.0, False), (torch.ones(()), 1.0, False)]
    )
    def test_equal_is_what_is_known(self, a, b, known):
        assert equal(a, b) is known

    def test_a_symbol_is_equal_to_itself_alone(self):
        one, other = torch.ones(2), torch.ones(2)
        assert equal(one, one)
        assert not equal(one, other)

    def test_head_is_a_view_of_the_first_elements(self):
        x = torch.arange(6.0)
        first = head(x, torch.empty(2, 2))
        assert first.tolist() == [0, 1, 2, 3]
        assert first.data_ptr() == x.data_ptr()

    @pytest.mark.parametrize(("source", "dtype"), [(torch.int64, torch.int32), (torch.float32, torch.float64)])
    def test_convert(self, source, dtype):
        made = convert(torch.tensor([-3, 2**31], dtype=source), dtype)
        assert made.dtype == dtype
        assert made.tolist() == torch.tensor([-3, 2**31], dtype=source).to(dtype).tolist()


def lerp_half(a, b):
    return lerp(a, b, 0.5)


def axpy_half(a, b):
    return axpy(a, b, 0.5)


class TestContainer:
    def test_holds_its_parts_in_order(self):
        parts = [torch.zeros(2), torch.ones(()), torch.ones(3)]
        v = Vector(iter(parts))
        assert len(v) == 3
        assert all(a is b for a, b in zip(v, parts, strict=True))
        assert v[1] is parts[1]

    def test_shows_its_parts(self):
        assert repr(Vector([torch.ones(1), 2.0])) == "Vector(tensor([1.]), 2.0)"

    @pytest.mark.parametrize("operation", [operator.add, operator.mul, Vector.dot])
    def test_vectors_of_different_lengths_do_not_combine(self, operation):
        with pytest.raises(ValueError, match=r"vectors of 3 and \[2\] parts do not combine"):
            operation(vector(0), Vector([torch.zeros(2), torch.zeros(3)]))


# Buckets

LENGTHS = [0, 1, 2, 3, 7, 40, 300]
shapes = st.lists(st.sampled_from(LENGTHS), max_size=2).map(tuple)
tensors_of = st.lists(st.tuples(shapes, st.sampled_from(["plain", "transposed", "strided"])), min_size=1, max_size=8)
limits = st.sampled_from([2 * BLOCK, 3 * BLOCK, 8 * BLOCK, BUCKET])
examples = settings(max_examples=100, derandomize=True, deadline=None)


def build(described, dtype=torch.float64) -> list[torch.Tensor]:
    """Tensors of these shapes and memory layouts, every element of all of them different, none of them 0."""
    made, begin = [], 1
    for shape, layout in described:
        count = torch.Size(shape).numel()
        values = torch.arange(begin, begin + count, dtype=dtype).view(shape)
        begin += count
        if layout == "transposed" and len(shape) > 1:
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "strided" and shape:
            wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
            wide[..., ::2] = values
            values = wide[..., ::2]
        made.append(values)
    return made


def members(bucket, tensors):
    return [tensors[index] for index in bucket.members]


class TestBuckets:
    @given(described=tensors_of, limit=limits)
    @examples
    def test_every_element_lies_in_one_place_in_row_major_order(self, described, limit):
        tensors = build(described)
        seen = []
        for bucket in buckets(tensors, limit):
            here, laid = members(bucket, tensors), torch.zeros(bucket.size, dtype=torch.float64)
            views, pieces = bucket.views(laid, here), bucket.pieces(here)
            assert len(views) == len(pieces) == len(bucket.stretches)
            for stretch, view, piece in zip(bucket.stretches, views, pieces, strict=True):
                assert view.shape == piece.shape
                place = laid[stretch.at : stretch.at + stretch.count]
                assert (place == 0).all()  # nothing lies there yet
                view.copy_(piece)
                assert torch.equal(place, here[stretch.tensor].reshape(-1)[stretch.start : stretch.start + stretch.count])
            seen.append(laid[laid != 0])
        everything = torch.cat(seen) if seen else torch.zeros(0)
        assert torch.equal(everything.sort().values, torch.arange(1, sum(t.numel() for t in tensors) + 1, dtype=everything.dtype))

    @given(described=tensors_of, limit=limits)
    @examples
    def test_a_bucket_exceeds_the_limit_only_for_a_tensor_that_is_not_contiguous(self, described, limit):
        tensors = build(described)
        for bucket in buckets(tensors, limit):
            alone = len(bucket.stretches) == 1 and not tensors[bucket.members[0]].is_contiguous()
            assert bucket.size <= limit or alone

    @given(described=tensors_of, limit=limits)
    @examples
    def test_no_block_is_cut(self, described, limit):
        """Nor shared: noise is made block by block."""
        for bucket in buckets(build(described), limit):
            assert all(stretch.at % BLOCK == 0 and stretch.start % BLOCK == 0 for stretch in bucket.stretches)
            blocks = [stretch.at // BLOCK + k for stretch in bucket.stretches for k in range(whole_blocks(stretch.count) // BLOCK)]
            assert len(set(blocks)) == len(blocks)

    @given(described=tensors_of, limit=limits)
    @examples
    def test_a_piece_of_a_large_tensor_is_all_of_its_bucket_and_every_other_bucket_is_of_whole_blocks(self, described, limit):
        tensors = build(described)
        for bucket in buckets(tensors, limit):
            (first, *others), here = bucket.stretches, members(bucket, tensors)
            if first.count < here[0].numel():
                assert not others and first.at == 0 and bucket.size == first.count
            elif bucket.size % BLOCK:
                assert not others and bucket.size == here[0].numel() >= min(ALONE, limit)
            else:
                assert bucket.size >= 2 * BLOCK

    DEALT = (
        # sizes, limit -> (tensor, start, count) of every stretch of every bucket
        ([3, 5, 2500, 4], 1024, [[(2, 0, 1024)], [(2, 1024, 1024)], [(2, 2048, 452)], [(0, 0, 3), (1, 0, 5), (3, 0, 4)]]),
        ([2304], 1024, [[(0, 0, 768)], [(0, 768, 768)], [(0, 1536, 768)]]),  # pieces of one size
        ([3, 5, 4], 512, [[(0, 0, 3), (1, 0, 5)], [(2, 0, 4)]]),  # each begins a block
        ([256, 256, 0, 255], 768, [[(0, 0, 256), (1, 0, 256), (3, 0, 255)]]),
        ([511, 1, 512], 512, [[(0, 0, 511)], [(2, 0, 512)], [(1, 0, 1)]]),
        ([ALONE - 1, ALONE, 3], BUCKET, [[(1, 0, ALONE)], [(0, 0, ALONE - 1), (2, 0, 3)]]),
        ([BUCKET + 1], BUCKET, [[(0, 0, ALONE + BLOCK)], [(0, ALONE + BLOCK, ALONE + 1 - BLOCK)]]),
    )

    @pytest.mark.parametrize(("sizes", "limit", "dealt"), DEALT)
    def test_a_large_tensor_is_cut_and_small_ones_share(self, sizes, limit, dealt):
        made = buckets([torch.empty(size) for size in sizes], limit)
        assert [[(b.members[s.tensor], s.start, s.count) for s in b.stretches] for b in made] == dealt

    def test_a_large_tensor_that_is_not_contiguous_stays_whole(self):
        (bucket,) = buckets([torch.empty(50, 60).T], 2 * BLOCK)
        assert [(s.start, s.count) for s in bucket.stretches] == [(0, 3000)]
        assert bucket.size == 3000

    def test_nothing_gives_no_bucket(self):
        assert buckets([]) == []
        assert buckets([torch.zeros(0), torch.zeros(3, 0)]) == []

    def test_views_and_pieces_share_memory_with_what_they_are_of(self):
        tensors = build([((3,), "plain"), ((2, 3), "transposed"), ((), "plain")])
        (bucket,) = buckets(tensors)
        laid = torch.zeros(bucket.size, dtype=torch.float64)
        bucket.views(laid, tensors)[1][1, 0] = 7
        assert laid.nonzero().tolist() == [[BLOCK + 3]]
        bucket.pieces(tensors)[1][1, 0] = 7
        assert tensors[1].tolist() == [[4, 5, 6], [7, 8, 9]]

    def test_a_piece_of_a_large_tensor_shares_its_memory(self):
        tensors = build([((40, 30), "plain")])
        for bucket in buckets(tensors, 2 * BLOCK):
            for piece in bucket.pieces(tensors):
                piece.neg_()
            assert bucket.within(tensors[0]).data_ptr() == bucket.pieces(tensors)[0].data_ptr()
        assert torch.equal(tensors[0], -build([((40, 30), "plain")])[0])

    WITHIN = (
        # shape, layout, limit -> how many elements of each bucket are seen where they lie, or None
        ((512,), "plain", BUCKET, [512]),
        ((1024,), "plain", BUCKET, [1024]),
        ((2, 2, 256), "plain", BUCKET, [1024]),
        ((1025,), "plain", 1024, [768, 257]),
        ((ALONE + 1,), "plain", BUCKET, [ALONE + 1]),
        ((1023,), "plain", BUCKET, [None]),  # idle elements follow
        ((256,), "plain", BUCKET, [None]),
        ((2, 512), "transposed", BUCKET, [None]),
        ((512,), "strided", BUCKET, [None]),
    )

    @pytest.mark.parametrize(("shape", "layout", "limit", "seen"), WITHIN)
    def test_a_tensor_that_is_all_of_its_bucket_need_not_be_copied(self, shape, layout, limit, seen):
        (tensor,) = build([(shape, layout)])
        within = [bucket.within(tensor) for bucket in buckets([tensor], limit)]
        assert [None if w is None else w.numel() for w in within] == seen
        if None not in within:
            assert torch.equal(torch.cat(within), tensor.reshape(-1))
            assert within[0].data_ptr() == tensor.data_ptr()

    def test_the_first_of_several_is_not_all_of_its_bucket(self):
        tensors = build([((512,), "plain"), ((3,), "plain")])
        (bucket,) = buckets(tensors)
        assert bucket.within(tensors[0]) is None

    @pytest.mark.parametrize("limit", [-512, 0, 2, 256, 511, 513, 1000])
    def test_a_limit_that_is_not_of_whole_blocks_is_refused(self, limit):
        with pytest.raises(ValueError, match=f"must be a multiple of 256 and at least two of them, got {limit}$"):
            buckets([torch.zeros(3)], limit)

    @pytest.mark.parametrize(("count", "whole"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512), (2**40 + 1, 2**40 + 256)])
    def test_whole_blocks(self, count, whole):
        assert whole_blocks(count) == whole

    def test_the_default_limit_is_one(self):
        assert BUCKET % BLOCK == 0 and BUCKET >= 2 * BLOCK
        assert ALONE <= BUCKET
