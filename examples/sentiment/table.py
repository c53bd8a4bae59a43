"""The figures that run.sh left, as a table: means over the three domains, mean and standard deviation over seeds.

python table.py figures
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

TASKS = ("tweets", "amazon", "news")


def spread(values: list[float], scale: float, decimals: int) -> str:
    """Mean and standard deviation."""
    return " ± ".join(f"{scale * v:.{decimals}f}" for v in [mean(values), *([stdev(values)] if len(values) > 1 else [])])


def main(folder: Path) -> None:
    """Print it, the best NLL first."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for path in folder.glob("*.json"):
        name, domain, seed, _ = path.name.split(".")
        found[name][seed][domain] = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, seeds in found.items():
        each = {key: [mean(by[task][key] for task in TASKS) for by in seeds.values()] for key in ("nll", "accuracy")}
        movies = [by["movies"]["accuracy"] for by in seeds.values()]
        rows.append((mean(each["nll"]), name, spread(each["accuracy"], 100, 1), spread(each["nll"], 1, 3), spread(movies, 100, 1)))
    print("| merged by | accuracy, three tasks (%) | NLL | accuracy on movies (%) |\n|---|---|---|---|")
    for _, *cells in sorted(rows):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
