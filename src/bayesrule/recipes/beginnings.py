"""What a training command begins with: a run that is to go on, or a file that holds its settings."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bayesrule.recipes.folder import read_record
from bayesrule.recipes.results import COMMANDS, SETTINGS
from bayesrule.recipes.settings import read_toml, settings_within, types


def said_before(arguments: Sequence[str], command: type, settings: type) -> dict[str, Any]:
    """What a run that is to go on began with, and what a run file says: the defaults of a training command.

    Args:
        arguments: Of the command.
        command: Its class, with a field for each of them.
        settings: The class of what is kept of them.

    Raises:
        OSError, ValueError: If the folder or the file cannot be read.
    """
    peek = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--config", type=Path)
    peek.add_argument("--out", type=Path)
    peek.add_argument("--data", nargs="*")
    peek.add_argument("--resume", action="store_true")
    try:
        asked, _ = peek.parse_known_args(list(arguments))
    except Exception:  # said better below
        return {}
    toml: dict[str, Any] = {}
    if asked.config is not None:
        known = {name: kind for name, kind in types(command).items() if name not in ("config", "hyperparameters")}
        toml = read_toml(asked.config, known | {"set": dict})
    out, found = asked.out or toml.get("out"), dict[str, Any]()
    if asked.resume and out is not None and not out.exists() and not (asked.data or "data" in toml):
        raise FileNotFoundError(f"there is no run in {out} to go on with; to begin one, give --data and --optimizer as well")
    if (asked.resume or toml.get("resume")) and out is not None and (out / "run.json").exists():
        record = read_record(out)
        theirs = COMMANDS.get(record["kind"])
        if theirs and SETTINGS.get(record["kind"]) is not (settings if settings in SETTINGS.values() else None):
            raise ValueError(f"{out} holds a run of another kind; go on with it by: bayesrule train {theirs} --resume --out {out}")
        began = settings_within(out, record, settings)
        found = {one.name: getattr(began, one.name) for one in fields(began)}
        if "runs" in record:
            found["seeds"] = len(record["runs"])
    found["hyperparameters"] = {**found.get("hyperparameters", {}), **toml.pop("set", {})}
    return {**found, **toml} if asked.config is not None or len(found) > 1 else {}
