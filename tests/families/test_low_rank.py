import pytest
import torch
from tests.contracts import SEEDS, GaussianContract, close, normal, positive, symmetric

import bayesrule as br
from bayesrule.bases import Basis
from bayesrule.estimators.factored import GaussNewtonFactor
from bayesrule.families.low_rank import DiagonalPlusFactor, LowRank
from bayesrule.vector import lerp

SIZE, NOISE = 5, br.CounterNoise(seed=77)
X, Y = normal(30, 9, SIZE), (normal(31, 9) > 0).double()
LOGISTIC = br.LinearLoss(X, br.likelihoods.Bernoulli(), Y)
FACTORED = br.BayesRule(br.Delta(), GaussNewtonFactor(), br.Additive())
PRIOR = br.Diagonal(normal(32, SIZE), normal(33, SIZE).abs() + 0.5)


def member(seed, rank, size=SIZE, ess=7.0):
    hess = DiagonalPlusFactor(normal(seed + 10, size).abs() + 0.3, normal(seed + 20, size, rank))
    return LowRank(normal(seed, size), hess, weight_decay=0.25, ess=ess)


def dense(q):
    """The Full Gaussian that is the same distribution."""
    weight_decay = torch.as_tensor(q.weight_decay, dtype=q.mean.dtype).expand(len(q.mean)).diag()
    return br.Full(q.mean, q.hess.matrix, weight_decay, ess=q.ess)


class TestRankTwo(GaussianContract):
    """All of the contract of a Gaussian but what needs natural parameters, or matrices that are not of the structure."""

    rank = 2
    test_natural_parameters_give_the_member_back = None
    test_expected_parameter_is_the_gradient_of_the_log_partition = None
    test_gradient_of_the_entropy_in_mu_is_minus_the_natural_parameter = None
    test_natural_gradient_is_autograds_through_the_exact_expectation = None
    test_gradient_of_the_kl_in_mu_is_autograds = None
    test_sandwich_is_the_matrix_product = None
    test_outer_is_what_the_structure_keeps_of_the_product = None
    test_under_a_prior_it_is_the_same_distribution = None
    test_additive_is_natural_where_the_rates_agree = None
    test_a_prior_counts_by_its_precision_whatever_its_ess = None
    test_riemannian_is_additive_to_first_order = None
    test_riemannian_never_takes_more_than_half_of_the_metric = None

    def make(self, seed):
        return member(seed, self.rank)

    def dense(self, q, part):
        return part.matrix


class TestRankZero(TestRankTwo):
    rank = 0


class TestRankAboveTheSize(TestRankTwo):
    rank = SIZE + 2


# Against Full and Diagonal


@pytest.mark.parametrize("rank", [0, 1, 3, SIZE, SIZE + 2])
def test_everything_it_says_is_what_full_says(rank):
    q, other, full = member(0, rank), member(1, rank), dense(member(0, rank))
    close(q.covariance, full.covariance)
    close(q.variance, full.variance)
    close(q.spread(X), full.spread(X))
    close(q.log_det(), full.log_det())
    close(q.entropy(), full.entropy())
    close(q.kl(other), full.kl(dense(other)))
    close(q.log_prob(other.mean), full.log_prob(other.mean))
    close(q.bend(other.mean), full.bend(other.mean))
    close(q.distance(PRIOR), q.distance(br.Diagonal(PRIOR.mean, PRIOR.precision)))
    root = torch.stack([q.root_precondition(row) for row in torch.eye(SIZE, dtype=torch.float64)], dim=1)
    close(root @ root.T, q.metric.matrix.inverse())


def steps(q, prior, rule, loss, rate, count=8):
    for _ in range(count):
        q = rule.step(q, prior, loss, rate)
    return q


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_with_a_rank_of_all_steps_are_those_of_full(rate):
    low = steps(LowRank(PRIOR.mean, 0.5, rank=SIZE), PRIOR, FACTORED, LOGISTIC, rate)
    flat = br.Full(PRIOR.mean, PRIOR.precision.diag())
    full = steps(br.Full(PRIOR.mean, 0.5), flat, br.BayesRule(br.Delta(), br.GaussNewton(), br.Additive()), LOGISTIC, rate)
    assert low.hess.rank == SIZE
    close(low.mean, full.mean)
    close(low.precision.matrix, full.precision)
    close(low.entropy(), full.entropy())
    close(low.kl(PRIOR), full.kl(flat))
    close(low.log_prob(X[0]), full.log_prob(X[0]))


