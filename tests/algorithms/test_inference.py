"""The loop: what it takes back, what it reports, when it stops."""

import itertools

import pytest
import torch
from tests.contracts import close, normal, positive

import bayesrule as br

NEWTON = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
GRID = br.BayesRule(br.GaussHermite(30), br.Hessian(), br.Natural())


def double_well(theta):
    return (theta**2 - 4).square().sum() / 4 + 0.3 * theta.sum()


def test_a_quadratic_takes_one_step_and_the_next_one_confirms_it():
    prior = br.Full(normal(0, 3), positive(1, 3))
    loss = br.Quadratic(positive(2, 3), normal(3, 3))
    result = br.infer(NEWTON, br.Full(normal(4, 3), positive(5, 3)), prior, loss)
    exact = NEWTON.step(prior, prior, loss)
    assert result.converged and len(result.trace) == 2 and result.backoffs == 0
    close(result.q.mean, exact.mean)


def test_a_step_out_of_the_family_is_taken_back_and_reported():
    """Between the wells the curvature is negative: a full step has no variance."""
    prior = br.Full(torch.zeros(1, dtype=torch.float64), 0.1)
    start = br.Full(torch.tensor([0.2], dtype=torch.float64), 25.0)
    with pytest.raises(br.DomainError):
        GRID.look(GRID.step(start, prior, br.Loss(double_well)), prior, br.Loss(double_well))
    result = br.infer(GRID, start, prior, br.Loss(double_well), steps=300)
    assert result.converged and result.backoffs > 0
    assert all(0 < step.rate <= 1 for step in result.trace)
    bounds = [step.bound for step in result.trace]
    assert all(b >= a - 1e-8 for a, b in itertools.pairwise(bounds))


def test_the_end_is_a_stationary_point():
    prior = br.Full(torch.zeros(1, dtype=torch.float64), 0.1)
    result = br.infer(GRID, br.Full(torch.ones(1, dtype=torch.float64), 4.0), prior, br.Loss(double_well), tolerance=1e-11)
    q = result.q
    slope = q.kl_gradient(prior) + q.natural_gradient(result.look)
    assert max(part.abs().max() for part in slope) < 1e-9
    assert result.bound == pytest.approx(float(q.bound(result.look, prior)))


def test_where_no_rate_helps_it_says_so():
    class Bottomless(br.Natural):
        def along(self, q, direction, rates):
            raise br.DomainError("nowhere")

    prior = br.Full(torch.zeros(2), 1.0)
    rule = br.BayesRule(br.Delta(), br.Hessian(), Bottomless())
    with pytest.raises(br.DomainError, match=r"no rate down to .* keeps step 1"):
        br.infer(rule, prior, prior, br.Loss(lambda x: x.square().sum()))


def test_draws_are_fresh_in_every_step_and_repeat_with_the_seed():
    prior = br.Full(torch.zeros(2, dtype=torch.float64), 1.0)
    rule = br.BayesRule(br.MonteCarlo(4), br.Hessian(), br.Natural())
    loss = br.Loss(lambda x: x.exp().sum())

    def run(seed):
        return br.infer(rule, prior, prior, loss, rate=0.2, steps=20, seed=seed)

    a, b, c = run(0), run(0), run(1)
    assert torch.equal(a.q.mean, b.q.mean) and not torch.equal(a.q.mean, c.q.mean)
    assert {step.backoffs for step in a.trace} == {0} and {step.rate for step in a.trace} == {0.2}


def test_oscillation_ends():
    """Steps that overshoot by nearly their own length: at rate 1 the distance falls by 1 percent a step."""

    class Overshooting(br.Natural):
        def direction(self, q, prior, look, rates):
            q, direction = super().direction(q, prior, look, rates)
            return q, direction * 1.99

    rule = br.BayesRule(br.Delta(), br.Hessian(), Overshooting())
    prior = br.Full(torch.zeros(2, dtype=torch.float64), 1.0)
    loss = br.Quadratic(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    result = br.infer(rule, prior, prior, loss)
    assert result.converged and len(result.trace) < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_rounding_is_the_least_tolerance(dtype):
    prior = br.Full(torch.zeros(1, dtype=dtype), 1.0)
    result = br.infer(GRID, prior, prior, br.Loss(lambda x: x.exp().sum() + x.square().sum()), tolerance=0.0)
    assert result.converged


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(rate=0.0), r"rate must be a number in \(0, 1\], got 0"), (dict(steps=0), "steps must be at least 1, got 0")],
    ids=["rate", "steps"],
)
def test_bad_options(options, words):
    prior = br.Full(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match=words):
        br.infer(NEWTON, prior, prior, br.Loss(lambda x: x.sum()), **options)
