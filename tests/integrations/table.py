"""The matrix of hosts as a table, and its place in the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- matrix: written by `make integrations` -->", "<!-- end of the matrix -->"
PRECISIONS = ("fp32", "bf16", "scaler")
MISSING = "not run"


def matrix(cells: Mapping[tuple[str, int, str], str]) -> str:
    """A row for each host and accumulation, a column for each precision."""
    hosts = list(dict.fromkeys(host for host, _, _ in cells))
    lines = ["| host | accumulation | " + " | ".join(PRECISIONS) + " |", "|---|---|" + "---|" * len(PRECISIONS)]
    for host in sorted(hosts, key=str.casefold):
        for accumulation in (1, 4):
            found = [cells.get((host, accumulation, precision), MISSING) for precision in PRECISIONS]
            lines.append(f"| {host} | {accumulation} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def write(table: str, page: Path) -> None:
    """Put the table between the markers of a page.

    Raises:
        ValueError: The page has no markers, or the table has holes.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for the matrix: a line {BEGIN} and a line {END}")
    if MISSING in table:
        raise ValueError(f"some cells did not run, so {page} stays as it is")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")
