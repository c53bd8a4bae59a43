"""A run and its folder: stopped at any moment it goes on and ends bit-equal; and whatever is wrong is said in one line."""

import json
import math
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.distributions import Normal, kl_divergence

import bayesrule as br
from bayesrule import cli
from bayesrule.recipes import runs
from bayesrule.recipes.folder import locked, read_lines, read_record
from bayesrule.recipes.formats import folders
from bayesrule.recipes.optimizers import OPTIMIZERS
from bayesrule.recipes.results import Run, read
from bayesrule.recipes.runs import Paused, train
from bayesrule.recipes.settings import Settings

COMPARED = ("model.safetensors", "posterior.safetensors", "predictions.safetensors", "metrics.jsonl")
STEPS = 5  # an epoch
NETS = """
from torch import nn

def dropout(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, classes))

def normed(shape, classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))

def tied(shape, classes):
    first = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), first, nn.Tanh(), nn.Linear(64, classes))

class Fragile(nn.Linear):
    def forward(self, x):
        if self.training:
            raise RuntimeError("out of luck")
        return super().forward(x)

def fragile(shape, classes):
    return nn.Sequential(nn.Flatten(), Fragile(64, classes))

def frozen(shape, classes):
    first = nn.Linear(64, 16).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(16, classes))
"""


