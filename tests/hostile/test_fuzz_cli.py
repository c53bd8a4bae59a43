"""A person's damaged data on the command line: a run, or one line and exit code 2; never a traceback, never a hang."""

import random
import shutil

import pytest
from tests.hostile.test_fuzz_data import LIMIT, MAKERS, alarm, mutate

from bayesrule import cli

SEEDS = 24
FLAGS = ("--optimizer", "sgd", "--model", "mlp", "--epochs", "1", "--split", "0.5", "0.25")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_mutants_on_the_command_line(tmp_path, capsys, kind):
    made = tmp_path / "made"
    made.mkdir()
    MAKERS[kind](made)
    codes = []
    for seed in range(SEEDS):
        rng = random.Random(f"cli {kind} {seed}")
        root, out = tmp_path / f"data{seed}", tmp_path / f"run{seed}"
        shutil.copytree(made, root)
        what = f"{kind}, seed {seed}: {mutate(root, rng)}"
        files = sorted(root.iterdir())
        spec = files[0] if len(files) == 1 and files[0].suffix in (".npz", ".csv", ".tsv", ".gz") else root
        with alarm(4 * LIMIT, what):
            for command in ("data", "train image", "train tabular"):
                words = [*command.split(), str(spec)] if command == "data" else [*command.split(), "--data", str(spec)]
                if command != "data":
                    words += ["--out", str(out), *FLAGS]
                code = cli.main(words)
                _, err = capsys.readouterr()
                said = [
                    line for line in err.splitlines() if line.startswith("bayesrule: ") and not line.startswith("bayesrule: note")
                ]
                assert code in (0, 2), what
                if code == 2:
                    assert len(said) == 1 and said[0].isprintable() and "Traceback" not in err, f"{what}: {err}"
                    assert not out.exists() or (out / "run.json").exists(), what
                codes.append(code)
                shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(root)
    learnable = {0} if kind not in ("cifar-100", "idx", "idx packed") else set()  # one image a class; all images alike
    assert {2} | learnable <= set(codes)