def test_a_rank_that_holds_all_data_is_enough():
    """Three rows curve the loss in three directions, whatever the weights are."""
    loss = br.LinearLoss(X[:3], br.likelihoods.Bernoulli(), Y[:3])
    low, all_ = (steps(LowRank(PRIOR.mean, rank=rank), PRIOR, FACTORED, loss, 0.3) for rank in (3, SIZE))
    close(low.mean, all_.mean)
    close(low.precision.matrix, all_.precision.matrix)


@pytest.mark.parametrize("curvatures", [(GaussNewtonFactor(), br.DiagonalHessian()), (br.GaussNewton(), br.GaussNewton())])
def test_rank_zero_is_diagonal_with_the_exact_diagonal(curvatures):
    start = normal(3, SIZE).abs() + 0.5
    mine, theirs = (br.BayesRule(br.Delta(), curvature, br.Additive()) for curvature in curvatures)
    low = steps(LowRank(PRIOR.mean, start, rank=0), PRIOR, mine, LOGISTIC, 0.3)
    diagonal = steps(br.Diagonal(PRIOR.mean, start), PRIOR, theirs, LOGISTIC, 0.3)
    assert low.hess.rank == 0
    close(low.mean, diagonal.mean, 1e-12)
    close(low.precision.diagonal, diagonal.precision, 1e-12)
    close(low.kl(PRIOR), diagonal.kl(PRIOR))
    close(low.entropy(), diagonal.entropy())


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_the_diagonal_of_the_precision_is_preserved_at_every_step(rank):
    rho, q = 0.3, LowRank(PRIOR.mean, member(0, rank).hess, rank=rank).under(PRIOR)
    for _ in range(5):
        exact = (1 - rho) * q.hess.matrix + rho * LOGISTIC(q.mean).hessian()
        q = FACTORED.step(q, PRIOR, LOGISTIC, rho)
        assert q.hess.rank == rank
        close(q.hess.matrix.diagonal(), exact.diagonal(), 1e-12)


def test_truncation_keeps_the_leading_directions():
    whole = DiagonalPlusFactor(torch.zeros(SIZE, dtype=torch.float64), normal(0, SIZE, 4))
    values = torch.linalg.eigvalsh(whole.matrix)
    kept = whole.truncated(2)
    close(torch.linalg.eigvalsh(kept.factor @ kept.factor.T)[-2:], values[-2:])
    off = whole.matrix - kept.matrix
    close(off.diagonal(), torch.zeros(SIZE, dtype=torch.float64), 1e-12)
    assert whole.truncated(4) is whole


# Steps


@pytest.mark.parametrize("curvature", [br.SquaredGradient(), br.SquaredGradient(4.0), br.Hessian(), br.DiagonalHessian()])
def test_other_curvatures_that_are_never_negative_do_too(curvature):
    rule = br.BayesRule(br.Delta(), curvature, br.Additive())
    low = rule.step(LowRank(PRIOR.mean, rank=SIZE), PRIOR, LOGISTIC, 0.4)
    full = rule.step(br.Full(PRIOR.mean, 1.0), br.Full(PRIOR.mean, PRIOR.precision.diag()), LOGISTIC, 0.4)
    close(low.mean, full.mean)
    close(low.precision.matrix, full.precision)


@pytest.mark.parametrize("expectation", [br.MonteCarlo(3), br.MonteCarlo(2, antithetic=True, control_variate="stl"), br.Exact()])
def test_expectations_over_draws_and_in_closed_form(expectation):
    q = br.BayesRule(expectation, GaussNewtonFactor(), br.Additive()).step(LowRank(PRIOR.mean, rank=3), PRIOR, LOGISTIC, 0.3, NOISE)
    assert q.hess.rank == 3 and q.mean.isfinite().all() and torch.linalg.eigvalsh(q.precision.matrix).min() > 0


def test_the_expectation_that_the_loss_knows_is_fulls():
    exact = br.BayesRule(br.Exact(), br.Zero(), br.Additive())
    low = exact.step(LowRank(PRIOR.mean, rank=SIZE), PRIOR, LOGISTIC, 0.3)
    full = exact.step(br.Full(PRIOR.mean, 1.0), br.Full(PRIOR.mean, PRIOR.precision.diag()), LOGISTIC, 0.3)
    close(low.mean, full.mean)
    close(low.precision.matrix, full.precision)


def test_a_grid_of_few_elements_is_the_expectation():
    loss, prior = br.LinearLoss(X[:, :2], br.likelihoods.Bernoulli(), Y), br.Isotropic(torch.zeros(2, dtype=torch.float64))
    by_grid, exact = (
        br.BayesRule(*how, br.Additive()).step(member(0, 1, 2), prior, loss, 0.3)
        for how in ((br.GaussHermite(40), GaussNewtonFactor()), (br.Exact(), br.Zero()))
    )
    close(by_grid.mean, exact.mean, 1e-8)
    close(by_grid.precision.matrix.diagonal(), exact.precision.matrix.diagonal(), 1e-8)


