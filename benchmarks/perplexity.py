"""How well optimizers learn text in 1,200 steps: equal grids on one seed, the best of each on three, at the mean and averaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch.optim import Optimizer

from bayesrule.recipes.gpt import GPTSettings
from bayesrule.recipes.language import measure, read
from bayesrule.recipes.language_runs import train
from bayesrule.recipes.muon import WithAdamW
from bayesrule.recipes.optimizers import TEXT_OPTIMIZERS, Choice, hidden
from benchmarks import child
from benchmarks.eigenspace import SOAP
from benchmarks.ledger import Settings, Table
from benchmarks.plots import curves
from benchmarks.timing import Spread, spread

CORPORA = {"Shakespeare": "shakespeare", "standard library": "stdlib"}
FACTORS = {"Shakespeare": 1.0, "standard library": 0.5}  # of all rates
STEPS, SEEDS = 1200, (0, 1, 2)
FOLDER = Path("runs") / "perplexity"


@dataclass(frozen=True)
class Method:
    """An optimizer, and the settings that are tried: ``usual``, and ``usual`` with each of the changes."""

    optimizer: str
    usual: Mapping[str, Any]
    changes: tuple[Mapping[str, Any], ...]
    kind: str = "rival"
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def grid(self, corpus: str) -> list[dict[str, Any]]:
        """All of them."""
        tried = [{**self.usual, **change} for change in ({}, *self.changes)]
        return [{k: v * FACTORS[corpus] if k in ("lr", "adamw_lr") else v for k, v in one.items()} for one in tried]


PRICE = {"hess_approx": "price", "gradsq_scale": None}
METHODS = {
    "AdamW": Method(
        "torch-adamw",
        {"lr": 0.01, "beta2": 0.99, "weight_decay": 0.1},
        ({"lr": 0.006}, {"beta2": 0.95}, {"weight_decay": 0.01}),
    ),
    "SOAP": Method(
        "soap",
        {"lr": 0.01, "beta2": 0.95, "adamw_lr": 0.01},
        ({"lr": 0.005}, {"lr": 0.02}, {"beta2": 0.99}),
    ),
    "Muon": Method(
        "torch-muon",
        {"lr": 0.02, "adamw_lr": 0.01},
        ({"lr": 0.01}, {"lr": 0.03}, {"adamw_lr": 0.015}),
    ),
    "IVON": Method(
        "ivon",
        {"lr": 0.01, "beta2": 0.98},
        ({"lr": 0.007}, {"beta2": 0.97}, {"beta2": 0.99}),
        "diagonal",
    ),
    "IVON, published": Method(
        "ivon",
        {"lr": 1.0},
        ({"lr": 0.5}, {"ess": 1e7}, {"clip_radius": 3e-3}),
        "diagonal",
        {**PRICE, "hess_init": 1e-3, "clip_radius": 1e-3, "beta2": 0.99999, "ess": 1e8},
    ),
    "EVON": Method(
        "evon",
        {"lr": 0.005, "adamw_lr": 0.01, "beta2": 0.99, "whiten": False},
        ({"lr": 0.007}, {"beta2": 0.98}, {"lr": 0.01, "whiten": True, "adjust_lr_fn": "match_rms_adamw"}),
        "structured",
    ),
    "EVON, published": Method(
        "evon",
        {"lr": 0.02, "adamw_lr": 0.01, "shampoo_beta": 0.95},
        ({"lr": 0.035}, {"phasing": True, "price_clip_ratio": 1.5}, {"shampoo_beta": 0.99}),
        "structured",
        {
            **PRICE,
            "hess_init": 0.5,
            "whiten": True,
            "clip_radius": math.inf,
            "adjust_lr_fn": None,
            "beta1": 0.95,
            "beta2": 0.999,
        },
    ),
}


class SOAPAdamW(WithAdamW):
    """SOAP for the matrices inside, AdamW for the rest."""

    def __init__(
        self,
        params: Any,
        lr: float,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        adamw_lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self._beta2 = beta2
        super().__init__(params, lr, weight_decay, adamw_lr, betas)

    def of_matrices(self, groups: list[dict[str, Any]]) -> Optimizer:
        return SOAP(groups, lr=0.0, beta2=self._beta2)


def one(optimizer: str, hyperparameters: dict[str, Any], corpus: str, seed: int, steps: int, out: str) -> dict[str, Any]:
    """In a process of its own: a run, gone on with where it was stopped, and its figures."""
    TEXT_OPTIMIZERS["soap"] = Choice("SOAP", SOAPAdamW, {"lr": 0.01}, groups=lambda m, s: hidden(m, s))
    folder = Path(out)
    settings = GPTSettings((corpus,), optimizer, hyperparameters, steps=steps, seed=seed)
    try:
        train(settings, folder, resume=True)
    except ValueError as error:
        if "diverged" not in str(error) and "cannot go on" not in str(error):
            raise
        return {"perplexity": math.inf}
    run = read(folder)
    found = measure(run)
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    lines = [[line["step"], line["validation_nll"]] for line in run.history]
    return {**found, "seconds": math.fsum(run.record.seconds), "curve": lines}


def figures(method: Method, change: Mapping[str, Any], corpus: str, seed: int, steps: int) -> dict[str, Any]:
    """Those of a run; kept in its folder."""
    chosen = {**method.fixed, **change}
    words = "-".join(f"{name}={value}" for name, value in sorted(chosen.items()))
    out = FOLDER / CORPORA[corpus] / f"{method.optimizer}-{words}-{steps}-{seed}"
    kept = out / "figures.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    arguments = dict(
        optimizer=method.optimizer, hyperparameters=chosen, corpus=CORPORA[corpus], seed=seed, steps=steps, out=str(out)
    )
    found = child.call("perplexity:one", 1, **arguments)
    kept.write_text(json.dumps(found))
    return found


@dataclass
class Entry:
    """What a method came to on a corpus."""

    method: Method
    tried: list[tuple[dict[str, Any], float]]
    chosen: dict[str, Any]
    runs: list[dict[str, Any]]

    def over(self, key: str) -> list[float]:
        return [run[key] for run in self.runs if key in run]


def entry(method: Method, corpus: str, steps: int, seeds: tuple[int, ...], pool: ThreadPoolExecutor) -> Entry:
    """The grid on the first seed, then the best of it on the others."""
    grid = method.grid(corpus)
    found = list(pool.map(lambda change: figures(method, change, corpus, seeds[0], steps), grid))
    tried = [(change, run["perplexity"]) for change, run in zip(grid, found, strict=True)]
    chosen, _ = min(tried, key=lambda each: each[1])
    runs = list(pool.map(lambda seed: figures(method, chosen, corpus, seed, steps), seeds))
    return Entry(method, tried, chosen, runs)


def tables(settings: Settings) -> list[Table]:
    steps, seeds = (30, SEEDS[:2]) if settings.quick else (STEPS, SEEDS)
    found = []
    for corpus in CORPORA:
        with ThreadPoolExecutor(settings.threads) as pool, ThreadPoolExecutor(len(METHODS)) as each:
            jobs = [(method, corpus, steps, seeds, pool) for method in METHODS.values()]
            entries = dict(zip(METHODS, each.map(lambda job: entry(*job), jobs), strict=True))
        found += [_table(corpus, entries, steps, seeds), _grid(corpus, entries)]
        lines = {name: [run["curve"] for run in e.runs if "curve" in run] for name, e in entries.items()}
        path = settings.plots / f"perplexity_{CORPORA[corpus]}.png"
        curves(path, title=f"Validation perplexity, {corpus}", x="steps", y="perplexity at the mean", lines=lines)
    return found


def _table(corpus: str, entries: Mapping[str, Entry], steps: int, seeds: tuple[int, ...]) -> Table:
    title = f"perplexity, {corpus}"
    adamw = mean(entries["AdamW"].over("perplexity"))
    rival = min(mean(entries[name].over("perplexity")) for name in ("SOAP", "Muon"))
    rows, key = [], dict[str, Spread]()
    for name, e in entries.items():
        plain, averaged = e.over("perplexity"), e.over("perplexity_mc")
        row = [
            name,
            _words(e.chosen),
            _spread(plain),
            _spread(averaged),
            f"{mean(plain) / adamw:.3f}",
            f"{mean(plain) / rival:.3f}",
        ]
        row += [f"{mean(e.over('bits_per_byte')):.3f}", f"{mean(e.over('ece')):.4f}"]
        rows.append([*row, f"{mean(e.over('ece_mc')):.4f}" if averaged else ""])
    for kind, by, words in (("diagonal", adamw, "AdamW"), ("structured", rival, "better of SOAP and Muon")):
        best = min((e for e in entries.values() if e.method.kind == kind), key=lambda e: mean(e.over("perplexity")))
        ratios = [p / by for p in best.over("perplexity")]
        key[f"{title}: {kind}"] = spread(ratios, mean(ratios))
        offs = [a / p for a, p in zip(best.over("perplexity_mc"), best.over("perplexity"), strict=True)]
        key[f"{title}: {kind}, averaged"] = spread(offs, mean(offs))
        rows.append([f"best {kind} / {words}", "", f"{mean(ratios):.3f}", f"{mean(offs):.4f}", *[""] * 5])
    head = ("optimizer", "settings", "mean", "averaged", "/ AdamW", "/ rival", "bits/byte", "ECE", "ECE, averaged")
    first, rest, factor = seeds[0], ", ".join(map(str, seeds)), FACTORS[corpus]
    scaled = "" if factor == 1 else f" (the rates of the other text times {factor:g})"
    note = (
        f"GPT of 0.37 million weights, {steps:,} steps of 1,024 bytes; as many settings of each{scaled} on seed {first}, then the "
        f"best of them, whose perplexity is in the table, on seeds {rest}: mean ± standard deviation. Averaged: over 8 draws. "
        "Rival: the better of SOAP and Muon."
    )
    return Table(title, head, rows, key, note)


def _grid(corpus: str, entries: Mapping[str, Entry]) -> Table:
    rows = [
        (name, _words({k: v for k, v in e.method.fixed.items() if k not in change} | change), f"{perplexity:.3f}")
        for name, e in entries.items()
        for change, perplexity in e.tried
    ]
    return Table(f"perplexity, {corpus}: all that was tried", ("optimizer", "settings", "seed 0"), rows)


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items())


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 and math.isfinite(sum(values)) else "")
