"""What tests of adaptation share: a logistic regression with everything known of it, and digits in tasks."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesrule as br

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "kprior_logistic.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


X, T = tensor(GOLDEN["X"]), tensor(GOLDEN["t"])[:, None]
NEW = [(tensor(GOLDEN["X_new"]), tensor(GOLDEN["t_new"])[:, None])]
BASE = tensor(GOLDEN["theta_base"])


class Logistic:
    """A linear model of 60 examples at its minimum, and its full posterior."""

    def __init__(self, structure="full"):
        self.how = {"loss": "bce", "optimizer": "newton"}
        self.model = nn.Linear(4, 1, bias=False).double().eval()
        with torch.no_grad():
            self.model.weight.copy_(BASE[None])
        q = br.Full(BASE, tensor(GOLDEN["laplace_precision"]))
        post = br.Posterior.of(q, {"weight": (1, 4)}, ess=60, num_data=60)
        delta = tensor(GOLDEN["delta"])
        post = replace(post, prior_mean={"weight": tensor(0.0)}, prior_precision={"weight": delta})
        self.post = post if structure == "full" else post.independent()
        self.memory = br.Memory.of(X, T, (X @ BASE)[:, None])

    def recall(self, indices):
        return self.memory.rows(torch.tensor(indices, dtype=torch.long))

    def adapt(self, **change):
        return br.adapt(self.model, self.post, **{**self.how, **change})


def digits(count=900):
    """Small digits, mixed: inputs and labels, then those of a test."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.data / 16.0, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    return x[:count], y[:count], x[count:], y[count:]


def perceptron(outputs=10):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, outputs)).eval()


def trained(model, x, y, delta=1.0, steps=300):
    """By Adam on all examples."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = delta / 2 * sum(p.square().sum() for p in model.parameters())
        ((nn.functional.cross_entropy(model(x), y, reduction="sum") + penalty) / len(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()
