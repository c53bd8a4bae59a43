"""The published implementations' trajectories, walked again with their own random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bayesrule.algorithms.published_rows import AUTHORS
from bayesrule.algorithms.trajectories import Trajectory

GOLDEN = Path(__file__).parents[1] / "golden"
READ = {file: json.loads((GOLDEN / f"{file}.json").read_text()) for file in AUTHORS}
CASES = [
    pytest.param(file, case, read["problems"][case["problem"]], id=f"{file}: {case['name']}")
    for file, read in READ.items()
    for case in read["cases"]
]


@pytest.mark.parametrize(("file", "case", "problem"), CASES)
def test_same_places_losses_and_state_as_the_published_code(file, case, problem):
    trajectory = Trajectory(case, problem)
    optimizer = AUTHORS[file].make(trajectory)
    samples = iter([sample for step in case["steps"] for sample in step.get("samples", ())])

    def check(found: torch.Tensor, expected: object) -> None:
        torch.testing.assert_close(found.detach(), trajectory.tensor(expected), rtol=1e-9, atol=1e-9)

    def at_each() -> None:
        sample = next(samples, {})
        for key, expected in sample.get("theta", sample.get("w", {})).items():
            check(trajectory.params[key], expected)

    for step, loss in trajectory.walk(optimizer, at_each):
        published = step.get("loss_at_perturbed")
        if published is None:
            published = sum(sample["loss"] for sample in step["samples"]) / len(step["samples"])
        check(loss, published)
        found = AUTHORS[file].read(trajectory, optimizer)
        assert found.keys() <= step["after"].keys() and len(found) >= len(step["after"]) - 1
        for what, by_key in found.items():
            for key, value in by_key.items():
                check(value, step["after"][what][key])


def test_all_published_cases_are_here():
    assert {file: len(read["cases"]) for file, read in READ.items()} == {"vadam": 6, "vogn": 4, "sam": 5, "bsam": 5, "bayesbinn": 5}
    assert {case["dtype"] for read in READ.values() for case in read["cases"]} == {"float64"}
