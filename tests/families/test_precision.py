"""Where numbers are hard: small and large concentrations, single precision, and what torch gets wrong and we do not."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from tests.families.members import NOISE, Drawn, blocks, cast, close
from torch.distributions import kl_divergence

import bayesrule as br
from bayesrule.families.special import digamma, trigamma

SINGLE, WIDE = torch.float32, torch.float64


def wide(number):
    return torch.as_tensor(number, dtype=WIDE)


# Small concentrations

SMALL = {
    "Gamma": lambda a: br.Gamma(a, torch.ones_like(a)),
    "InverseGamma": lambda a: br.InverseGamma(a, torch.ones_like(a)),
    "Beta": lambda a: br.Beta(a, a),
    "Dirichlet": lambda a: br.Dirichlet(a.expand(3)),
}
COUNT = 4000


@pytest.mark.parametrize("concentration", [1e-2, 1e-4])
@pytest.mark.parametrize("name", SMALL)
def test_statistics_of_draws_with_a_small_concentration_are_finite_and_right(name, concentration):
    """In single precision, where nearly all draws underflow; means within 5 standard errors of the logarithms."""
    q = SMALL[name](torch.tensor(concentration))
    drawn = q.sample_statistics(NOISE, (COUNT,))
    logs = drawn[0] if name != "Beta" else torch.stack(blocks(drawn), dim=-1)
    assert logs.dtype == SINGLE and logs.isfinite().all()
    expected = q.expected()[0] if name != "Beta" else torch.stack(blocks(q.expected()))
    fisher = SMALL[name](wide(concentration)).fisher()
    variance = fisher.diagonal() if name in ("Beta", "Dirichlet") else fisher[0, 0]
    assert ((logs.mean(0) - expected).abs() <= 5 * (variance / COUNT).sqrt()).all()
    theta = q.sample(NOISE, (COUNT,))
    assert theta.isfinite().all() and (theta > 0).all()
    assert q.log_prob(theta).isfinite().all()


@pytest.mark.parametrize("concentration", [1e-2, 1e-4])
def test_torch_loses_the_draws_of_a_small_concentration(concentration):
    """42 % of them at 0.01 are the smallest number of single precision, and their logarithm is a wall."""
    a = torch.full((COUNT,), concentration)
    with NOISE.forked(a):
        theirs = torch.distributions.Gamma(a, torch.ones_like(a)).sample()
    assert (theirs <= torch.finfo(SINGLE).tiny).double().mean() > 0.4
    ours = br.Gamma(a, torch.ones_like(a)).sample_statistics(NOISE)[0]
    assert (ours < math.log(torch.finfo(SINGLE).tiny)).double().mean() > 0.4


# Large concentrations

LARGE = {
    "Gamma": lambda a: br.Gamma(a, torch.ones_like(a)),
    "InverseGamma": lambda a: br.InverseGamma(a, torch.ones_like(a)),
    "Beta": lambda a: br.Beta(a, a),
    "Dirichlet": lambda a: br.Dirichlet(a.expand(4)),
    "VonMises": lambda a: br.VonMises(torch.zeros_like(a), a),
    "Poisson": br.Poisson,
}
VARIANCES = {
    "Gamma": lambda a: a,
    "InverseGamma": lambda a: 1 / ((a - 1) ** 2 * (a - 2)),
    "Beta": lambda a: 1 / (4 * (2 * a + 1)),
    "VonMises": lambda a: 1 / a,
    "Poisson": lambda a: a,
}


@pytest.mark.parametrize("concentration", [1e5, 1e6, 1e7], ids=lambda a: f"{a:.0e}")
@pytest.mark.parametrize("name", LARGE)
def test_an_entropy_in_single_precision_is_that_of_double(name, concentration):
    """And that of the normal distribution that all of them become, up to one over the concentration."""
    q, exact = LARGE[name](torch.tensor(concentration)), LARGE[name](wide(concentration))
    close(q.entropy(), exact.entropy().float(), 1e-5, 0.0)
    if name in VARIANCES:
        normal = (2 * math.pi * math.e * VARIANCES[name](wide(concentration))).log() / 2
        close(exact.entropy(), normal, 2 / concentration + 1e-7)


@pytest.mark.parametrize("concentration", [1e4, 1e5, 1e6, 1e7], ids=lambda a: f"{a:.0e}")
@pytest.mark.parametrize("name", [name for name in LARGE if name != "Poisson"])
def test_expected_parameters_are_met_where_the_map_back_is_badly_conditioned(name, concentration):
    """A concentration a is seen in mu as 1 / a: a rounding of mu is a^2 roundings of it, and of its size a of them."""
    q = LARGE[name](wide(concentration))
    again = q.from_expected(q.expected())
    close(again.expected(), q.expected(), 1e-12)
    close(again.natural(), q.natural(), 1e-14 * concentration, concentration)


@pytest.mark.parametrize("size", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_expected_parameters_of_uneven_concentrations_are_met(size, seed):
    """From 1e-4 to 1e6 in one Dirichlet."""
    q = br.Dirichlet(Drawn.seeded(seed).positives((20, size), 1e-4, 1e6))
    close(q.from_expected(q.expected()).expected(), q.expected(), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_expected_parameters_of_wisharts_are_met_for_any_degrees_of_freedom(size):
    df = size - 1 + torch.logspace(-3, 6, 19, dtype=WIDE)
    q = br.Wishart(df, torch.eye(size, dtype=WIDE).expand(19, size, size))
    again = q.from_expected(q.expected())
    close(again.expected(), q.expected(), 1e-12, df.max())
    close(again.expected()[1], q.expected()[1], 1e-12)
    assert ((again.df - df).abs() <= 1e-12 * df + 2e-15 * df**2).all()


def test_a_wishart_of_one_row_is_a_gamma():
    gamma = br.Gamma(wide([0.3, 2.0, 40.0]), wide([0.5, 1.0, 3.0]))
    wishart = br.Wishart(2 * gamma.concentration, 1 / (2 * gamma.rate)[:, None, None])
    close(wishart.entropy(), gamma.entropy(), 1e-13, 1.0)
    close(wishart.kl(wishart[1:2]), gamma.kl(gamma[1:2]), 1e-12, 10.0)
    theta = wide([0.2, 1.0, 14.0])
    close(wishart.log_prob(theta[:, None, None]), gamma.log_prob(theta), 1e-13, 10.0)


@pytest.mark.parametrize("concentration", [1e3, 1e5], ids=lambda a: f"{a:.0e}")
def test_solving_by_the_fisher_matrix_in_single_precision_is_solving_in_double(concentration):
    """Its condition is of the order of a^3."""
    q = br.Gamma(torch.tensor(concentration), torch.tensor(1.0))
    v = br.Vector([torch.tensor(1.0), torch.tensor(0.5)])
    exact = cast(q, WIDE).fisher_solve(v.map(torch.Tensor.double))
    close(q.fisher_solve(v), exact.map(torch.Tensor.float), 1e-6, 0.0)


@pytest.mark.parametrize("name", ["NormalGamma", "NormalInverseGamma", "NormalInverseWishart"])
def test_the_entropy_of_a_joint_family_does_not_know_where_it_is(name):
    """A shift of x by 1e4, with 1e4 observations of deviation 0.01."""
    entropies = []
    for at in (0.0, 1e4):
        many, one, eye = wide(1e4), wide(1.0), torch.eye(1, dtype=WIDE)
        loc = wide([at])
        made = {
            "NormalGamma": lambda loc=loc, n=many, b=one: br.NormalGamma(loc[0], n, n, b),
            "NormalInverseGamma": lambda loc=loc, n=many, b=one, eye=eye: br.NormalInverseGamma(loc, n * eye, n, b),
            "NormalInverseWishart": lambda loc=loc, n=many, eye=eye: br.NormalInverseWishart(loc, n, n, eye),
        }
        entropies.append(made[name]().entropy())
    close(entropies[1], entropies[0], 1e-6)


# What torch gets wrong


def test_trigamma_is_right_where_torchs_is_off_by_a_billionth():
    """torch's series stops at x^-7; what digamma differentiates to begins 8 further on, where that costs 1e-12."""
    x = torch.logspace(-2, 3, 400, dtype=WIDE)
    exact = torch.from_numpy(scipy.special.polygamma(1, x.numpy()))
    theirs = (torch.polygamma(1, x) / exact - 1).abs().max()
    assert 1e-10 < theirs < 1e-8
    close(trigamma(x), exact, 1e-14, 0.0)
    close(torch.func.grad(lambda x: digamma(x).sum())(x), exact, 1e-12, 0.0)
    close(digamma(x), torch.from_numpy(scipy.special.digamma(x.numpy())), 1e-14)


