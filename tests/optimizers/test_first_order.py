"""SGD, RMSprop, Adam and AdamW as instances of the rule are torch's, to rounding."""

import inspect

import pytest
import torch
from tests.instances import ALGORITHMS, TWINS, Network, Quadratic, flat, named, train
from torch import Tensor, nn

import bayesrule as br

STEPS = 80
HYPER = {
    br.SGD: dict(lr=0.05, momentum=0.9, weight_decay=0.01),
    br.RMSprop: dict(lr=0.01, momentum=0.5, weight_decay=0.01),
    br.Adam: dict(lr=0.01, weight_decay=0.05),
    br.AdamW: dict(lr=0.01, weight_decay=0.1),
}
FIRST_ORDER = [a for a in TWINS if (a.keeps, a.closure) == ("nothing", "once")]


def torchs(ours: type) -> type:
    return getattr(torch.optim, ours.__name__)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# A falling rate keeps the comparison fair: at a constant one RMSprop circles the minimum in steps of its own size, and there
# torch's path, begun one unit in the last place aside, is 4e-3 from itself after 200 steps.


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=named)
def test_takes_the_steps_of_its_twin_under_a_schedulers_rate(algorithm):
    ours, theirs = Network(), Network()
    paths = []
    for problem, optimizer in ((ours, algorithm(ours.parameters())), (theirs, algorithm.torch(theirs.parameters()))):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        rows = []
        for step in range(100):
            rows.append(train(problem, optimizer, [step]))
            scheduler.step()
        paths.append(torch.cat(rows))
    assert_same(*paths)


@pytest.mark.parametrize("algorithm", HYPER, ids=lambda a: a.__name__)
def test_takes_the_steps_of_its_twin_in_two_groups(algorithm):
    def path(make: type) -> Tensor:
        problem = Network()
        groups = [
            {"params": list(problem.inner.parameters()), "lr": 0.02, "weight_decay": 0.0},
            {"params": list(problem.outer.parameters())},
        ]
        return train(problem, make(groups, **HYPER[algorithm]), STEPS, decay=0.99)

    assert_same(path(algorithm), path(torchs(algorithm)))


@pytest.mark.parametrize("algorithm", HYPER, ids=lambda a: a.__name__)
def test_takes_the_steps_of_its_twin_where_gradients_are_absent_in_some_steps(algorithm):
    """A parameter out of the graph is left alone, its decay and its debiasing too."""

    def path(make: type) -> Tensor:
        problem = Network()

        def loss(problem: Network, step: int) -> Tensor:
            inner = [p for p in problem.inner.parameters()]
            for p in inner:
                p.requires_grad_(step % 3 != 1)
            value = problem.loss(step)
            return value if step % 3 != 2 else value + problem.inner.weight.square().sum()

        optimizer = make(problem.parameters(), **HYPER[algorithm])
        rows = []
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss(problem, step).backward()
            for p in problem.parameters():
                p.requires_grad_(True)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            rows.append(flat(problem.parameters()))
        return torch.stack(rows)

    ours = path(algorithm)
    assert_same(ours, path(torchs(algorithm)))
    inner = slice(0, 5 * 7)
    assert torch.equal(ours[0, inner], ours[1, inner])  # absent in step 1
    assert (ours[1, inner] != ours[2, inner]).all()


@pytest.mark.parametrize("algorithm", HYPER, ids=lambda a: a.__name__)
def test_parameters_that_join_late_are_debiased_from_their_own_first_step(algorithm):
    def path(make: type) -> Tensor:
        problem = Network()
        optimizer = make(problem.inner.parameters(), **HYPER[algorithm])
        early = train(problem, optimizer, 10, decay=0.99)
        optimizer.add_param_group({"params": list(problem.outer.parameters()), "lr": 0.02})
        return torch.cat([early, train(problem, optimizer, range(10, 50), decay=0.99)])

    ours = path(algorithm)
    assert_same(ours, path(torchs(algorithm)))


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=named)
def test_float32_stays_near_its_twin(algorithm):
    ours, theirs = (Network(dtype=torch.float32) for _ in range(2))
    path = train(ours, algorithm(ours.parameters()), 50)
    twin = train(theirs, algorithm.torch(theirs.parameters()), 50)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path, twin, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=named)
def test_ordinary_loop_and_closure_are_the_same(algorithm):
    looped, closed = Network(), Network()
    optimizer = algorithm(looped.parameters())
    for step in range(20):
        optimizer.zero_grad()
        looped.loss(step).backward()
        optimizer.step()
    train(closed, algorithm(closed.parameters()), 20)
    assert torch.equal(flat(looped.parameters()), flat(closed.parameters()))


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=named)
def test_gradients_are_left_standing_without_draws_as_torch_leaves_them(algorithm):
    problem = Network()
    optimizer = algorithm(problem.parameters())
    problem.loss(0).backward()
    before = [p.grad.clone() for p in problem.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.parameters(), before, strict=True))


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=named)
def test_needs_no_draw_and_a_context_shows_the_mean(algorithm):
    problem = Quadratic()
    optimizer = algorithm(problem.parameters())
    with optimizer.sampled_params(train=False):
        assert torch.equal(flat(problem.parameters()), flat(Quadratic().parameters()))
    train(problem, optimizer, 2)


