"""Look a name up in a table, or say in one line which name was probably meant."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry called ``name``.

    Raises:
        ValueError: If there is none; the message shows the name, the nearest one and all of them.

    Example:
        >>> lookup("model", "lenett", {"lenet": 1, "mlp": 2})
        Traceback (most recent call last):
        ValueError: unknown model 'lenett'; did you mean 'lenet'? there are: lenet, mlp
    """
    if name in table:
        return table[name]
    near = get_close_matches(name.lower(), table, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r};{hint} there are: {', '.join(sorted(table))}")
