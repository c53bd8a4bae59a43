"""A rule with any slots is an optimizer, and the published ones are among them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.instances import Network
from torch import nn

import bayesrule as br

IVON = dict(ess=200.0, hess_init=0.5, weight_decay=0.01)
VADAM = dict(ess=200.0, hess_init=0.5, weight_decay=0.01)
BALL = br.HeavyBall(0.9)
SAME = {
    "IVON": (
        br.BayesRule(br.MonteCarlo(), br.Reparameterized(), br.Riemannian(), br.Momentum(0.9)),
        dict(IVON, beta2=0.99),
        lambda params: br.IVON(params, 0.1, betas=(0.9, 0.99), rescale_lr=False, **IVON),
    ),
    "IVON, clipped": (
        br.BayesRule(br.MonteCarlo(), br.Reparameterized(), br.Riemannian(0.1), br.Momentum(0.9)),
        dict(IVON, beta2=0.99),
        lambda params: br.IVON(params, 0.1, betas=(0.9, 0.99), rescale_lr=False, clip_radius=0.1, **IVON),
    ),
    "VON": (
        br.BayesRule(br.MonteCarlo(), br.Reparameterized(), br.Additive(), br.Momentum(0.9, over="loss+prior")),
        dict(IVON, beta2=0.999),
        lambda params: br.VON(params, 0.1, **IVON),
    ),
    "Vadam": (
        br.BayesRule(br.MonteCarlo(), br.SquaredGradient(), br.SquareRoot(0.01, debias=True), br.Momentum(0.9, over="loss+prior")),
        dict(VADAM, beta2=0.999),
        lambda params: br.Vadam(params, 0.1, **VADAM),
    ),
    "SGD": (
        br.BayesRule(br.Delta(), br.Zero(), br.Additive(), BALL),
        dict(weight_decay=0.01),
        lambda params: br.SGD(params, 0.1, momentum=0.9, weight_decay=0.01),
    ),
    "SAM": (
        br.BayesRule(br.Adversarial(0.05), br.Zero(), br.Additive(), BALL),
        dict(weight_decay=0.01),
        lambda params: br.SAM(params, 0.1, weight_decay=0.01),
    ),
    "bSAM": (
        br.BayesRule(
            br.Adversarial(0.05, br.MonteCarlo(), normalized=False),
            br.Magnitude(0.1),
            br.Additive(mean_precision="old"),
            br.Momentum(0.9, over="loss+prior", debias=False),
        ),
        dict(IVON, beta2=0.999),
        lambda params: br.BSAM(params, 0.1, **IVON),
    ),
    "OGN": (
        br.BayesRule(br.Delta(), br.EmpiricalFisher(), br.Additive(), br.Momentum(0.9, over="loss+prior")),
        dict(IVON, beta2=0.999),
        lambda params: br.OGN(params, 0.1, **IVON),
    ),
}


def trained(model: Network, optimizer: br.BayesOptimizer, steps: int = 6) -> list[torch.Tensor]:
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            if optimizer.squares_examples:
                rows = slice(step % 4 * 16, step % 4 * 16 + 16)
                return nn.functional.cross_entropy(model(model.x[rows]), model.y[rows], reduction="none")
            loss = model.loss(step)
            loss.backward()
            return loss

        optimizer.step(closure)
    states = [optimizer.state[p] for p in model.parameters()]
    return [*model.parameters(), *(t for state in states for t in state.values())]


@pytest.mark.parametrize("name", SAME)
def test_a_published_algorithm_is_its_slots(name):
    rule, hyper, preset = SAME[name]
    mine, theirs = Network(), Network()
    composed = br.BayesOptimizer(mine.parameters(), rule, 0.1, **hyper)
    for a, b in zip(trained(mine, composed), trained(theirs, preset(theirs.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_every_optimizer_is_one():
    names = [name for name in br.__all__ if isinstance(getattr(br, name), type)]
    optimizers = [name for name in names if issubclass(getattr(br, name), torch.optim.Optimizer)]
    assert len(optimizers) > 10 and all(issubclass(getattr(br, name), br.BayesOptimizer) for name in optimizers)


def test_two_rules_do_not_share_their_programs():
    """They have the same class and the same hyper-parameters."""
    found = []
    for curvature in (br.SquaredGradient(1.0), br.SquaredGradient(50.0)):
        model = Network()
        rule = br.BayesRule(br.MonteCarlo(), curvature, br.Additive())
        trained(model, br.BayesOptimizer(model.parameters(), rule, 0.1, **IVON))
        found.append(model.inner.weight.detach())
    assert not torch.allclose(*found)


def test_groups_have_their_own_numbers_and_may_be_quiet():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    rule = br.BayesRule(br.MonteCarlo(), br.Reparameterized(), br.Riemannian())
    optimizer = br.BayesOptimizer([{"params": [a], "noise_scale": 0}, {"params": [b], "lr": 0.0}], rule, 0.1, ess=10.0)
    with optimizer.sampled_params(train=True):
        assert torch.equal(a, torch.ones(3)) and not torch.equal(b, torch.ones(3))
        (a + b).sum().backward()
    optimizer.step()
    assert not torch.equal(a, torch.ones(3)) and torch.equal(b, torch.ones(3))


@pytest.mark.parametrize("name", ["IVON", "SGD"])
def test_copies_and_checkpoints_go_on_bit_by_bit(name):
    rule, hyper, _ = SAME[name]
    model = Network()
    optimizer = br.BayesOptimizer(model.parameters(), rule, 0.1, **hyper)
    trained(model, optimizer, 3)
    twin, again = copy.deepcopy((model, optimizer)), Network()
    resumed = br.BayesOptimizer(again.parameters(), rule, 0.1, **hyper)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    wanted = trained(model, optimizer, 3)
    for found in (trained(*twin, 3), trained(again, resumed, 3)):
        assert all(map(torch.equal, found, wanted))


def test_what_is_learned_is_a_posterior():
    rule, hyper, _ = SAME["IVON"]
    model = Network()
    optimizer = br.BayesOptimizer(model.parameters(), rule, 0.1, **hyper)
    trained(model, optimizer)
    post = optimizer.posterior(model, num_data=64)
    torch.testing.assert_close(post.precision["outer.bias"], 200.0 * (optimizer.state[model.outer.bias]["hess"] + 0.01))


def test_without_a_curvature_nothing_is_kept_and_draws_have_the_first_spread():
    w = nn.Parameter(torch.zeros(100_000))
    optimizer = br.BayesOptimizer([w], br.BayesRule(br.MonteCarlo(), br.Zero(), br.Additive()), 0.1, ess=10.0, hess_init=0.4)
    with optimizer.sampled_params(train=True):
        assert w.std().item() == pytest.approx(0.5, rel=0.02)
        w.sum().backward()
    optimizer.step()
    assert set(optimizer.state[w]) == {"step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_curvature_the_posterior_has_the_first_spread(dtype):
    model = nn.Linear(3, 1, bias=False, dtype=dtype)
    rule = br.BayesRule(br.MonteCarlo(), br.Zero(), br.Additive())
    optimizer = br.BayesOptimizer(model.parameters(), rule, 0.1, ess=10.0, hess_init=0.4)
    optimizer.step(lambda: model(torch.ones(1, 3, dtype=dtype)).sum().backward())
    assert torch.equal(optimizer.posterior(model).precision["weight"], torch.full((1, 3), 4.0))
    assert optimizer.noise_visibility() == {"0": 1.0}


class TestMisuse:
    @pytest.mark.parametrize("rule", [None, "ivon", br.Riemannian()])
    def test_what_is_no_rule_is_refused(self, rule):
        with pytest.raises(TypeError, match="rule must be a BayesRule, got"):
            br.BayesOptimizer([nn.Parameter(torch.zeros(2))], rule, 0.1)

    @pytest.mark.parametrize(
        "bad", [dict(ess=0.0), dict(ess=math.inf), dict(beta2=1.5), dict(hess_init=-1.0), dict(weight_decay=-1.0)]
    )
    def test_hyperparameters_are_held_to_their_ranges(self, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"BayesOptimizer: parameter group 0: {name} must be .*, got"):
            br.BayesOptimizer([nn.Parameter(torch.zeros(2))], SAME["IVON"][0], 0.1, **bad)

    @pytest.mark.parametrize("curvature", [br.Hessian(), br.GaussNewton(), br.DiagonalHessian(), br.Hutchinson()])
    def test_a_curvature_that_gradients_do_not_tell_is_refused(self, curvature):
        w = nn.Parameter(torch.ones(2))
        with pytest.raises(TypeError, match="curvature"):
            br.BayesOptimizer([w], br.BayesRule(br.Delta(), curvature, br.Additive()), 0.1)

    @pytest.mark.parametrize("expectation", [br.GaussHermite(3), br.Enumerate(), br.Exact(), br.Score(), br.Pathwise()])
    def test_an_expectation_that_a_host_cannot_take_is_refused(self, expectation):
        with pytest.raises(TypeError, match="expectation"):
            br.BayesOptimizer([nn.Parameter(torch.ones(2))], br.BayesRule(expectation, br.Zero(), br.Additive()), 0.1)

    def test_a_retraction_of_other_families_is_refused(self):
        with pytest.raises(TypeError, match="retraction"):
            br.BayesOptimizer([nn.Parameter(torch.ones(2))], br.BayesRule(br.Delta(), br.Zero(), br.Natural()), 0.1)
