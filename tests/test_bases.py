"""Bases of axes: turning loses nothing, iterations find eigenvectors, whitening has the size that it says."""

import pytest
import torch
from tests.contracts import close, normal, positive

from bayesrule.bases import Bases, Basis, eigenvectors, followed, merged, plain, whitened


def orthogonal(seed, size):
    return torch.linalg.qr(normal(seed, size, size)).Q


LEFT, RIGHT, LAST = orthogonal(1, 3), orthogonal(2, 4), orthogonal(3, 2)


@pytest.mark.parametrize(
    ("shape", "basis"),
    [
        ((3, 4), Basis((3, 4), [LEFT, RIGHT])),
        ((3, 4), Basis((3, 4), [LEFT, None])),
        ((3, 4, 2), Basis((3, 4, 2), [None, RIGHT, LAST])),
        ((3, 2, 2, 2), Basis((3, 4, 2), [LEFT, RIGHT, LAST])),
        ((3,), Basis((3,), [LEFT])),
        ((), Basis((), [])),
    ],
    ids=["both", "one", "three axes", "merged", "vector", "number"],
)
def test_back_undoes_turn_and_neither_changes_a_length(shape, basis):
    x = normal(0, *shape)
    there = basis.turn(x)
    assert there.shape == x.shape
    close(basis.back(there), x, 1e-14)
    close(there.norm(), x.norm(), 1e-14)
    assert torch.equal(there, x) == all(q is None for q in basis.axes)


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (Basis((3, 4), [LEFT.clone(), None]), True),
        (Basis((3, 4), [None, None]), False),
        (Basis((3, 4), [LEFT, RIGHT]), False),
        (Basis((3, 2, 2), [LEFT, None, None]), False),
        (Basis((3, 4), [-LEFT, None]), False),
    ],
)
def test_bases_are_equal_if_they_turn_alike(other, equal):
    one = Basis((3, 4), [LEFT, None])
    assert one.equals(other) == equal
    assert Bases([one, one]).equals(Bases([one, other])) == equal
    assert not Bases([one, other]).equals(Bases([one]))


def test_a_matrix_is_turned_from_both_sides():
    x = normal(0, 3, 4)
    close(Basis((3, 4), [LEFT, RIGHT]).turn(x), LEFT.T @ x @ RIGHT, 1e-14)
    close(Basis((3, 4), [LEFT, None]).back(x), LEFT @ x, 1e-14)


def test_moments_are_of_the_slices_of_each_axis():
    x = normal(0, 3, 4, 2)
    left, none, last = Basis((3, 4, 2), [LEFT, None, LAST]).moments(x)
    close(left, torch.einsum("iab,jab->ij", x, x), 1e-13)
    close(last, torch.einsum("abi,abj->ij", x, x), 1e-13)
    assert none is None


def test_axes_are_merged_as_long_as_none_is_too_long():
    assert merged(torch.Size((2, 3, 2, 2)), 6) == (6, 4)
    assert merged(torch.Size((2, 3, 2, 2)), 1) == (2, 3, 2, 2)
    assert plain(torch.Size((2, 3, 2)), 4, merge=False, vectors=False) == ((2, 3, 2), [True] * 3)
    assert plain(torch.Size((2, 9)), 4, merge=True, vectors=False) == ((2, 9), [True, False])
    assert plain(torch.Size((3,)), 4, merge=False, vectors=False) == ((3,), [False])
    assert plain(torch.Size((3,)), 4, merge=False, vectors=True) == ((3,), [True])


def test_iterations_stay_orthonormal_and_find_the_eigenvectors():
    """The largest eigenvalue first."""
    moments = positive(4, 5)
    q = orthogonal(5, 5)
    for _ in range(400):
        q = followed(moments, q)
        close(q.T @ q, torch.eye(5, dtype=q.dtype), 1e-12)
    exact = eigenvectors(moments)
    values = (exact.T @ moments @ exact).diagonal()
    assert (values.diff() < 0).all()
    close((q.T @ exact).abs(), torch.eye(5, dtype=q.dtype), 1e-8)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 6, 4)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_whitening_brings_singular_values_near_to_one(shape, size):
    """Whatever they were, and leaves the directions."""
    u, _, vh = torch.linalg.svd(normal(6, shape[0], 384 // shape[0]), full_matrices=False)
    x = (u * torch.logspace(0, -1.5, 16, dtype=torch.float64)) @ vh
    out = whitened(size * x.reshape(shape))
    assert out.shape == shape and out.dtype == x.dtype
    within = u.T @ out.reshape(x.shape) @ vh.T
    assert within.diag().min() > 0.5 and within.diag().max() < 1.5
    assert (within - within.diag().diag()).abs().max() < 0.1


def test_of_a_vector_it_leaves_the_direction():
    x = normal(7, 9)
    close(whitened(5 * x), x / x.norm(), 1e-14)
    assert torch.equal(whitened(torch.zeros(3)), torch.zeros(3))
