"""Rows of inference: conjugate pairs beside the textbook's formulas, variational optima beside those of independent solvers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..estimators.curvatures import DiagonalHessian, Hessian, Zero
from ..estimators.expectations import Delta, Exact, GaussHermite
from ..estimators.likelihoods import Bernoulli, Gaussian, Likelihood, NegativeBinomial, Poisson, StudentT
from ..estimators.oracle import Loss
from ..estimators.predictors import LikelihoodLoss, LinearLoss
from ..families.circular import VonMises
from ..families.gaussian import Diagonal, Full
from ..families.latent import FunctionSpace, WeightSpace
from ..families.low_rank import LowRank
from ..families.matrices import NormalGamma, NormalInverseGamma, NormalInverseWishart, Wishart
from ..families.mixture import Mixture
from ..families.normal import Normal
from ..families.positive import Gamma, InverseGamma
from ..families.simplex import Beta, Dirichlet
from ..retractions import Additive, Natural
from ..rule import BayesRule, Expectation
from . import conjugate
from .cvi import CVI, NEWTON_SITES, cvi
from .inference import infer
from .newton import newton
from .rows import Row, golden, largest

NODES = 100
_LOGIT, _PROBIT = Bernoulli(nodes=NODES), Bernoulli("probit", nodes=NODES)
TIGHT = 1e-13


def _t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Conjugate pairs: a batch of two priors, one step from a start that is neither


COINS = _t([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
COUNTS = _t([[3.0, 0.0], [1.0, 2.0], [4.0, 7.0]])
NUMBERS = _t([[1.1, 0.3], [0.4, -2.0], [2.0, 0.5], [1.6, 1.0]])
VECTORS = _t([[0.2, 1.0], [1.1, -0.3], [0.5, 0.8], [-0.4, 1.9]])
N = len(NUMBERS)


def _parts(q: Any) -> tuple[Tensor, ...]:
    return (q.mean, q.precision) if isinstance(q, Full) else q._values


def _pair(name: str, prior: Any, likelihood: Any, data: Any, expected: Callable[[Any], tuple[Any, ...]]) -> Row:
    """A pair, and its posterior's parameters by the formula of the textbook."""

    def difference() -> float:
        start = type(prior)(*(value * 1.5 for value in _parts(prior)))
        found = conjugate.update(prior, likelihood, data, start=start).posterior
        return max(largest(a, b) for a, b in zip(_parts(found), expected(prior), strict=True))

    return Row(
        name, lambda: (conjugate.BAYES, type(prior)), "1, one step", "textbook formula", difference, "Khan & Rue 2023, sec. 5.1"
    )


def _normal_gamma(p: NormalGamma) -> tuple[Any, ...]:
    mean, spread = NUMBERS.mean(0), ((NUMBERS - NUMBERS.mean(0)) ** 2).sum(0)
    kappa = p.kappa + N
    rate = p.rate + spread / 2 + p.kappa * N * (mean - p.loc) ** 2 / (2 * kappa)
    return (p.kappa * p.loc + N * mean) / kappa, kappa, p.concentration + N / 2, rate


def _normal_inverse_wishart(p: NormalInverseWishart) -> tuple[Any, ...]:
    mean = VECTORS.mean(0)
    gaps, away = VECTORS - mean, mean - p.loc
    kappa = p.kappa + N
    scale = p.scale + gaps.mT @ gaps + p.kappa * N / kappa * torch.outer(away, away)
    return (p.kappa * p.loc + N * mean) / kappa, kappa, p.df + N, scale


def _regression(p: NormalInverseGamma) -> tuple[Any, ...]:
    y = NUMBERS[:, 0]
    precision = p.precision + VECTORS.mT @ VECTORS
    loc = torch.linalg.solve(precision, p.precision @ p.loc + VECTORS.mT @ y)
    rate = p.rate + (y @ y + p.loc @ p.precision @ p.loc - loc @ precision @ loc) / 2
    return loc, precision, p.concentration + N / 2, rate


def _vector_mean(p: Full) -> tuple[Any, ...]:
    inverse = torch.linalg.inv(2 * MATRIX)
    precision = p.precision + N * inverse
    return torch.linalg.solve(precision, p.precision @ p.mean + inverse @ VECTORS.sum(0)), precision


