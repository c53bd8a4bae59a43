"""Laplace's approximation on handwritten digits: what it mends, and by which predictions."""

import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bayesrule as br
from bayesrule.uses.metrics import classification_metrics


@functools.cache
def digits(noise, decay, steps):
    """A network that fits 600 digits, some with random labels, and 1,197 others."""
    found, generator = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(found.target), generator=generator)
    x, y = torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    wrong = torch.rand(len(y), generator=generator) < noise
    y = torch.where(wrong, torch.randint(0, 10, (len(y),), generator=generator), y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        pull = sum(p.square().sum() for p in model.parameters()) * (decay / 2 / 600)
        (cross_entropy(model(x[:600]), y[:600]) + pull).backward()
        optimizer.step()
    return model.eval(), (x[:600], y[:600]), (x[600:], y[600:])


def linearized(model, post, x, draws=16):
    """Class probabilities of f(m) + J (theta - m), averaged over draws of theta; J by central differences in float64."""
    mean = {name: m.double() for name, m in post.mean.items()}

    def outputs(weights):
        return functional_call(model, weights, (x.double(),)).detach()

    model.double()
    total = 0.0
    for draw in range(draws):
        step = {name: (t - post.mean[name]).double() * 1e-4 for name, t in post.sample(0, draw).items()}
        ahead, behind = (outputs({name: m + sign * step[name] for name, m in mean.items()}) for sign in (1, -1))
        total = total + (outputs(mean) + (ahead - behind) / 2e-4).softmax(-1) / draws
    model.float()
    return total.float()


def measured(probs, data):
    return classification_metrics(probs, data[1])


@pytest.mark.parametrize("structure", ["diag", "kron", "last_layer"])
def test_where_labels_were_memorized_it_is_better_calibrated_than_the_mean(structure, tmp_path):
    """20 % of the labels are random, the network is right about all: at the mean it is sure of what it memorized."""
    model, train, test = digits(0.2, 0.0, 300)
    br.Posterior.laplace(model, zip(*(t.split(128) for t in train), strict=True), structure).save(tmp_path / "p.safetensors")
    post = br.Posterior.load(tmp_path / "p.safetensors")
    before = measured(br.predict(model, post, test[0], "mean").probs, test)
    after = measured(linearized(model, post, test[0]), test)
    assert after["nll"] < before["nll"] - 0.3
    assert after["ece"] < before["ece"] - 0.02
    assert after["accuracy"] > before["accuracy"] - 0.06


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_draws_of_weights_lose_the_accuracy_that_linearized_outputs_keep(structure):
    """Which is why the method of a Laplace posterior is "glm"."""
    model, train, test = digits(0.0, 1.0, 500)
    post = br.Posterior.laplace(model, [train], structure)
    mean = measured(br.predict(model, post, test[0], "mean").probs, test)["accuracy"]
    glm = measured(linearized(model, post, test[0]), test)["accuracy"]
    mc = measured(br.predict(model, post, test[0], "mc", 16).probs, test)["accuracy"]
    assert glm > mean - 0.05
    assert mc < glm - 0.05
