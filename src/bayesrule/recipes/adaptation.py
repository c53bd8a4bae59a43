"""A finished run, changed without training it again: examples added or left out, another prior. What is left is a run again."""

import csv
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import bayesrule as br
from bayesrule.estimators.output_losses import output_loss
from bayesrule.recipes.comparison import describe as flat
from bayesrule.recipes.data import Bars, Data, Part, quiet
from bayesrule.recipes.dependence import Ordered
from bayesrule.recipes.folder import appearing, claim, digest, read_record, write_lines, write_record
from bayesrule.recipes.formats.pieces import nearest
from bayesrule.recipes.names import lookup
from bayesrule.recipes.optimizers import settle
from bayesrule.recipes.results import Run, describe, read
from bayesrule.recipes.runs import train
from bayesrule.recipes.settings import RunSettings
from bayesrule.recipes.sources import shown
from bayesrule.uses.adaptation.memory import By
from bayesrule.uses.adaptation.objectives import METHODS
from bayesrule.uses.adaptation.unlearning import residual_gradient
from bayesrule.uses.cautions import of_the_sum
from bayesrule.uses.changes import Changes, Examples

ADAPTED = "adapted"  # the key of run.json that says how a run came to be
AGAIN = "retrained"  # the folder of the run that was trained again
SAMPLE = 2000  # training examples that are looked at
STIFFEST = 1e6  # the most damping that is tried
ALONE = ("deviation", "negation")  # ways to leave examples out that do nothing else
CROSS_ENTROPY = output_loss("cross_entropy")
Which = Literal["laplace", "learned"]


@dataclass(frozen=True)
class Request:
    """What is asked of a run.

    Args:
        add: Data whose examples are added to the training part.
        remove: Places of training examples that are left out, in the run's own numbers, as words: see :func:`places`.
        remove_class: Classes of which all training examples are left out.
        weight_decay: Another strength of the prior.
        method: As of :func:`bayesrule.adapt`; or, where examples are only left out, "deviation" or "negation" of
            :func:`bayesrule.forget`.
        memory: Examples that are remembered: a number, or below 1 a share of those that stay.
        memory_by: How they are chosen, see :meth:`bayesrule.Memory.select`.
        posterior: "laplace" makes one around the run's weights by a pass over its data; "learned" takes the run's own, whose
            curvature has hardly moved after a short training, so that the model hardly moves either.
        damping: Precision of one more pull to the old weights; None looks for one by the loss of the changed data.
        epochs: Passes over what is added and remembered.
        lr: Learning rate; None is the default of :func:`bayesrule.adapt`.
        seed: Of the order of examples.
    """

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    remove_class: tuple[str, ...] = ()
    weight_decay: float | None = None
    method: str = "posterior_correction"
    memory: float = 0.1
    memory_by: By = "surrogate_error"
    posterior: Which = "laplace"
    damping: float | None = None
    epochs: int = 100
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.add or self.remove or self.remove_class or self.weight_decay is not None):
            raise ValueError("nothing is to be changed; pass --add, --remove, --remove-class or --weight-decay")
        if not 0 < self.memory < math.inf or (self.memory >= 1 and self.memory != int(self.memory)):
            raise ValueError(f"memory must be a whole number of examples, or a share between 0 and 1; got {self.memory:g}")
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be a number >= 0, got {self.damping:g}")
        lookup("method", self.method, {**METHODS, **dict.fromkeys(ALONE)})
        if self.method in ALONE and (self.add or self.weight_decay is not None):
            raise ValueError(f"{self.method} leaves examples out and does nothing else; take --method posterior_correction")
        lookup("memory_by", self.memory_by, dict.fromkeys(get_args(By)))
        if self.weight_decay is not None and not 0 < self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number > 0, got {self.weight_decay:g}")

    @property
    def remembers(self) -> bool:
        """Whether the method has a memory."""
        return self.method not in ALONE and METHODS[self.method].memory is not None

    def size(self, count: int) -> int:
        """How many of so many examples are remembered."""
        return min(count, max(1, round(self.memory if self.memory >= 1 else self.memory * count)))


