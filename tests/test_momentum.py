import pytest
import torch
from tests.contracts import close, normal

import bayesrule as br

ZERO = torch.zeros(3, dtype=torch.float64)


def gradients(count=8):
    return [normal(100 + t, 3) for t in range(count)]


def descent(momentum):
    return br.BayesRule(br.Delta(), br.Zero(), br.Additive(), momentum)


def walk(rule, q, prior, seen=None, squared=False):
    """Step number, gradient, q and memory of each step of a rule that is shown these gradients (and their squares)."""
    memory, steps = None, []
    for t, gradient in enumerate(seen or gradients(), start=1):
        look = br.Look(None, gradient, gradient.square() if squared else None)
        q, memory = rule.move(q, prior, look, br.Rates(0.1, 0.2, t), memory)
        steps.append((t, gradient, q, memory))
    return steps


def shown(momentum, prior=None):
    """A walk of plain gradient descent with this momentum."""
    return walk(descent(momentum), START, prior or PRIOR)


START, PRIOR = br.Fixed(normal(0, 3)), br.Fixed(normal(1, 3), 0.4)


class TestMomentum:
    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("beta", [0.0, 0.9])
    def test_over_the_loss_the_prior_acts_at_full_strength_outside(self, beta, debias):
        v, m = ZERO, START.mean
        for t, g, q, memory in shown(br.Momentum(beta, "loss", debias)):
            v = beta * v + (1 - beta) * g
            m = m - 0.1 * ((v / (1 - beta**t) if debias else v) + 0.4 * (m - PRIOR.mean))
            close(memory, v)
            close(q.mean, m)

    @pytest.mark.parametrize("debias", [True, False])
    def test_over_loss_and_prior_everything_is_averaged(self, debias):
        v, m = ZERO, START.mean
        for t, g, q, memory in shown(br.Momentum(0.9, "loss+prior", debias)):
            v = 0.9 * v + 0.1 * (g + 0.4 * (m - PRIOR.mean))
            m = m - 0.1 * (v / (1 - 0.9**t) if debias else v)
            close(memory, v)
            close(q.mean, m)

    def test_debiasing_is_a_rate(self):
        """The debiased average is the one with rates (1 - beta) / (1 - beta^t): the first of them is one."""
        average = normal(5, 3)  # forgotten at once
        momentum, memory = br.Momentum(0.9), None
        for t, g in enumerate(gradients(), start=1):
            look, _, memory = momentum.of_look(START, PRIOR, br.Look(None, g, None), memory, t)
            average = average + 0.1 / (1 - 0.9**t) * (g - average)
            close(look.gradient, average)

    def test_what_is_stored_does_not_depend_on_debiasing(self):
        raw, debiased = (shown(br.Momentum(0.9, debias=d)) for d in (False, True))
        for (*_, a), (*_, b) in zip(raw, debiased, strict=True):
            assert torch.equal(a, b)

    def test_beta_zero_is_no_momentum(self):
        for over in ("loss", "loss+prior"):
            with_, without = (shown(m)[-1][2].mean for m in (br.Momentum(0.0, over), br.NoInertia()))
            close(with_, without)

    def test_the_curvature_passes_untouched(self):
        curvature = normal(3, 3)
        look, _, _ = br.Momentum(0.9).of_look(START, PRIOR, br.Look(None, normal(2, 3), curvature), None, 1)
        assert look.curvature is curvature


class TestHeavyBall:
    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("dampening", [0.0, 0.3])
    @pytest.mark.parametrize("over", ["loss", "loss+prior"])
    def test_follows_its_recursion(self, over, dampening, nesterov):
        v, m = None, START.mean
        for _, g, q, memory in shown(br.HeavyBall(0.8, over, dampening, nesterov)):
            pull = 0.4 * (m - PRIOR.mean)
            force = g + pull if over == "loss+prior" else g
            v = force if v is None else 0.8 * v + (1 - dampening) * force
            m = m - 0.1 * ((force + 0.8 * v if nesterov else v) + (pull if over == "loss" else 0))
            close(memory, v)
            close(q.mean, m)

    @pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, False), (0.3, False), (0.0, True)])
    def test_is_torchs_for_a_centered_prior(self, dampening, nesterov):
        parameter = torch.nn.Parameter(START.mean.clone())
        twin = torch.optim.SGD([parameter], lr=0.1, momentum=0.8, dampening=dampening, weight_decay=0.4, nesterov=nesterov)
        for _, g, q, _ in shown(br.HeavyBall(0.8, "loss+prior", dampening, nesterov), br.Fixed(ZERO, 0.4)):
            parameter.grad = g.clone()
            twin.step()
            close(q.mean, parameter.detach(), 1e-14)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_over_the_step_it_sums_what_the_retraction_made(self, nesterov):
        rule = br.BayesRule(br.Delta(), br.SquaredGradient(), br.SquareRoot(eps=0.01), br.HeavyBall(0.8, "step", nesterov=nesterov))
        prior = br.Diagonal(PRIOR.mean, 0.4)
        v, m, s = None, START.mean, ZERO
        for _, g, q, memory in walk(rule, br.Diagonal(m, ZERO), prior, squared=True):
            s = s + 0.2 * (g.square() - s)
            direction = (g + 0.4 * (m - prior.mean)) / (s.sqrt() + 0.01)
            v = direction if v is None else 0.8 * v + direction
            m = m - 0.1 * (direction + 0.8 * v if nesterov else v)
            close(memory, v)
            close(q.hess, s)
            close(q.mean, m)

    def test_with_a_fixed_precision_it_is_the_heavy_ball_in_natural_parameters(self):
        """lambda_t+1 = lambda_t - rho grad + gamma (lambda_t - lambda_t-1), in units of the metric."""
        q = br.Fixed(normal(0, 3), normal(4, 3).abs() + 0.5)
        flat_prior = br.Fixed(ZERO, 0.0)
        naturals = [q.natural()] + [after.natural() for *_, after, _ in walk(descent(br.HeavyBall(0.8)), q, flat_prior)]
        before = naturals[0]
        for g, now, after in zip(gradients(), naturals, naturals[1:], strict=False):
            close(after, now - 0.1 * g + 0.8 * (now - before))
            before = now


