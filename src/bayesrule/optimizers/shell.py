"""The one torch optimizer: it carries q from step to step and lets the host do the looking.

A subclass is a constructor. It says which slots of the rule are filled by a group's hyper-parameters, and under which
names q is kept; the step, the draws, the state and its saving are here. The rule itself stays pure: it gets flat copies of a
bucket of parameters, and its result is copied back in place.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..families.gaussian import Diagonal
from ..family import Gaussian
from ..parts import Part
from ..posterior import Posterior
from ..program import Program
from ..rule import BayesRule, Rates
from .attaching import Attached, attach
from .cells import Cell, Layout, Names, Unit
from .checkpoints import check, restore
from .closures import evaluate
from .draws import LOOKS_TWICE, Draws
from .examples import Examples
from .execution import Compile, Execution, Flats, recorded_by
from .hyperparameters import HOW, OF_GROUPS, Allowed, check_arguments, check_group
from .injection import Injected
from .learned import begin, learned
from .reminders import Reminders, why_no_gradient
from .visibility import noise_visibility
from .workers import CHECK_EVERY, Sync, Workers

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class Shell(Optimizer, ABC):
    """What all algorithms share: state, draws, steps, checkpoints. See :class:`bayesrule.BayesOptimizer` for its arguments."""

    is_diagonal: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = False  # tensors, not parts of them
    runs: ClassVar[type[Execution]] = Execution
    names: Names  # of the class, or of one optimizer
    ranges: ClassVar[Mapping[str, Allowed]]

    def _set_up(self, params: ParamsT, arguments: Mapping[str, Any], **fixed: Any) -> None:
        """What every constructor ends with.

        Args:
            params: Parameters or groups.
            arguments: The constructor's own. Those that have a range are hyper-parameters, which may differ by group.
            **fixed: What this optimizer leaves no choice in.
        """
        how = {name: arguments.get(name, default) for name, default in HOW.items()} | fixed
        check_arguments(type(self).__name__, how["prior"], how["noise"], how["memory"], how["noise_per_rank"])
        self.frugal = how["memory"] == "low"
        compile = False if how["noise"] and how["compile"] == "auto" else how["compile"]
        self._prepare(how["noise"], compile, how["sync"], how["noise_per_rank"])
        defaults = {name: arguments.get(name, OF_GROUPS.get(name)) for name in self.ranges}
        starts = defaults.get("hess_init")
        Optimizer.__init__(self, params, defaults | ({"hess_init": 1.0} if isinstance(starts, Mapping) else {}))
        begin(self, how["prior"], starts if isinstance(starts, Mapping) else None)
        if "weight_decay" in defaults:
            self.reminders.of_decay(defaults["weight_decay"], [group["weight_decay"] for group in self.param_groups])

    def _prepare(self, noise: Callable[[Tensor], Tensor] | None, compile: Compile, sync: Sync, noise_per_rank: bool) -> None:
        host, name = weakref.proxy(self), type(self).__name__  # no circle keeps a dropped optimizer alive
        self.execution = self.runs(host, name, self.recorded, compile)
        self.layout = Layout(host, name, self.execution.scratch)
        self.workers = Workers(host, name, sync, noise_per_rank)
        self.examples = Examples(host, name)
        self.draws = Draws(host, Injected(noise) if noise else None)
        self.reminders = Reminders(type(self).__name__)
        self._ready = False  # whether this step has begun

    @property
    def recorded(self) -> dict[Any, Program]:
        """The programs of all optimizers with the same slots."""
        return recorded_by(type(self))

    # What a subclass fills in

    @abstractmethod
    def rule(self, group: Mapping[str, Any]) -> BayesRule:
        """The slots, filled by a group's hyper-parameters; those but 0 and infinity may be symbols."""

    @abstractmethod
    def rates(self, group: Mapping[str, Any], step: Any) -> Rates:
        """The step sizes of a group in its step number ``step``, from 1. Numbers may be symbols."""

    @abstractmethod
    def family(self, group: Mapping[str, Any], mean: Tensor, hess: Any, weight_decay: Any) -> Gaussian:
        """q from its mean, its curvature (None where nothing is kept) and the prior's precision per unit of ess."""

    def start(self, group: Mapping[str, Any]) -> float:
        """The curvature before the first step."""
        return 0.0

    # Looking

    @contextmanager
    def sampled_params(self, train: bool | None = None, weight: float = 1.0) -> Iterator[None]:
        """Put a draw of q into the parameters; leaving the context brings the mean back, bit by bit.

        With ``memory="low"`` the mean that returns from a draw with ``train=True`` is rounded to the last place of the sample.

        The contexts of a step are averaged, so their losses are not divided by the number of contexts; several ``backward()``
        in one context add up, so there they are.

        Args:
            train: Learn from the gradient that the context leaves in ``p.grad``; forward *and* backward belong inside. With
                False the draw only looks: it has noise of its own and touches no gradient. None: learn if gradients are enabled.
            weight: Weight of this draw among the draws of the step, for batches of unequal size.

        Raises:
            RuntimeError: A draw is open already.

        Example:
            >>> import torch, bayesrule as br
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> opt = br.IVON([w], lr=0.1, ess=100)
            >>> for _ in range(100):
            ...     with opt.sampled_params(train=True):
            ...         (w - 1).square().sum().backward()
            ...     opt.step()
            >>> (w - 1).abs().max().item() < 0.1
            True
        """
        self._renew()
        train = torch.is_grad_enabled() if train is None else train
        opened = self.draws.begin(train=train, weight=weight)
        try:
            yield
        except BaseException:
            if opened:
                self.draws.discard()
            raise
        if opened:
            self.draws.close()
            self.draws.check()

    @property
    def dropped_draws(self) -> int:
        """Draws thrown away because their gradient was not finite."""
        return self.draws.looks.dropped

    def train(self) -> None:
        """Put a draw of q into the parameters until :meth:`step`, or until :meth:`eval` brings the mean back.

        To be called before every training forward, as the trainers do that know of optimizers with two sets of weights. A
        step has one draw: called again, for another micro-batch, the same one goes on, bit by bit, whatever closed it for a
        while. Without draws in the algorithm nothing happens.

        Example:
            >>> import torch, bayesrule as br
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> opt = br.IVON([w], lr=0.1, ess=100)
            >>> for _ in range(100):
            ...     opt.train()
            ...     (w - 1).square().sum().backward()
            ...     opt.step()
            >>> (w - 1).abs().max().item() < 0.1
            True
        """
        if not self.draws.is_training and (self.wanted_draws() or self.squares_examples) and self.layout.trainable():
            self._renew()
            self.draws.begin(train=True, automatic=True)

    def eval(self) -> None:
        """Bring the mean back for an evaluation. The gradient of a draw is kept for the step."""
        self.draws.interrupt()

    def attach(self, model: nn.Module) -> Attached:
        """Let every training forward of a model open the draw by itself, so that the training loop stays as it is.

        In front of a forward in training mode the draw of the step opens (:meth:`train`); in front of one in eval mode, and of
        ``model.state_dict()``, it closes and goes on with the next training forward. Copies of the model are not attached, and
        neither model nor optimizer keeps the other alive.

        Args:
            model: What the training loop calls: the compiled or wrapped one where there is one.

        Returns:
            Its ``remove()`` ends this.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: The optimizer trains none of its parameters, or it is attached already.

        Example:
            >>> import torch, bayesrule as br
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = br.IVON(model.parameters(), lr=0.1, ess=100)
            >>> hooks = opt.attach(model)
            >>> model(torch.ones(2)).square().sum().backward()
            >>> opt.step()
        """
        attached = attach(self, model)
        if self.squares_examples:
            self.examples.attach(attached, model)
        return attached

    def wanted_draws(self) -> int:
        """How many draws make one look; 0 for an algorithm that does not draw."""
        return max(self.rule(group).expectation.draws for group in self.param_groups)

    @property
    def climbs(self) -> bool:
        """Whether a first look only says where to look, so that a step needs a closure."""
        return any(self.rule(group).expectation.climbs for group in self.param_groups)

    @property
    def squares_examples(self) -> bool:
        """Whether the gradient of every example is asked for."""
        return any(self.rule(group).curvature.squares_examples for group in self.param_groups)

    @property
    def asks_hessian(self) -> bool:
        """Whether second derivatives are asked for."""
        return any(self.rule(group).curvature.asks_hessian for group in self.param_groups)

    def place(self) -> tuple[int, int]:
        """The number of the step and of the draw at hand."""
        return self.execution.steps, self.draws.looks.begun

    # Moving

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move q by what was looked at since the last step.

        Args:
            closure: Clears the gradients, runs forward and backward and returns the loss. It is called once for every draw
                (``mc_samples``), each time at another sample.

        Returns:
            The closure's loss, averaged over the draws; None without a closure.

        Raises:
            RuntimeError: No parameter has a gradient.
        """
        loss = None
        if closure is not None:
            self._renew()
            loss = evaluate(self, closure)
        elif self.climbs:
            raise TypeError(f"{type(self).__name__}.step() looks twice and needs a closure: {LOOKS_TWICE}")
        self.draws.close()
        self.draws.check()
        self.draws.be_alone()
        self._renew()
        self.layout.follow()
        taken, drawn = self.draws.looks.take(), self.draws.looks.begun
        if taken is not None and not taken[0] and closure is not None and loss is None:
            self.reminders.of_nothing()  # a host skips a batch so
            taken = None
        if taken is not None and not taken[0]:
            self.draws.forget()
            why = why_no_gradient(drawn > 0, self.workers.active and not self.workers.sharded)
            raise RuntimeError(f"{type(self).__name__}.step(): no parameter has a gradient; {why}")
        # torch.distributed.checkpoint begins the state by a step of size none
        if taken is not None and any(group["lr"] for group in self.param_groups):
            self.reminders.of_draws(self.wanted_draws(), drawn, self.defaults.get("antithetic", False), self.workers.size)
        self.reminders.of_lost(taken is None and drawn > 0, self.dropped_draws)
        if taken is None:
            self.execution.steps -= 1  # so that a run that goes on from its state is compiled from the same step on
        else:
            params, how = taken
            cells = self.layout.cells(params)
            for cell in cells:
                flats = how(cell)
                cell.plot.put(flats["mean"], cell.only)
            self.layout.count(params)
            self.draws.written_to()
            if drawn:
                self.reminders.of_thawed(len(self.layout.left_out(params)))
                for p in params:
                    p.grad = None
                if self.is_diagonal and self.execution.steps % CHECK_EVERY == 1:
                    self.reminders.of_visibility(lambda: noise_visibility(self, None, below=2))
            if self.execution.steps == CHECK_EVERY and self.workers.active:
                self.reminders.of_idle(*self.layout.idle(), CHECK_EVERY)
        self.draws.forget()
        self._ready = False
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler asks before it decides whether to skip the step: either way the draw is over, and the mean returns."""
        if self.draws.is_automatic:
            self.draws.close()
        self.workers.allow_scaling(self.draws.looks.shown)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; what a closed draw left there is read first, and not lost."""
        self.draws.cleared()
        super().zero_grad(set_to_none)

    # q in pieces

    def _renew(self) -> None:
        """Before the first draw of a step: hyper-parameters may have changed, and it may be time to compile."""
        if not self.draws.looks.begun:
            if not self._ready:
                self._ready = True
                self.execution.advance(lambda: sum(p.numel() for p in self.layout.trainable()))
            self.layout.renew(self.execution.limit)

    def belief(self, group: Mapping[str, Any], flats: Flats) -> tuple[Gaussian, Gaussian]:
        """The q and the prior of a cell, from what is kept for it."""
        ess, pull = group.get("ess", 1.0), group["weight_decay"]
        if "prior_precision" in flats:
            pull = flats["prior_precision"] / ess
        return self.family(group, flats["mean"], flats.get("hess"), pull), Diagonal(flats.get("prior_mean", 0.0), 0.0, pull, ess)

    def at(self, group: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The hyper-parameters of a group after so many steps."""
        return dict(group)

    def looking(self, cell: Cell) -> Cell:
        """A cell as it is for a draw that is not learned from."""
        return cell

    def unit(self, group: Mapping[str, Any]) -> Unit:
        """What moves as one theta: each tensor, or the group as a whole; None where every element moves alone."""
        return None

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """The group of a parameter."""
        return next(group for group in self.param_groups if any(param is p for p in group["params"]))

    def lists(self, param: Tensor, name: str) -> list[tuple[int, ...]]:
        """The shapes of the tensors in a list that the state of a parameter holds; any of them may be None."""
        return []

    def blocks(self, group: Mapping[str, Any], old: Any, new: Any) -> Flats:
        """What is kept of a cell after a step: the mean, which parameters hold, and the curvature."""
        return {"mean": new.mean, "hess": new.hess}

    def like_state(self, param: Tensor) -> Tensor:
        """Zeros shaped like a parameter, in the dtype of its state."""
        return param.new_zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32))

    # The posterior

    def together(self, names: Mapping[Tensor, str]) -> tuple[Part, ...]:
        """The parameters that vary together in q, or are no Gaussians, by their names."""
        return ()

    def posterior(self, model: nn.Module, num_data: int | None = None) -> Posterior:
        """What was learned, by the model's parameter names; see :meth:`bayesrule.Posterior.from_optimizer`."""
        self.draws.interrupt()
        return learned(self, model, num_data)

    def noise_visibility(self, dtype: torch.dtype | None = None) -> dict[str, float]:
        """The fraction of each parameter's elements whose spread is at least half a place of the mean, by name or number.

        Where it is low, a draw in that dtype is mostly rounding: by chance, so that nothing becomes biased, but noisier than q.

        Args:
            dtype: In which parameters are held, to ask before they are; None is their own, or that of FSDP2's
                ``MixedPrecisionPolicy``.
        """
        return noise_visibility(self, dtype)

    # Groups and checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not set it takes from the defaults."""
        super().add_param_group(param_group)
        try:
            check_group(type(self).__name__, len(self.param_groups) - 1, self.param_groups[-1], self.ranges, self.needs_whole)
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state of q at the mean: an open draw is closed first."""
        self.draws.interrupt()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, exactly; tensors keep the precision they were saved in.

        Raises:
            ValueError: It is the state of another optimizer, or a hyper-parameter in it is outside its range.
        """
        check(self, state_dict)
        self.draws.discard()
        super().load_state_dict(state_dict)
        restore(self, state_dict)
        self.execution.resume(max((int(state["step"]) for state in self.state.values() if "step" in state), default=0))

    def __getstate__(self) -> dict[str, Any]:
        if self.draws.looks.begun or self.draws.is_training:
            raise RuntimeError(f"{type(self).__name__} cannot be copied between a draw and its step(); copy it after the step")
        self.draws.close()
        kept = {"noise": self.draws.injected and self.draws.injected.function, "compile": self.execution.compile}
        together = {"sync": self.workers.sync, "noise_per_rank": self.workers.noise_per_rank}
        return {**super().__getstate__(), **kept, **together, "frugal": self.frugal, "steps": self.execution.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "compile" in state:  # a copy; load_state_dict brings groups and state alone
            self.frugal, steps = state.pop("frugal"), state.pop("steps")
            self._prepare(*(state.pop(name) for name in ("noise", "compile", "sync", "noise_per_rank")))
            self.execution.resume(steps)
        else:
            self.draws.forget()
            self.layout.forget()
        super().__setstate__(state)
