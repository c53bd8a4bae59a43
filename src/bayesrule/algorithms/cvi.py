"""Conjugate-computation variational inference: generalized linear models and Gaussian processes by the rule on sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..estimators.curvatures import DiagonalHessian, Zero
from ..estimators.expectations import Delta, Exact
from ..estimators.likelihoods import Likelihood, named
from ..estimators.predictors import LikelihoodLoss
from ..families.gaussian import Diagonal, Full
from ..families.latent import FunctionSpace, Latent, WeightSpace
from ..retractions import Natural
from ..rule import BayesRule, Expectation
from ..vector import Vector
from .conjugate import BAYES, Sites
from .inference import Inference, StepInfo, infer
from .inputs import demand_finite, numbers
from .kernels import Kernel, as_kernel

CVI = BayesRule(Exact(), Zero(), Natural())
"""Variational inference as slots: over sites, with expectations that the likelihood knows."""

NEWTON_SITES = BayesRule(Delta(), DiagonalHessian(), Natural())
"""Newton's method for the same models (IRLS; Laplace's approximation at its end): looked at in the mean."""


SOME = 4096
"""As many examples, at least, are enough to find where to start."""


@dataclass(frozen=True)
class Fit:
    """A fitted model of predictors.

    Attributes:
        q: The posterior in terms of sites, in double precision: ``q.mean``, ``q.variance`` of the predictors, shape (N,); in
            weight space ``q.posterior``, the Gaussian over the weights.
        likelihood: Of a predictor.
        evidence_bound: Of the log evidence, in nats; for Delta, Laplace's approximation of it.
        converged: Whether the sites stand still.
        trace: Every step: bound, rate, backoffs, change.
        kernel: The kernel, for a Gaussian process.
        X: Inputs, shape (N, D).
    """

    q: Any = field(repr=False)
    likelihood: Likelihood
    evidence_bound: float
    converged: bool
    trace: list[StepInfo] = field(repr=False)
    kernel: Kernel | None
    X: Tensor = field(repr=False)

    @property
    def backoffs(self) -> int:
        """How many steps were taken back and tried at half their rate."""
        return sum(step.backoffs for step in self.trace)

    def predict(self, X: Any) -> tuple[Tensor, Tensor]:
        """Means and variances of the predictor at new inputs, shape (M,) each, for X of shape (M, D)."""
        X = _inputs(X, like=self.X, features=self.X.shape[1])
        with torch.set_grad_enabled(X.requires_grad):
            if self.kernel is None:
                mean, variance = self.q.predict(X.double())
            else:
                mean, variance = self.q.predict(self.kernel(self.X.double(), X.double()), self.kernel.diagonal(X.double()))
        return mean.to(X), variance.to(X)

    def predictive(self, X: Any) -> Distribution:
        """The distribution of new observations, averaged over the posterior; batch shape (M,).

        For labels a Bernoulli whose ``probs`` are the probabilities of class 1.
        """
        return self.likelihood.predictive(*self.predict(X))


def cvi(
    X: Any,
    y: Any,
    likelihood: Likelihood | str = "bernoulli",
    *,
    prior: Full | float = 1.0,
    kernel: Any = None,
    expectation: Expectation | None = None,
    rate: float | None = None,
    steps: int = 200,
    tolerance: float = 1e-8,
    warm_start: bool = True,
    tune: int = 0,
) -> Fit:
    r"""Variational inference for generalized linear models and Gaussian processes.

    Costs N D^2 + D^3 a step in weight space, N^3 with a kernel. Computed in double precision, as covariances of functions are
    nearly singular; predictions have the dtype of X.

    .. math::  \lambda_n \leftarrow (1 - \rho) \lambda_n + \rho\, (a_n - b_n m_n, \tfrac12 b_n), \qquad
               a = E_q[\partial_f \log p(y | f)],\ b = E_q[\partial_f^2 \log p(y | f)].

    As an instance of the rule: WeightSpace or FunctionSpace · Exact · Zero · Natural. With ``expectation=Delta()`` it is Newton's
    method and Laplace's approximation: the slots Delta · DiagonalHessian · Natural.

    Args:
        X: Inputs, shape (N, D), or (N,) for one feature; a column of ones, if a linear model is to have an intercept.
        y: Observations, shape (N,): numbers, counts, or labels 0 and 1.
        likelihood: An object of :mod:`bayesrule.likelihoods`, or "gaussian", "bernoulli", "probit", "poisson",
            "negative_binomial", "student_t".
        prior: Of the weights: a Gaussian, or the precision of N(0, 1 / prior). Not used with a kernel.
        kernel: Covariance function of a Gaussian process with mean zero: a scikit-learn kernel, a gpytorch kernel, or any
            function of two tensors of inputs, (N, D) and (M, D), that returns a tensor (N, M). None is the linear model.
        expectation: Exact() by default; Delta() is Newton's method, GaussHermite(n) the same as Exact up to its nodes.
        rate: Largest step size in (0, 1]; 1 after a warm start, 0.5 without, 0.1 where the expectation draws.
        steps: Most steps.
        tolerance: Relative change of the sites per unit of rate at which to stop.
        warm_start: Start from Newton's solution rather than from the prior.
        tune: Steps of L-BFGS on the evidence bound over hyper-parameters, without bounds: those of the kernel, the precision of
            the prior if it is a number, and those of the likelihood (variance, scale, df, dispersion).

    Returns:
        :class:`Fit`.

    Raises:
        ValueError: Shapes do not agree, numbers are not finite, observations cannot occur, or the prior is improper.

    Example:
        >>> import torch
        >>> fit = cvi(torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1]), "bernoulli")
        >>> fit.predictive(torch.tensor([[3.0]])).probs > 0.7
        tensor([True])

    Source: Khan and Lin (2017), arXiv:1703.04265.
    """
    given = _inputs(X)
    X = given.double()
    likelihood = named(likelihood)
    y = likelihood.check(numbers(y, "y").to(X.device), like=X)
    for name, least, value in (("steps", 1, steps), ("tune", 0, tune)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate <= 1):
        raise ValueError(f"rate must be a number in (0, 1], got {rate}")
    if len(y) != len(X):
        raise ValueError(f"X and y must have equally many examples, got {len(X)} and {len(y)}")
    if kernel is None:
        made: Kernel | None = None
        start: Latent = WeightSpace(X, _prior(prior, X))
    else:
        made = as_kernel(kernel)
        with torch.no_grad():
            start = FunctionSpace(_covariance(made, X))
        _semidefinite(start.K)
    if tune:
        start, likelihood = tuned(start, made, likelihood, y, X, tune_prior=not isinstance(prior, Full), steps=tune)
    rule = CVI if expectation is None else BayesRule(expectation, DiagonalHessian(), Natural())
    loss = LikelihoodLoss(likelihood, y)
    result = fit_sites(rule, start, loss, rate=rate, warm_start=warm_start, steps=steps, tolerance=tolerance)
    bound = result.bound if result.bound is not None else math.nan
    if isinstance(rule.expectation, Delta):
        bound = bound - result.q.log_det().item() / 2
    return Fit(result.q, likelihood, bound, result.converged, result.trace, made, given)


def fit_sites(rule: BayesRule, start: Latent, loss: Any, *, rate: float | None, warm_start: bool, **options: Any) -> Inference:
    """Run the rule on sites, after Newton's method where that helps."""
    prior: Any = replace(start, sites=None)  # type: ignore[type-var]
    newton = isinstance(rule.expectation, Delta)
    warm = warm_start and not newton
    if warm_start:
        start = _from_data(start, prior, loss)
    if warm:
        start = infer(NEWTON_SITES, _from_some(start, prior, loss), prior, loss, steps=20, tolerance=0.03).q
    usual = 0.1 if rule.expectation.draws else 1.0 if warm or newton else 0.5
    return infer(rule, start, prior, loss, rate=usual if rate is None else rate, **options)


