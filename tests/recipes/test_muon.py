"""Muon and AdamW as one optimizer: each does what torch's own does."""

import pytest
import torch

from bayesrule.recipes.gpt import GPT, Shape
from bayesrule.recipes.muon import MuonAdamW
from bayesrule.recipes.optimizers import hidden


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_are_torchs_own_side_by_side():
    pair, apart = GPT(20, Shape(layers=2, heads=2, width=16, context=12)), GPT(20, Shape(layers=2, heads=2, width=16, context=12))
    one = MuonAdamW(hidden(pair, {}), lr=0.02, adamw_lr=0.01)
    inner, *rest = hidden(apart, {})
    assert len(inner["params"]) == 8 and all(p.ndim == 2 for p in inner["params"])
    two = [
        torch.optim.Muon(inner["params"], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
    ]
    x = torch.arange(24).view(2, 12) % 20
    for step in range(5):
        for model, optimizers in ((pair, [one]), (apart, two)):
            model.zero_grad()
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        if step == 2:
            state = one.state_dict()
            one = MuonAdamW(hidden(pair, {}), lr=9.0)
            one.load_state_dict(state)
    assert torch.equal(*(torch.cat([p.flatten() for p in model.parameters()]) for model in (pair, apart)))
    assert [len(group["params"]) for group in one.param_groups] == [8, 2, 18]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_closure_is_called_once_and_its_loss_returned():
    model, calls = torch.nn.Sequential(torch.nn.Linear(3, 3)), []
    optimizer = MuonAdamW(hidden(model, {}))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) > 0
    assert calls == [True]
