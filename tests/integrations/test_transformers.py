"""Hugging Face's Trainer beyond the matrix: the posterior beside the model, the weight-decay trap, checkpoints in a draw."""

import contextlib
from pathlib import Path

import pytest
import torch
from tests.integrations.matrix import HYPER, SAVED, STEPS, Cell, Killed, Spy, flat, trained, watched

import bayesrule as br

pytestmark = pytest.mark.hosts
for framework in ("transformers", "accelerate", "peft"):
    pytest.importorskip(framework, reason=f"{framework} is not installed: make integrations installs it")

import peft  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tests.integrations.host_transformers import Begun, HuggingFace, adapted, llama, texts, trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from bayesrule.integrations.transformers import PosteriorCallback, SensitivityCallback  # noqa: E402

ONE, FOUR = Cell(1, "fp32"), Cell(4, "fp32")
FILE = "posterior.safetensors"


class Acts(TrainerCallback):
    """Does something at an event, in the second step."""

    def __init__(self, event: str, act) -> None:
        self.act = act
        setattr(self, event, self.handle)

    def handle(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.act()


def run(folder: Path, cell: Cell = ONE, callbacks=(), event=None, act=None, **more) -> tuple[Spy, object]:
    """Trains; ``act(trainer)`` happens at an event of the second step."""
    model = llama()
    with watched(model, cell, False, None) as spy:
        made = trainer(model, folder, cell, [Begun(spy), *callbacks], **more)
        if event is not None:
            made.add_callback(Acts(event, lambda: act(made)))
        made.train()
    return spy, made


def weights(path: Path, model) -> torch.Tensor:
    state = load_file(path)
    return torch.cat([state[name].reshape(-1) for name, _ in model.named_parameters()])


class TestPosterior:
    def test_lies_beside_every_saved_model(self, tmp_path):
        spy, made = run(tmp_path, callbacks=[PosteriorCallback()])
        made.save_model()
        for folder, step in [("checkpoint-3", 3), ("checkpoint-6", 6), (".", 6)]:
            posterior = br.Posterior.load(tmp_path / folder / FILE)
            assert posterior.num_data == len(texts(ONE)) and posterior.ess == HYPER["ess"]
            saved = load_file(tmp_path / folder / "model.safetensors")
            assert posterior.mean.keys() == saved.keys()
            assert all(torch.equal(posterior.mean[name], saved[name]) for name in saved)
            assert torch.equal(weights(tmp_path / folder / "model.safetensors", made.model), spy.means[step])
        later = br.Posterior.load(tmp_path / FILE).precision
        earlier = br.Posterior.load(tmp_path / "checkpoint-3" / FILE).precision
        assert all(not torch.equal(later[name], earlier[name]) for name in later)

    def test_is_over_adapters_alone(self, tmp_path):
        model = adapted()
        trainer(model, tmp_path, ONE, [PosteriorCallback(num_data=1000)]).train()
        posterior = br.Posterior.load(tmp_path / "checkpoint-3" / FILE)
        assert set(posterior.mean) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in posterior.mean) and posterior.num_data == 1000
        saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
        assert all(torch.equal(saved[name.replace(".default", "")], mean) for name, mean in posterior.mean.items())

    def test_fits_the_best_model_where_that_is_what_training_ends_with(self, tmp_path):
        _, made = run(
            tmp_path,
            callbacks=[PosteriorCallback()],
            learning_rate=0.0,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            save_steps=1,
        )
        made.save_model()
        saved = load_file(tmp_path / "model.safetensors")
        posterior = br.Posterior.load(tmp_path / FILE)
        assert all(torch.equal(posterior.mean[name], saved[name]) for name in saved)
        best = br.Posterior.load(Path(made.state.best_model_checkpoint) / FILE)
        assert all(torch.equal(posterior.precision[name], best.precision[name]) for name in saved)

    def test_of_another_optimizer_is_refused(self, tmp_path):
        made = trainer(llama(), tmp_path, ONE, [PosteriorCallback()])
        made.optimizer_cls_and_kwargs = (torch.optim.AdamW, {})
        with pytest.raises(TypeError, match="learns no posterior; pass optimizer_cls_and_kwargs"):
            made.train()

    def test_predicts(self, tmp_path):
        _, made = run(tmp_path, callbacks=[PosteriorCallback()])
        posterior = br.Posterior.load(tmp_path / FILE)
        words = torch.stack([text["input_ids"] for text in texts(ONE)])[:, :-1]

        class Next(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = made.model

            def forward(self, ids):
                return self.net(input_ids=ids).logits[:, -1]

        other = Next().eval()
        renamed = br.Posterior(
            *({f"net.{name}": t for name, t in part.items()} for part in (posterior.mean, posterior.precision)),
            *({f"net.{name}": t for name, t in part.items()} for part in (posterior.prior_mean, posterior.prior_precision)),
            posterior.ess,
        )
        found = br.predict(other, renamed, words, method="mc", num_samples=4)
        assert found.probs.shape == (len(words), 20) and bool((found.mutual_information > 0).all())


class TestWeightDecay:
    def test_that_the_trainer_overrides_is_warned_about(self, tmp_path):
        made = trainer(llama(), tmp_path, ONE, [], weight_decay=0.0)
        with pytest.warns(
            UserWarning, match=r"every parameter group sets weight_decay=0, over the 0.001.*TrainingArguments\(weight"
        ):
            made.train()

    def test_that_is_given_to_the_trainer_is_used(self, tmp_path):
        _, made = run(tmp_path, weight_decay=0.25)
        assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.25, 0.0]


