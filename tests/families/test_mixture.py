import json
import math
from pathlib import Path

import pytest
import torch
from tests.contracts import close, normal, positive
from torch.distributions import MultivariateNormal

import bayesrule as br
from bayesrule.families.mixture import Mixture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixture_step.json").read_text())
NOISE = br.CounterNoise(seed=496)
NATURAL = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
QUADRATURE = br.BayesRule(br.GaussHermite(12), br.Hessian(), br.Natural())


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def member(seed, full, components=3, size=2):
    precision = torch.stack([positive(seed + 10 + k, size) for k in range(components)])
    precision = precision if full else precision.diagonal(dim1=-2, dim2=-1)
    return Mixture(normal(seed, components, size), precision, normal(seed + 20, components))


class Seen(br.Oracle):
    """What is known of a loss with a Hessian, all in closed form: many looks cost little."""

    def __init__(self, value, gradient, hessian):
        self.value, self.gradient, self.hessian = (lambda: value), (lambda: gradient), (lambda: hessian)

    def gradient(self): ...


def well(x):
    """A double well of the golden numbers, in every element."""
    return (0.25 * (x**2 - 4) ** 2 + 0.3 * x).sum()


def WELL(x):
    return Seen(well(x), x * (x**2 - 4) + 0.3, (3 * x**2 - 4).diag())


A, C = positive(5, 2), normal(6, 2)


def bowl(x):
    return (x - C) @ A @ (x - C) / 2 + (x - C).cosh().sum()


def BOWL(x):
    return Seen(bowl(x), A @ (x - C) + (x - C).sinh(), A + (x - C).cosh().diag())


each_structure = pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])


def same(a, b, tolerance=1e-10):
    close(a.mean, b.mean, tolerance)
    close(a.precision, b.precision, tolerance)
    close(a.log_weights, b.log_weights, tolerance)


# The golden step


@pytest.mark.parametrize("curvature", [br.Hessian(), br.DiagonalHessian()], ids=lambda c: type(c).__name__)
@each_structure
def test_one_exact_step_on_a_double_well_is_the_golden_one(full, curvature):
    precision = 1 / wide(GOLDEN["vars"])[:, None]
    start = wide(GOLDEN["means"])[:, None], precision[..., None] if full else precision, wide(GOLDEN["weights"]).log()
    q, rule = Mixture(*start), br.BayesRule(br.GaussHermite(200), curvature, br.Natural())
    look = rule.look(q, None, WELL)
    close(look.value, wide(GOLDEN["E_k_of_loss_plus_logq"]), 1e-8)
    close(look.gradient.flatten(), wide(GOLDEN["E_k_grad_of_loss_plus_logq"]), 1e-8)
    close(look.curvature.flatten(), wide(GOLDEN["E_k_hess_of_loss_plus_logq"]), 1e-8)
    close(-q.bound(look, None), wide(GOLDEN["objective"]), 1e-8)
    after, step = rule.move(q, None, look, br.Rates(GOLDEN["rho"], GOLDEN["rho"]))[0], GOLDEN["step"]
    close(after.precision.flatten(), wide(step["precision"]), 1e-8)
    close(after.mean.flatten(), wide(step["mean"]), 1e-8)
    close(after.log_weights[0] - after.log_weights[1], wide(step["log_weight_ratio"]), 1e-8)
    close(-after.bound(rule.look(after, None, WELL), None), wide(step["objective_after"]), 1e-8)


# Against one Gaussian


@pytest.mark.parametrize("rule", [NATURAL, QUADRATURE], ids=["delta", "quadrature"])
@pytest.mark.parametrize(
    "prior", [br.Full(normal(7, 2), torch.zeros(2, 2, dtype=torch.float64)), br.Full(normal(7, 2), positive(8, 2))]
)
def test_one_component_is_full(rule, prior):
    one = br.Full(normal(0, 2), positive(1, 2))
    q = Mixture(one.mean[None], one.precision[None])
    for _ in range(4):
        one, q = (rule.step(member, prior, BOWL, 0.3) for member in (one, q))
        close(q.mean[0], one.mean)
        close(q.precision[0], one.precision)
        assert q.weights == 1
    if prior.precision.any() and rule is QUADRATURE:
        close(q.bound(rule.look(q, prior, BOWL), prior), one.bound(rule.look(one, prior, BOWL), prior))


