"""What language models cost: a step of the recipe beside nanoGPT's loop, and averaged perplexity beside one forward."""

from __future__ import annotations

import math
import tempfile
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.recipes.gpt import GPT, GPTSettings
from bayesrule.recipes.language import FINAL
from bayesrule.recipes.language_runs import begin
from bayesrule.recipes.tokens import Bytes, Tokens, spaced, windows
from benchmarks import child
from benchmarks.data import standard_library
from benchmarks.ledger import Settings, Table
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, typical

BATCH, RATE, MOST = 16, 0.01, 1200
THEIRS, OURS = "nanoGPT's loop, AdamW", "the recipe, AdamW"
NAMES = {OURS: "torch-adamw", "the recipe, IVON": "ivon", "the recipe, EVON": "evon", "the recipe, Muon": "torch-muon"}


def tokens() -> Tokens:
    """The source of the standard library, byte by byte."""
    text = standard_library().numpy()
    return Tokens(text[:-100_000], text[-100_000:], Bytes(), {"fingerprint": "standard library"})


class NanoGPT:
    """The training loop of nanoGPT: batches from a memory-mapped file, a cosine after a warm-up, clipping, a fused AdamW."""

    def __init__(self, model: GPT, path: Path) -> None:
        self.model, self.path, self.context, self.step = model, path, model.shape.context, 0
        decaying = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)
        self.x, self.y = self.batch()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(self.path, dtype=np.uint8, mode="r")
        places = torch.randint(len(data) - self.context, (BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + self.context].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + self.context].astype(np.int64)) for i in places])
        return x, y

    def rate(self) -> float:
        if self.step < 60:
            return RATE * (self.step + 1) / 61
        share = (self.step - 60) / (MOST - 60)
        return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    def __call__(self) -> None:
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logits = self.model(self.x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), self.y.view(-1))
        self.x, self.y = self.batch()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def race(rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: one step each a round, all from the same first weights."""
    text = tokens()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        text.train.tofile(path)
        mapped = Tokens(np.memmap(path, np.uint8, "r"), text.validation, text.codec, text.about)
        trainings = {}
        for name, optimizer in NAMES.items():
            settings = GPTSettings(("stdlib",), optimizer, {"lr": RATE}, steps=MOST, batch_size=BATCH)
            trainings[name] = begin(settings, mapped)[1]
        plain = NanoGPT(deepcopy(trainings[OURS].model), path)
        for training in trainings.values():
            training.model.train()

        def ours(name: str) -> Lap:
            start = perf_counter()
            trainings[name]._step()
            trainings[name].done += 1
            return Lap(perf_counter() - start)

        def theirs() -> Lap:
            start = perf_counter()
            plain()
            return Lap(perf_counter() - start)

        rivals: dict[str, Any] = {THEIRS: theirs} | {name: (lambda name=name: ours(name)) for name in NAMES}
        return interleave(rivals, rounds=rounds, warmup=warmup, seconds=seconds)


PLAIN, AVERAGED = "a forward at the mean", "averaged over 8 draws"


def averaging(rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: perplexity of the windows that the recipe measures at its end, at the mean and over 8 draws."""
    text = tokens()
    _, training = begin(GPTSettings(("stdlib",), "ivon", {"lr": RATE}, steps=MOST, batch_size=BATCH), text)
    for _ in range(3):
        training._step()
        training.done += 1
    model, posterior = training.model.eval(), training.posterior()
    context = training.settings.shape.context
    x, y = windows(text.validation, spaced(text.validation, FINAL, context), context)
    batches = list(zip(x.split(64), y.split(64), strict=True))

    def timed(posterior: br.Posterior | None) -> Lap:
        start = perf_counter()
        br.evaluate(model, posterior, batches, task="lm", **({} if posterior is None else {"num_samples": 8}))
        return Lap(perf_counter() - start)

    @torch.inference_mode()
    def plain() -> Lap:
        start = perf_counter()
        for x, y in batches:
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
        return Lap(perf_counter() - start)

    rivals = {PLAIN: plain, "perplexity at the mean": lambda: timed(None), AVERAGED: lambda: timed(posterior)}
    return interleave(rivals, rounds=rounds, warmup=warmup, seconds=seconds)


def tables(settings: Settings) -> list[Table]:
    effort: dict[str, Any] = dict(rounds=settings.rounds(61), warmup=3, seconds=settings.seconds(120))
    found = []
    for task, base, key, of in (
        ("race", THEIRS, "language: our loop / nanoGPT's", OURS),
        ("averaging", PLAIN, "language: averaged / forwards", AVERAGED),
    ):
        neighbors = Neighbors()
        laps = {
            name: [Lap(*lap) for lap in each] for name, each in child.call(f"language:{task}", settings.threads, **effort).items()
        }
        figures = {name: ratio(each, laps[base]) for name, each in laps.items()}
        rows = [(name, str(figures[name]), f"{typical(each).seconds * 1e3:.4g}") for name, each in laps.items()]
        title = {
            "race": "steps of a GPT of 0.37 million weights, 1,024 bytes",
            "averaging": f"perplexity of {FINAL:,} windows of 64 bytes",
        }[task]
        note = f"{len(laps[base])} rounds; {neighbors.report()}"
        found.append(Table(title, ("work", f"ratio to {base}", "ms"), rows, {key: figures[of]}, note))
    return found
