"""The one torch optimizer: what it keeps, what it hands out, what it takes back."""

import copy
import math

import pytest
import torch
from tests.instances import ALGORITHMS, PROBLEMS, SMALL_IVON, Network, Quadratic, closure_of, flat, living_bytes, named, train
from torch import Tensor, nn

import bayesrule as br

STATE = {
    br.SGD: {"step"},
    br.RMSprop: {"step", "square_avg"},
    br.Adam: {"step", "exp_avg", "exp_avg_sq"},
    br.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    br.IVON: {"step", "momentum", "hess"},
}
HYPER = {
    br.SGD: dict(lr=0.1),
    br.RMSprop: dict(lr=0.01),
    br.Adam: dict(lr=0.01),
    br.AdamW: dict(lr=0.01),
    br.IVON: SMALL_IVON,
}
BRING_GRADIENTS = [a for a in ALGORITHMS if a.closure != "examples"]


def ivon(problem: nn.Module, **hyper: object) -> br.IVON:
    return br.IVON(problem.parameters(), **{**SMALL_IVON, **hyper})


class TestState:
    @pytest.mark.parametrize("make", STATE, ids=lambda c: c.__name__)
    def test_has_the_names_that_users_rely_on(self, make):
        problem = Network()
        optimizer = make(problem.parameters(), **HYPER[make])
        train(problem, optimizer, 2)
        for p in problem.parameters():
            assert set(optimizer.state[p]) == STATE[make]

    @pytest.mark.parametrize("make", [br.SGD, br.RMSprop], ids=lambda c: c.__name__)
    def test_has_torchs_name_for_the_momentum(self, make):
        problem = Network()
        optimizer = make(problem.parameters(), lr=0.01, momentum=0.9)
        train(problem, optimizer, 2)
        assert set(optimizer.state[problem.inner.bias]) == STATE[make] | {"momentum_buffer"}

    @pytest.mark.parametrize("make", [br.RMSprop, br.Adam, br.AdamW], ids=lambda c: c.__name__)
    def test_has_torchs_names_and_values(self, make):
        ours, theirs = Network(), Network()
        mine = make(ours.parameters(), **HYPER[make])
        other = getattr(torch.optim, make.__name__)(theirs.parameters(), **HYPER[make])
        train(ours, mine, 10)
        train(theirs, other, 10)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert set(mine.state[p]) == set(other.state[q])
            for name, value in other.state[q].items():
                torch.testing.assert_close(mine.state[p][name], value, rtol=1e-11, atol=1e-14)

    @pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
    @pytest.mark.filterwarnings("ignore:.*above the rounding of its dtype")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_is_tensors_only_in_float32_or_wider_with_a_step_of_no_dimension(self, algorithm, dtype):
        """EVON has lists besides, of a tensor or None for each axis, and blocks have rows of a matrix."""
        problem = Quadratic(dtype)
        optimizer = algorithm(problem.parameters())
        train(problem, optimizer, 3)
        for w in problem.parameters():
            axes = {"basis": {"basis", "statistics"}, "blocks": {"matrix", "factor"}}.get(algorithm.keeps, set())
            for name, value in optimizer.state[w].items():
                assert isinstance(value, list if name in axes else Tensor)
                values = [axis for axis in value if axis is not None] if name in axes else [value]
                assert not any(each.requires_grad for each in values)
                if name == "step":
                    assert value.shape == ()
                    assert value.item() == 3
                else:
                    shapes = optimizer.lists(w, name) if name in axes else [w.shape]
                    assert all(tuple(each.shape) in shapes for each in values)
                    assert all(each.dtype == torch.promote_types(dtype, torch.float32) for each in values)

    @pytest.mark.parametrize("make", [br.IVON, br.Adam], ids=lambda c: c.__name__)
    def test_costs_two_tensors_a_parameter(self, make):
        problem = Network()
        optimizer = make(problem.parameters(), **HYPER[make])
        train(problem, optimizer, 2)
        for p in problem.parameters():
            assert sum(value.numel() for value in optimizer.state[p].values()) == 2 * p.numel() + 1

    @pytest.mark.usefixtures("unburdened")
    def test_no_graph_is_kept_from_step_to_step(self):
        problem = Network()
        optimizer = ivon(problem)
        train(problem, optimizer, 3)
        before = living_bytes()
        train(problem, optimizer, 10)
        assert living_bytes() == before

    def test_the_raw_averages_are_stored_and_debiased_on_use(self):
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = br.IVON([w], lr=0.1, ess=math.inf, betas=(0.9, 1.0), weight_decay=0.0, hess_init=1.0)
        with optimizer.sampled_params(train=True):
            w.grad = torch.ones_like(w)
        optimizer.step()
        assert optimizer.state[w]["momentum"].item() == pytest.approx(0.1)
        assert w.item() == pytest.approx(-0.1)


