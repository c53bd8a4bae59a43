"""What predictions are, what turns outputs into probabilities, and averages of these over draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..estimators.output_losses import IGNORED as IGNORED

Link = Literal["softmax", "sigmoid", "identity"]
LINKS = ("softmax", "sigmoid", "identity")


class Prediction(NamedTuple):
    """What a posterior says about inputs. N inputs, K outputs each.

    In float32, or the outputs' dtype if that is wider. With ``link="identity"`` (regression) ``probs``, ``entropy``,
    ``mutual_information`` and ``log_probs`` are None. With ``link="sigmoid"`` every output is a yes or no of its own, and these
    four are of shape (N, ..., K): the probability of yes, and the uncertainty of each answer.
    """

    probs: Tensor | None  # (N, ..., K) class probabilities, averaged over draws
    mean: Tensor  # (N, ..., K) mean of the model's outputs (logits) over draws; linearized, the outputs at the mean
    variance: Tensor  # (N, ..., K) their variance over weights, the epistemic part: zero at the mean
    entropy: Tensor | None  # (N, ...) total uncertainty in nats: entropy of probs
    mutual_information: Tensor | None  # (N, ...) its epistemic part: entropy of probs - mean entropy of the draws, >= 0
    log_probs: Tensor | None = None  # (N, ..., K) log of probs, finite where probs are too small for their dtype
    noise_variance: Tensor | None = None  # (N, ..., K) of a regression's targets about their means, the aleatoric part, where known
    covariance: Tensor | None = None  # (N, M, M) linearized: of the M outputs of each input in a row, where it was formed
    samples: Tensor | None = None  # (S, N, ..., K) linearized, sampled: outputs by draw of the weights, each serving all inputs
    log_complement: Tensor | None = None  # (N, ..., K) with link="sigmoid": log of 1 - probs, finite where probs round to 1
    sequence_log_probs: Tensor | None = None  # (N,) with labels: log of the mean over draws of the whole sequence's probability

    def with_noise(self, noise: float | Tensor | Sequence[float] | None) -> Prediction:
        """A regression's with the variance of its targets about their means, where that is known."""
        if noise is None or self.probs is not None:
            return self
        known = torch.as_tensor(noise, dtype=self.mean.dtype, device=self.mean.device)
        try:
            return self._replace(noise_variance=known.expand_as(self.mean))
        except RuntimeError:
            raise ValueError(
                f"noise_variance must be one number or one for each output, {tuple(self.mean.shape)}; got {tuple(known.shape)}"
            ) from None

    @property
    def total_variance(self) -> Tensor:
        """Of a regression's targets, (N, ..., K): epistemic and aleatoric."""
        return self.variance if self.noise_variance is None else self.variance + self.noise_variance


