"""The matrix of hosts: it is left out unless it is asked for, and what it finds is printed and kept as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.noise import HOSTS_OWN
from tests.integrations.table import matrix, write

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

OURS = (
    "test_matrix.py",
    "test_merging.py",
    "test_text.py",
    "test_torch.py",
    "test_lightning.py",
    "test_transformers.py",
    "test_accelerate.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, default=None, help="write the matrix of hosts into this page")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The frameworks take seconds to import, so that a run without them does not even look."""
    return True if collection_path.name in OURS and "not hosts" in config.option.markexpr else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("hosts"):
            for ignored in HOSTS_OWN:
                item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    cells = {tuple(value[:3]): value[3] for r in reports for name, value in getattr(r, "user_properties", []) if name == "cell"}
    if not cells:
        return
    table = matrix(cells)
    terminalreporter.section("hosts")
    terminalreporter.write_line(table)
    if config.option.matrix is not None:
        write(table, config.option.matrix)
