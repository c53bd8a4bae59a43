"""The ten rules for draws (design, section 4), and the faults of the published code that must not come back (spec, 6.6).

Of the rules, `train()`, `eval()`, `attach` and `noise_per_rank` belong to what is not built yet.
"""

import contextlib
import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from tests.instances import ALGORITHMS as EVERY
from tests.instances import SMALL_IVON, Network, Quadratic, draw, flat, living_bytes, named, replay, state, train
from torch import Tensor, nn

import bayesrule as br

VARIATIONAL = [a for a in EVERY if a.kind == "variational"]
APPROXIMATIONS = [
    pytest.param(dict(hess_approx="price"), id="price"),
    pytest.param(dict(hess_approx="gradsq", gradsq_scale=8.0), id="gradsq"),
]


def pair(dtype: torch.dtype = torch.float64, **hyper: object) -> tuple[Network, br.IVON]:
    problem = Network(dtype)
    return problem, br.IVON(problem.parameters(), **{**SMALL_IVON, **hyper})


def everything(optimizer: br.IVON, problem: nn.Module) -> Tensor:
    """Weights, momentum and curvature in one row."""
    return torch.cat([flat(problem.parameters()), state(optimizer, "momentum"), state(optimizer, "hess")])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def assert_equal_states(found: dict, expected: dict) -> None:
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class TestOpening:
    """Rule 1."""

    def test_a_context_puts_a_sample_where_the_mean_was(self):
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            assert (flat(problem.parameters()) != mean).all()
            problem.loss(0).backward()
        assert torch.equal(flat(problem.parameters()), mean)

    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("inner", [True, False])
    def test_nested_contexts_raise_and_leave_the_mean(self, outer, inner):
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with (
            pytest.raises(RuntimeError, match="draw is open already"),
            optimizer.sampled_params(train=outer),
            optimizer.sampled_params(train=inner),
        ):
            pytest.fail("the inner context opened")
        assert torch.equal(flat(problem.parameters()), mean)
        draw(optimizer, problem)
        optimizer.step()

    def test_two_optimizers_may_have_a_draw_open_at_once(self):
        problem, optimizer = pair()
        other, second = pair(seed=1)
        with optimizer.sampled_params(train=True), second.sampled_params(train=True):
            (problem.loss(0) + other.loss(0)).backward()
        optimizer.step()
        second.step()

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
    def test_a_weight_that_is_no_weight_is_refused(self, weight):
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with pytest.raises(ValueError, match="weight of a draw"), optimizer.sampled_params(train=True, weight=weight):
            pytest.fail("the context opened")
        assert torch.equal(flat(problem.parameters()), mean)

    def test_the_context_trains_unless_told_otherwise(self):
        """Fault 17: with training off by default, a forgotten flag surfaced only at the step."""
        problem, optimizer = pair()
        with optimizer.sampled_params():
            problem.loss(0).backward()
        optimizer.step()
        assert (state(optimizer, "hess") != SMALL_IVON["hess_init"]).all()


class TestClosing:
    """Rule 2."""

    @pytest.mark.filterwarnings("ignore:.*no gradient arrived in a draw")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_mean_returns_bit_by_bit(self, training, dtype):
        w = nn.Parameter(torch.linspace(-3, 1e3, 999).to(dtype))
        w.data[:2] = torch.tensor([1e-7, 0.0]).to(dtype)
        mean = w.detach().clone()
        optimizer = br.IVON([w], lr=0.1, ess=10.0)
        for _ in range(3):
            with optimizer.sampled_params(train=training):
                assert not torch.equal(w, mean)
            assert torch.equal(w.view(torch.uint8), mean.view(torch.uint8))

    def test_draws_that_show_nothing_warn_once(self):
        _, optimizer = pair()
        with optimizer.sampled_params():
            pass
        with (
            pytest.warns(UserWarning, match="no gradient arrived in a draw that is to be learned from"),
            optimizer.sampled_params(),
        ):
            pass
        with optimizer.sampled_params():
            pass

    def test_only_looks_where_gradients_are_disabled(self):
        """As an evaluation does that forgets to say so: each look is another sample."""
        problem, optimizer = pair()
        seen = []
        with torch.no_grad():
            for _ in range(3):
                with optimizer.sampled_params():
                    seen.append(flat(problem.parameters()))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_exception_restores_the_mean(self, training, error):
        """Fault 3: the mean was lost."""
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with pytest.raises(error), optimizer.sampled_params(train=training):
            problem.loss(0).backward()
            raise error
        assert torch.equal(flat(problem.parameters()), mean)

    def test_an_exception_discards_the_draw_as_if_it_had_not_been(self):
        problem, optimizer = pair()
        where = None
        with contextlib.suppress(ValueError), optimizer.sampled_params(train=True):
            where = flat(problem.parameters())
            problem.loss(0).backward()
            raise ValueError
        assert all(p.grad is None for p in problem.parameters())
        assert torch.equal(draw(optimizer, problem), where)  # the same noise is drawn again
        optimizer.step()
        other, untroubled = pair()
        draw(untroubled, other)
        untroubled.step()
        assert torch.equal(everything(optimizer, problem), everything(untroubled, other))

    def test_an_exception_in_a_second_draw_keeps_the_first(self):
        problem, optimizer = pair()
        draw(optimizer, problem)
        with contextlib.suppress(ValueError), optimizer.sampled_params(train=True):
            problem.loss(1).backward()
            raise ValueError
        optimizer.step()
        other, untroubled = pair()
        draw(untroubled, other)
        untroubled.step()
        same(everything(optimizer, problem), everything(untroubled, other))

    def test_an_exception_in_the_closure_restores_the_mean(self):
        problem, optimizer = pair(mc_samples=2)
        mean = flat(problem.parameters())

        def closure() -> Tensor:
            problem.loss(0).backward()
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            optimizer.step(closure)
        assert torch.equal(flat(problem.parameters()), mean)
        train(problem, optimizer, 1)

    def test_state_dict_inside_a_context_closes_the_draw(self):
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            optimizer.state_dict()
            assert torch.equal(flat(problem.parameters()), mean)
        optimizer.step()
        other, plain = pair()
        draw(plain, other)
        plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_step_inside_a_context_closes_the_draw(self):
        problem, optimizer = pair()
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            optimizer.step()
            moved = flat(problem.parameters())
        assert torch.equal(flat(problem.parameters()), moved)
        other, plain = pair()
        draw(plain, other)
        plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_a_checkpoint_between_draw_and_step_is_at_the_mean(self):
        problem, optimizer = pair()
        mean = {name: p.detach().clone() for name, p in problem.named_parameters()}
        draw(optimizer, problem)
        for name, value in problem.state_dict().items():
            assert torch.equal(value, mean[name])


