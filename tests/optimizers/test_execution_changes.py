"""Models that change, parameters left out of steps, several optimizers: the equations hold, or one line says why not."""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.optimizers.conftest import Bowls, agree, everything, learn, same_bits
from torch import Tensor, nn

import bayesrule as br

IVON = dict(lr=0.2, ess=20.0, hess_init=1.0, betas=(0.9, 0.99), weight_decay=0.05, seed=3)
SLOW = pytest.mark.slow
MODES = [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=SLOW)]
MEMORY = [pytest.param(dict(IVON), id="default"), pytest.param(dict(IVON, memory="low"), id="low")]


class ByHand:
    """IVON's equations, one tensor at a time, in float64, with the noise that the library promises."""

    def __init__(self, tensors: Sequence[Tensor], seed: int = 0, **hyper: Any) -> None:
        self.mean = [t.detach().double().clone() for t in tensors]
        self.hyper = [dict(hyper) for _ in tensors]
        self.hess = [torch.full_like(m, hyper["hess_init"]) for m in self.mean]
        self.momentum = [torch.zeros_like(m) for m in self.mean]
        self.steps, self.seed = [0] * len(self.mean), seed

    def step(self, problem: Bowls, only: Sequence[int] | None = None, draws: int = 1) -> None:
        """A step by the gradients of some of the weights."""
        chosen = range(len(self.mean)) if only is None else only
        seen = [(torch.zeros_like(m), torch.zeros_like(m)) for m in self.mean]
        for draw in range(draws):
            for i in chosen:
                hyper = self.hyper[i]
                noise = br.CounterNoise(self.seed, step=self.steps[i], draw=draw).normal(br.Vector(self.mean))[i]
                precision = hyper["ess"] * (self.hess[i] + hyper["weight_decay"])
                offset = noise / precision.sqrt() if hyper.get("noise_scale", 1) else torch.zeros_like(noise)
                theta = self.mean[i] + offset
                gradient = (theta - problem.targets[i].double()) * problem.widths[i].double() - theta.sin() / 4
                seen[i][0].add_(gradient / draws)
                seen[i][1].add_(precision * offset * gradient / draws)
        for i in chosen:
            hyper, (gradient, curvature) = self.hyper[i], seen[i]
            beta, decay = hyper["betas"][0], hyper["weight_decay"]
            rho, rate = 1 - hyper["betas"][1], hyper["lr"] * (hyper["hess_init"] + decay)
            self.steps[i] += 1
            self.momentum[i].mul_(beta).add_((1 - beta) * gradient)
            if hyper.get("noise_scale", 1):
                excess = curvature - self.hess[i]
                self.hess[i] = self.hess[i] + rho * excess + rho**2 / 2 * excess**2 / (self.hess[i] + decay)
            average = self.momentum[i] / (1 - beta ** self.steps[i])
            self.mean[i] = self.mean[i] - rate * (average + decay * self.mean[i]) / (self.hess[i] + decay)

    def check(self, optimizer: br.IVON, tolerance: float) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            state = optimizer.state[p]
            assert state["step"].item() == self.steps[i]
            for found, wanted in ((p, self.mean), (state["hess"], self.hess), (state["momentum"], self.momentum)):
                assert found.shape == wanted[i].shape
                torch.testing.assert_close(found.detach().double(), wanted[i], rtol=tolerance, atol=tolerance)


SIZES = (70_001, 5, (3, 4), 131_072)


def pair(dtype: torch.dtype = torch.float64, sizes: Sequence[Any] = SIZES, **hyper: Any) -> tuple[Bowls, br.IVON, ByHand]:
    """A problem, its optimizer (eager unless told), and the equations by hand."""
    problem = Bowls(*sizes, dtype=dtype)
    plain = {name: value for name, value in hyper.items() if name not in ("memory", "compile")}
    return problem, br.IVON(problem.parameters(), **{"compile": False, **hyper}), ByHand(list(problem.parameters()), **plain)