def test_one_component_without_a_prior_is_newtons_method():
    start, q = normal(0, 2), Mixture(normal(0, 2)[None], torch.eye(2, dtype=torch.float64)[None])
    for steps in (1, 4):
        end = br.newton(bowl, start, steps=steps, tolerance=0.0)
        mine = q
        for _ in range(steps):
            mine = NATURAL.step(mine, None, BOWL)
        close(mine.mean[0], end.mean)
        close(mine.precision[0], end.precision)


def test_one_component_is_diagonal():
    prior = br.Isotropic(normal(7, 2), wide(0.5))
    one = br.Diagonal(normal(0, 2), positive(1, 2).diagonal())
    q, flat = Mixture(one.mean[None], one.precision[None]), br.Diagonal(prior.mean, wide([0.5, 0.5]))
    for _ in range(4):
        one, q = QUADRATURE.step(one, flat, BOWL, 0.3), QUADRATURE.step(q, prior, BOWL, 0.3)
    close(q.mean[0], one.mean)
    close(q.precision[0], one.precision)


# What steps do


@pytest.mark.parametrize("rule", [NATURAL, QUADRATURE], ids=["delta", "quadrature"])
@each_structure
def test_components_that_are_identical_stay_so(full, rule):
    """And the mixture is the one Gaussian."""
    mean, precision, prior = normal(0, 1, 2), positive(1, 2)[None], br.Full(normal(7, 2), positive(8, 2).diagonal().diag())
    one = Mixture(mean, precision if full else precision.diagonal(dim1=-2, dim2=-1))
    q = Mixture(one.mean.expand(3, -1), one.precision.expand(3, *one.precision.shape[1:]))
    for _ in range(4):
        one, q = (rule.step(member, prior, BOWL, 0.3) for member in (one, q))
        close(q.mean, one.mean.expand(3, -1))
        close(q.precision, one.precision.expand_as(q.precision))
        close(q.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def WAVES(x):
    """Many minima, far apart."""
    return Seen((x**2 / 200 - x.cos()).sum(), x / 100 + x.sin(), (1 / 100 + x.cos()).diag())


@pytest.mark.parametrize("rule", [NATURAL, QUADRATURE], ids=["delta", "quadrature"])
@each_structure
def test_components_far_apart_go_their_own_ways(full, rule):
    starts = 8 * math.pi * wide([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.0]]) + 0.2
    precision = torch.full((3, 2), 4.0, dtype=torch.float64)
    q = Mixture(starts, precision.diag_embed() if full else precision)
    alone = [Mixture(q.mean[k : k + 1], q.precision[k : k + 1]) for k in range(3)]
    for _ in range(5):
        q, alone = rule.step(q, None, WAVES, 0.3), [rule.step(one, None, WAVES, 0.3) for one in alone]
        close(q.mean, torch.cat([one.mean for one in alone]))
        close(q.precision, torch.cat([one.precision for one in alone]))
    assert (q.mean - starts).abs().min() > 0.01


@pytest.mark.parametrize("retraction", [br.Natural(), br.Riemannian()], ids=lambda r: type(r).__name__)
def test_turning_the_loss_turns_the_components(retraction):
    """At the means; nodes of a quadrature lie along axes. Diagonals have axes of their own."""
    rule, turn = br.BayesRule(br.Delta(), br.Hessian(), retraction), torch.linalg.qr(normal(11, 2, 2)).Q

    def turned(x):
        seen = BOWL(turn.T @ x)
        return Seen(seen.value(), turn @ seen.gradient(), turn @ seen.hessian() @ turn.T)

    q = member(0, True)
    mapped = Mixture(q.mean @ turn.T, turn @ q.precision @ turn.T, q.log_weights)
    for _ in range(3):
        q, mapped = rule.step(q, None, BOWL, 0.05), rule.step(mapped, None, turned, 0.05)
        same(Mixture(q.mean @ turn.T, turn @ q.precision @ turn.T, q.log_weights), mapped)
    straight = member(0, False)
    after = rule.step(straight, None, BOWL, 0.05).mean @ turn.T
    assert (rule.step(Mixture(straight.mean @ turn.T, straight.precision), None, turned, 0.05).mean - after).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [NATURAL, QUADRATURE], ids=["delta", "quadrature"])
