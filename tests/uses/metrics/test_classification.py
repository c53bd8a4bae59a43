import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sklearn import metrics as sklearn

from bayesrule.uses.metrics import (
    accuracy,
    aurc,
    auroc,
    brier,
    calibration_error,
    classification_metrics,
    classwise_calibration_error,
    eaurc,
    entropy,
    nll,
    reliability,
    risk_coverage,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "metrics.json").read_text())
SAMPLES = torch.tensor(GOLDEN["sample_logits"], dtype=torch.float64).softmax(-1)
LABELS = torch.tensor(GOLDEN["labels"])


def problem(seed: int, examples: int = 200, classes: int = 5, dtype: torch.dtype = torch.float64):
    """Predictions that are right somewhat more often than not, without equal confidences."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (examples,), generator=generator)
    logits = 1.5 * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(examples), labels] += 1
    return logits.softmax(-1).to(dtype), labels


class TestGolden:
    """Figures computed once, apart from this library, for 40 inputs, 4 classes and 3 samples of the logits."""

    @pytest.fixture(params=["average_of_probabilities", "probabilities_of_average"])
    def case(self, request):
        if request.param == "average_of_probabilities":
            return SAMPLES.mean(0), GOLDEN[request.param]
        logits = torch.tensor(GOLDEN["sample_logits"], dtype=torch.float64).mean(0)
        return logits.softmax(-1), GOLDEN[request.param]

    @pytest.mark.parametrize(
        ("name", "metric"),
        [
            ("accuracy", accuracy),
            ("nll", nll),
            ("brier", brier),
            ("ece15", calibration_error),
            ("ece10", lambda p, y: calibration_error(p, y, bins=10)),
            ("adaptive_ece15", lambda p, y: calibration_error(p, y, adaptive=True)),
            ("adaptive_ece10", lambda p, y: calibration_error(p, y, bins=10, adaptive=True)),
            ("mce15", lambda p, y: calibration_error(p, y, norm="max")),
            ("aurc", lambda p, y: aurc(p.amax(1), p.argmax(1) == y)),
            ("eaurc", lambda p, y: eaurc(p.amax(1), p.argmax(1) == y)),
        ],
    )
    def test_figure(self, case, name, metric):
        probs, expected = case
        value = metric(probs, LABELS)
        assert value.shape == ()
        assert value.item() == pytest.approx(expected[name], abs=1e-9)

    def test_entropy(self, case):
        probs, expected = case
        torch.testing.assert_close(entropy(probs), torch.tensor(expected["entropy"], dtype=torch.float64), atol=1e-9, rtol=0)

    def test_mutual_information_from_entropies(self):
        information = entropy(SAMPLES.mean(0)) - entropy(SAMPLES).mean(0)
        expected = torch.tensor(GOLDEN["mutual_information"], dtype=torch.float64)
        torch.testing.assert_close(information, expected, atol=1e-9, rtol=0)

    def test_unknown_against_known(self):
        scores = entropy(SAMPLES.mean(0))
        assert auroc(scores, torch.arange(40) >= 20).item() == pytest.approx(GOLDEN["auroc_of_halves"], abs=1e-9)


class TestAgainstOthers:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("bins", [1, 10, 15])
    @pytest.mark.parametrize("norm", ["l1", "max"])
    @pytest.mark.parametrize("closed", ["left", "right"])  # the same away from the borders
    def test_calibration_error_is_torchmetrics(self, dtype, bins, norm, closed):
        from torchmetrics.functional.classification import multiclass_calibration_error  # brings all of transformers

        probs, labels = problem(0, dtype=dtype)
        theirs = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=bins, norm=norm)
        ours = calibration_error(probs, labels, bins=bins, norm=norm, closed=closed)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)  # they count in float32

    def test_nll_and_accuracy_are_scikit_learns(self):
        probs, labels = problem(1)
        assert nll(probs, labels).item() == pytest.approx(sklearn.log_loss(labels, probs, labels=range(5)), abs=1e-12)
        assert accuracy(probs, labels).item() == sklearn.accuracy_score(labels, probs.argmax(1))

    def test_brier_is_scikit_learns(self):
        probs, labels = problem(2, classes=2)
        theirs = sklearn.brier_score_loss(labels, probs[:, 1], scale_by_half=True)
        assert brier(probs, labels).item() == pytest.approx(2 * theirs, abs=1e-12)
        probs, labels = problem(2)
        theirs = sklearn.brier_score_loss(labels, probs, labels=range(5))
        assert brier(probs, labels).item() == pytest.approx(theirs, abs=1e-12)

    @pytest.mark.parametrize("closed", ["left", "right"])
    def test_classwise_calibration_error_is_torchmetrics_class_by_class(self, closed):
        from torchmetrics.functional.classification import binary_calibration_error

        probs, labels = problem(12)
        theirs = [binary_calibration_error(probs[:, k].contiguous(), (labels == k).long(), n_bins=15).item() for k in range(5)]
        assert classwise_calibration_error(probs, labels, closed=closed).item() == pytest.approx(sum(theirs) / 5, abs=1e-7)
        assert classwise_calibration_error(probs, labels).item() != pytest.approx(calibration_error(probs, labels).item(), abs=1e-3)

    @pytest.mark.parametrize("k", [1, 2, 4, 5])
    def test_top_k_accuracy_is_scikit_learns(self, k):
        probs, labels = problem(13)
        theirs = sklearn.top_k_accuracy_score(labels, probs.numpy(), k=k, labels=range(5)) if k < 5 else 1
        assert accuracy(probs, labels, top_k=k).item() == pytest.approx(theirs, abs=1e-12)

    @pytest.mark.parametrize("decimals", [16, 1, 0])  # the fewer, the more ties
    def test_auroc_is_scikit_learns(self, decimals):
        scores = torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64).round(decimals=decimals)
        positives = torch.rand(300, generator=torch.Generator().manual_seed(4)) < 0.3
        assert auroc(scores, positives).item() == pytest.approx(sklearn.roc_auc_score(positives, scores), abs=1e-12)

    def test_reliability_is_a_plain_loop(self):
        probs, labels = problem(5)
        confidence, predicted = probs.max(1)
        diagram = reliability(probs, labels, bins=10)
        for b in range(10):
            inside = (confidence > b / 10) & (confidence <= (b + 1) / 10)
            assert diagram.count[b] == inside.sum()
            if inside.any():
                assert diagram.confidence[b].item() == pytest.approx(confidence[inside].mean().item())
                assert diagram.accuracy[b].item() == pytest.approx((predicted == labels)[inside].double().mean().item())
            else:
                assert diagram.confidence[b].isnan() and diagram.accuracy[b].isnan()


class TestConventions:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_borders_belong_to_the_closed_side(self, dtype):
        probs = torch.tensor([[k / 10, 1 - k / 10] for k in (5, 6, 7, 8, 9, 10)], dtype=dtype)
        labels = torch.zeros(6, dtype=torch.long)
        right = reliability(probs, labels, bins=10, closed="right")
        left = reliability(probs, labels, bins=10, closed="left")
        assert right.count.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
        assert left.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]  # 1.0 stays in the last bin
        assert right.edges.tolist() == pytest.approx([k / 10 for k in range(11)])

    def test_adaptive_bins_hold_equally_many(self):
        probs, labels = problem(6, examples=43)
        diagram = reliability(probs, labels, bins=10, adaptive=True)
        assert diagram.count.tolist() == [5, 5, 5, 4, 4, 4, 4, 4, 4, 4]
        assert diagram.edges.shape == (11,)
        assert (diagram.edges.diff() >= 0).all()

    def test_more_bins_than_examples(self):
        probs, labels = problem(7, examples=3)
        assert reliability(probs, labels, adaptive=True).count.tolist() == [1, 1, 1] + 12 * [0]
        expected = (probs.amax(1) - (probs.argmax(1) == labels).double()).abs().mean()
        assert calibration_error(probs, labels, adaptive=True).item() == pytest.approx(expected.item())

    def test_nll_of_a_zero_probability_is_finite(self):
        probs = torch.tensor([[1.0, 0.0]])
        assert nll(probs, torch.tensor([1])).item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))

    def test_auroc_of_one_kind_is_nan(self):
        assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([True, True])).isnan()
        assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([0, 0])).isnan()

    def test_infinite_scores_are_ranked(self):
        assert auroc(torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([0, 0, 1])).item() == 1

    def test_risk_of_equal_confidence_is_the_error_rate(self):
        curve = risk_coverage(torch.full((4,), 0.5), torch.tensor([1, 0, 1, 1]))
        assert curve.risk.tolist() == [0.25, 0.25, 0.25, 0.25]
        assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]

    @pytest.mark.parametrize(
        ("row", "label", "place"),
        [([0.25] * 4, 0, 1), ([0.25] * 4, 3, 4), ([0.4, 0.3, 0.3, 0.0], 1, 2), ([0.4, 0.3, 0.3, 0.0], 2, 3)],
    )
    def test_the_first_class_wins_a_tie_whatever_k(self, row, label, place):
        found = [accuracy(torch.tensor([row]), torch.tensor([label]), top_k=k).item() for k in range(1, 5)]
        assert found == [float(k >= place) for k in range(1, 5)]

    def test_what_is_asked_for_is_measured_and_nothing_else(self):
        probs, labels = problem(14, classes=6)
        found = classification_metrics(probs, labels, ("mce", "top5_accuracy", "eaurc", "coverage_at_5_risk", "adaptive_ece"))
        correct, confidence = probs.argmax(1) == labels, probs.amax(1)
        assert list(found) == ["mce", "top5_accuracy", "eaurc", "coverage_at_5_risk", "adaptive_ece"]
        assert found["mce"] == calibration_error(probs, labels, norm="max").item()
        assert found["top5_accuracy"] == accuracy(probs, labels, top_k=5).item() < 1
        assert found["eaurc"] == eaurc(confidence, correct).item()
        assert found["adaptive_ece"] == calibration_error(probs, labels, adaptive=True).item()

    def test_dictionary(self):
        probs, labels = problem(8)
        found = classification_metrics(probs, labels)
        correct = probs.argmax(1) == labels
        assert list(found) == ["accuracy", "nll", "ece", "brier", "auroc", "aurc"]
        assert all(type(value) is float for value in found.values())
        assert found["ece"] == calibration_error(probs, labels, bins=15, closed="right").item()
        assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(correct, probs.amax(1)), abs=1e-12)
        assert math.isnan(classification_metrics(probs, probs.argmax(1))["auroc"])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_probabilities_are_accepted(self, dtype):
        probs, labels = problem(9)
        half, full = classification_metrics(probs.to(dtype), labels), classification_metrics(probs, labels)
        assert half["nll"] == pytest.approx(full["nll"], rel=1e-2)

    def test_no_gradient_is_recorded(self):
        probs, labels = problem(10)
        assert not nll(probs.requires_grad_(), labels).requires_grad

    def test_inputs_stay_as_they_are(self):
        probs, labels = problem(11)
        before = probs.clone(), labels.clone()
        classification_metrics(probs, labels)
        assert torch.equal(probs, before[0]) and torch.equal(labels, before[1])


@st.composite
def predictions(draw):
    """Probabilities on a coarse grid, so that ties and borders are common."""
    classes = draw(st.integers(2, 4))
    row = st.lists(st.integers(0, 5), min_size=classes, max_size=classes).filter(any)
    weights = torch.tensor(draw(st.lists(row, min_size=1, max_size=12)), dtype=torch.float64)
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(weights), max_size=len(weights)))
    order = draw(st.permutations(range(len(weights))))
    return weights / weights.sum(1, keepdim=True), torch.tensor(labels), torch.tensor(order)


class TestProperties:
    @settings(deadline=None)
    @given(predictions())
    def test_ranges_and_shuffling(self, case):
        probs, labels, order = case
        found = classification_metrics(probs, labels)
        assert 0 <= found["brier"] <= 2
        assert found["nll"] >= 0
        assert all(-1e-12 <= found[name] <= 1 + 1e-12 for name in ("accuracy", "ece", "aurc"))
        assert classification_metrics(probs[order], labels[order]) == pytest.approx(found, abs=1e-12, nan_ok=True)
        adaptive = calibration_error(probs, labels, bins=3, adaptive=True).item()
        assert calibration_error(probs[order], labels[order], bins=3, adaptive=True).item() == pytest.approx(adaptive)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
    def test_auroc_of_negated_scores(self, pairs):
        scores = torch.tensor([score for score, _ in pairs], dtype=torch.float64)
        positives = torch.tensor([positive for _, positive in pairs])
        area = auroc(scores, positives).item()
        assert auroc(-scores, positives).item() == pytest.approx(1 - area, nan_ok=True)
        assert auroc(scores.exp(), positives).item() == pytest.approx(area, nan_ok=True)
        if not math.isnan(area):
            won = scores[positives][:, None] - scores[~positives]
            assert area == pytest.approx(((won > 0).double() + 0.5 * (won == 0)).mean().item())

    @settings(deadline=None)
    @given(predictions())
    def test_risk_at_full_coverage_is_the_error(self, case):
        probs, labels, _ = case
        curve = risk_coverage(probs.amax(1), probs.argmax(1) == labels)
        assert curve.coverage[-1] == 1
        assert curve.risk[-1].item() == pytest.approx(1 - accuracy(probs, labels).item())


class TestBadInput:
    PROBS = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    LABELS = torch.tensor([0, 1])

    @pytest.mark.parametrize(
        "metric", [accuracy, nll, brier, reliability, calibration_error, classwise_calibration_error, classification_metrics]
    )
    @pytest.mark.parametrize(
        ("probs", "labels", "message"),
        [
            (PROBS[0], LABELS, r"probs must have shape \(examples, classes\); got \(2,\)"),
            (PROBS[:0], LABELS[:0], r"probs must hold at least one distribution; got shape \(0, 2\)"),
            (PROBS.round().long(), LABELS, "probs must be floating point; got torch.int64"),
            (torch.tensor([[3.0, -2.0], [0.5, 0.5]]), LABELS, "probs must not be negative; got -2"),
            (2 * PROBS, LABELS, "probs must sum to 1 in every row; got a row that sums to 2"),
            (PROBS * torch.tensor([[1.0], [math.nan]]), LABELS, "probs must sum to 1 .* sums to nan"),
            (PROBS, LABELS[:1], r"labels must have shape \(2,\), one per example; got \(1,\)"),
            (PROBS, LABELS.float(), "labels must be integers, one class index per example; got torch.float32"),
            (PROBS, LABELS.bool(), "labels must be integers, one class index per example; got torch.bool"),
            (PROBS, LABELS + 1, r"labels must lie in \[0, 2\); got 2"),
            (PROBS, LABELS - 1, r"labels must lie in \[0, 2\); got -1"),
        ],
    )
    def test_predictions(self, metric, probs, labels, message):
        with pytest.raises(ValueError, match=message):
            metric(probs, labels)

    @pytest.mark.parametrize("metric", [auroc, risk_coverage, aurc])
    @pytest.mark.parametrize(
        ("scores", "kinds", "message"),
        [
            (PROBS, PROBS, r"must have shape \(examples,\) with at least one example; got \(2, 2\)"),
            (PROBS[0, :0], LABELS[:0], r"must have shape \(examples,\) with at least one example; got \(0,\)"),
            (PROBS[0], LABELS[:1], r"must have the shape of \w+, \(2,\); got \(1,\)"),
            (torch.tensor([0.1, math.nan]), LABELS, "must not be NaN; got 1 NaN of 2"),
            (PROBS[0], LABELS + 1, "must be booleans or 0 and 1; got 2"),
        ],
    )
    def test_scores(self, metric, scores, kinds, message):
        with pytest.raises(ValueError, match=message):
            metric(scores, kinds)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"bins": 0}, "bins must be at least 1; got 0"),
            ({"closed": "both"}, "closed must be 'right' or 'left'; got 'both'"),
            ({"norm": "l2"}, "norm must be 'l1' or 'max'; got 'l2'"),
        ],
    )
    def test_choices(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            calibration_error(self.PROBS, self.LABELS, **arguments)

    def test_top_k_is_from_one_to_the_number_of_classes(self):
        for k in (0, 3):
            with pytest.raises(ValueError, match=f"top_k must lie between 1 and the number of classes, 2; got {k}"):
                accuracy(self.PROBS, self.LABELS, top_k=k)

    def test_an_unknown_name_is_refused_with_the_known(self):
        with pytest.raises(ValueError, match="unknown metric 'f1'; take of accuracy, top5_accuracy, nll, "):
            classification_metrics(self.PROBS, self.LABELS, ["f1"])

    def test_entropy(self):
        with pytest.raises(ValueError, match="sums to 2"):
            entropy(torch.ones(3, 2))
        with pytest.raises(ValueError, match="at least one distribution"):
            entropy(torch.tensor(1.0))