class TestEquations:
    @pytest.mark.parametrize("compile", MODES)
    @pytest.mark.parametrize("hyper", MEMORY)
    def test_hold(self, hyper, compile):
        problem, optimizer, hand = pair(**hyper, compile=compile)
        for _ in range(4):
            learn(problem, optimizer)
            hand.step(problem)
        hand.check(optimizer, 1e-10)

    def test_a_wrong_offset_or_a_lost_curvature_would_be_seen(self):
        problem, optimizer, hand = pair(**IVON)
        learn(problem, optimizer)
        hand.step(problem)
        hand.hess[1] = torch.full_like(hand.hess[1], 1.0)
        with pytest.raises(AssertionError):
            hand.check(optimizer, 1e-3)


PATTERNS = [
    pytest.param([None, [0], [1, 2], None, [3], None], id="mixed"),
    pytest.param([[0, 2], [0, 2], None, None], id="late"),
    pytest.param([[1], None, [1], None], id="one-of-three"),
]


class TestPartialSteps:
    """A bucket whose parameters have made different numbers of steps, or have no gradient now."""

    @pytest.mark.parametrize("compile", MODES)
    @pytest.mark.parametrize("hyper", MEMORY)
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_each_parameter_follows_its_own_count(self, pattern, hyper, compile):
        problem, optimizer, hand = pair(**hyper, compile=compile)
        for only in pattern:
            learn(problem, optimizer, only=only)
            hand.step(problem, only)
        hand.check(optimizer, 1e-10)

    @pytest.mark.parametrize("hyper", MEMORY)
    def test_with_several_draws(self, hyper):
        problem, optimizer, hand = pair(**hyper, mc_samples=2)
        for only in (None, [0], [1, 2], None, [0, 3], None):
            learn(problem, optimizer, only=only, draws=2)
            hand.step(problem, only, draws=2)
        hand.check(optimizer, 1e-10)

    @pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(
        ("make", "twin", "hyper"),
        [
            pytest.param(br.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.2), id="sgd"),
            pytest.param(br.AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1), id="adamw"),
            pytest.param(br.RMSprop, torch.optim.RMSprop, dict(lr=0.01, momentum=0.9), id="rmsprop"),
        ],
    )
    def test_the_others_are_torchs(self, make, twin, hyper, compile):
        problem, other = (Bowls(*SIZES, dtype=torch.float64) for _ in range(2))
        ours, theirs = make(problem.parameters(), **hyper, compile=compile), twin(other.parameters(), **hyper)
        for only in (None, [0], [1, 2], None, [3, 1], None):
            for trained, optimizer in ((problem, ours), (other, theirs)):
                trained.backward(only)
                optimizer.step()
                optimizer.zero_grad()
        for w, wanted in zip(problem.weights, other.weights, strict=True):
            torch.testing.assert_close(w, wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("sizes", [(70_000, 70_000), (70_000, 70_000, 5, 7)], ids=str)
    def test_gradients_of_any_layout_are_read(self, sizes):
        """Also one number that stands for all, beside parameters that lie in one run of memory."""
        problem, other = (Bowls(*sizes, dtype=torch.float64) for _ in range(2))
        expanded, dense = (br.IVON(p.parameters(), **IVON, compile=False) for p in (problem, other))
        for trained, optimizer in ((problem, expanded), (other, dense)):
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    for i, w in enumerate(trained.weights):
                        gradient = torch.tensor(1.0 + i, dtype=torch.float64).expand(w.shape)
                        w.grad = gradient if optimizer is expanded else gradient.clone()
                optimizer.step()
        same_bits(expanded, dense)


CASTS = [
    pytest.param(torch.float32, torch.float64, 1e-5, id="float32-float64"),
    pytest.param(torch.float64, torch.float32, 1e-5, id="float64-float32"),
    pytest.param(torch.float32, torch.bfloat16, None, id="float32-bfloat16"),
    pytest.param(torch.float32, torch.float16, None, id="float32-float16"),
]


class TestModelsThatChange:
    @pytest.mark.parametrize("compile", MODES)
    @pytest.mark.parametrize("when", [0, 2])
    @pytest.mark.parametrize(("dtype", "then", "tolerance"), CASTS)
    def test_a_cast_goes_on_from_the_same_q(self, dtype, then, tolerance, when, compile):
        """To 16 bits: as a fresh optimizer does that was given the same state."""
        problem, optimizer, hand = pair(dtype, **IVON, compile=compile)
        for _ in range(when):
            learn(problem, optimizer)
            hand.step(problem)
        problem.to(then)
        if tolerance is None:
            other = Bowls(*SIZES, dtype=then)
            other.load_state_dict(problem.state_dict())
            other.targets, other.widths = problem.targets, problem.widths
            fresh = br.IVON(other.parameters(), **IVON, compile=compile)
            fresh.load_state_dict(optimizer.state_dict())
            learn(other, fresh, 3)
        for _ in range(3):
            learn(problem, optimizer)
            hand.step(problem)
        wide = torch.promote_types(then, torch.float32)
        for p in problem.parameters():
            assert p.dtype == then and optimizer.state[p]["hess"].dtype == optimizer.state[p]["momentum"].dtype == wide
        if tolerance is None:
            same_bits(optimizer, fresh)
        else:
            hand.check(optimizer, tolerance)

    @pytest.mark.parametrize("compile", MODES)
    @pytest.mark.parametrize("hyper", MEMORY)
    @pytest.mark.parametrize("when", ["between steps", "between draw and step", "in an open draw"])
    def test_parameters_put_elsewhere_in_memory(self, when, hyper, compile):
        """As a model is that was moved to a device and back, or whose checkpoint was assigned."""
        problem, optimizer, hand = pair(**hyper, compile=compile)

        def move() -> None:
            for p in problem.parameters():
                p.data = p.data.clone()

        for step in range(3):
            with optimizer.sampled_params(train=True):
                if step == 1 and when == "in an open draw":
                    move()
                problem.backward()
            if step == 1 and when == "between draw and step":
                move()
            optimizer.step()
            if step == 1 and when == "between steps":
                move()
            hand.step(problem)
        hand.check(optimizer, 1e-10)

    def test_parameters_put_elsewhere_while_they_are_looked_at(self):
        problem, optimizer, _ = pair(**IVON)
        before = everything(optimizer)
        with optimizer.sampled_params(train=False):
            for p in problem.parameters():
                p.data = p.data.clone()
        same_bits({str(i): p.detach() for i, p in enumerate(problem.parameters())}, {n: before[n] for n in "0123"})

    def test_a_cast_between_draw_and_step_is_taken_or_refused(self):
        problem, optimizer, hand = pair(torch.float32, **IVON)
        learn(problem, optimizer)
        hand.step(problem)
        with optimizer.sampled_params(train=True):
            problem.backward()
        hand.step(problem)
        problem.double()
        with contextlib.suppress(RuntimeError, ValueError):
            optimizer.step()
            hand.check(optimizer, 1e-5)

    @pytest.mark.parametrize("hyper", MEMORY)
    def test_another_memory_format_is_the_same_model(self, hyper):
        shapes = ((8, 3, 5, 5), (64, 64, 5, 5), 7)
        problem, optimizer, hand = pair(sizes=shapes, **hyper)
        for memory_format in (None, torch.channels_last, torch.contiguous_format, torch.channels_last):
            if memory_format is not None:
                for w in list(problem.weights)[:2]:
                    w.data = w.data.to(memory_format=memory_format)
            for _ in range(2):
                learn(problem, optimizer)
                hand.step(problem)
            assert memory_format is None or problem.weights[1].is_contiguous(memory_format=memory_format)
        hand.check(optimizer, 1e-10)

    @pytest.mark.parametrize("hyper", MEMORY)
    @pytest.mark.parametrize("unfreeze", [True, False])
    def test_a_parameter_frozen_between_steps(self, unfreeze, hyper):
        problem, optimizer, hand = pair(**hyper)
        frozen = [1, 3]
        for step in range(6):
            for i in frozen:
                problem.weights[i].requires_grad_(step < 2 or (unfreeze and step > 3))
            only = [i for i, w in enumerate(problem.weights) if w.requires_grad]
            learn(problem, optimizer, only=only)
            hand.step(problem, only)
        hand.check(optimizer, 1e-10)

    def test_a_parameter_frozen_between_draw_and_step_takes_no_curvature_from_the_others(self):
        problem, optimizer, hand = pair(**IVON)
        for _ in range(2):
            learn(problem, optimizer)
            hand.step(problem)
        with optimizer.sampled_params(train=True):
            problem.backward()
        problem.weights[1].requires_grad_(False)
        with contextlib.suppress(RuntimeError):  # one clear line would do
            optimizer.step()
            hand.step(problem, [0, 2, 3])
            hand.check(optimizer, 1e-10)

    @pytest.mark.parametrize("hyper", MEMORY)
    def test_a_group_added_between_steps(self, hyper):
        problem, _, hand = pair(**hyper)
        first, *rest = problem.weights
        optimizer = br.IVON([first], **hyper, compile=False)
        learn(problem, optimizer, 2, only=[0])
        hand.step(problem, [0])
        hand.step(problem, [0])
        optimizer.add_param_group({"params": rest, "lr": 0.05, "ess": 100.0})
        for i in (1, 2, 3):
            hand.hyper[i].update(lr=0.05, ess=100.0)
        for _ in range(3):
            learn(problem, optimizer)
            hand.step(problem)
        hand.check(optimizer, 1e-10)

    def test_a_group_added_between_draw_and_step(self):
        problem, _, hand = pair(**IVON)
        first, *rest = problem.weights
        optimizer = br.IVON([first], **IVON, compile=False)
        with optimizer.sampled_params(train=True):
            problem.backward([0])
        optimizer.add_param_group({"params": rest})
        optimizer.step()
        hand.step(problem, [0])
        learn(problem, optimizer)
        hand.step(problem)
        hand.check(optimizer, 1e-10)

    @pytest.mark.parametrize(
        ("make", "hyper", "compile"),
        [
            pytest.param(br.SGD, dict(lr=0.1, momentum=0.9), False, id="sgd"),
            pytest.param(br.SGD, dict(lr=0.1, momentum=0.9), True, id="sgd-compiled"),
            pytest.param(br.IVON, IVON, False, id="ivon"),
        ],
    )
    @pytest.mark.parametrize(
        ("before", "after"),
        [((5,), (3,)), ((1,), (5,)), ((3,), (4, 3)), ((300,), (200,)), ((400_000,), (300_000,)), ((300_000,), (400_000,))],
        ids=str,
    )
    def test_another_shape_is_refused_in_one_line(self, before, after, make, hyper, compile):
        """Its state belongs to the old one; broadcast or cut short, it would be that of other weights."""
        problem = Bowls(before, 7)
        optimizer = make(problem.parameters(), **hyper, compile=compile)
        learn(problem, optimizer, 2)
        other = Bowls(after, 7)
        problem.weights[0].data = other.weights[0].detach().clone()
        problem.targets, problem.widths = other.targets, other.widths
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)shape") as caught:
            learn(problem, optimizer)
        message = str(caught.value)
        assert "\n" not in message and make.__name__ in message
        assert str(after) in message and str(before) in message


