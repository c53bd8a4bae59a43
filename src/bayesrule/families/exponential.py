r"""Exponential families: :math:`q_\lambda(\theta) = h(\theta)\, \exp(\langle \lambda, T(\theta) \rangle - A(\lambda))`.

A family writes its statistics T, its log partition A and the three ways to name a member (natural, expected, standard);
entropy, KL, density, Fisher matrix and the rule's gradients follow from these for all alike:

.. math::  \mu = \nabla A, \quad F = \nabla^2 A, \quad H = A - \langle \lambda, \mu \rangle - E[\log h], \quad
           KL(q \| p) = A(\lambda_p) - A(\lambda_q) - \langle \lambda_p - \lambda_q, \mu_q \rangle.

Convention: h = 1 wherever that is possible, so that Bayes' rule adds natural parameters. A Beta and a Dirichlet therefore have
their concentrations less one, a Gamma has (concentration - 1, -rate). Only the Poisson has another h, 1 / x!.

Shapes: a member has a ``batch_shape`` of independent problems in front, and every method works on each of them alone. Values
are made in double precision and given in the dtype of the parameters: in single precision an entropy loses all its digits
at a concentration of a million. All maps are differentiable and work under ``torch.func.vmap``, where nothing is checked.

Source: O. Barndorff-Nielsen (1978); M. J. Wainwright and M. I. Jordan (2008), Graphical models, exponential families, and
variational inference.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ..family import DomainError, Family
from ..noise import Noise
from ..rule import Look, Point
from ..vector import Vector, holds
from .blocks import blocks, coordinates, derivative


class ExponentialFamily(Family):
    """What follows from statistics and log partition."""

    is_exponential_family = True
    reparameterizable: ClassVar[bool] = True
    """Whether a draw is differentiable in the parameters."""

    @property
    def batch_shape(self) -> Size:
        """Shape of the independent problems."""
        return Size()

    @abstractmethod
    def statistics(self, theta: Any) -> Vector:
        """T(theta), block by block, shape (..., *batch_shape, *block)."""

    @abstractmethod
    def log_partition(self) -> Tensor:
        """A, in nats, shape batch_shape; twice differentiable."""

    @abstractmethod
    def from_expected(self, expected: Vector) -> Self:
        """The member with this expectation parameter."""

    @abstractmethod
    def in_domain(self, natural: Vector) -> Tensor:
        """Whether a natural parameter belongs to a member, shape batch_shape."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same member in another dtype."""

    @abstractmethod
    def to_torch(self) -> Distribution:
        """The same distribution of torch.distributions; TypeError where torch has none."""

    def fisher_mul(self, v: Vector) -> Vector:
        """F v, for a v shaped like the natural parameter: how mu answers to a change of lambda."""
        return derivative(lambda natural: self.from_natural(natural).expected(), self.natural(), v)

    def fisher_solve(self, v: Vector) -> Vector:
        """F^-1 v, for a v shaped like the expectation parameter: from grad_lambda to grad_mu."""
        return derivative(lambda expected: self.from_expected(expected).natural(), self.expected(), v)

    def natural_gradient(self, look: Look) -> Point:
        return look.gradient

    def as_look(self, natural_gradient: Vector) -> Look:
        """The look that has this natural gradient: the reverse of :meth:`natural_gradient`."""
        return Look(None, natural_gradient, None)

    def score(self, where: Point) -> Look:
        return Look(None, self.fisher_solve(self.statistics(where) - self.expected()), None)


