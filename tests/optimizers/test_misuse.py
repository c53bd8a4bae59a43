"""What could train silently wrong raises or warns: stale gradients, failed batches, interrupted draws, states that do not fit."""

import contextlib
import copy
import gc
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from tests.instances import Network, flat
from tests.optimizers.conftest import same_bits
from tests.optimizers.problems import Linear, X, backward, by_context, closure, context, only, ordinary, pair, run, switched
from torch import nn
from torch.utils.checkpoint import checkpoint

import bayesrule as br

pytestmark = pytest.mark.usefixtures("warned")


def failing_forward(model: Network, optimizer: br.IVON) -> None:
    model(torch.ones(2, 99))


def failing_after_backward(model: Network, optimizer: br.IVON) -> None:
    backward(model, 7)
    raise RuntimeError("out of memory")


def failing_in_backward(model: Network, optimizer: br.IVON) -> None:
    loss = model.loss(7)
    handle = model.inner.weight.register_hook(lambda gradient: gradient.expand(99, 99))
    try:
        loss.backward()
    finally:
        handle.remove()


FAILURES = [failing_forward, failing_after_backward, failing_in_backward]


class TestExceptions:
    """A batch that fails and is given up is as if it had not been."""

    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.parametrize("binding", ["context", "closure", "train", "attached", "joined context", "attached closure"])
    def test_leave_no_trace(self, binding, failure):
        model, optimizer = pair()
        if binding.startswith("attached"):
            optimizer.attach(model)
        for batch in range(3):
            mean = flat(model.parameters())
            with pytest.raises(RuntimeError):
                if binding.endswith("closure"):
                    optimizer.step(lambda: failure(model, optimizer))
                elif binding == "context":
                    with optimizer.sampled_params(train=True):
                        failure(model, optimizer)
                else:
                    if not binding.startswith("attached"):
                        optimizer.train()
                    with optimizer.sampled_params(train=True) if binding == "joined context" else contextlib.nullcontext():
                        failure(model, optimizer)
            if binding in ("context", "closure", "attached closure"):
                assert torch.equal(flat(model.parameters()), mean)
            optimizer.zero_grad()
            if binding in ("train", "joined context"):
                optimizer.train()
            ordinary(model, optimizer, [batch]) if binding in ("train", "attached", "joined context") else context(
                model, optimizer, [batch]
            )
        same_bits(optimizer, by_context(steps=3))

    def test_in_a_closure_lose_the_micro_batches_before_it_too(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        backward(model, 0)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(lambda: failing_after_backward(model, optimizer))
        assert torch.equal(flat(model.parameters()), mean) and all(p.grad is None for p in model.parameters())
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    def test_eval_brings_the_mean_back_after_one(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError):
            failing_forward(model, optimizer)
        optimizer.eval()
        assert torch.equal(flat(model.parameters()), mean)


STALE = "gradients from before this draw"


class TestStaleGradients:
    """A gradient that was there before the draw belongs to other weights."""

    @staticmethod
    def leave(model: Network) -> None:
        model.loss(0).backward()

    @pytest.mark.parametrize("binding", ["context", "train", "eval", "save", "attached", "evaluated", "saved", "closure"])
    def test_raise_where_the_draw_closes_and_are_cleared(self, binding):
        model, optimizer = pair()
        mean = flat(model.parameters())
        self.leave(model)
        if binding in ("attached", "evaluated", "saved"):
            optimizer.attach(model)
        with pytest.raises(RuntimeError, match=STALE):
            if binding == "context":
                with optimizer.sampled_params(train=True):
                    backward(model, 1)
            elif binding == "closure":
                optimizer.step(lambda: backward(model, 1))
            else:
                if binding in ("train", "eval", "save"):
                    optimizer.train()
                backward(model, 1)
                {"eval": optimizer.eval, "save": optimizer.state_dict, "saved": model.state_dict}.get(
                    binding, lambda: model.eval()(model.x) if binding == "evaluated" else optimizer.step()
                )()
        assert torch.equal(flat(model.parameters()), mean) and all(p.grad is None for p in model.parameters())
        model.train()
        context(model, optimizer, [1])
        other, plain = pair()
        context(other, plain, [1])
        same_bits(optimizer, plain)

    @pytest.mark.parametrize("to_none", [True, False])
    @pytest.mark.parametrize("when", ["before the draw", "under the draw", "after the forward"])
    def test_that_are_cleared_first_are_none(self, when, to_none):
        model, optimizer = pair()
        self.leave(model)
        if when == "before the draw":
            optimizer.zero_grad(set_to_none=to_none)
        optimizer.train()
        if when == "under the draw":
            optimizer.zero_grad(set_to_none=to_none)
        loss = model.loss(0)
        if when == "after the forward":
            optimizer.zero_grad(set_to_none=to_none)
        loss.backward()
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_that_the_model_zeroes_in_place_under_the_draw_are_none(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        model.zero_grad(set_to_none=False)
        backward(model, 0)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_of_one_layer_raise_though_another_was_cleared(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        model.inner.zero_grad()
        backward(model, 1)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()

    def test_that_are_added_to_out_of_place_raise(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            model.loss(1).backward(create_graph=True)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()

    def test_that_nobody_adds_to_are_replaced_silently(self):
        model, optimizer = pair()
        self.leave(model)
        with optimizer.sampled_params(train=True):
            for p, gradient in zip(model.parameters(), torch.autograd.grad(model.loss(0), model.parameters()), strict=True):
                p.grad = gradient
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_of_a_step_without_a_draw_raise_in_the_next_one(self, warned):
        model, optimizer = pair()
        ordinary(model, optimizer, [0])
        assert "a step without a draw" in only(warned)
        optimizer.train()
        backward(model, 1)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()


class TestMisuse:
    """What could train silently wrong raises, or warns once with the remedy."""

    @pytest.mark.parametrize("wrong", [None, "model", [nn.Linear(1, 1)], lambda x: x], ids=["none", "name", "list", "function"])
    def test_attaching_what_is_no_module(self, wrong):
        _, optimizer = pair()
        with pytest.raises(TypeError, match=r"IVON\.attach: expected a torch\.nn\.Module, got"):
            optimizer.attach(wrong)

    @pytest.mark.parametrize("wrong", [Linear, nn.Identity])
    def test_attaching_a_model_of_others(self, wrong):
        _, optimizer = pair()
        model = wrong()
        with pytest.raises(ValueError, match=f"trains no parameter of this {wrong.__name__}; attach the model that it trains"):
            optimizer.attach(model)
        assert not model._forward_pre_hooks

    def test_attaching_twice(self):
        model, optimizer = pair()
        hooks = optimizer.attach(model)
        with pytest.raises(ValueError, match=r"attached already; remove\(\) what the first attach\(\) returned"):
            optimizer.attach(model)
        assert len(model._forward_pre_hooks) == 1
        hooks.remove()
        optimizer.attach(model)

    @pytest.mark.parametrize("step", [ordinary, closure])
    def test_a_training_forward_outside_a_draw(self, step, warned):
        model, optimizer = pair()
        for batch in range(2):
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
        message = only(warned)
        for remedy in ("opt.attach(model)", "opt.train()", "step(closure)", "sampled_params(train=True)"):
            assert remedy in message

    def test_evaluating_in_training_mode_under_a_draw(self, warned):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        model(X).sum().backward()
        for grad in (torch.no_grad, torch.inference_mode):
            with grad():
                model(X)
        message = only(warned)
        assert "sees the draw that is open, not the mean" in message and "model.eval()" in message

    def test_gradients_that_never_arrive(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        optimizer.attach(model)
        model.loss(0)
        with pytest.raises(RuntimeError, match=r"no parameter has a gradient; a draw was opened, but backward\(\) did not run"):
            optimizer.step()
        assert torch.equal(flat(model.parameters()), mean)
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    def test_gradients_that_never_arrive_in_a_closure(self):
        model, optimizer = pair()
        with pytest.raises(RuntimeError, match=r"backward\(\) did not run in it or reached no parameter"):
            optimizer.step(lambda: model.loss(0))

    def test_a_closure_where_the_scaler_forbids_it(self):
        model, optimizer = pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=lambda: backward(model, 0))

    def test_a_closure_inside_a_context(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError, match="a draw is open already"), optimizer.sampled_params(train=True):
            optimizer.step(lambda: backward(model, 0))
        assert torch.equal(flat(model.parameters()), mean)

    def test_train_inside_a_look(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError, match="leave its sampled_params"), optimizer.sampled_params(train=False):
            optimizer.train()
        assert torch.equal(flat(model.parameters()), mean)

    def test_a_weight_for_a_draw_that_is_joined(self):
        _, optimizer = pair()
        optimizer.train()
        with pytest.raises(RuntimeError, match=r"weight 2\.0 cannot join .*opt\.eval\(\)"), optimizer.sampled_params(weight=2.0):
            pytest.fail("the context opened")

    @pytest.mark.parametrize("binding", [switched, ordinary])
    def test_several_draws_where_a_step_has_one(self, binding, warned):
        run(binding, True, mc_samples=3)
        assert "mc_samples=3 acts in step(closure); this step had 1 draw:" in only(warned)

    @pytest.mark.parametrize("closed", [False, True])
    def test_several_draws_in_a_closure_under_a_draw_which_is_the_only_one(self, closed, warned):
        model, optimizer = pair(mc_samples=3)
        optimizer.attach(model)
        backward(model, 0, 0.5)
        if closed:
            optimizer.eval()
        calls = []
        optimizer.step(lambda: calls.append(backward(model, 1, 0.5)))
        assert len(calls) == 1 and "mc_samples=3 acts in step(closure); this step had 1 draw:" in only(warned)
        same_bits(optimizer, by_context(steps=1, micro=2))

    def test_half_an_antithetic_pair(self, warned):
        run(ordinary, True, antithetic=True)
        assert "antithetic draws come in pairs, but this step had 1" in only(warned)

    def test_a_reentrant_checkpoint_that_wants_a_draw_in_backward(self):
        model, optimizer = pair()
        optimizer.attach(model)
        out = checkpoint(model, model.x.clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"IVON: a model computed again in backward\(\).*use_reentrant=False"):
            out.sum().backward()
        optimizer.zero_grad()
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    @pytest.mark.parametrize("then", ["eval", "train"])
    def test_backward_through_weights_that_were_exchanged_since_the_forward(self, then):
        model, optimizer = pair()
        if then == "eval":
            optimizer.train()
        loss = model.loss(0)
        getattr(optimizer, then)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_copying_an_optimizer_whose_draw_waits_for_its_step(self):
        model, optimizer = pair()
        optimizer.train()
        backward(model, 0)
        optimizer.eval()
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="copy it after the step"):
                duplicate(optimizer)


class TestInterruptions:
    """A draw that is closed before its time, by whoever, learns from nothing that comes at the mean."""

    CLOSERS: ClassVar = {
        "state_dict": lambda model, optimizer: optimizer.state_dict(),
        "eval": lambda model, optimizer: optimizer.eval(),
        "posterior": lambda model, optimizer: optimizer.posterior(model),
    }

    @pytest.mark.parametrize("close", CLOSERS.values(), ids=CLOSERS)
    def test_a_backward_after_a_close_within_a_context_raises(self, close):
        model, optimizer = pair()
        with pytest.raises(RuntimeError, match=r"backward\(\) ran at the mean"), optimizer.sampled_params(train=True):
            close(model, optimizer)
            backward(model, 0)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("close", CLOSERS.values(), ids=CLOSERS)
    def test_a_close_after_the_backward_of_a_context_does_no_harm(self, close):
        model, optimizer = pair()
        with optimizer.sampled_params(train=True):
            backward(model, 0)
            close(model, optimizer)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_a_backward_in_eval_mode_between_micro_batches_raises(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0, 0.5)
        model.eval()
        model.loss(0).backward()
        model.train()
        with pytest.raises(RuntimeError, match=r"backward\(\) ran at the mean"):
            backward(model, 1, 0.5)
        backward(model, 0)  # the step begins anew
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_gradients_by_autograd_grad_in_eval_mode_are_no_harm(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0)
        model.eval()
        torch.autograd.grad(model.loss(0), list(model.parameters()))
        model.train()
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_a_forward_after_the_contexts_of_a_step_opens_nothing(self):
        model, optimizer = pair()
        optimizer.attach(model)
        with optimizer.sampled_params(train=True):
            backward(model, 0)
        model.loss(0)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))


class TestTwoOptimizers:
    """Over the same parameters, one after the other: the first one's draw is over before the second one's begins."""

    @pytest.mark.parametrize("second", [br.IVON, br.SGD], ids=["draws", "does not"])
    def test_the_draw_of_another_is_no_mean(self, second):
        model, first = pair()
        mean = flat(model.parameters())
        first.attach(model)
        backward(model, 0)
        other = second(model.parameters(), lr=0.0, **({"ess": 10.0} if second is br.IVON else {}))
        model.zero_grad()
        model.loss(0).backward() if second is br.SGD else other.step(lambda: model.loss(0).backward())
        if second is br.SGD:
            other.step()
        assert torch.equal(flat(model.parameters()), mean)

    def test_two_cannot_be_attached(self):
        model, first = pair()
        hooks = first.attach(model)
        second = br.IVON(model.parameters(), lr=0.1, ess=10.0)
        with pytest.raises(ValueError, match="another optimizer of these parameters is attached"):
            second.attach(model)
        hooks.remove()
        second.attach(model)

    def test_an_old_one_that_is_collected_leaves_what_was_learned_since(self):
        model, first = pair()
        hooks = first.attach(model)
        backward(model, 0)
        hooks.remove()
        first.train()
        second = torch.optim.SGD(model.parameters(), lr=0.5)
        second.step()
        learned = flat(model.parameters())
        del first
        gc.collect()
        assert torch.equal(flat(model.parameters()), learned)

    def test_a_context_of_another_is_refused(self):
        model, first = pair()
        second = br.IVON(model.parameters(), lr=0.1, ess=10.0)
        with (
            first.sampled_params(train=True),
            pytest.raises(RuntimeError, match="another optimizer has a draw open in these parameters"),
            second.sampled_params(train=True),
        ):
            pass


class TestLoadingRefuses:
    def test_another_order_of_the_same_names(self):
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        saved = br.IVON([("a", a), ("b", b)], lr=0.1, ess=10.0).state_dict()
        with pytest.raises(ValueError, match="in group 0 'a' was saved where 'b' stands"):
            br.IVON([("b", b), ("a", a)], lr=0.1, ess=10.0).load_state_dict(saved)

    def test_a_state_without_the_prior(self):
        w = nn.Parameter(torch.ones(3))
        plain = br.IVON([("w", w)], lr=0.1, ess=10.0)
        plain.step(lambda: w.square().sum().backward())
        prior = br.Posterior({"w": torch.zeros(3)}, {"w": torch.ones(3)})
        with pytest.raises(ValueError, match="saved without a posterior as the prior"):
            br.IVON([("w", w)], lr=0.1, ess=10.0, prior=prior).load_state_dict(plain.state_dict())


def test_ten_steps_that_change_nothing_are_told(warned):
    model, optimizer = pair()
    for _ in range(12):
        optimizer.step(lambda: backward(model, 0, float("nan")))
    assert "ten steps in a row changed nothing" in only(warned)
