"""Curvatures that come as factors: B with B B^T in the place of the Hessian, for families of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..rule import Curvature, Oracle, Point


@dataclass(frozen=True)
class GaussNewtonFactor(Curvature):
    r"""The generalized Gauss-Newton matrix as a factor: :math:`B B^T`, B of shape (D, n).

    For :class:`~bayesrule.LowRank`: no matrix of shape (D, D) is made. Costs D n numbers for n outputs. The same curvature as
    :class:`~bayesrule.GaussNewton`.

    .. math::  B = \tfrac{1}{\sqrt n} [J_1^T L_1^{1/2}, \dots, J_n^T L_n^{1/2}], \qquad
               B B^T = \tfrac1n \textstyle\sum_i J_i^T L_i J_i.

    An instance of the slot curvature; it asks ``oracle.factor()``.

    Raises:
        TypeError: The oracle knows no factor.

    Example:
        >>> import torch
        >>> import bayesrule as br
        >>> X, likelihood = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), br.likelihoods.Gaussian()
        >>> loss, start = br.LinearLoss(X, likelihood, torch.tensor([2.0, 3.0])), br.LowRank(torch.zeros(2), rank=2)
        >>> rule = br.BayesRule(br.Delta(), GaussNewtonFactor(), br.Additive())
        >>> rule.step(start, br.Diagonal(torch.zeros(2)), loss).mean
        tensor([0.8000, 1.5000])

    Source: N. N. Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """

    degree = 1

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        return q.gather(oracle.factor())


@dataclass(frozen=True)
class EmpiricalFisherFactor(Curvature):
    r"""The mean product of the gradients of the examples, as a factor: :math:`\tfrac1n \sum_i g_i g_i^T`. Never negative.

    What :class:`~bayesrule.EmpiricalFisher` has the diagonal of, for families that hold more: :class:`~bayesrule.LowRank` without
    a matrix of shape (D, D), :class:`~bayesrule.Full` with it. Costs the gradients of n single examples, D n numbers.

    Source: A. Mishkin et al. (2018), SLANG, arXiv:1811.04504.
    """

    degree = 2
    squares_examples = True
    keeps_examples = True

    def __call__(self, q: Any, prior: Any, offset: Point | None, oracle: Oracle) -> Any:
        gradients = oracle.gradients()
        return q.gather(gradients.mT / len(gradients) ** 0.5)
