"""How an adaptation finds its minimum: exactly by Newton's method, batch by batch, or with draws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...estimators.pushing import Push
from ...optimizers.first_order import Adam
from ...optimizers.variational import IVON
from ...posterior import Posterior
from .objectives import Objective

Solver = Literal["adam", "newton", "ivon"] | Callable[[list[nn.Parameter]], Any]
SOLVERS = ("adam", "newton", "ivon")


@contextmanager
def moving(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Only these parameters have gradients; where something fails, they come back as they were. Gradients are as before."""
    wanted, before = set(names), []
    for name, p in model.named_parameters():
        before.append((p, p.requires_grad, p.grad, p.detach().clone() if name in wanted else None))
        p.requires_grad_(name in wanted)
        p.grad = None
    try:
        with torch.enable_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for p, _, _, old in before:
                if old is not None:
                    p.copy_(old)
        raise
    finally:
        for p, required, grad, _ in before:
            p.requires_grad_(required)
            p.grad = grad


def newton(objective: Objective, solve: Callable[[Tensor], Tensor], steps: int = 100) -> None:
    """Newton's method on the Gauss-Newton matrix, by conjugate gradients, with steps that only go down.

    Costs, for each product, a forward derivative and a backward over all examples. It ends where there are some 1e-3 nats to gain
    in single precision, 1e-15 in double, or where rounding hides what there is.

    Args:
        objective: Its weights move to the minimum.
        solve: Products with an approximate inverse of the matrix.
        steps: At most so many.

    Warns:
        RuntimeWarning: They did not suffice.
    """
    push, value = Push(objective.model), objective.value()
    rounding = torch.finfo(objective.theta.dtype).eps
    enough = 1e-3 if rounding > 1e-10 else 1e-15  # nats
    for _ in range(steps):
        gradient = objective.gradient()
        drop = float(gradient @ solve(gradient))
        if not math.isfinite(drop):
            raise RuntimeError("the gradient is not finite; look at the model's outputs")
        if drop == 0:
            return
        size = 1 + abs(value)
        step = conjugate_gradients(lambda v: objective.product(v, push), -gradient, solve, min(0.1, math.sqrt(drop / size)))
        start, fall = objective.theta, float(gradient @ step)
        for halving in range(20):
            objective.put(start + step * 0.5**halving)
            found = objective.value()
            if found <= value + 1e-4 * 0.5**halving * fall + 16 * rounding * size:
                break
        else:
            objective.put(start)
            return  # as far as rounding lets it
        value = found
        if drop <= enough:
            return
    warnings.warn(f"Newton's method still falls by {drop:.2g} nats after {steps} steps", RuntimeWarning, stacklevel=3)


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, solve: Callable[[Tensor], Tensor], tolerance: float, most: int = 250
) -> Tensor:
    """x with A x = b, up to a share of b.

    Args:
        times: Products with A, symmetric; a direction along which it is not positive ends the search.
        b: Shape (P,).
        solve: Products with an approximate inverse of A.
        tolerance: Of the residual, as a share of b, in the metric of ``solve``.
        most: Products at most.
    """
    x, residual = torch.zeros_like(b), b.clone()
    z = solve(residual)
    direction, size = z, residual @ z
    first = size
    for number in range(most):
        image = times(direction)
        inside = direction @ image
        if inside <= 0:
            return z if number == 0 else x
        step = size / inside
        x, residual = x + step * direction, residual - step * image
        z = solve(residual)
        now = residual @ z
        if now <= tolerance**2 * first:
            return x
        direction, size = z + (now / size) * direction, now
    return x


def descend(
    objective: Objective,
    make: Callable[[list[nn.Parameter]], Any],
    epochs: int,
    batch_size: int,
    seed: int,
    pulled: bool = True,
) -> Any:
    """Steps of an optimizer on batches of added and remembered examples, at a rate that falls to zero as a cosine.

    Args:
        objective: Its weights move.
        make: From the parameters to the optimizer.
        epochs: How often every example is seen.
        batch_size: Examples in a batch.
        seed: Of their order.
        pulled: Whether the pull is in the gradient, and not the optimizer's own prior.

    Raises:
        RuntimeError: The loss is no longer finite.
    """
    optimizer, count = make(objective.params), len(objective.losses) if objective.losses is not None else 1
    generator, steps = torch.Generator().manual_seed(seed), epochs * -(-count // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    drawn = getattr(optimizer, "sampled_params", None)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(batch_size):
            optimizer.zero_grad()
            with nullcontext() if drawn is None else drawn(train=True):
                value = objective.backward(rows, pulled)
            if not math.isfinite(value):
                raise RuntimeError(f"the adaptation diverged: a batch has the loss {value}; take a smaller lr")
            optimizer.step()
            schedule.step()
    return optimizer


def adam(lr: float | None) -> Callable[[list[nn.Parameter]], Any]:
    """The default."""
    return lambda params: Adam(params, lr=5e-3 if lr is None else lr)


def ivon(lr: float | None, prior: Posterior, curvature: dict[str, Tensor], ess: float, seed: int, named: Any) -> Any:
    """IVON from a posterior as its prior, whose curvature begins in the data at hand."""
    start: Any = {name: (h / ess).clamp_min(1e-8) for name, h in curvature.items()}
    how: dict[str, Any] = {"betas": (0.9, 0.999), "rescale_lr": False, "seed": seed}
    return lambda _: IVON(named, lr=0.1 if lr is None else lr, ess=ess, hess_init=start, prior=prior, **how)