def test_no_optimizer_has_a_step_of_its_own():
    public = [getattr(br, name) for name in br.__all__]
    classes = [c for c in public if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    assert {a.make for a in ALGORITHMS} == set(classes)
    for cls in classes:
        # torch wraps `step` on the class it makes an instance of, so look below the wrapping
        assert inspect.unwrap(cls.step) is inspect.unwrap(br.BayesOptimizer.step)


def test_sgd_on_a_quadratic_with_noise_averaged_is_gradient_descent():
    """E_q[gradient] of a quadratic is the gradient at the mean: mirrored draws give exactly that."""
    noisy, quiet = Quadratic(), Quadratic()
    hyper = dict(betas=(0.0, 1.0), weight_decay=0.0, hess_init=1.0)
    ours = br.IVON(noisy.parameters(), lr=0.1, ess=10.0, mc_samples=2, antithetic=True, **hyper)
    assert_same(train(noisy, ours, 50), train(quiet, br.SGD(quiet.parameters(), lr=0.1), 50))


def test_adam_obeys_the_rules_heavy_ball_identity():
    """D_new step_new = -a (1 - beta1) g + beta1 D_old step_old, with debiasing folded into rate and eps (spec, 4)."""
    problem, (b1, b2), lr, eps = Network(), (0.9, 0.99), 0.01, 1e-8
    optimizer = br.Adam(problem.parameters(), lr=lr, betas=(b1, b2), eps=eps)
    weights, pushed = flat(problem.parameters()), 0.0
    for t in range(1, 31):
        gradient = flat(torch.autograd.grad(problem.loss(t - 1), list(problem.parameters())))
        train(problem, optimizer, [t - 1])
        moved = flat(problem.parameters()) - weights
        weights = weights + moved
        square = flat(optimizer.state[p]["exp_avg_sq"] for p in problem.parameters())
        denominator = (square / (1 - b2**t)).sqrt() + eps
        force = -moved * denominator * (1 - b1**t) / lr
        torch.testing.assert_close(force, (1 - b1) * gradient + b1 * pushed, rtol=1e-8, atol=1e-10)
        pushed = force


def test_rmsprop_momentum_is_of_steps_not_gradients():
    """The first step of lr 1 with square_avg (1 - alpha) g^2 is sign(g) / sqrt(1 - alpha), the second adds half of it."""
    w = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = br.RMSprop([w], lr=1.0, alpha=0.0, eps=0.0, momentum=0.5)
    for expected in (-1.0, -2.5):
        w.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
        assert w.item() == pytest.approx(expected)


@pytest.mark.parametrize("make", [br.SGD, br.RMSprop, br.STE, br.Dropout], ids=lambda make: make.__name__)
def test_momentum_may_be_turned_off(make):
    """And what was remembered is not used any more."""
    problem = Network()
    optimizer = make(problem.parameters(), lr=0.01, momentum=0.9)
    train(problem, optimizer, 3)
    optimizer.param_groups[0]["momentum"] = 0.0
    assert train(problem, optimizer, 2).isfinite().all()


@pytest.mark.parametrize("make", [br.SGD, br.IVON, br.EVON, br.Dropout, br.STE], ids=lambda make: make.__name__)
def test_sparse_parameters_are_refused(make):
    w = torch.nn.Parameter(torch.eye(3).to_sparse())
    arguments = {
        "lr": 0.1,
        **({"ess": 10.0} if make in (br.IVON, br.EVON) else {}),
        **({"hess_init": 1.0} if make is br.EVON else {}),
    }
    with pytest.raises(TypeError, match=f"{make.__name__}: parameter group 0 has sparse parameters"):
        make([w], **arguments)


@pytest.mark.parametrize("kind", [br.AdamW, br.Adam, br.RMSprop], ids=lambda kind: kind.__name__)
def test_contexts_of_a_step_are_accumulated_as_torchs_gradients(kind):
    """The squares are of their mean, weighted, and not the mean of their squares."""
    torch.manual_seed(0)
    start, batches = torch.randn(5, 3), torch.randn(4, 3, 5, 3)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, twin = kind([ours], lr=0.1), getattr(torch.optim, kind.__name__)([theirs], lr=0.1)
    for step in batches:
        for g, weight in zip(step, (1.0, 2.0, 1.0), strict=True):
            with optimizer.sampled_params(train=True, weight=weight):
                optimizer.zero_grad()
                (ours * g).sum().backward()
        optimizer.step()
        theirs.grad = (step[0] + 2 * step[1] + step[2]) / 4
        twin.step()
        torch.testing.assert_close(ours, theirs)
