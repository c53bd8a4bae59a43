"""Bayes' rule is one step of the Bayesian learning rule, from any start.

A Belgian one-euro coin, spun on edge 250 times, came up heads 140 times. "It looks very suspicious to me", said a statistician.
The evidence disagrees: it slightly favors a fair coin.

Source: The Guardian, 4 January 2002; D. MacKay (2003), Information Theory, Inference, and Learning Algorithms, exercise 3.15.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bayesrule as br

SPINS = torch.tensor([1.0] * 140 + [0.0] * 110)


def main(out: Path) -> None:
    flat = br.Beta(1.0, 1.0)
    coin = br.conjugate.update(flat, "bernoulli", SPINS)
    print(f"posterior                    {named(coin.posterior)}: {mean_and_deviation(coin.posterior)}")
    print(f"the next spin is heads       {coin.predictive.probs:.4f}")
    print(f"evidence against a fair coin {(coin.log_evidence - len(SPINS) * math.log(0.5)).exp():.2f} to 1")

    for start in (br.Beta(2.0, 400.0), br.Beta(30.0, 0.5)):
        found = br.conjugate.update(flat, "bernoulli", SPINS, start=start).posterior
        print(f"one step from {named(start):<15}{named(found)}")

    yesterday = br.conjugate.update(flat, "bernoulli", SPINS[::2])
    today = br.conjugate.update(yesterday.posterior, "bernoulli", SPINS[1::2])
    print(f"yesterday, then today        {named(yesterday.posterior)}, then {named(today.posterior)}")
    print(f"log evidence in nats         {yesterday.log_evidence:.3f} {today.log_evidence:+.3f} = {coin.log_evidence:.3f} at once")
    draw({"before": flat, "after 125 spins": yesterday.posterior, "after 250 spins": today.posterior}, out / "coin.png")


def named(q: br.Beta) -> str:
    return f"Beta({q.concentration1:g}, {q.concentration0:g})"


def mean_and_deviation(q: br.Beta) -> str:
    return f"{q.mean:.3f} ± {q.to_torch().stddev:.3f}"


def draw(posteriors: dict[str, br.Beta], path: Path) -> None:
    """Densities of the probability of heads."""
    x: Tensor = torch.linspace(0.301, 0.899, 600)
    figure = Figure(figsize=(8, 4.5), dpi=125, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.5, color="#999999", linestyle="--", label="a fair coin")
    for (name, q), color in zip(posteriors.items(), ("#000000", "#E69F00", "#0072B2"), strict=True):
        axes.plot(x, q.to_torch().log_prob(x).exp(), color=color, linewidth=2, label=f"{name}: {named(q)}")
    axes.set_xlabel("probability of heads", fontsize=13)
    axes.set_ylabel("density", fontsize=13)
    axes.set_xlim(0.3, 0.9)
    axes.set_ylim(0, None)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=12, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"picture                      {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the picture (runs/examples)")
    main(parser.parse_args().out)
