"""Invariants of the rule that belong to no single file: descent, positivity, and what the algorithms share."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import bayesrule as br

A = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
ZERO = torch.zeros(3, dtype=torch.float64)
NATURAL = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())


@pytest.mark.parametrize("rho", [0.05, 0.3, 1.0])
def test_the_evidence_bound_never_falls_with_exact_expectations(rho):
    """On a quadratic E_q[loss] is exact: the loss at the mean and half the trace of A S^-1."""
    prior, loss = br.Full(ZERO, 0.5), br.Quadratic(A, B)

    def negative_bound(q):
        return loss(q.mean).value() + (A * q.covariance).sum() / 2 + q.kl(prior)

    q = br.Full(torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64), 4.0)
    bounds = [negative_bound(q)]
    for _ in range(20):
        q = NATURAL.step(q, prior, loss, rho)
        bounds.append(negative_bound(q))
    assert all(after <= before + 1e-12 for before, after in pairwise(bounds))
    assert bounds[-1] < bounds[0] - 1


@pytest.mark.parametrize("retraction", [br.Natural(), br.Additive()])
@pytest.mark.parametrize("rho", [0.01, 0.5, 1.0])
def test_curvatures_without_negative_part_keep_the_precision_positive_and_symmetric(retraction, rho):
    generator = torch.Generator().manual_seed(0)
    rule, prior, q = br.BayesRule(br.Delta(), br.Zero(), retraction), br.Full(ZERO, 0.1), br.Full(ZERO, 1.0)
    q = q.under(prior)
    for _ in range(50):
        v = torch.randn(3, generator=generator, dtype=torch.float64)
        q, _ = rule.move(q, prior, br.Look(None, v, torch.outer(v, v)), br.Rates(rho, rho))
        assert torch.linalg.eigvalsh(q.precision).min() > 0.09
        torch.testing.assert_close(q.precision, q.precision.T, rtol=0, atol=1e-12)


def test_gradient_descent_under_weight_noise_goes_the_same_way_on_average():
    """On a quadratic the mean over mirrored noise is exact."""
    noisy = br.BayesRule(br.MonteCarlo(2, antithetic=True), br.Zero(), br.Additive())
    q, flat, loss, m = br.Fixed(B, 4.0), br.Fixed(ZERO, 0.0), br.Quadratic(A, B), B
    for step in range(10):
        q = noisy.step(q, flat, loss, 0.1, br.CounterNoise(step=step))
        m = m - 0.1 / 4 * (A @ m - B)
    torch.testing.assert_close(q.mean, m, rtol=1e-12, atol=1e-12)


def test_gradient_descent_converges_linearly_at_rate_one_over_the_largest_curvature():
    eigenvalues, solution = torch.linalg.eigvalsh(A), torch.linalg.solve(A, B)
    shrink = 1 - eigenvalues.min() / eigenvalues.max()
    for steps in (1, 5, 40):
        m = br.gradient_descent(lambda x: x @ A @ x / 2 - B @ x, ZERO, float(1 / eigenvalues.max()), steps)
        assert (m - solution).norm() <= shrink**steps * solution.norm() * (1 + 1e-12)


def test_adam_is_a_heavy_ball_whose_scale_is_the_denominator_of_each_step():
    r"""D_{t+1} (m_{t+1} - m_t) = -a_t (1 - beta1) g + (a_t / a_{t-1}) beta1 D_t (m_t - m_{t-1}), debiasing inside a_t and D."""
    generator = torch.Generator().manual_seed(1)
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer, last = br.Adam([w], lr=0.01, eps=1e-8), None
    for t in range(1, 30):
        before, g = w.detach().clone(), torch.randn(4, generator=generator, dtype=torch.float64)
        w.grad = g
        optimizer.step()
        scale = optimizer.state[w]["exp_avg_sq"].div(1 - 0.999**t).sqrt() + 1e-8
        rate, force = 0.01 / (1 - 0.9**t), scale * (w.detach() - before)
        if last is not None:
            torch.testing.assert_close(force / rate, -0.1 * g + 0.9 * last, rtol=1e-9, atol=1e-10)
        last = force / rate
