"""SAM and bSAM: where they climb to, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bayesrule as br


def climbing(w: nn.Parameter, optimizer: br.BayesOptimizer, loss=lambda w: w.pow(4).sum()):
    """A closure that remembers where it was called."""

    def closure(*part: int) -> torch.Tensor:
        optimizer.zero_grad()
        seen.append((w.detach().clone(), part))
        value = loss(w)
        value.backward()
        return value

    seen: list = []
    return closure, seen


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, -4.0, 0.5], dtype=torch.float64))


class TestClimbing:
    @pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
    def test_sam_goes_as_far_as_rho_whatever_the_scale_of_the_loss(self, scale):
        w = weights()
        optimizer = br.SAM([w], lr=0.01, rho=0.3)
        closure, seen = climbing(w, optimizer, lambda w: scale * w.pow(4).sum())
        optimizer.step(closure)
        (first, _), (second, _) = seen
        direction = 4 * scale * first**3
        torch.testing.assert_close(second - first, 0.3 * direction / direction.norm(), rtol=1e-9, atol=1e-12)

    def test_the_radius_is_over_all_groups_and_each_has_its_own(self):
        a, b, c = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (3.0, 4.0, 0.0))
        optimizer = br.SAM([{"params": [a]}, {"params": [b, c], "rho": 0.0}], lr=0.0, rho=1.0)
        seen = []

        def closure():
            optimizer.zero_grad()
            seen.append((a.item(), b.item()))
            ((a**2 + b**2) / 2).sum().backward()

        optimizer.step(closure)
        assert seen[0] == (3.0, 4.0)
        assert seen[1] == pytest.approx((3.6, 4.0), abs=1e-9)
        assert (a.item(), b.item()) == (3.0, 4.0)

    def test_bsam_climbs_from_the_mean_by_the_gradient_of_the_draw(self):
        w = weights()
        optimizer = br.BSAM([w], lr=0.01, ess=10.0, rho=0.2, weight_decay=0.1, hess_init=0.4, noise=lambda p: torch.ones_like(p))
        closure, seen = climbing(w, optimizer)
        before = w.detach().clone()
        optimizer.step(closure)
        draw = before + 1 / math.sqrt(10 * 0.5)
        torch.testing.assert_close(seen[0][0], draw)
        torch.testing.assert_close(seen[1][0], before + 0.2 * 4 * draw**3 / 0.5)

    @pytest.mark.parametrize("make", [lambda w: br.SAM([w], lr=0.1, m_sharpness=3), lambda w: br.BSAM([w], 0.1, 10, m_sharpness=3)])
    def test_every_part_is_looked_at_twice(self, make):
        w = weights()
        optimizer = make(w)
        closure, seen = climbing(w, optimizer)
        optimizer.step(closure)
        assert [part for _, part in seen] == [(0,), (0,), (1,), (1,), (2,), (2,)]

    def test_a_step_of_sam_on_a_quadratic_is_its_closed_form(self):
        """(A + rho A^2 / |A w|) w instead of A w."""
        A, w = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64), weights()
        optimizer, wanted = br.SAM([w], lr=0.1, momentum=0.0, rho=0.4, weight_decay=0.02), weights().detach()
        for _ in range(5):
            optimizer.step(climbing(w, optimizer, lambda w: w @ A @ w / 2)[0])
            slope = A @ wanted
            wanted = wanted - 0.1 * (slope + 0.4 * A @ slope / slope.norm() + 0.02 * wanted)
            torch.testing.assert_close(w.detach(), wanted, rtol=1e-11, atol=1e-11)

    def test_without_a_radius_bsam_steps_by_the_gradient_at_the_mean_and_curves_by_that_of_the_draw(self):
        w = weights()
        hyper = dict(ess=10.0, betas=(0.0, 0.8), rho=0.0, weight_decay=0.1, damping=0.05, hess_init=0.4)
        optimizer = br.BSAM([w], lr=0.01, noise=torch.ones_like, **hyper)
        before = w.detach().clone()
        optimizer.step(climbing(w, optimizer)[0])
        seen = 4 * (before + 1 / math.sqrt(10 * 0.5)) ** 3
        torch.testing.assert_close(w.detach(), before - 0.01 * (4 * before**3 + 0.1 * before) / 0.5)
        torch.testing.assert_close(optimizer.state[w]["hess"], 0.8 * 0.4 + 0.2 * (math.sqrt(0.5) * seen.abs() + 0.05))

    @pytest.mark.parametrize(("ess", "alike"), [(math.inf, True), (100.0, False)])
    def test_with_infinite_ess_bsam_has_no_chance_in_it(self, ess, alike):
        found = []
        for seed in (0, 1):
            w = weights()
            optimizer = br.BSAM([w], 0.01, ess, seed=seed)
            for _ in range(3):
                optimizer.step(climbing(w, optimizer)[0])
            found.append(w.detach())
        assert torch.equal(*found) == alike

    def test_a_zero_gradient_stays_where_it_is(self):
        w = nn.Parameter(torch.zeros(3))
        optimizer = br.SAM([w], lr=0.1)
        optimizer.step(climbing(w, optimizer)[0])
        assert torch.equal(w, torch.zeros(3))

    def test_the_shell_does_what_the_rule_does(self):
        """One step of bSAM by the pure rule, from the same draw."""
        w = weights()
        hyper = dict(ess=10.0, rho=0.2, weight_decay=0.1, damping=0.05, hess_init=0.4)
        optimizer = br.BSAM([w], 0.05, noise=lambda p: torch.full_like(p, 0.3), **hyper)
        group = optimizer.param_groups[0]
        q, prior = br.Diagonal(w.detach().clone(), torch.full_like(w, 0.4), 0.1, 10.0), br.Diagonal(0.0, 0.0, 0.1, 10.0)

        class Source(br.CounterNoise):
            def normal(self, like):
                return torch.full_like(like, 0.3)

        rule = optimizer.rule(group)
        look = rule.look(q, prior, br.Loss(lambda x: x.pow(4).sum()), Source())
        new, memory = rule.move(q, prior, look, br.Rates(0.05, 1 - 0.999), None)
        optimizer.step(climbing(w, optimizer)[0])
        torch.testing.assert_close(w.detach(), new.mean)
        torch.testing.assert_close(optimizer.state[w]["hess"], new.hess)
        torch.testing.assert_close(optimizer.state[w]["momentum"], memory)


class TestMisuse:
    @pytest.mark.parametrize("make", [lambda w: br.SAM([w], lr=0.1), lambda w: br.BSAM([w], 0.1, 10)])
    @pytest.mark.parametrize("use", ["step", "train", "context"])
    def test_a_single_look_is_refused(self, make, use):
        w = weights()
        optimizer = make(w)
        with pytest.raises(TypeError, match="pass step\\(\\) a function"):
            if use == "step":
                optimizer.step()
            elif use == "train":
                optimizer.train()
            else:
                with optimizer.sampled_params(train=True):
                    pass
        assert torch.equal(w, weights())

    def test_a_prediction_is_made_at_a_draw(self):
        w = weights()
        with br.BSAM([w], 0.1, 10).sampled_params(train=False):
            assert not torch.equal(w, weights())
        assert torch.equal(w, weights())

    @pytest.mark.parametrize("call", [1, 2])
    def test_what_is_not_finite_changes_nothing(self, call):
        w = weights()
        optimizer = br.BSAM([w], 0.1, 10)
        closure, seen = climbing(w, optimizer)

        def broken():
            value = closure()
            if len(seen) == call:
                w.grad[0] = math.nan
            return value

        optimizer.step(broken)
        assert torch.equal(w, weights()) and optimizer.dropped_draws == 1

    @pytest.mark.parametrize(
        "bad", [dict(rho=-0.1), dict(m_sharpness=0), dict(weight_decay=0.0), dict(damping=-1.0), dict(ess=0.0)]
    )
    def test_hyperparameters_are_held_to_their_ranges(self, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"BSAM: parameter group 0: {name} must be .*, got"):
            br.BSAM([weights()], **{"lr": 0.1, "ess": 10.0, **bad})