@pytest.mark.parametrize("family", [br.Beta, br.Dirichlet], ids=lambda f: f.__name__)
def test_natural_parameters_are_a_concentration_less_one_where_torchs_hooks_have_all_of_it(family):
    """Trap 1: their carrier is -sum log x; and it has no mean, so that the hook of the entropy raises."""
    q = family(wide(2.5), wide(1.5)) if family is br.Beta else family(wide([2.5, 1.5]))
    there = q.to_torch()
    theirs = torch.cat([part.flatten() for part in there._natural_params])
    with pytest.raises(NotImplementedError):
        torch.distributions.ExponentialFamily.entropy(there)
    mine = torch.cat([part.flatten() for part in q.natural()])
    close(mine, theirs - 1, 1e-15)
    hook = there._log_normalizer(*there._natural_params)
    close(q.log_partition(), hook.squeeze(), 1e-14)
    close(q.entropy(), there.entropy(), 1e-12)


def test_von_mises_and_poisson_have_what_torchs_have_not():
    """Trap 1, continued: no entropy, no KL of a von Mises; the KL as the integral that it is."""
    q, p = br.VonMises(wide(0.5), wide(1.2)), br.VonMises(wide(-1.0), wide(3.0))
    for call in (q.to_torch().entropy, lambda: kl_divergence(q.to_torch(), p.to_torch())):
        with pytest.raises(NotImplementedError):
            call()
    angles = torch.linspace(-math.pi, math.pi, 201, dtype=WIDE)[1:]
    log_q, log_p = q.log_prob(angles), p.log_prob(angles)
    weights = log_q.exp() * (2 * math.pi / 200)
    close(weights.sum(), wide(1.0), 1e-13)
    close(q.entropy(), -(weights * log_q).sum(), 1e-12)
    close(q.kl(p), (weights * (log_q - log_p)).sum(), 1e-12)


