"""`attach(model)`: when its forwards open a draw and who sees it; hooks, copies, wrappers, checkpoints."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat
from tests.optimizers.conftest import same_bits
from tests.optimizers.problems import Linear, Wrapper, X, backward, by_context, ordinary, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bayesrule as br

pytestmark = pytest.mark.usefixtures("warned")


class TestAttach:
    def test_a_training_forward_sees_a_sample_and_one_in_eval_mode_the_mean(self):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        sampled = model(X)
        assert not torch.equal(sampled, mean)
        assert torch.equal(model(X), sampled)
        model.eval()
        assert torch.equal(model(X), mean)
        model.train()
        assert torch.equal(model(X), sampled)

    def test_arguments_by_name_do(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        model(input=X).sum().backward()
        optimizer.step()

    @pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
    def test_a_forward_without_gradients_opens_no_draw(self, grad):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        with grad():
            assert torch.equal(model(X), mean)

    def test_neither_keeps_the_other_alive(self):
        model, optimizer = pair(make=Linear)
        hooks = optimizer.attach(model)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
        model(X).sum().backward()
        model.state_dict()
        model, optimizer = pair(make=Linear)
        hooks = optimizer.attach(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        hooks.remove()

    def test_the_hooks_need_not_be_kept(self):
        model, optimizer = pair()
        optimizer.attach(model)
        gc.collect()
        ordinary(model, optimizer, [0])

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), lambda m: copy.deepcopy(copy.deepcopy(m))],
        ids=["deep copy", "shallow copy", "pickle", "copy of a copy"],
    )
    def test_copies_are_inert(self, duplicate):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        other = duplicate(model)
        assert torch.equal(other(X), mean) and not optimizer.draws.is_open
        other.state_dict()
        sampled = model(X)
        other.eval()
        other(X)
        other.state_dict()
        assert optimizer.draws.is_open and torch.equal(model(X), sampled)

    def test_a_copy_may_be_attached_itself(self):
        model, optimizer = pair()
        optimizer.attach(model)
        other, second = copy.deepcopy((model, optimizer))
        hooks = second.attach(other)
        for number in range(3):
            ordinary(model, optimizer, [number])
            ordinary(other, second, [number])
        same_bits(second, optimizer)
        hooks.remove()

    def test_an_average_of_the_weights_is_of_means(self):
        model, optimizer = pair()
        optimizer.attach(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        means = []
        for number in range(3):
            ordinary(model, optimizer, [number])
            average.update_parameters(model)
            means.append(flat(model.parameters()))
            average(model.x)
        torch.testing.assert_close(flat(average.module.parameters()), torch.stack(means).mean(0))

    def test_remove_ends_it_and_may_be_called_twice(self):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        hooks = optimizer.attach(model)
        assert not torch.equal(model(X), mean)
        optimizer.eval()
        hooks.remove()
        hooks.remove()
        assert torch.equal(model(X), mean)
        assert not model._forward_pre_hooks and not model._state_dict_pre_hooks
        optimizer.attach(model)

    def test_model_state_dict_between_micro_batches_is_at_the_mean_and_the_draw_goes_on(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for number in range(3):
            mean = flat(model.parameters())
            backward(model, 2 * number, 0.5)
            assert torch.equal(flat(model.state_dict().values()), mean)
            assert torch.equal(flat(Wrapper(model).state_dict().values()), mean)
            backward(model, 2 * number + 1, 0.5)
            optimizer.step()
        same_bits(optimizer, by_context(steps=3, micro=2))

    def test_evaluation_between_micro_batches_is_at_the_mean_and_the_draw_goes_on(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for number in range(3):
            model.eval()
            before = model(model.x)
            model.train()
            backward(model, 2 * number, 0.5)
            model.eval()
            assert torch.equal(model(model.x), before)
            model.train()
            backward(model, 2 * number + 1, 0.5)
            model.eval()
            assert torch.equal(model(model.x), before)
            model.train()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3, micro=2))

    def test_a_look_sees_its_own_sample_whatever_the_mode(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        seen = [model(X)]
        for mode in (model.train, model.eval):
            mode()
            with optimizer.sampled_params(train=False), torch.no_grad():
                seen.append(model(X))
        model.eval()
        seen.append(model(X))
        model.train()
        assert torch.equal(model(X), seen[0])
        assert len({tuple(out.flatten().tolist()) for out in seen}) == 4

    @pytest.mark.parametrize("attaching", [[0, 1], [1, 0], [1]], ids=["inner first", "outer first", "outer alone"])
    def test_a_model_within_a_model_has_one_draw(self, attaching):
        model, optimizer = pair()
        parts = [model, Wrapper(model)]
        for index in attaching:
            optimizer.attach(parts[index])
        for number in range(3):
            rows = slice(number * 16, number * 16 + 16)
            nn.functional.cross_entropy(parts[1](model.x[rows]), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3))

    def test_two_optimizers_of_one_model_each_draw_their_own(self):
        made = []
        for attached in (True, False):
            model = Network(torch.float32)
            both = [br.IVON(part.parameters(), **SMALL_IVON, seed=i) for i, part in enumerate((model.inner, model.outer))]
            for optimizer in both if attached else ():
                optimizer.attach(model)
            for batch in range(4):
                with contextlib.ExitStack() as stack:
                    for optimizer in () if attached else both:
                        stack.enter_context(optimizer.sampled_params(train=True))
                    backward(model, batch)
                for optimizer in both:
                    optimizer.step()
                    optimizer.zero_grad()
            made.append(both)
        for found, wanted in zip(*made, strict=True):
            same_bits(found, wanted)

    def test_two_models_of_one_optimizer_share_a_draw(self):
        def made() -> tuple[Network, Network, br.IVON]:
            model, second = Network(torch.float32), Network(torch.float32)
            return model, second, br.IVON([*model.parameters(), *second.parameters()], **SMALL_IVON)

        one, two, optimizer = made()
        optimizer.attach(one)
        optimizer.attach(two)
        other, second, plain = made()
        for batch in range(3):
            (one.loss(batch) + two.loss(batch + 1)).backward()
            optimizer.step()
            with plain.sampled_params(train=True):
                (other.loss(batch) + second.loss(batch + 1)).backward()
            plain.step()
        same_bits(optimizer, plain)

    def test_evaluating_one_model_leaves_the_draw_of_another_optimizer(self):
        model, optimizer = pair(make=Linear)
        other, second = pair(make=Linear, seed=1)
        optimizer.attach(model)
        second.attach(other)
        sampled, also = model(X), other(X)
        model.eval()
        model(X)
        assert second.draws.is_open and torch.equal(other(X), also)
        model.train()
        assert torch.equal(model(X), sampled)

    def test_one_optimizer_a_parameter_stepping_in_backward(self):
        """Gradients are freed as they come; the draws of the other parameters stay open."""
        model = Network(torch.float32)
        optimizers = [br.IVON([p], **SMALL_IVON, seed=i) for i, p in enumerate(model.parameters())]
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):
            optimizer.attach(model) if p is not model.inner.weight else None
            p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        optimizers[0].attach(model)
        for batch in range(3):
            backward(model, batch)
        other = Network(torch.float32)
        plain = [br.IVON([p], **SMALL_IVON, seed=i) for i, p in enumerate(other.parameters())]
        for batch in range(3):
            with contextlib.ExitStack() as stack:
                for optimizer in plain:
                    stack.enter_context(optimizer.sampled_params(train=True))
                backward(other, batch)
            for optimizer in plain:
                optimizer.step()
        for found, wanted in zip(optimizers, plain, strict=True):
            same_bits(found, wanted)

    def test_an_explicit_context_closes_at_its_end_and_is_a_draw_of_its_own(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        for batch in range(2):
            with optimizer.sampled_params(train=True):
                backward(model, batch)
            assert torch.equal(flat(model.parameters()), mean)
        optimizer.step()
        other, plain = pair()
        for batch in range(2):
            with plain.sampled_params(train=True):
                backward(other, batch)
        plain.step()
        same_bits(optimizer, plain)

    def test_a_context_within_an_open_draw_joins_it_and_leaves_it_open(self):
        model, optimizer = pair()
        optimizer.train()
        sample = flat(model.parameters())
        with optimizer.sampled_params(train=True):
            assert torch.equal(flat(model.parameters()), sample)
            backward(model, 0, 0.5)
        assert torch.equal(flat(model.parameters()), sample)
        backward(model, 1, 0.5)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1, micro=2))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_within_the_model_recomputes_at_the_same_sample(self, reentrant):
        class Checkpointed(Network):
            def forward(self, x: Tensor) -> Tensor:
                hidden = torch.tanh(self.inner(x))
                return checkpoint(self.outer, hidden, use_reentrant=reentrant)

        model, optimizer = pair(make=lambda: Checkpointed(torch.float32))
        optimizer.attach(model)
        for batch in range(3):
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context(steps=3))

    def test_checkpointing_the_model_itself_recomputes_at_the_same_sample(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for batch in range(3):
            rows = slice(batch * 16, batch * 16 + 16)
            nn.functional.cross_entropy(checkpoint(model, model.x[rows], use_reentrant=False), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3))

    def test_forward_under_autocast_sees_the_sample(self):
        model, optimizer = pair(make=lambda: nn.Linear(64, 8))
        optimizer.attach(model)
        x = torch.linspace(-1, 1, 256).view(4, 64)
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()
            mean = model(x)
            model.train()
            sampled = model(x)
            sampled.sum().backward()
            optimizer.zero_grad()
            model.eval()
            assert torch.equal(model(x), mean) and not torch.equal(sampled, mean)

    def test_functional_calls_see_what_they_are_given(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        sampled = model(X)
        model.eval()
        assert (torch.func.functional_call(model, weights, (X,)) == 0).all()
        model.train()
        assert (torch.func.functional_call(model, weights, (X,)) == 0).all()
        assert torch.equal(model(X), sampled)

    def test_predictions_between_micro_batches_are_those_of_a_copy(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0, 0.5)
        model.eval()
        learned = optimizer.posterior(model)
        found = br.predict(model, learned, model.x, "mc", 4)
        wanted = br.predict(copy.deepcopy(model), learned, model.x, "mc", 4)
        assert torch.equal(found.probs, wanted.probs)
        model.train()
        backward(model, 1, 0.5)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1, micro=2))


class TestHooks:
    def test_of_dropped_optimizers_do_not_pile_up(self):
        model, _ = pair()
        for _ in range(5):
            br.IVON(model.parameters(), lr=0.1, ess=10.0).attach(model)
            gc.collect()
        assert not model._forward_pre_hooks and not model._forward_hooks and not model._state_dict_pre_hooks
        assert not any(part._forward_pre_hooks for part in model.modules())

    def test_on_stale_gradients_go_with_a_discarded_draw(self):
        model, optimizer = pair()
        for _ in range(3):
            backward(model, 0)
            with contextlib.suppress(KeyError), optimizer.sampled_params(train=True):
                raise KeyError
        assert not any(p._backward_hooks for p in model.parameters())

    def test_of_a_part_alone_are_told_of_once(self, warned):
        model, optimizer = pair()
        optimizer.attach(model.outer)
        for batch in range(2):
            backward(model, batch)
            optimizer.step()
        messages = [str(warning.message) for warning in warned]
        warned.clear()
        assert len(messages) == 1 and "2 of 4 parameters are in no attached model" in messages[0]

    def test_of_all_parts_are_not_told_of(self):
        model, optimizer = pair()
        for part in (model.inner, model.outer):
            optimizer.attach(part)
        backward(model, 0)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))
