"""TensorBoard on request: every line of every seed, once; and a word where it is not installed."""

import sys
import types
from typing import ClassVar

import pytest

from bayesrule.recipes.tensorboard import watching


class Writer:
    """Writes down what it is told, into a folder as TensorBoard's does."""

    told: ClassVar[list] = []
    open = 0

    def __init__(self, folder):
        self.folder = folder
        type(self).open += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        type(self).open -= 1

    def add_scalar(self, name, value, step):
        self.told.append((self.folder, name, value, step))

    def flush(self):
        self.told.append((self.folder, "flush"))


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(Writer, "told", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return Writer.told


def test_every_line_is_written_into_the_folder_of_its_seed(told, tmp_path):
    with watching(tmp_path) as watch:
        for seed, epoch in ((0, 1), (0, 2), (1, 1)):
            watch(seed, {"epoch": epoch, "train_loss": 0.5, "lr": 0.1})
    first, second = (str(tmp_path / "tensorboard" / f"seed-{seed}") for seed in (0, 1))
    lines = [(first, 1), (first, 2), (second, 1)]
    expected = [row for f, e in lines for row in ((f, "train_loss", 0.5, e), (f, "lr", 0.1, e), (f, "flush"))]
    assert told == expected and Writer.open == 0


def test_what_was_written_before_is_written_anew(told, tmp_path):
    old = tmp_path / "tensorboard" / "seed-3" / "events"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    with watching(tmp_path) as watch:
        assert old.exists()  # not before there is a line
        watch(3, {"epoch": 1, "lr": 1.0})
        assert not old.exists()


def test_is_closed_whatever_happens(told, tmp_path):
    with pytest.raises(KeyError), watching(tmp_path) as watch:
        watch(0, {"epoch": 1, "lr": 1.0})
        raise KeyError
    assert Writer.open == 0


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard needs tensorboard, which is not installed: pip install tensorboard"
    with pytest.raises(ValueError, match=message), watching(tmp_path):
        pass


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with watching(tmp_path) as watch:
        for epoch in (1, 2):
            watch(3, {"epoch": epoch, "train_loss": 1 / epoch})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "seed-3")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 1.0), (2, 0.5)]
