"""Objectives: their gradients are those of the loss of all data, wherever the weights stand."""

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import NEW, Logistic, T, X, tensor
from torch.nn import functional as F

from bayesrule.estimators.output_losses import output_loss
from bayesrule.estimators.pushing import Push
from bayesrule.uses.adaptation.objectives import METHODS, Functions, Losses, Objective
from bayesrule.uses.adaptation.past import of_the_past
from bayesrule.uses.adaptation.solving import moving

BCE = output_loss("bce")


def objective(method, problem, remove=None, memory=None, add=True):
    how = METHODS[method]
    past = of_the_past(problem.model, problem.post, BCE, problem.memory if memory is None else memory, remove, how.memory)
    added = [Losses(BCE, *NEW[0], torch.ones(8))] if add else []
    return Objective(problem.model, how.pull(past.known), Losses.joined([*past.losses, *added]), past.whole, 68.0)


def retraining(theta, keep, delta=2.0):
    x, y = torch.cat([X[keep], NEW[0][0]]), torch.cat([T[keep], NEW[0][1]])
    return F.binary_cross_entropy_with_logits(x @ theta, y[:, 0], reduction="sum") + delta / 2 * theta.square().sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("removed", [[], [5, 17, 58]])
@pytest.mark.parametrize(
    ("method", "structure"),
    [("posterior_correction", "full"), ("posterior_correction", "diag"), ("kprior", "full"), ("replay", "diag")],
)
def test_gradients_and_products_are_those_of_all_data(method, structure, removed, seed):
    """Of a model that is linear in its weights, with all data in memory."""
    problem = Logistic(structure)
    made = objective(method, problem, torch.tensor(removed) if removed else None)
    theta, v = 3 * torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = [i for i in range(60) if i not in removed]
    made.put(theta)
    with moving(problem.model, made.anchor.names):
        gradient, product = made.gradient(), made.product(v, Push(problem.model))
        value = made.value()
        made.put(theta + v)
        change = made.value() - value
    loss = lambda t: retraining(t, keep)  # noqa: E731
    close(gradient, torch.func.grad(loss)(theta), 1e-9)
    close(product, torch.func.hessian(loss)(theta) @ v, 1e-9)
    close(tensor(change), loss(theta + v) - loss(theta), 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_batches_average_to_the_whole(method):
    problem = Logistic()
    made = objective(method, problem, memory=problem.recall(range(12)))
    made.put(torch.ones(4).double())
    with moving(problem.model, made.anchor.names):
        want = made.gradient() / 68
        total = torch.zeros(4).double()
        batches = torch.arange(len(made.losses)).split(4)
        for rows in batches:
            problem.model.zero_grad()
            made.backward(rows)
            total += problem.model.weight.grad[0]
        close(total / len(batches), want, 1e-12)


def test_a_term_bends_as_its_value_says():
    f = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    v = torch.ones(5, 3).double() / 7
    terms = [
        Losses(output_loss("cross_entropy"), None, torch.tensor([0, 1, 2, 0, 1]), torch.rand(5), f / 3),
        Functions(None, f[:, :2] - 1, torch.linalg.cholesky(torch.eye(5).double() + 1).expand(2, 5, 5)),
    ]
    for term in terms:
        want = torch.func.jvp(torch.func.grad(term.value), (f,), (v,))[1]
        close(term.bend(f, v), want, 1e-9)


def test_classes_that_a_model_did_not_know_have_probability_zero():
    """The gradient of a remembered example is that of its probabilities."""
    loss, known = output_loss("cross_entropy"), torch.tensor([[1.0, -1.0]]).double()
    old = torch.cat([known, torch.full((1, 1), -torch.inf)], 1)
    labels = torch.tensor([1])
    term = Losses(loss, None, labels, torch.ones(1), loss.residual(old, labels))
    f = torch.tensor([[0.5, 0.0, 2.0]]).double()
    found = torch.func.grad(term.value)(f)
    close(found, f.softmax(1) - torch.cat([known.softmax(1), torch.zeros(1, 1)], 1), 1e-12)


def test_jacobians_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("bayesrule.uses.adaptation.objectives.LIMIT", 100)
    with pytest.raises(RuntimeError, match=r"method='functional' needs .* GiB for the Jacobians of 60 examples; take a smaller"):
        objective("functional", Logistic())
