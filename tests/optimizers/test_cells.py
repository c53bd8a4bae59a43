"""Where parameters and their state lie flat: large tensors are cut, small ones share, and the state is an ordinary one."""

import warnings

import pytest
import torch
from torch import nn

import bayesrule as br
from bayesrule.vector import BUCKET

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
