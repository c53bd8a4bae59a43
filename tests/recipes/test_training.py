"""Training: one loop for every optimizer of the table, one epoch at a time."""

import math
from dataclasses import replace

import pytest
import torch
from tests.sweeps import sweep
from torch import nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.recipes.data import load
from bayesrule.recipes.models import build
from bayesrule.recipes.optimizers import OPTIMIZERS, settle
from bayesrule.recipes.schedules import SCHEDULES
from bayesrule.recipes.training import ANCHOR, Diverged, Training, batches_of

pytestmark = pytest.mark.filterwarnings("ignore:IBLR. . of . tensors have more than max_block:UserWarning")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture
def begin(digits):
    def begin(name, model=None, given=None, data=digits, **options):
        model = model or build("mlp", data.shape, len(data.classes))
        optimizer = OPTIMIZERS[name].make(model, settle(name, given or {}, len(data.train)))
        return Training(model, optimizer, data, **{"epochs": 3, "batch_size": 100, **options})

    return begin


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_and_keeps_a_line_an_epoch(name, begin):
    training, ticks = begin(name), []
    lines = [training.epoch(lambda: ticks.append(training.done)) for _ in range(3)]
    assert training.history == lines and training.finished and len(training.seconds) == 3
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    turns = 3 if name == "multi-ivon" else 1  # each component has its share of the steps
    assert lines[-1]["train_loss"] < (1 - 0.04 / turns) * lines[0]["train_loss"]
    assert ticks == list(range(1, 3 * training.steps + 1)) and training.steps == 9
    assert [line["lr"] for line in lines] == pytest.approx([training.rates[0] * factor for factor in (1, 0.75, 0.25)])
    gaussian = OPTIMIZERS[name].variational and name not in ("multi-ivon", "dropout", "bayesbinn")
    assert ("elbo" in lines[0]) == gaussian


@pytest.mark.filterwarnings("ignore:example .* has leverage")  # Adam's second moments are rough
@pytest.mark.parametrize("name", ["ivon", "evon", "sgd", "torch-adamw"])
def test_an_estimate_by_leaving_one_out_stands_in_every_line_and_changes_nothing(name, begin):
    plain, watched = begin(name), begin(name, loo=50)
    lines = [(plain.epoch(), watched.epoch()) for _ in range(2)]
    for without, line in lines:
        assert line.pop("loo_nll") > 0 and 0 <= line.pop("loo_accuracy") <= 1 and 0.01 <= line.pop("concentration") <= 1
        assert line == without
    assert equal(plain, watched)


@pytest.mark.parametrize(("ours", "theirs"), [("sgd", "torch-sgd"), ("adamw", "torch-adamw")])
def test_the_rules_own_optimizers_train_as_torchs(ours, theirs, begin):
    weights = []
    for name in (ours, theirs):
        training = begin(name)
        training.epoch()
        weights.append(training.model[1].weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_an_epoch_is_the_plain_loop(begin, digits):
    training, model = begin("torch-sgd"), build("mlp", digits.shape, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    seen = []
    training.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    training.epoch()
    everything = digits.scale(digits.train.source.values[digits.train.indices])
    order = [int((everything == image).flatten(1).all(1).nonzero()[0]) for image in torch.cat(seen)]
    assert len(set(order)) == len(order) == len(digits.train) and order != sorted(order)
    total = 0.0
    for step, inputs in enumerate(seen):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * 0.5 * (1 + math.cos(math.pi * step / 27))
        labels = digits.train.labels[torch.tensor(order[100 * step : 100 * (step + 1)])]
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), training.model.parameters(), strict=True))
    assert training.history[0]["train_loss"] == pytest.approx(total / len(order))


