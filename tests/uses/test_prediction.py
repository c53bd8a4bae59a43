"""Predictions average probabilities over draws of the weights, and say how the draws disagree."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br
from bayesrule.drawing import Draws

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
LOGITS = torch.tensor(GOLDEN["sample_logits"], dtype=torch.float64)
KEYS = {"accuracy", "aurc", "auroc", "brier", "ece", "nll"}


class Scripted(nn.Module):
    """Gives the outputs that it was told, one set a forward pass, whatever its weight."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs, self.passes = outputs, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.outputs[self.passes - 1]

    def posterior(self) -> br.Posterior:
        return br.Posterior({"weight": torch.zeros(1)}, {"weight": torch.ones(1)})


class Watched(nn.Module):
    """Keeps a copy of the weight that each forward pass sees."""

    def __init__(self, size: int = 5, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype))
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return x * self.weight


class Tied(nn.Module):
    """The same matrix reads tokens and gives their logits; a convolution lies channels last, a scale has no axis."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.read = nn.Embedding(7, 4)
        self.mix = nn.Conv2d(4, 4, (1, 3), padding=(0, 1)).to(memory_format=torch.channels_last)
        self.write = nn.Linear(4, 7)
        self.scale = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.write.weight = self.read.weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.mix(self.read(x).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return self.write(inner) * self.scale


class Small(nn.Module):
    """A convolution, a norm with running statistics, a linear layer, in the order of an image classifier."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(48, 4)
        )
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Calls(TorchDispatchMode):
    """Counts calls by name, and new storages of at least ``least`` bytes."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.large, self.names = least, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        given, made = (
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((args, kwargs), out)
        )
        self.large += sum(size >= self.least for place, size in made.items() if place not in given)
        return out


def reference(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log probability, entropy and mutual information of stacked outputs (draws, ...), in float64."""
    logs = outputs.double().log_softmax(-1)
    log_probs = logs.logsumexp(0) - math.log(len(outputs))
    total, own = (torch.special.entr(log.exp()).sum(-1) for log in (log_probs, logs))
    return log_probs, total, total - own.mean(0)


def learned() -> tuple[Network, br.Posterior]:
    net = Network().eval()
    optimizer = br.IVON(net.parameters(), **{**SMALL_IVON, "ess": 10.0})
    train(net, optimizer, 20)
    return net, optimizer.posterior(net)


def diagonal(model: nn.Module, precision: float = 4.0) -> br.Posterior:
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return br.Posterior(mean, {name: torch.full_like(m, precision) for name, m in mean.items()})


class TestMean:
    @pytest.mark.parametrize("given", [dict(posterior=None), dict(method="mean")], ids=["no posterior", "mean"])
    def test_is_the_plain_forward_pass(self, given):
        net, post = learned()
        with torch.no_grad():
            outputs = net(net.x)
        prediction = br.predict(net, **{"posterior": post, **given}, x=net.x)
        torch.testing.assert_close(prediction.mean, outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prediction.probs, outputs.softmax(-1), rtol=1e-12, atol=1e-12)
        assert (prediction.variance == 0).all()
        assert (prediction.mutual_information.abs() < 1e-12).all()

    def test_is_at_the_posteriors_mean_not_at_the_weights_that_stand_in_the_model(self):
        net, post = learned()
        expected = br.predict(net, None, net.x)
        for p in net.parameters():
            p.data.zero_()
        torch.testing.assert_close(br.predict(net, post, net.x, "mean").probs, expected.probs)

    @pytest.mark.parametrize("certain", [lambda p: p.exact(), lambda p: p.rescale(ess=p.ess * 1e24)])
    def test_averages_over_a_posterior_without_spread_are_the_mean(self, certain):
        net, post = learned()
        one = br.predict(net, certain(post), net.x, "mc", num_samples=5)
        two = br.predict(net, post, net.x, "mean")
        torch.testing.assert_close(one.probs, two.probs, rtol=1e-9, atol=1e-9)
        assert one.variance.max() < 1e-18
        assert one.mutual_information.max() < 1e-9

    def test_a_model_that_is_known_exactly_is_the_mean_too(self):
        net, _ = learned()
        one = br.predict(net, br.Posterior.point(net), net.x, num_samples=4)
        torch.testing.assert_close(one.probs, br.predict(net, None, net.x).probs, rtol=1e-12, atol=1e-12)