@each_structure
def test_the_order_of_components_does_not_matter(rule, full):
    q, order = member(0, full), [2, 0, 1]
    prior = member(3, full)
    turned = Mixture(q.mean[order], q.precision[order], q.log_weights[order])
    close(turned.log_prob(normal(9, 4, 2)), q.log_prob(normal(9, 4, 2)), 1e-12)
    looks = rule.look(q, prior, BOWL), rule.look(turned, prior, BOWL)
    close(q.bound(looks[0], prior), turned.bound(looks[1], prior), 1e-12)
    q, turned = (rule.move(a, prior, look, br.Rates(0.02, 0.02))[0] for a, look in zip((q, turned), looks, strict=True))
    same(Mixture(q.mean[order], q.precision[order], q.log_weights[order]), turned)


@pytest.mark.parametrize("curvature", [br.Hessian(), br.DiagonalHessian()], ids=lambda c: type(c).__name__)
@each_structure
def test_both_minima_of_a_double_well_are_found_each_with_what_it_is_worth(full, curvature):
    """Where Newton's method ends from the two starts; the weights are Laplace's evidences."""
    starts = wide([[-1.4], [1.5]])
    q = Mixture(starts, torch.full((2, 1, 1) if full else (2, 1), 4.0, dtype=torch.float64))
    rule = br.BayesRule(br.Delta(), curvature, br.Natural())
    for _ in range(60):
        q = rule.step(q, None, WELL, 0.5)
    ends = [br.newton(well, start, steps=30, tolerance=0.0) for start in starts]
    close(q.mean, torch.stack([end.mean for end in ends]))
    close(q.precision.flatten(), torch.cat([end.precision.flatten() for end in ends]))
    worth = torch.stack([-well(end.mean) - end.log_det() / 2 for end in ends])
    close(q.weights, worth.softmax(0))
    assert 0.7 < q.weights[0] < 0.95


def test_in_many_dimensions_each_component_finds_its_own_minimum():
    start = wide([[1.5, -1.5, 1.5, 2.5], [-1.5, 1.5, 2.5, -2.5], [1.5, 1.5, 1.5, 1.5]])
    q = Mixture(start, torch.full((3, 4), 8.0, dtype=torch.float64))
    for _ in range(60):
        q = NATURAL.step(q, None, WELL, 0.5)
    close(q.mean.sign(), start.sign(), 0)
    slopes = torch.stack([torch.func.grad(well)(mean) for mean in q.mean])
    close(slopes, torch.zeros_like(slopes))


@each_structure
def test_the_evidence_bound_rises_over_fifty_small_steps(full):
    prior, loss = br.Full(wide([0.0, 0.0]), 0.3 * torch.eye(2, dtype=torch.float64)), WELL
    start = torch.full((2, 2), 2.0, dtype=torch.float64)
    q, bounds = Mixture(wide([[-1.0, 0.5], [1.5, 1.0]]), start.diag_embed() if full else start), []
    rule = br.BayesRule(br.GaussHermite(5), br.Hessian(), br.Natural())
    for _ in range(50):
        look = rule.look(q, prior, loss)
        bounds.append(q.bound(look, prior))
        q = rule.move(q, prior, look, br.Rates(0.02, 0.02))[0]
    rises = torch.stack(bounds).diff()
    assert (rises > 0).all() and bounds[-1] - bounds[0] > 0.9


def test_two_components_are_nearer_to_two_modes_than_one():
    prior, loss = br.Full(wide([0.0]), wide([[0.1]])), WELL
    rule, bounds = br.BayesRule(br.GaussHermite(20), br.Hessian(), br.Natural()), []
    for starts in (wide([[-1.8]]), wide([[-1.8], [1.8]])):
        q = Mixture(starts, torch.full((len(starts), 1, 1), 6.0, dtype=torch.float64))
        for _ in range(40):
            q = rule.step(q, prior, loss, 0.3)
        bounds.append(q.bound(rule.look(q, prior, loss), prior))
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    joint = -(0.25 * (x**2 - 4) ** 2 + 0.3 * x) + prior.log_prob(x[:, None])
    evidence = joint.logsumexp(0) + (x[1] - x[0]).log()
    assert bounds[0] + 0.2 < bounds[1] < evidence < bounds[1] + 0.05


