"""The 19 faults of the published implementation that are on record, and the tests that hold each of them off.

A class stands for all its tests; what has no file is in this one. What each fault was is said in `FAULTS`.

 1: optimizers/test_parameters.py::TestLeftAlone::test_a_parameter_without_gradient_is_untouched
    optimizers/test_parameters.py::TestLeftAlone::test_a_parameter_that_joins_late_is_debiased_from_its_own_first_step
    optimizers/test_sampling.py::TestReading::test_a_parameter_without_gradient_in_one_of_two_draws_counts_zero_there
 2: optimizers/test_sampling.py::TestWithoutDraws
    optimizers/test_misuse.py::TestMisuse::test_a_training_forward_outside_a_draw
    TestSteps::test_of_an_accelerating_host_come_once_an_accumulation
 3: optimizers/test_sampling.py::TestClosing::test_an_exception_restores_the_mean
    optimizers/test_misuse.py::TestExceptions::test_leave_no_trace
 4: optimizers/test_parameters.py::TestLeftAlone::test_a_frozen_parameter_is_neither_perturbed_nor_decayed
    TestSteps::test_leave_a_frozen_parameter_alone_in_every_binding
 5: optimizers/test_parameters.py::TestResume
    TestResume::test_the_first_step_after_a_resume_is_as_long_as_without_one
 6: optimizers/test_parameters.py::TestState
    TestState::test_of_a_distributed_checkpoint_has_the_models_names_and_goes_on_bit_by_bit
    TestState::test_goes_to_the_device_of_the_parameters_when_it_is_loaded
    processes/test_workers.py::TestSharded::test_goes_on_with_another_number_of_processes
 7: optimizers/test_parameters.py::TestGroups
    TestGroups::test_one_added_under_a_draw_learns_from_the_next_step_on_at_the_latest
 8: optimizers/test_parameters.py::TestPlaces::test_several_dtypes_share_an_optimizer_and_each_goes_its_own_way
    optimizers/test_parameters.py::TestPlaces::test_the_models_dtype_may_change_between_steps
    TestState::test_follows_a_model_that_is_cast_to_less
    TestState::test_follows_a_model_to_another_device
 9: optimizers/test_parameters.py::TestPlaces::test_storage_stays_where_it_is
    optimizers/test_parameters.py::TestPlaces::test_channels_last_stays_channels_last_and_trains_as_contiguous_does
    optimizers/test_parameters.py::TestPlaces::test_tied_weights_stay_tied_and_are_perturbed_once
    TestPlaces::test_no_binding_moves_the_weights
10: optimizers/test_hosts.py::TestScaler
    TestScaler::test_gradients_may_be_cleared_before_every_draw
    TestScaler::test_gradients_cleared_before_it_steps_are_missed_by_it_in_words
    TestScaler::test_gradients_are_unscaled_in_every_binding
11: processes/test_workers.py::TestDataParallel
    processes/test_workers.py::TestDataParallel::test_ranks_count_by_their_draws
12: optimizers/test_sampling.py::TestReading::test_missing_zero_grad_between_draws_counts_nothing_twice
    optimizers/test_sampling.py::TestReading::test_missing_zero_grad_between_steps_counts_nothing_twice
    optimizers/test_sampling.py::TestWithoutDraws::test_backward_after_the_context_is_refused_by_autograd_and_leaves_the_mean
    optimizers/test_misuse.py::TestStaleGradients
13: optimizers/test_hosts.py::TestClosures
    optimizers/test_bindings.py::TestTheSameBits::test_in_every_binding
14: optimizers/test_hyperparameters.py::TestIVON
    optimizers/test_variational.py::TestSteps::test_infinite_ess_draws_no_noise_and_keeps_the_curvature
15: optimizers/test_variational.py::TestNoise
    optimizers/test_hosts.py::TestInjectedNoise
    optimizers/test_execution_memory.py::TestScratch::test_a_later_step_allocates_nothing_of_the_size_of_a_bucket
    processes/test_workers.py::TestDataParallel::test_of_noise_per_rank_is_one_process_with_as_many_draws
16: optimizers/test_parameters.py::TestPlaces::test_state_is_float32_or_wider
    optimizers/test_parameters.py::TestPlaces::test_small_steps_of_the_curvature_do_not_vanish_beside_bfloat16_weights
    optimizers/test_parameters.py::TestResume::test_float32_state_of_bfloat16_weights_is_not_rounded_by_loading
    optimizers/test_low_precision.py::TestTheGoldenPosterior
17: optimizers/test_sampling.py::TestOpening::test_the_context_trains_unless_told_otherwise
18: optimizers/test_parameters.py::TestSparse::test_sparse_gradients_are_refused_in_words_and_move_nothing
    TestSteps::test_refuse_sparse_gradients_in_every_binding
19: optimizers/test_sampling.py::TestReading::test_draws_are_averaged_with_their_weights
    processes/test_workers.py::TestDataParallel::test_ranks_count_by_their_draws
    TestSteps::test_weigh_micro_batches_of_unequal_size_by_their_size
"""

