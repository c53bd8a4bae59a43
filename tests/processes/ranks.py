"""Several ranks of torch.distributed on this machine, over gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _one(rank: int, size: int, case: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        found = case(*arguments)
    except Exception as error:
        found = "".join(traceback.format_exception(error))
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)  # whether or not the others are there still


def run(size: int, folder: Path, case: Callable[..., Any], *arguments: Any, timeout: float = 100.0) -> list[Any]:
    """What a function of a module returns on each rank: tensors, numbers and text. Whatever was raised comes as text.

    Args:
        size: Number of ranks.
        folder: An empty one.
        case: A function at the top of a module.
        arguments: Its arguments.
        timeout: Seconds until ranks that wait for one another are given up.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=_one, args=(rank, size, case, str(folder), arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not stuck, f"ranks {stuck} did not end"
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=True) if path.exists() else "killed" for path in paths]
