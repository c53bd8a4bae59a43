"""How sure a model is of each weight, where training left no posterior: a file beside the weights, for merging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ...posterior import Posterior
from ...storage import write_tensors
from .folders import short, sidecar_metadata

Way = Literal["squared_gradients", "ggn", "observed"]
CURVATURES: Mapping[str, Literal["fisher", "ggn", "empirical"]] = {
    "squared_gradients": "fisher",
    "ggn": "ggn",
    "observed": "empirical",
}
"""What each way is in :meth:`bayesrule.Posterior.laplace`."""


def precision(
    model: nn.Module,
    loader: Iterable[Any],
    method: Way = "squared_gradients",
    *,
    prior_precision: float = 1e-3,
    loss: Literal["cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    num_data: int | None = None,
    seed: int = 0,
) -> Posterior:
    r"""How sure a trained model is of its weights: a diagonal posterior, for merging.

    .. math::  S = \sum_{i=1}^N g_i^2 + \delta, \qquad g_i = \nabla_\theta \log p(y_i \mid x_i, \theta), \quad
               y_i \sim p(y \mid x_i, \theta),

    example by example, on the scale of the sum over all examples, as merging wants it. Costs a forward and a backward an example;
    ``ggn`` as many backwards as there are outputs, and has no noise of labels. A weight that does not require a gradient is not in
    it. Training with :class:`bayesrule.IVON` leaves such a posterior without any pass.

    Args:
        model: In eval mode.
        loader: Batches (inputs, targets), or mappings with ``labels``, each example once. Targets count for "observed" only.
        method: "squared_gradients" of labels drawn from the model; "ggn", the diagonal Gauss-Newton matrix; "observed", squared
            gradients of the labels that are there.
        prior_precision: :math:`\delta` > 0: N times the weight decay of the mean loss.
        loss: As of :meth:`bayesrule.Posterior.laplace`.
        num_data: N, where the loader gives a sample of the examples; the sum is scaled up.
        seed: Of the labels that are drawn.

    Raises:
        ValueError: The method is unknown, delta is not positive, or the model or the data are not as they should be.

    Example:
        >>> import torch, bayesrule as br
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> br.precision(nn.Linear(2, 3).eval(), data, num_data=100).num_data
        100

    Source: N. Daheim et al. (2024), arXiv:2310.12808, for squared gradients of drawn labels.
    """
    if method not in CURVATURES:
        raise ValueError(f"unknown method {method!r}; take {', '.join(map(repr, get_args(Way)))}")
    how: Any = {"curvature": CURVATURES[method], "num_data": num_data, "seed": seed}
    return Posterior.laplace(model, loader, "diag", prior_precision, loss, **how)


def save_precision(path: str | os.PathLike[str], posterior: Posterior) -> None:
    """Write the precision of a diagonal posterior as a file that merging finds beside the weights, whole or not at all.

    Args:
        path: precision.safetensors in the folder of the model.
        posterior: Of its weights; what is known exactly is left out. Where ``num_data`` is known, it is scaled to all examples.

    Raises:
        OSError: It cannot be written.
    """
    learned = {name: s for name, s in posterior.precision.items() if not bool(s.isinf().any())}
    factor = (posterior.num_data or posterior.ess) / posterior.ess
    priors = {name: t for name, t in (posterior.prior_precision or {}).items() if name in learned and t.dim() == 0}
    about = sidecar_metadata("posterior", {short(name): factor * t.item() for name, t in priors.items()})
    write_tensors(path, {short(name): (factor * s).float() for name, s in learned.items()}, about)
