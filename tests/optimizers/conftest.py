"""What the tests of execution share: problems whose gradients are the same bits everywhere, and ways to compare runs."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import bayesrule as br
from bayesrule.optimizers import execution


class Logistic(nn.Module):
    """Logistic regression in minibatches, with weights in tensors of several shapes.

    It is convex and its gradient never fades, so rounding neither grows nor is all that is left of a momentum or a root.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(256, 580, generator=generator).to(dtype) / 8
        self.y = torch.randn(256, generator=generator).sign().to(dtype)
        self.matrix = nn.Parameter(torch.randn(20, 15, generator=generator).to(dtype) / 10)
        self.row = nn.Parameter(torch.randn(280, generator=generator).to(dtype) / 10)
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))

    def losses(self, step: int) -> Tensor:
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        margins = self.y[rows] * (self.x[rows] @ torch.cat([self.matrix.view(-1), self.row]) + self.bias)
        return softplus(-margins)

    def loss(self, step: int) -> Tensor:
        return self.losses(step).mean()


class Bowls(nn.Module):
    """A separable convex loss over tensors of any size; its gradient is elementwise, so no order of sums is in it."""

    def __init__(self, *shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(3, *(s if isinstance(s, tuple) else (s,)), generator=generator) for s in shapes]
        self.weights = nn.ParameterList(nn.Parameter(start.to(dtype)) for start, _, _ in draw)
        self.targets = [target.to(dtype) for _, target, _ in draw]
        self.widths = [(0.5 + width.abs()).to(dtype) for _, _, width in draw]

    def gradients(self) -> list[Tensor]:
        """Of sum (width (w - target)^2 / 2 + cos w / 4), where the weights now stand."""
        pieces = zip(self.weights, self.targets, self.widths, strict=True)
        return [(w.detach() - t).to(w.dtype) * c.to(w.dtype) - w.detach().sin() / 4 for w, t, c in pieces]

    def backward(self, only: Sequence[int] | None = None) -> None:
        """What backpropagation leaves in ``p.grad``, of all weights or of some."""
        for i, (w, gradient) in enumerate(zip(self.weights, self.gradients(), strict=True)):
            if only is None or i in only:
                w.grad = gradient


def learn(problem: Bowls, optimizer: Any, steps: int = 1, only: Sequence[int] | None = None, draws: int = 1) -> None:
    """Steps by the gradients of some of the weights; with draws where the optimizer has any."""
    for _ in range(steps):
        for _ in range(draws):
            if isinstance(optimizer, br.IVON):
                with optimizer.sampled_params(train=True):
                    problem.backward(only)
            else:
                problem.backward(only)
        optimizer.step()
        optimizer.zero_grad()


def compiled(optimizer: Any) -> int:
    """How many programs of an optimizer run compiled."""
    return optimizer.execution.active and sum(program.is_compiled for program in optimizer.execution.programs.values())


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and all state, by name."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {f"{i}.{name}": value.clone() for i, p in enumerate(params) for name, value in optimizer.state[p].items()}
    return {**{str(i): p.detach().clone() for i, p in enumerate(params)}, **kept}


def same_bits(found: torch.optim.Optimizer | dict[str, Tensor], wanted: torch.optim.Optimizer | dict[str, Tensor]) -> None:
    """Two runs are at the same bits."""
    found, wanted = (run if isinstance(run, dict) else everything(run) for run in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name], value), f"{name} differs by {(found[name] - value).abs().max():.3g}"


def agree(found: torch.optim.Optimizer, wanted: torch.optim.Optimizer, tolerance: float = 1e-6) -> None:
    """Two runs agree: all parameters, and all state, each name to the tolerance of the largest number under that name.

    A tensor is not measured by itself alone: near the minimum its momentum is what rounding left of the others' weights.
    """
    found, wanted = everything(found), everything(wanted)
    assert found.keys() == wanted.keys()
    sizes: dict[str, float] = {}
    for name, value in wanted.items():
        kind = name.partition(".")[2]
        sizes[kind] = max(sizes.get(kind, 0.0), value.abs().max().item())
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        gap, size = (found[name].double() - value.double()).abs().max().item(), sizes[name.partition(".")[2]]
        assert gap <= tolerance * size, f"{name}: {gap:.3g} apart, of {size:.3g}"


def closures(problem: Any, optimizer: Any, steps: int) -> None:
    """Steps on the logistic regression by closures."""
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            if getattr(optimizer, "squares_examples", False):
                return problem.losses(step)
            loss = problem.loss(step)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def warned() -> Iterator[list[warnings.WarningMessage]]:
    """What was warned about. Nothing may be, unless a test looks for it and clears the list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert [str(warning.message) for warning in caught] == []


MADE: dict[str, tuple[Any, ...]] = {}  # what a test makes once and uses several times


@pytest.fixture(autouse=True)
def alone() -> None:
    """No models of earlier tests."""
    MADE.clear()


@pytest.fixture
def unburdened() -> None:
    """What there is before the test is not looked through each time that it counts what it holds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unrecorded() -> Iterator[None]:
    """No programs of earlier tests, and none for later ones: what is counted or made to fail begins from nothing."""
    execution.SHARED.clear()
    yield
    execution.SHARED.clear()
