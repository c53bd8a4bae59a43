r"""Mixtures of Gaussians, :math:`q(\theta) = \sum_k \pi_k N(\theta; m_k, S_k^{-1})`: posteriors with several modes.

A mixture is no exponential family, but theta and the component together are a minimal conditional one. Its natural parameters
are those of each Gaussian and :math:`\log \pi_k / \pi_K`, and its Fisher matrix is :math:`\pi_k F_k` block by block, so the weights
in front of expectations cancel. The entropy has no closed form, so it is looked at with the loss: the **objective** is

.. math::  \phi = \ell + \log q - \log p_0,

and the rule, with :math:`E_k` the expectation under component k, is

.. math::  S_k \leftarrow S_k + \rho E_k[\nabla^2 \phi], \quad m_k \leftarrow m_k - \rho S_k^{-1} E_k[\nabla \phi], \quad
           \log \tfrac{\pi_k}{\pi_K} \leftarrow \log \tfrac{\pi_k}{\pi_K} - \rho\, (E_k[\phi] - E_K[\phi]).

Source: W. Lin, M. E. Khan and M. Schmidt (2019), arXiv:1906.02914; Khan and Rue (2023), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal

from ..family import DomainError, Family
from ..noise import Noise
from ..rule import Look, Oracle, Point
from ..vector import Vector, holds
from .gaussian import Full
from .structure import Elementwise


@dataclass(frozen=True, eq=False)
class Mixture(Family):
    r"""K Gaussians with weights, each with a diagonal or a full precision.

    For losses with several minima, and posteriors that no single Gaussian is near. With the expectation Delta each component goes
    to a minimum of its own, and the weights say what each is worth; with GaussHermite (D <= 3) or MonteCarlo it is variational
    inference. Costs K times what one Gaussian costs, and K^2 D^2 for the density of one component at another's place.

    .. math::  \lambda = \bigl(S_k m_k,\; -\tfrac12 S_k,\; \log \tfrac{\pi_k}{\pi_K}\bigr), \qquad
               \mu = \bigl(\pi_k m_k,\; \pi_k (S_k^{-1} + m_k m_k^T),\; \pi_k\bigr).

    The loss counts as it is (ess is 1): minus the log likelihood of all data. The prior is a Diagonal, a Full, a Mixture, or
    None where it is flat. The retraction :class:`~bayesrule.Natural` is the rule to the letter, and may leave the family where
    :math:`E_k[\nabla^2 \phi]` is negative; :class:`~bayesrule.Riemannian` never does, but leaves the weights as they are.

    Args:
        mean: The m_k, shape (K, D).
        precision: The S_k, shape (K, D) for diagonals or (K, D, D).
        log_weights: Logarithms of the pi_k up to a constant, shape (K,), or a number for equal weights.

    Raises:
        ValueError: Shapes do not agree, or weights are not finite. A DomainError if a precision is not positive definite.
        TypeError: The entropy or a KL divergence is asked for; a look lacks what a step needs.

    Example:
        Both minima of a double well:

        >>> import bayesrule as br
        >>> rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())
        >>> loss = br.Loss(lambda x: 10 * (x.square() - 1).square().sum())
        >>> q = Mixture(torch.tensor([[-0.8], [1.5]]), torch.full((2, 1, 1), 40.0))
        >>> for _ in range(20):
        ...     q = rule.step(q, None, loss, rate=0.7)
        >>> q.mean.flatten().round(decimals=4)
        tensor([-1.,  1.])

    Differs from: Lin et al. draw theta from the whole of q, weighted by responsibilities; here each component has its own draws.

    Source: W. Lin, M. E. Khan and M. Schmidt (2019), arXiv:1906.02914.
    """

    mean: Tensor
    precision: Tensor
    log_weights: Any = 0.0
    _root: Tensor = field(init=False, repr=False)
    _log_tops: Tensor = field(init=False, repr=False)  # logarithms of pi_k N(m_k; m_k, S_k^-1), shape (K,)

    ess: ClassVar[float] = 1.0
    is_exponential_family: ClassVar[bool] = False
    reparameterizable: ClassVar[bool] = False
    """Whether a draw from the whole is differentiable: which component it is of is not."""

    def __post_init__(self) -> None:
        if self.mean.dim() != 2 or not len(self.mean):
            raise ValueError(f"the mean of a Mixture must have shape (K, D) with K > 0, got {tuple(self.mean.shape)}")
        whole = (*self.mean.shape, self.mean.shape[1])
        if tuple(self.precision.shape) not in (tuple(self.mean.shape), whole):
            shapes = f"{tuple(self.mean.shape)} or {whole}"
            raise ValueError(f"the precision of this Mixture must have shape {shapes}, got {tuple(self.precision.shape)}")
        weights = torch.as_tensor(self.log_weights, dtype=self.mean.dtype, device=self.mean.device)
        if weights.shape not in ((), (len(self.mean),)):
            raise ValueError(f"log_weights must have shape ({len(self.mean)},), got {tuple(weights.shape)}")
        if not holds(weights.isfinite()):
            raise ValueError(f"log_weights must be finite, got {weights.tolist()}: leave a component without weight out")
        object.__setattr__(self, "log_weights", weights.expand(len(self.mean)).log_softmax(0))
        # made here: what is first made inside a transform of torch.func cannot be kept for later
        root, found = self._factorized()
        object.__setattr__(self, "_root", root)
        half = (root if self.diagonal else root.diagonal(dim1=-2, dim2=-1)).log().sum(-1)
        object.__setattr__(self, "_log_tops", self.log_weights + half - self.mean.shape[1] / 2 * math.log(2 * math.pi))
        if not holds(found):
            first = int((~found).nonzero()[0])
            raise DomainError(
                f"the precision of component {first} is not positive definite: use the retraction Riemannian or a smaller rate"
            )

    @property
    def weights(self) -> Tensor:
        """The pi_k, shape (K,)."""
        return self.log_weights.exp()

    # The components; a v has shape (..., K, D)

    @property
    def diagonal(self) -> bool:
        """Whether precisions are diagonals."""
        return self.precision.dim() == 2

    def _factorized(self) -> tuple[Tensor, Tensor]:
        """A root of each precision, lower triangular or a diagonal, and whether there is one, shape (K,)."""
        if self.diagonal:
            return self.precision.sqrt(), (self.precision > 0).all(1) & self.precision.isfinite().all(1)
        root, failed = torch.linalg.cholesky_ex(self.precision)
        return root, (failed == 0) & root.isfinite().all(-1).all(-1)

    def stretch(self, v: Tensor) -> Tensor:
        """S_k v_k."""
        return self._apply(self.precision, v)

    def _apply(self, matrix: Tensor, v: Tensor) -> Tensor:
        return matrix * v if self.diagonal else (matrix @ v[..., None])[..., 0]

    def precondition(self, v: Tensor) -> Tensor:
        """S_k^-1 v_k."""
        return v / self.precision if self.diagonal else torch.cholesky_solve(v[..., None], self._root)[..., 0]

    def root_solve(self, v: Tensor) -> Tensor:
        """R_k v_k with R_k R_k^T = S_k^-1: unit normals become offsets of every component."""
        return v / self._root if self.diagonal else torch.linalg.solve_triangular(self._root.mT, v[..., None], upper=True)[..., 0]

    # The density

    def _apart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of pi_k N(theta; m_k, S_k^-1), shape (..., K), and the slopes of the Gaussians' logarithms, (..., K, D)."""
        gap = theta[..., None, :] - self.mean
        slope = -self.stretch(gap)
        return self._log_tops + (gap * slope).sum(-1) / 2, slope

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density, shape (...), for theta of shape (..., D)."""
        return self._apart(theta)[0].logsumexp(-1)

    def responsibilities(self, theta: Tensor) -> Tensor:
        """Probabilities that theta, shape (..., D), comes from each component, shape (..., K)."""
        return self._apart(theta)[0].softmax(-1)

    def log_prob_gradient(self, theta: Tensor) -> Tensor:
        """Gradient of the log density, shaped like theta, (..., D): the slopes of the components, by responsibility."""
        logs, slopes = self._apart(theta)
        return (logs.softmax(-1)[..., None] * slopes).sum(-2)

    def log_prob_hessian(self, theta: Tensor, diagonal: bool = False) -> Tensor:
        """Hessian of the log density, shape (..., D, D), or its diagonal, shape (..., D), at theta of shape (..., D).

        The covariance of the components' slopes under the responsibilities, less their mean precision.
        """
        logs, slopes = self._apart(theta)
        r = logs.softmax(-1)
        apart = slopes - (r[..., None] * slopes).sum(-2, keepdim=True)
        if diagonal:
            own = self.precision if self.diagonal else self.precision.diagonal(dim1=-2, dim2=-1)
            return (r[..., None] * (apart**2 - own)).sum(-2)
        own = torch.diag_embed(self.precision) if self.diagonal else self.precision
        return (apart * r[..., None]).mT @ apart - torch.einsum("...k,kij->...ij", r, own)

    def to_torch(self) -> MixtureSameFamily:
        """The same distribution of torch.distributions."""
        components: Distribution
        if self.diagonal:
            components = Independent(Normal(self.mean, self.precision.rsqrt(), validate_args=False), 1, validate_args=False)
        else:
            components = MultivariateNormal(self.mean, precision_matrix=self.precision, validate_args=False)
        return MixtureSameFamily(Categorical(logits=self.log_weights, validate_args=False), components, validate_args=False)

    def entropy(self) -> NoReturn:
        raise TypeError("the entropy of a Mixture has no closed form; look with the rule and ask bound(look, prior)")

    def kl(self, other: Any) -> NoReturn:
        raise TypeError("KL divergences of a Mixture have no closed form; look with the rule and ask bound(look, prior)")

    # Draws

    def sample(self, noise: Noise) -> Tensor:
        """One draw from the whole, shape (D,)."""
        like = Vector([self.log_weights[0], self.mean])  # apart, so that which and where are independent
        chosen = (noise.uniform(like)[0] > self.weights.cumsum(0)[:-1]).sum()
        return (self.mean + self.root_solve(noise.normal(like)[1]))[chosen]

    def place(self, where: Point | None) -> Tensor:
        """One theta for each component, shape (K, D): its mean, or an offset of shape (K, D) from there."""
        return self.mean if where is None else self.mean + where

    def draw(self, noise: Noise) -> Tensor:
        """One draw of every component as an offset, shape (K, D)."""
        return self.root_solve(noise.normal(self.mean))

    def grid(self, rule: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, Point]]:
        size = self.mean.shape[1]
        if size > 3:
            raise ValueError(f"a grid of {len(rule)} nodes in each of {size} dimensions is too large: use MonteCarlo")
        for corner in product(rule, repeat=size):
            z = self.mean.new_tensor([node for node, _ in corner]).expand_as(self.mean)
            yield math.prod(weight for _, weight in corner), self.root_solve(z)

    # What is looked at

    def objective(self, loss: Callable[[Point], Oracle], prior: Any) -> Callable[[Point], Oracle]:
        """The loss and log q - log prior, at one theta for each component; one call of the loss for each."""
        p = _prior(prior)

        def phi(theta: Tensor) -> Oracle:
            return _PhiAt(self, p, theta, tuple(loss(one) for one in theta))

        return phi

    def bound(self, look: Look, prior: Any) -> Tensor:
        """The evidence bound - sum_k pi_k E_k[phi], shape (), from a look at the objective; up to a constant under a flat prior."""
        if look.value is None:
            raise TypeError("the evidence bound needs the value of the loss; this look has none")
        return -(self.weights * look.value).sum()

    def project(self, matrix: Tensor) -> Tensor:
        """What the structure keeps of symmetric matrices, shape (K, D, D)."""
        return matrix.diagonal(dim1=-2, dim2=-1) if self.diagonal else (matrix + matrix.mT) / 2

    def keep_diagonal(self, diagonal: Tensor) -> Tensor:
        """What the structure keeps of matrices with these diagonals, shape (K, D), and nothing else."""
        return diagonal if self.diagonal else torch.diag_embed(diagonal)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """The part of (a_k b_k^T + b_k a_k^T) / 2 that the structure keeps."""
        return a * b if self.diagonal else self.project(a[..., :, None] * b[..., None, :])

    def bend(self, v: Tensor) -> NoReturn:
        raise TypeError("log q is part of what a Mixture looks at, which is that control variate already; leave it out")

    # The conditional exponential family

    def natural(self) -> Vector:
        return Vector([self.stretch(self.mean), self.precision * -0.5, self.log_weights[:-1] - self.log_weights[-1]])

    def from_natural(self, natural: Vector) -> Self:
        moved = replace(self, precision=natural[1] * -2, log_weights=torch.cat([natural[2], natural[2].new_zeros(1)]))
        return moved.moved(mean=moved.precondition(natural[0]))

    def in_domain(self, natural: Vector) -> Tensor:
        """Whether a natural parameter belongs to a member, shape ()."""
        finite = torch.stack([part.isfinite().all() for part in natural]).all()
        second = torch.nan_to_num(natural[1] * -2)
        positive = (second > 0).all() if self.diagonal else (torch.linalg.cholesky_ex(second).info == 0).all()
        return finite & positive

    def expected(self) -> Vector:
        own = 1 / self.precision if self.diagonal else torch.cholesky_inverse(self._root)
        second = own + self.outer(self.mean, self.mean)
        return Vector([self._weigh(self.mean), self._weigh(second), self.weights[:-1]])

    def _weigh(self, each: Tensor) -> Tensor:
        """Each component's times its weight."""
        return self.weights.view(-1, *[1] * (each.dim() - 1)) * each

    def natural_gradient(self, look: Look) -> Vector:
        if look.curvature is None or look.value is None:
            missing = "curvature" if look.curvature is None else "value of the loss"
            raise TypeError(f"the natural gradient of a Mixture needs a {missing}; the look has none")
        if look.curvature.shape != self.precision.shape:
            shapes = f"{tuple(self.precision.shape)}, got {tuple(look.curvature.shape)}"
            raise TypeError(f"the curvature of this Mixture must have shape {shapes}")
        first = look.gradient - self._apply(look.curvature, self.mean)
        return Vector([first, look.curvature / 2, look.value[:-1] - look.value[-1]])

    def kl_gradient(self, prior: Any) -> Vector:
        """Zero: log q - log prior is in the objective."""
        return self.natural() * 0.0

    # What the retractions of mean and precision ask. They move components and leave the weights.

    @property
    def hess(self) -> Tensor:
        """Where the curvature of the objective goes: zero."""
        return torch.zeros_like(self.precision)

    def moved(self, *, mean: Tensor | None = None, hess: Tensor | None = None) -> Self:
        """The same weights with other means, or with precisions that this much is added to."""
        precision = self.precision if hess is None else self.precision + hess
        return replace(self, mean=self.mean if mean is None else mean, precision=precision)

    def sandwich(self, d: Tensor) -> Tensor:
        """d_k S_k^-1 d_k for symmetric d_k of the structure."""
        if self.diagonal:
            return d * d / self.precision
        half = torch.linalg.solve_triangular(self._root, d, upper=False)
        return half.mT @ half

    def prior_gradient(self, prior: Any) -> float:
        """Zero: the prior is in the objective."""
        return 0.0


