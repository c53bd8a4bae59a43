"""A language model from its settings to its folder: whatever stops it, it goes on."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesrule as br
from bayesrule.recipes.data import Bars, quiet
from bayesrule.recipes.folder import claim, locked, write_lines, write_record
from bayesrule.recipes.gpt import GPTSettings, Training, built
from bayesrule.recipes.language import KIND, TextRecord, complete, describe, measure, put_tokens, read, record_of, take_back
from bayesrule.recipes.optimizers import DATA, TEXT_OPTIMIZERS, settle
from bayesrule.recipes.results import going_on, place
from bayesrule.recipes.runs import CHECKPOINT, Paused, go_on, learn
from bayesrule.recipes.tokens import Tokens, opened, windows
from bayesrule.recipes.workers import ALONE, Elsewhere, Workers
from bayesrule.storage import write_tensors


def check(settings: GPTSettings, workers: Workers = ALONE) -> None:
    """Refuse what is wrong whatever the text is, before it is read.

    Raises:
        ValueError: If so; the message says what.
    """
    if settings.hyperparameters.get("noise_per_rank"):
        raise ValueError("noise_per_rank is no setting here: --fresh-draws gives each micro-batch and process a draw of its own")
    hyperparameters = settle(settings.optimizer, settings.hyperparameters, 1, TEXT_OPTIMIZERS)
    anywhere = {"hess_init": 1.0} if hyperparameters.get("hess_init") == DATA else {}
    TEXT_OPTIMIZERS[settings.optimizer].make(nn.Sequential(nn.Linear(2, 2)), hyperparameters | anywhere)
    workers.check(place(settings.device))
    if settings.fresh_draws and not TEXT_OPTIMIZERS[settings.optimizer].variational:
        raise ValueError(f"fresh_draws is for optimizers that draw weights, and {settings.optimizer} draws none; leave it out")


def begin(settings: GPTSettings, tokens: Tokens, workers: Workers = ALONE) -> tuple[GPTSettings, Training]:
    """Model and optimizer, ready for the first step, and the settings with all defaults filled in.

    Raises:
        ValueError: If a value of the settings is wrong.
    """
    choice, shard = TEXT_OPTIMIZERS[settings.optimizer], settings.shard and workers.size > 1
    settings = complete(settings, tokens, workers.size)
    model, start = built(settings, tokens.codec.vocabulary, place(settings.device), shard), dict[str, Any]()
    if settings.hyperparameters.get("hess_init") == DATA:
        start = {"hess_init": br.start_curvature(model, "cross_entropy", beginning(settings, tokens))}
    apart = settings.fresh_draws and workers.size > 1 and choice.draws_apart and not shard  # shards see one sample
    each = {"noise_per_rank": True} if apart else {}
    optimizer = choice.make(model, {**settings.hyperparameters, **start}, settings.seed, **each)
    return settings, Training(model, optimizer, tokens, settings, workers)


def beginning(settings: GPTSettings, tokens: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight batches, the same on every process, of which a curvature begins."""
    context, generator = settings.shape.context, torch.Generator().manual_seed(settings.seed)
    for _ in range(8):
        starts = torch.randint(len(tokens.train) - context, (settings.batch_size,), generator=generator)
        yield windows(tokens.train, starts.tolist(), context)


