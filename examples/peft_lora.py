"""PEFT: a posterior over the adapters alone, saved beside them, while the model that they adapt stays as it is.

A small transformer that knows Python source gets adapters for English prose (the topics of Python's own help). The file with their
posterior holds as many numbers as the adapters have, not as the model has.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

from pydoc_data.topics import topics

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

import bayesrule as br
from bayesrule.integrations.transformers import PosteriorCallback

LENGTH, LETTERS = 32, 128


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    prose = rows("".join(topics.values())[:100_000])
    train_set, new = prose[:-200], prose[-200:]
    with tempfile.TemporaryDirectory() as folder:
        base = transformer()
        code = rows("".join(inspect.getsource(module) for module in (argparse, inspect, statistics)))
        trained(base, code, Path(folder) / "base", torch.optim.AdamW, {"lr": 5e-3})
        before = nats(base, new)

        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        kept = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        out = Path(folder) / "adapted"
        ivon = {"lr": 1.0, "ess": train_set.numel(), "hess_init": 0.1}
        trained(model, train_set, out, br.IVON, ivon, callbacks=[PosteriorCallback(num_data=train_set.numel())])
        saved = out / "checkpoint-300"
        post = br.Posterior.load(saved / "posterior.safetensors")
        files = sorted(path.name for path in saved.glob("*.safetensors"))

    same = all(torch.equal(kept[name], p) for name, p in model.named_parameters() if name in kept)
    numbers, size = sum(t.numel() for t in post.mean.values()), sum(p.numel() for p in model.parameters())
    spreads = torch.stack([score(model, post, draw, new) for draw in range(8)])
    print(f"nats a letter of English      {before:.3f} before, {nats(model, new):.3f} after")
    print(f"samples of the adapters       {spreads.min():.3f} to {spreads.max():.3f}")
    print(f"posterior over                {numbers:,} of {size:,} numbers")
    print(f"saved                         {', '.join(files)}")
    print(f"the model itself is unchanged {same}")


def transformer() -> LlamaForCausalLM:
    sizes = dict(vocab_size=LETTERS, hidden_size=48, intermediate_size=96, num_hidden_layers=1, max_position_embeddings=LENGTH)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=None, bos_token_id=None, eos_token_id=None))


def rows(text: str) -> Tensor:
    """Pieces of a text, in numbers."""
    letters = torch.tensor([ord(letter) for letter in text if ord(letter) < LETTERS])
    return letters[: len(letters) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(model: nn.Module, data: Tensor, folder: Path, optimizer: type, chosen: dict, callbacks: list | None = None) -> None:
    options = dict(logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    arguments = TrainingArguments(str(folder), max_steps=300, per_device_train_batch_size=32, weight_decay=1e-4, **options)
    dataset = [{"input_ids": row, "labels": row} for row in data]
    Trainer(model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(optimizer, chosen), callbacks=callbacks).train()


@torch.no_grad()
def nats(model: nn.Module, data: Tensor) -> Tensor:
    return model.eval()(input_ids=data, labels=data).loss


def score(model: nn.Module, post: br.Posterior, draw: int, data: Tensor) -> Tensor:
    with br.sampled(model, post, seed=0, draw=draw):
        return nats(model, data)


if __name__ == "__main__":
    main()
