import math

import pytest
import torch
from tests.contracts import GaussianContract, close, normal, positive, shaped, symmetric

import bayesrule as br


def deviation(seed: int, *shape: int) -> torch.Tensor:
    """Numbers between a half and some three."""
    return normal(seed, *shape).abs() + 0.5


class TestFixed(GaussianContract):
    moves_precision = False

    def make(self, seed):
        return br.Fixed(normal(seed, 4))

    def mean_log_base_measure(self, q):
        return -(q.natural() * q.mean).sum() / 2


class TestFixedWithAMetric(TestFixed):
    """Members of an exponential family share what is fixed; a prior may differ in it."""

    def make(self, seed):
        return br.Fixed(normal(seed, 2, 3), deviation(99, 2, 3), ess=7.0)

    def keep(self, q, matrix):
        return shaped(matrix.diagonal(), q.mean)


class TestIsotropic(GaussianContract):
    def make(self, seed):
        return br.Isotropic(normal(seed, 4), deviation(seed + 10, 1)[0], weight_decay=0.25, ess=7.0)


class TestIsotropicOnAVector(GaussianContract):
    def make(self, seed):
        mean = br.Vector([normal(seed, 2, 1), normal(seed + 10, 3)])
        return br.Isotropic(mean, deviation(seed + 20, 1)[0], weight_decay=torch.tensor(0.5, dtype=torch.float64), ess=3.0)


class TestDiagonal(GaussianContract):
    def make(self, seed):
        return br.Diagonal(normal(seed, 5), deviation(seed + 10, 5), weight_decay=0.25, ess=7.0)


class TestDiagonalWithAPriorPerElement(GaussianContract):
    def make(self, seed):
        return br.Diagonal(normal(seed, 5), deviation(seed + 10, 5), deviation(seed + 20, 5), ess=0.4)


class TestDiagonalOnAMatrix(GaussianContract):
    def make(self, seed):
        return br.Diagonal(normal(seed, 2, 3), deviation(seed + 10, 2, 3), weight_decay=0.1, ess=7.0)

    def keep(self, q, matrix):
        return shaped(matrix.diagonal(), q.mean)


class TestDiagonalOnAVector(TestDiagonalOnAMatrix):
    def make(self, seed):
        mean = br.Vector([normal(seed, 2, 2), normal(seed + 10, 1), normal(seed + 20)])
        hess = br.Vector([deviation(seed + 30, 2, 2), deviation(seed + 40, 1), deviation(seed + 50)])
        return br.Diagonal(mean, hess, weight_decay=0.25, ess=7.0)


class TestFull(GaussianContract):
    def make(self, seed):
        return br.Full(normal(seed, 3), positive(seed + 10, 3), weight_decay=0.25, ess=7.0)


class TestFullWithAPriorMatrix(GaussianContract):
    def make(self, seed):
        return br.Full(normal(seed, 4), positive(seed + 10, 4), positive(seed + 20, 4), ess=0.4)


# What single families say and refuse


@pytest.mark.parametrize("family", [br.Fixed, br.Isotropic, br.Diagonal, br.Full], ids=lambda f: f.__name__)
def test_without_more_than_a_mean_it_is_the_unit_gaussian(family):
    q = family(normal(0, 3))
    close(q.entropy(), torch.tensor(1.5 * math.log(2 * math.pi * math.e), dtype=torch.float64))
    close(q.log_prob(q.mean), torch.tensor(-1.5 * math.log(2 * math.pi), dtype=torch.float64))


def test_numbers_for_full_stand_for_multiples_of_the_identity():
    eye = torch.eye(3, dtype=torch.float64)
    q = br.Full(normal(0, 3), 2.0, weight_decay=torch.tensor(0.5, dtype=torch.float64), ess=4.0)
    close(q.hess, 2 * eye, 0)
    close(q.weight_decay, eye / 2, 0)
    close(q.precision, 10 * eye, 0)


def test_full_gives_its_covariance():
    q = TestFull().make(0)
    close(q.covariance, q.precision.inverse())


@pytest.mark.parametrize(
    "use",
    [
        lambda q: q.entropy(),
        lambda q: q.solve(q.mean),
        lambda q: q.sample(br.CounterNoise()),
        lambda q: q.covariance,
        lambda q: q.sandwich(q.hess),
        lambda q: q.expected(),
    ],
)
def test_an_indefinite_full_says_so_with_its_least_eigenvalue_and_what_to_do(use):
    q = br.Full(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), ess=3.0)  # eigenvalues 3 and -1, times 3
    with pytest.raises(ValueError, match=r"not positive definite \(least eigenvalue -3\).*Riemannian.*GaussNewton"):
        use(q)


