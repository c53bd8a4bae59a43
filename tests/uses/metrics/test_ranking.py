import json
import math
from pathlib import Path

import pytest
import torch
from sklearn import metrics as sklearn

from bayesrule.uses.metrics import (
    aupr,
    aurc,
    coverage_at_risk,
    eaurc,
    energy,
    entropy,
    fpr_at_tpr,
    max_probability,
    ood_metrics,
    risk_coverage,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "metrics.json").read_text())


def problem(seed: int, decimals: int, examples: int = 300):
    """Scores, the fewer decimals the more of them equal, that are larger for positives more often than not."""
    generator = torch.Generator().manual_seed(seed)
    positives = torch.rand(examples, generator=generator) < 0.3
    scores = torch.randn(examples, generator=generator, dtype=torch.float64) + positives
    return scores.round(decimals=decimals), positives


@pytest.mark.parametrize("decimals", [16, 1, 0])
@pytest.mark.parametrize("seed", range(3))
class TestScikitLearn:
    def test_area_under_precision_and_recall(self, seed, decimals):
        scores, positives = problem(seed, decimals)
        assert aupr(scores, positives).item() == pytest.approx(sklearn.average_precision_score(positives, scores), abs=1e-12)

    @pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
    def test_false_positives_where_enough_are_found(self, seed, decimals, tpr):
        scores, positives = problem(seed, decimals)
        false, true, _ = sklearn.roc_curve(positives, scores, drop_intermediate=False)
        assert fpr_at_tpr(scores, positives, tpr).item() == pytest.approx(false[true >= tpr].min(), abs=1e-12)

    def test_known_against_unknown(self, seed, decimals):
        scores, unknown = problem(seed, decimals)
        found = ood_metrics(scores[~unknown], scores[unknown])
        assert found["auroc_ood"] == pytest.approx(sklearn.roc_auc_score(unknown, scores), abs=1e-12)
        assert found["aupr_out"] == pytest.approx(sklearn.average_precision_score(unknown, scores), abs=1e-12)
        assert found["aupr_in"] == pytest.approx(sklearn.average_precision_score(~unknown, -scores), abs=1e-12)
        assert found["fpr95"] == fpr_at_tpr(scores, unknown).item()


def test_golden_halves():
    known, unknown = entropy(torch.tensor(GOLDEN["sample_logits"], dtype=torch.float64).softmax(-1).mean(0)).split(20)
    assert ood_metrics(known, unknown)["auroc_ood"] == pytest.approx(GOLDEN["auroc_of_halves"], abs=1e-9)


def test_of_one_kind_there_is_nothing_to_tell():
    scores = torch.tensor([0.1, 0.2])
    assert aupr(scores, torch.zeros(2)).isnan() and fpr_at_tpr(scores, torch.zeros(2)).isnan()
    assert fpr_at_tpr(scores, torch.ones(2)).isnan() and aupr(scores, torch.ones(2)).item() == 1


@pytest.mark.parametrize("decimals", [16, 1, 0])
@pytest.mark.parametrize("risk", [0.0, 0.05, 0.3, 1.0])
def test_coverage_at_a_risk_is_the_last_point_of_the_curve_under_it(decimals, risk):
    confidence, correct = problem(0, decimals)
    curve = risk_coverage(confidence, correct)
    able = [c for c, r in zip(curve.coverage.tolist(), curve.risk.tolist(), strict=True) if r <= risk + 1e-12]
    assert coverage_at_risk(confidence, correct, risk).item() == max(able, default=0)


def test_coverage_may_rise_again_after_the_risk_was_too_large():
    correct = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    confidence = torch.linspace(1, 0.1, 10)
    assert coverage_at_risk(confidence, correct, 0.1).item() == 1
    assert coverage_at_risk(confidence, correct, 0.05).item() == pytest.approx(0.1)
    assert coverage_at_risk(confidence, 1 - correct, 0.05).item() == 0


def test_excess_over_the_oracle_by_hand():
    correct = torch.tensor([True, False, True, False])
    perfect = 1 / 4 * (1 / 3 + 2 / 4)
    assert eaurc(correct.double(), correct).item() == 0
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert aurc(confidence, correct).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert eaurc(confidence, correct).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4 - perfect)


def test_scores_of_the_unknown():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(max_probability(logits.softmax(-1)), 1 - logits.softmax(-1).amax(-1))
    torch.testing.assert_close(energy(logits), -logits.exp().sum(-1).log())
    torch.testing.assert_close(energy(logits, 2.0), -2 * (logits / 2).exp().sum(-1).log())


SCORES, KINDS = torch.tensor([0.1, 0.4]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aupr(SCORES, KINDS[:1]), r"positives must have the shape of scores, \(2,\); got \(1,\)"),
        (lambda: fpr_at_tpr(SCORES * math.nan, KINDS), "scores must not be NaN; got 2 NaN of 2"),
        (lambda: fpr_at_tpr(SCORES, KINDS, tpr=95), r"tpr must lie in \[0, 1\]; got 95"),
        (lambda: coverage_at_risk(SCORES, KINDS, risk=-0.1), r"risk must lie in \[0, 1\]; got -0.1"),
        (lambda: eaurc(SCORES, KINDS + 1), "correct must be booleans or 0 and 1; got 2"),
        (lambda: ood_metrics(SCORES[:0], SCORES), r"known must have shape \(examples,\) with at least one example"),
        (lambda: ood_metrics(SCORES, SCORES * math.nan), "unknown must not be NaN"),
        (lambda: energy(SCORES, 0.0), "temperature must be a number > 0; got 0.0"),
        (lambda: energy(SCORES * math.nan), "logits must not be NaN; got 2 NaN of 2"),
        (lambda: max_probability(SCORES), "probs must sum to 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
