import math

import pytest
import torch
from tests.contracts import close, normal, positive, symmetric
from torch.nn.functional import binary_cross_entropy_with_logits

import bayesrule as br
from bayesrule.estimators.oracle import Seen

SIZE, NOISE = 4, br.CounterNoise(seed=21)
MEAN = normal(0, SIZE)
FAMILIES = {
    "isotropic": br.Isotropic(MEAN, torch.tensor(1.5, dtype=torch.float64), 0.25, ess=3.0),
    "diagonal": br.Diagonal(MEAN, normal(1, SIZE).abs() + 0.5, 0.25, ess=3.0),
    "full": br.Full(MEAN, positive(1, SIZE), 0.25, ess=3.0),
}
PRIORS = {name: type(q)(normal(2, SIZE), 0.75, ess=3.0) for name, q in FAMILIES.items()}
CURVATURES = {
    "zero": br.Zero(),
    "squared": br.SquaredGradient(),
    "reparameterized": br.Reparameterized(),
    "gauss-newton": br.GaussNewton(),
    "hessian": br.Hessian(),
}

X, Y = normal(3, 9, SIZE), (normal(4, 9) > 0).double()
LOGISTIC = br.ModelLoss(lambda theta: X @ theta, binary_cross_entropy_with_logits, Y)


def at(curvature, name, loss=LOGISTIC, offset=None):
    q = FAMILIES[name]
    return curvature(q, PRIORS[name], offset, loss(q.mean if offset is None else q.mean + offset))


def test_zero_leaves_the_precision_alone():
    assert at(br.Zero(), "full") is None
    prior = PRIORS["diagonal"]
    q = FAMILIES["diagonal"].under(prior)
    assert br.BayesRule(br.Delta(), br.Zero(), br.Additive()).step(q, prior, LOGISTIC, 0.5).hess is q.hess


@pytest.mark.parametrize("name", FAMILIES)
class TestStructures:
    """Every curvature comes in the structure of the family."""

    def test_hessian_is_kept_in_part(self, name):
        close(at(br.Hessian(), name), FAMILIES[name].project(LOGISTIC(MEAN).hessian()))

    def test_gauss_newton_is_kept_in_part(self, name):
        close(at(br.GaussNewton(), name), FAMILIES[name].project(LOGISTIC(MEAN).gauss_newton()))

    def test_gauss_newton_equals_the_hessian_of_a_model_with_linear_outputs(self, name):
        close(at(br.GaussNewton(), name), at(br.Hessian(), name))

    def test_squared_gradient_is_the_square_of_the_mean_gradient(self, name):
        g = LOGISTIC(MEAN).gradient()
        close(at(br.SquaredGradient(), name), FAMILIES[name].project(torch.outer(g, g)))

    @pytest.mark.parametrize("scale", [0.5, 7.0])
    def test_squared_gradient_is_scaled(self, name, scale):
        close(at(br.SquaredGradient(scale), name), scale * at(br.SquaredGradient(), name))

    @pytest.mark.parametrize("scale", [1.0, 7.0])
    def test_squared_gradient_takes_the_priors_gradient_along_before_it_squares(self, name, scale):
        g = LOGISTIC(MEAN).gradient() + 0.75 * (MEAN - PRIORS[name].mean)
        close(at(br.SquaredGradient(scale, "loss+prior"), name), scale * FAMILIES[name].project(torch.outer(g, g)))

    def test_squared_gradient_is_never_negative(self, name):
        square = at(br.SquaredGradient(), name)
        assert (torch.linalg.eigvalsh(square) > -1e-14).all() if square.dim() == 2 else (square >= 0).all()

    def test_reparameterized_says_nothing_at_the_mean(self, name):
        assert at(br.Reparameterized(), name) is None

    def test_reparameterized_is_prices_product(self, name):
        q, offset = FAMILIES[name], normal(5, SIZE)
        g = LOGISTIC(MEAN + offset).gradient()
        close(
            at(br.Reparameterized(), name, offset=offset),
            q.outer(q.precision * offset if name != "full" else q.precision @ offset, g),
        )

    @pytest.mark.parametrize("curvature", list(CURVATURES.values())[1:], ids=list(CURVATURES)[1:])
    def test_degree_is_the_power_of_the_losss_scale(self, name, curvature):
        offset = normal(5, SIZE)
        one, three = (
            at(curvature, name, br.ModelLoss(LOGISTIC.outputs, lambda f, y, c=c: c * LOGISTIC.losses(f, y), Y), offset)
            for c in (1.0, 3.0)
        )
        close(three, 3.0**curvature.degree * one)


