"""Runs that are stopped on purpose, and what must then be equal byte for byte."""

from bayesrule.recipes.folder import read_record

COMPARED = ("model.safetensors", "posterior.safetensors", "predictions.safetensors", "metrics.jsonl")


class Crash(Exception):
    """The machine is gone."""


def at_step(number, act, title=None):
    """Bars that act when so many steps are done; with a title, of that bar alone."""

    def bars(name, total):
        done = [0]

        def advance():
            done[0] += 1
            if done[0] == number and (name == title if title else name not in ("look", "predict")):
                act()

        return advance

    return bars


def crash():
    raise Crash


def content(folder):
    """What must be equal, byte for byte, and the record without its times."""
    record = read_record(folder)
    return {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in COMPARED} | {
        "run.json": {key: value for key, value in record.items() if key != "seconds"}
    }


def assert_equal(folder, other):
    first, second = content(folder), content(other)
    assert [name for name in first if first[name] != second[name]] == []
    expected = {name for name in first if first[name] is not None}
    assert {path.name for path in folder.iterdir()} == expected  # no checkpoint, no lock, nothing half written
