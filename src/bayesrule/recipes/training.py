"""Train a classifier with any optimizer of the table, one epoch at a time, from any step on.

One loop serves every optimizer: a variational one opens its draw inside ``step(closure)``, so that nothing here knows
whether the gradient was taken at the weights or at a sample of them. An epoch is the unit of work because runs that
are compared for speed must be interleaved. Whatever is random is a function of the seed and the number of the step,
or kept with the state, so a run that goes on from a saved state ends where it would have ended. Several processes take
their share of every batch and of the validation data, and agree on what came out.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_map

import bayesrule as br
from bayesrule.estimators.batches import outputs_of
from bayesrule.recipes.augmentation import augmentation
from bayesrule.recipes.data import FORWARD, Data, Part, fitting
from bayesrule.recipes.models import has_batch_norm
from bayesrule.recipes.schedules import SCHEDULES
from bayesrule.recipes.states import load_states, states
from bayesrule.recipes.workers import ALONE, Workers

BATCH = 1024  # inputs of a forward without gradient
ANCHOR = 2048  # training examples that running statistics of batch norm are estimated from
BEST = "best."


class Diverged(ValueError):
    """A loss is no longer a number."""


class Training:
    """A run in progress: every call of :meth:`epoch` goes once through the shuffled training data, or through what is left.

    Minimizes the mean cross entropy.

    Args:
        model: The model; trained in place, on the device where it is.
        optimizer: Its optimizer.
        data: What to learn from.
        epochs: How often :meth:`epoch` will be called; sets the schedule.
        batch_size: Examples a step.
        seed: Seed of the order and of whatever the model draws.
        schedule: Name of the course of the learning rate.
        augment: Names of changes of training images.
        bf16: Compute forward passes of training in bfloat16 where autocast does.
        patience: Keep the epoch with the smallest validation NLL and stop after so many without a smaller one; None keeps the last.
        loo: How many training examples give a leave-one-out estimate after each epoch.
        frozen: Whether a checkpoint holds weights that do not learn, too.
        workers: The processes that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: Data,
        *,
        epochs: int,
        batch_size: int,
        seed: int = 0,
        schedule: str = "cosine",
        augment: Sequence[str] = (),
        bf16: bool = False,
        patience: int | None = None,
        loo: int = 0,
        frozen: bool = True,
        workers: Workers = ALONE,
    ) -> None:
        self.model, self.optimizer, self.data = model, optimizer, data
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.steps = -(-len(data.train) // batch_size)  # an epoch
        self.schedule, self.augment = SCHEDULES[schedule], augmentation(augment)
        self.bf16, self.patience, self.frozen, self.workers = bf16, patience, frozen, workers
        self.tracker = br.TrackSensitivity(_First(self), subset=loo) if loo else None
        self.device = next(model.parameters()).device
        self.variational = "ess" in optimizer.defaults
        self.by_example = bool(getattr(optimizer, "squares_examples", False))
        if self.by_example and has_batch_norm(model):
            raise ValueError(
                f"{type(optimizer).__name__} needs the loss of every example by itself, which batch norm mixes; take another model"
            )
        if self.by_example and workers.size > 1:
            raise ValueError(f"{type(optimizer).__name__} runs in one process here, and these are {workers.size}")
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.done = 0  # steps
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []  # of the training steps of each epoch
        self.between_steps = True  # so that the state is whole
        self.sharded = False
        self.best: dict[str, Tensor] | None = None
        self._total, self._elapsed = 0.0, 0.0  # of the epoch in progress
        with torch.random.fork_rng(self._devices()):
            torch.manual_seed(seed)
            self._random = self._generators()

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        return len(self.history) >= self.epochs or (
            self.patience is not None and bool(self.history) and len(self.history) - self.best_epoch >= self.patience
        )

    @property
    def best_epoch(self) -> int:
        """The epoch with the smallest validation NLL, from 1."""
        return 1 + min(range(len(self.history)), key=lambda i: self.history[i]["validation_nll"])

    def epoch(self, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train to the end of the epoch and return its line: losses in nats, the training loss as the optimizer saw it.

        ``tick`` is called after every step; what it raises leaves a state that can be saved and gone on from.

        Raises:
            Diverged: If the line holds what is no number.
        """
        number = len(self.history)
        generator = self._generator(number, 0)
        order = torch.randperm(len(self.data.train), generator=generator)
        batches = self.data.train.batches(order, self.batch_size, generator)[self.done - number * self.steps :]
        rate = self.rates[0] * self.schedule(number / self.epochs)
        self.model.train()
        with self._randomness():
            began = time.perf_counter()
            shares = [batch[self.workers.share(len(batch))[0]] for batch in batches]
            for batch, mine, stored in zip(batches, shares, self.data.train.stream(shares), strict=True):
                self._total += self._step(stored, self.data.train.labels[mine], len(batch)) * len(batch)
                self.done += 1
                self._elapsed += time.perf_counter() - began
                self._random = self._generators()
                if self.done % self.steps:  # the last belongs to the line
                    tick()
                began = time.perf_counter()
        return self._close(rate, tick)

    def _step(self, stored: Tensor, labels: Tensor, count: int) -> float:
        """Learn from this process's share of a batch of so many; the mean loss of the whole batch."""
        self.between_steps = False
        share, weight = self.workers.share(count)
        inputs, labels = self.data.scale(stored.to(self.device, non_blocking=True)), labels.to(self.device)
        inputs = self.augment(inputs, self._generator(self.done, 1), (count, share))
        factor = self.schedule(self.done / self.total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.workers.spread(self.model.buffers())
        if not self.workers.is_first:  # which draws as if it were alone
            torch.manual_seed(self.workers.seed(self.seed, self.done))

        parts = self.optimizer.param_groups[0].get("m_sharpness", 1)

        def closure(part: int = 0) -> Tensor:
            self.optimizer.zero_grad()
            x, y = tree_map(lambda whole: whole.tensor_split(parts)[part], (inputs, labels))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(outputs_of(self.model, x), y, reduction="none" if self.by_example else "mean")
            if self.by_example:
                return loss
            loss = loss if weight == 1 else loss * weight
            loss.backward()
            self.workers.average(self.model.parameters())
            return loss

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type,assignment]  # torch says float, any will do
        self.between_steps = True
        return self.workers.total(loss.item())[0] / self.workers.size

    def _close(self, rate: float, tick: Callable[[], object]) -> dict[str, Any]:
        """Measure what the epoch came to."""
        loss, accuracy = self._validate()
        line: dict[str, Any] = {
            "epoch": len(self.history) + 1,
            "train_loss": self._total / len(self.data.train),
            "validation_nll": loss,
            "validation_accuracy": accuracy,
            "lr": rate,
        }
        if not all(map(math.isfinite, line.values())):
            raise Diverged(f"training diverged in epoch {line['epoch']} (loss {line['train_loss']:g}); lower the lr ({rate:g})")
        self.history.append(line | self._bound(line["train_loss"]) | self._left_out())
        self.seconds.append(self._elapsed)
        self._total, self._elapsed = 0.0, 0.0
        if self.patience is not None and self.best_epoch == len(self.history):
            self.best = {BEST + name: t.detach().clone() for name, t in states(self.model, self.optimizer, self.frozen).items()}
        tick()
        return self.history[-1]

    def _left_out(self) -> dict[str, float]:
        """What leave-one-out cross-validation would say, if that is asked for."""
        if self.tracker is None:
            return {}
        found = self.tracker.update(self.model, self.optimizer, len(self.history) + 1) or {}
        return {name: found[name] for name in ("loo_nll", "loo_accuracy", "concentration")}

    def _bound(self, train_loss: float) -> dict[str, float]:
        """The evidence bound, in nats per example: minus the loss under the noise, minus the distance from the prior.

        It bounds the log evidence of the training data whatever the ess; at ess = N the optimizer maximizes it.
        """
        if not self.variational:
            return {}
        posterior = self.posterior()
        if posterior.prior_mean is None or posterior.prior_precision is None:
            return {}
        shaped = {
            name: (posterior.prior_mean[name].expand_as(m).clone(), posterior.prior_precision[name].expand_as(m).clone())
            for name, m in posterior.mean.items()
        }
        if any(bool((precision <= 0).any()) for _, precision in shaped.values()):
            return {}  # no prior, no bound
        prior = br.Posterior({n: mean for n, (mean, _) in shaped.items()}, {n: precision for n, (_, precision) in shaped.items()})
        if not posterior.is_gaussian:
            return {}
        distance = posterior.kl(prior).item() / len(self.data.train)
        return {"kl": distance, "elbo": -train_loss - distance} if math.isfinite(distance) else {}

    def posterior(self) -> br.Posterior:
        """What a variational optimizer has learned."""
        return br.Posterior.from_optimizer(self.optimizer, self.model, num_data=len(self.data.train))

    def anchor(self) -> list[Tensor]:
        """Training inputs from which the running statistics of batch norm are estimated."""
        return anchor(self.data, self.device)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        self.workers.spread(self.model.buffers())
        if self.variational and has_batch_norm(self.model):
            with torch.random.fork_rng(self._devices()):
                torch.manual_seed(ALONE.seed(self.seed, len(self.history), 1))  # for dropout: the same in all processes
                update_bn(self.anchor(), self.model)  # what was gathered belongs to samples of the weights
        self.model.eval()
        nll = right = 0.0
        part = self.data.validation
        for inputs, labels in batches_of(part, self.data, self.device, self.workers):
            logits = outputs_of(self.model, inputs).float()
            nll += F.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
        nll, right = self.workers.total(nll, right)
        return nll / len(part), right / len(part)

    # State

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run goes on from, between steps: tensors, and numbers."""
        numbers = {"done": self.done, "history": self.history, "seconds": self.seconds}
        tensors = (
            states(self.model, self.optimizer, self.frozen)
            | {f"random.{i}": t for i, t in enumerate(self._random)}
            | (self.best or {})
        )
        return tensors, {**numbers, "total": self._total, "elapsed": self._elapsed}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: If it is of another run, or damaged.
        """
        load_states(self.model, self.optimizer, tensors)
        self.done, self.history, self.seconds = int(numbers["done"]), list(numbers["history"]), list(numbers["seconds"])
        self._total, self._elapsed = float(numbers["total"]), float(numbers["elapsed"])
        self._random = [tensors[f"random.{i}"] for i in range(len(self._random))]
        self.best = {name: t for name, t in tensors.items() if name.startswith(BEST)} or None

    def keep_best(self) -> None:
        """Where patience looked for the best epoch, go back to it."""
        if self.best is not None:
            load_states(self.model, self.optimizer, {name.removeprefix(BEST): t for name, t in self.best.items()})

    # Randomness

    def _generator(self, number: int, stream: int) -> torch.Generator:
        """Random numbers that depend on the seed, a number and what they are for alone."""
        return torch.Generator().manual_seed((2 * (self.seed * 1_000_003 + number) + stream) % 2**63)

    def _devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _generators(self) -> list[Tensor]:
        """The states of torch's own generators, which dropout draws from."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices())]

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """The run's own randomness inside, the caller's untouched."""
        with torch.random.fork_rng(self._devices()):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices(), self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _First:
    """The training data of a run in their order, as inputs of the model."""

    def __init__(self, training: Training) -> None:
        self.training, self.dataset = training, training.data.train

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return batches_of(self.training.data.train, self.training.data, self.training.device)


def batches_of(part: Part, data: Data, device: torch.device, workers: Workers = ALONE) -> Iterator[tuple[Any, Tensor]]:
    """A part in its order, as inputs of a model and their labels; of several processes each has its share of the batches."""
    batches = part.by_length().split(fitting(data.extent, BATCH, FORWARD))[workers.rank :: workers.size]
    for batch, stored in zip(batches, part.stream(batches), strict=True):
        yield data.scale(stored.to(device)), part.labels[batch].to(device)


def anchor(data: Data, device: torch.device) -> list[Tensor]:
    """Training inputs from which the running statistics of batch norm are estimated: the same ones every time."""
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: fitting(data.extent, ANCHOR)]
    return [data.scale(stored.to(device)) for stored in data.train.stream(chosen.split(fitting(data.extent, BATCH // 4, FORWARD)))]