import ast
import copy
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.instances import SMALL_IVON, Network, draw, flat
from tests.optimizers.conftest import everything, same_bits
from tests.optimizers.problems import pair
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import bayesrule as br

FAULTS = {
    1: "a parameter without a gradient in a context: AttributeError",
    2: "a step without a context: TypeError about None",
    3: "an exception in a context left the sample in place and lost the mean",
    4: "a frozen parameter was perturbed and decayed",
    5: "a resume lost the step count, the switches and the noise: the first step was 8.9 times too long",
    6: "state lay flat in param_groups: not moved, cast or sharded on loading",
    7: "add_param_group: KeyError",
    8: "several dtypes or devices, or a model cast later: ValueError",
    9: "storage was exchanged in every step",
    10: "gradients were captured while still scaled; unscaling twice, or after zero_grad, raised",
    11: "across ranks gradsq raised and unequal counts were weighted equally",
    12: "gradients without zero_grad were counted twice; backward outside the context was not noticed",
    13: "an ordinary closure failed",
    14: "bad arguments: a message with the wrong value, NaN, or nothing at all",
    15: "noise came from the global generator",
    16: "state had the dtype of the parameters",
    17: "a context did not train unless told to",
    18: "sparse gradients failed deep inside",
    19: "micro-batches of unequal size were weighted equally",
}
TESTS = Path(__file__).parents[1]


def listed() -> dict[int, list[str]]:
    """Fault -> tests, as the docstring of this file says."""
    found: dict[int, list[str]] = {}
    for line in (__doc__ or "").splitlines():
        begins = re.match(r" ?(\d+): ", line)
        if begins:
            found[int(begins[1])] = []
        if "::" in line:
            found[max(found)].append(line.split()[-1])
    return found


@functools.cache
def names_in(path: Path) -> set[str]:
    """The classes and the tests in a file, as pytest writes them."""
    tests = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            tests |= {node.name, *(f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))}
    return tests


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    assert listed()[fault], FAULTS[fault]
    for test in listed()[fault]:
        file, _, name = test.partition("::") if ".py::" in test else (Path(__file__).relative_to(TESTS), "", test)
        assert name in names_in(TESTS / file), f"{FAULTS[fault]}: {test} is not there"


Look = Callable[[], Any]


def in_context(model: nn.Module, optimizer: br.IVON, look: Look) -> None:
    with optimizer.sampled_params():
        look()
    optimizer.step()


def in_closure(model: nn.Module, optimizer: br.IVON, look: Look) -> None:
    optimizer.step(look)


def after_train(model: nn.Module, optimizer: br.IVON, look: Look) -> None:
    optimizer.train()
    look()
    optimizer.step()


def attached(model: nn.Module, optimizer: br.IVON, look: Look) -> None:
    hooks = optimizer.attach(model)
    look()
    optimizer.step()
    hooks.remove()


every_binding = pytest.mark.parametrize("binding", [in_context, in_closure, after_train, attached])


