"""Hugging Face's Trainer, with ``optimizer_cls_and_kwargs`` and nothing else, around a transformer and around its adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from tests.integrations.host_accelerate import force_fp16
from tests.integrations.matrix import EPOCH, HYPER, ROWS, SAVED, STEPS, Cell, Host, Spy, Trace, context_loop, watched
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bayesrule as br
from bayesrule.integrations.transformers import PosteriorCallback

WORDS = 20


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def adapted(seed: int = 0) -> nn.Module:
    """Adapters on a model that is the same for all seeds, as a downloaded one is."""
    base = llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def texts(cell: Cell) -> list[dict[str, Tensor]]:
    """Words that follow one another in a circle, with mistakes."""
    generator = torch.Generator().manual_seed(1)
    number = EPOCH * cell.accumulation * ROWS
    first = torch.randint(WORDS, (number, 1), generator=generator)
    words = (first + torch.arange(8) + (torch.rand(number, 8, generator=generator) < 0.1)) % WORDS
    return [{"input_ids": row, "labels": row} for row in words]


def arguments(folder: Path, cell: Cell, **more: Any) -> TrainingArguments:
    chosen: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        gradient_accumulation_steps=cell.accumulation,
        weight_decay=HYPER["weight_decay"],
        bf16=cell.precision == "bf16",
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=SAVED,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return TrainingArguments(**{**chosen, **more})


class Begun(TrainerCallback):
    """Tells the spy when training begins."""

    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.spy.start()


def trainer(model: nn.Module, folder: Path, cell: Cell, callbacks: list[Any], **more: Any) -> Trainer:
    made = Trainer(
        model,
        arguments(folder, cell, **more),
        train_dataset=texts(cell),
        eval_dataset=texts(cell)[:ROWS],
        optimizer_cls_and_kwargs=(br.IVON, dict(HYPER)),
        callbacks=callbacks,
    )
    force_fp16(made.accelerator, cell)
    return made


class HuggingFace(Host):
    name = "HF Trainer"
    callbacks: tuple[type, ...] = ()

    def model(self, seed: int = 0) -> nn.Module:
        return llama(seed)

    def fit(self, folder: Path, cell: Cell, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Spy:
        model = self.model(seed=1 if resume else 0)
        with watched(model, cell, resume, kill) as spy:
            run = trainer(model, folder, cell, [Begun(spy), *(make() for make in self.callbacks)])
            run.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
        return spy

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        state = load_file(folder / f"checkpoint-{SAVED}" / "model.safetensors")
        return torch.cat([state[name].reshape(-1) for name, _ in self.model().named_parameters()])

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Those that the Trainer makes; the order decides which parameter gets which noise."""
        decayed = Trainer.get_decay_parameter_names(None, model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if name in decayed], "weight_decay": HYPER["weight_decay"]},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]

    def reference(self, cell: Cell, spy: Spy) -> Trace:
        """On the inputs that the Trainer gave: they say by how many words the loss of a step is divided."""
        model = self.model()
        given = spy.inputs

        def losses(step: int) -> list[Callable[[], Tensor]]:
            first = step * cell.accumulation
            return [lambda inputs=inputs: model(**inputs).loss for inputs in given[first : first + cell.accumulation]]

        return context_loop(
            model,
            self.groups(model),
            cell,
            losses,
            clip=1.0,
            schedule=lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS),
        )


class Adapters(HuggingFace):
    """PEFT LoRA in the Trainer, with the posterior saved beside the adapters."""

    name = "PEFT LoRA"
    callbacks = (PosteriorCallback,)

    def model(self, seed: int = 0) -> nn.Module:
        return adapted(seed)

    def saved(self, folder: Path, cell: Cell) -> Tensor:
        state = load_file(folder / f"checkpoint-{SAVED}" / "adapter_model.safetensors")
        names = [name.replace(".default", "") for name, p in self.model().named_parameters() if p.requires_grad]
        assert sorted(names) == sorted(state)
        return torch.cat([state[name].reshape(-1) for name in names])
