"""Vadam and Vprop walk as the published code does, and without noise as Adam and RMSprop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bayesrule as br


@pytest.mark.parametrize("make", [br.Vadam, br.Vprop])
class TestArguments:
    def test_ess_is_needed(self, make):
        with pytest.raises(TypeError, match=f"{make.__name__} needs ess: the number of training examples"):
            make([nn.Parameter(torch.zeros(2))])

    @pytest.mark.parametrize(
        "bad", [dict(weight_decay=0.0), dict(hess_init=-0.1), dict(ess=0.0), dict(mc_samples=0), dict(lr=-1.0)]
    )
    def test_what_leaves_no_posterior_is_refused(self, make, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"{make.__name__}: parameter group 0: {name} must be .*, got"):
            make([nn.Parameter(torch.zeros(2))], **{"ess": 10.0, **bad})

    def test_the_posterior_has_the_spread_of_the_draws(self, make):
        model = nn.Linear(3, 2, dtype=torch.float64)
        optimizer = make(model.parameters(), lr=0.01, ess=50.0, weight_decay=0.1, hess_init=0.3)
        for _ in range(3):
            optimizer.step(lambda: model(torch.ones(4, 3, dtype=torch.float64)).square().mean().backward())
        post = optimizer.posterior(model)
        hess = optimizer.state[model.weight][optimizer.names.hess]
        torch.testing.assert_close(post.precision["weight"], 50.0 * (hess + 0.1))
        torch.testing.assert_close(post.mean["weight"], model.weight.detach())

    def test_several_equal_draws_are_one(self, make):
        weights = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        for w, draws in zip(weights, (1, 4), strict=True):
            optimizer = make([w], lr=0.1, ess=10.0, mc_samples=draws, noise=lambda p: torch.full_like(p, 0.7))
            for _ in range(5):
                optimizer.step(lambda w=w: w.pow(4).sum().backward())
        torch.testing.assert_close(*weights, rtol=1e-13, atol=1e-13)

    def test_groups_without_noise_stay_at_the_mean(self, make):
        quiet, loud = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = make([{"params": [quiet], "noise_scale": 0}, {"params": [loud]}], ess=10.0)
        with optimizer.sampled_params():
            assert torch.equal(quiet, torch.ones(3)) and not torch.equal(loud, torch.ones(3))


def test_without_noise_vadam_is_adam_but_for_where_the_prior_acts():
    """N to infinity with the prior's precision over N as Adam's eps."""
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    optimizer, twin = br.Vadam([mine], lr=0.01, ess=math.inf, weight_decay=1e-8), torch.optim.Adam([theirs], lr=0.01, eps=1e-8)
    for _ in range(50):
        for w, each in ((mine, optimizer), (theirs, twin)):
            each.zero_grad()
            (w - 0.3).pow(4).sum().backward()
            each.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_without_noise_vprop_is_rmsprop_but_for_where_the_prior_acts():
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    optimizer = br.Vprop([mine], lr=0.01, ess=math.inf, alpha=0.9, weight_decay=1e-8)
    twin = torch.optim.RMSprop([theirs], lr=0.01, alpha=0.9, eps=1e-8)
    for _ in range(50):
        for w, each in ((mine, optimizer), (theirs, twin)):
            each.zero_grad()
            (w - 0.3).pow(4).sum().backward()
            each.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
