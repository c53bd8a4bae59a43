"""What once went wrong in inference, each with the input that showed it."""

import math

import pytest
import torch
from sklearn.gaussian_process.kernels import RBF
from tests.contracts import close, normal

import bayesrule as br

VARIANCES = br.conjugate.Normal(variance=[1.0, 2.0])


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def counts(seed, rate):
    return torch.poisson(rate, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "signal"), [(100.0, 25.0), (100.0, 100.0), (1e4, 100.0)])
def test_large_counts_under_a_process_with_a_wide_prior(dtype, size, signal):
    """W K is large: the mean as a difference of large terms lost its digits, and with them the bound."""
    X = normal(0, 30, 2)
    y = counts(1, size * (0.3 * X[:, 0]).exp())
    fit = br.cvi(X.to(dtype), y.to(dtype), "poisson", kernel=signal * RBF(1.0))
    assert fit.converged and fit.evidence_bound < 0
    close(fit.q.mean, y.clamp(min=1).log(), 0.3)
    twin = br.cvi(X, y, "poisson", kernel=signal * RBF(1.0), tolerance=1e-10)
    assert fit.evidence_bound == pytest.approx(twin.evidence_bound, rel=1e-4)


@pytest.mark.parametrize(
    ("X", "prior"),
    [
        (torch.stack([torch.ones(50), torch.linspace(0, 9, 50)], 1), 1e-3),
        (torch.linspace(0, 100, 50), 1.0),
        (torch.stack([torch.ones(50), torch.arange(1950.0, 2000.0)], 1), 1.0),
    ],
    ids=["weak prior", "long column", "years"],
)
@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_far_from_one_start_where_they_are(X, prior, likelihood):
    fit = br.cvi(X.double(), torch.arange(50), likelihood, prior=prior)
    assert fit.converged and math.isfinite(fit.evidence_bound)


def test_a_start_without_a_finite_bound_is_told():
    with pytest.raises(br.DomainError, match="the evidence bound is -inf where it starts: start nearer"):
        br.cvi(normal(0, 30, 2) * 30, torch.full((30,), 55.0), "poisson", prior=1e-2, warm_start=False)


def test_a_loop_that_takes_no_step_does_not_return_its_start():
    class Backwards(br.Natural):
        def direction(self, q, prior, look, rates):
            q, direction = super().direction(q, prior, look, rates)
            return q, direction * -1

    prior = br.Full(t([0.0]), 1.0)
    rule = br.BayesRule(br.Delta(), br.Hessian(), Backwards())
    with pytest.raises(br.DomainError, match="raises the evidence bound"):
        br.infer(rule, br.Full(t([1.0]), 3.0), prior, br.Quadratic(t([[2.0]]), t([5.0])))


def test_an_isotropic_stays_one():
    rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
    with pytest.raises(TypeError, match="an Isotropic needs a prior of one precision"):
        rule.step(br.Isotropic(t([0.0, 0.0])), br.Diagonal(t([0.0, 0.0]), t([1.0, 9.0])), br.Loss(lambda x: x.square().sum()))


def test_a_batch_of_coins_is_inferred_together():
    coins = br.Bernoulli(t([0.0, 0.0]))
    rule = br.BayesRule(br.Enumerate(), br.Zero(), br.Natural())
    result = br.infer(rule, coins, coins, br.Loss(lambda x: (x @ t([1.0, 2.0]) - 1) ** 2))
    p = result.q.expected()[0]
    # stationary: the log odds are minus the expected difference of the loss
    close(result.q.logits, t([-(4 * p[1] - 1), -(4 * p[0])]), 1e-6)


@pytest.mark.parametrize("make", [br.Diagonal, br.Isotropic, br.Full], ids=lambda f: f.__name__)
def test_natural_gradients_of_sharp_gaussians_in_single_precision(make):
    """Mean 100 and deviation 0.01: the second moment less the mean squared has no digit of the variance in single precision."""
    precision = {br.Diagonal: [1e4], br.Isotropic: 1e4, br.Full: [[1e4]]}[make]
    single, double = (
        make(torch.tensor([100.0], dtype=d), torch.tensor(precision, dtype=d)) for d in (torch.float32, torch.float64)
    )
    v = double.expected()
    for mine, there in zip(single.fisher_solve(v.map(torch.Tensor.float)), double.fisher_solve(v), strict=True):
        torch.testing.assert_close(mine.double(), there, rtol=1e-4, atol=0)


