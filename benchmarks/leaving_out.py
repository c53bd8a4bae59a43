"""Estimates of leaving examples out, against models that were really trained without them; and which labels are wrong."""

from __future__ import annotations

import gzip
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br
from benchmarks import child
from benchmarks.ledger import Settings, Table
from benchmarks.plots import scatter
from benchmarks.rivals import kronfluence
from benchmarks.timing import spread

POSTERIORS = ("full", "kron", "diag")
POINTS = (10, 40, 160, 640)
"""Steps after which estimates are compared with retraining."""


def sklearn_digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small digits, mixed."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor(found.data / 16.0, dtype=torch.float64)[order], torch.tensor(found.target)[order]


def perceptron(inputs: int, hidden: int, classes: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# Retraining


def snapshots(x: Tensor, y: Tensor, total: int, delta: float) -> Iterator[nn.Sequential]:
    """A two-layer network after each number of steps in POINTS; all examples in a step, the sum of losses over ``total``."""
    model = perceptron(x.shape[1], 8, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(1, POINTS[-1] + 1):
        optimizer.zero_grad()
        penalty = delta / 2 * sum(p.square().sum() for p in model.parameters())
        ((F.cross_entropy(model(x), y, reduction="sum") + penalty) / total).backward()
        optimizer.step()
        if step in POINTS:
            yield model


def retraining(removals: int, delta: float = 1.0) -> dict[str, Any]:
    """In a process of its own: the change of outputs and losses without each of some examples, estimated and true."""
    x, y = sklearn_digits(200)
    chosen = torch.arange(removals)
    estimates: dict[str, list[Any]] = {name: [] for name in POSTERIORS}
    whole: list[tuple[Tensor, Tensor]] = []
    for model in snapshots(x, y, 200, delta):
        with torch.no_grad():
            f = model(x)[chosen]
        whole.append((f, F.cross_entropy(f, y[chosen], reduction="none")))
        for name in POSTERIORS:
            post = br.Posterior.laplace(model, [(x, y)], structure=name, prior_precision=delta)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = br.Sensitivity(model, post).scores([(x, y)])
            estimates[name].append((scores.deviation[chosen].norm(dim=1), scores.loo_loss[chosen], scores.loss[chosen]))
    truth = [(torch.zeros(removals).double(), torch.zeros(removals).double()) for _ in POINTS]
    for i in chosen.tolist():
        keep = torch.arange(200) != i
        for point, model in enumerate(snapshots(x[keep], y[keep], 200, delta)):
            with torch.no_grad():
                f = model(x[i : i + 1])
            truth[point][0][i] = (f - whole[point][0][i]).norm()
            truth[point][1][i] = F.cross_entropy(f, y[i : i + 1])
    return {
        "truth": [[t.tolist() for t in point] for point in truth],
        "loss": [losses.tolist() for _, losses in whole],
        "estimates": {name: [[t.tolist() for t in point] for point in found] for name, found in estimates.items()},
    }


# Cross-validation


def trained(x: Tensor, y: Tensor, delta: float, epochs: int) -> nn.Sequential:
    """A two-layer network of digits, by Adam until it rests."""
    model, batch = perceptron(64, 32, 10), 50
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            penalty = delta / len(x) / 2 * sum(p.square().sum() for p in model.parameters())
            (F.cross_entropy(model(x[rows]), y[rows]) + penalty).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def cross_validation(deltas: list[float], epochs: int, folds: int = 10) -> list[dict[str, float]]:
    """In a process of its own: by weight decay, the leave-one-out estimates, the NLL of cross-validation and of test data."""
    x, y = sklearn_digits(1797)
    x, y, tests = x[:1000], y[:1000], (x[1000:], y[1000:])
    fold = torch.arange(len(x)) % folds
    found = []
    for delta in deltas:
        model = trained(x, y, delta, epochs)
        line = {"delta": delta}
        for name in POSTERIORS:
            post = br.Posterior.laplace(model, [(x, y)], structure=name, prior_precision=delta)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                estimate = br.Sensitivity(model, post, estimator="layerwise").loo([(x, y)])
            line |= {"train": estimate.train_nll, name: estimate.nll}
        held = [
            F.cross_entropy(trained(x[fold != k], y[fold != k], delta, epochs)(x[fold == k]), y[fold == k]) for k in range(folds)
        ]
        line["cross-validation"] = float(sum(h.item() for h in held) / folds)
        with torch.no_grad():
            line["test"] = F.cross_entropy(model(tests[0]), tests[1]).item()
        found.append(line)
    return found


# Wrong labels

STAGES = (2, 10, 30, 100)
RANKINGS = ("loss", "loss, averaged", "LOO", "LOO, averaged", "LOO, unscaled", "LOO, last layer", "kronfluence")
"""LOO is that of ``mislabelled``: by the posterior that IVON learns, as wide as the data say."""


def texts() -> tuple[Tensor, Tensor] | None:
    """3,000 sentences with their sentiment, as weighted words; None where they are not."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "sentiment_labelled_sentences"
    if not folder.exists():
        return None
    lines = [
        line.rsplit("\t", 1)
        for path in sorted(folder.iterdir())
        if "labelled" in path.name
        for line in (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode().splitlines()
        if "\t" in line
    ]
    words = TfidfVectorizer(min_df=2, max_features=500).fit_transform([text for text, _ in lines]).toarray()
    return torch.tensor(words * 5, dtype=torch.float32), torch.tensor([int(label) for _, label in lines])


def mnist() -> tuple[Tensor, Tensor]:
    from benchmarks.data import digits

    x, y = digits()
    return x.flatten(1), y


SETS: dict[str, Callable[[], tuple[Tensor, Tensor] | None]] = {
    "digits": lambda: tuple(t.float() if t.is_floating_point() else t for t in sklearn_digits(1500)),  # type: ignore[return-value]
    "MNIST, 5,000": mnist,
    "sentences": texts,
}


def _unsorted(ranked: Any) -> Tensor:
    """Scores in the order of the data."""
    found = torch.empty_like(ranked.scores)
    found[ranked.indices] = ranked.scores
    return found


def wrong_labels(name: str, seed: int) -> dict[str, dict[str, float]] | None:
    """In a process of its own: precision among the tenth that looks worst, of which a tenth is wrong, by stage and ranking."""
    data = SETS[name]()
    if data is None:
        return None
    x, y = data
    n, classes = len(x), int(y.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    x, y = x[order], y[order].clone()
    wrong = torch.randperm(n, generator=generator)[: n // 10]
    y[wrong] = (y[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    bad = torch.zeros(n, dtype=torch.bool)
    bad[wrong] = True
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))
    optimizer = br.IVON(model.parameters(), lr=0.1, ess=n, weight_decay=1.0 / n, hess_init=0.5, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STAGES[-1] * -(-n // 50))
    batches = list(zip(x.split(256), y.split(256), strict=True))
    tracker = br.TrackSensitivity(batches, subset=None, estimator="layerwise", num_data=n)
    lost = torch.zeros(n)
    found: dict[str, dict[str, float]] = {}

    def precision(scores: Tensor) -> float:
        if scores.isnan().all():  # of a rival that is not installed
            return math.nan
        return bad[scores.argsort(descending=True)[: n // 10]].float().mean().item()

    for epoch in range(1, STAGES[-1] + 1):
        for rows in torch.randperm(n, generator=generator).split(50):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            losses = F.cross_entropy(model(x), y, reduction="none")
        lost += losses
        if epoch in STAGES or epoch % 10 == 0 or epoch in (1, 3, 5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tracker.update(model, optimizer, epoch)
        if epoch in STAGES:
            assert tracker.scores is not None
            model.eval()
            last = br.Posterior.laplace(model, batches, structure="last_layer", prior_precision=1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                head = br.Sensitivity(model, last, estimator="last_layer").scores(batches)
            own = br.Sensitivity(model.eval(), optimizer.posterior(model, num_data=n), scale="data", estimator="layerwise")
            loo = own.scores(batches).loo_loss
            rival = kronfluence(model, x, y)
            if rival is not None:
                rival.fit()
            influence = losses * math.nan if rival is None else rival.score()
            model.train()
            figures = (losses, lost, loo, _unsorted(tracker.mislabelled()), tracker.scores.loo_loss, head.loo_loss, influence)
            found[str(epoch)] = dict(zip(RANKINGS, map(precision, figures), strict=True))
            found[str(epoch)]["training loss"] = losses.mean().item()
    return found


def tables(settings: Settings) -> list[Table]:
    found = []
    answer = child.call("leaving_out:retraining", settings.threads, removals=8 if settings.quick else 50)
    figures, rows = {}, []
    for point, steps in enumerate(POINTS):
        for name in POSTERIORS:
            pairs = zip(answer["estimates"][name][point][:2], answer["truth"][point], strict=True)
            by = [rank_correlation(torch.tensor(a), torch.tensor(b)) for a, b in pairs]
            if name == "full":
                figures["leaving out: 1 - rank correlation"] = spread([1 - by[1]], 1 - by[1])  # the last one stays
            means = [sum(answer["estimates"][name][point][1]), sum(answer["truth"][point][1]), sum(answer["loss"][point])]
            count = len(answer["loss"][point])
            rows.append((str(steps), name, f"{by[0]:.3f}", f"{by[1]:.3f}", *(f"{m / count:.3f}" for m in means)))
    panels = {
        f"after {steps} steps": {
            name: (answer["truth"][point][1], answer["estimates"][name][point][1]) for name in ("full", "kron")
        }
        for point, steps in enumerate(POINTS)
    }
    title = "Loss of 50 digits by models without them, one at a time: trained again, and estimated by two Laplace posteriors"
    scatter(settings.plots / "leaving_out.png", title=title, x="trained again, nats", y="estimated, nats", panels=panels)
    heads = ("steps", "Laplace", "rank correlation, outputs", "rank correlation, losses", "LOO NLL, estimate", "true", "train")
    note = "two layers, 200 digits, 50 of them really left out, one at a time; deterministic"
    found.append(Table("leaving one out, against retraining", heads, rows, figures, note))

    deltas = [0.3, 3.0] if settings.quick else [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    lines = child.call("leaving_out:cross_validation", settings.threads, deltas=deltas, epochs=20 if settings.quick else 200)
    names = ("delta", "train", *POSTERIORS, "cross-validation", "test")
    rows = [tuple(f"{line[name]:.4g}" for name in names) for line in lines]
    best = {name: min(range(len(lines)), key=lambda i, name=name: lines[i][name]) for name in ("full", "kron", "test")}
    at = lines[best["full"]]
    off, steps_off = abs(at["full"] / at["cross-validation"] - 1), float(abs(best["full"] - best["test"]))
    figures = {
        "leaving out: off cross-validation": spread([off], off),
        "leaving out: grid steps": spread([steps_off], steps_off),
    }
    heads = ("weight decay", "train", *(f"LOO, {name}" for name in POSTERIORS), "10-fold CV", "test")
    found.append(Table("leave-one-out NLL by weight decay, digits", heads, rows, figures, "1,000 digits; deterministic"))

    for name in SETS:
        seeds = range(1 if settings.quick else 3)
        runs = [child.call("leaving_out:wrong_labels", settings.threads, name=name, seed=seed) for seed in seeds]
        if runs[0] is None:
            continue
        rows, figures = [], {}
        for stage in map(str, STAGES):
            means = {key: sum(run[stage][key] for run in runs) / len(runs) for key in runs[0][stage]}
            rows.append((stage, f"{means['training loss']:.3f}", *(f"{means[key]:.3f}" for key in RANKINGS)))
            gains = [run[stage]["LOO, averaged"] - run[stage]["loss"] for run in runs]
            figures[f"wrong labels, {name}, epoch {stage}: LOO averaged less loss"] = spread(gains, gains[0])
        heads = ("epoch", "training loss", *RANKINGS)
        note = f"precision among the worst tenth, a tenth is wrong; {len(runs)} seeds"
        found.append(Table(f"wrong labels, {name}", heads, rows, figures, note))
    return found
