"""The two ways of running a step, eagerly and compiled: one trajectory, on any number of threads."""

import inspect
import json
import math
import warnings
from typing import Any

import pytest
import torch
from tests.optimizers import test_variational as published
from tests.optimizers.conftest import Bowls, Logistic, agree, closures, compiled, everything, learn, same_bits

import bayesrule as br

pytestmark = pytest.mark.usefixtures("unrecorded")

IVON = dict(lr=0.2, ess=500.0, hess_init=0.2, betas=(0.9, 0.999), weight_decay=1e-3)
BALL = dict(lr=0.2, momentum=0.9)
SLOW = pytest.mark.slow


def table(*rows: tuple[str, type, dict[str, Any]], default: tuple[str, ...]) -> list[Any]:
    return [pytest.param(make, hyper, id=name, marks=() if name in default else SLOW) for name, make, hyper in rows]


COMPOSED = br.BayesRule(br.MonteCarlo(2), br.SquaredGradient(32.0), br.Riemannian(), br.Momentum(0.9))
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
    ("vadam", br.Vadam, dict(lr=1e-3, ess=500.0, weight_decay=1e-3, hess_init=0.1)),
    ("vadam-draws", br.Vadam, dict(lr=1e-3, ess=500.0, mc_samples=3, hess_init=0.1)),
    ("vprop", br.Vprop, dict(lr=1e-3, ess=5000.0, weight_decay=1e-3, hess_init=0.1, memory="low")),
    ("sam", br.SAM, dict(lr=0.1, rho=0.05, weight_decay=1e-3)),
    ("bsam", br.BSAM, dict(lr=0.1, ess=500.0, rho=0.05, weight_decay=1e-3)),
    ("von", br.VON, dict(lr=0.1, ess=500.0, betas=(0.9, 0.9999), weight_decay=1e-3)),
    ("vogn", br.VOGN, dict(lr=0.1, ess=500.0, weight_decay=1e-3, mc_samples=2)),
    ("ogn", br.OGN, dict(lr=0.1, ess=500.0, weight_decay=1e-3, damping=0.01)),
    ("composed", br.BayesOptimizer, dict(rule=COMPOSED, lr=0.1, ess=500.0, weight_decay=1e-3)),
    ("ste", br.STE, dict(lr=0.01, weight_decay=1e-3)),
    ("bayesbinn", br.BayesBiNN, dict(lr=5e-3, ess=500.0, beta=0.9, natural_init=1.0, temperature=0.5)),
    default=("adamw", "ivon", "ivon-low"),
)


def run(make: type, hyper: dict[str, Any], steps: int, compile: Any, groups: Any = list) -> torch.optim.Optimizer:
    """An optimizer after steps on the logistic regression, by closures."""
    problem = Logistic()
    optimizer = make(groups(problem.parameters()), **hyper, compile=compile)
    closures(problem, optimizer, steps)
    return optimizer


def test_every_public_optimizer_is_held_to_agree():
    public = {getattr(br, name) for name in br.__all__}
    optimizers = {o for o in public if inspect.isclass(o) and issubclass(o, torch.optim.Optimizer) and not inspect.isabstract(o)}
    assert {o for o in optimizers if "compile" in inspect.signature(o).parameters} == {row.values[0] for row in MODES}


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

    def test_the_problem_is_worth_its_steps(self):
        """Or else agreement would say little."""
        problem = Logistic()
        before = sum(problem.loss(step) for step in range(8))
        optimizer = run(br.SGD, BALL, 200, False)
        with torch.no_grad():
            for p, trained in zip(problem.parameters(), optimizer.param_groups[0]["params"], strict=True):
                p.copy_(trained)
        assert sum(problem.loss(step) for step in range(8)) < 0.6 * before


class TestGoldenCompiled:
    """The published trajectories once more, all compiled but the draw itself."""

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in list(published.CASES)[:1] + list(published.CASES)[-1:] else SLOW)
            for name in published.CASES
        ],
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


RAGGED = (70_001, 3, (17, 5), 140_003, 1, 999)
LARGE = (70_001, 3, (17, 5), 300_003, 1, (1 << 20) + 77, 999)


