"""Who competes at inference: the same problem solved by the library and by scikit-learn, or at once and in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

import bayesrule as br

SKLEARN, OURS, LAPLACE = "scikit-learn", "bayesrule", "bayesrule, Laplace"
LOOP, BATCH = "one by one", "in one call"
PENALTY = 1.0  # of ridge; the prior precision of logistic regression
TOLERANCE = 1e-5  # of logistic regression: the largest power of ten that leaves weights right to 1e-6 at all sizes measured
SITES = 1e-4  # of Gaussian processes: leaves the bound right to 1e-10 of itself
KERNEL = ConstantKernel(4.0) * RBF(1.0)
COUNTS = 20  # observations of each small problem

Rivals = dict[str, Callable[[], Any]]


def draw(kind: str, *shape: int, number: int = 0) -> Tensor:
    """Normals or uniforms in double precision, the same on every machine."""
    noise = br.CounterNoise(seed=1, draw=number)
    found: Tensor = getattr(noise, kind)(torch.empty(shape, dtype=torch.float64))
    return found


def labels(logits: Tensor) -> Tensor:
    return (draw("uniform", len(logits), number=2) < logits.sigmoid()).double()


def ridge(N: int, D: int) -> Rivals:
    X = draw("normal", N, D)
    y = X @ draw("normal", D, number=1) + draw("normal", N, number=2)
    rival = Ridge(alpha=PENALTY, solver="cholesky", fit_intercept=False)
    return {SKLEARN: lambda: rival.fit(X.numpy(), y.numpy()), OURS: lambda: br.ridge(X, y, PENALTY)}


def logistic(N: int, D: int, tolerance: float = TOLERANCE) -> Rivals:
    X = draw("normal", N, D)
    y = labels(X @ draw("normal", D, number=1) * 2 / D**0.5)
    rival = LogisticRegression(solver="lbfgs", C=1 / PENALTY, fit_intercept=False)
    return {
        SKLEARN: lambda: rival.fit(X.numpy(), y.numpy()),
        OURS: lambda: br.cvi(X, y, "bernoulli", prior=PENALTY, tolerance=tolerance),
        LAPLACE: lambda: br.cvi(X, y, "bernoulli", prior=PENALTY, tolerance=tolerance, expectation=br.Delta()),
    }


def logistic_error(N: int, D: int) -> dict[str, float]:
    """How far from their optima the contenders of :func:`logistic` stop: weights, and the bound relative to itself."""
    timed, exact = logistic(N, D), logistic(N, D, tolerance=1e-12)
    fit, best, mode = timed[OURS](), exact[OURS](), exact[LAPLACE]().q.posterior.mean
    return {
        "bound": abs(fit.evidence_bound / best.evidence_bound - 1),
        OURS: float((fit.q.posterior.mean - best.q.posterior.mean).abs().max()),
        LAPLACE: float((timed[LAPLACE]().q.posterior.mean - mode).abs().max()),
        SKLEARN: float((torch.as_tensor(timed[SKLEARN]().coef_[0]) - mode).abs().max()),
    }


def process(N: int, D: int, tolerance: float = SITES) -> Rivals:
    """Gaussian process classification with a given kernel."""
    X = draw("normal", N, D)
    y = labels(3 * (2 * X[:, 0]).sin() + X[:, 1])
    rival = GaussianProcessClassifier(KERNEL, optimizer=None)
    return {
        SKLEARN: lambda: rival.fit(X.numpy(), y.numpy()),
        OURS: lambda: br.cvi(X, y, "bernoulli", kernel=KERNEL, tolerance=tolerance),
        LAPLACE: lambda: br.cvi(X, y, "bernoulli", kernel=KERNEL, tolerance=tolerance, expectation=br.Delta()),
    }


def process_error(N: int, D: int) -> dict[str, float]:
    """How far from their optima the contenders of :func:`process` stop: the bound relative to itself, function values."""
    timed, exact = process(N, D), process(N, D, tolerance=1e-12)
    fit, best = timed[OURS](), exact[OURS]()
    return {
        "bound": abs(fit.evidence_bound / best.evidence_bound - 1),
        OURS: float((fit.q.mean - best.q.mean).abs().max()),
        LAPLACE: float((timed[LAPLACE]().q.mean - exact[LAPLACE]().q.mean).abs().max()),
    }


def conjugate(pair: str, problems: int) -> Rivals:
    """Many small problems: each with its own call, or all in one."""
    ones, u = torch.ones(problems, dtype=torch.float64), draw("uniform", COUNTS, problems)
    family, fields, likelihood, data = {
        "Gamma, Poisson": (br.Gamma, [2 * ones, ones], "poisson", (8 * u).floor()),
        "Beta, Bernoulli": (br.Beta, [ones, ones], "bernoulli", (u < 0.3).double()),
        "NormalGamma, Normal": (br.NormalGamma, [0 * ones, ones, ones, ones], "normal", draw("normal", COUNTS, problems)),
    }[pair]
    prior = family(*fields)
    single = [(family(*each), data[:, i]) for i, each in enumerate(zip(*fields, strict=True))]
    return {
        LOOP: lambda: [br.conjugate.update(before, likelihood, observed) for before, observed in single],
        BATCH: lambda: br.conjugate.update(prior, likelihood, data),
    }
