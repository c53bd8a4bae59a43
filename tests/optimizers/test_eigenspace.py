"""EVON walks as the published code does, and as IVON where it has no basis."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import bayesrule as br
from bayesrule.algorithms.trajectories import Trajectory
from bayesrule.bases import Basis

GOLDEN = Path(__file__).parents[1] / "golden"
READ = [json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("evon", "evon_variants")]
CASES = {case["name"]: (case, read["problems"][case["problem"]]) for read in READ for case in read["cases"]}


def ours(t: Trajectory) -> br.EVON:
    """The optimizer of a case, in our names."""
    hyper = dict(t.hyper)
    if not hyper.pop("sampling"):
        hyper["ess"] = math.inf
    hyper["betas"] = tuple(hyper["betas"])
    hyper["shampoo_beta"] = None if hyper["shampoo_beta"] == -1 else hyper["shampoo_beta"]
    return br.EVON(t.params.values(), whiten=hyper.pop("whiten_prec_grad"), compat=True, noise=t.noise, **hyper)


def axes(t: Trajectory, values: list) -> list[torch.Tensor | None]:
    return [None if value is None else t.tensor(value) for value in values]


@pytest.mark.parametrize("name", CASES)
def test_same_places_weights_and_state_as_the_published_code(name):
    """Signs of eigenvectors are arbitrary, and the published ones have float32 accuracy: after a step they replace ours."""
    t = Trajectory(*CASES[name])
    optimizer = ours(t)
    samples = iter([sample for step in t.case["steps"] for sample in step["samples"]])
    near = dict(rtol=1e-7, atol=1e-7)

    def at_each() -> None:
        for key, place in next(samples)["theta"].items():
            torch.testing.assert_close(t.params[key].detach(), t.tensor(place), **near)

    for step, loss in t.walk(optimizer, at_each):
        published = sum(sample["loss"] for sample in step["samples"]) / len(step["samples"])
        torch.testing.assert_close(loss, t.tensor(published), **near)
        for key, p in t.params.items():
            state, expected = optimizer.state[p], step["after"]["state"][key]
            torch.testing.assert_close(p.detach(), t.tensor(step["after"]["params"][key]), **near)
            torch.testing.assert_close(state["hess"], t.tensor(expected["h"]), **near)
            assert int(state["step"]) - bool(t.hyper.get("max_precond_dim", 1)) == expected["step"]
            for found, wanted in zip(state["statistics"], axes(t, expected["GG"]), strict=True):
                torch.testing.assert_close(found, wanted, **near) if wanted is not None else None
                assert (found is None) == (wanted is None)
            mine, theirs = (Basis(optimizer.wide(p), basis) for basis in (state["basis"], axes(t, expected["Q"])))
            for q, r in zip(mine.axes, theirs.axes, strict=True):
                if q is not None:  # of small eigenvalues float32 does not know the vectors
                    assert float((q[:, 0] @ r[:, 0]).abs()) > 1 - 1e-4
            state["momentum"].copy_(theirs.turn(mine.back(state["momentum"])))
            torch.testing.assert_close(state["momentum"], t.tensor(expected["exp_avg"]), **near)
            state["basis"] = list(theirs.axes)


def test_all_published_cases_are_here():
    assert len(CASES) == 6 + 6
