"""Laplace's approximation around the weights of a trained model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bases import Bases, Basis
from ..estimators.batches import outputs_of, pairs, rows_of
from ..estimators.data_curvature import KINDS, Diagonals, Factors, Head, Matrix, Sum, accumulate, wide
from ..estimators.output_losses import OutputLoss, SquaredError
from ..families.eigen import Eigen
from ..families.gaussian import Full
from ..joints import Joint, law_of
from ..parts import Named, Part
from ..vector import Vector
from .evidence import best_precision

STRUCTURES = ("diag", "kron", "last_layer", "full")
Prior = float | str | Mapping[str, float]


class Settings(NamedTuple):
    """What is asked for; see :meth:`bayesrule.Posterior.laplace`."""

    structure: str
    prior_precision: Prior
    loss: OutputLoss
    curvature: str
    num_data: int | None
    layer: str | None
    max_bytes: int
    seed: int


def laplace(model: nn.Module, loader: Iterable[Any], how: Settings) -> dict[str, Any]:
    """The fields of the posterior."""
    _check(model, how)
    batches = iter(loader)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if how.structure == "last_layer":
        params, batches = _last_layer(model, params, batches, how.layer)
    if not params:
        raise ValueError("no parameter requires a gradient, so there is nothing to be uncertain of")
    for name, p in params.items():
        if not bool(p.isfinite().all()):
            raise ValueError(f"the weights {name!r} are not finite")
    kept = _kept(model, params, how)
    with torch.no_grad(), _only(model, params):
        accumulate(model, batches, how.loss, kept, how.curvature, how.seed)  # type: ignore[arg-type]
        examples = kept.examples if how.num_data is None else how.num_data
        fields = _posterior(model, params, kept, how.prior_precision, examples / kept.examples)
        noise = (float(how.loss.noise_variance),) if isinstance(how.loss, SquaredError) else None
        return {**fields, "ess": float(examples), "num_data": examples, "noise_variance": noise}


def _check(model: nn.Module, how: Settings) -> None:
    for what, value, known in (("structure", how.structure, STRUCTURES), ("curvature", how.curvature, KINDS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; take {', '.join(map(repr, known))}")
    prior = how.prior_precision
    numbers = prior.values() if isinstance(prior, Mapping) else [prior]
    if prior != "marglik" and not all(_is_positive(number) for number in numbers):
        raise ValueError(f"prior_precision must be a number > 0, numbers > 0 by name, or 'marglik', got {prior!r}")
    if how.layer is not None and how.structure != "last_layer":
        raise ValueError(f"layer={how.layer!r} goes with structure='last_layer' only; freeze parameters to leave them out")
    for name, module in model.named_modules():
        if module.training and _is_noisy(module):
            raise ValueError(
                f"{name or 'the model'!r} ({type(module).__name__}) is in training mode, in which outputs are no function of one "
                "example and the weights; call model.eval()"
            )


def _is_positive(number: Any) -> bool:
    try:
        return 0 < float(number) < math.inf
    except (TypeError, ValueError):
        return False


def _is_noisy(module: nn.Module) -> bool:
    rate = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0)
    noisy = isinstance(rate, int | float) and rate > 0
    return noisy or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _last_layer(
    model: nn.Module, params: dict[str, nn.Parameter], batches: Iterator[Any], layer: str | None
) -> tuple[dict[str, nn.Parameter], Iterator[Any]]:
    """The parameters of the last linear layer that runs, or of a layer of this name; and all batches, of which one was seen."""
    if layer is not None:
        found = dict(model.named_modules()).get(layer)
        if found is None:
            raise ValueError(f"the model has no layer {layer!r}; take a name of model.named_modules()")
        return _of(found, params), batches
    called: list[nn.Module] = []
    handles = [
        m.register_forward_hook(lambda module, *_: called.append(module)) for m in model.modules() if isinstance(m, nn.Linear)
    ]
    try:
        first = next(batches, None)
        for inputs, labels in pairs([] if first is None else [first], model):
            with torch.no_grad():
                outputs_of(model, rows_of(inputs, slice(1), len(labels)))
    finally:
        for handle in handles:
            handle.remove()
    if first is None:
        raise ValueError("there is nothing to learn from: the loader gave no example")
    if not called:
        raise ValueError("no nn.Linear ran, so there is no last layer; name one with layer=")
    return _of(called[-1], params), itertools.chain([first], batches)


def _of(module: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    own = set(module.parameters())
    return {name: p for name, p in params.items() if p in own}


@contextmanager
def _only(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """No graph is kept for the gradients of other parameters."""
    wanted = set(params.values())
    others = [p for p in model.parameters() if p.requires_grad and p not in wanted]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def _kept(model: nn.Module, params: Mapping[str, nn.Parameter], how: Settings) -> Sum:
    if how.structure == "diag":
        return Diagonals(params)
    if how.structure == "kron":
        return Factors(params, model)
    size = sum(p.numel() for p in params.values())
    needed = size**2 * torch.finfo(wide(next(iter(params.values())))).bits // 8
    if needed > how.max_bytes:
        raise RuntimeError(
            f"structure={how.structure!r} needs {needed / 1e9:.3g} GB for a matrix of {size} x {size}, and as much for its root "
            f"(max_bytes is {how.max_bytes / 1e9:.3g} GB); take "
            + ("'kron' or 'diag'" if how.structure == "last_layer" else "'last_layer', 'kron' or 'diag'")
        )
    return _head(model, params) or Matrix(params)


def _head(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Head | None:
    """For the parameters of one linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and set(params.values()) == set(module.parameters()):
            return Head(params, module.weight, module.bias)
    return None


