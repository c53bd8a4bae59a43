"""One posterior as every family of the library sees it, fitted by the library's own rule; docs/families.md says what to look at.

The smallest neural network, w2 tanh(w1 x), tells two kinds of iris apart by the length of their sepals. Its posterior is bent and
tilted, and has two modes: both weights may change their sign together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import contourpy
import torch
from sklearn.datasets import load_iris
from torch import Tensor
from torch.nn.functional import softplus

import bayesrule as br
from bayesrule.bases import Basis, eigenvectors

LENGTH, Y = (torch.tensor(column[50:]).double() for column in (load_iris().data[:, 0], load_iris().target - 1))
X, AXIS = LENGTH - LENGTH.mean(), torch.linspace(-7, 7, 281).double()  # cm, of versicolor and virginica; weights
GRID, CORNERS = (torch.cartesian_prod(axis, axis) for axis in (AXIS, torch.tensor([-1.0, 1.0]).double()))
PAPER, TICKS = "M0,0H1000V444H0", {-4: "−4", 0: "0", 4: "4"}
STYLE = """:root{--paper:#fff;--ink:#222;--truth:#2f6fab;--q:#c8500a} text{fill:var(--ink);font:13px Helvetica,Arial,sans-serif}
@media (prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#d8dee6;--truth:#5a9bd8;--q:#ffa24a}} .name{font-weight:bold}
.tick{text-anchor:middle} .end{text-anchor:end} .frame{fill:none;stroke:var(--ink);stroke-opacity:.5} .axes{stroke:var(--ink);
stroke-opacity:.2;stroke-width:.06} .truth{fill:var(--truth);fill-opacity:.35} .q{fill:none;stroke:var(--q);stroke-width:.11}
.point{stroke:var(--q);stroke-width:.55;stroke-linecap:round} .paper{fill:var(--paper)}"""


def losses(w: Tensor) -> Tensor:  # minus the log likelihood of each flower
    out = w.reshape(-1)[1] * (w.reshape(-1)[0] * X).tanh()
    return softplus(out) - Y * out


def fits() -> dict[str, Any]:  # with the prior N(0, 4 I); all but the first and the last start where gradient descent ends
    def fit(way: tuple[Any, Any, Any], q: Any, prior: Any, rate: float = 0.5, steps: int = 25) -> Any:
        for _ in range(steps):
            q = br.BayesRule(*way).step(q, prior, br.Loss(lambda w: losses(w).sum()), rate)
        return q

    zero, still, spread = torch.zeros(2).double(), br.Zero(), br.GaussHermite(5)
    additive, natural = (spread, br.Hessian(), br.Additive()), (spread, br.Hessian(), br.Natural())
    prior = br.Isotropic(zero, zero[0] + 0.25)
    w = fit((br.Delta(), still, br.Additive()), br.Fixed(zero + 1), prior, 0.05, 200).mean
    slopes, full = torch.func.jacrev(losses)(w), br.Full(w, 4.0)
    return {
        "Point": br.Fixed(w, 1e9),  # without width, as far as the grid can tell
        "Fixed": fit((spread, still, br.Additive()), br.Fixed(w), prior, 0.2),
        "Isotropic": fit(natural, br.Isotropic(w, zero[0] + 4), prior),
        "Diagonal": fit(natural, br.Diagonal(w, zero + 4), prior),
        "LowRank, one direction": fit(additive, br.LowRank(w, 4.0, rank=1), prior),
        "Eigen": fit(natural, br.Eigen(w, Basis((2,), [eigenvectors(slopes.T @ slopes)]), zero + 4), prior),
        "Kronecker, 2 × 1": fit(additive, br.Kronecker(w[:, None], 4.0), br.Isotropic(zero[:, None], prior.hess)),
        "Full": fit(natural, full, br.Full(zero, 0.25)),
        "Mixture of two": fit(natural, br.Mixture(torch.stack([w, -w]), torch.stack([full.metric] * 2)), prior),
        "Signs": fit((br.Enumerate(), still, br.Natural()), br.SignedBernoulli(zero + 0.1), br.SignedBernoulli(zero)),
    }


def told(log_prob: Any, places: Tensor) -> Tensor:  # log probabilities, as if there were no other places
    return torch.vmap(log_prob, chunk_size=8192)(places).reshape(len(places), -1).sum(1).log_softmax(0)


def shown(logs: Tensor, kind: str) -> str:  # what has 90 and 50 % of the probability; of corners, circles whose areas are theirs
    if len(logs) == 4:
        circle = f'<circle class="{kind}" cx="{{0[0]:g}}" cy="{{0[1]:g}}" r="{{1:.2f}}"/>'
        return "".join(map(circle.format, CORNERS.tolist(), (logs / 2).exp().clamp(min=0.08)))
    down, plane = logs.sort(descending=True).values, contourpy.contour_generator(AXIS, AXIS, logs.view(281, 281).T)
    edges = [plane.lines(down[down.exp().cumsum(0) < share][-1]) for share in (0.9, 0.5)]
    parts = ["M" + "ZM".join(" ".join(f"{x:.2f},{y:.2f}" for x, y in line[::2]) for line in lines) for lines in edges]
    return "".join(f'<path class="{kind}" d="{part}Z"/>' for part in parts)


def main(out: Path) -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 444"><style>{STYLE}</style><path class="paper" d="{PAPER}"/>'
    for number, (name, q) in enumerate(fits().items()):
        places = CORNERS if name == "Signs" else GRID
        exact = told(lambda w: -losses(w).sum() - w.square().sum() / 8, places)
        logs = told(q.log_prob, places[..., None] if name[0] == "K" else places)
        gap = "∞" if name == "Point" else f"{(logs.exp() * (logs - exact)).sum():.2f}"
        print(f"KL(q || p), {name:<24}{gap}")
        spot = f'<path class="point" d="M{q.mean.flatten()[0]:.2f},{q.mean.flatten()[1]:.2f}h.01"/>'
        marks = shown(exact, "truth") + (spot if name == "Point" else shown(logs, "q"))
        svg += f"""\n<g transform="translate({36 + number % 5 * 193} {28 + number // 5 * 212})"><text class="name" y="-8">{name}
</text><svg width="176" height="176" viewBox="-5.5 -5.5 11 11"><g transform="scale(1 -1)"><path class="axes" d="M-6,0H6M0,-6V6"/>
{marks}</g></svg><rect class="frame" width="176" height="176"/><text class="end" x="168" y="166">KL {gap}</text>"""
        ticks = [f'<text class="tick" x="{88 + 16 * w}" y="192">{tick}</text>' for w, tick in (TICKS | {5.2: "w₁"}).items()]
        sides = [f'<text class="end" x="-6" y="{92 - 16 * w}">{tick}</text>' for w, tick in (TICKS | {5.1: "w₂"}).items()]
        svg += "".join(ticks * (number > 4) + sides * (number % 5 == 0)) + "</g>"
    out.mkdir(parents=True, exist_ok=True)
    (out / "families.svg").write_text(svg + "\n</svg>\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the picture (docs)")
    main(parser.parse_args().out)
