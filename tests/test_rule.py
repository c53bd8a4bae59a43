import copy
import inspect
import math
import re
from itertools import pairwise

import pytest
import torch
from tests.contracts import close, flat, normal, positive

import bayesrule as br
from bayesrule.algorithms.cvi import CVI
from bayesrule.algorithms.newton import GRADIENT_DESCENT, NEWTON
from bayesrule.family import Family

NATURAL = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
ADDITIVE = br.BayesRule(br.Delta(), br.Hessian(), br.Additive())
RIEMANNIAN = br.BayesRule(br.Delta(), br.Hessian(), br.Riemannian())
SAMPLED = br.BayesRule(br.MonteCarlo(3), br.Reparameterized(), br.Riemannian(), br.Momentum(0.9))
RULES = {"natural": NATURAL, "additive": ADDITIVE, "riemannian": RIEMANNIAN, "sampled": SAMPLED}


def full(seed: int, size: int = 3, **more) -> br.Full:
    return br.Full(normal(seed, size), positive(seed + 10, size), **more)


def diagonal(seed: int, size: int = 3, **more) -> br.Diagonal:
    return br.Diagonal(normal(seed, size), normal(seed + 10, size).abs() + 0.5, **more)


def quadratic(seed: int = 7, size: int = 3) -> br.Quadratic:
    return br.Quadratic(positive(seed, size), normal(seed, size))


def bumpy(theta):
    """Not a quadratic; its Hessian is positive definite."""
    return theta.exp().sum() + (theta.sum() - 1) ** 4 / 4 + theta.square().sum()


FAMILIES = {"full": full, "diagonal": diagonal}


@pytest.fixture(params=FAMILIES)
def make(request):
    return FAMILIES[request.param]


