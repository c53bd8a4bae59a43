"""What hosts do around draws: they clip, scale and schedule, bring closures and noise, skip steps, freeze, wrap and copy."""

import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
from tests.instances import SMALL_IVON, Network, draw, flat, replay, state, train
from tests.optimizers.conftest import same_bits
from tests.optimizers.problems import (
    APPROXIMATIONS,
    Linear,
    Wrapper,
    X,
    as_row,
    backward,
    by_context,
    closure,
    context,
    only,
    ordinary,
    pair,
    pair64,
    quietly,
    same,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bayesrule as br


class TestSeveralDraws:
    """Rule 5: the average stands in p.grad, and what rescales it rescales the products."""

    def test_the_average_gradient_stands_in_grad(self):
        problem, optimizer = pair64()
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
        problem, clipped = pair64(**approximation)
        for step in range(draws):
            draw(clipped, problem, step)
        norm = nn.utils.clip_grad_norm_(problem.parameters(), max_norm=0.1)
        assert norm > 0.1
        other, small = pair64(**approximation)
        for step in range(draws):
            draw(small, other, step, scale=0.1 / (norm.item() + 1e-6))  # as torch clips
        clipped.step()
        small.step()
        torch.testing.assert_close(as_row(clipped, problem), as_row(small, other), rtol=1e-9, atol=1e-12)

    def test_clipping_by_norm_leaves_a_small_gradient_alone(self):
        problem, clipped = pair64()
        other, plain = pair64()
        for optimizer, net in ((clipped, problem), (plain, other)):
            draw(optimizer, net, 0)
            draw(optimizer, net, 1)
        nn.utils.clip_grad_norm_(problem.parameters(), max_norm=1e6)
        clipped.step()
        plain.step()
        assert torch.equal(as_row(clipped, problem), as_row(plain, other))

    @pytest.mark.parametrize("draws", [1, 2, 3])
    def test_clipping_counts_even_if_gradients_are_cleared_before_the_step(self, draws):
        problem, cleared = pair64()
        other, plain = pair64()
        for optimizer, net in ((cleared, problem), (plain, other)):
            for step in range(draws):
                draw(optimizer, net, step)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.1)
        cleared.zero_grad()
        cleared.step()
        plain.step()
        same(as_row(cleared, problem), as_row(plain, other))

    def test_rescaling_between_draws_acts_on_what_was_averaged_so_far(self):
        problem, optimizer = pair64(betas=(0.0, 0.9), lr=0.0)
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
        problem, optimizer = pair64()
        other, plain = pair64()
        for step in range(3):
            draw(optimizer, problem, step)
            optimizer.zero_grad()
            draw(plain, other, step)
        optimizer.step()
        plain.step()
        same(as_row(optimizer, problem), as_row(plain, other))


