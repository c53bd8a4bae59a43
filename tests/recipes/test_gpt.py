"""The GPT: what it is, and that its training is the plain loop that a reader would write, from any step on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.recipes.gpt import GPT, SIZES, GPTSettings, Shape, Training, built, write
from bayesrule.recipes.language_runs import begin
from bayesrule.recipes.optimizers import TEXT_OPTIMIZERS
from bayesrule.recipes.tokens import Bytes, Tokens, spaced, windows
from bayesrule.recipes.training import Diverged
from bayesrule.recipes.workers import Workers

TEXT = np.frombuffer(("".join(f"{i} times {i} is {i * i}\n" for i in range(400))).encode(), np.uint8)
TINY = Shape(layers=2, heads=2, width=16, context=12)


@pytest.fixture
def tokens():
    return Tokens(TEXT[:5000], TEXT[5000:5600], Bytes(), {"fingerprint": "x"})


def chosen(optimizer="torch-adamw", **changes):
    small = {"layers": 2, "heads": 2, "width": 16, "context": 12, "steps": 6, "batch_size": 4, "every": 3, "warmup": 2}
    return GPTSettings(("text",), optimizer, **{**small, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestModel:
    @pytest.mark.parametrize(
        ("size", "vocabulary", "count"),
        [
            ("nano", 256, 366_432),
            ("small", 50257, 124_439_808),
            ("medium", 50257, 354_823_168),
            ("large", 50257, 774_030_080),
            ("xl", 50257, 1_557_611_200),
        ],
    )
    def test_sizes_are_those_of_gpt_2(self, size, vocabulary, count):
        with torch.device("meta"):
            model = GPT(vocabulary, SIZES[size])
        assert sum(p.numel() for p in model.parameters()) == count

    def test_no_place_sees_what_follows(self):
        model = GPT(20, TINY).eval()
        first = torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(0))
        second = first.clone()
        second[:, 7:] = (second[:, 7:] + 1) % 20
        a, b = model(first), model(second)
        torch.testing.assert_close(a[:, :7], b[:, :7])
        assert a.shape == (3, 12, 20) and (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3
        torch.testing.assert_close(model(first[:, :5]), a[:, :5])

    def test_what_is_added_to_the_stream_begins_small(self):
        model = GPT(256, Shape(8, 4, 128, 64))
        for name, p in model.named_parameters():
            if p.ndim == 2:
                wanted = 0.02 / 4 if name.endswith("outward.weight") else 0.02
                assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            else:
                assert (p == float("norm" in name and "weight" in name)).all()

    def test_the_seed_is_of_the_first_weights_and_of_nothing_else(self):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        same, again, other = GPT(9, TINY, seed=1), GPT(9, TINY, seed=1), GPT(9, TINY, seed=2)
        assert torch.equal(weights(same), weights(again)) and not torch.equal(weights(same), weights(other))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.hosts
    def test_it_is_gpt_2(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        ours = GPT(30, TINY).eval()
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2)).eval()
        names = {"tokens": "wte", "places": "wpe", "norm.": "ln_f.", "blocks": "h", "norm1": "ln_1", "norm2": "ln_2"}
        names |= {"attention.inward": "attn.c_attn", "attention.outward": "attn.c_proj", "widen": "mlp.c_fc"}
        state = {}
        for name, t in ours.state_dict().items():
            linear = any(part in name for part in ("inward", "outward", "widen")) and t.ndim == 2
            for mine, other in names.items():
                name = name.replace(mine, other) if not (mine == "norm." and "blocks" in name) else name
            state[f"transformer.{name.replace('.outward', '.mlp.c_proj')}"] = t.T if linear else t
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        x = torch.arange(24).view(2, 12) % 30
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)

    def test_it_writes(self):
        model = GPT(20, TINY).eval()
        greedy = write(model, [3, 4], 30, temperature=0)
        assert len(greedy) == 30 and greedy[0] == model(torch.tensor([[3, 4]]))[0, -1].argmax()
        assert greedy[-1] == model(torch.tensor([([3, 4, *greedy])[-13:-1]]))[0, -1].argmax()
        assert write(model, [3], 30, seed=1) == write(model, [3], 30, seed=1) != write(model, [3], 30, seed=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "nan"}, "unknown size 'nan'; did you mean 'nano'"),
        ({"tokenizer": "bpf"}, "did you mean 'bpe'"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"steps": 0}, "steps must be at least 1 and below 2147483648, got 0"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"warmup": 6}, "warmup must be from 0 to below the 6 steps, got 6"),
        ({"floor": 1.5}, "floor must be from 0 to 1"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_settings_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        chosen(**changes)


class TestTraining:
    def reference(self, settings, tokens, optimizer, model):
        """The loop as one would write it for one optimizer."""
        for step in range(settings.steps):
            rise = (step + 1) / 3 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * rise
            batches = []
            for micro in range(settings.accumulate):
                generator = torch.Generator().manual_seed(Workers().seed(settings.seed, step, micro))
                starts = torch.randint(5000 - 12, (settings.batch_size,), generator=generator)
                batches.append(
                    [torch.from_numpy(np.stack([tokens.train[s + i : s + i + 12] for s in starts])).long() for i in (0, 1)]
                )
            optimizer.zero_grad()
            if settings.fresh_draws:
                for x, y in batches:
                    with optimizer.sampled_params(train=True):
                        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            elif settings.optimizer == "ivon":
                with optimizer.sampled_params(train=True):
                    for x, y in batches:
                        (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(batches)).backward()
            else:
                for x, y in batches:
                    (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(batches)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return weights(model)

    @pytest.mark.parametrize(
        ("optimizer", "changes"),
        [
            ("torch-adamw", {}),
            ("torch-adamw", {"accumulate": 3}),
            ("ivon", {"accumulate": 2}),
            ("ivon", {"accumulate": 2, "fresh_draws": True}),
        ],
    )
    def test_is_the_plain_loop(self, optimizer, changes, tokens):
        settings = chosen(optimizer, hyperparameters={"lr": 0.01}, **changes)
        _, training = begin(settings, tokens)
        while not training.finished:
            training.epoch()
        model = GPT(256, TINY)
        if optimizer == "ivon":
            g = torch.Generator().manual_seed(settings.seed)
            first = (windows(tokens.train, torch.randint(4988, (4,), generator=g).tolist(), 12) for _ in range(8))
            start = br.start_curvature(model, "cross_entropy", first)
            hyper = dict(ess=50_000, weight_decay=1e-6, clip_radius=1.0, rescale_lr=False, hess_approx="gradsq")
            squares = dict(gradsq_scale=48 if settings.fresh_draws else 96, hess_init=start, betas=(0.9, 0.99))
            plain = br.IVON(model.named_parameters(), lr=0.01, **hyper, **squares)
        else:
            params = [
                {"params": [p for p in model.parameters() if (p.ndim > 1) is big], "weight_decay": 0.1 * big}
                for big in (True, False)
            ]
            plain = torch.optim.AdamW(params, 0.01, betas=(0.9, 0.99), fused=True)
        assert torch.equal(weights(training.model), self.reference(settings, tokens, plain, model))

    def test_lines_are_of_fixed_windows_and_of_the_steps_before(self, tokens):
        settings = chosen(every=4)
        _, training = begin(settings, tokens)
        first, second = training.epoch(), training.epoch()
        assert [first["step"], second["step"]] == [4, 6] and training.finished and len(training.seconds) == 2
        x, y = windows(tokens.validation, spaced(tokens.validation, 256, 12), 12)
        with torch.no_grad():
            nll = F.cross_entropy(training.model(x).flatten(0, 1), y.flatten()).item()
        assert second["validation_nll"] == pytest.approx(nll, rel=1e-5)
        losses, (_, again) = [], begin(settings, tokens)
        again.model.train()
        for _ in range(4):
            losses.append(again._step().item())
            again.done += 1
        assert first["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-9)

    def test_batches_depend_on_seed_step_micro_batch_and_process_alone(self, tokens):
        seen = {}
        for seed in (0, 1):
            for rank in (0, 1):
                _, training = begin(chosen(seed=seed), tokens)
                training.workers = Workers(rank, 2)
                for training.done in (0, 1, 5):
                    for micro in (0, 1):
                        x, y = training.batch(micro)
                        assert torch.equal(x[:, 1:], y[:, :-1])
                        seen[seed, rank, training.done, micro] = tuple(x.flatten().tolist())
        assert len(set(seen.values())) == len(seen) == 24

    @pytest.mark.parametrize(
        ("optimizer", "changes"),
        [(name, {}) for name in TEXT_OPTIMIZERS] + [("ivon", {"dropout": 0.3, "accumulate": 2, "fresh_draws": True})],
    )
    def test_a_training_that_goes_on_ends_where_it_would_have_ended(self, optimizer, changes, tokens):
        settings, kept = chosen(optimizer, steps=8, **changes), []
        _, whole = begin(settings, tokens)
        torch.manual_seed(1)

        def keep():
            tensors, numbers = whole.state()
            kept.append(({name: t.clone() for name, t in tensors.items()}, {**numbers, "history": list(numbers["history"])}))

        while not whole.finished:
            whole.epoch(keep)
        for tensors, numbers in (kept[0], kept[3], kept[5]):
            _, other = begin(replace(settings, seed=0), tokens)
            with torch.no_grad():
                for p in other.model.parameters():
                    p.add_(1.0)
            other.load_state(tensors, numbers)
            torch.manual_seed(99)
            while not other.finished:
                other.epoch()
            assert torch.equal(weights(other.model), weights(whole.model)) and other.history == whole.history

    def test_dropout_draws_from_a_generator_of_its_own(self, tokens):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        _, training = begin(chosen(dropout=0.5), tokens)
        training.epoch()
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_mean_stands_in_the_model_between_steps_and_noise_in_training(self, tokens, monkeypatch):
        seen = []
        _, training = begin(chosen("ivon"), tokens)
        means = weights(training.model)
        real = Training.loss
        monkeypatch.setattr(Training, "loss", lambda self, x, y: seen.append(weights(self.model)) or real(self, x, y))
        training._step()
        assert not torch.equal(seen[0], means)
        assert training.posterior().num_data == 5000
        training.done = 1
        training._step()
        assert (seen[1] - seen[0]).abs().max() > 1e-3

    def test_bf16_and_compiled_models(self, tokens, monkeypatch):
        called = []
        monkeypatch.setattr(torch, "compile", lambda model: called.append(model) or model)
        results = []
        for changes in ({}, {"precision": "bf16"}, {"compile": True}):
            _, training = begin(chosen(**changes), tokens)
            results.append(training.epoch()["validation_nll"])
        assert len(called) == 1 and results[0] == results[2] != results[1] == pytest.approx(results[0], rel=0.01)

    def test_what_diverges_says_so(self, tokens):
        _, training = begin(chosen(hyperparameters={"lr": 1e30}), tokens)
        with pytest.raises(Diverged, match=r"training diverged before step 3 \(loss .*\); lower the lr \(1e\+30\)"):
            training.epoch()


def test_a_model_is_built_at_its_first_weights():
    model = built(chosen(dropout=0.2, seed=3), 30, torch.device("cpu"))
    assert torch.equal(weights(model), weights(GPT(30, TINY, seed=3))) and model.drop.p == 0.2


@pytest.mark.parametrize(
    ("changes", "processes", "apart", "count"),
    [
        ({}, 1, True, 48),
        ({"accumulate": 3}, 2, True, 288),
        ({"accumulate": 3, "fresh_draws": True}, 2, True, 48),
        ({"accumulate": 3, "fresh_draws": True}, 2, False, 96),
        ({"accumulate": 3, "fresh_draws": True, "shard": True}, 2, True, 96),
    ],
    ids=str,
)
def test_squares_are_scaled_by_the_tokens_of_a_draw(changes, processes, apart, count):
    assert chosen("ivon", **changes).tokens_a_draw(processes, apart) == count
