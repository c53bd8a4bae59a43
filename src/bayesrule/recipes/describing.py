"""What is in some data, before an hour is spent on them."""

from typing import Any

from bayesrule.recipes.data import Bars, Data, arrange, check, quiet, survey
from bayesrule.recipes.formats.named import Text, stdlib
from bayesrule.recipes.formats.reading import read
from bayesrule.recipes.settings import Settings

TEXTS = {"stdlib": stdlib}


def describe(settings: Settings, bars: Bars = quiet) -> tuple[dict[str, Any], str | None]:
    """What is in the data of a run that may be, and why nothing could be learned from them, if so.

    Raises:
        ValueError: If they cannot be read.
        OSError: If they are not there.
    """
    if settings.data in TEXTS:
        return _text(TEXTS[settings.data]()), None
    found = read(settings.data, settings.height_width, settings.target)
    data = arrange(found, settings.held_out, settings.split_seed, settings.split)
    refusal = None
    try:
        check(data)
        data = survey(data, bars)
    except ValueError as error:
        refusal = str(error)
    return _examples(data), refusal


def _text(text: Text) -> dict[str, Any]:
    parts = {"training": text.train, "validation": text.validation, "test": text.test}
    return {"name": text.name, "kind": "text", "files": sum(text.files), "bytes": {name: len(part) for name, part in parts.items()}}


def _examples(data: Data) -> dict[str, Any]:
    if not data.classes:
        return {"name": data.name, "kind": data.kind, "form": data.form, "shape": list(data.shape)} | {
            "examples": {"unlabeled": len(data.train.source)},
            "classes": {},
            "notes": list(data.notes),
        }
    counts = {
        label: {name: int((part.labels == k).sum()) for name, part in data.parts.items()} for k, label in enumerate(data.classes)
    }
    return {
        "name": data.name,
        "kind": data.kind,
        "form": data.form,
        "shape": list(data.shape),
        "examples": {name: len(part) for name, part in data.parts.items()},
        "classes": counts,
        "columns": list(data.columns),
        "held_out": 0 if data.unknown is None else len(data.unknown),
        "notes": list(data.notes),
    }
