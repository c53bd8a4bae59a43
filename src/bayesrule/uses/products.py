r"""Products with the covariance of outputs under a posterior, :math:`V_i v = J_i S^{-1} J_i^T v`, by one of several ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..drawing import Draws, kept
from ..estimators.batches import examples_in, outputs_of, rows_of
from ..estimators.calls import Inseparable
from ..estimators.linearized import Block, Linearized, Spread
from ..estimators.per_example import variances
from ..estimators.pushing import Push
from ..posterior import Posterior
from .deviations import Times

Estimator = Literal["vjp_jvp", "layerwise", "last_layer", "mc"]
ESTIMATORS = ("vjp_jvp", "layerwise", "last_layer", "mc")
LIMIT = 2**32
"""Bytes that a single example may take."""
HELD = 2**30
"""Bytes that a batch may take; larger ones are halved."""


class Products:
    """A model at the mean of a posterior, and the covariance of its outputs.

    Args:
        model: In eval mode.
        posterior: Over parameters of the model by name; None gives all of them the variance 1.
        estimator: ``vjp_jvp`` takes a backward and a forward a product, whatever the number of outputs; ``layerwise`` a backward
            for each output, once; ``last_layer`` does as ``vjp_jvp`` for the weights of the last layer alone; ``mc`` takes
            draws of the weights.
        num_samples: Draws of ``mc``.
        seed: Which draws.
    """

    def __init__(
        self, model: nn.Module, posterior: Posterior | None, estimator: Estimator, num_samples: int = 32, seed: int = 0
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; take one of {', '.join(map(repr, ESTIMATORS))}")
        if estimator == "mc" and posterior is None:
            raise ValueError("the estimator 'mc' draws from a posterior, and there is none; take 'vjp_jvp'")
        self.model, self.posterior, self.estimator = model, posterior, estimator
        self.num_samples, self.seed, self.cheaper = num_samples, seed, "'vjp_jvp', or 'last_layer'"
        self.factor = 1.0  # of all variances
        self.params: dict[str, Tensor] = dict(model.named_parameters()) if posterior is None else dict(posterior.bind(model))
        self.spread, self._together, self._push = _spread(posterior, self.params), True, Push(model)

    @contextmanager
    def at_the_mean(self) -> Iterator[None]:
        """The mean stands in the parameters, and all of them that vary have gradients; leaving brings back what was there."""
        before = {p: p.requires_grad for p in self.model.parameters()}
        with torch.inference_mode(False), torch.enable_grad(), kept(self.params.values()):
            try:
                with torch.no_grad():
                    for name, p in self.params.items():
                        if self.posterior is not None:
                            p.copy_(self.posterior.mean[name])
                for name in self.spread.names:
                    self.params[name].requires_grad_()
                yield
            finally:
                for p, requires in before.items():
                    p.requires_grad_(requires)

    def of(self, inputs: Any) -> tuple[Tensor, Times]:
        """The outputs for a batch, shape (n, ...), and products with their covariance; at the mean."""
        values, times = self._of(inputs)
        own, wide = values.dtype, torch.promote_types(values.dtype, torch.float32)
        return values.to(wide), lambda v, rows: times(v.to(own), rows).to(wide) * self.factor

    def solve(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The covariance of the weights times a vector by name."""
        return {name: each * self.factor for name, each in self._solve(v).items()}

    def _solve(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: s * v[name] for name, s in self.spread.variance.items()}
        for block in self.spread.blocks:
            found |= {name: each[0] for name, each in block.solve_each({name: v[name][None] for name in block.names}).items()}
        return found

    def _of(self, inputs: Any) -> tuple[Tensor, Times]:
        if self.estimator == "mc":
            return self._by_draws(inputs)
        if self.estimator == "layerwise":
            values, matrix = self._or_one_by_one(self._covariance, inputs, True)
            return values, lambda v, rows: (matrix[rows] @ v.to(matrix).flatten(1)[:, :, None]).view_as(v)
        if not self._together:
            with torch.no_grad():
                values = outputs_of(self.model, inputs)
            return values, partial(self._each_alone, inputs)
        model, spread, call = self._called(inputs)
        whole = Linearized(model, lambda: call(slice(None)), spread)

        def together(v: Tensor, rows: Tensor) -> Tensor:
            if len(rows) == len(whole.values):
                return whole.times(v)
            return Linearized(model, lambda: call(rows), spread).times(v)

        def times(v: Tensor, rows: Tensor) -> Tensor:
            if self._together:
                try:
                    return together(v, rows)
                except Inseparable as error:
                    self._part(error)
            return self._each_alone(inputs, v, rows)

        return whole.values, times

    def _each_alone(self, inputs: Any, v: Tensor, rows: Tensor) -> Tensor:
        """Products of examples that go one by one, each by a plain backward and a push."""
        params, found = {name: self.params[name] for name in self.spread.names}, list[Tensor]()
        for i, own in zip(rows.tolist(), v, strict=True):
            one = rows_of(inputs, slice(i, i + 1), examples_in(inputs))
            with torch.enable_grad():
                values = outputs_of(self.model, one)
                back = torch.autograd.grad(values, list(params.values()), own[None].to(values), allow_unused=True)
            pulled = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), back, strict=True)}
            found.append(self._push.along(self._solve(pulled), partial(outputs_of, self.model, one)))
        return torch.cat(found).to(v)

    def _part(self, error: Inseparable) -> None:
        """From now on examples go alone; said once."""
        warnings.warn(f"{error}; until then examples go one by one, which is slow", UserWarning, stacklevel=4)
        self._together = False

    def of_losses(self, losses: Callable[[], Tensor]) -> Tensor:
        """The variance of one number of each example, shape (n,)."""
        return Linearized(self.model, losses, self.spread).covariance()[:, 0, 0] * self.factor

    def covariance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The outputs for a batch, shape (n, ...), and the covariance of each example's, (n, K, K) for K outputs."""
        values, matrix = self._or_one_by_one(self._covariance, inputs, True)
        return values, matrix * self.factor

    def variance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The outputs for a batch, and the variance of each, both (n, ...): the diagonals of :meth:`covariance`."""
        values, variance = self._or_one_by_one(self._variance, inputs, False)
        return values, variance * self.factor

    def _or_one_by_one(
        self, together: Callable[[Any], tuple[Tensor, Tensor]], inputs: Any, matrices: bool
    ) -> tuple[Tensor, Tensor]:
        """Where layers cannot tell examples apart, each goes alone; said once."""
        if self._together:
            try:
                return together(inputs)
            except Inseparable as error:
                self._part(error)
        n = examples_in(inputs)
        each = [self._alone(rows_of(inputs, slice(i, i + 1), n), matrices) for i in range(n)]
        return torch.cat([values for values, _ in each]), torch.cat([found for _, found in each])

    def _alone(self, inputs: Any, matrices: bool) -> tuple[Tensor, Tensor]:
        """Of one example, by its Jacobian."""
        model, spread, call = self._called(inputs)
        params = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in spread.names}
        with torch.enable_grad():
            values = call(slice(None))
        count = values.numel()
        if (needed := 4 * count * sum(p.numel() for p in params.values())) > LIMIT:
            raise RuntimeError(f"the gradients of an example take {needed / 2**30:.1f} GiB; take {self.cheaper}")
        units = torch.eye(count, dtype=values.dtype, device=values.device).view(count, *values.shape)
        of = [torch.autograd.grad(values, list(params.values()), u, retain_graph=True, allow_unused=True) for u in units]
        jacobian = {
            name: torch.stack([torch.zeros_like(p) if each[at] is None else each[at] for each in of])
            for at, (name, p) in enumerate(params.items())
        }
        moved = {name: jacobian[name] * s.to(values.device) for name, s in spread.variance.items()}
        for block in spread.blocks:
            moved |= block.solve_each({name: jacobian[name] for name in block.names})
        found = [(jacobian[name].flatten(1), moved[name].flatten(1)) for name in jacobian]
        if matrices:
            return values.detach(), torch.stack([a @ b.mT for a, b in found]).sum(0)[None]
        return values.detach(), torch.stack([(a * b).sum(1) for a, b in found]).sum(0).view(values.shape)

    def _covariance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        model, spread, call = self._called(inputs)
        whole = Linearized(model, lambda: call(slice(None)), spread)
        n, each = len(whole.values), whole.bytes
        if each > LIMIT:
            raise RuntimeError(
                f"the covariance of {whole.values[:1].numel()} outputs takes {each / 2**30:.1f} GiB an example; take {self.cheaper}"
            )
        if n > 1 and n * each > HELD:
            del whole
            halves = [self._covariance(rows_of(inputs, rows, n)) for rows in (slice(0, n // 2), slice(n // 2, n))]
            return torch.cat([values for values, _ in halves]), torch.cat([matrix for _, matrix in halves])
        return whole.values, whole.covariance()

    def _variance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        if self.estimator == "last_layer":
            layer, spread, features = self._last_layer(inputs)
            if not spread.blocks:
                return _in_closed_form(layer, spread, features)
        model, spread, call = self._called(inputs)
        if not spread.blocks:
            seen: list[Tensor] = []

            def outputs() -> Tensor:
                seen[:] = [call(slice(None))]
                return seen[0].flatten(1) if seen[0].dim() > 1 else seen[0]

            found = variances(model, outputs, spread.variance)
            return seen[0].detach(), found.view(seen[0].shape)
        whole = Linearized(model, lambda: call(slice(None)), spread)
        n, each = len(whole.values), whole.bytes // max(1, whole.values[:1].numel())
        if each > LIMIT:
            raise RuntimeError(f"the variance of an output takes {each / 2**30:.1f} GiB an example; take {self.cheaper}")
        if n > 1 and n * each > HELD:
            del whole
            halves = [self._variance(rows_of(inputs, rows, n)) for rows in (slice(0, n // 2), slice(n // 2, n))]
            return torch.cat([values for values, _ in halves]), torch.cat([found for _, found in halves])
        return whole.values, whole.variance()

    def _called(self, inputs: Any) -> tuple[nn.Module, Spread, Callable[[Any], Tensor]]:
        """What is linearized: a module, the covariance of its weights, and what calls it on some of the inputs."""
        if self.estimator == "last_layer":
            layer, spread, features = self._last_layer(inputs)
            return layer, spread, lambda rows: layer(features[rows])
        return self.model, self.spread, self._call(inputs)

    def _call(self, inputs: Any) -> Callable[[Any], Tensor]:
        def call(rows: Any) -> Tensor:
            return outputs_of(self.model, inputs if isinstance(rows, slice) else rows_of(inputs, rows, examples_in(inputs)))

        return call

    def _last_layer(self, inputs: Any) -> tuple[nn.Linear, Spread, Tensor]:
        """The layer that gives the outputs, the covariance of its weights, and what goes in."""
        name, layer, features = last_layer(self.model, inputs)
        own = {f"{name}.{p}".lstrip("."): p for p, _ in layer.named_parameters()}
        variance = {own[full]: s for full, s in self.spread.variance.items() if full in own}
        blocks = [_within(block, own, self.params) for block in self.spread.blocks if any(full in own for full in block.names)]
        return layer, Spread(variance, blocks), features

    @torch.no_grad()
    def _by_draws(self, inputs: Any) -> tuple[Tensor, Times]:
        assert self.posterior is not None
        values = outputs_of(self.model, inputs)
        draws, found = Draws(self.posterior, self.params, self.seed), list[Tensor]()
        with kept(self.params.values()):
            for draw in range(self.num_samples):
                draws.write(draw)
                drawn = outputs_of(self.model, inputs)
                if self.posterior.is_gaussian:
                    draws.mirror()
                    drawn = (drawn - outputs_of(self.model, inputs)) / 2
                found.append(drawn)
        offsets = torch.stack(found)
        if not self.posterior.is_gaussian:
            offsets = offsets - offsets.mean(0)

        def times(v: Tensor, rows: Tensor) -> Tensor:
            own = offsets[:, rows]
            return (own * (own * v).flatten(2).sum(2).view(*own.shape[:2], *[1] * (v.dim() - 1))).mean(0)

        return values, times


def last_layer(model: nn.Module, inputs: Any) -> tuple[str, nn.Linear, Tensor]:
    """The linear layer that gives a model's outputs: its name, itself, and what goes in.

    Raises:
        ValueError: There is none.
    """
    seen: list[tuple[str, nn.Linear, Tensor, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, module, args[0], out)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            outputs = outputs_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, features, out in reversed(seen):
        if isinstance(out, Tensor) and out.shape == outputs.shape and out.data_ptr() == outputs.data_ptr():
            return name, module, features
    raise ValueError("the model's outputs come from no linear layer, which is what 'last_layer' needs; take another estimator")


@torch.no_grad()
def _in_closed_form(layer: nn.Linear, spread: Spread, features: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a linear layer whose weights are independent, and their variances."""
    values, wide = layer(features), torch.promote_types(layer.weight.dtype, torch.float32)
    of = {name: s.to(values.device, wide) for name, s in spread.variance.items()}
    found = torch.zeros(values.shape, dtype=wide, device=values.device)
    if "weight" in of:
        found = found + features.to(wide).square() @ of["weight"].mT
    return values, found + of["bias"] if "bias" in of else found


def _spread(posterior: Posterior | None, params: Mapping[str, Tensor]) -> Spread:
    """The covariance of the weights that are not known exactly."""
    if posterior is None:
        return Spread({name: torch.ones_like(p) for name, p in params.items() if p.requires_grad})
    together = {name for part in posterior.parts for name in part.names}
    variance = {name: 1 / s for name, s in posterior.precision.items() if name not in together}
    return Spread(
        {name: s for name, s in variance.items() if s.any()},
        [Block(part.names, part.solve_each) for part in posterior.parts],
    )


def _within(block: Block, own: Mapping[str, str], params: Mapping[str, Tensor]) -> Block:
    """The part of a block that belongs to a layer, under the layer's names; the other weights of the block may be anything."""
    inside = [name for name in block.names if name in own]

    def solve_each(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(v.values()))
        zeros = {name: like.new_zeros(1).expand(len(like), *params[name].shape) for name in block.names if name not in own}
        solved = block.solve_each({name: v[own[name]] if name in own else zeros[name] for name in block.names})
        return {own[name]: solved[name] for name in inside}

    return Block([own[name] for name in inside], solve_each)
