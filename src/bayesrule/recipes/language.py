"""Folders of language models: what is in them, what it comes to, and runs side by side."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import bayesrule as br
from bayesrule.recipes.folder import claim, digest, locked, read_lines, read_record, write_record
from bayesrule.recipes.gpt import GPT, GPTSettings, built, write
from bayesrule.recipes.names import lookup
from bayesrule.recipes.optimizers import TEXT_OPTIMIZERS, settle
from bayesrule.recipes.results import going_on, load_learned, place
from bayesrule.recipes.settings import settings_within
from bayesrule.recipes.tokens import TOKENIZER, TOKENS, Tokens, find, opened, spaced, windows, written
from bayesrule.storage import write_text
from bayesrule.uses.language import LanguageReport, Method, Trial, token_calibration

KIND = "text"
SAMPLES = 8  # networks that are averaged
FINAL = 1024  # validation windows of the final figures
CALIBRATED = 1 << 22  # probabilities whose calibration is looked at
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class TextRecord:
    """What ``run.json`` says of a run."""

    folder: Path
    settings: GPTSettings
    text: Mapping[str, Any]
    seconds: tuple[float, ...]
    finished: bool
    failed: str | None
    processes: int
    threads: int | None
    versions: Mapping[str, str]

    @property
    def command(self) -> str:
        """What goes on with the run."""
        return going_on(KIND, self.folder)


def record_of(folder: Path) -> TextRecord:
    """The record of a run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of something else.
    """
    found = read_record(folder)
    if found["kind"] != KIND:
        raise ValueError(f"{folder} holds a run of the kind {found['kind']!r}, not of text; take that to its own command")
    try:
        return TextRecord(
            folder,
            settings_within(folder, found, GPTSettings),
            dict(found["text"]),
            tuple(float(one) for one in found.get("seconds", ())),
            found.get("finished") is True,
            found.get("failed"),
            int(found.get("processes", 1)),
            found.get("threads"),
            dict(found.get("versions", {})),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {type(error).__name__}: {error}") from error


def is_text(folder: Path) -> bool:
    """Whether a folder holds a run on text."""
    with contextlib.suppress(OSError, ValueError):
        return bool(read_record(folder)["kind"] == KIND)
    return False


def put_tokens(settings: GPTSettings, out: Path, record: TextRecord | None, processes: int) -> None:
    """Put the tokens into the folder, and begin the record, unless both are there."""
    if record is not None and (out / TOKENS).is_dir():
        return
    if record is None:
        claim(out)
    files = find(settings.data, settings.extensions)
    with written(files, out, settings.tokenizer, settings.vocabulary) as tokens:
        if record is not None:
            if tokens.fingerprint != record.text.get("fingerprint"):
                raise ValueError(f"the text of {out} is no longer the one that it began with; bring it back")
            return
        tokens.check(settings.shape.context)
        write_record(out / "run.json", describe(complete(settings, tokens, processes), tokens, processes))


def complete(settings: GPTSettings, tokens: Tokens, processes: int) -> GPTSettings:
    """The settings with those of the optimizer filled in.

    Raises:
        ValueError: If the optimizer is unknown or has no such setting.
    """
    choice = lookup("optimizer", settings.optimizer, TEXT_OPTIMIZERS)
    averaged = settings.tokens_a_draw(processes, choice.draws_apart)
    hyperparameters = settle(settings.optimizer, settings.hyperparameters, len(tokens.train), TEXT_OPTIMIZERS, averaged)
    return replace(settings, hyperparameters=hyperparameters)


def take_back(out: Path) -> None:
    """Remove what :func:`put_tokens` put into a folder where nothing has begun."""
    shutil.rmtree(out / TOKENS, ignore_errors=True)
    for name in ("run.json", TOKENIZER):
        (out / name).unlink(missing_ok=True)


def describe(settings: GPTSettings, tokens: Tokens, processes: int) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins."""
    alike = {"threads": torch.get_num_threads(), "processes": processes}
    return {"kind": KIND, "settings": settings.plain(), "text": tokens.about, **alike}


# Finished runs


@dataclass(frozen=True)
class TextRun:
    """A run read back from its folder: the model at the mean, in eval mode, and the posterior, if its optimizer leaves one."""

    record: TextRecord
    tokens: Tokens
    model: GPT
    posterior: br.Posterior | None
    history: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The optimizer's name in print."""
        return TEXT_OPTIMIZERS[self.record.settings.optimizer].title


def read(folder: Path, unfinished: bool = False) -> TextRun:
    """The finished run in a folder.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If it is not finished, or a file is damaged or does not fit the others; the message names it.
    """
    record = record_of(folder)
    settings = record.settings
    if not (record.finished or unfinished):
        raise ValueError(f"{folder} is not finished: {record.failed or f'go on with: {record.command}'}")
    tokens = _kept(record)
    model = built(settings, tokens.codec.vocabulary, place(settings.device))
    posterior = load_learned(folder, model, TEXT_OPTIMIZERS[settings.optimizer].variational)
    return TextRun(record, tokens, model.eval(), posterior, read_lines(folder / "metrics.jsonl"))


def _kept(record: TextRecord) -> Tokens:
    """The tokens in the folder of a run; made again from the text where they were deleted."""
    out, settings = record.folder, record.settings
    if not (out / TOKENS).is_dir():
        with locked(out):
            put_tokens(settings, out, record, record.processes)
    tokens = opened(out, settings.tokenizer)
    if tokens.fingerprint != record.text.get("fingerprint"):
        raise ValueError(f"{out / TOKENS} holds another text than the run began with; delete it to make it again")
    return tokens