def test_the_kl_of_a_batch_of_wisharts_is_that_of_each():
    """Trap 2: torch sums over the batch, and gives -1.0216 and -0.5575 here."""
    scale = wide([[[1.0, 0.3], [0.3, 2.0]], [[1.5, -0.2], [-0.2, 0.8]]])
    q = br.Wishart(wide([4.0, 6.0]), scale)
    p = br.Wishart(wide([5.0, 4.5]), torch.eye(2, dtype=WIDE).expand(2, 2, 2))
    found = q.kl(p)
    theirs = torch.stack([kl_divergence(q[i].to_torch(), p[i].to_torch()) for i in range(2)])
    close(found, theirs, 1e-12)
    assert (found > 0).all()
    assert not torch.allclose(kl_divergence(q.to_torch(), p.to_torch()), theirs, rtol=0.1)


def test_the_entropy_and_kl_of_a_wishart_have_gradients_in_their_first_argument():
    """Trap 3: torch's hooks detach it."""
    scale = torch.eye(2, dtype=WIDE)
    df = wide(4.0).requires_grad_()
    theirs = kl_divergence(
        torch.distributions.Wishart(df, scale, validate_args=False),
        torch.distributions.Wishart(wide(5.0), scale, validate_args=False),
    )
    (detached,) = torch.autograd.grad(theirs, df, allow_unused=True)
    p = br.Wishart(wide(5.0), scale)
    (ours,) = torch.autograd.grad(br.Wishart(df, scale).kl(p), df)
    h = 1e-5
    slope = (br.Wishart(wide(4 + h), scale).kl(p) - br.Wishart(wide(4 - h), scale).kl(p)) / (2 * h)
    close(ours, slope, 1e-7)
    assert detached is None or (detached - slope).abs() > 1e-3