class TestLearning:
    @pytest.mark.parametrize(
        ("algorithm", "problem"),
        [
            pytest.param(algorithm, problem, id=f"{named(algorithm)}-{name}")
            for algorithm in ALGORITHMS
            for name, problem in PROBLEMS.items()
            if algorithm.make is not br.STE or problem is not Quadratic  # at whose signs some slope always points inwards
        ],
    )
    def test_the_loss_falls(self, algorithm, problem):
        net = problem()
        optimizer = algorithm(net.parameters())
        before = sum(net.loss(step).item() for step in range(4))
        train(net, optimizer, 100)
        after = sum(net.loss(step).item() for step in range(4))
        assert after < 0.6 * before

    @pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
    def test_named_parameters_are_welcome(self, algorithm):
        plain, labeled = Network(), Network()
        path = train(plain, algorithm(plain.parameters()), 5)
        optimizer = algorithm(labeled.named_parameters())
        assert torch.equal(path, train(labeled, optimizer, 5))
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in labeled.named_parameters()]

    @pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
    def test_step_returns_the_closures_loss(self, algorithm):
        class Level(Network):
            def loss(self, *args: object) -> Tensor:
                return super().loss(*args) * 0 + 2.5

        net = Level()
        optimizer = algorithm(net.parameters())
        assert optimizer.step(closure_of(net, optimizer, 0)).item() == pytest.approx(2.5)

    @pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
    def test_step_hooks_run(self, algorithm):
        net = Network()
        optimizer = algorithm(net.parameters())
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        train(net, optimizer, 2)
        assert calls == ["before", "after"] * 2

    @pytest.mark.filterwarnings("ignore:.*no gradient arrived in a draw")
    @pytest.mark.parametrize("algorithm", BRING_GRADIENTS, ids=named)
    def test_a_step_without_any_gradient_raises(self, algorithm):
        net = Network()
        optimizer = algorithm(net.parameters())
        with pytest.raises(RuntimeError, match=f"{algorithm.make.__name__}.step\\(\\): no parameter has a gradient"):
            optimizer.step(lambda: 1.0)

    @pytest.mark.filterwarnings("ignore:.*no gradient arrived in a draw")
    @pytest.mark.parametrize("algorithm", BRING_GRADIENTS, ids=named)
    def test_a_closure_that_skips_its_batch_changes_nothing_and_is_told_once(self, algorithm):
        net = Network()
        optimizer = algorithm(net.parameters())
        before = [p.detach().clone() for p in net.parameters()]
        with pytest.warns(UserWarning, match="whose closure returned None and left no gradient"):
            assert optimizer.step(lambda: None) is None
        optimizer.step(lambda: None)
        assert all(map(torch.equal, net.parameters(), before))


