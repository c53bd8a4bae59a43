"""``bayesrule sensitivity DIR``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bayesrule.recipes.dependence import Scale, Which, examine, write_table
from bayesrule.recipes.terminal import print_dependence, print_json, progress
from bayesrule.storage import write_text
from bayesrule.uses.dependence import TOP, render
from bayesrule.uses.products import Estimator
from bayesrule.uses.sensitivity import Correction

Score = Literal["loo_loss", "loss", "gap", "sensitivity", "self_influence", "cook", "leverage"]


@dataclass(frozen=True)
class RankExamples:
    """Rank the training examples of a run by how much it depends on them: labels to check, leave-one-out losses, a page.

    Args:
        dir: Folder of the run.
        subset: Score only so many training examples, chosen at random; a later call with more goes on from there.
        top: Labels to check that are shown.
        estimator: vjp_jvp for any model, layerwise for few classes, last_layer for the last layer alone, mc by draws.
        correction: newton, or first_order, which takes half as long.
        score: What makes a label suspicious; by default the leave-one-out loss, or without a posterior the training loss.
        posterior: auto takes what the run has learned, none does without, laplace makes one of the last layer.
        scale: posterior takes variances as they are, data as wide as the curvature of the data allows (for rankings).
        classes: Also estimate what leaving out each class would do.
        out: Folder for sensitivity.csv, sensitivity.html and the scores; by default that of the run.
        json: Print one JSON object instead of tables.
    """

    dir: tyro.conf.Positional[Path]
    subset: int | None = None
    top: int = TOP
    estimator: Estimator = "vjp_jvp"
    correction: Correction = "newton"
    score: Score | None = None
    posterior: Which = "auto"
    scale: Scale = "posterior"
    classes: bool = False
    out: Path | None = None
    json: bool = False

    def run(self) -> None:
        """Score, write and print."""
        out = self.out or self.dir
        with progress() as bars:
            found = examine(
                self.dir,
                out,
                subset=self.subset,
                top=self.top,
                estimator=self.estimator,
                correction=self.correction,
                score=self.score,
                posterior=self.posterior,
                scale=self.scale,
                classes=self.classes,
                bars=bars,
            )
        table, page = out / "sensitivity.csv", out / "sensitivity.html"
        write_table(table, found)
        write_text(page, render(found))
        if self.json:
            listed = {
                "suspects": [found.about(i) for i in found.suspects],
                "classes": {row.name: {"loss": row.loss, "loss_without": row.loss_without} for row in found.class_losses},
            }
            print_json({**found.figures, "score": found.score, **listed, "table": str(table), "page": str(page)})
            return
        print_dependence(found)
        print(f"Table: {table}\nPage: {page}")
