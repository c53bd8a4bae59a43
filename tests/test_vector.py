import operator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.contracts import close, flat, normal

from bayesrule.vector import BUCKET, Vector, axpy, buckets, lerp

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

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
tensors_of = st.lists(st.tuples(shapes, st.sampled_from(["plain", "transposed", "strided"])), min_size=1, max_size=8)
limits = st.sampled_from([2, 4, 10, 64, BUCKET])
examples = settings(max_examples=150, derandomize=True, deadline=None)


def build(described, dtype=torch.float64) -> list[torch.Tensor]:
    """Tensors of these shapes and memory layouts, every element of all of them different."""
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
    def test_gathered_and_scattered_every_element_comes_back_in_place(self, described, limit):
        sources, targets = build(described), [torch.zeros_like(t) for t in build(described)]
        targets = [torch.empty_strided(s.shape, s.stride(), dtype=s.dtype).zero_() for s in sources]
        before = [(t.data_ptr(), t.stride(), t.shape) for t in targets]
        for bucket in buckets(sources, limit):
            bucket.scatter(bucket.gather(members(bucket, sources), torch.float64), members(bucket, targets))
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(source, target)
        assert [(t.data_ptr(), t.stride(), t.shape) for t in targets] == before

    @given(described=tensors_of, limit=limits)
    @examples
    def test_every_element_lies_in_one_place_in_row_major_order_and_idle_ones_are_zero(self, described, limit):
        tensors = build(described)
        seen = []
        for bucket in buckets(tensors, limit):
            gathered = bucket.gather(members(bucket, tensors), torch.float64)
            assert gathered.shape == (bucket.size,)
            covered = torch.zeros(bucket.size, dtype=torch.bool)
            for stretch, piece in zip(bucket.stretches, bucket.split(gathered), strict=True):
                tensor = tensors[bucket.members[stretch.tensor]]
                assert torch.equal(piece, tensor.reshape(-1)[stretch.start : stretch.start + stretch.count])
                assert torch.equal(piece, gathered[stretch.at : stretch.at + stretch.count])
                assert not covered[stretch.at : stretch.at + stretch.count].any()
                covered[stretch.at : stretch.at + stretch.count] = True
            assert (gathered[~covered] == 0).all()
            seen.append(gathered[covered])
        everything = torch.cat(seen) if seen else torch.zeros(0)
        assert everything.numel() == sum(t.numel() for t in tensors)
        assert torch.equal(everything.sort().values, torch.arange(1, everything.numel() + 1, dtype=everything.dtype))

    @given(described=tensors_of, limit=limits)
    @examples
    def test_a_bucket_exceeds_the_limit_only_for_a_tensor_that_is_not_contiguous(self, described, limit):
        tensors = build(described)
        for bucket in buckets(tensors, limit):
            alone = len(bucket.stretches) == 1 and not tensors[bucket.members[0]].is_contiguous()
            assert bucket.size <= limit or alone

    @given(described=tensors_of, limit=limits)
    @examples
    def test_no_pair_of_elements_is_cut(self, described, limit):
        for bucket in buckets(build(described), limit):
            assert all(stretch.at % 2 == 0 and stretch.start % 2 == 0 for stretch in bucket.stretches)

    def test_a_large_tensor_is_cut_and_small_ones_share(self):
        tensors = build([((3,), "plain"), ((5,), "plain"), ((70,), "plain"), ((2, 2), "plain")])
        dealt = [[(b.members[s.tensor], s.start, s.count) for s in b.stretches] for b in buckets(tensors, 32)]
        assert sorted(dealt) == [
            [(0, 0, 3), (1, 0, 5), (3, 0, 4)],
            [(2, 0, 32)],
            [(2, 32, 32)],
            [(2, 64, 6)],
        ]

    def test_nothing_gives_no_bucket(self):
        assert buckets([]) == []
        assert buckets([torch.zeros(0), torch.zeros(3, 0)]) == []

    def test_the_memory_format_of_images_is_kept(self):
        weight = normal(0, 4, 3, 5, 5).to(memory_format=torch.channels_last)
        pointer = weight.data_ptr()
        (bucket,) = buckets([weight])
        bucket.scatter(bucket.gather([weight], torch.float64) * 2, [weight])
        assert torch.equal(weight, 2 * normal(0, 4, 3, 5, 5))
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.data_ptr() == pointer

    @pytest.mark.parametrize("limit", [4, BUCKET], ids=["cut", "whole"])
    def test_tied_views_see_what_is_scattered(self, limit):
        weight = torch.zeros(3, 5)
        tied, row = weight.view(15), weight[1]
        for bucket in buckets([weight], limit):
            bucket.scatter(bucket.gather([torch.arange(15.0)], torch.float32), [weight])
        assert torch.equal(tied, torch.arange(15.0))
        assert torch.equal(row, torch.arange(5.0, 10.0))

    @pytest.mark.parametrize("limit", [4, BUCKET], ids=["cut", "whole"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_dtypes_are_converted_both_ways(self, dtype, limit):
        source = [normal(0, 3, 3).to(dtype), normal(1, 7).to(dtype)]
        target = [torch.zeros_like(t) for t in source]
        for bucket in buckets(source, limit):
            wide = bucket.gather(members(bucket, source), torch.float64)
            assert wide.dtype == torch.float64
            bucket.scatter(wide + 1e-3, members(bucket, target))
        for s, t in zip(source, target, strict=True):
            assert torch.equal(t, (s.double() + 1e-3).to(dtype))

    def test_tensors_of_several_dtypes_share_a_bucket_without_loss(self):
        tensors = [normal(0, 5).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32)]
        (bucket,) = buckets(tensors)
        pieces = bucket.split(bucket.gather(tensors, torch.float64))
        for piece, tensor in zip(pieces, tensors, strict=True):
            assert torch.equal(piece, tensor.double())

    def test_gathering_and_changing_the_result_of_an_operation_leaves_the_tensors_alone(self):
        tensors = build([((3,), "plain"), ((9,), "plain")])
        for limit in (4, BUCKET):
            for bucket in buckets(tensors, limit):
                bucket.gather(members(bucket, tensors), torch.float64).mul(2)
        assert all(torch.equal(a, b) for a, b in zip(tensors, build([((3,), "plain"), ((9,), "plain")]), strict=True))

    def test_only_the_members_asked_for_are_written(self):
        tensors = build([((3,), "plain"), ((2, 2), "plain"), ((), "plain")])
        (bucket,) = buckets(tensors)
        bucket.scatter(-bucket.gather(tensors, torch.float64), tensors, only={0, 2})
        signs = [t.sign().unique().tolist() for t in tensors]
        assert signs == [[-1], [1], [-1]]

    def test_pieces_of_a_split_are_views(self):
        tensors = build([((3,), "plain"), ((2,), "plain")])
        (bucket,) = buckets(tensors)
        whole = bucket.gather(tensors, torch.float64)
        bucket.split(whole)[1].zero_()
        assert whole.tolist() == [1, 2, 3, 0, 0, 0]

    def test_the_default_limit_is_even(self):
        """Tensors are cut at multiples of it."""
        assert BUCKET % 2 == 0