class TestCheckpointsInADraw:
    """With the callback they are at the mean: the Trainer saves in the middle of a step when it is told to stop."""

    def test_between_two_micro_batches(self, tmp_path):
        def save(made):
            made.save_model(str(tmp_path / "between"))

        whole, _ = run(tmp_path / "whole", FOUR)
        spy, made = run(tmp_path / "cut", FOUR, [PosteriorCallback()], "on_substep_end", save)
        assert torch.equal(weights(tmp_path / "between" / "model.safetensors", made.model), spy.means[1])
        assert all(torch.equal(a, b) for a, b in zip(spy.means, whole.means, strict=True))
        spy.check()

    def test_before_the_step_when_a_signal_came(self, tmp_path):
        def signal(made):
            (manager,) = (c.jit_manager for c in made.callback_handler.callbacks if getattr(c, "jit_manager", None))
            manager.is_checkpoint_requested = True

        spy, made = run(tmp_path, FOUR, [PosteriorCallback()], "on_substep_end", signal, enable_jit_checkpoint=True)
        assert torch.equal(weights(tmp_path / "checkpoint-1" / "model.safetensors", made.model), spy.means[1])
        host = HuggingFace()
        model = host.model(seed=1)
        with watched(model, FOUR, False, None) as resumed:
            resumed.begun = 1
            trainer(model, tmp_path, FOUR, [Begun(resumed)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        whole, _ = run(tmp_path / "whole", FOUR)
        assert all(torch.equal(a, b) for a, b in zip(resumed.means, whole.means[1:], strict=True))

    @pytest.mark.parametrize(
        "callbacks",
        [
            pytest.param((PosteriorCallback,), id="with the posterior"),
            pytest.param((), id="alone"),
        ],
    )
    def test_after_a_skipped_step(self, tmp_path, callbacks):
        cell, overflows = Cell(1, "scaler"), []
        model = llama()
        for p in model.parameters():
            p.register_hook(lambda g: g * float("inf") if overflows else g)
        with watched(model, cell, False, None) as spy:
            made = trainer(model, tmp_path, cell, [Begun(spy), *(make() for make in callbacks)], save_steps=1, eval_strategy="no")
            made.add_callback(Acts("on_step_begin", lambda: overflows.append(1)))
            made.add_callback(Acts("on_pre_optimizer_step", overflows.clear))
            made.train()
        skipped = STEPS - (len(spy.means) - 1)
        assert skipped == 1
        for step in range(2, 2 + skipped):
            assert torch.equal(weights(tmp_path / f"checkpoint-{step}" / "model.safetensors", model), spy.means[1])
            if callbacks:
                posterior = br.Posterior.load(tmp_path / f"checkpoint-{step}" / FILE)
                saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
                assert all(torch.equal(posterior.mean[name], saved[name]) for name in saved)
        again = [seen for step, seen in spy.training if step == 1]
        assert len(again) == skipped + 1 and all(torch.equal(seen, again[0]) for seen in again)


class TestAStopInADraw:
    """Training that ends between two micro-batches leaves their sample in the weights, until somebody asks for the mean."""

    @staticmethod
    def fit(folder: Path, callbacks, error: type[BaseException] | None):
        class Stops(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    if error is not None:
                        raise error
                    control.should_training_stop = True

        model = llama()
        with watched(model, FOUR, False, None) as spy:
            made = trainer(model, folder, FOUR, [Begun(spy), Stops(), *callbacks], eval_strategy="no")
            with contextlib.nullcontext() if error is None else pytest.raises(error):
                made.train()
        return made, spy.means[-1]

    @pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["stopped", "interrupted"])
    def test_the_callback_saves_the_mean(self, error, tmp_path):
        made, mean = self.fit(tmp_path, [PosteriorCallback()], error)
        made.save_model(str(tmp_path / "after"))
        assert torch.equal(weights(tmp_path / "after" / "model.safetensors", made.model), mean)

    @pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["stopped", "interrupted"])
    @pytest.mark.parametrize("ask", [lambda made: made.optimizer.eval(), lambda made: made.evaluate()], ids=["eval", "evaluate"])
    def test_alone_one_must_ask(self, ask, error, tmp_path):
        made, mean = self.fit(tmp_path, [], error)
        ask(made)
        made.save_model(str(tmp_path / "after"))
        assert torch.equal(weights(tmp_path / "after" / "model.safetensors", made.model), mean)


class TestAdapters:
    """PEFT in a loop of one's own."""

    def batches(self):
        return [torch.stack([text["input_ids"] for text in texts(FOUR)[i : i + 4]]) for i in range(0, 48, 4)]

    def test_are_saved_in_a_draw_at_the_mean_and_merged_at_the_mean(self, tmp_path):
        model = adapted()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        for words in self.batches():
            model.train()
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
        mean = flat(model)
        model(input_ids=words)
        assert optimizer.draws.is_open
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        names = [name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad]
        assert torch.equal(torch.cat([state[name].reshape(-1) for name in names]), mean)

        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        wanted = loaded(input_ids=words).logits
        assert torch.equal(model.eval()(input_ids=words).logits, wanted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=words).logits, wanted)

    def test_that_are_switched_off_leave_the_base_model(self):
        model = adapted()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        words = self.batches()[0]
        model.train()
        model(input_ids=words, labels=words).loss.backward()
        with model.disable_adapter():
            off = model(input_ids=words).logits
        assert torch.equal(off, llama()(input_ids=words).logits)
        optimizer.step()

    def test_that_are_added_later_are_trained_by_an_optimizer_of_their_own(self):
        model = adapted()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizers = []
        for name in ("default", "second"):
            model.set_adapter(name)
            optimizers.append((name, br.IVON(trained(model), **HYPER)))
        for name, optimizer in optimizers:
            model.set_adapter(name)
            hooks = optimizer.attach(model)
            others = {key: p.clone() for key, p in model.named_parameters() if name not in key}
            words = self.batches()[0]
            model.train()
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
            hooks.remove()
            assert all(torch.equal(p, others[key]) for key, p in model.named_parameters() if key in others)


