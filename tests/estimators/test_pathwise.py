"""Gradients through draws that are not Gaussian, against closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.contracts import close, flat, normal

import bayesrule as br

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "estimator_moments.json").read_text())["natural_gradients"]["gamma"]
DOUBLE, NOISE, DRAWS = torch.float64, br.CounterNoise(seed=9, step=1), 20_000
RULE = br.BayesRule(br.Pathwise(), br.Zero(), br.Natural())
DIRECTION = torch.tensor([0.8, -0.5], dtype=DOUBLE)


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def exact(q, expectation):
    """grad_mu of a closed form, a function of a member: F^-1 of autograd's grad_lambda."""
    blocks = [block.clone().requires_grad_() for block in q.natural()]
    gradients = torch.autograd.grad(expectation(q.from_natural(br.Vector(blocks))), blocks)
    # of a matrix the symmetric part
    return q.fisher_solve(br.Vector([(g + g.mT) / 2 if g.dim() == 2 else g for g in gradients]))


def many(q):
    """A batch of copies: as many draws in one look."""
    return type(q)(*(value.expand(DRAWS, *value.shape) for value in vars(q).values() if isinstance(value, torch.Tensor)))


WISHART = br.Wishart(tensor(5.0), tensor([[0.5, 0.1], [0.1, 0.8]]))
CASES = {  # a member, a function of draws, its expectation
    "gamma": (
        br.Gamma(tensor(GOLDEN["shape"]), tensor(GOLDEN["rate"])),
        lambda x: (x**2 + 3 / x).sum(),
        lambda q: q.concentration * (q.concentration + 1) / q.rate**2 + 3 * q.rate / (q.concentration - 1),
    ),
    "gamma below one": (
        br.Gamma(tensor(0.3), tensor(2.0)),
        lambda x: (x**2).sum(),
        lambda q: q.concentration * (q.concentration + 1) / q.rate**2,
    ),
    "inverse gamma": (
        br.InverseGamma(tensor(7.0), tensor(2.0)),
        lambda x: (x**2).sum(),
        lambda q: q.rate**2 / ((q.concentration - 1) * (q.concentration - 2)),
    ),
    "exponential": (br.Exponential(tensor(1.7)), lambda x: (x**2).sum(), lambda q: 2 / q.rate**2),
    "normal": (br.Normal(tensor(0.4), tensor(2.0)), lambda x: (x**3).sum(), lambda q: q.loc**3 + 3 * q.loc / q.precision),
    "beta": (
        br.Beta(tensor(2.0), tensor(3.0)),
        lambda x: (x**2 + 5 * x).sum(),
        lambda q: (
            (q.concentration1 * (q.concentration1 + 1) / (q.concentration1 + q.concentration0 + 1) + 5 * q.concentration1)
            / (q.concentration1 + q.concentration0)
        ),
    ),
    "dirichlet": (
        br.Dirichlet(tensor([0.7, 2.0, 3.0])),
        lambda x: (x[..., 0] * x[..., 1]).sum(),
        lambda q: q.concentration[0] * q.concentration[1] / (q.concentration.sum() * (q.concentration.sum() + 1)),
    ),
    "wishart linear": (
        WISHART,
        lambda w: (w @ DIRECTION @ DIRECTION).sum(),
        lambda q: q.df * (q.scale @ DIRECTION @ DIRECTION),
    ),
    "wishart": (
        WISHART,
        lambda w: (w @ DIRECTION @ DIRECTION).square().sum(),
        lambda q: q.df * (q.df + 2) * (q.scale @ DIRECTION @ DIRECTION) ** 2,
    ),
}


def symmetric(point):
    return br.Vector([(part + part.mT) / 2 if part.dim() > 1 and part.shape[-1] == part.shape[-2] else part for part in point])


@pytest.mark.parametrize("name", CASES)
def test_it_is_unbiased(name):
    """Every number of the natural gradient within 5 standard errors of 20 000 draws."""
    q, function, expectation = CASES[name]
    found = symmetric(RULE.look(many(q), many(q), br.Loss(function), NOISE).gradient)
    for estimates, truth in zip(found, symmetric(exact(q, expectation)), strict=True):
        error = estimates.std(dim=0) / math.sqrt(DRAWS)
        assert error.max() < 0.1 * (1 + flat(exact(q, expectation)).abs().max())  # the test can see something
        assert ((estimates.mean(dim=0) - truth).abs() <= 5 * error + 1e-12).all()


def test_the_closed_forms_are_the_golden_ones():
    q, _, expectation = CASES["gamma"]
    close(flat(exact(q, expectation)), tensor(GOLDEN["natgrad"]), 1e-9)
    close(flat(q.fisher_mul(exact(q, expectation))), tensor(GOLDEN["grad_lambda"]), 1e-9)
    close(expectation(q), tensor(GOLDEN["E_f"]))