class TestSeveral:
    @pytest.mark.parametrize("compile", MODES)
    def test_two_optimizers_at_once_are_each_alone(self, compile):
        hyper = (dict(IVON, seed=1), dict(IVON, ess=300.0, seed=2, hess_approx="gradsq", gradsq_scale=8.0))
        problems = [Bowls(*SIZES, seed=i) for i in range(2)]
        optimizers = [br.IVON(p.parameters(), **h, compile=compile) for p, h in zip(problems, hyper, strict=True)]
        for _ in range(4):
            with optimizers[0].sampled_params(train=True), optimizers[1].sampled_params(train=True):
                for problem in problems:
                    problem.backward()
            for optimizer in optimizers:
                optimizer.step()
        for i, together in enumerate(optimizers):
            problem = Bowls(*SIZES, seed=i)
            alone = br.IVON(problem.parameters(), **hyper[i], compile=compile)
            learn(problem, alone, 4)
            same_bits(together, alone)

    @pytest.mark.parametrize("compile", MODES)
    @pytest.mark.parametrize("hyper", MEMORY)
    def test_two_groups_have_their_own_numbers(self, hyper, compile):
        problem, _, hand = pair(**hyper)
        a, b, c, d = problem.weights
        own = (
            {},
            dict(lr=0.05, ess=100.0, betas=(0.5, 0.9), weight_decay=0.2),
            dict(noise_scale=0, weight_decay=0.0),
            dict(hess_init=0.3),
        )
        groups = [{"params": [p], **numbers} for p, numbers in zip((a, b, c, d), own, strict=True)]
        optimizer = br.IVON(groups, **hyper, compile=compile)
        for i, numbers in enumerate(own):
            hand.hyper[i].update(numbers)
            hand.hess[i].fill_(hand.hyper[i]["hess_init"])
        for _ in range(4):
            learn(problem, optimizer)
            hand.step(problem)
        hand.check(optimizer, 1e-10)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("hyper", [IVON, dict(IVON, hess_approx="gradsq")], ids=["price", "gradsq"])
    def test_other_dtypes_agree_in_both_modes(self, hyper, dtype):
        """16-bit weights: the state is float32, and its rounding may tip that of a weight by a place."""
        runs = []
        for compile in (True, False):
            problem = Bowls(70_001, 5, dtype=dtype)
            with torch.no_grad():
                for w in problem.weights:
                    w.mul_(0.5)
            optimizer = br.IVON(problem.parameters(), **dict(hyper, ess=1e3), compile=compile)
            learn(problem, optimizer, 20 if dtype == torch.float64 else 1)
            runs.append(optimizer)
        agree(*runs, 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)

    def test_weights_of_several_dtypes_share_one_optimizer(self):
        """The 16-bit one, first in the space of noise, as if it were alone."""
        problem, other = (Bowls(*SIZES, dtype=torch.float64) for _ in range(2))
        problem.weights[0].data = problem.weights[0].data.bfloat16()
        problem.weights[1].data = problem.weights[1].data.float()
        other.weights[0].data = other.weights[0].data.bfloat16()
        hand = ByHand(list(problem.parameters()), **IVON)
        optimizer, alone = (br.IVON(w, **IVON, compile=False) for w in (problem.parameters(), [other.weights[0]]))
        for _ in range(2):
            learn(problem, optimizer)
            learn(other, alone)
            hand.step(problem)
        together = everything(optimizer)
        same_bits({n: together[n] for n in everything(alone)}, alone)
        for i, tolerance in ((1, 1e-5), (2, 1e-10), (3, 1e-10)):
            state = optimizer.state[problem.weights[i]]
            found = (problem.weights[i].detach(), state["hess"], state["momentum"])
            for tensor, wanted in zip(found, (hand.mean[i], hand.hess[i], hand.momentum[i]), strict=True):
                torch.testing.assert_close(tensor.double(), wanted, rtol=tolerance, atol=tolerance)
        assert [optimizer.state[w]["hess"].dtype for w in problem.weights] == [torch.float32] * 2 + [torch.float64] * 2

    def test_a_tied_weight_is_one_parameter_in_both_modes(self):
        problem, optimizer, hand = pair(sizes=(7, 70_001), **IVON)
        problem.alias = problem.weights[0]
        assert len(list(problem.parameters())) == 2
        learn(problem, optimizer)
        hand.step(problem)
        assert problem.alias is problem.weights[0]
        hand.check(optimizer, 1e-10)

    def test_a_missing_draw_warns_once_and_keeps_the_curvature(self):
        problem, optimizer, _ = pair(**IVON)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                problem.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(caught) == 1
        assert all((optimizer.state[w]["hess"] == 1.0).all() and w.isfinite().all() for w in problem.weights)


def test_the_problem_has_the_gradient_that_it_says():
    problem = Bowls(6, (2, 3), dtype=torch.float64)
    pieces = zip(problem.weights, problem.targets, problem.widths, strict=True)
    sum((c * (w - t) ** 2 / 2 + w.cos() / 4).sum() for w, t, c in pieces).backward()
    for w, gradient in zip(problem.weights, problem.gradients(), strict=True):
        assert isinstance(w, nn.Parameter)
        torch.testing.assert_close(w.grad, gradient, rtol=1e-14, atol=1e-14)
