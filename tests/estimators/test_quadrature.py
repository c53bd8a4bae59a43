"""Expectations without noise: Gauss-Hermite quadrature, and losses that know their own."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.contracts import close, normal, positive

import bayesrule as br
from bayesrule.estimators.quadrature import gauss_hermite

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "estimator_moments.json").read_text())
NATURAL = GOLDEN["natural_gradients"]
DOUBLE = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def look(q, function, nodes=20, curvature=None):
    loss = function if isinstance(function, br.Quadratic | Tilted) else br.Loss(function)
    return br.BayesRule(br.GaussHermite(nodes), curvature or br.Hessian(), br.Natural()).look(q, q, loss)


@dataclass(frozen=True)
class Tilted:
    """The golden loss exp(a theta) + theta Q theta / 2."""

    a: torch.Tensor
    Q: torch.Tensor

    def __call__(self, theta):
        return TiltedAt(self.a, self.Q, theta)


@dataclass(frozen=True)
class TiltedAt(br.Oracle):
    a: torch.Tensor
    Q: torch.Tensor
    theta: torch.Tensor

    def value(self):
        return (self.a @ self.theta).exp() + self.theta @ self.Q @ self.theta / 2

    def gradient(self):
        return (self.a @ self.theta).exp() * self.a + self.Q @ self.theta

    def hessian(self):
        return (self.a @ self.theta).exp() * torch.outer(self.a, self.a) + self.Q


TILTED = Tilted(tensor(NATURAL["full"]["a"]), tensor(NATURAL["full"]["Q"]))


def golden_member(name):
    case = NATURAL[name]
    mean = tensor(NATURAL["full"]["mean"])
    if name == "full":
        return br.Full(mean, torch.linalg.inv(tensor(case["cov"])))
    if name == "diag":
        return br.Diagonal(mean, 1 / tensor(case["var"]))
    return br.Isotropic(mean, tensor(case["precision"]))


class TestGaussHermite:
    @pytest.mark.parametrize("nodes", [1, 2, 3, 7, 20])
    def test_is_exact_for_polynomials_of_degree_below_twice_the_nodes(self, nodes):
        """The moments of the unit normal, and the first that it misses."""
        q = br.Full(torch.zeros(1, dtype=DOUBLE), 1.0)
        for degree in range(2 * nodes + 1):
            moment = math.prod(range(degree - 1, 0, -2)) if degree % 2 == 0 else 0.0
            found = look(q, lambda x, degree=degree: (x**degree).sum(), nodes, br.Zero()).value.item()
            scale = math.prod(range(degree, 0, -2)) or 1
            assert (abs(found - moment) < 1e-12 * scale) == (degree < 2 * nodes), (degree, found, moment)

    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("family", [br.Full, br.Diagonal, br.Isotropic])
    def test_knows_value_gradient_and_hessian_of_a_quartic(self, family, size):
        """Of (c theta)^4 in up to three dimensions, whatever the correlations and the ess."""
        hess = {br.Full: positive(1, size), br.Diagonal: positive(1, size).diagonal(), br.Isotropic: tensor(1.7)}[family]
        q, c = family(normal(0, size), hess, 0.3, 2.5), normal(5, size)
        m, v = q.mean @ c, q.solve(c) @ c
        found = look(q, lambda theta: (c @ theta) ** 4, 3)
        close(found.value, m**4 + 6 * m**2 * v + 3 * v**2)
        close(found.gradient, 4 * (m**3 + 3 * m * v) * c)
        close(found.curvature, q.project(12 * (m**2 + v) * torch.outer(c, c)))

    @pytest.mark.parametrize("name", ["full", "diag", "isotropic"])
    def test_natural_gradients_and_steps_are_the_golden_ones(self, name):
        case, q = NATURAL[name], golden_member(name)
        found = look(q, TILTED, 10)
        close(found.gradient, tensor(case["E_grad"]))
        if "E_f" in case:
            close(found.value, tensor(case["E_f"]))
        curvature = tensor(case["E_hess" if name == "full" else "E_hess_diag" if name == "diag" else "E_trace_hess"])
        close(found.curvature, curvature / 3 if name == "isotropic" else curvature)
        first, second = q.natural_gradient(found)
        close(first, tensor(case["natgrad_lambda1"]))
        close(second, tensor(case["natgrad_lambda2"]))
        flat = type(q)(q.mean * 0, q.hess * 0)
        moved = br.BayesRule(br.GaussHermite(10), br.Hessian(), br.Natural()).step(q, flat, TILTED, 0.2)
        close(moved.precision, tensor(case["blr_step_rho_0p2"]["precision"]))
        close(moved.mean, tensor(case["blr_step_rho_0p2"]["mean"]))

    def test_the_improved_step_is_the_golden_one(self):
        """There both move from the old precision."""
        q, stored = golden_member("full"), NATURAL["full"]["iblr_step_rho_0p2"]
        flat = br.Full(q.mean * 0, q.hess * 0)
        moved = br.BayesRule(br.GaussHermite(10), br.Hessian(), br.Riemannian(mean_precision="old")).step(q, flat, TILTED, 0.2)
        close(moved.precision, tensor(stored["precision"]))
        close(moved.mean, tensor(stored["mean"]))

    def test_doubling_the_nodes_converges_to_the_golden_expectations(self):
        q = br.Full(tensor([GOLDEN["m"]]), 1 / GOLDEN["sd"] ** 2)
        exact = [GOLDEN["E_f"]["mean"], GOLDEN["grad_mean"]["exact"], GOLDEN["hess"]["exact"]]
        errors = []
        for nodes in (2, 4, 8, 16, 32, 64):
            found = look(q, lambda t: (3 * torch.nn.functional.softplus(t) - 1.5 * t + 0.25 * t**2).sum(), nodes)
            errors.append(torch.cat([part.reshape(-1) for part in found]) - tensor(exact))
        sizes = torch.stack(errors).abs()
        assert (sizes[1:] < sizes[:-1] / 4).logical_or(sizes[1:] < 1e-12).all()
        assert sizes[-1].max() < 1e-12

    def test_price_through_the_nodes_is_the_expected_hessian(self):
        """A curvature that needs offsets gets them."""
        q = br.Full(tensor([GOLDEN["m"]]), 1 / GOLDEN["sd"] ** 2)

        def function(t):
            return (3 * torch.nn.functional.softplus(t) - 1.5 * t + 0.25 * t**2).sum()

        close(look(q, function, 64, br.Reparameterized()).curvature, tensor([[GOLDEN["hess"]["exact"]]]), 1e-9)

    def test_a_q_without_spread_is_looked_at_in_its_mean(self):
        q, A, b = br.Full(normal(0, 2), 1.0, ess=math.inf), positive(1, 2), normal(2, 2)
        close(look(q, br.Quadratic(A, b), 4).gradient, A @ q.mean - b)

    def test_single_precision_stays_and_noise_is_not_asked(self):
        q = br.Diagonal(normal(0, 2).float(), 1.0)
        found = look(q, lambda x: (x**2).sum(), 4)
        assert {part.dtype for part in found} == {torch.float32}
        close(found.value, (q.mean**2).sum() + 2, 1e-5)
        assert br.GaussHermite().draws == 0

    def test_nodes_and_weights_are_those_of_the_unit_normal(self):
        at, weights = torch.tensor(gauss_hermite(30), dtype=torch.float64).T
        close(weights.sum(), tensor(1.0), 1e-14)
        close((weights * at**2).sum(), tensor(1.0), 1e-13)
        close(at, -at.flip(0), 1e-13)

    @pytest.mark.parametrize("nodes", [0, -3, 201, 400, 2.5])
    def test_nodes_out_of_range_are_refused(self, nodes):
        with pytest.raises(ValueError, match=rf"^nodes must be a whole number from 1 to 200, got {nodes}$"):
            br.GaussHermite(nodes)

    def test_many_nodes_are_no_less_exact(self):
        close(look(br.Full(torch.zeros(1, dtype=DOUBLE), 1.0), lambda x: (x**2).sum(), 200, br.Zero()).value, tensor(1.0))

    @pytest.mark.parametrize("family", [br.Full, br.Diagonal])
    def test_more_than_three_dimensions_are_refused(self, family):
        message = r"^a grid of 20 nodes in each of 4 dimensions is too large: use MonteCarlo, or Exact$"
        with pytest.raises(ValueError, match=message):
            look(family(torch.zeros(4), 1.0), torch.sum)

    @pytest.mark.parametrize("q", [br.Gamma(1.0, 1.0), br.Bernoulli(0.0)], ids=["Gamma", "Bernoulli"])
    def test_other_families_have_no_grid(self, q):
        with pytest.raises(
            TypeError,
            match=rf"^a {type(q).__name__} has no quadrature grid; use Enumerate if it is finite, else Pathwise or Score$",
        ):
            look(q, torch.sum)


@pytest.mark.parametrize(
    "expectation", [br.GaussHermite(), br.Exact(), br.Enumerate(), br.Score(), br.Pathwise()], ids=lambda e: type(e).__name__
)
def test_an_optimizer_that_asks_for_single_draws_is_told_what_it_needs(expectation):
    name = type(expectation).__name__
    with pytest.raises(TypeError, match=rf"^{name} does not look at single draws; an optimizer needs Delta or MonteCarlo$"):
        expectation.offset(br.Full(torch.zeros(1), 1.0), br.CounterNoise(), 0)


@dataclass(frozen=True)
class Knowing:
    """A loss that says what it expects, and refuses to be looked at in one place."""

    def __call__(self, theta):
        raise AssertionError("nobody was to look here")

    def expected(self, q):
        return br.Look(q.mean.sum(), q.mean * 2, None)


class TestExact:
    def test_is_what_the_loss_says(self):
        q = br.Full(normal(0, 3), 1.0)
        found = br.BayesRule(br.Exact(), br.Hessian(), br.Natural()).look(q, q, Knowing())  # the curvature is not asked
        close(found.value, q.mean.sum(), 0)
        close(found.gradient, q.mean * 2, 0)
        assert found.curvature is None
        assert br.Exact().draws == 0

    @pytest.mark.parametrize("loss", [br.Loss(torch.sum), br.Quadratic(torch.eye(3), torch.zeros(3))], ids=["Loss", "Quadratic"])
    def test_a_loss_that_does_not_know_is_refused(self, loss):
        q = br.Full(torch.zeros(3), 1.0)
        message = r"^Exact needs a loss that knows its expectation; use GaussHermite, Enumerate or MonteCarlo$"
        with pytest.raises(TypeError, match=message):
            br.BayesRule(br.Exact(), br.Zero(), br.Natural()).look(q, q, loss)

    def test_conjugate_sites_are_looked_at_as_a_whole(self):
        sites = br.conjugate.Sites(br.Vector([tensor(2.0), tensor(-3.0)]))
        q = br.Gamma(tensor(2.0), tensor(1.0))
        found = br.BayesRule(br.Exact(), br.Zero(), br.Natural()).look(q, q, sites)
        assert [part.item() for part in q.natural_gradient(found)] == [-2.0, 3.0]
        with pytest.raises(TypeError, match=r"^Sites are looked at as a whole: use the expectation Exact$"):
            sites(tensor(1.0))

    @pytest.mark.parametrize("ess", [1.0, 4.0])
    def test_conjugate_sites_are_the_same_for_every_gaussian(self, ess):
        q = br.Full(normal(0, 2), positive(1, 2), ess=ess)
        natural = br.Vector([normal(2, 2), -positive(3, 2)])
        found = q.natural_gradient(br.conjugate.Sites(natural).expected(q))
        for part, expected in zip(found, natural, strict=True):
            close(part, -expected)