def test_the_uniform_von_mises():
    q = br.VonMises(t(0.3), t(0.0))
    close(q.fisher(), torch.eye(2, dtype=torch.float64) / 2)
    close(q.from_expected(q.expected()).concentration, t(0.0))
    close(torch.func.grad(lambda x: q.from_natural(br.Vector([x, t(0.0)])).log_partition())(t(0.0)), t(0.0))
    close(q.entropy(), t(math.log(2 * math.pi)))
    assert br.conjugate.update(q, br.conjugate.VonMises(2.0), [0.5]).posterior.loc.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("q", "theta", "values"),
    [
        (br.Exponential(1.0), [-1.0, 0.0], [-math.inf, 0.0]),
        (br.Bernoulli(0.0), [0.5, 1.0], [-math.inf, -math.log(2)]),
        (br.Beta(1.0, 1.0), [0.0, 1.0, 2.0], [0.0, 0.0, -math.inf]),
        (br.Gamma(1.0, 1.0), [0.0, -1.0], [0.0, -math.inf]),
        (br.Poisson(2.0), [1.5, -1.0, 0.0], [-math.inf, -math.inf, -2.0]),
        (br.Categorical(torch.zeros(3)), [7.0, 2.0], [-math.inf, -math.log(3)]),
        (br.Dirichlet(torch.ones(2)), [[0.5, 0.6], [0.5, 0.5]], [-math.inf, 0.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_densities_at_the_end_of_their_support_and_outside(q, theta, values):
    close(q.log_prob(torch.tensor(theta)), torch.tensor(values), 1e-6)


def test_predictives_of_much_data_keep_their_digits():
    heads = torch.full((200_000,), 3.0)
    single = br.conjugate.update(br.Beta(2.0, 1.0), br.conjugate.Binomial(10), heads)
    double = br.conjugate.update(br.Beta(t(2.0), t(1.0)), br.conjugate.Binomial(10), heads)
    at = torch.arange(11)
    close(single.predictive.log_prob(at).double(), double.predictive.log_prob(at), 1e-5)
    assert single.posterior.concentration1.dtype == torch.float32


def test_predictions_hold_no_graph_of_the_kernel():
    class Kernel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.length = torch.nn.Parameter(t(1.0))

        def forward(self, a, b):
            return (-((a[:, None] - b[None]) / self.length).square().sum(-1) / 2).exp()

    kernel = Kernel()
    fit = br.cvi(normal(0, 20), torch.arange(20) % 2, kernel=kernel, tune=3)
    assert fit.predictive(normal(1, 3)).probs.numpy().shape == (3,)
    assert kernel.length.grad is None


def test_draws_of_theta_are_followed_slowly():
    fit = br.cvi(normal(0, 30, 2), torch.arange(30) % 2, expectation=br.MonteCarlo(2), steps=5)
    assert {step.rate for step in fit.trace} == {0.1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: br.conjugate.update(br.Normal(0.0, 1.0), br.conjugate.Normal(variance=[1.0, 2.0]), [1.0]),
            "variance must be a number",
        ),
        (lambda: br.cvi([[1.0]], [1], kernel=RBF), "kernel must be an object, got the class RBF"),
        (lambda: br.cvi([[1.0], [2.0]], [0, 1], kernel=lambda a, b: (a @ b.T).numpy()), "kernel must return a tensor"),
        (lambda: br.cvi([[1.0]], [1], rate=0), r"rate must be a number in \(0, 1\], got 0"),
        (lambda: br.cvi([[1.0]], [1], steps=1.5), "steps must be a whole number of at least 1, got 1.5"),
        (lambda: br.cvi([[1.0]], [1], tune=-1), "tune must be a whole number of at least 0, got -1"),
        (lambda: br.cvi([[1.0]], [1], prior="a"), "prior must be a precision in .* got a"),
        (lambda: br.Beta("a", 1.0), "concentration1 of a Beta must be a number or a tensor, got 'a'"),
        (lambda: br.Beta(torch.tensor(1 + 1j), 1.0), "parameters of a Beta must be real"),
        (lambda: br.Full(torch.tensor(0.0), 1.0), "mean of a Full must be a tensor of shape"),
        (lambda: br.Full(torch.zeros(2), torch.eye(3)), r"hess of a Full must have shape \(..., 2, 2\), got \(3, 3\)"),
        (lambda: br.ridge(torch.zeros(3, 0), torch.zeros(3), 1.0), r"X must have shape .* got \(3, 0\)"),
        (lambda: br.ridge([[1.0]], [1.0], None), r"penalty must be a number in \[0, inf\), got None"),
        (
            lambda: br.linear_regression(torch.ones(3, 2), torch.ones(3), br.Diagonal(torch.zeros(2))),
            "prior must be a Full Gaussian",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert "\n" not in str(error.value)