@pytest.mark.parametrize("rate", [0.3, 1.0])
@each_structure
def test_riemannian_stays_in_the_family_and_leaves_the_weights(full, rate):
    """At a start between the wells, where the curvature is negative and the rule to the letter leaves."""
    precision = torch.full((2, 1, 1) if full else (2, 1), 0.5, dtype=torch.float64)
    q = start = Mixture(wide([[-0.1], [0.2]]), precision, wide([0.0, 1.0]))
    with pytest.raises(br.DomainError, match="component 0 is not positive definite: use the retraction Riemannian"):
        NATURAL.step(q, None, WELL, rate)
    rule = br.BayesRule(br.Delta(), br.Hessian(), br.Riemannian(clip_radius=0.5))
    look = rule.look(q, None, WELL)
    moved = rule.move(q, None, look, br.Rates(rate, rate))[0]
    H, S = look.curvature, q.precision
    close(moved.precision, S + rate * H + rate**2 / 2 * H * H / S)
    for _ in range(10):
        q = rule.step(q, None, WELL, rate)
        assert (q.precision > 0).all()
        close(q.log_weights, start.log_weights, 0)


@each_structure
def test_riemannian_and_additive_are_natural_but_for_the_weights(full):
    q, prior, rates = member(0, full), member(1, full), br.Rates(1e-3, 1e-3)
    look = NATURAL.look(q, prior, BOWL)
    letter, additive, riemannian = (
        br.BayesRule(br.Delta(), br.Hessian(), retraction).move(q, prior, look, rates)[0]
        for retraction in (br.Natural(), br.Additive(), br.Riemannian())
    )
    close(additive.mean, letter.mean)
    close(additive.precision, letter.precision)
    e = q.sandwich(look.curvature)
    close(riemannian.precision, letter.precision + 0.5e-6 * e)
    assert (letter.log_weights - q.log_weights).abs().max() > 1e-5


# Looks


@each_structure
def test_the_density_has_torchs_value_and_autograds_derivatives(full):
    q, points = member(0, full), 2 * normal(3, 6, 2)
    close(q.log_prob(points), q.to_torch().log_prob(points))
    gradient = torch.func.vmap(torch.func.grad(q.log_prob))(points)
    hessian = torch.func.vmap(_hessian(q.log_prob))(points)
    close(q.log_prob_gradient(points), gradient)
    close(q.log_prob_hessian(points), hessian)
    close(q.log_prob_hessian(points, diagonal=True), hessian.diagonal(dim1=-2, dim2=-1))
    close(q.responsibilities(points).sum(-1), torch.ones(6, dtype=torch.float64))
    close(q.responsibilities(points[0])[1].log(), q.log_weights[1] + _component(q, 1).log_prob(points[0]) - q.log_prob(points[0]))


def _hessian(function):
    return torch.func.jacrev(torch.func.grad(function))


def _component(q, k):
    precision = q.precision[k] if q.precision.dim() == 3 else q.precision[k].diag()
    return MultivariateNormal(q.mean[k], precision_matrix=precision)


@pytest.mark.parametrize(
    "prior", [None, br.Full(normal(7, 2), positive(8, 2)), br.Isotropic(normal(7, 2), wide(0.5)), member(5, True)]
)
@each_structure
def test_the_objective_is_autograds(full, prior):
    q, torchs = member(0, full), prior and prior.to_torch()

    def phi(x):
        return well(x) + q.log_prob(x) - (0.0 if torchs is None else torchs.log_prob(x))

    theta = q.place(q.draw(NOISE))
    oracle = q.objective(br.Loss(well), prior)(theta)
    hessian = torch.stack([_hessian(phi)(one) for one in theta])
    close(oracle.value(), torch.stack([phi(one) for one in theta]))
    close(oracle.gradient(), torch.stack([torch.func.grad(phi)(one) for one in theta]))
    close(oracle.hessian(), hessian)
    close(oracle.diagonal(), hessian.diagonal(dim1=-2, dim2=-1))


def test_losses_that_know_more_are_asked():
    X, y = normal(1, 6, 2), (normal(2, 6) > 0).double()
    loss, q = br.LinearLoss(X, br.likelihoods.Bernoulli(), y), member(0, False)
    oracle = q.objective(loss, None)(q.mean)
    close(oracle.gauss_newton(), oracle.hessian())
    close(oracle.diagonal(), oracle.hessian().diagonal(dim1=-2, dim2=-1))
    exact, cheap = (
        br.BayesRule(br.Delta(), c, br.Natural()).step(q, None, loss, 0.05) for c in (br.Hessian(), br.DiagonalHessian())
    )
    same(exact, cheap)


