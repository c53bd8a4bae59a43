"""``bayesrule merge BASE A B ... --out DIR`` and ``bayesrule precision DIR``."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import bayesrule as br
from bayesrule.recipes.classifiers import open_classifier
from bayesrule.recipes.dependence import Ordered
from bayesrule.recipes.folder import read_record
from bayesrule.recipes.formats.pieces import few
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import Paused
from bayesrule.recipes.terminal import print_json, progress
from bayesrule.recipes.text import host
from bayesrule.uses.merging.folders import PRECISION, read_json
from bayesrule.uses.merging.sidecar import Way
from bayesrule.uses.merging.streaming import RECORD

Name = Literal["gradient_matching", "fisher", "task_arithmetic", "linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class MergeModels:
    """Merge models that were fine-tuned apart from one base, tensor by tensor, without data; or take one out again.

    Interrupted, the same command goes on. See docs/merging_checkpoints.md.

    Args:
        base: Folder of the model that all were trained from, or minilm.
        models: Folders of the trained models: checkpoints of Hugging Face, runs, or adapters (LoRA).
        out: New folder for the result.
        weights: Of the models: one for each, or one for all; negative takes out. fisher and linear divide them by their sum.
        method: gradient_matching and fisher weigh by precisions (see bayesrule precision), the others do without.
        density: Part of the changes that ties (by default 0.2) and dare (0.5) keep.
        seed: Of what dare drops.
        prior_precision: Of the base, where neither it nor the models say.
        dtype: Of the result: same as the base, float64, float32, bfloat16 or float16.
        max_shard_size: Bytes of a file of weights, at most.
        json: Print one JSON object instead of a sentence.
    """

    base: tyro.conf.Positional[str]
    models: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    weights: tuple[float, ...] = (1.0,)
    method: Name = "gradient_matching"
    density: float | None = None
    seed: int = 0
    prior_precision: float | None = None
    dtype: str = "same"
    max_shard_size: float = 5e9
    json: bool = False

    def run(self) -> None:
        """Merge and say so."""
        base = Path(self.base) if Path(self.base).exists() else host().find(self.base).folder
        done = (self.out / RECORD).exists()
        alphas: Any = self.weights[0] if len(self.weights) == 1 else self.weights
        how: dict[str, Any] = {"method": self.method, "density": self.density, "seed": self.seed, "dtype": self.dtype}
        how |= {"prior_precision": self.prior_precision, "max_shard_size": self.max_shard_size}
        try:
            with progress() as bars:
                record = br.merge_checkpoints(base, self.models, self.out, alphas=alphas, progress=bars, **how)
        except KeyboardInterrupt:
            raise Paused("interrupted; the same command goes on where it was") from None
        if not done:
            self._name_classes()
        if self.json:
            print_json({"out": str(self.out), **record})
        elif done:
            print(f"Nothing to do: {self.out} holds this merge. To make it again, delete the folder.")
        else:
            print(f"Merged {len(self.models)} models by {self.method}: {self.out}")

    def _name_classes(self) -> None:
        """Say so if models mean other classes by the same numbers; those of adapters are known to their runs alone."""
        known = {folder: names for folder in self.models if (names := classes_of(folder))}
        first = next(iter(known.values()), ())
        for folder, names in known.items():
            if names != first:
                warnings.warn(f"{self.models[0]} tells apart {few(first)}, and {folder} {few(names)}", stacklevel=2)
        if first and (self.out / "config.json").exists() and classes_of(self.out) != first:
            host().name_classes(self.out, first)


def classes_of(folder: Path) -> tuple[str, ...]:
    """The names of the classes that a checkpoint of Hugging Face, or a run, tells apart; none where nothing is said of them."""
    if (folder / "config.json").exists():
        names = read_json(folder / "config.json").get("id2label") or {}
        return tuple(str(names[key]) for key in sorted(names, key=int))
    if (folder / "run.json").exists():
        return tuple(map(str, read_record(folder)["data"].get("classes", ())))
    return ()


@dataclass(frozen=True)
class MeasurePrecision:
    """Measure how sure a classifier is of each weight, where training left no posterior, for merging.

    Args:
        dir: Folder of a run, or of a checkpoint of Hugging Face that classifies texts.
        data: A .csv or .tsv of the texts that it was trained on; of a run by default its own training data.
        method: squared_gradients of classes drawn from the model, ggn (the Gauss-Newton matrix), or observed (squared gradients of
            the classes in the data).
        subset: Look at so many examples only, chosen at random, and scale up.
        text_column: The column of texts.
        label_column: The column of classes; for observed alone.
        max_length: Tokens of a text that are read; by default those of the run, else 128.
        weight_decay: Of the mean loss: the prior's precision is it times the number of examples.
        seed: Of the choice, and of the classes that are drawn.
        json: Print one JSON object instead of a sentence.
    """

    dir: tyro.conf.Positional[Path]
    data: str | None = None
    method: Way = "squared_gradients"
    subset: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_length: int | None = None
    weight_decay: float = 1e-6
    seed: int = 0
    json: bool = False

    def run(self) -> None:
        """Measure and write."""
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset must be at least 1, got {self.subset}")
        if not self.weight_decay > 0:
            raise ValueError(f"weight_decay must be above 0, got {self.weight_decay}")
        with progress() as bars:
            if self.data is not None:
                label = self.label_column if self.method == "observed" else None
                found = open_classifier(self.dir, self.data, self.text_column, label, self.max_length)
                model, total = found.model, len(found.part)
                order = self._order(total)
                loader: Any = ((inputs, labels.clamp(min=0)) for inputs, labels in found.batches(order, bars, "measure"))
            elif (self.dir / "run.json").exists():
                run = read(self.dir)
                model, total = run.model, len(run.data.train)
                order = self._order(total)
                loader = Ordered(run.data, order, bars)
            else:
                raise ValueError(f"{self.dir} is no run; name the texts that it was trained on by --data")
            try:
                posterior = br.precision(
                    model, loader, self.method, prior_precision=self.weight_decay * total, num_data=total, seed=self.seed
                )
            except RuntimeError as error:
                raise ValueError(f"{self.dir}: {' '.join(str(error).split())}") from error
        br.save_precision(self.dir / PRECISION, posterior)
        if self.json:
            print_json({"precision": str(self.dir / PRECISION), "method": self.method, "examples": len(order), "num_data": total})
        else:
            print(f"Precision by {self.method} of {len(order):,} of {total:,} examples: {self.dir / PRECISION}")

    def _order(self, total: int) -> torch.Tensor:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.subset]
