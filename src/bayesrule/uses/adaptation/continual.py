"""One task after another, without forgetting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...estimators.batches import pairs
from ...posterior import Posterior
from .adapting import adapt
from .architectures import widened
from .memory import By, Memory


class ContinualLearner:
    r"""A model that learns one task after another: each is added to what the posterior knows and the memory recalls.

    For each task it adapts, chooses some examples to remember, and asks the model what it now says of all that it remembers.

    Args:
        model: In eval mode.
        posterior: What it has learned so far.
        memory_size: Examples to remember of each task.
        by: How they are chosen, see :meth:`bayesrule.Memory.select`.
        balanced: Likewise.
        seed: Of the choice, and of the order of examples.
        **how: As for :func:`bayesrule.adapt`: method, loss, optimizer, epochs, ...

    Attributes:
        model: With the weights of now.
        posterior: Of all tasks.
        memory: Of all tasks; None before the first.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
        >>> tasks = [[(x[:2], 3 * x[:2])], [(x[2:], 3 * x[2:])]]
        >>> model = nn.Linear(1, 1, bias=False).eval()
        >>> _ = nn.init.constant_(model.weight, 1.5)  # which the first task says, and a prior of precision 1
        >>> posterior = Posterior.laplace(model, tasks[0], loss="mse")
        >>> learner = ContinualLearner(model, posterior, 1, "curvature", loss="mse", optimizer="newton")
        >>> learner.remember(tasks[0])
        >>> learner.fit(tasks[1]).mean["weight"], len(learner.memory)
        (tensor([[2.8636]]), 2)
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        memory_size: int,
        by: By = "random",
        *,
        balanced: bool = True,
        seed: int = 0,
        **how: Any,
    ) -> None:
        self.model, self.posterior, self.memory_size, self.by = model, posterior, memory_size, by
        self.balanced, self.seed, self.how = balanced, seed, how
        self.memory: Memory | None = None
        self._seen = 0

    def fit(self, task: Iterable[Any]) -> Posterior:
        """Learn a task. Where it has new classes, :attr:`model` becomes a copy with more outputs.

        Args:
            task: Batches (inputs, labels), or mappings with ``labels``, which can be read several times.
        """
        grown = self._grown(task)
        self.posterior = adapt(
            self.model, self.posterior, memory=self.memory, add=task, new_model=grown, seed=self.seed, **self.how
        )
        self.model = grown or self.model
        self.remember(task)
        return self.posterior

    def _grown(self, task: Iterable[Any]) -> nn.Module | None:
        """A model with outputs for new classes, if there are any; the memory gets them too."""
        if self.memory is None or self.how.get("loss", "cross_entropy") != "cross_entropy":
            return None
        outputs = self.memory.outputs.shape[-1]
        classes = 1 + max((int(labels.max()) for _, labels in pairs(task, self.model)), default=0)
        if classes <= outputs:
            return None
        self.memory = self.memory.pad(classes)
        return widened(self.model, classes)

    def remember(self, task: Iterable[Any]) -> None:
        """Choose examples of a task that the model has learned, and see what it says of all others now."""
        said = {name: self.how[name] for name in ("loss", "noise_variance") if name in self.how}
        chosen = Memory.select(
            self.model,
            self.posterior,
            task,
            self.memory_size,
            self.by,
            balanced=self.balanced,
            seed=self.seed,
            first=self._seen,
            **said,
        )
        self.memory = chosen if self.memory is None else self.memory.refresh(self.model).extend(chosen)
        self._seen = self.posterior.num_data or self._seen + len(chosen)
