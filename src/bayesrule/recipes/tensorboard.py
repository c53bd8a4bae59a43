"""The lines of ``metrics.jsonl`` for those who watch TensorBoard."""

import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bayesrule.recipes.runs import Watch


@contextmanager
def watching(out: Path) -> Iterator[Watch]:
    """What is told every line and writes it into ``out/tensorboard``, a folder a seed; a run that goes on writes all lines anew.

    Raises:
        ValueError: If TensorBoard is not installed.
    """
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard") from error
    open_ones: dict[int, Any] = {}
    with ExitStack() as stack:

        def watch(seed: int, line: Mapping[str, Any]) -> None:
            if seed not in open_ones:
                folder = out / "tensorboard" / f"seed-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                open_ones[seed] = stack.enter_context(writer(str(folder)))
            place, *figures = line.items()  # an epoch or a step comes first
            for name, value in figures:
                open_ones[seed].add_scalar(name, value, place[1])
            open_ones[seed].flush()

        yield watch
