"""What every test file shares: threads, the optional surroundings, and the markers that skip without them."""

import gc
import shutil
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

torch.set_num_threads(1)  # one worker a core: threads of the same process would only queue for it
pytest.register_assert_rewrite("tests.contracts", "tests.optimizers.problems")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not SHARED.is_dir():
        missing["shared"] = pytest.mark.skip(reason="there is no folder `shared` beside the checkout")
    if CHROMIUM is None:
        missing["browser"] = pytest.mark.skip(reason="no chromium, chromium-browser or google-chrome on the PATH")
    for item in items:
        for marker, skip in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Modules and test items stay to the end: garbage is no longer looked for among them, nor tensors counted."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference data beside the checkout; use with the marker of the same name."""
    return SHARED


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's binary; use with the marker `browser`."""
    assert CHROMIUM is not None
    return CHROMIUM