class TestAverages:
    def test_are_those_of_a_loop_over_sampled(self):
        net, post = learned()
        seed, count = 3, 6
        rows = []
        for number in range(count):
            with br.sampled(net, post, seed, draw=number), torch.no_grad():
                rows.append(net(net.x))
        outputs = torch.stack(rows)
        probs = outputs.softmax(-1)
        prediction = br.predict(net, post, net.x, "mc", num_samples=count, seed=seed)
        torch.testing.assert_close(prediction.mean, outputs.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prediction.variance, outputs.var(0, correction=0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(prediction.probs, probs.mean(0), rtol=1e-12, atol=1e-12)
        total, aleatoric = -(probs.mean(0) * probs.mean(0).log()).sum(-1), -(probs * probs.log()).sum(-1).mean(0)
        torch.testing.assert_close(prediction.entropy, total, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(prediction.mutual_information, total - aleatoric, rtol=1e-9, atol=1e-11)

    def test_golden_probabilities_entropy_and_mutual_information(self):
        """Three draws of logits for forty inputs, computed once apart from this library."""
        model = Scripted(LOGITS)
        with pytest.warns(UserWarning, match="an average over 3 draws"):
            prediction = br.predict(model, model.posterior(), torch.zeros(40, 1), num_samples=3)
        golden = torch.tensor(GOLDEN["mutual_information"], dtype=torch.float64)
        torch.testing.assert_close(prediction.mutual_information, golden, rtol=1e-9, atol=1e-9)
        entropy = torch.as_tensor(GOLDEN["average_of_probabilities"]["entropy"], dtype=torch.float64)
        found = prediction.entropy if entropy.dim() else prediction.entropy.mean()
        torch.testing.assert_close(found, entropy, rtol=1e-9, atol=1e-9)

    def test_golden_metrics_are_of_averaged_probabilities_not_logits(self):
        model = Scripted(LOGITS)
        with pytest.warns(UserWarning, match="an average over 3 draws"):
            figures = br.evaluate(model, model.posterior(), [(torch.zeros(40, 1), torch.tensor(GOLDEN["labels"]))], num_samples=3)
        wanted, wrong = GOLDEN["average_of_probabilities"], GOLDEN["probabilities_of_average"]
        for ours, theirs in (("nll", "nll"), ("ece", "ece15"), ("brier", "brier"), ("aurc", "aurc")):
            assert figures[ours] == pytest.approx(wanted[theirs], abs=1e-9)
        assert abs(wanted["nll"] - wrong["nll"]) > 1e-3

    def test_two_draws_that_contradict_one_another_are_undecided_and_all_of_it_epistemic(self):
        outputs = torch.tensor([[[20.0, -20.0]], [[-20.0, 20.0]]], dtype=torch.float64)
        model = Scripted(outputs.repeat(2, 1, 1))
        prediction = br.predict(model, model.posterior(), torch.zeros(1, 1), num_samples=4)
        torch.testing.assert_close(prediction.probs, torch.full((1, 2), 0.5, dtype=torch.float64))
        assert prediction.entropy.item() == pytest.approx(math.log(2))
        assert prediction.mutual_information.item() == pytest.approx(math.log(2), abs=1e-9)
        assert prediction.mean.abs().max() < 1e-12
        assert (prediction.variance - 400).abs().max() < 1e-9

    def test_mutual_information_is_never_negative_and_below_the_entropy(self):
        net, post = learned()
        prediction = br.predict(net, post, net.x, num_samples=8)
        assert (prediction.mutual_information >= 0).all()
        assert (prediction.mutual_information <= prediction.entropy + 1e-12).all()
        assert (prediction.variance > 0).all()
        torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(64).double())

    def test_outputs_of_a_linear_model_have_the_closed_forms_mean_and_variance(self):
        model = nn.Linear(4, 2).double().eval()
        generator = torch.Generator().manual_seed(0)
        mean = {name: p.detach().clone() for name, p in model.named_parameters()}
        precision = {n: 1 + 5 * torch.rand(m.shape, generator=generator, dtype=m.dtype) for n, m in mean.items()}
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        count = 2000
        found = br.predict(model, br.Posterior(mean, precision), x, num_samples=count, link="identity")
        expected = x @ mean["weight"].T + mean["bias"]
        variance = x**2 @ (1 / precision["weight"]).T + 1 / precision["bias"]
        assert ((found.mean - expected).abs() < 4.5 * (variance / count).sqrt()).all()
        assert ((found.variance / variance - 1).abs() < 4.5 * math.sqrt(2 / count)).all()

    def test_with_the_identity_there_are_no_probabilities(self):
        model = nn.Linear(2, 1).eval()
        prediction = br.predict(model, diagonal(model), torch.zeros(3, 2), num_samples=4, link="identity")
        assert prediction.probs is prediction.entropy is prediction.mutual_information is None
        assert prediction.mean.shape == prediction.variance.shape == (3, 1)

    def test_sequences_keep_their_shape(self):
        model = nn.Linear(4, 6).eval()
        prediction = br.predict(model, diagonal(model), torch.randn(3, 5, 4), num_samples=4)
        assert prediction.probs.shape == prediction.mean.shape == (3, 5, 6)
        assert prediction.entropy.shape == prediction.mutual_information.shape == (3, 5)


class TestRunning:
    def test_the_same_seed_gives_the_same_answer_and_another_another(self):
        net, post = learned()
        one, two, other = (br.predict(net, post, net.x, num_samples=4, seed=seed).probs for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_seeds_share_no_draws_whatever_the_number_of_samples(self):
        """Else the mean over two seeds would hide how far apart two runs are."""
        model = Watched()
        for seed, count in ((0, 32), (1, 16), (2, 8), (3, 24)):
            br.predict(model, diagonal(model), torch.ones(1, 1), num_samples=count, seed=seed, link="identity")
        assert len({tuple(w.tolist()) for w in model.seen}) == 32 + 16 + 8 + 24

    def test_more_samples_begin_with_the_same_draws(self):
        one, two = Watched(), Watched()
        for model, count in ((one, 4), (two, 9)):
            br.predict(model, diagonal(model), torch.ones(1, 1), num_samples=count, seed=3)
        assert torch.equal(torch.stack(one.seen), torch.stack(two.seen[:4]))

    @pytest.mark.parametrize("antithetic", [False, True])
    def test_draw_s_is_that_of_sampled_and_of_the_posterior_and_serves_all_batches(self, antithetic):
        model = Watched()
        post = diagonal(model)
        br.predict(model, post, torch.ones(6, 1), num_samples=4, seed=7, batch_size=2, antithetic=antithetic)
        seen = torch.stack(model.seen).view(4, 3, 5)
        assert (seen == seen[:, :1]).all()
        for draw in range(0, 4, 1 + antithetic):
            assert torch.equal(seen[draw, 0], post.sample(7, draw)["weight"])
            with br.sampled(model, post, 7, draw=draw):
                assert torch.equal(seen[draw, 0], model.weight)

    @pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
    def test_a_seed_of_another_kind_is_the_same_seed(self, seed):
        net, post = learned()
        one, two = (br.predict(net, post, net.x, num_samples=np.int32(4), seed=s).probs for s in (seed, 3))
        assert torch.equal(one, two)

    @pytest.mark.parametrize("size", [1, 7, 64])
    def test_batches_do_not_change_the_answer(self, size):
        net, post = learned()
        whole, parts = (br.predict(net, post, net.x, num_samples=4, batch_size=b) for b in (512, size))
        for one, two in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)

    def test_the_weights_come_back_bit_by_bit_and_no_graph_is_kept(self):
        net, post = learned()
        before = flat(net.parameters())
        prediction = br.predict(net, post, net.x, num_samples=4)
        assert torch.equal(flat(net.parameters()), before)
        assert not prediction.probs.requires_grad
        assert all(p.requires_grad for p in net.parameters())

    @pytest.mark.parametrize("given", [dict(method="mean"), dict(), dict(antithetic=True), dict(vmap=2)], ids=str)
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_the_weights_come_back_bit_by_bit_after_a_failing_forward(self, error, given):
        class Fails(nn.Linear):
            passes = 0

            def forward(self, x: Tensor) -> Tensor:
                self.passes += 1
                if self.passes == (1 if given else 3):
                    raise error("no")
                return super().forward(x)

        model = Fails(2, 2).eval()
        post = diagonal(model)
        with torch.no_grad():  # not what the posterior has as its mean, and nothing that arithmetic would bring back
            model.weight.copy_(torch.tensor([[-0.0, math.nan], [1e-42, math.inf]]))
        before = [p.detach().clone().view(torch.int32) for p in model.parameters()]
        with pytest.raises(error, match="no") as kept:  # the traceback keeps the frames, so nothing may wait for their end
            br.predict(model, post, torch.zeros(1, 2), **given)
        assert kept.value is not None
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.detach().view(torch.int32), old)

    def test_the_weights_come_back_when_a_draw_is_refused(self):
        model = Watched()
        before = model.weight.detach().clone()
        with pytest.raises(RuntimeError, match="draw 0 gave non-finite") as kept:
            br.predict(model, diagonal(model), torch.full((1, 1), math.inf))
        assert torch.equal(model.weight, before)
        assert kept.value is not None

    def test_tied_weights_strides_and_storage_survive(self):
        """Inside a draw too, and the draw is the same for a model that lies contiguous."""
        model, plain = Tied(), Tied()
        plain.mix.to(memory_format=torch.contiguous_format)
        tokens = torch.tensor([[0, 3, 6, 1], [2, 2, 5, 4]])
        places = [(p.data_ptr(), p.stride()) for p in model.parameters()]
        before = flat(model.parameters())
        inside = []
        model.write.register_forward_hook(lambda *_: inside.append([(p.data_ptr(), p.stride()) for p in model.parameters()]))
        one, two = (br.predict(m, diagonal(m), tokens, num_samples=4) for m in (model, plain))
        assert not model.mix.weight.is_contiguous()
        assert inside == [places] * 4
        assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == places
        assert model.write.weight is model.read.weight
        assert torch.equal(flat(model.parameters()), before)
        torch.testing.assert_close(one.probs, two.probs)
        assert one.variance.min() > 0

    def test_a_posterior_that_shares_its_memory_with_the_model_is_not_written_over(self):
        model, apart = Watched(512), Watched(512)  # fills a bucket, so the mean is used where it lies
        shared = br.Posterior({"weight": model.weight.detach()}, {"weight": torch.full((512,), 4.0).double()})
        for m, post in ((model, shared), (apart, diagonal(apart))):
            br.predict(m, post, torch.ones(1, 1), num_samples=4, antithetic=True)
        assert torch.equal(torch.stack(model.seen), torch.stack(apart.seen))

    def test_large_temporaries_and_roots_do_not_grow_with_the_draws(self):
        """Of a matrix that takes several buckets: what is as large as it is made once, the standard deviations too."""
        model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 2)).eval()
        post, counts = diagonal(model), {}
        for given in (dict(num_samples=4), dict(num_samples=9), dict(num_samples=9, antithetic=True)):
            with Calls(least=model[0].weight.nbytes) as calls:
                br.predict(model, post, torch.ones(4, 1024), **given, batch_size=2)
            counts[str(given)] = calls.large, calls.names["rsqrt"] + calls.names["rsqrt_"]
        assert len(set(counts.values())) == 1, counts
        large, roots = next(iter(counts.values()))
        assert large == 1  # the weights that come back
        assert roots > 0

    def test_at_the_mean_no_noise_is_drawn_and_antithetic_pairs_share_it(self, monkeypatch):
        drawn = Counter()
        write = Draws.write

        def counted(self, draw):
            drawn[draw] += 1
            write(self, draw)

        monkeypatch.setattr(Draws, "write", counted)
        net, post = learned()
        drawn.clear()
        br.predict(net, post, net.x, "mean")
        assert not drawn
        br.predict(net, post, net.x, num_samples=5)
        assert dict(drawn) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}
        drawn.clear()
        br.predict(net, post, net.x, num_samples=5, antithetic=True)
        assert dict(drawn) == {0: 1, 2: 1, 4: 1}

    def test_global_random_numbers_are_left_alone(self):
        net, post = learned()
        before = torch.get_rng_state()
        br.predict(net, post, net.x, num_samples=4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_takes_thirty_two_draws_by_default(self):
        model = Scripted(torch.randn(40, 1, 3, generator=torch.Generator().manual_seed(0)))
        br.predict(model, model.posterior(), torch.zeros(1, 1))
        assert model.passes == 32

    def test_no_inputs_give_no_predictions(self):
        model = nn.Linear(2, 3).eval()
        prediction = br.predict(model, diagonal(model), torch.zeros(0, 2), num_samples=4)
        assert prediction.probs.shape == (0, 3)
        assert prediction.entropy.shape == (0,)


class TestAntithetic:
    def test_pairs_are_mirror_images_in_the_mean(self):
        model, plain = Watched(), Watched()
        for m, antithetic in ((model, True), (plain, False)):
            br.predict(m, diagonal(m), torch.ones(1, 1), num_samples=6, antithetic=antithetic)
        even, odd = torch.stack(model.seen[::2]), torch.stack(model.seen[1::2])
        torch.testing.assert_close((even + odd) / 2, model.weight.detach().expand(3, -1), rtol=1e-14, atol=1e-14)
        assert ((even - odd).abs() > 1e-6).all()
        assert torch.equal(even, torch.stack(plain.seen[::2]))

    def test_the_mean_of_a_linear_model_is_exact(self):
        model = nn.Linear(3, 2).double().eval()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        post = diagonal(model)
        exact = br.predict(model, post, x, "mean", link="identity").mean
        pairs, plain = (br.predict(model, post, x, num_samples=8, link="identity", antithetic=a) for a in (True, False))
        torch.testing.assert_close(pairs.mean, exact, rtol=1e-13, atol=1e-13)
        assert (plain.mean - exact).abs().min() > 1e-4
        assert pairs.variance.min() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_known_exactly_stay(self, dtype):
        model = Watched(dtype=dtype)
        br.predict(model, br.Posterior.point(model), torch.ones(1, 1), num_samples=4, antithetic=True)
        assert all(torch.equal(w, model.weight) for w in model.seen)


class TestVmap:
    X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    @pytest.mark.parametrize("link", ["softmax", "identity"])
    @pytest.mark.parametrize("antithetic", [False, True])
    @pytest.mark.parametrize("chunk", [1, 3, 5, 16])
    def test_gives_what_the_loop_gives(self, chunk, antithetic, link):
        model = Small()
        about = dict(num_samples=8, seed=2, antithetic=antithetic, link=link, batch_size=4)
        before = flat(model.parameters())
        loop, stacked = (br.predict(model, diagonal(model), self.X, vmap=vmap, **about) for vmap in (None, chunk))
        for name, one, two in zip(loop._fields, loop, stacked, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12, msg=name) if one is not None else None
            assert (one is None) == (two is None)
        assert torch.equal(flat(model.parameters()), before)

    def test_evaluates_that_many_draws_in_a_pass(self):
        model = Small()
        passes = []
        model.register_forward_hook(lambda *_: passes.append(1))
        br.predict(model, diagonal(model), self.X, num_samples=8, vmap=3)
        assert len(passes) == 3

    def test_ties_and_weights_outside_the_posterior_hold(self):
        model = Tied()
        tokens = torch.tensor([[0, 3, 6, 1]])
        full = diagonal(model)
        some = br.Posterior(*({"read.weight": block["read.weight"]} for block in (full.mean, full.precision)))
        for post in (full, some):
            loop, stacked = (br.predict(model, post, tokens, num_samples=4, vmap=vmap) for vmap in (None, 2))
            torch.testing.assert_close(loop.log_probs, stacked.log_probs, rtol=1e-4, atol=1e-4)

    def test_evaluate_takes_it_and_the_mean_does_without(self):
        net, post = learned()
        loader = [(net.x, net.y)]
        for given in (dict(), dict(method="mean"), dict(posterior=None)):
            about = {"posterior": post, "num_samples": 6, "antithetic": True, **given}
            assert br.evaluate(net, loader=loader, vmap=4, **about) == pytest.approx(
                br.evaluate(net, loader=loader, **about), rel=1e-9
            )


class TestLogProbabilities:
    @pytest.mark.parametrize("spread", [0.1, 5.0, 60.0, 1000.0])
    def test_are_those_of_the_stacked_draws_in_float64_even_where_float32_has_none(self, spread):
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(16, 30, 5, generator=generator) * spread
        outputs[:, 0, 0] = 4 * spread
        model = Scripted(outputs)
        found = br.predict(model, model.posterior(), torch.zeros(30, 1), num_samples=16)
        log_probs, entropy, information = reference(outputs)
        assert found.log_probs.isfinite().all()
        torch.testing.assert_close(found.log_probs.double(), log_probs, rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(found.probs.double(), log_probs.exp(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found.mutual_information.double(), information.clamp_min(0), rtol=1e-5, atol=2e-6)
        assert (log_probs.min() < -110) == (spread > 10)  # exp(-104) is the least float32 above zero

    @pytest.mark.parametrize("order", [1, -1])
    def test_do_not_depend_on_which_draw_comes_first(self, order):
        """A class that is improbable in the first draws and probable in the last, and the other way round."""
        outputs = torch.tensor([[[0.0, gap]] for gap in (-300.0, -150.0, -1.0, 200.0)][::order])
        model = Scripted(outputs)
        found = br.predict(model, model.posterior(), torch.zeros(1, 1), num_samples=4)
        torch.testing.assert_close(found.log_probs.double(), reference(outputs)[0], rtol=3e-7, atol=1e-6)

    def test_nll_counts_them_where_probabilities_have_run_out(self):
        outputs = torch.zeros(8, 4, 3)
        outputs[:, :, 0] = torch.linspace(100, 400, 32).view(8, 4)
        labels = torch.tensor([1, 2, 1, 0])
        model = Scripted(outputs)
        figures = br.evaluate(model, model.posterior(), [(torch.zeros(4, 1), labels)], num_samples=8)
        expected = -reference(outputs)[0].gather(1, labels[:, None]).mean().item()
        assert figures["nll"] == pytest.approx(expected, rel=1e-7)
        assert expected > 80

    def test_nll_of_a_float32_network_is_that_of_float64_arithmetic(self):
        model = Small(torch.float32)
        x, labels = TestVmap.X.float(), torch.tensor([0, 1, 2, 3, 0, 1])
        post, rows = diagonal(model), []
        for draw in range(32):
            with br.sampled(model, post, 0, draw=draw), torch.no_grad():
                rows.append(model(x))
        figures = br.evaluate(model, post, [(x[:4], labels[:4]), (x[4:], labels[4:])])
        expected = -reference(torch.stack(rows))[0].gather(1, labels[:, None]).mean().item()
        assert figures["nll"] == pytest.approx(expected, rel=1e-6)

    def test_are_the_sixth_field_after_the_five_of_old(self):
        old = ("probs", "mean", "variance", "entropy", "mutual_information")
        assert br.Prediction._fields[:6] == (*old, "log_probs")
        assert br.Prediction(*[None] * 5).log_probs is None


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("given", [dict(), dict(antithetic=True), dict(vmap=3), dict(method="mean")], ids=str)
    def test_statistics_are_at_least_float32_and_weights_keep_their_dtype(self, dtype, given):
        model = nn.Linear(4, 3).to(dtype).eval()
        post = diagonal(model)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = br.predict(model, post, x, num_samples=6, **given)
        assert {t.dtype for t in found[:6]} == {torch.promote_types(dtype, torch.float32)}
        assert {p.dtype for p in model.parameters()} == {dtype}

    def test_a_bfloat16_model_is_averaged_in_float32(self):
        model = Watched(3, torch.bfloat16)
        post = br.Posterior({"weight": torch.tensor([1.0, -1.0, 0.3])}, {"weight": torch.tensor([4.0, 100.0, 1.0])})
        found = br.predict(model, post, torch.ones(1, 1, dtype=torch.bfloat16), num_samples=64)
        outputs = torch.stack(model.seen).unsqueeze(1)
        assert outputs.dtype == torch.bfloat16
        for draw in (0, 63):  # reckoned in float32, rounded once, by chance
            sample = post.sample(0, draw)["weight"]
            assert ((outputs[draw, 0].float() - sample).abs() < sample.abs() * 2**-7).all()
        log_probs, entropy, information = reference(outputs)
        wide = outputs.double()
        torch.testing.assert_close(found.mean.double(), wide.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance.double(), wide.var(0, correction=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.log_probs.double(), log_probs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-5, atol=1e-6)

    def test_dtypes_may_be_mixed(self):
        """Each parameter has the noise of its place, whatever its neighbors' dtypes."""

        class Mixed(nn.Module):
            def __init__(self, *dtypes: torch.dtype) -> None:
                super().__init__()
                self.parts = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes])

        mixed = Mixed(torch.float32, torch.float64, torch.bfloat16, torch.float64)
        wide = Mixed(*[torch.float64] * 4)
        post = diagonal(wide)
        with br.sampled(mixed, post, 1), br.sampled(wide, post, 1):
            assert len({p.dtype for p in mixed.parts}) == 3
            for one, two in zip(mixed.parts, wide.parts, strict=True):
                torch.testing.assert_close(one.double(), two, rtol=torch.finfo(one.dtype).eps, atol=1e-6)


class TestComplaints:
    def test_training_mode_warns(self):
        model = nn.Linear(2, 2)
        with pytest.warns(UserWarning, match="model is in training mode") as caught:
            br.predict(model, None, torch.randn(3, 2))
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("count", [1, 3])
    def test_few_draws_warn(self, count):
        model = nn.Linear(2, 2).eval()
        with pytest.warns(UserWarning, match=f"average over {count} draws may be worse than the mean") as caught:
            br.predict(model, diagonal(model), torch.randn(3, 2), num_samples=count)
        assert len(caught) == 1
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(method="average"), "unknown method 'average'; take 'mean', 'mc' or 'glm'"),
            (dict(link="probit"), "unknown link 'probit'; take 'softmax', 'sigmoid' or 'identity'"),
            (dict(num_samples=0), "num_samples must be a whole number >= 1, got 0"),
            (dict(num_samples=-3), "num_samples must be a whole number >= 1, got -3"),
            (dict(num_samples=2.5), "num_samples must be a whole number >= 1, got 2.5"),
            (dict(vmap=0), "vmap must be a whole number >= 1, got 0; it is how many draws are evaluated at once, or None"),
            (dict(vmap=True), "vmap must be a whole number >= 1, got True"),
            (dict(seed=1.5), "seed must be a whole number, got 1.5"),
            (dict(posterior=None, method="mc"), "draws from a posterior, and there is none"),
        ],
        ids=str,
    )
    def test_settings_that_mean_nothing_are_refused(self, given, message):
        model = nn.Linear(2, 2).eval()
        with pytest.raises(ValueError, match=message):
            br.predict(model, **{"posterior": diagonal(model), **given}, x=torch.randn(3, 2))

    def test_probabilities_instead_of_logits_are_refused(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)).eval()
        with pytest.raises(ValueError, match=r"outputs sum to 1 in every row; let the model give logits"):
            br.predict(model, None, torch.randn(8, 2))

    def test_logits_that_are_positive_or_sum_to_one_are_not_taken_for_probabilities(self):
        for outputs in ([[3.0, 1.0]], [[2.0, -1.0]]):
            br.predict(Scripted(torch.tensor([outputs])), None, torch.zeros(1, 1))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_outputs_that_are_not_finite_are_refused_with_what_to_do(self, bad):
        outputs = torch.zeros(4, 5, 3)
        outputs[2, 1, 0] = outputs[2, 4, 2] = bad
        model = Scripted(outputs)
        message = r"draw 2 gave non-finite outputs in 2 of 5 rows; posterior variance .*'weight'.*rescale\(ess="
        with pytest.raises(RuntimeError, match=message):
            br.predict(model, model.posterior(), torch.zeros(5, 1), num_samples=4)

    def test_evaluate_refuses_an_unknown_task(self):
        model = nn.Linear(2, 2).eval()
        with pytest.raises(ValueError, match="unknown task 'ranking'"):
            br.evaluate(model, None, [], task="ranking")

    @pytest.mark.parametrize("loader", [[], DataLoader(TensorDataset(torch.zeros(0, 2), torch.zeros(0)))])
    def test_evaluate_refuses_a_loader_without_data(self, loader):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            br.evaluate(nn.Linear(2, 2).eval(), None, loader)