def test_the_evidence_bound_is_fulls():
    q, look = member(0, 2, ess=1.0), br.Look(torch.tensor(2.0, dtype=torch.float64), normal(1, SIZE), None)
    flat = br.Full(PRIOR.mean, PRIOR.precision.diag())
    close(q.bound(look, PRIOR), dense(q).bound(look, flat))


def test_a_prior_may_be_any_diagonal_of_any_ess():
    q, mean, ones = member(0, 2), PRIOR.mean, torch.ones(SIZE, dtype=torch.float64)
    priors = [br.Isotropic(mean, 2 * ones[0]), br.Diagonal(mean, ones, ess=2.0), LowRank(mean, 0.5, ess=4.0, rank=3)]
    rule, look = br.BayesRule(br.Delta(), br.Zero(), br.Additive()), br.Look(None, normal(1, SIZE), q.gather(normal(2, SIZE, 4)))
    ends = [rule.move(q.under(prior), prior, look, br.Rates(0.3, 0.3))[0] for prior in priors]
    for prior, end in zip(priors, ends, strict=True):
        close(q.under(prior).precision.matrix, q.precision.matrix)
        close(end.mean, ends[0].mean)
        close(end.precision.matrix, ends[0].precision.matrix)
        close(end.kl(prior), ends[0].kl(priors[0]))


# Pieces


def test_a_diagonal_and_a_factor_add_scale_and_mix_like_matrices():
    a, b = member(0, 2).hess, member(1, 3).hess
    eye, quarter = torch.eye(SIZE, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    close((a + b).matrix, a.matrix + b.matrix)
    close((0.5 + a).matrix, a.matrix + eye / 2)
    close((a - 0.5).matrix, a.matrix - eye / 2)
    close((a / 4).matrix, a.matrix / 4)
    close((quarter * a).matrix, a.matrix / 4)
    close(lerp(a, b, 0.3).matrix, 0.7 * a.matrix + 0.3 * b.matrix)
    close(lerp(a, b, 1.0).matrix, b.matrix)
    close(lerp(a, b.diagonal, quarter).matrix, 0.75 * a.matrix + 0.25 * b.diagonal.diag())
    close(a @ X.T, a.matrix @ X.T)
    close(a @ X[0], a.matrix @ X[0])


def test_looks_with_factors_have_a_running_mean():
    a, b = (br.Look(None, normal(seed, SIZE), member(seed, 2).hess) for seed in (0, 1))
    close(a.lerp(b, 0.5).curvature.matrix, (a.curvature.matrix + b.curvature.matrix) / 2)


@pytest.mark.parametrize("rank", [0, 2, SIZE, SIZE + 3])
def test_what_is_projected_has_the_diagonal_of_the_matrix_and_its_leading_part(rank):
    matrix, q = positive(0, SIZE), LowRank(normal(0, SIZE), rank=rank)
    kept = q.project(matrix)
    close(kept.matrix.diagonal(), matrix.diagonal(), 1e-12)
    values = torch.linalg.eigvalsh(kept.factor @ kept.factor.T)
    close(values[max(SIZE - rank, 0) :], torch.linalg.eigvalsh(matrix)[max(SIZE - rank, 0) :])
    if rank >= SIZE:
        close(kept.matrix, matrix, 1e-12)


def test_negative_directions_are_kept_on_the_diagonal_alone():
    matrix = symmetric(4, SIZE)
    assert torch.linalg.eigvalsh(matrix).min() < 0
    close(LowRank(normal(0, SIZE), rank=SIZE).project(matrix).matrix.diagonal(), matrix.diagonal(), 1e-12)


def test_a_draw_is_the_root_of_the_covariance_times_normals():
    q = member(0, 2)
    close(q.draw(NOISE), q.root_solve(NOISE.normal(q.mean)), 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.float64, 1e-10)])
def test_the_square_of_a_stiff_factor_is_never_made(dtype, tolerance):
    """Curvatures of 1e6 times the diagonal, two of them alike."""
    factor = normal(0, SIZE, 3) * 1e3
    factor[:, 2] = factor[:, 1]
    q = LowRank(torch.zeros(SIZE, dtype=dtype), DiagonalPlusFactor(torch.ones(SIZE, dtype=dtype), factor.to(dtype)))
    v = normal(1, SIZE)
    exact = torch.linalg.solve(torch.eye(SIZE, dtype=torch.float64) + factor @ factor.T, v)
    close(q.precondition(v.to(dtype)).double(), exact, tolerance)
    assert q.log_det().isfinite() and (q.variance > 0).all()


