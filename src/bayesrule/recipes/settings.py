"""All that decides a run, and the TOML files that hold it."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bayesrule.recipes.augmentation import augmentation
from bayesrule.recipes.formats.pieces import nearest
from bayesrule.recipes.names import lookup
from bayesrule.recipes.schedules import SCHEDULES


@dataclass(frozen=True)
class Settings:
    """All that decides a run; kept in its ``run.json``.

    Args:
        data: A name, or the path of data.
        optimizer: A name in the table of optimizers.
        model: A name in the table of models, or ``package.module:function``.
        hyperparameters: The optimizer's settings: those given, or in a run.json all of them.
        epochs: Passes through the training data.
        batch_size: Examples a step.
        seed: Seed of the first weights, of the order of examples and of the optimizer's draws.
        split_seed: Seed of the split, where the data are not split.
        split: Shares of training and validation examples, where the data are not split.
        held_out: Classes that are not learned, but kept to see how the model takes the unknown.
        size: Height and width that image files are resized to, or one number for both; none as they are.
        target: The column of a table that holds the class; none is the last.
        norm: Normalization in residual networks.
        schedule: How the learning rate goes on.
        augment: Changes of training images.
        precision: "float32", or "bf16" for autocast in training.
        patience: Stop after so many epochs without a smaller validation NLL, and keep the best; none never stops early.
        device: "auto", "cpu", "cuda".
    """

    data: str
    optimizer: str
    model: str = "lenet"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 50
    seed: int = 0
    split_seed: int = 0
    split: tuple[float, float] | None = None
    held_out: tuple[str, ...] = ()
    size: tuple[int, ...] = ()
    target: str | None = None
    norm: str = "frn"
    schedule: str = "cosine"
    augment: tuple[str, ...] = ()
    precision: str = "float32"
    patience: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size), ("patience", self.patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(self.size) > 2:
            raise ValueError(f"size must be one number of pixels, or height and width; got {' '.join(map(str, self.size))}")
        lookup("schedule", self.schedule, SCHEDULES)
        lookup("precision", self.precision, {"float32": None, "bf16": None})
        augmentation(self.augment)

    @property
    def height_width(self) -> tuple[int, int] | None:
        """The size of images, if it is given."""
        return (self.size[0], self.size[-1]) if self.size else None

    def plain(self) -> dict[str, Any]:
        """As JSON and TOML have it."""
        return asdict(self)

    def differ(self, other: "Settings") -> list[str]:
        """The names of the settings that are not the other's, but those of the optimizer, whose defaults depend on the data."""
        mine, theirs = self.plain(), other.plain()
        return [name for name in mine if name != "hyperparameters" and mine[name] != theirs[name]]


def from_plain(plain: Mapping[str, Any]) -> Settings:
    """Settings from JSON, where tuples are lists.

    Raises:
        TypeError, ValueError: If they are none.
    """
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Settings(**values)


def settings_within(folder: Path, record: Mapping[str, Any]) -> Settings:
    """The settings in a ``run.json``.

    Raises:
        ValueError: If they are damaged.
    """
    try:
        return from_plain(record["settings"])
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
        values[name] = _fitted(path, key, value, known[name])
    return values


def _fitted(path: Path, key: str, value: Any, kind: Any) -> Any:
    """A value of a run file as the type that is asked for."""
    wanted = get_args(kind) if type(None) in get_args(kind) else (kind,)
    for one in wanted:
        items = get_args(one)
        if items and isinstance(value, list):
            inner = {item for item in items if item is not ...}
            length = None if ... in items else len(items)
            if length in (None, len(value)) and all(any(_is(item, part) for part in inner) for item in value):
                return tuple(Path(item) if Path in inner else item for item in value)
        elif not items and _is(value, one):
            return one(value) if one in (float, Path) else value
    words = " or ".join(str(getattr(one, "__name__", one)).replace("str", "text") for one in wanted if one is not type(None))
    raise ValueError(f"{path}: {key} must be {words}, got {value!r}")


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
