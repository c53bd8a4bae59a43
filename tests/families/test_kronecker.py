from itertools import product

import pytest
import torch
from tests.contracts import SEEDS, GaussianContract, close, normal, positive, symmetric

import bayesrule as br
from bayesrule.bases import Basis
from bayesrule.estimators.factored import GaussNewtonFactor
from bayesrule.families.kronecker import Kronecker, KroneckerProduct

ROWS, COLUMNS = 3, 2
SIZE, SHAPE = ROWS * COLUMNS, (ROWS, COLUMNS)
NOISE = br.CounterNoise(seed=78)
X, Y = normal(40, 15, SIZE), (normal(41, 15) > 0).double()
LOGISTIC = br.LinearLoss(X, br.likelihoods.Bernoulli(), Y)
NEWTON = br.BayesRule(br.Delta(), br.Hessian(), br.Additive())
FLAT = br.Isotropic(torch.zeros(SHAPE, dtype=torch.float64), 0.0)
PRIOR = br.Diagonal(normal(42, *SHAPE), normal(43, *SHAPE).abs() + 0.5)


def member(seed, shape=SHAPE, weight_decay=0.25, ess=7.0):
    metric = KroneckerProduct(positive(seed + 10, shape[0]), positive(seed + 20, shape[1]))
    return Kronecker(normal(seed, *shape), metric, weight_decay, ess)


def dense(q):
    """The Full Gaussian of W.flatten() that is the same distribution."""
    metric = q.metric.matrix if isinstance(q, Kronecker) else (q.mean * 0 + q.metric).flatten().diag()
    return br.Full(q.mean.flatten(), metric, ess=q.ess)


class TestMatrix(GaussianContract):
    """All of the contract of a Gaussian but what needs natural parameters, or matrices that are not of the structure."""

    shape = SHAPE
    test_natural_parameters_give_the_member_back = None
    test_expected_parameter_is_the_gradient_of_the_log_partition = None
    test_gradient_of_the_entropy_in_mu_is_minus_the_natural_parameter = None
    test_natural_gradient_is_autograds_through_the_exact_expectation = None
    test_gradient_of_the_kl_in_mu_is_autograds = None
    test_sandwich_is_the_matrix_product = None
    test_additive_is_natural_where_the_rates_agree = None
    test_a_prior_counts_by_its_precision_whatever_its_ess = None
    test_riemannian_is_additive_to_first_order = None
    test_riemannian_never_takes_more_than_half_of_the_metric = None

    def make(self, seed):
        return member(seed, self.shape)

    def dense(self, q, part):
        return part.reshape(self.size(q), -1) if isinstance(part, torch.Tensor) else part.matrix


class TestColumn(TestMatrix):
    shape = (4, 1)


class TestWideMatrix(TestMatrix):
    shape = (2, 4)


# Against Full


def columns(matrix, rows=ROWS):
    """A matrix over W.flatten() as one over vec W, which stacks columns."""
    order = torch.arange(len(matrix)).view(rows, -1).T.flatten()
    return matrix[order][:, order]


