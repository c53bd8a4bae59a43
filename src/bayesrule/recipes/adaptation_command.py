"""``bayesrule adapt``."""

from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from bayesrule.recipes.adaptation import Request, adapt
from bayesrule.recipes.endings import say
from bayesrule.recipes.terminal import print_json, print_rows, progress
from bayesrule.storage import write_text
from bayesrule.uses.changes import Changes, render_changes

PAGE = "adaptation.html"


@dataclass(frozen=True)
class AdaptRun(Request):
    """Change a finished run without training it again: add data, take examples out, change the prior.

    What comes out is a run again, with the settings that training from the start would have. With --retrain it is trained from the
    start, too, and a page shows how near the two are: on the test data, and on what was taken out or added.

    Args:
        dir: Folder of the run.
        out: Folder for the changed one.
        add: Data whose examples are added to the training part; a path or a name.
        remove: Training examples to take out: numbers, ranges such as 40-60, or CSV files with a column index, as of sensitivity.
        remove_class: Classes of which all training examples are taken out.
        weight_decay: Another strength of the prior.
        method: posterior_correction, kprior, prior, replay, functional; to take examples out alone also deviation, negation.
        memory: Examples that are remembered: a number, or below 1 a share of those that stay.
        memory_by: How they are chosen: surrogate_error, curvature, sensitivity, random.
        posterior: laplace makes one by a pass over the data; learned takes the run's own, which holds on after a short training.
        damping: Precision of one more pull to the old weights. None looks for one by the loss of the changed data with the prior.
        epochs: Passes over what is added and remembered.
        lr: Learning rate. None is the default.
        seed: Of the order of examples.
        retrain: Train from the start, too, and compare.
        json: Print one JSON object instead of tables.
    """

    dir: tyro.conf.Positional[Path] = tyro.MISSING
    out: Path = tyro.MISSING
    retrain: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        """Settings are checked when all of them are known."""

    def run(self) -> None:
        """Change, measure, write and print."""
        request = Request(**{one.name: getattr(self, one.name) for one in fields(Request)})
        with progress() as bars:
            found = adapt(self.dir, self.out, request, retrain=self.retrain, bars=bars)
        write_text(self.out / PAGE, render_changes(found))
        for note in found.notes:
            say(f"note: {note}")
        self.show(found)

    def show(self, found: Changes) -> None:
        """Print the results."""
        if self.json:
            print_json({**found.detailed[1], "rows": found.detailed})
            return
        print_rows(found.rows, found.columns)
        if found.is_compared:
            print(f"The same answers as the model that was {found.models[-1]}, and the distance of their probabilities:")
            print_rows(found.agreement, found.nearness)
        print(f"Page: {self.out / PAGE}")