def _seen_from(there: Any, prior: Latent, loss: LikelihoodLoss) -> Latent:
    """The member whose sites are what is seen from a mean: Newton's step, whoever's mean it is."""
    return BAYES.step(prior, prior, Sites(-there.natural_gradient(NEWTON_SITES.look(there, there, loss))))


def _from_data(start: Latent, prior: Latent, loss: LikelihoodLoss) -> Latent:
    """What is seen from the predictors that the observations themselves suggest, where the likelihood knows such."""
    suggested = loss.likelihood.start(loss.y)
    return start if suggested is None else _seen_from(Diagonal(suggested, torch.ones_like(suggested)), prior, loss)


def _from_some(start: Latent, prior: Latent, loss: LikelihoodLoss) -> Latent:
    """Where Newton's method begins: of many examples with few weights, at the solution for one in so many of them."""
    if not isinstance(prior, WeightSpace) or prior.size < 4 * (few := max(SOME, 50 * prior.X.shape[1])):
        return start
    rows = slice(None, None, prior.size // few)
    some, seen = WeightSpace(prior.X[rows], prior.prior), LikelihoodLoss(loss.likelihood, loss.y[rows])
    weights = infer(NEWTON_SITES, _from_data(some, some, seen), some, seen, steps=20, tolerance=0.03).q.posterior
    return _seen_from(WeightSpace(prior.X, weights), prior, loss)


def tuned(
    start: Latent, kernel: Kernel | None, likelihood: Likelihood, y: Tensor, X: Tensor, *, tune_prior: bool, steps: int
) -> tuple[Latent, Likelihood]:
    """Hyper-parameters by L-BFGS on the evidence bound, each value of which is that of sites that stand still.

    There the bound does not change with the sites, so its gradient is the one at fixed sites.
    """
    leaves = [] if kernel is None else kernel.parameters()
    held = {name: torch.tensor(float(getattr(likelihood, name)), dtype=X.dtype).log() for name in likelihood.positive}
    logs = list(held.values())
    if kernel is None and tune_prior:
        assert isinstance(start, WeightSpace)
        logs.append(start.prior.precision[0, 0].log())
    for log in logs:
        log.requires_grad_()
    if not leaves + logs:
        raise ValueError("tune found no hyper-parameter: this kernel, prior and likelihood have none that is free")
    sites: Vector | None = None
    with_values: Callable[..., Likelihood] = partial(replace, likelihood)

    def model() -> tuple[Latent, Likelihood]:
        values = dict(zip(held, (log.exp() for log in logs), strict=False))
        if kernel is not None:
            return FunctionSpace(_covariance(kernel, X)), with_values(**values)
        assert isinstance(start, WeightSpace)
        prior = Full(start.prior.mean, logs[-1].exp()) if tune_prior else start.prior
        return WeightSpace(X, prior), with_values(**values)

    def settled() -> tuple[Latent, Likelihood]:
        nonlocal sites
        with torch.no_grad():
            prior, present = model()
            begin = prior if sites is None else prior.from_natural(sites)
            result = fit_sites(CVI, begin, LikelihoodLoss(present, y), rate=None, warm_start=sites is None, tolerance=1e-6)
        sites = result.q.natural()
        return prior, present

    optimizer = torch.optim.LBFGS(leaves + logs, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        settled()
        with torch.enable_grad():
            prior, present = model()
            q = prior if sites is None else prior.from_natural(sites)
            loss = q.kl(prior) - present.expected_log_prob(q.mean, q.variance, y)[0].sum()
            loss.backward()
        return loss.detach()

    try:
        optimizer.step(closure)
        with torch.no_grad():
            prior, present = model()
    except ValueError as error:
        raise ValueError(f"tune ran to the end of the numbers ({error}): hold that parameter, or give more data") from error
    optimizer.zero_grad()
    values = {name: float(getattr(present, name)) for name in held}
    return prior, with_values(**values)


def _covariance(kernel: Kernel, X: Tensor) -> Tensor:
    K = kernel(X)
    if not isinstance(K, Tensor):
        raise TypeError(f"kernel must return a tensor of covariances, got {type(K).__name__}")
    if K.shape != (len(X), len(X)) or not K.isfinite().all():
        raise ValueError(f"kernel must give finite covariances of shape {(len(X), len(X))}, got {tuple(K.shape)}")
    if ((K - K.mT).abs().max() > 1e-5 * K.abs().max()).item():
        raise ValueError("kernel must give a symmetric matrix of covariances; it does not")
    return K.to(X.dtype)


def _semidefinite(K: Tensor) -> None:
    slack = torch.finfo(K.dtype).eps ** 0.5 * K.diagonal().mean().abs()
    if torch.linalg.cholesky_ex(K + slack * torch.eye(len(K), dtype=K.dtype, device=K.device)).info:
        least = torch.linalg.eigvalsh(K).min().item()
        raise ValueError(f"kernel must give a positive semi-definite matrix; its least eigenvalue is {least:.3g}")


def _inputs(X: Any, like: Tensor | None = None, features: int | None = None) -> Tensor:
    X = numbers(X, "X")
    X = X if like is None else X.to(like)
    X = X if X.is_floating_point() else X.to(torch.get_default_dtype())
    X = X[:, None] if X.dim() == 1 else X
    if X.dim() != 2 or not X.numel() or (features is not None and X.shape[1] != features):
        wanted = "features" if features is None else features
        raise ValueError(f"X must have shape (examples, {wanted}) with at least one example, got {tuple(X.shape)}")
    demand_finite(X, "X")
    return X


def _prior(prior: Full | float, X: Tensor) -> Full:
    if isinstance(prior, Full):
        if len(prior.mean) != X.shape[1]:
            raise ValueError(f"prior is over {len(prior.mean)} weights, X has {X.shape[1]} features")
        if torch.linalg.cholesky_ex(prior.precision).info or not prior.mean.isfinite().all():
            raise ValueError("prior must have a finite mean and a positive definite precision: its weights need a finite variance")
        return Full(prior.mean.to(X), prior.precision.to(X))
    if not isinstance(prior, int | float) or not 0 < prior < math.inf:
        raise ValueError(f"prior must be a precision in (0, inf) or a Full Gaussian, got {prior}")
    return Full(X.new_zeros(X.shape[1]), float(prior))