class TestPurity:
    """Nothing is changed in place and nothing is kept."""

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    def test_look_move_and_step_leave_their_inputs_as_they_are(self, rule, make):
        prior, loss = make(1, ess=5.0), br.Loss(bumpy)
        q, memory = make(0, ess=5.0).under(prior), normal(3, 3)
        look, rates = rule.look(q, prior, loss, br.CounterNoise()), br.Rates(0.1, 0.2, 4)
        inputs = (q, prior, look, memory)
        before = copy.deepcopy(inputs)
        rule.look(q, prior, loss, br.CounterNoise())
        rule.move(q, prior, look, rates, memory)
        rule.step(q, prior, loss, 0.1, br.CounterNoise())
        for now, then in zip(inputs, before, strict=True):
            for a, b in zip(tensors(now), tensors(then), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    def test_the_same_step_twice_is_the_same(self, rule, make):
        prior, loss, q = make(1), br.Loss(bumpy), make(0)
        first, second = (rule.step(q, prior, loss, 0.1, br.CounterNoise()) for _ in range(2))
        assert torch.equal(first.mean, second.mean)
        assert torch.equal(first.metric, second.metric)

    def test_a_step_remembers_nothing(self):
        with_memory = br.BayesRule(br.Delta(), br.Hessian(), br.Natural(), br.HeavyBall(0.9))
        q, prior, loss = full(0), full(1), br.Loss(bumpy)
        for _ in range(3):
            close(with_memory.step(q, prior, loss, 0.1).mean, NATURAL.step(q, prior, loss, 0.1).mean)

    def test_what_is_remembered_is_returned(self):
        rule = br.BayesRule(br.Delta(), br.Zero(), br.Additive(), br.Momentum(0.9))
        q, prior, look = br.Fixed(normal(0, 3)), br.Fixed(normal(1, 3), 0.0), br.Look(None, normal(2, 3), None)
        _, memory = rule.move(q, prior, look, br.Rates(0.1, 0.1))
        close(memory, 0.1 * look.gradient)
        _, memory = NATURAL.move(full(0), full(1), br.Look(None, normal(2, 3), positive(3, 3)), br.Rates(0.1, 0.1))
        assert memory is None


def tensors(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, Family):
        return [t for value in (thing.mean, thing.hess, thing.weight_decay) for t in tensors(value)]
    return [t for part in thing for t in tensors(part)] if isinstance(thing, tuple) else []


class TestConjugate:
    """A quadratic loss is a Gaussian likelihood: its natural parameter is the same everywhere."""

    @pytest.mark.parametrize("seed", range(4))
    def test_one_step_of_rate_one_is_bayes_rule_from_any_start(self, seed):
        prior, loss = full(1, ess=5.0), quadratic()
        exact = br.Full(torch.zeros(3), prior.precision + 5 * loss.matrix)
        exact = exact.moved(mean=exact.solve(prior.precision @ prior.mean + 5 * loss.vector))
        q = NATURAL.step(full(seed + 20, ess=5.0), prior, loss)
        close(q.mean, exact.mean)
        close(q.precision, exact.precision)

    def test_one_step_from_the_prior_itself(self):
        prior, loss = full(1), quadratic()
        close(NATURAL.step(prior, prior, loss).precision, prior.precision + loss.matrix)

    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    def test_the_distance_in_natural_parameters_shrinks_by_one_minus_rate(self, rate):
        prior, loss, start = full(1, ess=5.0), quadratic(), full(0, ess=5.0)
        end = flat(NATURAL.step(start, prior, loss).natural())
        q = start
        for step in range(1, 9):
            q = NATURAL.step(q, prior, loss, rate)
            close(flat(q.natural()) - end, (1 - rate) ** step * (flat(start.natural()) - end))

    def test_data_in_two_parts_give_the_posterior_of_all(self):
        prior, first, second = full(1), quadratic(7), quadratic(8)
        both = br.Quadratic(first.matrix + second.matrix, first.vector + second.vector)
        at_once = NATURAL.step(full(0), prior, both)
        for one, other in ((first, second), (second, first)):
            learned = NATURAL.step(full(2), prior, one)
            learned = NATURAL.step(full(3), learned, other)
            close(learned.mean, at_once.mean)
            close(learned.precision, at_once.precision)

    def test_the_posterior_is_a_fixed_point_at_any_rate(self):
        prior, loss = full(1), quadratic()
        posterior = NATURAL.step(prior, prior, loss)
        for rule in (NATURAL, ADDITIVE, RIEMANNIAN):
            again = rule.step(posterior, prior, loss, 0.3)
            close(again.mean, posterior.mean)
            close(again.precision, posterior.precision)

    def test_the_evidence_lower_bound_never_falls(self):
        prior, loss, q = full(1), quadratic(), full(0)

        def bound(q):
            return -loss(q.mean).value() - (loss.matrix * q.covariance).sum() / 2 - q.kl(prior)

        bounds = [bound(q)]
        for _ in range(30):
            q = NATURAL.step(q, prior, loss, 0.1)
            bounds.append(bound(q))
        assert all(later >= earlier - 1e-12 for earlier, later in pairwise(bounds))
        assert bounds[-1] > bounds[0] + 1


class TestNewton:
    def test_rates_one_over_t_average_the_hessians(self):
        """From any start, which the first step forgets."""
        flat_prior, q, loss = br.Full(torch.zeros(3, dtype=torch.float64), 0.0), full(0), br.Loss(bumpy)
        hessians = []
        for step in range(1, 12):
            hessians.append(loss(q.mean).hessian())
            q = NATURAL.step(q, flat_prior, loss, 1 / step)
            close(q.precision, torch.stack(hessians).mean(dim=0))

    @pytest.mark.parametrize("rule", [NATURAL, ADDITIVE, RIEMANNIAN], ids=["natural", "additive", "riemannian"])
    @pytest.mark.parametrize("rate", [1.0, 0.3])
    def test_full_gaussians_are_equivariant_to_affine_changes_of_coordinates(self, rule, rate):
        """With theta = B phi + b, steps in phi are steps in theta."""
        B, b = normal(5, 3, 3) + 2 * torch.eye(3, dtype=torch.float64), normal(6, 3)
        inverse = B.inverse()

        def in_phi(q):
            return br.Full(inverse @ (q.mean - b), B.T @ q.precision @ B)

        q, prior = full(0), full(1)
        mapped, mapped_prior = in_phi(q), in_phi(prior)
        for _ in range(4):
            q = rule.step(q, prior, br.Loss(bumpy), rate)
            mapped = rule.step(mapped, mapped_prior, br.Loss(lambda phi: bumpy(B @ phi + b)), rate)
            close(mapped.mean, in_phi(q).mean, 1e-8)
            close(mapped.precision, in_phi(q).precision, 1e-8)

    def test_a_diagonal_is_not(self):
        """So the test above can fail."""
        B = normal(5, 3, 3) + 2 * torch.eye(3, dtype=torch.float64)
        q, prior, loss = diagonal(0), diagonal(1), br.Loss(bumpy)
        stepped = ADDITIVE.step(q, prior, loss).mean
        mapped = br.Diagonal(B.inverse() @ q.mean, (B.T @ q.precision.diag() @ B).diagonal())
        mapped_prior = br.Diagonal(B.inverse() @ prior.mean, (B.T @ prior.precision.diag() @ B).diagonal())
        moved = ADDITIVE.step(mapped, mapped_prior, br.Loss(lambda phi: bumpy(B @ phi))).mean
        assert (B @ moved - stepped).abs().max() > 1e-2


class TestScale:
    """Only ess times the mean loss counts."""

    @pytest.mark.parametrize("rule", [ADDITIVE, RIEMANNIAN, SAMPLED], ids=["additive", "riemannian", "sampled"])
    @pytest.mark.parametrize("factor", [4.0, 0.3])
    def test_scaling_the_loss_up_and_ess_down_changes_no_mean(self, rule, factor, make):
        noise, walks = br.CounterNoise(seed=1), []
        for c in (1.0, factor):
            prior = make(1, weight_decay=0.5, ess=20.0)
            prior = type(prior)(prior.mean, c * prior.hess, c * prior.weight_decay, 20.0 / c)
            q = make(0, weight_decay=0.5, ess=20.0)
            q = type(q)(q.mean, c * q.hess, c * q.weight_decay, 20.0 / c).under(prior)
            loss, memory, walk = br.Loss(lambda theta, c=c: c * bumpy(theta)), None, []
            for step in range(1, 6):
                look = rule.look(q, prior, loss, noise.at(step=step))
                q, memory = rule.move(q, prior, look, br.Rates(0.1, 0.05, step), memory)
                walk.append((q.mean, q.metric / c))
            walks.append(walk)
        for (mean, metric), (scaled_mean, scaled_metric) in zip(*walks, strict=True):
            close(mean, scaled_mean)
            close(metric, scaled_metric)

    def test_of_the_prior_its_precision_counts_not_how_it_is_split(self, make):
        """Yesterday's posterior comes with an ess of its own."""
        prior = make(1, ess=20.0)
        split = type(prior)(prior.mean, prior.metric / 2, prior.metric / 2, prior.ess)
        other_ess = type(prior)(prior.mean, prior.metric * 4, prior.metric * 0, prior.ess / 4)
        for rule in (NATURAL, ADDITIVE, RIEMANNIAN):
            expected = rule.step(make(0, ess=20.0), prior, br.Loss(bumpy), 0.3)
            for same in (split, other_ess):
                stepped = rule.step(make(0, ess=20.0), same, br.Loss(bumpy), 0.3)
                close(stepped.mean, expected.mean)
                close(stepped.precision, expected.precision)


class TestLook:
    LOOKS = tuple(br.Look(normal(seed), normal(seed, 3), positive(seed, 3)) for seed in range(5))

    def test_lerp_with_one_over_n_gives_the_mean_of_looks(self):
        mean = self.LOOKS[0]
        for n, look in enumerate(self.LOOKS[1:], start=2):
            mean = mean.lerp(look, 1 / n)
        for got, *every in zip(mean, *self.LOOKS, strict=True):
            close(got, torch.stack(every).mean(dim=0))

    def test_lerp_with_zero_and_one_gives_either_look(self):
        a, b = self.LOOKS[:2]
        for got, expected in ((a.lerp(b, 0.0), a), (a.lerp(b, 1.0), b)):
            for x, y in zip(got, expected, strict=True):
                close(x, y, 1e-14)

    def test_what_one_look_did_not_see_is_taken_from_the_other(self):
        seen, blind = self.LOOKS[0], br.Look(None, self.LOOKS[1].gradient, None)
        for mean in (seen.lerp(blind, 0.25), blind.lerp(seen, 0.25)):
            assert mean.value is seen.value
            assert mean.curvature is seen.curvature
        assert blind.lerp(blind, 0.5).value is None
        close(seen.lerp(blind, 0.25).gradient, 0.75 * seen.gradient + 0.25 * blind.gradient)

    def test_vectors_are_looked_at_too(self):
        a, b = (br.Vector([normal(seed, 2), normal(seed + 1)]) for seed in (0, 5))
        mean = br.Look(None, a, a).lerp(br.Look(None, b, b), 0.25)
        close(flat(mean.gradient), 0.75 * flat(a) + 0.25 * flat(b))
        close(flat(mean.curvature), 0.75 * flat(a) + 0.25 * flat(b))


class TestLooking:
    def test_at_the_mean_it_sees_value_gradient_and_hessian(self):
        q, loss = full(0), br.Loss(bumpy)
        look = NATURAL.look(q, q, loss)
        close(look.value, bumpy(q.mean))
        close(look.gradient, torch.func.grad(bumpy)(q.mean))
        close(look.curvature, torch.autograd.functional.hessian(bumpy, q.mean))

    def test_with_draws_it_is_the_mean_over_them(self):
        q, loss, noise = full(0, ess=5.0), br.Loss(bumpy), br.CounterNoise(seed=3, step=2)
        rule = br.BayesRule(br.MonteCarlo(4), br.Hessian(), br.Natural())
        look = rule.look(q, q, loss, noise)
        thetas = [q.sample(noise.at(draw=draw)) for draw in range(4)]
        close(look.value, torch.stack([bumpy(t) for t in thetas]).mean())
        close(look.gradient, torch.stack([torch.func.grad(bumpy)(t) for t in thetas]).mean(dim=0))
        close(look.curvature, torch.stack([torch.autograd.functional.hessian(bumpy, t) for t in thetas]).mean(dim=0))

    def test_another_noise_gives_another_look_and_a_rule_that_draws_needs_one(self):
        q, loss = full(0), br.Loss(bumpy)
        rule = br.BayesRule(br.MonteCarlo(), br.Zero(), br.Additive())
        looks = [rule.look(q, q, loss, noise).value for noise in (br.CounterNoise(), br.CounterNoise(seed=1))]
        assert looks[0] != looks[1]
        with pytest.raises(ValueError, match=r"this rule draws: pass noise=CounterNoise\(seed, step=t\)"):
            rule.step(q, q, loss)

    def test_the_loss_is_asked_once_a_draw(self):
        asked = []

        def loss(theta):
            asked.append(theta)
            return br.Loss(bumpy)(theta)

        q = full(0)
        br.BayesRule(br.Delta(), br.Hessian(), br.Natural()).look(q, q, loss)
        assert len(asked) == 1
        assert asked[0] is q.mean
        br.BayesRule(br.MonteCarlo(5), br.Zero(), br.Natural()).look(q, q, loss, br.CounterNoise())
        assert len(asked) == 6

    def test_no_look_needs_more_than_the_oracle_offers(self):
        class OnlyAGradient(br.Oracle):
            def gradient(self):
                return normal(0, 3)

        q = full(0)
        look = br.BayesRule(br.Delta(), br.Zero(), br.Additive()).look(q, q, lambda theta: OnlyAGradient())
        assert look.value is None
        assert look.curvature is None
        with pytest.raises(TypeError, match="OnlyAGradient cannot give the Hessian"):
            NATURAL.look(q, q, lambda theta: OnlyAGradient())


# The table in the module's docstring


def documented():
    """Rows of the table: algorithm -> the first word of each other column."""
    import bayesrule.rule

    lines = inspect.getdoc(bayesrule.rule).splitlines()
    first, second, third = (i for i, line in enumerate(lines) if line.startswith("===="))
    columns = [(m.start(), m.end()) for m in re.finditer("=+", lines[first])]
    cells = [
        [line[begin:end].strip() for begin, end in columns] for line in (*lines[first + 1 : second], *lines[second + 1 : third])
    ]
    assert cells[0] == ["algorithm", "family", "expectation", "curvature", "retraction", "inertia"]
    return {
        name: [re.match(r"\w+", cell)[0] for cell in rest] for row in cells[1:] for name in row[0].split(", ") for rest in [row[1:]]
    }


def slots(rule):
    return [type(slot).__name__ for slot in (rule.expectation, rule.curvature, rule.retraction, rule.momentum)]


CONSTRUCTED = {
    "gradient descent": lambda: GRADIENT_DESCENT,
    "Newton": lambda: NEWTON,
    "ridge": lambda: NEWTON,
    "SGD": lambda: optimizer_rule(br.SGD, lr=0.1, momentum=0.9),
    "RMSprop": lambda: optimizer_rule(br.RMSprop, lr=0.1, momentum=0.9),
    "Adam": lambda: optimizer_rule(br.Adam, lr=0.1),
    "AdamW": lambda: optimizer_rule(br.AdamW, lr=0.1),
    "IVON": lambda: optimizer_rule(br.IVON, lr=0.1, ess=10.0),
    "conjugate Bayes": lambda: br.conjugate.BAYES,
    "CVI": lambda: CVI,
}


def optimizer_rule(make, **hyper):
    optimizer = make([torch.nn.Parameter(torch.zeros(2))], **hyper)
    return optimizer.rule(optimizer.param_groups[0])


def test_the_table_of_algorithms_is_what_the_constructors_fill_in():
    table = documented()
    assert set(table) == set(CONSTRUCTED)
    for name, (_, *written) in table.items():
        assert slots(CONSTRUCTED[name]()) == written, name


def test_the_families_of_the_table_exist():
    families = {row[0] for row in documented().values()}
    assert all(issubclass(getattr(br, family.split(",")[0]), Family) for family in families)


def test_infinite_ess_has_no_spread_and_no_draws():
    q = br.Diagonal(torch.zeros(2), torch.ones(2), ess=math.inf)
    look = SAMPLED.look(q, q, br.Loss(lambda theta: (theta - 1).square().sum()), br.CounterNoise())
    close(look.gradient, torch.full((2,), -2.0), 0)
    assert look.curvature is None
