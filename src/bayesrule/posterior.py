"""A posterior over a model's named weights: what training leaves behind, and what everything after it takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .drawing import Draws, kept, whole_number
from .families.gaussian import Diagonal
from .storage import write_tensors
from .vector import Vector

FORMAT, VERSION = "bayesrule-posterior", 1
_BLOCKS = ("mean", "precision", "prior_mean", "prior_precision")


@dataclass(frozen=True)
class Posterior:
    r"""The Gaussian :math:`q(\theta) = N(m, S^{-1})` over named weights, S diagonal. A value: nothing changes it.

    Args:
        mean: m, name -> tensor.
        precision: The diagonal of S, name -> tensor shaped like the mean; > 0, inf for a weight that is known exactly.
        prior_mean: Mean of the prior, name -> tensor shaped like the mean, or a number for all of it, shape ().
        prior_precision: Precision of the prior, likewise; >= 0, zero for a flat prior.
        ess: Effective sample size that multiplied the mean loss, in examples.
        num_data: Number of training examples, a whole number >= 1, where known.
        structure: Structure of S: "diag".

    Raises:
        ValueError: Names or shapes do not agree, a precision is not positive, a prior's is negative, or ``ess`` or
            ``num_data`` is no size; the message names the tensor.

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
    structure: str = "diag"

    def __post_init__(self) -> None:
        for block in _BLOCKS[1:]:
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
        if self.num_data is not None:
            object.__setattr__(self, "num_data", whole_number("num_data", self.num_data, 1, "; None where it is not known"))

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

    def exact(self) -> Posterior:
        """The mean, known exactly: every draw is the mean."""
        return replace(self, precision={name: torch.full_like(m, math.inf) for name, m in self.mean.items()})

    def rescale(self, *, ess: float) -> Posterior:
        """The posterior raised to the power ess / self.ess: as if each example counted more or less, the prior with it."""
        if not ess > 0:
            raise ValueError(f"ess must be a number > 0, got {ess!r}")
        factor = ess / self.ess
        precision = {name: s * factor for name, s in self.precision.items()}
        prior = self.prior_precision and {name: s * factor for name, s in self.prior_precision.items()}
        return replace(self, precision=precision, prior_precision=prior, ess=ess)

    # The Gaussian

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of S^-1, name -> tensor."""
        return {name: 1 / s for name, s in self.precision.items()}

    def sample(self, seed: int, draw: int = 0) -> dict[str, Tensor]:
        """One draw of the weights, name -> tensor; the same for the same seed and number of the draw."""
        drawn = {name: torch.empty_like(m) for name, m in self.mean.items()}
        Draws(self.mean, self.precision, drawn, seed).write(draw)
        return drawn

    def matvec(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S^-1 v, by name."""
        return {name: v[name] / s for name, s in self.precision.items()}

    def sqrt_matvec(self, eps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S^-1/2 eps, by name: unit normals become offsets from the mean."""
        return {name: eps[name] / s.sqrt() for name, s in self.precision.items()}

    def log_prob(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Log density at theta in nats, shape ()."""
        return self._gaussian.log_prob(Vector([theta[name] for name in self.mean]))

    def kl(self, other: Posterior) -> Tensor:
        """KL(self || other) in nats, shape ()."""
        if odd := set(self.mean) ^ set(other.mean):
            raise ValueError(f"the posteriors disagree on the name {min(odd)!r}")
        theirs = Diagonal(Vector([other.mean[n] for n in self.mean]), Vector([other.precision[n] for n in self.mean]))
        return self._gaussian.kl(theirs)

    @property
    def _gaussian(self) -> Diagonal:
        return Diagonal(Vector(list(self.mean.values())), Vector(list(self.precision.values())))

    # Meeting models and optimizers

    def match(self, names: Sequence[str], params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and precision for each parameter, by name where there are names, else in order.

        Raises:
            ValueError: Number, names or shapes do not agree.
        """
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
        blocks = {block: getattr(self, block) or {} for block in _BLOCKS}
        tensors = {f"{block}.{name}": t for block, named in blocks.items() for name, t in named.items()}
        said = dict(structure=self.structure, ess=self.ess, num_data=self.num_data, names=list(self.mean))
        about = dict(format=FORMAT, version=VERSION, **said)
        write_tensors(path, tensors, {"bayesrule": json.dumps(about)})

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
        if not Path(path).is_file():
            raise FileNotFoundError(f"no posterior file at {os.fspath(path)!r}")
        blocks: dict[str, dict[str, Tensor]] = {block: {} for block in _BLOCKS}
        prefix = strip_prefix and f"{strip_prefix.removesuffix('.')}."
        try:
            with safe_open(path, framework="pt", device=device) as file:
                about = _about(path, file.metadata())
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    block, _, name = key.partition(".")
                    if block not in blocks:
                        raise ValueError(f"{os.fspath(path)!r} is no posterior file: it holds a tensor {key!r}")
                    if (short := name.removeprefix(prefix)) in blocks[block]:
                        raise ValueError(f"{os.fspath(path)!r} holds {short!r} twice without {prefix!r}; take no strip_prefix")
                    blocks[block][short] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file ({error}); take another copy") from error
        order = [name.removeprefix(prefix) for name in about.get("names", ())]
        for block, found in blocks.items():
            blocks[block] = {**{name: found[name] for name in order if name in found}, **found}
        mean, precision, prior_mean, prior_precision = blocks.values()
        about = {key: about[key] for key in ("ess", "num_data", "structure")}
        try:
            return cls(mean, precision, prior_mean or None, prior_precision or None, **about)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def _about(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    about: dict[str, Any] = {}
    try:
        about = json.loads((metadata or {})["bayesrule"])
        known = about["format"] == FORMAT and isinstance(about["version"], int)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{os.fspath(path)!r} is no posterior file: its metadata does not say {FORMAT!r} and a version")
    if about["version"] > VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {about['version']}, this release reads {VERSION}; upgrade bayesrule"
        )
    fits = {
        "structure": about.get("structure") == "diag",
        "ess": isinstance(about.get("ess"), int | float),
        "num_data": about.get("num_data") is None or isinstance(about["num_data"], int),
        "names": isinstance(about.get("names", []), list) and all(isinstance(name, str) for name in about.get("names", [])),
    }
    for key, fit in fits.items():
        if not fit:
            raise ValueError(f"{os.fspath(path)!r} has a {key} that this release cannot read: {about.get(key)!r}")
    return about


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
        Draws(posterior.mean, posterior.precision, params, seed).write(draw)
        yield model