def _von_mises(p: VonMises) -> tuple[Any, ...]:
    total = p.concentration * torch.exp(1j * p.loc) + 2.0 * torch.exp(1j * NUMBERS).sum(0)
    return total.angle(), total.abs()


def _wishart(p: Wishart) -> tuple[Any, ...]:
    return p.df + N, torch.linalg.inv(torch.linalg.inv(p.scale) + VECTORS.mT @ VECTORS)


def _squares(p: Any) -> tuple[Any, ...]:
    return p.concentration + N / 2, p.rate + ((NUMBERS - 1) ** 2).sum(0) / 2


TWO = _t([2.0, 0.5])
MATRIX = _t([[1.0, 0.2], [0.2, 1.5]])
PAIRS: list[tuple[str, Any, Any, Any, Callable[[Any], tuple[Any, ...]]]] = [
    ("Beta-Bernoulli", Beta(TWO, 3.0), "bernoulli", COINS, lambda p: (TWO + COINS.sum(0), 3 + (1 - COINS).sum(0))),
    ("Beta-binomial", Beta(TWO, 3.0), conjugate.Binomial(9), COUNTS, lambda p: (TWO + COUNTS.sum(0), 30 - COUNTS.sum(0))),
    ("Gamma-Poisson", Gamma(TWO, 1.5), "poisson", COUNTS, lambda p: (TWO + COUNTS.sum(0), p.rate + 3)),
    ("Gamma-exponential", Gamma(TWO, 1.5), "exponential", COUNTS, lambda p: (TWO + 3, p.rate + COUNTS.sum(0))),
    ("Dirichlet-categorical", Dirichlet(TWO), "categorical", COINS[:, 0], lambda p: (TWO + _t([1.0, 3.0]),)),
    ("Dirichlet-multinomial", Dirichlet(TWO), "multinomial", COUNTS, lambda p: (TWO + COUNTS.sum(0),)),
    (
        "Normal mean",
        Normal(TWO, 0.5),
        conjugate.Normal(variance=0.6),
        NUMBERS,
        lambda p: ((p.loc * 0.5 + NUMBERS.sum(0) / 0.6) / (0.5 + N / 0.6), p.precision + N / 0.6),
    ),
    (
        "multivariate Normal mean",
        Full(TWO, MATRIX),
        conjugate.MultivariateNormal(covariance=2 * MATRIX),
        VECTORS,
        _vector_mean,
    ),
    ("Normal precision", Gamma(TWO, 1.5), conjugate.Normal(mean=1.0), NUMBERS, _squares),
    ("Normal variance", InverseGamma(TWO, 1.5), conjugate.Normal(mean=1.0), NUMBERS, _squares),
    ("Normal-Gamma", NormalGamma(TWO, 1.2, 2.0, 1.0), "normal", NUMBERS, _normal_gamma),
    ("Wishart precision", Wishart(_t(4.0), MATRIX), conjugate.MultivariateNormal(mean=0.0), VECTORS, _wishart),
    (
        "Normal-inverse-Wishart",
        NormalInverseWishart(TWO, 1.0, 4.0, MATRIX),
        "multivariate_normal",
        VECTORS,
        _normal_inverse_wishart,
    ),
    (
        "linear regression, noise unknown",
        NormalInverseGamma(TWO, MATRIX, 2.0, 1.5),
        "linear_regression",
        (VECTORS, NUMBERS[:, 0]),
        _regression,
    ),
    ("von Mises direction", VonMises(TWO, 1.5), conjugate.VonMises(2.0), NUMBERS, _von_mises),
]


# Models of predictors: optima of independent solvers


def _logistic_vi(family: type, block: str) -> float:
    case = golden("logistic")
    loss = LinearLoss(_t(case["X"]), _LOGIT, _t(case["y"]))
    origin, precision, wanted = _t([0.0] * 3), case["prior_precision"], case[block]
    prior: Any = Full(origin, precision) if family is Full else Diagonal(origin, origin + precision)
    q = infer(CVI, prior, prior, loss, tolerance=TIGHT).q
    spread = largest(q.covariance, _t(wanted["cov"])) if family is Full else largest(q.variance, _t(wanted["var"]))
    return max(largest(q.mean, _t(wanted["mean"])), spread)