def log_probs_of(outputs: Tensor, link: str, temperature: float = 1.0) -> Tensor:
    """Log probabilities along the last dimension: of the classes, or (sigmoid) of no and yes in a new dimension."""
    scaled = outputs if temperature == 1 else outputs / temperature
    return scaled.log_softmax(-1) if link == "softmax" else torch.stack([logsigmoid(-scaled), logsigmoid(scaled)], -1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Along the last dimension, in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def prediction_of(
    log_probs: Tensor, link: str, mean: Tensor, variance: Tensor, aleatoric: Tensor | None, entropy: Tensor | None = None
) -> Prediction:
    """From log probabilities as of :func:`log_probs_of`, and the mean entropy of the draws where that is known."""
    total = entropy_of(log_probs) if entropy is None else entropy
    information = None if aleatoric is None else (total - aleatoric).clamp_min(0)
    own, no = (log_probs, None) if link == "softmax" else (log_probs[..., 1], log_probs[..., 0])
    return Prediction(own.exp(), mean, variance, total, information, own, log_complement=no)


class Averages:
    """Running means over draws; memory does not grow with their number.

    That of the probabilities is kept as ``top``, the largest log probability so far, and ``total``, the sum of
    exp(log probability - top).

    Args:
        link: What turns outputs into probabilities.
        temperature: What logits are divided by before.
        combine: "probs", or "logits" for the probabilities of the mean logits.
        labels: Of sequences, shape (N, T): their probabilities are averaged too, as wholes.
    """

    def __init__(self, link: str, temperature: float = 1.0, combine: str = "probs", labels: Tensor | None = None) -> None:
        self.link, self.temperature, self.combine, self.labels, self.count = link, temperature, combine, labels, 0
        self.mean = self.squares = self.top = self.total = self.noise = torch.zeros(())
        self.sequences: list[Tensor] = []

    def update(self, outputs: Tensor) -> None:
        """Take in the outputs of one draw."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        self.count += 1
        logs = None if self.link == "identity" else log_probs_of(outputs, self.link, self.temperature)
        if logs is not None and self.labels is not None:
            self.sequences.append(_whole(logs, self.labels.to(logs.device)))
        if self.count == 1:
            self.mean, self.squares = outputs.clone(), torch.zeros_like(outputs)
            if logs is not None:
                self.top, self.total, self.noise = logs, torch.ones_like(logs), entropy_of(logs)
            return
        gap = outputs - self.mean
        self.mean.add_(gap, alpha=1 / self.count)
        self.squares.addcmul_(gap, outputs - self.mean)
        if logs is not None:
            self.noise.add_(entropy_of(logs))
            top = torch.maximum(self.top, logs)
            self.total.mul_(self.top.sub_(top).exp_()).add_(logs.sub_(top).exp_())
            self.top = top

    def prediction(self) -> Prediction:
        """Of the draws so far."""
        variance = self.squares / self.count
        if self.link == "identity":
            return Prediction(None, self.mean, variance, None, None)
        if self.combine == "logits":
            return prediction_of(log_probs_of(self.mean, self.link, self.temperature), self.link, self.mean, variance, None)
        log_probs = self.top + (self.total / self.count).log()
        found = prediction_of(log_probs, self.link, self.mean, variance, self.noise / self.count)
        if not self.sequences:
            return found
        return found._replace(sequence_log_probs=torch.stack(self.sequences).logsumexp(0) - math.log(self.count))


def _whole(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The log probability of each whole sequence, shape (N,)."""
    if labels.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit outputs for {tuple(log_probs.shape[:-1])}: one for each position"
        )
    counts = labels != IGNORED
    picked = log_probs.gather(-1, labels.long().clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(counts, picked, 0).flatten(1).sum(1) if labels.dim() > 1 else torch.where(counts, picked, 0)


def mixed(found: Sequence[Prediction], weights: Sequence[float], link: str) -> Prediction:
    """The average of predictions of which one holds, with these probabilities."""
    mean = _mean(weights, [one.mean for one in found])
    variance = _mean(weights, [one.variance + (one.mean - mean) ** 2 for one in found])
    if link == "identity":
        return Prediction(None, mean, variance, None, None)
    log_probs = _log_mean(weights, [one.log_probs for one in found])
    assert log_probs is not None
    probs = log_probs.exp()
    total = entropy_of(log_probs) if link == "softmax" else torch.special.entr(probs) + torch.special.entr(1 - probs)
    own = [one.entropy - one.mutual_information for one in found if one.entropy is not None and one.mutual_information is not None]
    information = (total - _mean(weights, own)).clamp_min(0) if len(own) == len(found) else None
    sequences = _log_mean(weights, [one.sequence_log_probs for one in found])
    no = _log_mean(weights, [one.log_complement for one in found])
    return Prediction(probs, mean, variance, total, information, log_probs, log_complement=no, sequence_log_probs=sequences)


def _mean(weights: Sequence[float], each: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * one for w, one in zip(weights, each, strict=True)]).sum(0)


def _log_mean(weights: Sequence[float], each: Sequence[Tensor | None]) -> Tensor | None:
    terms = [one + math.log(w) for w, one in zip(weights, each, strict=True) if one is not None]
    return torch.stack(terms).logsumexp(0) if terms else None
