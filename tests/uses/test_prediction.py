"""Predictions average probabilities over draws of the weights, and say how the draws disagree."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br

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
            with br.sampled(net, post, seed * count + number), torch.no_grad():
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

    def test_seeds_share_no_draws(self):
        """Else the mean over two seeds would hide how far apart two runs are."""

        class Watched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))
                self.places: set[float] = set()

            def forward(self, x: Tensor) -> Tensor:
                self.places.add(self.weight.item())
                return x * self.weight

        model = Watched().eval()
        for seed in range(3):
            br.predict(model, diagonal(model), torch.ones(1, 1), num_samples=8, seed=seed, link="identity")
        assert len(model.places) == 24

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

    def test_the_weights_come_back_after_a_failing_forward(self):
        class Fails(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                raise ValueError("no")

        model = Fails(2, 2).eval()
        before = flat(model.parameters())
        with pytest.raises(ValueError, match="no"):
            br.predict(model, diagonal(model), torch.zeros(1, 2))
        assert torch.equal(flat(model.parameters()), before)

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
            (dict(method="average"), "unknown method 'average'; take 'mean' or 'mc'"),
            (dict(link="sigmoid"), "unknown link 'sigmoid'; take 'softmax' or 'identity'"),
            (dict(num_samples=0), "num_samples must be a whole number >= 1, got 0"),
            (dict(num_samples=-3), "num_samples must be a whole number >= 1, got -3"),
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