class TestTrainer:
    def test_goes_on_in_the_middle_of_a_shuffled_epoch(self, tmp_path):
        def fit(folder, kill=None, resume=None):
            model = llama(seed=1 if resume else 0)
            model.config.attention_dropout = 0.2
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.2
            with watched(model, FOUR, False, kill) as spy:
                spy.begun = 4 if resume else 0
                made = trainer(
                    model, folder, FOUR, [Begun(spy)], save_steps=2, train_sampling_strategy="random", eval_strategy="no"
                )
                made.train(resume_from_checkpoint=resume)
            return spy

        def die():
            raise Killed

        whole = fit(tmp_path / "whole")
        with pytest.raises(Killed):
            fit(tmp_path / "cut", kill=die)
        resumed = fit(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
        assert all(torch.equal(a, b) for a, b in zip(resumed.means, whole.means[4:], strict=True))

    def test_trains_again(self, tmp_path):
        _, made = run(tmp_path, callbacks=[PosteriorCallback()])
        made.train()
        assert not made.model._forward_pre_hooks and not made.model._state_dict_pre_hooks

    def test_computes_activations_again(self, tmp_path):
        whole, _ = run(tmp_path / "whole")
        for reentrant in (False, True):
            spy, _ = run(
                tmp_path / str(reentrant),
                callbacks=[PosteriorCallback()],
                activation_checkpointing=True,
                activation_checkpointing_kwargs={"use_reentrant": reentrant},
            )
            assert all(torch.equal(a, b) for a, b in zip(spy.means, whole.means, strict=True))

    @pytest.mark.parametrize("callbacks", [(), (PosteriorCallback,)], ids=["alone", "with the posterior"])
    def test_compiles(self, tmp_path, callbacks):
        whole, _ = run(tmp_path / "whole")
        spy, made = run(
            tmp_path / "compiled", callbacks=[make() for make in callbacks], torch_compile=True, torch_compile_backend="aot_eager"
        )
        for a, b in zip(spy.means, whole.means, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the compiler fuses, and so rounds, in another order
        assert torch.equal(weights(tmp_path / "compiled" / "checkpoint-3" / "model.safetensors", made.model), spy.means[SAVED])

    def test_evaluates_at_the_mean_when_training_is_over(self, tmp_path):
        spy, made = run(tmp_path)
        assert torch.equal(flat(made.model), spy.means[-1])


class TestSensitivity:
    """Each text is an example, whose loss is the sum over its tokens, each of which is predicted from those before."""

    @pytest.mark.filterwarnings("ignore:posterior was trained with ess=64", "ignore:no closed form for LlamaRMSNorm")
    def test_estimates_are_in_the_logs(self, tmp_path):
        batch = [{"input_ids": torch.stack([text["input_ids"] for text in texts(ONE)[:4]])}]
        batch[0]["labels"] = batch[0]["input_ids"]
        tracker = br.TrackSensitivity(batch, num_data=48, correction="first_order")
        _, made = run(tmp_path, callbacks=[SensitivityCallback(tracker)])
        logged = [line["loo_nll"] for line in made.state.log_history if "loo_nll" in line]
        assert logged == [line["loo_nll"] for line in tracker.history] and logged
        made.optimizer.optimizer.eval()
        with torch.no_grad():
            wanted = made.model.eval()(**batch[0]).loss * (batch[0]["input_ids"].shape[1] - 1)
        assert tracker.history[-1]["train_nll"] == pytest.approx(wanted.item(), rel=1e-5)
