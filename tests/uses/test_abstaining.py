import math
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import bayesrule as br
from bayesrule.uses.abstaining import ConformalSets, conformal_quantile, conformity_scores, selective_threshold, set_metrics


@cache
def digits():
    """Probabilities and labels of the 1,297 digits that a logistic regression has not learned from."""
    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=300, C=0.01).fit(x[:500] / 16, y[:500])
    return torch.from_numpy(model.predict_proba(x[500:] / 16)), torch.from_numpy(y[500:]).long()


def halves(seed: int, count: int = 300):
    probs, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fit, rest = order[:count], order[count:]
    return (probs[fit], labels[fit]), (probs[rest], labels[rest])


SEEDS = 60
HOW = [("lac", None), ("aps", None), ("aps", 0)]


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize(("score", "seed"), HOW)
def test_sets_of_digits_hold_the_truth_as_often_as_promised(score, seed, level):
    found = []
    for split in range(SEEDS):
        known, new = halves(split)
        sets = ConformalSets(level, score, seed)
        found.append(set_metrics(sets.fit(*known)(new[0]), new[1]))
    covered = torch.tensor([one["coverage"] for one in found], dtype=torch.float64)
    error = covered.std().item() / math.sqrt(SEEDS)
    assert covered.mean() >= level - 3 * error
    assert covered.mean() <= level + 1 / 301 + 3 * error
    assert 0.005 < covered.std() < 0.05  # each split by itself may miss the promise


def test_adaptive_sets_grow_where_the_model_is_unsure():
    known, new = halves(0)
    sizes = ConformalSets(0.9, "aps").fit(*known)(new[0]).double().sum(1)
    unsure = new[0].amax(1) < new[0].amax(1).median()
    assert sizes[unsure].mean() > sizes[~unsure].mean() + 0.5


@pytest.mark.parametrize("uniform", [None, torch.tensor([0.25, 0.25])])
def test_adaptive_scores_by_hand(uniform):
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], dtype=torch.float64)
    u = 1 if uniform is None else 0.25
    by_hand = torch.tensor([[0.8 + u * 0.2, u * 0.5, 0.5 + u * 0.3], [u * 0.4, 0.8 + u * 0.2, 0.4 + u * 0.4]], dtype=torch.float64)
    torch.testing.assert_close(conformity_scores(probs, "aps", uniform), by_hand)
    torch.testing.assert_close(conformity_scores(probs, "lac"), 1 - probs)


@pytest.mark.parametrize(
    ("count", "level", "number"),
    [(9, 0.9, 9), (9, 0.7, 7), (10, 0.9, 10), (99, 0.9, 90), (8, 0.9, None), (5, 0.0, 1), (5, 1.0, None), (19, 0.95, 19)],
)
def test_the_quantile_counts_the_new_one_in(count, level, number):
    scores = torch.arange(1.0, count + 1).flip(0)
    assert conformal_quantile(scores, level) == (math.inf if number is None else number)


def test_few_examples_promise_only_the_set_of_all():
    known, new = halves(0, count=8)
    assert ConformalSets(0.9).fit(*known)(new[0]).all()


@pytest.mark.parametrize("risk", [0.0, 0.01, 0.03, 1.0])
def test_the_threshold_is_the_lowest_that_bears_the_risk(risk):
    probs, labels = digits()
    confidence, correct = probs.amax(1).round(decimals=2), probs.argmax(1) == labels
    threshold = selective_threshold(confidence, correct, risk)
    risks = {t: 1 - correct[confidence >= t].double().mean().item() for t in confidence.unique().tolist()}
    able = [t for t, found in risks.items() if found <= risk]
    assert threshold == min(able, default=math.inf)
    assert (risk == 1) == (threshold == confidence.min())


def test_a_threshold_of_validation_digits_holds_on_others():
    for seed in range(5):
        (p, y), (new_p, new_y) = halves(seed)
        threshold = selective_threshold(p.amax(1), p.argmax(1) == y, 0.02)
        taken = new_p.amax(1) >= threshold
        wrong = (new_p.argmax(1) != new_y)[taken].double().mean().item()
        everything = (new_p.argmax(1) != new_y).double().mean().item()
        assert 0.3 < taken.double().mean() < 1 and wrong < 0.02 + 3 * math.sqrt(0.02 / (300 * 0.5)) < everything + 0.02
        assert wrong < everything / 2


def test_where_no_threshold_will_do_nothing_is_answered():
    assert selective_threshold(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.4) == math.inf
    assert selective_threshold(torch.tensor([0.9, 0.9]), torch.tensor([0, 1]), 0.5) == pytest.approx(0.9)


PROBS, LABELS = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: br.ConformalSets(1.0), "level must lie between 0 and 1; got 1.0"),
        (lambda: br.ConformalSets(score="raps"), "unknown score 'raps'; take 'lac' or 'aps'"),
        (lambda: conformity_scores(PROBS, "raps"), "unknown score 'raps'"),
        (lambda: conformity_scores(PROBS[0]), r"probs must have shape \(examples, classes\)"),
        (lambda: br.ConformalSets()(PROBS), "no threshold yet; fit"),
        (lambda: br.ConformalSets().fit(PROBS, LABELS + 1), r"labels must lie in \[0, 2\); got 2"),
        (lambda: br.ConformalSets().fit(2 * PROBS, LABELS), "sum to 1"),
        (lambda: conformal_quantile(torch.tensor([]), 0.9), "at least one"),
        (lambda: conformal_quantile(torch.tensor([math.nan]), 0.9), "scores must be numbers"),
        (lambda: conformal_quantile(LABELS.float(), 90), r"level must lie in \[0, 1\]; got 90"),
        (lambda: set_metrics(PROBS, LABELS), "sets must be booleans"),
        (lambda: set_metrics(PROBS > 0.5, LABELS + 1), r"labels must lie in \[0, 2\)"),
        (lambda: br.selective_threshold(PROBS[0], LABELS, 5), r"risk must lie in \[0, 1\]; got 5"),
        (lambda: br.selective_threshold(PROBS[0], LABELS + 1, 0.1), "correct must be booleans or 0 and 1; got 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
