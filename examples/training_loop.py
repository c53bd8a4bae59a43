"""The training loop of the README, in plain PyTorch: what changes is the optimizer and one line, what is gained is a posterior.

Digits of 8 x 8 pixels; the network is asked afterwards about digits that it has not seen, and the doubtful ones are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import bayesrule as br


def main(out: Path) -> None:
    torch.manual_seed(0)
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images / 16, dtype=torch.float32).flatten(1), torch.tensor(bunch.target)
    train_set, test_set = random_split(TensorDataset(images, labels), [0.7, 0.3])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x_new, y_new = test_set[:]

    post, probs = learn(model, train_set, x_new)

    print(f"weights                    {sum(m.numel() for m in post.mean.values()):,}, each with a mean and a precision")
    print(f"right                      {(probs.argmax(1) == y_new).float().mean():.3f}")
    sure = probs.amax(1) > 0.9
    print(f"right where it is sure     {(probs.argmax(1) == y_new)[sure].float().mean():.3f} of {sure.sum()}")
    print(f"right where it is not sure {(probs.argmax(1) == y_new)[~sure].float().mean():.3f} of {(~sure).sum()}")
    noise = br.predict(model.eval(), post, torch.rand(200, 64), method="mc")
    print(f"entropy, digits and noise  {F.cross_entropy(probs.log(), probs):.2f}, {noise.entropy.mean():.2f} nats")
    draw(x_new.view(-1, 8, 8), y_new, probs, out / "training_loop.png")


def learn(model: nn.Module, train_set, x_new: Tensor) -> tuple[br.Posterior, Tensor]:
    loader = [batch for _ in range(20) for batch in DataLoader(train_set, batch_size=50, shuffle=True)]  # 20 epochs
    opt = br.IVON(model.parameters(), lr=0.1, ess=len(train_set))
    for x, y in loader:
        with opt.sampled_params(train=True):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        opt.step()
    post = br.Posterior.from_optimizer(opt, model, num_data=len(train_set))
    probs = br.predict(model.eval(), post, x_new, method="mc").probs
    return post, probs


def draw(images: Tensor, labels: Tensor, probs: Tensor, path: Path) -> None:
    figure = Figure((10.5, 3.6), layout="constrained")
    figure.suptitle("Where the posterior doubts: the answer, its probability, and what it was")
    doubtful = probs.amax(1).argsort()[:16].tolist()
    for axes, i in zip(figure.subplots(2, 8).flat, doubtful, strict=True):
        answer = int(probs[i].argmax())
        axes.imshow(images[i].numpy(), cmap="gray_r")
        axes.set_title(
            f"{answer}, {100 * probs[i, answer]:.0f} % ({labels[i]})", fontsize=9, color="k" if answer == labels[i] else "C3"
        )
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture                    {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the picture (default: %(default)s)")
    main(parser.parse_args().out)
