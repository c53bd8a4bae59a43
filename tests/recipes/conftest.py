"""Small data and models of a user, and runs on them."""

import math
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tests.recipes.stopped import Crash, at_step, crash

from bayesrule.recipes import runs
from bayesrule.recipes.runs import train
from bayesrule.recipes.settings import Settings

NETS = """
from torch import nn

def dropout(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, classes))

def normed(shape, classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))

def tied(shape, classes):
    first = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), first, nn.Tanh(), nn.Linear(64, classes))

class Fragile(nn.Linear):
    def forward(self, x):
        if self.training:
            raise RuntimeError("out of luck")
        return super().forward(x)

def fragile(shape, classes):
    return nn.Sequential(nn.Flatten(), Fragile(64, classes))

def frozen(shape, classes):
    first = nn.Linear(64, 16).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(16, classes))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, 165 + 36 + 36 or so images of three classes, and models of the user's own."""
    folder = tmp_path_factory.mktemp("world")
    digits = load_digits(n_class=3)
    images, labels = digits.images[:240].astype(np.uint8) * 15, digits.target[:240]
    np.savez(folder / "small.npz", x=images, y=labels)
    for part, few in (("train", range(60)), ("val", range(60, 90)), ("test", range(90, 120))):
        for i in few:
            path = folder / "pictures" / part / str(labels[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
    (folder / "own_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_nets", None)


@pytest.fixture
def settings(world):
    def settings(optimizer="ivon", **changes):
        return Settings(str(world / "small.npz"), optimizer, **{"model": "mlp", "epochs": 3, "batch_size": 36, **changes})

    return settings


@pytest.fixture
def each_step(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(runs, "EVERY", 0.0)
    monkeypatch.setattr(runs, "EFFORT", math.inf)


@pytest.fixture
def crashed(settings, tmp_path, each_step):
    """A run that crashed in its second epoch."""
    with pytest.raises(Crash):
        train(settings(), tmp_path / "run", bars=at_step(8, crash))
    return tmp_path / "run"
