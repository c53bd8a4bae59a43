"""Where a curvature begins: in the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..shards import whole
from .batches import outputs_of, pairs
from .output_losses import IGNORED, Callables, output_loss


def start_curvature(model: nn.Module, loss: str | Callables, batches: Iterable[Any], *, floor: float = 0.1) -> dict[str, Tensor]:
    r"""The curvature of the mean loss at a model's weights, weight by weight: a start for ``hess_init``.

    .. math::  e = \frac1B \sum_b n_b\, g_b^2, \qquad h_0 = \max(e,\; \text{floor} \cdot \overline{e}),

    with :math:`g_b` the gradient of the mean loss of batch b, over :math:`n_b` losses, and :math:`\overline e` the mean of e over
    the tensor. Where gradients are mostly noise that is the empirical Fisher matrix's diagonal, at a forward and a backward a
    batch. The floor is for weights that these batches do not speak of. Weights and their gradients stay as they are. Under
    FSDP2 all processes give the same batches; the tensors are shared out as the parameters are.

    As an instance of the rule: ``EmpiricalFisher``, from whole batches, at the mean.

    Args:
        model: Asked in eval mode, so that nothing in it changes; parameters without a gradient are left out.
        loss: "cross_entropy" (of each label, such as a token), "bce", "mse", or a function of outputs and targets that gives the
            loss of each example.
        batches: Pairs (inputs, labels) or mappings with ``labels``, some eight of them.
        floor: Least curvature, in units of its mean over the tensor, >= 0.

    Returns:
        name -> tensor, shaped as the parameter; of a tensor that no batch speaks of the mean over the others.

    Raises:
        ValueError: There are no batches, or a gradient is not finite.

    Example:
        >>> import torch, bayesrule as br
        >>> model = torch.nn.Linear(4, 3)
        >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(8)]
        >>> start = start_curvature(model, "cross_entropy", batches)
        >>> opt = br.IVON(model.named_parameters(), lr=0.1, ess=1000, hess_init=start, hess_approx="gradsq", gradsq_scale=32)

    Source: derived here; the batch's scale as in VOGN, Khan et al. (2018), arXiv:1806.04854.
    """
    if not 0 <= floor < float("inf"):
        raise ValueError(f"start_curvature: floor must be a number >= 0, got {floor!r}")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("start_curvature: no parameter of the model wants a gradient")
    measure = output_loss(loss)
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in params.items()}
    number = 0
    with _apart(model, params.values()):
        for inputs, labels in pairs(batches, model):
            count = int((labels != IGNORED).sum()) if loss == "cross_entropy" else len(labels)
            if not count:
                continue
            outputs = outputs_of(model, inputs)
            (measure.values(outputs, measure.check(outputs, labels)).sum() / count).backward()
            for name, p in params.items():
                if p.grad is not None:
                    sums[name] += count * p.grad.to(sums[name].dtype) ** 2
                p.grad = None
            number += 1
    if not number:
        raise ValueError("start_curvature: there are no batches; give some eight")
    typical = {name: float(whole(e.mean())) / number for name, e in sums.items()}
    if strange := next((name for name, e in typical.items() if not math.isfinite(e)), None):
        raise ValueError(f"start_curvature: the gradient of {strange!r} is not finite; look at the model's outputs")
    heard = [e for e in typical.values() if e > 0] or [1.0]
    return {
        name: (e / number).clamp_min(floor * typical[name]) if typical[name] else torch.full_like(e, sum(heard) / len(heard))
        for name, e in sums.items()
    }


@contextmanager
def _apart(model: nn.Module, params: Iterable[Tensor]) -> Iterator[None]:
    """Eval mode and gradients of one's own inside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    held = [(p, p.grad) for p in params]
    for p, _ in held:
        p.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, g in held:
            p.grad = g
        for module, mode in modes:
            module.training = mode