def places(words: Sequence[str], data: Data) -> list[int]:
    """Numbers of training examples, each once, in order.

    Args:
        words: Numbers, ranges such as 40-60 with both ends, or files: CSV with a column ``index``, as of ``bayesrule sensitivity``.
        data: Of the run.

    Raises:
        ValueError: If a word is none of these, or there is no such example.
        OSError: If a file cannot be read.

    Example:
        >>> from bayesrule.recipes.data import load
        >>> places(["3", "7-9", "8"], load("digits"))
        [3, 7, 8, 9]
    """
    found: set[int] = set()
    for word in words:
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"{word} is no range: it ends before it begins")
            found.update(range(first, last + 1) if last < len(data.train) else (first, last))
        else:
            found.update(_listed(Path(word)))
    if odd := sorted(place for place in found if not 0 <= place < len(data.train)):
        raise ValueError(f"{data.name} has no training {data.kind} {odd[0]}; they are 0 to {len(data.train) - 1}")
    return sorted(found)


def _listed(path: Path) -> list[int]:
    if not path.exists():
        raise ValueError(f"{shown(path)} is no number, no range such as 40-60, and no file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [int(row["index"]) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{shown(path)} is no CSV file with whole numbers in a column named index") from None


def adapt(folder: Path, out: Path, request: Request, *, retrain: bool = False, bars: Bars = quiet) -> Changes:
    """Change a run, leave the changed one in a folder of its own, and measure both.

    The changed run has the settings with which a training from the start would have the same data and prior, so that it can be
    evaluated, reported and changed again like any other.

    Args:
        folder: Of a finished run.
        out: Where the changed one goes; where it is there already, what is left to do is done.
        request: What is asked.
        retrain: Whether to train from the start, too, and to compare; that run is kept in ``out``.
        bars: Progress.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If something does not fit; the message says what.
        Paused: If training again was interrupted; the next call goes on with it.
    """
    run = read(folder)
    gone = _gone(run, request)
    settings = _settings(run, request, gone)
    data = settings.load(run.record.scale)
    complete = settle(settings.optimizer, settings.hyperparameters, len(data.train), settings.optimizers)
    settings = replace(settings, hyperparameters=complete)
    asked = {"from": str(folder.resolve()), **asdict(request), "data": data.fingerprint, "weights": _weights(run)}
    parts = _parts(run, data, gone)
    before = [run.probabilities(part, None) for _, part in parts]
    if not _is_there(out, asked):
        with appearing(out) as draft:
            _write(run, draft, settings, data, asked, *_adapted(run, data, gone, request, bars))
    after = read(out)
    models, seconds = ["before", "adapted"], [run.seconds, float(read_record(out)[ADAPTED]["took"]["seconds"])]
    each = [before, [after.probabilities(part, None) for _, part in parts]]
    if retrain:
        train(settings, out / AGAIN, resume=True, bars=bars)
        again = read(out / AGAIN)
        models, seconds = [*models, "trained again"], [*seconds, again.seconds]
        each.append([again.probabilities(part, None) for _, part in parts])
    examples = [Examples(name, part.labels, [probs[i] for probs in each]) for i, (name, part) in enumerate(parts)]
    return Changes(
        title=f"{run.title} on {run.data.name}, changed without training again",
        summary=_summary(run, after, gone, request),
        models=models,
        examples=examples,
        seconds=seconds,
        notes=read_record(out)[ADAPTED]["took"]["notes"],
        settings=flat(settings),
        thing=data.kind,
    )


def _weights(run: Run) -> str:
    return digest(run.folder / run.settings.weights_file, run.folder / "posterior.safetensors")


def _gone(run: Run, request: Request) -> list[int]:
    """The places of what is left out."""
    found = set(places(request.remove, run.data))
    for name in request.remove_class:
        if name not in run.data.classes:
            near = nearest(name, run.data.classes) or f"; its classes are {', '.join(run.data.classes)}"
            raise ValueError(f"there is no class {name!r} in {run.data.name} to leave out{near}")
        found.update((run.data.train.labels == run.data.classes.index(name)).nonzero()[:, 0].tolist())
    if len(found) == len(run.data.train):
        raise ValueError(f"all {len(found)} training {run.data.kind}s are to be left out; leave some")
    return sorted(found)


