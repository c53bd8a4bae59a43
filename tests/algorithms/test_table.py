"""The table of algorithms: complete, computed when asked, and every row close to its twin."""

import functools
import math
from pathlib import Path

import pytest
import torch

import bayesrule as br
from bayesrule.algorithms import inference_rows
from bayesrule.algorithms import table as module
from bayesrule.optimizers import execution

KEYS = ["algorithm", "family", "expectation", "curvature", "retraction", "rates", "twin", "difference", "source"]
ROWS = {row.algorithm: row for row in module.ROWS}


@functools.cache
def read(name):
    """A row as the table has it, computed once, by the generator of nobody else."""
    before = torch.get_rng_state()
    row = ROWS[name].read()
    assert torch.equal(before, torch.get_rng_state())
    return row


@pytest.mark.parametrize("name", ROWS)
def test_row_is_complete_and_close_to_its_twin(name):
    row = read(name)
    assert list(row) == KEYS
    assert all(isinstance(row[key], str) and row[key] for key in KEYS if key != "difference")
    # the optima of independent solvers are themselves known to 1e-10 only
    limit = 1e-9 if "optimum" in row["twin"] or "grid integration" in row["twin"] else 1e-12
    assert math.isfinite(row["difference"]) and row["difference"] < limit


def test_every_algorithm_of_this_release_has_a_row():
    optimizers = {"SGD", "RMSprop", "Adam", "AdamW", "IVON (price)", "IVON (gradsq)"}
    published = ["EVON", "VON", "OGN", "VOGN", "Vadam", "Vprop", "SAM", "bSAM", "BayesBiNN"]
    optimizers |= {"iBLR, full", "SLANG", "matrix normal, factor by factor", "dropout", "Multi-IVON"}
    optimizers |= {*published, "SAM, m-sharpness", "straight-through estimator"}
    classics = {"Newton", "Laplace", "ridge", "linear regression", "gradient descent"}
    pairs = {name for name, *_ in inference_rows.PAIRS}
    models = {name for name, *_ in inference_rows.MODELS}
    assert len(pairs) == 15 and len(models) == 16
    assert optimizers | classics | pairs | models == set(ROWS)


def test_slots_are_read_off_the_rule():
    assert [read("IVON (price)")[key] for key in KEYS[1:5]] == ["Diagonal", "MonteCarlo", "Reparameterized", "Riemannian"]
    assert [read("ridge")[key] for key in KEYS[1:5]] == ["Full", "Delta", "Hessian", "Natural"]


def test_difference_is_computed_when_the_table_is_called(monkeypatch):
    monkeypatch.setattr(execution, "SHARED", {})  # what was recorded before does not know of the fault
    monkeypatch.setattr(br.Riemannian, "precision", lambda self, q, curvature, rho: q.moved(hess=q.hess * 1.5))
    assert ROWS["IVON (price)"].read()["difference"] > 1e-3


def test_the_page_is_the_table(monkeypatch):
    monkeypatch.setattr(module, "table", lambda: [read(name) for name in ROWS])
    written = (Path(__file__).parents[2] / "docs" / "table.md").read_text()
    assert written == module.page(), "docs/table.md is stale: make table"
    assert written.count("\n|") >= 2 + 25
