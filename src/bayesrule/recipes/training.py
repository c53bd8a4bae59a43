"""Train a classifier with any optimizer of the table, one epoch at a time.

One loop serves every optimizer: a variational one opens its draw inside ``step(closure)``, so that nothing here knows
whether the gradient was taken at the weights or at a sample of them. An epoch is the unit of work because runs that
are compared for speed must be interleaved.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import bayesrule as br
from bayesrule.recipes.data import Pair
from bayesrule.recipes.names import lookup


@dataclass(frozen=True)
class Choice:
    """An optimizer that can be chosen by name: how to make it, and settings that work on small images.

    Args:
        title: The name in print.
        make: Takes the parameters and the settings by name.
        settings: Defaults; their names are those of the command line. ``ess`` counts in training sets.
        variational: Whether it learns a posterior: it then takes the seed of its draws and leaves the posterior behind.
    """

    title: str
    make: Callable[..., Optimizer]
    settings: Mapping[str, float]
    variational: bool = False


def _momentum(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    return lambda params, **settings: make(params, momentum=0.9, **settings)


def _betas(make: Callable[..., Optimizer], **fixed: Any) -> Callable[..., Optimizer]:
    return lambda params, beta2, **settings: make(params, betas=(0.9, beta2), **settings, **fixed)


OPTIMIZERS: dict[str, Choice] = {
    "sgd": Choice("SGD", _momentum(br.SGD), {"lr": 0.03, "weight_decay": 5e-4}),
    "rmsprop": Choice("RMSprop", br.RMSprop, {"lr": 1e-3, "weight_decay": 0.0}),
    "adam": Choice("Adam", _betas(br.Adam), {"lr": 1e-3, "weight_decay": 0.0, "beta2": 0.999}),
    "adamw": Choice("AdamW", _betas(br.AdamW), {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999}),
    "ivon": Choice(
        "IVON",
        _betas(br.IVON),
        {"lr": 0.1, "ess": 10.0, "hess_init": 0.1, "weight_decay": 1e-4, "beta2": 0.999},
        variational=True,
    ),
    # torch's own, to compare with
    "torch-sgd": Choice("SGD", _momentum(torch.optim.SGD), {"lr": 0.03, "weight_decay": 5e-4}),
    "torch-adamw": Choice("AdamW", _betas(torch.optim.AdamW, fused=True), {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999}),
}


def settle(name: str, given: Mapping[str, float | None], num_data: int) -> dict[str, float]:
    """All settings of an optimizer: its defaults, overridden by what was given (None: not given).

    Raises:
        ValueError: If the optimizer is unknown or has no such setting.

    Example:
        >>> settle("sgd", {"lr": 0.1, "ess": None}, num_data=1000)
        {'lr': 0.1, 'weight_decay': 0.0005}
    """
    choice = lookup("optimizer", name, OPTIMIZERS)
    chosen = {setting: value for setting, value in given.items() if value is not None}
    for setting, value in chosen.items():
        if setting not in choice.settings:
            raise ValueError(f"{name} has no {setting} (got {value:g}); its settings are {', '.join(choice.settings)}")
    settings = dict(choice.settings)
    if "ess" in settings:
        settings["ess"] *= num_data
    return settings | chosen


class Training:
    """A run in progress: every call of :meth:`epoch` goes once through the shuffled training data.

    Minimizes the mean cross entropy; the learning rate falls from ``lr`` to 0 along half a cosine.

    Args:
        model: The model; trained in place.
        optimizer: Its optimizer.
        train, validation: Inputs and labels.
        epochs: How often :meth:`epoch` will be called; sets the schedule.
        batch_size: Examples a step.
        seed: Seed of the shuffling.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train: Pair,
        validation: Pair,
        *,
        epochs: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.optimizer = model, optimizer
        self.train, self.validation = train, validation
        self.batch_size = batch_size
        self.steps = -(-len(train[1]) // batch_size)  # an epoch
        self.schedule = CosineAnnealingLR(optimizer, epochs * self.steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []

    def epoch(self, tick: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Train for one epoch and return its line: losses in nats, the training loss as the optimizer saw it.

        ``seconds`` counts the training steps only, not the validation. ``tick`` is called after every step.
        """
        rate = float(self.schedule.get_last_lr()[0])
        self.model.train()
        order = torch.randperm(len(self.train[1]), generator=self.generator)
        total = 0.0
        began = time.perf_counter()
        for batch in order.split(self.batch_size):
            total += self._step(*(part[batch] for part in self.train)) * len(batch)
            tick()
        seconds = time.perf_counter() - began

        loss, accuracy = self._validate()
        line: dict[str, float] = {
            "epoch": len(self.history) + 1,
            "train_loss": total / len(order),
            "validation_nll": loss,
            "validation_accuracy": accuracy,
            "seconds": seconds,
            "lr": rate,
        }
        if not all(map(torch.isfinite, torch.tensor(list(line.values())))):
            raise ValueError(f"training diverged in epoch {line['epoch']} (loss {line['train_loss']:g}); lower the lr ({rate:g})")
        self.history.append(line)
        return line

    def _step(self, inputs: Tensor, labels: Tensor) -> float:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()
            return loss

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type,assignment]  # torch says float, any will do
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        self.model.eval()
        inputs, labels = self.validation
        logits = self.model(inputs)
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
