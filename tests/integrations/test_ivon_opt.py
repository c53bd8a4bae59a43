"""Coming from the published package: its scripts run after two substitutions, its checkpoints go on."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesrule as br
from bayesrule.integrations.ivon_opt import load_ivon_opt

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ivon_opt_checkpoint.json").read_text())


def saved() -> dict[str, Any]:
    groups = [
        {name: torch.tensor(value, dtype=torch.double) if name in ("momentum", "hess") else value for name, value in group.items()}
        for group in GOLDEN["state_dict"]["param_groups"]
    ]
    return {"state": GOLDEN["state_dict"]["state"], "param_groups": groups}


def double(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.double)


class Problem:
    def __init__(self, noise: Iterator[Tensor] | None = None) -> None:
        self.x, self.y = double(GOLDEN["X"]), double(GOLDEN["y"])
        self.params = [nn.Parameter(double(p)) for p in GOLDEN["params"]]
        w, b, c = self.params
        groups = [{"params": [w, b]}, {"params": [c]}]
        self.optimizer = br.IVON(groups, lr=9.0, ess=9.0, noise=None if noise is None else lambda p: next(noise))

    def loss(self) -> Tensor:
        w, b, c = self.params
        return ((torch.tanh(self.x @ w) * c[0] + b.sum() + c[1] - self.y) ** 2).mean()


def test_a_checkpoint_goes_on_where_the_package_would_have_gone():
    problem = Problem(iter([double(normals) for step in GOLDEN["next"] for normals in step["normals"]]))
    load_ivon_opt(problem.optimizer, saved(), GOLDEN["steps"])
    for step in GOLDEN["next"]:
        with problem.optimizer.sampled_params(train=True):
            problem.loss().backward()
        problem.optimizer.step()
        for p, wanted in zip(problem.params, step["params"], strict=True):
            torch.testing.assert_close(p.detach(), double(wanted), rtol=1e-10, atol=1e-12)


def test_the_settings_of_every_group_are_taken_over():
    problem = Problem()
    load_ivon_opt(problem.optimizer, saved(), 5)
    first, second = problem.optimizer.param_groups
    assert (first["lr"], second["lr"], first["ess"], second["ess"]) == (0.1, 0.05, 100.0, 50.0)
    assert first["betas"] == (0.9, 0.999) and first["clip_radius"] == 2.0 and first["weight_decay"] == 1e-3
    assert all(problem.optimizer.state[p]["step"].item() == 5 for p in problem.params)


def changed(change: Any) -> dict[str, Any]:
    state = copy.deepcopy(saved())
    change(state)
    return state


REFUSED = {
    "too short": (
        lambda s: s["param_groups"][0].update(hess=torch.ones(3)),
        "hess of group 0 has shape .3,., its parameters have 4",
    ),
    "not finite": (
        lambda s: s["param_groups"][1]["momentum"].fill_(float("nan")),
        "momentum of group 1 has 2 entries that are not",
    ),
    "no variance": (
        lambda s: s["param_groups"][1]["hess"].fill_(-1e-3),
        "hess . weight_decay of group 1 has 2 entries not above 0 .min 0.; take an earlier",
    ),
    "no tensor": (lambda s: s["param_groups"][0].update(momentum=None), "momentum of group 0 must be a tensor .* got NoneType"),
    "whole numbers": (lambda s: s["param_groups"][0].update(hess=torch.ones(4, dtype=torch.long)), "real numbers, got torch.int64"),
    "a key less": (lambda s: s["param_groups"][1].pop("clip_radius"), "group 1 of the state lacks .'clip_radius'."),
    "a parameter less": (lambda s: s["param_groups"][0].update(params=[0]), "group 0 of the state has 1 parameters, .* 2; make"),
    "before the step": (
        lambda s: s["state"].update(count=2),
        "between a draw and its step, with 2 draws in it; take one saved after",
    ),
    "groups that are none": (lambda s: s.update(param_groups=3), "this is no state_dict of ivon-opt"),
    "one group": (lambda s: s["param_groups"].pop(), "the state has 1 parameter groups, the optimizer 2"),
    "another format": (lambda s: s["param_groups"][0].pop("beta1"), "this is no state_dict of ivon-opt"),
    "no groups": (lambda s: s.pop("param_groups"), "this is no state_dict of ivon-opt"),
    "a bad setting": (lambda s: s["param_groups"][0].update(ess=-1.0), "ess must be a number in"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_and_nothing_changes(change, message):
    problem = Problem()
    before = copy.deepcopy(problem.optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        load_ivon_opt(problem.optimizer, changed(change), 5)
    assert "\n" not in str(raised.value)
    assert problem.optimizer.state_dict() == before


def test_a_draw_stays_open_where_a_state_is_refused():
    problem = Problem()
    problem.optimizer.train()
    drawn = [p.detach().clone() for p in problem.params]
    with pytest.raises(ValueError, match="entries that are not finite"):
        load_ivon_opt(problem.optimizer, changed(lambda s: s["param_groups"][1]["hess"].fill_(float("inf"))), 5)
    assert all(torch.equal(p, d) for p, d in zip(problem.params, drawn, strict=True))


def test_a_negative_curvature_is_taken_while_the_prior_outweighs_it():
    problem = Problem()
    load_ivon_opt(problem.optimizer, changed(lambda s: s["param_groups"][1].update(hess=double([-0.7, 0.5]), weight_decay=1.0)), 5)
    assert problem.optimizer.state[problem.params[2]]["hess"].tolist() == [-0.7, 0.5]


def test_a_new_scheduler_finds_the_first_learning_rate():
    problem = Problem()
    load_ivon_opt(problem.optimizer, changed(lambda s: [g.update(initial_lr=0.4) for g in s["param_groups"]]), 5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5, last_epoch=4)
    assert scheduler.base_lrs == [0.4, 0.4]


def test_what_the_package_does_not_heed_in_a_group_is_not_taken():
    problem = Problem()
    load_ivon_opt(problem.optimizer, changed(lambda s: s["param_groups"][0].update(debias=False, rescale_lr=False)), 5)
    assert problem.optimizer.param_groups[0]["debias"] and problem.optimizer.param_groups[0]["rescale_lr"]


def test_names_in_another_order_are_refused():
    named = [("a", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))]
    state = changed(lambda s: (s["param_groups"].pop(), s["param_groups"][0].update(param_names=["b", "a"])))
    state["param_groups"][0].update(momentum=torch.ones(6), hess=torch.ones(6))
    with pytest.raises(ValueError, match="'b' was saved where 'a' stands"):
        load_ivon_opt(br.IVON(named, lr=0.1, ess=10), state, 5)


def test_the_state_stays_as_it_is():
    problem, state = Problem(), saved()
    load_ivon_opt(problem.optimizer, state, 5)
    with problem.optimizer.sampled_params(train=True):
        problem.loss().backward()
    problem.optimizer.step()
    for theirs, group in zip(state["param_groups"], saved()["param_groups"], strict=True):
        assert torch.equal(theirs["hess"], group["hess"]) and torch.equal(theirs["momentum"], group["momentum"])


def test_a_momentum_does_not_come_from_no_steps():
    with pytest.raises(ValueError, match="steps is 0, but the momentum of group 0 has moved"):
        load_ivon_opt(Problem().optimizer, saved(), 0)


@pytest.mark.parametrize("steps", [-1, 2.5, True, None])
def test_steps_must_be_a_number_of_steps(steps):
    with pytest.raises(ValueError, match="steps must be a whole number >= 0"):
        load_ivon_opt(Problem().optimizer, saved(), steps)


def test_only_ivon_is_filled():
    with pytest.raises(TypeError, match=r"fills a bayesrule.IVON, got a SGD"):
        load_ivon_opt(br.SGD([nn.Parameter(torch.ones(1))]), saved(), 1)  # type: ignore[arg-type]


def test_load_state_dict_points_to_the_loader():
    with pytest.raises(ValueError, match=r"saved by the package ivon-opt; load it with .*load_ivon_opt"):
        Problem().optimizer.load_state_dict(saved())


SCRIPT = """
import torch
import ivon

torch.manual_seed(0)
x = torch.randn(200, 5)
y = (x @ torch.arange(5.0) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = ivon.IVON(model.parameters(), lr=0.3, ess=len(x), hess_init=0.5, beta1=0.9, beta2=0.999, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

train_samples = 2
for epoch in range(20):
    for rows in torch.arange(len(x)).split(50):
        for _ in range(train_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
        optimizer.step()
    scheduler.step()

test_samples = 10
sampled = []
with torch.no_grad():
    for _ in range(test_samples):
        with optimizer.sampled_params():
            sampled.append(model(x).softmax(-1))
probs = torch.stack(sampled).mean(0)
accuracy = (probs.argmax(-1) == y).float().mean().item()
"""


def test_a_script_for_the_package_runs_after_two_substitutions():
    script = SCRIPT.replace("import ivon", "import bayesrule as ivon").replace("beta1=0.9, beta2=0.999", "betas=(0.9, 0.999)")
    found: dict[str, Any] = {}
    exec(script, found)
    assert found["accuracy"] > 0.9
    assert len({tuple(s.flatten().tolist()) for s in found["sampled"]}) == 10
