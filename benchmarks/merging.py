"""Checkpoints of 540 MB merged on disk, beside plain reading and writing of the files, and beside mergekit where it is installed.

mergekit runs as a command, in an environment of its own: ``pip install mergekit==0.1.5`` there, its mergekit-yaml on the PATH or
in the variable MERGEKIT.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from bayesrule.uses.merging.streaming import merge_checkpoints
from benchmarks import child
from benchmarks.ledger import Settings, Table
from benchmarks.memory import highest, peak_since_reset
from benchmarks.timing import Lap, Laps, Neighbors, digits, interleave, ratio, spread, typical

NAMES = ("base", "one", "two", "three")
PLAIN, OURS, COMMAND, MERGEKIT = "reading and writing the files", "merge_checkpoints", "bayesrule merge", "mergekit-yaml"
WEIGHTS = "model.safetensors"
METHOD = "linear"


def models(root: Path) -> None:
    """SmolLM2-135M in float32, and three copies that were moved at random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bayesrule.recipes.pretrained import find, silence

    checkpoint = find("smollm2")
    with silence():
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, **checkpoint.how)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, **checkpoint.how)
    model.hf_quantizer = None
    del model.config.quantization_config
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), silence():
            for key, p in model.named_parameters():
                p.copy_(start[key] + (0.01 * torch.randn(p.shape, generator=generator) if seed else 0))
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)


def copy(folders: Sequence[Path], out: Path) -> None:
    """Read all files, and write as much as one of them."""
    room = memoryview(bytearray(2**20))
    out.mkdir()
    with (out / WEIGHTS).open("wb", buffering=0) as target:
        for number, folder in enumerate(folders):
            with (folder / WEIGHTS).open("rb", buffering=0) as source:
                while count := source.readinto(room):
                    if number == 0:
                        target.write(room[:count])
        os.fsync(target.fileno())


def growth(root: str) -> float:
    """In a process of its own: bytes of memory that a merge takes at its worst."""
    base, *others = (Path(root, name) for name in NAMES)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        before = peak_since_reset()
        merge_checkpoints(base, others, Path(folder, "out"), method=METHOD)
        return float(highest() - before)


def race(root: str, rounds: int, seconds: float) -> Laps:
    """In a process of its own."""
    folders = [Path(root, name) for name in NAMES]
    recipe = Path(root, "merge.yml")
    given = [{"model": str(folder), "parameters": {"weight": 1 / len(folders)}} for folder in folders]
    recipe.write_text(json.dumps({"models": given, "merge_method": "linear", "dtype": "float32"}))
    mergekit = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")

    def rival(work: Callable[[Path], object]) -> Callable[[], Lap]:
        def lap() -> Lap:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                began = perf_counter()
                work(Path(folder, "out"))
                return Lap(perf_counter() - began)

        return lap

    def command(*words: object) -> None:
        quiet = subprocess.DEVNULL
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(list(map(str, words)), check=True, stdout=quiet, stderr=quiet, env=env)

    ours = (sys.executable, "-m", "bayesrule", "merge", *folders, "--method", METHOD, "--out")
    rivals = {
        PLAIN: rival(lambda out: copy(folders, out)),
        OURS: rival(lambda out: merge_checkpoints(folders[0], folders[1:], out, method=METHOD)),
        COMMAND: rival(lambda out: command(*ours, out)),
    }
    if mergekit is not None:
        rivals[MERGEKIT] = rival(lambda out: command(mergekit, recipe, out))
    return interleave(rivals, rounds=rounds, warmup=1, seconds=seconds, least=3)


def tables(settings: Settings) -> list[Table]:
    neighbors = Neighbors()
    with tempfile.TemporaryDirectory() as root:
        models(Path(root))
        size = (Path(root, NAMES[0]) / WEIGHTS).stat().st_size
        grown = child.call("merging:growth", settings.threads, root=root)
        answer = child.call("merging:race", settings.threads, root=root, rounds=settings.rounds(9), seconds=settings.seconds(300))
    laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
    costs = {name: ratio(each, laps[PLAIN]) for name, each in laps.items()}
    rows = [(name, str(costs[name]), digits(typical(each).seconds)) for name, each in laps.items()]
    figures = {"merging: ours / plain": costs[OURS], "merging, memory": spread([grown / 1e6], grown / 1e6)}
    if MERGEKIT in laps:
        figures["merging: ours / mergekit"] = ratio(laps[COMMAND], laps[MERGEKIT])
    words = (
        f"{len(NAMES)} checkpoints of {size / 1e6:.0f} MB in float32 merged by {METHOD}, {len(laps[PLAIN])} rounds; memory grew by "
    )
    note = f"{words}{grown / 1e6:.0f} MB. The last rows are whole commands, from the start of Python on. {neighbors.report()}"
    return [Table("merging checkpoints", ("work", "ratio to reading and writing", "seconds"), rows, figures, note)]
