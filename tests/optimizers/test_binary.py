"""Binary weights: the published trajectories, the exact posterior of a linear loss, and the straight-through estimator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import bayesrule as br


def weights(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class TestBayesBiNN:
    def test_a_linear_loss_has_its_posterior_after_one_step_from_anywhere(self):
        w, a = weights(1.0, -2.0, 0.5), torch.tensor([0.3, -0.1, 0.02], dtype=torch.float64)
        optimizer = br.BayesBiNN([w], lr=10.0, ess=10.0, mc_samples=0, natural_init=2.0, prior_natural=0.25)
        (w @ a).backward()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[w]["natural"], 0.25 - 10 * a)
        torch.testing.assert_close(w.detach(), (0.25 - 10 * a).tanh())

    def test_the_gradient_of_a_relaxed_draw_is_that_of_the_mean_on_average(self):
        """For a linear loss grad_mu is its slope; at temperature 1 with lambda = 0 the relaxation is unbiased."""
        w = nn.Parameter(torch.zeros(200_000, dtype=torch.float64))
        optimizer = br.BayesBiNN([w], lr=1.0, ess=1.0, natural_init=0.0)
        optimizer.step(lambda: (w * 0.7).sum().backward())
        found = -optimizer.state[w]["natural"] / 0.7
        assert found.mean().item() == pytest.approx(2 / 3, abs=4 * found.std().item() / math.sqrt(len(w)))

    def test_parameters_hold_the_mean_and_begin_at_their_signs(self):
        w = weights(0.3, -1e-9, 0.0)
        optimizer = br.BayesBiNN([w], lr=0.1, ess=1.0, natural_init=0.5)
        torch.testing.assert_close(w.detach(), math.tanh(0.5) * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
        assert torch.equal(optimizer.state[w]["natural"], torch.tensor([0.5, -0.5, 0.5], dtype=torch.float64))

    def test_looks_are_binary_and_as_often_one_as_the_mean_says(self):
        w = nn.Parameter(torch.ones(100_000))
        optimizer = br.BayesBiNN([w], lr=0.1, ess=1.0, natural_init=0.4)
        mean = w.detach().clone()
        with optimizer.sampled_params(train=False):
            assert set(w.unique().tolist()) == {-1.0, 1.0}
            assert w.mean().item() == pytest.approx(math.tanh(0.4), abs=0.012)
        assert torch.equal(w, mean)

    def test_a_smaller_temperature_is_nearer_to_binary(self):
        far = []
        for temperature in (2.0, 0.5, 0.01):
            w = nn.Parameter(torch.ones(1000))
            optimizer = br.BayesBiNN([w], lr=0.1, ess=1.0, natural_init=0.4, temperature=temperature)
            with optimizer.sampled_params(train=True):
                assert (w.abs() <= 1).all()
                far.append((1 - w.abs()).mean().item())
                w.sum().backward()
        assert far[0] > far[1] > far[2] and far[2] < 0.02

    @pytest.mark.parametrize(("draws", "rests"), [(2, True), (1, False)])
    def test_an_even_loss_leaves_even_odds(self, draws, rests):
        """At mirrored draws; one alone takes a side."""
        w, uniform = nn.Parameter(torch.ones(3, dtype=torch.float64)), itertools.cycle([0.2, 0.8])
        hyper = dict(natural_init=0.0, mc_samples=draws, noise=lambda p: torch.full_like(p, next(uniform)))
        optimizer = br.BayesBiNN([w], lr=1.0, ess=10.0, **hyper)
        for _ in range(3):
            optimizer.step(lambda: (w**4 - 0.3 * w**2).sum().backward())
        assert (optimizer.state[w]["natural"].abs().max().item() < 1e-14) == rests

    @pytest.mark.parametrize(
        "bad", [dict(temperature=0.0), dict(beta=1.0), dict(mc_samples=-1), dict(natural_init=-1.0), dict(ess=0.0)]
    )
    def test_hyperparameters_are_held_to_their_ranges(self, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"BayesBiNN: parameter group 0: {name} must be .*, got"):
            br.BayesBiNN([weights(1.0)], **{"lr": 0.1, "ess": 10.0, **bad})

    def test_the_posterior_has_signs_whose_mean_is_that_of_the_weights(self):
        model = nn.Linear(2, 1)
        optimizer = br.BayesBiNN(model.parameters(), 0.1, 10.0, natural_init=0.7)
        post = optimizer.posterior(model)
        assert post.structure == "signs"
        for name, p in model.named_parameters():
            torch.testing.assert_close(post.mean[name], p.detach())
            torch.testing.assert_close(post.variance[name], 1 - p.detach() ** 2)
            assert set(post.sample(0)[name].unique().tolist()) <= {-1.0, 1.0}
        logits = br.predict(model.eval(), post, torch.ones(1, 2), num_samples=8, link="identity")
        assert logits.variance.sum() > 0


class Straight(torch.autograd.Function):
    """Signs whose gradient passes."""

    @staticmethod
    def forward(ctx, latent):
        return torch.where(latent < 0, -1.0, 1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class TestSTE:
    @pytest.mark.parametrize("hyper", [dict(momentum=0.0), dict(momentum=0.9, weight_decay=0.01)], ids=str)
    def test_is_sgd_on_latent_weights_seen_through_their_signs(self, hyper):
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (6, 1))
        mine, latent = (weights(0.3, -0.2, 0.1, -0.6, 0.05, -0.01) for _ in range(2))
        optimizer, twin = br.STE([mine], lr=0.05, **hyper), torch.optim.SGD([latent], lr=0.05, **hyper)
        flips = set()
        for _ in range(50):
            for optim, used in ((optimizer, lambda: mine), (twin, lambda: Straight.apply(latent))):
                optim.zero_grad()
                (x @ used()[:, None] - y).square().mean().backward()
                optim.step()
            torch.testing.assert_close(optimizer.state[mine]["natural"], latent.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(mine.detach(), Straight.apply(latent.detach()))
            flips.add(tuple(mine.tolist()))
        assert len(flips) > 3

    def test_latent_weights_stay_within_their_bound(self):
        w = weights(0.3, -5.0)
        optimizer = br.STE([w], lr=1.0, clip=1.0)
        assert optimizer.state[w]["natural"].tolist() == [0.3, -1.0]
        for _ in range(3):
            w.grad = torch.tensor([5.0, 5.0], dtype=torch.float64)
            optimizer.step()
        assert optimizer.state[w]["natural"].tolist() == [-1.0, -1.0]


class TestFamily:
    @pytest.mark.parametrize("member", [torch.zeros(3), torch.tensor([0.3, -2.0, 0.9])], ids=["even", "odd"])
    def test_is_the_family_of_coins_for_one_problem(self, member):
        member = member.double()
        ours, coins = br.Signs(member), br.SignedBernoulli(2 * member)
        torch.testing.assert_close(ours.mean, coins.mean)
        torch.testing.assert_close(ours.variance, coins.variance)
        torch.testing.assert_close(ours.entropy(), coins.entropy().sum())
        torch.testing.assert_close(ours.kl(br.Signs(member + 0.5)), coins.kl(br.SignedBernoulli(2 * member + 1.0)).sum())
        theta = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(ours.log_prob(theta), coins.log_prob(theta).sum())

    def test_draws_have_the_mean(self):
        q = br.Signs(torch.full((50_000,), 0.3, dtype=torch.float64))
        theta = q.sample(br.CounterNoise(seed=3))
        assert set(theta.unique().tolist()) == {-1.0, 1.0}
        assert theta.mean().item() == pytest.approx(math.tanh(0.3), abs=0.02)

    def test_the_rule_finds_the_posterior_of_a_linear_loss(self):
        a = torch.tensor([0.4, -0.2], dtype=torch.float64)
        rule, start, prior = br.BayesRule(br.Delta(), br.Zero(), br.Natural()), br.Signs(a, 5.0), br.Signs(torch.zeros(2).double())
        found = rule.step(start, prior, br.Loss(lambda w: a @ w))
        torch.testing.assert_close(found.natural(), -5 * a)


@pytest.mark.parametrize("kind", [lambda p: br.STE(p, lr=0.1), lambda p: br.BayesBiNN(p, 0.1, 10.0)], ids=["ste", "bayesbinn"])
def test_frozen_parameters_stay_as_they_are(kind):
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    before = layer.bias.clone()
    kind(layer.parameters())
    assert torch.equal(layer.bias, before)
