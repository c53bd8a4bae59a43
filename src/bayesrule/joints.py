"""Named weights as one theta of a family, and how the members of each family are written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from .bases import Bases, Basis
from .families.deviations import Deviations
from .families.eigen import Eigen
from .families.gaussian import Diagonal, Full
from .families.kronecker import Kronecker
from .families.low_rank import DiagonalPlusFactor, LowRank
from .families.mixture import Mixture
from .families.signs import Signs
from .families.spike_slab import SpikeAndSlab
from .families.structure import Elementwise, Structured
from .family import Gaussian
from .noise import Noise
from .parts import Law, Named, OneOf, Part
from .vector import Vector, leaves


@dataclass(frozen=True)
class Joint(Part):
    """Some weights as one theta of a family.

    Args:
        names: Of the tensors.
        shapes: Of the tensors.
        q: The member. Its mean is a Vector of these tensors, or all their elements in a row, shape (D,).
    """

    names: tuple[str, ...]
    shapes: tuple[Size, ...]
    q: Any

    @property
    def structure(self) -> str:
        return self._kind.structure

    @property
    def is_gaussian(self) -> bool:
        return isinstance(self.q, Gaussian)

    @property
    def _kind(self) -> Kind:
        return next(kind for kind in KINDS if isinstance(self.q, kind.family))

    def named(self, point: Any) -> dict[str, Tensor]:
        """What a family calls one theta, as tensors by name."""
        if not isinstance(point, Vector):
            pieces = point.split([math.prod(shape) for shape in self.shapes])
            point = Vector([piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)])
        return dict(zip(self.names, point, strict=True))

    def point(self, named: Named) -> Any:
        """The reverse of :meth:`named`."""
        parts = [named[name] for name in self.names]
        return Vector(parts) if isinstance(self.q.mean, Vector) else torch.cat([part.reshape(-1) for part in parts])

    @property
    def mean(self) -> dict[str, Tensor]:
        return self.named(self.q.mean)

    @property
    def precision(self) -> dict[str, Tensor]:
        return self.named(self._kind.diagonal(self.q))

    @property
    def variance(self) -> dict[str, Tensor]:
        return self.named(self.q.variance)

    def sample(self, noise: Noise) -> dict[str, Tensor]:
        return self.named(self.q.sample(noise))

    def solve(self, v: Named) -> dict[str, Tensor]:
        return self.named(self.q.solve(self.point(v)))

    def solve_each(self, v: Named) -> dict[str, Tensor]:
        if isinstance(self.q.mean, Vector):
            return super().solve_each(v)
        rows = self.q.solve_each(torch.cat([v[name].flatten(1) for name in self.names], 1))
        pieces = rows.split([math.prod(shape) for shape in self.shapes], 1)
        return {n: piece.view(-1, *shape) for n, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def root_solve(self, v: Named) -> dict[str, Tensor]:
        return self.named(self.q.root_solve(self.point(v)))

    def log_prob(self, theta: Named) -> Tensor:
        log_prob: Tensor = self.q.log_prob(self.point(theta))
        return log_prob

    def entropy(self) -> Tensor:
        entropy: Tensor = self.q.entropy()
        return entropy

    def kl_from_independent(self, mean: Named, precision: Named) -> Tensor:
        if not self.is_gaussian:
            raise TypeError(f"weights of the structure {self.structure!r} have no KL from Gaussians")
        return super().kl_from_independent(mean, precision)

    def kl(self, other: Part) -> Tensor:
        if not isinstance(other, Joint) or other.names != self.names or other.structure != self.structure:
            raise TypeError(f"no KL is offered of {self.structure!r} from {other.structure!r}; average log_prob over draws")
        kl: Tensor = self.q.kl(other.q)
        return kl

    def rescaled(self, factor: float) -> Joint:
        return replace(self, q=self.q.power(factor))

    def renamed(self, short: Callable[[str], str]) -> Joint:
        return replace(self, names=tuple(map(short, self.names)))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._kind.write(self)


# What files keep of each family


class Kind(NamedTuple):
    """How the members of a family are written down."""

    structure: str
    family: type
    diagonal: Callable[[Any], Any]  # of the precision
    write: Callable[[Joint], tuple[dict[str, Tensor], dict[str, Any]]]
    read: Callable[[Sequence[Tensor], Sequence[str], Named, Mapping[str, Any]], Any]  # means, names, tensors, about


def _write_eigen(part: Joint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    q, kept = part.q, {}
    for name, basis, spectrum in zip(part.names, q.basis.parts, q._precisions, strict=True):
        kept[f"spectrum.{name}"] = spectrum
        kept |= {f"axis{i}.{name}": axis for i, axis in enumerate(basis.axes) if axis is not None}
    turned = [[axis is not None for axis in basis.axes] for basis in q.basis.parts]
    return kept, {"axes": [list(basis.shape) for basis in q.basis.parts], "turned": turned}


def _read_eigen(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> Eigen:
    bases = []
    for name, mean, shape, turned in zip(names, means, about["axes"], about["turned"], strict=True):
        axes = [kept[f"axis{i}.{name}"] if has else None for i, has in enumerate(turned)]
        if math.prod(shape) != mean.numel() or not all(map(_turns, axes, shape)):
            raise ValueError(f"the basis of {name!r} does not fit its mean, shape {tuple(mean.shape)}, or is not orthonormal")
        bases.append(Basis(tuple(shape), axes))
    spectra = [_positive(f"the spectrum of {name!r}", kept[f"spectrum.{name}"], m) for name, m in zip(names, means, strict=True)]
    return Eigen(Vector(means), Bases(bases), Vector(spectra))


def _turns(axis: Tensor | None, size: int) -> bool:
    """Whether an axis is as it was, or has an orthonormal basis."""
    if axis is None:
        return True
    eye = torch.eye(size, dtype=axis.dtype, device=axis.device)
    return axis.shape == (size, size) and bool((axis.T @ axis - eye).abs().max() < 1e-2)


def _positive(what: str, values: Tensor, like: Tensor) -> Tensor:
    if values.shape != like.shape or values.dtype != like.dtype or not bool((values > 0).all()):
        raise ValueError(f"{what} must have shape {tuple(like.shape)}, dtype {like.dtype} and positive entries")
    return values


def _write_full(part: Joint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"matrix": part.q.precision}, {}


def _read_full(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> Full:
    mean, matrix = _joined(means), kept["matrix"]
    fits = matrix.shape == (len(mean), len(mean)) and matrix.dtype == mean.dtype
    if not fits or not torch.equal(matrix, matrix.T) or int(torch.linalg.cholesky_ex(matrix).info):
        raise ValueError(f"the precision of {', '.join(names)} must be a symmetric positive definite matrix of {len(mean)} rows")
    return Full(mean, matrix)


def _read_factored(means: Sequence[Tensor], names: Sequence[str], kept: Named) -> tuple[Tensor, DiagonalPlusFactor]:
    """A mean in a row, and a diagonal and directions that go with it."""
    mean, factor = _joined(means), kept["factor"]
    diagonal = _positive(f"the diagonal of {', '.join(names)}", kept["diagonal"], mean)
    if factor.dim() != 2 or len(factor) != len(mean) or factor.dtype != mean.dtype or not bool(factor.isfinite().all()):
        raise ValueError(f"the factor of {', '.join(names)} must have {len(mean)} finite rows")
    return mean, DiagonalPlusFactor(diagonal, factor)


def _read_low_rank(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> LowRank:
    return LowRank(*_read_factored(means, names, kept))


def _read_deviations(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> Deviations:
    return Deviations(*_read_factored(means, names, kept))


def _read_signs(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> Signs:
    natural = [kept[f"natural.{name}"] for name in names]
    for name, t, m in zip(names, natural, means, strict=True):
        if t.shape != m.shape or t.dtype != m.dtype or bool(t.isnan().any()):
            raise ValueError(f"the odds of {name!r} must have shape {tuple(m.shape)} and be numbers")
    return Signs(_joined(natural))


def _read_dropout(means: Sequence[Tensor], names: Sequence[str], kept: Named, about: Mapping[str, Any]) -> SpikeAndSlab:
    shape = None if about["shape"] is None else tuple(about["shape"])
    return SpikeAndSlab(_joined(means), _probability(about["keep"]), shape, about["axis"])


def _write_low_rank(part: Joint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    precision = part.q.precision
    return {"diagonal": precision.diagonal, "factor": precision.factor}, {}


def _write_deviations(part: Joint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    covariance = part.q.spread / part.q.ess
    return {"diagonal": covariance.diagonal, "factor": covariance.factor}, {}


def _joined(means: Sequence[Tensor]) -> Tensor:
    return torch.cat([mean.reshape(-1) for mean in means])


def _write_signs(part: Joint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {f"natural.{name}": t for name, t in part.named(part.q.natural_parameter).items()}, {}


def _probability(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"a probability must be in (0, 1], got {value!r}")
    return value


KINDS = [
    Kind("eigen", Eigen, lambda q: q.precision_diagonal, _write_eigen, _read_eigen),
    Kind("full", Full, lambda q: q.precision.diagonal(), _write_full, _read_full),
    Kind(
        "low_rank",
        LowRank,
        lambda q: q.precision.diagonal + (q.precision.factor**2).sum(1),
        _write_low_rank,
        _read_low_rank,
    ),
    Kind("deviations", Deviations, lambda q: q.precision_diagonal, _write_deviations, _read_deviations),
    Kind(
        "dropout",
        SpikeAndSlab,
        lambda q: 1 / q.variance,
        lambda part: ({}, {"keep": float(part.q.keep), "shape": part.q.shape, "axis": part.q.axis}),
        _read_dropout,
    ),
    Kind("signs", Signs, lambda q: 1 / q.variance, _write_signs, _read_signs),
]


# Files


def of_tensors(names: Sequence[str], tensors: Named, about: Sequence[Mapping[str, Any]]) -> Law:
    """The reverse of :meth:`Law.tensors`, with means and precisions among the tensors.

    Raises:
        KeyError: Something that was said to be there is missing.
        ValueError: Something does not fit, or is of a structure that this release does not know.
    """
    mean, precision = ({name: tensors[f"{block}.{name}"] for name in names} for block in ("mean", "precision"))
    parts = []
    for number, said in enumerate(about):
        kept = {key.removeprefix(f"part{number}."): t for key, t in tensors.items() if key.startswith(f"part{number}.")}
        parts.append(_read_part(said, kept, mean))
    together = [name for part in parts for name in part.names]
    if len(set(together)) < len(together):
        raise ValueError("a tensor belongs to two parts")
    for name, m in mean.items():
        if not bool(m.isfinite().all()) or precision[name].shape != m.shape or not bool((precision[name] > 0).all()):
            raise ValueError(f"mean or precision of {name!r} is no such thing: of another shape, not finite or not positive")
    return Law(mean, precision, tuple(parts))


def _read_part(said: Mapping[str, Any], kept: Named, mean: Named) -> Part:
    if said["structure"] == "mixture":
        laws = []
        for number, law in enumerate(said["laws"]):
            prefix = f"law{number}."
            own = {key.removeprefix(prefix): t for key, t in kept.items() if key.startswith(prefix)}
            laws.append(of_tensors(law["names"], own, law["parts"]))
        weights = kept["log_weights"]
        if not laws or weights.shape != (len(laws),) or abs(float(weights.exp().sum()) - 1) > 1e-3:
            raise ValueError("the weights of a mixture must be one for each posterior, and sum to 1")
        return OneOf(tuple(laws), weights)
    kind = next((kind for kind in KINDS if kind.structure == said["structure"]), None)
    if kind is None:
        raise ValueError(f"it has the structure {said['structure']!r}, which this release does not know; upgrade bayesrule")
    names = tuple(said["names"])
    means = [mean[name] for name in names]
    return Joint(names, tuple(m.shape for m in means), kind.read(means, names, kept, said))


# Families


def law_of(q: Any, shapes: Mapping[str, Size]) -> Law:
    """A member of a family as a law over named weights.

    Raises:
        TypeError: Of this family there is none.
        ValueError: Names and shapes do not agree with theta.
    """
    names, sizes = tuple(shapes), tuple(shapes.values())
    if isinstance(q, Mixture):
        return _law_of_mixture(q, shapes)
    if isinstance(q, Kronecker):
        q = _in_its_basis(q)
    if isinstance(q, Signs):
        q = replace(q, natural_parameter=_row(q.natural_parameter), expected_value=None, ess=1.0)
    elif not isinstance(q, Structured | LowRank | Deviations | SpikeAndSlab):
        raise TypeError(
            f"a {type(q).__name__} is no distribution of a model's weights; take a Gaussian, a Mixture, Signs or a SpikeAndSlab"
        )
    elif isinstance(q, Eigen) and not isinstance(q.mean, Vector):
        q = replace(q, mean=Vector([q.mean]), basis=Bases([q.basis]), hess=Vector([q._precisions]), weight_decay=0.0, ess=1.0)
    part = Joint(names, sizes, q)
    found = [p.numel() for p in leaves(q.mean)]
    wanted = [math.prod(size) for size in sizes] if isinstance(q.mean, Vector) else [sum(math.prod(size) for size in sizes)]
    if found != wanted:
        raise ValueError(f"theta has {found} elements, and the names have shapes {[tuple(size) for size in sizes]}")
    if isinstance(q, Elementwise):
        precision = part.named(_row(q._precisions) if not isinstance(q.mean, Vector) else q._precisions)
        return Law(part.named(_row(q.mean) if not isinstance(q.mean, Vector) else q.mean), precision)
    return Law(part.mean, part.precision, (part,))


def _in_its_basis(q: Kronecker) -> Eigen:
    """The same Gaussian, diagonal in the eigenvectors of both factors."""
    precision = q.precision
    (left, rows), (right, columns) = (torch.linalg.eigh(factor) for factor in (precision.left, precision.right))
    return Eigen(q.mean, Basis(precision.shape, [rows, columns]), torch.outer(left, right))


def _row(point: Any) -> Any:
    return torch.cat([part.reshape(-1) for part in leaves(point)])


def _law_of_mixture(q: Mixture, shapes: Mapping[str, Size]) -> Law:
    family = Diagonal if q.diagonal else Full
    laws = tuple(law_of(family(m, s), shapes) for m, s in zip(q.mean, q.precision, strict=True))
    part = OneOf(laws, q.log_weights)
    return Law(part.mean, part.precision, (part,))
