"""The contract of a family, as a class to inherit: a new family writes `make(seed)` and has these tests.

A family whose parts are not plain tensors also says how they read as dense matrices (`dense`), and what part of a
matrix it keeps (`keep`). Everything is compared in float64 with matrices, with torch.distributions and with autograd.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import bayesrule as br

SEEDS = range(3)
NOISE = br.CounterNoise(seed=8128)


def normal(seed: int, *shape: int) -> Tensor:
    """Unit normals in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(seed: int, size: int) -> Tensor:
    matrix = normal(seed, size, size)
    return (matrix + matrix.T) / 2


def positive(seed: int, size: int) -> Tensor:
    """A positive definite matrix with eigenvalues that are not small."""
    factor = normal(seed, size, size)
    return factor @ factor.T / size + 0.5 * torch.eye(size, dtype=torch.float64)


def flat(point: Any) -> Tensor:
    """All numbers of a tensor or a Vector (of Vectors ...), one behind the other."""
    return torch.cat([flat(part) for part in point]) if isinstance(point, br.Vector) else point.reshape(-1)


def shaped(values: Tensor, like: Any) -> Any:
    """The reverse of `flat`."""
    if not isinstance(like, br.Vector):
        return values.view(like.shape)
    pieces = values.split([flat(part).numel() for part in like])
    return br.Vector([shaped(piece, part) for piece, part in zip(pieces, like, strict=True)])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class GaussianContract(ABC):
    """What holds for every Gaussian family."""

    moves_precision = True

    @abstractmethod
    def make(self, seed: int) -> br.Gaussian:
        """A member with random numbers in float64; members of all seeds have the same shapes."""

    def dense(self, q: br.Gaussian, part: Any) -> Tensor:
        """A metric, or anything in its structure, as a matrix of shape (D, D)."""
        if isinstance(part, Tensor) and part.shape == (self.size(q), self.size(q)):
            return part
        return torch.diag(flat(q.mean * 0 + part))

    def keep(self, q: br.Gaussian, matrix: Tensor) -> Any:
        """The part of a symmetric matrix that the structure keeps."""
        return q.project(matrix)

    def mean_log_base_measure(self, q: br.Gaussian) -> Any:
        """E_q[log h], for a family whose base measure h is not constant."""
        return 0.0

    # Shorthands

    def size(self, q: br.Gaussian) -> int:
        return flat(q.mean).numel()

    def precision(self, q: br.Gaussian) -> Tensor:
        return self.dense(q, q.metric) * q.ess

    def torch(self, q: br.Gaussian) -> MultivariateNormal:
        return MultivariateNormal(flat(q.mean), precision_matrix=self.precision(q))

    def matrix(self, q: br.Gaussian, linear: Any) -> Tensor:
        """The matrix of a linear map of points."""
        eye = torch.eye(self.size(q), dtype=torch.float64)
        return torch.stack([flat(linear(shaped(row, q.mean))) for row in eye], dim=1)

    def look(self, q: br.Gaussian, seed: int) -> br.Look:
        """A made-up look with positive curvature."""
        size = self.size(q)
        curvature = self.keep(q, positive(seed, size)) if self.moves_precision else None
        return br.Look(None, shaped(normal(seed + 1, size), q.mean), curvature)

    def same(self, a: br.Gaussian, b: br.Gaussian, tolerance: float = 1e-10) -> None:
        """The two are one distribution."""
        close(flat(a.mean), flat(b.mean), tolerance)
        close(self.precision(a), self.precision(b), tolerance)

    def natural_slope(self, q: br.Gaussian, of: Any) -> Tensor:
        """grad_mu of a function of q: F^-1 d/dlambda by autograd, F = d mu / d lambda; the flat blocks."""
        start = flat(q.natural())

        def member(natural: Tensor) -> br.Gaussian:
            return q.from_natural(shaped(natural, q.natural()))

        fisher = torch.autograd.functional.jacobian(lambda natural: flat(member(natural).expected()), start)
        slope = torch.autograd.functional.jacobian(lambda natural: of(member(natural)), start)
        return torch.linalg.pinv(fisher, rtol=1e-10) @ slope  # symmetric blocks count entries twice: minimum norm

    # Parameters

    @pytest.mark.parametrize("seed", SEEDS)
    def test_natural_parameters_give_the_member_back(self, seed: int) -> None:
        q = self.make(seed)
        again = q.from_natural(q.natural())
        assert type(again) is type(q)
        self.same(again, q)
        other = self.make(seed + 1)
        self.same(q.from_natural(other.natural()), other)

    def test_members_add_up_if_they_have_natural_parameters(self) -> None:
        q = self.make(SEEDS[0])
        assert q.adds_to(self.make(SEEDS[1])) == q.is_exponential_family
        assert not q.adds_to(br.Signs(torch.zeros(2)))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_expected_parameter_is_the_gradient_of_the_log_partition(self, seed: int) -> None:
        q = self.make(seed)

        def log_partition(natural: Tensor) -> Tensor:
            member = q.from_natural(shaped(natural, q.natural()))
            pairing = natural @ flat(member.expected())
            return member.entropy() + pairing + self.mean_log_base_measure(member)

        slope = torch.autograd.functional.jacobian(log_partition, flat(q.natural()))
        close(slope, flat(q.expected()))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_members_are_what_moved_makes_of_another(self, seed: int) -> None:
        q, other = self.make(seed), self.make(seed + 1)
        moved = q.moved(mean=other.mean)
        close(flat(moved.mean), flat(other.mean), 0)
        close(self.precision(moved), self.precision(q), 0)

    # The distribution

    def test_samples_have_the_mean_and_the_covariance(self) -> None:
        """Within 5 standard errors of 2000 samples: a sound sampler misses one bound in two million."""
        q, draws = self.make(0), 2000
        samples = torch.stack([flat(q.sample(NOISE.at(draw=draw))) for draw in range(draws)])
        covariance = self.torch(q).covariance_matrix
        variance = covariance.diagonal()
        off = (samples.mean(dim=0) - flat(q.mean)) / (variance / draws).sqrt()
        assert off.abs().max() < 5
        spread = ((variance[:, None] * variance + covariance**2) / draws).sqrt()
        assert ((samples.T.cov() - covariance) / spread).abs().max() < 5

    def test_a_sample_is_shaped_like_the_mean(self) -> None:
        q = self.make(0)
        sample = q.sample(NOISE)
        assert type(sample) is type(q.mean)
        pairs = zip(sample, q.mean, strict=True) if isinstance(sample, br.Vector) else [(sample, q.mean)]
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_entropy_is_torchs(self, seed: int) -> None:
        q = self.make(seed)
        close(q.entropy(), self.torch(q).entropy())

    @pytest.mark.parametrize("seed", SEEDS)
    def test_log_prob_is_torchs(self, seed: int) -> None:
        q = self.make(seed)
        for theta in (q.sample(NOISE), self.make(seed + 1).mean):
            close(q.log_prob(theta), self.torch(q).log_prob(flat(theta)))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_kl_is_torchs_never_negative_and_zero_from_itself(self, seed: int) -> None:
        q, other = self.make(seed), self.make(seed + 1)
        close(q.kl(other), kl_divergence(self.torch(q), self.torch(other)))
        assert q.kl(other) > 0
        assert q.kl(q).abs() < 1e-12

    # Natural gradients

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradient_of_the_entropy_in_mu_is_minus_the_natural_parameter(self, seed: int) -> None:
        q = self.make(seed)
        slope = self.natural_slope(q, lambda member: member.entropy() + self.mean_log_base_measure(member))
        close(slope, -flat(q.natural()), 1e-9)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_natural_gradient_is_autograds_through_the_exact_expectation(self, seed: int) -> None:
        q = self.make(seed)
        matrix, vector = symmetric(seed, self.size(q)), normal(seed, self.size(q))

        def expectation(member: br.Gaussian) -> Tensor:
            mean, covariance = flat(member.mean), self.torch(member).covariance_matrix
            return q.ess * ((mean @ matrix @ mean + (matrix * covariance).sum()) / 2 - vector @ mean)

        gradient = shaped(matrix @ flat(q.mean) - vector, q.mean)
        curvature = self.keep(q, matrix) if self.moves_precision else None
        natural_gradient = q.natural_gradient(br.Look(None, gradient, curvature))
        close(flat(natural_gradient), self.natural_slope(q, expectation), 1e-9)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradient_of_the_kl_in_mu_is_autograds(self, seed: int) -> None:
        q, prior = self.make(seed), self.make(seed + 1)
        close(flat(q.kl_gradient(prior)), self.natural_slope(q, lambda member: member.kl(prior)), 1e-9)

    # The metric

    @pytest.mark.parametrize("seed", SEEDS)
    def test_stretch_multiplies_by_the_metric_and_precondition_undoes_it(self, seed: int) -> None:
        q = self.make(seed)
        metric = self.dense(q, q.metric)
        close(self.matrix(q, q.stretch), metric)
        close(self.matrix(q, q.precondition), metric.inverse())
        v = shaped(normal(seed, self.size(q)), q.mean)
        close(flat(q.precondition(q.stretch(v))), flat(v))
        close(flat(q.stretch(q.precondition(v))), flat(v))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_solve_and_root_solve_belong_to_the_precision(self, seed: int) -> None:
        q = self.make(seed)
        covariance = self.precision(q).inverse()
        close(self.dense(q, q.precision), self.precision(q))
        close(self.matrix(q, q.solve), covariance)
        root = self.matrix(q, q.root_solve)
        close(root @ root.T, covariance)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_sandwich_is_the_matrix_product(self, seed: int) -> None:
        q = self.make(seed)
        d = self.keep(q, symmetric(seed, self.size(q)))
        dense = self.dense(q, d)
        close(self.dense(q, q.sandwich(d)), dense @ self.dense(q, q.metric).inverse() @ dense)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_outer_is_what_the_structure_keeps_of_the_product(self, seed: int) -> None:
        q = self.make(seed)
        a, b = normal(seed, self.size(q)), normal(seed + 1, self.size(q))
        product = torch.outer(a, b)
        kept = self.keep(q, (product + product.T) / 2)
        close(self.dense(q, q.outer(shaped(a, q.mean), shaped(b, q.mean))), self.dense(q, kept))

    # Under a prior

    @pytest.mark.parametrize("seed", SEEDS)
    def test_under_a_prior_it_is_the_same_distribution(self, seed: int) -> None:
        q, prior = self.make(seed), self.make(seed + 1)
        under = q.under(prior)
        self.same(under, q)
        assert under.ess == q.ess
        if self.moves_precision:
            close(self.dense(q, under.weight_decay) * q.ess, self.precision(prior))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
    def test_additive_is_natural_where_the_rates_agree(self, seed: int, rate: float) -> None:
        prior = self.make(seed + 1)
        q = self.make(seed).under(prior)
        look, rates = self.look(q, seed), br.Rates(rate, rate)
        to_the_letter = br.Natural().along(*br.Natural().direction(q, prior, look, rates), rates)
        additive = br.Additive().along(*br.Additive().direction(q, prior, look, rates), rates)
        self.same(additive, to_the_letter, 1e-12)

    @pytest.mark.parametrize("retraction", [br.Natural(), br.Additive(), br.Riemannian()], ids=lambda r: type(r).__name__)
    def test_a_prior_counts_by_its_precision_whatever_its_ess(self, retraction: br.Retraction) -> None:
        """Yesterday's posterior may have had more data."""
        q, prior = self.make(0), self.make(1)
        again = replace(prior, hess=prior.metric / 4, weight_decay=prior.metric * 0, ess=4 * prior.ess)
        self.same(again, prior)
        rule = br.BayesRule(br.Delta(), br.Zero(), retraction)
        moved = [rule.move(q.under(p), p, self.look(q, 0), br.Rates(0.3, 0.3))[0] for p in (prior, again)]
        self.same(*moved)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_riemannian_is_additive_to_first_order(self, seed: int) -> None:
        prior = self.make(seed + 1)
        q = self.make(seed).under(prior)
        look = self.look(q, seed)

        def apart(rate: float) -> Tensor:
            rates = br.Rates(rate, rate)
            ends = [r.along(*r.direction(q, prior, look, rates), rates) for r in (br.Riemannian(), br.Additive())]
            return (flat(ends[0].natural()) - flat(ends[1].natural())).norm()

        if self.moves_precision:
            ratio = apart(1e-3) / apart(5e-4)
            assert 3.9 < ratio < 4.1  # the difference is of second order in the rate
        else:
            assert apart(1e-3) == 0

    @given(seed=st.integers(0, 10**6), scale=st.floats(0, 100), rho=st.floats(0.001, 2))
    @settings(
        max_examples=30,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    def test_riemannian_never_takes_more_than_half_of_the_metric(self, seed: int, scale: float, rho: float) -> None:
        q = self.make(seed % 5)
        if not self.moves_precision:
            return
        curvature = self.keep(q, symmetric(seed, self.size(q))) * scale
        new = br.Riemannian().precision(q, curvature, rho)
        left = self.dense(q, new.metric) - self.dense(q, q.metric) / 2
        assert torch.linalg.eigvalsh(left).min() > -1e-10 * (1 + scale) ** 2
