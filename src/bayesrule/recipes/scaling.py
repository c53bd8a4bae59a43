"""What becomes of examples as they are stored, on their way into a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """What becomes of examples as they are stored, on their way into a model.

    Inputs are shifted and divided, per channel of an image or column of a table.
    """

    center: tuple[float, ...]
    spread: tuple[float, ...]

    def __call__(self, stored: Tensor) -> Tensor:
        """Examples as they are stored, shape (examples, channels, ...), as float32 inputs of a model."""
        shape = (1, -1, *(1,) * (stored.dim() - 2))
        center, spread = (torch.tensor(side, device=stored.device).view(shape) for side in (self.center, self.spread))
        return (stored.float() - center).div_(spread)

    def kept(self, scale: "Scale") -> "Scale":
        """That of a run which was kept, in the place of this one."""
        return scale

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is one for examples of such a shape."""
        return len(self.center) == shape[0]


@dataclass(frozen=True)
class Padding(Scale):
    """Documents as tokens have no scale; a batch of them is as long as its longest.

    Args:
        token: What stands behind the end of a shorter one; the mask says that it is nothing.

    Example:
        >>> Padding(token=9)(torch.tensor([[5, 6, -1, -1], [7, -1, -1, -1]]))["input_ids"].tolist()
        [[5, 6], [7, 9]]
    """

    center: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    token: int = 0

    def __call__(self, stored: Tensor) -> Any:
        """Tokens, shape (documents, length), -1 behind the end; as a model of Hugging Face takes them, with their mask."""
        mask = stored >= 0
        longest = int(mask.sum(1).max())
        ids = torch.where(mask, stored, self.token)[:, :longest]
        return {"input_ids": ids.long(), "attention_mask": mask[:, :longest].long()}

    def kept(self, scale: Scale) -> Scale:
        return self

    def fits(self, shape: Sequence[int]) -> bool:
        return True
