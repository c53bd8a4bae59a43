"""The rules for draws (design, section 4): when one opens and closes, who reads it, when a step drops it or has none."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
from tests.instances import SMALL_IVON, Network, Quadratic, draw, flat, living_bytes, replay, state, train
from tests.optimizers.problems import APPROXIMATIONS, as_row, assert_equal_states, pair64, quietly, same
from torch import Tensor, nn

import bayesrule as br


class TestOpening:
    """Rule 1."""

    def test_a_context_puts_a_sample_where_the_mean_was(self):
        problem, optimizer = pair64()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            assert (flat(problem.parameters()) != mean).all()
            problem.loss(0).backward()
        assert torch.equal(flat(problem.parameters()), mean)

    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("inner", [True, False])
    def test_nested_contexts_raise_and_leave_the_mean(self, outer, inner):
        problem, optimizer = pair64()
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
        problem, optimizer = pair64()
        other, second = pair64(seed=1)
        with optimizer.sampled_params(train=True), second.sampled_params(train=True):
            (problem.loss(0) + other.loss(0)).backward()
        optimizer.step()
        second.step()

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
    def test_a_weight_that_is_no_weight_is_refused(self, weight):
        problem, optimizer = pair64()
        mean = flat(problem.parameters())
        with pytest.raises(ValueError, match="weight of a draw"), optimizer.sampled_params(train=True, weight=weight):
            pytest.fail("the context opened")
        assert torch.equal(flat(problem.parameters()), mean)

    def test_the_context_trains_unless_told_otherwise(self):
        """Fault 17: with training off by default, a forgotten flag surfaced only at the step."""
        problem, optimizer = pair64()
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
        _, optimizer = pair64()
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
        problem, optimizer = pair64()
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
        problem, optimizer = pair64()
        mean = flat(problem.parameters())
        with pytest.raises(error), optimizer.sampled_params(train=training):
            problem.loss(0).backward()
            raise error
        assert torch.equal(flat(problem.parameters()), mean)

    def test_an_exception_discards_the_draw_as_if_it_had_not_been(self):
        problem, optimizer = pair64()
        where = None
        with contextlib.suppress(ValueError), optimizer.sampled_params(train=True):
            where = flat(problem.parameters())
            problem.loss(0).backward()
            raise ValueError
        assert all(p.grad is None for p in problem.parameters())
        assert torch.equal(draw(optimizer, problem), where)  # the same noise is drawn again
        optimizer.step()
        other, untroubled = pair64()
        draw(untroubled, other)
        untroubled.step()
        assert torch.equal(as_row(optimizer, problem), as_row(untroubled, other))

    def test_an_exception_in_a_second_draw_keeps_the_first(self):
        problem, optimizer = pair64()
        draw(optimizer, problem)
        with contextlib.suppress(ValueError), optimizer.sampled_params(train=True):
            problem.loss(1).backward()
            raise ValueError
        optimizer.step()
        other, untroubled = pair64()
        draw(untroubled, other)
        untroubled.step()
        same(as_row(optimizer, problem), as_row(untroubled, other))

    def test_an_exception_in_the_closure_restores_the_mean(self):
        problem, optimizer = pair64(mc_samples=2)
        mean = flat(problem.parameters())

        def closure() -> Tensor:
            problem.loss(0).backward()
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            optimizer.step(closure)
        assert torch.equal(flat(problem.parameters()), mean)
        train(problem, optimizer, 1)

    def test_state_dict_inside_a_context_closes_the_draw(self):
        problem, optimizer = pair64()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            optimizer.state_dict()
            assert torch.equal(flat(problem.parameters()), mean)
        optimizer.step()
        other, plain = pair64()
        draw(plain, other)
        plain.step()
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_step_inside_a_context_closes_the_draw(self):
        problem, optimizer = pair64()
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            optimizer.step()
            moved = flat(problem.parameters())
        assert torch.equal(flat(problem.parameters()), moved)
        other, plain = pair64()
        draw(plain, other)
        plain.step()
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_a_checkpoint_between_draw_and_step_is_at_the_mean(self):
        problem, optimizer = pair64()
        mean = {name: p.detach().clone() for name, p in problem.named_parameters()}
        draw(optimizer, problem)
        for name, value in problem.state_dict().items():
            assert torch.equal(value, mean[name])


class TestReading:
    """Rules 3 and 4."""

    def test_zero_grad_after_a_closed_context_does_not_lose_the_draw(self):
        problem, optimizer = pair64()
        other, plain = pair64()
        for step in range(3):
            draw(optimizer, problem, step)
            optimizer.zero_grad()
            assert all(p.grad is None for p in problem.parameters())
            optimizer.step()
            draw(plain, other, step)
            plain.step()
        same(as_row(optimizer, problem), as_row(plain, other))

    def test_zero_grad_in_an_open_context_only_clears(self):
        problem, optimizer = pair64()
        other, plain = pair64()
        with optimizer.sampled_params(train=True):
            problem.loss(3).backward()
            optimizer.zero_grad()
            problem.loss(0).backward()
        optimizer.step()
        draw(plain, other)
        plain.step()
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_missing_zero_grad_between_draws_counts_nothing_twice(self, approximation):
        """Fault 12: gradients piled up and were counted twice, silently."""
        problem, careless = pair64(**approximation)
        other, careful = pair64(**approximation)
        for step in range(3):
            for _ in range(3):
                draw(careless, problem, step)
                careful.zero_grad()
                draw(careful, other, step)
            careless.step()
            careful.step()
            careful.zero_grad()
        same(as_row(careless, problem), as_row(careful, other))

    def test_missing_zero_grad_between_steps_counts_nothing_twice(self):
        problem, careless = pair64()
        other, careful = pair64()
        for step in range(3):
            draw(careless, problem, step)
            careless.step()
            careful.zero_grad()
            draw(careful, other, step)
            careful.step()
        assert torch.equal(as_row(careless, problem), as_row(careful, other))

    def test_a_gradient_from_whoever_put_it_there_is_read(self):
        problem, optimizer = pair64()
        other, plain = pair64()
        with optimizer.sampled_params(train=True):
            gradients = torch.autograd.grad(problem.loss(0), list(problem.parameters()))
        for p, g in zip(problem.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
        draw(plain, other)
        plain.step()
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_several_backwards_in_one_context_are_one_draw(self):
        """Accumulation (a): one sample, loss / k each."""
        problem, pieces = pair64()
        other, whole = pair64()
        with pieces.sampled_params(train=True):
            for step in range(4):
                (problem.loss(step) / 4).backward()
        pieces.step()
        with whole.sampled_params(train=True):
            (sum(other.loss(step) for step in range(4)) / 4).backward()
        whole.step()
        same(as_row(pieces, problem), as_row(whole, other))

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
        problem, optimizer = pair64(betas=(0.0, 0.9), lr=0.0)
        with optimizer.sampled_params(train=True):
            problem.loss(0).backward()
            first = problem.inner.weight.grad.clone()
        with optimizer.sampled_params(train=True):
            problem.outer(torch.zeros(7, dtype=torch.float64)).sum().backward()
        with quietly():
            optimizer.step()
        torch.testing.assert_close(optimizer.state[problem.inner.weight]["momentum"], first / 2)

    @pytest.mark.usefixtures("unburdened")
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_what_is_kept_between_draws_does_not_grow_with_their_number(self, approximation):
        def kept(draws: int) -> int:
            problem, optimizer = pair64(**approximation)
            for _ in range(draws):
                draw(optimizer, problem)
            return living_bytes()

        two = kept(2)
        assert kept(8) == two == kept(30)

    @pytest.mark.usefixtures("unburdened")
    def test_a_finished_step_leaves_two_tensors_a_parameter_and_scratch_that_does_not_grow(self):
        problem, optimizer = pair64(mc_samples=3)
        train(problem, optimizer, 2)
        after_two = living_bytes()
        train(problem, optimizer, 6)
        assert living_bytes() == after_two


class TestNotFinite:
    """Rule 6."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_the_only_draw_not_finite_changes_nothing_and_is_drawn_again(self, bad):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        before, steps = as_row(optimizer, problem), optimizer.state[problem.inner.bias]["step"].item()
        with optimizer.sampled_params(train=True):
            where = flat(problem.parameters())
            problem.loss(2).backward()
            problem.inner.bias.grad[3] = bad
        optimizer.step()
        assert optimizer.dropped_draws == 1
        assert torch.equal(as_row(optimizer, problem), before)
        assert optimizer.state[problem.inner.bias]["step"].item() == steps
        assert all(p.grad is None for p in problem.parameters())
        assert torch.equal(draw(optimizer, problem, 2), where)
        optimizer.step()
        other, untroubled = pair64()
        train(other, untroubled, 3)
        assert torch.equal(as_row(optimizer, problem), as_row(untroubled, other))

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_one_draw_of_three_not_finite_is_dropped_whole(self, which):
        normals = [torch.randn(7 * 5 + 7 + 3 * 7 + 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        sizes = [35, 7, 21, 3]

        def run(draws: list[int], bad: int | None) -> Tensor:
            pieces = [piece for i in draws for piece in normals[i].double().split(sizes)]
            problem, optimizer = pair64(noise=replay(pieces))
            for i in draws:
                with optimizer.sampled_params(train=True):
                    problem.loss(i).backward()
                    if i == bad:
                        problem.outer.bias.grad[0] = math.nan
            optimizer.step()
            assert optimizer.dropped_draws == (bad is not None)
            return as_row(optimizer, problem)

        same(run([0, 1, 2], bad=which), run([i for i in range(3) if i != which], bad=None))

    def test_every_draw_not_finite_changes_nothing(self):
        problem, optimizer = pair64()
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
        problem, optimizer = pair64(mc_samples=2)
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
        assert not pair64()[1]._step_supports_amp_scaling


class TestWithoutDraws:
    """Rule 7."""

    def test_a_step_without_a_draw_is_taken_at_the_mean_with_the_curvature_kept_and_warns_once(self):
        """Fault 2: a TypeError about None."""
        problem, optimizer = pair64()
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
        again, plain = pair64()
        again.loss(0).backward()
        with quietly():
            plain.step()
        torch.testing.assert_close(flat(again.parameters()), first, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_a_step_without_a_draw_keeps_the_curvature_whatever_its_estimate(self, approximation):
        problem, optimizer = pair64(**approximation)
        problem.loss(0).backward()
        with quietly():
            optimizer.step()
        assert (state(optimizer, "hess") == 0.5).all()
        assert (state(optimizer, "momentum") != 0).all()

    def test_a_step_without_a_draw_leaves_the_draws_after_it_in_order(self):
        problem, optimizer = pair64()
        problem.loss(0).backward()
        with quietly():
            optimizer.step()
        optimizer.zero_grad()
        train(problem, optimizer, [1])
        assert (state(optimizer, "hess") != 0.5).all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 2

    @pytest.mark.parametrize("opened", [True, False])
    def test_no_gradient_at_all_says_why(self, opened):
        problem, optimizer = pair64()
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
        problem, optimizer = pair64()
        mean = flat(problem.parameters())
        with optimizer.sampled_params(train=True):
            loss = problem.loss(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert torch.equal(flat(problem.parameters()), mean)


class TestLooking:
    """Rule 8: draws with train=False."""

    def test_touch_neither_gradients_nor_training_noise(self):
        problem, optimizer = pair64(mc_samples=1)
        other, plain = pair64(mc_samples=1)
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
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_between_two_training_draws_change_nothing(self):
        problem, optimizer = pair64()
        other, plain = pair64()
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
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_differ_from_one_another_and_from_training_draws(self):
        problem, optimizer = pair64()
        rows = []
        for _ in range(5):
            with optimizer.sampled_params(train=False):
                rows.append(flat(problem.parameters()))
        rows.append(draw(optimizer, problem))
        assert len({tuple(row.tolist()) for row in rows}) == 6

    def test_change_no_state(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        with optimizer.sampled_params(train=False):
            pass
        assert_equal_states(optimizer.state_dict(), before)

    def test_do_not_make_a_step(self):
        problem, optimizer = pair64()
        with optimizer.sampled_params(train=False):
            problem.loss(0)
        with quietly(), pytest.raises(RuntimeError, match="no parameter has a gradient"):
            optimizer.step()


def test_quadratic_model_is_what_the_golden_files_use():
    problem = Quadratic()
    assert problem.loss(0).item() == pytest.approx(1.4455, abs=1e-4)
