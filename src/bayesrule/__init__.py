"""The Bayesian learning rule for PyTorch: one rule, many algorithms, one posterior."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "rule": "BayesRule Curvature Expectation Inertia Look NoInertia Oracle Rates Retraction",
    "family": "DomainError Family Gaussian",
    "vector": "Vector",
    "noise": "CounterNoise Noise",
    "families.exponential": "ExponentialFamily",
    "families.gaussian": "Diagonal Fixed Full Isotropic",
    "families.normal": "Normal",
    "families.discrete": "Bernoulli Categorical Poisson SignedBernoulli",
    "families.positive": "Exponential Gamma InverseGamma",
    "families.simplex": "Beta Dirichlet",
    "families.circular": "VonMises",
    "families.matrices": "NormalGamma NormalInverseGamma NormalInverseWishart Wishart",
    "estimators.oracle": "Loss ModelLoss Quadratic",
    "estimators.expectations": "Delta Enumerate Exact GaussHermite MonteCarlo Pathwise Score",
    "estimators.curvatures": "DiagonalHessian EmpiricalFisher GaussNewton Hessian Hutchinson Reparameterized SquaredGradient Zero",
    "retractions": "Additive Natural Riemannian SquareRoot",
    "momentum": "HeavyBall Momentum",
    "posterior": "Posterior sampled",
    "posthoc.trajectories": "SWAG",
    "optimizers.optimizer": "BayesOptimizer",
    "optimizers.first_order": "SGD RMSprop Adam AdamW",
    "optimizers.variational": "IVON",
    "optimizers.perturbed": "Vadam Vprop",
    "optimizers.online_newton": "OGN VOGN VON",
    "optimizers.sharpness": "BSAM SAM",
    "optimizers.binary": "STE BayesBiNN",
    "optimizers.eigenspace": "EVON",
    "optimizers.splitting": "split_matrices",
    "optimizers.covariance": "IBLR SLANG",
    "optimizers.components": "MultiIVON",
    "optimizers.dropout": "Dropout",
    "families.spike_slab": "SpikeAndSlab",
    "estimators.masks": "Masks",
    "families.signs": "HardSigns Signs",
    "estimators.relaxed": "Relaxed",
    "estimators.adversarial": "Adversarial Magnitude",
    "families.eigen": "Eigen",
    "families.low_rank": "DiagonalPlusFactor LowRank",
    "families.deviations": "Deviations",
    "families.kronecker": "Kronecker KroneckerProduct",
    "families.mixture": "Mixture",
    "families.latent": "FunctionSpace WeightSpace",
    "estimators.starts": "start_curvature",
    "estimators.factored": "EmpiricalFisherFactor GaussNewtonFactor",
    "estimators.predictors": "LikelihoodLoss LinearLoss",
    "algorithms.inference": "Inference infer",
    "algorithms.cvi": "cvi",
    "algorithms.newton": "gradient_descent laplace newton",
    "algorithms.regression": "linear_regression ridge",
    "algorithms.table": "table",
    "uses.prediction": "Prediction predict",
    "uses.evaluation": "evaluate",
    "uses.calibration": "calibrate fit_temperature",
    "uses.abstaining": "ConformalSets selective_threshold",
    "uses.sensitivity": "Sensitivity",
    "uses.tracking": "TrackSensitivity",
    "uses.adaptation.memory": "Memory",
    "uses.adaptation.adapting": "adapt",
    "uses.merging.posteriors": "merge",
    "uses.merging.mixtures": "merge_mixtures",
    "uses.merging.previews": "preview",
    "uses.merging.mismatches": "gradient_mismatch",
    "uses.merging.sidecar": "precision save_precision",
    "uses.merging.streaming": "merge_checkpoints",
    "uses.adaptation.continual": "ContinualLearner",
    "uses.adaptation.unlearning": "forget",
}
_MODULES = {"conjugate": "algorithms.conjugate", "likelihoods": "estimators.likelihoods", "metrics": "uses.metrics"}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"bayesrule.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'bayesrule' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bayesrule.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