def test_an_indefinite_full_may_stand_as_long_as_nobody_uses_it():
    """A flat prior is one."""
    flat_prior = br.Full(torch.zeros(2), 0.0)
    close(flat_prior.natural()[1], torch.zeros(2, 2), 0)


def test_the_precision_of_a_fixed_gaussian_does_not_move():
    with pytest.raises(TypeError, match=r"Fixed.*does not move.*Zero"):
        br.Fixed(torch.zeros(2)).moved(hess=2.0)
    with pytest.raises(TypeError, match=r"Fixed.*does not move"):
        br.BayesRule(br.Delta(), br.Hessian(), br.Additive()).step(
            br.Fixed(torch.zeros(2)), br.Fixed(torch.zeros(2)), br.Quadratic(torch.eye(2), torch.ones(2))
        )


@pytest.mark.parametrize("family", [br.Isotropic, br.Diagonal, br.Full], ids=lambda f: f.__name__)
def test_the_natural_gradient_without_a_curvature_is_refused_by_name(family):
    with pytest.raises(TypeError, match=f"{family.__name__} needs a curvature"):
        family(torch.zeros(2)).natural_gradient(br.Look(None, torch.zeros(2), None))


def test_fixed_ignores_its_weight_decay():
    mean = normal(0, 3)
    close(br.Fixed(mean, 2.0, weight_decay=5.0).metric * mean, 2 * mean, 0)


def test_structures_keep_of_a_matrix_the_mean_diagonal_the_diagonal_and_all():
    matrix = symmetric(0, 3)
    close(br.Isotropic(normal(0, 3)).project(matrix), matrix.trace() / 3)
    close(br.Diagonal(normal(0, 3)).project(matrix), matrix.diagonal(), 0)
    close(br.Full(normal(0, 3)).project(matrix), matrix, 0)


def test_a_diagonal_may_stand_under_an_isotropic_prior():
    prior = br.Isotropic(normal(1, 4), torch.tensor(2.0, dtype=torch.float64))
    same = br.Diagonal(prior.mean, torch.full((4,), 2.0, dtype=torch.float64))
    q = br.Diagonal(normal(0, 4), deviation(2, 4), ess=3.0)
    look, rates = br.Look(None, normal(3, 4), deviation(4, 4)), br.Rates(0.2, 0.2)
    rule = br.BayesRule(br.Delta(), br.Zero(), br.Natural())
    one, other = (rule.move(q.under(p), p, look, rates)[0] for p in (prior, same))
    close(one.mean, other.mean)
    close(one.precision, other.precision)


@pytest.mark.parametrize("retraction", [br.Natural(), br.Additive(), br.Riemannian()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("family", [br.Diagonal, br.Full], ids=lambda f: f.__name__)
def test_a_number_does_for_a_metric(family, retraction):
    ones = torch.ones(3, dtype=torch.float64)
    whole = ones if family is br.Diagonal else ones.diag()
    prior, look = family(normal(1, 3), whole / 4, ess=5.0), br.Look(None, normal(2, 3), 2 * whole)
    rule = br.BayesRule(br.Delta(), br.Zero(), retraction)
    number = family(normal(0, 3), 1.5, weight_decay=0.25, ess=5.0)
    tensor = family(normal(0, 3), 1.5 * whole, weight_decay=whole / 4, ess=5.0)
    one, other = (rule.move(q, prior, look, br.Rates(0.2, 0.2))[0] for q in (number, tensor))
    close(one.mean, other.mean)
    close(one.precision, other.precision)


def test_a_centered_prior_may_have_the_number_zero_for_its_mean():
    q, decay = TestDiagonal().make(0), torch.tensor(0.25, dtype=torch.float64)
    close(q.prior_gradient(br.Isotropic(0.0, decay, ess=q.ess)), q.mean / 4)


def test_a_prior_centered_on_q_does_not_pull():
    q = TestDiagonal().make(0)
    assert q.prior_gradient(br.Diagonal(q.mean, 3.0)) == 0


def test_members_are_frozen():
    with pytest.raises(AttributeError):
        br.Diagonal(torch.zeros(2)).mean = torch.ones(2)


@pytest.mark.parametrize("family", [br.Fixed, br.Isotropic, br.Diagonal, br.Full], ids=lambda f: f.__name__)
def test_float32_stays_float32(family):
    q = family(torch.ones(3), torch.tensor(2.0), ess=3.0)
    for number in (q.sample(br.CounterNoise()), q.entropy(), q.log_prob(q.mean), q.kl(q), q.solve(q.mean)):
        assert number.dtype == torch.float32
