"""Rows of optimizers over blocks and mixtures, each beside the same by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..estimators.curvatures import Hessian
from ..estimators.expectations import Delta
from ..estimators.oracle import Loss
from ..families.kronecker import Kronecker
from ..families.mixture import Mixture
from ..joints import Joint
from ..optimizers.components import MultiIVON
from ..optimizers.covariance import IBLR, SLANG
from ..optimizers.dropout import Dropout
from ..optimizers.optimizer import BayesOptimizer
from ..retractions import Additive
from ..rule import BayesRule
from .rows import Row, golden, largest

STEPS = 20


def _data() -> tuple[Tensor, Tensor]:
    found = golden("mlp")
    return torch.tensor(found["x"], dtype=torch.float64), torch.tensor(found["y"], dtype=torch.float64)


def _losses(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none")


def _each(x: Tensor, mean: Tensor, y: Tensor) -> Tensor:
    """The gradient of the loss of every example."""
    return ((x @ mean).sigmoid() - y)[:, None] * x


def slots(kind: type[BayesOptimizer], **hyper: Any) -> tuple[BayesRule, type]:
    """The slots of an optimizer, and the family of what it leaves behind."""
    with torch.random.fork_rng([]):
        model = nn.Linear(2, 2, bias=False)
    optimizer = kind(model.parameters(), **hyper)
    if optimizer.squares_examples:
        optimizer.step(lambda: model(torch.eye(2)).sum(1))
    else:
        optimizer.step(lambda: model(torch.eye(2)).sum().backward())
    group = optimizer.param_groups[0]
    (part,) = optimizer.posterior(model).parts
    return optimizer.rule(group), type(part.q) if isinstance(part, Joint) else Mixture


def _iblr_twin() -> float:
    """The rule in its factor form: S = L L^T, U = L^T + rho L^-1 E, S <- (S + U^T U) / 2."""
    x, y = _data()
    w, m, eye = nn.Parameter(x.new_full((3,), 0.2)), x.new_full((3,), 0.2), torch.eye(3, dtype=x.dtype)
    eps = torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    queue, gap = iter(eps), 0.0
    optimizer = IBLR([w], 0.1, 16.0, betas=(0.9, 0.95), weight_decay=0.1, noise=lambda _: next(queue))
    S, v = 1.1 * eye, 0 * m
    for step in range(STEPS):
        with optimizer.sampled_params(train=True):
            _losses(x, w, y).mean().backward()
        optimizer.step()
        L = torch.linalg.cholesky(S)
        offset = torch.linalg.solve_triangular(L.T, eps[step, :, None], upper=True)[:, 0] / 4
        g = _each(x, m + offset, y).mean(0)
        F = torch.outer(16 * S @ offset, g)
        E = (F + F.T) / 2 + 0.1 * eye - S
        U = L.T + 0.05 * torch.linalg.solve_triangular(L, E, upper=False)
        S, v = (S + U.T @ U) / 2, 0.9 * v + 0.1 * g
        m = m - 0.1 * torch.linalg.solve(S, v / (1 - 0.9 ** (step + 1)) + 0.1 * m)
        gap = max(gap, largest(w.detach(), m))
    return gap


def _slang_twin() -> float:
    """By eigendecompositions of whole matrices, without noise."""
    x, y = _data()
    w, m = nn.Parameter(x.new_full((3,), 0.2)), x.new_full((3,), 0.2)
    optimizer = SLANG([w], 0.1, float("inf"), rank=1, betas=(0.9, 0.8), weight_decay=0.1)
    d, low, v, gap = torch.ones_like(m), x.new_zeros(3, 3), 0 * m, 0.0
    for step in range(STEPS):
        optimizer.step(lambda: _losses(x, w, y))
        each = _each(x, m, y)
        whole = 0.8 * low + 0.2 * each.T @ each / len(each)
        values, vectors = torch.linalg.eigh(whole)
        low = values[-1] * torch.outer(vectors[:, -1], vectors[:, -1])
        d = 0.8 * d + (whole - low).diagonal()
        v = 0.9 * v + 0.1 * (each.mean(0) + 0.1 * m)
        m = m - 0.1 * torch.linalg.solve(torch.diag(d + 0.1) + low, v / (1 - 0.9 ** (step + 1)))
        gap = max(gap, largest(w.detach(), m))
    return gap


def _dropout_twin() -> float:
    """torch.optim.SGD on a network whose inputs have masks."""
    x, y = _data()
    w, inner = (nn.Parameter(x.new_full((1, 3), 0.2)) for _ in range(2))
    u = torch.rand(STEPS, 1, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    queue, gap = iter(u), 0.0
    ours = Dropout([w], 0.5, p=0.4, momentum=0.9, weight_decay=0.01, noise=lambda _: next(queue))
    theirs = torch.optim.SGD([inner], 0.5, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        with ours.sampled_params(train=True):
            _losses(x, w[0], y).mean().backward()
        ours.step()
        theirs.zero_grad()
        _losses(x * (u[step, 0] < 0.6).to(x.dtype) / 0.6, inner[0], y).mean().backward()
        theirs.step()
        gap = max(gap, largest(w.detach(), inner.detach()))
    return gap


def _mixture_twin() -> float:
    """By hand from each start, with noise that is too small to see."""
    x, y = _data()
    starts = [x.new_full((3,), value) for value in (0.2, -0.4)]
    hyper: dict[str, Any] = dict(
        lr=0.3, ess=1e30, hess_init=0.5, betas=(0.9, 0.95), weight_decay=0.01, hess_approx="gradsq", gradsq_scale=16.0
    )
    w = nn.Parameter(starts[0].clone())
    ours = MultiIVON([w], **hyper, components=2)
    with ours.sampled_params(train=False):
        pass
    ours.state[w]["mean_1"] = starts[1].clone()
    for _ in range(2 * STEPS):
        ours.step(lambda: _losses(x, w, y).mean().backward())
    ends = []
    for m in starts:
        h, v = x.new_full((3,), 0.5), 0 * m
        for step in range(1, STEPS + 1):
            g = _each(x, m, y).mean(0)
            e = 16 * g**2 - h
            h, v = h + 0.05 * e + 0.05**2 / 2 * e**2 / (h + 0.01), 0.9 * v + 0.1 * g
            m = m - 0.3 * 0.51 * (v / (1 - 0.9**step) + 0.01 * m) / (h + 0.01)
        ends.append(m)
    return max(largest(w.detach(), ends[0]), largest(ours.state[w]["mean_1"], ends[1]))


def _kronecker_twin() -> float:
    """A quadratic whose Hessian is the product of a pattern across rows and one across columns: solved in one step."""
    left, right = (torch.tensor(values, dtype=torch.float64) for values in ([[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]))
    pull = torch.tensor([[1.0, -2.0], [0.5, 0.3]], dtype=torch.float64)
    q = KRONECKER.step(
        Kronecker(torch.ones_like(pull)),
        Kronecker(torch.zeros_like(pull), 0.0),
        Loss(lambda W: (left @ W @ right * W).sum() / 2 - (pull * W).sum()),
    )
    whole = torch.kron(left, right)
    return max(largest(q.mean.flatten(), torch.linalg.solve(whole, pull.flatten())), largest(q.precision.matrix, whole))


KRONECKER = BayesRule(Delta(), Hessian(), Additive())
BY_HAND = f"by hand, {STEPS} steps"
ROWS = [
    Row("iBLR, full", lambda: slots(IBLR, lr=1.0, ess=1.0), "lr, 1 - beta2", BY_HAND, _iblr_twin, "Lin et al. 2020, app. E"),
    Row("SLANG", lambda: slots(SLANG, lr=1.0, ess=1.0, rank=1), "lr, 1 - beta2", BY_HAND, _slang_twin, "Mishkin et al. 2018"),
    Row(
        "matrix normal, factor by factor",
        lambda: (KRONECKER, Kronecker),
        "1, one step",
        "torch.linalg.solve",
        _kronecker_twin,
        "Khan & Rue 2023, sec. 5.4",
    ),
    Row(
        "dropout",
        lambda: slots(Dropout, lr=1.0),
        "lr",
        f"torch.optim.SGD, masked, {STEPS} steps",
        _dropout_twin,
        "Khan & Rue 2023, sec. 4.3",
    ),
    Row(
        "Multi-IVON",
        lambda: slots(MultiIVON, lr=1.0, ess=1.0),
        "lr (hess_init + weight_decay), 1 - beta2",
        f"by hand from each start, {STEPS} steps",
        _mixture_twin,
        "Shen et al. 2024, sec. 4",
    ),
]
"""Of blocks and mixtures."""
