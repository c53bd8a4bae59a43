"""An ordinary training loop, made for AdamW: it trains IVON too, once a line outside of it has attached the optimizer.

Handwritten digits in micro-batches, with a schedule, clipping and an evaluation in every epoch; none of it knows of draws. The same
loop is run by AdamW and by IVON, and both end about as well on digits that were not seen. What IVON leaves beside the weights is
their posterior, which says where its samples disagree: that is where most of the mistakes are.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br

EPOCHS, MICRO, ACCUMULATE = 20, 25, 2


def main() -> None:
    torch.manual_seed(0)
    x, y, x_new, y_new = digits()

    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), x, y, x_new, y_new)
    say("AdamW", model(x_new).softmax(1), y_new)

    model = network()
    opt = br.IVON(model.parameters(), lr=1.0, ess=len(x))
    opt.attach(model)  # the one line: every training forward now sees a draw, every other the mean
    train(model, opt, x, y, x_new, y_new)
    say("IVON, the mean", model(x_new).softmax(1), y_new)
    post = opt.posterior(model, num_data=len(x))
    found = br.predict(model, post, x_new, method="mc", num_samples=32)
    say("IVON, the posterior", found.probs, y_new)
    wrong = found.probs.argmax(1) != y_new
    doubtful = found.mutual_information.argsort(descending=True)[: len(y_new) // 5]
    print(f"mistakes {wrong.sum()}, of which {wrong[doubtful].sum()} in the fifth where the samples disagree most")


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> None:
    """Knows nothing of any of this."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS)
    for _ in range(EPOCHS):
        model.train()
        for i, rows in enumerate(torch.randperm(len(x)).split(MICRO)):
            loss = F.cross_entropy(model(x[rows]), y[rows]) / ACCUMULATE
            loss.backward()
            if i % ACCUMULATE == ACCUMULATE - 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        schedule.step()
        model.eval()
        with torch.no_grad():
            F.cross_entropy(model(x_new), y_new)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels to learn from, and others to be asked about."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    x = torch.tensor(bunch.images / 16, dtype=torch.float32).flatten(1)[order]
    y = torch.tensor(bunch.target)[order]
    return x[:500], y[:500], x[500:], y[500:]


@torch.no_grad()
def say(name: str, probs: Tensor, y: Tensor) -> None:
    nats = F.nll_loss(probs.clamp_min(1e-12).log(), y)
    print(f"{name:20} right {(probs.argmax(1) == y).float().mean():.3f}   nats a digit {nats:.3f}")


if __name__ == "__main__":
    main()
