"""One task after another."""

import copy

import pytest
import torch
from tests.uses.adaptation.problems import accuracy, digits, perceptron, trained

import bayesrule as br

X, Y, TEST_X, TEST_Y = digits(600)
TASKS = [[(X[task == Y // 2], Y[task == Y // 2])] for task in range(5)]
FIRST = trained(perceptron(), *TASKS[0][0])


def accuracies(method):
    """Of each task, after all of them."""
    model = copy.deepcopy(FIRST)
    learner = br.ContinualLearner(model, br.Posterior.laplace(model, TASKS[0]), 12, method=method, epochs=30, lr=0.01)
    learner.remember(TASKS[0])
    for task in TASKS[1:]:
        learner.fit(task)
    assert learner.posterior.num_data == 600 and len(learner.memory) == 60
    assert torch.equal(learner.memory.refresh(model).outputs, learner.memory.outputs)
    assert len(learner.memory.indices.unique()) == 60
    return [accuracy(model, TEST_X[task == TEST_Y // 2], TEST_Y[task == TEST_Y // 2]) for task in range(5)]


def test_digits_in_five_tasks_are_remembered():
    found = {method: sum(accuracies(method)) / 5 for method in ("posterior_correction", "prior")}
    assert found["posterior_correction"] > 0.8 > 0.5 > found["prior"]


def test_a_head_grows_with_its_tasks():
    model = trained(perceptron(2), *TASKS[0][0], steps=100)
    learner = br.ContinualLearner(model, br.Posterior.laplace(model, TASKS[0]), 12, epochs=30, lr=0.01)
    learner.remember(TASKS[0])
    for number, task in enumerate(TASKS[1:3], start=2):
        post = learner.fit(task)
        assert learner.model[2].out_features == 2 * number and post.mean["2.weight"].shape[0] == 2 * number
        assert learner.memory.outputs.shape == (12 * number, 2 * number)
    assert accuracy(learner.model, *TASKS[2][0]) > 0.8 and model[2].out_features == 2


@pytest.mark.parametrize("by", ["surrogate_error", "curvature", "sensitivity"])
def test_every_choice_of_examples_goes(by):
    model = copy.deepcopy(FIRST)
    learner = br.ContinualLearner(model, br.Posterior.laplace(model, TASKS[0]), 6, by, epochs=1)
    learner.remember(TASKS[0])
    learner.fit(TASKS[1])
    assert learner.memory.labels.bincount(minlength=10).tolist() == [3, 3, 3, 3, 0, 0, 0, 0, 0, 0]
