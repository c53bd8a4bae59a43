"""What conjugate updates refuse: one line that names the argument and the value."""

import math

import numpy as np
import pytest
import torch
from tests.contracts import close, normal

import bayesrule as br
from bayesrule import conjugate as c

update = c.update


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


EYE = torch.eye(2, dtype=torch.float64)
ONE = number(1.0)
BETA, GAMMA, DIRICHLET = br.Beta(ONE, ONE), br.Gamma(ONE, ONE), br.Dirichlet(tensor(1, 1, 1))
NORMAL, ANGLE = br.Normal(ONE, ONE), br.VonMises(ONE, ONE)
BOTH = br.NormalGamma(ONE, ONE, ONE, ONE)
FULL, WISHART = br.Full(tensor(0, 0), EYE), br.Wishart(number(4.0), EYE)
NIW, NIG = br.NormalInverseWishart(tensor(0, 0), ONE, number(4.0), EYE), br.NormalInverseGamma(tensor(0, 0), EYE, ONE, ONE)
COINS = br.Beta(torch.ones(2, 3), 1.0)
KNOWN = c.Normal(variance=1.0)
ROWS = normal(0, 5, 2)


def refused(message, prior, likelihood, data, kind=ValueError, **more):
    with pytest.raises(kind, match=f"^{message}$") as caught:
        update(prior, likelihood, data, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prior", "likelihood", "data", "message"),
    [
        (BETA, "bernoulli", [1, 0.5], "data must be 0 or 1, got 0.5"),
        (BETA, "bernoulli", [1, -1], "data must be 0 or 1, got -1"),
        (BETA, c.Binomial(3), [1, 4], r"data must be whole numbers from 0 to 3 \(trials\), got 4"),
        (BETA, c.Binomial(3), [1.5], r"data must be whole numbers from 0 to 3 \(trials\), got 1.5"),
        (GAMMA, "poisson", [3, -1], "data must be counts, whole and not negative, got -1"),
        (GAMMA, "poisson", [3, 2.5], "data must be counts, whole and not negative, got 2.5"),
        (GAMMA, "exponential", [3, -0.25], "data must be waiting times, not negative, got -0.25"),
        (DIRICHLET, "categorical", [0, 3], "data must be class numbers from 0 to 2, got 3"),
        (DIRICHLET, "categorical", [0, -1], "data must be class numbers from 0 to 2, got -1"),
        (DIRICHLET, "categorical", [0, 0.5], "data must be class numbers from 0 to 2, got 0.5"),
        (DIRICHLET, "multinomial", [[1, 2, -3]], "data must be counts, whole and not negative, got -3"),
        (DIRICHLET, "multinomial", [[1, 2, 0.5]], "data must be counts, whole and not negative, got 0.5"),
    ],
)
def test_what_cannot_occur(prior, likelihood, data, message):
    refused(message, prior, likelihood, data)


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("prior", "likelihood", "shape"),
    [
        (BETA, "bernoulli", (4,)),
        (GAMMA, "poisson", (4,)),
        (GAMMA, "exponential", (4,)),
        (DIRICHLET, "multinomial", (4, 3)),
        (NORMAL, KNOWN, (4,)),
        (BOTH, "normal", (4,)),
        (FULL, c.MultivariateNormal(covariance=EYE), (4, 2)),
        (NIW, "multivariate_normal", (4, 2)),
        (ANGLE, c.VonMises(1.0), (4,)),
    ],
    ids=lambda value: getattr(type(value), "__name__", None) if not isinstance(value, str | tuple) else None,
)
def test_data_that_are_not_finite_or_missing_altogether(prior, likelihood, shape, missing):
    data = torch.ones(shape)
    data[1:3] = missing
    refused(f"data has {data[1:3].numel()} entries that are not finite; remove or impute them", prior, likelihood, data)
    refused("data is empty: give at least one observation", prior, likelihood, data[:0])


