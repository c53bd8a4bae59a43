"""Expectations that ask for values alone: sums over all values, and the score function."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.contracts import close, flat, normal, positive

import bayesrule as br

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "estimator_moments.json").read_text())["natural_gradients"]
DOUBLE, NOISE = torch.float64, br.CounterNoise(seed=4, step=2)


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


class Values:
    """A loss of which only values are known: what asks for more fails."""

    def __init__(self, function):
        self.function = function

    def __call__(self, theta):
        return ValueAt(self.function(theta))


class ValueAt(br.Oracle):
    def __init__(self, seen):
        self.seen = seen

    def value(self):
        return self.seen

    def gradient(self):
        raise AssertionError("nobody was to ask for a gradient")


def look(expectation, q, function, noise=NOISE):
    return br.BayesRule(expectation, br.Zero(), br.Natural()).look(q, q, Values(function), noise)


def table(sizes):
    """A made-up function of several discrete elements, by its table; values from 0, or -1 and 1."""
    numbers = normal(3, *sizes)

    def function(theta):
        elements = theta.reshape(-1)
        index = (elements > 0).long() if (elements < 0).any() or all(s == 2 for s in sizes) else elements.long()
        return numbers[tuple(index.tolist())]

    return function, numbers


class TestEnumerate:
    @pytest.mark.parametrize("probability", [0.01, 0.3, 0.999])
    def test_of_a_coin_it_is_the_difference(self, probability):
        case = GOLDEN["bernoulli_01"]
        q = br.Bernoulli(tensor(probability).logit())
        found = look(br.Enumerate(), q, lambda x: case["f0"] + (case["f1"] - case["f0"]) * x)
        close(found.gradient[0], tensor(case["natgrad"]))
        close(found.value, tensor(case["f0"] + probability * (case["f1"] - case["f0"])))
        assert found.curvature is None

    @pytest.mark.parametrize("probability", [0.01, 0.3, 0.999])
    def test_of_a_signed_coin_it_is_half_the_difference(self, probability):
        f = {-1.0: 0.5, 1.0: 2.0}
        found = look(br.Enumerate(), br.SignedBernoulli(tensor(probability).logit()), lambda x: tensor(f[x.item()]))
        close(found.gradient[0], tensor((f[1.0] - f[-1.0]) / 2))

    @pytest.mark.parametrize("seed", range(3))
    def test_of_a_choice_it_is_the_difference_from_the_last(self, seed):
        case = GOLDEN["categorical_minimal"]
        found = look(br.Enumerate(), br.Categorical(normal(seed, 4)), lambda x: tensor(case["f"])[x.long()])
        close(found.gradient[0], tensor(case["natgrad"]))

    @pytest.mark.parametrize("family", [br.Bernoulli, br.SignedBernoulli])
    @pytest.mark.parametrize("shape", [(3,), (2, 2)])
    def test_of_coins_together_it_is_autograds_of_the_joint_sum(self, family, shape):
        q, (function, numbers) = family(normal(1, *shape)), table([2] * math.prod(shape))

        def expectation(mu):
            p = (mu if family is br.Bernoulli else (1 + mu) / 2).reshape(-1)
            weights = [
                math.prod(p[i] if bit else 1 - p[i] for i, bit in enumerate(bits)) for bits in product([0, 1], repeat=len(p))
            ]
            return (torch.stack(weights) * numbers.reshape(-1)).sum()

        found, mu = look(br.Enumerate(), q, function), q.expected()[0]
        close(found.value, expectation(mu))
        close(found.gradient[0], torch.autograd.functional.jacobian(expectation, mu))

    def test_of_choices_together_it_is_autograds_of_the_joint_sum(self):
        q, (function, numbers) = br.Categorical(normal(1, 2, 3)), table([3, 3])

        def expectation(mu):
            p = torch.cat([mu, 1 - mu.sum(-1, keepdim=True)], dim=-1)
            return p[0] @ numbers @ p[1]

        found, mu = look(br.Enumerate(), q, function), q.expected()[0]
        close(found.value, expectation(mu))
        close(found.gradient[0], torch.autograd.functional.jacobian(expectation, mu))

    def test_a_step_is_the_rules(self):
        """In natural parameters: lambda - rho (lambda - lambda_0 + f(1) - f(0))."""
        q, prior = br.Bernoulli(tensor(0.7)), br.Bernoulli(tensor(-0.2))
        moved = br.BayesRule(br.Enumerate(), br.Zero(), br.Natural()).step(q, prior, Values(lambda x: 0.5 + 1.5 * x), 0.3)
        close(moved.logits, tensor(0.7 - 0.3 * (0.9 + 1.5)))

    def test_one_full_step_is_the_exact_posterior_of_a_coin(self):
        prior = br.Bernoulli(tensor(-0.2))
        moved = br.BayesRule(br.Enumerate(), br.Zero(), br.Natural()).step(
            br.Bernoulli(tensor(4.0)), prior, Values(lambda x: 3 * x)
        )
        close(moved.logits, prior.logits - 3)

    def test_single_precision_stays(self):
        found = look(br.Enumerate(), br.Bernoulli(normal(0, 3).float()), lambda x: x.sum() ** 2)
        assert found.value.dtype == found.gradient[0].dtype == torch.float32

    @pytest.mark.parametrize("family", [br.Bernoulli, br.SignedBernoulli])
    @pytest.mark.parametrize("logit", [35.0, 45.0])
    def test_a_coin_that_is_almost_certain(self, family, logit):
        """For a linear function the difference is its slope, however small the probability of the other side."""
        found = look(br.Enumerate(), family(tensor(logit)), lambda x: 0.5 + 1.5 * x)
        close(found.gradient[0], tensor(1.5), 1e-6)

    @pytest.mark.parametrize(
        "q", [br.Gamma(1.0, 1.0), br.Poisson(1.0), br.Full(torch.zeros(1), 1.0)], ids=lambda q: type(q).__name__
    )
    def test_what_takes_infinitely_many_values_is_refused(self, q):
        message = rf"^a {type(q).__name__} takes infinitely many values; use Pathwise or Score, for a Gaussian GaussHermite$"
        with pytest.raises(TypeError, match=message):
            look(br.Enumerate(), q, torch.sum)

    def test_a_loss_without_values_is_refused(self):
        q = br.Bernoulli(0.0)
        with pytest.raises(TypeError, match=r"^the value of the loss is needed, and Values does not know it$"):
            look(br.Enumerate(), q, lambda x: None)


# The score function

COINS = 100_000


@pytest.mark.parametrize("logit", [-1.0, 0.4, 2.0])
@pytest.mark.parametrize("baseline", [None, 1.2, "leave-one-out"])
def test_the_score_of_a_coin_is_unbiased_with_the_variance_of_its_enumeration(logit, baseline):
    """A hundred thousand coins at once; for two draws every pair of values is enumerated."""
    f, draws = tensor([0.5, 2.0]), 2
    q = br.Bernoulli(tensor(logit).expand(COINS))
    found = look(br.Score(draws, baseline), q, lambda x: torch.where(x > 0, f[1], f[0])).gradient[0]
    p = tensor(logit).sigmoid()
    chance, score = torch.stack([1 - p, p]), torch.stack([-1 / (1 - p), 1 / p])
    if baseline == "leave-one-out":
        estimate = (f[:, None] - f) * (score[:, None] - score) / 2
    else:
        one = (f - (baseline or 0.0)) * score
        estimate = (one[:, None] + one) / 2
    pairs = chance[:, None] * chance
    mean, variance = (pairs * estimate).sum(), (pairs * estimate**2).sum() - (pairs * estimate).sum() ** 2
    close(mean, f[1] - f[0])
    assert (found.mean() - mean).abs() < 5 * (variance / COINS).sqrt()
    assert (found.var() / variance - 1).abs() < 0.1


@pytest.mark.parametrize("family", [br.Poisson, br.Exponential])
def test_the_score_of_other_families_is_unbiased(family):
    """E[x^2] in mu: of a Poisson mu + mu^2, of an Exponential 2 mu^2. Within 5 standard errors of 50 000 looks."""
    q = family(tensor(1.3).expand(50_000))
    found = look(br.Score(4), q, lambda x: x**2).gradient[0]
    mu = q.expected()[0][0]
    exact = 1 + 2 * mu if family is br.Poisson else 4 * mu
    assert (found.mean() - exact).abs() < 5 * found.std() / math.sqrt(len(found))


def test_the_value_is_the_mean_over_draws():
    q = br.Bernoulli(normal(0, 5))
    places = [q.sample(NOISE.at(draw=draw)) for draw in range(6)]
    close(look(br.Score(6), q, torch.sum).value, torch.stack(places).sum(-1).mean())


def test_of_a_constant_nothing_is_learned_with_the_others_as_baseline():
    for q in (br.Bernoulli(normal(0, 5)), br.Gamma(tensor(2.0), tensor(1.0)), br.Full(normal(0, 2), positive(1, 2))):
        found = look(br.Score(3), q, lambda x: tensor(7.0))
        parts = [found.gradient] if found.curvature is None else [found.gradient, found.curvature]
        assert all(flat(part).abs().max() == 0 for part in parts)


def test_of_a_constant_a_gaussian_score_is_its_own():
    q = br.Full(normal(0, 2), positive(1, 2), ess=3.0)
    offset = q.draw(NOISE.at(draw=0))
    found = look(br.Score(1, None), q, lambda x: tensor(2.0))
    pull = q.precision @ offset
    close(found.gradient, 2 * pull)
    close(found.curvature, 2 * (torch.outer(pull, pull) - q.precision))


@pytest.mark.parametrize(
    ("draws", "baseline", "least"), [(1, "leave-one-out", 2), (0, None, 1), (0, 0.5, 1), (-1, "leave-one-out", 2)]
)
def test_too_few_draws_are_refused(draws, baseline, least):
    with pytest.raises(ValueError, match=rf"^draws must be at least {least} for the baseline {baseline}, got {draws}$"):
        look(br.Score(draws, baseline), br.Bernoulli(0.0), torch.sum)


def test_draws_need_noise():
    q = br.Bernoulli(0.0)
    with pytest.raises(ValueError, match=r"^this rule draws: pass noise=CounterNoise\(seed, step=t\)"):
        br.BayesRule(br.Score(), br.Zero(), br.Natural()).look(q, q, Values(torch.sum))
