"""The command line: what it prints, what it refuses, and that a refusal is one line and exit code 2."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bayesrule import cli
from bayesrule.recipes import demo as demos
from bayesrule.recipes.image import Settings, train

TRAIN = "train image --data digits --model mlp --optimizer ivon --epochs 1 --batch-size 300 --out"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ivon"
    train(Settings("digits", "mlp", "ivon", {}, epochs=2, batch_size=300), out)
    return out


def call(command, capsys):
    """Exit code, stdout and stderr of a command."""
    return cli.main(command.split()), *capsys.readouterr()


def test_train_leaves_a_run_and_prints_its_metrics(tmp_path, capsys):
    code, out, _ = call(f"{TRAIN} {tmp_path / 'run'}", capsys)
    assert code == 0 and "accuracy" in out and "Report:" in out
    assert (tmp_path / "run" / "posterior.safetensors").exists()


@pytest.mark.parametrize("command", ["evaluate {run} --json", "table --json", TRAIN + " {new} --json"])
def test_json_is_exactly_one_object(run, tmp_path, capsys, command):
    code, out, _ = call(command.format(run=run, new=tmp_path / "new"), capsys)
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_json_of_evaluate_has_the_keys_of_evaluate_and_no_nan(run, capsys):
    _, out, _ = call(f"evaluate {run} --json", capsys)
    assert {"accuracy", "nll", "ece", "brier", "auroc", "aurc"} <= set(json.loads(out))
    cli._print_json({"auroc": float("nan"), "rows": [{"nll": 1.0, "auroc": float("inf")}]})
    assert json.loads(capsys.readouterr().out) == {"auroc": None, "rows": [{"nll": 1.0, "auroc": None}]}


def test_evaluate_says_the_same_twice_and_tells_the_mean_from_the_average(run, capsys):
    first, second = (json.loads(call(f"evaluate {run} --json --num-samples 8", capsys)[1]) for _ in range(2))
    assert first == second
    mean, averaged = first["rows"]
    assert averaged["nll"] == first["nll"] != mean["nll"]


def test_table_prints_every_algorithm(capsys):
    code, out, _ = call("table", capsys)
    assert code == 0
    assert all(name in out for name in ("SGD", "RMSprop", "AdamW", "IVON", "ridge", "Newton"))


def test_report_is_written_again(run, capsys):
    (run / "report.html").unlink()
    code, out, _ = call(f"report {run}", capsys)
    assert code == 0 and str(run / "report.html") in out
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_demo_prints_the_table_and_then_has_nothing_to_do(tmp_path, capsys, monkeypatch):
    tiny = replace(demos.DEMO, data="digits", model="mlp", epochs=1, batch_size=400)
    monkeypatch.setattr(demos.demo, "__defaults__", (tiny, *demos.demo.__defaults__[1:]))
    out = tmp_path / "demo"
    code, first, progress = call(f"demo --out {out}", capsys)
    assert code == 0 and "AdamW, temperature" in first and "times as long" in first
    assert "IVON" in progress  # the bars
    code, second, _ = call(f"demo --out {out}", capsys)
    assert code == 0 and f"Nothing to do: {out}" in second
    assert first.splitlines()[:8] == second.splitlines()[:8]
    (out / "report.html").unlink()
    assert call(f"demo --out {out}", capsys)[0] == 0 and (out / "report.html").exists()
    code, again, _ = call(f"report {out}", capsys)
    assert code == 0 and "report.html" in again


REFUSALS = {
    "unknown data": (f"{TRAIN} {{new}} --data digit", "unknown data 'digit'; did you mean 'digits'"),
    "unknown model": (f"{TRAIN} {{new}} --model lenett", "unknown model 'lenett'; did you mean 'lenet'"),
    "unknown optimizer": (f"{TRAIN} {{new}} --optimizer ivom", "unknown optimizer 'ivom'; did you mean 'ivon'"),
    "unknown kind": ("train video --data digits --model mlp --optimizer sgd --out {new}", "video"),
    "negative rate": (f"{TRAIN} {{new}} --lr -1", "lr must be a number in [0, inf), got -1.0"),
    "no such setting": (f"{TRAIN} {{new}} --optimizer sgd --ess 5", "sgd has no ess"),
    "no epochs": (f"{TRAIN} {{new}} --epochs 0", "epochs must be at least 1, got 0"),
    "folder of another run": (f"{TRAIN} {{run}}", "already holds another run"),
    "folder of other files": (f"{TRAIN} {{foreign}}", "already holds other files"),
    "demo into another run": ("demo --out {run}", "already holds another run"),
    "demo into other files": ("demo --out {foreign}", "already holds other files"),
    "no run": ("evaluate {new}", "there is no run folder"),
    "not a run": ("report {foreign}", "is not a run folder"),
    "no draws": ("evaluate {run} --num-samples 0", "num_samples must be a whole number >= 1, got 0"),
    "no place": (f"{TRAIN} {{foreign}}/thesis.tex/run", "thesis.tex: File exists"),
    "no such command": ("evalute {run}", "evalute"),
    "no such flag": (f"{TRAIN} {{new}} --momentum 3", "--momentum"),
    "not a number": (f"{TRAIN} {{new}} --epochs many", "many"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_exit_code_2_and_nothing_written(name, run, tmp_path, capsys):
    command, message = REFUSALS[name]
    foreign, new = tmp_path / "foreign", tmp_path / "new"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in run.iterdir()}
    code, out, err = call(command.format(run=run, new=new, foreign=foreign), capsys)
    assert code == 2 and out == ""
    assert err.startswith("bayesrule: ") and len(err.splitlines()) == 1 and message in err
    assert not new.exists() and [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    assert before == {p: p.stat().st_mtime_ns for p in run.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"foreign"}


def test_a_missing_extra_is_one_line_and_exit_code_2():
    code = "import sys; sys.modules['tyro'] = None; from bayesrule.cli import main; sys.exit(main(['table']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'bayesrule: the command line needs tyro, which is not installed: pip install "bayesrule[cli]"'
    ]


def test_a_killed_run_leaves_nothing(tmp_path):
    command = f"train image --data digits --optimizer sgd --epochs 100000 --out {tmp_path / 'run'}"
    killed = subprocess.Popen([sys.executable, "-m", "bayesrule.cli", *command.split()], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.terminate()
    assert "bayesrule: interrupted; nothing was kept" in killed.communicate(timeout=60)[1]
    assert killed.returncode == 130 and not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.br, "table", interrupt, raising=False)
    code, _, err = call("table", capsys)
    assert code == 130 and err == "bayesrule: interrupted; nothing was kept\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def broken():
        raise RuntimeError("ours")

    monkeypatch.setattr(cli.br, "table", broken, raising=False)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["table"])


def test_commands_leave_the_threads_of_torch_alone(run, capsys):
    before = torch.get_num_threads()
    call(f"evaluate {run}", capsys)
    assert torch.get_num_threads() == before
