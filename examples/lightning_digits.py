"""PyTorch Lightning: IVON in `configure_optimizers`, `DrawCallback()` among the callbacks, and nothing else changes.

Handwritten digits, with accumulation, clipping and validation. Afterwards the digits of which the posterior is least sure are set
aside, as one would for a person to look at: that removes more mistakes than setting aside as many at random.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import bayesrule as br
from bayesrule.integrations.lightning import DrawCallback


class Digits(pl.LightningModule):
    def __init__(self, ess: int) -> None:
        super().__init__()
        self.ess = ess
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("right", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return br.IVON(self.parameters(), lr=0.1, ess=self.ess)


def main() -> None:
    quiet()
    pl.seed_everything(0, verbose=False)
    bunch = load_digits()
    dataset = TensorDataset(torch.tensor(bunch.images / 16, dtype=torch.float32), torch.tensor(bunch.target))
    train_set, val_set = random_split(dataset, [0.5, 0.5])
    module = Digits(ess=len(train_set))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=15,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            callbacks=[DrawCallback()],  # the one line
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(train_set, batch_size=20, shuffle=True), DataLoader(val_set, batch_size=len(val_set)))
    print(f"right in validation, at the mean  {trainer.callback_metrics['right']:.3f}")

    x, y = val_set[:]
    post = trainer.optimizers[0].posterior(module, num_data=len(train_set))
    found = br.predict(module.eval(), post, x, method="mc", num_samples=32)
    right = found.probs.argmax(1) == y
    surest = found.entropy.argsort()[: int(0.9 * len(y))]
    print(f"mistakes of the posterior         {(~right).sum()} of {len(y)}")
    print(f"mistakes where it is surest       {(~right[surest]).sum()} of {len(surest)}")


def quiet() -> None:
    """Lightning's hints about loaders and devices are of no use here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec")


if __name__ == "__main__":
    main()
