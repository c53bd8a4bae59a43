"""Linearized predictions (diagonal posterior, probit), beside laplace-torch's of the same network and variances."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import bayesrule as br
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.memory import highest, peak_since_reset
from benchmarks.models import mlp, resnet20
from benchmarks.prediction import timed
from benchmarks.timing import Lap, Laps, Neighbors, interleave, ratio, spread, typical

FORWARD, OURS, RIVAL = "one forward", "bayesrule.predict, glm", "laplace-torch, glm"
OTHERS: dict[str, dict[str, Any]] = {
    f"{OURS}, last layer": {"variance": "last_layer"},
    f"{OURS}, sampled, 32 draws": {"variance": "sampled"},
}
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "MLP 0.86M, 32 examples": (mlp, lambda x: x, 32),
    "ResNet-20, 8 examples": (resnet20, as_cifar, 8),  # with 32 the rival asks for more than 20 GB
}
ABSENT = "laplace-torch is not installed here, so it was skipped"
PRIOR = 1.0


def installed() -> bool:
    return importlib.util.find_spec("laplace") is not None


def _rivals(workload: str, examples: int | None = None) -> dict[str, Callable[[], Tensor]]:
    """What gives the probabilities, by name."""
    make, prepare, size = WORKLOADS[workload]
    x = prepare(digits()[0][: examples or size])
    model = make().eval()
    precision = {name: 50 + 100 * torch.rand_like(p) for name, p in model.named_parameters()}
    posterior = br.Posterior({name: p.detach().clone() for name, p in model.named_parameters()}, precision)

    def ours(how: dict[str, Any]) -> Callable[[], Tensor]:
        return lambda: _known(br.predict(model, posterior, x, "glm", **how).probs)

    @torch.no_grad()
    def forward() -> Tensor:
        found: Tensor = model(x)
        return found

    rivals = {FORWARD: forward, OURS: ours({}), **{name: ours(how) for name, how in OTHERS.items()}}
    return rivals | ({RIVAL: _laplace(model, precision, x)} if installed() else {})


def _known(probs: Tensor | None) -> Tensor:
    assert probs is not None
    return probs


def _laplace(model: nn.Module, precision: dict[str, Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The rival with the same posterior; nothing is fitted."""
    from laplace import DiagLaplace  # type: ignore[import-not-found, unused-ignore]

    rival: Any = DiagLaplace(model, "classification", prior_precision=PRIOR)
    rival.H = parameters_to_vector([s.reshape(-1) for s in precision.values()]) - PRIOR
    rival.mean = parameters_to_vector(model.parameters()).detach()
    rival.n_outputs, rival.n_data = 10, 1
    model.output_size = 10  # type: ignore[assignment]
    return lambda: rival(x, pred_type="glm", link_approx="probit")


def race(workload: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own; all give the same probabilities first."""
    rivals = _rivals(workload)
    if RIVAL in rivals:
        torch.testing.assert_close(rivals[RIVAL](), rivals[OURS](), rtol=1e-3, atol=1e-5)
    return interleave({name: timed(each) for name, each in rivals.items()}, rounds=rounds, warmup=warmup, seconds=seconds)


def peak(workload: str, name: str) -> float:
    """In a process of its own: the peak of resident memory of a prediction, over what stood before it, in bytes."""
    _rivals(workload, 1)[name]()
    run = _rivals(workload)[name]
    before = peak_since_reset()
    run()
    return highest() - before


def tables(settings: Settings) -> list[Table]:
    found = []
    effort: dict[str, Any] = dict(rounds=settings.rounds(21), warmup=1, seconds=settings.seconds(90))
    if not installed():
        warnings.warn(ABSENT, stacklevel=1)
    for workload in WORKLOADS:
        neighbors = Neighbors()
        answer = child.call("linearized:race", settings.threads, workload=workload, **effort)
        laps = {name: [Lap(*lap) for lap in each] for name, each in answer.items()}
        peaks = {name: child.call("linearized:peak", settings.threads, workload=workload, name=name) for name in laps}
        title, figures = f"linearized prediction, {workload}", {}
        if RIVAL in laps:
            memory = peaks[OURS] / peaks[RIVAL]
            figures = {f"{title}: time": ratio(laps[OURS], laps[RIVAL]), f"{title}: memory": spread([memory], memory)}
        costs = {name: ratio(of, laps[FORWARD]) for name, of in laps.items()}
        rows = [(n, str(costs[n]), f"{typical(of).seconds * 1e3:.4g}", f"{peaks[n] / 2**20:.4g}") for n, of in laps.items()]
        beside = f"ours / the rival: time {figures[f'{title}: time']}, memory {memory:.3g}; " if figures else f"{ABSENT}; "
        note = f"{beside}{len(laps[OURS])} rounds; memory over what stood before, one process each; {neighbors.report()}"
        found.append(Table(title, ("prediction", "ratio to a forward", "ms", "MiB"), rows, figures, note))
    return found