def test_of_a_wishart_a_linear_function_has_its_own_matrix():
    q, _, expectation = CASES["wishart linear"]
    first, second = exact(q, expectation)
    close(first, torch.outer(DIRECTION, DIRECTION))
    close(second, tensor(0.0))


def test_it_looks_at_as_many_draws_of_q():
    q, places = br.Gamma(tensor(5.0), tensor(2.0)), []

    def loss(theta):
        places.append(theta.item())
        return br.Loss(torch.sum)(theta)

    found = br.BayesRule(br.Pathwise(4), br.Zero(), br.Natural()).look(q, q, loss, NOISE)
    assert places == [q.sample(NOISE.at(draw=draw)).item() for draw in range(4)]
    close(found.value, tensor(places).mean())


def test_single_precision_stays():
    q = br.Gamma(torch.tensor(5.0), torch.tensor(2.0))
    found = RULE.look(q, q, br.Loss(CASES["gamma"][1]), NOISE)
    assert {part.dtype for part in (found.value, *found.gradient)} == {torch.float32}


def test_of_a_conjugate_loss_it_sees_the_site_on_average():
    """A Poisson likelihood as any loss would be, from two places: minus (sum of the counts, -examples) within 5 standard errors."""
    for q in (br.Gamma(tensor(2.0), tensor(1.5)), br.Gamma(tensor(17.0), tensor(7.5))):
        found = torch.stack(
            list(RULE.look(many(q), many(q), br.Loss(lambda rate: (6 * rate - 15 * rate.log()).sum()), NOISE).gradient)
        )
        error = found.std(dim=-1) / math.sqrt(DRAWS)
        assert ((found.mean(dim=-1) - tensor([-15.0, 6.0])).abs() < 5 * error).all()


class Pair(br.Oracle):
    """The loss x^2 + t of a Vector (x, t)."""

    def __init__(self, theta):
        self.theta = theta

    def value(self):
        return self.theta[0] ** 2 + self.theta[1]

    def gradient(self):
        return br.Vector([2 * self.theta[0], torch.ones_like(self.theta[1])])


BOTH = br.NormalGamma(tensor(0.5), tensor(2.0), tensor(4.0), tensor(3.0))


def test_joint_families_have_gradients_by_vectors():
    """E[x^2 + t] = m^2 + b / (kappa (a - 1)) + a / b."""

    def expectation(q):
        return q.loc**2 + q.rate / (q.kappa * (q.concentration - 1)) + q.concentration / q.rate

    truth = flat(exact(BOTH, expectation))
    found = torch.stack(list(RULE.look(many(BOTH), many(BOTH), Pair, NOISE).gradient))
    error = found.std(dim=-1) / math.sqrt(DRAWS)
    assert ((found.mean(dim=-1) - truth).abs() < 5 * error).all()


def test_joint_families_have_gradients_by_autograd():
    found = RULE.look(BOTH, BOTH, br.Loss(lambda theta: theta[0] ** 2 + theta[1]), NOISE)
    close(flat(found.gradient), flat(RULE.look(BOTH, BOTH, Pair, NOISE).gradient))


def test_a_gaussian_steps_along_its_paths_too():
    q = br.Full(normal(0, 2), torch.eye(2, dtype=DOUBLE))
    RULE.step(q, q, br.Quadratic(torch.eye(2, dtype=DOUBLE), normal(1, 2)), 0.1, NOISE)


@pytest.mark.parametrize("q", [br.Poisson(2.0), br.Bernoulli(0.0), br.VonMises(0.0, 1.0)], ids=lambda q: type(q).__name__)
def test_draws_without_a_derivative_are_refused(q):
    message = rf"^draws of a {type(q).__name__} are not differentiable; use Enumerate or Score$"
    with pytest.raises(TypeError, match=message):
        RULE.look(q, q, br.Loss(torch.sum), NOISE)


def test_no_draws_are_refused():
    q = br.Gamma(2.0, 1.0)
    with pytest.raises(ValueError, match=r"^no look was taken: draws must be at least 1$"):
        br.BayesRule(br.Pathwise(0), br.Zero(), br.Natural()).look(q, q, br.Loss(torch.sum), NOISE)


def test_the_delta_method_is_for_gaussians():
    """Of a Gamma a gradient in one place says nothing yet: a step would be silently wrong."""
    q = br.Gamma(tensor(2.0), tensor(1.0))
    with pytest.raises(TypeError, match="Pathwise"):
        br.BayesRule(br.Delta(), br.Zero(), br.Natural()).step(q, q, br.Loss(torch.sum), 0.1)
