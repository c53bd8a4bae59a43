"""The command line: what it prints, what it refuses, and that a refusal is one line and exit code 2."""

import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bayesrule import cli
from bayesrule.recipes import demo as demos
from bayesrule.recipes import runs, settings
from bayesrule.recipes.folder import read_record
from bayesrule.recipes.settings import Settings
from bayesrule.recipes.terminal import print_json

TRAIN = "train image --data {data} --model mlp --optimizer ivon --epochs 1 --batch-size 50 --out"
TABLE = "train tabular --data {table} --optimizer sgd --epochs 2 --out"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small data of some kinds, and a finished run."""
    folder = tmp_path_factory.mktemp("world")
    digits = load_digits(n_class=3)
    images, labels = digits.images[:200].astype(np.uint8) * 15, digits.target[:200]
    np.savez(folder / "small.npz", x=images, y=labels)
    np.savez(folder / "one.npz", x=images, y=np.zeros(200, int))
    np.savez(folder / "noise.npz", x=images[:, ::-1] ^ 77, y=labels)
    rows = [f"{i % 7},{i * i % 11},{'red' if i % 3 else 'blue'}" for i in range(90)]
    (folder / "table.csv").write_text("\n".join(["u,v,color", *rows]))
    (folder / "cli_nets.py").write_text(
        "from torch import nn\ndef small(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    runs.train(Settings(str(folder / "small.npz"), "ivon", "mlp", epochs=2, batch_size=50), folder / "ivon")
    runs.train(Settings(str(folder / "small.npz"), "sgd", "mlp", epochs=1, batch_size=50), folder / "sgd")
    return folder


@pytest.fixture
def call(world, tmp_path, capsys):
    """Exit code, stdout and stderr of a command, in which places have names."""
    places = {name: world / name for name in ("ivon", "sgd")} | {"new": tmp_path / "new", "tmp": tmp_path}
    places |= {"data": world / "small.npz", "table": world / "table.csv", "one": world / "one.npz", "noise": world / "noise.npz"}

    def call(command):
        return cli.main([word.format(**places) for word in command.split()]), *capsys.readouterr()

    return call


@pytest.fixture
def no_pages(monkeypatch):
    """Pages are not what a test is about, and they take their time."""
    for module in (cli, demos):
        monkeypatch.setattr(module, "render", lambda report: f"<!doctype html>{report.title}")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, "train image", "train tabular"])
def test_help_is_no_error(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    out, err = capsys.readouterr()
    assert not stop.value.code and out.startswith("usage: bayesrule") and not err


class TestTrain:
    def test_leaves_a_run_and_prints_its_metrics(self, call, tmp_path):
        code, out, err = call(f"{TRAIN} {{new}}")
        assert code == 0 and "accuracy" in out and out.splitlines()[-1] == f"Report: {tmp_path / 'new' / 'report.html'}"
        assert "IVON" in err and "predict" in err  # the bars
        files = {"model", "posterior", "predictions"}
        wanted = {f"{name}.safetensors" for name in files} | {"run.json", "metrics.jsonl", "report.html"}
        assert {path.name for path in (tmp_path / "new").iterdir()} == wanted
        assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")

    def test_a_table(self, call, tmp_path):
        code, out, _ = call(f"{TABLE} {{new}} --json")
        assert code == 0 and {"accuracy", "nll"} <= set(json.loads(out))
        record = read_record(tmp_path / "new")
        assert record["kind"] == "row" and record["settings"]["model"] == "mlp" and record["data"]["classes"] == ["blue", "red"]

    def test_a_column_may_be_named(self, call, tmp_path):
        assert call(f"{TABLE} {{new}} --target u")[0] == 0
        assert read_record(tmp_path / "new")["data"]["classes"] == list("0123456")

    def test_notes_of_the_data_are_said(self, call):
        assert "bayesrule: note: " in call(f"{TABLE} {{new}}")[2]  # rows that occur twice

    def test_settings_reach_the_run(self, call, tmp_path):
        said = (
            "--set beta1=0.8 --set hess_approx=gradsq --lr 0.2 --ess 300 --seed 4 --split-seed 2 --held-out 2 --augment shift flip"
        )
        assert call(f"{TRAIN} {{new}} {said} --patience 3 --precision bf16 --schedule step --split 0.6 0.2")[0] == 0
        found = read_record(tmp_path / "new")["settings"]
        given = {"beta1": 0.8, "hess_approx": "gradsq", "lr": 0.2, "ess": 300.0}
        assert found["hyperparameters"] == {"hess_init": 0.5, "weight_decay": 1e-4, "beta2": 0.99999} | given
        assert [found[name] for name in ("seed", "split_seed", "held_out", "augment")] == [4, 2, ["2"], ["shift", "flip"]]
        assert [found[name] for name in ("patience", "precision", "schedule", "split")] == [3, "bf16", "step", [0.6, 0.2]]
        assert read_record(tmp_path / "new")["data"]["classes"] == ["0", "1"]

    def test_a_model_of_the_users_own(self, call, world, tmp_path, monkeypatch):
        monkeypatch.chdir(world)
        assert call("train image --data {data} --model cli_nets:small --optimizer sgd --epochs 1 --out {new}")[0] == 0
        code, out, _ = call("evaluate {new} --json")
        assert code == 0 and len(json.loads(out)["rows"]) == 2


@pytest.mark.usefixtures("no_pages")
class TestResume:
    def test_goes_on(self, call, tmp_path, monkeypatch, world):
        command = TRAIN.replace("--epochs 1", "--epochs 2") + " {new}"
        self.stop(call, command, monkeypatch)
        code, _, err = call(f"{command} --lr 0.3 --resume")
        assert code == 2 and "began with lr 0.2, not 0.3" in err
        code, _, err = call("train image --resume --out {new} --batch-size 7")
        assert code == 2 and "began with batch_size 50, not 7; give the same settings, or --resume and --out alone" in err
        code, _, err = call(command)
        assert code == 2 and "already holds another run; go on with it by --resume" in err
        assert call("train image --resume --out {new}")[0] == 0
        for name in ("model.safetensors", "posterior.safetensors", "metrics.jsonl"):
            assert (tmp_path / "new" / name).read_bytes() == (world / "ivon" / name).read_bytes()
        before = (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns
        for again in ("train image --resume --out {new} --json", f"{command} --resume --json"):
            code, out, _ = call(again)
            assert code == 0 and "accuracy" in json.loads(out)
        assert before == (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns

    def test_with_the_same_command_it_begins_what_has_not_begun_and_goes_on(self, call, tmp_path, monkeypatch, world):
        command = TRAIN.replace("--epochs 1", "--epochs 2") + " {new} --resume"
        self.stop(call, command, monkeypatch)
        assert call(command)[0] == 0
        assert (tmp_path / "new" / "model.safetensors").read_bytes() == (world / "ivon" / "model.safetensors").read_bytes()

    def stop(self, call, command, monkeypatch):
        """The run of a command, as Ctrl-C stops it after three steps."""
        asked = iter([False, False, True])

        class Stop:
            def is_set(self):
                return next(asked)

        with monkeypatch.context() as patched:
            patched.setattr(runs, "stopping", lambda: nullcontext(Stop()))
            code, out, err = call(command)
        assert code == 130 and not out
        assert "bayesrule: stopped after step 3 of 6 and saved; go on with: bayesrule train image --resume" in err.splitlines()[-1]
        assert len(err.splitlines()[-1].split("bayesrule: ")) == 2

    def test_several_seeds(self, call, tmp_path, monkeypatch):
        command = TRAIN.replace("--epochs 1", "--epochs 2") + " {new} --seeds 2 --seed 3"
        self.stop(call, command, monkeypatch)
        assert [path.name for path in tmp_path.iterdir()] == ["new"] and not (tmp_path / "new" / "seed-4").exists()
        code, _, err = call(command.replace("--seeds 2", "--seeds 3") + " --resume")
        assert code == 2 and "began with other seeds; give the same" in err
        code, out, _ = call("train image --resume --out {new} --json")
        assert code == 0 and "accuracy" in json.loads(out)
        assert {path.name for path in (tmp_path / "new").iterdir()} == {"run.json", "report.html", "seed-3", "seed-4"}
        code, out, _ = call("evaluate {new} --json")
        assert code == 0 and len(json.loads(out)["rows"]) == 2
        code, out, _ = call("report {new} {sgd} --json")
        assert code == 0 and len(json.loads(out)["rows"]) == 4


@pytest.mark.usefixtures("no_pages")
class TestConfig:
    def write(self, tmp_path, text):
        (tmp_path / "run.toml").write_text(text)

    def test_a_file_holds_settings_and_what_is_said_goes_first(self, call, world, tmp_path):
        text = f'data = "{world / "small.npz"}"\noptimizer = "sgd"\nmodel = "mlp"\nepochs = 9\nlr = 1\n'
        text += 'batch-size = 70\nheld-out = ["2"]\n'
        self.write(tmp_path, text + f'out = "{tmp_path / "new"}"\n[set]\nmomentum = 0.5\n')
        assert call("train image --config {tmp}/run.toml --epochs 1 --lr 0.01")[0] == 0
        found = read_record(tmp_path / "new")["settings"]
        assert (found["epochs"], found["batch_size"], found["held_out"], found["optimizer"]) == (1, 70, ["2"], "sgd")
        assert found["hyperparameters"] == {"lr": 0.01, "momentum": 0.5, "weight_decay": 5e-4}

    def test_the_rest_may_be_said(self, call, tmp_path):
        self.write(tmp_path, "epochs = 1\nset = {momentum = 0.7, nesterov = true}\n")
        code, _, err = call("train image --data {data} --optimizer sgd --model mlp --out {new} --config {tmp}/run.toml")
        assert code == 0, err
        found = read_record(tmp_path / "new")["settings"]["hyperparameters"]
        assert found == {"lr": 0.03, "momentum": 0.7, "nesterov": True, "weight_decay": 5e-4}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch = 3", "has an unknown key 'epoch'; did you mean 'epochs'?"),
            ("zzz = 3", "has an unknown key 'zzz'; known are "),
            ('epochs = "three"', "epochs must be a whole number, got 'three'"),
            ("epochs = true", "epochs must be a whole number, got True"),
            ("epochs = 1.5", "epochs must be a whole number, got 1.5"),
            ("data = 3", "data must be text, got 3"),
            ('split = [0.5, "x"]', "split must be "),
            ("split = [0.5]", "split must be "),
            ("held-out = [1]", "held-out must be "),
            ("epochs = ", "is no TOML file"),
            ("\x00", "is no TOML file"),
            (None, "run.toml: No such file"),
            ("epochs = 0", "epochs must be at least 1, got 0"),
            ('model = "mlq"', "did you mean 'mlp'"),
        ],
    )
    def test_what_is_wrong_with_it_is_said(self, text, message, call, tmp_path):
        if text is not None:
            self.write(tmp_path, text)
        rest = (
            "--optimizer sgd --out {new}"
            + ("" if text and "model" in text else " --model mlp")
            + (" --data {data}" if text != "data = 3" else "")
        )
        code, out, err = call(f"train image --config {{tmp}}/run.toml {rest}")
        lines = [line for line in err.splitlines() if line.split()[0] != "look"]
        assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("bayesrule: ") and message in lines[0]
        assert not (tmp_path / "new").exists()

    def test_no_text(self, call, tmp_path):
        (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
        code, _, err = call("train image --config {tmp}/run.toml --data {data} --optimizer sgd --out {new}")
        assert code == 2 and "is no TOML file" in err and len(err.splitlines()) == 1


class TestData:
    def test_says_what_is_there(self, call):
        code, out, _ = call("data {data}")
        assert code == 0 and "small.npz: NumPy arrays (.npz); images of 1 x 8 x 8, 3 classes; 140 training, 30 validation" in out
        assert "0" in out and "class" in out
        code, out, _ = call("data {table} --target v")
        assert code == 0 and "rows of" in out and "note: " in out

    def test_as_json(self, call):
        code, out, _ = call("data {data} --json")
        found = json.loads(out)
        assert code == 0 and len(out.splitlines()) == 1 and found["refusal"] is None
        assert sum(found["examples"].values()) == 200 and sum(sum(c.values()) for c in found["classes"].values()) == 200
        assert found["shape"] == [1, 8, 8]

    def test_text(self, call, monkeypatch):
        from bayesrule.recipes import describing
        from bayesrule.recipes.formats.named import Text

        monkeypatch.setitem(describing.TEXTS, "stdlib", lambda: Text("stdlib", (3, 2, 1), *(torch.zeros(n) for n in (5000, 40, 3))))
        code, out, _ = call("data stdlib")
        assert code == 0 and out == "stdlib: text of 6 files; bytes: 5,000 training, 40 validation, 3 test\n"
        assert json.loads(call("data stdlib --json")[1])["bytes"] == {"training": 5000, "validation": 40, "test": 3}

    @pytest.mark.parametrize("flag", ["", " --json"])
    def test_what_nothing_can_be_learned_from_is_shown_and_refused(self, flag, call):
        code, out, err = call(f"data {{one}}{flag}")
        assert code == 2 and "has one class only, '0'" in err and len(err.splitlines()) == 1
        if flag:
            assert "has one class only" in json.loads(out)["refusal"]
        else:
            assert "1 classes" in out or "1 class" in out


class TestReport:
    def test_runs_side_by_side(self, call, tmp_path):
        code, out, _ = call("report {sgd} {ivon} --out {tmp}/both.html --ood {noise}")
        assert code == 0 and "IVON, averaged" in out and "SGD, temperature" in out and out.endswith(f"{tmp_path}/both.html\n")
        page = (tmp_path / "both.html").read_text()
        assert "SGD" in page and "IVON" in page
        code, out, _ = call("report {sgd} {ivon} --out {tmp}/both.html --json --ood {noise} --num-samples 4")
        found = json.loads(out)
        assert found["report"] == str(tmp_path / "both.html") and len(found["rows"]) == 4
        assert all(0 <= row["auroc_ood"] <= 1 for row in found["rows"])

    def test_of_one_run_lies_in_its_folder(self, call, world, tmp_path):
        shutil.copytree(world / "sgd", tmp_path / "a")
        assert call("report {tmp}/a")[0] == 0 and (tmp_path / "a" / "report.html").exists()
        shutil.copytree(world / "sgd", tmp_path / "b")
        assert call("report {tmp}/a {tmp}/b")[0] == 0 and (tmp_path / "report.html").exists()

    def test_evaluate_says_the_same_twice_and_tells_the_mean_from_the_average(self, call):
        first, second = (json.loads(call("evaluate {ivon} --json --num-samples 8")[1]) for _ in range(2))
        assert first == second and {"accuracy", "nll", "ece", "brier", "auroc", "aurc"} <= set(first)
        mean, averaged = first["rows"]
        assert averaged["nll"] == first["nll"] != mean["nll"]
        assert {"auroc_ood", "aupr_in", "fpr95"} <= set(json.loads(call("evaluate {ivon} --json --ood {noise}")[1]))
        assert {"classwise_ece", "eaurc", "coverage_at_5_risk"} <= set(first) and "fpr95" not in first

    def test_evaluate_prints_what_there_is_to_say_by_subject(self, call):
        out = call("evaluate {ivon} --ood {noise}")[1]
        subjects = [line for line in out.splitlines() if line in ("calibration", "selective prediction", "unknown data")]
        assert subjects == ["calibration", "selective prediction", "unknown data"] and "E-AURC" in out and "AUPR known" in out
        assert "unknown data" not in call("evaluate {ivon}")[1]


class TestSensitivity:
    def test_prints_losses_and_labels_to_check_and_leaves_a_table_and_a_page(self, call, world, tmp_path):
        shutil.copytree(world / "ivon", tmp_path / "a")
        code, out, err = call("sensitivity {tmp}/a --top 5")
        assert code == 0 and "score" in err and "warning" not in err
        assert all(words in out for words in ("training", "leave-one-out", "test", "The most sensitive 1 % of 140 images carry"))
        assert out.endswith(f"Table: {tmp_path}/a/sensitivity.csv\nPage: {tmp_path}/a/sensitivity.html\n")
        page, table = ((tmp_path / "a" / f"sensitivity.{end}").read_text() for end in ("html", "csv"))
        assert page.startswith("<!doctype html>") and page.count('data-mark="wrong" ') == 5 and len(table.splitlines()) == 141
        assert len([line for line in out.splitlines() if "small.npz x[" in line]) == 5

    def test_as_json(self, call, tmp_path):
        code, out, _ = call("sensitivity {ivon} --out {new} --json --classes --top 3 --subset 70")
        found = json.loads(out)
        assert code == 0 and len(out.splitlines()) == 1
        assert (found["examples"], found["training_examples"], found["score"], len(found["suspects"])) == (70, 140, "loo_loss", 3)
        assert found["loo_nll"] > found["train_nll"] > 0 and found["test_nll"] > 0 and 0 < found["top_share"] < 1
        assert found["suspects"][0]["loo_loss"] >= found["suspects"][1]["loo_loss"] and set(found["classes"]) == {"0", "1", "2"}
        assert found["table"] == str(tmp_path / "new" / "sensitivity.csv")
        assert {path.name for path in (tmp_path / "new").iterdir()} == {
            f"sensitivity.{end}" for end in ("csv", "html", "safetensors")
        }
        curves = {"test_nll", "test_accuracy"}
        mean = json.loads(call("evaluate {ivon} --json")[1])["rows"][0]
        assert [found[name] for name in sorted(curves)] == [pytest.approx(mean[name[5:]]) for name in sorted(curves)]

    def test_a_run_without_a_posterior_says_what_it_does(self, call):
        code, out, err = call("sensitivity {sgd} --out {new}")
        said = [line for line in err.splitlines() if line.startswith("bayesrule:")]
        does = "scores are those of SGD, which rank examples but estimate no leave-one-out loss"
        assert code == 0 and said == [f"bayesrule: warning: SGD leaves no posterior; {does}"]
        assert "leave-one-out" not in out and "by training loss:" in out
        found = json.loads(call("sensitivity {sgd} --out {new} --json")[1])
        assert found["loo_nll"] is None and found["score"] == "loss" and found["suspects"][0]["loo_loss"] is None

    def test_scores_of_another_kind_are_refused(self, call, tmp_path):
        assert call("sensitivity {ivon} --out {new} --subset 20")[0] == 0
        code, out, err = call("sensitivity {ivon} --out {new} --estimator last_layer")
        assert code == 2 and not out and "holds scores of another estimator; remove it, or choose another --out" in err
        (tmp_path / "new" / "sensitivity.safetensors").write_text("x")
        code, out, err = call("sensitivity {ivon} --out {new}")
        assert code == 2 and not out and "is no file of scores" in err and len(err.splitlines()) == 1


def test_json_has_no_nan(capsys):
    print_json({"auroc": float("nan"), "rows": [{"nll": 1.0, "auroc": float("inf")}]})
    assert json.loads(capsys.readouterr().out) == {"auroc": None, "rows": [{"nll": 1.0, "auroc": None}]}


def test_table_prints_every_algorithm(call, monkeypatch):
    row = dict.fromkeys(("family", "expectation", "curvature", "retraction", "rates", "twin", "source"), "x") | {"difference": 1e-9}
    rows = [{"algorithm": name, **row} for name in ("SGD", "IVON", "ridge")]
    monkeypatch.setattr(cli.br, "table", lambda: rows, raising=False)
    code, out, _ = call("table")
    assert code == 0 and all(name in out for name in ("SGD", "IVON", "ridge")) and "1e-09" in out
    assert json.loads(call("table --json")[1]) == {"algorithms": rows}


@pytest.mark.usefixtures("no_pages")
def test_demo_prints_the_table_and_then_has_nothing_to_do(tmp_path, call, monkeypatch):
    tiny = replace(demos.DEMO, data="digits", model="mlp", epochs=1, batch_size=400)
    monkeypatch.setattr(demos.demo, "__defaults__", (tiny, *demos.demo.__defaults__[1:]))
    out = tmp_path / "demo"
    code, first, progress = call(f"demo --out {out}")
    assert code == 0 and "AdamW, temperature" in first and "times as long" in first
    assert "IVON" in progress  # the bars
    code, second, _ = call(f"demo --out {out}")
    assert code == 0 and f"Nothing to do: {out}" in second
    assert first.splitlines()[:8] == second.splitlines()[:8]
    (out / "report.html").unlink()
    assert call(f"demo --out {out}")[0] == 0 and (out / "report.html").exists()
    code, again, _ = call(f"report {out}")
    assert code == 0 and "report.html" in again
    code, again, _ = call(f"evaluate {out} --json")
    assert code == 0 and len(json.loads(again)["rows"]) >= 5


REFUSALS = {
    "unknown data": ("train image --data digit --optimizer sgd --out {new}", "there is no data 'digit'"),
    "unknown model": (f"{TRAIN} {{new}} --model lenett", "unknown model 'lenett'; did you mean 'lenet'"),
    "unknown optimizer": (f"{TRAIN} {{new}} --optimizer ivom", "unknown optimizer 'ivom'; did you mean 'ivon'"),
    "unknown kind": ("train video --data digits --model mlp --optimizer sgd --out {new}", "video"),
    "no kind": ("train", "image"),
    "no data": ("train image --optimizer sgd --out {new}", "--data"),
    "no place": ("train image --data {data} --optimizer sgd", "--out"),
    "negative rate": (f"{TRAIN} {{new}} --lr -1", "lr must be a number in [0, inf), got -1.0"),
    "no such setting": (f"{TRAIN} {{new}} --optimizer sgd --ess 5", "sgd has no setting ess"),
    "no epochs": (f"{TRAIN} {{new}} --epochs 0", "epochs must be at least 1, got 0"),
    "no batch": (f"{TRAIN} {{new}} --batch-size -3", "batch_size must be at least 1, got -3"),
    "no seeds": (f"{TRAIN} {{new}} --seeds 0", "seeds must be at least 1, got 0"),
    "three sides": (f"{TRAIN} {{new}} --size 1 2 3", "size must be one number of pixels, or height and width; got 1 2 3"),
    "unknown schedule": (f"{TRAIN} {{new}} --schedule cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
    "unknown change": (f"{TRAIN} {{new}} --augment shift flop", "unknown augmentation 'flop'; did you mean 'flip'"),
    "unknown precision": (f"{TRAIN} {{new}} --precision bf", "unknown precision 'bf'"),
    "unknown class": (f"{TRAIN} {{new}} --held-out 7", "there is no class '7'"),
    "shares": (f"{TRAIN} {{new}} --split 0.9 0.3", "split must be two shares"),
    "a table of images": (f"{TRAIN} {{new}} --target y", "it is no table"),
    "rows as images": ("train image --data {table} --optimizer sgd --out {new}", "take: bayesrule train tabular"),
    "images as rows": ("train tabular --data {data} --optimizer sgd --out {new}", "take: bayesrule train image"),
    "one class": ("train image --data {one} --optimizer sgd --out {new}", "has one class only"),
    "no such column": (f"{TABLE} {{new}} --target colour", "has no column 'colour'; did you mean 'color'"),
    "set without a value": (f"{TRAIN} {{new}} --set lr", "--set takes key=value, got 'lr'"),
    "set twice": (f"{TRAIN} {{new}} --set beta1=0.5 --set beta1=0.6", "--set gives beta1 twice, 0.5 and 0.6; drop one"),
    "set and said": (f"{TRAIN} {{new}} --set lr=0.5 --lr 0.6", "--lr and --set both give lr; drop one"),
    "set and said, two words": (f"{TRAIN} {{new}} --set hess_init=1 --hess-init 2", "--hess-init and --set both give hess_init"),
    "set something unknown": (
        f"{TRAIN} {{new}} --set momentun=0.5 --optimizer sgd",
        "has no setting momentun (got 0.5); did you mean",
    ),
    "set a list": (f"{TRAIN} {{new}} --set lr=[1]", "--set lr takes a number, true, false or a word, got [1]"),
    "set a word": (f"{TRAIN} {{new}} --set lr=fast", "lr"),
    "diverged": (f"{TRAIN} {{new}} --optimizer torch-sgd --lr 1e30", "training diverged in epoch 1"),
    "folder of another run": (f"{TRAIN} {{ivon}}", "already holds another run"),
    "folder of other files": (f"{TRAIN} {{tmp}}/foreign", "already holds other files"),
    "resume of other files": (f"{TRAIN} {{tmp}}/foreign --resume", "already holds other files"),
    "resume of nothing": ("train image --resume --out {new}", "--data"),
    "resume of a finished run with other data": (
        "train image --resume --out {ivon} --data digits",
        "are no longer those that it began with",
    ),
    "demo into another run": ("demo --out {ivon}", "already holds another run"),
    "demo into other files": ("demo --out {tmp}/foreign", "already holds other files"),
    "no run": ("evaluate {new}", "there is no run folder"),
    "no runs": ("report", "report takes the folder of at least one run"),
    "not a run": ("report {tmp}/foreign", "is not a run folder"),
    "one of two is none": ("report {ivon} {new} --out {tmp}/page.html", "there is no run folder"),
    "no draws": ("evaluate {ivon} --num-samples 0", "num_samples must be a whole number >= 1, got 0"),
    "other data of another kind": ("evaluate {ivon} --ood {table}", "and the model takes images"),
    "no place for a page": ("report {ivon} --out {new}/deep/page.html", "page.html: No such file"),
    "below a file": (f"{TRAIN} {{tmp}}/foreign/thesis.tex/run", "thesis.tex"),
    "no such command": ("evalute {ivon}", "evalute"),
    "no such flag": (f"{TRAIN} {{new}} --momentum 3", "--momentum"),
    "not a number": (f"{TRAIN} {{new}} --epochs many", "many"),
    "no run to rank": ("sensitivity {new}", "there is no run folder"),
    "no run to rank, other files": ("sensitivity {tmp}/foreign", "is not a run folder"),
    "no examples": ("sensitivity {ivon} --subset 0", "subset must be at least 1, got 0"),
    "no labels": ("sensitivity {ivon} --top -1", "top must be at least 1, got -1"),
    "no such score": ("sensitivity {ivon} --score lo_loss", "lo_loss"),
    "no such estimator": ("sensitivity {ivon} --estimator exact", "exact"),
    "a score that needs a posterior": ("sensitivity {sgd} --score gap", "--score gap needs a posterior"),
    "classes without a posterior": ("sensitivity {sgd} --classes --out {new}", "--classes needs a posterior"),
    "scores into a file": ("sensitivity {ivon} --out {tmp}/foreign/thesis.tex", "thesis.tex: File exists"),
    "no data to look at": ("data {tmp}/nothing", "there is no data"),
    "an empty folder to look at": ("data {tmp}/foreign", "nothing to learn from"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_exit_code_2_and_nothing_written(name, call, world, tmp_path):
    command, message = REFUSALS[name]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}
    code, out, err = call(command)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("bayesrule:")]
    assert len(lines) == 1 and message in lines[0]
    bars = [line for line in err.splitlines() if line not in lines]
    assert all(line.split()[0] in ("look", "predict") or name == "diverged" for line in bars)
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {each for each in left if name != "diverged" or not each.startswith("new")} == {"foreign", "foreign/thesis.tex"}


@pytest.mark.parametrize("flag", ["--model mlq", "--optimizer ivom", "--set momentun=1", "--device tpu", "--norm layer"])
def test_what_the_flags_alone_show_is_said_before_data_are_read(flag, call, monkeypatch):
    monkeypatch.setattr(settings, "read", lambda *_, **__: pytest.fail("data were read"))
    assert call(f"{TRAIN} {{new}} {flag}")[0] == 2


def test_tensorboard_that_is_not_installed_is_one_line(call, tmp_path, monkeypatch):
    if importlib.util.find_spec("tensorboard") is not None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = call(f"{TRAIN} {{new}} --tensorboard")
    assert code == 2 and "--tensorboard needs tensorboard, which is not installed" in err and not (tmp_path / "new").exists()


def test_a_missing_extra_is_one_line_and_exit_code_2():
    code = "import sys; sys.modules['tyro'] = None; from bayesrule.cli import main; sys.exit(main(['table']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'bayesrule: the command line needs tyro, which is not installed: pip install "bayesrule[cli]"'
    ]


@pytest.mark.parametrize("command", ["table", "table --json"])
def test_an_interrupt_is_one_line(command, call, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.br, "table", interrupt, raising=False)
    code, _, err = call(command)
    assert code == 130 and err == "bayesrule: interrupted; nothing was kept\n"


def test_an_interrupt_while_data_are_read_leaves_nothing(call, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(settings, "read", interrupt)
    code, _, err = call(f"{TRAIN} {{new}}")
    assert code == 130 and err == "bayesrule: interrupted; nothing was kept\n" and not (tmp_path / "new").exists()


def test_too_little_memory_is_one_line(call, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(settings, "read", full)
    code, _, err = call(f"{TRAIN} {{new}}")
    assert code == 2 and "there is not enough memory" in err and not (tmp_path / "new").exists()


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def broken():
        raise RuntimeError("ours")

    monkeypatch.setattr(cli.br, "table", broken, raising=False)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["table"])


def test_commands_leave_threads_and_randomness_of_torch_alone(call):
    before, state = torch.get_num_threads(), torch.get_rng_state()
    call("evaluate {ivon} --num-samples 4")
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)


def test_names_of_classes_are_no_markup(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (60, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["[/b]", "[red]a", "c"] * 20))
    assert cli.main(["data", str(tmp_path / "a.npz")]) == 0
    out, _ = capsys.readouterr()
    assert "[/b]" in out and "[red]a" in out