class Standard(ExponentialFamily):
    """A family whose members are named by the parameters that users know: the fields of the class, checked.

    A number or tensor each; they are brought to one dtype and one batch shape.
    """

    constraints: ClassVar[dict[str, str]]
    """Field -> "real", "positive", "not negative" or "positive definite"."""
    dims: ClassVar[dict[str, int]] = {}
    """Field -> dimensions of one problem's value, where that is not 0."""
    block_dims: ClassVar[tuple[int, ...]] = (0, 0)
    """Dimensions of one problem's natural blocks; 2 is a symmetric matrix."""
    torch_class: ClassVar[type[Distribution] | None] = None

    # What a family writes, in double precision

    @classmethod
    @abstractmethod
    def _of_natural(cls, natural: Vector) -> tuple[Any, ...]:
        """The fields, from the natural parameter."""

    @classmethod
    @abstractmethod
    def _of_expected(cls, expected: Vector) -> tuple[Any, ...]:
        """The fields, from the expectation parameter."""

    @abstractmethod
    def _statistics(self, theta: Any) -> Vector: ...

    @abstractmethod
    def _expected(self) -> Vector: ...

    @abstractmethod
    def _log_partition(self) -> Tensor: ...

    def _mean_log_base_measure(self) -> Any:
        return 0.0

    def log_base_measure(self, theta: Any) -> Any:
        """Log of h at theta; 0 unless said otherwise."""
        return 0.0

    def _faults(self) -> Iterator[tuple[str, Tensor, str]]:
        """Every demand on a field: its name, where it holds, and how it reads."""
        for name, kind in self.constraints.items():
            yield name, *_demand(kind, getattr(self, name), self.dims.get(name, 0))

    @classmethod
    def _read(cls, distribution: Any) -> tuple[Any, ...]:
        """The fields, from a distribution of ``torch_class``; the same names unless said otherwise."""
        return tuple(getattr(distribution, name) for name in cls.constraints)

    def _make(self) -> Distribution:
        if self.torch_class is None:
            raise TypeError(f"torch.distributions has no {type(self).__name__}; use sample, log_prob and entropy here")
        make: Callable[..., Distribution] = self.torch_class
        return make(*self._values, validate_args=False)

    # Members

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        given = {name: (getattr(self, name), self.dims.get(name, 0)) for name in names}
        values = _together(given, type(self).__name__)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)
        for name, valid, words in self._faults():
            if not holds(valid):
                value = getattr(self, name)
                first = value[~valid][0] if valid.shape else value
                raise ValueError(f"{name} of a {type(self).__name__} must be {words}, got {first.tolist()}")

    @property
    def _values(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.constraints)

    @property
    def _wide(self) -> Self:
        """The same member in double precision."""
        return self.to(torch.float64)

    def to(self, dtype: torch.dtype) -> Self:
        if self._values[0].dtype == dtype:
            return self
        return self._unchecked(*(value.to(dtype) for value in self._values))

    @classmethod
    def _unchecked(cls, *values: Tensor) -> Self:
        member = object.__new__(cls)
        for name, value in zip(cls.constraints, values, strict=True):
            object.__setattr__(member, name, value)
        return member

    def _narrow(self, value: Any) -> Any:
        """A result in the dtype of the parameters."""
        dtype = self._values[0].dtype
        return value.map(lambda part: part.to(dtype)) if isinstance(value, Vector) else value.to(dtype)

    @property
    def batch_shape(self) -> Size:
        name, value = next(iter(self.constraints)), self._values[0]
        return value.shape[: value.dim() - self.dims.get(name, 0)]

    def __getitem__(self, index: Any) -> Self:
        """Some of the batch."""
        return type(self)(*(value[index] for value in self._values))

    @classmethod
    def from_natural(cls, natural: Vector) -> Self:
        return cls._named(cls._of_natural, natural, "natural")

    @classmethod
    def from_expected(cls, expected: Vector) -> Self:
        return cls._named(cls._of_expected, expected, "expected")

    @classmethod
    def _named(cls, read: Callable[[Vector], tuple[Any, ...]], parameter: Vector, name: str) -> Self:
        if len(parameter) != len(cls.block_dims):
            raise ValueError(f"{name} of a {cls.__name__} must have {len(cls.block_dims)} blocks, got {len(parameter)}")
        dtype = parameter[0].dtype
        try:
            return cls(*(value.to(dtype) for value in read(parameter.map(Tensor.double))))
        except ValueError as error:
            raise DomainError(f"{name} is outside the domain of {cls.__name__}: {error}; take a smaller step") from None

    @classmethod
    def in_domain(cls, natural: Vector) -> Tensor:
        member = cls._unchecked(*cls._of_natural(natural.map(Tensor.double)))
        valid = [holds_here for _, holds_here, _ in member._faults()]
        return torch.stack(torch.broadcast_tensors(*valid)).all(0)

    @classmethod
    def from_torch(cls, distribution: Distribution) -> Self:
        """The same distribution, from torch.distributions."""
        if cls.torch_class is None or type(distribution) is not cls.torch_class:
            raise TypeError(f"a {cls.__name__} cannot be made from a {type(distribution).__name__}")
        return cls(*cls._read(distribution))

    def to_torch(self) -> Distribution:
        return self._make()

    # What follows

    def natural_gradient(self, look: Look) -> Point:
        if not isinstance(look.gradient, Vector) or len(look.gradient) != len(self.block_dims):
            raise TypeError(f"the look at a {type(self).__name__} must be grad_mu: use Exact, Enumerate, Pathwise or Score")
        return look.gradient

    def natural(self) -> Vector:
        return self._narrow(self._wide._natural())

    @abstractmethod
    def _natural(self) -> Vector: ...

    def expected(self) -> Vector:
        return self._narrow(self._wide._expected())

    def log_partition(self) -> Tensor:
        return self._narrow(self._wide._log_partition())

    def mean_log_base_measure(self) -> Tensor:
        """E_q[log h], shape batch_shape."""
        return self._narrow(self._wide._mean_log_base_measure() + torch.zeros_like(self._wide._log_partition()))

    def statistics(self, theta: Any) -> Vector:
        return self._narrow(self._wide._statistics(_wide(theta)))

    def _seen_from(self, other: Self) -> Self:
        """This member with the location of another as its origin, where entropy and KL do not change with that."""
        return self

    def _theta_from(self, theta: Any) -> Any:
        """Theta with this member's location as its origin."""
        return theta

    def entropy(self) -> Tensor:
        q = self._wide
        q = q._seen_from(q)
        return self._narrow(q._log_partition() - self._pair(q._natural(), q._expected()) - q._mean_log_base_measure())

    def kl(self, other: Self) -> Tensor:
        q, p = self._wide, other._wide
        q, p = q._seen_from(q), p._seen_from(q)
        total = p._log_partition() - q._log_partition() - self._pair(p._natural() - q._natural(), q._expected())
        return self._narrow(total)

    def log_prob(self, theta: Point) -> Tensor:
        q, theta = self._wide, _wide(theta)
        possible = self._supports(theta)
        theta, q = q._theta_from(theta), q._seen_from(q)
        natural, statistics = q._natural(), q._statistics(theta)
        # at the end of a support a logarithm is infinite, and its factor may be zero
        statistics = statistics.map(lambda t, n: torch.where(t.isinf() & (n == 0), 0.0, t), natural)
        value = self._pair(natural, statistics) - q._log_partition() + q.log_base_measure(theta)
        return self._narrow(torch.where(possible, value, -torch.inf))

    def _supports(self, theta: Any) -> Tensor:
        """Where theta can occur, problem by problem."""
        return torch.ones((), dtype=torch.bool, device=self._values[0].device)

    def _pair(self, natural: Vector, statistics: Vector) -> Tensor:
        """<lambda, T>, problem by problem."""
        blocks = zip(natural, statistics, self.block_dims, strict=True)
        total: Any = sum((a * b).sum(dim=tuple(range(-d, 0))) if d else a * b for a, b, d in blocks)
        return total

    @property
    def mean(self) -> Any:
        """E_q[theta], shape (*batch_shape, *event)."""
        return self.to_torch().mean

    @property
    def variance(self) -> Any:
        """Variance of every element of theta, shape (*batch_shape, *event)."""
        return self.to_torch().variance

    @property
    def stddev(self) -> Any:
        """Standard deviation of every element of theta, shape (*batch_shape, *event)."""
        return self.variance**0.5

    def sample(self, noise: Noise, shape: Sequence[int] = ()) -> Any:
        """Draws of theta, shape (*shape, *batch_shape, *event)."""
        with noise.forked(self._values[0]):
            return self._sample(Size(shape))

    def _sample(self, shape: Size) -> Any:
        distribution = self.to_torch()
        return distribution.rsample(shape) if distribution.has_rsample else distribution.sample(shape)

    def sample_statistics(self, noise: Noise, shape: Sequence[int] = ()) -> Vector:
        """T of draws; of those too that are too small for their dtype, where T is a logarithm."""
        return self.statistics(self.sample(noise, shape))

    def fisher_solve(self, v: Vector) -> Vector:
        columns = coordinates(v.map(Tensor.double), self.block_dims)
        solved = torch.linalg.solve(self._wide.fisher(), columns[..., None])[..., 0]
        return self._narrow(blocks(solved, self.natural(), self.block_dims))

    def fisher(self) -> Tensor:
        """F as a matrix, shape (*batch_shape, n, n), of the n independent numbers of lambda.

        Off-diagonal elements of a symmetric block count once, times the root of 2: in these coordinates the inner product of
        matrices is that of vectors.
        """
        natural = self.natural()
        flat = coordinates(natural, self.block_dims)
        units = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)

        def column(unit: Tensor) -> Tensor:
            return coordinates(self.fisher_mul(blocks(unit.expand_as(flat), natural, self.block_dims)), self.block_dims)

        return torch.stack([column(unit) for unit in units], dim=-1)