def test_its_precision_is_the_kronecker_product_of_right_and_left_for_stacked_columns():
    q = member(0)
    close(columns(q.precision.matrix), 7 * torch.kron(q.metric.right, q.metric.left))
    close(q.metric.right.trace(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", [SHAPE, (1, 4), (4, 1), (1, 1)])
def test_everything_it_says_is_what_full_says(shape):
    q, other = member(0, shape), member(1, shape)
    full, rows = dense(q), normal(2, 5, q.mean.numel())
    close(q.covariance, full.covariance)
    close(q.variance.flatten(), full.variance)
    close(q.spread(rows), full.spread(rows))
    close(q.spread(rows.view(5, *shape)), full.spread(rows))
    close(q.log_det(), full.log_det())
    close(q.entropy(), full.entropy())
    close(q.kl(other), full.kl(dense(other)))
    close(q.log_prob(other.mean), full.log_prob(other.mean.flatten()))
    close(q.log_prob(torch.stack([q.mean, other.mean])), full.log_prob(torch.stack([q.mean, other.mean]).flatten(1)))
    close(q.bend(other.mean).flatten(), full.stretch(other.mean.flatten()) - 0.25 * other.mean.flatten())
    close(q.to_torch().log_prob(other.mean.flatten()), q.log_prob(other.mean))


@pytest.mark.parametrize(
    "p", [PRIOR, br.Isotropic(PRIOR.mean, 2.0, ess=3.0), br.Fixed(PRIOR.mean, 2.0)], ids=lambda p: type(p).__name__
)
def test_the_kl_and_the_bound_from_a_diagonal_are_fulls(p):
    q, look = member(0, ess=1.0), br.Look(torch.tensor(2.0, dtype=torch.float64), normal(1, *SHAPE), None)
    close(q.kl(p), dense(q).kl(dense(p)))
    close(q.bound(look, p), dense(q).bound(look, dense(p)))
    close(q.distance(p), dense(q).distance(dense(p)))


def test_a_draw_is_the_roots_times_a_matrix_of_unit_normals():
    q, Z = member(0), NOISE.normal(member(0).mean)
    left, right = (torch.linalg.cholesky(factor) for factor in (q.metric.left * 7, q.metric.right))
    close(q.sample(NOISE), q.mean + left.inverse().T @ Z @ right.inverse())


# Steps


def by_the_formula(q, whole, gradient, rate):
    """The conditional block updates in dense matrices: precisions, not metrics, with W's columns stacked; H with the prior."""
    left, right = q.ess * q.metric.left, q.metric.right
    H = columns(whole).view(COLUMNS, ROWS, COLUMNS, ROWS)
    left = (1 - rate) * left + rate / COLUMNS * torch.einsum("ij,ikjl->kl", right.inverse(), H)
    right = (1 - rate) * right + rate / ROWS * torch.einsum("kl,ikjl->ij", left.inverse(), H)
    mean = q.mean - rate * left.inverse() @ gradient @ right.inverse()
    return mean, torch.kron(right, left)


PRIORS = {
    "diagonal": PRIOR,
    "isotropic": br.Isotropic(PRIOR.mean, 2.0, ess=3.0),
    "flat": FLAT,
    "kronecker": member(50),
}
CURVATURES = {
    "Hessian": br.Hessian(),
    "GaussNewton": br.GaussNewton(),
    "GaussNewtonFactor": GaussNewtonFactor(),
    "DiagonalHessian": br.DiagonalHessian(),
    "SquaredGradient": br.SquaredGradient(3.0),
}


SINGULAR = ("SquaredGradient", "flat", 1.0)


@pytest.mark.parametrize(
    ("curvature", "prior", "rate"), [row for row in product(CURVATURES, PRIORS, (0.3, 1.0)) if row != SINGULAR]
)
def test_a_step_is_the_dense_formula(curvature, prior, rate):
    q, p = member(3), PRIORS[prior]
    oracle, pull = LOGISTIC(q.mean), dense(p).precision if p is not FLAT else torch.zeros(SIZE, SIZE, dtype=torch.float64)
    flat = oracle.gradient().flatten()
    seen = {"DiagonalHessian": oracle.hessian().diagonal().diag(), "SquaredGradient": 3 * torch.outer(flat, flat)}
    whole = q.ess * seen.get(curvature, oracle.hessian()) + pull
    gradient = q.ess * oracle.gradient() + (pull @ (q.mean - p.mean).flatten()).view(SHAPE)
    mean, precision = by_the_formula(q, whole, gradient, rate)
    new = br.BayesRule(br.Delta(), CURVATURES[curvature], br.Additive()).step(q, p, LOGISTIC, rate)
    close(new.mean, mean, 1e-9)
    close(columns(new.precision.matrix), precision, 1e-9)
    close(new.metric.right.trace(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_of_rate_one_is_all_where_the_curvature_is_a_kronecker_product(seed, transposed):
    """With a flat prior, or one whose left or right factor is the loss's."""
    left, right = positive(seed, ROWS), positive(seed + 1, COLUMNS)
    target = normal(seed + 2, *SHAPE)
    loss = br.Loss(lambda W: ((W - target) * (left @ (W - target) @ right)).sum() / 2)
    eye = torch.eye(ROWS if transposed else COLUMNS, dtype=torch.float64)
    pull = KroneckerProduct(eye, right) if transposed else KroneckerProduct(left, eye)
    for prior in (FLAT, Kronecker(normal(seed + 3, *SHAPE), pull, ess=7.0)):
        flat = prior.precision * torch.eye(SIZE) if prior is FLAT else prior.precision.matrix
        full = br.BayesRule(br.Delta(), br.Hessian(), br.Additive()).step(
            dense(member(seed)), br.Full(prior.mean.flatten(), flat), br.Loss(lambda w: loss.function(w.view(SHAPE)))
        )
        for start in (member(seed + 4), Kronecker(normal(seed + 5, *SHAPE), 100.0, ess=7.0)):
            q = NEWTON.step(start, prior, loss)
            close(q.mean.flatten(), full.mean)
            close(q.precision.matrix, full.precision)
            again = NEWTON.step(q, prior, loss)
            close(again.mean, q.mean)
            close(again.precision.matrix, q.precision.matrix)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_of_one_row_or_column_it_ends_where_full_does(shape):
    X, Y = normal(60, 12, 4), (normal(61, 12) > 0).double()
    loss, rule = br.LinearLoss(X, br.likelihoods.Bernoulli(), Y), br.BayesRule(br.Exact(), br.Zero(), br.Additive())
    q, prior = Kronecker(torch.zeros(shape, dtype=torch.float64)), br.Isotropic(torch.zeros(shape, dtype=torch.float64))
    full, of_full = br.Full(torch.zeros(4, dtype=torch.float64)), br.Full(torch.zeros(4, dtype=torch.float64))
    for _ in range(60):
        q, full = rule.step(q, prior, loss, 0.5), rule.step(full, of_full, loss, 0.5)
    close(q.mean.flatten(), full.mean)
    close(q.precision.matrix, full.precision)


def test_what_is_no_kronecker_product_stays_out_of_reach_but_is_nearer_than_by_a_diagonal():
    """Regression on x^T W z. What stands still has the least KL of its family, in each factor."""
    X = torch.einsum("ni,na->nia", normal(70, 6, ROWS), normal(71, 6, COLUMNS)).flatten(1)
    loss = br.LinearLoss(X, br.likelihoods.Gaussian(), normal(72, 6))
    origin = torch.zeros(SHAPE, dtype=torch.float64)
    exact = NEWTON.step(br.Full(origin.flatten()), br.Full(origin.flatten(), 0.3), loss)
    q, diagonal = member(1, ess=1.0), br.Diagonal(origin.flatten())
    for _ in range(400):
        q, diagonal = (NEWTON.step(each, br.Isotropic(each.mean * 0, 0.3), loss, 0.7) for each in (q, diagonal))
    close(q.mean.flatten(), exact.mean)
    least = dense(q).kl(exact)
    assert 0.01 < least < 0.9 * dense(diagonal).kl(exact)

    def off(left, right):
        return dense(Kronecker(q.mean, KroneckerProduct(left, right))).kl(exact)

    for slope in torch.func.grad(off, (0, 1))(q.metric.left, q.metric.right):
        close(slope, torch.zeros_like(slope))


@pytest.mark.parametrize(
    ("expectation", "curvature"),
    [
        (br.MonteCarlo(3), GaussNewtonFactor()),
        (br.MonteCarlo(1000, antithetic=True, control_variate="stl"), br.Reparameterized("stl")),
        (br.MonteCarlo(2), br.Hutchinson()),
        (br.Exact(), br.Zero()),
    ],
)
def test_expectations_over_draws_and_in_closed_form(expectation, curvature):
    q = br.BayesRule(expectation, curvature, br.Additive()).step(Kronecker(PRIOR.mean, 3.0), PRIOR, LOGISTIC, 0.3, NOISE)
    exact = br.BayesRule(br.Exact(), br.Zero(), br.Additive()).step(Kronecker(PRIOR.mean, 3.0), PRIOR, LOGISTIC, 0.3)
    assert torch.linalg.eigvalsh(q.precision.matrix).min() > 0
    if not isinstance(curvature, GaussNewtonFactor | br.Hutchinson):
        close(q.mean, exact.mean, 0.02)
        close(q.precision.matrix, exact.precision.matrix, 0.05)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_grid_of_few_elements_is_the_expectation(shape):
    loss, prior = br.LinearLoss(X[:, :2], br.likelihoods.Bernoulli(), Y), br.Isotropic(torch.zeros(shape, dtype=torch.float64))
    by_grid, exact = (
        br.BayesRule(*how, br.Additive()).step(member(0, shape), prior, loss, 0.3)
        for how in ((br.GaussHermite(40), br.Hessian()), (br.Exact(), br.Zero()))
    )
    close(by_grid.mean, exact.mean, 1e-8)
    close(by_grid.precision.matrix, exact.precision.matrix, 1e-8)


def test_price_with_its_control_variate_is_exact_on_the_posterior_of_a_quadratic():
    """Not so without: the curvature of one draw is far off."""
    q, prior = member(0, weight_decay=0.0), br.Isotropic(PRIOR.mean, 0.5)
    hess = (q.metric.matrix - 0.5 / 7 * torch.eye(SIZE, dtype=torch.float64)).view(*SHAPE, *SHAPE)
    loss = br.Loss(
        lambda W: torch.einsum("ia,iajb,jb->", W - q.mean, hess, W - q.mean) / 2 - (W * (q.mean - prior.mean)).sum() / 14
    )
    rule = br.BayesRule(br.MonteCarlo(1, control_variate="stl"), br.Reparameterized("stl"), br.Additive())
    new = rule.step(q, prior, loss, 0.5, NOISE)
    close(new.mean, q.mean)
    close(new.precision.matrix, q.precision.matrix)


def test_the_score_has_the_density_of_a_gaussian_to_differentiate():
    q, where = member(0, ess=2.0), normal(1, *SHAPE)
    look, full = q.score(where), dense(q).score(where.flatten())
    close(look.gradient.flatten(), full.gradient)
    close(look.curvature.reshape(SIZE, SIZE), full.curvature)


# Pieces


def test_a_product_is_one_value_whatever_the_scale_of_its_factors():
    left, right = positive(0, ROWS), positive(1, COLUMNS)
    product = KroneckerProduct(left, right)
    close(product.matrix, torch.kron(left, right))
    close(KroneckerProduct(left * 3, right / 3).left, product.left)
    close((2.0 * product / 4).matrix, product.matrix / 2)
    close(product @ normal(2, *SHAPE), left @ normal(2, *SHAPE) @ right)
    close(product.inverse().matrix, product.matrix.inverse())
    close(product.log_det(), product.matrix.logdet())
    assert (KroneckerProduct(left, 0 * right).matrix == 0).all()


def test_a_prior_is_kept_apart_in_the_metric():
    q = member(0)
    for prior in PRIORS.values():
        under = q.under(prior)
        assert under.metric is q.metric
        close(under.bend(q.mean), q.stretch(q.mean) - prior.stretch(q.mean) * prior.ess / 7)
        close(
            symmetric(9, SIZE).view(*SHAPE, *SHAPE) + under.hess - symmetric(9, SIZE).view(*SHAPE, *SHAPE),
            under.hess + 0 * X.new_zeros(*SHAPE, *SHAPE),
        )


def test_entropy_and_density_are_differentiable():
    def entropy(left):
        return Kronecker(torch.zeros(SHAPE, dtype=torch.float64), KroneckerProduct(left, positive(1, COLUMNS))).entropy()

    close(torch.func.grad(entropy)(positive(0, ROWS)), -COLUMNS / 2 * positive(0, ROWS).inverse())


def test_float32_stays_float32():
    loss = br.Loss(lambda W: W.square().sum())
    q = NEWTON.step(Kronecker(torch.ones(2, 3), 2.0, ess=3.0), br.Diagonal(torch.zeros(2, 3), ess=3.0), loss, 0.5)
    numbers = (q.mean, q.sample(NOISE), q.entropy(), q.log_prob(q.mean), q.kl(q), q.solve(q.mean), q.variance, q.covariance)
    assert {number.dtype for number in (*numbers, q.metric.left, q.spread(torch.eye(6)))} == {torch.float32}


# What it refuses


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda q: q.natural(), "no exponential family.*Additive"),
        (lambda q: q.from_natural(q.mean), "no exponential family.*Additive"),
        (lambda q: q.natural_gradient(br.Look(None, q.mean, None)), "Additive"),
        (lambda q: q.kl_gradient(PRIOR), "Additive"),
        (lambda q: q.expected(), "no exponential family.*mean and variance"),
        (lambda q: q.sandwich(q.hess), "Additive"),
        (lambda q: q.moved(hess=q.metric), "by its factors.*Additive"),
        (lambda q: q.metric + q.metric, "sum of Kronecker products.*Additive"),
        (lambda q: q.metric - 1.0, "sum of Kronecker products"),
        (lambda q: q.hess + 1.0, "sum of Kronecker products"),
        (lambda q: q.under(br.Full(q.mean.flatten())), r"prior over matrices of shape \(3, 2\)"),
        (lambda q: q.under(br.Full(q.mean)), r"prior over matrices of shape \(3, 2\)"),  # a batch of three
        (lambda q: q.under(br.Eigen(q.mean, Basis(SHAPE, [None, None]))), r"prior over matrices of shape \(3, 2\)"),
        (lambda q: q.under(br.LowRank(q.mean.flatten())), r"prior over matrices of shape \(3, 2\)"),
        (lambda q: q.kl(br.Isotropic(q.mean.T)), r"prior over matrices of shape \(3, 2\)"),
        (lambda q: br.Diagonal(q.mean).under(q), "needs a prior of its own structure, got a Kronecker"),
        (lambda q: br.Isotropic(q.mean).under(q), "needs a prior of its own structure, got a Kronecker"),
        (lambda q: br.BayesRule(br.Delta(), br.Hessian(), br.Natural()).step(q, PRIOR, LOGISTIC), "retraction Additive"),
        (lambda q: br.BayesRule(br.Delta(), br.Hessian(), br.Riemannian()).step(q, PRIOR, LOGISTIC), "retraction Additive"),
        (lambda q: br.BayesRule(br.Delta(), GaussNewtonFactor(), br.Riemannian()).step(q, PRIOR, LOGISTIC), "retraction Additive"),
        (lambda q: br.BayesRule(br.Delta(), br.Hessian(), br.Additive(eps=1e-8)).step(q, PRIOR, LOGISTIC), "without eps"),
    ],
)
def test_what_its_structure_cannot_hold_is_refused_with_a_way_out(use, message):
    with pytest.raises(TypeError, match=message) as caught:
        use(member(0))
    assert "\n" not in str(caught.value)
    assert not Kronecker.is_exponential_family


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kronecker(torch.zeros(2)), r"shape \(n, p\), got \(2,\)"),
        (lambda: Kronecker(torch.zeros(2, 3), KroneckerProduct(torch.eye(3), torch.eye(2))), r"over \(2, 3\), got \(3, 2\)"),
        (lambda: Kronecker(torch.zeros(2, 3), torch.eye(6)), r"KroneckerProduct over \(2, 3\), got another kind"),
        (lambda: Kronecker(torch.zeros(2, 3), weight_decay=torch.ones(4)), r"mean of shape \(2, 3\) cannot have shape \(4,\)"),
        (lambda: KroneckerProduct(torch.ones(2, 3), torch.eye(2)), r"left.*square matrix, got shape \(2, 3\)"),
        (lambda: KroneckerProduct(torch.eye(2), torch.ones(2)), r"right.*square matrix, got shape \(2,\)"),
        (lambda: Kronecker(torch.zeros(2, 2), -1.0).entropy(), "left factor.*not positive definite.*eigenvalue -1"),
        (lambda: NEWTON.step(member(0), FLAT, br.Loss(lambda W: -W.square().sum())), "left factor.*not positive definite"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_members_are_frozen():
    with pytest.raises(AttributeError):
        member(0).mean = torch.zeros(SHAPE)