class TestAdamAsMomentumInLambda:
    def test_steps_times_their_denominators_obey_the_heavy_ball(self):
        """D_t+1 (m_t+1 - m_t) = -alpha (1 - beta1) g + beta1 D_t (m_t - m_t-1), D the denominator of each step."""
        rule = br.BayesRule(br.Delta(), br.SquaredGradient(), br.SquareRoot(eps=0.01), br.Momentum(0.9, debias=False))
        prior = br.Diagonal(ZERO, 0.0)
        last, m = ZERO, START.mean
        for _, g, q, _ in walk(rule, br.Diagonal(m, ZERO), prior, squared=True):
            scaled = (q.hess.sqrt() + 0.01) * (q.mean - m)
            close(scaled, -0.1 * 0.1 * g + 0.9 * last)
            last, m = scaled, q.mean


INSIDE = [br.Momentum(0.9, "loss+prior"), br.HeavyBall(0.9, "loss+prior")]


class TestPriorInside:
    """With loss+prior the retraction is left a prior that pulls no more."""

    @pytest.mark.parametrize("momentum", INSIDE, ids=lambda m: type(m).__name__)
    @pytest.mark.parametrize("family", [br.Fixed, br.Isotropic, br.Diagonal, br.Full], ids=lambda f: f.__name__)
    def test_the_prior_that_is_left_is_centered_on_q(self, family, momentum):
        q, prior = family(normal(0, 3), 2.0), family(normal(1, 3), 0.4)
        look, left, _ = momentum.of_look(q, prior, br.Look(None, normal(2, 3), None), None, 1)
        assert q.prior_gradient(left) == 0
        close(torch.as_tensor(left.metric), torch.as_tensor(prior.metric), 0)  # its precision still counts
        close(look.gradient, normal(2, 3) + 0.4 * (q.mean - prior.mean))  # the first step of either

    @pytest.mark.parametrize(
        "momentum", [br.Momentum(0.9, "loss"), br.HeavyBall(0.9, "loss"), br.HeavyBall(0.9, "step"), br.NoInertia()], ids=repr
    )
    def test_otherwise_the_prior_passes_untouched(self, momentum):
        assert momentum.of_look(START, PRIOR, br.Look(None, normal(2, 3), None), None, 1)[1] is PRIOR

    def test_natural_sees_the_same_posterior_whichever_way_the_prior_goes(self):
        """Without memory it makes no difference where the prior's gradient is added."""
        q, prior = br.Full(normal(0, 3), 2.0), br.Full(normal(1, 3), 0.4)
        look = br.Look(None, normal(2, 3), torch.eye(3, dtype=torch.float64))
        ends = [
            br.BayesRule(br.Delta(), br.Zero(), retraction, momentum).move(q.under(prior), prior, look, br.Rates(0.3, 0.3))[0]
            for retraction in (br.Natural(), br.Additive())
            for momentum in (br.Momentum(0.0, "loss"), br.Momentum(0.0, "loss+prior"), br.NoInertia())
        ]
        for end in ends[1:]:
            close(end.mean, ends[0].mean)
            close(end.precision, ends[0].precision)


@pytest.mark.parametrize(
    "momentum",
    [*INSIDE, br.Momentum(0.9), br.HeavyBall(0.9, "step", nesterov=True), br.HeavyBall(0.9, dampening=0.5)],
    ids=repr,
)
def test_memories_are_not_changed_in_place(momentum):
    """After eight steps each is still as it was when it was made."""
    rule = descent(momentum)
    seen = gradients()
    steps = walk(rule, START, PRIOR, seen)
    again = walk(rule, START, PRIOR, gradients())
    for (*_, q, memory), (*_, same_q, same_memory) in zip(steps, again, strict=True):
        assert torch.equal(q.mean, same_q.mean)
        assert torch.equal(memory, same_memory)
    assert all(torch.equal(a, b) for a, b in zip(seen, gradients(), strict=True))


def test_vectors_have_momentum_too():
    def two(seed):
        return br.Vector([normal(seed, 2), normal(seed + 50)])

    q, prior, memory = br.Fixed(two(0)), br.Fixed(two(1), 0.4), None
    v, m, rule = two(0) * 0, two(0), descent(br.Momentum(0.9, "loss+prior", debias=False))
    for t in range(1, 5):
        q, memory = rule.move(q, prior, br.Look(None, two(10 * t), None), br.Rates(0.1, 0.1, t), memory)
        v = 0.9 * v + 0.1 * (two(10 * t) + 0.4 * (m - prior.mean))
        m = m - 0.1 * v
        for a, b in zip(q.mean, m, strict=True):
            close(a, b)
