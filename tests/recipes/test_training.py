"""Training: one loop for every optimizer of the table."""

import pytest
import torch

import bayesrule as br
from bayesrule.recipes.data import load
from bayesrule.recipes.models import build
from bayesrule.recipes.training import OPTIMIZERS, Training, settle


def begin(name, epochs=3, batch_size=100, **given):
    data = load("digits")
    model = build("mlp", data.train[0], len(data.classes))
    optimizer = OPTIMIZERS[name].make(model.parameters(), **settle(name, given, len(data.train[1])))
    return Training(model, optimizer, data.train, data.validation, epochs=epochs, batch_size=batch_size)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_and_keeps_a_line_an_epoch(name):
    training, ticks = begin(name), []
    for _ in range(3):
        training.epoch(lambda: ticks.append(1))
    losses = [line["train_loss"] for line in training.history]
    assert losses[-1] < 0.96 * losses[0]
    assert [line["epoch"] for line in training.history] == [1, 2, 3]
    assert len(ticks) == 3 * training.steps == 27
    assert training.history[-1]["lr"] < training.history[0]["lr"]
    assert training.schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [("sgd", "torch-sgd"), ("adamw", "torch-adamw")])
def test_the_rules_own_optimizers_train_as_torchs(ours, theirs):
    weights = []
    for name in (ours, theirs):
        training = begin(name)
        training.epoch()
        weights.append(training.model[1].weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_two_runs_are_equal():
    first, second = begin("ivon"), begin("ivon")
    first.epoch(), second.epoch()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_ess_counts_in_training_sets():
    assert settle("ivon", {}, 50)["ess"] == 10 * 50
    assert settle("ivon", {"ess": 7.0, "lr": None}, 50)["ess"] == 7.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: settle("adagrad", {}, 1), "unknown optimizer 'adagrad'"),
        (lambda: settle("sgd", {"ess": 5.0}, 1), "sgd has no ess .got 5.; its settings are lr, weight_decay"),
        (lambda: begin("ivon", lr=-1.0), "parameter group 0: lr must be a number in .0, inf., got -1.0"),
        (lambda: begin("sgd", epochs=0), "epochs must be at least 1, got 0"),
        (lambda: begin("sgd", batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: begin("torch-sgd", lr=1e12).epoch(), "training diverged in epoch 1 .*lower the lr"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_variational_optimizers_leave_a_posterior():
    for name, choice in OPTIMIZERS.items():
        training = begin(name)
        training.epoch()
        if choice.variational:
            assert br.Posterior.from_optimizer(training.optimizer, training.model).mean
        else:
            with pytest.raises(TypeError, match="learns no posterior"):
                br.Posterior.from_optimizer(training.optimizer, training.model)
