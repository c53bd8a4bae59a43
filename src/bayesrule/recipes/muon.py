"""Muon for the matrices inside of a model and AdamW for the rest, torch's own, as one optimizer to compare with."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer


class WithAdamW(Optimizer):
    """An optimizer for matrices, and torch's AdamW for the rest.

    Both parts see the groups and the state of this one, so that schedules and checkpoints need not know of them.

    Args:
        params: Groups, of which those with ``hidden=True`` hold matrices.
        lr: Of matrices.
        weight_decay: Of all groups that set none.
        adamw_lr: Of AdamW.
        betas: Of AdamW.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, adamw_lr: float, betas: tuple[float, float]) -> None:
        groups = [{**group, "lr": lr if group.get("hidden") else adamw_lr} for group in params]
        super().__init__(groups, {"weight_decay": weight_decay})
        self._parts: list[Optimizer] = [self.of_matrices(self._groups(True)), torch.optim.AdamW(self._groups(False), betas=betas)]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    @abstractmethod
    def of_matrices(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of matrices."""

    def _groups(self, hidden: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if bool(group.get("hidden")) is hidden]

    def _share(self) -> None:
        for part, hidden in zip(self._parts, (True, False), strict=True):
            part.param_groups, part.state = self._groups(hidden), self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(dict(state_dict))
        self._share()


class MuonAdamW(WithAdamW):
    """The usual pair, updates of Muon of the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``).

    Args:
        params: Groups, of which those with ``hidden=True`` hold matrices for Muon.
        lr: Of Muon.
        weight_decay: Of all groups that set none.
        momentum: Of Muon.
        adamw_lr: Of AdamW.
        betas: Of AdamW.

    Source: K. Jordan et al. (2024), Muon; J. Liu et al. (2025), Muon is Scalable for LLM Training, arXiv:2502.16982.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adamw_lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self._momentum = momentum
        super().__init__(params, lr, weight_decay, adamw_lr, betas)

    def of_matrices(self, groups: list[dict[str, Any]]) -> Optimizer:
        muon: Any = torch.optim.Muon
        made: Optimizer = muon(groups, momentum=self._momentum, adjust_lr_fn="match_rms_adamw")
        return made
