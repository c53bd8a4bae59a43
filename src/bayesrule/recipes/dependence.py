"""What a finished run depends on: its training examples scored, in files beside the run."""

import csv
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

import bayesrule as br
from bayesrule.recipes.data import DOCUMENT, FORWARD, Bars, Data, Part, fitting, quiet
from bayesrule.recipes.formats.documents import SHOWN
from bayesrule.recipes.results import Run, read
from bayesrule.recipes.runs import Paused
from bayesrule.storage import replacing
from bayesrule.uses.charts import HEAT
from bayesrule.uses.curves import ClassLoss
from bayesrule.uses.dependence import TOP, Dependence
from bayesrule.uses.metrics import classification_metrics
from bayesrule.uses.products import Estimator
from bayesrule.uses.scores import Scores
from bayesrule.uses.sensitivity import Correction, Sensitivity

KEPT = "sensitivity.safetensors"
BATCH = 256  # examples scored at once, at most
OF_NO_SCALE = ("loo_loss", "gap", "leverage")  # without a posterior
Which = Literal["auto", "none", "laplace"]
Scale = Literal["posterior", "data"]


@dataclass(frozen=True)
class Ordered:
    """Training examples in some order, batch by batch, as a model takes them.

    Args:
        data: Of the run.
        order: Their places in the training part, shape (examples,).
        bars: Progress.
    """

    data: Data
    order: Tensor
    bars: Bars = quiet

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The places, batch by batch."""
        return self.order.split(fitting(self.data.extent, BATCH, FORWARD))

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        tick = self.bars("score", len(self.batches))
        for batch, stored in zip(self.batches, self.data.train.stream(self.batches), strict=True):
            try:
                yield self.data.scale(stored), self.data.train.labels[batch]
            finally:  # whoever has enough takes no more
                tick()


def examine(
    folder: Path,
    out: Path | None = None,
    *,
    subset: int | None = None,
    top: int = TOP,
    estimator: Estimator = "vjp_jvp",
    correction: Correction = "newton",
    score: str | None = None,
    posterior: Which = "auto",
    scale: Scale = "posterior",
    classes: bool = False,
    bars: Bars = quiet,
) -> Dependence:
    """Score the training examples of a run, without augmentation.

    What is found is kept in ``sensitivity.safetensors`` while it goes on, and a later call goes on from there: examples are taken
    in one order that looks random and is always the same, so that a subset is a beginning of all.

    Args:
        folder: Of a finished run.
        out: The folder of the scores; None is that of the run. Made if it is not there.
        subset: Only so many training examples; None is all.
        top: How many suspicious labels are shown.
        estimator: As for :class:`~bayesrule.Sensitivity`.
        correction: Likewise.
        score: What makes a label suspicious, one of :data:`~bayesrule.uses.scores.SCORES`; None is the leave-one-out loss, or the
            training loss where there is no posterior.
        posterior: "auto" is what the run has learned, or None if it has none; "none" never takes it; "laplace" makes one
            of the last layer.
        scale: "posterior" takes its variances as they are, "data" as wide as the curvature of the data allows, see
            :meth:`~bayesrule.Sensitivity.width`: for rankings by posteriors that are too wide.
        classes: Whether to estimate what leaving out each class would do.
        bars: Progress.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If an argument is wrong, the run is not finished or damaged, the data have changed, or the scores that were kept
            are of something else.
        Paused: If it was interrupted; what was scored is kept.
    """
    for name, value in (("subset", subset), ("top", top)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    run, out = read(folder), out or folder
    try:
        law, notes = _posterior(run, posterior)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
    asked = f"--score {score}" if score in OF_NO_SCALE else "--scale data" if scale == "data" else "--classes" if classes else None
    if law is None and asked:
        raise ValueError(f"{asked} needs a posterior, and {folder} has none that is taken; see --posterior")
    if classes and len(run.data.classes) > HEAT:
        raise ValueError(f"--classes tells of {HEAT} classes at most, and {run.data.name} has {len(run.data.classes)}; drop it")
    out.mkdir(parents=True, exist_ok=True)
    path = out / KEPT
    total = len(run.data.train)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    count = min(subset or total, total)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            factor = None
            if scale == "data":
                factor = Sensitivity(run.model, law).width(Ordered(run.data, torch.arange(total)))
                notes.append(
                    f"variances are scaled by {factor:.3g}, as far as the curvature of the data allows; leave-one-out losses then "
                    "lean to the training loss"
                )
                heard.clear()  # it is said again
            asker = Sensitivity(run.model, law, correction=correction, estimator=estimator, scale=factor)
            chosen = order[: max(count, min(_known(path), total))]
            found = asker.scores(Ordered(run.data, chosen, bars), path=path, subset=len(chosen))
        places = order[:count].sort()
        scores = Scores(**{one.name: getattr(found, one.name)[:count][places.indices] for one in fields(Scores)})
        losses = _without_classes(asker, run.data, bars) if classes else []
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(re.sub("name another( file)?$", "choose another --out", str(error))) from error
    except KeyboardInterrupt:
        if not path.exists():
            raise
        raise Paused(f"interrupted; what was scored is kept in {path}; the same command goes on from there") from None
    notes += _told(heard, scores, places.values, run.data.train)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return _dependence(run, scores, places.values, law, notes, losses, score, top, bars)


def _posterior(run: Run, which: Which) -> tuple[br.Posterior | None, list[str]]:
    """The posterior that is asked with, and what is to be said of it."""
    if which == "laplace":
        everything = Ordered(run.data, torch.arange(len(run.data.train)))
        return br.Posterior.laplace(run.model, everything, "last_layer", "marglik"), []
    if which == "auto" and run.posterior is not None:
        return run.posterior, []
    why = f"{run.title} leaves no posterior" if run.posterior is None else "the posterior is not taken"
    return None, [f"{why}; scores are those of SGD, which rank examples but estimate no leave-one-out loss"]


def _known(path: Path) -> int:
    """How many examples a file of scores holds; none if it is no such file, of which more is said by whoever reads it."""
    try:
        with safe_open(str(path), "pt") as file:
            return int(file.get_slice("labels").get_shape()[0])
    except Exception:  # whatever safetensors runs into
        return 0


def _told(heard: Any, scores: Scores, places: Tensor, part: Part) -> list[str]:
    """What was warned of, in the numbers of the data."""
    told = [str(each.message) for each in heard if " leverage " not in str(each.message)]
    refused = (scores.leverage >= 1).nonzero()[:, 0]
    if len(refused):
        some = f"{len(refused):,} of {len(scores):,} examples have a leverage of 1 or more"
        example = part.name(int(places[refused[0]]))
        told.append(
            f"{some} (the first: {example}); for them first-order estimates stand: the posterior may be too wide or not converged"
        )
    return list(dict.fromkeys(told))


def _without_classes(asker: Sensitivity, data: Data, bars: Bars) -> list[ClassLoss]:
    """What leaving out each class would do to its own examples."""
    everything, found = Ordered(data, torch.arange(len(data.train))), []
    tick = bars("leave", len(data.classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page says that these are a ranking
        for k, name in enumerate(data.classes):
            if count := int((data.train.labels == k).sum()):
                gone = asker.leave_class_out(k, everything)
                found.append(ClassLoss(name, count, gone.loss.mean().item(), gone.loss_without.mean().item()))
            tick()
    return found


def _dependence(
    run: Run,
    scores: Scores,
    places: Tensor,
    law: br.Posterior | None,
    notes: list[str],
    losses: list[ClassLoss],
    score: str | None,
    top: int,
    bars: Bars,
) -> Dependence:
    data, train = run.data, run.data.train
    part = Part(train.source, train.indices[places], train.labels[places])
    probs = run.probabilities(part, None, bars("name", -(-len(part) // run.at_once)))
    without = None
    if law is not None and scores.deviation.numel():
        without = (probs.clamp_min(1e-38).log() + scores.deviation).argmax(1)
    tested = classification_metrics(run.predictions(bars=bars)["test"], data.test.labels, ("nll", "accuracy"))

    def row(i: int) -> list[tuple[str, str]]:
        names = data.columns or [f"column {k + 1}" for k in range(data.shape[0])]
        return [(name, f"{value:.4g}") for name, value in zip(names, train[i].tolist(), strict=True)]

    def text(i: int) -> str:
        whole = str(train.source.texts[int(train.indices[i])])  # type: ignore[attr-defined]
        return whole if len(whole) > SHOWN else ""  # else its name has it

    return Dependence(
        title=f"What {run.title} learned {data.name} from",
        scores=scores,
        indices=places,
        labels=part.labels,
        predictions=probs.argmax(1),
        without=without,
        classes=data.classes,
        total=len(train),
        score=score or ("loo_loss" if law is not None else "loss"),
        estimates=law is not None,
        test=tested,
        thing=data.kind,
        names=train.name,
        images=train if data.kind == "image" else None,
        words=row if data.kind == "row" else text if data.kind == DOCUMENT else None,
        history=run.history,
        class_losses=losses,
        warnings=notes,
        identity=f"{data.fingerprint} {run.folder.name}",
        top=min(top, len(scores)),
    )


NUMBERS = ("loss", "loo_loss", "gap", "sensitivity", "self_influence", "cook", "leverage")
COLUMNS = ("index", "source", "label", "prediction", *NUMBERS, "loo_prediction")


def write_table(path: Path, found: Dependence) -> None:
    """A line for each scored example as RFC 4180 has it, in the order of the data; whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        known = {name: found.scores.by(name).tolist() for name in NUMBERS if found.estimates or name not in OF_NO_SCALE}
        for i in range(len(found.scores)):
            about = found.about(i) | {name: f"{values[i]:.9g}" for name, values in known.items()}
            writer.writerow(["" if about.get(name) is None else about[name] for name in COLUMNS])
