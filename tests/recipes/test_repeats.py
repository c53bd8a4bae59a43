"""Several seeds: each as if it were alone, and a folder that knows them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bayesrule.recipes import repeats
from bayesrule.recipes.folder import read_record, write_record
from bayesrule.recipes.repeats import members, train_seeds
from bayesrule.recipes.runs import Paused, train
from bayesrule.recipes.settings import Settings


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.npz"
    digits = load_digits(n_class=2)
    np.savez(path, x=digits.images[:80].astype(np.uint8), y=digits.target[:80])
    return Settings(str(path), "sgd", "mlp", epochs=1, batch_size=30, seed=4)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_each_is_as_if_it_were_alone(chosen, tmp_path):
    train_seeds(chosen, tmp_path / "many", 3)
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"run.json", "seed-4", "seed-5", "seed-6"}
    train(replace(chosen, seed=5), tmp_path / "one")
    found = [weights(tmp_path / "many" / f"seed-{seed}") for seed in (4, 5, 6)]
    assert found[1] == weights(tmp_path / "one") and len(set(found)) == 3
    record = read_record(tmp_path / "many")
    assert record["kind"] == "seeds" and record["runs"] == ["seed-4", "seed-5", "seed-6"] and record["settings"]["seed"] == 4
    ((name, runs),) = members(tmp_path / "many")
    assert name == str(tmp_path / "many") and [run.name for run in runs] == record["runs"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*.*")}
    train_seeds(chosen, tmp_path / "many", 3, resume=True)  # nothing to do
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*.*")}


def test_one_seed_is_a_run(chosen, tmp_path):
    train_seeds(chosen, tmp_path / "one", 1)
    assert read_record(tmp_path / "one")["kind"] == "image"
    assert members(tmp_path / "one") == [(str(tmp_path / "one"), [tmp_path / "one"])]


def test_goes_on_where_it_was_stopped(chosen, tmp_path, monkeypatch):
    real = repeats.train

    def stopped(settings, out, **options):
        if settings.seed == 5:
            raise Paused(f"go on with: bayesrule train image --resume --out {out}")
        real(settings, out, **options)

    with monkeypatch.context() as patched, pytest.raises(Paused) as stop:
        patched.setattr(repeats, "train", stopped)
        train_seeds(chosen, tmp_path / "many", 3)
    assert str(stop.value) == f"go on with: bayesrule train image --resume --out {tmp_path / 'many'}"
    first = (tmp_path / "many" / "seed-4" / "model.safetensors").stat().st_mtime_ns
    told = []
    train_seeds(chosen, tmp_path / "many", 3, resume=True, watch=lambda seed, line: told.append(seed))
    assert told == [5, 6] and first == (tmp_path / "many" / "seed-4" / "model.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize("left", [(), ("seed-4",)])
def test_begins_where_it_was_killed_before_it_wrote(chosen, tmp_path, left):
    for name in left:
        (tmp_path / "many" / name).mkdir(parents=True)
    train_seeds(chosen, tmp_path / "many", 2, resume=True)
    assert read_record(tmp_path / "many" / "seed-5")["finished"]


@pytest.mark.parametrize(
    ("count", "changes", "resume", "message"),
    [
        (2, {}, False, "already holds another run"),
        (3, {}, True, "began with other seeds; give the same, or --resume and --out alone"),
        (2, {"seed": 5}, True, "began with other seeds"),
        (2, {"epochs": 2}, True, "began with other epochs; give"),
        (2, {"hyperparameters": {"lr": 0.5}}, True, "began with other settings of the optimizer; give"),
        (1, {}, True, "holds 'seeds', not a single run"),
        (0, {}, True, "seeds must be at least 1, got 0"),
        (-1, {}, False, "seeds must be at least 1, got -1"),
    ],
)
def test_other_seeds_and_settings_are_refused(chosen, tmp_path, count, changes, resume, message):
    out = tmp_path / "many"
    write_record(out.parent / "record", {"kind": "seeds", "runs": ["seed-4", "seed-5"], "settings": chosen.plain()})
    out.mkdir()
    (out.parent / "record").rename(out / "run.json")
    with pytest.raises((ValueError, FileExistsError), match=message):
        train_seeds(replace(chosen, **changes), out, count, resume=resume)
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_single_run_does_not_become_many(chosen, tmp_path):
    train(chosen, tmp_path / "one")
    for resume in (False, True):
        with pytest.raises((ValueError, FileExistsError), match=r"already holds another run|began with other seeds"):
            train_seeds(chosen, tmp_path / "one", 2, resume=resume)
    assert not (tmp_path / "one" / "seed-4").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(chosen, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds other files"):
        train_seeds(chosen, tmp_path, 2, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("runs", [None, [], "seed-1", [1], {"a": 1}])
def test_a_damaged_record_names_no_runs(tmp_path, runs):
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "kind": "seeds", "runs": runs}))
    with pytest.raises(ValueError, match=r"run\.json is damaged: it names no runs"):
        members(tmp_path)


def test_the_runs_of_a_demo_are_methods(tmp_path):
    write_record(tmp_path / "run.json", {"kind": "demo", "runs": ["a", "b"]})
    assert members(tmp_path) == [(str(tmp_path / name), [tmp_path / name]) for name in "ab"]


def test_what_is_wrong_leaves_nothing(chosen, tmp_path):
    with pytest.raises(ValueError, match="lr must be"):
        train_seeds(replace(chosen, hyperparameters={"lr": -1.0}), tmp_path / "many", 2)
    assert not list(tmp_path.iterdir())


def test_data_are_announced_once(chosen, tmp_path):
    told = []
    train_seeds(chosen, tmp_path / "many", 2, started=told.append)
    assert [data.name for data in told] == ["small.npz"]


def test_runs_that_were_made_one_by_one_are_gathered(chosen, tmp_path):
    for seed in (4, 5):
        train(replace(chosen, seed=seed), tmp_path / "many" / f"seed-{seed}")
    train_seeds(chosen, tmp_path / "many", 2, resume=True)
    assert [run.name for _, runs in members(tmp_path / "many") for run in runs] == ["seed-4", "seed-5"]