def measure(run: TextRun, num_samples: int = SAMPLES, *, again: bool = False) -> dict[str, Any]:
    """Figures at the mean and, where there is a posterior, averaged over draws, over windows spread over the validation part.

    Those that were kept beside these weights are read, unless ``again``; else they are computed and kept.
    """
    out, settings = run.record.folder, run.record.settings
    weights = digest(out / "model.safetensors", out / "posterior.safetensors")
    about = {"weights": weights, "num_samples": num_samples, "windows": [FINAL, CALIBRATED], "text": run.tokens.fingerprint}
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
        kept = json.loads((out / EVALUATION).read_text(encoding="utf-8"))
        if kept["about"] == about and not again:
            return dict(kept["figures"])
    x, y = windows(run.tokens.validation, spaced(run.tokens.validation, FINAL, settings.shape.context), settings.shape.context)
    device = place(settings.device)
    vocabulary = run.tokens.codec.vocabulary
    size = max(1, min(64, (1 << 26) // (vocabulary * settings.shape.context)))
    batches = list(zip(x.to(device).split(size), y.to(device).split(size), strict=True))
    stride = -(-len(x) // max(1, CALIBRATED // (vocabulary * settings.shape.context)))
    autocast = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
    figures: dict[str, Any] = {}
    asked = {"": None} if run.posterior is None else {"": None, "_mc": run.posterior}
    with autocast:
        for ending, posterior in asked.items():
            how: dict[str, Any] = {} if posterior is None else {"num_samples": num_samples}
            found = br.evaluate(run.model, posterior, batches, task="lm", token_bytes=run.tokens.codec.sizes, **how)
            calibration = token_calibration(run.model, posterior, x[::stride].to(device), y[::stride], **how)
            figures |= {f"{name}{ending}": value for name, value in {**found, **calibration}.items()}
    with contextlib.suppress(OSError):
        write_text(out / EVALUATION, json.dumps({"about": about, "figures": figures}) + "\n")
    return figures


def sample(
    run: TextRun, length: int, *, prompt: str = "\n", temperature: float = 0.8, draw: int | None = None, seed: int = 0
) -> str:
    """Text that the model writes, at the mean, or with the weights of one draw of the posterior for the whole of it.

    Raises:
        ValueError: If there is no posterior to draw from, or a value is out of range.
    """
    if length < 0 or not temperature >= 0:
        raise ValueError(f"sample and temperature must be at least 0, got {length} and {temperature}")
    if draw is not None and run.posterior is None:
        raise ValueError(f"{run.record.folder} has no posterior to draw from; leave --draw out")
    start = run.tokens.codec.encode(prompt)
    if not start:
        raise ValueError("prompt must not be empty; the text begins after it")
    drawn = nullcontext() if draw is None or run.posterior is None else br.sampled(run.model, run.posterior, seed, draw)
    with drawn:
        return run.tokens.codec.decode(start + write(run.model, start, length, temperature, seed))


def compare(folders: Sequence[Path], num_samples: int = SAMPLES, *, again: bool = False) -> LanguageReport:
    """Runs on the same text side by side; those that differ in the seed alone are one method.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ValueError: If a run is not finished or damaged, or two are of different texts.
    """
    runs = [read(folder) for folder in folders]
    first = runs[0]
    groups: dict[str, list[TextRun]] = {}
    for run in runs:
        if run.tokens.fingerprint != first.tokens.fingerprint:
            raise ValueError(
                f"{first.record.folder} and {run.record.folder} are of different texts or tokens; compare runs of the same"
            )
        key = json.dumps(run.record.settings.plain() | {"seed": 0, "data": (), "device": ""}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    titles = [group[0].title for group in groups.values()]
    names = [
        group[0].title if titles.count(group[0].title) == 1 else f"{group[0].title} ({group[0].record.folder})"
        for group in groups.values()
    ]
    methods = [
        Method(
            name,
            [Trial(measure(run, num_samples, again=again), math.fsum(run.record.seconds), run.history) for run in group],
            {"weights": f"{sum(p.numel() for p in group[0].model.parameters()):,}", "steps": f"{group[0].record.settings.steps:,}"},
        )
        for name, group in zip(names, groups.values(), strict=True)
    ]
    text, data = first.record.text, ", ".join(first.record.settings.data)
    counts, sizes = text["tokens"], text["bytes"]
    return LanguageReport(
        title=f"{', '.join(dict.fromkeys(titles))} on {data}",
        summary=[
            f"Each model learned from {counts['train']:,} tokens ({sizes['train']:,} bytes) of {text['files']:,} files and is "
            f"measured on {FINAL:,} windows, or as many as there are, of the last {counts['validation']:,} tokens, which played "
            "no part in training.",
            f"Where there is a posterior, averaged means that every token's probability is the mean over {num_samples} networks "
            "drawn from it.",
        ],
        methods=methods,
        settings={name: _flat(group[0].record.settings) for name, group in zip(names, groups.values(), strict=True)}
        | {"Versions": dict(first.record.versions)},
    )


def _flat(settings: GPTSettings) -> dict[str, Any]:
    """The settings as one flat table, in words."""
    flat = {**settings.plain(), **settings.hyperparameters}
    del flat["hyperparameters"]

    def word(value: Any) -> Any:
        return ", ".join(value) if isinstance(value, list | tuple) else f"{value:g}" if isinstance(value, float) else value

    return {name.replace("_", " "): word(value) for name, value in flat.items() if value is not None}
