"""What each optimizer keeps between steps, and holds within one, in bytes for each byte of float32 parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayesrule as br

SIZE = 64  # a matrix of 64 x 64
KEEPS = {
    "SGD": (lambda p: br.SGD(p, 0.1), 0, 0),
    "SGD, momentum": (lambda p: br.SGD(p, 0.1, momentum=0.9), 1, 0),
    "RMSprop": (lambda p: br.RMSprop(p), 1, 0),
    "Adam": (lambda p: br.Adam(p), 2, 0),
    "AdamW": (lambda p: br.AdamW(p), 2, 0),
    "IVON": (lambda p: br.IVON(p, 0.1, 100.0), 2, 1),
    "IVON, low": (lambda p: br.IVON(p, 0.1, 100.0, memory="low"), 2, 0),
    "VON": (lambda p: br.VON(p, 0.01, 100.0), 2, 1),
    "OGN": (lambda p: br.OGN(p, 0.1, 100.0), 2, 1),
    "VOGN": (lambda p: br.VOGN(p, 0.1, 100.0), 2, 2),
    "Vadam": (lambda p: br.Vadam(p, 0.01, 100.0), 2, 1),
    "Vprop": (lambda p: br.Vprop(p, 0.01, 100.0), 1, 1),
    "SAM": (lambda p: br.SAM(p, 0.1), 1, 2),
    "BSAM": (lambda p: br.BSAM(p, 0.1, 100.0), 2, 2),
    "STE": (lambda p: br.STE(p, 0.1), 2, 0),
    "BayesBiNN": (lambda p: br.BayesBiNN(p, 0.1, 100.0), 2, 1),
    "EVON": (lambda p: br.EVON(p, 0.01, 100.0, 0.1), 2 + 4, 1),  # two matrices for each axis, each as large as a square parameter
}


@pytest.mark.parametrize("name", KEEPS)
def test_keeps_and_holds_no_more_than_it_says(name):
    make, keeps, holds = KEEPS[name]
    model = nn.Linear(SIZE, SIZE, bias=False)
    optimizer, p = make(model.parameters()), model.weight

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model(torch.ones(8, SIZE)).square().mean(1)
        if optimizer.squares_examples:
            return losses
        losses.mean().backward()
        return losses.detach().mean()

    for _ in range(3):
        optimizer.step(closure)
    lists = [value for value in optimizer.state[p].values() if isinstance(value, list)]
    kept = [t for key, t in optimizer.state[p].items() if key != "step" and isinstance(t, Tensor)]
    kept += [t for each in lists for t in each if t is not None]
    assert sum(t.nbytes for t in kept) == keeps * p.nbytes
    memory = {t.untyped_storage().data_ptr() for t in kept}
    blocks = [b for plot in optimizer.layout.plots() for b in plot.flats.values() if b.untyped_storage().data_ptr() not in memory]
    assert sum(b.nbytes for b in blocks) == holds * p.nbytes
