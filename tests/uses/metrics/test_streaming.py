"""A class says of batches what its function says of all data at once; several processes are asked in tests/processes."""

import pytest
import torch
from tests.processes.measuring import CASES, cut, data

import bayesrule as br
from bayesrule.uses.metrics import Streaming, streaming


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(60,), (1, 20, 39)], ids=str)
def test_batches_say_what_all_data_say(name, sizes):
    kind, options, function, batch = CASES[name]
    streamed = kind(**options)
    for part in cut(batch, sizes):
        streamed.update(*part)
    found = streamed.compute()
    assert found.shape == () and not found.requires_grad
    assert found.item() == pytest.approx(function(*batch).item(), rel=1e-12)
    assert streamed.compute() == found


def test_all_classes_are_there():
    classes = {one for one in vars(streaming).values() if isinstance(one, type) and issubclass(one, Streaming)}
    abstract = {streaming.Streaming, streaming.Sums, streaming.Mean, streaming.Scores}
    assert {kind for kind, *_ in CASES.values()} == classes - abstract
    assert all(getattr(br.metrics, one.__name__) is one for one in classes - abstract)


@pytest.mark.parametrize("name", CASES)
def test_what_is_forgotten_no_longer_counts(name):
    kind, options, function, batch = CASES[name]
    streamed = kind(**options)
    first, second = cut(batch, (25, 35))
    streamed.update(*first)
    streamed.reset()
    with pytest.raises(ValueError, match=f"{kind.__name__} has seen no data; call update before compute"):
        streamed.compute()
    streamed.update(*second)
    assert streamed.compute().item() == pytest.approx(function(*second).item(), rel=1e-12)


def test_sums_take_no_more_memory_for_more_batches():
    probs, labels = data()[:2]
    for kind in (br.metrics.CalibrationError, br.metrics.ClasswiseCalibrationError, br.metrics.BrierScore):
        streamed = kind()
        for _ in range(5):
            streamed.update(probs, labels)
        assert len(streamed._kept) == 1 and streamed._kept[0].shape[0] == 1


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_are_those_of_torchmetrics(norm):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    probs, labels = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)).softmax(-1), data()[1]  # without ties
    pairs = [
        (br.metrics.CalibrationError(bins=10, norm=norm), MulticlassCalibrationError(5, n_bins=10, norm=norm)),
        (br.metrics.Accuracy(top_k=2), MulticlassAccuracy(5, top_k=2, average="micro")),
    ]
    for ours, theirs in pairs:
        for part in cut((probs, labels), (7, 53)):
            ours.update(*part)
            theirs.update(*part)
        assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: br.metrics.CalibrationError(n_bins=10), TypeError, "CalibrationError takes bins, closed, norm; got 'n_bins'"),
        (lambda: br.metrics.BrierScore(bins=10), TypeError, "BrierScore takes no options; got 'bins'"),
        (lambda: br.metrics.BitsPerByte(token_bytes=7), TypeError, "for each token of the vocabulary, as a tensor; got 7"),
        (lambda: br.metrics.AURC().update(torch.ones(2), torch.tensor([0, 2])), ValueError, "must be booleans or 0 and 1; got 2"),
        (lambda: br.metrics.CalibrationError(bins=0).update(*data()[:2]), ValueError, "bins must be at least 1; got 0"),
        (lambda: br.metrics.FPR95().update(torch.ones(2, 2), torch.ones(2, 2)), ValueError, r"must have shape \(examples,\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
