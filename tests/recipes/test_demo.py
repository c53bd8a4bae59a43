"""The main job, small: complete, comparable, restartable, and honest in words."""

import json
from dataclasses import replace

import pytest
import torch

from bayesrule.recipes import demo as module
from bayesrule.recipes.comparison import compare
from bayesrule.recipes.demo import DEMO, demo, findings, is_complete, ratio, results, summarize
from bayesrule.recipes.results import read

TINY = replace(DEMO, data="digits", model="mlp", epochs=2, batch_size=300)
METHODS = ["AdamW", "AdamW, temperature", "SGD", "SGD, temperature", "IVON, mean", "IVON, averaged"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    demo(folder, TINY)
    return folder


def test_leaves_the_table_the_report_and_every_run(out):
    metrics = results(out)
    assert [row["method"] for row in metrics["rows"]] == METHODS
    assert all({"accuracy", "nll", "ece", "brier", "auroc_ood", "seconds"} <= set(row) for row in metrics["rows"])
    assert len(metrics["ratio"]) == 3 and metrics["ratio"] == sorted(metrics["ratio"])
    for name in ("adamw", "sgd", "ivon"):
        assert {"model.safetensors", "run.json", "metrics.jsonl", "report.html"} <= {p.name for p in (out / name).iterdir()}
    assert (out / "ivon" / "posterior.safetensors").exists()
    assert is_complete(out)
    page = (out / "report.html").read_text()
    assert all(method in page for method in METHODS)


def test_the_contestants_take_the_same_number_of_gradients(out):
    runs = [json.loads((out / name / "run.json").read_text())["settings"] for name in ("adamw", "sgd", "ivon")]
    shared = [{key: run[key] for key in ("data", "model", "epochs", "batch_size", "seed", "held_out")} for run in runs]
    assert shared[0] == shared[1] == shared[2]


def test_temperature_changes_no_answer(out):
    rows = results(out)["rows"]
    assert rows == summarize(out).rows
    assert rows[0]["accuracy"] == rows[1]["accuracy"]


@pytest.mark.parametrize("name", ["begin", "finish", "render"])
def test_an_interrupted_demo_leaves_nothing_and_may_be_started_again(name, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    short = replace(TINY, epochs=1, batch_size=2000)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, name, interrupt)
        demo(tmp_path / "demo", short)
    assert not list(tmp_path.iterdir())
    assert not is_complete(tmp_path / "demo")


def test_each_run_of_it_is_a_run(out):
    for name, (optimizer, hyperparameters) in module.CONTESTANTS.items():
        run = read(out / name)
        assert run.settings.optimizer == optimizer and len(run.history) == 2
        assert hyperparameters.items() <= run.settings.hyperparameters.items()
    assert [row["method"] for row in compare([out]).rows] == METHODS
    with pytest.raises(ValueError, match="not a single run"):
        read(out)


def test_threads_are_those_of_the_caller(monkeypatch):
    before = torch.get_num_threads()
    with pytest.raises(KeyError), module.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("text", ["", "{", "[1"])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        results(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        demo(tmp_path, TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("nll", "word"), [(0.05, "better"), (0.2, "worse"), (0.1, "equal")])
def test_the_words_follow_the_numbers(nll, word):
    rival = {"method": "AdamW", "nll": 0.1, "ece": 0.1, "auroc_ood": 0.9}
    text = findings([rival, rival, {**rival, "nll": nll}])
    assert f"NLL {word} ({nll:.3f}, 0.100)" in text


def test_ratio_is_of_rounds_not_of_totals():
    assert ratio([1.0, 2.0, 30.0], [1.0, 1.0, 10.0]) == [1.5, 2.0, 2.5]