def _weights(name: str, likelihood: Likelihood, block: str | None = None, expectation: Expectation | None = None) -> float:
    case = golden(name)
    X, y, prior = _t(case["X"]), _t(case["y"]), case["prior_precision"]
    q = cvi(X, y, likelihood, prior=prior, tolerance=TIGHT, expectation=expectation).q.posterior
    at = case[block] if block else case
    return max(largest(q.mean, _t(at["mean"])), largest(q.covariance, _t(at["cov"])))


_logistic = partial(_weights, "logistic", _LOGIT)


def _newton_path() -> float:
    case = golden("logistic")
    X, y = _t(case["X"]), _t(case["y"])
    prior = WeightSpace(X, Full(torch.zeros(3, dtype=torch.float64), case["prior_precision"]))
    q, gap = prior, 0.0
    for weights in case["newton"][1:]:
        q = NEWTON_SITES.step(q, prior, LikelihoodLoss(Bernoulli(), y))
        gap = max(gap, largest(q.posterior.mean, _t(weights)))
    return gap


def _student_t() -> float:
    case = golden("student_t")
    y = _t(case["y"])
    likelihood = StudentT(df=case["nu"], scale=case["scale"], nodes=NODES)
    q = cvi(torch.ones_like(y), y, likelihood, prior=case["prior_precision"], tolerance=TIGHT).q.posterior
    return max(abs(q.mean.item() - case["mean"]), abs(q.covariance.item() - case["var"]))


def _negative_binomial() -> float:
    """With a tiny dispersion it is the Poisson of the golden numbers, to first order; their Richardson limit is compared."""
    case = golden("poisson")
    X, y = _t(case["X"]), _t(case["y"])

    def mean(dispersion: float) -> Tensor:
        likelihood = NegativeBinomial(dispersion=dispersion, nodes=NODES)
        found: Tensor = cvi(X, y, likelihood, prior=case["prior_precision"], tolerance=TIGHT).q.posterior.mean
        return found

    return largest(2 * mean(1e-5) - mean(2e-5), _t(case["mean"]))