def _settings(run: Run, request: Request, gone: Sequence[int]) -> RunSettings:
    """Those with which a training from the start has the changed data and prior."""
    before = {*run.settings.without}
    there = [i for i in range(len(run.data.train) + len(before)) if i not in before]
    usual = settle(run.settings.optimizer, {}, len(run.data.train), run.settings.optimizers)
    hyperparameters = {name: v for name, v in run.settings.hyperparameters.items() if usual.get(name) != v}
    if request.weight_decay is not None:
        if prior_of(run.settings) is None:
            raise ValueError(f"the weight decay of {run.settings.optimizer} is no prior that can be exchanged; train again with it")
        hyperparameters["weight_decay"] = request.weight_decay
    also = tuple(str(Path(spec).resolve()) if Path(spec).exists() else spec for spec in request.add)
    return replace(
        run.settings,
        also=(*run.settings.also, *also),
        without=tuple(sorted({*before, *(there[i] for i in gone)})),
        hyperparameters=hyperparameters,
    )


def _parts(run: Run, data: Data, gone: Sequence[int]) -> list[tuple[str, Part]]:
    """The examples that are looked at."""
    train, stay = run.data.train, _staying(run, gone)
    some = stay[torch.linspace(0, len(stay) - 1, min(SAMPLE, len(stay))).long()]
    found = [("test", data.test), ("remaining", _some(train, some))]
    if gone:
        found.append(("removed", _some(train, torch.tensor(gone))))
    if len(data.train) > len(stay):
        found.append(("added", _some(data.train, torch.arange(len(stay), len(data.train)))))
    return found


def _staying(run: Run, gone: Sequence[int]) -> Tensor:
    kept = torch.ones(len(run.data.train), dtype=torch.bool)
    kept[list(gone)] = False
    return kept.nonzero()[:, 0]


def _some(part: Part, places: Tensor) -> Part:
    return replace(part, indices=part.indices[places], labels=part.labels[places])


