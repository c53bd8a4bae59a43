"""A Gaussian whose covariance is a diagonal and a few directions, and what it is not."""

import pytest
import torch
from tests.contracts import SEEDS, close, normal
from torch.distributions import kl_divergence

import bayesrule as br

SIZE = 5


def member(seed, rank=2, ess=3.0):
    spread = br.DiagonalPlusFactor(normal(seed + 10, SIZE).abs() + 0.3, normal(seed + 20, SIZE, rank))
    return br.Deviations(normal(seed, SIZE), spread, ess)


@pytest.mark.parametrize("rank", [0, 2, SIZE + 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_torchs(seed, rank):
    q, p = member(seed, rank), member(seed + 1, 3, ess=0.5)
    mine, theirs = q.to_torch(), p.to_torch()
    close(q.variance, mine.covariance_matrix.diagonal(), 1e-10)
    close(q.precision_diagonal, mine.precision_matrix.diagonal(), 1e-8)
    close(q.log_det(), torch.linalg.slogdet(mine.precision_matrix)[1], 1e-8)
    close(q.entropy(), mine.entropy(), 1e-8)
    theta = normal(seed + 5, SIZE)
    close(q.log_prob(theta), mine.log_prob(theta), 1e-8)
    close(q.kl(p), kl_divergence(mine, theirs), 1e-8)
    close(q.power(2.0).variance, q.variance / 2, 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_solving_and_stretching_undo_each_other_and_a_root_is_one(seed):
    q, v = member(seed), normal(seed + 6, SIZE)
    close(q.stretch(q.solve(v)) * q.ess, v, 1e-9)
    close(q.solve(v), q.to_torch().covariance_matrix @ v, 1e-10)
    root = torch.stack([q.root_solve(e) for e in torch.eye(SIZE, dtype=v.dtype)], 1)
    close(root @ root.T, q.to_torch().covariance_matrix, 1e-9)


def test_the_mean_moves_and_nothing_else():
    q = member(0)
    assert q.moved(mean=q.mean + 1).mean.tolist() == (q.mean + 1).tolist()
    assert q.moved() is q
    look = br.Look(None, q.mean, q.mean)
    asked = (
        lambda: q.moved(hess=1.0),
        q.natural,
        q.expected,
        lambda: q.from_natural(q.mean),
        lambda: q.natural_gradient(look),
        lambda: q.sandwich(q.mean),
        lambda: q.outer(q.mean, q.mean),
        lambda: q.project(torch.eye(SIZE)),
    )
    for call in asked:
        with pytest.raises(TypeError, match="statistics of a trajectory, which nothing steps in; take LowRank"):
            call()
    with pytest.raises(TypeError, match="the precision of Deviations has no short form"):
        q.metric  # noqa: B018
    with pytest.raises(TypeError, match="no KL is offered of Deviations from a Diagonal"):
        q.kl(br.Diagonal(q.mean))


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"must be of one size, shape \(P,\), got \(5,\) and \(4,\)"):
        br.Deviations(torch.zeros(5), br.DiagonalPlusFactor(torch.ones(4), torch.zeros(4, 1)))
