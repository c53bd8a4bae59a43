"""Dropout over weights: the steps of a masked network, its limits, and expectations by all masks there are."""

import io
from itertools import product

import pytest
import torch
from tests.instances import Network, flat, train
from torch import nn

import bayesrule as br

WIDE = torch.float64


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def uniforms(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


class Masked(nn.Module):
    """Two layers with a mask in front of each, the same for all examples."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        for seed, p in enumerate(self.parameters()):
            p.data = normal(seed, *p.shape)
        self.masks = (torch.ones(4, dtype=WIDE), torch.ones(5, dtype=WIDE))

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x * self.masks[0])) * self.masks[1])


X, Y = normal(10, 6, 4), normal(11, 6, 3)


def squared(model):
    return (model(X) - Y).square().mean()


@pytest.mark.parametrize("hyper", [{}, dict(momentum=0.9), dict(momentum=0.9, weight_decay=0.1)], ids=str)
def test_it_takes_the_steps_of_sgd_on_a_masked_network(hyper):
    ours, theirs, keep = Masked(), Masked(), 0.7
    drawn = [{name: uniforms(10 * step + i, *p.shape) for i, (name, p) in enumerate(ours.named_parameters())} for step in range(8)]
    queue = iter([u for step in drawn for u in step.values()])
    optimizer = br.Dropout(ours.parameters(), lr=0.05, p=0.3, noise=lambda p: next(queue), **hyper)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.05, **hyper)
    for step in drawn:
        with optimizer.sampled_params(train=True):
            squared(ours).backward()
        optimizer.step()
        theirs.masks = tuple(
            (step[f"{layer}.weight"].reshape(-1)[:size] < keep).double() / keep for layer, size in (("inner", 4), ("outer", 5))
        )
        reference.zero_grad()
        squared(theirs).backward()
        reference.step()
        torch.testing.assert_close(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-12, atol=1e-12)


def test_one_example_at_a_time_it_is_torchs_dropout():
    """The same mask, in the weights or in front of them."""
    layer, x = nn.Linear(5, 3).double(), normal(0, 1, 5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        masked = nn.functional.dropout(torch.ones(1, 5, dtype=WIDE), 0.4)
    queue = iter([torch.where(masked > 0, 0.1, 0.9).expand(3, 5), torch.zeros(3, dtype=WIDE)])
    optimizer = br.Dropout(layer.parameters(), lr=0.1, p=0.4, noise=lambda p: next(queue))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = layer(nn.functional.dropout(x, 0.4))
    with optimizer.sampled_params(train=True):
        torch.testing.assert_close(layer(x), expected)


def test_without_masks_it_is_sgd():
    one, other = Network(), Network()
    ends = [
        train(one, br.Dropout(one.parameters(), lr=0.1, p=0.0, momentum=0.9, weight_decay=0.01), 10),
        train(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 10),
    ]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_the_mean_gradient_over_all_masks_is_that_of_the_expected_loss():
    """With units of two elements each, and a mean of zero among them, whose gradient counts as any other."""
    mean, keep = torch.tensor([0.5, -1.0, 0.0, 0.0, 2.0, 0.3], dtype=WIDE), 0.6
    units = torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(theta):
        return (theta.sin() * normal(1, 6)).sum() + (theta @ normal(2, 6)) ** 2

    def over_masks(m):
        total = 0.0
        for z in product((0.0, 1.0), repeat=3):
            weight = torch.tensor([keep if there else 1 - keep for there in z]).prod()
            total = total + weight * loss(m * torch.tensor(z, dtype=WIDE)[units] / keep)
        return total

    exact = torch.func.grad(over_masks)(mean)
    q, found = br.SpikeAndSlab(mean, keep, (3, 2), axis=0), torch.zeros(6, dtype=WIDE)
    for z in product((0.0, 1.0), repeat=3):
        noise = Told(torch.tensor([0.3 if there else 0.9 for there in z] + [0.5] * 3, dtype=WIDE))
        rule = br.BayesRule(br.Masks(), br.Zero(), br.Additive())
        look = rule.look(q, q, br.Loss(loss), noise)
        found = found + torch.tensor([keep if there else 1 - keep for there in z]).prod() * look.gradient
    torch.testing.assert_close(found, exact)


class Told(br.Noise):
    """Uniforms that are given."""

    def __init__(self, values):
        self.values = values

    def normal(self, like):
        raise AssertionError

    def uniform(self, like):
        return self.values

    def at(self, *, step=None, draw=None):
        return self

    def apart(self, stream):
        return self


def test_a_unit_is_an_input_whatever_the_kind_of_layer():
    layers = nn.ModuleList([nn.Linear(6, 4), nn.Conv2d(3, 2, 3), nn.Conv1d(5, 2, 2), nn.LayerNorm(4)]).double()
    for p in layers.parameters():
        nn.init.ones_(p)
    optimizer = br.Dropout(layers.parameters(), lr=0.1, p=0.5)
    found = set()
    for _ in range(6):
        with optimizer.sampled_params(train=False):
            for p in layers.parameters():
                if p.dim() < 2:
                    assert (p == 1).all()
                else:
                    along = p.detach().movedim(1, 0).reshape(p.shape[1], -1)
                    assert (along == along[:, :1]).all()
                    found |= set(along.unique().tolist())
    assert found == {0.0, 2.0}


def test_draws_over_a_linear_layer_average_to_its_output():
    layer, x = nn.Linear(8, 3).double(), normal(0, 4, 8)
    optimizer = br.Dropout(layer.parameters(), lr=0.1, p=0.3)
    exact, outputs = layer(x).detach(), []
    for _ in range(2000):
        with torch.no_grad(), optimizer.sampled_params(train=False):
            outputs.append(layer(x))
    stacked = torch.stack(outputs)
    assert ((stacked.mean(0) - exact) / (stacked.std(0) / 2000**0.5)).abs().max() < 5


def test_several_draws_have_a_slope_each():
    """Two draws in a step are the mean of two masked gradients."""
    model, expected = Masked(), Masked()
    us = [{name: uniforms(10 * d + i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())} for d in range(2)]
    queue = iter([u for draw in us for u in draw.values()])
    optimizer = br.Dropout(model.parameters(), lr=0.1, p=0.5, noise=lambda p: next(queue))
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            squared(model).backward()
    optimizer.step()
    for draw in us:
        expected.masks = tuple(
            (draw[f"{name}.weight"].reshape(-1)[:n] < 0.5).double() * 2 for name, n in (("inner", 4), ("outer", 5))
        )
        (squared(expected) / 2).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat(model.parameters()), flat(expected.parameters()))


def test_looking_between_a_draw_and_its_step_changes_nothing():
    ends = []
    for looks in (False, True):
        model = Masked()
        optimizer = br.Dropout(model.parameters(), lr=0.1, p=0.5)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                squared(model).backward()
            if looks:
                with optimizer.sampled_params(train=False):
                    squared(model)
            optimizer.step()
        ends.append(flat(model.parameters()))
    assert torch.equal(*ends)


def test_a_run_goes_on_bit_by_bit():
    def make(model):
        return br.Dropout(model.parameters(), lr=0.1, p=0.3, momentum=0.9, mc_samples=2, seed=4)

    whole, first, second = Network(), Network(), Network()
    expected = train(whole, make(whole), 8)[-1]
    optimizer = make(first)
    train(first, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    again = make(second)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(second, again, range(5, 8))[-1], expected)


def test_the_posterior_predicts_by_masks(tmp_path):
    model = Network()
    optimizer = br.Dropout([{"params": model.inner.parameters(), "p": 0.0}, {"params": model.outer.parameters()}], 0.1, p=0.4)
    train(model, optimizer, 3)
    optimizer.posterior(model, num_data=64).save(tmp_path / "p.safetensors")
    post = br.Posterior.load(tmp_path / "p.safetensors")
    assert post.structure == "dropout" and post.num_data == 64
    draws = [post.sample(0, draw) for draw in range(5)]
    torch.testing.assert_close(draws[0]["inner.weight"], model.inner.weight.detach())
    ratio = torch.stack([draw["outer.weight"] / model.outer.weight.detach() for draw in draws])
    assert set(ratio.round(decimals=9).unique().tolist()) == {0.0, round(1 / 0.6, 9)}
    torch.testing.assert_close(post.variance["outer.weight"], model.outer.weight.detach() ** 2 * (0.4 / 0.6))
    assert (br.predict(model.eval(), post, model.x, num_samples=8).mutual_information > 0).any()


REFUSED = {
    "p one": (lambda p: br.Dropout(p, lr=0.1, p=1.0), ValueError, "Dropout: parameter group 0: p must be a number in"),
    "natural": (lambda p: br.SpikeAndSlab(p[0]).natural(), TypeError, "no natural parameters; use the retraction Additive"),
    "expected": (lambda p: br.SpikeAndSlab(p[0]).expected(), TypeError, "no expectation parameters"),
    "density": (lambda p: br.SpikeAndSlab(p[0]).log_prob(p[0]), TypeError, "no density"),
    "entropy": (lambda p: br.SpikeAndSlab(p[0]).entropy(), TypeError, "no density"),
    "kl": (lambda p: br.SpikeAndSlab(p[0]).kl(br.SpikeAndSlab(p[0])), TypeError, "no density"),
    "the rule to the letter": (
        lambda p: br.BayesRule(br.Delta(), br.Zero(), br.Natural()).step(
            br.SpikeAndSlab(p[0]), br.SpikeAndSlab(p[0]), br.Loss(lambda x: x.sum())
        ),
        (TypeError, AttributeError),
        "SpikeAndSlab",
    ),
    "a power": (
        lambda p: br.Posterior.of(br.SpikeAndSlab(p[0].detach(), 0.5), {"w": (3,)}).rescale(ess=2.0),
        TypeError,
        "retrain with another p",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_not_is_refused_in_one_line(case):
    action, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        action([nn.Parameter(torch.ones(3))])
    assert "\n" not in str(caught.value)
