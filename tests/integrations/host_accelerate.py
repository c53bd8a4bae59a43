"""Accelerate: ``prepare``, ``accumulate``, and the wrapper's ``train()`` and ``eval()``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tests.integrations.matrix import (
    CLIP,
    HYPER,
    SAVED,
    STEPS,
    Cell,
    Host,
    Net,
    Spy,
    Trace,
    micro_batches,
    net_reference,
    trained,
    watched,
)
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br


def force_fp16(accelerator: Accelerator, cell: Cell) -> None:
    """What Accelerate does for ``fp16`` on a GPU; on a processor it refuses."""
    if cell.precision == "scaler":
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = cell.scaler()


def accelerator(cell: Cell) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    made = Accelerator(
        cpu=True,
        gradient_accumulation_steps=cell.accumulation,
        mixed_precision="bf16" if cell.precision == "bf16" else "no",
    )
    force_fp16(made, cell)
    return made


class Accelerate(Host):
    name = "Accelerate"

    def model(self, seed: int = 0) -> nn.Module:
        return Net(seed)

    def fit(self, folder: Path, cell: Cell, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Spy:
        accelerate = accelerator(cell)
        net = self.model(seed=1 if resume else 0)
        model, optimizer = accelerate.prepare(net, br.IVON(trained(net), **HYPER))
        if resume:
            accelerate.load_state(folder / "saved")
        with watched(model, cell, resume, kill) as spy:
            spy.start()
            for step in range(spy.begun, STEPS):
                for x, y in micro_batches(cell, step):
                    model.train()
                    optimizer.train()
                    with accelerate.accumulate(model):
                        accelerate.backward(F.cross_entropy(model(x), y))
                        if accelerate.sync_gradients:
                            accelerate.clip_grad_norm_(model.parameters(), CLIP)
                        optimizer.step()
                        optimizer.zero_grad()
                    model.eval()
                    optimizer.eval()
                    with torch.no_grad():
                        model(x)
                if step + 1 == SAVED:
                    accelerate.save_state(folder / "saved")
        return spy

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        state = load_file(folder / "saved" / "model.safetensors")
        return torch.cat([state[name].reshape(-1) for name, _ in self.model().named_parameters()])

    def reference(self, cell: Cell, spy: Spy) -> Trace:
        return net_reference(self.model(), cell)
