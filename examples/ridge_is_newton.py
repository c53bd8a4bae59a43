"""Ridge regression = Newton's method = one step of the Bayesian learning rule, on the diabetes data.

442 patients, ten standardized measurements, and how far the disease had progressed a year later (a score from 25 to 346).
On a quadratic loss one step of the rule with rate 1 reaches the posterior from anywhere; its mean is what ridge regression
finds, and its covariance comes for free.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import Tensor

import bayesrule as br

PENALTY = 10.0
NAMES = ["age", "sex", "body mass index", "blood pressure"]
NAMES += ["cholesterol", "LDL", "HDL", "cholesterol / HDL", "log triglycerides", "blood sugar"]


def main(out: Path) -> None:
    data = load_diabetes(scaled=False)
    X, y = torch.tensor(data.data), torch.tensor(data.target)
    X, y = (X - X.mean(0)) / X.std(0), y - y.mean()
    N, D = X.shape
    sigma2 = float((y - X @ torch.linalg.lstsq(X, y[:, None]).solution[:, 0]).square().sum() / (N - D - 1))

    def loss(w: Tensor) -> Tensor:
        return (y - X @ w).square().sum() / (2 * sigma2)

    prior = br.Full(torch.zeros(D, dtype=y.dtype), PENALTY / sigma2)
    start = br.CounterNoise(seed=0).normal(y[:D]) * 10
    rule = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())

    ridge = br.ridge(X, y, PENALTY, noise_variance=sigma2)
    newton = br.newton(loss, start, prior=prior, steps=1)
    step = rule.step(br.Full(start, 1.0), prior, br.Loss(loss))
    sklearn = torch.tensor(Ridge(alpha=PENALTY, fit_intercept=False).fit(X.numpy(), y.numpy()).coef_)

    print(f"largest difference from br.ridge (the weights go up to {ridge.mean.abs().max():.0f}):")
    means = {"br.newton, one step": newton.mean, "br.BayesRule, one step": step.mean, "scikit-learn's Ridge": sklearn}
    for name, mean in means.items():
        print(f"  {name:<24}{(mean - ridge.mean).abs().max():.1e}")
    print(f"  {'covariance of the step':<24}{(step.covariance - ridge.covariance).abs().max():.1e}")

    half = 1.96 * ridge.variance.sqrt()
    print("\npoints of progression per standard deviation, with 95 % credible intervals:")
    for name, mean, width in zip(NAMES, ridge.mean, half, strict=True):
        print(f"  {name:<18}{mean:6.1f}   ({mean - width:6.1f} to {mean + width:6.1f})")
    draw(ridge.mean, half, out / "ridge.png")


def draw(mean: Tensor, half: Tensor, path: Path) -> None:
    """Weights with their intervals."""
    figure = Figure(figsize=(8, 4.5), dpi=125, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#999999", linestyle="--")
    axes.errorbar(mean, range(len(NAMES)), xerr=half, fmt="o", color="#0072B2", markersize=7, linewidth=2, capsize=4)
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.invert_yaxis()
    axes.set_xlabel("points per standard deviation, with 95 % credible intervals", fontsize=13)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the picture (runs/examples)")
    main(parser.parse_args().out)
