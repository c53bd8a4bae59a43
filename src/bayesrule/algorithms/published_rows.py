"""Rows of optimizers that others have published, each beside a trajectory of their code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizers.binary import STE, BayesBiNN
from ..optimizers.eigenspace import EVON
from ..optimizers.injection import Injected
from ..optimizers.online_newton import OGN, VOGN, VON
from ..optimizers.optimizer import BayesOptimizer
from ..optimizers.perturbed import Vadam, Vprop
from ..optimizers.sharpness import BSAM, SAM
from ..optimizers.variational import IVON
from ..rule import BayesRule
from .block_rows import slots
from .rows import Row, golden, largest
from .trajectories import Trajectory


@dataclass(frozen=True)
class Author:
    """How a published implementation reads in our names.

    Args:
        make: Our optimizer with the hyper-parameters of a trajectory.
        state: From trajectory, group, parameter and its state to what was published of it, by published name.
    """

    make: Callable[[Trajectory], BayesOptimizer]
    state: Callable[[Trajectory, Mapping[str, Any], Tensor, Mapping[str, Tensor]], dict[str, Tensor]]

    def read(self, trajectory: Trajectory, optimizer: BayesOptimizer) -> dict[str, dict[str, Tensor]]:
        """What was published of a step, by name and parameter: ours."""
        group = optimizer.param_groups[0]
        found: dict[str, dict[str, Tensor]] = {}
        for key, p in trajectory.params.items():
            for name, value in self.state(trajectory, group, p, optimizer.state[p]).items():
                found.setdefault(name, {})[key] = value.detach()
        return found


def _vadam(t: Trajectory) -> BayesOptimizer:
    hyper, ess = t.hyper, t.hyper["train_set_size"]
    shared: dict[str, Any] = dict(
        lr=hyper["lr"],
        ess=ess,
        weight_decay=hyper["prior_prec"] / ess,
        hess_init=(hyper["prec_init"] - hyper["prior_prec"]) / ess,
        mc_samples=hyper.get("num_samples", 1),
        noise=t.noise,
    )
    if "beta" in hyper:
        return Vprop(t.params.values(), alpha=hyper["beta"], **shared)
    return Vadam(t.params.values(), betas=tuple(hyper["betas"]), **shared)


def _vogn(t: Trajectory) -> VOGN:
    """Of 2018: P = N (s + delta). Of 2024, at temperature T: s + delta = T / V, ess = N / T, and rates T times the published."""
    hyper, params = t.hyper, t.params.values()
    if "train_set_size" in hyper:
        ess = hyper["train_set_size"]
        decay = hyper["prior_prec"] / ess
        start = hyper["prec_init"] / ess - decay
        return VOGN(
            params,
            hyper["lr"],
            ess,
            betas=(0.0, hyper["beta"]),
            weight_decay=decay,
            hess_init=start,
            mc_samples=hyper["num_samples"],
            noise=t.noise,
        )
    heat, decay = hyper["temperature"], hyper["prior_precision"] / hyper["data_size"]
    return VOGN(
        params,
        hyper["lr"] * heat,
        hyper["data_size"] / heat,
        betas=(hyper["momentum_grad"], 1 - heat * (1 - hyper["momentum_hess"])),
        weight_decay=decay,
        hess_init=heat / hyper["std_init"] ** 2 - decay,
        damping=hyper["dampening"],
        debias=False,
        mean_precision="old",
        mc_samples=hyper["mc_samples"],
        noise=t.noise,
    )


def _vogn_state(t: Trajectory, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    metric = state["hess"] + group["weight_decay"]
    if "train_set_size" in t.hyper:
        return {"mean": p, "precision": group["ess"] * metric}
    return {"params": p, "momentum_grad": state["momentum"], "log_std": (t.hyper["temperature"] / metric).log() / 2}


def _sam(t: Trajectory) -> BayesOptimizer:
    hyper, params = t.hyper, t.params.values()
    shared: dict[str, Any] = dict(lr=hyper["learningrate"], rho=hyper.get("rho", 0.0), m_sharpness=hyper.get("msharpness", 1))
    if "Ndata" not in hyper:
        return SAM(params, momentum=hyper["momentum"], weight_decay=hyper["wdecay"], **shared)
    return BSAM(
        params,
        ess=hyper["Ndata"],
        betas=(hyper["beta1"], hyper["beta2"]),
        weight_decay=hyper["wdecay"],
        damping=hyper["damping"],
        hess_init=hyper["s_init"] - hyper["wdecay"],
        noise=t.noise,
        **shared,
    )


def _bayesbinn(t: Trajectory) -> BayesBiNN:
    """A ``reweight`` r of the prior: ess = N / r, and lr N times the published."""
    hyper = t.hyper
    optimizer = BayesBiNN(
        t.params.values(),
        lr=hyper["lr"] * hyper["train_set_size"],
        ess=hyper["train_set_size"] / hyper["reweight"],
        beta=hyper["betas"],
        mc_samples=hyper["num_samples"],
        temperature=hyper["temperature"],
        prior_natural=hyper.get("prior_lamda", 0.0),
        noise=t.noise,
        compat=True,
    )
    with torch.no_grad():
        for key, p in t.params.items():
            optimizer.state[p]["natural"] = t.tensor(t.case["lambda_init"][key])
            p.copy_(optimizer.state[p]["natural"].tanh())
    return optimizer


def _bayesbinn_state(t: Trajectory, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stale = {"mu_as_stored": p} if t.hyper["num_samples"] else {}
    return {"lambda": state["natural"], "momentum": t.hyper["reweight"] * state["momentum"], **stale}


AUTHORS = {
    "vadam": Author(
        _vadam,
        lambda t, group, p, state: {
            "params": p,
            **{"exp_avg_sq" if name == "square_avg" else name: s for name, s in state.items() if name != "step"},
        },
    ),
    "vogn": Author(_vogn, _vogn_state),
    "sam": Author(_sam, lambda t, group, p, state: {"params": p, "momentum": state["momentum_buffer"]}),
    "bsam": Author(
        _sam,
        lambda t, group, p, state: {"params": p, "momentum": state["momentum"], "s": state["hess"] + group["weight_decay"]},
    ),
    "bayesbinn": Author(_bayesbinn, _bayesbinn_state),
}
"""By golden file."""


def _gap(file: str, name: str) -> float:
    """The largest difference from a published trajectory, over all steps and all that was published."""
    author, found = AUTHORS[file], golden(name)
    trajectory = Trajectory(found["case"], found["problem"])
    optimizer, gap = author.make(trajectory), 0.0
    for step, _ in trajectory.walk(optimizer):
        for what, by_key in author.read(trajectory, optimizer).items():
            gap = max([gap, *(largest(value, trajectory.tensor(step["after"][what][key])) for key, value in by_key.items())])
    return gap


def _slots(kind: type[BayesOptimizer], **hyper: Any) -> tuple[BayesRule, type]:
    optimizer = kind([nn.Parameter(torch.zeros(1))], **hyper)
    group = optimizer.param_groups[0]
    return optimizer.rule(group), type(optimizer.family(group, torch.zeros(1), torch.zeros(1), 0.0))


def _published(kind: type[BayesOptimizer], file: str, name: str, rates: str, source: str, title: str = "", **hyper: Any) -> Row:
    return Row(
        algorithm=title or kind.__name__,
        rule=lambda: _slots(kind, **hyper),
        rates=rates,
        twin="trajectory of the published code",
        difference=lambda: _gap(file, name),
        source=source,
    )


# By hand


def _data() -> tuple[Tensor, Tensor]:
    found = golden("mlp")
    return torch.tensor(found["x"], dtype=torch.float64), torch.tensor(found["y"], dtype=torch.float64)


def _ogn_twin() -> float:
    """Logistic regression, whose gradients of examples are known."""
    x, y = _data()
    w, mean = nn.Parameter(x.new_full((3,), 0.2)), x.new_full((3,), 0.2)
    optimizer, s, v, gap = (
        OGN([w], 0.1, 16.0, betas=(0.9, 0.9), hess_init=0.3, weight_decay=0.01),
        x.new_full((3,), 0.3),
        0 * mean,
        0.0,
    )
    for step in range(1, 21):
        optimizer.step(lambda: torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none"))
        each = ((x @ mean).sigmoid() - y)[:, None] * x
        s = 0.9 * s + 0.1 * each.square().mean(0)
        v = 0.9 * v + 0.1 * (each.mean(0) + 0.01 * mean)
        mean = mean - 0.1 * v / (1 - 0.9**step) / (s + 0.01)
        gap = max(gap, largest(w.detach(), mean))
    return gap


def _von_twin() -> float:
    """The same with the noise 1, by Price's formula."""
    x, y = _data()
    w, mean = nn.Parameter(x.new_full((3,), 0.2)), x.new_full((3,), 0.2)
    hyper: dict[str, Any] = dict(betas=(0.9, 0.99), hess_init=1.0, weight_decay=0.1, noise=torch.ones_like)
    optimizer, h, v, gap = VON([w], 0.1, 16.0, **hyper), x.new_ones(3), 0 * mean, 0.0
    for step in range(1, 21):
        with optimizer.sampled_params(train=True):
            torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y).backward()
        optimizer.step()
        offset = (16 * (h + 0.1)).rsqrt()
        g = (((x @ (mean + offset)).sigmoid() - y)[:, None] * x).mean(0)
        f = 16 * (h + 0.1) * offset * g
        h, v = 0.99 * h + 0.01 * f, 0.9 * v + 0.1 * (g + 0.1 * mean)
        mean = mean - 0.1 * v / (1 - 0.9**step) / (h + 0.1)
        gap = max(gap, largest(w.detach(), mean))
    return gap


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        return torch.where(latent < 0, -1.0, 1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _ste_twin() -> float:
    """torch.optim.SGD on latent weights, through an autograd function whose gradient passes straight."""
    x, y = _data()
    start = [0.3, -0.2, 0.05]
    w, latent = (nn.Parameter(torch.tensor(start, dtype=torch.float64)) for _ in range(2))
    ours, theirs, gap = STE([w], 0.1, weight_decay=0.01), torch.optim.SGD([latent], 0.1, momentum=0.9, weight_decay=0.01), 0.0
    for _ in range(20):
        for optimizer, weights in ((ours, lambda: w), (theirs, lambda: _Straight.apply(latent))):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(x @ weights(), y).backward()
            optimizer.step()
        gap = max(gap, largest(ours.state[w]["natural"], latent.detach()))
    return gap


def _evon_twin() -> float:
    """IVON in the coordinates of bases that stay: W = Q_L U Q_R^T, with the same draws of U."""
    x, y = _data()
    start = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.4, -0.6]], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        value: Tensor = torch.nn.functional.binary_cross_entropy_with_logits((x @ w.T).prod(1), y)
        return value

    hyper: dict[str, Any] = dict(lr=0.05, ess=16.0, hess_init=0.5, betas=(0.9, 0.95), weight_decay=0.01)
    w = nn.Parameter(start.clone())
    ours = EVON([w], **hyper, compat=True, precondition_frequency=10**6, whiten=False, eps=0.0)
    ours.step(lambda: loss(w).backward())  # finds the bases, and moves nothing
    left, right = ours.state[w]["basis"]
    u = nn.Parameter(left.T @ start @ right)
    theirs = IVON([u], **hyper, rescale_lr=False)
    normals, gap = torch.Generator().manual_seed(0), 0.0
    drawn: list[Tensor] = []
    for optimizer in (ours, theirs):
        optimizer.draws.injected = Injected(lambda _: drawn[-1])
    for _ in range(20):
        drawn.append(torch.randn(2, 3, generator=normals, dtype=torch.float64))
        ours.step(lambda: loss(w).backward())
        theirs.step(lambda: loss(left @ u @ right.T).backward())
        gap = max(gap, largest(w.detach(), left @ u.detach() @ right.T))
    return gap


