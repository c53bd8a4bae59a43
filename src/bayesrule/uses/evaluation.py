"""Measure predictions on data with known answers: classes, numbers, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count, cycle
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..estimators.batches import inputs_and_labels, inputs_of
from ..estimators.output_losses import shaped_like
from ..posterior import Posterior
from .metrics import energy, max_probability, ood_metrics
from .metrics.checks import check_labels, known_names
from .metrics.classification import CLASSIFICATION, STANDARD, classification_metrics
from .metrics.language import IGNORED, token_sums
from .metrics.regression import coverage, crps, gaussian_nll, interval_width, rmse
from .prediction import How, LinkApprox, Method, Prediction, Variance, check_outputs, predict_batches

Task = Literal["classification", "regression", "lm"]

OOD = ("auroc_ood", "aupr_in", "aupr_out", "fpr95")
REGRESSION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rmse": lambda mean, variance, targets: rmse(mean, targets),
    "nll": gaussian_nll,
    "crps": crps,
    "coverage": coverage,
    "interval_width": lambda mean, variance, targets: interval_width(variance.expand_as(mean)),
}
LANGUAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "nll": lambda sums: sums[0] / sums[1],
    "perplexity": lambda sums: (sums[0] / sums[1]).exp(),
    "bits_per_byte": lambda sums: sums[0] / (math.log(2) * sums[2]),
}
SCORES: dict[str, Callable[[Prediction], Tensor | None]] = {
    "entropy": lambda found: found.entropy,
    "max_probability": lambda found: None if found.probs is None else max_probability(found.probs),
    "mutual_information": lambda found: found.mutual_information,
    "variance": lambda found: found.variance.mean(-1),
    "energy": lambda found: energy(found.mean),
}
BYTES = 256  # tokens of a vocabulary of which each may be a byte


def evaluate(
    model: nn.Module,
    posterior: Posterior | None,
    loader: Iterable[tuple[Tensor, Tensor]],
    task: Task = "classification",
    *,
    method: Method | None = None,
    num_samples: int = 32,
    link: Literal["softmax", "sigmoid"] = "softmax",
    link_approx: LinkApprox = "probit",
    variance: Variance = "layerwise",
    tau: float = 1.0,
    temperature: float | None = None,
    seed: int = 0,
    metrics: Iterable[str] | None = None,
    ood: Iterable[Any] | None = None,
    ood_score: str = "entropy",
    noise_variance: float | Tensor | None = None,
    token_bytes: int | Tensor | None = None,
    antithetic: bool = False,
    vmap: int | None = None,
    compile: bool = False,
    batch_norm: Iterable[Tensor] | None = None,
) -> dict[str, float]:
    """Measure predictions on data with known answers.

    Costs as :func:`predict`, for all of the data; one draw serves the data and ``ood``. Of a language model no more is kept than
    the probability of each token that came.

    Args:
        model: As for :func:`predict`.
        posterior: As for :func:`predict`.
        loader: Batches (inputs, labels), or (inputs, numbers in the outputs' shape), or (tokens, those that follow); or mappings
            with ``labels`` as Hugging Face has them; read once.
        task: "classification"; "regression", Gaussian; "lm", the tokens that come, of which -100 do not count.
        method: As for :func:`predict`; "lm" knows "mean" and "mc".
        num_samples: As for :func:`predict`.
        link: Of "classification": "softmax", or "sigmoid" for yes or no by one logit, with labels 0 and 1.
        link_approx: As for :func:`predict`.
        variance: As for :func:`predict`.
        tau: As for :func:`predict`.
        temperature: As for :func:`predict`.
        seed: As for :func:`predict`.
        metrics: Names of the figures wanted; None is the task's usual ones. Others are, for classes, top5_accuracy, adaptive_ece,
            classwise_ece, mce, eaurc, coverage_at_1_risk and coverage_at_5_risk (largest share answered with at most so many
            percent wrong) and, with ``ood``, auroc_ood, aupr_in, aupr_out, fpr95; for numbers, interval_width.
        ood: Batches of inputs (or (inputs, anything)) of another kind, to be told from the data of classes.
        ood_score: By what: "entropy" of the prediction, "max_probability", "mutual_information", "variance" or "energy".
        noise_variance: Of the targets of a regression around the true outputs, a number or one for each output; None is the
            posterior's ``noise_variance``, or none.
        token_bytes: Bytes of all tokens that count, or of each in the vocabulary, shape (K,); None where each is one.
        antithetic: As for :func:`predict`.
        vmap: As for :func:`predict`; not for "lm".
        compile: As for :func:`predict`.
        batch_norm: As for :func:`predict`; not for "lm".

    Returns:
        Of classes accuracy, nll (nats, of log probabilities that do not underflow), ece (15 equal-width bins, right-closed), brier
        (0 to 2), auroc (confidence telling right from wrong predictions), aurc; with ``ood`` also auroc_ood (known against
        unknown). Of numbers rmse, nll (nats a target, of the total variance), crps, coverage (of central 95 % intervals). Of
        tokens nll (nats a token), perplexity and, if ``token_bytes`` is given or there are at most 256 tokens, bits_per_byte.

    Raises:
        ValueError: Unknown task or metric, no data, or data that do not fit the outputs.

    Example:
        >>> model = nn.Linear(2, 2).eval()
        >>> data = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
        >>> sorted(evaluate(model, None, data))
        ['accuracy', 'aurc', 'auroc', 'brier', 'ece', 'nll']
    """
    if task not in ("classification", "regression", "lm"):
        raise ValueError(f"unknown task {task!r}; take 'classification', 'regression' or 'lm'")
    if ood is not None and task != "classification":
        raise ValueError(f"ood data are told from those of classes; take task='classification', not {task!r}")
    wanted = _wanted(task, metrics, ood is not None)
    if ood_score not in SCORES:
        raise ValueError(f"unknown ood_score {ood_score!r}; take of {', '.join(SCORES)}")
    if link not in ("softmax", "sigmoid"):
        raise ValueError(f"unknown link {link!r} of classes; take 'softmax' or 'sigmoid'; numbers have task='regression'")
    batches = [inputs_and_labels(batch, model) for batch in loader]
    if not batches:
        raise ValueError("there is nothing to evaluate: the loader gave no batch")
    others = [] if ood is None else [inputs_of(batch) for batch in ood]
    inputs, targets = [x for x, _ in batches] + others, [y for _, y in batches]
    linear = (link_approx, variance, tau, temperature)
    how = How(method, num_samples, seed, antithetic, vmap, compile, batch_norm, "probs", *linear)
    if task == "lm":
        return _of_tokens(_answers(model, posterior, inputs, targets, how), token_bytes, wanted, metrics is None)
    found = predict_batches(model, posterior, inputs, "identity" if task == "regression" else link, how)
    if task == "regression":
        return _of_numbers(found, torch.cat(targets), noise_of(posterior, noise_variance, found.mean), wanted)
    return _of_classes(found, torch.cat(targets), wanted, SCORES[ood_score])


def _wanted(task: Task, metrics: Iterable[str] | None, ood: bool) -> tuple[str, ...]:
    usual: dict[Task, tuple[str, ...]] = {
        "classification": (*STANDARD, *(OOD[:1] if ood else ())),
        "regression": ("rmse", "nll", "crps", "coverage"),
        "lm": tuple(LANGUAGE),
    }
    if metrics is None:
        return usual[task]
    known = {"classification": (*CLASSIFICATION, *(OOD if ood else ())), "regression": REGRESSION, "lm": LANGUAGE}
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not ood and (lost := [name for name in metrics if name in OOD]):
        raise ValueError(f"{lost[0]} tells unknown data from known data; pass ood=, batches of unknown inputs")
    return known_names(metrics, known[task])


def noise_of(posterior: Posterior | None, given: float | Tensor | None, outputs: Tensor) -> Tensor:
    """The variance of the noise: what is given, else the posterior's, else none; one number or one for each output.

    Raises:
        ValueError: It is negative, or of another number of outputs.
    """
    if given is None:
        known = None if posterior is None else posterior.noise_variance
        given = torch.tensor(0.0 if known is None else known, dtype=torch.float64)
    noise = torch.as_tensor(given, dtype=torch.float64)
    if not (noise >= 0).all():
        raise ValueError(f"noise_variance must be >= 0, got {noise.min().item():.6g}")
    noise = noise.squeeze(-1) if noise.shape == (1,) else noise
    if noise.ndim and noise.shape != outputs.shape[1:][-1:]:
        raise ValueError(
            f"noise_variance must be one number or one for each output, {tuple(outputs.shape)}; got {tuple(noise.shape)}"
        )
    return noise


def _of_classes(
    found: Prediction, labels: Tensor, wanted: Sequence[str], score: Callable[[Prediction], Tensor | None]
) -> dict[str, float]:
    if found.log_complement is not None:
        found, labels = as_classes(found), yes_or_no(labels)
    assert found.probs is not None and found.log_probs is not None
    labels = labels.to(found.probs.device)
    known = len(labels)
    figures = classification_metrics(found.probs[:known], labels, [name for name in wanted if name not in OOD])
    if "nll" in figures:
        figures["nll"] = -found.log_probs[:known].gather(1, labels.long()[:, None]).cpu().double().mean().item()
    if any(name in OOD for name in wanted):
        scores = score(found)
        assert scores is not None
        figures |= ood_metrics(scores[:known], scores[known:])
    return {name: figures[name] for name in wanted}


def as_classes(found: Prediction) -> Prediction:
    """Of classes, whatever the link: yes or no by one logit as the two classes that it is, of logits 0 and f.

    Raises:
        ValueError: There is more than one logit for yes or no.
    """
    if found.log_complement is None:
        return found
    assert found.log_probs is not None and found.entropy is not None
    if found.mean.shape[1:].numel() != 1:
        raise ValueError(
            f"link='sigmoid' is measured for one logit an input, got outputs of shape {tuple(found.mean.shape)}; take a column"
        )
    logs, logit = torch.stack([found.log_complement.reshape(-1), found.log_probs.reshape(-1)], -1), found.mean.reshape(-1, 1)
    information = found.mutual_information
    return Prediction(
        logs.exp(),
        torch.cat([torch.zeros_like(logit), logit], -1),
        torch.cat([torch.zeros_like(logit), found.variance.reshape(-1, 1)], -1),
        found.entropy.reshape(-1),
        None if information is None else information.reshape(-1),
        logs,
    )


def yes_or_no(labels: Tensor) -> Tensor:
    """Labels 0 and 1 as whole numbers, whatever they came as."""
    if bool((odd := (labels != 0) & (labels != 1)).any()):
        raise ValueError(f"labels of yes or no are 0 and 1, got {labels[odd][0].item():.6g}")
    return labels.reshape(-1).long()


def _of_numbers(found: Prediction, targets: Tensor, noise: Tensor, wanted: Sequence[str]) -> dict[str, float]:
    mean = found.mean.cpu()
    variance, targets = found.variance.cpu().double() + noise, shaped_like(mean, targets)
    return {name: REGRESSION[name](mean, variance, targets).item() for name in wanted}


class _Answers(NamedTuple):
    nll: Tensor  # (M,) of each token that counts, in nats, the probability averaged over draws
    tokens: Tensor  # (M,)
    vocabulary: int  # number of tokens that there are


def _answers(model: nn.Module, posterior: Posterior | None, inputs: Sequence[Any], targets: Sequence[Tensor], how: How) -> _Answers:
    """What the model says of the tokens that came; of all others only how probable they are together, so that little is kept."""
    if how.method not in (None, "mean", "mc"):
        raise ValueError(f"tokens are predicted by 'mean' or 'mc', not {how.method!r}")
    if how.vmap is not None or how.batch_norm is not None:
        raise ValueError("tokens are predicted draw by draw, without vmap and batch_norm; leave them out")
    known = 1.0 if posterior is None else posterior.temperature
    temperature = known if how.temperature is None else how.temperature  # logits are tempered before the answer is read off them
    how = how._replace(method=how.method or ("mean" if posterior is None else "mc"), temperature=1.0)
    turn, calls, sizes = cycle(targets), count(), set[int]()

    def answer(outputs: Tensor) -> Tensor:
        came = next(turn).to(outputs.device)
        if outputs.shape[:-1] != came.shape or not came.ndim:
            raise ValueError(f"the model gave outputs of shape {tuple(outputs.shape)} for tokens of shape {tuple(came.shape)}")
        number = next(calls)
        if number == 0:
            check_outputs(outputs, 0, posterior, "softmax")
        sizes.add(outputs.shape[-1])
        check_labels(counted := came[came != IGNORED], len(counted), outputs.shape[-1])
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        logs = (wide if temperature == 1 else wide / temperature).log_softmax(-1)
        right = logs.gather(-1, came.where(came != IGNORED, 0).long()[..., None])
        if not right.isfinite().all():  # a row with an output that is NaN or inf has no log probability that is a number
            check_outputs(outputs, number // len(targets), posterior, "softmax")
        return torch.cat([right, (-right.expm1()).log().clamp_min(-1e4)], -1).flatten(0, -2)

    found = predict_batches(model, posterior, inputs, "softmax", how, answer)
    assert found.log_probs is not None
    came = torch.cat([y.flatten() for y in targets]).to(found.log_probs.device)
    if not (counts := came != IGNORED).any():
        raise ValueError(f"there is nothing to evaluate: all {came.numel()} tokens are {IGNORED}, which do not count")
    return _Answers(-found.log_probs[:, 0][counts], came[counts], sizes.pop())


def _of_tokens(found: _Answers, token_bytes: int | Tensor | None, wanted: Sequence[str], usual: bool) -> dict[str, float]:
    if token_bytes is None and found.vocabulary > BYTES and "bits_per_byte" in wanted:
        if not usual:
            raise ValueError(f"bits_per_byte needs token_bytes, the bytes of each of the {found.vocabulary} tokens")
        wanted = [name for name in wanted if name != "bits_per_byte"]
    sums = token_sums(found.nll, found.tokens, token_bytes)
    return {name: LANGUAGE[name](sums).item() for name in wanted}
