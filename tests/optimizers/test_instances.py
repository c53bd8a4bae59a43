"""What holds for many optimizers alike: each invariant once, over the rows of the table."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.instances import (
    ALGORITHMS,
    GAUSS_NEWTON,
    PROBLEMS,
    SMALL_EVON,
    SMALL_IVON,
    TWINS,
    Algorithm,
    Network,
    Quadratic,
    closure_of,
    flat,
    named,
    state,
    train,
)
from torch import Tensor, nn

import bayesrule as br

every = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
LEARNS_CURVATURE = [a for a in ALGORITHMS if a.keeps in ("precision", "basis") and a.twin is None]
TAKES_SEVERAL = [
    (a, name)
    for a in ALGORITHMS
    for name in ("mc_samples", "m_sharpness")
    if a.takes(name) and not a.hyper.get("antithetic") and a.alone.get("ess") != math.inf and a.alone.get("p") != 0.0
]


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def noise_of(algorithm: Algorithm, mirrored: bool = False) -> dict[str, Any]:
    """An argument for the same noise in every draw, or for that of the other sign; of signs it is uniform in (0, 1)."""
    if not algorithm.takes("noise"):
        return {}
    value = (0.3 if mirrored else 0.7) if algorithm.keeps in ("odds", "units") else (-0.4 if mirrored else 0.4)
    return {"noise": lambda p: torch.full_like(p, value)}


# Limits


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("algorithm", TWINS, ids=named)
def test_takes_the_steps_of_its_twin(algorithm, problem):
    """At a falling rate: at a constant one RMSprop circles the minimum, where rounding grows."""
    ours, theirs = problem(), problem()
    path = train(ours, algorithm(ours.parameters()), 100, decay=0.98)
    same(path, train(theirs, algorithm.torch(theirs.parameters()), 100, decay=0.98))
    assert (path[0] != path[-1]).all()


class Pair(NamedTuple):
    """Two algorithms that meet in a limit, in the state and in what is seen of the weights."""

    problem: Callable[[], Any]
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    seen: Callable[[Tensor], Tensor] = torch.clone
    tolerance: float = 1e-12


class Tiny(Network):
    """Weights so near to zero that tanh is as good as linear, and with one size: only their signs differ."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.data = 1e-5 * p.data.sign()


FROZEN = dict(ess=50.0, hess_init=0.5, betas=(0.0, 1.0), weight_decay=0.01)
BSAM = dict(ess=math.inf, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01, damping=0.05)
PAIRS = {
    "EVON without bases is IVON": Pair(
        Network,
        lambda p: br.EVON(p, **{**SMALL_EVON, "max_precond_dim": 0}),
        lambda p: br.IVON(p, **{**SMALL_IVON, "lr": SMALL_EVON["lr"]}, rescale_lr=False),
    ),
    "EVON of vectors is IVON": Pair(
        Quadratic,
        lambda p: br.EVON(p, **SMALL_EVON),
        lambda p: br.IVON(p, **{**SMALL_IVON, "lr": SMALL_EVON["lr"]}, rescale_lr=False),
    ),
    "VOGN of single examples squares their gradients": Pair(
        Quadratic,
        lambda p: br.VOGN(p, **{**GAUSS_NEWTON, "damping": 0.0}),
        lambda p: br.BayesOptimizer(
            p,
            br.BayesRule(br.MonteCarlo(), br.SquaredGradient(), br.Additive(), br.Momentum(0.9, over="loss+prior")),
            0.1,
            ess=64.0,
            hess_init=0.5,
            beta2=0.9,
            weight_decay=0.01,
        ),
    ),
    "VOGN without noise is OGN": Pair(
        Network,
        lambda p: br.VOGN(p, **{**GAUSS_NEWTON, "ess": math.inf}),
        lambda p: br.OGN(p, **GAUSS_NEWTON),
    ),
    "IVON whose curvature is frozen is VON": Pair(
        Network, lambda p: br.IVON(p, 0.1, rescale_lr=False, **FROZEN), lambda p: br.VON(p, 0.1, **FROZEN)
    ),
    "bSAM without radius and noise goes by the magnitude of the gradient": Pair(
        Network,
        lambda p: br.BSAM(p, 0.1, rho=0.0, **BSAM),
        lambda p: br.BayesOptimizer(
            p,
            br.BayesRule(
                br.Delta(),
                br.Magnitude(0.05),
                br.Additive(mean_precision="old"),
                br.Momentum(0.9, over="loss+prior", debias=False),
            ),
            0.1,
            hess_init=0.5,
            beta2=0.9,
            weight_decay=0.01,
        ),
    ),
    # to six digits: 1 - w^2 is rounded beside the 1e-10 that is added to it
    "BayesBiNN without noise at almost no temperature is STE": Pair(
        Tiny,
        lambda p: br.BayesBiNN(p, 1e-5, 20.0, natural_init=1e-5, temperature=1e-10, noise=lambda p: torch.full_like(p, 0.5)),
        lambda p: br.STE(p, 1e-5, momentum=0.0, weight_decay=1 / 20),
        torch.sign,
        1e-5,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_algorithms_meet(name):
    pair, found = PAIRS[name], []
    for make in (pair.ours, pair.theirs):
        problem = pair.problem()
        optimizer = make(problem.parameters())
        start = flat(problem.parameters())
        path = train(problem, optimizer, 20)
        assert (path != start).any(0).double().mean() > 0.25
        found.append((pair.seen(path), state(optimizer, optimizer.names.hess)))
    (ours, kept), (theirs, twins) = found
    same(ours, theirs)
    torch.testing.assert_close(kept, twins, rtol=pair.tolerance, atol=pair.tolerance * float(twins.abs().mean()))


# Symmetries


@pytest.mark.parametrize("c", [8.0, 0.25])
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.scales is not None], ids=named)
def test_scaling_the_loss_moves_no_weight(algorithm, c):
    """Powers of two are exact: eigenvectors that are not unique stay the same."""
    plain, scaled = Network(), Network()
    one, other = algorithm(plain.parameters(), **algorithm.scaled_with), algorithm(scaled.parameters(), **algorithm.scaled(c))
    same(train(plain, one, 8), train(scaled, other, 8, scale=c), 1e-10)
    if one.names.hess and "hess_init" in algorithm.scales:
        same(state(one, one.names.hess) * c ** algorithm.scales["hess_init"], state(other, other.names.hess), 1e-10)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.keeps != "blocks"], ids=named)  # a group is a block