def _adapted(run: Run, data: Data, gone: Sequence[int], request: Request, bars: Bars) -> tuple[br.Posterior, dict[str, Any]]:
    """The posterior of the changed run, whose model has the changed weights; and what it took, as run.json keeps it."""
    stay, removed = _staying(run, gone), Ordered(run.data, torch.tensor(gone, dtype=torch.int64))
    everything = Ordered(data, torch.arange(len(data.train)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            start = perf_counter()
            posterior = of_the_sum(_posterior(run, request.posterior, bars))
            how: dict[str, Any] = {"epochs": request.epochs, "lr": request.lr, "seed": request.seed}
            if request.method == "deviation":
                how = {}  # it is one solve
            if request.remembers:
                stayed, size = Ordered(run.data, stay, bars), request.size(len(stay))
                how["memory"] = br.Memory.select(run.model, posterior, stayed, size, request.memory_by, seed=request.seed)
            if len(data.train) > len(stay):
                how["add"] = Ordered(data, torch.arange(len(stay), len(data.train)))
            decay = prior_of(run.settings) if request.weight_decay is None else request.weight_decay
            if decay and request.method not in ALONE:  # of the mean loss, whatever the number of examples
                how["prior_precision"] = decay * len(data.train)
            before = residual_gradient(run.model, posterior, everything, CROSS_ENTROPY)
            if request.method in ALONE:
                way: Any = request.method
                changed, damping = br.forget(run.model, posterior, removed, method=way, **how).posterior, 0.0
            else:
                how |= {"method": request.method, **({"remove": removed} if gone else {})}
                changed, damping = _damped(run, posterior, data, request.damping, how)
            seconds = perf_counter() - start
            after = residual_gradient(run.model, changed, everything, CROSS_ENTROPY)
        except RuntimeError as error:
            raise ValueError(f"{run.folder}: {' '.join(str(error).split())}") from error
    notes = [
        f"The gradient of the summed loss and prior of the changed data has the norm {after:.3g}; with the old weights it was "
        f"{before:.3g}, and where training ends it is 0.",
        *dict.fromkeys(str(each.message) for each in heard),
    ]
    if damping and request.damping is None:
        notes.insert(1, f"A damping of {damping:g} pulled to the old weights: the loss of the changed data chose it.")
    left = {"before": before, "after": after}
    return changed, {"seconds": seconds, "damping": damping, "residual_gradient": left, "notes": notes}


def _damped(
    run: Run, posterior: br.Posterior, data: Data, damping: float | None, how: dict[str, Any]
) -> tuple[br.Posterior, float]:
    """The posterior of the changed run, and its damping: that given, or else found.

    Training again would end where the loss of the changed data, with the prior, is least, so a change that raises it went too far.
    Of the dampings 0, 1, 4, 16, ... the one with the least loss is taken. Where examples are left out the first that does not
    raise it is: what remains hardly tells how far to go, as it was fitted before.
    """
    if damping is not None:
        return br.adapt(run.model, posterior, damping=damping, **how), damping
    sample = _some(data.train, torch.linspace(0, len(data.train) - 1, min(SAMPLE, len(data.train))).long())

    def objective() -> float:
        own = run.probabilities(sample, None).gather(1, sample.labels[:, None]).clamp_min(1e-38)
        loss = -own.log().double().mean().item() * len(data.train)
        for name, p in run.model.named_parameters():
            if posterior.prior_precision is not None and name in posterior.prior_precision:
                delta = how.get("prior_precision", posterior.prior_precision[name])
                center = 0.0 if posterior.prior_mean is None else posterior.prior_mean[name]
                loss += float((delta * (p.detach().cpu() - center) ** 2).sum() / 2)
        return loss

    before, damping, least, best, falls = objective(), 0.0, math.inf, (posterior, 0.0), False
    while damping <= STIFFEST:
        changed = br.adapt(run.model, posterior, damping=damping, **how)
        if (now := objective()) < least:
            least, best = now, (changed, damping)
        elif falls:
            break
        falls = falls or now < before
        if falls and "remove" in how:
            break
        damping = max(1.0, 4 * damping)
    if not falls:
        warnings.warn(
            "the loss of the changed data rises with any damping; the least rise was taken. Train longer, or remember more",
            stacklevel=2,
        )
    run.model.load_state_dict(best[0].mean, strict=False)
    return best


def _posterior(run: Run, which: Which, bars: Bars) -> br.Posterior:
    """What the run has learned, or Laplace's approximation around its weights."""
    if which == "learned":
        kept = run.folder / "posterior.safetensors"
        if not kept.exists():
            raise ValueError(f"{run.folder} holds no posterior, as {run.title} leaves none; take --posterior laplace")
        return br.Posterior.load(kept)
    everything = Ordered(run.data, torch.arange(len(run.data.train)), bars)
    decay = prior_of(run.settings)
    return br.Posterior.laplace(run.model, everything, "diag", decay * len(run.data.train) if decay else "marglik")


def prior_of(settings: RunSettings) -> float | None:
    """The weight decay of a run, where that is a prior."""
    if not settings.optimizers[settings.optimizer].variational:
        return None
    return settings.hyperparameters.get("weight_decay")


def _is_there(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder holds what is asked for."""
    if not (out / "run.json").exists():
        claim(out)
        return False
    found = read_record(out).get(ADAPTED, {})
    if {name: list(v) if isinstance(v, tuple) else v for name, v in asked.items()} != {name: found.get(name) for name in asked}:
        raise FileExistsError(f"{out} already holds another run; choose another --out or delete it first")
    return True


def _write(
    run: Run,
    draft: Path,
    settings: RunSettings,
    data: Data,
    asked: dict[str, Any],
    posterior: br.Posterior,
    took: dict[str, Any],
) -> None:
    """A finished run in a folder."""
    settings.write_weights(run.model, draft)
    posterior.save(draft / "posterior.safetensors")
    write_lines(draft / "metrics.jsonl", run.history)
    record = describe(settings, data, run.record.processes)
    record |= {"seconds": run.record.seconds, ADAPTED: {**asked, "took": took}, "finished": True}
    write_record(draft / "run.json", record)


def _summary(run: Run, after: Run, gone: Sequence[int], request: Request) -> list[str]:
    things = f"{run.data.kind}s"
    added = len(after.data.train) - len(run.data.train) + len(gone)
    said = [f"{len(gone):,} of {len(run.data.train):,} training {things} were taken away"] if gone else []
    said += [f"{added:,} training {things} were added to {len(run.data.train):,}"] if added else []
    said += [f"the weight decay became {request.weight_decay:g}"] if request.weight_decay is not None else []
    first = "; ".join(said)
    size = request.size(len(run.data.train) - len(gone))
    memory = f", with a memory of {size:,} of those that stayed" if request.remembers else ""
    return [f"{first[0].upper()}{first[1:]}. The model was adapted by {request.method.replace('_', ' ')}{memory}."]
