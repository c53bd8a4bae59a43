"""The two ways of running a step, eagerly and compiled: one trajectory, on any number of threads."""

import copy
import inspect
import json
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from tests.optimizers.conftest import Bowls, Logistic, agree, everything, learn, same_bits
from tests.optimizers import test_variational as published
from torch import Tensor

import bayesrule as br
from bayesrule.optimizers import execution

IVON = dict(lr=0.2, ess=500.0, hess_init=0.2, betas=(0.9, 0.999), weight_decay=1e-3)
BALL = dict(lr=0.2, momentum=0.9)
SLOW = pytest.mark.slow


def table(*rows: tuple[str, type, dict[str, Any]], default: tuple[str, ...]) -> list[Any]:
    return [pytest.param(make, hyper, id=name, marks=() if name in default else SLOW) for name, make, hyper in rows]


MODES = table(
    ("sgd", br.SGD, dict(lr=0.3)),
    ("sgd-decay", br.SGD, dict(lr=0.3, weight_decay=0.01)),
    ("sgd-momentum", br.SGD, BALL),
    ("sgd-nesterov", br.SGD, dict(BALL, nesterov=True, weight_decay=0.01)),
    ("sgd-dampening", br.SGD, dict(BALL, dampening=0.3, weight_decay=0.01)),
    ("rmsprop", br.RMSprop, dict(lr=1e-3, weight_decay=0.01)),
    ("rmsprop-momentum", br.RMSprop, dict(lr=1e-3, momentum=0.9)),
    ("adam", br.Adam, dict(lr=1e-3)),
    ("adam-decay", br.Adam, dict(lr=1e-3, betas=(0.8, 0.99), weight_decay=0.01)),
    ("adamw", br.AdamW, dict(lr=1e-3, weight_decay=0.1)),
    ("ivon", br.IVON, IVON),
    ("ivon-gradsq", br.IVON, dict(IVON, hess_approx="gradsq")),
    ("ivon-gradsq-scaled", br.IVON, dict(IVON, hess_approx="gradsq", gradsq_scale=64.0)),
    ("ivon-no-decay", br.IVON, dict(IVON, weight_decay=0.0)),
    ("ivon-clipped", br.IVON, dict(IVON, clip_radius=0.5)),
    ("ivon-unscaled", br.IVON, dict(IVON, lr=0.05, rescale_lr=False, debias=False)),
    ("ivon-pairs", br.IVON, dict(IVON, mc_samples=2, antithetic=True)),
    ("ivon-draws", br.IVON, dict(IVON, mc_samples=3)),
    ("ivon-low", br.IVON, dict(IVON, memory="low")),
    ("ivon-low-pairs", br.IVON, dict(IVON, memory="low", mc_samples=2, antithetic=True)),
    ("ivon-frozen", br.IVON, dict(IVON, betas=(0.9, 1.0))),
    ("ivon-certain", br.IVON, dict(IVON, ess=math.inf)),
    default=("sgd-momentum", "adamw", "ivon", "ivon-low"),
)


def run(make: type, hyper: dict[str, Any], steps: int, compile: Any, groups: Any = list) -> torch.optim.Optimizer:
    """An optimizer after steps on the logistic regression, by closures."""
    problem = Logistic()
    optimizer = make(groups(problem.parameters()), **hyper, compile=compile)
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss

        optimizer.step(closure)
    return optimizer


def compiled(optimizer: Any) -> int:
    """How many programs of an optimizer run compiled."""
    return sum(program.is_compiled for program in optimizer.execution.programs.values())


def test_every_public_optimizer_is_held_to_agree():
    public = {getattr(br, name) for name in br.__all__}
    optimizers = {o for o in public if inspect.isclass(o) and issubclass(o, torch.optim.Optimizer) and not inspect.isabstract(o)}
    assert optimizers == {row.values[0] for row in MODES}


