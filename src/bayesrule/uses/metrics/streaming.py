"""The metrics of data that come in batches, in one or several processes: a class is a function and what it keeps.

Where a figure is a function of sums, such as means and histograms, the sums are kept; where it needs the order of all examples,
the few numbers of each example that it needs, in float64 on the CPU. Several processes bring together what each kept, in the
order of their ranks, so a figure is the same on all, and that of all data in one process: to the last bit where numbers are kept,
up to rounding where sums are.

    >>> error = CalibrationError(bins=10)
    >>> for probs, labels in [(torch.tensor([[0.9, 0.1]]), torch.tensor([0])), (torch.tensor([[0.7, 0.3]]), torch.tensor([1]))]:
    ...     error.update(probs, labels)
    >>> round(error.compute().item(), 4)
    0.4
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .binning import bin_totals, classwise_totals, equal_mass, gap
from .checks import check_numbers, check_predictions, check_scores
from .classification import accuracy, brier, nll
from .language import IGNORED, token_totals
from .ranking import aupr, aurc, auroc, coverage_at_risk, eaurc, fpr_at_tpr
from .regression import coverage, crps, gaussian_nll, interval_width


class Streaming(ABC):
    """A figure of data that come in batches.

    Args:
        options: Of the function that it is a class of, by name.

    Raises:
        TypeError: The function has no option of that name.
    """

    options: ClassVar[dict[str, Any]] = {}
    """Their names and defaults."""

    def __init__(self, **options: Any) -> None:
        if odd := options.keys() - self.options.keys():
            known = ", ".join(self.options) or "no options"
            raise TypeError(f"{type(self).__name__} takes {known}; got {min(odd)!r}")
        self._options = {**self.options, **options}
        self._kept: list[Tensor] = []

    def update(self, *batch: Tensor) -> None:
        """Take in a batch: the tensors that the function takes."""
        self._kept.append(self._keep(*batch).detach().to("cpu", torch.float64))

    def compute(self, *, sync: bool = True, group: Any = None) -> Tensor:
        """The figure of all batches since the last :meth:`reset`, shape ().

        Args:
            sync: Whether to bring together what all processes of ``torch.distributed`` took in, where there are several: then all
                of them have to call this. What several have seen, as a DistributedSampler's padding, counts as often.
            group: Of processes; None is all of them.

        Raises:
            ValueError: Nothing was taken in anywhere.
        """
        kept = gathered(torch.cat(self._kept) if self._kept else torch.zeros(0, 0, dtype=torch.float64), sync, group)
        if not len(kept):
            raise ValueError(f"{type(self).__name__} has seen no data; call update before compute")
        return self._figure(kept)

    def reset(self) -> None:
        """Forget all batches."""
        self._kept = []

    @abstractmethod
    def _keep(self, *batch: Tensor) -> Tensor:
        """What is kept of a batch, shape (rows, columns)."""

    @abstractmethod
    def _figure(self, kept: Tensor) -> Tensor:
        """The figure of all rows."""


def gathered(rows: Tensor, sync: bool = True, group: Any = None) -> Tensor:
    """The rows of all processes, in the order of their ranks; each may have any number, shape (rows, columns).

    Raises:
        ValueError: Those of two processes differ in their columns.
    """
    if not (sync and dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    shapes = [torch.zeros(2, dtype=torch.long, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, torch.tensor(rows.shape, device=device), group)
    sizes = [(int(shape[0]), int(shape[1])) for shape in shapes]
    columns = sorted({width for count, width in sizes if count})
    if len(columns) > 1:
        raise ValueError(f"processes measured different things: their sums have {' and '.join(map(str, columns))} numbers")
    padded = torch.zeros(max(count for count, _ in sizes), *columns, dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device) if len(rows) else 0
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, (count, _) in zip(parts, sizes, strict=True)]).to(rows.device)


class Sums(Streaming):
    """Keeps sums: one row, however many batches there are."""

    def update(self, *batch: Tensor) -> None:
        super().update(*batch)
        self._kept = [torch.cat(self._kept).sum(0, keepdim=True)]

    def _keep(self, *batch: Tensor) -> Tensor:
        return self._sums(*batch).flatten()[None]

    def _figure(self, kept: Tensor) -> Tensor:
        return self._of_sums(kept.sum(0))

    @abstractmethod
    def _sums(self, *batch: Tensor) -> Tensor:
        """Of a batch; those of two batches add up."""

    @abstractmethod
    def _of_sums(self, sums: Tensor) -> Tensor:
        """The figure."""


class Mean(Sums):
    """Keeps the sum and the number of what ``function`` is a mean of: the elements of the last tensor of a batch."""

    function: ClassVar[Callable[..., Tensor]]

    def _sums(self, *batch: Tensor) -> Tensor:
        mean, count = type(self).function(*batch, **self._options), batch[-1].numel()
        return torch.stack([mean * count, mean.new_tensor(count)])

    def _of_sums(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


class Scores(Streaming):
    """Keeps a score and a kind of each example, and gives them to ``function``."""

    function: ClassVar[Callable[..., Tensor]]

    def _keep(self, *batch: Tensor) -> Tensor:
        scores, kinds = batch
        check_scores("scores", scores, "kinds", kinds)
        return torch.stack([x.detach().cpu().double() for x in (scores, kinds)], 1)

    def _figure(self, kept: Tensor) -> Tensor:
        return type(self).function(kept[:, 0], kept[:, 1], **self._options)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function that have a default, by name."""
    found = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in found if one.default is not inspect.Parameter.empty}


