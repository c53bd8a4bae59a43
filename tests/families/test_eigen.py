"""The rotated diagonal against dense Gaussians, and where its basis has a factor for each axis."""

import pytest
import torch
from tests.contracts import NOISE, GaussianContract, close, flat, normal, positive, shaped, symmetric
from torch.distributions import kl_divergence

import bayesrule as br
from bayesrule.bases import Bases, Basis


def orthogonal(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(seed, size, size))[0]


def deviation(seed: int, *shape: int) -> torch.Tensor:
    return normal(seed, *shape).abs() + 0.5


VECTOR = Basis((4,), [orthogonal(50, 4)])
MATRIX = Basis((3, 2), [orthogonal(51, 3), orthogonal(52, 2)])
HALF = Basis((3, 2), [None, orthogonal(53, 2)])
MERGED = Basis((4, 2), [orthogonal(54, 4), None])  # of a tensor of shape (2, 2, 2)
BOTH = Bases([MATRIX, Basis((2,), [None])])


class EigenContract(GaussianContract):
    def turns(self, q):
        """Q as a matrix."""
        return self.matrix(q, q.basis.back)

    def dense(self, q, part):
        if isinstance(part, torch.Tensor) and part.shape == (self.size(q), self.size(q)):
            return part
        turns = self.turns(q)
        return (turns * flat(q.mean * 0 + part)) @ turns.T

    def keep(self, q, matrix):
        turns = self.turns(q)
        return shaped((turns.T @ matrix @ turns).diagonal(), q.mean)


class TestOfAVector(EigenContract):
    def make(self, seed):
        return br.Eigen(normal(seed, 4), VECTOR, deviation(seed + 10, 4), weight_decay=0.25, ess=7.0)


class TestOfAMatrix(EigenContract):
    def make(self, seed):
        return br.Eigen(normal(seed, 3, 2), MATRIX, deviation(seed + 10, 3, 2), weight_decay=0.25, ess=0.4)


class TestOfOneAxis(EigenContract):
    def make(self, seed):
        return br.Eigen(normal(seed, 3, 2), HALF, deviation(seed + 10, 3, 2), deviation(seed + 20, 3, 2), ess=3.0)


class TestOfMergedAxes(EigenContract):
    def make(self, seed):
        return br.Eigen(normal(seed, 2, 2, 2), MERGED, deviation(seed + 10, 2, 2, 2), weight_decay=0.1)


class TestOfTwoTensors(EigenContract):
    def make(self, seed):
        mean = br.Vector([normal(seed, 3, 2), normal(seed + 10, 2)])
        hess = br.Vector([deviation(seed + 20, 3, 2), deviation(seed + 30, 2)])
        return br.Eigen(mean, BOTH, hess, weight_decay=0.25, ess=7.0)


def test_members_of_other_bases_do_not_add_up():
    one, again, other = (br.Eigen(normal(0, 4), Basis((4,), [orthogonal(seed, 4)])) for seed in (50, 50, 51))
    assert one.adds_to(again) and not one.adds_to(other)


KINDS = [TestOfAVector, TestOfAMatrix, TestOfOneAxis, TestOfMergedAxes]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_structures_keep_what_lies_on_the_diagonal_of_the_basis(kind):
    contract, q = kind(), kind().make(0)
    matrix = symmetric(3, contract.size(q))
    close(q.project(matrix), contract.keep(q, matrix))
    diagonal = normal(4, *q.mean.shape)
    close(q.keep_diagonal(diagonal), contract.keep(q, torch.diag(flat(diagonal))))
    X, weights = normal(5, 6, contract.size(q)), deviation(6, 6)
    close(q.project_weighted(X, weights), contract.keep(q, X.T @ torch.diag(weights) @ X))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_variances_are_those_of_the_dense_gaussian(kind):
    contract, q = kind(), kind().make(0)
    covariance = contract.precision(q).inverse()
    close(flat(q.variance), covariance.diagonal())
    close(flat(q.precision_diagonal), contract.precision(q).diagonal())
    X = normal(5, 6, contract.size(q))
    close(q.spread(X), ((X @ covariance) * X).sum(1))
    close(q.to_torch().covariance_matrix, covariance)


@pytest.mark.parametrize("other", [MATRIX, HALF, Basis((3, 2), [orthogonal(60, 3), None]), Basis((3, 2), [None, None])])
def test_kl_between_different_bases_is_that_of_the_dense_gaussians(other):
    contract, q = TestOfAMatrix(), TestOfAMatrix().make(0)
    p = br.Eigen(normal(7, 3, 2), other, deviation(8, 3, 2))
    close(q.kl(p), kl_divergence(contract.torch(q), contract.torch(p)))


def test_a_basis_of_all_eigenvectors_makes_it_any_gaussian():
    """Newton's step on a quadratic from anywhere is exact, as over a Full."""
    A, b = positive(0, 4), normal(1, 4)
    _, vectors = torch.linalg.eigh(A)
    rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
    start = br.Eigen(normal(2, 4), Basis((4,), [vectors]))
    flat_prior = br.Isotropic(torch.zeros(4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    q = rule.step(start, br.Eigen(flat_prior.mean, start.basis, 0.5), br.Quadratic(A, b))
    exact = A + 0.5 * torch.eye(4, dtype=torch.float64)
    close(q.mean, torch.linalg.solve(exact, b))
    close(q.to_torch().precision_matrix, exact)


def test_a_kronecker_quadratic_is_solved_in_the_basis_of_its_factors():
    left, right = positive(0, 3), positive(1, 2)
    A, b = torch.kron(left, right), normal(2, 6)  # rows of W one after the other
    basis = Basis((3, 2), [torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]])
    matrix = A.reshape(3, 2, 3, 2)

    def loss(W):
        return (W * torch.einsum("ijkl,kl->ij", matrix, W)).sum() / 2 - (b.view(3, 2) * W).sum()

    q = br.Eigen(normal(3, 3, 2), basis, 1.0)
    q = q.moved(hess=q.project(A))
    gradient = torch.func.grad(loss)(q.mean)
    close(flat(q.mean - q.precondition(gradient)), torch.linalg.solve(A, b))
    close(q.to_torch().precision_matrix, A)


def test_a_prior_that_is_neither_isotropic_nor_of_the_same_basis_is_refused():
    q = TestOfAMatrix().make(0)
    for prior in (br.Diagonal(q.mean, deviation(0, 3, 2)), br.Eigen(q.mean, HALF, deviation(0, 3, 2))):
        with pytest.raises(TypeError, match=r"isotropic or has the same basis, got a (Diagonal|Eigen)"):
            q.under(prior)
    same = q.under(br.Isotropic(q.mean, torch.tensor(2.0, dtype=torch.float64)))
    close(same.precision, q.precision)


def test_draws_of_a_matrix_have_the_covariance_of_both_bases():
    q = TestOfAMatrix().make(0)
    root = TestOfAMatrix().matrix(q, q.root_solve)
    close(root @ root.T, TestOfAMatrix().precision(q).inverse())
    assert q.sample(NOISE).shape == (3, 2)