class TestAgreement:
    @pytest.mark.parametrize(("make", "hyper"), MODES)
    def test_eager_and_compiled_are_one_trajectory_for_200_steps(self, make, hyper):
        eager, fast = (run(make, hyper, 200, compile) for compile in (False, True))
        assert compiled(fast) > 0 == compiled(eager)
        agree(fast, eager)

    @pytest.mark.slow
    def test_with_a_group_without_noise(self):
        def groups(params: Any) -> Any:
            first, *rest = params
            return [{"params": [first], "noise_scale": 0}, {"params": rest, "lr": 0.1, "weight_decay": 0.01}]

        agree(*(run(br.IVON, IVON, 200, compile, groups) for compile in (True, False)))

    @pytest.mark.slow
    def test_with_a_posterior_for_a_prior(self):
        problem = Logistic()
        precision = {name: torch.rand(p.shape) + 0.5 for name, p in problem.named_parameters()}
        mean = {name: torch.randn(p.shape) / 10 for name, p in problem.named_parameters()}
        zeros = {name: torch.zeros(p.shape) for name, p in problem.named_parameters()}
        prior = br.Posterior(mean, precision, zeros, precision, 500.0)
        agree(*(run(br.IVON, dict(IVON, prior=prior), 200, compile) for compile in (True, False)))

    def test_both_know_the_minimum(self):
        """That the problem is worth anything: 200 steps get somewhere."""
        problem = Logistic()
        optimizer = run(br.SGD, BALL, 200, False)
        before = problem.loss()
        with torch.no_grad():
            for p, trained in zip(problem.parameters(), optimizer.param_groups[0]["params"], strict=True):
                p.copy_(trained)
        assert problem.loss() < 0.6 * before


class TestGoldenCompiled:
    """The published trajectories once more, all compiled but the draw itself."""

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in list(published.CASES)[:1] + list(published.CASES)[-1:] else SLOW) for name in published.CASES]
    )
    def test_same_weights_momentum_curvature_and_samples(self, name, monkeypatch):
        made = []

        def make(*args: Any, **kwargs: Any) -> Any:
            made.append(own(*args, **kwargs, compile=True))
            return made[-1]

        own = br.IVON
        monkeypatch.setattr(br, "IVON", make)
        published.TestGolden().test_same_weights_momentum_curvature_and_samples(name)
        kinds = {key[0] for optimizer in made for key, program in optimizer.execution.programs.items() if program.is_compiled}
        assert len(made) == 1 and "close" in kinds
        assert json.dumps(published.CASES[name][1]["steps"]).count("after") == 1 or kinds & {"move", "move_on_average"}


RAGGED = (70_001, 3, (17, 5), 300_003, 1, (1 << 20) + 77, 999)


class TestThreads:
    """Whoever shares the work: the bits are the same."""

    ROWS = table(
        ("ivon", br.IVON, IVON),
        ("ivon-low", br.IVON, dict(IVON, memory="low")),
        ("ivon-gradsq", br.IVON, dict(IVON, hess_approx="gradsq", clip_radius=0.5)),
        ("adamw", br.AdamW, dict(lr=1e-3)),
        ("rmsprop", br.RMSprop, dict(lr=1e-3, momentum=0.9)),
        ("sgd", br.SGD, BALL),
        default=("ivon", "ivon-low", "ivon-gradsq", "adamw", "rmsprop", "sgd"),
    )

    @pytest.mark.parametrize(("make", "hyper"), ROWS)
    def test_eager(self, make, hyper, threads):
        self.check(make, hyper, threads, (1, 2, 4), compile=False)

    def test_eager_of_several_draws(self, threads):
        self.check(br.IVON, dict(IVON, mc_samples=2), threads, (1, 2, 4), compile=False, draws=2)

    @pytest.mark.slow
    @pytest.mark.parametrize(("make", "hyper"), ROWS)
    def test_compiled(self, make, hyper, threads):
        self.check(make, hyper, threads, (1, 2, 4), compile=True)

    def test_compiled_momentum(self, threads):
        self.check(br.SGD, BALL, threads, (1, 2), compile=True)

    @staticmethod
    def check(make: type, hyper: dict[str, Any], threads: Any, counts: tuple[int, ...], *, compile: bool, draws: int = 1) -> None:
        runs = []
        for count in counts:
            threads(count)
            torch._dynamo.reset()
            problem = Bowls(*RAGGED)
            optimizer = make(problem.parameters(), **hyper, compile=compile)
            with torch._inductor.utils.fresh_cache():  # the number of threads is part of the code
                learn(problem, optimizer, 3, draws=draws)
            assert bool(compiled(optimizer)) == compile
            runs.append(everything(optimizer))
        for other in runs[1:]:
            same_bits(other, runs[0])

    def test_ten_steps_move_every_weight(self):
        """That the runs above compare anything."""
        problem = Bowls(*RAGGED)
        before = [w.detach().clone() for w in problem.weights]
        learn(problem, br.IVON(problem.parameters(), **IVON, compile=False), 1)
        assert all((w != b).all() for w, b in zip(problem.weights, before, strict=True))