def _prior(prior: Any) -> Mixture | None:
    """A prior as a mixture; None where it is flat."""
    if prior is None or isinstance(prior, Mixture):
        return prior
    if not isinstance(prior, Full | Elementwise):
        raise TypeError(f"the prior of a Mixture is a Gaussian, a Mixture, or None where it is flat; got a {type(prior).__name__}")
    precision = prior.precision if isinstance(prior, Full) else prior.mean * 0 + prior.precision
    return None if holds(precision == 0) else Mixture(prior.mean[None], precision[None])


@dataclass(frozen=True)
class _PhiAt(Oracle):
    """What is known of loss + log q - log prior at one theta for each component."""

    q: Mixture
    prior: Mixture | None
    theta: Tensor  # (K, D)
    losses: tuple[Oracle, ...]

    def _with(self, own: list[Any], of: Callable[[Mixture], Tensor]) -> Tensor:
        total = torch.stack(own) + of(self.q)
        return total if self.prior is None else total - of(self.prior)

    def value(self) -> Tensor | None:
        values = [loss.value() for loss in self.losses]
        return None if any(value is None for value in values) else self._with(values, lambda p: p.log_prob(self.theta))

    def gradient(self) -> Tensor:
        return self._with([loss.gradient() for loss in self.losses], lambda p: p.log_prob_gradient(self.theta))

    def hessian(self) -> Tensor:
        return self._with([loss.hessian() for loss in self.losses], lambda p: p.log_prob_hessian(self.theta))

    def gauss_newton(self) -> Tensor:
        """The loss's Gauss-Newton matrix and the Hessian of the rest, shape (K, D, D)."""
        return self._with([loss.gauss_newton() for loss in self.losses], lambda p: p.log_prob_hessian(self.theta))

    def diagonal(self) -> Tensor:
        """Diagonals of the Hessians, shape (K, D); by way of the loss's Hessian where it does not know its diagonal."""
        own = [loss.hessian().diagonal() if type(loss).diagonal is Oracle.diagonal else loss.diagonal() for loss in self.losses]
        return self._with(own, lambda p: p.log_prob_hessian(self.theta, diagonal=True))
