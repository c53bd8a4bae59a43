"""Estimators of one look against the means and variances that quadrature knows; 200 000 looks at once by torch.func.vmap."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.contracts import close, normal, positive, symmetric

import bayesrule as br
from bayesrule.estimators.quadrature import gauss_hermite
from bayesrule.noise import Noise

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "estimator_moments.json").read_text())
DRAWS, DOUBLE = 200_000, torch.float64


def loss(theta):
    """The golden problem's, shape () for theta of shape (1,)."""
    return (3 * torch.nn.functional.softplus(theta) - 1.5 * theta + 0.25 * theta**2).sum()


MEAN, SD = torch.tensor([GOLDEN["m"]], dtype=DOUBLE), GOLDEN["sd"]
FAMILIES = {
    "full": br.Full(MEAN, torch.eye(1, dtype=DOUBLE) / SD**2),
    "diagonal": br.Diagonal(MEAN, torch.ones(1, dtype=DOUBLE) / SD**2),
}


@dataclass(frozen=True)
class Given(Noise):
    """Numbers that are already drawn, shape (draws, ...)."""

    numbers: torch.Tensor
    draw: int = 0

    def normal(self, like):
        return self.numbers[self.draw].view(like.shape)

    uniform = normal

    def at(self, *, step=None, draw=None):
        return Given(self.numbers, self.draw if draw is None else draw)

    def apart(self, stream):
        return self


def looks(q, expectation, curvature, draws=DRAWS, function=loss, prior=None, kind="normal"):
    """Independent looks: values (draws,), gradients (draws, D) and curvatures (draws, ...)."""
    each = max(expectation.draws, curvature.draws, 1)
    numbers = getattr(br.CounterNoise(seed=5), kind)(torch.zeros(draws, each, q.mean.numel(), dtype=DOUBLE))
    oracle = function if callable(getattr(function, "expected", None)) or isinstance(function, br.Quadratic) else br.Loss(function)
    rule = br.BayesRule(expectation, curvature, br.Natural())

    def look(numbers):
        value, gradient, matrix = rule.look(q, q if prior is None else prior, oracle, Given(numbers))
        return value, gradient, torch.zeros(()) if matrix is None else matrix

    return torch.func.vmap(look)(numbers)


def fits(found, mean, variance, within=0.1):
    """Mean within 5 standard errors, which are known, and variance within 10 percent."""
    found = found.reshape(len(found), -1)[:, 0]
    assert abs(found.mean().item() - mean) < 5 * math.sqrt(variance / len(found))
    assert abs(found.var().item() / variance - 1) < within


