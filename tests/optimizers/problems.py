"""What the tests of draws share: models with their optimizers, the bindings that make a step, and ways to compare runs."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat, state
from tests.optimizers.conftest import MADE, everything
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bayesrule as br

APPROXIMATIONS = [
    pytest.param(dict(hess_approx="price"), id="price"),
    pytest.param(dict(hess_approx="gradsq", gradsq_scale=8.0), id="gradsq"),
]


# Models and their optimizers


def pair(dtype: torch.dtype = torch.float32, make: Callable[[], nn.Module] | None = None, **hyper: Any) -> tuple[Any, br.IVON]:
    model = make() if make else Network(dtype)
    return model, br.IVON(model.parameters(), **{**SMALL_IVON, **hyper})


def pair64(**hyper: Any) -> tuple[Any, br.IVON]:
    return pair(torch.float64, **hyper)


class Linear(nn.Linear):
    """A picklable model that may be given its input by name."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        nn.init.constant_(self.weight, 0.5)
        nn.init.constant_(self.bias, 0.1)


X = torch.linspace(-1, 2, 12).view(4, 3)


class Wrapper(nn.Module):
    """As compilers and parallel wrappers are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def fresh(
    dtype: torch.dtype = torch.float32, groups: Callable[[Network], Any] | None = None, **hyper: Any
) -> tuple[Network, br.IVON]:
    """A model and its optimizer at the start; the same two each time, since to make them takes longer than to train them."""
    key = repr((dtype, groups, hyper))
    if key not in MADE:
        model = Network(dtype)
        optimizer = br.IVON(groups(model) if groups else model.parameters(), **{**SMALL_IVON, **hyper})
        MADE[key] = model, optimizer, *copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, weights, saved = MADE[key]
    optimizer.load_state_dict(copy.deepcopy(saved))
    model.load_state_dict(weights)
    model.train().zero_grad()
    return model, optimizer


# The bindings: each makes one step on the mean gradient of some micro-batches


def backward(model: Network, batch: int, share: float = 1.0) -> Tensor:
    loss = model.loss(batch) * share
    loss.backward()
    return loss


def context(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    with optimizer.sampled_params(train=True):
        for batch in batches:
            backward(model, batch, 1 / len(batches))
    optimizer.step()


def closure(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    def look() -> Tensor:
        optimizer.zero_grad()
        return torch.stack([backward(model, batch, 1 / len(batches)).detach() for batch in batches]).sum()

    optimizer.step(look)


def switched(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """Told before every forward."""
    for batch in batches:
        optimizer.train()
        backward(model, batch, 1 / len(batches))
    optimizer.step()
    optimizer.eval()
    optimizer.zero_grad()


def ordinary(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """A loop for any optimizer; draws if it is attached."""
    optimizer.zero_grad()
    for batch in batches:
        backward(model, batch, 1 / len(batches))
    optimizer.step()


def run(
    step: Callable[..., None],
    attached: bool = False,
    *,
    micro: int = 1,
    steps: int = 3,
    schedule: Callable[[Any], Any] | None = None,
    **made: Any,
) -> dict[str, Tensor]:
    """Train with one binding; all weights and state."""
    model, optimizer = fresh(**made)
    scheduler = schedule(optimizer) if schedule else None
    hooks = optimizer.attach(model) if attached else None
    for number in range(steps):
        step(model, optimizer, range(number * micro, (number + 1) * micro))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler:
            scheduler.step()
    if hooks:
        hooks.remove()
    return everything(optimizer)


@functools.cache
def by_context(**how: Any) -> dict[str, Tensor]:
    """What the context reaches: the measure of the others."""
    return run(context, **how)


# Comparing


def as_row(optimizer: br.IVON, problem: nn.Module) -> Tensor:
    """Weights, momentum and curvature in one row."""
    return torch.cat([flat(problem.parameters()), state(optimizer, "momentum"), state(optimizer, "hess")])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def assert_equal_states(found: dict, expected: dict) -> None:
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


# Warnings


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def only(caught: list[warnings.WarningMessage]) -> str:
    """The one warning that there is, which points at a line of these tests."""
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    warning = caught.pop()
    assert Path(warning.filename).parent == Path(__file__).parent and warning.category is UserWarning
    return str(warning.message)
