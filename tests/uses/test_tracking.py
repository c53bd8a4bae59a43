"""Leave-one-out estimates while something trains."""

import math

import pytest
import torch
from tests.contracts import close
from torch import nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.uses.tracking import concentration


def problem():
    """A line through noise, a tenth of whose labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    y = (x[:, 0] > 0).long()
    y[:6] = 1 - y[:6]
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model, x, y


def ivon(model):
    return br.IVON(model.parameters(), lr=0.2, ess=60, hess_init=0.5, weight_decay=0.01)


def train(tracker, epochs, make=ivon):
    model, x, y = problem()
    optimizer = make(model)
    for _ in range(epochs):
        for rows in torch.arange(60).split(15):

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
        tracker.update(model, optimizer)
    return model, optimizer


def data():
    _, x, y = problem()
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def test_every_line_is_the_estimate_of_its_epoch():
    tracker = br.TrackSensitivity(data())
    model, optimizer = train(tracker, 4)
    wanted = br.Sensitivity(model.eval(), optimizer.posterior(model, num_data=60)).loo(data())
    line = tracker.history[-1]
    assert (line["loo_nll"], line["train_nll"]) == pytest.approx((wanted.nll, wanted.train_nll), rel=1e-6)
    assert line["loo_accuracy"] == pytest.approx(wanted.accuracy)
    assert [line["epoch"] for line in tracker.history] == [1, 2, 3, 4]
    close(tracker.scores.loo_loss, wanted.per_example, 1e-5)


def test_the_training_goes_on_as_if_nobody_had_looked():
    plain, _ = train(br.TrackSensitivity(data(), every=100), 3)
    watched, _ = train(br.TrackSensitivity(data()), 3)
    assert watched.training
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)


def test_every_second_epoch_and_the_first_examples_only():
    tracker = br.TrackSensitivity(data(), every=2, subset=10)
    train(tracker, 5)
    assert [line["epoch"] for line in tracker.history] == [2, 4]
    assert len(tracker.scores) == 10


def test_wrong_labels_are_found_by_what_was_said_over_time():
    tracker = br.TrackSensitivity(data())
    train(tracker, 20)
    found = tracker.mislabelled(6)
    assert len(set(found.indices.tolist()) & set(range(6))) >= 5
    assert bool((found.scores[:-1] >= found.scores[1:]).all())


def test_it_stops_when_nothing_gets_better():
    tracker = br.TrackSensitivity(data(), patience=2)
    assert not tracker.should_stop
    for epoch, nll in enumerate((3.0, 1.0, 2.0, 1.5), start=1):
        tracker.history.append({"epoch": epoch, "loo_nll": nll})
        assert tracker.should_stop == (epoch == 4)
    assert tracker.best_epoch == 2


@pytest.mark.parametrize("make", [lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda m: br.SGD(m.parameters(), 0.1)])
def test_of_an_optimizer_without_variances_it_ranks(make):
    tracker = br.TrackSensitivity(data(), correction="first_order")
    train(tracker, 2, make)
    assert all(line["loo_nll"] == line["train_nll"] > 0 for line in tracker.history)  # for want of a scale


@pytest.mark.filterwarnings("ignore:example .* has leverage")
def test_of_torchs_adam_the_second_moments_are_asked():
    tracker = br.TrackSensitivity(data())
    model, optimizer = train(tracker, 3, lambda m: torch.optim.Adam(m.parameters(), 0.02))
    post = br.Posterior.from_adam(optimizer, model, 60, debias=True)
    wanted = br.Sensitivity(model.eval(), post).loo(data())
    assert tracker.history[-1]["loo_nll"] == pytest.approx(wanted.nll, rel=1e-6)
    assert wanted.nll > wanted.train_nll


def test_any_posterior_may_be_asked():
    tracker = br.TrackSensitivity(data(), posterior=lambda model, _: br.Posterior.point(model))
    with pytest.warns(UserWarning, match="knows every weight exactly"):
        train(tracker, 1)
    line = tracker.history[0]
    assert line["loo_nll"] == line["train_nll"]
    assert math.isnan(line["concentration"])


def test_a_warning_is_said_once():
    tracker = br.TrackSensitivity(data())

    def tempered(model):
        return br.IVON(model.parameters(), lr=0.2, ess=600, hess_init=0.5, weight_decay=0.01)

    with pytest.warns(UserWarning, match="trained with ess=600 but num_data=60") as caught:
        train(tracker, 3, tempered)
    assert len(caught) == 1


def test_concentration_is_the_share_of_the_largest_hundredth():
    assert concentration(torch.ones(200)) == pytest.approx(0.01)
    assert concentration(torch.eye(50)[3]) == 1.0


@pytest.mark.parametrize("name", ["every", "subset", "patience"])
def test_numbers_are_whole_and_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1, got 0"):
        br.TrackSensitivity(data(), **{name: 0})


@pytest.mark.parametrize("ask", [lambda t: t.best_epoch, lambda t: t.mislabelled(), lambda t: t.top(3)])
def test_there_is_nothing_before_the_first_estimate(ask):
    with pytest.raises(RuntimeError, match="there is no estimate yet"):
        ask(br.TrackSensitivity(data()))
