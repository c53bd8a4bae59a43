"""Models that adapt, against models that were trained again."""

import re
import warnings

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import BASE, GOLDEN, NEW, Logistic, T, X, accuracy, digits, perceptron, tensor, trained
from torch import nn

import bayesrule as br

CHANGES = {
    "add_data": {"add": NEW},
    "remove_data": {"remove": GOLDEN["removed_indices"]},
    "change_regulariser": {"prior_precision": GOLDEN["delta_new"]},
}
CORRECTED = ("posterior_correction", "posterior_correction_surrogate_error_order")


def quiet(problem, **change):
    """Without the warning that K-priors with few examples are far off."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a K-prior with a memory for")
        return problem.adapt(**change)


# Against stored solutions


@pytest.mark.parametrize("task", CHANGES)
@pytest.mark.parametrize("method", ["posterior_correction", "kprior"])
def test_a_full_memory_is_retraining(task, method):
    found = Logistic().adapt(**CHANGES[task], method=method, memory=Logistic().memory)
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"][task]["retrained"]), 1e-8)


@pytest.mark.parametrize("task", CHANGES)
@pytest.mark.parametrize("key", [*CORRECTED, "kprior_memory"])
def test_parts_of_the_memory_are_what_is_stored(task, key):
    cases = GOLDEN["tasks"][task].get(key, [])
    for case in cases:
        if task == "remove_data" and not set(GOLDEN["removed_indices"]) <= set(case["indices"]):
            continue
        problem = Logistic()
        method = "kprior" if key == "kprior_memory" else "posterior_correction"
        found = quiet(problem, **CHANGES[task], method=method, memory=problem.recall(case["indices"]))
        close(found.mean["weight"][0], tensor(case["theta"]), 1e-8)
    assert cases or (task, key) == ("remove_data", CORRECTED[1])


@pytest.mark.parametrize("task", ["add_data", "change_regulariser"])
@pytest.mark.parametrize(("structure", "key"), [("full", "laplace_full"), ("diag", "laplace_diag")])
def test_the_posterior_as_prior_is_laplace(task, structure, key):
    found = Logistic(structure).adapt(**CHANGES[task], method="prior")
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"][task][key]), 1e-8)


@pytest.mark.parametrize("delta", [0.02, 200.0])
@pytest.mark.parametrize("method", ["posterior_correction", "kprior", "replay"])
def test_another_prior_starts_at_the_old_weights(method, delta):
    problem = Logistic("diag")
    how = {"method": method, "memory": problem.memory, "optimizer": "adam", "lr": 1e-12, "epochs": 1}
    close(quiet(problem, prior_precision=delta, **how).mean["weight"], problem.post.mean["weight"], 1e-9)


@pytest.mark.parametrize("task", CHANGES)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_damping_pulls_to_the_old_weights_and_leaves_the_precision(task, structure):
    problem, moved = Logistic(structure), []
    old = problem.post.mean["weight"]
    for damping in (0.0, 1.0, 100.0, 1e9):
        problem = Logistic(structure)
        found = quiet(problem, **CHANGES[task], method="posterior_correction", memory=problem.memory, damping=damping)
        moved.append(float((found.mean["weight"] - old).norm()))
    assert moved[0] > moved[1] > moved[2] > moved[3] and moved[3] < 1e-6
    with pytest.raises(ValueError, match="damping must be a number >= 0, got -1"):
        quiet(Logistic(structure), **CHANGES[task], damping=-1.0)


def test_taking_away_without_a_memory_is_one_newton_step():
    problem, gone = Logistic(), GOLDEN["removed_indices"]
    found = problem.adapt(remove=[(X[gone], T[gone])], method="prior")
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"]["remove_data"]["posterior_correction"][0]["theta"]), 1e-8)


@pytest.mark.parametrize("size", [6, 12, 30, 60])
def test_a_feature_that_is_dropped(size):
    case = GOLDEN["tasks"]["change_model_drop_feature_2"]
    keep = case["columns_kept"]

    class Without(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1, bias=False).double()

        def forward(self, x):
            return self.layer(x[:, keep])

    problem, new = Logistic(), Without().eval()
    stored = next((one for one in case["kprior_memory"] if one["size"] == size), {"theta": case["kprior_full_memory"]})
    memory = problem.recall(stored.get("indices", range(60)))
    found = problem.adapt(
        memory=memory, new_model=new, mapping=lambda old: {"layer.weight": old["weight"][:, keep]}, method="kprior"
    )
    close(found.mean["layer.weight"][0], tensor(stored["theta"]), 1e-8)
    close(new.layer.weight[0], tensor(stored["theta"]), 1e-8)
    close(problem.model.weight[0], BASE, 1e-15)


# What holds of any change


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_memory_is_an_empty_memory_is_the_posterior_as_prior(structure, change):
    remove = [(X[:6], T[:6])]
    how = {"remove": remove} if change == "remove_data" else CHANGES[change]
    empty = Logistic(structure).recall([])
    found = [
        Logistic(structure).adapt(**how, method=method, memory=memory).mean["weight"]
        for method, memory in (("prior", None), ("posterior_correction", None), ("posterior_correction", empty))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [0, 12, 60])
def test_what_is_added_and_taken_away_again_was_never_there(size):
    problem = Logistic()
    memory = problem.recall(GOLDEN["order_by_surrogate_error"][:size])
    after = problem.adapt(add=NEW, memory=memory)
    new = br.Memory.of(*NEW[0], torch.zeros(8, 1))
    memory = memory.extend(new).refresh(problem.model)
    back = br.adapt(problem.model, after, remove=NEW, memory=memory, **problem.how)
    close(back.mean["weight"][0], BASE, 1e-6)
    close(back.parts[0].q.precision, tensor(GOLDEN["laplace_precision"]), 1e-6)
    assert (back.num_data, back.ess) == (60, 60)


@pytest.mark.parametrize("change", CHANGES)
def test_the_posterior_is_that_of_the_changed_data(change):
    """With all data in memory, of the structure of the old one."""
    keep = torch.ones(60, dtype=torch.bool)
    if change == "remove_data":
        keep[GOLDEN["removed_indices"]] = False
    x, y = X[keep], T[keep]
    if change == "add_data":
        x, y = torch.cat([x, NEW[0][0]]), torch.cat([y, NEW[0][1]])
    delta = GOLDEN["delta_new"] if change == "change_regulariser" else GOLDEN["delta"]
    for structure in ("full", "diag"):
        problem = Logistic(structure)
        found = problem.adapt(**CHANGES[change], memory=problem.memory)
        want = br.Posterior.laplace(problem.model, [(x, y)], structure, delta, "bce")
        close(found.precision["weight"], want.precision["weight"], 1e-8)
        close(found.prior_precision["weight"].expand(1, 4), torch.full((1, 4), delta).double(), 1e-12)
        assert (found.num_data, found.ess, found.structure) == (len(x), len(x), structure)
        assert torch.equal(found.mean["weight"], problem.model.weight)


@pytest.mark.parametrize("method", ["posterior_correction", "kprior"])
def test_a_full_memory_is_retraining_whatever_the_structure(method):
    problem = Logistic("diag")
    found = problem.adapt(add=NEW, memory=problem.memory, method=method)
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"]["add_data"]["retrained"]), 1e-8)


def test_replay_of_all_is_retraining_and_the_functions_of_all_are_the_posterior():
    problem = Logistic()
    found = problem.adapt(add=NEW, memory=problem.memory, method="replay")
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"]["add_data"]["retrained"]), 1e-8)
    problem = Logistic()
    found = problem.adapt(add=NEW, memory=problem.memory, method="functional")
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"]["add_data"]["laplace_full"]), 1e-4)  # the jitter


def test_examples_that_go_leave_the_memory_whether_named_or_shown():
    gone = GOLDEN["removed_indices"]
    named, shown = (
        Logistic().adapt(remove=remove, memory=Logistic().memory)
        for remove in (torch.tensor(gone), [(X[gone[:2]], T[gone[:2]]), (X[gone[2:]], T[gone[2:]])])
    )
    close(named.mean["weight"], shown.mean["weight"], 1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "newton", "ivon"])
def test_another_prior_without_a_memory_is_solved_whatever_the_optimizer(optimizer):
    found = Logistic("diag").adapt(prior_precision=0.5, method="prior", optimizer=optimizer, epochs=1)
    close(found.mean["weight"][0], tensor(GOLDEN["tasks"]["change_regulariser"]["laplace_diag"]), 1e-8)


def test_numbers_of_examples_are_found_in_a_memory_that_the_method_does_not_use():
    found = [
        Logistic().adapt(remove=remove, method="prior", memory=memory).mean["weight"]
        for remove, memory in (([7, 3], Logistic().memory), ([(X[[3, 7]], T[[3, 7]])], None))
    ]
    close(found[0], found[1], 1e-12)


# By steps


@pytest.mark.parametrize(
    "optimizer",
    ["adam", lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9), lambda params: br.IVON(params, lr=0.5, ess=1e8)],
    ids=["adam", "a function", "one that draws"],
)
def test_steps_come_near_the_minimum(optimizer):
    problem = Logistic()
    found = problem.adapt(add=NEW, memory=problem.recall(range(24)), optimizer=optimizer, epochs=300, lr=0.02)
    exact = Logistic().adapt(add=NEW, memory=problem.recall(range(24)))
    close(found.mean["weight"], exact.mean["weight"], 2e-3)


def test_ivon_learns_from_a_posterior_as_its_prior():
    problem = Logistic("diag")
    found = problem.adapt(add=NEW, optimizer="ivon", method="prior", epochs=400)
    want = Logistic("diag").adapt(add=NEW, method="prior")
    deviation = want.variance["weight"].sqrt()
    assert ((found.mean["weight"] - want.mean["weight"]).abs() < deviation).all()
    assert (found.precision["weight"] > 0.7 * want.precision["weight"]).all()
    assert found.num_data == 68 and torch.equal(found.prior_precision["weight"][0], torch.full((4,), 2.0).double())


def test_networks_forget_less_with_a_memory():
    x, y, _, _ = digits(400)
    low, high = y < 5, y >= 5
    model = trained(perceptron(), x[low], y[low])
    post = br.Posterior.laplace(model, [(x[low], y[low])])
    memory = br.Memory.select(model, post, [(x[low], y[low])], 40)
    found = br.adapt(model, post, memory=memory, add=[(x[high], y[high])], epochs=30, lr=0.01)
    assert accuracy(model, x[low], y[low]) > 0.85 and accuracy(model, x[high], y[high]) > 0.85
    assert found.num_data == len(x)
    again = trained(perceptron(), x[low], y[low])
    br.adapt(again, post, method="prior", add=[(x[high], y[high])], epochs=30, lr=0.01)
    assert accuracy(again, x[low], y[low]) < 0.5


def test_weights_that_are_known_exactly_stay():
    x, y, _, _ = digits(200)
    model = trained(perceptron(), x, y, steps=50)
    post = br.Posterior.laplace(model, [(x, y)], structure="last_layer")
    before = model[0].weight.detach().clone()
    found = br.adapt(model, post, add=[(x, y)], epochs=2)
    assert torch.equal(model[0].weight, before) and found.precision["0.weight"].isinf().all()
    assert found.structure == post.structure and not torch.equal(found.mean["2.weight"], post.mean["2.weight"])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# Failures


def unprepared(**fields):
    return br.Posterior({"weight": BASE[None]}, {"weight": torch.ones(1, 4).double()}, **fields)


def turned():
    q = br.Kronecker(torch.zeros(1, 4).double(), br.KroneckerProduct(torch.eye(1).double(), torch.eye(4).double()))
    return br.Posterior.of(q, {"weight": (1, 4)})


MISUSES = [
    ({}, ValueError, "nothing changes: pass add, remove, prior_precision or new_model"),
    ({"add": NEW, "method": "ewc"}, ValueError, "unknown method 'ewc'; take 'posterior_correction', 'kprior', "),
    ({"add": NEW, "optimizer": "lbfgs"}, ValueError, "unknown optimizer 'lbfgs'; take 'adam', 'newton', 'ivon' or a function"),
    ({"add": NEW, "lr": -1.0}, ValueError, "lr must be a number > 0, got -1.0"),
    ({"add": NEW, "epochs": 0}, ValueError, "epochs must be a whole number >= 1, got 0"),
    ({"add": NEW, "batch_size": 2.5}, ValueError, "batch_size must be a whole number >= 1, got 2.5"),
    ({"add": NEW, "method": "replay"}, ValueError, "method='replay' needs a memory here"),
    ({"new_model": nn.Linear(4, 1).double().eval()}, ValueError, "needs a memory here: pass Memory.select("),
    ({"add": []}, ValueError, "there is nothing to add: the loader gave no example"),
    ({"remove": [(X[:0], T[:0])]}, ValueError, "there is nothing to remove: the loader gave no example"),
    ({"remove": range(14)}, ValueError, "14 examples to remove are not in the memory; K-prior removal needs them"),
    ({"remove": [70], "memory": Logistic().memory}, ValueError, "1 examples to remove are not in the memory"),
    ({"prior_precision": -1.0}, ValueError, "prior_precision must be a number > 0, got -1.0 for 'weight'"),
    ({"prior_precision": {}}, ValueError, "prior_precision has no number for 'weight'"),
    ({"prior_precision": 1.0, "posterior": unprepared()}, ValueError, "the posterior does not know its prior"),
    ({"add": NEW, "posterior": turned()}, TypeError, "structure 'eigen' cannot take up the curvature of other data"),
    ({"add": NEW, "posterior": unprepared().exact()}, ValueError, "the posterior knows every weight exactly"),
    ({"remove": [(X, T)], "posterior": unprepared()}, ValueError, "removal makes the precision of 'weight' negative (4 of 4"),
    ({"remove": [(X[:6], T[:6])] * 12}, ValueError, "removal makes the precision of 'weight' negative (the least eigenvalue"),
    ({"add": [(NEW[0][0], NEW[0][1] + 3)]}, ValueError, "bce takes labels 0 and 1"),
    (
        {"add": NEW, "memory": br.Memory.of(X, T, torch.ones(60, 1))},
        ValueError,
        "the memory holds outputs of another model than that of the posterior",
    ),
    ({"add": NEW, "memory": br.Memory.of(X, T, torch.ones(60))}, ValueError, "the memory holds outputs of shape (60,)"),
    ({"add": NEW, "optimizer": "ivon"}, TypeError, "IVON learns independent weights; take the posterior's independent() part"),
]


@pytest.mark.parametrize(("how", "error", "says"), MISUSES, ids=[says[:40] for _, _, says in MISUSES])
def test_misuse_is_refused_in_one_line_and_changes_nothing(how, error, says):
    problem = Logistic()
    problem.post = how.pop("posterior", problem.post) if "posterior" in how else problem.post
    how = {name: value for name, value in how.items() if name != "posterior"}
    with pytest.raises(error, match=re.escape(says)) as raised:
        problem.adapt(**how)
    assert "\n" not in str(raised.value)
    assert torch.equal(problem.model.weight[0], BASE) and problem.model.weight.requires_grad


def test_steps_that_diverge_are_undone():
    problem = Logistic()
    with pytest.raises(RuntimeError, match=r"the adaptation diverged: a batch has the loss .*; take a smaller lr"):
        problem.adapt(add=NEW, optimizer=lambda params: torch.optim.SGD(params, lr=1e200))
    assert torch.equal(problem.model.weight[0], BASE)


def test_a_model_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match=r"dropout is random; call model\.eval"):
        br.adapt(model, br.Posterior.point(model), add=NEW)


def test_a_k_prior_of_few_examples_warns_when_the_prior_changes():
    problem = Logistic()
    with pytest.warns(UserWarning, match="a K-prior with a memory for 12 of 60 examples is far off when the prior changes"):
        problem.adapt(prior_precision=0.5, method="kprior", memory=problem.recall(range(12)))


def test_another_ess_is_rescaled():
    problem = Logistic()
    want = problem.adapt(add=NEW).mean["weight"]
    problem = Logistic()
    problem.post = problem.post.rescale(ess=600.0)
    with pytest.warns(UserWarning, match="trained with ess=600 but num_data=60; variances are scaled by 10 for adaptation"):
        close(problem.adapt(add=NEW).mean["weight"], want, 1e-10)
