"""What calibrate chooses is the best on the data it was given, by evaluate's own figures."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bayesrule as br
from bayesrule.uses import calibration, linear_prediction
from bayesrule.uses.calibration import calibrate, fit_temperature, valley

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 4, generator=GENERATOR, dtype=torch.float64)
TRUTH = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.multinomial((X @ TRUTH).softmax(-1), 1, generator=GENERATOR).squeeze(1)
NUMBERS = X @ TRUTH[:, :2] + torch.tensor([0.5, 2.0]) * torch.randn(200, 2, generator=GENERATOR, dtype=torch.float64)
CLASSES, TARGETS = [(X[:70], LABELS[:70]), (X[70:], LABELS[70:])], [(X[:70], NUMBERS[:70]), (X[70:], NUMBERS[70:])]


def fixture(outputs: int = 3, precision: float = 3.0, hot: float = 1.0) -> tuple[nn.Module, br.Posterior]:
    """A linear model near the truth, whose logits are too large by a factor, with a posterior around it."""
    model = nn.Linear(4, outputs).double().eval()
    shift = 0.5 * torch.randn(4, outputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.weight.data.copy_(hot * (TRUTH[:, :outputs] + shift).T)
    model.bias.data.zero_()
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, br.Posterior(mean, {n: torch.full_like(m, precision) for n, m in mean.items()}, ess=100.0, num_data=100)


def nll(model, post, loader=CLASSES, **given):
    task = "regression" if loader[0][1].is_floating_point() else "classification"
    return br.evaluate(model, post, loader, task, metrics=["nll"], **{"num_samples": 8, **given})["nll"]


@pytest.mark.parametrize("given", [{}, {"antithetic": True}, {"seed": 3}, {"method": "mean"}], ids=str)
@pytest.mark.parametrize("what", [("tau",), ("temperature",), ("tau", "temperature")], ids=str)
class TestClasses:
    @pytest.mark.filterwarnings("ignore:no scale of the posterior")  # at the mean there is none
    def test_nothing_near_is_better(self, what, given):
        model, post = fixture(hot=3.0)
        found = calibrate(model, post, CLASSES, what, num_samples=8, **given)
        best = nll(model, found, **given)
        assert best < nll(model, post, **given) or (given and what == ("tau",))
        for tau in (0.5, 0.9, 1.1, 2.0) if "tau" in what else (1.0,):
            for factor in (0.7, 0.97, 1.03, 1.5) if "temperature" in what else (1.0,):
                other = replace(found.rescale(ess=found.ess * tau), temperature=found.temperature * factor)
                assert nll(model, other, **given) >= best - 2e-6

    @pytest.mark.filterwarnings("ignore:no scale of the posterior")
    def test_what_is_not_named_stays(self, what, given):
        model, post = fixture(hot=3.0)
        post = replace(post, temperature=1.3)
        found = calibrate(model, post, CLASSES, what, num_samples=8, **given)
        assert (found.temperature == 1.3) == ("temperature" not in what)
        changed = found.ess != 100 or found.precision["bias"].isinf().all()
        assert changed == ("tau" in what)
        assert all(torch.equal(found.mean[name], m) for name, m in post.mean.items()) and found.num_data == 100


class TestScale:
    @pytest.mark.parametrize("factor", [1 / 50, 7.0])
    def test_where_it_starts_does_not_matter(self, factor):
        model, post = fixture(hot=3.0)
        one, two = (calibrate(model, p, CLASSES, num_samples=8) for p in (post, post.rescale(ess=100 * factor)))
        assert two.ess == pytest.approx(one.ess, rel=0.06) and two.temperature == pytest.approx(one.temperature, rel=0.03)
        assert nll(model, two) == pytest.approx(nll(model, one), abs=2e-5)

    def test_a_mean_that_no_draw_betters_is_returned_known_exactly(self):
        model, post = fixture()
        model.weight.data.copy_(0.2 * TRUTH.T)  # too unsure already, and draws make it more so
        post = replace(post, mean={**post.mean, "weight": model.weight.detach().clone()})
        with pytest.warns(UserWarning, match="no scale of the posterior predicts these data better than its mean") as caught:
            found = calibrate(model, post, CLASSES, ("tau",), antithetic=True)
        assert caught[0].filename == __file__
        assert all(p.isinf().all() for p in found.precision.values())
        mean = br.predict(model, None, X)
        torch.testing.assert_close(br.predict(model, found, X).probs, mean.probs, rtol=1e-12, atol=1e-12)

    def test_large_scales_come_to_the_mean(self):
        model, post = fixture()
        far = br.predict(model, post.rescale(ess=1e14), X, num_samples=4)
        torch.testing.assert_close(far.probs, br.predict(model, None, X).probs, rtol=1e-5, atol=1e-6)

    def test_a_scale_whose_draws_are_not_finite_is_no_choice(self):
        model, post = fixture()
        model.register_forward_hook(lambda *args: args[2] / (model.weight.abs().max() < 4))
        found = calibrate(model, post, CLASSES, ("tau",), num_samples=8)
        assert math.isfinite(nll(model, found)) and found.ess > 0
        with pytest.raises(RuntimeError, match="non-finite outputs"):
            calibrate(model, post.rescale(ess=1e-3), CLASSES, ("tau",), num_samples=8)


class TestLinearized:
    """One linearization serves all scales and temperatures."""

    HOW = (
        {},
        {"variance": "exact", "link_approx": "bridge_norm"},
        {"variance": "sampled", "link_approx": "mc"},
        {"link_approx": "mc"},
    )

    @pytest.mark.parametrize("how", HOW, ids=str)
    @pytest.mark.parametrize("what", ["tau", "temperature"])
    def test_nothing_near_is_better(self, what, how):
        model, post = fixture(hot=3.0)
        how = {"method": "glm", "num_samples": 8, **how}
        found = calibrate(model, post, CLASSES, what, **how)
        best = nll(model, found, **how)
        assert best < nll(model, post, **how) and (found.temperature == 1) == (found.ess != 100) == (what == "tau")
        for tau, factor in ((0.8, 1.0), (1.25, 1.0)) if what == "tau" else ((1.0, 0.97), (1.0, 1.03)):
            other = replace(found.rescale(ess=found.ess * tau), temperature=found.temperature * factor)
            assert nll(model, other, **how) >= best - 2e-6

    def test_the_model_runs_once(self):
        model, post = fixture(hot=3.0)
        counts = []
        for what in ("temperature", "tau"):
            seen = []
            handle = model.register_forward_hook(lambda *_, seen=seen: seen.append(0))
            calibrate(model, post, CLASSES, what, method="glm")
            handle.remove()
            counts.append(len(seen))
        assert counts[0] == counts[1] <= 2 * len(CLASSES) + 1

    def test_draws_that_are_not_kept_have_one_width_and_temperature(self, monkeypatch):
        model, post = fixture(hot=3.0)
        how = {"method": "glm", "variance": "sampled", "link_approx": "mc", "num_samples": 8}
        kept = br.predict(model, post, X, **how, tau=2.0)
        monkeypatch.setattr(linear_prediction, "HELD", 100)
        torch.testing.assert_close(br.predict(model, post, X, **how, tau=2.0).probs, kept.probs)
        with pytest.raises(RuntimeError, match="draws of 600 outputs were not kept"):
            calibrate(model, post, CLASSES, **how)

    def test_numbers_too(self):
        model, post = fixture(2)
        found = calibrate(model, post, TARGETS, method="glm")
        best = nll(model, found, TARGETS, method="glm")
        for tau, factor in ((0.8, 1.0), (1.25, 1.0), (1.0, 0.9), (1.0, 1.1)):
            noise = tuple(factor * v for v in found.noise_variance)
            other = replace(found.rescale(ess=found.ess * tau), noise_variance=noise)
            assert nll(model, other, TARGETS, method="glm") >= best - 2e-6


YES = [(X[:70], (LABELS[:70] == 0).float()), (X[70:], (LABELS[70:] == 0).float())]


@pytest.mark.parametrize("method", ["mean", "mc", "glm"])
def test_yes_or_no_by_one_logit_is_calibrated(method):
    model, post = fixture(1, hot=4.0)
    how = {"method": method, "num_samples": 8, "link": "sigmoid"}
    found = calibrate(model, post, YES, "temperature", **how)
    best = br.evaluate(model, found, YES, metrics=["nll"], **how)["nll"]
    for factor in (0.97, 1.03):
        other = replace(found, temperature=found.temperature * factor)
        assert br.evaluate(model, other, YES, metrics=["nll"], **how)["nll"] > best
    columns = calibrate(model, post, [(x, y.long()[:, None]) for x, y in YES], "temperature", **how)
    assert columns.temperature == found.temperature


class TestTemperature:
    def test_of_the_mean_is_that_of_fit_temperature(self):
        model, post = fixture(hot=3.0)
        found = calibrate(model, post, CLASSES, ("temperature",), method="mean")
        with torch.no_grad():
            assert found.temperature == pytest.approx(fit_temperature(model(X), LABELS), rel=1e-5)

    def test_predictions_use_it_whatever_the_method(self):
        model, post = fixture()
        hot = replace(post, temperature=2.5)
        with torch.no_grad():
            one = (model(X) / 2.5).softmax(-1)
        torch.testing.assert_close(br.predict(model, hot, X, "mean").probs, one)
        rows = []
        for draw in range(4):
            with br.sampled(model, post, 0, draw), torch.no_grad():
                rows.append((model(X) / 2.5).softmax(-1))
        found, plain = (br.predict(model, p, X, num_samples=4) for p in (hot, post))
        torch.testing.assert_close(found.probs, torch.stack(rows).mean(0))
        torch.testing.assert_close(found.log_probs.exp(), found.probs)
        torch.testing.assert_close(found.entropy, torch.special.entr(found.probs).sum(-1))
        assert torch.equal(found.mean, plain.mean) and torch.equal(found.variance, plain.variance)

    def test_a_model_that_is_always_right_has_none(self):
        model, post = fixture()
        with torch.no_grad():
            labels = model(X).argmax(-1)
        with pytest.warns(UserWarning, match=r"no minimum at a temperature in \[0.0001, 10000\]; using 0.0001"):
            assert calibrate(model, post, [(X, labels)], "temperature", method="mean").temperature == pytest.approx(1e-4)

    def test_tokens_that_do_not_count_do_not_count(self):
        model, post = fixture(hot=3.0)
        x, labels = X.view(20, 10, 4), LABELS.view(20, 10).clone()
        labels[:, 7:] = -100
        found = calibrate(model, post, [(x[:5], labels[:5]), (x[5:], labels[5:])], ("temperature",), num_samples=8)
        kept = calibrate(model, post, [(x[:, :7].reshape(-1, 4), labels[:, :7].flatten())], ("temperature",), num_samples=8)
        assert found.temperature == pytest.approx(kept.temperature, rel=1e-4)

    def test_running_statistics_of_each_draw_are_those_of_predict(self):
        model, post = fixture(hot=3.0)
        normed = nn.Sequential(model, nn.BatchNorm1d(3, dtype=torch.float64)).eval()
        post = replace(
            post, mean={f"0.{n}": m for n, m in post.mean.items()}, precision={f"0.{n}": p for n, p in post.precision.items()}
        )
        given = {"batch_norm": [X[:50], X[50:]], "num_samples": 8}
        found = calibrate(normed, post, CLASSES, ("temperature",), **given)
        best = nll(normed, found, **given)
        for factor in (0.97, 1.03):
            assert nll(normed, replace(found, temperature=found.temperature * factor), **given) > best


class TestNoise:
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_is_found_for_each_output(self, outputs):
        model, post = fixture(outputs, precision=1e3)
        model.weight.data.copy_(TRUTH[:, :outputs].T)
        post = replace(post, mean={**post.mean, "weight": model.weight.detach().clone()})
        data = [(x, y[:, :outputs]) for x, y in TARGETS]
        found = calibrate(model, post, data, ("noise",))
        assert found.noise_variance == pytest.approx((0.25, 4.0)[:outputs], rel=0.35)  # of 200, one standard error is 0.1
        best = nll(model, found, data)
        for factor in (0.95, 1.05):
            assert nll(model, replace(found, noise_variance=tuple(factor * v for v in found.noise_variance)), data) > best
        assert found.temperature == 1 and found.ess == post.ess

    def test_and_the_scale_together(self):
        model, post = fixture(2)
        found = calibrate(model, post, TARGETS, ("tau", "noise"), num_samples=8)
        alone = calibrate(model, post, TARGETS, ("noise",), num_samples=8)
        assert nll(model, found, TARGETS) < nll(model, alone, TARGETS) < nll(model, replace(post, noise_variance=(1.0,)), TARGETS)

    def test_a_scale_for_the_noise_that_is_known(self):
        model, post = fixture(2)
        found = calibrate(model, replace(post, noise_variance=(0.25, 4.0)), TARGETS, ("tau",), num_samples=8)
        assert found.noise_variance == (0.25, 4.0)
        for factor in (0.8, 1.25):
            assert nll(model, found.rescale(ess=found.ess * factor), TARGETS) > nll(model, found, TARGETS) - 1e-6


class TestWithoutPowers:
    @pytest.fixture(params=["mixture", "dropout"])
    def powerless(self, request):
        model, post = fixture(hot=3.0)
        if request.param == "mixture":
            return model, br.Posterior.mixture([post, post.rescale(ess=10.0)])
        optimizer = br.Dropout(model.parameters(), lr=0.1, ess=100.0)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                nn.functional.cross_entropy(model(X), LABELS).backward()
            optimizer.step()
        return model, optimizer.posterior(model)

    def test_get_the_temperature_only_and_say_so(self, powerless):
        model, post = powerless
        with pytest.warns(UserWarning, match="tau is left as it is: a power of"):
            found = calibrate(model, post, CLASSES, num_samples=8)
        assert found.temperature != 1 and found.ess == post.ess
        assert nll(model, found) < nll(model, post)

    def test_have_nothing_else_to_choose(self, powerless):
        with pytest.raises(ValueError, match=r"tau cannot be chosen: a power of .*; take what=\('temperature',\)"):
            calibrate(*powerless, CLASSES, ("tau",))


class TestFiles:
    @pytest.mark.parametrize(
        ("more", "version"),
        [({}, 1), ({"temperature": 1.7}, 3), ({"noise_variance": (0.25, 4.0)}, 3)],
        ids=str,
    )
    def test_keep_it_and_stay_readable_by_earlier_releases_without_it(self, more, version, tmp_path):
        model, post = fixture()
        post = replace(post, **more)
        post.save(tmp_path / "p.safetensors")
        back = br.Posterior.load(tmp_path / "p.safetensors")
        assert (back.temperature, back.noise_variance) == (post.temperature, post.noise_variance)
        assert torch.equal(br.predict(model, back, X, num_samples=4).probs, br.predict(model, post, X, num_samples=4).probs)
        with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
            about = file.metadata()["bayesrule"]
        assert f'"version": {version}' in about and ("temperature" in about) == ("temperature" in more)

    def test_of_other_shapes_of_posteriors_keep_it_too(self, tmp_path):
        _, post = fixture()
        mixed = replace(br.Posterior.mixture([post, post]), temperature=0.5)
        mixed.save(tmp_path / "p.safetensors")
        assert br.Posterior.load(tmp_path / "p.safetensors").temperature == 0.5
        assert all(p.temperature == 2 for p in (replace(post, temperature=2.0), replace(post, temperature=2.0).exact()))

    @pytest.mark.parametrize(
        "more",
        [
            {"temperature": 0.0},
            {"temperature": math.nan},
            {"noise_variance": 1.0},
            {"noise_variance": ()},
            {"noise_variance": (-1.0,)},
        ],
    )
    def test_hold_positive_numbers(self, more):
        with pytest.raises(ValueError, match=f"{next(iter(more))} must be a .*> 0"):
            replace(fixture()[1], **more)

    def test_a_mixture_is_of_posteriors_with_one_temperature(self):
        _, post = fixture()
        hot = replace(post, temperature=2.0)
        assert br.Posterior.mixture([hot, hot]).temperature == 2
        with pytest.raises(ValueError, match="disagree on temperature or noise_variance; mix them before they are calibrated"):
            br.Posterior.mixture([post, hot])


def test_weights_and_hooks_are_left_as_they_were():
    model, post = fixture(hot=3.0)
    model.weight.data.add_(1)
    before = model.weight.detach().clone()
    calibrate(model, post, CLASSES, "temperature", num_samples=4)
    assert torch.equal(model.weight, before) and not model._forward_hooks


def test_too_much_to_keep_is_refused_with_what_would_do(monkeypatch):
    model, post = fixture()
    monkeypatch.setattr(calibration, "_MOST_BYTES", 32 * 3 * 8 * 150)
    message = "would keep .* GiB of outputs .200 labels, 3 classes, 32 draws.; pass at most 150 labels, or take fewer num_samples"
    with pytest.raises(RuntimeError, match=message):
        calibrate(model, post, CLASSES)
    calibrate(model, post, [(X[:150], LABELS[:150])], "temperature")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"posterior": None}, "calibrate needs a posterior, got NoneType; of a bare model take Posterior.point(model)"),
        ({"loader": []}, "nothing to calibrate on: the loader gave no batch"),
        ({"link": "identity"}, "unknown link 'identity' of classes; take 'softmax' or 'sigmoid'"),
        ({"loader": [(X, 2 * LABELS)], "link": "sigmoid"}, "labels of yes or no are 0 and 1, got"),
        ({"what": ()}, "what must name of ('tau', 'temperature'), for the labels are classes; got ()"),
        ({"what": ("noise",)}, "what must name of ('tau', 'temperature'), for the labels are classes; got ('noise',)"),
        ({"what": "temperature", "loader": TARGETS}, "what must name of ('tau', 'noise'), for the labels are floating point"),
        ({"loader": [(X, LABELS[:5])]}, "outputs of shape (200, 3) for labels (5,)"),
        ({"loader": [(X, LABELS + 3)]}, "labels must lie in [0, 3); got"),
        ({"loader": [(X, 0 * LABELS - 100)]}, "no label differs from -100"),
        ({"method": "average"}, "unknown method 'average'"),
        ({"num_samples": 0}, "num_samples must be a whole number >= 1, got 0"),
        ({"what": "noise", "loader": [(X, X @ TRUTH[:, :2])]}, "targets have shape (200, 2) and the outputs (200, 3)"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(given, message):
    model, post = fixture()
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate(**{"model": model, "posterior": post, "loader": CLASSES, **given})


def test_targets_that_are_met_exactly_have_no_noise():
    model, post = fixture(2)
    with torch.no_grad():
        data = [(X, model(X))]
    with pytest.raises(ValueError, match="every target is predicted exactly"):
        calibrate(model, post, data, "noise", method="mean")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x - 7.3) ** 2, 7.3),
        (lambda x: abs(x + 2), -2),
        (lambda x: -x, 10.0),
        (lambda x: x, -10.0),
        (lambda x: 0.0, 0.5),
        (lambda x: math.inf if x > 1 else -x, 1.0),
    ],
)
def test_a_valley_is_walked_to_its_ground(function, expected):
    x, value = valley(function, 0.5, 1.0, 10.0, 1e-6)
    assert x == pytest.approx(expected, abs=1e-5) and value == function(x)
