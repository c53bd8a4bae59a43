"""A run of a host that kills its own process in the fifth step: ``python -m tests.integrations.killed HOST FOLDER``."""

import os
import signal
import sys
from pathlib import Path

import torch
from tests.integrations.matrix import Cell
from tests.integrations.test_matrix import the_host

if __name__ == "__main__":
    torch.set_num_threads(1)
    the_host(sys.argv[1]).fit(Path(sys.argv[2]), Cell(4, "fp32"), kill=lambda: os.kill(os.getpid(), signal.SIGKILL))
