"""Models of predictors as exponential families: sites are natural parameters, in weights and in functions."""

import math

import pytest
import torch
from tests.contracts import close, normal, positive

import bayesrule as br

N = 6
X = normal(0, N, 3)
PRIOR = br.Full(normal(1, 3), positive(2, 3))
KERNEL = positive(3, N)
NOISE = br.CounterNoise(seed=28)


def sites(seed, least=0.2):
    return br.Vector([normal(seed, N), -(normal(seed + 1, N).abs() + least) / 2])


def weight_space(seed):
    return br.WeightSpace(X, PRIOR, sites(seed))


def function_space(seed):
    return br.FunctionSpace(KERNEL, sites(seed))


def negative(seed):
    """One site of negative precision, small enough for the whole to be a Gaussian."""
    pull, second = sites(seed)
    second[2] = 0.02
    return br.FunctionSpace(KERNEL, br.Vector([pull, second]))


MAKERS = {"weights": weight_space, "functions": function_space, "a negative site": negative}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def dense(q):
    """Mean and covariance of the predictors by plain inverses."""
    W = torch.diag(q.precisions)
    if isinstance(q, br.WeightSpace):
        covariance = torch.linalg.inv(PRIOR.precision + X.mT @ W @ X)
        return X @ covariance @ (PRIOR.precision @ PRIOR.mean + X.mT @ q.pull), X @ covariance @ X.mT
    covariance = torch.linalg.inv(torch.linalg.inv(KERNEL) + W)
    return covariance @ q.pull, covariance


def test_marginals_are_those_of_plain_inverses(make):
    q = make(10)
    mean, covariance = dense(q)
    close(q.mean, mean)
    close(q.variance, covariance.diagonal())
    close(q.expected()[1], mean**2 + covariance.diagonal())
    if isinstance(q, br.FunctionSpace):
        close(q.covariance, covariance)


def test_the_log_partition_is_its_integral_over_the_prior(make):
    """A = log E_prior[exp(sites)], by the ratio of Gaussian normalizers; and its gradient is mu."""
    q = make(20)

    def log_partition(pull, second):
        return q.from_natural(br.Vector([pull, second])).log_partition()

    slope = torch.func.grad(log_partition, argnums=(0, 1))(*q.natural())
    for mine, expected in zip(slope, q.expected(), strict=True):
        close(mine, expected, 1e-9)
    close(q.from_natural(q.natural() * 0).log_partition(), torch.zeros((), dtype=torch.float64))


def test_kl_is_that_of_the_gaussians(make):
    q, other = make(30), make(40)
    if isinstance(q, br.WeightSpace):
        close(q.kl(other), q.posterior.kl(other.posterior), 1e-9)
        close(q.kl(br.WeightSpace(X, PRIOR)), q.posterior.kl(PRIOR), 1e-9)
        return
    dist = [torch.distributions.MultivariateNormal(*dense(each)) for each in (q, other)]
    prior = torch.distributions.MultivariateNormal(torch.zeros(N, dtype=torch.float64), KERNEL)
    close(q.kl(other), torch.distributions.kl_divergence(*dist), 1e-9)
    close(q.kl(br.FunctionSpace(KERNEL)), torch.distributions.kl_divergence(dist[0], prior), 1e-9)
    close(q.entropy(), dist[0].entropy(), 1e-9)
    close(q.log_prob(normal(50, N)), dist[0].log_prob(normal(50, N)), 1e-9)


def test_the_prior_has_no_sites(make):
    q = make(10)
    prior = br.WeightSpace(X, PRIOR) if isinstance(q, br.WeightSpace) else br.FunctionSpace(KERNEL)
    close(prior.natural()[0], torch.zeros(N, dtype=torch.float64))
    close(prior.log_partition(), torch.zeros((), dtype=torch.float64))
    close(prior.distance(prior), torch.zeros((), dtype=torch.float64))
    close(prior.log_det(), torch.zeros((), dtype=torch.float64))
    wanted = X @ PRIOR.covariance @ X.mT if isinstance(q, br.WeightSpace) else KERNEL
    close(prior.variance, wanted.diagonal())
    close(prior.mean, X @ PRIOR.mean if isinstance(q, br.WeightSpace) else torch.zeros(N, dtype=torch.float64))


def test_predictions_continue_the_marginals(make):
    """At the inputs themselves a prediction is the marginal."""
    q = make(10)
    found = q.predict(X) if isinstance(q, br.WeightSpace) else q.predict(KERNEL, KERNEL.diagonal())
    close(found[0], q.mean)
    close(found[1], q.variance)


def test_the_prior_predicts_itself():
    mean, variance = br.FunctionSpace(KERNEL).predict(KERNEL[:, :2], KERNEL.diagonal()[:2])
    close(mean, torch.zeros(2, dtype=torch.float64))
    close(variance, KERNEL.diagonal()[:2])


def test_looks_and_natural_gradients_are_the_same_thing(make):
    q = make(10)
    look = br.Look(None, normal(60, N), normal(61, N))
    again = q.as_look(q.natural_gradient(look))
    close(again.gradient, look.gradient)
    close(again.curvature, look.curvature)
    with pytest.raises(TypeError, match="sites need a curvature"):
        q.natural_gradient(look._replace(curvature=None))


def test_draws_of_single_predictors_have_their_marginals(make):
    q = make(10)
    draws = torch.stack([q.place(q.draw(NOISE.at(draw=i))) for i in range(4000)])
    assert ((draws.mean(0) - q.mean).abs() < 5 * (q.variance / 4000).sqrt()).all()
    assert ((draws.var(0) / q.variance - 1).abs() < 5 * math.sqrt(2 / 4000)).all()


def test_joint_samples_have_the_covariance(make):
    q = make(10)
    draws = torch.stack([q.sample(NOISE.at(draw=i)) for i in range(4000)])
    _, covariance = dense(q)
    deviation = covariance.diagonal().sqrt()
    error = (draws.mT.cov() - covariance) / deviation / deviation[:, None]
    assert error.abs().max() < 5 * math.sqrt(2 / 4000)


def test_the_domain_ends_where_a_precision_would_be_lost():
    q = function_space(10)
    assert q.in_domain(q.natural())
    far = br.Vector([q.natural()[0], torch.full((N,), 1e3, dtype=torch.float64)])
    assert not q.in_domain(far)
    with pytest.raises(br.DomainError, match="least site precision -2e\\+03"):
        q.from_natural(far).variance  # noqa: B018
    with pytest.raises(br.DomainError, match="smaller rate"):
        weight_space(10).from_natural(far).mean  # noqa: B018


def test_predictors_have_no_density_in_weight_space():
    with pytest.raises(TypeError, match=r"ask \.posterior\.log_prob"):
        weight_space(10).log_prob(normal(0, N))
    close(weight_space(10).entropy(), weight_space(10).posterior.entropy())


def test_a_site_without_precision_still_pulls():
    pull, second = sites(10)
    second[1] = 0.0
    q = br.FunctionSpace(KERNEL, br.Vector([pull, second]))
    mean, covariance = dense(q)
    close(q.mean, mean)
    close(q.variance, covariance.diagonal())
