"""Lightning: automatic optimization, validation in the middle of a step, the callback and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tests.integrations.matrix import CLIP, HYPER, ROWS, Cell, Host, Net, Spy, Trace, data, net_reference, watched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br
from bayesrule.integrations.lightning import DrawCallback


class Module(pl.LightningModule):
    """What a user writes. The network is called by its own name, so that no hook of the module's forward runs."""

    def __init__(self, net: nn.Module, spy: Spy | None = None) -> None:
        super().__init__()
        self.net = net
        self.spy = spy

    def configure_optimizers(self) -> br.IVON:
        return br.IVON(self.net.parameters(), **HYPER)

    def on_train_start(self) -> None:
        if self.spy is not None:
            self.spy.start()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))


def trainer(folder: Path, cell: Cell, **more: Any) -> pl.Trainer:
    precision: dict[str, Any] = {"fp32": {}, "bf16": {"precision": "bf16-mixed"}}.get(cell.precision) or {}
    if cell.precision == "scaler":  # "16-mixed" on a processor becomes bf16-mixed, so its plugin is made by hand
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", cell.scaler())]}
    chosen: dict[str, Any] = dict(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=cell.accumulation,
        gradient_clip_val=CLIP,
        val_check_interval=6 if cell.accumulation == 4 else 1,
        limit_val_batches=1,
        callbacks=[
            DrawCallback(),
            ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return pl.Trainer(**{**chosen, **precision, **more})


def loaders(cell: Cell) -> tuple[DataLoader, DataLoader]:
    dataset = TensorDataset(*data(cell))
    return DataLoader(dataset, batch_size=ROWS), DataLoader(dataset, batch_size=ROWS)


class Lightning(Host):
    name = "Lightning"

    def model(self, seed: int = 0) -> nn.Module:
        return Net(seed)

    def fit(self, folder: Path, cell: Cell, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Spy:
        net = self.model(seed=1 if resume else 0)
        with watched(net, cell, resume, kill) as spy:
            trainer(folder, cell).fit(Module(net, spy), *loaders(cell), ckpt_path=self._file(folder) if resume else None)
        return spy

    def _file(self, folder: Path) -> Path:
        return folder / "step=3.ckpt"

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        state = torch.load(self._file(folder))["state_dict"]
        return torch.cat([value.reshape(-1) for value in state.values()])

    def reference(self, cell: Cell, spy: Spy) -> Trace:
        return net_reference(self.model(), cell)
