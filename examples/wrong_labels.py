"""Which labels are wrong? A network learns digits of which a tenth are mislabelled; what it would say without each tells which.

Leave-one-out losses are estimated after every epoch, from the posterior that IVON learns anyway: nothing is trained again, and
nobody holds validation data back.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import bayesrule as br

EPOCHS, BATCH = 25, 50


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels of which a tenth are wrong, and which."""
    generator = torch.Generator().manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    wrong = torch.randperm(len(y), generator=generator)[: len(y) // 10]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return x, y, wrong


def main() -> None:
    x, y, wrong = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = br.IVON(model.parameters(), lr=0.1, ess=len(y), hess_init=0.5, weight_decay=1e-3)
    tracker = br.TrackSensitivity(list(zip(x.split(256), y.split(256), strict=True)), every=5, subset=None, estimator="layerwise")
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(y)).split(BATCH):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        line = tracker.update(model, optimizer, epoch)
        if line is not None:
            print(f"epoch {epoch:2}: NLL {line['train_nll']:.3f} in training, {line['loo_nll']:.3f} left out, estimated")
    suspects = tracker.mislabelled(len(wrong)).indices
    share = torch.isin(suspects, wrong).float().mean().item()
    print(f"Of the {len(wrong)} most suspicious labels {100 * share:.0f} % are wrong; by chance it would be 10 %.")


if __name__ == "__main__":
    main()
