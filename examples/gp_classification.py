"""Gaussian process classification that says where it does not know: two kinds of iris, by the size of their petals.

The probability averages over the latent function f, whose standard deviation grows away from the flowers that were seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_iris
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import Tensor

import bayesrule as br

LENGTH, WIDTH = torch.linspace(1.5, 8.5, 141).double(), torch.linspace(0.0, 3.5, 141).double()  # of a petal, cm
KINDS = (("versicolor", "o", "#F6B04E"), ("virginica", "^", "#B7A9D9"))


def main(out: Path) -> None:
    iris = load_iris()
    of_interest = iris.target > 0  # setosa is told apart by anything
    X, y = torch.tensor(iris.data[of_interest, 2:]), torch.tensor(iris.target[of_interest] - 1)

    fit = br.cvi(X, y, "bernoulli", kernel=ConstantKernel() * RBF(), tune=30)

    grid = torch.cartesian_prod(LENGTH, WIDTH)
    probability = fit.predictive(grid).probs
    deviation = fit.predict(grid)[1].sqrt()
    right = (fit.predictive(X).probs > 0.5) == y
    print(f"kernel found                 {fit.kernel.source} (lengths in cm)")
    print(f"bound of the log evidence    {fit.evidence_bound:.2f} nats, converged: {fit.converged}")
    print(f"flowers on the right side    {int(right.sum())} of {len(y)}")
    print(f"standard deviation of f      {fit.predict(X)[1].sqrt().mean():.1f} at the flowers, {deviation.max():.1f} at the edge")
    draw(X, y, probability.view(141, 141).T, deviation.view(141, 141).T, out / "gp_classification.png")


def draw(X: Tensor, y: Tensor, probability: Tensor, deviation: Tensor, path: Path) -> None:
    """Two maps over petal length and width: the probability of virginica, and how unsure f is."""
    figure = Figure(figsize=(10, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shade(left, probability, torch.linspace(0, 1, 21), 4, "PuOr", "probability of virginica")
    sides = left.contour(LENGTH, WIDTH, probability, levels=[0.1, 0.5, 0.9], colors="black", linewidths=[1.0, 2.2, 1.0])
    left.clabel(sides, fontsize=12, manual=[(2.4, 2.65), (2.3, 1.0), (7.6, 1.4)])
    shade(
        right, deviation, torch.arange(0.0, float(deviation.max()) + 0.5, 0.5), 4, "viridis", "standard deviation of the latent f"
    )
    for axes in (left, right):
        for kind, (name, marker, color) in enumerate(KINDS):
            axes.scatter(*X[y == kind].T, marker=marker, color=color, edgecolor="black", linewidth=0.9, s=36, label=name)
        axes.set_xlabel("petal length (cm)", fontsize=13)
        axes.tick_params(labelsize=12)
    left.set_ylabel("petal width (cm)", fontsize=13)
    right.legend(fontsize=12, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"picture                      {path}")


def shade(axes: Axes, values: Tensor, levels: Tensor, every: int, colors: str, title: str) -> None:
    filled = axes.contourf(LENGTH, WIDTH, values, levels=levels, cmap=colors)
    axes.figure.colorbar(filled, ax=axes, ticks=levels[::every], format="%g").ax.tick_params(labelsize=12)
    axes.set_title(title, fontsize=14)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the picture (runs/examples)")
    main(parser.parse_args().out)
