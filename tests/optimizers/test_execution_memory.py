"""What a step holds and allocates, counted in bytes; and the mode that regenerates its noise to hold less."""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.instances import flat, living_bytes
from tests.optimizers.conftest import Bowls, Logistic, agree, closures, everything, learn, same_bits
from tests.sweeps import sweep
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesrule as br
from bayesrule.vector import BUCKET

IVON = dict(lr=0.2, ess=500.0, hess_init=0.2, betas=(0.9, 0.99), weight_decay=1e-2)
LOW = dict(IVON, memory="low", compile=False)
CALM = dict(LOW, ess=20.0, hess_init=1.0, betas=(0.9, 0.999))
"""Curvature moves little, so it stays positive whatever becomes of the prior."""
LARGE = 1 << 16


class Allocations(TorchDispatchMode):
    """Notes every tensor of at least 64 KiB that an operation makes anew, neither a view nor an out=."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.device.type != "meta" and t.untyped_storage().data_ptr() not in given:
                size = t.untyped_storage().nbytes()
                self.made += [(str(func), size)] if size >= LARGE else []
        return result


MAKERS = [
    pytest.param(br.SGD, dict(lr=0.1, momentum=0.9), 1, id="sgd"),
    pytest.param(br.RMSprop, dict(lr=1e-3, momentum=0.9, weight_decay=0.1), 1, id="rmsprop"),
    pytest.param(br.AdamW, dict(lr=1e-3), 1, id="adamw"),
    pytest.param(br.IVON, IVON, 1, id="ivon"),
    pytest.param(br.IVON, dict(IVON, hess_approx="gradsq", clip_radius=1.0), 1, id="ivon-gradsq"),
    pytest.param(br.IVON, dict(IVON, memory="low"), 1, id="ivon-low"),
]
SEVERAL = [
    pytest.param(br.IVON, dict(IVON, mc_samples=2, antithetic=True), 2, id="ivon-pairs"),
    pytest.param(br.IVON, dict(IVON, mc_samples=3, memory="low"), 3, id="ivon-low-draws"),
]
SHAPES = [
    pytest.param((3 * BUCKET + 5,), id="one-cut", marks=pytest.mark.slow),
    pytest.param((70_001, 66_000, 3, (5, 7)), id="several"),
    pytest.param((1000,) * 200, id="many-small"),
]


class TestScratch:
    """Eager temporaries lie in memory that is used again."""

    @pytest.mark.parametrize("shapes", SHAPES)
    @pytest.mark.parametrize(("make", "hyper", "draws"), MAKERS + SEVERAL)
    def test_does_not_grow_after_two_steps(self, make, hyper, draws, shapes):
        problem = Bowls(*shapes)
        optimizer = make(problem.parameters(), **hyper, compile=False)
        learn(problem, optimizer, 2, draws=draws)
        held, version = optimizer.execution.scratch.nbytes, optimizer.execution.scratch.version
        learn(problem, optimizer, 3, draws=draws)
        assert optimizer.execution.scratch.nbytes == held > 0
        assert optimizer.execution.scratch.version == version

    SLOTS = 12
    """Bucket-sized pieces of 8 bytes an element: the noise takes two of them, mean and gradient and what is theirs the rest."""

    @pytest.mark.parametrize(("make", "hyper", "draws"), MAKERS + SEVERAL)
    def test_is_bounded_by_the_bucket_whatever_the_model(self, make, hyper, draws):
        sizes = []
        for count in (2, 8):
            problem = Bowls(*[BUCKET] * count, *[50_000] * count)
            optimizer = make(problem.parameters(), **hyper, compile=False)
            learn(problem, optimizer, 2, draws=draws)
            sizes.append(optimizer.execution.scratch.nbytes)
        assert sizes[0] == sizes[1] <= self.SLOTS * 4 * BUCKET

    @pytest.mark.parametrize("shapes", SHAPES)
    @pytest.mark.parametrize(("make", "hyper", "draws"), MAKERS)
    def test_a_later_step_allocates_nothing_of_the_size_of_a_bucket(self, make, hyper, draws, shapes):
        problem = Bowls(*shapes)
        optimizer = make(problem.parameters(), **hyper, compile=False)
        learn(problem, optimizer, 2)
        gradients = problem.gradients()
        with Allocations() as seen:
            with optimizer.sampled_params(train=True) if make is br.IVON else contextlib.nullcontext():
                for w, gradient in zip(problem.weights, gradients, strict=True):
                    w.grad = gradient
            optimizer.step()
        assert seen.made == []

    def test_an_allocation_is_seen(self):
        with Allocations() as seen:
            x = torch.zeros(LARGE // 4)
            x.view(2, -1).add_(1)
            torch.add(x, x, out=x)
            _ = x + 1
            _ = x[:10] + 1
        assert [size for _, size in seen.made] == [LARGE, LARGE]


@pytest.mark.usefixtures("unburdened")
class TestStash:
    """What is held beside parameters, gradients, curvature and momentum."""

    SHAPES = (70_000, BUCKET + 3, 999)

    @staticmethod
    def held(hyper: dict[str, Any], shapes: Sequence[int]) -> list[int]:
        """Bytes beside scratch, more than before the optimizer: between steps, while a draw is open, and once it is closed."""
        problem = Bowls(*shapes)
        start = living_bytes()
        optimizer = br.IVON(problem.parameters(), **hyper, compile=False)
        learn(problem, optimizer, 3)
        scratch = optimizer.execution.scratch.nbytes
        found = [living_bytes() - start - scratch]
        with optimizer.sampled_params(train=True):
            found.append(living_bytes() - start - scratch)
            problem.backward()
        found.append(living_bytes() - start - scratch - 4 * sum(shapes))  # less the gradient itself
        assert optimizer.execution.scratch.nbytes == scratch
        return found

    @pytest.mark.parametrize("shapes", [SHAPES, tuple(range(66_000, 90_000, 1000))], ids=["few", "ever larger"])
    def test_one_tensor_more_than_adam_by_default_and_none_with_low_memory(self, shapes):
        every = 4 * sum(shapes)
        few = 2 * BUCKET  # what is idle between small tensors, and numbers of pairs
        assert few < every
        default, low = (self.held(hyper, shapes) for hyper in (IVON, dict(IVON, memory="low")))
        assert all(2 * every <= size <= 3 * every + few for size in default)
        assert all(2 * every <= size <= 2 * every + few for size in low)

    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_does_not_grow_from_step_to_step(self, memory):
        problem = Bowls(*self.SHAPES)
        optimizer = br.IVON(problem.parameters(), **IVON, memory=memory, compile=False)
        learn(problem, optimizer, 2)
        with optimizer.sampled_params(train=False):
            pass
        before = living_bytes()
        for _ in range(3):
            learn(problem, optimizer)
            with optimizer.sampled_params(train=False):
                pass
        assert living_bytes() == before


LOOKS = [
    pytest.param({}, id="price"),
    pytest.param(dict(hess_approx="gradsq", gradsq_scale=64.0), id="gradsq"),
    pytest.param(dict(mc_samples=2, antithetic=True), id="pairs"),
    pytest.param(dict(mc_samples=3), id="draws"),
    pytest.param(dict(weight_decay=0.0), id="no-decay"),
    pytest.param(dict(ess=float("inf")), id="certain"),
]


class TestLowMemory:
    """The noise of a draw made again in place of a stash."""

    @pytest.mark.parametrize("hyper", sweep(LOOKS, "price", "pairs"))
    def test_is_the_default_trajectory_for_200_steps(self, hyper):
        runs = []
        for memory in ("low", "default"):
            problem = Logistic(torch.float64)
            optimizer = br.IVON(problem.parameters(), **{**IVON, **hyper}, memory=memory, compile=False)
            closures(problem, optimizer, 200)
            runs.append(optimizer)
        agree(*runs, tolerance=1e-13)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
    def test_the_mean_returns_within_one_place_of_the_sample(self, scale, dtype):
        problem = Bowls(70_001, 5, (3, 4), dtype=dtype)
        with torch.no_grad():
            for w in problem.weights:
                w.mul_(scale)
        optimizer = br.IVON(problem.parameters(), **LOW)
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            sample = flat(problem.parameters())
        # sample and mean are each rounded once; a place of the larger of the two bounds both
        place = torch.finfo(dtype).eps * torch.maximum(sample.abs(), mean.abs())
        assert (sample != mean).float().mean() > 0.99
        assert ((flat(problem.parameters()) - mean).abs() <= place).all()

    def test_a_look_brings_the_mean_back_bit_by_bit(self):
        problem = Bowls(70_001, 5)
        optimizer = br.IVON(problem.parameters(), **LOW)
        learn(problem, optimizer, 2)
        before = everything(optimizer)
        for _ in range(3):
            with optimizer.sampled_params(train=False):
                assert all((w != before[str(i)]).any() for i, w in enumerate(problem.weights))
            same_bits(everything(optimizer), before)

    def test_a_discarded_draw_is_as_if_it_had_not_been(self):
        problem, other = (Bowls(70_001, 5, dtype=torch.float64) for _ in range(2))
        troubled, plain = (br.IVON(p.parameters(), **LOW) for p in (problem, other))
        learn(problem, troubled, 2)
        learn(other, plain, 2)
        for _ in range(3):
            with contextlib.suppress(ValueError), troubled.sampled_params(train=True):
                sample = everything(troubled)
                problem.backward()
                raise ValueError
            assert all(w.grad is None for w in problem.weights)
        agree(troubled, plain, 1e-15)  # three roundings of the mean
        with troubled.sampled_params(train=True):
            again = everything(troubled)
            problem.backward()
        assert all((again[name] - value).abs().max() < 1e-14 for name, value in sample.items())  # the same noise
        troubled.step()
        learn(other, plain)
        agree(troubled, plain, 1e-12)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(dict(ess=50.0), id="ess"),
            pytest.param(dict(ess=float("inf")), id="ess-inf"),
            pytest.param(dict(weight_decay=0.5), id="weight_decay"),
            pytest.param(dict(weight_decay=0.0), id="weight_decay-0"),
            pytest.param(dict(lr=0.01), id="lr"),
            pytest.param(dict(betas=(0.5, 0.995)), id="betas"),
            pytest.param(dict(ess=7.0, weight_decay=0.3, lr=0.4, betas=(0.7, 0.998)), id="all"),
        ],
    )
    @pytest.mark.parametrize("start", [{}, dict(weight_decay=0.0)], ids=["", "from-no-decay"])
    def test_what_changes_between_draw_and_step_acts_on_the_step_alone(self, change, start):
        """As it does where the offset is kept."""
        runs = []
        for memory in ("low", "default"):
            problem = Bowls(1000, 5, dtype=torch.float64)
            optimizer = br.IVON(problem.parameters(), **{**CALM, **start, "memory": memory})
            for _ in range(2):  # back and forth: what was recorded for one must not serve the other
                learn(problem, optimizer)
                before = {name: optimizer.param_groups[0][name] for name in change}
                with optimizer.sampled_params(train=True):
                    problem.backward()
                optimizer.param_groups[0].update(change)
                optimizer.step()
                optimizer.param_groups[0].update(before)
            runs.append(optimizer)
        agree(*runs, 1e-12)

    def test_a_second_change_is_not_mistaken_for_the_first(self):
        """Between draw and step from no prior to one, and later to another."""
        runs = []
        for memory in ("low", "default"):
            problem = Bowls(1000, 5, dtype=torch.float64)
            optimizer = br.IVON(problem.parameters(), **{**CALM, "weight_decay": 0.0, "memory": memory})
            for decay in (0.5, 0.1, 2.0):
                with optimizer.sampled_params(train=True):
                    problem.backward()
                optimizer.param_groups[0]["weight_decay"] = decay
                optimizer.step()
                optimizer.param_groups[0]["weight_decay"] = 0.0
            runs.append(optimizer)
        agree(*runs, 1e-12)

    @pytest.mark.parametrize("hyper", LOOKS[:4])
    def test_parameters_with_different_step_counts_have_their_own_noise(self, hyper):
        runs = []
        for memory in ("low", "default"):
            problem = Bowls(300, 5, (3, 4), dtype=torch.float64)
            optimizer = br.IVON(problem.parameters(), **{**CALM, **hyper, "memory": memory})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                for only in ([0], [0, 1], [0, 1, 2], [0, 1, 2], [1], [0, 1, 2]):
                    learn(problem, optimizer, only=only, draws=hyper.get("mc_samples", 1))
            runs.append(optimizer)
        agree(*runs, 1e-12)

    def test_a_run_that_is_resumed_is_exact(self):
        problem, other = Bowls(70_001, 5), Bowls(70_001, 5)
        optimizer = br.IVON(problem.parameters(), **LOW)
        learn(problem, optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed = br.IVON(other.parameters(), **LOW)
        other.load_state_dict(problem.state_dict())
        resumed.load_state_dict(saved)
        learn(problem, optimizer, 3)
        learn(other, resumed, 3)
        same_bits(resumed, optimizer)

    def test_a_checkpoint_in_an_open_draw_is_at_the_mean(self):
        problem = Bowls(70_001, 5)
        optimizer = br.IVON(problem.parameters(), **LOW)
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            problem.backward()
            optimizer.state_dict()
            assert (flat(problem.parameters()) - mean).abs().max() < 1e-6
        optimizer.step()
        assert optimizer.state[problem.weights[0]]["step"].item() == 1

    def test_takes_no_noise_of_the_users(self):
        with pytest.raises(ValueError, match="memory='low' makes its noise again, so it takes no noise=") as caught:
            br.IVON(Bowls(3).parameters(), **LOW, noise=torch.ones_like)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", ["none", True, None, "LOW"], ids=repr)
    def test_another_word_is_refused(self, value):
        with pytest.raises(ValueError, match="memory must be 'default' or 'low', got") as caught:
            br.IVON(Bowls(3).parameters(), **{**LOW, "memory": value})
        assert repr(value) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parameters_of_16_bits_do_not_drift(self, dtype):
        """Its documentation is for 32 bits and more: refused in one line, or the mean kept in some other way."""
        problem = Bowls(1000, dtype=dtype)
        try:
            optimizer = br.IVON(problem.parameters(), **{**LOW, "lr": 0.0})
            mean = flat(problem.parameters())
            learn(problem, optimizer, 10)
        except (ValueError, TypeError) as error:
            assert "memory" in str(error) and "\n" not in str(error)
        else:
            assert torch.equal(flat(problem.parameters()), mean)
