"""What families refuse: parameters that name no member, in one line that names the argument."""

import math

import pytest
import torch
from torch import distributions as td

import bayesrule as br

ONE, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)
EYE, ZERO = torch.eye(2), torch.tensor(0.0)
SKEW = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])

GOOD = {
    br.Bernoulli: {"logits": ONE},
    br.SignedBernoulli: {"logits": ONE},
    br.Categorical: {"logits": torch.zeros(3)},
    br.Poisson: {"rate": ONE},
    br.Gamma: {"concentration": ONE, "rate": ONE},
    br.InverseGamma: {"concentration": ONE, "rate": ONE},
    br.Exponential: {"rate": ONE},
    br.Beta: {"concentration1": ONE, "concentration0": ONE},
    br.Dirichlet: {"concentration": torch.ones(3)},
    br.VonMises: {"loc": ONE, "concentration": ONE},
    br.Normal: {"loc": ONE, "precision": ONE},
    br.Wishart: {"df": 3 * ONE, "scale": EYE},
    br.NormalGamma: {"loc": ONE, "kappa": ONE, "concentration": ONE, "rate": ONE},
    br.NormalInverseGamma: {"loc": torch.ones(2), "precision": EYE, "concentration": ONE, "rate": ONE},
    br.NormalInverseWishart: {"loc": torch.ones(2), "kappa": ONE, "df": 3 * ONE, "scale": EYE},
}
FIELDS = [(family, name) for family, fields in GOOD.items() for name in fields]
FLAT = (br.VonMises, "concentration")  # 0 is the uniform distribution
POSITIVE = [(family, name) for family, name in FIELDS if name not in ("loc", "logits") and (family, name) != FLAT]
MATRICES = [(br.Wishart, "scale"), (br.NormalInverseGamma, "precision"), (br.NormalInverseWishart, "scale")]


def of(value):
    return value.__name__ if isinstance(value, type) else str(value)


def refused(family, name, value, match=None):
    """One line that names the argument and the family."""
    with pytest.raises(ValueError, match=match) as caught:
        family(**{**GOOD[family], name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} of a") and family.__name__ in message and "\n" not in message


@pytest.mark.parametrize(("family", "name"), FIELDS, ids=of)
@pytest.mark.parametrize("gap", [NAN, INF, -INF], ids=["nan", "inf", "minus inf"])
def test_gaps_are_refused(family, name, gap):
    good = GOOD[family][name]
    refused(family, name, good * gap if good.dim() == 0 else good + gap)
    broken = good.clone()
    broken.view(-1)[-1] = gap
    refused(family, name, broken)


@pytest.mark.parametrize(("family", "name"), POSITIVE, ids=of)
@pytest.mark.parametrize("sign", [0.0, -1.0], ids=["zero", "negative"])
def test_what_must_be_positive_is_refused_at_zero_and_below(family, name, sign):
    refused(family, name, GOOD[family][name] * sign, "positive|above 1")


@pytest.mark.parametrize(("family", "name"), MATRICES, ids=of)
@pytest.mark.parametrize("matrix", [SKEW, INDEFINITE, 0 * EYE], ids=["not symmetric", "indefinite", "zero"])
def test_matrices_must_be_symmetric_and_positive_definite(family, name, matrix):
    refused(family, name, matrix, "symmetric and positive definite")


@pytest.mark.parametrize("family", [br.Wishart, br.NormalInverseWishart], ids=of)
@pytest.mark.parametrize("df", [1.0, 0.5, -3.0])
def test_degrees_of_freedom_must_be_above_the_size_less_one(family, df):
    refused(family, "df", torch.tensor(df), "above 1, for matrices of 2 rows")


def test_the_first_of_a_batch_that_is_wrong_is_told():
    with pytest.raises(ValueError, match=r"^rate of a Gamma must be finite and positive, got -2\.0$"):
        br.Gamma(torch.ones(3), torch.tensor([1.0, -2.0, -3.0]))


@pytest.mark.parametrize("family", [family for family, fields in GOOD.items() if len(fields) > 1], ids=of)
def test_batch_shapes_that_do_not_go_together_are_refused(family):
    first, *others = GOOD[family].items()
    shapes = {first[0]: first[1].expand(2, *first[1].shape)} | {name: value.expand(3, *value.shape) for name, value in others}
    with pytest.raises(ValueError, match=f"batch shapes of a {family.__name__} do not go together") as caught:
        family(**shapes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [(br.Dirichlet, "concentration", ONE), (br.Categorical, "logits", ONE), (br.Wishart, "scale", torch.ones(2, 3))],
    ids=of,
)
def test_a_shape_that_does_not_fit_is_refused_by_name(family, name, value):
    refused(family, name, value, "shape")


@pytest.mark.parametrize("family", [br.NormalInverseGamma, br.NormalInverseWishart], ids=of)
@pytest.mark.parametrize("size", [1, 3])
def test_a_mean_and_a_matrix_of_different_sizes_are_refused(family, size):
    refused(family, "loc", torch.zeros(size), "2")


def test_numbers_and_whole_numbers_are_taken():
    for q in (br.Gamma(2, 3), br.Gamma(torch.tensor(2), 3.0), br.Gamma(torch.tensor(2), torch.tensor(3))):
        assert q.concentration.dtype == torch.get_default_dtype() and q.concentration == 2
    mixed = br.Gamma(torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float64))
    assert mixed.concentration.dtype == mixed.rate.dtype == torch.float64
    assert br.Gamma(torch.ones(3), 2.0).batch_shape == br.Gamma(2.0, torch.ones(3)).batch_shape == (3,)


