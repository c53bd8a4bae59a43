"""Finite families: their support, and the score, with which natural gradients are differences of values."""

import math

import pytest
import torch
from tests.families.members import Drawn, close

import bayesrule as br

WIDE = torch.float64
SEEDS = range(3)


def expectation(q, of):
    """The gradient that looking at every value gives, once by scores and once by the support's own derivatives."""
    looks = [q.score(point).scaled(probability * of(point)).gradient for probability, point, _ in q.support()]
    scored = br.Vector([sum(parts) for parts in zip(*looks, strict=True)])
    found = br.Vector([sum(lever[0] * of(point) for _, point, lever in q.support())])
    if q.logits.abs().max() < 10:
        close(scored[0], found[0], 1e-5 if q.logits.dtype == torch.float32 else 1e-10)
    return found


def values(seed: int):
    """A function on whole numbers from -1 to 3 without any structure."""
    table = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=WIDE)
    return lambda point: table[(point + 1).long()]


def coin(family, seed, shape=()):
    return family(Drawn.seeded(seed).reals(shape, -3, 3))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("family", [br.Bernoulli, br.SignedBernoulli], ids=lambda f: f.__name__)
def test_the_support_of_coins_is_every_combination(family, shape, seed):
    q = coin(family, seed, shape)
    seen = list(q.support())
    assert len(seen) == len({tuple(point.flatten().tolist()) for _, point, _ in seen}) == 2 ** math.prod(shape)
    assert all(point.shape == shape for _, point, _ in seen)
    close(sum(probability for probability, *_ in seen), torch.tensor(1.0, dtype=WIDE), 1e-14)
    mean = sum(probability * point for probability, point, _ in seen)
    close(mean, q.expected()[0], 1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_support_of_a_choice_is_its_classes(seed):
    q = br.Categorical(Drawn.seeded(seed).reals((4,), -3, 3))
    seen = list(q.support())
    assert [point.item() for _, point, _ in seen] == [0, 1, 2, 3]
    close(torch.stack([probability for probability, *_ in seen]), q.mean, 1e-13)


def test_the_support_of_a_batch_of_choices_is_every_combination():
    q = br.Categorical(Drawn.seeded(0).reals((2, 3), -1, 1))
    seen = list(q.support())
    assert len(seen) == 9
    close(sum(probability for probability, *_ in seen), torch.tensor(1.0, dtype=WIDE), 1e-14)


@pytest.mark.parametrize("family", [br.Poisson, br.Gamma, br.Normal, br.Diagonal], ids=lambda f: f.__name__)
def test_other_families_have_no_support(family):
    q = family(torch.ones(1), torch.ones(1)) if family is not br.Poisson else family(torch.ones(1))
    with pytest.raises(TypeError, match=f"{family.__name__} takes infinitely many values; use"):
        q.support()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_natural_gradient_is_the_difference_of_values(seed):
    f = values(seed)
    at = [f(torch.tensor(float(x))) for x in range(-1, 4)]
    zero, one = at[1], at[2]
    close(expectation(coin(br.Bernoulli, seed), f)[0], one - zero, 1e-12)
    close(expectation(coin(br.SignedBernoulli, seed), f)[0], (one - at[0]) / 2, 1e-12)
    choice = br.Categorical(Drawn.seeded(seed).reals((4,), -3, 3))
    close(expectation(choice, f)[0], torch.stack(at[1:4]) - at[4], 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_natural_gradient_of_many_coins_is_the_expected_difference_in_each(seed):
    q = coin(br.Bernoulli, seed, (3,))
    weights = Drawn.seeded(seed + 10).reals((3,))

    def f(point):
        return (point @ weights).sin() + point[0] * point[2]

    def conditional(i, value):
        total = 0.0
        for probability, point, _ in q.support():
            if point[i] == value:
                own = q.logits[i].sigmoid() if value else (-q.logits[i]).sigmoid()
                total = total + probability / own * f(point)
        return total

    close(expectation(q, f)[0], torch.stack([conditional(i, 1) - conditional(i, 0) for i in range(3)]), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "logit"),
    [
        (torch.float64, 12.0),
        (torch.float64, 30.0),
        (torch.float32, 5.0),
        (torch.float64, 40.0),
        (torch.float32, 15.0),
        (torch.float32, 20.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [br.Bernoulli, br.SignedBernoulli], ids=lambda f: f.__name__)
def test_the_natural_gradient_of_a_coin_that_is_nearly_sure(family, dtype, logit):
    """It does not depend on the coin: f(1) - f(0), or half of f(1) - f(-1), is as large for one that is nearly sure."""
    found = expectation(family(torch.tensor(logit, dtype=dtype)), lambda point: 3 * point)[0]
    close(found, torch.tensor(3.0, dtype=dtype), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [40.0, -40.0, 800.0, -800.0])
@pytest.mark.parametrize("family", [br.Bernoulli, br.SignedBernoulli], ids=lambda f: f.__name__)
def test_coins_that_are_sure_are_finite(family, logit, dtype):
    q, fair = family(torch.tensor(logit, dtype=dtype)), family(torch.tensor(0.0, dtype=dtype))
    signed = family is br.SignedBernoulli
    close(q.natural()[0] * (2 if signed else 1), q.logits, 0)
    close(q.log_partition(), torch.tensor(abs(logit) / 2 if signed else max(logit, 0.0), dtype=dtype), 1e-6)
    assert 0 <= q.entropy() < 1e-6
    close(q.kl(fair), torch.tensor(math.log(2), dtype=dtype), 1e-6)
    close(fair.kl(q), torch.tensor(abs(logit) / 2 - math.log(2), dtype=dtype), 1e-6)
    low = -1.0 if signed else 0.0
    likely, unlikely = (1.0, low) if logit > 0 else (low, 1.0)
    close(q.log_prob(torch.tensor(likely, dtype=dtype)), torch.tensor(0.0, dtype=dtype), 1e-6)
    close(q.log_prob(torch.tensor(unlikely, dtype=dtype)), torch.tensor(-abs(logit), dtype=dtype), 1e-6)
    close(q.sample(br.CounterNoise()), torch.tensor(likely, dtype=dtype), 0)


def test_a_choice_that_is_sure_is_finite():
    q = br.Categorical(torch.tensor([800.0, 0.0, -800.0]))
    close(q.log_partition(), torch.tensor(1600.0), 0)
    assert q.entropy() == 0
    close(q.log_prob(torch.tensor(2)), torch.tensor(-1600.0), 0)


@pytest.mark.parametrize("rate", [1e-3, 0.5, 3.0, 40.0, 99.9, 100.0, 100.1, 1e3, 1e5])
def test_the_entropy_of_a_poisson_is_the_sum_over_counts(rate):
    """torch has none, and its hook raises."""
    with pytest.raises(NotImplementedError):
        torch.distributions.Poisson(rate).entropy()
    q = br.Poisson(torch.tensor(rate, dtype=WIDE))
    middle, spread = round(rate), math.ceil(12 * math.sqrt(rate) + 40)
    counts = torch.arange(max(middle - spread, 0), middle + spread, dtype=WIDE)
    log_prob = q.log_prob(counts)
    close(q.entropy(), -(log_prob.exp() * log_prob).sum(), 1e-10)
    slope = torch.func.grad(lambda r: br.Poisson(r).entropy())(q.rate)
    weight = log_prob.exp() * (counts / rate - 1)
    close(slope, -(weight * (log_prob + 1)).sum(), 1e-8)