@pytest.mark.parametrize(
    ("prior", "likelihood", "data", "shapes"),
    [
        (BETA, "bernoulli", 1, ("", "")),
        (BETA, "bernoulli", [[1], [0]], ("", "2, 1")),
        (COINS, "bernoulli", torch.ones(7), (", 2, 3", "7,")),
        (COINS, "bernoulli", torch.ones(7, 3, 2), (", 2, 3", "7, 3, 2")),
        (DIRICHLET, "categorical", [[1, 0, 0]], ("", "1, 3")),
        (DIRICHLET, "multinomial", [1, 0, 0], (", 3", "3,")),
        (DIRICHLET, "multinomial", [[1, 0]], (", 3", "1, 2")),
        (FULL, c.MultivariateNormal(covariance=EYE), ROWS[0], (", 2", "2,")),
        (WISHART, c.MultivariateNormal(mean=0.0), torch.ones(4, 3), (", 2", "4, 3")),
        (NIW, "multivariate_normal", torch.ones(4, 1), (", 2", "4, 1")),
    ],
)
def test_data_of_another_shape(prior, likelihood, data, shapes):
    wanted, got = shapes
    refused(rf"data must have shape \(examples{wanted or ','}\), got \({got}\)", prior, likelihood, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ROWS, r"data must be a pair \(X, y\), got Tensor"),
        ((ROWS,), r"data must be a pair \(X, y\), got tuple"),
        ((ROWS, ROWS[:4, 0]), "X and y must have equally many examples, got 5 and 4"),
        ((ROWS, ROWS), r"data must have shape \(examples,\), got \(5, 2\)"),
        ((ROWS[:, :1], ROWS[:, 0]), r"X must have shape \(examples, 2\), got \(5, 1\)"),
        ((ROWS[0], ROWS[:, 0]), r"X must have shape \(examples, 2\), got \(2,\)"),
        ((ROWS / 0, ROWS[:, 0]), r"X has 10 entries that are not finite; remove or impute them"),
        ((ROWS, ROWS[:, 0] / 0), "data has 5 entries that are not finite; remove or impute them"),
        ((ROWS[:0], ROWS[:0, 0]), "data is empty: give at least one observation"),
    ],
)
def test_inputs_and_targets_that_do_not_fit(data, message):
    refused(message, NIG, "linear_regression", data)


@pytest.mark.parametrize(
    ("prior", "likelihood", "message"),
    [
        (GAMMA, "bernoulli", "Bernoulli is conjugate to Beta, got a prior Gamma"),
        (BETA, "poisson", "Poisson is conjugate to Gamma, got a prior Beta"),
        (BETA, "exponential", "Exponential is conjugate to Gamma, got a prior Beta"),
        (BETA, "categorical", "Categorical is conjugate to Dirichlet, got a prior Beta"),
        (NORMAL, "linear_regression", "LinearRegression is conjugate to NormalInverseGamma, got a prior Normal"),
        (NORMAL, c.VonMises(1.0), "VonMises is conjugate to VonMises, got a prior Normal"),
        (NORMAL, "normal", r"Normal\(mean=None, variance=None\) is conjugate to NormalGamma, got a prior Normal"),
        (GAMMA, KNOWN, r"Normal\(mean=None, variance=1.0\) is conjugate to Normal, got a prior Gamma"),
        (BETA, c.Normal(mean=0), r"Normal\(mean=0, variance=None\) is conjugate to Gamma or InverseGamma, got a prior Beta"),
        (GAMMA, c.Normal(0, 1), "Normal.* is conjugate to nothing: one of mean and variance is to be unknown, got a prior Gamma"),
        (FULL, "multivariate_normal", "MultivariateNormal is conjugate here to NormalInverseWishart, got a prior Full"),
        (FULL, c.MultivariateNormal(mean=0), "MultivariateNormal is conjugate here to Wishart, got a prior Full"),
        (WISHART, c.MultivariateNormal(covariance=EYE), "MultivariateNormal is conjugate here to Full, got a prior Wishart"),
        (
            FULL,
            c.MultivariateNormal(0, EYE),
            "MultivariateNormal .* to nothing: one of mean and covariance is to be unknown, .* Full",
        ),
        (1.0, "bernoulli", "update takes a family and a likelihood, got float and Bernoulli"),
        (BETA, c.Bernoulli, "update takes a family and a likelihood, got Beta and ABCMeta"),
    ],
)
def test_what_is_no_pair(prior, likelihood, message):
    refused(message, prior, likelihood, [1], TypeError)


