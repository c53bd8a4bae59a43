"""Schedules of the learning rate: functions of the share that is done."""

import pytest
import torch

from bayesrule.recipes.schedules import SCHEDULES, constant, cosine, step


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (cosine, {0.0: 1.0, 0.25: 0.8535533905932737, 0.5: 0.5, 0.75: 0.1464466094067263, 1.0: 0.0}),
        (step, {0.0: 1.0, 0.499: 1.0, 0.5: 0.1, 0.749: 0.1, 0.75: 0.01, 1.0: 0.01}),
        (constant, {0.0: 1.0, 1.0: 1.0}),
    ],
)
def test_values(schedule, values):
    assert {done: schedule(done) for done in values} == pytest.approx(values, abs=1e-15)
    assert SCHEDULES[schedule.__name__] is schedule


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)),
        ("step", lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 15])),
    ],
)
def test_is_that_of_torch(name, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    schedule = theirs(optimizer)
    for done in range(20):
        assert 0.3 * SCHEDULES[name](done / 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