def test_splitting_parameters_into_groups_changes_nothing(algorithm):
    whole, split = Network(), Network()
    first, *others, last = split.parameters()
    one, many = algorithm(whole.parameters()), algorithm([{"params": [first]}, {"params": others}, {"params": [last]}])
    same(train(whole, one, 6), train(split, many, 6))
    if one.names.hess:
        same(state(one, one.names.hess), state(many, many.names.hess))


@pytest.mark.parametrize(("algorithm", "several"), TAKES_SEVERAL, ids=lambda x: x.name if isinstance(x, Algorithm) else x)
def test_draws_with_equal_noise_are_one_draw(algorithm, several):
    """As are equal parts of a batch."""
    one, many = Network(), Network()
    first = algorithm(one.parameters(), **noise_of(algorithm))
    other = algorithm(many.parameters(), **noise_of(algorithm), **{several: 3})
    assert other.wanted_draws() == 3
    same(train(one, first, 6), train(many, other, 6))
    if first.names.hess:
        same(state(first, first.names.hess), state(other, other.names.hess))


def mirrored() -> Quadratic:
    """The other way round."""
    problem = Quadratic()
    problem.c = -problem.c
    for p in problem.parameters():
        p.data.neg_()
    return problem


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.name != "multi-ivon"], ids=named)  # whose noise is its own
def test_flipping_the_signs_of_a_problem_flips_the_path(algorithm):
    plain, other = Quadratic(), mirrored()
    path = train(plain, algorithm(plain.parameters(), **noise_of(algorithm)), 10)
    same(path, -train(other, algorithm(other.parameters(), **noise_of(algorithm, mirrored=True)), 10))


def turned(turn: Tensor) -> Quadratic:
    """In coordinates of its own."""
    problem = Quadratic()
    problem.A, problem.c = turn @ problem.A @ turn.T, turn @ problem.c
    start = turn @ flat(problem.parameters())
    problem.head.data, problem.tail.data = start[:2].clone(), start[2:].clone()
    return problem


@every
def test_turning_the_problem_turns_the_path_of_those_without_coordinates_of_their_own(algorithm):
    """EVON's bases turn with matrices: see there."""
    generator = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    plain, other = Quadratic(), turned(turn)
    path = train(plain, algorithm(plain.parameters()), 10)
    gap = path @ turn.T - train(other, algorithm(other.parameters()), 10)
    assert (gap.abs().max() < 1e-12) == algorithm.turns
    assert algorithm.turns or gap.abs().max() > 1e-3


# Bounds


