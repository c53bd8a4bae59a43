"""What models are merged around."""

import math

import pytest
import torch

import bayesrule as br
from bayesrule.uses.merging.anchors import anchor_of, has_precision, is_exact, wide
from bayesrule.uses.merging.methods import METHODS

INF = math.inf


def post(mean=(1.0, 2.0), precision=(3.0, 4.0), prior=None, prior_mean=None, **known):
    blocks = [{"w": torch.tensor(block)} for block in (mean, precision)]
    about = {"prior_precision": prior, "prior_mean": prior_mean}
    return br.Posterior(*blocks, **{key: {"w": torch.tensor(value)} for key, value in about.items() if value is not None}, **known)


def found(base, models, method="gradient_matching", prior_precision=None):
    return anchor_of(base, models, METHODS[method], prior_precision)


@pytest.mark.parametrize(
    ("base", "models", "given", "mean", "precision"),
    [
        (post(), [post(prior=2.0)], None, [1.0, 2.0], [3.0, 4.0]),  # a base that knows is taken as it is
        (post(), [post()], 7.0, [1.0, 2.0], [3.0, 4.0]),
        (post(precision=(INF, INF)), [post(prior=2.0), post(prior=4.0)], None, [1.0, 2.0], [3.0, 3.0]),  # else the mean of priors
        (post(precision=(INF, INF)), [post(prior=2.0)], 7.0, [1.0, 2.0], [7.0, 7.0]),  # or what is given
        (post(precision=(INF, 5.0)), [post(prior=2.0)], None, [1.0, 2.0], [2.0, 5.0]),  # by weight
        (None, [post(prior=(2.0, 6.0)), post(prior=4.0)], None, [0.0, 0.0], [3.0, 5.0]),
        (None, [post(prior=2.0, prior_mean=0.5)], None, [0.5, 0.5], [2.0, 2.0]),
        (None, [post(prior=2.0, prior_mean=0.5)], 7.0, [0.0, 0.0], [7.0, 7.0]),  # a prior that is given is around 0
    ],
)
def test_mean_and_precision(base, models, given, mean, precision):
    anchor = found(base, models, prior_precision=given).posterior
    assert anchor.mean["w"].tolist() == mean and anchor.precision["w"].tolist() == precision


@pytest.mark.parametrize("method", ["fisher", "linear", "task_arithmetic", "ties"])
def test_some_methods_can_do_without_a_precision(method):
    anchor = found(post(precision=(INF, INF)), [post()], method)
    assert is_exact(anchor.posterior) and anchor.posterior.prior_precision is None


@pytest.mark.parametrize(
    ("base", "seen"),
    [
        (post(ess=5.0, num_data=5), (5.0, 5)),
        (post(ess=5.0), (5.0, None)),
        (post(precision=(INF, INF), ess=5.0, num_data=5), (0.0, 0)),
        (None, (0.0, 0)),
    ],
)
def test_what_it_has_seen(base, seen):
    anchor = found(base, [post(prior=2.0)])
    assert (anchor.ess, anchor.num_data) == seen


def test_a_prior_is_its_own_prior_and_a_base_has_its_own():
    assert found(None, [post(prior=2.0)]).posterior.prior_precision["w"].tolist() == [2.0, 2.0]
    assert found(post(prior=0.5), [post(prior=2.0)]).posterior.prior_precision["w"].item() == 0.5


@pytest.mark.parametrize(
    ("base", "models", "method", "message"),
    [
        (None, [post()], "dare_linear", "dare_linear adds task vectors to a base; pass one, or choose method='linear'"),
        (None, [post()], "gradient_matching", "gradient_matching needs the precision of the base, which has none"),
        (None, [post(prior=2.0), post()], "gradient_matching", "pass prior_precision, or a base with one, or choose method="),
        (None, [post(prior=2.0, prior_mean=m) for m in (0.0, 1.0)], "fisher", "priors with different means of 'w'; pass a base"),
    ],
)
def test_refusals(base, models, method, message):
    with pytest.raises(ValueError, match=message):
        found(base, models, method)


def test_small_questions():
    assert has_precision(torch.tensor([1.0, 0.0])) and not has_precision(torch.tensor([1.0, INF]))
    assert is_exact(post(precision=(INF, INF))) and not is_exact(post(precision=(INF, 1.0)))
    assert [wide(torch.ones(1, dtype=d)).dtype for d in (torch.float16, torch.float64)] == [torch.float32, torch.float64]