# From curvature to precision


def _posterior(model: nn.Module, params: Mapping[str, nn.Parameter], kept: Sum, prior: Prior, scale: float) -> dict[str, Any]:
    mean = {name: p.detach().to(wide(p), copy=True) for name, p in model.named_parameters()}
    size = float(sum(mean[name].double().square().sum() for name in params))
    exact = {name: torch.full_like(m, math.inf) for name, m in mean.items()}

    def priors(spectra: Callable[[], Iterable[Tensor]]) -> dict[str, float]:
        if isinstance(prior, Mapping):
            if odd := set(params) - set(prior):
                raise ValueError(f"prior_precision has no number for {min(odd)!r}")
            return {name: float(prior[name]) for name in params}
        return dict.fromkeys(params, best_precision(list(spectra()), size) if isinstance(prior, str) else float(prior))

    parts: tuple[Part, ...] = ()
    if isinstance(kept, Matrix):
        delta, parts = _full(kept, mean, scale, priors)
        found: dict[str, Tensor] = {}
    elif isinstance(kept, Factors):
        delta, parts, found = _kron(kept, mean, scale, priors)
    else:
        assert isinstance(kept, Diagonals)
        sums = {name: _finite(name, total) * scale for name, total in kept.sums.items()}
        delta = priors(sums.values)
        found = {name: total + delta[name] for name, total in sums.items()}
    flat = {name: m.new_tensor(delta.get(name, next(iter(delta.values())))) for name, m in mean.items()}
    return {
        "mean": mean,
        "precision": {**exact, **found},
        "prior_mean": {name: m.new_zeros(()) for name, m in mean.items()},
        "prior_precision": flat,
        "parts": parts,
        "method_hint": "glm",
    }


def _finite(name: str, curvature: Tensor) -> Tensor:
    if bad := int((~curvature.isfinite()).sum()):
        raise RuntimeError(f"the curvature of {name!r} has {bad} entries that are not finite; its weights or inputs are too large")
    return curvature


def _full(kept: Matrix, mean: Named, scale: float, priors: Any) -> tuple[dict[str, float], tuple[Part, ...]]:
    matrix = _finite(", ".join(kept.params), kept.sum) * scale
    matrix = (matrix + matrix.mT) / 2
    delta = priors(lambda: [torch.linalg.eigvalsh(matrix.double())])
    added = torch.cat([matrix.new_full((mean[name].numel(),), delta[name]) for name in kept.params])
    matrix.diagonal().add_(added)
    if int(torch.linalg.cholesky_ex(matrix).info):
        raise ValueError(
            f"the precision is not positive definite in {matrix.dtype}: its largest entry is {matrix.max().item():.3g}, the "
            f"prior's {min(delta.values()):.3g}; pass model.double() or a larger prior_precision"
        )
    row = torch.cat([mean[name].reshape(-1) for name in kept.params])
    return delta, law_of(Full(row, matrix), {name: mean[name].shape for name in kept.params}).parts


def _kron(kept: Factors, mean: Named, scale: float, priors: Any) -> tuple[dict[str, float], tuple[Part, ...], dict[str, Tensor]]:
    turned = {name: _turned(name, kept, mean[name], scale) for name in kept.rows}
    sums = {name: _finite(name, total) * scale for name, total in kept.sums.items()}
    delta = priors(lambda: [*(spectrum for _, spectrum in turned.values()), *sums.values()])
    parts: tuple[Part, ...] = ()
    if turned:
        names = tuple(turned)
        spectra = Vector([spectrum + delta[name] for name, (_, spectrum) in turned.items()])
        q = Eigen(Vector([mean[name] for name in names]), Bases([basis for basis, _ in turned.values()]), spectra)
        parts = (Joint(names, tuple(mean[name].shape for name in names), q),)
    return delta, parts, {name: total + delta[name] for name, total in sums.items()}


def _turned(name: str, kept: Factors, mean: Tensor, scale: float) -> tuple[Basis, Tensor]:
    """The eigenvectors of both factors, and the products of eigenvalues, shaped like the mean."""
    factors = [kept.rows[name], *([kept.inner[name]] if name in kept.inner else [])]
    axes: list[Tensor | None] = []
    spectrum = torch.full((), scale, dtype=torch.float64)
    for factor in factors:
        _finite(name, factor)
        if factor.dim() == 1:
            values, vectors = factor.double().cpu(), None
        else:
            values, vectors = torch.linalg.eigh(factor.double().cpu())
        axes.append(None if vectors is None else vectors.contiguous().to(mean))
        spectrum = spectrum[..., None] * values.clamp(min=0)
    return Basis(tuple(len(factor) for factor in factors), axes), spectrum.reshape(mean.shape).to(mean)