@pytest.mark.parametrize(("dtype", "logit"), [(SINGLE, 20.0), (WIDE, 40.0), (WIDE, 800.0)], ids=str)
def test_a_sure_bernoulli_is_finite_where_torchs_hooks_are_not(dtype, logit):
    """Trap 4: its natural parameter goes through probabilities, and its A is log1p(exp)."""
    q = br.Bernoulli(torch.tensor(logit, dtype=dtype))
    there = torch.distributions.Bernoulli(logits=q.logits)
    assert there._natural_params[0].isinf()
    assert torch.distributions.ExponentialFamily.entropy(there).isnan()
    close(q.natural()[0], q.logits, 0)
    close(q.log_partition(), q.logits, 1e-7)
    assert 0 <= q.entropy() < 1e-7


@pytest.mark.parametrize("family", [br.Normal, br.Diagonal, br.Isotropic], ids=lambda f: f.__name__)
def test_the_entropy_of_a_normal_far_from_zero_keeps_its_digits(family):
    """Trap 5: torch's hook gives -4.0 for a mean of 100 and a deviation of 0.01 in single precision."""
    mean, precision = torch.tensor([100.0]), torch.tensor([1e4])
    q = family(mean, precision if family is not br.Isotropic else precision[0])
    there = torch.distributions.Normal(mean, precision.rsqrt())
    exact = math.log(2 * math.pi * math.e * 1e-4) / 2
    assert (torch.distributions.ExponentialFamily.entropy(there) - exact).abs() > 0.1
    close(q.entropy().squeeze(), torch.tensor(exact), 1e-6)
    close(q.kl(q).squeeze(), torch.tensor(0.0), 1e-6)


@pytest.mark.parametrize("make", [br.Bernoulli, br.Poisson, br.Exponential], ids=lambda f: f.__name__)
def test_bridges_to_torch_work_within_vmap(make):
    """Trap 6: torch's own checks of arguments may ask for values there, and are not made."""
    parameters = wide([0.5, 1.0, 2.0])
    found = torch.func.vmap(lambda value: make(value).to_torch().log_prob(torch.ones((), dtype=WIDE)))(parameters)
    close(found, make(parameters).log_prob(torch.ones(3, dtype=WIDE)), 1e-12)


def test_torch_gives_a_signed_coin_its_probabilities():
    q = br.SignedBernoulli(wide(0.3))
    close(q.to_torch().log_prob(wide(1.0)), q.log_prob(wide(1.0)), 1e-12)


def test_the_density_of_a_von_mises_has_all_its_digits():
    """torch's Bessel functions are good to 1e-7."""
    q, theta = br.VonMises(wide(0.3), torch.logspace(-2, 4, 25, dtype=WIDE)), wide(0.31)
    exact = torch.from_numpy(scipy.stats.vonmises(q.concentration.numpy(), loc=0.3).logpdf(0.31))
    close(q.log_prob(theta), exact, 1e-11)
    off = (q.to_torch().log_prob(theta) - exact).abs().max()
    assert 1e-10 < off < 1e-4


def test_a_look_without_gradients_does_not_take_them_from_a_member():
    concentration = torch.tensor(2.0, requires_grad=True)
    q = br.Gamma(concentration, torch.tensor(3.0))
    with torch.no_grad():
        q.entropy()
    assert q.entropy().requires_grad
