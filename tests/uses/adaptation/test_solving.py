"""Solvers on problems with known ends."""

import warnings

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import NEW, Logistic
from torch import nn

import bayesrule as br
from bayesrule.uses.adaptation.solving import conjugate_gradients, moving


@pytest.mark.parametrize("exact", [True, False])
def test_conjugate_gradients_solve(exact):
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    a, b = a @ a.T + torch.eye(6), torch.arange(6).double()
    inverse = torch.linalg.inv(a)
    solve = (lambda v: inverse @ v) if exact else (lambda v: v / a.diagonal())
    close(conjugate_gradients(lambda v: a @ v, b, solve, 1e-12), inverse @ b, 1e-10)


def test_conjugate_gradients_stop_where_a_matrix_is_not_positive():
    found = conjugate_gradients(lambda v: -v, torch.ones(3), lambda v: v, 1e-6)
    assert torch.equal(found, torch.ones(3))


def test_parameters_come_back_where_something_fails():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), moving(model, ["weight", "bias"]):
        assert model.bias.requires_grad
        with torch.no_grad():
            model.weight.add_(1)
        raise KeyError
    assert torch.equal(model.weight, before) and not model.bias.requires_grad


def test_newtons_method_says_when_it_did_not_arrive(monkeypatch):
    problem = Logistic()
    monkeypatch.setattr("bayesrule.uses.adaptation.adapting.newton", lambda o, s: br_newton(o, s, steps=1))
    from bayesrule.uses.adaptation.solving import newton as br_newton

    with pytest.warns(RuntimeWarning, match="Newton's method still falls by .* nats after 1 steps"):
        problem.adapt(add=NEW, memory=problem.memory)


def test_newtons_method_arrives_in_single_precision():
    problem = Logistic()
    want = problem.adapt(add=NEW, memory=problem.memory).mean["weight"]
    problem = Logistic()
    model = nn.Linear(4, 1, bias=False).eval()
    post = br.Posterior(
        *(
            {n: t.float() for n, t in block.items()}
            for block in (problem.post.mean, problem.post.precision, problem.post.prior_mean, problem.post.prior_precision)
        ),
        ess=60.0,
        num_data=60,
    )
    memory = br.Memory(
        problem.memory.inputs.float(),
        problem.memory.labels.float(),
        problem.memory.outputs.float(),
        problem.memory.weights,
        problem.memory.indices,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = br.adapt(model, post, add=[(NEW[0][0].float(), NEW[0][1].float())], memory=memory, loss="bce", optimizer="newton")
    close(found.mean["weight"].double(), want, 1e-4)