class Adversary(nn.Module):
    """Slopes of all sizes, and a bend downwards as strong: gradients against the noise. And every fifth time, nothing at all."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.w = nn.Parameter(torch.randn(2, 3, generator=generator).to(dtype))
        self.start = self.w.detach().clone()
        self.slopes = (torch.randn(15, 4, 6, generator=generator) * 10 ** torch.randn(15, 4, 1, generator=generator)).to(dtype)
        self.bends = (10 ** (1.5 * torch.randn(15, generator=generator))).to(dtype)
        self.slopes[4::5], self.bends[4::5] = 0, 0

    def losses(self, step: int) -> Tensor:
        return self.slopes[step] @ self.w.flatten() - self.bends[step] * (self.w - self.start).square().sum()

    def loss(self, step: int) -> Tensor:
        return self.losses(step).mean()


def decaying(algorithm: Algorithm, beta: float) -> dict[str, Any]:
    """The argument that keeps such a share of the curvature."""
    return {"betas": (0.5, beta)} if algorithm.takes("betas") else {"alpha" if algorithm.takes("alpha") else "beta2": beta}


@pytest.mark.parametrize(("dtype", "slack", "beta"), [(torch.float32, 1e-6, 0.6), (torch.float64, 1e-14, 0.0)], ids=str)
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.floor and a.twin is not torch.optim.SGD], ids=named)
def test_the_precision_has_its_floor_whatever_gradients_come(algorithm, dtype, slack, beta):
    problem = Adversary(dtype)
    optimizer = algorithm(problem.parameters(), lr=0.0, **decaying(algorithm, beta))
    (group,) = optimizer.param_groups
    decay, reached = group["weight_decay"], False
    before = torch.full((6,), optimizer.start(group), dtype=dtype)
    for step in range(15):
        train(problem, optimizer, [step])
        after, floor = state(optimizer, optimizer.names.hess), algorithm.floor(group, before)
        assert after.isfinite().all() and (after >= floor - slack * (before + decay)).all()
        assert not decay or (after + decay > 0).all()
        reached |= bool((after <= floor + 0.2 * (before + decay)).all())
        before = after
    assert reached


# Means


@every
def test_rate_zero_leaves_the_mean(algorithm):
    problem = Network()
    optimizer = algorithm(problem.parameters(), lr=0.0)
    start = flat(problem.parameters())
    path = train(problem, optimizer, 3)
    assert torch.equal(path, start.expand_as(path))


@pytest.mark.parametrize("algorithm", LEARNS_CURVATURE, ids=named)
def test_rate_zero_still_learns_momentum_and_curvature(algorithm):
    problem = Network()
    optimizer = algorithm(problem.parameters(), lr=0.0)
    train(problem, optimizer, 3)
    assert (state(optimizer, optimizer.names.hess) != optimizer.start(optimizer.param_groups[0])).all()
    rule = optimizer.rule(optimizer.param_groups[0])
    assert not rule.momentum.remembers or (state(optimizer, optimizer.names.memory) != 0).all()


class Lost(Exception):
    """What goes wrong within a draw."""


def failing(problem: Any, optimizer: Any, call: int) -> Callable[..., Tensor]:
    """An ordinary closure that fails when it is called for the last time."""
    ordinary, calls = closure_of(problem, optimizer, 0), []

    def closure(*part: int) -> Tensor:
        loss = ordinary(*part)
        calls.append(part)
        if len(calls) == call:
            raise Lost
        return loss

    return closure


@every
def test_a_context_brings_the_mean_back_bit_by_bit_also_from_exceptions(algorithm):
    """And the run goes on as if there had been none."""
    troubled, smooth = Network(torch.float32), Network(torch.float32)
    one, other = algorithm(troubled.parameters()), algorithm(smooth.parameters())
    train(troubled, one, 3)
    before = train(smooth, other, 3)[-1]
    (group,) = one.param_groups
    shows = one.rule(group).expectation.spreads and group["ess"] < 1e9

    def draw(train: bool, error: bool) -> None:
        with contextlib.suppress(Lost), one.sampled_params(train=train):
            assert torch.equal(flat(troubled.parameters()), before) != shows
            if train:
                troubled.loss(0).backward()
            if error:
                raise Lost

    draw(train=False, error=False)
    assert torch.equal(flat(troubled.parameters()), before)
    draw(train=False, error=True)
    assert torch.equal(flat(troubled.parameters()), before)
    if algorithm.closure != "twice":
        draw(train=True, error=True)
        assert torch.equal(flat(troubled.parameters()), before)
    for call in (1, 2) if algorithm.closure == "twice" else (1,):
        with pytest.raises(Lost):
            one.step(failing(troubled, one, call))
        assert torch.equal(flat(troubled.parameters()), before)
    assert torch.equal(train(troubled, one, [3, 4]), train(smooth, other, [3, 4]))
