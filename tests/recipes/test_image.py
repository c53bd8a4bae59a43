"""A run and its folder: what is written, read back and refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bayesrule as br
from bayesrule.recipes.image import Settings, read, summarize, train
from bayesrule.recipes.training import OPTIMIZERS

FILES = {"model.safetensors", "run.json", "metrics.jsonl", "report.html"}


def settings(optimizer="ivon", **changes):
    return Settings("digits", "mlp", optimizer, {}, **{"epochs": 2, "batch_size": 200, **changes})


@pytest.fixture(scope="module")
def ivon(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ivon"
    train(settings(), out)
    return out


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_leaves_a_whole_folder(optimizer, tmp_path):
    train(settings(optimizer), tmp_path / "run")
    posterior = {"posterior.safetensors"} if OPTIMIZERS[optimizer].variational else set()
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES | posterior
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["optimizer"] == optimizer


def test_the_model_file_is_the_mean_of_the_posterior(ivon):
    model, posterior = load_file(ivon / "model.safetensors"), br.Posterior.load(ivon / "posterior.safetensors")
    assert set(model) == set(posterior.mean)
    assert all(torch.equal(model[name], posterior.mean[name]) for name in model)
    assert posterior.num_data == 898 and posterior.ess == 8980


def test_reads_back_and_measures_the_same_every_time(ivon):
    mean, averaged = summarize(ivon, 8).rows
    assert summarize(ivon, 8).rows == [mean, averaged]
    assert mean["method"] == "IVON, mean" and averaged["method"] == "IVON, averaged" and mean["nll"] != averaged["nll"]
    run = read(ivon)
    measured = br.evaluate(run.model, run.posterior, [run.data.test], num_samples=8)
    assert {key: averaged[key] for key in measured} == pytest.approx(measured, abs=1e-6)


def test_unknown_images_are_measured_where_digits_were_held_out(tmp_path):
    train(settings(held_out=(9,)), tmp_path / "run")
    assert all(0 <= row["auroc_ood"] <= 1 for row in summarize(tmp_path / "run", 8).rows)


def test_a_run_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        train(Settings("digits", "mlp", "torch-sgd", {"lr": 1e12}, epochs=2), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", '{"format": 1, "kind": "image", "settings": {}}', "run.json is damaged"),
        ("run.json", '{"format": 1, "kind": "demo", "runs": ["a"]}', "holds a demo, not a single run; name one"),
        ("model.safetensors", "no weights", "model.safetensors is damaged"),
        ("posterior.safetensors", "no posterior", "posterior.safetensors' is damaged"),
        ("metrics.jsonl", "{", "metrics.jsonl is damaged"),
    ],
)
def test_a_damaged_folder_names_the_file(ivon, tmp_path, file, text, message):
    for path in ivon.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_a_posterior_of_another_model_is_named(ivon, tmp_path, name):
    for path in ivon.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    other = {name: torch.zeros(2)}  # a name, or a shape, that the model has not
    br.Posterior(other, {name: torch.ones(2)}).save(tmp_path / "posterior.safetensors")
    with pytest.raises(ValueError, match=f"posterior.safetensors is of another model: .*{name}"):
        read(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "posterior.safetensors", "metrics.jsonl"])
def test_a_missing_file_is_named(ivon, tmp_path, file):
    for path in ivon.iterdir():
        if path.name != file:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=file):
        read(tmp_path)