def test_the_line_is_of_the_validation_part_at_the_mean(begin, digits):
    training = begin("ivon")
    training.epoch()
    part, model = digits.validation, training.model.eval()
    with torch.no_grad():
        logits = model(digits.scale(digits.train.source.values[part.indices]))
    line = training.history[0]
    assert line["validation_nll"] == pytest.approx(F.cross_entropy(logits, part.labels).item(), rel=1e-5)
    assert line["validation_accuracy"] == (logits.argmax(1) == part.labels).double().mean().item()
    assert torch.equal(training.posterior().mean["1.weight"], model[1].weight)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_decides_the_rate_of_every_step(schedule, begin):
    training, rates = begin("sgd", schedule=schedule, epochs=4), []
    for _ in range(4):
        training.epoch(lambda: rates.append(training.optimizer.param_groups[0]["lr"]))
    assert rates == [0.03 * SCHEDULES[schedule](i / 36) for i in range(36)]


@pytest.mark.parametrize("name", ["ivon", "adamw"])
def test_the_seed_decides(name, begin):
    runs = [begin(name, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.epoch()
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


@pytest.mark.parametrize("seed", [-1, 2**40, 2**63 - 1])
def test_every_seed_is_one(seed, begin):
    first, second = begin("sgd", seed=seed), begin("sgd", seed=seed)
    first.epoch(), second.epoch()
    assert equal(first, second)


def test_orders_of_epochs_differ(begin):
    training, seen = begin("sgd"), []
    training.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    training.epoch(), training.epoch()
    assert not torch.equal(torch.cat(seen[:9]), torch.cat(seen[9:]))


def test_augmentation_changes_training_images_alone(begin):
    training, seen = begin("sgd", augment=("shift", "flip")), {True: [], False: []}
    training.model.register_forward_pre_hook(lambda module, inputs: seen[module.training].append(inputs[0]))
    training.epoch()
    plain, kept = begin("sgd"), {True: [], False: []}
    plain.model.register_forward_pre_hook(lambda module, inputs: kept[module.training].append(inputs[0]))
    plain.epoch()
    assert not torch.equal(torch.cat(seen[True]), torch.cat(kept[True]))
    assert torch.equal(torch.cat(seen[False]), torch.cat(kept[False]))


def test_bf16_is_for_training_alone(begin):
    kinds = {True: set(), False: set()}
    training = begin("ivon", bf16=True)
    training.model[1].register_forward_hook(lambda module, _, output: kinds[module.training].add(output.dtype))
    training.epoch()
    assert kinds == {True: {torch.bfloat16}, False: {torch.float32}}
    assert all(p.dtype == torch.float32 for p in training.model.parameters())


@pytest.mark.parametrize("name", ["ivon", "adamw"])
def test_statistics_of_batch_norm_are_those_of_the_mean(name, begin, digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    training = begin(name, model)
    training.epoch()
    found = model[2].running_mean.clone()
    inputs = torch.cat(training.anchor())
    assert len(inputs) == min(ANCHOR, len(digits.train))
    mean = model[1](inputs.flatten(1)).mean(0)
    assert (name == "ivon") == torch.allclose(found, mean, atol=1e-2)
    assert torch.equal(inputs, torch.cat(training.anchor()))


class TestPatience:
    def losses(self, training, monkeypatch, values):
        values = iter(values)
        monkeypatch.setattr(training, "_validate", lambda: (next(values), 0.5))

    def test_ends_after_so_many_without_a_smaller_one_and_keeps_the_best(self, begin, monkeypatch):
        training, weights = begin("adamw", epochs=9, patience=2), []
        self.losses(training, monkeypatch, [3.0, 2.0, 2.5, 1.5, 1.5, 1.6, 1.0])
        while not training.finished:
            training.epoch()
            weights.append(training.model[1].weight.detach().clone())
        assert len(weights) == 6 and training.best_epoch == 4
        training.keep_best()
        assert torch.equal(training.model[1].weight, weights[3])

    def test_may_last_to_the_end(self, begin, monkeypatch):
        training = begin("adamw", epochs=3, patience=2)
        self.losses(training, monkeypatch, [3.0, 2.0, 1.0])
        while not training.finished:
            training.epoch()
        assert training.best_epoch == len(training.history) == 3

    def test_keeps_the_last_without_it(self, begin, monkeypatch):
        training = begin("adamw", epochs=2)
        self.losses(training, monkeypatch, [1.0, 2.0])
        training.epoch(), training.epoch()
        last = training.model[1].weight.detach().clone()
        training.keep_best()
        assert training.best is None and torch.equal(training.model[1].weight, last)


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_what_is_no_number_is_divergence(nll, begin, monkeypatch):
    training = begin("sgd")
    monkeypatch.setattr(training, "_validate", lambda: (nll, 0.1))
    with pytest.raises(Diverged, match=r"training diverged in epoch 1 \(loss [0-9.]+\); lower the lr \(0\.03\)"):
        training.epoch()
    assert not training.history


@pytest.mark.parametrize("name", sweep(OPTIMIZERS, "ivon", "adamw"))
@pytest.mark.parametrize("stop", [1, 8, 9, 10])
def test_goes_on_from_its_state(name, stop, begin):
    class Stop(Exception):
        pass

    def until():
        if first.done == stop:
            raise Stop

    first, whole = begin(name), begin(name)
    with pytest.raises(Stop):
        while True:
            first.epoch(until)
    tensors, numbers = first.state()
    second = begin(name)
    second.load_state({key: t.clone() for key, t in tensors.items()}, numbers)
    assert second.done == stop and len(second.history) == stop // 9
    while not second.finished:
        second.epoch()
    while not whole.finished:
        whole.epoch()
    assert equal(second, whole) and second.history == whole.history


@pytest.mark.parametrize("broken", ["model", "optimizer", "random", "numbers"])
def test_a_state_that_is_not_whole_is_refused(broken, begin):
    first = begin("ivon")
    first.epoch()
    tensors, numbers = first.state()
    tensors = {key: t for key, t in tensors.items() if not (key.startswith(broken) and (broken != "optimizer" or "hess" in key))}
    if broken == "numbers":
        numbers = {**numbers, "done": None}
    with pytest.raises((KeyError, RuntimeError, TypeError, ValueError)):
        begin("ivon").load_state(tensors, numbers)


def test_only_variational_optimizers_leave_a_posterior(begin):
    for name, choice in OPTIMIZERS.items():
        training = begin(name, epochs=1)
        training.epoch()
        if choice.variational:
            assert training.posterior().num_data == len(training.data.train)
        else:
            with pytest.raises(TypeError, match="learns no posterior"):
                br.Posterior.from_optimizer(training.optimizer, training.model)


def test_a_part_comes_in_its_order_and_scaled(digits, monkeypatch):
    monkeypatch.setattr("bayesrule.recipes.training.FORWARD", 200 * 64 + 63)  # large examples are few at once
    pairs = list(batches_of(digits.test, digits, torch.device("cpu")))
    assert [len(labels) for _, labels in pairs] == [200, 200, 200, 29]
    assert torch.equal(torch.cat([labels for _, labels in pairs]), digits.test.labels)
    values = digits.test.source.values[digits.test.indices]
    scale = digits.scale
    torch.testing.assert_close(torch.cat([inputs for inputs, _ in pairs]), (values - scale.center[0]) / scale.spread[0])


def test_the_last_batch_may_be_small(begin, digits):
    for size, steps in ((len(digits.train), 1), (10**6, 1), (897, 2)):
        training = begin("sgd", batch_size=size, epochs=1)
        assert training.steps == steps
        training.epoch()
        assert training.finished and training.done == steps


def test_labels_and_inputs_belong_together(begin, digits):
    shuffled = replace(digits.train, labels=digits.train.labels[torch.randperm(898, generator=torch.Generator().manual_seed(0))])
    training = begin("adamw", data=replace(digits, train=shuffled), epochs=3)
    while not training.finished:
        training.epoch()
    assert training.history[-1]["validation_accuracy"] < 0.5  # what was learned is nonsense