QUADRATIC = br.Quadratic(symmetric(6, SIZE), normal(7, SIZE))


def estimates(q, draws, loss=QUADRATIC):
    """Price's estimates at many draws."""
    made = []
    for draw in range(draws):
        offset = br.MonteCarlo().offset(q, NOISE, draw)
        made.append(br.Reparameterized()(q, q, offset, loss(q.mean + offset)))
    return torch.stack(made)


@pytest.mark.parametrize("name", FAMILIES)
class TestReparameterized:
    def test_is_unbiased_for_a_quadratic(self, name):
        """Within 5 standard errors of 2000 draws, element by element."""
        made = estimates(FAMILIES[name], 2000)
        error = made.std(dim=0) / math.sqrt(len(made))
        assert ((made.mean(dim=0) - FAMILIES[name].project(QUADRATIC.matrix)).abs() < 5 * error).all()

    def test_is_unbiased_for_the_expected_hessian_where_that_is_not_the_hessian_at_the_mean(self, name):
        """E of the second derivative of exp(c theta) is c c^T exp(c m + c V c / 2)."""
        q, c = FAMILIES[name], normal(8, SIZE) / 2
        expected = q.project(torch.outer(c, c) * (c @ q.mean + c @ q.solve(c) / 2).exp())
        made = estimates(q, 2000, br.Loss(lambda theta: (c @ theta).exp()))
        error = made.std(dim=0) / math.sqrt(len(made))
        assert ((made.mean(dim=0) - expected).abs() < 5 * error).all()

    def test_its_error_falls_with_the_root_of_the_draws(self, name):
        """Root mean square error of means over 2 and over 32 draws: 1/4, within 20 percent."""
        made = estimates(FAMILIES[name], 3200) - FAMILIES[name].project(QUADRATIC.matrix)

        def error(draws):
            return made.unflatten(0, (-1, draws)).mean(dim=1).square().mean().sqrt()

        assert 0.8 < 4 * error(32) / error(2) < 1.2

    def test_its_noise_grows_with_the_gradient_at_the_mean(self, name):
        steep = br.Quadratic(QUADRATIC.matrix, 100 * QUADRATIC.vector)
        assert estimates(FAMILIES[name], 200, steep).std() > 10 * estimates(FAMILIES[name], 200).std()


@pytest.mark.parametrize(
    ("curvature", "oracle", "what"),
    [
        (br.Hessian(), Seen(MEAN), "Seen cannot give the Hessian"),
        (br.GaussNewton(), Seen(MEAN), "Seen cannot give the Gauss-Newton matrix"),
        (br.GaussNewton(), br.Loss(torch.sum)(MEAN), "cannot give the Gauss-Newton matrix"),
    ],
)
def test_a_curvature_that_asks_too_much_of_an_oracle_is_told_so(curvature, oracle, what):
    with pytest.raises(TypeError, match=f"{what}; use another curvature or another oracle"):
        curvature(FAMILIES["full"], PRIORS["full"], None, oracle)


