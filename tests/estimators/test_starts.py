"""A curvature that begins in the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bayesrule as br


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batches(count: int = 3, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size + i, 3, generator=g).double(), torch.randint(4, (size + i,), generator=g)) for i in range(count)]


def by_hand(net: nn.Module, data: list, loss: object, floor: float) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x, y in data:
        for (name, _), g in zip(net.named_parameters(), torch.autograd.grad(loss(net(x), y), list(net.parameters())), strict=True):
            found[name] += len(x) * g**2 / len(data)
    return {name: torch.maximum(e, floor * e.mean()) for name, e in found.items()}


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": lambda f, y: F.mse_loss(f, F.one_hot(y, 4).double(), reduction="none").sum(1).mean() / 2,
    "own": lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1),
}


@pytest.mark.parametrize("floor", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_squares_of_the_mean_gradients_at_the_scale_of_a_batch(loss, floor):
    net, data = model(), batches()
    given = [(x, F.one_hot(y, 4).double()) for x, y in data] if loss == "mse" else data
    each = (lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1, reduction="none")) if loss == "own" else loss
    found, expected = br.start_curvature(net, each, given, floor=floor), by_hand(net, data, LOSSES[loss], floor)
    assert found.keys() == expected.keys()
    for name, h in found.items():
        torch.testing.assert_close(h, expected[name])
    assert all(p.grad is None for p in net.parameters())


def test_gradients_of_the_loop_stay():
    net, ones = model(), {}
    for name, p in net.named_parameters():
        ones[name] = p.grad = torch.ones_like(p)
    br.start_curvature(net, "cross_entropy", batches())
    assert all(p.grad is ones[name] for name, p in net.named_parameters())


def test_tokens_count_that_are_not_ignored():
    torch.manual_seed(0)
    net = nn.Embedding(5, 5).double()
    x = torch.randint(5, (4, 6))
    y = torch.where(torch.rand(4, 6) < 0.3, -100, x)
    (g,) = torch.autograd.grad(F.cross_entropy(net(x).flatten(0, 1), y.flatten()), [net.weight])
    torch.testing.assert_close(br.start_curvature(net, "cross_entropy", [(x, y)], floor=0.0)["weight"], (y >= 0).sum() * g**2)


def test_a_loss_of_ones_own_is_averaged_over_examples_whatever_labels_are():
    torch.manual_seed(0)
    net, x, y = nn.Embedding(5, 5).double(), torch.randint(5, (4, 6)), torch.randint(5, (4, 6))

    def each(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(4, 6).mean(1)

    (g,) = torch.autograd.grad(each(net(x), y).mean(), [net.weight])
    torch.testing.assert_close(br.start_curvature(net, each, [(x, y)], floor=0.0)["weight"], 4 * g**2)


def test_a_batch_without_labels_does_not_count():
    torch.manual_seed(0)
    net, x = nn.Embedding(5, 5).double(), torch.randint(5, (4, 6))
    silent = (x, torch.full_like(x, -100))
    expected = br.start_curvature(net, "cross_entropy", [(x, x)])
    torch.testing.assert_close(br.start_curvature(net, "cross_entropy", [(x, x), silent]), expected)


def test_nothing_of_the_model_changes_and_an_attached_optimizer_draws_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    net[3].eval()
    kept, data = {name: t.clone() for name, t in net.state_dict().items()}, [(x.float(), y) for x, y in batches()]
    alone = br.start_curvature(net, "cross_entropy", data)
    optimizer = br.IVON(net.parameters(), lr=0.1, ess=10.0)
    hooks, state = optimizer.attach(net), torch.get_rng_state()
    torch.testing.assert_close(br.start_curvature(net, "cross_entropy", data), alone)
    assert torch.equal(state, torch.get_rng_state()) and not optimizer.draws.is_open
    hooks.remove()
    assert all(torch.equal(t, kept[name]) for name, t in net.state_dict().items())
    assert net[1].training and net[2].training and not net[3].training


def test_weights_that_no_batch_speaks_of_begin_as_the_others():
    net = nn.ModuleDict({"used": nn.Linear(3, 4), "unused": nn.Linear(3, 2)})
    net.forward = net["used"].forward
    data = [(x.float(), y) for x, y in batches()]
    found = br.start_curvature(net, "cross_entropy", data)
    usual = torch.stack([found[f"used.{name}"].mean() for name in ("weight", "bias")])
    assert found["unused.weight"].shape == (2, 3) and (found["unused.weight"] > 0.5 * usual.min()).all()
    net["unused"].requires_grad_(False)
    assert set(br.start_curvature(net, "cross_entropy", data)) == {"used.weight", "used.bias"}


BAD = {
    "no batches": (dict(batches=[]), "there are no batches"),
    "a floor below zero": (dict(floor=-1.0), "floor must be a number >= 0, got -1.0"),
    "an unknown loss": (dict(loss="hinge"), "unknown loss 'hinge'"),
    "infinite inputs": (dict(batches=[(torch.full((2, 3), torch.inf).double(), torch.tensor([0, 1]))]), "'0.weight' is not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    change, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        br.start_curvature(**{"model": model(), "loss": "cross_entropy", "batches": batches(), **change})


# As what an optimizer starts from


@pytest.mark.parametrize("kind", [br.IVON, br.EVON, br.VON, br.VOGN])
def test_optimizers_begin_where_it_says(kind):
    net = model()
    start = br.start_curvature(net, "cross_entropy", batches())
    optimizer = kind(net.named_parameters(), lr=0.1, ess=100.0, hess_init=start, weight_decay=0.5)
    precision = optimizer.posterior(net).precision
    for name, h in start.items():
        torch.testing.assert_close(precision[name], 100 * (h + 0.5))
    numbers = torch.cat([h.flatten() for h in start.values()])
    assert optimizer.param_groups[0]["hess_init"] == pytest.approx(float(numbers.mean()))


def test_groups_of_adamw_begin_at_zero():
    net = model()
    groups = br.split_matrices(net, lr=0.1, exclude=["2"])
    optimizer = br.EVON(groups, lr=0.1, ess=100.0, hess_init=br.start_curvature(net, "cross_entropy", batches()))
    assert not any(state["hess"].any() for p, state in optimizer.state.items() if p is not net[0].weight)
    assert optimizer.state[net[0].weight]["hess"].all()


def test_what_was_begun_is_saved_before_the_first_step():
    net = model()
    start = br.start_curvature(net, "cross_entropy", batches())
    saved = br.IVON(net.named_parameters(), lr=0.1, ess=100.0, hess_init=start).state_dict()
    other = br.IVON(net.named_parameters(), lr=0.1, ess=100.0)
    other.load_state_dict(saved)
    torch.testing.assert_close(other.posterior(net).precision["0.weight"], 100 * (start["0.weight"] + 1e-4))


STARTS = {
    "a name is missing": lambda start: start.pop("0.bias") is None or start,
    "another shape": lambda start: start | {"0.bias": torch.ones(3)},
    "below zero": lambda start: start | {"0.bias": -torch.ones(5)},
    "no number": lambda start: start | {"0.bias": torch.full((5,), torch.nan)},
    "no tensor": lambda start: start | {"0.bias": 1.0},
}


@pytest.mark.parametrize("what", STARTS)
def test_starts_that_do_not_fit_are_refused(what):
    net = model()
    start = STARTS[what](br.start_curvature(net, "cross_entropy", batches()))
    with pytest.raises(ValueError, match=r"IVON: hess_init must hold finite numbers >= 0, shape \(5,\), for '0.bias', got"):
        br.IVON(net.named_parameters(), lr=0.1, ess=100.0, hess_init=start)


def test_they_need_names():
    net = model()
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        br.IVON(net.parameters(), lr=0.1, ess=100.0, hess_init=br.start_curvature(net, "cross_entropy", batches()))
