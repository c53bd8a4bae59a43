"""Hosts of torch alone: a loop that knows nothing of draws but one line, around a model and around a compiled one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.integrations.matrix import (
    CLIP,
    HYPER,
    KILLED,
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

FILE = "checkpoint.pt"


class PlainLoop(Host):
    """``opt.attach(model)``, and the loop of any other optimizer."""

    name = "plain loop"

    def model(self, seed: int = 0) -> nn.Module:
        return Net(seed)

    def fit(self, folder: Path, cell: Cell, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Spy:
        model = self.model(seed=1 if resume else 0)
        optimizer, scaler = br.IVON(trained(model), **HYPER), cell.scaler()
        attached = optimizer.attach(model)
        if resume:
            checkpoint = torch.load(folder / FILE)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
        with watched(model, cell, resume, kill) as spy:
            spy.start()
            for step in range(spy.begun, STEPS):
                for i, (x, y) in enumerate(micro_batches(cell, step)):
                    model.train()
                    with cell.autocast():
                        loss = F.cross_entropy(model(x), y) / cell.accumulation
                    scaler.scale(loss).backward()
                    if step == KILLED and i == 0:  # an evaluation in the middle of a step
                        self.look(model, x)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                self.look(model, x)
                if step + 1 == SAVED:
                    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
                    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / FILE)
        attached.remove()
        return spy

    def look(self, model: nn.Module, x: Tensor) -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        return torch.cat([value.reshape(-1) for value in torch.load(folder / FILE)["model"].values()])

    def reference(self, cell: Cell, spy: Spy) -> Trace:
        return net_reference(self.model(), cell)


class Compiled(PlainLoop):
    """The same around ``torch.compile(model)``."""

    name = "torch.compile"

    def model(self, seed: int = 0) -> nn.Module:
        return torch.compile(Net(seed), backend="inductor" if shutil.which("c++") else "aot_eager")
