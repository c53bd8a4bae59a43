"""Two networks learned other digits, from one base. Can they be made one without their data?

A posterior knows how sure each network is of each weight, so that merging adds what both have learned. The weight of each task is
chosen afterwards: a preview of all weightings costs no training.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bayesrule as br
from bayesrule.uses.merging.fronts import front_chart

EPOCHS, BATCH = 150, 50
Data = tuple[Tensor, Tensor]


def digits() -> list[Data]:
    """To learn the base from, then to fine-tune, then to test."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    return list(zip(x.split([200, 1000, 597]), y.split([200, 1000, 597]), strict=True))


def small(data: Data) -> Data:
    """The digits 0 to 4."""
    x, y = data
    return x[y < 5], y[y < 5]


def large(data: Data) -> Data:
    """The digits 5 to 9."""
    x, y = data
    return x[y >= 5], y[y >= 5]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def learn(data: Data, base: br.Posterior | None = None) -> br.Posterior:
    """What a network learns, from what a base knows."""
    (x, y), model, generator = data, network(), torch.Generator().manual_seed(1)
    if base is not None:
        model.load_state_dict(dict(base.mean))
    optimizer = br.IVON(
        model.named_parameters(), lr=0.1, ess=len(y), hess_init=0.1, betas=(0.9, 0.999), weight_decay=1e-2, prior=base
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return optimizer.posterior(model, num_data=len(y))


def loss(post: br.Posterior, data: Data) -> float:
    """NLL at the mean."""
    with br.sampled(network(), post.exact(), seed=0) as model, torch.no_grad():
        return nn.functional.cross_entropy(model(data[0]), data[1]).item()


def main(picture: Path | None = None) -> None:
    first, rest, test = digits()
    base = learn(first)
    one, two, both = learn(small(rest), base), learn(large(rest), base), learn(rest, base)

    def losses(post: br.Posterior) -> list[float]:
        return [loss(post, small(test)), loss(post, large(test))]

    print("NLL of new digits       0-4    5-9")
    rows = {"the base": base, "learned 0-4": one, "learned 5-9": two, "learned all": both}
    rows |= {name: br.merge(base, [one, two], method=name) for name in ("gradient_matching", "task_arithmetic", "fisher", "linear")}
    for name, post in rows.items():
        print(f"{name:20}", *(f"{value:6.2f}" for value in losses(post)))
    found = br.preview(base, [one, two], losses, names=["the digits 0 to 4", "the digits 5 to 9"])
    weights = " ".join(f"{a:g}:{b:g}" for (a, b), *_ in found.front)
    print(f"{len(found.front)} of {len(found.points)} weightings are on the front: {weights}")
    if picture is not None:
        picture.write_text(front_chart(found))


if __name__ == "__main__":
    main()
