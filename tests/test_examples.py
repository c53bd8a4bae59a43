"""The examples run, say what they promise to show, and draw it."""

import importlib
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

FOLDER = Path(__file__).parents[1] / "examples"
PICTURES = {
    "coin": "coin.png",
    "ridge_is_newton": "ridge.png",
    "gp_classification": "gp_classification.png",
    "training_loop": "training_loop.png",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example in an empty folder and returns what it printed, once its picture has been looked at."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        importlib.import_module(f"examples.{name}").main(tmp_path / "pictures")
        written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
        assert written == [Path("pictures") / PICTURES[name]]
        pixels = imread(tmp_path / written[0])[..., :3]
        assert pixels.shape[1] >= 1000
        assert pixels.reshape(-1, 3).std(axis=0).min() > 0.05  # not blank
        return capsys.readouterr().out

    return run


def number(text: str, line: str, place: int = 0) -> float:
    """A number of the line that begins with some words."""
    found = next(each.strip().removeprefix(line) for each in text.splitlines() if each.strip().startswith(line))
    return float(re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", found)[place])


def test_every_example_is_tested_and_short():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PICTURES)
    assert all(len(path.read_text().splitlines()) <= 100 for path in FOLDER.glob("*.py"))


def test_coin(run):
    text = run("coin")
    assert text.count("Beta(141, 111)") == 4  # at once, from two starts, in two days
    assert number(text, "the next spin is heads") == pytest.approx(141 / 252, abs=1e-4)
    assert number(text, "evidence against a fair coin") == 0.48  # the published figure
    parts = [number(text, "log evidence in nats", place) for place in range(3)]
    assert parts[0] + parts[1] == pytest.approx(parts[2], abs=2e-3)


def test_ridge_is_newton(run):
    text = run("ridge_is_newton")
    for name in ("br.newton, one step", "br.BayesRule, one step", "scikit-learn's Ridge", "covariance of the step"):
        assert number(text, name) < 1e-10
    low, high = number(text, "body mass index", 1), number(text, "body mass index", 2)
    assert 0 < low < number(text, "body mass index") < high


def test_gp_classification(run):
    text = run("gp_classification")
    assert "converged: True" in text
    assert number(text, "bound of the log evidence") > -18
    assert number(text, "flowers on the right side") >= 94
    near, far = number(text, "standard deviation of f"), number(text, "standard deviation of f", 1)
    assert far > 4 * near


def test_the_training_loop_is_that_of_the_readme(run):
    readme = (FOLDER.parent / "README.md").read_text()
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "sampled_params" in block)
    lines = [line for line in loop.splitlines() if line.strip() and not line.startswith("import")]
    indented = "".join(f"    {line}\n" for line in lines)
    assert len(lines) == 9 and indented in (FOLDER / "training_loop.py").read_text()
    text = run("training_loop")
    assert number(text, "right where it is sure") > number(text, "right") > 0.9
    known, noise = (number(text, "entropy, digits and noise", place) for place in (0, 1))
    assert noise > 2 * known
