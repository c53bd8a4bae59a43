"""Where parameters and their state lie flat: large tensors are cut, small ones share, and the state is an ordinary one."""

import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import bayesrule as br
from bayesrule.lowering import Scratch
from bayesrule.noise import addresses
from bayesrule.plots import plots
from bayesrule.vector import BLOCK, BUCKET

SHAPES = [(7,), (2 * BUCKET + 3,), (), (3, 5, 2), (BUCKET,), (BUCKET + 1,)]
HYPER = dict(lr=0.3, ess=50.0, hess_init=0.4, betas=(0.9, 0.7), weight_decay=0.02, clip_radius=2.0)


def normals(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def trained(steps, params, optimizer, start=0):
    for step in range(start, start + steps):
        with optimizer.sampled_params(train=True):
            for p, g in zip(params, normals(100 + step), strict=True):
                p.grad = g * (1 + p.detach())
        optimizer.step()


def test_tensors_larger_than_a_bucket_follow_the_equations():
    params, noise = [nn.Parameter(v) for v in normals(0)], {}
    optimizer = br.IVON(params, noise=lambda p: noise[p], **HYPER)
    m, v, h = normals(0), [torch.zeros(()) for _ in SHAPES], [torch.full(s, 0.4, dtype=torch.float64) for s in SHAPES]
    for step in range(3):
        eps = normals(10 + step)
        noise.update(zip(params, eps, strict=True))
        trained(1, params, optimizer, step)
        for i, g in enumerate(normals(100 + step)):
            n = eps[i] / (50 * (h[i] + 0.02)).sqrt()
            g = g * (1 + m[i] + n)
            f = 50 * (h[i] + 0.02) * n * g
            v[i] = 0.9 * v[i] + 0.1 * g
            h[i] = h[i] + 0.3 * (f - h[i]) + 0.045 * (f - h[i]) ** 2 / (h[i] + 0.02)
            slope = (v[i] / (1 - 0.9 ** (step + 1)) + 0.02 * m[i]) / (h[i] + 0.02)
            m[i] = m[i] - 0.3 * 0.42 * slope.clamp(-2, 2)
            for found, right in ((params[i], m[i]), (optimizer.state[params[i]]["hess"], h[i])):
                torch.testing.assert_close(found.detach(), right, rtol=1e-10, atol=1e-12)


def test_a_resumed_run_of_cut_tensors_is_bit_equal():
    params = [nn.Parameter(v) for v in normals(0)]
    optimizer = br.IVON(params, **HYPER)
    trained(2, params, optimizer)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = br.IVON(again, **HYPER)
    resumed.load_state_dict(optimizer.state_dict())
    trained(2, params, optimizer, 2)
    trained(2, again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_tensor_put_into_the_state_is_obeyed(index):
    params = [nn.Parameter(v) for v in normals(0)]
    optimizer = br.IVON(params, lr=0.0, ess=50.0, betas=(0.9, 1.0))
    trained(1, params, optimizer)
    p = params[index]
    optimizer.state[p]["hess"] = torch.full(p.shape, 9.0)  # float32, for a float64 parameter
    trained(1, params, optimizer, 1)
    assert (optimizer.state[p]["hess"] == 9.0).all() and optimizer.state[p]["hess"].dtype == torch.float64
    assert all((optimizer.state[q]["hess"] == 1.0).all() for q in params if q is not p)


def test_state_has_the_shape_of_its_parameter():
    params = [nn.Parameter(v) for v in normals(0)]
    optimizer = br.IVON(params, **HYPER)
    trained(1, params, optimizer)
    for p in params:
        assert {name: tuple(t.shape) for name, t in optimizer.state[p].items()} == {
            "step": (),
            "hess": tuple(p.shape),
            "momentum": tuple(p.shape),
        }


def test_a_reminder_points_at_the_line_that_stepped():
    p = nn.Parameter(torch.ones(2))
    optimizer = br.IVON([p], lr=0.1, ess=5)
    p.grad = torch.ones(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


# Plots: where copying between tensors and flats happens

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7, 40, 300]), max_size=2).map(tuple)
layouts = st.sampled_from(["plain", "transposed", "strided"])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
tensors_of = st.lists(st.tuples(shapes, layouts, dtypes), min_size=1, max_size=8)
limits = st.sampled_from([2 * BLOCK, 3 * BLOCK, 8 * BLOCK, BUCKET])
examples = settings(max_examples=100, derandomize=True, deadline=None)
CUT_OR_WHOLE = pytest.mark.parametrize("limit", [2 * BLOCK, BUCKET], ids=["cut", "whole"])