class TestClosures:
    """Rule 10, and fault 13: an ordinary closure failed."""

    @pytest.mark.parametrize("draws", [1, 4])
    def test_an_ordinary_closure_is_called_once_a_draw_each_at_another_sample(self, draws):
        problem, optimizer = pair64(mc_samples=draws)
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
        problem, closed = pair64(mc_samples=draws)
        other, opened = pair64()
        for step in range(3):
            train(problem, closed, [step])
            for _ in range(draws):
                draw(opened, other, step)
            opened.step()
        assert torch.equal(as_row(closed, problem), as_row(opened, other))

    @pytest.mark.parametrize("draws", [1, 3])
    def test_a_closure_may_open_its_own_context(self, draws):
        problem, own = pair64(mc_samples=draws)
        other, ordinary = pair64(mc_samples=draws)

        def closure() -> Tensor:
            with own.sampled_params(train=True):
                own.zero_grad()
                loss = problem.loss(0)
                loss.backward()
            return loss

        own.step(closure)
        train(other, ordinary, 1)
        assert torch.equal(as_row(own, problem), as_row(ordinary, other))

    def test_a_closure_runs_with_gradients_on_even_where_they_are_off(self):
        problem, optimizer = pair64()
        with torch.no_grad():
            train(problem, optimizer, 1)
        assert (state(optimizer, "momentum") != 0).all()

    def test_a_closure_may_return_nothing_or_a_number(self):
        problem, optimizer = pair64(mc_samples=2)

        def closure(value: object) -> object:
            optimizer.zero_grad()
            problem.loss(0).backward()
            return value

        assert optimizer.step(lambda: closure(None)) is None
        assert optimizer.step(lambda: closure(2.5)) == 2.5

    def test_a_draw_before_the_closure_counts_too(self):
        problem, mixed = pair64(mc_samples=2)
        other, plain = pair64(mc_samples=3)
        draw(mixed, problem)
        with quietly():
            train_step_without_zero_grad(mixed, problem)
        train(other, plain, 1)
        same(as_row(mixed, problem), as_row(plain, other))

    def test_mc_samples_with_contexts_warns_once(self):
        problem, optimizer = pair64(mc_samples=3)
        with pytest.warns(UserWarning, match="mc_samples=3 acts in step") as caught:
            for _ in range(3):
                draw(optimizer, problem)
                optimizer.step()
        assert len(caught) == 1

    def test_mc_samples_with_as_many_contexts_is_silent(self):
        problem, optimizer = pair64(mc_samples=3)
        for _ in range(3):
            draw(optimizer, problem)
        optimizer.step()

    def test_half_an_antithetic_pair_warns_once(self):
        problem, optimizer = pair64(antithetic=True)
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
        problem, scaled = pair64(**approximation)
        other, plain = pair64(**approximation)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            self.step(problem, scaled, scaler, draws, clip=clip)
            for step in range(draws):
                draw(plain, other, step)
            if clip:
                nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            plain.step()
        torch.testing.assert_close(as_row(scaled, problem), as_row(plain, other), rtol=1e-11, atol=1e-13)

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
        torch.testing.assert_close(as_row(optimizer, problem), as_row(plain, other), rtol=1e-5, atol=1e-6)
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
        torch.testing.assert_close(as_row(optimizer, problem), as_row(plain, other), rtol=1e-5, atol=1e-6)

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
        problem, optimizer = pair64()
        schedule = scheduler(optimizer)
        other, plain = pair64()
        for step in range(6):
            plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            train(problem, optimizer, [step])
            train(other, plain, [step])
            schedule.step()
        assert optimizer.param_groups[0]["lr"] != SMALL_IVON["lr"]
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_one_cycle_moves_beta1_too(self):
        problem, optimizer = pair64()
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
        problem, optimizer = pair64(noise=lambda p: torch.ones(3))
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

        problem, optimizer = pair64(noise=noise)
        mean = flat(problem.parameters())
        with pytest.raises(ValueError, match="out of noise"), optimizer.sampled_params(train=True):
            pytest.fail("the context opened")
        assert torch.equal(flat(problem.parameters()), mean)
        draw(optimizer, problem)
        optimizer.step()
        assert (flat(problem.parameters()) != mean).all()