@pytest.mark.parametrize("curvature", [br.Hessian(), br.Reparameterized()], ids=lambda c: type(c).__name__)
@each_structure
def test_draws_of_every_component_have_the_mean_of_the_quadrature(full, curvature):
    """Within 5 standard errors."""
    q, loss, count = member(0, full), BOWL, 400
    rule = br.BayesRule(br.MonteCarlo(1), curvature, br.Natural())
    exact = QUADRATURE.look(q, None, loss)
    looks = [rule.look(q, None, loss, NOISE.at(step=step)) for step in range(count)]
    for part, expected in enumerate(exact):
        seen = torch.stack([look[part] for look in looks])
        assert ((seen.mean(0) - expected).abs() <= 5 * seen.std(0) / count**0.5 + 1e-6).all()


def test_natural_steps_with_draws_stay_near_those_with_quadrature():
    q = p = Mixture(wide([[-1.5], [1.5]]), torch.full((2, 1, 1), 6.0, dtype=torch.float64))
    drawn = br.BayesRule(br.MonteCarlo(40, antithetic=True), br.Hessian(), br.Natural())
    for step in range(20):
        q = QUADRATURE.step(q, None, WELL, 0.1)
        p = drawn.step(p, None, WELL, 0.1, NOISE.at(step=step))
    close(p.mean, q.mean, 0.03)
    close(p.precision, q.precision, 0.3)
    close(p.weights, q.weights, 0.1)


def test_the_loop_of_inference_runs_it():
    prior = br.Full(wide([0.0]), wide([[0.1]]))
    q = Mixture(wide([[-1.0], [1.5]]), torch.full((2, 1, 1), 2.0, dtype=torch.float64))
    found = br.infer(br.BayesRule(br.GaussHermite(20), br.Hessian(), br.Natural()), q, prior, WELL, rate=0.3, steps=30)
    assert found.trace[-1].bound > found.trace[0].bound
    assert found.q.mean[0] < -1.8 and found.q.mean[1] > 1.7


# Members


@each_structure
def test_natural_parameters_give_the_member_back(full):
    q, other = member(0, full), member(1, full)
    same(q.from_natural(q.natural()), q)
    same(q.from_natural(other.natural()), other)
    assert q.in_domain(other.natural())
    close(q.natural()[2], q.log_weights[:-1] - q.log_weights[-1], 0)
    natural = br.Vector([q.natural()[0], -q.natural()[1], q.natural()[2]])
    assert not q.in_domain(natural)
    with pytest.raises(br.DomainError, match="component 0 is not positive definite"):
        q.from_natural(natural)


@each_structure
def test_natural_gradients_are_autograds_through_the_expectation(full):
    """grad_lambda E_q[f] = F grad_mu E_q[f], block by block F = d mu / d lambda within a component, of a quadratic f."""
    q, b = member(0, full), normal(5, 2)

    def expectation(first, second, ratios):
        p = q.from_natural(br.Vector([first, second, ratios]))
        covariances = p.precision.inverse() if full else (1 / p.precision).diag_embed()
        values = torch.einsum("ki,ij,kj->k", p.mean, A, p.mean) / 2 + (A * covariances).sum((1, 2)) / 2 - p.mean @ b
        return (p.weights * values).sum(), values

    slopes, values = torch.func.grad(expectation, (0, 1, 2), has_aux=True)(*q.natural())
    look = br.Look(values, q.mean @ A - b, q.project(A.expand(3, 2, 2)))
    natural = q.natural_gradient(look)

    def moments(first, second, ratios):
        """Of the components where weights stand still, of the weights where components do."""
        p = q.from_natural(br.Vector([first, second, ratios]))
        held = Mixture(p.mean, p.precision, q.log_weights).expected()
        return held[0], held[1], Mixture(q.mean, q.precision, p.log_weights).expected()[2]

    multiplied = torch.func.vjp(moments, *q.natural())[1](tuple(natural))  # F is symmetric
    for mine, theirs in zip(multiplied, slopes, strict=True):
        close(mine, theirs)


@each_structure
def test_samples_have_the_moments_of_the_mixture(full):
    """Within 5 standard errors."""
    q, count = member(0, full), 1000
    samples = torch.stack([q.sample(NOISE.at(draw=draw)) for draw in range(count)])
    reference = q.to_torch()
    assert samples.shape == (count, 2)
    assert ((samples.mean(0) - reference.mean).abs() <= 5 * (reference.variance / count).sqrt()).all()
    squares = (samples - reference.mean) ** 2
    assert ((squares.mean(0) - reference.variance).abs() <= 5 * squares.std(0) / count**0.5).all()
    share = q.responsibilities(samples)
    assert ((share.mean(0) - q.weights).abs() <= 5 * share.std(0) / count**0.5).all()


