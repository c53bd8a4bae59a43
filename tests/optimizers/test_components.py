"""Multi-IVON: several modes that take turns, each as IVON alone would have gone."""

import copy
import io

import pytest
import torch
from tests.instances import Network, flat, train
from torch import nn

import bayesrule as br

HYPER = dict(lr=0.3, ess=50.0, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01)


def make(model, **more):
    return br.MultiIVON(model.named_parameters(), **{**HYPER, **more})


class Steady(Network):
    """The same batch in every step."""

    def loss(self, step, reduction="mean"):
        return super().loss(0, reduction)


def component(optimizer, model, name, number):
    values = [optimizer.state[p][f"{name}_{number}"] if number else optimizer.state[p][name] for p in model.parameters()]
    return flat(values)


def test_one_component_is_ivon_bit_by_bit():
    one, other = Network(), Network()
    ends = [train(one, make(one, components=1), 12), train(other, br.IVON(other.parameters(), **HYPER), 12)]
    assert torch.equal(*ends)
    assert make(one, components=1).posterior(one).structure == "diag"


@pytest.mark.parametrize("count", [2, 3])
def test_each_component_goes_as_ivon_alone(count):
    """Without noise, from where it began: mean, curvature and momentum."""
    hyper = dict(ess=1e30, hess_approx="gradsq", gradsq_scale=8.0)
    model = Steady()
    optimizer = make(model, components=count, spread=0.7, **hyper)
    train(model, optimizer, count)  # each has made a step, so that all have begun
    for number in range(count):
        begin = Steady()
        fresh = make(begin, components=count, spread=0.7, **hyper)
        places = [fresh._beginning(fresh.param_groups[0], p, number) if number else p.detach().clone() for p in begin.parameters()]
        with torch.no_grad():
            for p, place in zip(begin.parameters(), places, strict=True):
                p.copy_(place)
        alone = br.IVON(begin.parameters(), **{**HYPER, **hyper})
        train(begin, alone, 1)
        mean = component(optimizer, model, "mean", number) if number else flat(model.parameters())
        torch.testing.assert_close(mean, flat(begin.parameters()), rtol=1e-12, atol=1e-12)
    train(model, optimizer, 4 * count)
    train(begin, alone, 4)
    number = count - 1
    for name, own in (("mean", None), ("hess", "hess"), ("momentum", "momentum")):
        expected = flat(begin.parameters()) if own is None else flat(alone.state[p][own] for p in begin.parameters())
        torch.testing.assert_close(component(optimizer, model, name, number), expected, rtol=1e-10, atol=1e-10)


def test_components_that_begin_alike_stay_alike_without_noise():
    model = Steady()
    optimizer = make(model, components=3, spread=0.0, ess=1e30, hess_approx="gradsq", gradsq_scale=8.0)
    train(model, optimizer, 12)
    for number in (1, 2):
        torch.testing.assert_close(component(optimizer, model, "mean", number), flat(model.parameters()), rtol=1e-12, atol=1e-12)


def test_components_begin_as_large_as_the_first_and_apart():
    model = nn.Linear(200, 100)
    nn.init.zeros_(model.bias)
    optimizer = make(model, components=2)
    with optimizer.sampled_params(train=False):
        pass
    with optimizer.sampled_params(train=False):  # of the second
        pass
    other = optimizer.state[model.weight]["mean_1"]
    first = model.weight.detach()
    assert abs(other.norm() / first.norm() - 1) < 0.02
    assert abs((other * first).sum() / first.norm() / other.norm()) < 0.05
    assert (optimizer.state[model.bias]["mean_1"] == 0).all()


@pytest.mark.parametrize("draws", [1, 2])
def test_parameters_hold_the_first_component_between_draws(draws):
    model = Network()
    optimizer = make(model, components=3, mc_samples=draws)
    before = flat(model.parameters())
    train(model, optimizer, 1)
    after = flat(model.parameters())
    assert not torch.equal(before, after)
    train(model, optimizer, 2)  # of the two others
    assert torch.equal(flat(model.parameters()), after)
    train(model, optimizer, 1)
    assert not torch.equal(flat(model.parameters()), after)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_draw_that_fails_brings_the_first_component_back(number):
    model = Network()
    optimizer = make(model, components=3)
    if number:
        train(model, optimizer, number)
    before = flat(model.parameters())
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        assert not torch.equal(flat(model.parameters()), before)
        raise ZeroDivisionError
    assert torch.equal(flat(model.parameters()), before)
    with optimizer.sampled_params(train=False):
        pass
    assert torch.equal(flat(model.parameters()), before)


