"""Several ranks train one model, over gloo: what they reach is what one process reaches, and what goes wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import data_parallel, misuses, ranks, sharding, training
from torch import Tensor

pytestmark = pytest.mark.hosts

RESCALED = training.RESCALED
GRADSQ = dict(hess_approx="gradsq", gradsq_scale=30.0)


def agree(found: list[Any], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """All ranks are equal to the bit, and agree with one process: each kind of tensor to the tolerance of its largest number."""
    for rank in found:
        assert not isinstance(rank, str), rank
        assert rank.keys() == wanted.keys()
        assert all(torch.equal(rank[name], found[0][name]) for name in rank)
    kinds: dict[str, float] = {}
    for name, value in wanted.items():
        kind = name.rpartition(".")[2]
        kinds[kind] = max(kinds.get(kind, 0.0), value.abs().max().item())
    for name, value in wanted.items():
        gap, size = (found[0][name].double() - value.double()).abs().max().item(), kinds[name.rpartition(".")[2]]
        assert gap <= tolerance * size, f"{name}: {gap:.3g} apart, of {size:.3g}"


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[Any]]:
    def start(size: int, case: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        number = len(list(tmp_path.iterdir()))
        folder = tmp_path / f"launch{number}"
        folder.mkdir()
        return ranks.run(size, folder, case, *arguments, **named)

    return start


class TestDataParallel:
    @pytest.mark.parametrize(
        "hyper", [{}, RESCALED, GRADSQ, dict(draws=2, **RESCALED), dict(memory="low"), dict(momentum_dtype=torch.bfloat16)], ids=str
    )
    def test_of_one_noise_is_one_process(self, launch, hyper):
        agree(launch(2, data_parallel.ddp, hyper), training.one(2, hyper, per_rank=False))

    @pytest.mark.parametrize(
        "hyper",
        [
            {},
            RESCALED,
            GRADSQ,
            dict(**RESCALED, **GRADSQ),
            dict(draws=2),
            dict(draws=2, **RESCALED),
            dict(antithetic=True),
            dict(compile=True, steps=3, ess=100.0),
        ],
        ids=str,
    )
    def test_of_noise_per_rank_is_one_process_with_as_many_draws(self, launch, hyper):
        agree(launch(2, data_parallel.ddp, dict(noise_per_rank=True, **hyper)), training.one(2, hyper))

    @pytest.mark.parametrize("hyper", [{}, GRADSQ], ids=str)
    def test_of_noise_per_rank_with_a_group_without_noise(self, launch, hyper):
        agree(launch(2, data_parallel.some_without_noise_here, hyper), data_parallel.some_without_noise(hyper, None))

    def test_of_three_ranks(self, launch):
        found = launch(3, data_parallel.ddp, dict(noise_per_rank=True))
        agree(found, training.one(3, {}))

    @pytest.mark.parametrize("hyper", [{}, dict(draws=2), GRADSQ], ids=str)
    def test_without_a_wrapper_the_optimizer_averages(self, launch, hyper):
        agree(launch(2, data_parallel.ddp, dict(noise_per_rank=True, wrapped=False, **hyper)), training.one(2, hyper))

    def test_without_a_wrapper_of_one_noise(self, launch):
        agree(launch(2, data_parallel.ddp, dict(wrapped=False)), training.one(2, {}, per_rank=False))

    @pytest.mark.parametrize(
        ("hyper", "per_rank"),
        [
            (dict(draws=2, unsynced="all draws but the last"), True),
            (dict(draws=2, unsynced="all draws but the last"), False),
            (dict(draws=2, unsynced="all draws but the last", **GRADSQ), True),
            (dict(unsynced="later steps"), True),
            (dict(unsynced="later steps"), False),
            (dict(wrapped=False, alike=True), True),
            (dict(wrapped=False, alike=True), False),
        ],
        ids=str,
    )
    def test_whether_gradients_are_averaged_is_seen_in_every_step(self, launch, hyper, per_rank):
        agree(launch(2, data_parallel.ddp, dict(noise_per_rank=per_rank, **hyper)), training.one(2, hyper, per_rank))

    def test_gradients_that_cancel_leave_the_curvature_of_each(self, launch):
        agree(launch(2, data_parallel.cancelling), data_parallel.cancelling(2))

    def test_a_mean_that_was_mended_mends_no_curvature(self, launch):
        assert launch(2, data_parallel.mended) == [[2, 1, 1]] * 2

    @pytest.mark.parametrize(
        ("where", "found"), [("in the draws of all", [2, 1, 1]), ("after the draws of one rank", [3, 1, 1])], ids=str
    )
    def test_what_is_not_finite_changes_nothing(self, launch, where, found):
        assert launch(2, data_parallel.lost, where)[1] == found

    def test_the_noise_of_one_rank_times_the_mean_gradient_would_be_half_the_curvature(self, launch):
        """The trap: what makes the tests above worth something."""
        (found, _), wanted = launch(2, data_parallel.trapped), training.one(2, {})
        assert not isinstance(found, str), found
        gap = (found["first.weight.hess"] - wanted["first.weight.hess"]).abs().max() / wanted["first.weight.hess"].abs().max()
        assert gap > 0.1

    @pytest.mark.parametrize(
        ("draws", "weights", "nan", "scale"),
        [
            ((1, 1), (1.0, 3.0), None, 1.0),
            ((2, 1), (1.0, 1.0), None, 1.0),
            ((1, 0), (1.0, 1.0), None, 1.0),
            ((1, 1), (1.0, 1.0), 1, 1.0),
            ((1, 1), (1.0, 1.0), 1, 512.0),
        ],
        ids=["weights", "draws", "nothing", "nan", "nan in scaled gradients"],
    )
    def test_ranks_count_by_their_draws(self, launch, draws, weights, nan, scale):
        found = launch(2, data_parallel.uneven, draws, weights, nan, scale)
        agree(found, data_parallel.uneven_alone(draws, weights, nan))


class TestSharded:
    @pytest.mark.parametrize(
        "hyper", [{}, RESCALED, GRADSQ, dict(draws=2, **RESCALED), dict(memory="low"), dict(momentum_dtype=torch.bfloat16)], ids=str
    )
    def test_is_one_process_with_the_same_noise(self, launch, hyper):
        agree(launch(2, sharding.fsdp, hyper), training.one(2, hyper, per_rank=False))

    def test_is_one_process_where_parts_are_uneven_or_empty(self, launch):
        agree(launch(4, sharding.fsdp, {}), training.one(4, {}, per_rank=False))

    @pytest.mark.parametrize(("size", "reshard"), [(2, None), (2, False), (2, True), (4, 2)], ids=str)
    def test_sees_the_draw_after_an_evaluation_and_the_mean_after_a_step(self, launch, size, reshard):
        looked, plain = (launch(size, sharding.sharded_after_looks, look, reshard)[0] for look in (True, False))
        assert not isinstance(looked, str) and torch.equal(looked, plain), looked

    def test_climbs_as_far_as_one_process_where_parts_are_replicated(self, launch):
        model = training.Logistic()
        wanted = sharding.climbing(model, lambda step: [training.rows_of(step, part, 4) for part in range(4)], model)
        agree(launch(4, sharding.climbing_replicated), wanted)

    def test_jobs_that_are_left_alone_have_nothing_to_do_with_one_another(self, launch):
        assert launch(4, sharding.two_jobs) == [[3, 0], [3, 0], [4, 1], [4, 1]]

    def test_gradients_from_before_a_draw_may_be_cleared_but_not_added_to(self, launch):
        assert launch(2, sharding.stale, False) == [1, 1]
        for found in launch(2, sharding.stale, True):
            assert "gradients from before this draw stood in p.grad" in found.strip().splitlines()[-1]

    def test_drops_a_draw_everywhere_or_nowhere(self, launch):
        assert launch(2, sharding.sharded_nans) == [[1, 2, 2, 2, 2, 2]] * 2

    @pytest.mark.parametrize("drifts", ["state", "weights"])
    def test_ranks_that_hold_the_same_parts_are_compared(self, launch, drifts):
        assert launch(4, sharding.replicated, drifts) == [[4]] * 4

    def test_noise_that_is_gathered_in_bfloat16_is_warned_of(self, launch):
        for found in launch(2, sharding.gathered_in_bfloat16):
            assert any("of the noise of '0." in warning for warning in found), found

    def test_a_layer_sharded_later_is_told_of(self, launch):
        for found in launch(2, sharding.partly_sharded_later):
            assert any("2 of 5 parameters had no gradient in 100 steps" in warning for warning in found), found

    def test_goes_on_from_a_distributed_checkpoint_bit_by_bit(self, launch, tmp_path):
        whole = launch(2, sharding.fsdp, dict(steps=6))
        folder = str(tmp_path / "saved")
        launch(2, sharding.checkpointed, folder, 3, True)
        found = launch(2, sharding.checkpointed, folder, 3, False)
        agree(found, whole[0], 0.0)

    @pytest.mark.parametrize("size", [1, 4])
    def test_goes_on_with_another_number_of_processes(self, launch, tmp_path, size):
        wanted = launch(2, sharding.fsdp, dict(steps=6))[0]
        folder = str(tmp_path / "saved")
        launch(2, sharding.checkpointed, folder, 3, True)
        agree(launch(size, sharding.checkpointed, folder, 3, False), wanted)

    def test_state_of_other_parts_is_refused(self, launch, tmp_path):
        folder = str(tmp_path)
        launch(2, sharding.saved_in_parts, folder, True)
        for error in launch(3, sharding.saved_in_parts, folder, False):
            assert "torch.distributed.checkpoint" in error.splitlines()[-1]


MISUSES = {
    "weights": "the parameters or state of rank 1 differ",
    "settings": "the hyper-parameters of rank 1 differ",
    "seeds": "the hyper-parameters of rank 1 differ",
    "weights of draws": "differ in weight",
    "sharded later": r"if the model was sharded \(fully_shard\) after this optimizer was made",
    "noise per rank of a sharded model": "noise_per_rank=True needs whole parameters",
    "partly sharded": "3 others are not",
    "attached within a sharded model": "attach the whole model",
    "attached after it was sharded": "make the optimizer after it",
    "a scaler without a wrapper": "wrap the model in DistributedDataParallel",
    "gradients by hand": "is what backward\\(\\) brings to it",
    "columns": r"supported are Replicate and one Shard\(0\)",
    "FSDP1": "FSDP1",
    "FSDP1 with original parameters": "FSDP1",
    "ZeRO": "ZeRO",
}


class TestMisuse:
    @pytest.mark.parametrize(("case", "message"), MISUSES.items())
    def test_is_refused_on_every_rank(self, launch, case, message):
        for found in launch(2, misuses.misused, case):
            assert isinstance(found, str)
            assert re.search(message, found.strip().splitlines()[-1])

    @pytest.mark.parametrize(("when", "found"), [(5, 8), (70, 101)])
    def test_a_rank_that_goes_astray_is_found_at_the_next_check(self, launch, when, found):
        assert launch(2, data_parallel.drifting, when) == [[found], [found]]

    def test_independent_processes_are_left_alone(self, launch):
        assert launch(2, data_parallel.apart) == [[2.0], [3.0]]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_nothing_else(launch, tmp_path):
    whole = launch(2, data_parallel.resumed, str(tmp_path), 7)
    found = launch(2, data_parallel.resumed, str(tmp_path), 7, 5, timeout=60.0)
    assert found[1] == "killed" and isinstance(found[0], str)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4
    agree(launch(2, data_parallel.resumed, str(tmp_path), 7, None, True), whole[0], 0.0)
