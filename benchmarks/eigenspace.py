"""What EVON costs beside SOAP, SAM and bSAM beside two plain steps; and how near EVON's covariance comes to the exact one."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

import bayesrule as br
from benchmarks import child
from benchmarks.data import as_cifar, digits
from benchmarks.ledger import Settings, Table
from benchmarks.models import resnet20
from benchmarks.timing import Lap, Laps, Neighbors, Spread, interleave, ratio, typical

EVERY = 10  # steps from one basis to the next
SHAPES = {"12 layers of 256": [shape for _ in range(12) for shape in ((768, 256), (256, 256), (1024, 256), (256, 1024))]}


class SOAP(torch.optim.Optimizer):
    """Adam in Shampoo's eigenbasis, by the torch calls that EVON makes, one matrix at a time."""

    def __init__(
        self, params: Any, lr: float, beta1: float = 0.95, beta2: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self._one(p, self.state[p], group)

    def _one(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g, beta1, beta2 = p.grad, group["beta1"], group["beta2"]
        if not state:
            state["L"], state["R"] = (1 - beta2) * g @ g.T, (1 - beta2) * g.T @ g
            state["QL"], state["QR"] = torch.linalg.eigh(state["L"])[1], torch.linalg.eigh(state["R"])[1]
            state["m"], state["v"], state["t"] = torch.zeros_like(g), torch.zeros_like(g), torch.tensor(0.0)
        turned = self._contract(g, state, 0)
        state["t"] += 1
        t = int(state["t"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        state["m"].lerp_(turned, 1 - beta1)
        state["v"].lerp_(turned.square(), 1 - beta2)
        root = (state["v"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.sub_(self._contract(state["m"] / root, state, 1), alpha=group["lr"] / (1 - beta1**t))
        state["L"].lerp_(g @ g.T, 1 - beta2)
        state["R"].lerp_(g.T @ g, 1 - beta2)
        if t % EVERY == 0:
            raw = self._contract(state["m"], state, 1)
            state["QL"], state["QR"] = (torch.linalg.qr(state[s] @ state[q])[0].contiguous() for s, q in (("L", "QL"), ("R", "QR")))
            state["m"] = self._contract(raw, state, 0)

    @staticmethod
    def _contract(x: Tensor, state: dict[str, Any], side: int) -> Tensor:
        for q in (state["QL"], state["QR"]):
            x = torch.tensordot(x, q, dims=([0], [side]))
        return x


def eigen(shapes: str, rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: steps on given gradients; EVON draws, too."""
    torch.manual_seed(0)

    def rival(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], Lap]:
        params = [nn.Parameter(torch.randn(shape) / 16) for shape in SHAPES[shapes]]
        optimizer = make(params)

        def run() -> Lap:
            gradients = [torch.randn_like(p) / 100 for p in params]
            start = perf_counter()
            for _ in range(1):
                if isinstance(optimizer, br.EVON):
                    optimizer.train()
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
            return Lap(perf_counter() - start)

        return run

    hyper: dict[str, Any] = dict(ess=1e6, hess_init=0.1, betas=(0.95, 0.999), shampoo_beta=0.99, whiten=False)
    return interleave(
        {
            "SOAP": rival(lambda params: SOAP(params, 1e-3)),
            "EVON": rival(lambda params: br.EVON(params, 1e-3, **hyper, precondition_frequency=EVERY)),
            "EVON, phasing": rival(lambda params: br.EVON(params, 1e-3, **hyper, precondition_frequency=EVERY, phasing=True)),
        },
        rounds=rounds,
        warmup=warmup,
        seconds=seconds,
    )


def sharp(rounds: int, warmup: int, seconds: float) -> Laps:
    """In a process of its own: a step of SAM or bSAM beside two of SGD, on ResNet-20."""
    pixels, labels = digits()
    pixels = as_cifar(pixels)[:128]

    def rival(make: Callable[[Any], torch.optim.Optimizer], times: int) -> Callable[[], Lap]:
        model = resnet20()
        optimizer = make(model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels), labels[:128])
            loss.backward()
            return loss

        def run() -> Lap:
            start = perf_counter()
            for _ in range(times):
                optimizer.step(closure)
            return Lap(perf_counter() - start)

        return run

    return interleave(
        {
            "two steps of SGD": rival(lambda params: torch.optim.SGD(params, 0.01, momentum=0.9), 2),
            "two steps of AdamW": rival(lambda params: torch.optim.AdamW(params, 1e-3), 2),
            "SAM": rival(lambda params: br.SAM(params, 0.01, compile=False), 1),
            "bSAM": rival(lambda params: br.BSAM(params, 0.1, 1e5, compile=False), 1),
        },
        rounds=rounds,
        warmup=warmup,
        seconds=seconds,
    )


# How near the covariance comes

STEPS, DECAY = 12_000, 1e-3


def divergence(mean: Tensor, covariance: Tensor, exact_mean: Tensor, precision: Tensor) -> float:
    """KL(q || exact), in nats."""
    gap = exact_mean - mean
    nats = (precision @ covariance).trace() - len(mean) - torch.logdet(precision) - torch.logdet(covariance) + gap @ precision @ gap
    return float(nats / 2)


def _covariance(optimizer: br.BayesOptimizer, w: nn.Parameter) -> Tensor:
    posterior = optimizer.posterior(nn.ParameterDict({"w": w}))
    units = torch.eye(w.numel(), dtype=w.dtype).view(-1, *w.shape)
    return torch.stack([posterior.matvec({"w": unit})["w"].flatten() for unit in units])


def _spd(size: int, seed: int) -> Tensor:
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return turn @ torch.logspace(-1.3, 0, size, dtype=torch.float64).diag() @ turn.T


def quadratic() -> dict[str, float]:
    """The loss trace(W^T A W B) / 2, whose Hessian is the Kronecker product of A and B: nats from the exact posterior."""
    left, right, ess = _spd(4, 1), _spd(3, 2), 100.0
    precision = ess * (torch.kron(left, right) + DECAY * torch.eye(12, dtype=torch.float64))
    shared: dict[str, Any] = dict(betas=(0.9, 0.999), weight_decay=DECAY)
    return _found(
        (4, 3),
        lambda w: (left @ w @ right * w).sum() / 2,
        torch.zeros(12, dtype=torch.float64),
        precision,
        {
            "IVON": lambda w: br.IVON([w], 0.02, ess, hess_init=0.3, rescale_lr=False, **shared),
            "EVON": lambda w: br.EVON([w], 0.02, ess, 0.3, shampoo_beta=0.99, whiten=False, precondition_frequency=5, **shared),
            "iBLR": lambda w: br.IBLR([w], 0.02, ess, hess_init=0.3, **shared),
        },
    )


def logistic() -> dict[str, float]:
    """Breast cancer, ten features and a constant: nats from the best Gaussian, which conjugate-computation VI finds."""
    features, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor(features)[:, :10]
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    y, ess = torch.tensor(labels, dtype=torch.float64), float(len(x))
    best = br.cvi(x, y, prior=1.0).q.posterior
    shared: dict[str, Any] = dict(betas=(0.9, 0.9995), weight_decay=1 / ess)
    basis: dict[str, Any] = dict(shampoo_beta=0.995, whiten=False, precondition_1d=True, precondition_frequency=5)
    return _found(
        (11,),
        lambda w: F.binary_cross_entropy_with_logits(x @ w, y),
        best.mean,
        best.precision,
        {
            "IVON": lambda w: br.IVON([w], 0.02, ess, hess_init=0.1, rescale_lr=False, **shared),
            "EVON": lambda w: br.EVON([w], 0.02, ess, 0.1, **basis, **shared),
            "iBLR": lambda w: br.IBLR([w], 0.02, ess, hess_init=0.1, **shared),
        },
    )


def _found(
    shape: tuple[int, ...],
    loss: Callable[[Tensor], Tensor],
    mean: Tensor,
    precision: Tensor,
    rivals: dict[str, Callable[[Any], br.BayesOptimizer]],
) -> dict[str, float]:
    found = {}
    for name, make in rivals.items():
        w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = make(w)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.02 if step < 0.7 * STEPS else 0.005
            optimizer.step(lambda w=w: loss(w).backward())
        found[name] = divergence(w.detach().flatten(), _covariance(optimizer, w), mean, precision)
    return found


def tables(settings: Settings) -> list[Table]:
    found, neighbors = [], Neighbors()
    effort: dict[str, Any] = dict(rounds=settings.rounds(101), warmup=12, seconds=settings.seconds(60))
    races = {
        "EVON beside SOAP": ("eigen", "SOAP", dict(shapes=next(iter(SHAPES)))),
        "SAM beside two steps": ("sharp", "two steps of SGD", {}),
    }
    for title, (race, base, own) in races.items():
        laps = child.call(f"eigenspace:{race}", settings.threads, **own, **effort)
        each = {name: [Lap(*lap) for lap in of] for name, of in laps.items()}
        figures = {f"{title}: {name}": ratio(of, each[base]) for name, of in each.items()}
        if race == "sharp":
            figures[f"{title}: bSAM"] = ratio(each["bSAM"], each["two steps of AdamW"])
        rows = [(name, str(figures[f"{title}: {name}"]), f"{typical(of).seconds * 1e3:.4g}") for name, of in each.items()]
        note = f"{len(each[base])} rounds; bSAM against two steps of AdamW; {neighbors.report()}"
        found.append(Table(title, ("optimizer", f"ratio to {base}", "ms"), rows, figures, note))
    nats = {"Kronecker quadratic": quadratic(), "logistic regression": logistic()}
    rows = [(problem, *(f"{by[name]:.3f}" for name in ("IVON", "EVON", "iBLR"))) for problem, by in nats.items()]
    exact = {f"covariance, {problem}: EVON / IVON": Spread(*[by["EVON"] / by["IVON"]] * 4) for problem, by in nats.items()}
    note = f"Nats from the exact Gaussian, after {STEPS:,} steps with one draw each; deterministic."
    found.append(Table("how near the covariance comes", ("problem", "IVON", "EVON", "iBLR, full"), rows, exact, note))
    return found
