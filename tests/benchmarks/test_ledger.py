"""The ledger's writer and its statistics. Nothing here is timed."""

from pathlib import Path

import pytest
from benchmarks import ledger
from benchmarks.ledger import Table, against_targets, append, markdown, section, verdict
from benchmarks.targets import TARGETS, Target
from benchmarks.timing import Lap, Neighbors, Spread, digits, interleave, ratio, spread, typical

OLDER = "# Ledger\n\n## An older section\n\n| a |\n|---|\n| 1 |\n"


def laps(*seconds: float) -> list[Lap]:
    return [Lap(value, faults=number) for number, value in enumerate(seconds)]


def test_a_ratio_is_taken_round_by_round():
    # a machine that slows down threefold in the last round does not move it
    found = ratio(laps(2.0, 2.2, 6.0), laps(1.0, 1.0, 3.0))
    assert found == pytest.approx((2.0, 2.0, 2.1, 2.0))
    assert ratio(laps(4.0, 1.0), laps(2.0, 2.0)).best == pytest.approx(0.5)


def test_a_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError):
        ratio(laps(1.0, 2.0), laps(1.0))


def test_quartiles_and_a_single_value():
    assert spread([5, 1, 4, 2, 3], best=1) == Spread(3, 2, 4, 1)
    assert spread([7.0], best=7.0) == Spread(7.0, 7.0, 7.0, 7.0)
    assert str(Spread(1.0304, 1.01, 12.34, 0.999)) == "1.030 (1.010 to 12.3) [0.999]"
    assert typical(laps(3.0, 1.0, 2.0)) == Lap(2.0, 1)


@pytest.mark.parametrize(("value", "text"), [(0, "0.000"), (1.0304, "1.030"), (2.345, "2.35"), (23.45, "23.4"), (1234.5, "1,234")])
def test_digits(value, text):
    assert digits(value) == text


def test_all_rivals_take_every_round_in_changing_order():
    order: list[str] = []

    def rival(name: str):
        return lambda: order.append(name) or Lap(1.0)

    found = interleave({name: rival(name) for name in "abc"}, rounds=20, warmup=2, seconds=60)
    assert {name: len(each) for name, each in found.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 22 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6


def test_no_round_begins_after_the_time_is_up_but_the_least():
    found = interleave({"a": lambda: Lap(1.0)}, rounds=1000, warmup=0, seconds=-1, least=3)
    assert len(found["a"]) == 3


def test_neighbors_are_named_in_one_line():
    line = Neighbors().report()
    assert line.startswith("load average") and "\n" not in line
    assert Neighbors.warning(False) == "" and "busy" in Neighbors.warning(True)


def test_a_markdown_table_is_aligned():
    assert markdown(("a", "long head"), [("longer", "1")]).splitlines() == [
        "| a      | long head |",
        "| ------ | --------- |",
        "| longer | 1         |",
    ]


@pytest.mark.parametrize(
    ("at_least", "value", "expected"),
    [
        (False, 3.1, "**missed**"),
        (False, 3.0, "met"),
        (False, 2.0, "met, stretch too"),
        (True, 2.9, "**missed**"),
        (True, 9, "met, stretch too"),
    ],
)
def test_verdict(at_least, value, expected):
    target = Target("key", "words", bound=3.0, stretch=4.0 if at_least else 2.0, at_least=at_least)
    assert verdict(target, spread([value], value)) == expected


def test_only_what_was_measured_is_held_against_its_target():
    assert against_targets({"something else": spread([1.0], 1.0)}) is None
    found = against_targets({TARGETS[0].key: spread([1.0], 1.0)})
    assert found is not None and [row[0] for row in found.rows] == [TARGETS[0].words]


def test_targets_differ():
    assert len({target.key for target in TARGETS}) == len(TARGETS) == len({target.words for target in TARGETS})


def test_a_section_begins_with_the_targets():
    table = Table("work", ("optimizer",), [("AdamW",)], {TARGETS[0].key: spread([1.0], 1.0)}, "5 rounds")
    text = section("2026-11-24, commit abc1234", ["a machine", "a command"], [table])
    assert text.startswith("## 2026-11-24, commit abc1234\n\n- a machine\n- a command\n\n### Targets\n\n| ")
    assert "### Work\n\n| optimizer |" in text and text.endswith("5 rounds\n")


def test_a_section_goes_behind_older_ones(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text(OLDER)
    append("## New\n\ntext\n\n", path)
    append("## Newer\n", path)
    assert path.read_text() == f"{OLDER}\n## New\n\ntext\n\n## Newer\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_section_of_all(tmp_path: Path):
    append("## New\n", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "## New\n"


def test_a_run_that_dies_while_writing_leaves_the_ledger_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "README.md"
    path.write_text(OLDER)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        append("## New\n", path)
    assert path.read_text() == OLDER
    assert list(tmp_path.iterdir()) == [path]
