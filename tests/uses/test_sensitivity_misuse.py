"""What sensitivity refuses, and what it warns of."""

import re
import warnings

import pytest
import torch
from tests.contracts import close, normal
from tests.uses.test_sensitivity_networks import network, perceptron, posterior_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br


def test_a_wide_posterior_falls_back_to_first_order_and_says_so():
    model, x, y = network()
    post = posterior_of(model).rescale(ess=0.02)
    wide = br.Posterior(post.mean, post.precision, ess=12, num_data=12)
    with pytest.warns(RuntimeWarning, match=r"^example \d+ has leverage [\d.]+ >= 1.*; falling back to first order"):
        found = br.Sensitivity(model, wide).scores([(x, y)])
    first = br.Sensitivity(model, wide, correction="first_order").scores([(x, y)])
    refused = found.leverage >= 1
    assert refused.any()
    close(found.deviation[refused], first.deviation[refused], 1e-12)


def test_another_ess_is_that_of_the_sum_with_a_warning():
    model, x, y = network()
    post = posterior_of(model)
    tempered = post.rescale(ess=1200.0)
    with pytest.warns(UserWarning, match=r"trained with ess=1200 but num_data=12; variances are scaled by 100 for leave-one-out"):
        found = br.Sensitivity(model, tempered).scores([(x, y)])
    close(found.deviation, br.Sensitivity(model, post).scores([(x, y)]).deviation, 1e-9)


def test_other_numbers_of_examples_are_told():
    model, x, y = network()
    with pytest.warns(UserWarning, match="the data have 6 examples, and the posterior is of 12"):
        br.Sensitivity(model, posterior_of(model)).scores([(x[:6], y[:6])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = br.Sensitivity(model, posterior_of(model)).scores([(x[:8], y[:8]), (x[8:], y[8:])], subset=6)
    assert len(found) == 6


def dropping():
    return nn.Sequential(perceptron(), nn.Dropout(0.5)).double()


REFUSED = {
    "estimator": (lambda m, q, x, y: br.Sensitivity(m, q, estimator="exact"), ValueError, "unknown estimator 'exact'"),
    "correction": (lambda m, q, x, y: br.Sensitivity(m, q, correction="full"), ValueError, "unknown correction 'full'"),
    "loss": (lambda m, q, x, y: br.Sensitivity(m, q, "hinge"), ValueError, "unknown loss 'hinge'; take 'cross_entropy'"),
    "noise": (
        lambda m, q, x, y: br.Sensitivity(m, q, "mse", noise_variance=0),
        ValueError,
        "noise_variance must be a number > 0, got 0",
    ),
    "draws without a posterior": (lambda m, q, x, y: br.Sensitivity(m, None, estimator="mc"), ValueError, "there is none"),
    "no data": (lambda m, q, x, y: br.Sensitivity(m, q).scores([]), ValueError, "there are no examples"),
    "a batch of one": (lambda m, q, x, y: br.Sensitivity(m, q).scores([x]), TypeError, "a batch is a pair"),
    "labels": (
        lambda m, q, x, y: br.Sensitivity(m, q).scores([(x, y + 7)]),
        ValueError,
        "labels go from 7 to 9, and there are 3 classes",
    ),
    "shape of labels": (lambda m, q, x, y: br.Sensitivity(m, q).scores([(x, y[:, None])]), ValueError, "labels have shape"),
    "numbers": (lambda m, q, x, y: br.Sensitivity(m, q, "mse").scores([(x, y)]), ValueError, "mse takes real numbers as targets"),
    "no 0 or 1": (
        lambda m, q, x, y: br.Sensitivity(m, q, "bce").scores([(x, torch.full((12, 3), 2.0))]),
        ValueError,
        "bce takes labels 0 and 1, or between them; 36 of 36",
    ),
    "not finite": (lambda m, q, x, y: br.Sensitivity(m, q).scores([(x / 0, y)]), RuntimeError, "not finite for 12 of 12"),
    "score": (lambda m, q, x, y: br.Sensitivity(m, q).mislabelled([(x, y)], score="best"), ValueError, "unknown score 'best'"),
    "nothing scored": (lambda m, q, x, y: br.Sensitivity(m, q).top(3), RuntimeError, "nothing was scored yet"),
    "nothing to remove from": (lambda m, q, x, y: br.Sensitivity(m, q).remove([1]), ValueError, "there is no data"),
    "not in the data": (
        lambda m, q, x, y: br.Sensitivity(m, q).remove([1, 40], [(x, y)]),
        ValueError,
        "2 examples to take away, and 1",
    ),
    "no such class": (lambda m, q, x, y: br.Sensitivity(m, q).leave_class_out(9, [(x, y)]), ValueError, "no example to take away"),
    "a loss of all": (
        lambda m, q, x, y: br.Sensitivity(m, q, F.cross_entropy).scores([(x, y)]),
        ValueError,
        "loss must return one number for each of 12 examples",
    ),
    "other names": (
        lambda m, q, x, y: br.Sensitivity(m, br.Posterior.point(nn.Linear(2, 2))),
        KeyError,
        "posterior holds 'weight' and the model has no parameter of that name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line(case):
    action, error, message = REFUSED[case]
    model, x, y = network()
    with pytest.raises(error, match=message) as caught:
        action(model, posterior_of(model), x, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: network("convolutional")[0].train(), "batch norm mixes examples"), (dropping, "dropout is random")],
)
def test_training_mode_is_refused(make, message):
    model = make()
    x = torch.zeros(2, 1, 4, 4) if "norm" in message else torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match=f"{message}; call model.eval\\(\\)"):
        br.Sensitivity(model, br.Posterior.point(model)).scores([(x.double(), torch.zeros(2, dtype=torch.long))])


def test_a_model_whose_outputs_come_from_no_linear_layer_has_no_last_layer():
    model = nn.Sequential(perceptron(), nn.Tanh()).double().eval()
    with pytest.raises(ValueError, match="come from no linear layer"):
        br.Sensitivity(model, posterior_of(model), estimator="last_layer").scores([(normal(1, 2, 4), torch.zeros(2).long())])


def test_a_posterior_that_is_certain_is_told():
    model, x, y = network()
    with pytest.warns(UserWarning, match="knows every weight exactly, so that leaving examples out changes nothing") as caught:
        found = br.Sensitivity(model, posterior_of(model).exact()).scores([(x, y)])
    assert torch.equal(found.loo_loss, found.loss) and len(caught) == 1


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1], "named by whole numbers from 0 on, or by a mask of them, got [-1]"),
        ([0.5], "named by whole numbers from 0 on, or by a mask of them, got [0.5]"),
        ([900], "1 examples to take away, and 0 of them are among the 12 of the data"),
    ],
    ids=str,
)
def test_examples_that_are_none_are_refused(indices, message):
    model, x, y = network()
    with pytest.raises(ValueError, match=re.escape(message)):
        br.Sensitivity(model, posterior_of(model)).remove(indices, [(x, y)])


