"""Vadam and Vprop: what they want to know, and what they learn."""

from __future__ import annotations

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

    def test_groups_without_noise_stay_at_the_mean(self, make):
        quiet, loud = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = make([{"params": [quiet], "noise_scale": 0}, {"params": [loud]}], ess=10.0)
        with optimizer.sampled_params():
            assert torch.equal(quiet, torch.ones(3)) and not torch.equal(loud, torch.ones(3))