@pytest.mark.usefixtures("warned")
class TestHosts:
    """What hosts do around a draw that is open for a while: between micro-batches, or after a step that was skipped."""

    def test_a_model_frozen_for_anothers_step_still_draws_in_its_own(self):
        """As a discriminator is while its generator learns."""
        model, optimizer = pair()
        optimizer.attach(model)
        for batch in range(3):
            model.requires_grad_(False)
            model(model.x.clone().requires_grad_()).sum().backward()
            model.requires_grad_(True)
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context())

    def test_a_model_that_another_optimizer_learns_through_has_one_draw_for_both(self):
        model, optimizer = pair()
        other, second = pair(make=Linear)
        optimizer.attach(model)
        second.attach(other)
        for batch in range(3):
            fake = torch.cat([other(X), X, X[:, :1]], dim=1)
            model(fake).sum().backward()
            second.step()
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context())

    def test_a_layer_thawed_under_a_draw_stays_out_of_the_step_which_says_so(self, warned):
        model, optimizer = pair()
        optimizer.attach(model)
        before = model.inner.weight.detach().clone()
        model.inner.requires_grad_(False)
        backward(model, 0, 0.5)
        model.inner.requires_grad_(True)
        backward(model, 1, 0.5)
        optimizer.step()
        assert torch.equal(model.inner.weight, before)
        assert "2 parameters became trainable while a draw was open" in only(warned)

    def test_a_layer_frozen_under_a_draw_is_left_alone_and_at_its_mean(self):
        model, optimizer = pair()
        optimizer.attach(model)
        before = model.inner.weight.detach().clone()
        backward(model, 0, 0.5)
        model.inner.requires_grad_(False)
        backward(model, 1, 0.5)
        optimizer.step()
        assert torch.equal(model.inner.weight, before)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
    def test_copying_model_and_optimizer_under_a_draw_is_refused_or_at_the_mean(self, duplicate):
        model, optimizer = pair(make=Linear)
        mean = flat(model.parameters())
        optimizer.train()
        model(X).sum().backward()
        try:
            other, _ = duplicate((model, optimizer))
        except RuntimeError:
            return
        assert torch.equal(flat(other.parameters()), mean)

    def test_weights_loaded_into_an_attached_model_stay(self):
        """As the best ones so far are, after training was broken off within a step."""
        model, optimizer = pair()
        optimizer.attach(model)
        best = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
        backward(model, 0, 0.5)
        model.load_state_dict(best)
        model.eval()(model.x)
        assert all((p == 0.25).all() for p in model.parameters())

    def test_what_a_wrapper_wraps_is_saved_at_the_mean(self):
        """Hosts unwrap compiled and parallel models before they save."""
        model, optimizer = pair()
        wrapper = Wrapper(model)
        mean = flat(model.parameters())
        optimizer.attach(wrapper)
        wrapper(model.x).sum().backward()
        assert torch.equal(flat(wrapper.module.state_dict().values()), mean)

    def test_what_a_wrapper_wraps_is_evaluated_at_the_mean(self):
        model, optimizer = pair()
        wrapper = Wrapper(model)
        model.eval()
        mean = model(model.x)
        optimizer.attach(wrapper)
        wrapper.train()(model.x).sum().backward()
        model.eval()
        assert torch.equal(model(model.x), mean)

    def test_what_a_wrapper_wraps_in_eval_mode_trains_under_the_draw_of_the_wrapper(self):
        """As a network with frozen normalization does within a module in training mode."""
        model, optimizer = pair()
        wrapper = Wrapper(model)
        optimizer.attach(wrapper)
        model.eval()
        for batch in range(3):
            rows = slice(batch * 16, batch * 16 + 16)
            nn.functional.cross_entropy(wrapper(model.x[rows]), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context())

    def test_an_attached_model_trained_in_eval_mode_is_told_to_call_train(self, warned):
        model, optimizer = pair()
        optimizer.attach(model)
        model.eval()
        ordinary(model, optimizer, [0])
        messages = [str(warning.message) for warning in warned]
        warned.clear()
        assert len(messages) == 1 and "model.train()" in messages[0]

    def test_remove_under_a_draw_brings_the_mean_back(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        hooks = optimizer.attach(model)
        backward(model, 0)
        hooks.remove()
        assert torch.equal(flat(model.parameters()), mean)

    def test_an_optimizer_that_is_dropped_under_its_draw_leaves_the_mean(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        optimizer.attach(model)
        backward(model, 0)
        del optimizer
        gc.collect()
        assert torch.equal(flat(model.parameters()), mean)

    @pytest.mark.parametrize("binding", [closure, context])
    @pytest.mark.parametrize("draws", [1, 2])
    def test_a_step_skipped_by_a_scaler_is_as_if_it_had_not_been(self, draws, binding):
        """The scaler does not call step(); the host clears the gradients, and the same noise is drawn again."""

        def contexts(model: Network, optimizer: br.IVON, share: float) -> None:
            for _ in range(draws):
                with optimizer.sampled_params(train=True):
                    backward(model, 0, share)

        model, optimizer = pair(mc_samples=draws)
        other, plain = pair(mc_samples=draws)
        if binding is context:
            contexts(model, optimizer, float("inf"))
            optimizer.zero_grad()
        else:
            optimizer.step(lambda: backward(model, 0, float("inf")))
        for each in ((model, optimizer), (other, plain)):
            contexts(*each, 1.0)
            each[1].step()
        same_bits(optimizer, plain)

    def test_a_reentrant_checkpoint_under_train_is_silent(self):
        model, optimizer = pair()
        optimizer.attach(model)
        optimizer.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint(model, model.x.clone().requires_grad_(), use_reentrant=True).sum().backward()
        optimizer.step()

    def test_gradients_of_examples_by_functional_calls_of_an_attached_model(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x,)).sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X)
        assert torch.equal(found["weight"].flatten(1), X)
