"""The golden numbers: every family at one member, and natural gradients of closed-form expectations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families.members import close, to_numbers, to_point
from torch import Tensor

import bayesrule as br

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = json.loads((GOLDEN / "families.json").read_text())["families"]
GRADIENTS = json.loads((GOLDEN / "natural_gradients.json").read_text())
HALF = torch.tensor(0.5, dtype=torch.float64)


def wide(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def scalars(numbers: list[float]) -> br.Vector:
    return br.Vector([wide(number) for number in numbers])


def whole(numbers: list[float]) -> br.Vector:
    return br.Vector([wide(numbers)])


def first(numbers: list[float]) -> br.Vector:
    """For a Gaussian of one element: its mean is a vector, and so are the blocks."""
    return br.Vector([wide([number]) for number in numbers])


def mean_and_scalar(numbers: list[float]) -> br.Vector:
    return br.Vector([wide(numbers[:1]), wide(numbers[1])])


CASES = {
    "normal": (br.Normal, scalars, (0, 0)),
    "normal-diagonal": (br.Diagonal(wide([0.0])), first, (1, 1)),
    "normal-isotropic": (br.Isotropic(wide([0.0]), HALF), mean_and_scalar, (1, 0)),
    "beta": (br.Beta, scalars, (0, 0)),
    "gamma": (br.Gamma, scalars, (0, 0)),
    "inverse_gamma": (br.InverseGamma, scalars, (0, 0)),
    "exponential": (br.Exponential, scalars, (0,)),
    "von_mises": (br.VonMises, scalars, (0, 0)),
    "bernoulli_01": (br.Bernoulli, scalars, (0,)),
    "bernoulli_pm1": (br.SignedBernoulli, scalars, (0,)),
    "categorical_minimal": (br.Categorical, whole, (1,)),
    "dirichlet": (br.Dirichlet, whole, (1,)),
    "poisson": (br.Poisson, scalars, (0,)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_golden_member(name):
    family, read, dims = CASES[name]
    golden = FAMILIES[name.split("-")[0]]
    q = family.from_natural(read(golden["natural"]))
    close(q.natural(), read(golden["natural"]), 1e-14)
    close(q.expected(), read(golden["expectation"]), 1e-10)
    close(family.from_expected(read(golden["expectation"])).natural(), read(golden["natural"]), 1e-10)
    close(q.log_partition(), wide(golden["log_partition"]), 1e-10)
    close(q.entropy(), wide(golden["entropy"]), 1e-10)
    if "minus_E_log_h" in golden:
        close(-q.mean_log_base_measure(), wide(golden["minus_E_log_h"]), 1e-10)
    fisher = wide(golden["fisher_natural"])
    units = torch.eye(len(fisher), dtype=torch.float64)
    columns = [to_numbers(q.fisher_mul(to_point(unit, q.natural(), dims)), dims) for unit in units]
    close(torch.stack(columns, dim=-1), fisher, 1e-10)
    back = [to_numbers(q.fisher_solve(to_point(column, q.natural(), dims)), dims) for column in fisher.T]
    close(torch.stack(back, dim=-1), units, 1e-10)
    if "kl_to" in golden:
        close(q.kl(family.from_natural(read(golden["kl_to"]["natural"]))), wide(golden["kl_to"]["value"]), 1e-10)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("beta", ("alpha", "beta")),
        ("gamma", ("shape", "rate")),
        ("inverse_gamma", ("a", "b")),
        ("exponential", ("rate",)),
        ("von_mises", ("loc", "concentration")),
        ("poisson", ("rate",)),
        ("dirichlet", ("alpha",)),
    ],
)
def test_the_golden_member_by_the_parameters_that_users_know(name, fields):
    family, read, _ = CASES[name]
    golden = FAMILIES[name]
    close(family(*(wide(golden["standard"][field]) for field in fields)).natural(), read(golden["natural"]), 1e-14)


def test_the_golden_normal_and_bernoulli_by_the_parameters_that_users_know():
    normal, coin = FAMILIES["normal"], FAMILIES["bernoulli_01"]
    mean, variance = wide(normal["standard"]["mean"]), wide(normal["standard"]["var"])
    close(br.Normal(mean, 1 / variance).natural(), scalars(normal["natural"]), 1e-14)
    close(br.Bernoulli(wide(coin["standard"]["prob"]).logit()).natural(), scalars(coin["natural"]), 1e-14)


def test_the_golden_wishart():
    golden = FAMILIES["wishart"]
    q = br.Wishart(wide(golden["standard"]["nu"]), wide(golden["standard"]["V"]))
    natural = br.Vector([wide(golden["natural"][block]) for block in ("l1", "l2")])
    expected = br.Vector([wide(golden["expectation"][block]) for block in ("m1", "m2")])
    close(q.natural(), natural, 1e-14)
    close(q.expected(), expected, 1e-10)
    close(q.from_expected(expected).natural(), natural, 1e-10)
    close(q.log_partition(), wide(golden["log_partition"]), 1e-10)
    close(q.entropy(), wide(golden["entropy"]), 1e-10)
    other = br.Wishart(wide(golden["kl_to"]["standard"]["nu"]), wide(golden["kl_to"]["standard"]["V"]))
    close(q.kl(other), wide(golden["kl_to"]["value"]), 1e-10)


def test_the_golden_full_gaussian():
    golden = FAMILIES["gaussian_full"]
    standard, there = golden["standard"], golden["kl_to"]["standard"]
    q = br.Full(wide(standard["mean"]), wide(standard["precision"]))
    natural = br.Vector([wide(golden["natural"][block]) for block in ("l1", "l2")])
    expected = br.Vector([wide(golden["expectation"][block]) for block in ("m1", "m2")])
    close(q.covariance, wide(standard["cov"]), 1e-10)
    close(q.natural(), natural, 1e-14)
    close(q.from_natural(natural).mean, q.mean, 1e-14)
    close(q.expected(), expected, 1e-10)
    close(q.from_expected(expected).natural(), natural, 1e-10)
    close(q.log_partition(), wide(golden["log_partition"]), 1e-10)
    close(q.entropy(), wide(golden["entropy"]), 1e-10)
    close(q.kl(br.Full(wide(there["mean"]), wide(there["cov"]).inverse())), wide(golden["kl_to"]["value"]), 1e-10)


# Natural gradients, and one step with them: flat priors, rate 0.2

RATES = br.Rates(0.2, 0.2)


def stepped(q: Any, look: br.Look, retraction: br.Retraction) -> Any:
    flat = type(q)(q.mean * 0, q.precision * 0)
    rule = br.BayesRule(br.Delta(), br.Zero(), retraction)
    return rule.move(q.under(flat), flat, look, RATES)[0]


def gaussians() -> dict[str, tuple[Any, br.Look]]:
    full, diagonal, isotropic = (GRADIENTS[name] for name in ("full", "diag", "isotropic"))
    mean, trace = wide(full["mean"]), wide(isotropic["E_trace_hess"])
    return {
        "full": (br.Full(mean, wide(full["cov"]).inverse()), br.Look(None, wide(full["E_grad"]), wide(full["E_hess"]))),
        "diag": (
            br.Diagonal(mean, 1 / wide(diagonal["var"])),
            br.Look(None, wide(diagonal["E_grad"]), wide(diagonal["E_hess_diag"])),
        ),
        "isotropic": (
            br.Isotropic(mean, wide(isotropic["precision"])),
            br.Look(None, wide(isotropic["E_grad"]), trace / 3),
        ),
    }


@pytest.mark.parametrize("name", ["full", "diag", "isotropic"])
def test_the_golden_natural_gradient_and_step_of_a_gaussian(name):
    golden, (q, look) = GRADIENTS[name], gaussians()[name]
    natural_gradient = br.Vector([wide(golden["natgrad_lambda1"]), wide(golden["natgrad_lambda2"])])
    close(q.natural_gradient(look), natural_gradient, 1e-10)
    again = q.as_look(natural_gradient)
    close(br.Vector([again.gradient, again.curvature]), br.Vector([look.gradient, look.curvature]), 1e-10)
    for retraction in (br.Natural(), br.Additive()):
        moved = stepped(q, look, retraction)
        close(moved.precision, wide(golden["blr_step_rho_0p2"]["precision"]), 1e-10)
        close(moved.mean, wide(golden["blr_step_rho_0p2"]["mean"]), 1e-10)


def test_the_golden_improved_step_of_a_full_gaussian():
    q, look = gaussians()["full"]
    moved = stepped(q, look, br.Riemannian(mean_precision="old"))
    close(moved.precision, wide(GRADIENTS["full"]["iblr_step_rho_0p2"]["precision"]), 1e-10)
    close(moved.mean, wide(GRADIENTS["full"]["iblr_step_rho_0p2"]["mean"]), 1e-10)


def test_the_golden_expectations_are_those_of_a_quadrature():
    """exp(a theta) needs few nodes for ten digits: a theta has a deviation below a half."""
    golden = GRADIENTS["full"]
    a, matrix = wide(golden["a"]), wide(golden["Q"])
    q = gaussians()["full"][0]
    rule = br.BayesRule(br.GaussHermite(8), br.Hessian(), br.Natural())
    look = rule.look(q, q, br.Loss(lambda theta: (a @ theta).exp() + theta @ matrix @ theta / 2))
    close(look.value, wide(golden["E_f"]), 1e-10)
    close(br.Vector([look.gradient, look.curvature]), br.Vector([wide(golden["E_grad"]), wide(golden["E_hess"])]), 1e-10)


def test_the_golden_step_with_a_fixed_covariance():
    """By a Full whose precision is left alone; and by a Fixed in the coordinates in which the covariance is the identity."""
    golden = GRADIENTS["fixed_cov"]
    mean, precision, gradient = (wide(golden[name]) for name in ("mean", "precision_matrix", "E_grad"))
    look = br.Look(None, gradient, None)
    close(stepped(br.Full(mean, precision), look, br.Additive()).mean, wide(golden["step_rho_0p2"]), 1e-10)
    root = torch.linalg.cholesky(precision)
    white = br.Fixed(root.T @ mean)
    look = br.Look(None, torch.linalg.solve_triangular(root, gradient[:, None], upper=False)[:, 0], None)
    close(white.natural_gradient(look), look.gradient, 0)
    for retraction in (br.Natural(), br.Additive()):
        moved = root.T.inverse() @ stepped(white, look, retraction).mean
        close(moved, wide(golden["step_rho_0p2"]), 1e-10)


def test_the_golden_natural_gradient_of_a_gamma():
    """E[theta^2 + 3 / theta] in closed form, by autograd in lambda and in mu, and by quadrature of the score."""
    golden = GRADIENTS["gamma"]
    q = br.Gamma(wide(golden["shape"]), wide(golden["rate"]))

    def mean(q: br.Gamma) -> Tensor:
        a, b = q.concentration, q.rate
        return a * (a + 1) / b**2 + 3 * b / (a - 1)

    close(mean(q), wide(golden["E_f"]), 1e-14)
    slope = torch.func.grad(lambda *natural: mean(br.Gamma.from_natural(br.Vector(natural))), (0, 1))(*q.natural())
    close(br.Vector(slope), scalars(golden["grad_lambda"]), 1e-10)
    close(q.fisher_solve(br.Vector(slope)), scalars(golden["natgrad"]), 1e-10)
    in_mu = torch.func.grad(lambda *expected: mean(br.Gamma.from_expected(br.Vector(expected))), (0, 1))(*q.expected())
    close(br.Vector(in_mu), scalars(golden["natgrad"]), 1e-10)
    grid = torch.linspace(-12, 5, 4001, dtype=torch.float64)  # in the logarithm, where the trapezoidal rule is exact
    theta = grid.exp()
    weights = (q.log_prob(theta) + grid).exp() * (grid[1] - grid[0])
    score = torch.func.vmap(lambda at: tuple(q.score(at).gradient))(theta)
    found = [(weights * part * (theta**2 + 3 / theta)).sum() for part in score]
    close(br.Vector(found), scalars(golden["natgrad"]), 1e-9)


def test_the_golden_natural_gradients_of_finite_families():
    rule = br.BayesRule(br.Enumerate(), br.Zero(), br.Natural())
    coin, choice = GRADIENTS["bernoulli_01"], GRADIENTS["categorical_minimal"]
    q = br.Bernoulli(wide(coin["prob"]).logit())
    look = rule.look(q, q, br.Loss(lambda x: coin["f0"] + (coin["f1"] - coin["f0"]) * x))
    close(look.gradient, scalars([coin["natgrad"]]), 1e-10)
    values = wide(choice["f"])
    q = br.Categorical(wide([0.5, -1.0, 0.2, 0.0]))
    look = rule.look(q, q, br.Loss(lambda k: values[k.long()]))
    close(look.gradient, whole(choice["natgrad"]), 1e-10)
