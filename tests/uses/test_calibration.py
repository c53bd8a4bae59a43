import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from bayesrule.uses.calibration import fit_temperature
from bayesrule.uses.metrics import nll

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())


def problem(seed: int, examples: int = 500, classes: int = 6):
    """Labels drawn from the softmax of the logits, so the best temperature is near 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def test_nll_over_the_golden_temperatures():
    logits = torch.tensor(GOLDEN["sample_logits"][0], dtype=torch.float64)
    labels = torch.tensor(GOLDEN["labels"])
    for temperature, expected in zip(GOLDEN["temperature"]["grid"], GOLDEN["temperature"]["nll"], strict=True):
        assert nll((logits / temperature).softmax(1), labels).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_minimises_the_nll(seed, scale):
    logits, labels = problem(seed)
    logits = scale * logits
    temperature = fit_temperature(logits, labels)

    def loss(u):
        return F.cross_entropy(logits / math.exp(u), labels).item()

    found = minimize_scalar(loss, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10})
    assert math.log(temperature) == pytest.approx(found.x, abs=1e-6)
    assert loss(math.log(temperature)) <= found.fun + 1e-15
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits / t, labels).backward()
    assert abs(t.grad.item()) * temperature < 1e-12


def test_finds_the_temperature_of_the_labels():
    logits, labels = problem(7, examples=20_000)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-12)


def test_closed_form_of_two_classes():
    logits = torch.tensor([[2.0, 0.0]]).repeat(10, 1)
    labels = torch.tensor([1] * 2 + [0] * 8)
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(0.8 / 0.2), rel=1e-12)


def test_is_deterministic_and_ignores_precision_order_and_shift():
    logits, labels = problem(8)
    logits = logits.float()
    temperature = fit_temperature(logits, labels)
    assert fit_temperature(logits, labels) == temperature
    assert fit_temperature(logits.double(), labels) == temperature
    assert fit_temperature(logits.flip(0), labels.flip(0)) == pytest.approx(temperature, rel=1e-12)
    shift = torch.arange(500.0, dtype=torch.float64)[:, None]
    assert fit_temperature(logits.double() + shift, labels) == pytest.approx(temperature, rel=1e-9)


def test_one_gross_mistake_among_many_sure_ones():
    logits = torch.zeros(1000, 3)
    logits[:, 0] = 50
    labels = torch.zeros(1000, dtype=torch.long)
    labels[0] = 2
    temperature = fit_temperature(logits, labels)
    p = (logits[0] / temperature).softmax(0)
    assert p[0].item() == pytest.approx(0.999, abs=1e-6)


def test_no_minimum_gives_a_limit_and_says_so():
    logits = torch.eye(3)
    with pytest.warns(UserWarning, match="every example is classified right; using 0.0001"):
        assert fit_temperature(logits, torch.arange(3)) == pytest.approx(1e-4)
    with pytest.warns(UserWarning, match="no better than chance; using 10000"):
        assert fit_temperature(-logits, torch.arange(3)) == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"logits must have shape \(examples, classes\).*got \(3,\)"),
        (torch.zeros(0, 3), torch.zeros(0).long(), r"neither empty; got \(0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must lie in \[0, 3\); got 3"),
        (torch.zeros(2, 3), torch.tensor([0]), r"labels must have shape \(2,\)"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "logits must be finite; got inf"),
    ],
)
def test_bad_input(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)
