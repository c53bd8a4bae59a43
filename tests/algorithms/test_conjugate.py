"""Bayes' rule for every pair of a prior and a likelihood, written once for a table of pairs."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.contracts import close, flat, normal
from torch import Tensor
from torch import distributions as td

import bayesrule as br
from bayesrule import conjugate as c

update = c.update
DOUBLE = torch.float64


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# The table


def positives(seed: int, *shape: int) -> Tensor:
    return 1 + (normal(seed, *shape) / 2).exp()


def matrices(seed: int, batch: tuple[int, ...], size: int = 2) -> Tensor:
    root = normal(seed, *batch, size, size)
    return root @ root.mT / size + torch.eye(size, dtype=DOUBLE) / 2


def counts(seed: int, *shape: int, most: float = math.inf) -> Tensor:
    return (2 * normal(seed, *shape).abs()).floor().clamp(max=most)


def simple(family: Any, *kinds: Callable[..., Tensor]) -> Callable[..., Any]:
    """Members with fields of these kinds, one number a problem each."""
    return lambda seed, batch=(): family(*(kind(10 * seed + i, *batch) for i, kind in enumerate(kinds)))


class Pair(NamedTuple):
    likelihood: Any
    member: Callable[..., Any]  # from a seed and a batch shape to a prior
    data: Callable[..., Any]  # from a seed, a number of examples and a batch shape to observations
    space: str  # of one observation
    theta: str | None = None  # where theta lives, if it is one number
    given: Callable[[Tensor], td.Distribution] | None = None  # the likelihood by torch


def vectors(seed: int, n: int, batch: tuple[int, ...] = ()) -> Tensor:
    return normal(seed, n, *batch, 2) + 0.5


def reals(seed: int, n: int, batch: tuple[int, ...] = ()) -> Tensor:
    return normal(seed, n, *batch) + 0.5


def inputs(seed: int, n: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    return normal(seed, n, *batch, 2), reals(seed + 99, n, batch)


def full(seed: int, batch: tuple[int, ...] = ()) -> br.Full:
    hess = matrices(seed + 1, batch)
    return br.Full(normal(seed, *batch, 2), hess, hess / 2, ess=2.0)


def wishart(seed: int, batch: tuple[int, ...] = ()) -> br.Wishart:
    return br.Wishart(2 + positives(seed, *batch), matrices(seed + 1, batch))


def niw(seed: int, batch: tuple[int, ...] = ()) -> br.NormalInverseWishart:
    loc, kappa, df = normal(seed, *batch, 2), positives(seed + 1, *batch), 2 + positives(seed + 2, *batch)
    return br.NormalInverseWishart(loc, kappa, df, matrices(seed + 3, batch))


def nig(seed: int, batch: tuple[int, ...] = ()) -> br.NormalInverseGamma:
    a, b = positives(seed + 2, *batch), positives(seed + 3, *batch)
    return br.NormalInverseGamma(normal(seed, *batch, 2), matrices(seed + 1, batch), a, b)


def coins(seed: int, n: int, batch: tuple[int, ...] = ()) -> Tensor:
    return (normal(seed, n, *batch) > 0).to(DOUBLE)


BETA, GAMMA = simple(br.Beta, positives, positives), simple(br.Gamma, positives, positives)
DIRICHLET = lambda seed, batch=(): br.Dirichlet(positives(seed, *batch, 3))  # noqa: E731
COVARIANCE = tensor([[0.8, 0.3], [0.3, 1.1]])
PAIRS = {
    "bernoulli": Pair(c.Bernoulli(), BETA, coins, "choices 2", "unit", lambda x: td.Bernoulli(x)),
    "binomial": Pair(
        c.Binomial(4), BETA, lambda s, n, b=(): counts(s, n, *b, most=4), "choices 5", "unit", lambda x: td.Binomial(4, x)
    ),
    "poisson": Pair(c.Poisson(), GAMMA, lambda s, n, b=(): counts(s, n, *b), "choices 400", "positive", td.Poisson),
    "exponential": Pair(c.Exponential(), GAMMA, lambda s, n, b=(): normal(s, n, *b).exp(), "positive", "positive", td.Exponential),
    "categorical": Pair(c.Categorical(), DIRICHLET, lambda s, n, b=(): counts(s, n, *b, most=2), "choices 3"),
    "multinomial": Pair(c.Multinomial(), DIRICHLET, lambda s, n, b=(): counts(s, n, *b, 3), "choices 3"),
    "normal mean": Pair(
        c.Normal(variance=0.6), simple(br.Normal, normal, positives), reals, "real", "real", lambda x: td.Normal(x, 0.6**0.5)
    ),
    "normal precision": Pair(c.Normal(mean=0.3), GAMMA, reals, "real", "positive", lambda x: td.Normal(0.3, x**-0.5)),
    "normal variance": Pair(
        c.Normal(mean=0.3),
        simple(br.InverseGamma, positives, positives),
        reals,
        "real",
        "positive",
        lambda x: td.Normal(0.3, x**0.5),
    ),
    "normal both": Pair(c.Normal(), simple(br.NormalGamma, normal, positives, positives, positives), reals, "real"),
    "vector mean": Pair(c.MultivariateNormal(covariance=COVARIANCE), full, vectors, "plane"),
    "vector precision": Pair(c.MultivariateNormal(mean=tensor([0.3, -0.2])), wishart, vectors, "plane"),
    "vector both": Pair(c.MultivariateNormal(), niw, vectors, "plane"),
    "regression": Pair(c.LinearRegression(), nig, inputs, "real"),
    "von mises": Pair(
        c.VonMises(2.0), simple(br.VonMises, normal, positives), reals, "circle", "circle", lambda x: td.VonMises(x, tensor(2.0))
    ),
}
NAMED = {name: pair for name, pair in PAIRS.items() if name in c.NAMES} | {
    "normal": PAIRS["normal both"],
    "multivariate_normal": PAIRS["vector both"],
    "linear_regression": PAIRS["regression"],
}
N = 7


@pytest.fixture(params=PAIRS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str) -> Pair:
    return PAIRS[name]


def tensors(thing: Any) -> dict[str, Tensor]:
    return {f.name: getattr(thing, f.name) for f in fields(thing) if isinstance(getattr(thing, f.name), Tensor)}


def mapped(thing: Any, function: Callable[[Tensor], Any]) -> Any:
    """Something with tensors in it, with a function of them in their place."""
    if isinstance(thing, Tensor):
        return function(thing)
    if isinstance(thing, tuple):
        return tuple(mapped(part, function) for part in thing)
    return replace(thing, **{name: function(value) for name, value in tensors(thing).items()})


def log_prob(predictive: Any, data: Any) -> Tensor:
    """Of observations, one after the other in front; for regression at their inputs."""
    if isinstance(data, tuple):
        return predictive(data[0]).log_prob(data[1])
    return predictive.log_prob(data)


def line(step: float = 0.04, end: float = 3.2) -> tuple[Tensor, Tensor]:
    """Double-exponential quadrature: points far out on the real line, and their weights."""
    t = torch.arange(-end, end, step, dtype=DOUBLE)
    return (t.sinh() * math.pi / 2), t.cosh() * (math.pi / 2 * step)


def quadrature(space: str) -> tuple[Tensor, Tensor]:
    """Points and weights with which sums are integrals over a space, or sums."""
    kind, *size = space.split()
    if kind == "choices":
        points = torch.arange(int(size[0]), dtype=DOUBLE)
        return points, torch.ones_like(points)
    if kind == "circle":
        points = torch.arange(400, dtype=DOUBLE) * (2 * math.pi / 400) - math.pi
        return points, torch.full_like(points, 2 * math.pi / 400)
    if kind == "plane":
        x, w = quadrature("real")
        return torch.cartesian_prod(x, x), torch.cartesian_prod(w, w).prod(-1)
    u, w = line()
    if kind == "real":
        return u.sinh(), u.cosh() * w
    if kind == "positive":
        return u.exp(), u.exp() * w
    inside = u.abs() < 34  # the unit interval, up to where 1 - x rounds to 0
    x = u[inside].sigmoid()
    return x, w[inside] * x * (-u[inside]).sigmoid()


# What holds for every pair


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_one_step_from_anywhere_is_bayes_rule(pair, seed):
    prior, data = pair.member(0), pair.data(1, N)
    posterior = update(prior, pair.likelihood, data).posterior
    assert type(posterior) is type(prior)
    close(flat(update(prior, pair.likelihood, data, start=pair.member(seed)).posterior.natural()), flat(posterior.natural()))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_smaller_rate_leaves_that_part_of_the_way(pair, rate):
    """The distance to the posterior in natural parameters shrinks by 1 - rate, step by step."""
    prior, start, data = pair.member(0), pair.member(10), pair.data(1, N)
    goal = flat(update(prior, pair.likelihood, data).posterior.natural())
    away, q = flat(start.natural()) - goal, start
    for left in (1 - rate, (1 - rate) ** 2):
        q = update(prior, pair.likelihood, data, start=q, rate=rate).posterior
        close(flat(q.natural()) - goal, left * away)


@pytest.mark.parametrize("order", [[*range(N)], [*reversed(range(N))], [3, 0, 6, 1, 5, 2, 4]], ids=["forth", "back", "mixed"])
@pytest.mark.parametrize("parts", [[1] * N, [2, 5]], ids=["one by one", "two parts"])
def test_learning_in_parts_is_learning_at_once(pair, order, parts):
    """Yesterday's posterior is today's prior; the log evidences add up, in whatever order the data come."""
    prior, data = pair.member(0), pair.data(1, N)
    at_once, q, evidence = update(prior, pair.likelihood, data), prior, 0.0
    for part in torch.tensor(order).split(parts):
        q, gained, _ = update(q, pair.likelihood, mapped(data, lambda x, part=part: x[part]))
        evidence = evidence + gained
    close(flat(q.natural()), flat(at_once.posterior.natural()))
    close(evidence, at_once.log_evidence)


def test_data_are_forgotten_by_subtracting_their_site(pair):
    prior, data = pair.member(0), pair.data(1, N)
    some, rest = mapped(data, lambda x: x[:3]), mapped(data, lambda x: x[3:])
    everything = update(prior, pair.likelihood, data).posterior.natural()
    other = pair.member(10)  # a site does not depend on the prior
    site = update(other, pair.likelihood, some).posterior.natural() - other.natural()
    close(flat(everything - site), flat(update(prior, pair.likelihood, rest).posterior.natural()))


def test_posteriors_of_shards_merge_by_adding_their_sites(pair):
    prior, data = pair.member(0), pair.data(1, N)
    shards = [mapped(data, lambda x, i=i: x[i::3]) for i in range(3)]
    learned = [update(prior, pair.likelihood, shard).posterior.natural() for shard in shards]
    merged = sum((natural - prior.natural() for natural in learned), prior.natural())
    close(flat(merged), flat(update(prior, pair.likelihood, data).posterior.natural()))


def test_the_evidence_is_the_product_of_the_predictives_one_after_the_other(name, pair):
    prior, data = pair.member(0), pair.data(1, N)
    if name == "multinomial":  # whose predictive is of one trial
        data = torch.eye(3, dtype=DOUBLE)[[0, 2, 2, 1, 2, 0, 2]]
    total, q = 0.0, prior
    predictive = update(prior, pair.likelihood, data, start=prior, rate=1e-300).predictive  # the prior's own
    for i in range(N):
        seen = mapped(data, lambda x, i=i: x[i : i + 1])
        total = total + log_prob(predictive, seen.argmax(-1) if name == "multinomial" else seen)
        q, _, predictive = update(q, pair.likelihood, seen)
    close(total.sum(), update(prior, pair.likelihood, data).log_evidence)


def test_the_predictive_sums_to_one(pair):
    predictive = update(pair.member(0), pair.likelihood, pair.data(1, N)).predictive
    points, weights = quadrature(pair.space)
    if callable(predictive):
        predictive = predictive(tensor([0.7, -1.2]))
    close((weights * predictive.log_prob(points).exp()).sum(), tensor(1.0), 1e-7)


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.theta])
def test_evidence_and_predictive_are_integrals_over_theta(pair):
    prior, data = pair.member(0), pair.data(1, N)
    theta, weights = quadrature(pair.theta)
    posterior, log_evidence, predictive = update(prior, pair.likelihood, data)
    likelihood = pair.given(theta).log_prob(data[:, None]).sum(0)
    joint = prior.log_prob(theta) + likelihood + weights.log()
    close(joint.logsumexp(0), log_evidence, 1e-8)
    close(
        (posterior.log_prob(theta) - joint + weights.log() + log_evidence), torch.zeros_like(theta), 1e-8 * joint.abs().max().item()
    )
    coming = pair.data(2, 1)
    averaged = (pair.given(theta).log_prob(coming) + posterior.log_prob(theta) + weights.log()).logsumexp(0)
    close(averaged, predictive.log_prob(coming[0]), 1e-8)


def test_a_batch_of_problems_is_as_many_calls(name, pair):
    shape = (2, 3)
    prior, data = pair.member(0, shape), pair.data(1, N, shape)
    batch = update(prior, pair.likelihood, data)
    assert batch.log_evidence.shape == shape
    for at in np.ndindex(shape):
        own = mapped(data, lambda x, at=at: x[(slice(None), *at)])
        single = update(mapped(prior, lambda x, at=at: x[at]), pair.likelihood, own)
        close(flat(br.Vector([block[at] for block in batch.posterior.natural()])), flat(single.posterior.natural()))
        close(batch.log_evidence[at], single.log_evidence)
        first = mapped(pair.data(2, 1, shape), lambda x: x[0])
        if name == "multinomial":
            first = first.argmax(-1)
        close(log_prob(batch.predictive, first)[at], log_prob(single.predictive, mapped(first, lambda x, at=at: x[at])))


def test_priors_are_mapped_over(name, pair):
    """torch.func.vmap over the natural parameters of three priors, for the same data."""
    priors, data = pair.member(0, (3,)), pair.data(1, N)
    like = pair.member(0)

    def learn(*natural):
        posterior, evidence, _ = update(like.from_natural(br.Vector(natural)), pair.likelihood, data)
        return (*posterior.natural(), evidence)

    *natural, evidence = torch.func.vmap(learn)(*priors.natural())
    for i in range(3):
        single = update(mapped(priors, lambda x, i=i: x[i]), pair.likelihood, data)
        close(flat(br.Vector([block[i] for block in natural])), flat(single.posterior.natural()))
        close(evidence[i], single.log_evidence)


def test_single_precision_stays_and_is_right_to_four_digits(pair):
    prior, data = pair.member(0), pair.data(1, N)
    double = update(prior, pair.likelihood, data)
    likelihood = mapped(pair.likelihood, Tensor.float)
    single = update(mapped(prior, Tensor.float), likelihood, mapped(data, Tensor.float))
    assert all(value.dtype == torch.float32 for value in (single.log_evidence, *tensors(single.posterior).values()))
    close(flat(single.posterior.natural()).double(), flat(double.posterior.natural()), 1e-4)
    close(single.log_evidence.double(), double.log_evidence, 1e-4)


def test_the_evidence_can_be_differentiated_in_the_prior(pair):
    """Empirical Bayes: each parameter of the prior times a number near 1, autograd against finite differences."""
    prior, data = pair.member(0), pair.data(1, N)
    names = list(tensors(prior))

    def evidence(factors):
        scaled = {name: getattr(prior, name) * factor for name, factor in zip(names, factors, strict=True)}
        return update(replace(prior, **scaled), pair.likelihood, data).log_evidence

    factors = torch.ones(len(names), dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(evidence, factors, atol=1e-6)
    assert torch.autograd.grad(evidence(factors), factors)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Tensor.tolist, Tensor.numpy], ids=["lists", "numpy"])
def test_data_may_be_lists_and_arrays(pair, kind):
    prior, data = pair.member(0), pair.data(1, N)
    close(update(prior, pair.likelihood, mapped(data, kind)).log_evidence, update(prior, pair.likelihood, data).log_evidence, 0)


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.space.startswith("choices")])
def test_counts_may_be_whole_numbers_and_coins_truth_values(name, pair):
    prior, data = pair.member(0), pair.data(1, N)
    kinds = [torch.bool, torch.uint8, torch.int64] if name == "bernoulli" else [torch.uint8, torch.int64]
    for kind in kinds:
        found = update(prior, pair.likelihood, data.to(kind))
        close(found.log_evidence, update(prior, pair.likelihood, data).log_evidence, 0)
        assert found.posterior.natural()[0].dtype == DOUBLE


@pytest.mark.parametrize("name", sorted(c.NAMES))
def test_a_likelihood_without_parameters_goes_by_its_name(name):
    pair = NAMED[name]
    prior, data = pair.member(0), pair.data(1, N)
    close(update(prior, name, data).log_evidence, update(prior, pair.likelihood, data).log_evidence, 0)


def test_the_arguments_are_left_as_they_were(pair):
    prior, data = pair.member(0), pair.data(1, N)
    update(prior, pair.likelihood, data, start=pair.member(10))
    for name, value in tensors(prior).items():
        assert torch.equal(value, getattr(pair.member(0), name))
    both = zip(data, pair.data(1, N), strict=True) if isinstance(data, tuple) else [(data, pair.data(1, N))]
    assert all(torch.equal(after, before) for after, before in both)
