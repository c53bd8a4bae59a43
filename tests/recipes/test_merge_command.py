"""`bayesrule merge` and `bayesrule precision`, on folders that need no framework to be read."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.uses.merging.checkpoints import SHAPES, checkpoint, precisions, tensors

from bayesrule import cli
from bayesrule.recipes.merge_command import classes_of
from bayesrule.recipes.runs import train
from bayesrule.uses.merging import writing

BASE = tensors(0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    for k, name in enumerate(("base", "a", "b")):
        checkpoint(tmp_path / name, tensors(k, BASE, 0.1) if k else BASE, precisions(k, 1.1 if k else 0.1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("bayesrule:")]
    return code, out, "\n".join(said)


class TestMerge:
    def test_says_what_it_did_and_that_nothing_is_left_to_do(self, root, capsys):
        code, out, err = asked(capsys, "merge", "base", "a", "b", "--out", "out")
        assert (code, out, err) == (0, "Merged 2 models by gradient_matching: out\n", "")
        code, out, _ = asked(capsys, "merge", "base", "a", "b", "--out", "out")
        assert code == 0 and out.startswith("Nothing to do: out holds this merge.")

    def test_as_json(self, root, capsys):
        how = ["--weights", "0.7", "-0.2", "--method", "ties", "--density", "0.4", "--seed", "3", "--json"]
        code, out, _ = asked(capsys, "merge", "base", "a", "b", "--out", "out", *how)
        found = json.loads(out)
        assert code == 0 and (found["alphas"], found["density"], found["seed"], found["method"]) == ([0.7, -0.2], 0.4, 3, "ties")
        assert found["out"] == "out" and found["sha256"].keys() == {f"{name}/model.safetensors" for name in ("base", "a", "b")}

    @pytest.mark.parametrize("weights", [("0.5",), ("0.5", "0.5")])
    def test_one_weight_is_that_of_all(self, root, capsys, weights):
        asked(capsys, "merge", "base", "a", "b", "--out", "out", "--method", "task_arithmetic", "--weights", *weights)
        found = load_file(root / "out" / "model.safetensors")
        for name in SHAPES:
            wanted = (
                BASE[name] + 0.5 * (tensors(1, BASE, 0.1)[name] - BASE[name]) + 0.5 * (tensors(2, BASE, 0.1)[name] - BASE[name])
            )
            torch.testing.assert_close(found[name], wanted)

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (("base", "a", "--out", "base"), "base already exists; choose another place or delete it first"),
            (("base", "none", "--out", "out"), "there is no folder 'none'"),
            (("base", "--out", "out"), "there are no models to merge; name at least one"),
            (("base", "a", "--out", "out", "--weights", "1", "2"), "there are 1 models and 2 alphas"),
            (("base", "a", "--out", "out", "--method", "mean"), "invalid choice 'mean'"),
            (("base", "a", "b", "--out", "out", "--weights", "0.1", "-1"), "leaves"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, root, capsys, words, reason):
        code, out, err = asked(capsys, "merge", *words)
        assert code == 2 and out == "" and reason in err and err.count("\n") == 0
        assert {path.name for path in root.iterdir()} == {"base", "a", "b"}

    def test_a_classifier_of_other_classes_is_warned_of(self, root, capsys):
        for name, labels in (("a", ["bad", "good"]), ("b", ["good", "bad"])):
            (root / name / "config.json").write_text(json.dumps({"id2label": {str(k): label for k, label in enumerate(labels)}}))
        (root / "base" / "config.json").write_text((root / "a" / "config.json").read_text())
        code, _, err = asked(capsys, "merge", "base", "a", "b", "--out", "out")
        assert code == 0 and "warning: a tells apart bad, good, and b good, bad" in err
        assert classes_of(root / "out") == ("bad", "good") and classes_of(root) == ()

    def test_interrupted(self, root, capsys, monkeypatch):
        def interrupt(writer, block):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(writing.Writer, "append", interrupt)
            code, _, err = asked(capsys, "merge", "base", "a", "--out", "out")
        assert code == 130 and err == "bayesrule: interrupted; the same command goes on where it was"
        assert not (root / "out").exists()
        assert asked(capsys, "merge", "base", "a", "--out", "out")[0] == 0 and not (root / ".out.draft").exists()


class TestRuns:
    """Of images: the same names, whatever was trained."""

    @pytest.fixture
    def runs(self, settings, tmp_path, monkeypatch):
        for name, optimizer, seed in (("base", "ivon", 0), ("one", "ivon", 0), ("two", "torch-adamw", 0)):
            train(settings(optimizer, seed=seed, epochs=1 + (name != "base")), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_measured_and_merged(self, runs, capsys):
        code, _, err = asked(capsys, "merge", "base", "one", "two", "--out", "out")
        assert code == 2 and "no precision for model 'two'; run bayesrule precision two" in err
        code, out, _ = asked(capsys, "precision", "two", "--subset", "50", "--json")
        found = json.loads(out)
        assert code == 0 and found["examples"] == 50 and found["num_data"] > 100
        found = load_file(runs / "two" / "precision.safetensors")
        assert found.keys() == load_file(runs / "two" / "model.safetensors").keys()
        assert all((s >= 0.99e-6 * 100).all() for s in found.values())
        code, out, _ = asked(capsys, "merge", "base", "one", "two", "--out", "out")
        assert code == 0 and {"model.safetensors", "merge.json", "precision.safetensors"} == {
            p.name for p in (runs / "out").iterdir()
        }

    @pytest.mark.parametrize("method", ["squared_gradients", "ggn", "observed"])
    def test_every_way(self, runs, capsys, method):
        code, out, _ = asked(capsys, "precision", "two", "--method", method)
        assert code == 0 and out.startswith(f"Precision by {method} of ")

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (("nowhere",), "nowhere is no run; name the texts that it was trained on by --data"),
            (("two", "--subset", "0"), "subset must be at least 1, got 0"),
            (("two", "--weight-decay", "0"), "weight_decay must be above 0, got 0.0"),
            (("two", "--data", "a.csv"), "two is no classifier of texts; --data takes one"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, runs, capsys, words, reason):
        code, _, err = asked(capsys, "precision", *words)
        assert code == 2 and err == f"bayesrule: {reason}" and not (runs / "two" / "precision.safetensors").exists()
