"""All that decides a run, and the TOML files that hold it."""

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from safetensors.torch import load_file
from torch import nn

from bayesrule.recipes.amending import amended
from bayesrule.recipes.augmentation import augmentation
from bayesrule.recipes.data import Bars, Data, Part, Scale, arrange, check, quiet, survey
from bayesrule.recipes.formats.pieces import nearest
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.models import MODELS, build
from bayesrule.recipes.names import lookup
from bayesrule.recipes.optimizers import OPTIMIZERS, Choice
from bayesrule.recipes.residual import NORMS
from bayesrule.recipes.schedules import SCHEDULES
from bayesrule.recipes.sources import Collection
from bayesrule.recipes.strangers import others, strangers
from bayesrule.storage import write_tensors


@dataclass(frozen=True)
class RunSettings(ABC):
    """All that decides a run of a classifier, whatever it classifies; kept in its ``run.json``.

    They know where their data, their model and its files come from, and which optimizers there are, so that one training, one
    folder, one report and one list of suspicious labels serve images, rows and documents.

    Args:
        data: A name, or the path of data.
        optimizer: One of the recipe's.
        model: One of the recipe's.
        hyperparameters: The optimizer's settings: those given, or in a run.json all of them.
        epochs: Passes through the training data.
        batch_size: Examples a step.
        seed: Seed of the first weights, of the order of examples and of the optimizer's draws.
        split_seed: Seed of the split, where the data are not split.
        split: Shares of training and validation examples, where the data are not split.
        held_out: Classes that are not learned, but kept to see how the model takes the unknown.
        also: More data of these classes, for the training part.
        without: Training examples that are left out, by their places (the index of ``bayesrule sensitivity``).
        schedule: How the learning rate goes on: cosine, linear, step or constant.
        precision: "float32", or "bf16" for autocast in training.
        patience: Stop after so many epochs without a smaller validation NLL, and keep the best; none never stops early.
        device: "auto", "cpu", "cuda".
        loo: How many training examples give a leave-one-out estimate after each epoch; 0 is none.
    """

    of_data: ClassVar[tuple[str, ...]] = ("data", "held_out", "split_seed", "split", "also", "without")
    """The settings that decide what the data are."""
    frozen_weights: ClassVar[bool] = True
    """Whether a checkpoint keeps weights that do not learn; else they come back when the model is built again."""

    draws: ClassVar[int] = 32
    """Networks that are averaged unless another number is asked for."""

    data: str
    optimizer: str
    model: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 50
    seed: int = 0
    split_seed: int = 0
    split: tuple[float, float] | None = None
    held_out: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    without: tuple[int, ...] = ()
    schedule: str = "cosine"
    precision: str = "float32"
    patience: int | None = None
    device: str = "auto"
    loo: int = 0

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size), ("patience", self.patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, most in {"seed": 2**62, "split_seed": 2**62, "batch_size": 2**31, "epochs": 2**31, "loo": 2**31}.items():
            value = getattr(self, name)
            if not 0 <= value < most:
                raise ValueError(f"{name} must be a whole number from 0 to below {most}, got {value}")
        lookup("schedule", self.schedule, SCHEDULES)
        lookup("precision", self.precision, {"float32": None, "bf16": None})

    def plain(self) -> dict[str, Any]:
        """As JSON and TOML have it."""
        return asdict(self)

    def differ(self, other: "RunSettings") -> list[str]:
        """The names of the settings that are not the other's.

        Those of the optimizer are left out, since their defaults depend on the data, and the place of the data, which may move.
        """
        mine, theirs = self.plain(), other.plain()
        return [name for name in mine if name not in ("hyperparameters", "data") and mine[name] != theirs[name]]

    @property
    @abstractmethod
    def optimizers(self) -> Mapping[str, Choice]:
        """Those that can be chosen."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what is wrong whatever the data are, before they are read.

        Raises:
            ValueError: If so.
        """

    def load(self, scale: Scale | None = None, bars: Bars = quiet) -> Data:
        """The data; with a scale that was measured before, nothing is read but what must be."""
        plain = self.arranged()
        data = amended(plain, [self.more(spec, plain) for spec in self.also], self.without)
        return survey(data, bars) if scale is None else replace(data, scale=data.scale.kept(scale))

    @abstractmethod
    def arranged(self) -> Data:
        """The data in their parts, before anything is added or left out; nothing is measured yet."""

    @abstractmethod
    def more(self, spec: str, like: Data) -> Collection:
        """Other data with classes, as a model of ``like`` takes them."""

    @abstractmethod
    def strangers(self, spec: str, like: Data) -> Part:
        """Data of another kind, as unknown to a model of ``like``."""

    @abstractmethod
    def build(self, data: Data) -> nn.Module:
        """The model at its first weights, which depend on the seed alone.

        Raises:
            ValueError: If there is no such model, or it does not take such data.
        """

    def write_weights(self, model: nn.Module, folder: Path) -> None:
        """Leave a trained model in a folder."""
        write_tensors(folder / "model.safetensors", model.state_dict(), {})

    def read_weights(self, model: nn.Module, folder: Path) -> None:
        """Put the weights of a folder into a model that was built."""
        model.load_state_dict(load_file(folder / "model.safetensors"))

    @property
    def weights_file(self) -> str:
        """The file of a run folder that holds what was learned."""
        return "model.safetensors"


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that decides a run on images or rows of a table; kept in its ``run.json``.

    Args:
        optimizer: sgd, rmsprop, adam, adamw, ivon; torch-sgd, torch-adamw for torch's own.
        model: mlp, lenet, resnet20, resnet18, resnet50, or package.module:function for your own.
        size: Height and width that image files are resized to, or one number for both; none as they are.
        target: The column of a table that holds the class; none is the last.
        norm: Normalization in residual networks: frn (filter response) or batch.
        augment: Changes of training images: shift, flip.
    """

    of_data: ClassVar[tuple[str, ...]] = (*RunSettings.of_data, "size", "target")

    model: str = "lenet"
    size: tuple[int, ...] = ()
    target: str | None = None
    norm: str = "frn"
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) > 2:
            raise ValueError(f"size must be one number of pixels, or height and width; got {' '.join(map(str, self.size))}")
        augmentation(self.augment)

    @property
    def height_width(self) -> tuple[int, int] | None:
        """The size of images, if it is given."""
        return (self.size[0], self.size[-1]) if self.size else None

    @property
    def optimizers(self) -> Mapping[str, Choice]:
        return OPTIMIZERS

    def check(self) -> None:
        lookup("norm", self.norm, NORMS)
        if ":" not in self.model:
            lookup("model", self.model, MODELS)

    def arranged(self) -> Data:
        data = arrange(read(self.data, self.height_width, self.target), self.held_out, self.split_seed, self.split)
        check(data)
        return data

    def more(self, spec: str, like: Data) -> Collection:
        return others(spec, like, self.target)

    def strangers(self, spec: str, like: Data) -> Part:
        return strangers(spec, like, self.target)

    def build(self, data: Data) -> nn.Module:
        if data.kind != "image" and self.augment:
            raise ValueError(f"augment {' '.join(self.augment)} changes images, and the data are {data.kind}s; leave it out")
        return build(self.model, data.shape, len(data.classes), self.seed, self.norm)


def from_plain(plain: Mapping[str, Any], kind: Any = Settings) -> Any:
    """Settings of a kind from JSON, where tuples are lists.

    Raises:
        TypeError, ValueError: If they are none.
    """
    known = types(kind)
    if strange := plain.keys() - known.keys():
        raise ValueError(f"unknown setting {min(strange)!r}")
    return kind(**{name: fitted(name, value, known[name]) for name, value in plain.items()})


def settings_within(folder: Path, record: Mapping[str, Any], kind: Any = Settings) -> Any:
    """The settings of a kind in a ``run.json``.

    Raises:
        ValueError: If they are damaged.
    """
    try:
        return from_plain(record["settings"], kind)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {type(error).__name__}: {error}") from error


def read_toml(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run file.

    Args:
        path: The file.
        known: The type of the value of every key.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no TOML, or a key or the type of its value is unknown; the message has the nearest key.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error
    values = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known) or f"; known are {', '.join(known)}"
            raise ValueError(f"{path} has an unknown key {key!r}{near}")
        try:
            values[name] = fitted(key, value, known[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def fitted(name: str, value: Any, kind: Any) -> Any:
    """A value from JSON or TOML as the type that is asked for, where lists are tuples.

    Raises:
        ValueError: If it is of another.
    """
    if value is None and type(None) in get_args(kind):
        return None
    wanted = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    for one in wanted:
        origin, items = get_origin(one) or one, get_args(one)
        if origin is tuple and isinstance(value, list | tuple):
            if (... in items or len(items) == len(value)) and all(_is(item, items[0]) for item in value):
                return tuple(float(item) if items[0] is float else item for item in value)
        elif origin in (dict, Mapping) and isinstance(value, dict):
            return value
        elif origin not in (tuple, dict, Mapping) and _is(value, one):
            return one(value) if one in (float, Path) else value
    raise ValueError(f"{name} must be {' or '.join(map(_word, wanted))}, got {value!r}")


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path", dict: "a table"}


def _word(kind: Any) -> str:
    items = get_args(kind)
    if get_origin(kind) is not tuple:
        return WORDS.get(get_origin(kind) or kind, "a table")
    many = "" if ... in items else f"{len(items)} "
    return f"a list of {many}{ {str: 'texts', int: 'whole numbers', float: 'numbers'}.get(items[0], 'values') }"


def _is(value: Any, kind: Any) -> bool:
    if kind is Path:
        return isinstance(value, str)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def types(kind: type) -> dict[str, Any]:
    """The type of every field of a dataclass."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}