class TestReading:
    """Rules 3 and 4."""

    def test_zero_grad_after_a_closed_context_does_not_lose_the_draw(self):
        problem, optimizer = pair()
        other, plain = pair()
        for step in range(3):
            draw(optimizer, problem, step)
            optimizer.zero_grad()
            assert all(p.grad is None for p in problem.parameters())
            optimizer.step()
            draw(plain, other, step)
            plain.step()
        same(everything(optimizer, problem), everything(plain, other))

    def test_zero_grad_in_an_open_context_only_clears(self):
        problem, optimizer = pair()
        other, plain = pair()
        with optimizer.sampled_params(train=True):
            problem.loss(3).backward()
            optimizer.zero_grad()
            problem.loss(0).backward()
        optimizer.step()
        draw(plain, other)
        plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_missing_zero_grad_between_draws_counts_nothing_twice(self, approximation):
        """Fault 12: gradients piled up and were counted twice, silently."""
        problem, careless = pair(**approximation)
        other, careful = pair(**approximation)
        for step in range(3):
            for _ in range(3):
                draw(careless, problem, step)
                careful.zero_grad()
                draw(careful, other, step)
            careless.step()
            careful.step()
            careful.zero_grad()
        same(everything(careless, problem), everything(careful, other))

    def test_missing_zero_grad_between_steps_counts_nothing_twice(self):
        problem, careless = pair()
        other, careful = pair()
        for step in range(3):
            draw(careless, problem, step)
            careless.step()
            careful.zero_grad()
            draw(careful, other, step)
            careful.step()
        assert torch.equal(everything(careless, problem), everything(careful, other))

    def test_a_gradient_from_whoever_put_it_there_is_read(self):
        problem, optimizer = pair()
        other, plain = pair()
        with optimizer.sampled_params(train=True):
            gradients = torch.autograd.grad(problem.loss(0), list(problem.parameters()))
        for p, g in zip(problem.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
        draw(plain, other)
        plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_several_backwards_in_one_context_are_one_draw(self):
        """Accumulation (a): one sample, loss / k each."""
        problem, pieces = pair()
        other, whole = pair()
        with pieces.sampled_params(train=True):
            for step in range(4):
                (problem.loss(step) / 4).backward()
        pieces.step()
        with whole.sampled_params(train=True):
            (sum(other.loss(step) for step in range(4)) / 4).backward()
        whole.step()
        same(everything(pieces, problem), everything(whole, other))

    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 3.0, 0.5), (16.0, 16.0, 7.0)])
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_draws_are_averaged_with_their_weights(self, approximation, weights):
        """Accumulation (b), and fault 19: micro-batches of unequal size."""
        hyper = {**SMALL_IVON, **approximation, "lr": 0.0, "betas": (0.0, 0.9)}
        problem = Network()
        optimizer = br.IVON(problem.parameters(), **hyper)
        mean, total, gradient, curvature = flat(problem.parameters()), sum(weights), 0.0, 0.0
        for step, weight in enumerate(weights):
            with optimizer.sampled_params(train=True, weight=weight):
                offset = flat(problem.parameters()) - mean
                problem.loss(step).backward()
            by_hand = Network()
            nn.utils.vector_to_parameters(mean + offset, by_hand.parameters())
            g = flat(torch.autograd.grad(by_hand.loss(step), list(by_hand.parameters())))
            gradient = gradient + weight / total * g
            if approximation["hess_approx"] == "price":
                curvature = curvature + weight / total * hyper["ess"] * (0.5 + 0.01) * offset * g
            else:
                curvature = curvature + weight / total * 8.0 * g**2
        with quietly():
            optimizer.step()
        excess = curvature - 0.5
        hess = 0.5 + 0.1 * excess + 0.5 * 0.1**2 * excess**2 / 0.51
        torch.testing.assert_close(state(optimizer, "momentum"), gradient, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state(optimizer, "hess"), hess, rtol=1e-11, atol=1e-13)

    def test_a_parameter_without_gradient_in_one_of_two_draws_counts_zero_there(self):
        problem, optimizer = pair(betas=(0.0, 0.9), lr=0.0)
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            first = problem.inner.weight.grad.clone()
        with optimizer.sampled_params(train=True):
            problem.outer(torch.zeros(7, dtype=torch.float64)).sum().backward()
        with quietly():
            optimizer.step()
        torch.testing.assert_close(optimizer.state[problem.inner.weight]["momentum"], first / 2)

    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_what_is_kept_between_draws_does_not_grow_with_their_number(self, approximation):
        def kept(draws: int) -> int:
            problem, optimizer = pair(**approximation)
            for _ in range(draws):
                draw(optimizer, problem)
            return living_bytes()

        two = kept(2)
        assert kept(8) == two == kept(30)

    def test_a_finished_step_leaves_two_tensors_a_parameter_and_scratch_that_does_not_grow(self):
        problem, optimizer = pair(mc_samples=3)
        train(problem, optimizer, 2)
        after_two = living_bytes()
        train(problem, optimizer, 6)
        assert living_bytes() == after_two