class TestSteps:
    """Faults 2, 4, 18 and 19."""

    @every_binding
    def test_leave_a_frozen_parameter_alone_in_every_binding(self, binding):
        model, optimizer = pair()
        model.inner.requires_grad_(False)
        frozen, seen = flat(model.inner.parameters()), []
        model.register_forward_hook(lambda *_: seen.append(flat(model.inner.parameters())))
        for step in range(3):
            binding(model, optimizer, lambda step=step: model.loss(step).backward())
        assert len(seen) == 3 and all(torch.equal(frozen, other) for other in [*seen, flat(model.inner.parameters())])
        assert optimizer.state[model.outer.weight]["step"] == 3

    def test_of_an_accelerating_host_come_once_an_accumulation(self):
        """The host's wrapper swallows step() and zero_grad() but at the last micro-batch."""

        def wrapped(optimizer: br.IVON, batch: int, call: Callable[[br.IVON], None]) -> None:
            if batch % 4 == 3:
                call(optimizer)

        model, optimizer = pair()
        optimizer.attach(model)
        for batch in range(8):
            (model.loss(batch) / 4).backward()
            wrapped(optimizer, batch, br.IVON.step)
            wrapped(optimizer, batch, br.IVON.zero_grad)
        other, plain = pair()
        for batches in (range(4), range(4, 8)):
            with plain.sampled_params():
                for batch in batches:
                    (other.loss(batch) / 4).backward()
            plain.step()
        same_bits(optimizer, plain)

    @every_binding
    def test_refuse_sparse_gradients_in_every_binding(self, binding):
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = br.IVON(table.parameters(), lr=0.1, ess=10.0)
        before = table.weight.detach().clone()
        with pytest.raises(RuntimeError, match="sparse gradients are not supported; make the embedding with sparse=False"):
            binding(table, optimizer, lambda: table(torch.tensor([1, 3])).sum().backward())
        assert torch.equal(table.weight, before)

    def test_weigh_micro_batches_of_unequal_size_by_their_size(self):
        """Mean losses over 12 and 4 rows, each with its weight, are the mean loss over 16 rows."""
        model, optimizer = pair(torch.float64, noise=lambda p: torch.full_like(p, 0.5))
        for rows in (slice(0, 12), slice(12, 16)):
            with optimizer.sampled_params(weight=rows.stop - rows.start):
                nn.functional.cross_entropy(model(model.x[rows]), model.y[rows]).backward()
        optimizer.step()
        other, plain = pair(torch.float64, noise=lambda p: torch.full_like(p, 0.5))
        draw(plain, other)
        plain.step()
        for found, wanted in zip(everything(optimizer).values(), everything(plain).values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


class TestResume:
    """Fault 5."""

    def test_the_first_step_after_a_resume_is_as_long_as_without_one(self):
        model, optimizer = pair()
        for step in range(20):
            in_closure(model, optimizer, lambda step=step: model.loss(step).backward())
        other, resumed = pair(seed=9, debias=False, rescale_lr=False)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before, lengths = flat(model.parameters()), []
        for net, each in ((model, optimizer), (other, resumed)):
            in_closure(net, each, lambda net=net: net.loss(20).backward())
            lengths.append((flat(net.parameters()) - before).norm())
        assert lengths[0] == lengths[1] > 0


class TestState:
    """Faults 6 and 8."""

    def test_of_a_distributed_checkpoint_has_the_models_names_and_goes_on_bit_by_bit(self):
        model, optimizer = pair()
        for step in range(3):
            in_closure(model, optimizer, lambda step=step: model.loss(step).backward())
        optimizer.train()
        model.loss(0).backward()
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        assert list(saved["state"]) == [name for name, _ in model.named_parameters()]
        assert all({"step", "hess", "momentum"} == set(state) for state in saved["state"].values())
        other, resumed = pair(lr=0.9)
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, resumed, saved)
        optimizer.step()
        in_closure(other, resumed, lambda: other.loss(0).backward())
        same_bits(resumed, optimizer)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_follows_a_model_that_is_cast_to_less(self, dtype):
        model, optimizer = pair()
        for step in range(4):
            if step == 2:
                model.to(dtype)
                model.x = model.x.to(dtype)
            in_context(model, optimizer, lambda step=step: model.loss(step).backward())
        for p in model.parameters():
            assert p.dtype == dtype and p.isfinite().all() and optimizer.state[p]["step"] == 4
            assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())

    needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device, which is a CUDA one")

    @needs_cuda
    def test_goes_to_the_device_of_the_parameters_when_it_is_loaded(self):
        model, optimizer = pair()
        in_closure(model, optimizer, lambda: model.loss(0).backward())
        other = Network(torch.float32).cuda()
        second = br.IVON(other.parameters(), **SMALL_IVON)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.x, other.y = other.x.cuda(), other.y.cuda()
        in_context(other, second, lambda: other.loss(0).backward())
        assert all(second.state[p][name].is_cuda for p in other.parameters() for name in ("hess", "momentum"))

    @needs_cuda
    def test_follows_a_model_to_another_device(self):
        model, optimizer = pair()
        in_context(model, optimizer, lambda: model.loss(0).backward())
        optimizer.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict())
        model.cuda()
        model.x, model.y = model.x.cuda(), model.y.cuda()
        optimizer.load_state_dict(saved)
        in_context(model, optimizer, lambda: model.loss(1).backward())
        assert all(optimizer.state[p]["hess"].is_cuda and p.isfinite().all() for p in model.parameters())