def _covariance(case: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        gap = (a[:, None] - b[None]).square().sum(-1)
        return case["signal_std"] ** 2 * (gap / (-2 * case["lengthscale"] ** 2)).exp()

    return kernel


def _gp_regression() -> float:
    case = golden("gp_regression")
    fit = cvi(_t(case["x"]), _t(case["y"]), Gaussian(variance=case["noise_var"]), kernel=_covariance(case))
    return largest(fit.predict(_t(case["x_test"]))[0], _t(case["mean"]))


def _gp(likelihood: Likelihood, block: str, expectation: Expectation | None = None) -> float:
    case = golden("gp_classification")
    labels = (_t(case["y"]) + 1) / 2
    fit = cvi(_t(case["x"]), labels, likelihood, kernel=_covariance(case), tolerance=TIGHT, expectation=expectation)
    return largest(fit.q.mean if block == "mode" else fit.predict(_t(case["x_test"]))[0], _t(case[block]))


def _low_rank() -> float:
    """With as many directions as weights it reaches the optimum of the full Gaussian."""
    case = golden("logistic")
    loss, origin = LinearLoss(_t(case["X"]), _LOGIT, _t(case["y"])), _t([0.0] * 3)
    prior = Diagonal(origin, origin + case["prior_precision"])
    q: Any = LowRank(origin, 0.0, case["prior_precision"], rank=3)
    for _ in range(60):
        q = _ADDITIVE.step(q, prior, loss, 0.5)
    return max(largest(q.mean, _t(case[_FULL]["mean"])), largest(q.covariance, _t(case[_FULL]["cov"])))


def _mixture() -> float:
    case = golden("mixture")
    q = Mixture(_t(case["means"])[:, None], 1 / _t(case["vars"])[:, None], _t(case["weights"]).log())
    found = _GRID_HESSIAN.step(q, None, Loss(lambda x: ((x**2 - 4) ** 2 / 4 + 0.3 * x).sum()), case["rho"])
    ratio = found.log_weights[0] - found.log_weights[1]
    gaps = [largest(getattr(found, name).flatten(), _t(case["step"][name])) for name in ("mean", "precision")]
    return max(*gaps, largest(ratio, _t(case["step"]["log_weight_ratio"])))


def _multimodal() -> float:
    """Two components at the two minima of a double well, beside Newton's method from both sides."""

    def well(x: Tensor) -> Tensor:
        return 10 * ((x**2 - 4) ** 2 / 4 + 0.3 * x).sum()

    q: Any = Mixture(_t([[-1.5], [1.5]]), _t([[100.0], [100.0]]))
    for _ in range(60):
        q = _MODES.step(q, None, Loss(well), 0.5)
    return largest(q.mean, torch.stack([newton(well, start, steps=50).mean for start in _t([[-2.5], [2.5]])]))


_BLR = "Khan & Rue 2023, sec."
_FULL, _DIAGONAL = "full_gaussian_vi", "diag_gaussian_vi"
_CVI = "Khan & Lin 2017"
_END = "up to 1, to the end"
_OPTIMUM = "optimum by L-BFGS"
_MODE = "optimum by scikit-learn"
_ADDITIVE = BayesRule(Exact(), Zero(), Additive())
_GRID_HESSIAN = BayesRule(GaussHermite(200), Hessian(), Natural())
_MODES = BayesRule(Delta(), Hessian(), Natural())
_GRID = BayesRule(GaussHermite(NODES), DiagonalHessian(), Natural())

# name, slots, family, rates, twin, source, difference
MODELS: list[tuple[str, BayesRule, type, str, str, str, Callable[[], float]]] = [
    ("GP regression", CVI, FunctionSpace, "1, one step", "closed form", f"{_BLR} 5.1", _gp_regression),
    ("Newton for GLMs", NEWTON_SITES, WeightSpace, "1", "Newton's path", f"{_BLR} 3.2", _newton_path),
    (
        "Laplace for GLMs",
        NEWTON_SITES,
        WeightSpace,
        _END,
        _MODE,
        f"{_BLR} 4.4",
        partial(_logistic, "laplace", Delta()),
    ),
    (
        "Laplace for GP classification",
        NEWTON_SITES,
        FunctionSpace,
        _END,
        _MODE,
        f"{_BLR} 4.4",
        partial(_gp, _LOGIT, "mode", Delta()),
    ),
    ("natural-gradient VI, full", CVI, Full, _END, _OPTIMUM, f"{_BLR} 5.4", partial(_logistic_vi, Full, _FULL)),
    (
        "natural-gradient VI, diagonal",
        CVI,
        Diagonal,
        _END,
        _OPTIMUM,
        f"{_BLR} 5.4",
        partial(_logistic_vi, Diagonal, _DIAGONAL),
    ),
    ("natural-gradient VI, low rank", _ADDITIVE, LowRank, "0.5, to the end", _OPTIMUM, f"{_BLR} 5.4", _low_rank),
    ("natural-gradient VI, mixture", _GRID_HESSIAN, Mixture, "0.05", "one step by grid integration", "Lin et al. 2019", _mixture),
    ("multimodal optimization", _MODES, Mixture, "0.5", "Newton from two starts", f"{_BLR} 3.2", _multimodal),
    ("CVI logistic regression", CVI, WeightSpace, _END, _OPTIMUM, _CVI, partial(_logistic, _FULL)),
    (
        "CVI by quadrature",
        _GRID,
        WeightSpace,
        _END,
        _OPTIMUM,
        _CVI,
        partial(_logistic, _FULL, GaussHermite(NODES)),
    ),
    ("CVI Poisson regression", CVI, WeightSpace, _END, _OPTIMUM, _CVI, partial(_weights, "poisson", Poisson())),
    ("CVI negative binomial", CVI, WeightSpace, _END, "Poisson optimum, dispersion to 0", _CVI, _negative_binomial),
    ("CVI Student-t regression", CVI, WeightSpace, _END, "grid quadrature and Nelder-Mead", _CVI, _student_t),
    ("GP classification, logit", CVI, FunctionSpace, _END, _OPTIMUM, _CVI, partial(_gp, _LOGIT, "logit")),
    ("GP classification, probit", CVI, FunctionSpace, _END, _OPTIMUM, _CVI, partial(_gp, _PROBIT, "probit")),
]


def _model(name: str, rule: BayesRule, family: type, rates: str, twin: str, source: str, difference: Callable[[], float]) -> Row:
    return Row(name, lambda: (rule, family), rates, twin, difference, source)


ROWS = [*(_pair(*pair) for pair in PAIRS), *(_model(*model) for model in MODELS)]
