"""Precisions of models that were trained elsewhere: sums of squares over examples, and their file."""

import pytest
import torch
from tests.uses.merging.checkpoints import checkpoint
from torch import nn

import bayesrule as br
from bayesrule.uses.merging.folders import open_checkpoint
from bayesrule.uses.merging.headers import Room

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 2
DATA = [(X[:5], Y[:5]), (X[5:], Y[5:])]


@pytest.fixture
def model():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def squares(model, draws):
    """Example by example, with these labels."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(X, draws, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square()
    return total


def test_observed_labels_are_squares_one_by_one(model):
    found = br.precision(model, DATA, "observed", prior_precision=0.5)
    for name, total in squares(model, Y).items():
        torch.testing.assert_close(found.precision[name], total + 0.5)
    assert found.ess == found.num_data == 12


def test_drawn_labels_are_on_average_the_gauss_newton_matrix(model):
    exact = br.precision(model, DATA, "ggn", prior_precision=1e-3).precision
    draws = [br.precision(model, DATA, seed=seed, prior_precision=1e-3).precision for seed in range(200)]
    for name, s in exact.items():
        mean = torch.stack([each[name] for each in draws]).mean(0)
        torch.testing.assert_close(mean, s, rtol=0.15, atol=0.05)
    assert not draws[0]["0.weight"].equal(draws[1]["0.weight"])


def test_a_sample_is_scaled_up(model):
    some, all_ = (br.precision(model, DATA, "ggn", prior_precision=1e-9, num_data=n) for n in (12, 120))
    for name, s in some.precision.items():
        torch.testing.assert_close(all_.precision[name], 10 * s)


def test_an_unknown_method(model):
    with pytest.raises(ValueError, match="unknown method 'hessian'; take 'squared_gradients', 'ggn', 'observed'"):
        br.precision(model, DATA, "hessian")


def test_the_file_is_found_beside_the_weights(model, tmp_path):
    model[0].bias.requires_grad_(False)
    post = br.precision(model, DATA, "ggn", prior_precision=0.25)
    folder = checkpoint(tmp_path / "model", model.state_dict())
    br.save_precision(folder / "precision.safetensors", post)
    found = open_checkpoint(folder)
    assert found.precision.keys() == {"0.weight", "2.weight", "2.bias"}  # a frozen weight is known exactly
    assert {s.number for s in found.prior.values()} == {0.25}


def test_precisions_in_the_file_are_those_of_all_examples(tmp_path):
    w = torch.ones(2)
    post = br.Posterior({"w": w}, {"w": w * 8}, {"w": w[0] * 0}, {"w": w[0] * 4}, ess=400.0, num_data=100)
    folder = checkpoint(tmp_path / "model", {"w": w})
    br.save_precision(folder / "precision.safetensors", post)
    found = open_checkpoint(folder)
    assert found.precision["w"].read(0, 2, Room()).tolist() == [2, 2]
    assert found.prior["w"].number == 1.0
