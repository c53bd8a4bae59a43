"""What several ranks measure together is what one process measures of all their data."""

import pytest
import torch
from tests.processes import measuring, ranks


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.hosts)])
def test_ranks_say_together_what_one_process_says(size, tmp_path):
    found = ranks.run(size, tmp_path, measuring.measured)
    assert not any(isinstance(one, str) for one in found), found
    alone = found[0].pop("alone")
    assert alone.item() == pytest.approx(measuring.CASES["BrierScore {}"][2](*measuring.data()[:2]).item(), rel=1e-12)
    for name, (kind, options, function, batch) in measuring.CASES.items():
        assert all(torch.equal(one[name], found[0][name]) for one in found), name
        streamed = kind(**options)
        streamed.update(*batch)
        gap = (found[0][name] - streamed.compute()).abs().item()
        bound = 0 if len(streamed._kept[0]) > 1 else 1e-14  # what is kept by example is the same to the bit
        assert gap <= bound * max(1.0, found[0][name].abs().item()), f"{name}: {gap}"
        assert found[0][name].item() == pytest.approx(function(*batch).item(), rel=1e-12), name


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("case", "message"),
    [(measuring.unalike, "different things: their sums have 135 and 225 numbers"), (measuring.unseen, "has seen no data")],
)
def test_misuse_is_refused_on_every_rank(case, message, tmp_path):
    for found in ranks.run(2, tmp_path, case):
        assert message in found.strip().splitlines()[-1]
