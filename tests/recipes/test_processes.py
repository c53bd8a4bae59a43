"""Several processes that train one model: shares, agreement, one voice, and an end that is the same whatever ends one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tests.recipes.stopped import COMPARED, assert_equal, content

from bayesrule import cli
from bayesrule.recipes.augmentation import augmentation
from bayesrule.recipes.folder import read_lines, read_record
from bayesrule.recipes.workers import ALONE, Elsewhere, Workers, is_loss, join, numbers_of

FOUND = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class TestShares:
    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    @pytest.mark.parametrize("count", [1, 2, 4, 7, 12])
    def test_the_average_of_weighted_means_is_the_mean_of_the_batch(self, size, count):
        values = torch.arange(count).double().square()
        shares = [Workers(rank, size).share(count) for rank in range(size)]
        average = sum(values[share].mean() * weight for share, weight in shares) / size
        torch.testing.assert_close(average, values.mean())
        seen = torch.cat([values[share] for share, weight in shares if weight])
        assert sorted(seen.tolist()) == values.tolist()

    def test_one_alone_has_everything_and_agrees_with_itself(self):
        assert ALONE.is_first and ALONE.share(5) == (slice(0, None, 1), 1.0)
        assert (
            ALONE.total(1.5, 2) == [1.5, 2] and ALONE.any(True) and not ALONE.any(False) and ALONE.says("so") and ALONE.says("so")
        )
        assert ALONE.first(lambda: {1: 2}) == {1: 2} and ALONE.together(lambda: [3]) == [3]
        with pytest.raises(OSError, match="gone"), ALONE:
            ALONE.first(lambda: (_ for _ in ()).throw(OSError("gone")))

    def test_seeds_differ_by_step_and_process(self):
        seeds = {Workers(rank, 3).seed(0, step) for rank in range(3) for step in range(50)}
        assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)

    @pytest.mark.parametrize("names", [["shift"], ["flip"], ["shift", "flip"]])
    def test_images_are_changed_as_one_process_would(self, names):
        images, change = torch.rand(7, 1, 16, 16), augmentation(names)
        whole = change(images, torch.Generator().manual_seed(3))
        for rank in range(3):
            share, _ = Workers(rank, 3).share(7)
            part = change(images[share], torch.Generator().manual_seed(3), (7, share))
            assert torch.equal(part, whole[share])


class TestWhoIsThere:
    def test_without_torchrun_one_is_alone(self):
        assert numbers_of({}) == numbers_of({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1, 0)
        assert join({}) is ALONE

    def test_with_it_one_is_among_others(self):
        assert numbers_of(FOUND) == (1, 2, 1) and numbers_of({**FOUND, "LOCAL_RANK": "0"}) == (1, 2, 0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"WORLD_SIZE": "two"},
                "WORLD_SIZE must be a whole number, got 'two'; start several processes with torchrun, or unset it",
            ),
            ({"RANK": "-1"}, "RANK must be a whole number, got '-1'"),
            ({"RANK": "2"}, r"RANK must be below WORLD_SIZE \(2\), got 2"),
            (
                {"MASTER_ADDR": None},
                "WORLD_SIZE is 2, but MASTER_ADDR is not set; start several processes with torchrun, or unset it",
            ),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            numbers_of({name: value for name, value in {**FOUND, **changes}.items() if value is not None})

    def test_the_command_refuses_it_in_one_line(self, monkeypatch, capsys):
        monkeypatch.setattr(cli, "join", lambda: numbers_of({"WORLD_SIZE": "2", "RANK": "0"}))
        assert cli.main(["table"]) == 2
        assert capsys.readouterr().err == (
            "bayesrule: WORLD_SIZE is 2, but MASTER_ADDR is not set; start several processes with torchrun, or unset it\n"
        )

    def test_a_gpu_that_is_not_there_is_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        Workers(0, 2, 0).check(torch.device("cuda"))
        Workers(1, 2, 1).check(torch.device("cpu"))
        ALONE.check(torch.device("cuda"))
        with pytest.raises(ValueError, match=r"process 1 has no GPU: there are 1 here, and it is number 1 from 0; start fewer"):
            Workers(1, 2, 1).check(torch.device("cuda"))

    def test_another_that_has_gone_is_told_from_a_mistake(self):
        assert is_loss(Elsewhere()) and is_loss(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
        assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_loss(ValueError("gloo"))


# Two processes

PROGRAM = """
import math, os, signal, sys
import torch
torch.set_num_threads(1)
from bayesrule.recipes import runs
from bayesrule.recipes.training import Training
from bayesrule.cli import main
runs.EVERY, runs.EFFORT = 0.0, math.inf  # a checkpoint after every step
victims, number = os.environ.get("VICTIMS", "").split(","), int(os.environ.get("SIGNAL", "9"))
steps = int(os.environ.get("STEPS", "0"))
real = Training._step