class Crash(Exception):
    """The machine is gone."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, 165 + 36 + 36 or so images of three classes, and models of the user's own."""
    folder = tmp_path_factory.mktemp("world")
    digits = load_digits(n_class=3)
    images, labels = digits.images[:240].astype(np.uint8) * 15, digits.target[:240]
    np.savez(folder / "small.npz", x=images, y=labels)
    for part, few in (("train", range(60)), ("val", range(60, 90)), ("test", range(90, 120))):
        for i in few:
            path = folder / "pictures" / part / str(labels[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
    (folder / "own_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_nets", None)


@pytest.fixture
def settings(world):
    def settings(optimizer="ivon", **changes):
        return Settings(str(world / "small.npz"), optimizer, **{"model": "mlp", "epochs": 3, "batch_size": 36, **changes})

    return settings


@pytest.fixture
def each_step(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(runs, "EVERY", 0.0)
    monkeypatch.setattr(runs, "EFFORT", math.inf)


def at_step(number, act, title=None):
    """Bars that act when so many steps are done; with a title, of that bar alone."""

    def bars(name, total):
        done = [0]

        def advance():
            done[0] += 1
            if done[0] == number and (name == title if title else name not in ("look", "predict")):
                act()

        return advance

    return bars


def crash():
    raise Crash


def content(folder):
    """What must be equal, byte for byte, and the record without its times."""
    record = read_record(folder)
    return {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in COMPARED} | {
        "run.json": {key: value for key, value in record.items() if key != "seconds"}
    }


def assert_equal(folder, other):
    first, second = content(folder), content(other)
    assert [name for name in first if first[name] != second[name]] == []
    expected = {name for name in first if first[name] is not None}
    assert {path.name for path in folder.iterdir()} == expected  # no checkpoint, no lock, nothing half written


KINDS = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "sgd without momentum": {"optimizer": "torch-sgd", "hyperparameters": {"momentum": 0.0}},
    "amsgrad": {"optimizer": "torch-adamw", "hyperparameters": {"amsgrad": True}},
    "nesterov": {"optimizer": "sgd", "hyperparameters": {"nesterov": True}},
    "two draws": {"optimizer": "ivon", "hyperparameters": {"mc_samples": 2, "antithetic": True}},
    "little memory": {"optimizer": "ivon", "hyperparameters": {"memory": "low"}},
    "squared gradients": {"optimizer": "ivon", "hyperparameters": {"hess_approx": "gradsq"}},
    "dropout": {"optimizer": "adamw", "model": "own_nets:dropout"},
    "dropout under noise": {"optimizer": "ivon", "model": "own_nets:dropout"},
    "tied weights": {"optimizer": "ivon", "model": "own_nets:tied"},
    "frozen weights": {"optimizer": "ivon", "model": "own_nets:frozen"},
    "batch norm": {"optimizer": "sgd", "model": "own_nets:normed"},
    "batch norm under noise": {"optimizer": "ivon", "model": "own_nets:normed"},
    "augmentation": {"optimizer": "ivon", "augment": ("shift", "flip")},
    "bf16": {"optimizer": "ivon", "precision": "bf16"},
    "steps": {"optimizer": "sgd", "schedule": "step", "epochs": 4},
    "patience": {"optimizer": "ivon", "model": "own_nets:dropout", "patience": 2, "epochs": 6, "schedule": "constant"},
    "early stop": {"optimizer": "adamw", "hyperparameters": {"lr": 0.05}, "patience": 1, "epochs": 8, "schedule": "constant"},
    "patience with batch norm": {"optimizer": "ivon", "model": "own_nets:normed", "patience": 1, "epochs": 3},
    "held out": {"optimizer": "ivon", "held_out": ("2",), "seed": 3, "split_seed": 5, "batch_size": 24},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashed_goes_on_and_ends_bit_equal(kind, settings, tmp_path, each_step):
    chosen = settings(**KINDS[kind])
    train(chosen, tmp_path / "whole")
    steps = len(read_lines(tmp_path / "whole" / "metrics.jsonl")) * STEPS
    for number in (1, 4, STEPS, STEPS + 1, steps - 1, steps):  # before a checkpoint, in an epoch, at its end, after it, at the end
        with pytest.raises(Crash):
            train(chosen, tmp_path / "run", resume=True, bars=at_step(number, crash))
        assert not read_record(tmp_path / "run").get("finished")
    with pytest.raises(Crash):
        train(chosen, tmp_path / "run", resume=True, bars=at_step(1, crash, "predict"))
    train(chosen, tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_stopped_early_means_the_best_epoch(settings, tmp_path):
    train(settings(**KINDS["early stop"]), tmp_path / "run")
    record, lines = read_record(tmp_path / "run"), read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["validation_nll"] for line in lines]
    assert len(lines) == record["best_epoch"] + 1 < 8 and min(losses) == losses[record["best_epoch"] - 1]
    run = read(tmp_path / "run")
    validated = br.evaluate(run.model, None, [(run.data.scale(run.data.validation[i][None]), run.data.validation.labels[i : i + 1])
                                              for i in range(len(run.data.validation))])  # fmt: skip
    assert validated["nll"] == pytest.approx(min(losses), rel=1e-4)
    train(replace(settings(**KINDS["early stop"]), patience=None, epochs=record["best_epoch"]), tmp_path / "short")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "short"))
    assert all(torch.equal(first[name], second[name]) for name in first)  # a constant rate: the best epoch is a shorter run


@pytest.mark.parametrize("optimizer", ["ivon", "sgd"])
def test_resnet20_with_batch_norm_goes_on(optimizer, world, settings, tmp_path, each_step):
    arrays = np.load(world / "small.npz")
    np.savez(tmp_path / "tiny.npz", x=arrays["x"][:48], y=arrays["y"][:48])
    chosen = settings(optimizer, model="resnet20", norm="batch", epochs=2, batch_size=12)
    chosen = replace(chosen, data=str(tmp_path / "tiny.npz"))
    train(chosen, tmp_path / "whole")
    for number in (2, 4):
        with pytest.raises(Crash):
            train(chosen, tmp_path / "run", resume=True, bars=at_step(number, crash))
    train(chosen, tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [1, 3, STEPS, 3 * STEPS])
def test_an_interrupt_saves_says_how_to_go_on_and_ends_bit_equal(number, settings, tmp_path):
    out = tmp_path / "run"
    before = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Paused) as stop:
        train(settings(), out, bars=at_step(number, lambda: signal.raise_signal(signal.SIGINT)))
    assert str(stop.value) == (
        f"stopped after step {number} of 15 and saved; go on with: bayesrule train image --resume --out {out}"
    )
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(read_lines(out / "metrics.jsonl") if number >= STEPS else []) == number // STEPS
    train(settings(), out, resume=True)
    train(settings(), tmp_path / "whole")
    assert_equal(out, tmp_path / "whole")