def train(
    settings: GPTSettings,
    out: Path,
    *,
    resume: bool = False,
    bars: Bars = quiet,
    watch: Callable[[int, Mapping[str, Any]], object] | None = None,
    workers: Workers = ALONE,
) -> None:
    """Train and leave a complete run folder at ``out``.

    As for images: killed at any moment, a run goes on with ``resume`` and ends bit-equal to one that was not. The tokens are in
    the folder, too.

    Args:
        settings: What to do.
        out: The folder.
        resume: Go on where a run of these settings was stopped; begin if there is none.
        bars: Progress.
        watch: Told the seed and every line of the metrics.
        workers: The processes that train together; the first one writes.

    Raises:
        FileExistsError: If ``out`` holds something already and it is not to be resumed.
        ValueError: If a setting is wrong, the text cannot be learned from, training diverges, or ``out`` holds another run.
        Paused: If a signal came; everything is saved.
        Elsewhere: If another process failed.
    """
    there = workers.first(lambda: resume and (out / "run.json").exists())
    record = workers.together(lambda: _look(settings, out, there, workers))
    with ExitStack() as stack:

        def enter() -> bool:
            """Take the folder, and put the tokens into it; whether there is something to do."""
            stack.enter_context(locked(out))
            if record is not None and record_of(out).finished:
                return False
            put_tokens(settings, out, record, workers.size)
            return True

        if workers.first(enter):
            tokens = workers.together(lambda: opened(out, settings.tokenizer))
            try:
                settled, training = workers.together(lambda: begin(settings, tokens, workers))
            except (ValueError, Elsewhere):
                if record is None and workers.is_first:
                    take_back(out)
                raise
            whose = identity(settled, tokens)
            if workers.first(lambda: (out / CHECKPOINT).exists()):
                workers.together(lambda: go_on(out, training, whose))
            about = describe(settled, tokens, workers.size)
            try:
                learn(
                    training,
                    out,
                    whose,
                    lambda: going_on(KIND, out),
                    lambda why: write_record(out / "run.json", about | {"failed": why}),
                    bars(TEXT_OPTIMIZERS[settings.optimizer].title, settings.steps),
                    lambda line: watch(settings.seed, line) if watch else None,
                )
                _finish(settled, training, out, about)
            except OSError as error:
                if error.errno is None:
                    raise
                words = f"{error.strerror}; mend that and go on with: {going_on(KIND, out)}"
                raise OSError(error.errno, words, error.filename) from error
            except KeyboardInterrupt:
                raise Paused(f"stopped at once; go on from the last checkpoint with: {going_on(KIND, out)}") from None
        workers.first(lambda: (out / CHECKPOINT).unlink(missing_ok=True))


def identity(settings: GPTSettings, tokens: Tokens) -> str:
    """Of all that decides a run."""
    words = json.dumps({**settings.plain(), "data": tokens.fingerprint}, sort_keys=True)  # wherever the text is
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _look(settings: GPTSettings, out: Path, there: bool, workers: Workers) -> TextRecord | None:
    """What is in the folder to go on with; refuse what is wrong before the text is read."""
    if not there:
        check(settings, workers)
        if workers.is_first:
            claim(out)
        return None
    record = record_of(out)
    for name in settings.differ(record.settings):
        raise _other(record, name, getattr(settings, name), getattr(record.settings, name))
    for name, value in settings.hyperparameters.items():
        if record.settings.hyperparameters.get(name) != value:
            raise _other(record, name, value, record.settings.hyperparameters.get(name))
    check(settings, workers)
    if record.failed:
        raise ValueError(f"{out} cannot go on: {record.failed}; train into another --out")
    if not record.finished and record.threads != torch.get_num_threads():
        warnings.warn(
            f"{out} began with {record.threads} threads and goes on with {torch.get_num_threads()}: it will end like one that "
            "was not stopped only up to rounding; set OMP_NUM_THREADS for more",
            stacklevel=3,
        )
    if not record.finished and record.processes != workers.size:
        raise ValueError(f"{out} began in {record.processes} processes, not {workers.size}: batches would differ; start as many")
    return record


def _other(record: TextRecord, name: str, mine: Any, theirs: Any) -> ValueError:
    return ValueError(
        f"{record.folder} began with {name} {theirs}, not {mine}; give the same settings, or --resume and --out alone"
    )


def _finish(settings: GPTSettings, training: Training, out: Path, about: Mapping[str, Any]) -> None:
    """Write what a finished run leaves; ``run.json`` says last that it is finished."""
    weights, posterior = {}, None
    if training.workers.is_first or training.sharded:
        weights = training.weights()
        posterior = training.posterior() if training.variational else None

    def leave() -> None:
        write_tensors(out / "model.safetensors", weights, {})
        if posterior is not None:
            posterior.save(out / "posterior.safetensors")
        write_lines(out / "metrics.jsonl", training.history)
        record = {**about, "seconds": training.seconds}
        write_record(out / "run.json", record)
        measure(read(out, unfinished=True))
        write_record(out / "run.json", record | {"finished": True})

    training.workers.first(leave)