def step(training, *rest):
    if training.done == steps and os.environ["RANK"] in victims:
        os.kill(os.getpid(), number)
    return real(training, *rest)

Training._step = step
sys.exit(main())
"""

NETS = """
import os
from torch import nn

def dropout(shape, classes):
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.4), nn.BatchNorm1d(16), nn.Linear(16, classes))

class Idle(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Linear(4, classes))
        self.idle = nn.Parameter(self[0].bias.detach().clone())

    def forward(self, x):
        return self[0](x)

def idle(shape, classes):
    return Idle(classes)

class Fragile(nn.Linear):
    def forward(self, x):
        if self.training and os.environ["RANK"] in os.environ["FRAGILE"]:
            raise RuntimeError("out of luck")
        return super().forward(x)

def fragile(shape, classes):
    return Fragile(4, classes)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A table of 97 rows for training, 21 and 22 for the rest, images, models, and the program."""
    folder = tmp_path_factory.mktemp("world")
    values = np.random.default_rng(0).normal(size=(140, 4))
    classes = np.where(values[:, 0] + values[:, 1] * values[:, 2] > 0.1, "red", "blue")
    rows = [",".join([*(f"{v:.4f}" for v in row), name]) for row, name in zip(values, classes, strict=True)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,d,color", *rows]))
    digits = load_digits(n_class=3)
    np.savez(folder / "small.npz", x=digits.images[:200].astype(np.uint8) * 15, y=digits.target[:200])
    (folder / "nets_of_many.py").write_text(NETS)
    (folder / "program.py").write_text(PROGRAM)
    return folder


@pytest.fixture(scope="module")
def call(world):
    """Exit code, stdout and stderr of a command in so many processes under torchrun."""

    def call(command, size=2, **surroundings):
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        around = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{world}", **surroundings}
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        start = [*start, str(world / "program.py")] if size > 1 else [sys.executable, "-m", "bayesrule"]
        done = subprocess.run([*start, *map(str, command)], env=around, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture(scope="module")
def train(world, call):
    """The same of a training on the table."""

    def train(out, *more, size=2, **surroundings):
        given = {"--data": world / "table.csv", "--optimizer": "ivon", "--epochs": 3, "--batch-size": 16, "--out": out}
        given |= dict(zip(more[::2], more[1::2], strict=True))
        return call(["train", "tabular", *(word for pair in given.items() for word in pair)], size, **surroundings)

    return train


def said(err):
    return [line for line in err.splitlines() if line.startswith("bayesrule: ")]


def codes(err):
    """The exit codes that torchrun reports."""
    return [int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", err)]


def differ(first, second):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_one_of_them_writes(train, tmp_path):
    assert train(tmp_path / "one", size=1)[0] == 0
    code, out, err = train(tmp_path / "two")
    assert code == 0 and out.count("IVON, mean") == 1 and out.count("Report:") == 1 and said(err) == []
    assert differ(tmp_path / "two", tmp_path / "one") < 1e-5
    assert {path.name for path in (tmp_path / "two").iterdir()} == {*COMPARED, "run.json", "report.html"}
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert [read_record(tmp_path / name)["processes"] for name in ("one", "two")] == [1, 2]


@pytest.mark.slow
def test_a_last_batch_of_one_and_a_parameter_without_use(train, tmp_path):
    for name, size in (("one", 1), ("two", 2)):
        more = ("--model", "nets_of_many:idle", "--optimizer", "adamw", "--batch-size", "48")  # 97 are 48, 48 and 1
        assert train(tmp_path / name, *more, size=size)[0] == 0
    assert differ(tmp_path / "two", tmp_path / "one") < 1e-5


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A run of two processes that nothing stopped: dropout, batch norm, and patience that looks for the best epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, *DROPOUT)[0] == 0
    (folder / "report.html").unlink()
    return folder


DROPOUT = ("--model", "nets_of_many:dropout", "--patience", "3", "--batch-size", "20")


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["0", "1", "0,1"])
def test_killed_at_any_of_them_a_run_goes_on_and_ends_bit_equal(victims, train, call, whole, tmp_path):
    out = tmp_path / "run"
    code, _, err = train(out, *DROPOUT, VICTIMS=victims, STEPS="9")
    assert code != 0 and -signal.SIGKILL in codes(err) and (out / "checkpoint.safetensors").exists()
    if victims == "1":
        (line,) = said(err)
        assert line == (
            f"bayesrule: another process of the run has ended; go on with: bayesrule train tabular --resume --out {out}"
        )
    code, _, err = call(["train", "tabular", "--resume", "--out", out])
    assert code == 0 and said(err) == []
    (out / "report.html").unlink()
    assert_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["0", "1"])
def test_a_signal_to_any_of_them_stops_all_and_saves_and_another_number_is_warned_of(victims, train, call, whole, tmp_path):
    out = tmp_path / "run"
    code, _, err = train(out, *DROPOUT, VICTIMS=victims, STEPS="9", SIGNAL=str(int(signal.SIGINT)))
    (line,) = said(err)
    assert code != 0 and line.startswith("bayesrule: stopped after step 10 of 15 and saved; go on with: bayesrule train tabular")
    if victims == "0":
        code, _, err = call(["train", "tabular", "--resume", "--out", out])
        (out / "report.html").unlink()
        assert code == 0 and said(err) == [] and content(out) == content(whole)
    else:
        code, _, err = call(["train", "tabular", "--resume", "--out", out], size=1)
        (line,) = said(err)
        assert code == 0 and line == (
            f"bayesrule: warning: {out} began in 2 processes and goes on in 1: it will not end bit-equal to one that was not "
            "stopped; for that, start 2"
        )


def apart(command, world, **surroundings):
    """Two processes without torchrun, which would stop one when the other ends: their exit codes, and what both say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    around |= {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{world}", **surroundings}
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "bayesrule", *map(str, command)],
            env={**around, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60) for process in begun]
    finally:
        for process in begun:
            process.kill()
    return [process.returncode for process in begun], [out for out, _ in said], "".join(err for _, err in said)


