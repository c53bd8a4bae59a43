"""The main job around its steps: data that lie in files, memory for a large folder, a report on many images."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from bayesrule.recipes.data import Data, Part, Scale, load
from bayesrule.recipes.formats import folders
from bayesrule.recipes.runs import begin, train
from bayesrule.recipes.settings import Settings as Run
from bayesrule.recipes.sources import stored
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.memory import highest
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, spread, typical

TENSORS, MEMORY, FILES = "tensors, scaled before", "the recipe, images in memory", "the recipe, images in PNG files"
BATCH, STEPS = 128, 8
PICTURE = (500, 700)  # height and width in the large folder
TESTED = 50_000


def pictures(root: Path, count: int) -> None:
    """Real digits as color PNG files of 32 x 32 in class folders."""
    pixels, labels = digits()
    colors = as_cifar(pixels[:count])
    low, high = colors.min(), colors.max()
    bytes_ = ((colors - low) / (high - low) * 255).byte().movedim(1, -1).numpy()
    for i, (image, label) in enumerate(zip(bytes_, labels[:count].tolist(), strict=True)):
        path = root / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def scaled_before(data: Data) -> Data:
    """The same data as float tensors that need nothing more."""

    def part(of: Part) -> Part:
        values = data.scale(torch.cat(list(of.stream(torch.arange(len(of)).split(BATCH)))))
        return Part(stored(values, "tensors"), torch.arange(len(of)), of.labels)

    parts = {name: part(getattr(data, name)) for name in ("train", "validation", "test")}
    return replace(data, **parts, scale=Scale((0.0,) * 3, (1.0,) * 3))


def race(optimizer: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: epochs of a ResNet-20, the same but for where the images are."""
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder), 2 * STEPS * BATCH)
        settings = Run(folder, optimizer, "resnet20", batch_size=BATCH, epochs=rounds + warmup, split=(0.5, 0.05))
        in_memory = load(folder, split=settings.split)
        folders.MEMORY = 0
        sources = {TENSORS: scaled_before(in_memory), MEMORY: in_memory, FILES: load(folder, split=settings.split)}

        def rival(data: Data) -> Callable[[], Lap]:
            _, training = begin(settings, data)

            def epoch() -> Lap:
                training.epoch()
                return Lap(training.seconds[-1] / training.steps)

            return epoch

        rivals = {name: rival(data) for name, data in sources.items()}
        return interleave(rivals, rounds=rounds, warmup=warmup, seconds=seconds)


def large_folder(gigabytes: float) -> dict[str, float]:
    """In a process of its own: peak memory in bytes of a run on so many bytes of JPEG files, most of them copies."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root, written, files = Path(folder, "data"), 0, 0
        originals = []
        for i in range(64):
            path = Path(folder, f"{i}.jpg")
            Image.fromarray(generator.integers(0, 256, (*PICTURE, 3), dtype=np.uint8)).save(path, quality=85)
            originals.append(path.read_bytes())
        while written < gigabytes * 1e9:
            path = root / f"class {files % 4}" / f"{files}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(originals[files % 64] + str(files).encode())
            written, files = written + len(originals[files % 64]), files + 1
        before = highest()
        began = perf_counter()
        train(Run(str(root), "adamw", "lenet", epochs=1, batch_size=BATCH, size=(32,)), Path(folder, "run"))
        return {"bytes": written, "files": files, "before": before, "peak": highest(), "seconds": perf_counter() - began}


def report() -> dict[str, float]:
    """In a process of its own: seconds of `bayesrule report` on three runs, as a person waits for it."""
    pixels, labels = digits()
    generator = torch.Generator().manual_seed(0)
    low, high = pixels.min(), pixels.max()
    images = ((pixels - low) / (high - low) * 255).byte()[:, 0]
    chosen = torch.randint(len(images), (60_000 + TESTED,), generator=generator)
    noisy = (images[chosen].float() + 30 * torch.randn((len(chosen), 28, 28), generator=generator)).clamp(0, 255).byte().numpy()
    names = [labels[chosen].numpy()[part] for part in (slice(60_000), slice(60_000, None))]
    with tempfile.TemporaryDirectory() as folder:
        path, outs = Path(folder, "noisy.npz"), []
        np.savez(path, x_train=noisy[:60_000], y_train=names[0], x_test=noisy[60_000:], y_test=names[1])
        for optimizer in ("adamw", "sgd", "ivon"):
            outs.append(Path(folder, optimizer))
            train(Run(str(path), optimizer, "mlp", epochs=1, batch_size=500), outs[-1])
        page = Path(folder, "report.html")
        began = perf_counter()
        command = [sys.executable, "-m", "bayesrule.cli", "report", *map(str, outs), "--out", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        return {"seconds": perf_counter() - began, "bytes": page.stat().st_size}


def tables(settings: Settings) -> list[Table]:
    return [loading(settings, "adamw"), loading(settings, "ivon"), folder(settings), page(settings)]


def loading(settings: Settings, optimizer: str) -> Table:
    """Epochs of a ResNet-20 by where its images are."""
    neighbors = Neighbors()
    effort = dict(rounds=settings.rounds(15), warmup=2, seconds=settings.seconds(150))
    answer = child.call("loading:race", settings.threads, optimizer=optimizer, **effort)
    laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
    costs = {name: ratio(each, laps[TENSORS]) for name, each in laps.items()}
    rows = [(name, str(costs[name]), f"{typical(each).seconds * 1e3:.4g}") for name, each in laps.items()]
    figures = {f"loading, {optimizer}, {name}": cost for name, cost in costs.items()}
    note = f"ResNet-20 of the recipe, batch {BATCH}, epochs of {STEPS} steps with {optimizer}, {len(laps[TENSORS])} rounds. "
    return Table(f"loading, {optimizer}", ("images", "ratio", "ms a step"), rows, figures, note + neighbors.report())


def folder(settings: Settings) -> Table:
    """Peak memory on a large folder."""
    neighbors = Neighbors()
    found = child.call("loading:large_folder", settings.threads, gigabytes=0.1 if settings.quick else 10)
    gigabytes = {name: found[name] / 1e9 for name in ("bytes", "before", "peak")}
    row = (f"{gigabytes['bytes']:.1f} GB, {found['files']:,} files", *(f"{gigabytes[name]:.2f}" for name in ("before", "peak")))
    figures = {"memory, folder": spread([gigabytes["peak"]], gigabytes["peak"])}
    words = f"JPEG files of {PICTURE[0]} x {PICTURE[1]} pixels, --size 32, an epoch of a LeNet"
    note = f"{words}; {found['seconds']:.0f} seconds for the whole run, looking at the data included. {neighbors.report()}"
    return Table("memory for a large folder", ("folder", "GB before", "GB at most"), [row], figures, note)


def page(settings: Settings) -> Table:
    """Seconds of a report."""
    neighbors = Neighbors()
    found = child.call("loading:report", settings.threads)
    figures = {"report": spread([found["seconds"]], found["seconds"])}
    row = (f"3 runs, {TESTED:,} test images", f"{found['seconds']:.1f}", f"{found['bytes'] / 1e6:.2f}")
    return Table("report", ("of", "seconds", "MB"), [row], figures, f"The whole command. {neighbors.report()}")
