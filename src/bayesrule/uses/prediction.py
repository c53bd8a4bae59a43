"""Predict with a posterior: at its mean, or averaged over draws of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..posterior import Posterior, sampled
from .metrics import auroc, classification_metrics

Method = Literal["mean", "mc"]


class Prediction(NamedTuple):
    """What a posterior says about inputs. N inputs, K outputs each.

    With ``link="identity"`` (regression) ``probs``, ``entropy`` and ``mutual_information`` are None.
    """

    probs: Tensor | None  # (N, ..., K) class probabilities, averaged over draws
    mean: Tensor  # (N, ..., K) mean of the model's outputs (logits) over draws
    variance: Tensor  # (N, ..., K) their variance over draws: zero at the mean
    entropy: Tensor | None  # (N, ...) total uncertainty in nats: entropy of probs
    mutual_information: Tensor | None  # (N, ...) its epistemic part: entropy of probs - mean entropy of the draws, >= 0


def predict(
    model: nn.Module,
    posterior: Posterior | None,
    x: Tensor,
    method: Method | None = None,
    num_samples: int = 32,
    *,
    link: Literal["softmax", "identity"] = "softmax",
    seed: int = 0,
    batch_size: int = 512,
) -> Prediction:
    r"""Predict for inputs, averaging **probabilities** over draws of the weights.

    .. math::  p(y | x) \approx \frac1S \sum_s p(y | f(x; \theta_s)), \qquad \theta_s \sim q.

    Costs one forward ("mean") or ``num_samples`` forwards ("mc"), and memory for one copy of the weights; every draw of
    the weights is made once and serves all batches. The weights of the model come back bit by bit.

    Args:
        model: Gives logits (outputs, for regression), shape (n, ..., K), in eval mode.
        posterior: What was learned; None takes the model's weights as they are.
        x: Inputs, shape (N, ...).
        method: "mean", "mc" (Monte Carlo), or None: "mc" where there is a posterior.
        num_samples: Draws S of "mc"; 32 is usual, under 4 is worse than the mean.
        link: "softmax" for classes, "identity" for regression.
        seed: Which draws; the same seed, the same answer.
        batch_size: Inputs per forward.

    Raises:
        ValueError: Unknown method or link, fewer than two classes, or outputs that are probabilities already.
        RuntimeError: A draw gave outputs that are not finite.

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> predict(model, Posterior.point(model), torch.zeros(5, 2), "mc", num_samples=4).probs.shape
        torch.Size([5, 3])

    Source: spelled out for IVON in Shen et al. (2024), section 3.
    """
    return _predict(model, posterior, x.split(batch_size), method, num_samples, link, seed)


def evaluate(
    model: nn.Module,
    posterior: Posterior | None,
    loader: Iterable[tuple[Tensor, Tensor]],
    task: Literal["classification"] = "classification",
    *,
    method: Method | None = None,
    num_samples: int = 32,
    seed: int = 0,
    ood: Iterable[Any] | None = None,
) -> dict[str, float]:
    """Measure predictions on data with known answers.

    Costs as :func:`predict`, for all of the data.

    Args:
        model: As for :func:`predict`.
        posterior: As for :func:`predict`.
        loader: Batches (inputs, labels); read once.
        task: "classification".
        method: As for :func:`predict`.
        num_samples: As for :func:`predict`.
        seed: As for :func:`predict`.
        ood: Batches of inputs (or (inputs, anything)) of another kind, to be told from the data by predictive entropy.

    Returns:
        accuracy, nll (nats), ece (15 equal-width bins, right-closed), brier (0 to 2), auroc (confidence telling right from
        wrong predictions), aurc; with ``ood`` also auroc_ood (known against unknown).

    Raises:
        ValueError: Unknown task, or no data.

    Example:
        >>> model = nn.Linear(2, 2).eval()
        >>> data = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
        >>> sorted(evaluate(model, None, data))
        ['accuracy', 'aurc', 'auroc', 'brier', 'ece', 'nll']
    """
    if task != "classification":
        raise ValueError(f"unknown task {task!r}; this release evaluates 'classification'")
    batches = [(batch[0], batch[1]) for batch in loader]
    if not batches:
        raise ValueError("there is nothing to evaluate: the loader gave no batch")
    known = _predict(model, posterior, [x for x, _ in batches], method, num_samples, "softmax", seed)
    assert known.probs is not None and known.entropy is not None
    labels = torch.cat([y for _, y in batches]).to(known.probs.device)
    figures = classification_metrics(known.probs, labels)
    if ood is not None:
        inputs = [batch if isinstance(batch, Tensor) else batch[0] for batch in ood]
        unknown = _predict(model, posterior, inputs, method, num_samples, "softmax", seed)
        assert unknown.entropy is not None
        scores = torch.cat([unknown.entropy, known.entropy])
        figures["auroc_ood"] = auroc(scores, torch.arange(len(scores), device=scores.device) < len(unknown.entropy)).item()
    return figures


def _predict(
    model: nn.Module,
    posterior: Posterior | None,
    batches: Sequence[Tensor],
    method: Method | None,
    num_samples: int,
    link: str,
    seed: int,
) -> Prediction:
    method = method or ("mean" if posterior is None else "mc")
    if link not in ("softmax", "identity"):
        raise ValueError(f"unknown link {link!r}; take 'softmax' or 'identity'")
    if model.training:
        warnings.warn(
            "model is in training mode; batch-norm statistics and dropout will disturb the posterior predictive",
            UserWarning,
            stacklevel=3,
        )
    averages = _Averages(link)
    for number, outputs in enumerate(_outputs(model, posterior, batches, method, num_samples, seed)):
        _check(outputs, number, posterior, link)
        averages.update(outputs)
    return averages.prediction()


def _outputs(
    model: nn.Module, posterior: Posterior | None, batches: Sequence[Tensor], method: str, num_samples: int, seed: int
) -> Iterator[Tensor]:
    """The model's outputs for all batches, once for every set of weights."""
    device = next(model.parameters()).device

    def forward() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(x.to(device)) for x in batches])

    if method == "mean":
        if posterior is None:
            yield forward()
            return
        with sampled(model, posterior.exact(), seed):
            outputs = forward()
        yield outputs
    elif method == "mc":
        if posterior is None:
            raise ValueError("method 'mc' draws from a posterior, and there is none; pass one or take method='mean'")
        if num_samples < 1:
            raise ValueError(f"num_samples must be a whole number >= 1, got {num_samples!r}")
        if num_samples < 4:
            warnings.warn(f"an average over {num_samples} draws may be worse than the mean", UserWarning, stacklevel=4)
        for number in range(num_samples):
            with sampled(model, posterior, seed * num_samples + number):
                outputs = forward()
            yield outputs
    else:
        raise ValueError(f"unknown method {method!r}; take 'mean' or 'mc'")


