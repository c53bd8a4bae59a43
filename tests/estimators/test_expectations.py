import math

import pytest
import torch
from tests.contracts import close, flat, normal, positive

import bayesrule as br

NOISE = br.CounterNoise(seed=11, step=4)


def full(seed=0, size=4, **more):
    return br.Full(normal(seed, size), positive(seed + 10, size), **more)


def diagonal(seed=0, size=4, **more):
    return br.Diagonal(normal(seed, size), normal(seed + 10, size).abs() + 0.5, **more)


FAMILIES = {"full": full, "diagonal": diagonal}


def offsets(expectation, q, noise=NOISE):
    """Where it looks, in order."""
    seen = []

    def look_at(offset):
        seen.append(offset)
        return br.Look(torch.tensor(0.0), q.mean, None)

    expectation(q, look_at, noise)
    return seen


class TestDelta:
    def test_looks_once_at_the_mean(self):
        assert offsets(br.Delta(), full()) == [None]
        assert br.Delta().offset(full(), NOISE, 0) is None
        assert br.Delta.draws == 0

    def test_returns_the_look_itself(self):
        look = br.Look(torch.tensor(1.0), torch.ones(2), torch.ones(2))
        assert br.Delta()(full(), lambda offset: look, NOISE) is look


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
class TestMonteCarlo:
    @pytest.mark.parametrize("draws", [1, 2, 5])
    def test_looks_at_as_many_samples_of_q(self, make, draws):
        q = make(ess=3.0)
        seen = offsets(br.MonteCarlo(draws), q)
        assert len(seen) == draws
        for draw, offset in enumerate(seen):
            close(q.mean + offset, q.sample(NOISE.at(draw=draw)), 1e-14)
            assert torch.equal(br.MonteCarlo(draws).offset(q, NOISE, draw), offset)

    def test_draws_differ(self, make):
        seen = offsets(br.MonteCarlo(3), make())
        assert len({tuple(o.tolist()) for o in seen}) == 3

    def test_is_the_mean_over_draws(self, make):
        q, k = make(), normal(3, 4)

        def look_at(offset):
            return br.Look(k @ offset, offset**2, None)

        look = br.MonteCarlo(7)(q, look_at, NOISE)
        every = torch.stack(offsets(br.MonteCarlo(7), q))
        close(look.value, (every @ k).mean())
        close(look.gradient, (every**2).mean(dim=0))
        assert look.curvature is None

    def test_antithetic_draws_are_mirror_images_two_by_two(self, make):
        q = make()
        seen = offsets(br.MonteCarlo(6, antithetic=True), q)
        plain = offsets(br.MonteCarlo(3), q)
        for pair in range(3):
            assert torch.equal(seen[2 * pair + 1], -seen[2 * pair])
            assert torch.equal(seen[2 * pair], plain[pair])

    @pytest.mark.parametrize("antithetic", [True, False])
    def test_a_q_without_spread_is_looked_at_in_its_mean(self, make, antithetic):
        q = make(ess=math.inf)
        assert offsets(br.MonteCarlo(2, antithetic), q) == [None, None]
        look = br.BayesRule(br.MonteCarlo(2, antithetic), br.Reparameterized(), br.Additive()).look(
            q, q, br.Quadratic(positive(3, 4), normal(2, 4)), NOISE
        )
        close(look.gradient, positive(3, 4) @ q.mean - normal(2, 4))
        assert look.curvature is None  # nothing is said and the precision stays

    def test_its_error_falls_with_the_root_of_the_draws(self, make):
        """The gradient of a quadratic: root mean square error over 100 looks, for 2 and for 32 draws; 1/4 within 15 percent."""
        q, loss = make(), br.Quadratic(positive(3, 4), normal(2, 4))

        def error(draws):
            rule = br.BayesRule(br.MonteCarlo(draws), br.Zero(), br.Additive())
            looks = torch.stack([rule.look(q, q, loss, NOISE.at(step=step)).gradient for step in range(100)])
            return (looks - loss(q.mean).gradient()).square().mean().sqrt()

        assert 0.85 < 4 * error(32) / error(2) < 1.15

    def test_it_is_unbiased(self, make):
        """Value, gradient and Hessian of a quartic within 5 standard errors of 2000 draws."""
        q, c, draws = make(ess=4.0), normal(5, 4), 2000
        spread = q.solve(c) @ c  # the variance of c theta
        m = q.mean @ c
        exact = (
            m**4 + 6 * m**2 * spread + 3 * spread**2,
            4 * (m**3 + 3 * m * spread) * c,
            12 * (m**2 + spread) * torch.outer(c, c),
        )
        thetas = torch.stack([q.mean + br.MonteCarlo().offset(q, NOISE, draw) for draw in range(draws)])
        f = thetas @ c
        samples = (f**4, 4 * f[:, None] ** 3 * c, 12 * f[:, None, None] ** 2 * torch.outer(c, c))
        looked = br.BayesRule(br.MonteCarlo(50), br.Hessian(), br.Additive()).look(
            q, q, br.Loss(lambda theta: (c @ theta) ** 4), NOISE
        )
        for sample, truth, seen in zip(samples, exact, looked, strict=True):
            error = sample.std(dim=0) / math.sqrt(draws)
            assert ((sample.mean(dim=0) - truth).abs() < 5 * error).all()
            first = sample[:50].mean(dim=0)
            close(seen, first if seen.shape == first.shape else first.diagonal(), 1e-9)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