_VADAM, _SAM = "Khan, Nielsen et al. 2018", "Foret et al. 2021"
ROWS = [
    Row(
        "EVON",
        lambda: slots(EVON, lr=1.0, ess=1.0, hess_init=1.0),
        "lr, 1 - beta2",
        "IVON in a basis that stays, 20 steps",
        _evon_twin,
        "Minut et al. 2026",
    ),
    Row("VON", lambda: _slots(VON, lr=1.0, ess=1.0), "lr, 1 - beta2", "by hand, 20 steps", _von_twin, f"{_VADAM}, sec. 3"),
    Row("OGN", lambda: _slots(OGN, lr=1.0, ess=1.0), "lr, 1 - beta2", "by hand, 20 steps", _ogn_twin, f"{_VADAM}, sec. 3"),
    _published(VOGN, "vogn", "vogn", "lr, 1 - beta2", "Osawa et al. 2019", lr=1.0, ess=1.0),
    _published(Vadam, "vadam", "vadam", "lr, 1 - beta2", f"{_VADAM}, alg. 1", ess=1.0),
    _published(Vprop, "vadam", "vprop", "lr, 1 - alpha", f"{_VADAM}, sec. 3", ess=1.0),
    _published(SAM, "sam", "sam", "lr", _SAM, lr=1.0),
    _published(SAM, "sam", "m-sharpness", "lr", _SAM, "SAM, m-sharpness", lr=1.0, m_sharpness=2),
    _published(BSAM, "bsam", "bsam", "lr, 1 - beta2", "Moellenhoff & Khan 2023, alg. 1", "bSAM", lr=1.0, ess=1.0),
    Row(
        "straight-through estimator",
        lambda: _slots(STE, lr=1.0),
        "lr",
        "torch.optim.SGD, 20 steps",
        _ste_twin,
        "Meng et al. 2020, sec. 3",
    ),
    _published(BayesBiNN, "bayesbinn", "bayesbinn", "lr / ess", "Meng et al. 2020, alg. 1", lr=1.0, ess=1.0),
]
