"""Contenders at inference solve the same problem, and the tables hold what the targets ask for. Nothing here is timed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import inference, problems
from benchmarks.inference import Work
from benchmarks.ledger import Settings, against_targets
from benchmarks.problems import BATCH, LAPLACE, LOOP, OURS, SKLEARN
from benchmarks.targets import PAIRS, TARGETS
from matplotlib.image import imread
from numpy.testing import assert_allclose


def solved(rivals: problems.Rivals):
    return {name: solve() for name, solve in rivals.items()}


def test_ridge_is_the_same_in_both():
    found = solved(problems.ridge(200, 5))
    assert_allclose(found[OURS].mean, found[SKLEARN].coef_, rtol=1e-10)


def test_laplace_is_what_logistic_regression_optimizes():
    found = solved(problems.logistic(500, 5))
    assert all(found[way].converged for way in (OURS, LAPLACE))
    assert_allclose(found[LAPLACE].q.posterior.mean, found[SKLEARN].coef_[0], atol=1e-3)


def test_the_timed_logistic_posterior_is_right_to_a_millionth():
    error = problems.logistic_error(500, 5)
    assert error["bound"] < 1e-9 and error[OURS] < 1e-6 and error[LAPLACE] < 1e-6


def test_laplace_is_the_gaussian_process_of_scikit_learn():
    found = solved(problems.process(60, 2))
    assert found[OURS].converged
    assert found[LAPLACE].evidence_bound == pytest.approx(found[SKLEARN].log_marginal_likelihood_value_, rel=1e-7)
    assert found[OURS].evidence_bound != pytest.approx(found[LAPLACE].evidence_bound, rel=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_call_finds_what_the_loop_finds(pair):
    found = solved(problems.conjugate(pair, 7))
    assert_allclose(found[BATCH].log_evidence, torch.stack([each.log_evidence for each in found[LOOP]]), rtol=1e-12)
    blocks = [torch.stack(block) for block in zip(*(each.posterior.natural() for each in found[LOOP]), strict=True)]
    for batch, single in zip(found[BATCH].posterior.natural(), blocks, strict=True):
        assert_allclose(batch, single, rtol=1e-12)


def test_data_do_not_depend_on_the_day():
    assert torch.equal(problems.draw("normal", 3, 4), problems.draw("normal", 3, 4))
    assert not torch.equal(problems.draw("normal", 3), problems.draw("normal", 3, number=1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Everything in this process, at sizes that take no time."""

    def call(task, threads, *, env, **arguments):
        assert threads == int(env["OMP_NUM_THREADS"]) == int(env["OPENBLAS_NUM_THREADS"]) == 3
        module, name = task.split(":")
        return getattr({"inference": inference, "problems": problems}[module], name)(**arguments)

    monkeypatch.setattr(inference.child, "call", call)
    monkeypatch.setattr(inference, "REST", 0.0)
    monkeypatch.setattr(inference, "WORKS", {name: work._replace(N=300, D=2) for name, work in inference.WORKS.items()})
    curves = {name: (Work(work.maker, work.about, 0, 2), (20, 40)) for name, (work, _) in inference.CURVES.items()}
    monkeypatch.setattr(inference, "CURVES", curves)


def test_tables_hold_the_figures_that_have_targets(small, tmp_path: Path):
    tables = inference.tables(Settings(threads=3, quick=True, asked_rounds=2, plots=tmp_path / "plots"))
    figures = {key: figure for table in tables for key, figure in table.figures.items()}
    assert set(figures) == {target.key for target in TARGETS if target.key.startswith("inference, ")}
    found = against_targets(figures)
    assert found is not None and len(found.rows) == len(figures)
    assert all(len(row) == len(table.head) for table in tables for row in table.rows)
    assert len({table.title for table in tables}) == len(tables)
    assert all("float64" in table.note for table in tables[:4])
    picture = imread(tmp_path / "plots" / "growth_inference.png")
    assert picture.shape[:2] == (2 * (720 + inference.GAP), 1200)
    assert all(np.ptp(half[..., :3]) > 0.5 for half in np.split(picture, 2))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["growth_inference.png"]
