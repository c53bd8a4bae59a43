"""Streaming metrics: of what batches each is, and what each rank says of its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bayesrule.uses import metrics as m

SIZES = {2: (13, 47), 3: (13, 0, 47)}
"""Examples of each rank."""


def data() -> tuple[Tensor, ...]:
    """Probabilities with ties, labels, means, variances, targets of 60 examples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (60,), generator=generator)
    logits = (2 * torch.randn(60, 5, generator=generator, dtype=torch.float64)).round(decimals=1)
    logits[torch.arange(60), labels] += 1
    mean, targets = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).float(), labels, mean, 0.2 + mean.abs(), targets


def cut(batch: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(list(sizes)) for x in batch), strict=True))


def cases() -> dict[str, tuple[Any, dict[str, Any], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """By name: a class, its options, the function that it is of, and data."""
    probs, labels, mean, variance, targets = data()
    classes, confident = (probs, labels), (probs.amax(1), probs.argmax(1) == labels)
    gaussians, logs = (mean, variance, targets), (probs.log(), labels)
    sizes = torch.arange(1, 6)
    rows: list[tuple[Any, dict[str, Any], Any, tuple[Tensor, ...]]] = [
        (m.Accuracy, {}, m.accuracy, classes),
        (m.Accuracy, {"top_k": 3}, m.accuracy, classes),
        (m.CategoricalNLL, {}, m.nll, classes),
        (m.BrierScore, {}, m.brier, classes),
        (m.CalibrationError, {}, m.calibration_error, classes),
        (m.CalibrationError, {"bins": 10, "closed": "left", "norm": "max"}, m.calibration_error, classes),
        (m.ClasswiseCalibrationError, {"bins": 10}, m.classwise_calibration_error, classes),
        (m.AdaptiveCalibrationError, {"bins": 7}, partial(m.calibration_error, adaptive=True), classes),
        (m.AUROC, {}, m.auroc, confident),
        (m.AUPR, {}, m.aupr, confident),
        (m.FPR95, {}, m.fpr_at_tpr, confident),
        (m.FPR95, {"tpr": 0.8}, m.fpr_at_tpr, confident),
        (m.AURC, {}, m.aurc, confident),
        (m.EAURC, {}, m.eaurc, confident),
        (m.CoverageAtRisk, {"risk": 0.2}, m.coverage_at_risk, confident),
        (m.RootMeanSquaredError, {}, m.rmse, (mean, targets)),
        (m.GaussianNLL, {}, m.gaussian_nll, gaussians),
        (m.CRPS, {}, m.crps, gaussians),
        (m.Coverage, {"level": 0.6}, m.coverage, gaussians),
        (m.IntervalWidth, {}, m.interval_width, (variance,)),
        (m.TokenNLL, {}, m.token_nll, logs),
        (m.Perplexity, {"ignored": 2}, m.perplexity, logs),
        (m.BitsPerByte, {"token_bytes": sizes}, m.bits_per_byte, logs),
    ]
    return {f"{row[0].__name__} {row[1]}": (row[0], row[1], partial(row[2], **row[1]), row[3]) for row in rows}


CASES = cases()


def measured() -> dict[str, Tensor]:
    """What one of several ranks says of all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, (kind, options, _, batch) in CASES.items():
        streamed = kind(**options)
        if SIZES[size][rank]:
            streamed.update(*cut(batch, SIZES[size])[rank])
        found[name] = streamed.compute()
    alone = m.BrierScore()
    if rank == 0:  # the others do not wait for it
        alone.update(*data()[:2])
        found["alone"] = alone.compute(sync=False)
    dist.barrier()
    return found


def unalike() -> None:
    """Classes of another number on each rank."""
    probs, labels = data()[:2]
    streamed = m.ClasswiseCalibrationError()
    streamed.update(*((probs, labels) if dist.get_rank() else (torch.eye(3), torch.arange(3))))
    streamed.compute()


def unseen() -> None:
    """No data anywhere."""
    m.BrierScore().compute()
