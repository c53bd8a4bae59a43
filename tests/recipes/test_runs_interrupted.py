"""A run beside other processes, on a full disk, killed: what is on the disk stays whole, and it goes on."""

import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tests.recipes.stopped import COMPARED, Crash, assert_equal, at_step, content, crash

from bayesrule import cli
from bayesrule.recipes import runs
from bayesrule.recipes.folder import locked
from bayesrule.recipes.runs import train
from bayesrule.recipes.settings import Settings


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


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(((3, signal.SIGKILL), (11, signal.SIGINT)), id="twice"),
        pytest.param(((3, signal.SIGKILL), (7, signal.SIGKILL), (11, signal.SIGINT)), id="thrice", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_and_interrupted_goes_on_and_ends_bit_equal(ends, tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    chosen = Settings("digits", "ivon", "mlp", epochs=20, batch_size=150)
    begun = [sys.executable, "-c", PROGRAM, *command(chosen, out)]

    def lines():
        return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0

    moments = random.Random(5)
    for aim, number in ends:
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
