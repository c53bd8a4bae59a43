"""How sure a network may be: measure it, choose the width of the posterior on validation data, and know when not to answer."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br

FIGURES = ("accuracy", "nll", "ece", "brier", "aurc", "auroc_ood")


def main() -> None:
    torch.manual_seed(0)
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    unknown, known = images[labels >= 8], (images[labels < 8], labels[labels < 8])  # eights and nines are never learned
    train, validation, test = (tuple(x[i] for x in known) for i in torch.randperm(len(known[0])).split([300, 400, 743]))

    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 8))
    post = learn(model, *train)
    calibrated = br.calibrate(model, post, [validation])

    print(f"chosen on validation data: tau {calibrated.ess / post.ess:.3g}, temperature {calibrated.temperature:.3g}")
    print("on test data  ", *(f"{name:>10}" for name in FIGURES))
    ways: dict[str, tuple] = {"mean": (post, "mean"), "averaged": (post, "mc"), "calibrated": (calibrated, "mc")}
    for way, (posterior, method) in ways.items():
        figures = br.evaluate(model, posterior, [test], method=method, metrics=FIGURES, ood=[unknown])
        print(f"{way:14}", *(f"{figures[name]:10.4f}" for name in FIGURES))

    probs, y = br.predict(model, calibrated, validation[0]).probs, validation[1]
    new = br.predict(model, calibrated, test[0]).probs
    sets = br.ConformalSets(level=0.99).fit(probs, y)(new)
    held = sets[range(len(new)), test[1]].float().mean()
    print(f"sets of classes for 99 %: hold the truth in {held:.1%}, with {sets.sum(1).float().mean():.2f} classes on average")
    threshold = br.selective_threshold(probs.amax(1), probs.argmax(1) == y, risk=0.01)
    taken = new.amax(1) >= threshold
    wrong = (new.argmax(1) != test[1])[taken].float().mean()
    print(f"answering from {threshold:.2f} on for 1 % wrong: {wrong:.1%} wrong of the {taken.float().mean():.0%} answered")


def learn(model: nn.Module, x: Tensor, y: Tensor) -> br.Posterior:
    opt = br.IVON(model.parameters(), lr=0.2, ess=len(x), weight_decay=1e-3, hess_init=0.1)
    for _ in range(60):
        for rows in torch.randperm(len(x)).split(50):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
    model.eval()
    return br.Posterior.from_optimizer(opt, model, num_data=len(x))


if __name__ == "__main__":
    main()