@pytest.mark.parametrize("family", list(GOOD), ids=of)
@pytest.mark.parametrize("way", ["natural", "expected"])
def test_another_number_of_blocks_is_refused_by_name(family, way):
    q = family(**GOOD[family])
    blocks = br.Vector([*getattr(q, way)(), ONE])
    with pytest.raises(ValueError, match=f"^{way} of a {family.__name__} must have {len(blocks) - 1} blocks, got {len(blocks)}$"):
        getattr(family, f"from_{way}")(blocks)


def vector(*numbers):
    return br.Vector([torch.as_tensor(number) for number in numbers])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (br.Bernoulli, vector(1.0)),
        (br.Bernoulli, vector(-0.1)),
        (br.SignedBernoulli, vector(-1.0)),
        (br.Categorical, vector([0.5, 0.5])),
        (br.Categorical, vector([0.5, 0.6])),
        (br.Poisson, vector(0.0)),
        (br.Gamma, vector(0.1, 1.0)),
        (br.Gamma, vector(0.0, -1.0)),
        (br.InverseGamma, vector(-0.1, 1.0)),
        (br.Exponential, vector(0.0)),
        (br.Beta, vector(-0.1, -0.1)),
        (br.Dirichlet, vector([-1.0, -1.0, -1.0])),
        (br.Dirichlet, vector([-1.0, 0.1, -9.0])),
        (br.VonMises, vector(1.0, 0.0)),
        (br.VonMises, vector(2.0, 0.0)),
        (br.Normal, vector(1.0, 1.0)),
        (br.Wishart, vector(torch.eye(2), 0.1)),
        (br.Wishart, vector(-torch.eye(2), -1.0)),
        (br.NormalGamma, vector(-1.0, 1.0, 1.0, 1.0)),
        (br.NormalInverseGamma, vector(1.0, 1.0, [1.0, 0.0], torch.diag(torch.tensor([1.0, 1.0])))),
        (br.NormalInverseWishart, vector([0.0, 0.0], 1.0, torch.eye(2), -0.1)),
        (br.Full(torch.zeros(2)), vector([1.0, 0.0], torch.eye(2))),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_expected_parameters_outside_are_refused_by_name(family, expected):
    with pytest.raises(br.DomainError, match=r"^expected is outside the domain of") as caught:
        family.from_expected(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("q", "natural"),
    [
        (br.Isotropic(torch.zeros(2), ONE), vector([1.0, 1.0], 0.5)),
        (br.Diagonal(torch.zeros(2), torch.ones(2)), vector([1.0, 1.0], [-0.5, 0.5])),
        (br.Full(torch.zeros(2)), vector([1.0, 1.0], torch.diag(torch.tensor([-0.5, 0.5])))),
    ],
    ids=["Isotropic", "Diagonal", "Full"],
)
def test_gaussians_tell_what_is_outside(q, natural):
    assert q.in_domain(q.natural()) and not q.in_domain(natural)
    assert not q.in_domain(natural * math.nan)


def test_an_indefinite_natural_parameter_of_a_full_is_refused():
    with pytest.raises(br.DomainError, match="not positive definite"):
        br.Full(torch.zeros(2)).from_natural(vector([1.0, 1.0], torch.diag(torch.tensor([-0.5, 0.5]))))


@pytest.mark.parametrize("family", [br.Isotropic, br.Diagonal], ids=of)
def test_a_gaussian_whose_metric_is_a_number_has_a_natural_parameter_of_tensors(family):
    q = family(torch.zeros(3))
    assert q.in_domain(q.natural())


def test_as_look_is_the_reverse_of_the_natural_gradient_of_a_fixed():
    q, gradient = br.Fixed(torch.zeros(2), ess=5.0), torch.ones(2)
    assert torch.equal(q.as_look(q.natural_gradient(br.Look(None, gradient, None))).gradient, gradient)


@pytest.mark.parametrize(
    "q", [br.Isotropic(torch.ones(2), 2 * ONE, ess=5.0), br.Full(torch.ones(2), 2.0, ess=5.0)], ids=["Isotropic", "Full"]
)
def test_as_look_is_the_reverse_of_the_natural_gradient(q):
    look = br.Look(None, torch.tensor([1.0, -2.0]), q.hess * 3)
    again = q.as_look(q.natural_gradient(look))
    torch.testing.assert_close((again.gradient, again.curvature), (look.gradient, look.curvature))


def test_a_natural_matrix_that_is_not_symmetric_is_outside():
    assert not br.Wishart.in_domain(vector(SKEW / -2, 0.5))


@pytest.mark.parametrize("family", list(GOOD), ids=of)
def test_a_distribution_of_another_kind_is_refused(family):
    with pytest.raises(TypeError, match=f"{family.__name__}.*made from a.*Cauchy|a SignedBernoulli is made from a Bernoulli"):
        family.from_torch(td.Cauchy(ONE, ONE))


@pytest.mark.parametrize("family", [br.NormalGamma, br.NormalInverseGamma, br.NormalInverseWishart], ids=of)
def test_families_that_torch_has_not_say_so(family):
    with pytest.raises(TypeError, match=rf"torch\.distributions has no {family.__name__}; use sample, log_prob and entropy"):
        family(**GOOD[family]).to_torch()


@pytest.mark.parametrize("family", list(GOOD), ids=of)
def test_nothing_is_checked_within_vmap(family):
    """Nobody can ask there; the members are right where the parameters are."""
    fields = {name: torch.stack([value, value]) for name, value in GOOD[family].items()}
    entropies = torch.func.vmap(lambda *values: family(*values).entropy())(*fields.values())
    torch.testing.assert_close(entropies, family(**fields).entropy())
