"""Every optimizer that can be chosen by name, and its settings."""

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import bayesrule as br
from bayesrule.recipes.formats.pieces import nearest
from bayesrule.recipes.muon import MuonAdamW
from bayesrule.recipes.names import lookup

# Arguments that no run file can hold, or that the recipe fills.
RESERVED = frozenset(
    ["params", "betas", "seed", "noise", "prior", "momentum_dtype", "foreach", "fused", "maximize", "capturable", "differentiable"]
)


@dataclass(frozen=True)
class Choice:
    """An optimizer that can be chosen by name, and settings that work on small images.

    Args:
        title: The name in print.
        kind: The class.
        settings: Defaults where they differ from the class's own; ``ess`` counts in training sets, or is a function of their size,
            ``gradsq_scale`` counts in the examples of a draw, and a ``hess_init`` of "data" is
            :func:`bayesrule.start_curvature`.
        variational: Whether it leaves a posterior behind.
        binary: Whether weights become -1 and 1: those of layers, while what has less than two dimensions stays as it is.
        fixed: Arguments that are no settings.
        groups: Parameters or groups of them that the class is called with, of a model and the settings.
        of_groups: Settings that are of these alone.
    """

    title: str
    kind: type[Optimizer]
    settings: Mapping[str, Any]
    variational: bool = False
    binary: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    groups: Callable[[nn.Module, Mapping[str, Any]], list[Any]] = lambda model, _: list(model.named_parameters())
    of_groups: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The names of all settings; ``betas`` is the two settings beta1 and beta2."""
        betas = ["beta1", "beta2"] if "betas" in self.arguments else []
        return [*(name for name in self.arguments if name not in RESERVED), *betas, *self.of_groups]

    @property
    def draws_apart(self) -> bool:
        """Whether each process can have draws of its own."""
        return "noise_per_rank" in self.arguments

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """Of the constructor, and of those that it hands its other arguments on to."""
        found: dict[str, inspect.Parameter] = {}
        for kind in self.kind.__mro__:
            own = inspect.signature(kind).parameters
            found = {**{name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}, **found}
            if all(p.kind is not p.VAR_KEYWORD for p in own.values()):
                break
        return found

    def make(self, model: nn.Module, settings: Mapping[str, Any], seed: int = 0, **more: Any) -> Optimizer:
        """The optimizer of a model's parameters; ``more`` are arguments that are no settings of the user's.

        Raises:
            ValueError: If a setting has no such value.
        """
        given: dict[str, Any] = {name: value for name, value in settings.items() if name not in ("beta1", "beta2", *self.of_groups)}
        if "beta1" in self.options:
            default = self.arguments["betas"].default
            given["betas"] = (settings.get("beta1", default[0]), settings.get("beta2", default[1]))
        if "seed" in self.arguments:
            given["seed"] = seed
        params = self.groups(model, settings)
        if self.binary:
            for _, p in params:
                p.requires_grad_(p.dim() > 1)
            params = [(name, p) for name, p in params if p.requires_grad]
        kind: Any = self.kind
        try:
            return kind(params, **given, **self.fixed, **more)
        except (TypeError, RuntimeError) as error:
            plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
            raise ValueError(f"{self.title} does not take {plain}: {error}") from error
        except ValueError as error:
            name = "" if str(error).startswith(self.kind.__name__) else f"{self.title}: "
            raise ValueError(f"{name}{error}") from error


SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999}
IVON = {"lr": 0.2, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-4, "beta2": 0.99999}
EVON = {"lr": 0.03, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-4, "beta2": 0.999}
VON = {"lr": 0.1, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-4, "beta2": 0.99999}
VOGN = {"lr": 0.1, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-4, "damping": 0.01, "beta2": 0.99}
VADAM = {"lr": 2e-3, "ess": 1e4, "weight_decay": 1e-4, "beta2": 0.999}
VPROP = {"lr": 1e-3, "ess": 1e4, "weight_decay": 1e-4, "alpha": 0.99}
IBLR = {"lr": 0.1, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-4, "beta2": 0.9999}
SLANG = {"lr": 0.1, "ess": 1.0, "rank": 2, "hess_init": 0.5, "weight_decay": 1e-3, "beta2": 0.99}
DROPOUT = {**SGD, "ess": 1.0, "p": 0.1}
BSAM = {"lr": 0.5, "ess": 1.0, "hess_init": 0.5, "weight_decay": 1e-3, "rho": 0.01, "damping": 0.01, "beta2": 0.999}
STE = {"lr": 3e-4, "clip": 1.0}
BAYESBINN = {"lr": 1.0, "ess": 1.0, "natural_init": 1.0, "temperature": 0.1}

OPTIMIZERS: dict[str, Choice] = {
    "sgd": Choice("SGD", br.SGD, SGD),
    "rmsprop": Choice("RMSprop", br.RMSprop, {"lr": 1e-3}),
    "adam": Choice("Adam", br.Adam, {"lr": 1e-3, "beta2": 0.999}),
    "adamw": Choice("AdamW", br.AdamW, ADAMW),
    "ivon": Choice("IVON", br.IVON, IVON, variational=True),
    "evon": Choice("EVON", br.EVON, EVON, variational=True),
    "von": Choice("VON", br.VON, VON, variational=True),
    "ogn": Choice("OGN", br.OGN, VOGN, variational=True),
    "vogn": Choice("VOGN", br.VOGN, VOGN, variational=True),
    "vadam": Choice("Vadam", br.Vadam, VADAM, variational=True),
    "vprop": Choice("Vprop", br.Vprop, VPROP, variational=True),
    "multi-ivon": Choice("MultiIVON", br.MultiIVON, {**IVON, "components": 3}, variational=True),
    "iblr": Choice("IBLR", br.IBLR, IBLR, variational=True),
    "slang": Choice("SLANG", br.SLANG, SLANG, variational=True),
    "dropout": Choice("Dropout", br.Dropout, DROPOUT, variational=True),
    "sam": Choice("SAM", br.SAM, {**SGD, "rho": 0.05}),
    "bsam": Choice("BSAM", br.BSAM, BSAM, variational=True),
    "ste": Choice("STE", br.STE, STE, binary=True),
    "bayesbinn": Choice("BayesBiNN", br.BayesBiNN, BAYESBINN, variational=True, binary=True),
    # torch's own, to compare with
    "torch-sgd": Choice("SGD", torch.optim.SGD, SGD),
    "torch-adamw": Choice("AdamW", torch.optim.AdamW, ADAMW, fixed={"fused": True}),
}


# Of text

DATA = "data"
"""As a ``hess_init``: where the data are."""


def decaying(model: nn.Module, _: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Matrices, whose weights decay, and all else, which does not, as GPT-2 and nanoGPT have it."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]


def hidden(model: nn.Module, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices of linear layers, then all else that decays and what does not."""
    inner = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    rest = [group | {"params": [p for p in group["params"] if p not in inner]} for group in decaying(model, settings)]
    return [{"params": [p for p in model.parameters() if p in inner], "hidden": True}, *rest]