def test_a_name_that_is_none():
    refused(
        "likelihood must be one of bernoulli, poisson, .*linear_regression or an object of bayesrule.conjugate, got 'bernouli'",
        BETA,
        "bernouli",
        [1],
    )


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, math.nan, math.inf])
def test_a_rate_out_of_range(rate):
    refused(rf"rate must be a number in \(0, 1\], got {rate}", BETA, "bernoulli", [1], rate=rate)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.Binomial(0), "trials must be a whole number of at least 1, got 0"),
        (lambda: c.Binomial(2.5), "trials must be a whole number of at least 1, got 2.5"),
        (lambda: c.VonMises(0.0), "concentration must be finite and positive, got 0.0"),
        (lambda: c.VonMises(math.nan), "concentration must be finite and positive, got nan"),
        (lambda: c.Normal(variance=0.0).of(NORMAL), "variance must be finite and positive, got 0.0"),
        (lambda: c.Normal(variance=math.inf).of(NORMAL), "variance must be finite and positive, got inf"),
        (lambda: c.Normal(mean=math.nan).of(GAMMA), "mean must be finite, got nan"),
        (lambda: c.MultivariateNormal(mean=math.inf).of(WISHART), "mean must be finite, got inf"),
        (
            lambda: c.MultivariateNormal(covariance=tensor([1, 2], [2, 1])).of(FULL),
            r"covariance must be symmetric and positive definite, of shape \(2, 2\), got \[\[1.0, 2.0\], \[2.0, 1.0\]\]",
        ),
        (
            lambda: c.MultivariateNormal(covariance=tensor([1, 0], [0, math.nan])).of(FULL),
            r"covariance must be symmetric and positive definite, of shape \(2, 2\), got \[\[1.0, 0.0\], \[0.0, nan\]\]",
        ),
    ],
)
def test_known_parameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_a_flat_prior_and_a_design_that_leaves_directions_open():
    """The message says how many columns are constant: usually it is two of them."""
    X = torch.cat([normal(0, 9, 2), torch.ones(9, 1, dtype=torch.float64), torch.full((9, 1), 3.0, dtype=torch.float64)], dim=1)
    flat = br.Full(torch.zeros(4, dtype=torch.float64), 0.0)
    message = r"^the posterior is improper: column 3 of X .*\(9 rows, 4 columns, 2 of them constant\)"
    with pytest.raises(ValueError, match=message) as caught:
        br.linear_regression(X, normal(1, 9), flat)
    assert "\n" not in str(caught.value)
    br.linear_regression(X[:, :3], normal(1, 9), br.Full(torch.zeros(3, dtype=torch.float64), 0.0))


def test_a_start_of_another_family_is_refused():
    refused("start must be a Normal like the prior, got a VonMises", NORMAL, KNOWN, [1.0], TypeError, start=ANGLE)


@pytest.mark.parametrize("kind", ["list", "array", "single"])
def test_a_known_covariance_may_be_a_list_an_array_and_in_another_dtype(kind):
    values = [[2.0, 0.5], [0.5, 1.0]]
    given = {"list": values, "array": np.array(values), "single": torch.tensor(values)}[kind]
    found = update(FULL, c.MultivariateNormal(covariance=given), ROWS)
    close(found.log_evidence, update(FULL, c.MultivariateNormal(covariance=tensor(*values)), ROWS).log_evidence)


@pytest.mark.parametrize("kind", ["list", "array"])
def test_a_known_mean_may_be_a_list_and_an_array(kind):
    given = [0.5, -1.0] if kind == "list" else np.array([0.5, -1.0])
    found = update(WISHART, c.MultivariateNormal(mean=given), ROWS)
    close(found.log_evidence, update(WISHART, c.MultivariateNormal(mean=tensor(0.5, -1.0)), ROWS).log_evidence)


@pytest.mark.parametrize("covariance", [tensor([1, 5], [0, 1]), torch.eye(3, dtype=torch.float64)], ids=["lopsided", "3 x 3"])
def test_a_covariance_that_does_not_fit(covariance):
    refused("covariance must be .*", FULL, c.MultivariateNormal(covariance=covariance), ROWS)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: update(BETA, "bernoulli", None), "data"),
        (lambda: update(BETA, "bernoulli", [1, None]), "data"),
        (lambda: update(BETA, "bernoulli", [[1, 0], [1]]), "data"),
        (lambda: update(BETA, "bernoulli", [1], rate=None), "rate"),
        (lambda: c.Binomial(math.nan), "trials"),
        (lambda: c.Binomial(math.inf), "trials"),
    ],
    ids=["none", "none in a list", "ragged", "rate none", "trials nan", "trials inf"],
)
def test_what_is_no_number_at_all(make, argument):
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must be"):
        make()


@pytest.mark.parametrize("away", [30.0, 300.0, 3000.0])
def test_single_precision_far_from_zero(away):
    """Temperatures in kelvin: the sum of squares has more digits than single precision."""
    data = away + normal(0, 1000)
    prior = [number(value) for value in (away, 1.0, 2.0, 1.0)]
    double = update(br.NormalGamma(*prior), "normal", data)
    single = update(br.NormalGamma(*(value.float() for value in prior)), "normal", data.float())
    close(single.posterior.rate.double(), double.posterior.rate, 1e-4)
    close(single.log_evidence.double(), double.log_evidence, 1e-4)