GRADIENT, HESSIAN, ELBO = GOLDEN["grad_mean"], GOLDEN["hess"], GOLDEN["elbo_grad_mean"]
STL_PRICE = GOLDEN["elbo_grad_logsd"]["stl"]["var"] / SD**4  # the derivative in the log deviation is the variance times it
MONTE = br.MonteCarlo()
CASES = {  # expectation, curvature, which part of the look, exact mean, variance
    "value": (MONTE, br.Zero(), 0, *GOLDEN["E_f"].values()),
    "gradient": (MONTE, br.Zero(), 1, *GRADIENT["reparam"].values()),
    "gradient stl": (br.MonteCarlo(control_variate="stl"), br.Zero(), 1, *ELBO["stl"].values()),
    "hessian": (MONTE, br.Hessian(), 2, *HESSIAN["sampled_hessian"].values()),
    "price": (MONTE, br.Reparameterized(), 2, *HESSIAN["reparam_price"].values()),
    "price of a pair": (br.MonteCarlo(2, True), br.Reparameterized(), 2, *HESSIAN["reparam_price_antithetic_pair"].values()),
    "price stl": (MONTE, br.Reparameterized("stl"), 2, HESSIAN["exact"], STL_PRICE),
    "squared gradient": (MONTE, br.SquaredGradient(), 2, *HESSIAN["squared_grad"].values()),
    "score": (br.Score(1, None), br.Zero(), 1, *GRADIENT["score"].values()),
    "score mean": (br.Score(1, GOLDEN["E_f"]["mean"]), br.Zero(), 1, *GRADIENT["score_with_mean_baseline"].values()),
    "score curvature": (br.Score(1, None), br.Zero(), 2, *HESSIAN["score_second_order"].values()),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_are_the_golden_ones(case, family):
    expectation, curvature, part, mean, variance = CASES[case]
    fits(looks(FAMILIES[family], expectation, curvature)[part], mean, variance)


def test_the_cheap_estimators_order_as_they_must():
    """By the golden variances: stl below plain, pair below single, baseline below none."""
    assert ELBO["stl"]["var"] < GRADIENT["reparam"]["var"] < GRADIENT["score_with_mean_baseline"]["var"] < GRADIENT["score"]["var"]
    assert STL_PRICE < HESSIAN["reparam_price_antithetic_pair"]["var"] < HESSIAN["reparam_price"]["var"]
    assert abs(STL_PRICE - 1.09) < 0.005


@pytest.mark.parametrize("part", [1, 2], ids=["gradient", "curvature"])
def test_leaving_one_out_is_unbiased_and_its_variance_is_that_of_a_double_quadrature(part):
    """Two draws: (f - f') (s - s') / 2, with s the score of the mean or of the curvature."""
    z, weights = torch.tensor(gauss_hermite(120), dtype=torch.float64).T
    f = torch.func.vmap(loss)(MEAN + SD * z[:, None])
    score = z / SD if part == 1 else (z**2 - 1) / SD**2
    estimate = (f[:, None] - f) * (score[:, None] - score) / 2
    pair = weights[:, None] * weights
    mean, second = (pair * estimate).sum().item(), (pair * estimate**2).sum().item()
    exact = GRADIENT["exact"] if part == 1 else HESSIAN["exact"]
    assert abs(mean - exact) < 1e-10
    fits(looks(FAMILIES["full"], br.Score(2), br.Zero())[part], exact, second - mean**2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_over_draws_has_the_variance_over_draws(family):
    for draws in (4, 16):
        found = looks(FAMILIES[family], br.MonteCarlo(draws), br.Hessian(), 20_000)
        fits(found[1], GRADIENT["exact"], GRADIENT["reparam"]["var"] / draws)
        fits(found[2], HESSIAN["exact"], HESSIAN["sampled_hessian"]["var"] / draws)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_mean_alone_there_is_a_bias_and_no_noise(family):
    q = FAMILIES[family]
    for expectation in (br.Delta(), br.MonteCarlo(2, antithetic=True)):
        found = br.BayesRule(expectation, br.Hessian(), br.Natural()).look(
            br.Full(q.mean, q.hess.reshape(1, 1), ess=math.inf), q, br.Loss(loss), br.CounterNoise()
        )
        close(found.gradient, torch.tensor([GRADIENT["delta"]], dtype=DOUBLE))
        close(found.curvature, torch.tensor([[HESSIAN["delta"]]], dtype=DOUBLE))


# Control variates where q is the posterior of a quadratic loss

SIZE, ESS, DECAY = 3, 7.0, 0.6
MATRIX = positive(1, SIZE)


def posterior(family, center):
    """The posterior, its prior and its loss, from a prior with weight decay around a center."""
    matrix = MATRIX if family is br.Full else MATRIX.diagonal().diag()
    b, center = normal(2, SIZE), center * normal(3, SIZE)
    mean = torch.linalg.solve(matrix + DECAY * torch.eye(SIZE, dtype=DOUBLE), b + DECAY * center)
    decay = DECAY * torch.eye(SIZE, dtype=DOUBLE) if family is br.Full else DECAY
    kept = matrix if family is br.Full else matrix.diagonal()
    return family(mean, kept, decay, ESS), family(center, decay, ess=ESS), br.Quadratic(matrix, b)


def variances(family, expectation, curvature, center):
    q, prior, quadratic = posterior(family, center)
    _, gradients, curvatures = looks(q, expectation, curvature, 200, quadratic, prior)
    assert gradients.shape == (200, SIZE)
    return gradients, curvatures


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("family", [br.Full, br.Diagonal])
def test_the_control_variate_takes_all_noise_from_the_gradient(family, center):
    q, _, quadratic = posterior(family, center)
    gradients, curvatures = variances(family, br.MonteCarlo(control_variate="stl"), br.Hessian(), center)
    assert gradients.var(dim=0).max() < 1e-20
    close(gradients[0], quadratic(q.mean).gradient())
    assert variances(family, br.MonteCarlo(), br.Zero(), center)[0].var(dim=0).max() > 1e-2
    assert curvatures.var(dim=0).max() == 0  # sampled Hessians of a quadratic have no noise anyway


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("family", [br.Full, br.Diagonal])
def test_the_control_variate_takes_all_noise_from_the_curvature(family, center):
    q, _, _ = posterior(family, center)
    _, curvatures = variances(family, br.MonteCarlo(), br.Reparameterized("stl"), center)
    assert curvatures.var(dim=0).max() < 1e-20
    close(curvatures[0], q.hess)


@pytest.mark.parametrize("family", [br.Full, br.Diagonal])
def test_without_a_prior_it_takes_all_noise_from_the_curvature(family):
    """Then the loss's own gradient is zero at the mean."""
    q, _, quadratic = posterior(family, 0.0)
    flat = family(q.mean, q.hess * 0, ess=ESS)
    q = family(torch.linalg.solve(quadratic.matrix, quadratic.vector), q.hess, q.hess * 0, ESS)
    *_, curvatures = looks(q, br.MonteCarlo(), br.Reparameterized("stl"), 200, quadratic, flat)
    assert curvatures.var(dim=0).max() < 1e-20
    close(curvatures[0], q.hess)
    *_, plain = looks(q, br.MonteCarlo(), br.Reparameterized(), 200, quadratic, flat)
    assert plain.var(dim=0).max() > 1e-2


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("family", [br.Full, br.Diagonal])
def test_far_from_the_posterior_control_variates_leave_the_mean(family, center):
    """Of a q with another curvature and mean, for every element within 5 standard errors."""
    q, prior, quadratic = posterior(family, center)
    q = q.moved(mean=normal(8, SIZE), hess=2 * q.hess)
    _, gradients, curvatures = looks(q, br.MonteCarlo(control_variate="stl"), br.Reparameterized("stl"), 20_000, quadratic, prior)
    for found, exact in ((gradients, quadratic(q.mean).gradient()), (curvatures, q.project(quadratic.matrix))):
        assert ((found.mean(dim=0) - exact).abs() <= 5 * found.std(dim=0) / math.sqrt(len(found)) + 1e-12).all()


# Hutchinson's probes

HESSIANS = {
    "symmetric": symmetric(6, 5),
    "diagonal": normal(7, 5).diag(),
    "indefinite": symmetric(8, 5) - torch.eye(5, dtype=DOUBLE),
}


def probes(matrix, family, draws=1):
    """Every choice of signs once."""
    signs = torch.cartesian_prod(*[torch.tensor([0.25, 0.75], dtype=DOUBLE)] * 5)
    q, oracle = family(torch.zeros(5, dtype=DOUBLE), 1.0), br.Quadratic(matrix, torch.zeros(5, dtype=DOUBLE))
    rule = br.BayesRule(br.Delta(), br.Hutchinson(draws), br.Natural())
    return torch.func.vmap(lambda u: rule.look(q, q, oracle, Given(u)).curvature)(signs[:, None])


@pytest.mark.parametrize("matrix", HESSIANS.values(), ids=HESSIANS)
class TestHutchinson:
    def test_over_all_signs_it_has_the_mean_and_the_variance_that_it_says(self, matrix):
        found = probes(matrix, br.Diagonal)
        close(found.mean(dim=0), matrix.diagonal())
        close(found.var(dim=0, correction=0), (matrix - matrix.diagonal().diag()).square().sum(dim=1))

    def test_in_a_family_of_matrices_it_estimates_all_of_the_hessian(self, matrix):
        found = probes(matrix, br.Full)
        close(found.mean(dim=0), matrix)
        close(found, found.mT)

    def test_in_one_number_it_estimates_the_mean_of_the_diagonal(self, matrix):
        close(probes(matrix, br.Isotropic).mean(dim=0), matrix.diagonal().mean())

    @pytest.mark.parametrize("draws", [1, 4])
    def test_by_counter_noise_too(self, matrix, draws):
        """1000 looks at as many steps: 5 standard errors of the known variance, elements one by one."""
        q, oracle = br.Diagonal(torch.zeros(5, dtype=DOUBLE), 1.0), br.Quadratic(matrix, torch.zeros(5, dtype=DOUBLE))
        rule = br.BayesRule(br.Delta(), br.Hutchinson(draws), br.Natural())
        found = torch.stack([rule.look(q, q, oracle, br.CounterNoise(1, step=step)).curvature for step in range(1000)])
        variance = (matrix - matrix.diagonal().diag()).square().sum(dim=1) / draws
        assert ((found.mean(dim=0) - matrix.diagonal()).abs() <= 5 * (variance / 1000).sqrt() + 1e-12).all()
        assert ((found.var(dim=0) / variance.clamp(min=1e-30) - 1).abs() < 0.15).all() or variance.max() == 0


def test_hutchinson_is_right_at_once_for_diagonal_hessians():
    assert probes(HESSIANS["diagonal"], br.Diagonal).var(dim=0).max() < 1e-30


def test_hutchinson_of_a_function_goes_by_products_alone():
    """Averaged over all signs, the diagonal of autograd's Hessian."""

    def bumpy(theta):
        return (theta[0] * theta[1:]).sin().sum() + theta.exp().sum()

    q = br.Diagonal(normal(0, 5), 1.0)
    signs = torch.cartesian_prod(*[torch.tensor([0.25, 0.75], dtype=DOUBLE)] * 5)
    rule = br.BayesRule(br.Delta(), br.Hutchinson(), br.Natural())
    found = torch.func.vmap(lambda u: rule.look(q, q, br.Loss(bumpy), Given(u)).curvature)(signs[:, None])
    close(found.mean(dim=0), torch.autograd.functional.hessian(bumpy, q.mean).diagonal())


def test_probes_are_not_the_draws_of_theta():
    """Both come from one look's noise, in two streams."""
    q, noise = br.Diagonal(torch.zeros(64, dtype=DOUBLE), 1.0), br.CounterNoise(3, step=1)
    oracle = br.Quadratic(symmetric(6, 64), torch.zeros(64, dtype=DOUBLE))
    seen = br.Hutchinson().at(noise, 0)
    signs = (seen.noise.at(draw=0).uniform(q.mean) - 0.5).sign()
    close(
        br.BayesRule(br.Delta(), br.Hutchinson(), br.Natural()).look(q, q, oracle, noise).curvature, signs * (oracle.matrix @ signs)
    )
    assert not torch.equal(signs, (noise.at(draw=0).uniform(q.mean) - 0.5).sign())
    assert abs((signs * q.draw(noise.at(draw=0)).sign()).mean()) < 0.5


def test_every_draw_of_theta_has_probes_of_its_own():
    """64 draws with a probe each are 64 probes: the variance is a 64th."""
    matrix = HESSIANS["symmetric"]
    q, oracle = br.Diagonal(torch.zeros(5, dtype=DOUBLE), 1.0), br.Quadratic(matrix, torch.zeros(5, dtype=DOUBLE))
    rule = br.BayesRule(br.MonteCarlo(64), br.Hutchinson(), br.Natural())
    found = torch.stack([rule.look(q, q, oracle, br.CounterNoise(1, step=step)).curvature for step in range(50)])
    variance = (matrix - matrix.diagonal().diag()).square().sum(dim=1)
    assert (found.var(dim=0) < variance / 16).all()


def test_hutchinson_without_noise_says_how_to_draw():
    q, quadratic = br.Diagonal(torch.zeros(5, dtype=DOUBLE), 1.0), br.Quadratic(symmetric(6, 5), normal(0, 5))
    with pytest.raises(ValueError, match=r"^this rule draws: pass noise=CounterNoise\(seed, step=t\)"):
        br.BayesRule(br.Delta(), br.Hutchinson(), br.Natural()).look(q, q, quadratic)
    with pytest.raises(ValueError, match=r"^Hutchinson draws: look through BayesRule.look"):
        br.Hutchinson()(q, q, None, quadratic(q.mean))
