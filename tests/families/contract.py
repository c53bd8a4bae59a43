"""The contract of an exponential family, as a class to inherit: a new family writes `members` and has these tests.

Everything is compared in double precision with autograd through other routes, unless a dtype is a parameter of the test.
Tolerances are relative; where a map is badly conditioned, its condition is part of the comparison.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from tests.families.members import (
    NOISE,
    Drawn,
    blocks,
    cast,
    close,
    entries,
    picked,
    rebuilt,
    size_of,
    split,
    tensors,
    to_numbers,
    to_point,
)
from torch import Tensor
from torch.distributions import kl_divergence

import bayesrule as br

Data = st.DataObject
WIDE = torch.float64


def often(count: int) -> Callable[[Any], Any]:
    """A property is looked at this often, always in the same places."""
    quiet = [HealthCheck.differing_executors, HealthCheck.too_slow]
    once = {"derandomize": True, "database": None, "phases": [Phase.generate]}  # a failure is told as it was found
    told = settings(max_examples=count, deadline=None, suppress_health_check=quiet, **once)
    return lambda test: told(given(data=st.data())(test))


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype).split(".")[1])


class FamilyContract(ABC):
    """What holds for every exponential family."""

    dims: tuple[int, ...] = (0,)
    """Dimensions of one problem's blocks; 2 is a symmetric matrix."""
    batches: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))
    count = 20000
    torch_entropy = torch_kl = torch_log_prob = True
    """Whether torch.distributions has a right one."""

    @abstractmethod
    def members(self, drawn: Drawn, batch: tuple[int, ...]) -> Any:
        """A member over the safe range in float64; all have events of one shape."""

    @abstractmethod
    def outside(self, q: Any) -> list[Any]:
        """Natural parameters just outside the domain, shaped like those of q without a batch."""

    def named(self, q: Any) -> list[Tensor]:
        """The numbers that name a member and no other."""
        return list(tensors(q).values())

    def draws(self, q: Any, count: int, noise: br.Noise = NOISE) -> Any:
        """Statistics of draws, shape (count, *batch, *block)."""
        return q.sample_statistics(noise, (count,))

    def theta(self, q: Any) -> Any:
        """One draw of each problem."""
        return q.sample(NOISE)

    def mean_log_base_measure(self, q: Any) -> Any:
        return q.mean_log_base_measure()

    def log_base_measure(self, q: Any, theta: Any) -> Any:
        return q.log_base_measure(theta)

    def reference(self, q: Any, theta: Any) -> float | None:
        """Log density of one member from elsewhere."""
        return None

    # Shorthands

    def any(self, data: Data) -> Any:
        return self.members(Drawn.by(data), data.draw(st.sampled_from(self.batches)))

    def one(self, data: Data) -> Any:
        return self.members(Drawn.by(data), ())

    def two(self, data: Data) -> tuple[Any, Any]:
        """Of one batch shape."""
        batch = data.draw(st.sampled_from(self.batches))
        return self.members(Drawn.by(data), batch), self.members(Drawn.by(data), batch)

    def numbers(self, point: Any) -> Tensor:
        return to_numbers(point, self.dims)

    def point(self, q: Any, numbers: Tensor) -> Any:
        return to_point(numbers, q.natural(), self.dims)

    def at_natural(self, q: Any, numbers: Tensor) -> Any:
        return q.from_natural(self.point(q, numbers))

    def at_expected(self, q: Any, numbers: Tensor) -> Any:
        return q.from_expected(self.point(q, numbers))

    def fisher(self, q: Any) -> Tensor:
        """The Hessian of A by autograd, for one member."""
        return torch.func.jacrev(torch.func.grad(lambda x: self.at_natural(q, x).log_partition()))(self.numbers(q.natural()))

    def base(self, q: Any, v: Any) -> Any:
        """F^-1 v by differentiating mu -> lambda, whatever shorter way the family has."""
        return br.ExponentialFamily.fisher_solve(q, v)

    # Three ways to name a member

    def condition(self, q: Any) -> float:
        """By how much naming a member in another way enlarges rounding: the condition of a matrix that is inverted."""
        return 1.0

    @each_dtype
    @often(9)
    def test_natural_parameters_give_the_member_back(self, dtype: torch.dtype, data: Data) -> None:
        """To a few roundings of the natural parameter; a concentration of 0.01 is 1 larger there, and loses two digits."""
        q = cast(self.any(data), dtype)
        again = q.from_natural(q.natural())
        assert type(again) is type(q) and again.batch_shape == q.batch_shape
        eps = torch.finfo(dtype).eps
        close(again.natural(), q.natural(), 32 * eps * self.condition(q))
        close(br.Vector(self.named(again)), br.Vector(self.named(q)), 1000 * eps)

    @often(9)
    def test_expected_parameters_give_the_member_back(self, data: Data) -> None:
        q = self.any(data)
        again = q.from_expected(q.expected())
        close(again.expected(), q.expected(), 1e-12)
        close(br.Vector(self.named(again)), br.Vector(self.named(q)), 1e-10)

    @often(6)
    def test_expected_parameters_in_single_precision_are_met(self, data: Data) -> None:
        q = cast(self.any(data), torch.float32)
        again = q.from_expected(q.expected())
        for mine, there in zip(blocks(again.expected()), blocks(q.expected()), strict=True):
            close(mine, there, 1e-4)

    @often(9)
    def test_expected_is_the_gradient_of_the_log_partition(self, data: Data) -> None:
        q = self.any(data)
        slope = torch.func.grad(lambda x: self.at_natural(q, x).log_partition().sum())(self.numbers(q.natural()))
        close(slope, self.numbers(q.expected()), 1e-11)

    # Fisher matrix

    @often(6)
    def test_multiplying_by_the_fisher_matrix_is_multiplying_by_the_hessian(self, data: Data) -> None:
        """Of the log partition by autograd, which is symmetric and positive definite. Off by 1e-9: torch's second lgamma."""
        q = self.one(data)
        fisher = self.fisher(q)
        size = fisher.abs().max().item()
        close(fisher, fisher.mT, 1e-12, size)
        assert torch.linalg.eigvalsh(fisher).min() > 0
        units = torch.eye(len(fisher), dtype=WIDE)
        products = [self.numbers(q.fisher_mul(self.point(q, unit))) for unit in units]
        close(torch.stack(products, dim=-1), fisher, 2e-9, size)

    @often(6)
    def test_fisher_is_the_hessian(self, data: Data) -> None:
        self.check_fisher(self.one(data))

    def check_fisher(self, q: Any) -> None:
        """In coordinates in which the inner product of matrices is that of vectors."""
        if hasattr(q, "fisher"):
            fisher = self.fisher(q)
            close(q.fisher(), fisher, 2e-9, fisher.abs().max().item())

    @often(6)
    def test_multiplying_by_the_fisher_matrix_and_solving_undo_each_other(self, data: Data) -> None:
        """And solving by the matrix is differentiating mu -> lambda; a solution is as good as the condition lets it be."""
        q = self.any(data)
        v = self.point(q, Drawn.by(data).reals(self.numbers(q.natural()).shape))
        fishers = [self.fisher(one) for one in entries(q)]
        condition = max(torch.linalg.cond(fisher).item() for fisher in fishers)
        solved, back = q.fisher_solve(v), q.fisher_solve(q.fisher_mul(v))
        close(solved, self.base(q, v), 1e-10 + 1e-14 * condition, size_of(solved))
        close(q.fisher_mul(solved), v, 1e-10, max(map(size_of, fishers)) * size_of(solved))
        close(back, v, 1e-10 + 1e-14 * condition, size_of(v))

    # Entropy, KL and density

    @often(9)
    def test_entropy_is_the_log_partition_less_the_pairing(self, data: Data) -> None:
        q = self.any(data)
        pairing = (self.numbers(q.natural()) * self.numbers(q.expected())).sum(-1)
        large = size_of(q.log_partition()) + size_of(pairing)
        close(q.entropy(), q.log_partition() - pairing - self.mean_log_base_measure(q), 1e-13, large)
        if self.torch_entropy:
            close(q.entropy(), q.to_torch().entropy(), 1e-10)

    @often(9)
    def test_kl_is_bregmans_never_negative_and_zero_from_itself(self, data: Data) -> None:
        q, p = self.two(data)
        gap = self.numbers(p.natural()) - self.numbers(q.natural())
        pairing = (gap * self.numbers(q.expected())).sum(-1)
        large = size_of(q.log_partition()) + size_of(p.log_partition()) + size_of(pairing)
        close(q.kl(p), p.log_partition() - q.log_partition() - pairing, 1e-13, large)
        assert (q.kl(p) > -1e-14 * large).all()
        close(q.kl(q), torch.zeros(q.batch_shape, dtype=WIDE), 1e-14, large)

    @often(10)
    def test_kl_is_torchs(self, data: Data) -> None:
        if self.torch_kl:  # without a batch: torch's Wishart is wrong with one
            q, p = self.one(data), self.one(data)
            close(q.kl(p), kl_divergence(q.to_torch(), p.to_torch()), 1e-9)

    @often(9)
    def test_log_prob_is_the_pairing_with_the_statistics(self, data: Data) -> None:
        q = self.any(data)
        theta = self.theta(q)
        pairing = (self.numbers(q.natural()) * self.numbers(q.statistics(theta))).sum(-1)
        found = q.log_prob(theta)
        close(found, pairing - q.log_partition() + self.log_base_measure(q, theta), 1e-13, size_of(pairing) + 1)
        if self.torch_log_prob:
            close(found, q.to_torch().log_prob(theta), 1e-9, size_of(pairing) + 1)

    @often(6)
    def test_log_prob_is_the_references(self, data: Data) -> None:
        q = self.one(data)
        theta = self.theta(q)
        reference = self.reference(q, theta)
        if reference is not None:
            close(q.log_prob(theta), torch.tensor(reference, dtype=WIDE), 1e-9)

    @often(5)
    def test_entropy_and_kl_are_differentiable_in_all_arguments(self, data: Data) -> None:
        """The gradients of the KL in closed form: F (lambda_q - lambda_p), and mu_p - mu_q."""
        q, p = self.one(data), self.one(data)
        x, y = self.numbers(q.natural()), self.numbers(p.natural())

        def kl(x: Tensor, y: Tensor) -> Tensor:
            return self.at_natural(q, x).kl(self.at_natural(q, y))

        slopes = torch.func.grad(kl, (0, 1))(x, y)
        gap = self.numbers(q.fisher_mul(self.point(q, x - y)))
        close(slopes[0], gap, 1e-8, 1e-4 * self.fisher(q).abs().max().item() * (size_of(x) + size_of(y)))
        close(slopes[1], self.numbers(p.expected()) - self.numbers(q.expected()), 1e-10, size_of(p.expected()) + 1)
        entropy = torch.func.grad(lambda x: self.at_natural(q, x).entropy())(x)
        for i, unit in enumerate(torch.eye(len(x), dtype=WIDE)):
            h = 1e-4 * (1e-2 + min(x[i].abs().item(), 1.0))
            values = [self.at_natural(q, x + step * h * unit).entropy() for step in (-2, -1, 1, 2)]
            slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
            close(entropy[i], slope, 1e-6, size_of(entropy) + 1e-2)

    # Draws

    @pytest.mark.parametrize("seed", range(2))
    def test_statistics_of_draws_have_the_mean_and_covariance_of_the_member(self, seed: int) -> None:
        """Within 5 standard errors."""
        q = self.members(Drawn.seeded(seed), ())
        fisher, off = self.fisher(q), self.numbers(self.draws(q, self.count)) - self.numbers(q.expected())
        assert (off.mean(0).abs() <= 5 * (fisher.diagonal() / self.count).sqrt()).all()
        products = off[:, :, None] * off[:, None, :]
        assert ((products.mean(0) - fisher).abs() <= 5 * products.std(0) / self.count**0.5).all()

    @each_dtype
    @often(3)
    def test_draws_have_their_shape_and_dtype(self, dtype: torch.dtype, data: Data) -> None:
        q = cast(self.any(data), dtype)
        for part, like in zip(blocks(self.draws(q, 2)), blocks(q.expected()), strict=True):
            assert part.shape == (2, *like.shape) and part.dtype == like.dtype == dtype

    def test_draws_are_named_by_their_noise_and_leave_torchs_generator_alone(self) -> None:
        q = self.members(Drawn.seeded(0), ())
        first = self.draws(q, 50)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            before = torch.get_rng_state()
            again, other = self.draws(q, 50), self.draws(q, 50, NOISE.at(step=1))
            assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.equal, blocks(first), blocks(again)))
        assert not torch.equal(blocks(first)[0], blocks(other)[0])

    # Natural gradients

    @often(6)
    def test_the_two_routes_to_a_natural_gradient_agree(self, data: Data) -> None:
        """grad_mu by way of mu -> member, and F^-1 grad_lambda by way of lambda -> member, of a function of the member."""
        q = self.one(data)
        weights = Drawn.by(data).reals(self.numbers(q.expected()).shape)

        def of(member: Any) -> Tensor:
            mu = self.numbers(member.expected())
            return (mu * weights).sum() ** 2 / (1 + size_of(q.expected())) + mu.sin().sum()

        in_mu = torch.func.grad(lambda mu: of(self.at_expected(q, mu)))(self.numbers(q.expected()))
        in_lambda = torch.func.grad(lambda x: of(self.at_natural(q, x)))(self.numbers(q.natural()))
        solved = self.numbers(q.fisher_solve(self.point(q, in_lambda)))
        condition = torch.linalg.cond(self.fisher(q)).item()
        close(solved, in_mu, 1e-9, size_of(in_mu) * (1 + 1e-6 * condition))
        straight = torch.func.grad(lambda mu: (mu * weights).sum() ** 2 / (1 + size_of(q.expected())) + mu.sin().sum())
        close(in_mu, straight(self.numbers(q.expected())), 1e-9, size_of(in_mu) * (1 + 1e-6 * condition))

    # Batches

    def outputs(self, q: Any, other: Any, theta: Any, v: Any) -> tuple[Tensor, ...]:
        """Everything that a member says."""
        points = [q.natural(), q.expected(), q.from_expected(q.expected()).natural(), q.statistics(theta)]
        points += [q.fisher_mul(v), q.fisher_solve(v)]
        scalars = [q.log_partition(), q.entropy(), q.kl(other), q.log_prob(theta), q.in_domain(q.natural()).to(WIDE)]
        return (*(part for point in points for part in blocks(point)), *scalars)

    @often(3)
    def test_a_batch_is_its_members_apart(self, data: Data) -> None:
        q, other = self.two(data)
        theta, v = self.theta(q), self.point(q, Drawn.by(data).reals(self.numbers(q.natural()).shape))
        together = self.outputs(q, other, theta, v)
        parts = zip(entries(q), entries(other), split(theta, q), split(v, q), strict=True)
        apart = [self.outputs(*arguments) for arguments in parts]
        for whole, pieces in zip(together, zip(*apart, strict=True), strict=True):
            pieces = torch.stack(pieces).view(whole.shape)
            close(whole, pieces, 1e-11, size_of(pieces))

    @often(3)
    def test_vmap_over_parameters_is_its_members_apart(self, data: Data) -> None:
        members = [self.one(data) for _ in range(3)]
        q = members[0]
        theta, v = self.theta(q), Drawn.by(data).reals(self.numbers(q.natural()).shape)

        def outputs(numbers: Tensor) -> tuple[Tensor, ...]:
            member = self.at_natural(q, numbers)
            return self.outputs(member, q, theta, self.point(q, v))

        rows = torch.stack([self.numbers(member.natural()) for member in members])
        for whole, pieces in zip(torch.func.vmap(outputs)(rows), zip(*map(outputs, rows), strict=True), strict=True):
            pieces = torch.stack(pieces)  # a divergence of zero is what rounding leaves of terms of order one
            close(whole, pieces, 1e-10, max(size_of(pieces), 1e-5))

    @each_dtype
    def test_a_batch_of_none_is_allowed(self, dtype: torch.dtype) -> None:
        batched = self.members(Drawn.seeded(0), (3,))
        if batched.batch_shape:
            q = cast(picked(batched, slice(0, 0)), dtype)
            assert q.batch_shape == (0,)
            theta = self.theta(q)
            for output in self.outputs(q, q, theta, q.natural()):
                assert output.shape[0] == 0
            assert self.draws(q, 2)[0].shape[:2] == (2, 0)

    @each_dtype
    @often(3)
    def test_results_have_the_dtype_of_the_parameters(self, dtype: torch.dtype, data: Data) -> None:
        q = cast(self.any(data), dtype)
        *found, domain = self.outputs(q, q, self.theta(q), q.natural())
        assert {part.dtype for part in (*found, *tensors(q.from_natural(q.natural())).values())} == {dtype}
        assert domain.all()

    # torch.distributions, and the domain

    @often(6)
    def test_torch_gives_the_member_back(self, data: Data) -> None:
        q = self.any(data)
        try:
            there = q.to_torch()
        except TypeError as error:
            assert type(q).__name__ in str(error) and "\n" not in str(error)
        else:
            close(br.Vector(self.named(q.from_torch(there))), br.Vector(self.named(q)), 1e-12)

    @each_dtype
    def test_natural_parameters_outside_are_refused_by_name(self, dtype: torch.dtype) -> None:
        q = cast(self.members(Drawn.seeded(0), ()), dtype)
        assert q.in_domain(q.natural())
        for natural in self.outside(q):
            assert not q.in_domain(natural), natural
            with pytest.raises(ValueError, match="natural") as caught:
                q.from_natural(natural)
            assert "\n" not in str(caught.value)

    @each_dtype
    def test_natural_parameters_with_gaps_are_outside(self, dtype: torch.dtype) -> None:
        q = cast(self.members(Drawn.seeded(0), ()), dtype)
        for gap in (torch.nan, torch.inf):
            parts = blocks(q.natural())
            for i in range(len(parts)):
                broken = [part * gap if i == j else part for j, part in enumerate(parts)]
                assert not q.in_domain(rebuilt(broken, q.natural()))
