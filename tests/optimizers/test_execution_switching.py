"""When programs are compiled, what a copy of an optimizer keeps of that, and what happens without a compiler."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.optimizers.conftest import Bowls, agree, compiled, learn, same_bits
from torch import Tensor

import bayesrule as br
from bayesrule.optimizers import execution

pytestmark = pytest.mark.usefixtures("unrecorded")

IVON = dict(lr=0.2, ess=500.0, hess_init=0.2, betas=(0.9, 0.999), weight_decay=1e-3)
BALL = dict(lr=0.2, momentum=0.9)
SLOW = pytest.mark.slow


class TestAuto:
    """Eager for PATIENCE steps, compiled from then on where it is worth while."""

    @pytest.fixture(autouse=True)
    def eager_for_ten_steps(self, monkeypatch):
        monkeypatch.setattr(execution, "PATIENCE", 10)
        monkeypatch.setattr(execution, "WORTHWHILE", 100)

    @pytest.mark.parametrize(
        ("make", "hyper"),
        [
            pytest.param(br.SGD, BALL, id="sgd"),
            pytest.param(br.IVON, IVON, id="ivon"),
            pytest.param(br.IVON, dict(IVON, memory="low"), id="ivon-low", marks=SLOW),
        ],
    )
    def test_switches_when_its_patience_is_over(self, make, hyper):
        problem, other = Bowls(300_003, 7), Bowls(300_003, 7)
        auto, eager = make(problem.parameters(), **hyper), make(other.parameters(), **hyper, compile=False)
        learn(problem, auto, 10)
        learn(other, eager, 10)
        assert not compiled(auto)
        same_bits(auto, eager)
        learn(problem, auto, 30)
        learn(other, eager, 30)
        assert compiled(auto)
        agree(auto, eager)

    @pytest.mark.parametrize("sizes", [(99,), (1,), (50, 49)], ids=str)
    def test_not_for_a_small_model(self, sizes):
        problem = Bowls(*sizes)
        optimizer = br.SGD(problem.parameters(), **BALL)
        learn(problem, optimizer, 20)
        assert not compiled(optimizer)

    def test_frozen_parameters_do_not_count(self):
        problem = Bowls(99, 1000)
        problem.weights[1].requires_grad_(False)
        optimizer = br.SGD(problem.parameters(), **BALL)
        learn(problem, optimizer, 20, only=[0])
        assert not compiled(optimizer)

    def test_not_with_noise_of_the_users(self):
        problem = Bowls(300)
        optimizer = br.IVON(problem.parameters(), **IVON, noise=torch.ones_like)
        learn(problem, optimizer, 20)
        assert not compiled(optimizer)

    def test_not_when_told_not_to(self):
        problem = Bowls(300)
        optimizer = br.SGD(problem.parameters(), **BALL, compile=False)
        learn(problem, optimizer, 20)
        assert not compiled(optimizer)

    def test_looks_and_draws_are_no_steps(self):
        problem = Bowls(300)
        optimizer = br.IVON(problem.parameters(), **IVON)
        for _ in range(20):
            with optimizer.sampled_params(train=False):
                pass
            with optimizer.sampled_params(train=True):
                problem.backward()
        assert not compiled(optimizer)

    @pytest.mark.slow
    def test_not_between_the_draws_of_a_step(self, monkeypatch):
        """The tenth and the eleventh step have three draws each; buckets are dealt anew between the two."""
        problem, other = Bowls(300_003, 7), Bowls(300_003, 7)
        hyper = dict(IVON, mc_samples=3)
        auto, eager = br.IVON(problem.parameters(), **hyper), br.IVON(other.parameters(), **hyper, compile=False)
        learn(problem, auto, 14, draws=3)
        learn(other, eager, 14, draws=3)
        assert compiled(auto)
        agree(auto, eager)


class TestCopies:
    """A copy keeps how it is run, and goes on from the same state."""

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
    @pytest.mark.parametrize(
        ("make", "hyper", "compile"),
        [
            pytest.param(br.SGD, BALL, True, id="compiled"),
            pytest.param(br.SGD, BALL, False, id="eager"),
            pytest.param(br.IVON, dict(IVON, memory="low"), False, id="low"),
            pytest.param(br.IVON, IVON, "auto", id="auto"),
            pytest.param(br.IVON, dict(IVON, memory="low"), True, id="low-compiled", marks=SLOW),
        ],
    )
    def test_goes_on_exactly(self, how, make, hyper, compile):
        problem = Bowls(70_001, 5)
        optimizer = make(problem.parameters(), **hyper, compile=compile)
        learn(problem, optimizer, 3)
        twin, twins = how((problem, optimizer))
        assert (twins.execution.compile, twins.frugal) == (compile, hyper.get("memory") == "low")
        learn(problem, optimizer, 3)
        learn(twin, twins, 3)
        same_bits(twins, optimizer)
        assert bool(compiled(twins)) == (compile is True)

    @pytest.mark.parametrize(
        ("make", "hyper", "compile"),
        [
            pytest.param(br.SGD, BALL, True, id="compiled"),
            pytest.param(br.IVON, IVON, False, id="eager"),
            pytest.param(br.IVON, IVON, True, id="ivon-compiled", marks=SLOW),
        ],
    )
    def test_a_checkpoint_goes_on_exactly_and_says_nothing_of_execution(self, make, hyper, compile):
        problem, other = Bowls(70_001, 5), Bowls(70_001, 5, seed=1)
        optimizer = make(problem.parameters(), **hyper, compile=compile)
        learn(problem, optimizer, 3)
        checkpoint = copy.deepcopy((problem.state_dict(), optimizer.state_dict()))
        assert set(checkpoint[1]["param_groups"][0]) == {*optimizer.defaults, "params"}
        resumed = make(other.parameters(), **hyper, compile=compile)
        other.load_state_dict(checkpoint[0])
        resumed.load_state_dict(checkpoint[1])
        other.targets, other.widths = problem.targets, problem.widths
        learn(problem, optimizer, 3)
        learn(other, resumed, 3)
        same_bits(resumed, optimizer)


class TestNoCompiler:
    """One line of warning at most, and the eager result."""

    @pytest.fixture
    def no_compiler(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(execution, "PATIENCE", 2)
        monkeypatch.setattr(execution, "WORTHWHILE", 1)

    @pytest.fixture
    def failing(self, monkeypatch):
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("g++: no such file\nand 40 lines more")

        monkeypatch.setattr(torch, "compile", fail)

    def test_auto_stays_eager_silently(self, no_compiler, failing):
        problem, other = Bowls(70_001, 5), Bowls(70_001, 5)
        auto, eager = br.IVON(problem.parameters(), **IVON), br.IVON(other.parameters(), **IVON, compile=False)
        learn(problem, auto, 6)  # warnings are errors
        learn(other, eager, 6)
        same_bits(auto, eager)

    def test_a_compiler_named_by_the_environment_is_found(self, no_compiler, monkeypatch):
        assert not execution.has_compiler()
        monkeypatch.setenv("CXX", "/bin/sh")
        assert execution.has_compiler()

    SIZES = ((70_001, 5), (300_003, 9, 600_000))

    @pytest.mark.parametrize("sizes", [SIZES[0], pytest.param(SIZES[1], marks=SLOW)], ids=str)
    @pytest.mark.parametrize(
        ("make", "hyper", "draws"),
        [
            pytest.param(br.IVON, IVON, 1, id="ivon"),
            pytest.param(br.IVON, dict(IVON, memory="low"), 1, id="ivon-low"),
            pytest.param(br.IVON, dict(IVON, mc_samples=2), 2, id="ivon-draws"),
            pytest.param(br.SGD, BALL, 1, id="sgd"),
        ],
    )
    def test_a_compiler_that_fails_is_told_once_and_alters_nothing(self, make, hyper, draws, sizes, failing):
        problem, other = Bowls(*sizes), Bowls(*sizes)
        told = make(problem.parameters(), **hyper, compile=True)
        with pytest.warns(UserWarning) as caught:
            learn(problem, told, 3, draws=draws)
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "\n" not in message
        for part in (make.__name__, "torch.compile failed", "g++: no such file", "going on eagerly", "compile=False"):
            assert part in message
        learn(problem, told, 2, draws=draws)  # warnings are errors
        eager = make(other.parameters(), **hyper, compile=False)
        learn(other, eager, 5, draws=draws)
        same_bits(told, eager)

    def test_a_compiler_that_fails_while_some_parameters_have_no_gradient(self, failing):
        """The buckets of the draw are those of its step, whatever happens between the two."""
        problem, other = Bowls(300_003, 9, 600_000), Bowls(300_003, 9, 600_000)
        told = br.IVON(problem.parameters(), **IVON, compile=True)
        with pytest.warns(UserWarning, match=r"torch\.compile failed"):
            learn(problem, told, 3, only=[0, 1])
        eager = br.IVON(other.parameters(), **IVON, compile=False)
        learn(other, eager, 3, only=[0, 1])
        same_bits(told, eager)

    def test_a_compiler_whose_results_are_wrong_is_not_used(self, monkeypatch):
        def wrong(function: Any, **kwargs: Any) -> Any:
            def off(*args: Tensor) -> None:
                function(*args)
                args[0].mul_(1.001)

            return off

        monkeypatch.setattr(torch, "compile", wrong)
        problem, other = Bowls(70_001, 5), Bowls(70_001, 5)
        told = br.AdamW(problem.parameters(), compile=True)
        with pytest.warns(UserWarning, match="not what the eager step makes"):
            learn(problem, told, 5)
        eager = br.AdamW(other.parameters(), compile=False)
        learn(other, eager, 5)
        same_bits(told, eager)

    @pytest.mark.parametrize("value", ["yes", "", None, 2, [], "Auto"], ids=repr)
    def test_another_word_is_refused_in_one_line(self, value):
        with pytest.raises(ValueError, match=r"compile must be True, False or 'auto', got") as caught:
            br.SGD(Bowls(3).parameters(), compile=value)
        assert repr(value) in str(caught.value) and "\n" not in str(caught.value)
