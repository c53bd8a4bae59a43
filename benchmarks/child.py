"""Call a function in a fresh process, so that no table warms up, fragments or recompiles another's."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def call(task: str, threads: int, *, env: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """What ``benchmarks.module:function`` returns there; arguments and result travel as JSON.

    Raises:
        RuntimeError: The process failed; it has said why on its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        words = json.dumps({"task": task, "threads": threads, "arguments": arguments, "answer": str(answer)})
        run = subprocess.run([sys.executable, "-m", "benchmarks.child", words], cwd=ROOT, env={**os.environ, **(env or {})})
        if run.returncode:
            raise RuntimeError(f"{task} {arguments} ended with exit code {run.returncode}; its own message stands above")
        return json.loads(answer.read_text())


def main(words: str) -> None:
    asked = json.loads(words)
    import torch

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    module, name = asked["task"].split(":")
    answer = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**asked["arguments"])
    Path(asked["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
