"""A GPT in two processes: each has windows of its own, and a run that is killed ends bit-equal to one that was not."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.test_language import assert_equal

PROGRAM = """
import math, os, sys
import torch
torch.set_num_threads(1)
from bayesrule.recipes import runs
from bayesrule.recipes.gpt import Training
from bayesrule.cli import main
runs.EVERY, runs.EFFORT = 0.0, math.inf  # a checkpoint after every step
victim, steps = os.environ.get("VICTIM"), int(os.environ.get("STEPS", "0"))
real = Training._step

def step(training):
    if training.done == steps and os.environ["RANK"] == victim:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return real(training)

Training._step = step
sys.exit(main())
"""
TINY = [
    "--layers",
    "1",
    "--heads",
    "2",
    "--width",
    "16",
    "--context",
    "12",
    "--steps",
    "7",
    "--batch-size",
    "4",
    "--every",
    "3",
    "--dropout",
    "0.1",
]


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Exit code and stderr of a command in two processes under torchrun."""
    world = tmp_path_factory.mktemp("world")
    (world / "program.py").write_text(PROGRAM)
    (world / "sums.txt").write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(500)))

    def call(*words, size=2, **surroundings):
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
            str(world / "program.py"),
        ]
        words = [str(word).format(text=world / "sums.txt") for word in words]
        around = {**kept, "OMP_NUM_THREADS": "1", **surroundings}
        done = subprocess.run([*start, "train", "gpt", *words], env=around, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    return call


WAYS = {
    "one draw": ["--optimizer", "ivon"],
    "fresh draws": ["--optimizer", "ivon", "--fresh-draws", "--accumulate", "2"],
    "matrices": ["--optimizer", "evon", "--fresh-draws", "--accumulate", "2"],
    "shards": ["--optimizer", "ivon", "--shard"],
    "shards of AdamW": ["--optimizer", "torch-adamw", "--shard"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_process_a_run_goes_on_and_ends_bit_equal(way, call, tmp_path):
    code, err = call("--data", "{text}", *TINY, *WAYS[way], "--out", tmp_path / "whole")
    assert code == 0, err
    for victim, number in (("0", signal.SIGKILL), ("1", signal.SIGINT)):
        out = tmp_path / victim
        code, err = call("--data", "{text}", *TINY, *WAYS[way], "--out", out, VICTIM=victim, STEPS="4", SIGNAL=str(int(number)))
        assert code != 0 and (out / "checkpoint.safetensors").exists()
        if number == signal.SIGINT:
            assert "bayesrule: stopped after step 5 of 7 and saved; go on with: bayesrule train gpt --resume" in err
        code, err = call("--resume", "--out", out)
        assert code == 0, err
        for folder in (out, tmp_path / "whole"):
            (folder / "report.html").unlink(missing_ok=True)
        assert_equal(out, tmp_path / "whole")


PUBLISHED = ["--lr", "1", "--hess-init", "1e-3", "--beta2", "0.99999", "--set", "hess_approx=price", "--set", "clip_radius=1e-3"]
ONCE = [*TINY[:-2], "--warmup", "0"]
ONCE[ONCE.index("--steps") + 1] = "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "near"),
    [
        ([*TINY[:-2], *PUBLISHED], dict(atol=1e-6, rtol=1e-4)),
        (ONCE, dict(atol=1e-4, rtol=1e-3)),  # where gradients are all but zero, their rounding is divided by their squares
    ],
    ids=["published", "squares, one step"],
)
def test_shards_do_what_copies_do_and_other_numbers_of_processes_are_refused(words, near, call, tmp_path):
    for name, more in {"copies": [], "shards": ["--shard"]}.items():
        code, err = call("--data", "{text}", "--optimizer", "ivon", *words, *more, "--out", tmp_path / name)
        assert code == 0, err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("copies", "shards"))
    assert all(torch.allclose(first[name], second[name], atol=near["atol"]) for name in first)
    first, second = (load_file(tmp_path / name / "posterior.safetensors") for name in ("copies", "shards"))
    assert first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=near["rtol"]) for name in first if "mean" not in name
    )
    code, err = call("--data", "{text}", *TINY, "--out", tmp_path / "new", VICTIM="0", STEPS="4", SIGNAL="2")
    code, err = call("--resume", "--out", tmp_path / "new", size=1)
    (line,) = [line for line in err.splitlines() if line.startswith("bayesrule:")]
    assert code == 1 and line.endswith("began in 2 processes, not 1: batches would differ; start as many")