class TestEvaluate:
    def test_gives_the_figures_as_plain_numbers(self):
        net, post = learned()
        for given in (dict(posterior=None), dict(), dict(method="mean")):
            figures = br.evaluate(net, **{"posterior": post, **given}, loader=[(net.x, net.y)], num_samples=4)
            assert set(figures) == KEYS
            assert all(type(value) is float and math.isfinite(value) for value in figures.values())

    def test_accuracy_and_nll_are_those_of_the_prediction(self):
        net, post = learned()
        probs = br.predict(net, post, net.x, num_samples=8, seed=2).probs
        figures = br.evaluate(net, post, [(net.x, net.y)], num_samples=8, seed=2)
        assert figures["accuracy"] == pytest.approx((probs.argmax(-1) == net.y).double().mean().item())
        assert figures["nll"] == pytest.approx(-probs[torch.arange(64), net.y].log().mean().item())

    def test_does_not_depend_on_how_the_loader_cuts(self):
        net, post = learned()
        data = TensorDataset(net.x, net.y)
        one, two = (br.evaluate(net, post, DataLoader(data, batch_size=size), num_samples=4) for size in (64, 5))
        assert one == pytest.approx(two, rel=1e-9)

    def test_reads_a_loader_that_can_be_read_only_once(self):
        net, post = learned()
        batches = iter([(net.x[:32], net.y[:32]), (net.x[32:], net.y[32:])])
        assert br.evaluate(net, post, batches, num_samples=4) == pytest.approx(
            br.evaluate(net, post, [(net.x, net.y)], num_samples=4), rel=1e-9
        )

    def test_tells_the_unknown_by_its_entropy(self):
        """Far along the boundary logits are flat, so what lies there is told apart; shuffled known data is not."""
        net, post = learned()
        loader = [(net.x, net.y)]
        unknown = [torch.zeros(32, 5, dtype=torch.float64), (torch.zeros(8, 5, dtype=torch.float64), torch.zeros(8))]
        figures = br.evaluate(net, post, loader, num_samples=8, ood=unknown)
        assert set(figures) == KEYS | {"auroc_ood"}
        entropy = br.predict(net, post, net.x, num_samples=8).entropy
        at_zero = br.predict(net, post, torch.zeros(1, 5, dtype=torch.float64), num_samples=8).entropy
        expected = (at_zero > entropy).double().mean() + 0.5 * (at_zero == entropy).double().mean()
        assert figures["auroc_ood"] == pytest.approx(expected.item(), abs=1e-9)
        same = br.evaluate(net, post, loader, num_samples=8, ood=[net.x.flip(0)])
        # each of the 64 inputs meets itself once among the 64 x 64 pairs, and there rounding may break the tie
        assert same["auroc_ood"] == pytest.approx(0.5, abs=64 / 64**2 / 2)

    def test_one_draw_serves_the_known_and_the_unknown(self):
        net, post = learned()
        passes = []
        net.register_forward_hook(lambda *_: passes.append(flat(net.parameters())))
        br.evaluate(net, post, [(net.x, net.y)], num_samples=4, ood=iter([net.x[:3], net.x[:2]]))
        assert len(passes) == 12
        assert all(torch.equal(passes[i], passes[i - i % 3]) for i in range(12))
        assert len({tuple(p.tolist()) for p in passes}) == 4

    def test_the_ood_data_do_not_touch_the_other_figures(self):
        net, post = learned()
        loader = [(net.x, net.y)]
        plain = br.evaluate(net, post, loader, num_samples=4)
        both = br.evaluate(net, post, loader, num_samples=4, ood=[torch.zeros(3, 5, dtype=torch.float64)])
        assert {key: both[key] for key in plain} == plain


@pytest.mark.parametrize("model", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))])
def test_a_single_output_is_no_class_probability(model):
    with pytest.raises(ValueError, match="class probabilities need"):
        br.predict(model.eval(), None, torch.zeros(5, 2))
    assert br.predict(model.eval(), None, torch.zeros(5, 2), link="identity").mean.shape[0] == 5


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(batch_size=0), ValueError, "batch_size must be a whole number >= 1, got 0"),
        (dict(batch_size=2.5), ValueError, "batch_size must be a whole number >= 1, got 2.5"),
        (dict(compile="auto"), ValueError, "compile must be True or False, got 'auto'"),
        (dict(x=[1.0, 2.0]), TypeError, "inputs as one tensor"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused_in_one_line(given, error, says):
    net, post = learned()
    with pytest.raises(error, match=re.escape(says)):
        br.predict(net, post, **{"x": net.x, **given})