def test_entropy_and_density_are_differentiable():
    def entropy(factor):
        return LowRank(torch.zeros(SIZE, dtype=torch.float64), DiagonalPlusFactor(PRIOR.precision, factor)).entropy()

    factor = normal(0, SIZE, 2)
    slope = torch.func.grad(entropy)(factor)
    close(slope, -(PRIOR.precision.diag() + factor @ factor.T).inverse() @ factor)
    assert torch.func.grad(entropy)(torch.zeros_like(factor)).isfinite().all()


def test_float32_stays_float32():
    rule, loss = br.BayesRule(br.Delta(), br.SquaredGradient(), br.Additive()), br.Quadratic(torch.eye(3), torch.ones(3))
    start = LowRank(torch.ones(3), 2.0, weight_decay=0.5, ess=3.0, rank=2)
    q = rule.step(start, br.Diagonal(torch.zeros(3), ess=3.0), loss, 0.5)
    numbers = (q.mean, q.sample(NOISE), q.entropy(), q.log_prob(q.mean), q.kl(q), q.solve(q.mean), q.variance, q.covariance)
    assert {number.dtype for number in (*numbers, q.hess.factor, q.spread(torch.eye(3)))} == {torch.float32}


def test_it_is_a_multivariate_normal_of_torch():
    q = member(0, 2)
    close(q.to_torch().log_prob(PRIOR.mean), q.log_prob(PRIOR.mean))


# What it refuses


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda q: q.natural(), "no exponential family.*Additive"),
        (lambda q: q.from_natural(q.mean), "no exponential family.*Additive"),
        (lambda q: q.natural_gradient(br.Look(None, q.mean, None)), "Additive"),
        (lambda q: q.kl_gradient(PRIOR), "Additive"),
        (lambda q: q.expected(), "no exponential family"),
        (lambda q: q.score(q.mean), "asks for gradients"),
        (lambda q: q.outer(q.mean, q.mean + 1), "GaussNewtonFactor"),
        (lambda q: q.sandwich(q.hess), "Additive"),
        (lambda q: q.hess - q.hess, "Additive"),
        (lambda q: q.under(q), "prior whose precision is diagonal"),
        (lambda q: q.under(br.Eigen(q.mean, Basis((SIZE,), [None]))), "prior whose precision is diagonal"),
        (lambda q: q.kl(br.Full(q.mean)), "prior whose precision is diagonal"),
        (lambda q: br.Full(q.mean).under(q), "needs a prior of its own structure, got a LowRank"),
        (lambda q: br.Diagonal(q.mean).under(q), "needs a prior of its own structure, got a LowRank"),
        (lambda q: br.BayesRule(br.Delta(), GaussNewtonFactor(), br.Natural()).step(q, PRIOR, LOGISTIC), "retraction Additive"),
        (lambda q: br.BayesRule(br.Delta(), GaussNewtonFactor(), br.Riemannian()).step(q, PRIOR, LOGISTIC), "retraction Additive"),
        (lambda q: FACTORED.step(q, PRIOR, br.Loss(torch.sum)), "use another curvature or another oracle"),
    ],
)
def test_what_its_structure_cannot_hold_is_refused_with_a_way_out(use, message):
    with pytest.raises(TypeError, match=message):
        use(member(0, 2))
    assert not LowRank.is_exponential_family


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(torch.zeros(2, 2)), r"shape \(D,\), got \(2, 2\)"),
        (lambda: LowRank(torch.zeros(2), rank=-1), "at least 0, got -1"),
        (lambda: LowRank(torch.zeros(2), DiagonalPlusFactor(torch.ones(3), torch.ones(3, 1))), "size of the mean, 2, got 3"),
        (lambda: DiagonalPlusFactor(torch.ones(3), torch.ones(2, 1)), r"got \(3,\) and \(2, 1\)"),
        (lambda: DiagonalPlusFactor(torch.ones(2), torch.ones(2, 1)) * -1.0, "numbers >= 0, got -1"),
        (lambda: LowRank(torch.zeros(2)).project_weighted(torch.eye(2), torch.tensor([1.0, -2.0])), "no negative curvature.*-2"),
        (lambda: LowRank(torch.zeros(2), torch.tensor([1.0, -3.0])).entropy(), "diagonal.*positive, the least is -3"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("seed", SEEDS)
def test_members_are_frozen(seed):
    with pytest.raises(AttributeError):
        member(seed, 1).mean = torch.zeros(SIZE)
