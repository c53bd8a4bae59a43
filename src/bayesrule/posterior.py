"""A posterior over a model's named weights: what training leaves behind, and what everything after it takes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .archive import BLOCKS, HINTS, read, write
from .drawing import Draws, kept, whole_number
from .joints import law_of
from .parts import Law, OneOf, Part
from .posthoc.makers import Makers
from .program import uncast


@dataclass(frozen=True)
class Posterior(Makers):
    r"""What is known of named weights: :math:`q(\theta) = N(m, S^{-1})`, S diagonal or not, and more. A value: nothing changes it.

    ``mean``, ``precision`` and ``variance`` are by weight whatever the structure: the mean, the diagonals of S and of its inverse.
    Where weights vary together, ``parts`` say how, and what is drawn, solved and saved is the whole.

    Args:
        mean: m, name -> tensor.
        precision: The diagonal of S, name -> tensor shaped like the mean; > 0, inf for a weight that is known exactly. Where
            ``parts`` know it, it may be left out.
        prior_mean: Mean of the prior, name -> tensor shaped like the mean, or a number for all of it, shape ().
        prior_precision: Precision of the prior, likewise; >= 0, zero for a flat prior.
        ess: Effective sample size that multiplied the mean loss, in examples.
        num_data: Number of training examples, a whole number >= 1, where known.
        parts: Weights that vary together, see ``bayesrule.parts``: made by an optimizer, :meth:`of` or :meth:`mixture`.
        temperature: What logits are divided by when predicting, > 0; fitted by :func:`bayesrule.calibrate`.
        noise_variance: Of targets around the outputs of a regression, one number or one for each output, likewise; where known.
        method_hint: "mean", "mc" or "glm": how to predict with it where nobody says; None is "mc".

    Raises:
        ValueError: Names or shapes do not agree, a precision is not positive, a prior's is negative, ``ess`` or ``num_data`` is no
            size, or a temperature or variance is not positive; the message names the tensor.

    Example:
        >>> post = Posterior({"w": torch.zeros(2)}, {"w": torch.full((2,), 4.0)})
        >>> post.variance["w"]
        tensor([0.2500, 0.2500])
    """

    mean: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]
    prior_mean: Mapping[str, Tensor] | None = None
    prior_precision: Mapping[str, Tensor] | None = None
    ess: float = 1.0
    num_data: int | None = None
    parts: tuple[Part, ...] = ()
    temperature: float = 1.0
    noise_variance: tuple[float, ...] | None = None
    method_hint: str | None = None

    @uncast()
    def __post_init__(self) -> None:
        if self.parts:
            for block in ("mean", "precision"):
                known = {name: t for part in self.parts for name, t in getattr(part, block).items()}
                object.__setattr__(self, block, {**getattr(self, block), **known})
        for block in BLOCKS[1:]:
            tensors = getattr(self, block)
            if tensors is None:
                continue
            if odd := set(self.mean) ^ set(tensors):
                raise ValueError(f"posterior mean and {block} disagree on the name {min(odd)!r}")
            object.__setattr__(self, block, {name: tensors[name] for name in self.mean})
            for name, tensor in tensors.items():
                shape = self.mean[name].shape
                if tensor.shape != shape and (block == "precision" or tensor.dim() > 0):
                    raise ValueError(f"posterior {block} of {name!r} has shape {tuple(tensor.shape)}, the mean {tuple(shape)}")
        if not self.mean:
            raise ValueError("a posterior needs the mean of at least one tensor")
        for name, tensor in self.mean.items():
            if bad := int((~tensor.isfinite()).sum()):
                raise ValueError(f"posterior mean of {name!r} has {bad} entries that are not finite")
        for name, tensor in self.precision.items():
            if bad := int((~(tensor > 0)).sum()):
                raise ValueError(
                    f"posterior precision of {name!r} has {bad} non-positive entries (min {tensor.min().item():.2g}); the "
                    "Hessian estimate went negative or data were subtracted that the posterior never saw"
                )
        for name, tensor in (self.prior_precision or {}).items():
            if bad := int((~(tensor >= 0)).sum()):
                raise ValueError(f"posterior prior_precision of {name!r} has {bad} entries below 0 or NaN; 0 is a flat prior")
        if not self.ess > 0:
            raise ValueError(f"ess must be a number > 0, got {self.ess!r}")
        if self.method_hint not in HINTS:
            raise ValueError(f"method_hint must be 'mean', 'mc', 'glm' or None, got {self.method_hint!r}")
        if self.num_data is not None:
            object.__setattr__(self, "num_data", whole_number("num_data", self.num_data, 1, "; None where it is not known"))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number > 0, got {self.temperature!r}")
        noise = self.noise_variance
        if noise is not None and not (isinstance(noise, tuple) and noise and all(0 < v < math.inf for v in noise)):
            raise ValueError(f"noise_variance must be a tuple of numbers > 0, or None, got {self.noise_variance!r}")

    @property
    def structure(self) -> str:
        """How weights vary: "diag", "eigen", "full", "low_rank", "deviations", "signs", "mixture", or several joined by "+"."""
        found = sorted({part.structure for part in self.parts})
        return "+".join([*found, *(["diag"] if self._law.apart else [])])

    @property
    def is_gaussian(self) -> bool:
        """Whether it is one Gaussian, of whatever structure: with a density that is not zero anywhere."""
        return all(part.is_gaussian for part in self.parts)

    @cached_property
    def _law(self) -> Law:
        return Law(self.mean, self.precision, self.parts)

    # Made from

    @classmethod
    def from_optimizer(cls, optimizer: Any, model: nn.Module, num_data: int | None = None) -> Posterior:
        """The posterior that an optimizer of this library has learned over a model's parameters.

        Args:
            optimizer: One that learns a posterior, such as :class:`bayesrule.IVON`.
            model: The module whose parameters it trains; its names are the posterior's.
            num_data: Number of training examples, for estimates that need the sum over them.

        Raises:
            TypeError: The optimizer learns no posterior.
            ValueError: The optimizer trains parameters that the model does not hold, or its groups differ in ess.
        """
        learned: Callable[..., Posterior] | None = getattr(optimizer, "posterior", None)
        if learned is None:
            raise TypeError(
                f"{type(optimizer).__name__} learns no posterior; train with bayesrule.IVON, or take Posterior.point(model)"
            )
        return learned(model, num_data=num_data)

    @classmethod
    def point(cls, model: nn.Module) -> Posterior:
        """A model's weights, known exactly: every draw is the mean."""
        mean = {name: p.detach().clone() for name, p in model.named_parameters()}
        return cls(mean, {name: torch.full_like(m, math.inf) for name, m in mean.items()})

    @classmethod
    def of(cls, q: Any, names: Mapping[str, Any], *, ess: float = 1.0, num_data: int | None = None) -> Posterior:
        """A member of a family as a posterior over named weights.

        Args:
            q: A Gaussian of any structure, a Mixture, Signs or a SpikeAndSlab; a Kronecker is kept by its eigenvectors.
                Its theta is a tensor or Vector of one part for each name, or has the elements of all in a row, shape (D,).
            names: Name -> shape, or a tensor of that shape, such as ``dict(model.named_parameters())``; in the order of theta.
            ess: Effective sample size, in examples, that is in q's precision.
            num_data: Number of training examples, where known.

        Raises:
            TypeError: Of this family there is no posterior over weights.
            ValueError: Names and shapes do not agree with theta.

        Example:
            >>> import bayesrule as br
            >>> q = br.Full(torch.zeros(3), torch.eye(3) + 1)
            >>> br.Posterior.of(q, {"weight": (2, 1), "bias": (1,)}).structure
            'full'
        """
        law = law_of(q, {name: torch.Size(getattr(shape, "shape", shape)) for name, shape in names.items()})
        return cls(law.mean, law.precision, ess=ess, num_data=num_data, parts=law.parts)

    @classmethod
    def mixture(cls, posteriors: Sequence[Posterior], weights: Sequence[float] | None = None) -> Posterior:
        r"""One of several posteriors holds, as after trainings from several starts: :math:`\sum_k \pi_k q_k`.

        It predicts as an ensemble whose members know their uncertainty. Costs the memory of all; a draw costs what one draw costs.

        Args:
            posteriors: Over the same names and shapes.
            weights: The pi_k up to a factor, > 0; None is equal weights.

        Raises:
            ValueError: There is none, they disagree, or weights are no positive numbers.

        Example:
            >>> two = [Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([4.0])}) for m in (-1.0, 1.0)]
            >>> Posterior.mixture(two).variance["w"]
            tensor([1.2500])

        Source: W. Lin, M. E. Khan and M. Schmidt (2019), arXiv:1906.02914, for the family; Y. Shen et al. (2024), section 4, for
        Multi-IVON.
        """
        weights = [1.0] * len(posteriors) if weights is None else list(weights)
        if not posteriors or len(weights) != len(posteriors) or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"a mixture takes one positive weight for each of its posteriors, got {len(posteriors)} and {weights}")
        first = posteriors[0]
        for other in posteriors:
            if odd := set(first.mean) ^ set(other.mean):
                raise ValueError(f"the posteriors disagree on the name {min(odd)!r}")
            if (other.temperature, other.noise_variance) != (first.temperature, first.noise_variance):
                raise ValueError("the posteriors disagree on temperature or noise_variance; mix them before they are calibrated")
            for name, m in other.mean.items():
                if m.shape != first.mean[name].shape:
                    raise ValueError(f"the posteriors disagree on the shape of {name!r}: {tuple(m.shape)}")
        laws = tuple(Law({name: p.mean[name] for name in first.mean}, p.precision, p.parts) for p in posteriors)
        part = OneOf(laws, torch.tensor(weights, dtype=torch.float64).log().log_softmax(0))
        ess, hint = min(p.ess for p in posteriors), "mc" if any(p.method_hint for p in posteriors) else None
        return replace(first, mean=part.mean, precision=part.precision, parts=(part,), ess=ess, method_hint=hint)

    def independent(self) -> Posterior:
        """The Gaussian with the same mean and the diagonal of the same precision: weights no longer vary together."""
        return replace(self, parts=())

    def exact(self) -> Posterior:
        """The mean, known exactly: every draw is the mean."""
        return replace(self, parts=(), precision={name: torch.full_like(m, math.inf) for name, m in self.mean.items()})

    def rescale(self, *, ess: float) -> Posterior:
        """The posterior raised to the power ess / self.ess: as if each example counted more or less, the prior with it."""
        if not ess > 0:
            raise ValueError(f"ess must be a number > 0, got {ess!r}")
        factor = ess / self.ess
        precision = {name: s * factor for name, s in self.precision.items()}
        prior = self.prior_precision and {name: s * factor for name, s in self.prior_precision.items()}
        parts = tuple(part.rescaled(factor) for part in self.parts)
        return replace(self, precision=precision, prior_precision=prior, ess=ess, parts=parts)

    # The distribution

    @property
    @uncast()
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of S^-1, name -> tensor."""
        return self._law.variance

    def sample(self, seed: int, draw: int = 0) -> dict[str, Tensor]:
        """One draw of the weights, name -> tensor; the same for the same seed and number of the draw."""
        drawn = {name: torch.empty_like(m) for name, m in self.mean.items()}
        Draws(self, drawn, seed).write(draw)
        return drawn

    @uncast()
    def matvec(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S^-1 v, by name."""
        return self._law.solve(v)

    @uncast()
    def sqrt_matvec(self, eps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S^-1/2 eps, by name: unit normals become offsets from the mean."""
        return self._law.root_solve(eps)

    @uncast()
    def log_prob(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Log density at theta in nats, shape (); weights that are known exactly add nothing where theta has them, else -inf."""
        return self._law.log_prob(theta)

    @uncast()
    def kl(self, other: Posterior) -> Tensor:
        """KL(self || other) in nats, shape (); infinite where only one of them knows a weight exactly, or both do and disagree."""
        if odd := set(self.mean) ^ set(other.mean):
            raise ValueError(f"the posteriors disagree on the name {min(odd)!r}")
        return self._law.kl(other._law)

    # Meeting models and optimizers

    def match(self, names: Sequence[str], params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and precision for each parameter, by name where there are names, else in order.

        Raises:
            ValueError: Number, names or shapes do not agree.
        """
        if self.parts:
            raise ValueError(
                f"a prior is over independent weights, and this posterior has the structure {self.structure!r}; take its "
                "independent() part"
            )
        wanted = list(names) if names else list(self.mean)
        if len(wanted) != len(params):
            raise ValueError(f"the prior holds {len(self.mean)} tensors but the optimizer {len(params)}; pass named_parameters()")
        found = []
        for name, p in zip(wanted, params, strict=True):
            if name not in self.mean:
                raise ValueError(f"the prior has no tensor {name!r}; it holds {', '.join(list(self.mean)[:4])}, ...")
            if self.mean[name].shape != p.shape:
                raise ValueError(f"the prior's {name!r} has shape {tuple(self.mean[name].shape)}, the parameter {tuple(p.shape)}")
            if self.precision[name].isinf().any():
                raise ValueError(f"the prior knows {name!r} exactly (infinite precision); it cannot be learned from there")
            found.append((self.mean[name], self.precision[name]))
        return found

    def bind(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that the posterior is about, name -> parameter.

        Raises:
            KeyError: The model lacks a name of the posterior; the message says which, and what may mend it.
            ValueError: Shapes do not agree.
        """
        params = dict(model.named_parameters())
        for name, m in self.mean.items():
            if name not in params:
                near = next((p for p in params if name.endswith(f".{p}")), None)
                hint = f" but the model has {near!r}; pass strip_prefix={name[: -len(near)]!r} to load()" if near else ""
                raise KeyError(f"posterior holds {name!r}{hint or ' and the model has no parameter of that name'}")
            if params[name].shape != m.shape:
                raise ValueError(f"posterior of {name!r} has shape {tuple(m.shape)}, the model {tuple(params[name].shape)}")
        return {name: params[name] for name in self.mean}

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        blocks = {block: getattr(self, block) or {} for block in BLOCKS}
        said = dict(structure=self.structure, ess=self.ess, num_data=self.num_data, names=list(self.mean))
        if self.temperature != 1:
            said["temperature"] = self.temperature
        if self.noise_variance is not None:
            said["noise_variance"] = list(self.noise_variance)
        said |= {} if self.method_hint is None else {"method_hint": self.method_hint}
        write(path, blocks, said, self._law if self.parts else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu", strip_prefix: str = "") -> Posterior:
        """Read a file that :meth:`save` wrote; nothing is ever unpickled.

        Args:
            path: The file.
            device: Where to put the tensors.
            strip_prefix: Leading parts of names to take off, such as "module." (or "module"): whole parts between dots only,
                so "mod" takes nothing off "module.weight". Names without it stay as they are.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, is no posterior, or is of a later format, or two names become one.
        """
        blocks, about, parts = read(path, device, strip_prefix)
        mean, precision, prior_mean, prior_precision = blocks.values()
        try:
            return cls(mean, precision, prior_mean or None, prior_precision or None, **about, parts=parts)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error


@contextmanager
def sampled(model: nn.Module, posterior: Posterior, seed: int, draw: int = 0) -> Iterator[nn.Module]:
    """Put one draw of a posterior into a model's parameters; leaving brings back what was there, bit by bit.

    Args:
        model: Holds parameters of the posterior's names.
        posterior: What to draw from.
        seed: Which draws.
        draw: Which of them; :func:`bayesrule.predict` averages over draws 0, 1, ... of its seed.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> with sampled(model, Posterior.point(model), seed=0):
        ...     print(model.training)
        True
    """
    params = posterior.bind(model)
    with kept(params.values()):
        Draws(posterior, params, seed).write(draw)
        yield model