class _Averages:
    """Running means over draws; memory does not grow with their number."""

    def __init__(self, link: str) -> None:
        self.link, self.count = link, 0
        self.mean = self.squares = self.probs = self.noise = torch.zeros(())

    def update(self, outputs: Tensor) -> None:
        self.count += 1
        step = 1 / self.count
        gap = outputs - self.mean
        self.mean = self.mean + gap * step
        self.squares = self.squares + gap * (outputs - self.mean)
        if self.link == "softmax":
            probs = outputs.softmax(dim=-1)
            self.probs = self.probs + (probs - self.probs) * step
            self.noise = self.noise + (_entropy(probs) - self.noise) * step

    def prediction(self) -> Prediction:
        variance = self.squares / self.count
        if self.link == "identity":
            return Prediction(None, self.mean, variance, None, None)
        total = _entropy(self.probs)
        return Prediction(self.probs, self.mean, variance, total, (total - self.noise).clamp_min(0))


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(dim=-1)


def _check(outputs: Tensor, number: int, posterior: Posterior | None, link: str) -> None:
    if link == "softmax" and (outputs.dim() < 2 or outputs.shape[-1] < 2):
        raise ValueError(
            f"the model gave outputs of shape {tuple(outputs.shape)}; class probabilities need (inputs, classes >= 2), "
            "numbers link='identity'"
        )
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
    if bad := int((~rows.isfinite()).any(dim=1).sum()):
        where = ""
        if posterior is not None:
            name = min(posterior.precision, key=lambda n: posterior.precision[n].min().item())
            widest = 1 / math.sqrt(posterior.precision[name].min().item())
            where = f"; posterior variance may be too large (max std {widest:.2g} at {name!r}); try rescale(ess=...)"
        raise RuntimeError(f"draw {number} gave non-finite outputs in {bad} of {len(rows)} rows{where}")
    sums = outputs.sum(dim=-1)
    if (
        link == "softmax"
        and outputs.numel()
        and outputs.shape[-1] > 1
        and (outputs >= 0).all()
        and torch.allclose(sums, torch.ones_like(sums))
    ):
        raise ValueError("outputs sum to 1 in every row; let the model give logits, not probabilities")
