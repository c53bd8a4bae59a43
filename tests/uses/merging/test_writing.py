"""Files written tensor by tensor: safetensors reads them, and a later writer goes on with them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bayesrule.uses.merging.writing import Planned, Writer, check_written, index_of, ordered, shards

TENSORS = {
    "wide": torch.arange(3, dtype=torch.float64), "half": torch.ones(5).bfloat16(), "whole": torch.tensor([[1, 2]]),
    "one": torch.tensor(2.5), "true": torch.tensor([True, False, True]), "none": torch.zeros(0, 4),
}  # fmt: skip
PLAN = {name: Planned(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
PLAN = {name: PLAN[name] for name in ordered(PLAN)}


def fill(writer, names, block=2):
    for name in names:
        for part in TENSORS[name].flatten().split(block):
            writer.append(part)


def same(file):
    found = load_file(file)
    return found.keys() == TENSORS.keys() and all(
        t.equal(found[name]) and t.dtype == found[name].dtype for name, t in TENSORS.items()
    )


def test_safetensors_reads_it(tmp_path):
    with Writer(tmp_path / "a", PLAN, {"format": "pt"}) as writer:
        fill(writer, PLAN)
        writer.sync()
    check_written(tmp_path / "a", PLAN)
    with safe_open(tmp_path / "a", framework="pt") as found:
        assert found.metadata() == {"format": "pt"}
    assert same(tmp_path / "a")
    assert [PLAN[name].dtype.itemsize for name in PLAN] == sorted((t.dtype.itemsize for t in TENSORS.values()), reverse=True)


@pytest.mark.parametrize("done", range(len(PLAN) + 1))
def test_another_goes_on_after_what_was_done(tmp_path, done):
    names = list(PLAN)
    with Writer(tmp_path / "a", PLAN, {}) as writer:
        fill(writer, names[:done])
        writer.append(torch.full((7,), 9, dtype=torch.uint8))  # of a tensor that was not finished
    with Writer(tmp_path / "a", PLAN, {}, done) as writer:
        fill(writer, names[done:])
    assert same(tmp_path / "a")


def test_what_is_missing_is_noticed(tmp_path):
    with Writer(tmp_path / "a", PLAN, {}) as writer:
        fill(writer, list(PLAN)[:-1])
    with pytest.raises(OSError, match="was not written as it should be"):
        check_written(tmp_path / "a", PLAN)
    with Writer(tmp_path / "b", PLAN, {}) as writer:
        fill(writer, PLAN)
    with pytest.raises(OSError, match="was not written as it should be; the disk"):
        check_written(tmp_path / "b", {**PLAN, "more": PLAN["one"]})


@pytest.mark.parametrize(("most", "sizes"), [(1e9, [3]), (8, [2, 1]), (7, [1, 1, 1]), (1, [1, 1, 1])])
def test_shards_hold_so_many_bytes_or_one_tensor(most, sizes):
    plan = {name: Planned(torch.float32, (1,)) for name in "abc"}
    found = shards(plan, most)
    assert [len(part) for part in found.values()] == sizes and [name for part in found.values() for name in part] == list("abc")
    index = json.loads(json.dumps(index_of(found)))
    assert index["metadata"]["total_size"] == 12 and index["weight_map"].keys() == plan.keys()
