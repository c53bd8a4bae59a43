"""Which parameters are matrices inside of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesrule as br


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight


class WithHead(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def frozen() -> nn.Module:
    model = Tied()
    model.inner.requires_grad_(False)
    return model


CASES = {
    "tied": (Tied, (), [["inner.weight"], ["tokens.weight"], ["inner.bias", "norm.weight", "norm.bias"]]),
    "a head that is named": (
        WithHead,
        (),
        [["inner.weight"], ["tokens.weight", "head.weight"], ["inner.bias", "norm.weight", "norm.bias", "head.bias"]],
    ),
    "a module is excluded": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)),
        ["1"],
        [["0.weight"], ["1.weight"], ["0.bias", "1.bias"]],
    ),
    "a parameter is excluded": (lambda: nn.Linear(2, 2), ["weight"], [["weight"], ["bias"]]),
    "a classifier of Hugging Face": (
        lambda: nn.ModuleDict({"encoder": nn.Linear(2, 2), "classifier": nn.ModuleDict({"dense": nn.Linear(2, 3)})}),
        (),
        [["encoder.weight"], ["classifier.dense.weight"], ["encoder.bias", "classifier.dense.bias"]],
    ),
    "kernels": (lambda: nn.Conv2d(2, 3, 3), (), [["weight"], ["bias"]]),
    "frozen": (frozen, (), [["tokens.weight"], ["norm.weight", "norm.bias"]]),
}


@pytest.mark.parametrize("name", CASES)
def test_split(name):
    make, exclude, expected = CASES[name]
    groups = br.split_matrices(make(), lr=0.01, exclude=exclude, weight_decay=0.1)
    assert [[key for key, _ in group["params"]] for group in groups] == expected
    for group in groups:
        if group.get("adamw"):
            assert group["lr"] == 0.01 and group["weight_decay"] == (0.1 if group["params"][0][1].dim() > 1 else 0.0)
    br.EVON(groups, lr=0.02, ess=100.0, hess_init=0.5)


def test_what_is_not_there_cannot_be_excluded():
    with pytest.raises(ValueError, match="the model has no module or parameter 'lm_head'; it has "):
        br.split_matrices(Tied(), lr=0.01, exclude=["lm_head"])


def test_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    optimizer = br.EVON(br.split_matrices(model, lr=0.05, exclude=["2"]), lr=0.05, ess=1e4, hess_init=0.5)
    x = torch.arange(6)
    losses = []
    for _ in range(60):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x + 1) % 6)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
