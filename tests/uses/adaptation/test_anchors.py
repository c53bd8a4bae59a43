"""Pulls of weights, and arithmetic on their precision."""

from dataclasses import replace

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import BASE, GOLDEN, Logistic, T, X, tensor

import bayesrule as br
from bayesrule.estimators.output_losses import output_loss
from bayesrule.uses.adaptation.anchors import Anchor, by_weight

S = tensor(GOLDEN["laplace_precision"])


def anchor(structure="full"):
    problem = Logistic(structure)
    return problem, Anchor.of(problem.post, problem.model.weight)


def matrix(of):
    return of.q.precision if isinstance(of.q, br.Full) else of.q.precision.diag()


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_posterior_there_and_back(structure):
    problem, found = anchor(structure)
    back = found.posterior(problem.post, {}, 3)
    assert (back.structure, back.ess, back.num_data) == (structure, 57, 57)
    close(back.precision["weight"], problem.post.precision["weight"], 1e-12)
    assert torch.equal(back.mean["weight"][0], BASE)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_value_and_pull_agree(structure):
    _, found = anchor(structure)
    theta = torch.arange(4).double()
    close(found.pull(theta), torch.func.grad(found.value)(theta), 1e-12)
    close(found.stretch(theta), matrix(found) @ theta, 1e-12)
    close(found.times_covariance(torch.eye(4).double()), torch.linalg.inv(matrix(found)), 1e-10)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_curvature_is_that_of_the_examples_each_by_its_weight(structure):
    problem, found = anchor(structure)
    weights = 1 + (torch.arange(60) % 3).double()
    p = (X @ BASE).sigmoid()
    want = (X.T * (weights * p * (1 - p))) @ X
    got = found.curvature(problem.model, [(X[:20], T[:20], weights[:20]), (X[20:], T[20:], weights[20:])], output_loss("bce"))
    close(got, want if structure == "full" else want.diagonal(), 1e-10)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_another_prior_adds_its_own_pull(structure):
    _, found = anchor(structure)
    found = replace(found, prior_mean=torch.ones(4).double())
    other, theta = found.under(torch.full((4,), 0.5).double()), torch.arange(4).double()
    close(other.pull(theta), found.pull(theta) - 1.5 * (theta - 1), 1e-10)
    assert torch.equal(other.prior_precision, torch.full((4,), 0.5).double())


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_no_direction_knows_less_than_the_prior(structure):
    _, found = anchor(structure)
    less = found.plus(matrix(found) if structure == "full" else found.diagonal, -0.99).above_prior()
    assert torch.linalg.eigvalsh(matrix(less)).min() > 2 - 1e-9
    enough = found.above_prior()
    assert torch.equal(matrix(enough), matrix(found))


def test_examples_are_sorted_by_what_they_count():
    found = by_weight([(X[:3], T[:3], torch.tensor([2.0, 1.0, 2.0]))])
    assert [(w, len(rows[0][1])) for w, rows in found] == [(1.0, 1), (2.0, 2)]


def test_what_cannot_be_an_anchor():
    part = br.Posterior({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, torch.inf])})
    with pytest.raises(ValueError, match="knows a part of 'w' exactly, and not all of it"):
        Anchor.of(part, torch.zeros(2))
    with pytest.raises(ValueError, match="knows every weight exactly"):
        Anchor.of(part.exact(), torch.zeros(2))
    mixture = br.Posterior.mixture([br.Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)})] * 2)
    with pytest.raises(TypeError, match=r"structure 'mixture' cannot take up .* independent\(\) part"):
        Anchor.of(mixture, torch.zeros(2))
