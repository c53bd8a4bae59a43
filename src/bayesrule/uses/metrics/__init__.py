r"""How good are predictions? Pure functions on tensors, on any device.

Classifiers are measured by class probabilities ``probs`` of shape (N, K) and integer ``labels`` of shape (N,), or by one score
for each example of shape (N,). Logarithms are natural, and averages run over the examples. Sums are taken in float64 (float32
on devices that have no float64), so a figure does not depend on the precision of the network.

The confidence of an example is its largest probability. Examples of equal confidence or score have no order of their
own; where an order is needed, the result is the mean over all orders, hence the same for every shuffling of the data.
"""

from .binning import Reliability, calibration_error, classwise_calibration_error, reliability
from .checks import check_labels
from .classification import accuracy, brier, classification_metrics, entropy, nll
from .language import bits_per_byte, perplexity, token_nll
from .ranking import RiskCoverage, aupr, aurc, auroc, coverage_at_risk, eaurc, fpr_at_tpr, ood_metrics, risk_coverage
from .regression import coverage, crps, gaussian_nll, interval_width, quantile_coverage, rmse
from .streaming import (
    AUPR,
    AURC,
    AUROC,
    CRPS,
    EAURC,
    FPR95,
    Accuracy,
    AdaptiveCalibrationError,
    BitsPerByte,
    BrierScore,
    CalibrationError,
    CategoricalNLL,
    ClasswiseCalibrationError,
    Coverage,
    CoverageAtRisk,
    GaussianNLL,
    IntervalWidth,
    Perplexity,
    RootMeanSquaredError,
    Streaming,
    TokenNLL,
)
from .unknown import energy, max_probability

__all__ = [
    "AUPR",
    "AURC",
    "AUROC",
    "CRPS",
    "EAURC",
    "FPR95",
    "Accuracy",
    "AdaptiveCalibrationError",
    "BitsPerByte",
    "BrierScore",
    "CalibrationError",
    "CategoricalNLL",
    "ClasswiseCalibrationError",
    "Coverage",
    "CoverageAtRisk",
    "GaussianNLL",
    "IntervalWidth",
    "Perplexity",
    "Reliability",
    "RiskCoverage",
    "RootMeanSquaredError",
    "Streaming",
    "TokenNLL",
    "accuracy",
    "aupr",
    "aurc",
    "auroc",
    "bits_per_byte",
    "brier",
    "calibration_error",
    "check_labels",
    "classification_metrics",
    "classwise_calibration_error",
    "coverage",
    "coverage_at_risk",
    "crps",
    "eaurc",
    "energy",
    "entropy",
    "fpr_at_tpr",
    "gaussian_nll",
    "interval_width",
    "max_probability",
    "nll",
    "ood_metrics",
    "perplexity",
    "quantile_coverage",
    "reliability",
    "risk_coverage",
    "rmse",
    "token_nll",
]