def test_a_loader_that_shuffles_is_told():
    model, x, y = network()
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    with pytest.warns(UserWarning, match="the loader shuffles"):
        br.Sensitivity(model, posterior_of(model)).scores(loader)


def test_a_covariance_that_is_too_large_is_refused_with_the_cheaper_way(monkeypatch):
    monkeypatch.setattr("bayesrule.uses.products.LIMIT", 10)
    model, x, y = network()
    with pytest.raises(RuntimeError, match=re.escape("the covariance of 3 outputs takes 0.0 GiB an example; take 'vjp_jvp'")):
        br.Sensitivity(model, posterior_of(model), estimator="layerwise").scores([(x, y)])


MORE = {
    "a mixture": (lambda m, q, x, y: br.Sensitivity(m, br.Posterior.mixture([q, q])), TypeError, "a mixture's mean is no model"),
    "read once": (lambda m, q, x, y: br.Sensitivity(m, q).mislabelled(iter([(x, y)])), ValueError, "more than once"),
    "no leverage": (
        lambda m, q, x, y: br.Sensitivity(m, q, correction="first_order").mislabelled([(x, y)], score="leverage"),
        ValueError,
        "the first order knows no leverage",
    ),
}


@pytest.mark.parametrize("case", MORE)
def test_what_would_be_wrong_is_refused(case):
    action, error, message = MORE[case]
    model, x, y = network()
    with pytest.raises(error, match=message):
        action(model, posterior_of(model), x, y)