def test_the_command_that_goes_on_can_be_typed_whatever_the_path(settings, tmp_path):
    out = tmp_path / "my runs" / "it's"
    with pytest.raises(Paused) as stop:
        train(settings(), out, bars=at_step(1, lambda: signal.raise_signal(signal.SIGINT)))
    assert shlex.split(str(stop.value).partition("go on with: ")[2])[-1] == str(out)


def test_a_second_interrupt_stops_at_once_and_the_last_checkpoint_stays(settings, tmp_path, each_step):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Paused, match="stopped at once; go on from the last checkpoint with: bayesrule train image --resume"):
        train(settings(), tmp_path / "run", bars=at_step(4, twice))
    with pytest.raises(Crash):  # three steps are kept: the fourth is done again
        train(settings(), tmp_path / "run", resume=True, bars=at_step(4, crash))
    train(settings(), tmp_path / "run", resume=True)
    train(settings(), tmp_path / "whole")
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_file_that_cannot_be_read_in_the_middle_stops_the_run_and_it_goes_on(part, world, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY", 0)  # read when they are needed
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    chosen = replace(settings("adamw", epochs=3, batch_size=12), data=str(tmp_path / "pictures"))
    victim = sorted((tmp_path / "pictures" / part / "1").iterdir())[-1]
    good = victim.read_bytes()
    train(chosen, tmp_path / "whole")
    with pytest.raises(ValueError, match=f"cannot read .*{victim.name}: .*; mend or remove it"):
        train(chosen, tmp_path / "run", bars=at_step(2, lambda: victim.write_bytes(good[:60].ljust(len(good), b"\0"))))
    assert not read_record(tmp_path / "run").get("finished")
    victim.write_bytes(good)
    train(chosen, tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_left_alone(settings, tmp_path):
    train(settings(), tmp_path / "run")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}
    train(settings(), tmp_path / "run", resume=True, bars=at_step(1, crash))
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}


@pytest.fixture
def crashed(settings, tmp_path, each_step):
    """A run that crashed in its second epoch."""
    with pytest.raises(Crash):
        train(settings(), tmp_path / "run", bars=at_step(8, crash))
    return tmp_path / "run"


def other_run(path):
    """The checkpoint of a run with another model."""
    save_file({"model.weight": torch.zeros(2)}, path, {"bayesrule": json.dumps({"done": 1, "history": [], "seconds": []})})