TABLE = ["train", "tabular", "--optimizer", "sgd", "--epochs", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*TABLE, "--data", "{world}/table.csv", "--out", "{full}"], "already holds other files; choose another --out"),
        ([*TABLE, "--data", "{world}/none.csv", "--out", "{new}"], "none.csv"),
        ([*TABLE, "--data", "{world}/table.csv", "--out", "{new}", "--lr", "1e30"], "training diverged in epoch 1"),
        ([*TABLE, "--out", "{new}"], "data"),
        (["demo", "--out", "{new}"], "only bayesrule train runs in several processes, and these are 2; start this one alone"),
    ],
)
def test_what_is_refused_is_said_once_and_ends_all(command, message, world, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    places = {"world": world, "full": tmp_path / "full", "new": tmp_path / "new"}
    codes, outs, err = apart([word.format(**places) for word in command], world)
    (line,) = said(err)
    assert codes == [2, 2] and outs == ["", ""] and message in line and "Traceback" not in err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(("fragile", "lines"), [("0", 1), ("1", 2), ("01", 1)])
def test_whoever_fails_in_training_all_end(fragile, lines, world, tmp_path):
    command = [*TABLE, "--data", world / "table.csv", "--model", "nets_of_many:fragile", "--out", tmp_path / "new"]
    codes, outs, err = apart(command, world, FRAGILE=fragile)
    words = sorted(said(err))
    assert codes == [2, 2] and outs == ["", ""] and len(words) == lines and "Traceback" not in err
    assert "nets_of_many:fragile failed in training: RuntimeError: out of luck" in words[-1]
    assert lines == 1 or words[0].startswith("bayesrule: another process of the run has ended; go on with: ")


@pytest.mark.slow
def test_torchrun_hears_of_a_refusal_and_json_is_one_object(world, call, train, tmp_path):
    begun = ["train", "image", "--data", world / "small.npz", "--optimizer", "ivon", "--model", "lenet", "--epochs", "1"]
    code, out, err = call([*begun, "--augment", "shift", "--seeds", "2", "--json", "--out", tmp_path / "run"])
    assert code == 0 and len(out.splitlines()) == 1 and json.loads(out)["seeds"] == 2
    code, out, err = train(tmp_path / "run")
    (line,) = said(err)
    assert code == 1 and out == "" and "already holds another run" in line and set(codes(err)) == {2}