class TestSeveralDraws:
    """Rule 5: the average stands in p.grad, and what rescales it rescales the products."""

    def test_the_average_gradient_stands_in_grad(self):
        problem, optimizer = pair()
        gradients = []
        for step in range(3):
            with optimizer.sampled_params(train=True):
                problem.loss(step).backward()
                gradients.append(flat(p.grad for p in problem.parameters()))
            average = sum(gradients) / len(gradients)
            torch.testing.assert_close(flat(p.grad for p in problem.parameters()), average, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("draws", [1, 2, 3])
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_clipping_scales_gradient_and_products_alike(self, approximation, draws):
        """As if the loss had been that much smaller in every draw."""
        problem, clipped = pair(**approximation)
        for step in range(draws):
            draw(clipped, problem, step)
        norm = nn.utils.clip_grad_norm_(problem.parameters(), max_norm=0.1)
        assert norm > 0.1
        other, small = pair(**approximation)
        for step in range(draws):
            draw(small, other, step, scale=0.1 / (norm.item() + 1e-6))  # as torch clips
        clipped.step()
        small.step()
        torch.testing.assert_close(everything(clipped, problem), everything(small, other), rtol=1e-9, atol=1e-12)

    def test_clipping_by_norm_leaves_a_small_gradient_alone(self):
        problem, clipped = pair()
        other, plain = pair()
        for optimizer, net in ((clipped, problem), (plain, other)):
            draw(optimizer, net, 0)
            draw(optimizer, net, 1)
        nn.utils.clip_grad_norm_(problem.parameters(), max_norm=1e6)
        clipped.step()
        plain.step()
        assert torch.equal(everything(clipped, problem), everything(plain, other))

    @pytest.mark.parametrize("draws", [1, 2, 3])
    def test_clipping_counts_even_if_gradients_are_cleared_before_the_step(self, draws):
        problem, cleared = pair()
        other, plain = pair()
        for optimizer, net in ((cleared, problem), (plain, other)):
            for step in range(draws):
                draw(optimizer, net, step)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.1)
        cleared.zero_grad()
        cleared.step()
        plain.step()
        same(everything(cleared, problem), everything(plain, other))

    def test_rescaling_between_draws_acts_on_what_was_averaged_so_far(self):
        problem, optimizer = pair(betas=(0.0, 0.9), lr=0.0)
        gradients = []
        for step in range(3):
            with optimizer.sampled_params(train=True):
                problem.loss(step).backward()
                gradients.append(flat(p.grad for p in problem.parameters()))
            if step == 1:
                for p in problem.parameters():
                    p.grad.mul_(0.5)
        optimizer.step()
        expected = ((gradients[0] + gradients[1]) / 2 * 0.5 * 2 + gradients[2]) / 3
        torch.testing.assert_close(state(optimizer, "momentum"), expected, rtol=1e-12, atol=1e-14)

    def test_zero_grad_between_draws_and_before_the_step_loses_none(self):
        problem, optimizer = pair()
        other, plain = pair()
        for step in range(3):
            draw(optimizer, problem, step)
            optimizer.zero_grad()
            draw(plain, other, step)
        optimizer.step()
        plain.step()
        same(everything(optimizer, problem), everything(plain, other))