class TestThreads:
    """Whoever shares the work: the bits are the same."""

    ROWS = table(
        ("ivon", br.IVON, IVON),
        ("ivon-low", br.IVON, dict(IVON, memory="low")),
        ("ivon-gradsq", br.IVON, dict(IVON, hess_approx="gradsq", clip_radius=0.5)),
        ("adamw", br.AdamW, dict(lr=1e-3)),
        ("rmsprop", br.RMSprop, dict(lr=1e-3, momentum=0.9)),
        ("sgd", br.SGD, BALL),
        default=("ivon", "ivon-low", "adamw"),
    )

    @pytest.mark.parametrize("sizes", [RAGGED, pytest.param(LARGE, marks=SLOW)], ids=["ragged", "large"])
    @pytest.mark.parametrize(("make", "hyper"), ROWS)
    def test_eager(self, make, hyper, sizes, threads):
        self.check(make, hyper, threads, (1, 2, 4), sizes, compile=False)

    def test_eager_of_several_draws(self, threads):
        self.check(br.IVON, dict(IVON, mc_samples=2), threads, (1, 2, 4), RAGGED, compile=False, draws=2)

    @pytest.mark.slow
    @pytest.mark.parametrize(("make", "hyper"), ROWS)
    def test_compiled(self, make, hyper, threads):
        self.check(make, hyper, threads, (1, 2, 4), LARGE, compile=True)

    def test_compiled_momentum(self, threads):
        self.check(br.SGD, BALL, threads, (1, 2), RAGGED, compile=True)

    @staticmethod
    def check(make: type, hyper: dict[str, Any], threads: Any, counts: Any, sizes: Any, *, compile: bool, draws: int = 1) -> None:
        runs = []
        for count in counts:
            threads(count)
            torch._dynamo.reset()
            problem = Bowls(*sizes)
            optimizer = make(problem.parameters(), **hyper, compile=compile)
            with torch._inductor.utils.fresh_cache():  # the number of threads is part of the code
                learn(problem, optimizer, 2, draws=draws)
            assert bool(compiled(optimizer)) == compile
            runs.append(everything(optimizer))
        for other in runs[1:]:
            same_bits(other, runs[0])

    def test_a_step_moves_every_weight(self):
        """That the runs above compare anything."""
        problem = Bowls(*RAGGED)
        before = [w.detach().clone() for w in problem.weights]
        learn(problem, br.IVON(problem.parameters(), **IVON, compile=False), 1)
        assert all((w != b).all() for w, b in zip(problem.weights, before, strict=True))


def graphs() -> int:
    """Graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class TestGraphs:
    SCHEDULE = (
        *({"lr": 0.1 * step / 5} for step in range(5)),
        *({"lr": 0.05 * (1 + math.cos(math.pi * step / 10))} for step in range(11)),
        {"ess": 700.0},
        {"weight_decay": 0.02},
        {"betas": (0.85, 0.99)},
        {"lr": 0.2, "ess": 1e5, "betas": (0.95, 0.9)},
    )

    # IVON: a draw; the mean brought back; a step by one gradient. The others: a step. The first step of all, which has nothing
    # to remember, runs eagerly.
    MOST = (
        pytest.param(br.IVON, IVON, 3, id="ivon"),
        pytest.param(br.IVON, dict(IVON, memory="low"), 3, id="ivon-low"),
        pytest.param(br.AdamW, dict(lr=0.1, weight_decay=0.1), 1, id="adamw"),
    )

    @pytest.fixture(autouse=True)
    def from_zero(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    @pytest.mark.parametrize(("make", "hyper", "most"), MOST)
    def test_no_schedule_compiles_anew(self, make, hyper, most):
        problem = Bowls(70_001)
        optimizer = make(problem.parameters(), **hyper, compile=True)
        learn(problem, optimizer, 2)
        assert graphs() == compiled(optimizer) == most
        programs = len(optimizer.execution.programs)
        for change in self.SCHEDULE:
            known = {name: value for name, value in change.items() if name in optimizer.defaults}
            optimizer.param_groups[0].update(known)
            learn(problem, optimizer)
        assert graphs() == compiled(optimizer) == most
        assert len(optimizer.execution.programs) == programs

    @pytest.mark.parametrize(("make", "hyper", "most"), MOST)
    def test_one_graph_serves_plots_of_every_size(self, make, hyper, most):
        """Pieces of one tensor, whole tensors, and small ones that share a bucket."""
        problem = Bowls((1 << 20) + 77, 300_003, 70_001, 1 << 19, (1 << 16) + 1, 3, 5)
        optimizer = make(problem.parameters(), **hyper, compile=True)
        learn(problem, optimizer, 3)
        assert graphs() == compiled(optimizer) == most

    @pytest.mark.slow
    def test_several_draws_take_two_graphs_more(self):
        """Of one draw's look into the running mean, and of the step by that; the step by one gradient falls away."""
        problem = Bowls(70_001)
        optimizer = br.IVON(problem.parameters(), **IVON, compile=True)
        for draws in (2, 3, 2, 5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                learn(problem, optimizer, 2, draws=draws)
        assert graphs() == compiled(optimizer) == 4
