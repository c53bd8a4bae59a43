"""Trained classifiers of texts, from folders of Hugging Face or of runs, with texts that they were not trained on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import bayesrule as br
from bayesrule.recipes.data import DOCUMENT, FORWARD, TOKEN, Bars, Part, Scale, fitting, quiet
from bayesrule.recipes.folder import read_record
from bayesrule.recipes.formats.pieces import few
from bayesrule.recipes.results import place, record_of
from bayesrule.recipes.sources import shown
from bayesrule.recipes.text import TextSettings, host
from bayesrule.uses.report import Method, Report, Trial

BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """A trained classifier and texts.

    Args:
        model: In eval mode.
        classes: What it tells apart.
        part: The texts, as tokens; labels are -1 where none were asked for.
        scale: How tokens become what the model takes.
        name: Of the data.
    """

    model: nn.Module
    classes: tuple[str, ...]
    part: Part
    scale: Scale
    name: str

    def batches(self, order: Tensor, bars: Bars = quiet, what: str = "predict") -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels of the texts at these places, batch by batch."""
        sizes = order.split(fitting((*self.part.source.shape, TOKEN), BATCH, FORWARD))
        device, tick = next(self.model.parameters()).device, bars(what, len(sizes))
        for chosen, stored in zip(sizes, self.part.stream(sizes), strict=True):
            yield self.scale(stored.to(device)), self.part.labels[chosen]
            tick()

    def report(self, title: str, bars: Bars = quiet) -> Report:
        """What it predicts of the texts, at its weights."""
        order = self.part.by_length()
        found = []
        for inputs, _ in self.batches(order, bars):
            probs = br.predict(self.model, None, inputs).probs
            assert probs is not None
            found.append(probs.float().cpu())
        probs = torch.cat(found)[order.argsort()]
        return Report(
            title=f"{title} on {self.name}",
            summary=(),
            classes=self.classes,
            labels=self.part.labels,
            methods=[Method(title, [Trial(probs)])],
            names=self.part.name,
            thing=DOCUMENT,
        )


def open_classifier(
    folder: Path, data: str, text_column: str = "text", label_column: str | None = "label", max_length: int | None = None
) -> Classifier:
    """The classifier in a folder, with the texts of a table.

    Args:
        folder: A checkpoint of Hugging Face with a head, or the run of ``bayesrule train text``.
        data: A .csv or .tsv of texts, and labels.
        text_column: The column of texts.
        label_column: The column of classes, which must be among those that the classifier knows; None reads none.
        max_length: Tokens of a text that are read; None is what a run was trained with, else 128.

    Raises:
        OSError: A file cannot be read.
        ValueError: There is no such classifier, or it does not know a class.
    """
    is_run, is_whole = (folder / "run.json").exists(), (folder / "config.json").exists()
    if is_run:
        settings = record_of(folder).settings
        if not isinstance(settings, TextSettings):
            raise ValueError(f"{folder} is no classifier of texts; --data takes one")
    else:
        settings = TextSettings(data, model=str(folder))
    if is_whole:
        settings = replace(settings, model=str(folder))
        model, classes = host().trained(folder)
    elif is_run:
        classes = tuple(map(str, read_record(folder)["data"].get("classes", ())))
        known: Any = SimpleNamespace(classes=classes)
        model = settings.build(known)
        settings.read_weights(model, folder)
    else:
        raise ValueError(f"{folder} holds neither config.json nor run.json; name a checkpoint of Hugging Face or a run")
    settings = replace(settings, text_column=text_column, max_length=max_length or settings.max_length)
    found, scale = settings.read(data, label_column)
    labels = found.labels
    if label_column is not None:
        if strange := [name for name in found.classes if name not in classes]:
            raise ValueError(
                f"{shown(Path(data))} has classes that {folder} does not know: {few(strange)}; it knows {few(classes)}"
            )
        labels = torch.tensor([classes.index(name) for name in found.classes])[labels]
    part = Part(found.source, torch.arange(len(found.source)), labels)
    return Classifier(model.to(place(settings.device)).eval(), classes, part, scale, found.name)