def graphs() -> int:
    """Graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class TestGraphs:
    SCHEDULE = [
        *({"lr": 0.1 * step / 5} for step in range(5)),
        *({"lr": 0.05 * (1 + math.cos(math.pi * step / 10))} for step in range(11)),
        {"ess": 700.0},
        {"weight_decay": 0.02},
        {"betas": (0.85, 0.99)},
        {"lr": 0.2, "ess": 1e5, "betas": (0.95, 0.9)},
    ]

    @pytest.mark.parametrize(
        ("make", "hyper", "most"),
        [
            # a draw; the mean brought back; a step by one gradient (the first step, without a memory, runs eagerly)
            pytest.param(br.IVON, IVON, 3, id="ivon"),
            pytest.param(br.IVON, dict(IVON, memory="low"), 3, id="ivon-low", marks=SLOW),
            pytest.param(br.AdamW, dict(lr=0.1, weight_decay=0.1), 1, id="adamw"),
        ],
    )
    def test_no_schedule_compiles_anew(self, make, hyper, most):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        problem = Bowls(70_001, (7, 40), 3)
        optimizer = make(problem.parameters(), **hyper, compile=True)
        learn(problem, optimizer, 2)
        assert graphs() == compiled(optimizer) == most
        programs = len(optimizer.execution.programs)
        for change in self.SCHEDULE:
            if "ess" in optimizer.defaults or "ess" not in change:
                optimizer.param_groups[0].update(change)
            learn(problem, optimizer)
        assert graphs() == compiled(optimizer) == most
        assert len(optimizer.execution.programs) == programs

    def test_one_graph_serves_plots_of_every_size(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        sizes = ((1 << 20) + 77, 300_003, 70_001, 1 << 19, (1 << 16) + 1, 3, 5)
        problem = Bowls(*sizes)
        optimizer = br.SGD(problem.parameters(), **BALL, compile=True)
        learn(problem, optimizer, 3)
        assert graphs() == compiled(optimizer) == 1

    @pytest.mark.slow
    def test_three_graphs_serve_plots_of_every_size_with_draws(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        problem = Bowls((1 << 20) + 77, 300_003, 70_001, 1 << 19, (1 << 16) + 1, 3, 5)
        optimizer = br.IVON(problem.parameters(), **IVON, compile=True)
        learn(problem, optimizer, 3)
        assert graphs() == compiled(optimizer) == 3

    @pytest.mark.slow
    def test_several_draws_take_two_graphs_more(self):
        """Of one draw's look into the running mean, and of the step by that; the step by one gradient falls away."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        problem = Bowls(70_001, 3)
        optimizer = br.IVON(problem.parameters(), **IVON, compile=True)
        for draws in (2, 3, 2, 5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                learn(problem, optimizer, 2, draws=draws)
        assert graphs() == compiled(optimizer) == 4


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

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
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
