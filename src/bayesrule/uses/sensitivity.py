r"""How much a model depends on each of its training examples: the memory-perturbation equation.

What a model would say of example i, had it been trained without i, follows from two things that a posterior knows: how uncertain
the outputs are there, :math:`V_i = J_i S^{-1} J_i^T`, and how wrong they were, :math:`e_i`:

.. math::  \Delta f_i = (1 - V_i L_i)^{-1} V_i e_i.

Nothing is retrained. Source: P. Nickl, L. Xu, D. Tailor, T. Moellenhoff and M. E. Khan (2023), The memory-perturbation equation,
arXiv:2310.19273; the Newton form and the full covariance of the outputs are ours (``docs/decisions.md``, section 15).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..drawing import whole_number
from ..estimators.batches import inputs_and_labels, on_device, pairs, rows_of
from ..estimators.output_losses import OutputLoss, output_loss
from ..posterior import Posterior
from .cautions import check_mode, check_order, checked, noise_of, of_the_sum, warn_of_certainty, warn_of_leverage, warn_of_size
from .deviations import dot, first_order, newton
from .journal import Journal, marks_of
from .products import Estimator, Products
from .removal import Group, Removal, losses_of
from .scores import LOOEstimate, Ranked, Scores, ranked

Correction = Literal["newton", "first_order"]
KEPT = 1024
"""Outputs of an example up to which their changes are kept."""


class Sensitivity:
    r"""The dependence of a model on its training data.

    The posterior is that of the sum of the losses: where its ``ess`` is not ``num_data``, it is rescaled, with a warning.

    Args:
        model: In eval mode; it is looked at in the posterior's mean, and comes back as it was.
        posterior: What was learned, of whatever structure. None is for a model trained by SGD: all variances are 1, so that
            scores are a ranking only.
        loss: "cross_entropy" of logits and classes, "bce" of logits and labels 0 or 1, "mse" of numbers with Gaussian noise, or a
            function of outputs and labels of n examples that gives n losses. Sequences have outputs (n, T, K) and labels (n, T);
            their loss is the sum over tokens.
        correction: "newton" for a Newton step on the rest of the data, exact for linear regression; "first_order" for V e.
        estimator: "vjp_jvp" for any model, a backward and a forward a product; "layerwise" for few outputs, a backward for each;
            "last_layer" for the weights of the last layer only; "mc" by draws of the weights, of the model as it is and not
            linearized. Groups, pairs and :meth:`self_scores` take all weights and products whatever it is.
        noise_variance: Of "mse"; None is the posterior's, or 1.
        error_fn: Derivative of a loss that is a function; None is torch's.
        hessian_fn: Its second derivative by example, shape (n, K, K); None is torch's.
        num_samples: Draws of "mc". Rank correlation with the exact values is about 0.8 for 32.
        seed: Which draws.
        scale: A factor of all variances, > 0. "data" is :meth:`width`, so that it does not matter how wide the posterior is; None
            is 1, and "data" for :meth:`mislabelled`.

    Raises:
        ValueError: An argument is none of the above, or names and shapes are not the model's.
        RuntimeError: The model is in training mode and has norms over the batch or dropout.

    Example:
        >>> import bayesrule as br
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
        >>> q, model = br.ridge(x, y[:, 0], penalty=1.0), nn.Linear(1, 1, bias=False)
        >>> post = br.Posterior.of(q, {"weight": (1, 1)}, ess=3, num_data=3)
        >>> Sensitivity(model, post, "mse").scores([(x, y)]).deviation[:, 0]
        tensor([ 0.0000,  0.1667, -2.6667])
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior | None,
        loss: str | OutputLoss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        *,
        correction: Correction = "newton",
        estimator: Estimator = "vjp_jvp",
        noise_variance: float | None = None,
        error_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        hessian_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        num_samples: int = 32,
        seed: int = 0,
        scale: float | Literal["data"] | None = None,
    ) -> None:
        if correction not in ("newton", "first_order"):
            raise ValueError(f"unknown correction {correction!r}; take 'newton' or 'first_order'")
        if not (scale is None or scale == "data" or (isinstance(scale, int | float) and 0 < scale < math.inf)):
            raise ValueError(f"scale must be a number > 0, 'data' or None, got {scale!r}")
        self.scale: float | str | None = scale
        self.model, self.correction = model, correction if posterior is not None else "first_order"
        if posterior is not None and "mixture" in posterior.structure:
            raise TypeError("a mixture's mean is no model; ask the posteriors that it is made of, one by one")
        self.loss = output_loss(loss, noise_of(posterior, noise_variance), error_fn, hessian_fn)
        self.posterior = None if posterior is None else of_the_sum(posterior)
        self.products = Products(model, self.posterior, estimator, num_samples, seed)
        self._data: Iterable[Any] | None = None
        self._scores: Scores | None = None

    # One by one

    def scores(
        self,
        loader: Iterable[Any],
        *,
        path: str | os.PathLike[str] | None = None,
        subset: int | None = None,
        passes: int = 1,
    ) -> Scores:
        """All that is known of each example.

        Costs, with "vjp_jvp" and "newton", some ten times a training epoch, of which the first order is a half; memory for a batch.

        Args:
            loader: Batches (inputs, labels), or mappings with ``labels``, in an order that stays.
            path: A safetensors file in which what is found is kept while it goes on; if it is there, from where it was left.
            subset: Only the first so many examples.
            passes: Of a loader that augments at random: averages over so many passes, each of which leaves out the copy that it
                sees. The number of examples is that of the distinct ones.

        Raises:
            ValueError: There is no data, labels do not suit the outputs, or the file is of another model or data.
        """
        if whole_number("passes", passes, 1) > 1 and path is not None:
            raise ValueError(f"a file keeps the scores of one pass, and passes is {passes}; take path=None")
        self._check_state()
        found: list[Scores] = []
        for _ in range(passes):
            found.append(self._scored(loader, path, subset))
        self._data, self._scores = loader, found[0] if passes == 1 else Scores.average(found)
        warn_of_leverage(self._scores.leverage)
        return self._scores

    def _scored(self, loader: Iterable[Any], path: str | os.PathLike[str] | None, subset: int | None) -> Scores:
        """One pass."""
        check_order(loader)
        self._set_scale(loader, self.scale)
        journal = Journal(path, self._fingerprint(), [one.name for one in fields(Scores)])
        seen = 0
        with self.products.at_the_mean():
            for batch in loader:
                inputs, labels = inputs_and_labels(batch, self.model)
                if subset is not None and seen + len(labels) > subset:
                    kept = slice(0, subset - seen)
                    inputs, labels = rows_of(inputs, kept, len(labels)), labels[kept]
                marks = marks_of(inputs, len(labels))
                known = journal.known(seen, labels, marks)
                if known < len(labels):
                    rest = slice(known, len(labels))
                    inputs, asked = on_device(self.model, rows_of(inputs, rest, len(labels))), labels[rest]
                    journal.add(self._of(inputs, asked.to(next(self.model.parameters()).device)), asked, marks[known:])
                seen += len(labels)
                if subset is not None and seen >= subset:
                    break
        if not seen:
            raise ValueError("there are no examples: the loader gave no batch")
        if subset is None:
            warn_of_size(self.posterior, seen)
        return Scores(**journal.finish(seen))

    def _of(self, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """The scores of a batch."""
        loss = self.loss
        values, times = self.products.of(inputs)
        labels = checked(loss, values, labels)
        slopes = loss.slopes(values, labels)
        if self.correction == "newton":
            found = newton(times, lambda rows: loss.slopes(values[rows], labels[rows]), len(values))
        else:
            found = first_order(times, slopes)
        moved = values + found.outputs
        change = loss.change(values, found.outputs)
        size = sum(p.numel() for p in self.products.params.values())
        right, loo_right = loss.correct(values, labels), loss.correct(moved, labels)
        flat = values[:1].numel() <= KEPT
        scores = {
            "loss": loss.values(values, labels),
            "loo_loss": loss.values(moved, labels),
            "sensitivity": change.abs().flatten(1).sum(1),
            "self_influence": dot(slopes.error, found.first),
            "cook": dot(found.weighted, found.outputs) / size,
            "leverage": found.leverage,
            "correct": values.new_full((len(values),), -1.0) if right is None else right.to(values.dtype),
            "loo_correct": values.new_full((len(values),), -1.0) if loo_right is None else loo_right.to(values.dtype),
            "deviation": found.outputs if flat else values.new_zeros(len(values), 0),
            "probability_deviation": change if flat else values.new_zeros(len(values), 0),
        }
        return {name: t.detach().cpu() for name, t in scores.items()}

    def width(self, loader: Iterable[Any], probes: int = 4) -> float:
        r"""By how much to multiply all variances, so that examples pull as far as the curvature of the data allows.

        .. math::  \alpha = \frac{E[g^T S^{-1} g]}{E[g^T S^{-1} H S^{-1} g]}, \qquad g = \sum_i \pm \nabla \ell_i, \qquad
                   H = \sum_i J_i^T L_i J_i + S_0

        The step along :math:`S^{-1} g` that lowers the losses most, on average over random signs. It is 1 where S is H, as for a
        full Laplace posterior at its mode; less where weights are taken to be independent, whose variances add up to more than
        the outputs have. Costs some four epochs for each probe. In a wrong direction the best step is short, so estimates scaled
        by it err towards the training loss; rankings are what it is good for.

        Args:
            loader: The training data.
            probes: Draws of signs.
        """
        self._check_state()
        if iter(loader) is loader:
            raise ValueError("the width is found by several passes; pass a loader that can be read more than once")
        before, self.products.factor = self.products.factor, 1.0
        try:
            return Group(self.products, self.loss, self.correction).width(lambda: pairs(loader, self.model), probes, seed=0)
        finally:
            self.products.factor = before

    def _set_scale(self, loader: Iterable[Any], scale: float | str | None) -> None:
        self.products.factor = self.width(loader) if scale == "data" else 1.0 if scale is None else float(scale)

    def loo(self, loader: Iterable[Any], **how: Any) -> LOOEstimate:
        """What leave-one-out cross-validation would say, without training anything again; costs as :meth:`scores`.

        Example:
            >>> model = nn.Linear(2, 3).eval()
            >>> data = [(torch.eye(2), torch.tensor([0, 2]))]
            >>> posterior = Posterior.laplace(model, data)
            >>> estimate = Sensitivity(model, posterior).loo(data)
            >>> estimate.nll > estimate.train_nll
            True
        """
        found = self.scores(loader, **how)
        right = found.loo_correct.double()
        accuracy = float("nan") if bool((right < 0).any()) else right.mean().item()
        return LOOEstimate(found.loo_loss.double().mean().item(), accuracy, found.loo_loss, found.loss.double().mean().item())

    def self_scores(self, loader: Iterable[Any]) -> Tensor:
        r"""The self-influence of each example alone, :math:`\langle \nabla \ell_i, S^{-1} \nabla \ell_i \rangle`, shape (N,).

        Costs one backward, and no more memory: the cheapest of all scores.
        """
        self._check_state()
        self._set_scale(loader, self.scale)
        found = []
        with self.products.at_the_mean():
            for inputs, labels in pairs(loader, self.model):
                found.append(self.products.of_losses(partial(losses_of, self.model, self.loss, inputs, labels)).cpu())
        if not found:
            raise ValueError("there are no examples: the loader gave no batch")
        return torch.cat(found)

    def top(self, k: int, score: str = "sensitivity") -> Ranked:
        """The k examples of the data last scored that the model depends on most.

        Raises:
            RuntimeError: Nothing was scored yet.
        """
        if self._scores is None:
            raise RuntimeError("nothing was scored yet: call scores(loader) first")
        return ranked(self._scores.by(score), k)

    def mislabelled(self, loader: Iterable[Any], k: int | None = None, *, score: str = "loo_loss", **how: Any) -> Ranked:
        """The examples whose labels look wrong, the most suspicious first.

        Where the posterior is wider than the data say, the ranking by leave-one-out losses is one by leverage, and worse than that
        by plain losses; hence the ``scale`` "data", if none was given.

        Args:
            loader: The training data.
            k: How many; None ranks all.
            score: What to rank by: "loo_loss", or any other of :class:`Scores`. "loss" is plain training loss.
            **how: As :meth:`scores`.
        """
        if score == "leverage" and self.correction == "first_order":
            raise ValueError("the first order knows no leverage; take correction='newton', or another score")
        scale = self.scale
        try:
            self.scale = "data" if scale is None and score != "loss" else scale
            return ranked(self.scores(loader, **how).by(score), k)
        finally:
            self.scale = scale
            self.products.factor = 1.0 if scale is None else self.products.factor

    # Together

    def remove(self, indices: Any, loader: Iterable[Any] | None = None) -> Removal:
        """What would change if some examples were taken away together.

        Costs a few passes over these examples, forward and backward.

        Args:
            indices: Their numbers in the data, or a mask.
            loader: The training data; None is what was scored last.

        Raises:
            ValueError: There are none, or a number is not in the data.

        Warns:
            UserWarning: They are more than a tenth of the data: the estimate is a ranking at best.
        """
        chosen = torch.as_tensor(indices).reshape(-1)
        chosen = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        if chosen.is_floating_point() or bool((chosen < 0).any()):
            raise ValueError(f"examples are named by whole numbers from 0 on, or by a mask of them, got {indices!r}")
        return self._removed(loader, lambda numbers, _: torch.isin(numbers, chosen), chosen)

    def leave_class_out(self, label: int, loader: Iterable[Any] | None = None) -> Removal:
        """What would change if all examples of a class were taken away; else as :meth:`remove`."""
        return self._removed(loader, lambda _, labels: labels.cpu() == label, None)

    def _removed(self, loader: Iterable[Any] | None, choose: Callable[[Tensor, Tensor], Tensor], wanted: Tensor | None) -> Removal:
        data = self._data if loader is None else loader
        if data is None:
            raise ValueError("there is no data: pass the loader, or call scores(loader) before")
        self._check_state()
        self._set_scale(data, self.scale)
        total, numbers, parts = 0, list[Tensor](), list[tuple[Any, Tensor]]()
        for batch in data:
            inputs, labels = inputs_and_labels(batch, self.model)
            here = torch.arange(total, total + len(labels))
            rows = choose(here, labels).view(len(labels), -1).any(1).nonzero()[:, 0]
            if len(rows):
                numbers.append(here[rows])
                parts.append((rows_of(inputs, rows, len(labels)), labels[rows]))
            total += len(labels)
        indices = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)
        if not len(indices) or (wanted is not None and len(indices) < len(wanted.unique())):
            asked = "no example" if wanted is None else f"{len(wanted.unique())} examples"
            raise ValueError(f"{asked} to take away, and {len(indices)} of them are among the {total} of the data")
        if len(indices) > total / 10:
            kind = "first-order" if self.correction == "first_order" else "Newton"
            share = f"{100 * len(indices) / total:.0f}%"
            warnings.warn(f"{kind} estimate removes {share} of the data; values are a ranking only", UserWarning, stacklevel=3)
        return Group(self.products, self.loss, self.correction).removal(indices, parts)

    def pairwise_scores(self, query: Iterable[Any], train: Iterable[Any]) -> Tensor:
        r"""How much the loss of each query grows to first order if a training example is taken away, shape (queries, N).

        .. math::  e_j^T V_{ji} e_i = \langle \nabla \ell_j, S^{-1} \nabla \ell_i \rangle

        Costs a gradient for each query, which are kept, and a backward over the training data with a product for each query.
        """
        self._check_state()
        self._set_scale(train, self.scale)
        return Group(self.products, self.loss, self.correction).influence(pairs(query, self.model), pairs(train, self.model))

    # Checks

    def _check_state(self) -> None:
        check_mode(self.model)
        warn_of_certainty(self.products.spread.names)

    def _fingerprint(self) -> dict[str, Any]:
        """What scores depend on."""
        products, digest = self.products, hashlib.sha256()
        named = {**dict(self.model.named_buffers()), **(products.params if self.posterior is None else self.posterior.mean)}
        spread = products.spread.variance
        for name, t in (*named.items(), *spread.items()):
            digest.update(name.encode())
            digest.update(t.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() if t.dim() else str(t.item()).encode())
        for part in () if self.posterior is None else self.posterior.parts:
            for t in part.tensors()[0].values():
                digest.update(t.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
        how = {"correction": self.correction, "estimator": products.estimator, "scale": f"{products.factor:.4g}"}
        draws = {"draws": products.num_samples, "seed": products.seed} if products.estimator == "mc" else {}
        function = getattr(self.loss, "function", None)
        loss = repr(self.loss) if function is None else getattr(function, "__qualname__", type(function).__name__)
        return {**how, **draws, "loss": loss, "model": digest.hexdigest()}