class TestLoading:
    """What was saved by something else is refused, in words, and changes nothing."""

    @staticmethod
    def saved(make: type, **hyper: object) -> dict:
        net = Network()
        optimizer = make(net.parameters(), **hyper)
        train(net, optimizer, 2)
        return optimizer.state_dict()

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param((torch.optim.Adam, dict(lr=0.1)), id="torch-adam"),
            pytest.param((torch.optim.SGD, dict(lr=0.1)), id="torch-sgd"),
            pytest.param((torch.optim.SGD, dict(lr=0.1, momentum=0.9)), id="torch-sgd-momentum"),
            pytest.param((br.Adam, dict(lr=0.1)), id="adam"),
            pytest.param((br.SGD, dict(lr=0.1)), id="sgd"),
        ],
    )
    def test_the_state_of_another_optimizer_is_refused(self, other):
        net = Network()
        optimizer = ivon(net)
        train(net, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="IVON"):
            optimizer.load_state_dict(self.saved(other[0], **other[1]))
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
        train(net, optimizer, [2])

    def test_the_settings_of_another_optimizer_that_has_not_trained_are_refused(self):
        net = Network()
        optimizer = ivon(net)
        untrained = torch.optim.Adam(Network().parameters()).state_dict()
        with pytest.raises(ValueError, match="IVON"):
            optimizer.load_state_dict(untrained)
        train(net, optimizer, 1)

    @pytest.mark.parametrize("make", [br.SGD, br.RMSprop, br.Adam, br.AdamW], ids=lambda c: c.__name__)
    def test_the_state_of_ivon_is_refused_by_the_others(self, make):
        net = Network()
        optimizer = make(net.parameters(), **HYPER[make])
        with pytest.raises(ValueError, match=make.__name__):
            optimizer.load_state_dict(self.saved(br.IVON, **SMALL_IVON))
        train(net, optimizer, 1)

    def test_hyper_parameters_outside_their_range_are_refused(self):
        net = Network()
        optimizer = ivon(net)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["ess"] = -3.0
        with pytest.raises(ValueError, match=r"IVON: parameter group 0: ess must be .* got -3.0"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["ess"] == SMALL_IVON["ess"]

    def test_tensors_of_another_shape_are_refused(self):
        class Wider(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.outer = nn.Linear(6, 7), nn.Linear(7, 3)

        optimizer = br.IVON(Wider().parameters(), **SMALL_IVON)
        with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
            optimizer.load_state_dict(self.saved(br.IVON, **SMALL_IVON))

    def test_before_the_first_step_a_state_loads_too(self):
        net = Network()
        optimizer = ivon(net)
        optimizer.load_state_dict(ivon(Network(), lr=0.7).state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.7
        train(net, optimizer, 1)


class TestPosterior:
    def test_from_optimizer_and_the_optimizers_own_are_the_same(self):
        net = Network()
        optimizer = ivon(net)
        train(net, optimizer, 2)
        one, two = br.Posterior.from_optimizer(optimizer, net, num_data=64), optimizer.posterior(net, num_data=64)
        assert one.num_data == two.num_data == 64
        for block in ("mean", "precision", "prior_mean", "prior_precision"):
            for name, value in getattr(one, block).items():
                assert torch.equal(value, getattr(two, block)[name])

    def test_before_the_first_step_is_the_start(self):
        net = Network()
        post = ivon(net).posterior(net)
        for name, p in net.named_parameters():
            assert torch.equal(post.mean[name], p)
            torch.testing.assert_close(post.precision[name], torch.full_like(p, 50.0 * 0.51), rtol=1e-14, atol=0)

    def test_does_not_follow_the_weights_afterwards(self):
        net = Network()
        optimizer = ivon(net)
        train(net, optimizer, 2)
        post = optimizer.posterior(net)
        mean, precision = flat(post.mean.values()), flat(post.precision.values())
        train(net, optimizer, [2, 3])
        assert torch.equal(flat(post.mean.values()), mean)
        assert torch.equal(flat(post.precision.values()), precision)

    def test_asked_for_inside_a_context_is_at_the_mean(self):
        net = Network()
        optimizer = ivon(net)
        mean = flat(net.parameters())
        with optimizer.sampled_params(train=False):
            post = optimizer.posterior(net)
        assert torch.equal(flat(post.mean.values()), mean)

    def test_leaves_frozen_parameters_out(self):
        net = Network()
        net.inner.bias.requires_grad_(False)
        assert "inner.bias" not in ivon(net).posterior(net).mean

    @pytest.mark.parametrize("make", [br.SGD, br.Adam, br.AdamW, br.RMSprop], ids=lambda c: c.__name__)
    def test_of_an_optimizer_that_learns_none_is_refused(self, make):
        net = Network()
        with pytest.raises(TypeError, match=f"{make.__name__} learns no posterior; train with bayesrule.IVON"):
            br.Posterior.from_optimizer(make(net.parameters(), **HYPER[make]), net)

    def test_of_a_foreign_optimizer_is_refused(self):
        net = Network()
        with pytest.raises(TypeError, match=r"Adam learns no posterior; train with bayesrule.IVON"):
            br.Posterior.from_optimizer(torch.optim.Adam(net.parameters()), net)

    def test_over_parameters_outside_the_model_is_refused(self):
        net = Network()
        extra = nn.Parameter(torch.zeros(2, 9))
        optimizer = br.IVON([*net.parameters(), extra], **SMALL_IVON)
        with pytest.raises(ValueError, match=r"shape \(2, 9\) that the model does not hold"):
            optimizer.posterior(net)

    def test_of_groups_that_differ_in_ess_is_refused(self):
        net = Network()
        groups = [{"params": list(net.inner.parameters()), "ess": 10.0}, {"params": list(net.outer.parameters())}]
        with pytest.raises(ValueError, match=r"differ in ess \[10.0, 50.0\]"):
            br.IVON(groups, **SMALL_IVON).posterior(net)

    def test_knows_its_prior(self):
        net = Network()
        post = ivon(net).posterior(net)
        for name in post.mean:
            assert post.prior_mean[name] == 0
            assert post.prior_precision[name].item() == pytest.approx(50.0 * 0.01)

    def test_is_in_float32_beside_bfloat16_weights(self):
        net = nn.Linear(2, 2).bfloat16()
        post = br.IVON(net.parameters(), lr=0.1, ess=10.0).posterior(net)
        assert {t.dtype for t in (*post.mean.values(), *post.precision.values())} == {torch.float32}


def test_repr_shows_the_hyper_parameters():
    text = repr(ivon(Network()))
    assert text.startswith("IVON (")
    assert "hess_init: 0.5" in text
