"""A run and its folder: stopped at any moment it goes on and ends bit-equal; and whatever is wrong is said in one line."""

import json
import random
import shlex
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.recipes.stopped import Crash, assert_equal, at_step, crash
from tests.sweeps import sweep
from torch.distributions import Normal, kl_divergence

import bayesrule as br
from bayesrule.recipes.folder import read_lines, read_record
from bayesrule.recipes.formats import folders
from bayesrule.recipes.optimizers import OPTIMIZERS
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import Paused, train
from bayesrule.recipes.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:IBLR. . of . tensors have more than max_block:UserWarning")

STEPS = 5  # an epoch
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


FEW = ("ivon", "adamw", "dropout under noise", "augmentation", "early stop", "patience with batch norm", "held out")


@pytest.mark.parametrize("kind", sweep(KINDS, *FEW))
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


@pytest.mark.parametrize("optimizer", sweep(("ivon", "sgd"), "ivon"))
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


@pytest.fixture
def interruptible():
    """What starts tests in the background may have it that interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_stops_at_once_and_the_last_checkpoint_stays(settings, tmp_path, each_step, interruptible):
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