def test_vectors_have_curvatures_by_gradients():
    def two(seed):
        return br.Vector([normal(seed, 2, 2), normal(seed + 50, 3)])

    q, prior = br.Diagonal(two(0), two(1) * 0 + 2.0, ess=3.0), br.Diagonal(two(2), 0.75, ess=3.0)
    offset, g = two(3), two(4)
    for curvature, expected in [
        (br.SquaredGradient(2.0), 2 * g * g),
        (br.SquaredGradient(1.0, "loss+prior"), (g + 0.75 * (q.mean - prior.mean)) ** 2),
        (br.Reparameterized(), 6 * offset * g),
    ]:
        for got, part in zip(curvature(q, prior, offset, Seen(g)), expected, strict=True):
            close(got, part)


class Elements(br.Oracle):
    """The loss sum c theta^4: its Hessian is a diagonal, and it knows it."""

    c = normal(12, SIZE)

    def __init__(self, theta):
        self.theta = theta

    def value(self):
        return (self.c * self.theta**4).sum()

    def gradient(self):
        return 4 * self.c * self.theta**3

    def diagonal(self):
        return 12 * self.c * self.theta**2

    def hessian(self):
        return self.diagonal().diag()


class TestDiagonalHessian:
    def test_is_the_diagonal_that_the_oracle_knows(self):
        q = FAMILIES["diagonal"]
        assert torch.equal(at(br.DiagonalHessian(), "diagonal", Elements), Elements(MEAN).diagonal())
        rules = [br.BayesRule(br.Delta(), curvature, br.Additive()) for curvature in (br.DiagonalHessian(), br.Hessian())]
        known, projected = (rule.step(q, PRIORS["diagonal"], Elements, 0.1) for rule in rules)
        close(known.mean, projected.mean)
        close(known.hess, projected.hess)

    def test_is_taken_where_the_draw_looked(self):
        offset = normal(5, SIZE)
        close(at(br.DiagonalHessian(), "diagonal", Elements, offset), Elements(MEAN + offset).diagonal())

    def test_has_no_noise_of_its_own_and_one_power_of_the_loss(self):
        assert br.DiagonalHessian.draws == 0
        assert br.DiagonalHessian.degree == 1

    @pytest.mark.parametrize(
        "oracle", [Seen(MEAN), br.Loss(torch.sum)(MEAN), QUADRATIC(MEAN), LOGISTIC(MEAN)], ids=lambda o: type(o).__name__
    )
    def test_an_oracle_that_does_not_know_it_says_so(self, oracle):
        q = FAMILIES["diagonal"]
        with pytest.raises(TypeError, match="cannot give the diagonal of the Hessian; use another curvature or another oracle"):
            br.DiagonalHessian()(q, q, None, oracle)

    @pytest.mark.parametrize("name", ["full", "isotropic"])
    def test_comes_in_the_structure_of_the_family(self, name):
        found, expected = at(br.DiagonalHessian(), name, Elements), at(br.Hessian(), name, Elements)
        assert found.shape == expected.shape
        close(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
class TestControlVariate:
    def test_subtracts_what_the_curvature_of_q_would_show_and_adds_it_back(self, name):
        q, offset = FAMILIES[name], normal(5, SIZE)
        rest = LOGISTIC(MEAN + offset).gradient() + q.prior_gradient(PRIORS[name]) - q.bend(offset)
        product = q.outer(q.stretch(offset) * q.ess, rest)
        close(at(br.Reparameterized("stl"), name, offset=offset), product + q.hess)

    def test_says_nothing_at_the_mean(self, name):
        assert at(br.Reparameterized("stl"), name) is None

    def test_gradients_lose_the_same(self, name):
        q = FAMILIES[name]
        plain, less = (
            br.BayesRule(br.MonteCarlo(control_variate=which), br.Hessian(), br.Additive()).look(q, q, LOGISTIC, NOISE)
            for which in (None, "stl")
        )
        close(less.gradient, plain.gradient - q.bend(br.MonteCarlo().offset(q, NOISE, 0)))
        close(less.curvature, plain.curvature, 0)
        close(less.value, plain.value, 0)