@each_structure
def test_precision_acts_on_each_component(full):
    q, v = member(0, full), normal(2, 3, 2)
    dense = q.precision if full else q.precision.diag_embed()
    close(q.stretch(v), torch.einsum("kij,kj->ki", dense, v))
    close(q.precondition(v), torch.linalg.solve(dense, v))
    roots = torch.stack([q.root_solve(unit.expand(3, 2)) for unit in torch.eye(2, dtype=torch.float64)], dim=-1)
    close(roots @ roots.mT, dense.inverse())
    d = q.keep_diagonal(v)
    close(q.sandwich(d), q.project(v.diag_embed() @ dense.inverse() @ v.diag_embed()) if full else d * d / q.precision)


def test_weights_are_normalized_and_may_be_left_out():
    q = member(0, True)
    close(q.weights.sum(), wide(1.0))
    same(Mixture(q.mean, q.precision, q.log_weights + 5), q)
    close(Mixture(q.mean, q.precision).weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_far_from_all_components_nothing_overflows():
    q, far = member(0, True), wide([1e6, -1e6])
    assert q.log_prob(far).isfinite() and q.log_prob_gradient(far).isfinite().all()
    assert q.log_prob_hessian(far).isfinite().all() and q.responsibilities(far).sum() == pytest.approx(1)


@each_structure
def test_float32_stays_float32(full):
    eye = torch.ones(2, 3)
    q = Mixture(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), eye.diag_embed() if full else eye, torch.zeros(2))
    look = br.BayesRule(br.GaussHermite(3), br.Hessian(), br.Natural()).look(q, br.Diagonal(torch.zeros(3)), WELL)
    q = NATURAL.step(q, br.Diagonal(torch.zeros(3)), br.Loss(lambda x: x.square().sum()), 0.1)
    assert {part.dtype for part in (*look, q.mean, q.precision, q.log_weights, q.sample(NOISE))} == {torch.float32}


# What it refuses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(torch.zeros(2), torch.ones(2)), r"must have shape \(K, D\) with K > 0, got \(2,\)"),
        (lambda: Mixture(torch.zeros(0, 2), torch.ones(0, 2)), r"K > 0, got \(0, 2\)"),
        (lambda: Mixture(torch.zeros(3, 2), torch.ones(3)), r"shape \(3, 2\) or \(3, 2, 2\), got \(3,\)"),
        (lambda: Mixture(torch.zeros(3, 2), torch.ones(2, 2)), r"shape \(3, 2\) or \(3, 2, 2\), got \(2, 2\)"),
        (lambda: Mixture(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(2)), r"log_weights must have shape \(3,\), got \(2,\)"),
        (lambda: Mixture(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.0, -math.inf])), "must be finite.*leave.*out"),
        (lambda: Mixture(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]])), "component 1 is not positive definite"),
        (lambda: Mixture(torch.zeros(2, 1), torch.tensor([[[1.0]], [[0.0]]])), "component 1 is not positive definite"),
        (
            lambda: next(Mixture(torch.zeros(1, 4), torch.ones(1, 4)).grid(((0.0, 1.0),))),
            "4 dimensions is too large: use MonteCarlo",
        ),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda q: q.entropy(), "no closed form.*bound"),
        (lambda q: q.kl(q), "no closed form.*bound"),
        (lambda q: q.bend(q.mean), "control variate already"),
        (lambda q: q.score(q.mean), "has no score"),
        (lambda q: q.objective(BOWL, "flat"), "None where it is flat; got a str"),
        (lambda q: q.bound(br.Look(None, q.mean, None), None), "needs the value"),
        (lambda q: q.natural_gradient(br.Look(q.weights, q.mean, None)), "needs a curvature"),
        (lambda q: q.natural_gradient(br.Look(None, q.mean, q.precision)), "needs a value of the loss"),
        (lambda q: q.natural_gradient(br.Look(q.weights, q.mean, q.mean)), r"shape \(3, 2, 2\), got \(3, 2\)"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(use, message):
    with pytest.raises(TypeError, match=message):
        use(member(0, True))


def test_members_are_frozen():
    with pytest.raises(AttributeError):
        member(0, True).mean = torch.zeros(3, 2)