def build(described, seed=0):
    """Tensors of these shapes, memory layouts and dtypes."""
    made = []
    for (shape, layout, dtype), values in zip(described, normals(seed, [shape for shape, *_ in described]), strict=True):
        values = values.to(dtype)
        if layout == "transposed" and len(shape) > 1:
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "strided" and shape:
            wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
            wide[..., ::2] = values
            values = wide[..., ::2]
        made.append(values)
    return made


def dealt(tensors, limit=BUCKET):
    starts = addresses(t.numel() for t in tensors)
    return plots(list(zip(starts, tensors, strict=True)), Scratch(), limit)


def identity(tensors):
    return [(t.data_ptr(), t.stride(), t.shape, t.dtype) for t in tensors]


class TestCopying:
    @given(described=tensors_of, limit=limits)
    @examples
    def test_what_is_read_and_put_back_changed_arrives_in_every_element(self, described, limit):
        """Nothing is lost, nothing moves: storage, strides, shapes and dtypes stay."""
        params = build(described)
        before, where = [t.clone() for t in params], identity(params)
        for plot in dealt(params, limit):
            assert plot.mean().shape == (plot.bucket.size,)
            plot.put(plot.mean() * 3)
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, (old.to(torch.promote_types(p.dtype, torch.float32)) * 3).to(p.dtype))
        assert identity(params) == where

    @given(described=tensors_of, limit=limits)
    @examples
    def test_other_tensors_are_read_in_the_order_of_the_parameters_and_written_back(self, described, limit):
        """Gradients, say. They may lie otherwise in memory than the parameters do."""
        params, others = build(described), [t.contiguous() for t in build(described, seed=1)]
        numbers = {id(p): i for i, p in enumerate(params)}
        into = [torch.zeros_like(t) for t in others]
        for plot in dealt(params, limit):
            here = [numbers[id(p)] for p in plot.params]
            read = plot.read([others[i] for i in here], "gradient")
            assert read.dtype == plot.dtype == torch.promote_types(plot.params[0].dtype, torch.float32)
            plot.write(read, [into[i] for i in here], None, "gradient")
        assert all(torch.equal(a, b) for a, b in zip(into, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(params, build(described), strict=True))

    @given(described=tensors_of, limit=limits)
    @examples
    def test_reading_leaves_the_tensors_alone_and_the_mean_is_what_stands_in_them(self, described, limit):
        params = build(described)
        for plot in dealt(params, limit):
            mean = plot.mean()
            for stretch in plot.bucket.stretches:
                right = plot.params[stretch.tensor].reshape(-1)[stretch.start : stretch.start + stretch.count]
                assert torch.equal(mean[stretch.at : stretch.at + stretch.count], right.to(plot.dtype))
        assert all(torch.equal(a, b) for a, b in zip(params, build(described), strict=True))

    @pytest.mark.parametrize(
        ("shape", "dtype", "own"),
        [
            ((512,), torch.float32, True),
            ((40, 2560), torch.float64, True),
            ((512,), torch.bfloat16, False),  # reckoned in float32
            ((511,), torch.float32, False),
        ],
    )
    def test_a_parameter_that_lies_in_one_run_of_whole_blocks_is_worked_on_where_it_is(self, shape, dtype, own):
        p = torch.zeros(shape, dtype=dtype)
        (plot,) = dealt([p])
        mean = plot.mean()
        assert (mean.data_ptr() == p.data_ptr()) is own
        assert plot.mean().data_ptr() == mean.data_ptr()  # no copy anew elsewhere
        mean.fill_(2.0)
        plot.put(mean)
        assert (p == 2).all()

    def test_the_memory_of_a_parameter_is_written_without_gradients(self):
        p = nn.Parameter(torch.zeros(512))
        (plot,) = dealt([p])
        assert not plot.mean().requires_grad
        plot.mean().fill_(2.0)
        assert (p == 2).all()

    def test_the_memory_format_of_images_is_kept(self):
        weight = normals(0, [(4, 3, 5, 5)])[0].to(memory_format=torch.channels_last)
        pointer = weight.data_ptr()
        (plot,) = dealt([weight])
        plot.put(plot.mean() * 2)
        assert torch.equal(weight, 2 * normals(0, [(4, 3, 5, 5)])[0])
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.data_ptr() == pointer

    @CUT_OR_WHOLE
    def test_tied_views_see_what_is_put(self, limit):
        weight = torch.zeros(30, 50)
        tied, row = weight.view(1500), weight[1]
        values, at = torch.arange(1500.0), 0
        for plot in dealt([weight], limit):
            count = plot.bucket.stretches[0].count
            plot.put(nn.functional.pad(values[at : at + count], (0, plot.bucket.size - count)))
            at += count
        assert torch.equal(tied, values)
        assert torch.equal(row, values[50:100])

    @CUT_OR_WHOLE
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_dtypes_are_converted_both_ways(self, dtype, limit):
        source = [t.to(dtype) for t in normals(0, [(3, 3), (7,), (700,)])]
        target = [t.clone() for t in source]
        wide = torch.promote_types(dtype, torch.float32)
        for plot in dealt(target, limit):
            assert plot.mean().dtype == wide
            plot.put(plot.mean() + 1e-3)
        for s, t in zip(source, target, strict=True):
            assert torch.equal(t, (s.to(wide) + 1e-3).to(dtype))

    @pytest.mark.parametrize("only", [{0, 2}, {1}, {2}], ids=str)
    def test_only_the_members_asked_for_are_written(self, only):
        params = [t.abs() + 1 for t in normals(0, [(3,), (2, 2), ()])]
        (plot,) = dealt(params)
        block = plot.flat("kept").fill_(1.0)
        plot.keep(-plot.mean(), block, frozenset(only))
        plot.put(-plot.mean(), frozenset(only))
        signs = [-1.0 if i in only else 1.0 for i in range(3)]
        assert [t.sign().unique().tolist() for t in params] == [[s] for s in signs]
        assert [t.sign().unique().tolist() for t in plot.bucket.views(block, params)] == [[s] for s in signs]

    def test_all_members_are_kept_without_a_choice(self):
        params = normals(0, [(3,), (2, 2)])
        (plot,) = dealt(params)
        plot.keep(plot.mean(), plot.flat("kept"), None)
        assert all(torch.equal(a, b) for a, b in zip(plot.bucket.views(plot.flat("kept"), params), params, strict=True))

    def test_plots_use_scratch_in_turn(self):
        """However many plots there are, one copy of the largest is held, and it stays where it is."""
        params = normals(0, [(300,)] * 40)
        scratch = Scratch()
        made = plots(list(zip(addresses([300] * 40), params, strict=True)), scratch, 8 * BLOCK)
        assert len(made) == 10
        pointers = {plot.mean().data_ptr() for plot in made for _ in range(2)}
        assert len(pointers) == 1
        assert scratch.nbytes == 8 * BLOCK * 8


class TestBlocks:
    @CUT_OR_WHOLE
    def test_state_shares_memory_with_the_block_of_its_plot(self, limit):
        params = [t.float() for t in normals(0, [(3, 4), (700,), ()])]
        states = {id(p): {} for p in params}
        for plot in dealt(params, limit):
            plot.shared("hess", [states[id(p)] for p in plot.params], fill=0.5).mul_(4)
        for p in params:
            assert states[id(p)]["hess"].shape == p.shape
            assert (states[id(p)]["hess"] == 2).all()
        for plot in dealt(params, limit):  # whoever comes later takes over what is there
            assert plot.shared("hess", [states[id(p)] for p in plot.params]).unique().tolist() in ([2], [0, 2])

    def test_a_block_is_made_once_and_dropped_when_told(self):
        (plot,) = dealt([torch.ones(3)])
        block = plot.flat("mine")
        assert block.shape == (plot.bucket.size,) and (block == 0).all()
        assert plot.flat("mine") is block
        plot.drop("mine")
        plot.drop("mine")
        assert plot.flat("mine") is not block

    def test_a_block_made_in_inference_mode_outlives_it(self):
        (plot,) = dealt([torch.ones(3)])
        with torch.inference_mode():
            plot.flat("mine")
        plot.flat("mine").add_(1)
        assert not plot.flat("mine").is_inference()

    @given(described=tensors_of, limit=limits)
    @examples
    def test_the_noise_of_a_plot_is_that_of_its_parameters(self, described, limit):
        params = build(described)
        right = br.CounterNoise(3, step=5).normal(br.Vector([p.double() for p in params])).parts
        for plot in dealt(params, limit):
            plot.put(br.CounterNoise(3, step=5, where=plot.where._replace(dtype=torch.float64)).normal(plot.mean()).to(plot.dtype))
        for p, whole in zip(params, right, strict=True):
            wide = torch.promote_types(p.dtype, torch.float32)
            assert torch.equal(p, whole.to(wide).to(p.dtype))

    def test_beyond_two_to_the_31_pairs_numbers_are_wide(self):
        """The first of a bucket is counted from itself, the rest may lie far behind."""
        params = [torch.zeros(3), torch.zeros(3)]
        (plot,) = plots([(0, params[0]), (2**33, params[1])], Scratch(), BUCKET)
        assert plot.where.first == 0
        assert plot.where.numbers[BLOCK // 2].item() == 2**32