def test_looks_are_at_each_component_in_turn():
    model = Network()
    optimizer = make(model, components=3, ess=1e12)
    train(model, optimizer, 3)
    places = [flat(model.parameters()), *(component(optimizer, model, "mean", number) for number in (1, 2))]
    for place in places * 2:
        with optimizer.sampled_params(train=False):
            torch.testing.assert_close(flat(model.parameters()), place, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_run_goes_on_bit_by_bit(at):
    whole, first, second = Network(), Network(), Network()
    optimizer = make(whole, components=3)
    train(whole, optimizer, 9)
    begun = make(first, components=3)
    train(first, begun, at)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    again = make(second, components=3)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(second, again, range(at, 9))
    for name in ("mean", "hess", "momentum"):
        for number in (1, 2):
            assert torch.equal(component(again, second, name, number), component(optimizer, whole, name, number))
    assert torch.equal(flat(second.parameters()), flat(whole.parameters()))


def test_compiled_it_takes_the_same_steps():
    ends = []
    for compiled in (False, True):
        model = Network(torch.float32)
        optimizer = make(model, components=2, compile=compiled)
        train(model, optimizer, 6)
        ends.append([flat(model.parameters()), component(optimizer, model, "mean", 1)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_large_tensors_have_their_components_too():
    """One that is cut into several buckets."""
    w = nn.Parameter(torch.ones(3, 70_000))
    optimizer = br.MultiIVON([w], lr=0.1, ess=1e6, components=2)
    for _ in range(4):
        with optimizer.sampled_params(train=True):
            (w - 2).square().mean().mul(1e5).backward()
        optimizer.step()
    assert optimizer.state[w]["mean_1"].shape == w.shape
    assert ((optimizer.state[w]["mean_1"] - 2).abs().mean() < (torch.randn(1000) - 2).abs().mean()).all()
    assert int(optimizer.state[w]["step"]) == 4


def test_the_posterior_is_a_mixture_that_predicts(tmp_path):
    model = Network()
    optimizer = make(model, components=3)
    train(model, optimizer, 9)
    optimizer.posterior(model, num_data=64).save(tmp_path / "p.safetensors")
    post = br.Posterior.load(tmp_path / "p.safetensors")
    assert post.structure == "mixture" and post.num_data == 64
    (part,) = post.parts
    for number, law in enumerate(part.laws):
        mean = component(optimizer, model, "mean", number) if number else flat(model.parameters())
        torch.testing.assert_close(flat(law.mean.values()), mean)
        precision = 50 * (component(optimizer, model, "hess", number) + 0.01)
        torch.testing.assert_close(flat(law.precision.values()), precision)
    found = br.predict(model.eval(), post, model.x, num_samples=24)
    alone = br.predict(model, br.Posterior(part.laws[0].mean, part.laws[0].precision), model.x, num_samples=24)
    assert found.mutual_information.mean() > alone.mutual_information.mean()  # modes disagree more than draws of one


def test_bf16_parameters_hold_rounded_what_the_state_has_exactly():
    model = Network(torch.float32)
    model.x = model.x.bfloat16()
    model.bfloat16()
    optimizer = make(model, components=2)
    train(model, optimizer, 5)
    for p in model.parameters():
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}
    before = flat(model.parameters())
    train(model, optimizer, 1)  # of the second
    assert torch.equal(flat(model.parameters()), before)


BAD = {
    "no component": (dict(components=0), ValueError, "MultiIVON: parameter group 0: components must be a whole number >= 1"),
    "spread": (dict(spread=1.5), ValueError, r"MultiIVON: parameter group 0: spread must be a number in \[0, 1\], got 1.5"),
    "memory": (dict(memory="low"), TypeError, "MultiIVON has no memory="),
    "noise": (dict(noise=torch.zeros_like), TypeError, "MultiIVON has no noise="),
    "unknown": (dict(sigma=1.0), TypeError, "sigma"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_are_held_to_their_ranges(case):
    hyper, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make(Network(), **hyper)


def test_all_groups_have_as_many_components():
    model = Network()
    groups = [{"params": model.inner.parameters()}, {"params": model.outer.parameters(), "components": 2}]
    with pytest.raises(ValueError, match="the same number of components, got 2 after 3"):
        br.MultiIVON(groups, **HYPER)


def test_a_parameter_that_has_no_gradient_once_keeps_its_mean():
    w, u = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = br.MultiIVON([w, u], lr=0.1, ess=100.0, components=2)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
    for train_too in (False, True, False):
        with optimizer.sampled_params(train=train_too):
            pass
        assert (u == 1).all()


def test_a_copy_goes_on_with_the_component_whose_turn_it_is():
    model = Network()
    optimizer = make(model, components=3)
    train(model, optimizer, 4)
    other, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, [4, 5, 6]), train(other, copied, [4, 5, 6]))
    for name in ("mean", "hess", "momentum"):
        for number in (1, 2):
            assert torch.equal(component(optimizer, model, name, number), component(copied, other, name, number))
