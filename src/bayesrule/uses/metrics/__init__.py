r"""How good are predictions? Pure functions on tensors, on any device.

Classifiers are measured by class probabilities ``probs`` of shape (N, K) and integer ``labels`` of shape (N,), or by one score
for each example of shape (N,). Logarithms are natural, and averages run over the examples. Sums are taken in float64 (float32
on devices that have no float64), so a figure does not depend on the precision of the network.

The confidence of an example is its largest probability. Examples of equal confidence or score have no order of their
own; where an order is needed, the result is the mean over all orders, hence the same for every shuffling of the data.
"""

from .binning import Reliability, calibration_error, reliability
from .checks import check_labels
from .classification import accuracy, brier, classification_metrics, entropy, nll
from .ranking import RiskCoverage, aurc, auroc, risk_coverage

__all__ = [
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "aurc",
    "auroc",
    "brier",
    "calibration_error",
    "check_labels",
    "classification_metrics",
    "entropy",
    "nll",
    "reliability",
    "risk_coverage",
]
