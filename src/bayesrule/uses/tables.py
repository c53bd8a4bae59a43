"""Tables of figures: what a column shows, which cell is best, and which differences say nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayesrule.uses.charts import BINS


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        key: Of a row.
        heading: As shown.
        decimals: How many are shown.
        percent: Whether a share is shown in percent.
        best: ``min`` or ``max`` of the values as shown; none if there is no better.
        meaning: In plain words, with ``{thing}`` for what an example is called and ``{unknown}`` for the unknown ones.
    """

    key: str
    heading: str
    decimals: int
    percent: bool = False
    best: Callable[..., Any] | None = None
    meaning: str = ""

    def show(self, value: float, spread: float | None = None) -> str:
        """A value, with its spread over seeds if there is one.

        Example:
            >>> COLUMNS[0].show(0.9751), COLUMNS[0].show(0.9751, 0.002), COLUMNS[1].show(0.0812, 0.0041)
            ('97.5 %', '97.5 ± 0.2 %', '0.081 ± 0.004')
        """
        parts = [value] if spread is None else [value, spread]
        scale = 100 if self.percent else 1
        return " ± ".join(f"{scale * part:.{self.decimals}f}" for part in parts) + " %" * self.percent


COLUMNS = (
    Column("accuracy", "accuracy", 1, True, max, "Share of test {thing}s named correctly. Larger is better."),
    Column(
        "nll",
        "NLL",
        3,
        best=min,
        meaning="Negative log-likelihood: how surprising the true answers were to the method, in nats. It punishes confident "
        "mistakes most. Smaller is better.",
    ),
    Column(
        "ece",
        "ECE",
        3,
        best=min,
        meaning="Expected calibration error: the distance between what the method promised and what it kept, over "
        f"{BINS} equal bins of confidence. Smaller is better.",
    ),
    Column("brier", "Brier", 3, best=min, meaning="Squared error of the probabilities, from 0 to 2. Smaller is better."),
    Column(
        "auroc_ood",
        "AUROC unknown",
        3,
        best=max,
        meaning="Of one test {thing} and one of the {unknown}: the chance that the latter is given more uncertainty (predictive "
        "entropy). 0.5 is guessing, 1 is perfect. Larger is better.",
    ),
    Column("seconds", "seconds", 1, meaning="Training time, without validation."),
)
SECONDS = COLUMNS[-1]

TOKENS = (
    Column(
        "perplexity",
        "perplexity",
        3,
        best=min,
        meaning="At the mean weights: as if so many tokens had been equally likely at every place. Smaller is better.",
    ),
    Column(
        "perplexity_mc",
        "averaged",
        3,
        best=min,
        meaning="The same of probabilities averaged over networks drawn from the posterior.",
    ),
    Column("bits_per_byte", "bits/byte", 4, best=min, meaning="At the mean: what a byte of text takes, whatever the tokens."),
    Column("bits_per_byte_mc", "averaged", 4, best=min, meaning="The same, averaged."),
    Column(
        "ece",
        "ECE",
        4,
        best=min,
        meaning="Calibration error of the most probable token at the mean: the distance between promise and result. "
        "Smaller is better.",
    ),
    Column("ece_mc", "averaged", 4, best=min, meaning="The same, averaged."),
    SECONDS,
)
"""What there is to say of a language model."""

DETAILS: dict[str, tuple[Column, ...]] = {
    "calibration": (
        COLUMNS[2],
        Column("adaptive_ece", "adaptive ECE", 3, best=min),
        Column("classwise_ece", "classwise ECE", 4, best=min),
        Column("mce", "MCE", 3, best=min),
        COLUMNS[3],
    ),
    "selective prediction": (
        Column("auroc", "AUROC right", 3, best=max),
        Column("aurc", "AURC", 4, best=min),
        Column("eaurc", "E-AURC", 4, best=min),
        Column("coverage_at_1_risk", "answered at 1\u00a0% wrong", 1, True, max),
        Column("coverage_at_5_risk", "at 5\u00a0%", 1, True, max),
    ),
    "unknown data": (
        COLUMNS[4],
        Column("aupr_in", "AUPR known", 3, best=max),
        Column("aupr_out", "AUPR unknown", 3, best=max),
        Column("fpr95", "known flagged at 95\u00a0% found", 1, True, min),
    ),
}
"""What there is to say of a classifier beyond the table of results, by subject."""

Cells = list[list[tuple[str, bool]]]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COLUMNS) -> tuple[list[Column], Cells]:
    """The columns that apply, and every row's cells: the text, and whether no row shows a better value.

    Example:
        >>> columns, cells = table([{"accuracy": 0.9712, "nll": 0.1}, {"accuracy": 0.9713, "nll": 0.2}])
        >>> [column.heading for column in columns], cells
        (['accuracy', 'NLL'], [[('97.1 %', True), ('0.100', True)], [('97.1 %', True), ('0.200', False)]])
    """
    columns = [column for column in columns if any(column.key in row for row in rows)]
    return columns, cells_of(columns, rows)


def cells_of(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Every row's cells; the best is told by the means as shown, whatever their spread."""
    best = [
        column.show(column.best(row[column.key] for row in rows if column.key in row)) if column.best else None
        for column in columns
    ]

    def cell(column: Column, row: Mapping[str, Any], top: str | None) -> tuple[str, bool]:
        if column.key not in row:
            return "", False
        value = row[column.key]
        return column.show(value, row.get("spread", {}).get(column.key)), column.show(value) == top

    return [[cell(column, row, top) for column, top in zip(columns, best, strict=True)] for row in rows]


def undecided(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], error: float) -> list[str]:
    """Headings of the columns whose two best rows differ by less than their spread or, in accuracy, the test's standard error.

    Example:
        >>> rows = [{"accuracy": 0.95, "nll": 0.1}, {"accuracy": 0.96, "nll": 0.2}]
        >>> undecided(COLUMNS[:2], rows, error=0.02), undecided(COLUMNS[:2], rows, error=0.005)
        (['accuracy'], [])
    """
    close = []
    for column in columns:
        able = sorted((row for row in rows if column.key in row), key=lambda row: row[column.key], reverse=column.best is max)[:2]
        if column.best and len(able) > 1:
            noise = [row.get("spread", {}).get(column.key, 0.0) for row in able]
            if abs(able[0][column.key] - able[1][column.key]) < max(*noise, error if column.key == "accuracy" else 0.0):
                close.append(column.heading)
    return close