class TestNotFinite:
    """Rule 6."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_the_only_draw_not_finite_changes_nothing_and_is_drawn_again(self, bad):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        before, steps = everything(optimizer, problem), optimizer.state[problem.inner.bias]["step"].item()
        with optimizer.sampled_params(train=True):
            where = flat(problem.parameters())
            problem.loss(2).backward()
            problem.inner.bias.grad[3] = bad
        optimizer.step()
        assert optimizer.dropped_draws == 1
        assert torch.equal(everything(optimizer, problem), before)
        assert optimizer.state[problem.inner.bias]["step"].item() == steps
        assert all(p.grad is None for p in problem.parameters())
        assert torch.equal(draw(optimizer, problem, 2), where)
        optimizer.step()
        other, untroubled = pair()
        train(other, untroubled, 3)
        assert torch.equal(everything(optimizer, problem), everything(untroubled, other))

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_one_draw_of_three_not_finite_is_dropped_whole(self, which):
        normals = [torch.randn(7 * 5 + 7 + 3 * 7 + 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        sizes = [35, 7, 21, 3]

        def run(draws: list[int], bad: int | None) -> Tensor:
            pieces = [piece for i in draws for piece in normals[i].double().split(sizes)]
            problem, optimizer = pair(noise=replay(pieces))
            for i in draws:
                with optimizer.sampled_params(train=True):
                    problem.loss(i).backward()
                    if i == bad:
                        problem.outer.bias.grad[0] = math.nan
            optimizer.step()
            assert optimizer.dropped_draws == (bad is not None)
            return everything(optimizer, problem)

        same(run([0, 1, 2], bad=which), run([i for i in range(3) if i != which], bad=None))

    def test_every_draw_not_finite_changes_nothing(self):
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (problem.loss(0) * math.inf).backward()
        optimizer.step()
        assert optimizer.dropped_draws == 2
        assert torch.equal(flat(problem.parameters()), mean)

    def test_a_sum_that_overflows_is_not_mistaken_for_a_gradient_that_does(self):
        w = nn.Parameter(torch.zeros(8))
        optimizer = br.IVON([w], lr=1e-3, ess=10.0, betas=(0.9, 1.0), clip_radius=1.0)
        with optimizer.sampled_params(train=True):
            w.grad = torch.full_like(w, 3e38)
        optimizer.step()
        assert optimizer.dropped_draws == 0
        assert (w != 0).all()

    def test_step_with_a_closure_draws_again_too(self):
        problem, optimizer = pair(mc_samples=2)
        before = flat(problem.parameters())
        seen = []

        def closure(factor: float) -> Tensor:
            optimizer.zero_grad()
            seen.append(flat(problem.parameters()))
            loss = problem.loss(0) * factor
            loss.backward()
            return loss

        optimizer.step(lambda: closure(math.nan))
        assert torch.equal(flat(problem.parameters()), before)
        optimizer.step(lambda: closure(1.0))
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])

    def test_scaling_support_is_not_claimed(self):
        """Lightning would refuse to clip."""
        assert not pair()[1]._step_supports_amp_scaling


class TestWithoutDraws:
    """Rule 7."""

    def test_a_step_without_a_draw_is_taken_at_the_mean_with_the_curvature_kept_and_warns_once(self):
        """Fault 2: a TypeError about None."""
        problem, optimizer = pair()
        by_hand = Network()
        gradient = flat(torch.autograd.grad(by_hand.loss(0), list(by_hand.parameters())))
        start = flat(problem.parameters())
        problem.loss(0).backward()
        with pytest.warns(UserWarning, match="without a draw") as caught:
            optimizer.step()
            optimizer.zero_grad()
            problem.loss(1).backward()
            optimizer.step()
        assert len(caught) == 1
        assert (state(optimizer, "hess") == 0.5).all()
        first = start - SMALL_IVON["lr"] * (gradient + 0.01 * start)
        again, plain = pair()
        again.loss(0).backward()
        with quietly():
            plain.step()
        torch.testing.assert_close(flat(again.parameters()), first, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_a_step_without_a_draw_keeps_the_curvature_whatever_its_estimate(self, approximation):
        problem, optimizer = pair(**approximation)
        problem.loss(0).backward()
        with quietly():
            optimizer.step()
        assert (state(optimizer, "hess") == 0.5).all()
        assert (state(optimizer, "momentum") != 0).all()

    def test_a_step_without_a_draw_leaves_the_draws_after_it_in_order(self):
        problem, optimizer = pair()
        problem.loss(0).backward()
        with quietly():
            optimizer.step()
        optimizer.zero_grad()
        train(problem, optimizer, [1])
        assert (state(optimizer, "hess") != 0.5).all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 2

    @pytest.mark.parametrize("opened", [True, False])
    def test_no_gradient_at_all_says_why(self, opened):
        problem, optimizer = pair()
        before = flat(problem.parameters())
        if opened:
            with optimizer.sampled_params(train=True):
                pass
        with quietly(), pytest.raises(RuntimeError, match=r"no parameter has a gradient.*backward"):
            optimizer.step()
        assert torch.equal(flat(problem.parameters()), before)
        train(problem, optimizer, 1)

    def test_backward_after_the_context_is_refused_by_autograd_and_leaves_the_mean(self):
        """Fault 12: not detected. The weights have changed in place since the forward pass, and autograd can tell."""
        problem, optimizer = pair()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            loss = problem.loss(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert torch.equal(flat(problem.parameters()), mean)


class TestLooking:
    """Rule 8: draws with train=False."""

    def test_touch_neither_gradients_nor_training_noise(self):
        problem, optimizer = pair(mc_samples=1)
        other, plain = pair(mc_samples=1)
        for step in range(3):
            for times in range(2):
                with optimizer.sampled_params(train=False):
                    problem(problem.x)
                if times == 0:
                    draw(optimizer, problem, step)
            before = [p.grad.clone() for p in problem.parameters()]
            with optimizer.sampled_params(train=False), torch.no_grad():
                problem.loss(step)
            assert all(torch.equal(p.grad, g) for p, g in zip(problem.parameters(), before, strict=True))
            optimizer.step()
            draw(plain, other, step)
            plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_between_two_training_draws_change_nothing(self):
        problem, optimizer = pair()
        other, plain = pair()
        draw(optimizer, problem, 0)
        with optimizer.sampled_params(train=False):
            pass
        draw(optimizer, problem, 1)
        with optimizer.sampled_params(train=False):
            pass
        optimizer.step()
        draw(plain, other, 0)
        draw(plain, other, 1)
        plain.step()
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_differ_from_one_another_and_from_training_draws(self):
        problem, optimizer = pair()
        rows = []
        for _ in range(5):
            with optimizer.sampled_params(train=False):
                rows.append(flat(problem.parameters()))
        rows.append(draw(optimizer, problem))
        assert len({tuple(row.tolist()) for row in rows}) == 6

    def test_change_no_state(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        with optimizer.sampled_params(train=False):
            pass
        assert_equal_states(optimizer.state_dict(), before)

    def test_do_not_make_a_step(self):
        problem, optimizer = pair()
        with optimizer.sampled_params(train=False):
            problem.loss(0)
        with quietly(), pytest.raises(RuntimeError, match="no parameter has a gradient"):
            optimizer.step()


class TestClosures:
    """Rule 10, and fault 13: an ordinary closure failed."""

    @pytest.mark.parametrize("draws", [1, 4])
    def test_an_ordinary_closure_is_called_once_a_draw_each_at_another_sample(self, draws):
        problem, optimizer = pair(mc_samples=draws)
        places, losses = [], []

        def closure() -> Tensor:
            optimizer.zero_grad()
            places.append(flat(problem.parameters()))
            loss = problem.loss(0)
            loss.backward()
            losses.append(loss.item())
            return loss

        result = optimizer.step(closure)
        assert len({tuple(place.tolist()) for place in places}) == draws
        assert result.item() == pytest.approx(sum(losses) / draws)

    @pytest.mark.parametrize("draws", [1, 3])
    def test_equals_the_contexts_it_stands_for(self, draws):
        problem, closed = pair(mc_samples=draws)
        other, opened = pair()
        for step in range(3):
            train(problem, closed, [step])
            for _ in range(draws):
                draw(opened, other, step)
            opened.step()
        assert torch.equal(everything(closed, problem), everything(opened, other))

    @pytest.mark.parametrize("draws", [1, 3])
    def test_a_closure_may_open_its_own_context(self, draws):
        problem, own = pair(mc_samples=draws)
        other, ordinary = pair(mc_samples=draws)

        def closure() -> Tensor:
            with own.sampled_params(train=True):
                own.zero_grad()
                loss = problem.loss(0)
                loss.backward()
            return loss

        own.step(closure)
        train(other, ordinary, 1)
        assert torch.equal(everything(own, problem), everything(ordinary, other))

    def test_a_closure_runs_with_gradients_on_even_where_they_are_off(self):
        problem, optimizer = pair()
        with torch.no_grad():
            train(problem, optimizer, 1)
        assert (state(optimizer, "momentum") != 0).all()

    def test_a_closure_may_return_nothing_or_a_number(self):
        problem, optimizer = pair(mc_samples=2)

        def closure(value: object) -> object:
            optimizer.zero_grad()
            problem.loss(0).backward()
            return value

        assert optimizer.step(lambda: closure(None)) is None
        assert optimizer.step(lambda: closure(2.5)) == 2.5

    def test_a_draw_before_the_closure_counts_too(self):
        problem, mixed = pair(mc_samples=2)
        other, plain = pair(mc_samples=3)
        draw(mixed, problem)
        with quietly():
            train_step_without_zero_grad(mixed, problem)
        train(other, plain, 1)
        same(everything(mixed, problem), everything(plain, other))

    def test_mc_samples_with_contexts_warns_once(self):
        problem, optimizer = pair(mc_samples=3)
        with pytest.warns(UserWarning, match="mc_samples=3 acts in step") as caught:
            for _ in range(3):
                draw(optimizer, problem)
                optimizer.step()
        assert len(caught) == 1

    def test_mc_samples_with_as_many_contexts_is_silent(self):
        problem, optimizer = pair(mc_samples=3)
        for _ in range(3):
            draw(optimizer, problem)
        optimizer.step()

    def test_half_an_antithetic_pair_warns_once(self):
        problem, optimizer = pair(antithetic=True)
        with pytest.warns(UserWarning, match="pairs") as caught:
            for _ in range(2):
                draw(optimizer, problem)
                optimizer.step()
        assert len(caught) == 1


def train_step_without_zero_grad(optimizer: br.IVON, problem: Network) -> None:
    def closure() -> Tensor:
        loss = problem.loss(0)
        loss.backward()
        return loss

    optimizer.step(closure)


class TestLeftAlone:
    """Faults 1 and 4: parameters without a gradient, and frozen ones."""

    def test_a_parameter_without_gradient_is_untouched(self):
        problem, optimizer = pair()
        bias = problem.outer.bias
        mean = bias.detach().clone()
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (problem(problem.x).sum() * 0 + problem.inner.weight.square().sum()).backward()
                bias.grad = None
            optimizer.step()
        assert torch.equal(bias, mean)
        assert (optimizer.state[bias]["hess"] == 0.5).all()
        assert optimizer.state[bias]["step"].item() == 0
        assert optimizer.state[problem.inner.weight]["step"].item() == 2

    def test_a_parameter_that_joins_late_is_debiased_from_its_own_first_step(self):
        w, late = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
        optimizer = br.IVON([w, late], lr=0.1, ess=math.inf, weight_decay=0.0, hess_init=1.0)
        for step in range(5):
            with optimizer.sampled_params(train=True):
                w.grad = torch.ones_like(w)
                late.grad = torch.ones_like(late) if step == 4 else None
            optimizer.step()
        torch.testing.assert_close(late.detach(), torch.full_like(late, -0.1))
        torch.testing.assert_close(w.detach(), torch.full_like(w, -0.5))

    def test_a_frozen_parameter_is_neither_perturbed_nor_decayed(self):
        problem = Network()
        problem.inner.requires_grad_(False)
        optimizer = br.IVON(problem.parameters(), **SMALL_IVON)
        inner = flat(problem.inner.parameters())
        for step in range(3):
            with optimizer.sampled_params(train=True):
                assert torch.equal(flat(problem.inner.parameters()), inner)
                problem.loss(step).backward()
            optimizer.step()
        with optimizer.sampled_params(train=False):
            assert torch.equal(flat(problem.inner.parameters()), inner)
        assert torch.equal(flat(problem.inner.parameters()), inner)

    def test_freezing_and_thawing_midway_works(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        problem.inner.requires_grad_(False)
        inner, hess = flat(problem.inner.parameters()), optimizer.state[problem.inner.weight]["hess"].clone()
        train(problem, optimizer, [2, 3])
        assert torch.equal(flat(problem.inner.parameters()), inner)
        assert torch.equal(optimizer.state[problem.inner.weight]["hess"], hess)
        problem.inner.requires_grad_(True)
        train(problem, optimizer, [4])
        assert (flat(problem.inner.parameters()) != inner).all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 3
        assert optimizer.state[problem.outer.weight]["step"].item() == 5

    @pytest.mark.parametrize("draws", [1, 2, 3])
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_parameters_of_different_age_do_not_mix(self, approximation, draws):
        """In one group, where they are worked on together, as in groups of their own."""

        def run(groups: bool) -> Tensor:
            problem = Network()
            params = [{"params": [p]} for p in problem.parameters()] if groups else problem.parameters()
            optimizer = br.IVON(params, **SMALL_IVON, **approximation)
            for step in range(8):
                for number in range(draws):
                    with optimizer.sampled_params(train=True):
                        if step % 3 == 1 or (step == 5 and number == 0):
                            problem.outer(torch.ones(7, dtype=torch.float64)).square().sum().backward()
                        else:
                            problem.loss(step).backward()
                optimizer.step()
            assert optimizer.state[problem.inner.bias]["step"].item() < optimizer.state[problem.outer.bias]["step"].item()
            return everything(optimizer, problem)

        same(run(groups=False), run(groups=True))

    def test_the_noise_of_the_others_is_the_same_with_one_frozen(self):
        problem, optimizer = pair()
        other, plain = pair()
        problem.inner.weight.requires_grad_(False)
        with optimizer.sampled_params(train=False), plain.sampled_params(train=False):
            assert torch.equal(problem.outer.weight, other.outer.weight)


class TestSparse:
    def test_sparse_gradients_are_refused_in_words_and_move_nothing(self):
        """Fault 18: a missing reshape deep inside."""
        first, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3, sparse=True)
        optimizer = br.IVON([first, *table.parameters()], lr=0.1, ess=10.0)
        before = flat([first, table.weight])
        with optimizer.sampled_params(train=True):
            (table(torch.tensor([1, 3])) * first).sum().backward()
        with pytest.raises((RuntimeError, TypeError, ValueError), match="sparse gradients"):
            optimizer.step()
        assert torch.equal(flat([first, table.weight]), before)
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    (table(torch.tensor([1, 3])) * first).sum().backward()
            optimizer.step()
            pytest.fail("two draws with sparse gradients were taken")
        assert torch.equal(flat([first, table.weight]), before)


class TestResume:
    """Fault 5: the step count and every switch were lost; the first step after a resume was 8.9 times too long."""

    @pytest.mark.parametrize("algorithm", EVERY, ids=named)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_save_load_continue_is_bit_equal_to_no_interruption(self, algorithm, dtype):
        straight = Network(dtype)
        train(straight, algorithm(straight.parameters()), 12)
        first = Network(dtype)
        optimizer = algorithm(first.parameters())
        train(first, optimizer, 5)
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        second = Network(dtype)
        second.load_state_dict(weights)
        resumed = algorithm(second.parameters())
        resumed.load_state_dict(saved)
        train(second, resumed, range(5, 12))
        assert torch.equal(flat(second.parameters()), flat(straight.parameters()))

    def test_every_switch_and_the_seed_are_saved(self):
        problem, optimizer = pair(
            hess_approx="gradsq", gradsq_scale=3.0, debias=False, rescale_lr=False, clip_radius=0.2, seed=7, mc_samples=2
        )
        train(problem, optimizer, 2)
        other = Network()
        plain = br.IVON(other.parameters(), lr=9.0, ess=9.0)
        other.load_state_dict(problem.state_dict())
        plain.load_state_dict(optimizer.state_dict())
        train(problem, optimizer, [2, 3])
        train(other, plain, [2, 3])
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_float32_state_of_bfloat16_weights_is_not_rounded_by_loading(self):
        """Fault 16: state in the weights' dtype; torch's own loading casts it so."""
        w = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = br.IVON([w], lr=0.1, ess=100.0)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                w.square().sum().backward()
            optimizer.step()
        v = nn.Parameter(w.detach().clone())
        other = br.IVON([v], lr=0.1, ess=100.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name in ("hess", "momentum"):
            assert other.state[v][name].dtype == torch.float32
            assert torch.equal(other.state[v][name], optimizer.state[w][name])

    def test_loading_shares_no_memory_with_what_was_loaded(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        saved = optimizer.state_dict()
        before = copy.deepcopy(saved)
        other, second = pair()
        second.load_state_dict(saved)
        train(other, second, [2, 3])
        assert_equal_states(saved, before)

    def test_loading_over_a_used_optimizer_takes_the_loaded_state(self):
        problem, optimizer = pair()
        train(problem, optimizer, 3)
        other, second = pair(seed=5)
        train(other, second, 8)
        second.load_state_dict(optimizer.state_dict())
        other.load_state_dict(problem.state_dict())
        with second.sampled_params(train=False):
            pass
        train(problem, optimizer, [3, 4])
        train(other, second, [3, 4])
        assert torch.equal(everything(optimizer, problem), everything(second, other))

    def test_deepcopy_of_model_and_optimizer_continues_alike_and_apart(self):
        problem, optimizer = pair(mc_samples=2)
        train(problem, optimizer, 3)
        before = everything(optimizer, problem)
        twin, second = copy.deepcopy((problem, optimizer))
        train(twin, second, [3, 4])
        assert torch.equal(everything(optimizer, problem), before)
        train(problem, optimizer, [3, 4])
        assert torch.equal(everything(optimizer, problem), everything(second, twin))

    def test_pickle_of_model_and_optimizer_continues_alike(self):
        model = nn.Linear(3, 2, dtype=torch.float64)
        optimizer = br.IVON(model.parameters(), **SMALL_IVON)

        def step(model: nn.Module, optimizer: br.IVON) -> Tensor:
            with optimizer.sampled_params(train=True):
                model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            return flat(model.parameters())

        step(model, optimizer)
        twin, second = pickle.loads(pickle.dumps((model, optimizer)))
        assert torch.equal(step(twin, second), step(model, optimizer))


class TestState:
    """Fault 6: state lay flat in param_groups."""

    def test_is_per_parameter_and_groups_hold_no_tensors(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        assert set(optimizer.state) == set(problem.parameters())
        for p in problem.parameters():
            for name in ("momentum", "hess"):
                assert optimizer.state[p][name].shape == p.shape
        for group in optimizer.param_groups:
            assert not any(isinstance(value, Tensor) for key, value in group.items() if key != "params")

    def test_a_state_tensor_that_someone_replaces_is_used(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        p = problem.inner.bias
        optimizer.state[p]["hess"] = torch.full_like(p, 1e6, requires_grad=False)
        mean = p.detach().clone()
        with optimizer.sampled_params(train=False):
            assert (p - mean).abs().max() < 1e-2

    def test_a_state_tensor_that_someone_writes_into_is_used(self):
        problem, optimizer = pair()
        train(problem, optimizer, 2)
        p = problem.inner.bias
        optimizer.state[p]["hess"].fill_(1e6)
        mean = p.detach().clone()
        with optimizer.sampled_params(train=False):
            assert (p - mean).abs().max() < 1e-2


class TestGroups:
    """Fault 7: add_param_group raised a KeyError."""

    def test_a_group_added_later_is_drawn_and_trained(self):
        problem = Network()
        optimizer = br.IVON(problem.inner.parameters(), **SMALL_IVON)
        train(problem, optimizer, 3)
        optimizer.add_param_group({"params": list(problem.outer.parameters()), "lr": 0.05, "hess_init": 2.0})
        optimizer.zero_grad()
        before = flat(problem.outer.parameters())
        with optimizer.sampled_params(train=True):
            assert (flat(problem.outer.parameters()) != before).all()
            problem.loss(3).backward()
        optimizer.step()
        assert (flat(problem.outer.parameters()) != before).all()
        assert optimizer.state[problem.outer.weight]["step"].item() == 1
        assert optimizer.state[problem.inner.weight]["step"].item() == 4
        assert optimizer.param_groups[1]["ess"] == SMALL_IVON["ess"]

    def test_a_group_added_between_a_look_and_a_draw_is_drawn(self):
        problem = Network()
        optimizer = br.IVON(problem.inner.parameters(), **SMALL_IVON)
        with optimizer.sampled_params(train=False):
            pass
        optimizer.add_param_group({"params": list(problem.outer.parameters())})
        before = flat(problem.outer.parameters())
        with optimizer.sampled_params(train=False):
            assert (flat(problem.outer.parameters()) != before).all()
        assert torch.equal(flat(problem.outer.parameters()), before)

    def test_hyper_parameters_changed_between_a_look_and_a_step_are_used(self):
        problem, optimizer = pair()
        other, plain = pair()
        with optimizer.sampled_params(train=False):
            pass
        for changed in (optimizer, plain):
            changed.param_groups[0].update(betas=(0.5, 0.9), clip_radius=0.01, lr=0.2)
        train(problem, optimizer, 1)
        train(other, plain, 1)
        assert torch.equal(everything(optimizer, problem), everything(plain, other))


class TestPlaces:
    """Faults 8, 9 and 16: dtypes, and where the weights lie."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_state_is_float32_or_wider(self, dtype):
        w = nn.Parameter(torch.ones(5, dtype=dtype))
        optimizer = br.IVON([w], lr=0.1, ess=10.0)
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
        wide = torch.promote_types(dtype, torch.float32)
        assert {optimizer.state[w][name].dtype for name in ("hess", "momentum")} == {wide}
        assert w.dtype == dtype

    def test_small_steps_of_the_curvature_do_not_vanish_beside_bfloat16_weights(self):
        w = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = br.IVON([w], lr=0.0, ess=100.0, betas=(0.9, 0.99999))
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
        assert (optimizer.state[w]["hess"] != 1.0).all()

    def test_several_dtypes_share_an_optimizer_and_each_goes_its_own_way(self):
        dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float32]  # the first is rounded by the same noise if alone
        weights = [nn.Parameter(torch.linspace(-1, 1, 5 + i).to(dtype)) for i, dtype in enumerate(dtypes)]
        weights.append(nn.Parameter(torch.tensor(0.5)))
        normals = {w: torch.linspace(-2, 1, w.numel()).reshape(w.shape).to(w.dtype) for w in weights}
        together = br.IVON(weights, **SMALL_IVON, noise=lambda p: normals[p])
        starts = [w.detach().clone() for w in weights]
        alone = [nn.Parameter(start.clone()) for start in starts]
        noises = {id(a): normals[w] for a, w in zip(alone, weights, strict=True)}
        apart = [br.IVON([a], **SMALL_IVON, noise=lambda p: noises[id(p)]) for a in alone]

        def loss(tensors: list[Tensor]) -> Tensor:
            return sum((w.double().square().sum() + w.double().sum() for w in tensors), torch.zeros((), dtype=torch.double))

        for _ in range(3):
            with together.sampled_params(train=True):
                loss(weights).backward()
            together.step()
            with contextlib.ExitStack() as stack:
                for optimizer in apart:
                    stack.enter_context(optimizer.sampled_params(train=True))
                loss(alone).backward()
            for optimizer in apart:
                optimizer.step()
        for a, w, start in zip(alone, weights, starts, strict=True):
            torch.testing.assert_close(w, a, rtol=1e-6, atol=0)
            assert (w != start).all()

    def test_an_empty_parameter_does_no_harm(self):
        w, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, 4))
        optimizer = br.IVON([w, empty], lr=0.1, ess=10.0)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (w.square().sum() + empty.sum()).backward()
            optimizer.step()
        assert (w != 1).all()
        optimizer.load_state_dict(optimizer.state_dict())

    def test_the_models_dtype_may_change_between_steps(self):
        problem, optimizer = pair(dtype=torch.float32)
        train(problem, optimizer, 2)
        problem.double()
        problem.x = problem.x.double()
        train(problem, optimizer, [2, 3])
        assert {p.dtype for p in problem.parameters()} == {torch.float64}
        assert flat(problem.parameters()).isfinite().all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 4

    def test_storage_stays_where_it_is(self):
        problem, optimizer = pair()
        places = [p.data_ptr() for p in problem.parameters()]
        alias = problem.inner.weight.detach()[2:]
        train(problem, optimizer, 2)
        with optimizer.sampled_params(train=False):
            assert [p.data_ptr() for p in problem.parameters()] == places
            assert torch.equal(alias, problem.inner.weight[2:])
        assert [p.data_ptr() for p in problem.parameters()] == places
        assert torch.equal(alias, problem.inner.weight[2:])

    def test_channels_last_stays_channels_last_and_trains_as_contiguous_does(self):
        def run(memory_format: torch.memory_format) -> nn.Module:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
            net = net.to(memory_format=memory_format)
            optimizer = br.IVON(net.parameters(), **SMALL_IVON)
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            for _ in range(3):
                with optimizer.sampled_params(train=True):
                    net(x.to(memory_format=memory_format)).square().mean().backward()
                    assert net[0].weight.is_contiguous(memory_format=memory_format)
                optimizer.step()
            assert net[0].weight.is_contiguous(memory_format=memory_format)
            return net

        last, plain = run(torch.channels_last), run(torch.contiguous_format)
        torch.testing.assert_close(flat(last.parameters()), flat(plain.parameters()), rtol=1e-9, atol=1e-12)

    def test_tied_weights_stay_tied_and_are_perturbed_once(self):
        net = nn.Module()
        net.table = nn.Embedding(6, 4, dtype=torch.float64)
        net.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        net.head.weight = net.table.weight
        optimizer = br.IVON(net.parameters(), **SMALL_IVON)
        with optimizer.sampled_params(train=True):
            assert net.head.weight is net.table.weight
            net.head(net.table(torch.tensor([1, 2]))).square().mean().backward()
        optimizer.step()
        assert net.head.weight is net.table.weight
        assert len(optimizer.state) == 1

    @pytest.mark.parametrize("shape", [(70_001,), (300, 401), (401, 300)], ids=str)
    def test_a_tensor_too_large_for_one_bucket_moves_by_the_same_equations(self, shape):
        """Laid out row by row or column by column."""
        generator = torch.Generator().manual_seed(0)
        start, eps, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        small = torch.ones(3, dtype=torch.float64)
        for turned in (False, True)[: len(shape)]:
            memory = start.T.clone().T if turned else start.clone()
            w, v = nn.Parameter(memory), nn.Parameter(small.clone())
            normals = {id(w): eps, id(v): small}
            optimizer = br.IVON([v, w], lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01,
                                noise=lambda p, normals=normals: normals[id(p)])  # fmt: skip
            with optimizer.sampled_params(train=True):
                torch.testing.assert_close(w.detach(), start + eps / math.sqrt(50 * 0.51), rtol=1e-14, atol=1e-14)
                w.grad, v.grad = g.clone(), small.clone()
            assert torch.equal(w, start)
            optimizer.step()
            excess = math.sqrt(50 * 0.51) * eps * g - 0.5
            hess = 0.5 + 0.1 * excess + 0.005 * excess**2 / 0.51
            mean = start - 0.1 * 0.51 * (g + 0.01 * start) / (hess + 0.01)
            torch.testing.assert_close(optimizer.state[w]["hess"], hess, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(optimizer.state[w]["momentum"], 0.1 * g, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(w.detach(), mean, rtol=1e-10, atol=1e-10)


class TestScaler:
    """Fault 10: gradients were taken while still scaled."""

    @staticmethod
    def step(problem: Network, optimizer: br.IVON, scaler: torch.amp.GradScaler, draws: int, *, clip: bool) -> None:
        for step in range(draws):
            with optimizer.sampled_params(train=True):
                scaler.scale(problem.loss(step)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(problem.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    @pytest.mark.parametrize("draws", [1, 2, 3])
    @pytest.mark.parametrize("clip", [False, True])
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_scaled_gradients_are_unscaled_before_they_count(self, approximation, clip, draws):
        problem, scaled = pair(**approximation)
        other, plain = pair(**approximation)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            self.step(problem, scaled, scaler, draws, clip=clip)
            for step in range(draws):
                draw(plain, other, step)
            if clip:
                nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            plain.step()
        torch.testing.assert_close(everything(scaled, problem), everything(plain, other), rtol=1e-11, atol=1e-13)

    def test_overflow_skips_the_step_and_the_next_one_counts_only_its_own_draw(self):
        sizes = [35, 7, 21, 3]
        normals = torch.randn(66, generator=torch.Generator().manual_seed(0)).double()  # drawn again
        problem, optimizer = pair(dtype=torch.float32, noise=replay(normals.split(sizes)))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        before = flat(problem.parameters())
        for p in problem.parameters():
            p.register_hook(lambda g: g * 1e5)
        self.step(problem, optimizer, scaler, 1, clip=False)
        assert torch.equal(flat(problem.parameters()), before)
        assert scaler.get_scale() < 2.0**120
        scaler.update(2.0**10)
        self.step(problem, optimizer, scaler, 1, clip=False)
        other, plain = pair(dtype=torch.float32, noise=replay(normals.split(sizes)))
        for p in other.parameters():
            p.register_hook(lambda g: g * 1e5)
        draw(plain, other)
        plain.step()
        torch.testing.assert_close(everything(optimizer, problem), everything(plain, other), rtol=1e-5, atol=1e-6)
        assert optimizer.state[problem.inner.weight]["step"].item() == 1

    def test_one_draw_of_two_overflowing_leaves_the_other(self):
        problem, optimizer = pair(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = flat(problem.parameters())
        for factor in (1.0, math.inf):
            with optimizer.sampled_params(train=True):
                scaler.scale(problem.loss(0) * factor).backward()
        scaler.step(optimizer)
        assert optimizer.dropped_draws == 1
        other, plain = pair(dtype=torch.float32)
        draw(plain, other)
        plain.step()
        assert (flat(problem.parameters()) != before).all()
        torch.testing.assert_close(everything(optimizer, problem), everything(plain, other), rtol=1e-5, atol=1e-6)

    def test_autocast_with_a_scaler_trains(self):
        problem, optimizer = pair(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu")
        before = sum(problem.loss(step).item() for step in range(4))
        for step in range(60):
            with optimizer.sampled_params(train=True), torch.autocast("cpu", torch.bfloat16):
                scaler.scale(problem.loss(step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert sum(problem.loss(step).item() for step in range(4)) < 0.7 * before


class TestSchedulers:
    @pytest.mark.parametrize(
        "scheduler",
        [
            lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
        ],
        ids=["step", "cosine", "lambda"],
    )
    def test_set_the_rate_that_is_used(self, scheduler):
        problem, optimizer = pair()
        schedule = scheduler(optimizer)
        other, plain = pair()
        for step in range(6):
            plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            train(problem, optimizer, [step])
            train(other, plain, [step])
            schedule.step()
        assert optimizer.param_groups[0]["lr"] != SMALL_IVON["lr"]
        assert torch.equal(everything(optimizer, problem), everything(plain, other))

    def test_one_cycle_moves_beta1_too(self):
        problem, optimizer = pair()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=10)
        seen = set()
        for step in range(8):
            train(problem, optimizer, [step])
            seen.add(optimizer.param_groups[0]["betas"][0])
            schedule.step()
        assert len(seen) > 3
        assert optimizer.param_groups[0]["betas"][1] == SMALL_IVON["betas"][1]


class TestInjectedNoise:
    """Fault 15: noise came from the global generator and could not be given."""

    def test_is_asked_once_per_parameter_and_draw_in_parameter_order(self):
        problem = Network()
        asked = []

        def noise(p: Tensor) -> Tensor:
            asked.append(id(p))
            return torch.ones_like(p)

        groups = [{"params": list(problem.inner.parameters())}, {"params": list(problem.outer.parameters())}]
        optimizer = br.IVON(groups, **SMALL_IVON, noise=noise)
        order = [id(p) for p in problem.parameters()]
        for draws in (1, 3):
            asked.clear()
            for _ in range(draws):
                draw(optimizer, problem)
            optimizer.step()
            assert asked == order * draws

    def test_is_asked_anew_for_every_look_too(self):
        problem = Network()
        asked = []

        def noise(p: Tensor) -> Tensor:
            asked.append(id(p))
            return torch.ones_like(p)

        optimizer = br.IVON(problem.parameters(), **SMALL_IVON, noise=noise)
        for training in (False, True, False, True):
            with optimizer.sampled_params(train=training):
                if training:
                    problem.loss(0).backward()
        optimizer.step()
        assert asked == [id(p) for p in problem.parameters()] * 4

    def test_is_asked_in_parameter_order_over_several_dtypes(self):
        weights = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float64, torch.float32, torch.float64)]
        asked = []

        def noise(p: Tensor) -> Tensor:
            asked.append(id(p))
            return torch.ones_like(p)

        optimizer = br.IVON(weights, lr=0.1, ess=1.0, noise=noise)
        with optimizer.sampled_params(train=True):
            sum(w.double().sum() for w in weights).backward()
        optimizer.step()
        assert asked == [id(w) for w in weights]

    def test_of_another_shape_is_refused_and_leaves_the_mean(self):
        problem, optimizer = pair(noise=lambda p: torch.ones(3))
        mean = flat(problem.parameters())
        with pytest.raises(ValueError, match="noise returned shape"), optimizer.sampled_params(train=True):
            pytest.fail("the context opened")
        assert torch.equal(flat(problem.parameters()), mean)

    def test_that_fails_leaves_the_mean_and_a_usable_optimizer(self):
        calls = []

        def noise(p: Tensor) -> Tensor:
            calls.append(p)
            if len(calls) == 3:
                raise ValueError("out of noise")
            return torch.ones_like(p)

        problem, optimizer = pair(noise=noise)
        mean = flat(problem.parameters())
        with pytest.raises(ValueError, match="out of noise"), optimizer.sampled_params(train=True):
            pytest.fail("the context opened")
        assert torch.equal(flat(problem.parameters()), mean)
        draw(optimizer, problem)
        optimizer.step()
        assert (flat(problem.parameters()) != mean).all()


def test_quadratic_model_is_what_the_golden_files_use():
    problem = Quadratic()
    assert problem.loss(0).item() == pytest.approx(1.4455, abs=1e-4)