def _wide(theta: Any) -> Any:
    if isinstance(theta, Vector):
        return theta.map(_wide)
    return theta.double() if isinstance(theta, Tensor) else torch.as_tensor(theta, dtype=torch.float64)


def _demand(kind: str, value: Tensor, dims: int) -> tuple[Tensor, str]:
    """Where a value is what it must be, problem by problem, and how that reads."""
    finite = value.isfinite()
    if kind == "positive definite":
        finite = finite.all(-1).all(-1)
        symmetric = (value - value.mT).abs().amax((-2, -1)) <= 1e-4 * value.abs().amax((-2, -1))
        # a matrix with gaps is not asked for its root
        whole = torch.where(finite[..., None, None], value, torch.eye(value.shape[-1], dtype=value.dtype, device=value.device))
        return finite & symmetric & (torch.linalg.cholesky_ex(whole).info == 0), "symmetric and positive definite"
    valid = {"real": finite, "positive": finite & (value > 0), "not negative": finite & (value >= 0)}[kind]
    for _ in range(dims):
        valid = valid.all(-1)
    return valid, "finite" if kind == "real" else f"finite and {kind}"


def _together(given: dict[str, tuple[Any, int]], who: str) -> list[Tensor]:
    """Numbers and tensors (and the dimensions of one problem) as tensors of one dtype and one batch shape."""
    tensors = [v for v, _ in given.values() if isinstance(v, Tensor)]
    floating = [t.dtype for t in tensors if t.is_floating_point()] or [torch.get_default_dtype()]
    dtype = floating[0]
    if any(t.is_complex() for t in tensors):
        raise ValueError(f"the parameters of a {who} must be real numbers, got complex ones")
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    device = tensors[0].device if tensors else None
    made, shapes = [], []
    for name, (value, dims) in given.items():
        try:
            made.append(tensor := torch.as_tensor(value, device=device).to(dtype))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} of a {who} must be a number or a tensor, got {value!r}") from None
        if tensor.dim() < dims or (dims == 2 and tensor.shape[-1] != tensor.shape[-2]):
            wanted = ("()", "(n,)", "(n, n)")[dims]
            raise ValueError(f"{name} of a {who} must have shape {wanted} after its batch shape, got {tuple(tensor.shape)}")
        shapes.append(tensor.shape[: tensor.dim() - dims])
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(given, shapes, strict=True))
        raise ValueError(f"the batch shapes of a {who} do not go together: {found}") from None
    return [value.expand(batch + value.shape[len(shape) :]) for value, shape in zip(made, shapes, strict=True)]
