"""Weights of a posterior that are not independent Gaussians: what is known of them together, by name.

A :class:`~bayesrule.Posterior` keeps mean and precision of every weight. A part says how some of them vary together: as a member
of a family (:class:`~bayesrule.joints.Joint`), or as one of several posteriors (:class:`OneOf`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from .families.gaussian import Diagonal
from .noise import Noise
from .vector import Vector

Named = Mapping[str, Tensor]


class Part(ABC):
    """Some weights of a posterior, together. A value.

    Attributes:
        names: Of the tensors.
        structure: A word for how they vary.
    """

    names: tuple[str, ...]

    @property
    @abstractmethod
    def structure(self) -> str: ...

    @property
    @abstractmethod
    def is_gaussian(self) -> bool:
        """Whether they are one Gaussian, so that the mirror image of a draw in the mean is as likely."""

    @property
    @abstractmethod
    def mean(self) -> dict[str, Tensor]:
        """By name."""

    @property
    @abstractmethod
    def precision(self) -> dict[str, Tensor]:
        """The diagonal of the precision; of what is no Gaussian, one over the variance."""

    @property
    @abstractmethod
    def variance(self) -> dict[str, Tensor]:
        """By name."""

    @abstractmethod
    def sample(self, noise: Noise) -> dict[str, Tensor]:
        """One draw, by name."""

    @abstractmethod
    def solve(self, v: Named) -> dict[str, Tensor]:
        """The covariance times v."""

    def solve_each(self, v: Named) -> dict[str, Tensor]:
        """The covariance times each of n vectors, by name of shape (n, ...)."""
        found: dict[str, Tensor] = torch.func.vmap(self.solve)(dict(v))
        return found

    @abstractmethod
    def root_solve(self, v: Named) -> dict[str, Tensor]:
        """R v with R R^T the covariance."""

    @abstractmethod
    def log_prob(self, theta: Named) -> Tensor:
        """Log density in nats, shape ()."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats, shape ()."""

    @abstractmethod
    def kl(self, other: Part) -> Tensor:
        """KL(self || other) in nats, shape ()."""

    def kl_from_independent(self, mean: Named, precision: Named) -> Tensor:
        """KL from independent Gaussians in nats, shape ()."""
        surprise = [
            (precision[name] * (variance + (self.mean[name] - mean[name]) ** 2) - (precision[name] / (2 * math.pi)).log()).sum() / 2
            for name, variance in self.variance.items()
        ]
        return torch.stack(surprise).sum() - self.entropy()

    @abstractmethod
    def rescaled(self, factor: float) -> Self:
        """Raised to a power."""

    @abstractmethod
    def renamed(self, short: Callable[[str], str]) -> Self:
        """The same under other names."""

    @abstractmethod
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps beside the mean: tensors, and what is no tensor."""


# Laws: everything that is known of some weights


@dataclass(frozen=True)
class Law:
    """A distribution over named weights: some vary together, all others are independent Gaussians.

    Args:
        mean: Of all, name -> tensor.
        precision: Of all: the diagonal.
        parts: Those that vary together.
    """

    mean: Named
    precision: Named
    parts: tuple[Part, ...] = ()

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """The names of independent weights."""
        together = {name for part in self.parts for name in part.names}
        return tuple(name for name in self.mean if name not in together)

    @property
    def _independent(self) -> Diagonal:
        return Diagonal(Vector([self.mean[n] for n in self.apart]), Vector([self.precision[n] for n in self.apart]))

    @cached_property
    def _exact(self) -> dict[str, Tensor]:
        """Which independent weights are known exactly."""
        return {name: self.precision[name].isinf() for name in self.apart}

    @property
    def _dense(self) -> Diagonal:
        """Independent weights with a density: those known exactly have one of 1 where they are, and the precision of that."""
        precision = [self.precision[name].masked_fill(exact, 2 * math.pi) for name, exact in self._exact.items()]
        return Diagonal(Vector([self.mean[name] for name in self.apart]), Vector(precision))

    def _by_name(self, own: Callable[[str], Tensor], of: Callable[[Part], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = {name: own(name) for name in self.apart}
        for part in self.parts:
            found |= of(part)
        return {name: found[name] for name in self.mean}

    @property
    def variance(self) -> dict[str, Tensor]:
        return self._by_name(lambda name: 1 / self.precision[name], lambda part: part.variance)

    def sample(self, noise: Any) -> dict[str, Tensor]:
        """One draw, by name; ``noise`` is a CounterNoise."""
        found: dict[str, Tensor] = {}
        if self.apart:
            found |= zip(self.apart, self._independent.sample(noise.at(step=64 * noise.step)), strict=True)
        for number, part in enumerate(self.parts, start=1):
            found |= part.sample(noise.at(step=64 * noise.step + number))
        return {name: found[name] for name in self.mean}

    def solve(self, v: Named) -> dict[str, Tensor]:
        return self._by_name(lambda name: v[name] / self.precision[name], lambda part: part.solve(v))

    def root_solve(self, v: Named) -> dict[str, Tensor]:
        return self._by_name(lambda name: v[name] / self.precision[name].sqrt(), lambda part: part.root_solve(v))

    def log_prob(self, theta: Named) -> Tensor:
        terms = [part.log_prob(theta) for part in self.parts]
        if self.apart:
            terms.append(self._dense.log_prob(Vector([theta[name] for name in self.apart])))
            terms.append(-_unless(all(bool((theta[n] == self.mean[n])[e].all()) for n, e in self._exact.items()), terms[-1]))
        return torch.stack(terms).sum()

    def renamed(self, short: Callable[[str], str]) -> Law:
        """The same under other names."""
        mean, precision = ({short(name): t for name, t in named.items()} for named in (self.mean, self.precision))
        return Law(mean, precision, tuple(part.renamed(short) for part in self.parts))

    def tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """What a file keeps of the parts: tensors, and what is no tensor."""
        tensors: dict[str, Tensor] = {}
        about = []
        for number, part in enumerate(self.parts):
            kept, said = part.tensors()
            tensors |= {f"part{number}.{name}": t for name, t in kept.items()}
            about.append({"structure": part.structure, "names": list(part.names), **said})
        return tensors, about

    def kl(self, other: Law) -> Tensor:
        pairs = {part.names: part for part in other.parts}
        alone = {part.names for part in self.parts if part.names not in pairs and set(part.names) <= set(other.apart)}
        if set(pairs) != {part.names for part in self.parts} - alone:
            raise TypeError("no KL is offered of posteriors in which other weights vary together; average log_prob over draws")
        terms = [
            part.kl_from_independent(other.mean, other.precision) if part.names in alone else part.kl(pairs[part.names])
            for part in self.parts
        ]
        if self.apart:
            theirs = Law({name: other.mean[name] for name in self.apart}, other.precision)
            terms.append(self._dense.kl(theirs._dense))
            alike = all(torch.equal(e, theirs._exact[n]) for n, e in self._exact.items())
            agree = alike and all(torch.equal(self.mean[n][e], theirs.mean[n][e]) for n, e in self._exact.items())
            terms.append(_unless(agree, terms[-1]))
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class OneOf(Part):
    """Several laws, of which one holds: a mixture.

    Args:
        laws: Over the same names.
        log_weights: Logarithms of their probabilities, shape (K,).
    """

    laws: tuple[Law, ...]
    log_weights: Tensor

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.laws[0].mean)

    @property
    def structure(self) -> str:
        return "mixture"

    @property
    def is_gaussian(self) -> bool:
        return False

    @property
    def weights(self) -> list[float]:
        """The probabilities."""
        found: list[float] = self.log_weights.exp().tolist()
        return found

    def _mean_of(self, each: Sequence[Named]) -> dict[str, Tensor]:
        return {name: _total(w * one[name] for w, one in zip(self.weights, each, strict=True)) for name in self.names}

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        return self._mean_of([law.mean for law in self.laws])

    @property
    def _gaps(self) -> list[dict[str, Tensor]]:
        return [{name: law.mean[name] - self.mean[name] for name in self.names} for law in self.laws]

    @cached_property
    def variance(self) -> dict[str, Tensor]:
        within = self._mean_of([law.variance for law in self.laws])
        between = self._mean_of([{name: gap**2 for name, gap in gaps.items()} for gaps in self._gaps])
        return {name: within[name] + between[name] for name in self.names}

    @property
    def precision(self) -> dict[str, Tensor]:
        return {name: 1 / variance for name, variance in self.variance.items()}

    @cached_property
    def _takes_turns(self) -> bool:
        """Whether laws are as likely as one another, and hold no others that take turns."""
        alike = bool((self.log_weights == self.log_weights[0]).all())
        return alike and not any(isinstance(part, OneOf) for law in self.laws for part in law.parts)

    def choose(self, noise: Any) -> int:
        """The number of the law that a draw is from. Equal ones take turns from a random one on: K draws are one of each."""
        place = noise.at(step=64 * noise.step, draw=0 if self._takes_turns else None)
        chosen = place.uniform(self.log_weights[0].cpu())
        if self._takes_turns:
            return (int(chosen * len(self.laws)) + noise.draw) % len(self.laws)
        return int((chosen > self.log_weights.exp().cumsum(0)[:-1].cpu()).sum())

    def sample(self, noise: Any) -> dict[str, Tensor]:
        return self.laws[self.choose(noise)].sample(noise.at(step=64 * noise.step + 1))

    def solve(self, v: Named) -> dict[str, Tensor]:
        within = self._mean_of([law.solve(v) for law in self.laws])
        sizes = [_total((gaps[name] * v[name]).sum() for name in self.names) for gaps in self._gaps]
        between = self._mean_of([{name: gap * s for name, gap in gaps.items()} for gaps, s in zip(self._gaps, sizes, strict=True)])
        return {name: within[name] + between[name] for name in self.names}

    def root_solve(self, v: Named) -> dict[str, Tensor]:
        raise TypeError("a mixture is no linear function of normals; use sample")

    def log_prob(self, theta: Named) -> Tensor:
        return torch.stack([law.log_prob(theta) for law in self.laws]).add(self.log_weights).logsumexp(0)

    def entropy(self) -> Tensor:
        raise TypeError("there is no closed form for the entropy of a mixture; average log_prob over draws")

    def kl(self, other: Part) -> Tensor:
        raise TypeError("there is no closed form for the KL of a mixture; average log_prob over draws")

    def rescaled(self, factor: float) -> OneOf:
        raise TypeError("a power of a mixture is no mixture; rescale the posteriors before they are mixed")

    def renamed(self, short: Callable[[str], str]) -> OneOf:
        return replace(self, laws=tuple(law.renamed(short) for law in self.laws))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kept: dict[str, Tensor] = {"log_weights": self.log_weights}
        about = []
        for number, law in enumerate(self.laws):
            tensors, parts = law.tensors()
            for block in ("mean", "precision"):
                tensors |= {f"{block}.{name}": t for name, t in getattr(law, block).items()}
            kept |= {f"law{number}.{name}": t for name, t in tensors.items()}
            about.append({"names": list(law.mean), "parts": parts})
        return kept, {"laws": about}


def _unless(holds: bool, like: Tensor) -> Tensor:
    """Zero if it holds, else infinity."""
    return torch.full_like(like, 0.0 if holds else math.inf)


def _total(terms: Any) -> Tensor:
    found: Tensor = sum(terms)
    return found
