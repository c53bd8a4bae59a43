"""The matrix {host} x {accumulation} x {precision}. `make integrations` prints it and keeps it in docs/integrations.md."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.integrations.matrix import CELLS, SAVED, Cell, Host, Killed, same

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).parents[2]
HOSTS = {
    "plain loop": ("host_loops", "PlainLoop", ()),
    "Lightning": ("host_lightning", "Lightning", ("lightning",)),
    "HF Trainer": ("host_transformers", "HuggingFace", ("transformers", "accelerate", "peft")),
    "Accelerate": ("host_accelerate", "Accelerate", ("accelerate",)),
    "PEFT LoRA": ("host_transformers", "Adapters", ("transformers", "accelerate", "peft")),
    "torch.compile": ("host_loops", "Compiled", ()),
}


def the_host(name: str) -> Host:
    module, kind, needed = HOSTS[name]
    for framework in needed:
        pytest.importorskip(framework, reason=f"{framework} is not installed: make integrations installs it")
    return getattr(importlib.import_module(f"tests.integrations.{module}"), kind)()


def die() -> None:
    raise Killed


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.accumulation}-{cell.precision}")
@pytest.mark.parametrize("name", HOSTS)
def test_cell(name: str, cell: Cell, tmp_path: Path, record_property) -> None:
    host = the_host(name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()

    spy = host.fit(whole, cell)
    spy.check()
    run = spy.trace()
    same(run, host.reference(cell, spy))
    assert torch.equal(host.saved(whole, cell), run.means[SAVED])

    with pytest.raises(Killed):
        host.fit(cut, cell, kill=die)
    resumed = host.fit(cut, cell, resume=True)
    resumed.check()
    same(resumed.trace(), run, begun=SAVED)
    record_property("cell", (name, cell.accumulation, cell.precision, "same bits"))


@pytest.mark.parametrize("name", ["plain loop", "Lightning", "HF Trainer"])
def test_a_process_that_is_killed_goes_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    host, cell = the_host(name), Cell(4, "fp32")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    command = [sys.executable, "-m", "tests.integrations.killed", name, str(cut)]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    spy = host.fit(whole, cell)
    resumed = host.fit(cut, cell, resume=True)
    same(resumed.trace(), spy.trace(), begun=SAVED)
