"""Forgetting, against models that never knew."""

import re

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import BASE, GOLDEN, Logistic, T, X, digits, perceptron, tensor, trained
from torch import nn

import bayesrule as br

GONE = sorted(GOLDEN["removed_indices"])
REMOVE, REST = [(X[GONE], T[GONE])], [(X[[i for i in range(60) if i not in GONE]], T[[i for i in range(60) if i not in GONE]])]
RETRAINED = tensor(GOLDEN["tasks"]["remove_data"]["retrained"])


def retrained():
    model = nn.Linear(4, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(RETRAINED[None])
    return model


WAYS = [
    ("deviation", {}, 5e-4),
    ("adaptation", {"optimizer": "newton"}, 5e-4),
    ("adaptation", {"optimizer": "newton", "memory": Logistic().memory}, 1e-8),
    ("negation", {"optimizer": "newton"}, 5e-3),
]


@pytest.mark.parametrize(("method", "how", "tolerance"), WAYS, ids=["deviation", "adaptation", "with a memory", "negation"])
def test_the_weights_come_near_those_of_a_model_that_never_knew(method, how, tolerance):
    problem = Logistic()
    found = br.forget(problem.model, problem.post, REMOVE, remaining=REST, method=method, retrained=retrained(), loss="bce", **how)
    before = (BASE - RETRAINED).abs().max()
    gap = (found.posterior.mean["weight"][0] - RETRAINED).abs().max()
    assert gap < tolerance and gap < before / 5
    assert torch.equal(problem.model.weight, found.posterior.mean["weight"])
    assert (found.removed, found.posterior.num_data, found.posterior.ess) == (6, 54, 54)
    assert found.after.gradient < found.before.gradient / 5
    assert found.after.loss > found.before.loss
    assert found.after.agreement >= found.before.agreement
    f = (X[GONE] @ BASE).sigmoid(), (X[GONE] @ found.posterior.mean["weight"][0]).sigmoid()
    close(tensor(found.change), (f[1] - f[0]).abs().mean(), 1e-10)


def test_the_gradient_that_is_left_is_that_of_the_other_examples():
    problem = Logistic()
    found = br.forget(problem.model, problem.post, REMOVE, remaining=REST, loss="bce")
    p = (X[GONE] @ BASE).sigmoid()
    close(tensor(found.before.gradient), (X[GONE].T @ (p - T[GONE, 0])).norm(), 1e-8)  # at the minimum of all of them


def test_a_linear_regression_forgets_exactly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator).double()
    y = torch.randn(20, 1, generator=generator).double()
    post = br.Posterior.of(br.ridge(x, y[:, 0], 1.0), {"weight": (1, 3)}, ess=20, num_data=20)
    for method, how in (("deviation", {}), ("negation", {"optimizer": "newton"}), ("adaptation", {"optimizer": "newton"})):
        model = nn.Linear(3, 1, bias=False).double().eval()
        found = br.forget(model, post, [(x[:4], y[:4]), (x[4:6], y[4:6])], method=method, loss="mse", **how)
        close(model.weight[0].detach(), br.ridge(x[6:], y[6:, 0], 1.0).mean, 1e-9)
        close(found.posterior.parts[0].q.precision, br.ridge(x[6:], y[6:, 0], 1.0).precision, 1e-9)
        assert found.before.agreement is None and found.before.gradient is None


def test_a_class_is_forgotten_with_a_memory():
    x, y, _, _ = digits(400)
    gone = y == 3
    model = trained(perceptron(), x, y)
    post = br.Posterior.laplace(model, [(x, y)])
    memory = br.Memory.select(model, post, [(x, y)], 60)
    other = trained(perceptron(), x[~gone], y[~gone])
    found = br.forget(model, post, [(x[gone], y[gone])], method="adaptation", memory=memory, retrained=other, epochs=30, lr=0.01)
    assert found.before.agreement < 0.1 and found.after.agreement > 0.4
    assert found.after.loss > 10 * found.before.loss


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "prayer"}, "unknown method 'prayer'; take 'deviation', 'adaptation', 'negation'"),
        ({"memory": Logistic().memory}, "method='deviation' takes no 'memory'; take method='adaptation'"),
        ({"epochs": 3}, "method='deviation' takes no 'epochs'; take method='adaptation'"),
        ({"remove": []}, "there is nothing to remove: the loader gave no example"),
        ({"remove": REMOVE * 15}, "removal makes the precision of 'weight' negative (the least eigenvalue"),
        ({"remove": REMOVE * 15, "method": "negation", "optimizer": "newton"}, "negation makes the precision of 'weight' negative"),
    ],
)
def test_misuse_changes_nothing(how, says):
    problem = Logistic()
    with pytest.raises(ValueError, match=re.escape(says)):
        br.forget(problem.model, problem.post, **{"remove": REMOVE, "loss": "bce", **how})
    assert torch.equal(problem.model.weight[0], BASE)