class TestGroups:
    """Fault 7."""

    @every_binding
    def test_one_added_under_a_draw_learns_from_the_next_step_on_at_the_latest(self, binding):
        model = Network(torch.float32)
        optimizer = br.IVON(model.inner.parameters(), **SMALL_IVON)

        def look(step: int) -> None:
            if step == 0:
                optimizer.add_param_group({"params": list(model.outer.parameters()), "lr": 0.05})
            loss = model.loss(step)
            loss.backward()

        before = flat(model.outer.parameters())
        for step in range(2):
            binding(model, optimizer, lambda step=step: look(step))
            optimizer.zero_grad()
        assert (flat(model.outer.parameters()) != before).all()
        assert optimizer.state[model.outer.weight]["step"] >= 1 and optimizer.state[model.inner.weight]["step"] == 2
        assert (optimizer.state[model.outer.weight]["hess"] != SMALL_IVON["hess_init"]).all()


class TestPlaces:
    """Fault 9."""

    @every_binding
    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_no_binding_moves_the_weights(self, binding, memory):
        model, optimizer = pair(memory=memory)
        model.share_memory()
        places = [p.data_ptr() for p in model.parameters()]
        views = [p.detach().view(-1) for p in model.parameters()]
        model.register_forward_hook(lambda *_: places.extend(p.data_ptr() for p in model.parameters()))
        for step in range(2):
            binding(model, optimizer, lambda step=step: model.loss(step).backward())
        assert len(places) == 12 and places == places[:4] * 3
        assert torch.equal(torch.cat(views), flat(model.parameters())) and all(p.is_shared() for p in model.parameters())


class TestScaler:
    """Fault 10."""

    @staticmethod
    def draws(model: Network, optimizer: br.IVON, scale: Callable[[Tensor], Tensor], clear: Sequence[str]) -> None:
        for batch in range(3):
            if "before" in clear:
                optimizer.zero_grad()
            with optimizer.sampled_params():
                scale(model.loss(batch)).backward()
            if "after" in clear:
                optimizer.zero_grad()

    @pytest.mark.parametrize("unscale", [False, True])
    def test_gradients_may_be_cleared_before_every_draw(self, unscale):
        model, optimizer = pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        other, plain = pair()
        for _ in range(3):
            self.draws(model, optimizer, scaler.scale, ["before"])
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            self.draws(other, plain, lambda loss: loss, ["before"])
            plain.step()
        for found, wanted in zip(everything(optimizer).values(), everything(plain).values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    def test_gradients_cleared_before_it_steps_are_missed_by_it_in_words(self):
        """It has nothing to look at for infinities, and says so before the optimizer could take scaled gradients."""
        model, optimizer = pair()
        before = flat(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.draws(model, optimizer, scaler.scale, ["after"])
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(optimizer)
        assert torch.equal(flat(model.parameters()), before)

    @pytest.mark.parametrize("binding", ["context", "train", "attached"])
    def test_gradients_are_unscaled_in_every_binding(self, binding):
        model, optimizer = pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        hooks = optimizer.attach(model) if binding == "attached" else None
        other, plain = pair()
        for step in range(3):
            if binding == "train":
                optimizer.train()
            if binding == "context":
                with optimizer.sampled_params():
                    scaler.scale(model.loss(step)).backward()
            else:
                scaler.scale(model.loss(step)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            draw(plain, other, step)
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            plain.step()
        assert (hooks is None) == (binding != "attached")
        for found, wanted in zip(everything(optimizer).values(), everything(plain).values(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