class TestAntitheticPairs:
    """For a quadratic, Price's estimate is S o (g + A o)^T with g the gradient at the mean: a pair loses S o g^T altogether."""

    A = positive(3, 4)

    def look(self, q, vector, antithetic, step=0, draws=2):
        rule = br.BayesRule(br.MonteCarlo(draws, antithetic), br.Reparameterized(), br.Riemannian())
        return rule.look(q, q, br.Quadratic(self.A, vector), NOISE.at(step=step))

    def test_a_pair_sees_the_gradient_at_the_mean_exactly(self, make):
        q, b = make(ess=3.0), normal(2, 4)
        close(self.look(q, b, antithetic=True).gradient, self.A @ q.mean - b)

    def test_the_curvature_of_a_pair_does_not_depend_on_the_gradient(self, make):
        q = make(ess=3.0)
        offset = br.MonteCarlo(2, antithetic=True).offset(q, NOISE.at(step=0), 0)
        expected = q.outer(q.stretch(offset) * q.ess, self.A @ offset)
        for size in (0.0, 1.0, 1e3):
            close(self.look(q, size * normal(2, 4), antithetic=True).curvature, expected, 1e-9)
        independent = [self.look(q, size * normal(2, 4), antithetic=False).curvature for size in (0.0, 1e3)]
        assert (independent[0] - independent[1]).abs().max() > 10

    def test_a_linear_loss_has_no_curvature_in_pairs(self, make):
        q = make(ess=3.0)
        rule = br.BayesRule(br.MonteCarlo(4, antithetic=True), br.Reparameterized(), br.Riemannian())
        look = rule.look(q, q, br.Loss(lambda theta: normal(2, 4) @ theta), NOISE)
        close(look.curvature, torch.zeros_like(look.curvature), 1e-13)

    def test_far_from_the_minimum_pairs_have_the_smaller_error(self, make):
        q = make(ess=100.0)
        truth = q.project(self.A)
        errors = {}
        for antithetic in (True, False):
            looks = [self.look(q, 10 * normal(2, 4), antithetic, step).curvature for step in range(100)]
            errors[antithetic] = torch.stack([(c - truth).square().mean() for c in looks]).mean().sqrt()
        assert errors[True] < errors[False] / 20

    def test_an_odd_draw_at_the_end_stands_alone(self, make):
        q, b = make(ess=3.0), normal(2, 4)
        three = self.look(q, b, antithetic=True, draws=3)
        single = self.A @ (q.mean + q.root_solve(NOISE.at(step=0, draw=1).normal(q.mean))) - b
        close(three.gradient, (2 * (self.A @ q.mean - b) + single) / 3)


def test_vectors_are_drawn_part_by_part():
    mean = br.Vector([normal(0, 2, 2), normal(1, 3)])
    q = br.Diagonal(mean, mean * 0 + 4.0, ess=9.0)
    offset = br.MonteCarlo().offset(q, NOISE, 0)
    close(flat(offset), flat(NOISE.at(draw=0).normal(mean)) / 6)
