"""A finished run is read back whole, or one line says which file is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.recipes.stopped import COMPARED

import bayesrule as br
from bayesrule.recipes import results
from bayesrule.recipes.folder import read_record
from bayesrule.recipes.results import Run, read
from bayesrule.recipes.runs import train
from bayesrule.recipes.settings import Settings


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


@pytest.mark.parametrize("count", [None, 8])
def test_predictions_do_not_depend_on_how_many_are_made_at_once(finished, monkeypatch, count):
    run = read(finished)
    whole, seen = run.probabilities(run.data.test, count), []
    monkeypatch.setattr(results, "AT_ONCE", 10)
    monkeypatch.setattr(results, "FORWARD", 4 * 64)
    run.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(run.probabilities(run.data.test, count), whole, rtol=1e-5, atol=1e-6)
    assert max(seen) == 4


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