CHECKPOINTS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "no tensors": lambda path: path.write_bytes(b"\xff" * 500),
    "other run": other_run,
    "no numbers": lambda path: save_file(load_file(path), path),
    "numbers of nobody": lambda path: save_file(load_file(path), path, {"bayesrule": '{"done": null}'}),
    "a list": lambda path: save_file(load_file(path), path, {"bayesrule": "[1]"}),
    "no history": lambda path: save_file(
        load_file(path), path, {"bayesrule": '{"done": 1, "history": null, "seconds": [], "total": 0, "elapsed": 0}'}
    ),
    "no randomness": lambda path: save_file(
        {name: t for name, t in load_file(path).items() if not name.startswith("random")},
        path,
        {"bayesrule": '{"done": 1, "history": [], "seconds": [], "total": 0, "elapsed": 0}'},
    ),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_damaged_checkpoint_is_named_and_left_alone(how, crashed, settings):
    path = crashed / "checkpoint.safetensors"
    CHECKPOINTS[how](path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged") as refusal:
        train(settings(), crashed, resume=True)
    assert "\n" not in str(refusal.value) and path.read_bytes() == before
    path.unlink()  # as the message says
    train(settings(), crashed, resume=True)
    assert read_record(crashed)["finished"]


def test_a_damaged_checkpoint_says_what_to_do(crashed, settings):
    path = crashed / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="delete it to start anew"):
        train(settings(), crashed, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "began with epochs 3, not 4; give the same settings, or --resume and --out alone"),
        ({"optimizer": "sgd"}, "began with optimizer ivon, not sgd"),
        ({"model": "own_nets:tied"}, "began with model mlp, not own_nets:tied"),
        ({"hyperparameters": {"lr": 0.3}}, "began with lr 0.2, not 0.3"),
        ({"seed": 1}, "began with seed 0, not 1"),
        ({"split_seed": 1}, "began with split_seed 0, not 1"),
        ({"split": (0.5, 0.25)}, r"began with split None, not \(0.5, 0.25\)"),
        ({"held_out": ("1",)}, r"began with held_out \(\), not \('1',\)"),
        ({"augment": ("flip",)}, "began with augment"),
        ({"precision": "bf16"}, "began with precision float32, not bf16"),
        ({"patience": 2}, "began with patience None, not 2"),
        ({"batch_size": 12}, "began with batch_size 36, not 12"),
    ],
)
def test_other_settings_are_refused(changes, message, crashed, settings):
    before = {path: path.read_bytes() for path in crashed.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(settings(**changes), crashed, resume=True)
    assert before == {path: path.read_bytes() for path in crashed.iterdir()}


@pytest.mark.parametrize("what", ["pixel", "label", "order", "fewer"])
def test_other_data_are_refused(what, world, settings, tmp_path, each_step):
    arrays = np.load(world / "small.npz")
    x, y = arrays["x"].copy(), arrays["y"].copy()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    chosen = replace(settings(), data=str(tmp_path / "mine.npz"))
    with pytest.raises(Crash):
        train(chosen, tmp_path / "run", bars=at_step(3, crash))
    if what == "pixel":
        x[5, 3, 3] ^= 1
    elif what == "label":
        y[5] = (y[5] + 1) % 3
    x, y = (x[::-1], y[::-1]) if what == "order" else (x[:-1], y[:-1]) if what == "fewer" else (x, y)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    with pytest.raises(ValueError, match=r"the data of .*run are no longer those that it began with \(mine.*\); bring them back"):
        train(chosen, tmp_path / "run", resume=True)
    np.savez(tmp_path / "mine.npz", x=arrays["x"], y=arrays["y"])
    train(chosen, tmp_path / "run", resume=True)


def test_data_that_are_gone_are_named(world, settings, tmp_path, each_step):
    shutil.copy(world / "small.npz", tmp_path / "mine.npz")
    chosen = replace(settings(), data=str(tmp_path / "mine.npz"))
    with pytest.raises(Crash):
        train(chosen, tmp_path / "run", bars=at_step(3, crash))
    (tmp_path / "mine.npz").unlink()
    with pytest.raises(ValueError, match=r"there is no data .*mine\.npz"):
        train(chosen, tmp_path / "run", resume=True)


def test_a_run_that_diverged_says_so(settings, tmp_path):
    chosen = settings("torch-sgd", hyperparameters={"lr": 1e12})
    with pytest.raises(ValueError, match=r"training diverged in epoch 1 \(loss (nan|inf|[0-9.e+]+)\); lower the lr \(1e\+12\)"):
        train(chosen, tmp_path / "run")
    for call in (lambda: train(chosen, tmp_path / "run", resume=True), lambda: read(tmp_path / "run")):
        with pytest.raises(ValueError, match="training diverged in epoch 1"):
            call()
    with pytest.raises(FileExistsError, match="already holds another run"):
        train(chosen, tmp_path / "run")


def test_the_randomness_of_the_caller_is_left_alone(settings, tmp_path):
    before, numbers, words = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(settings(model="own_nets:dropout", augment=("shift", "flip")), tmp_path / "run")
    with pytest.raises(Paused):
        train(settings("sgd"), tmp_path / "other", bars=at_step(2, lambda: signal.raise_signal(signal.SIGINT)))
    read(tmp_path / "run").predictions(8, again=True)
    assert torch.equal(before, torch.get_rng_state()) and words == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(numbers, np.random.get_state(), strict=True))