def matrices(model: nn.Module, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices inside of a model, and all else for AdamW, at the same rate if no other is given."""
    rate = settings.get("adamw_lr", settings["lr"])
    return br.split_matrices(model, lr=rate, betas=(0.9, 0.99), weight_decay=0.1)


TEXT_ADAMW = {"lr": 0.006, "weight_decay": 0.1, "beta2": 0.99}
SQUARES = {"hess_approx": "gradsq", "gradsq_scale": 1.0, "hess_init": DATA, "weight_decay": 1e-6, "clip_radius": 1.0}
TEXT_IVON = {"lr": 0.005, "ess": 10.0, **SQUARES, "beta2": 0.99, "rescale_lr": False}
TEXT_EVON = {"lr": 0.005, "ess": 10.0, **SQUARES, "beta1": 0.95, "beta2": 0.99, "shampoo_beta": 0.95, "whiten": False}
TEXT_EVON |= {"hess_init": 1e-3, "adamw_lr": 0.01}
TEXT_MUON = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "adamw_lr": 0.01, "beta2": 0.99}

TEXT_OPTIMIZERS: dict[str, Choice] = {
    "adamw": replace(OPTIMIZERS["adamw"], settings=TEXT_ADAMW, groups=decaying),
    "ivon": replace(OPTIMIZERS["ivon"], settings=TEXT_IVON),
    "evon": replace(OPTIMIZERS["evon"], settings=TEXT_EVON, groups=matrices, of_groups=("adamw_lr",)),
    "torch-adamw": replace(OPTIMIZERS["torch-adamw"], settings=TEXT_ADAMW, groups=decaying),
}
if hasattr(torch.optim, "Muon"):
    TEXT_OPTIMIZERS["torch-muon"] = Choice("Muon", MuonAdamW, TEXT_MUON, groups=hidden)


def settle(
    name: str, given: Mapping[str, Any], num_data: int, offered: Mapping[str, Choice] = OPTIMIZERS, averaged: int = 1
) -> dict[str, Any]:
    """The settings of an optimizer: its defaults, overridden by what was given (None: not given, unless None is a value of it).

    Args:
        name: Of the optimizer.
        given: What was given.
        num_data: The size of the training set.
        offered: The table of a recipe.
        averaged: How many examples the gradient of a draw averages over.

    Raises:
        ValueError: If the optimizer is unknown or has no such setting.

    Example:
        >>> settle("sgd", {"lr": 0.1, "ess": None}, num_data=1000)
        {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.0005}
    """
    choice = lookup("optimizer", name, offered)
    may_be_none = {key for key, argument in choice.arguments.items() if argument.default is None}
    chosen = {key: value for key, value in given.items() if value is not None or key in may_be_none}
    for setting, value in chosen.items():
        if setting not in choice.options:
            near = nearest(setting, choice.options) or ";"
            raise ValueError(f"{name} has no setting {setting} (got {value!r}){near} its settings are {', '.join(choice.options)}")
    settings = dict(choice.settings)
    for setting, unit in {"ess": num_data, "gradsq_scale": averaged}.items():
        if (own := settings.get(setting)) is not None:
            settings[setting] = own(unit) if callable(own) else own * unit
    return settings | chosen


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """``key=value`` as a mapping; a value is a number, true, false, none, or else a word.

    Raises:
        ValueError: If there is no ``=``, or a key comes twice.

    Example:
        >>> assignments(["lr=1e-3", "nesterov=true", "clip_radius=inf", "hess_approx=price"])
        {'lr': 0.001, 'nesterov': True, 'clip_radius': inf, 'hess_approx': 'price'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (piece.strip() for piece in text.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"--set takes key=value, got {text!r}; for example --set lr=0.1")
        if key in found:
            raise ValueError(f"--set gives {key} twice, {found[key]!r} and {value}; drop one")
        words: dict[str, Any] = {"true": True, "false": False, "none": None, "inf": math.inf}
        try:
            found[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[key] = value
        if not isinstance(found[key], int | float | str | None):
            raise ValueError(f"--set {key} takes a number, true, false or a word, got {value}")
    return found
