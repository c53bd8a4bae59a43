"""Sequences of calls that once went silently wrong."""

import copy

import pytest
import torch
from torch import nn

import bayesrule as br


def ivon(*params, **hyper):
    return br.IVON(list(params), **{"lr": 0.1, "ess": 10.0, "betas": (0.0, 0.5), **hyper})


def test_draws_inside_autocast_see_their_own_weights():
    torch.manual_seed(0)
    model, seen = nn.Linear(64, 8), []
    optimizer = ivon(*model.parameters())
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
        optimizer.zero_grad()
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                seen.append(model(x))
                seen[-1].sum().backward()
        posterior = optimizer.posterior(model)
        spread = br.predict(model.eval(), posterior, x, "mc", 8, link="identity").variance
    assert not torch.equal(*seen)
    assert spread.min() > 0


@pytest.mark.parametrize("make", [lambda p: br.SGD(p, 0.1, momentum=0.9), lambda p: br.Adam(p, 0.1), lambda p: ivon(*p)])
def test_unfreezing_a_parameter_leaves_the_memory_of_the_others(make):
    a, b = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = make([a, b])

    def look():
        for p in (a, b):
            p.grad = torch.ones(3) if p.requires_grad else None

    def step():
        optimizer.step(look)

    for _ in range(5):
        step()
    memory = optimizer.names.memory
    before = optimizer.state[b][memory].clone()
    a.requires_grad_()
    step()
    assert (optimizer.state[b][memory] >= 0.85 * before).all() and (before > 0).all()


def test_loading_inside_a_draw_brings_the_mean_back():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    saved = copy.deepcopy(optimizer.state_dict())
    with optimizer.sampled_params(train=True):
        optimizer.load_state_dict(saved)
    assert (w == 0).all()


def test_copying_between_a_draw_and_its_step_is_refused():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    with optimizer.sampled_params(train=True):
        w.sum().backward()
    with pytest.raises(RuntimeError, match="copy it after the step"):
        copy.deepcopy(optimizer)


def test_after_a_failed_draw_clipping_still_acts_on_the_mean():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    for attempt in range(3):
        try:
            with optimizer.sampled_params(train=True):
                (1000 * w).sum().backward()
                assert attempt < 2
        except AssertionError:
            pass
    assert nn.utils.clip_grad_norm_([w], 0.3) > 1000
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.full((3,), 0.3 / 3**0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.add_(torch.tensor([0.0, 0.0, 0.0, 100.0])),
        lambda g: g.clamp_(-4, 4),
        lambda g: g.mul_(-0.5),
    ],
    ids=["regularizer", "value clipping", "scale"],
)
def test_two_equal_draws_are_one_whatever_is_done_to_the_gradient(change):
    states = []
    for draws in (1, 2):
        w = nn.Parameter(torch.zeros(4))
        optimizer = ivon(w, noise=lambda p: torch.tensor([0.5, -1.0, 1.5, 2.0]))
        for _ in range(draws):
            with optimizer.sampled_params(train=True):
                w.grad = torch.tensor([1.0, 2.0, 3.0, 400.0])
        change(w.grad)
        optimizer.step()
        states.append((w.detach(), optimizer.state[w]["hess"], optimizer.state[w]["momentum"]))
    torch.testing.assert_close(*states)


def test_a_parameter_held_back_after_two_draws_stays():
    u, w = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = ivon(u, w)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            (u + w).sum().backward()
    u.grad = None
    optimizer.step()
    assert (u == 0).all() and (w != 0).all()


def test_a_draw_without_backward_is_no_draw():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    with optimizer.sampled_params(train=True):
        pass
    optimizer.zero_grad()
    w.sum().backward()
    with pytest.warns(UserWarning, match="a step without a draw"):
        optimizer.step()
    assert (w != 0).all() and (optimizer.state[w]["hess"] == 1).all()


def test_what_is_made_infinite_after_two_draws_is_forgotten():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            w.sum().backward()
    w.grad[0] = torch.inf
    optimizer.zero_grad()
    assert optimizer.dropped_draws == 1
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            w.sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.ones(3))


def test_evaluation_in_inference_mode_comes_first():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    with torch.inference_mode(), optimizer.sampled_params(train=False):
        w.sum()
    with optimizer.sampled_params(train=True):
        w.sum().backward()
    optimizer.step()
    assert (w != 0).all()


def test_an_evaluation_context_loses_no_pending_draw():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    with optimizer.sampled_params(train=True):
        w.sum().backward()
    with optimizer.sampled_params(train=False):
        optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.ones(3))


def test_a_checkpoint_with_a_prior_loads_before_the_first_step():
    w = nn.Parameter(torch.zeros(3))
    prior = br.Posterior({"w": torch.ones(3)}, {"w": torch.ones(3)})
    saved = copy.deepcopy(ivon(w, prior=prior).state_dict())
    optimizer = ivon(w)
    optimizer.load_state_dict(saved)
    assert (optimizer.state[w]["prior_mean"] == 1).all()


def test_a_checkpoint_of_other_shapes_is_refused_whole():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w)
    with optimizer.sampled_params(train=True):
        w.sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["hess"] = torch.ones(1)
    saved["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError, match=r"hess of parameter 0 has shape \(1,\), the parameter \(3,\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_hyper_parameters_changed_between_draw_and_step_are_obeyed():
    w = nn.Parameter(torch.zeros(3))
    optimizer = ivon(w, rescale_lr=False)
    with optimizer.sampled_params(train=True):
        w.sum().backward()
    optimizer.param_groups[0].update(lr=2.0, clip_radius=0.01)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((3,), -0.02))


def test_no_noise_is_a_posterior_known_exactly_and_keeps_the_curvature():
    model = nn.Linear(2, 1)
    optimizer = br.IVON(model.parameters(), 0.1, float("inf"), weight_decay=0.0, hess_approx="gradsq", gradsq_scale=4.0)
    with optimizer.sampled_params(train=True):
        model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert all((optimizer.state[p]["hess"] == 1).all() for p in model.parameters())
    assert all((v == 0).all() for v in optimizer.posterior(model).variance.values())


def test_a_posterior_pairs_its_blocks_by_name():
    mean = {"w": torch.zeros(2), "v": torch.zeros(2)}
    one = br.Posterior(mean, {"w": torch.full((2,), 3.0), "v": torch.full((2,), 2.0)})
    other = br.Posterior(mean, {"v": torch.full((2,), 2.0), "w": torch.full((2,), 3.0)})
    assert one.log_prob(mean) == other.log_prob(mean) and other.kl(one) == 0


def test_a_prior_of_another_structure_is_refused():
    with pytest.raises(TypeError, match="a Full needs a prior of its own structure, got a Diagonal"):
        br.newton(lambda x: x.square().sum(), torch.zeros(2), prior=br.Diagonal(torch.zeros(2), 2.0))
