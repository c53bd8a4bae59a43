"""Rows of the algorithms that walk: optimizers and Newton's method, beside torch's own and published trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..families.gaussian import Fixed, Full
from ..noise import CounterNoise
from ..optimizers.first_order import SGD, Adam, AdamW, RMSprop
from ..optimizers.optimizer import BayesOptimizer
from ..optimizers.variational import IVON
from ..rule import BayesRule
from .newton import GRADIENT_DESCENT, NEWTON, gradient_descent, laplace, newton
from .regression import linear_regression, ridge
from .rows import Row, golden, largest

STEPS = 200


# The small problems that the rows run on: fixed data, float64


X = CounterNoise(seed=0).normal(torch.empty(40, 4, dtype=torch.float64))
Y = X @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + CounterNoise(seed=1).normal(X[:, 0])
ORIGIN = torch.zeros(4, dtype=torch.float64)


def _logistic(theta: Tensor) -> Tensor:
    loss: Tensor = binary_cross_entropy_with_logits(X @ theta, (Y > 0).double(), reduction="sum") + theta @ theta / 2
    return loss


def _path(make: Callable[[Any], torch.optim.Optimizer]) -> Tensor:
    """Where an optimizer takes the weights of a small network, step by step, on minibatches and a falling rate."""
    labels = torch.bucketize(Y, torch.tensor([-1.0, 1.0], dtype=torch.float64))
    weights = [nn.Parameter(CounterNoise(seed=2).normal(X.new_empty(shape))) for shape in ((4, 6), (6, 3))]
    optimizer, path = make(weights), []
    for step in range(STEPS):
        batch = slice(step % 4 * 10, step % 4 * 10 + 10)
        optimizer.zero_grad()
        cross_entropy(torch.tanh(X[batch] @ weights[0]) @ weights[1], labels[batch]).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        path.append(torch.cat([w.detach().flatten() for w in weights]))
    return torch.stack(path)


# Twins


def _torch_twin(ours: type[BayesOptimizer], twin: type[torch.optim.Optimizer], **hyper: Any) -> Row:
    def instance(params: Any) -> BayesOptimizer:
        return ours(params, **hyper)

    settings = ", ".join(f"{name}={value}" for name, value in hyper.items())
    return Row(
        algorithm=ours.__name__,
        rule=lambda: _slots(instance([nn.Parameter(torch.zeros(1))])),
        rates=settings,
        twin=f"torch.optim.{twin.__name__}, {STEPS} steps",
        difference=lambda: largest(_path(instance), _path(lambda params: twin(params, **hyper))),
        source="Khan & Rue 2023, sec. 3-4",
    )


def _slots(optimizer: BayesOptimizer) -> tuple[BayesRule, type]:
    group = optimizer.param_groups[0]
    return optimizer.rule(group), type(optimizer.family(group, torch.zeros(1), torch.zeros(1), 0.0))


def _ivon(name: str, approximation: Literal["price", "gradsq"]) -> Row:
    def difference() -> float:
        case = golden(name)
        params = {key: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for key, v in case["init"].items()}
        draws = [sample for step in case["steps"] for sample in step]
        normals = iter([torch.tensor(v, dtype=torch.float64) for sample in draws for v in sample["eps"].values()])
        optimizer = IVON(params.values(), noise=lambda _: next(normals), **case["hyper"])
        for step in case["steps"]:
            for sample in step:
                with optimizer.sampled_params(train=True):
                    for key, p in params.items():
                        p.grad = torch.tensor(sample["grad"][key], dtype=torch.float64)
            optimizer.step()
        after = case["after"]
        gaps = [
            largest(found, torch.tensor(after[block][key], dtype=torch.float64))
            for key, p in params.items()
            for block, found in (("params", p), *((b, optimizer.state[p][b]) for b in ("momentum", "hess")))
        ]
        return max(gaps)

    return Row(
        algorithm=f"IVON ({approximation})",
        rule=lambda: _slots(IVON([nn.Parameter(torch.zeros(1))], lr=1.0, ess=1.0, hess_approx=approximation)),
        rates="lr (hess_init + weight_decay), 1 - beta2",
        twin="trajectory of the published code",
        difference=difference,
        source="Shen et al. 2024, alg. 1",
    )


def _newton_twin() -> float:
    theta = ours = ORIGIN
    gap = 0.0
    for _ in range(5):
        hessian = torch.func.jacrev(torch.func.grad(_logistic))(theta)
        theta = theta - torch.linalg.solve(hessian, torch.func.grad(_logistic)(theta))
        ours = newton(_logistic, ours, steps=1).mean
        gap = max(gap, largest(ours, theta))
    return gap


def _laplace_twin() -> float:
    q = laplace(_logistic, ORIGIN)
    slope = torch.func.grad(_logistic)(q.mean)
    return max(slope.abs().max().item(), largest(q.precision, torch.func.jacrev(torch.func.grad(_logistic))(q.mean)))


def _ridge_twin() -> float:
    penalty = 0.7
    eye = torch.eye(4, dtype=torch.float64)
    least_squares = torch.linalg.lstsq(torch.cat([X, eye * penalty**0.5]), torch.cat([Y, ORIGIN])).solution
    return largest(ridge(X, Y, penalty).mean, least_squares)


def _regression_twin() -> float:
    prior = Full(torch.ones(4, dtype=torch.float64), 2.0)
    q = linear_regression(X, Y, prior, noise_variance=0.5)
    covariance = torch.linalg.inv(2 * torch.eye(4, dtype=torch.float64) + X.T @ X / 0.5)
    return max(largest(q.covariance, covariance), largest(q.mean, covariance @ (2 * prior.mean + X.T @ Y / 0.5)))


def _descent_twin() -> float:
    theta = nn.Parameter(ORIGIN.clone())
    optimizer = torch.optim.SGD([theta], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        _logistic(theta).backward()
        optimizer.step()
    return largest(gradient_descent(_logistic, ORIGIN, 0.01, 50), theta.detach())


_RULE_PAPER = "Khan & Rue 2023, sec."
ROWS = [
    Row(
        "gradient descent",
        lambda: (GRADIENT_DESCENT, Fixed),
        "rate",
        "torch.optim.SGD",
        _descent_twin,
        f"{_RULE_PAPER} 3.1",
    ),
    _torch_twin(SGD, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    Row("Newton", lambda: (NEWTON, Full), "1", "torch.linalg.solve", _newton_twin, f"{_RULE_PAPER} 3.2"),
    Row("Laplace", lambda: (NEWTON, Full), "1, to the end", "Hessian at the mode", _laplace_twin, f"{_RULE_PAPER} 3.3"),
    Row("linear regression", lambda: (NEWTON, Full), "1, one step", "closed form", _regression_twin, f"{_RULE_PAPER} 2"),
    Row("ridge", lambda: (NEWTON, Full), "1, one step", "torch.linalg.lstsq", _ridge_twin, f"{_RULE_PAPER} 2"),
    _torch_twin(RMSprop, torch.optim.RMSprop, lr=0.01, momentum=0.9, weight_decay=0.01),
    _torch_twin(Adam, torch.optim.Adam, lr=0.01, weight_decay=0.01),
    _torch_twin(AdamW, torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    _ivon("ivon_price", "price"),
    _ivon("ivon_gradsq", "gradsq"),
]