def test_the_randomness_of_the_caller_changes_nothing(settings, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        train(settings("adamw", model="own_nets:dropout", augment=("shift",)), tmp_path / name)
    assert_equal(tmp_path / "a", tmp_path / "b")


def test_the_evidence_bound_is_that_of_the_posterior(settings, tmp_path):
    train(settings(hyperparameters={"ess": 500.0, "weight_decay": 0.01}), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    posterior = br.Posterior.load(tmp_path / "run" / "posterior.safetensors")
    distance = 0.0
    for name, mean in posterior.mean.items():
        q = Normal(mean.double(), posterior.precision[name].double().rsqrt())
        prior = Normal(posterior.prior_mean[name].double(), posterior.prior_precision[name].double().rsqrt())
        distance += kl_divergence(q, Normal(*(side.expand_as(mean) for side in (prior.loc, prior.scale)))).sum().item()
        assert posterior.prior_precision[name].unique().item() == pytest.approx(500 * 0.01)
    assert lines[-1]["kl"] == pytest.approx(distance / posterior.num_data, rel=1e-5)
    assert all(line["elbo"] == -line["train_loss"] - line["kl"] and line["kl"] > 0 for line in lines)
    assert lines[-1]["elbo"] > lines[0]["elbo"]


def test_without_a_prior_there_is_no_bound(settings, tmp_path):
    train(settings("sgd", epochs=1), tmp_path / "sgd")
    train(settings("ivon", epochs=1, hyperparameters={"weight_decay": 0.0}), tmp_path / "ivon")
    for name in ("sgd", "ivon"):
        (line,) = read_lines(tmp_path / name / "metrics.jsonl")
        assert set(line) == {"epoch", "train_loss", "validation_nll", "validation_accuracy", "lr"}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "ivon"
    train(Settings(str(world / "small.npz"), "ivon", "mlp", epochs=2, batch_size=36), out)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_finished_folder_says_what_it_is(finished):
    record = read_record(finished)
    assert {path.name for path in finished.iterdir()} == {*COMPARED, "run.json"}
    assert record["finished"] and record["kind"] == "image" and record["data"]["name"] == "small.npz"
    assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
    assert record["data"]["classes"] == ["0", "1", "2"] and record["data"]["shape"] == [1, 8, 8]
    run = read(finished)
    assert record["data"]["examples"] == {name: len(part) for name, part in run.data.parts.items()}
    assert record["settings"]["hyperparameters"]["ess"] == len(run.data.train) == run.posterior.ess
    assert run.posterior.num_data == len(run.data.train) and run.title == "IVON" and not run.model.training
    model = load_file(finished / "model.safetensors")
    assert set(model) == set(run.posterior.mean) and all(torch.equal(model[name], run.posterior.mean[name]) for name in model)


def test_predictions_are_kept_until_something_changes(copied, monkeypatch):
    run, asked = read(copied), []
    monkeypatch.setattr(Run, "probabilities", lambda self, part, *_: asked.append(part) or torch.zeros(len(part), 3))
    kept = run.predictions()
    assert not asked and set(kept) == {"validation", "test", "averaged test"}
    assert (kept["test"].sum(1) - 1).abs().max() < 1e-5 and not torch.equal(kept["test"], kept["averaged test"])
    run.predictions(again=True)
    assert len(asked) == 3
    run.predictions(8)
    assert len(asked) == 6
    run.predictions(8)
    assert len(asked) == 6
    path = copied / "predictions.safetensors"
    path.write_bytes(path.read_bytes()[:200])  # what is damaged is made again
    run.predictions(8)
    assert len(asked) == 9
    run.posterior.save(copied / "posterior.safetensors")  # the same
    run.predictions(8)
    assert len(asked) == 9
    run.posterior.rescale(ess=50.0).save(copied / "posterior.safetensors")
    run.predictions(8)
    assert len(asked) == 12


def test_kept_predictions_are_those_that_are_made_again(finished):
    run = read(finished)
    kept = run.predictions()
    for name, part, samples in (("test", run.data.test, None), ("averaged test", run.data.test, 32)):
        assert torch.equal(kept[name], run.probabilities(part, samples))


def rewrite(change):
    """An act on a folder: a change of its record."""

    def act(folder):
        record = json.loads((folder / "run.json").read_text())
        change(record)
        (folder / "run.json").write_text(json.dumps(record))

    return act


def of_other_model(name):
    def act(folder):
        br.Posterior({name: torch.zeros(2)}, {name: torch.ones(2)}).save(folder / "posterior.safetensors")

    return act


def text(name, words):
    return lambda folder: (folder / name).write_text(words)


def absent(name):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "cut record": (text("run.json", '{"format": 2, "kind": "im'), r"run\.json is damaged"),
    "empty settings": (rewrite(lambda r: r.update(settings={})), r"run\.json is damaged"),
    "no settings": (rewrite(lambda r: r.pop("settings")), r"run\.json is damaged"),
    "settings of nobody": (rewrite(lambda r: r.update(settings=[1])), r"run\.json is damaged"),
    "epochs are a word": (rewrite(lambda r: r["settings"].update(epochs="many")), r"run\.json is damaged"),
    "unknown optimizer": (rewrite(lambda r: r["settings"].update(optimizer="ivom")), r"run\.json is damaged"),
    "unknown model": (rewrite(lambda r: r["settings"].update(model="mlq")), r"run\.json is damaged"),
    "no scale": (rewrite(lambda r: r["data"].pop("center")), r"run\.json is damaged"),
    "scale of words": (rewrite(lambda r: r["data"].update(spread=["wide"])), r"run\.json is damaged"),
    "scale of other data": (rewrite(lambda r: r["data"].update(center=[0.0] * 7)), r"run\.json is damaged"),
    "no data": (rewrite(lambda r: r.pop("data")), r"run\.json is damaged"),
    "no notes": (rewrite(lambda r: r["data"].pop("notes")), None),
    "no seconds": (rewrite(lambda r: r.pop("seconds")), r"run\.json is damaged"),
    "no fingerprint": (rewrite(lambda r: r["data"].pop("fingerprint")), "are no longer those"),
    "a demo": (text("run.json", '{"format": 2, "kind": "demo", "runs": ["a"]}'), r"run\.json is damaged|not a single run"),
    "unfinished": (rewrite(lambda r: r.pop("finished")), "is not finished: go on with: bayesrule train image --resume --out"),
    "no weights": (text("model.safetensors", "none"), r"model\.safetensors is damaged"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        r"model\.safetensors is damaged",
    ),
    "weights of another": (
        lambda f: save_file({"w": torch.ones(1)}, f / "model.safetensors"),
        r"model\.safetensors is damaged or of another model",
    ),
    "no posterior": (text("posterior.safetensors", "none"), r"posterior\.safetensors' is damaged"),
    "posterior of another name": (of_other_model("0.weight"), r"posterior\.safetensors is of another model: .*0\.weight"),
    "posterior of another shape": (of_other_model("1.weight"), r"posterior\.safetensors is of another model: .*1\.weight"),
    "cut lines": (text("metrics.jsonl", "{"), r"metrics\.jsonl is damaged"),
    "a line of something else": (text("metrics.jsonl", "[1]\n"), r"metrics\.jsonl is damaged"),
    "missing record": (absent("run.json"), r"holds no run\.json"),
    "missing weights": (absent("model.safetensors"), r"model\.safetensors"),
    "missing posterior": (absent("posterior.safetensors"), r"posterior\.safetensors"),
    "missing lines": (absent("metrics.jsonl"), r"metrics\.jsonl"),
    "missing predictions": (absent("predictions.safetensors"), None),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_names_the_file(what, copied):
    act, message = DAMAGE[what]
    act(copied)
    if message is None:
        assert set(read(copied).predictions()) == {"validation", "test", "averaged test"}
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        read(copied)
    assert "\n" not in str(refusal.value)


def test_two_processes_are_kept_apart(settings, tmp_path):
    with locked(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another process is at work in .*run; wait for it, or choose another --out"):
                train(settings(), tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()
    train(settings(), tmp_path / "run")


def test_what_a_process_left_that_was_killed_at_once_is_no_hindrance(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    train(settings(), tmp_path / "run", resume=True)
    train(settings(), tmp_path / "whole")
    assert_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("resume", [False, True])
def test_a_record_that_was_half_written_is_no_hindrance(resume, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / ".run.json.0123456789abcdef0123456789abcdef").write_text('{"for')
    train(settings(), tmp_path / "run", resume=resume)
    train(settings(), tmp_path / "whole")
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_that_were_half_written_are_swept_away(crashed, settings):
    (crashed / ".checkpoint.safetensors.0123456789abcdef0123456789abcdef").write_bytes(b"half")
    train(settings(), crashed, resume=True)
    assert {path.name for path in crashed.iterdir()} == {*COMPARED, "run.json"}


def test_a_run_that_was_killed_when_all_was_written_is_swept_on_resume(crashed, settings, tmp_path):
    shutil.copy(crashed / "checkpoint.safetensors", tmp_path / "kept")
    train(settings(), crashed, resume=True)
    shutil.copy(tmp_path / "kept", crashed / "checkpoint.safetensors")  # the last act of a run is to remove it
    train(settings(), crashed, resume=True)
    assert {path.name for path in crashed.iterdir()} == {*COMPARED, "run.json"}


@pytest.fixture
def full_disk():
    """A disk on which no file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def command(chosen, out):
    kind = f"--data {chosen.data} --optimizer {chosen.optimizer} --model {chosen.model}"
    return ["train", "image", *f"{kind} --epochs {chosen.epochs} --batch-size {chosen.batch_size} --out {out}".split()]


def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(settings, tmp_path, full_disk, capsys):
    full_disk(100)
    code = cli.main(command(settings(), tmp_path / "run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bayesrule: ")]
    assert code == 2 and len(lines) == 1 and "run.json: File too large" in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_and_the_old_checkpoint_is_whole(
    settings, tmp_path, full_disk, each_step, capsys, monkeypatch
):
    real, out = runs.save, tmp_path / "run"

    def save(path, tensors, about):
        if about["done"] == 7:
            full_disk(50_000)
        real(path, tensors, about)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save", save)
        code = cli.main(command(settings(), out))
    full_disk(resource.RLIM_INFINITY)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bayesrule: ")]
    (line,) = lines
    assert code == 2 and line.startswith(f"bayesrule: {out / 'checkpoint.safetensors'}: File too large; mend that and go on with: ")
    assert {path.name for path in out.iterdir()} == {"run.json", "metrics.jsonl", "checkpoint.safetensors"}
    with pytest.raises(Crash):  # six steps are kept
        train(settings(), out, resume=True, bars=at_step(7, crash))
    train(settings(), out, resume=True)
    train(settings(), tmp_path / "whole")
    assert_equal(out, tmp_path / "whole")


PROGRAM = """
import math, sys
import torch
torch.set_num_threads(1)  # as here
from bayesrule.recipes import runs
runs.EVERY, runs.EFFORT = 0.0, math.inf
from bayesrule.cli import main
sys.exit(main())
"""


def test_a_run_that_is_killed_and_interrupted_goes_on_and_ends_bit_equal(tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    chosen = Settings("digits", "ivon", "mlp", epochs=20, batch_size=150)
    begun = [sys.executable, "-c", PROGRAM, *command(chosen, out)]

    def lines():
        return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0

    moments = random.Random(5)
    for aim, number in ((3, signal.SIGKILL), (7, signal.SIGKILL), (11, signal.SIGINT)):
        with subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while lines() < aim and process.poll() is None:
                time.sleep(0.002)
            if aim == 3:
                with pytest.raises(ValueError, match="another process is at work"):
                    train(chosen, out, resume=True)
            time.sleep(moments.random() / 50)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert aim <= lines() < 20
        begun = [sys.executable, "-c", PROGRAM, "train", "image", "--resume", "--out", str(out)]
    last = said.splitlines()[-1]
    assert last.startswith("bayesrule: stopped after step ") and "of 120 and saved; go on with: bayesrule train image" in last
    going_on = shlex.split(last.partition("go on with: bayesrule ")[2])
    assert going_on == ["train", "image", "--resume", "--out", str(out)]
    assert cli.main(going_on) == 0 and "Report:" in capsys.readouterr().out
    train(chosen, whole)
    first, second = content(out), content(whole)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"model": "mlq"}, "unknown model 'mlq'; did you mean 'mlp'"),
        ({"optimizer": "ivom"}, "unknown optimizer 'ivom'; did you mean 'ivon'"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"device": "tpu"}, "there is no device 'tpu' here"),
        ({"device": "nothing:at:all"}, "there is no device 'nothing:at:all' here"),
        ({"hyperparameters": {"lr": -1.0}}, "lr must be"),
        ({"hyperparameters": {"lr": "fast"}}, "IVON"),
        ({"hyperparameters": {"momentum_dtype": "half"}}, "ivon has no setting momentum_dtype"),
        ({"hyperparameters": {"hess_approx": "none"}}, "hess_approx"),
        ({"hyperparameters": {"beta2": "none"}}, "IVON"),
        ({"optimizer": "torch-sgd", "hyperparameters": {"lr": "fast"}}, "SGD"),
        ({"optimizer": "torch-adamw", "hyperparameters": {"beta2": 3.0}}, "AdamW: .*beta"),
        ({"optimizer": "sgd", "hyperparameters": {"ess": 5.0}}, "sgd has no setting ess"),
        ({"held_out": ("7",)}, "there is no class '7'"),
        ({"split": (0.9, 0.2)}, "split must be two shares"),
        ({"size": (16,)}, "cannot be resized"),
        ({"target": "y"}, "it is no table"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(changes, message, settings, tmp_path):
    with pytest.raises(ValueError, match=message) as refusal:
        train(replace(settings(), **changes), tmp_path / "run")
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_rows_are_no_images(tmp_path):
    rows = "\n".join(f"{i % 7},{i % 3},{'ab'[i % 2]}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"u,v,kind\n{rows}\n")
    chosen = Settings(str(tmp_path / "t.csv"), "sgd", "mlp", epochs=1)
    with pytest.raises(ValueError, match=r"t.csv holds rows, not images; take: bayesrule train tabular"):
        train(chosen, tmp_path / "run", kind="image")
    with pytest.raises(ValueError, match="augment flip changes images, and the data are rows"):
        train(replace(chosen, augment=("flip",)), tmp_path / "run", kind="row")
    with pytest.raises(ValueError, match="lenet needs images"):
        train(replace(chosen, model="lenet"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    train(chosen, tmp_path / "run", kind="row")
    assert read(tmp_path / "run").record.kind == "row"


def test_the_watcher_is_told_every_line_also_of_what_was_done_before(crashed, settings):
    told = []
    train(settings(seed=0), crashed, resume=True, watch=lambda seed, line: told.append((seed, line)))
    assert told == [(0, line) for line in read_lines(crashed / "metrics.jsonl")]
    assert [line["epoch"] for _, line in told] == [1, 2, 3]


def test_a_model_of_the_user_that_fails_in_training_is_named(settings, tmp_path):
    with pytest.raises(ValueError, match="own_nets:fragile failed in training: RuntimeError: out of luck"):
        train(settings(model="own_nets:fragile"), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()  # a step that was half done is not kept


def test_a_checkpoint_of_another_run_is_refused(settings, tmp_path, each_step):
    for seed in (0, 1):
        with pytest.raises(Crash):
            train(settings(seed=seed), tmp_path / str(seed), bars=at_step(4, crash))
    shutil.copy(tmp_path / "1" / "checkpoint.safetensors", tmp_path / "0" / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="of another run: its settings or data are others; delete it to start anew"):
        train(settings(), tmp_path / "0", resume=True)


def test_data_that_have_moved_are_known_by_what_they_are(world, settings, tmp_path, each_step):
    shutil.copy(world / "small.npz", tmp_path / "a.npz")
    with pytest.raises(Crash):
        train(replace(settings(), data=str(tmp_path / "a.npz")), tmp_path / "run", bars=at_step(4, crash))
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    train(replace(settings(), data=str(tmp_path / "b.npz")), tmp_path / "run", resume=True)
    assert read(tmp_path / "run").settings.data == str(tmp_path / "b.npz")


def test_another_number_of_threads_is_said(crashed, settings):
    record = json.loads((crashed / "run.json").read_text())
    (crashed / "run.json").write_text(json.dumps({**record, "threads": 7}))
    with pytest.warns(UserWarning, match="began with 7 threads and goes on with 1: .* only up to rounding"):
        train(settings(), crashed, resume=True)
