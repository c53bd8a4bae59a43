"""What of the past enters an adaptation."""

from collections import Counter

import torch
from tests.contracts import close
from tests.uses.adaptation.problems import BASE, GOLDEN, Logistic, T, X, tensor

from bayesrule.estimators.output_losses import output_loss
from bayesrule.uses.adaptation.past import of_the_past

BCE = output_loss("bce")


def test_all_data_in_memory_leave_the_prior():
    for structure in ("full", "diag"):
        problem = Logistic(structure)
        past = of_the_past(problem.model, problem.post, BCE, problem.memory, None, "outputs")
        close(past.known.beside.diagonal, torch.full((4,), 2.0).double(), 1e-9)
        close(past.known.all.diagonal, tensor(GOLDEN["laplace_precision"]).diagonal(), 1e-12)
        assert torch.equal(problem.model.weight[0], BASE)


def test_one_of_two_equal_examples_leaves():
    problem = Logistic()
    memory = problem.recall([4, 4, 7])
    past = of_the_past(problem.model, problem.post, BCE, memory, [(X[[4, 9]], T[[4, 9]])], "outputs")
    assert Counter(past.memory.indices.tolist()) == Counter([4, 7]) and past.removed == 2


def test_masks_and_arrays_name_examples():
    mask = torch.zeros(60, dtype=torch.bool)
    mask[[3, 8]] = True
    for remove in (mask, mask.nonzero()[:, 0].numpy(), [8, 3], range(3, 9, 5)):
        problem = Logistic()
        past = of_the_past(problem.model, problem.post, BCE, problem.memory, remove, "outputs")
        assert past.removed == 2 and len(past.memory) == 58


def test_replay_knows_nothing_of_examples_that_went():
    problem = Logistic()
    past = of_the_past(problem.model, problem.post, BCE, problem.memory, [3], "labels")
    assert [len(one) for one in past.losses] == [59] and past.losses[0].pulls is None
