"""Leave-one-out estimates while a model trains: when to stop, and which labels to look at, without a validation set."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..posterior import Posterior
from .scores import Ranked, Scores, ranked
from .sensitivity import Sensitivity


class TrackSensitivity:
    r"""Estimates of leave-one-out cross-validation after every epoch of a training.

    Costs a pass of :meth:`Sensitivity.scores` over ``subset`` examples each time, some ten times an epoch over as many, and two
    numbers an example.

    Args:
        loader: The training data in an order that stays, without augmentation.
        every: Epochs from one estimate to the next.
        subset: How many examples, from the first on; None is all.
        posterior: What the model has learned so far, from the model and the optimizer: None asks the optimizer, one of this
            library or torch's Adam or AdamW; for others all variances are 1, and losses are those of training.
        patience: Estimates without a smaller leave-one-out NLL until :attr:`should_stop`; None never.
        num_data: How many examples the model is trained on; None is how many the loader has.
        **how: As for :class:`Sensitivity`: loss, estimator, correction, ...

    Attributes:
        history: A mapping for each estimate: epoch, train_nll, loo_nll, accuracy, loo_accuracy, and concentration, the share
            of all sensitivity that belongs to one example in a hundred.
        scores: Of the last estimate.

    Example:
        >>> import bayesrule as br
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> y = (x[:, 0] > 0).long()
        >>> model = nn.Linear(1, 2)
        >>> opt = br.IVON(model.parameters(), lr=0.5, ess=40)
        >>> tracker = TrackSensitivity([(x, y)])
        >>> for epoch in range(3):
        ...     with opt.sampled_params(train=True):
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...     opt.step()
        ...     line = tracker.update(model, opt)
        >>> [line["epoch"] for line in tracker.history], tracker.history[-1]["loo_nll"] > tracker.history[-1]["train_nll"]
        ([1, 2, 3], True)

    Source: P. Nickl et al. (2023), arXiv:2310.19273, section 4.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        every: int = 1,
        subset: int | None = 2000,
        posterior: Callable[[nn.Module, Any], Posterior | None] | None = None,
        patience: int | None = None,
        num_data: int | None = None,
        **how: Any,
    ) -> None:
        for name, value in {"every": every, "subset": subset, "patience": patience, "num_data": num_data}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        self.loader, self.every, self.subset, self.patience, self.how = loader, every, subset, patience, how
        self.of = posterior or (lambda model, optimizer: learned(model, optimizer, num_data or _examples(loader)))
        self.history: list[dict[str, float]] = []
        self.scores: Scores | None = None
        self._total = self._average = torch.zeros(0)
        self._told = set[str]()
        self._epochs = 0

    def update(self, model: nn.Module, optimizer: Any = None, epoch: int | None = None) -> dict[str, float] | None:
        """After an epoch: the new estimate, or None between two of them.

        The model is looked at in eval mode, at the mean, and comes back as it was; an open draw of the optimizer is closed.

        Args:
            model: The model.
            optimizer: What trains it.
            epoch: Its number, from 1; None counts.
        """
        self._epochs = self._epochs + 1 if epoch is None else epoch
        if self._epochs % self.every:
            return None
        if optimizer is not None and hasattr(optimizer, "draws"):
            optimizer.eval()
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with self._once():
                posterior = self.of(model, optimizer)
                found = Sensitivity(model, posterior, **self.how).scores(self.loader, subset=self.subset)
        finally:
            for module, training in modes:
                module.training = training
        return self._take(found, posterior is not None)

    def _take(self, found: Scores, knows: bool = True) -> dict[str, float]:
        if not knows:  # no variances, no scale of deviations
            found = replace(found, loo_loss=found.loss, loo_correct=found.correct)
        self.scores = found
        self._total = found.loo_loss.double() + (self._total if len(self._total) else 0.0)
        named = bool((found.correct >= 0).all())
        line = {
            "epoch": self._epochs,
            "train_nll": found.loss.double().mean().item(),
            "loo_nll": found.loo_loss.double().mean().item(),
            "accuracy": found.correct.double().mean().item() if named else math.nan,
            "loo_accuracy": found.loo_correct.double().mean().item() if named else math.nan,
            "concentration": concentration(found.sensitivity),
        }
        self.history.append(line)
        if self.history[-1]["loo_nll"] <= min(other["loo_nll"] for other in self.history):
            self._average = self._total / len(self.history)
        return line

    @contextmanager
    def _once(self) -> Any:
        """Says each warning once in a training."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            kind = re.sub(r"\d", "", str(warning.message))[:24]
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(warning.message, warning.category, stacklevel=4)

    @property
    def best_epoch(self) -> int:
        """The epoch with the smallest leave-one-out NLL.

        Raises:
            RuntimeError: There is no estimate yet.
        """
        if not self.history:
            raise RuntimeError("there is no estimate yet: call update(model, optimizer) after an epoch")
        return int(min(self.history, key=lambda line: line["loo_nll"])["epoch"])

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` estimates have brought no smaller leave-one-out NLL."""
        if self.patience is None or not self.history:
            return False
        best = min(range(len(self.history)), key=lambda i: self.history[i]["loo_nll"])
        return len(self.history) - 1 - best >= self.patience

    def mislabelled(self, k: int | None = None) -> Ranked:
        """The examples whose labels look wrong: with the largest leave-one-out loss on average over estimates up to the best.

        A network that has learned its labels by heart no longer tells which are wrong; what it said before does.
        """
        if not self.history:
            raise RuntimeError("there is no estimate yet: call update(model, optimizer) after an epoch")
        return ranked(self._average, k)

    def top(self, k: int, score: str = "sensitivity") -> Ranked:
        """The k examples that the model depends on most, by the last estimate."""
        if self.scores is None:
            raise RuntimeError("there is no estimate yet: call update(model, optimizer) after an epoch")
        return ranked(self.scores.by(score), k)


def learned(model: nn.Module, optimizer: Any, examples: int | None) -> Posterior | None:
    """What an optimizer has learned so far; None for one that learns no variances."""
    inner = optimizer
    while hasattr(inner, "optimizer"):  # what wraps it
        inner = inner.optimizer
    if hasattr(inner, "posterior") and "ess" in inner.defaults:
        found: Posterior = inner.posterior(model, num_data=examples)
        return found
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and inner.state and examples is not None:
        return Posterior.from_adam(inner, model, examples, debias=True)
    return None


def concentration(sensitivity: Tensor, share: float = 0.01) -> float:
    """The share of the total that belongs to the largest one in a hundred; NaN where all are zero."""
    count = max(1, round(share * len(sensitivity)))
    total = sensitivity.double().sum()
    return (sensitivity.double().topk(count).values.sum() / total).item() if total > 0 else math.nan


def _examples(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        if not isinstance(loader, Sequence):  # what can be read once only is not to be counted
            return None
        return sum(len(batch[1] if isinstance(batch, list | tuple) else batch["labels"]) for batch in loader)
