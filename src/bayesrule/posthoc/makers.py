"""How a posterior is made of weights that were trained with something else: the class methods of :class:`bayesrule.Posterior`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from ..drawing import whole_number
from ..estimators.output_losses import output_loss
from .dropout import dropout_parts, exact
from .laplace import Settings, laplace
from .trajectories import SWAG, Weights, one_of, second_moments, swag_posterior


class Makers:
    """Of posteriors, by class method."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    @classmethod
    def laplace(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        structure: Literal["diag", "kron", "last_layer", "full"] = "diag",
        prior_precision: float | Mapping[str, float] | Literal["marglik"] = 1.0,
        loss: Literal["cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        *,
        curvature: Literal["ggn", "fisher", "empirical"] = "ggn",
        noise_variance: float = 1.0,
        num_data: int | None = None,
        layer: str | None = None,
        max_bytes: int = 2**30,
        seed: int = 0,
    ) -> Self:
        r"""Laplace's approximation: the weights of a trained model, and the curvature of its loss around them.

        .. math::  m = \text{the weights}, \qquad S = \sum_{i=1}^N J_i^T L_i J_i + \delta I, \qquad
                   L_i = \nabla^2_f\, \ell_i, \quad J_i = \partial f_i / \partial \theta,

        of the SUM of the losses over all examples, and of it what the structure keeps. Batches stream; a forward each, and K
        backwards for K outputs with ``curvature="ggn"``, one with the others. A frozen weight is known exactly.

        ========== ================================================ ==========================================
        structure  keeps                                            takes, for P weights in layers of (O, I)
        ========== ================================================ ==========================================
        diag       the diagonal, exactly                            P
        kron       K-FAC factors of Linear and Conv weights, exact  O^2 + I^2 a layer, and O^3 + I^3 at the end
                   blocks of their biases, diagonals of all else
        last_layer all of the last ``nn.Linear``; the rest exact    its P^2; 1 forward
        full       all                                              P^2, and K P an example
        ========== ================================================ ==========================================

        The prior is added exactly, in the eigenvectors of the factors for "kron". Its mean is 0.

        Args:
            model: In eval mode; gives outputs f, shape (n, ..., K), or something with ``logits``.
            loader: Batches (inputs, targets), or mappings with ``labels`` as Hugging Face has them, each example once; read once.
            structure: See above. "kron" is a posterior of the structure "eigen".
            prior_precision: delta > 0: N times the weight decay of the mean loss; or one for each parameter, by name; or "marglik",
                which makes the data most probable by Laplace's own evidence (:mod:`bayesrule.posthoc.evidence`).
            loss: "cross_entropy" (labels, whole numbers, shape (n, ...)); "mse", which is Gaussian noise,
                |f - y|^2 / (2 noise_variance) summed over outputs; or a function of outputs and targets that returns the losses of
                the examples, shape (n,), convex in the outputs.
            curvature: "ggn" as above; "fisher": targets drawn from the model, unbiased; "empirical": squared gradients of the
                examples, which are not the curvature of a loss far from its minimum.
            noise_variance: sigma^2 of "mse", in squared units of y; the posterior's own, too.
            num_data: N, where the loader gives a sample of the examples; the curvature is scaled up.
            layer: For "last_layer" the name of another layer than the last.
            max_bytes: Largest matrix of "last_layer" and "full".
            seed: Of labels drawn for "fisher".

        Returns:
            One whose ``ess`` is N, as sensitivity and merging want it, and whose ``method_hint`` is "glm": draws of
            weights around a point that training never left predict badly (laplace-torch, issue 137).

        Raises:
            ValueError: Dropout or batch norm in training mode, targets or a loss of another kind, a prior that is not positive, no
                data.
            RuntimeError: Outputs or curvature are not finite, or it would take too many bytes; the message says how many.

        Example:
            >>> import torch, bayesrule as br
            >>> model, x = nn.Linear(2, 3).eval(), torch.randn(8, 2)
            >>> data = [(x, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))]
            >>> br.Posterior.laplace(model, data, "kron").structure
            'eigen'

        Source: D. MacKay (1992), A practical Bayesian framework for backpropagation networks; H. Ritter et al. (2018); E. Daxberger
        et al. (2021), Laplace redux, arXiv:2106.14806.
        """
        if num_data is not None:
            num_data = whole_number("num_data", num_data, 1)
        found = output_loss(loss, noise_variance)
        how = Settings(structure, prior_precision, found, curvature, num_data, layer, max_bytes, seed)
        return cls(**laplace(model, loader, how))

    @classmethod
    def from_adam(
        cls, optimizer: Any, model: nn.Module, num_data: int, prior_precision: float = 1.0, *, debias: bool = False
    ) -> Self:
        r"""A posterior from the second moments of a run of Adam, AdamW or RMSprop, of torch or of this library. Free.

        .. math::  m = \text{the weights}, \qquad s = N \sqrt{v} + \delta, \qquad v = \text{the state } \texttt{exp\_avg\_sq}.

        A rough one: v averages squares of gradients of batches, so s depends on their size. Where no data are at hand.

        Args:
            optimizer: After its last step; ``exp_avg_sq`` or ``square_avg`` in its state.
            model: What it trained. Parameters that it does not hold are known exactly.
            num_data: N, the number of training examples.
            prior_precision: delta > 0.
            debias: Whether v is divided by 1 - beta_2^t first, as Adam itself does; matters for less than some thousand steps.

        Raises:
            ValueError: There is no such state, or the model is another.

        Example:
            >>> import torch, bayesrule as br
            >>> model = nn.Linear(2, 1)
            >>> opt = torch.optim.Adam(model.parameters())
            >>> _ = model(torch.ones(1, 2)).sum().backward(), opt.step()
            >>> br.Posterior.from_adam(opt, model, num_data=100).precision["bias"]
            tensor([4.1623])

        Source: P. Nickl et al. (2023), The memory perturbation equation, arXiv:2310.19273, and its code, for this precision.
        """
        return cls(**second_moments(optimizer, model, num_data, prior_precision, debias))

    @classmethod
    def from_swag(
        cls,
        snapshots: SWAG | Iterable[Weights],
        model: nn.Module | None = None,
        *,
        rank: int = 20,
        scale: float = 0.5,
        num_data: int | None = None,
    ) -> Self:
        r"""The Gaussian of the weights that a training passed through (SWAG): a diagonal and a few directions of the covariance.

        .. math::  q = N\bigl(\bar\theta,\; s ( \operatorname{diag}(\operatorname{var} \theta_t) + \tfrac{1}{K-1} D D^T )\bigr)

        Costs K + 1 tensors of the weights; a draw K products. Weights that never moved are known exactly.

        Args:
            snapshots: A :class:`bayesrule.SWAG` that collected, or models or state dicts, in the order in which they came.
            model: Says which tensors of state dicts are weights.
            rank: K, where there is no collector.
            scale: s; 1/2 as in the paper, where each of the two parts is an estimate of the covariance. With ``rank=0`` take 1.
            num_data: Number of training examples, where known.

        Raises:
            ValueError: Fewer than two, or they never differ.

        Example:
            >>> import torch, bayesrule as br
            >>> ends = [{"w": torch.tensor([float(t), -t])} for t in range(3)]
            >>> br.Posterior.from_swag(ends).variance["w"]
            tensor([0.6458, 0.6458])

        Source: W. Maddox et al. (2019), arXiv:1902.02476.
        """
        ess = {} if num_data is None else {"ess": float(num_data)}
        return cls(**{**swag_posterior(snapshots, model, rank, scale), **ess}, num_data=num_data)

    @classmethod
    def ensemble(cls, models: Sequence[Weights], model: nn.Module | None = None) -> Self:
        """A deep ensemble: one of several trained models is right, each as likely; a mixture of points.

        Costs the memory of all. Draws take turns, so that M draws, or a multiple, are exactly the average over M members.

        Args:
            models: Models of one architecture, or state dicts.
            model: Says which tensors of state dicts are weights.

        Raises:
            ValueError: Fewer than two, or they disagree on names or shapes.

        Example:
            >>> import bayesrule as br
            >>> br.Posterior.ensemble([nn.Linear(2, 1) for _ in range(3)]).structure
            'mixture'

        Source: B. Lakshminarayanan et al. (2017), arXiv:1612.01474.
        """
        return cls(mean={}, precision={}, parts=(one_of(models, model),), method_hint="mc")

    @classmethod
    def mc_dropout(cls, model: nn.Module) -> Self:
        r"""Dropout that a model was trained with, as a posterior over weights: inputs of layers are there or not.

        .. math::  W_{oj} = z_j M_{oj} / \pi, \qquad z_j \sim \text{Bernoulli}(\pi), \qquad \pi = 1 - p.

        A draw is one mask for all examples (and positions), which is what one function of the posterior is; ``model.train()``
        would draw one for each. For ``nn.Dropout`` in front of ``nn.Linear``, and ``nn.Dropout1d``, ``2d`` and ``3d`` in front of
        convolutions, with ReLU or flattening of elements in between. ``torch.fx`` finds who reads what.

        Args:
            model: As it was trained; predict in eval mode, in which its own dropout does nothing.

        Raises:
            ValueError: No dropout, or its reader is no such layer or cannot be found; the message names both.

        Example:
            >>> import bayesrule as br
            >>> br.Posterior.mc_dropout(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))).structure
            'dropout+diag'

        Source: Y. Gal and Z. Ghahramani (2016), arXiv:1506.02142.
        """
        mean, precision = exact(model)
        parts = dropout_parts(model)
        return cls(mean=mean, precision=precision, parts=parts, method_hint="mc")