class Accuracy(Mean):
    """:func:`accuracy` of batches (probs, labels)."""

    function, options = staticmethod(accuracy), defaults(accuracy)


class CategoricalNLL(Mean):
    """:func:`nll` of batches (probs, labels)."""

    function = staticmethod(nll)


class BrierScore(Mean):
    """:func:`brier` of batches (probs, labels)."""

    function = staticmethod(brier)


class CalibrationError(Sums):
    """:func:`calibration_error` in bins of equal width of batches (probs, labels): keeps three sums for each bin."""

    options: ClassVar = {"bins": 15, "closed": "right", "norm": "l1"}

    def _sums(self, *batch: Tensor) -> Tensor:
        probs, labels = batch
        return bin_totals(probs, labels, self._options["bins"], self._options["closed"])

    def _of_sums(self, sums: Tensor) -> Tensor:
        return gap(sums.view(3, -1), self._options["norm"])


class ClasswiseCalibrationError(Sums):
    """:func:`classwise_calibration_error` of batches (probs, labels): keeps three sums for each bin and class."""

    options: ClassVar = {"bins": 15, "closed": "right"}

    def _sums(self, *batch: Tensor) -> Tensor:
        probs, labels = batch
        return classwise_totals(probs, labels, **self._options)

    def _of_sums(self, sums: Tensor) -> Tensor:
        return gap(sums.view(-1, 3, self._options["bins"])).mean()


class AdaptiveCalibrationError(Streaming):
    """:func:`calibration_error` in bins of equal mass of batches (probs, labels): keeps two numbers for each example."""

    options: ClassVar = {"bins": 15, "norm": "l1"}

    def _keep(self, *batch: Tensor) -> Tensor:
        probs, labels = batch
        confidence, predicted = check_predictions(probs, labels).max(1)
        return torch.stack([x.cpu().double() for x in (confidence, predicted == labels)], 1)

    def _figure(self, kept: Tensor) -> Tensor:
        return gap(equal_mass(kept[:, 0], kept[:, 1], self._options["bins"])[0], self._options["norm"])


class AUROC(Scores):
    """:func:`auroc` of batches (scores, positives): keeps two numbers for each example."""

    function = staticmethod(auroc)


class AUPR(Scores):
    """:func:`aupr` of batches (scores, positives): keeps two numbers for each example."""

    function = staticmethod(aupr)


class FPR95(Scores):
    """:func:`fpr_at_tpr` of batches (scores, positives): keeps two numbers for each example."""

    function, options = staticmethod(fpr_at_tpr), defaults(fpr_at_tpr)


class AURC(Scores):
    """:func:`aurc` of batches (confidence, correct): keeps two numbers for each example."""

    function = staticmethod(aurc)


class EAURC(Scores):
    """:func:`eaurc` of batches (confidence, correct): keeps two numbers for each example."""

    function = staticmethod(eaurc)


class CoverageAtRisk(Scores):
    """:func:`coverage_at_risk` of batches (confidence, correct): keeps two numbers for each example."""

    function, options = staticmethod(coverage_at_risk), defaults(coverage_at_risk)


class RootMeanSquaredError(Sums):
    """:func:`rmse` of batches (mean, targets)."""

    def _sums(self, *batch: Tensor) -> Tensor:
        mean, targets = check_numbers(*batch)
        squares = (mean - targets).square()
        return torch.stack([squares.sum(), squares.new_tensor(squares.numel())])

    def _of_sums(self, sums: Tensor) -> Tensor:
        return (sums[0] / sums[1]).sqrt()


class GaussianNLL(Mean):
    """:func:`gaussian_nll` of batches (mean, variance, targets)."""

    function = staticmethod(gaussian_nll)


class CRPS(Mean):
    """:func:`crps` of batches (mean, variance, targets)."""

    function = staticmethod(crps)


class Coverage(Mean):
    """:func:`coverage` of batches (mean, variance, targets)."""

    function, options = staticmethod(coverage), defaults(coverage)


class IntervalWidth(Mean):
    """:func:`interval_width` of batches of variances, each of the shape of its targets."""

    function, options = staticmethod(interval_width), defaults(interval_width)


class TokenNLL(Sums):
    """:func:`token_nll` of batches (log_probs, tokens): keeps three sums, and so do those below."""

    options: ClassVar = {"ignored": IGNORED}

    def _sums(self, *batch: Tensor) -> Tensor:
        log_probs, tokens = batch
        return token_totals(log_probs, tokens, **self._options)

    def _of_sums(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


class Perplexity(TokenNLL):
    """:func:`perplexity` of batches (log_probs, tokens)."""

    def _of_sums(self, sums: Tensor) -> Tensor:
        return (sums[0] / sums[1]).exp()


class BitsPerByte(TokenNLL):
    """:func:`bits_per_byte` of batches (log_probs, tokens); ``token_bytes`` is for each token of the vocabulary, or None."""

    options: ClassVar = {"token_bytes": None, "ignored": IGNORED}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(size := self._options["token_bytes"], int):
            raise TypeError(f"BitsPerByte takes token_bytes for each token of the vocabulary, as a tensor; got {size!r}")

    def _of_sums(self, sums: Tensor) -> Tensor:
        return sums[0] / (sums[2] * torch.log(sums.new_tensor(2.0)))
