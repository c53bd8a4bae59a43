"""Hugging Face's Trainer: `optimizer_cls_and_kwargs=(IVON, {...})` trains, `PosteriorCallback()` saves the posterior.

A small transformer, from nothing, on the source text of Python's standard library, letter by letter. Samples of the saved posterior
are then asked about text that was not seen: they agree on Python, and less so on the same text backwards.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

import bayesrule as br
from bayesrule.integrations.transformers import PosteriorCallback

LENGTH, LETTERS = 32, 128


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = texts()
    train_set, new = rows[:-200], rows[-200:]
    model = transformer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=400,
                per_device_train_batch_size=32,
                weight_decay=1e-4,  # of the prior: the Trainer's value counts, not the optimizer's
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in train_set],
            eval_dataset=[{"input_ids": row, "labels": row} for row in new],
            optimizer_cls_and_kwargs=(br.IVON, {"lr": 1.0, "ess": train_set.numel(), "hess_init": 0.1}),  # trains
            callbacks=[PosteriorCallback(num_data=train_set.numel())],  # saves
        )
        trainer.train()
        post = br.Posterior.load(Path(folder) / "checkpoint-400" / "posterior.safetensors")

    at_mean, _ = asked(model, br.Posterior.point(model), new, draws=1)
    averaged, spread = asked(model, post, new)
    _, backwards = asked(model, post, new.flip(1))
    common = torch.bincount(train_set.flatten(), minlength=LETTERS) + 1.0
    guess = -(common / common.sum()).log()[new[:, 1:]].mean()
    print(f"nats a letter, by how common it is      {guess:.3f}")
    print(f"nats a letter, at the mean              {at_mean:.3f}")
    print(f"nats a letter, over the posterior       {averaged:.3f}")
    print(f"spread of the samples, Python           {spread:.3f}")
    print(f"spread of the samples, Python backwards {backwards:.3f}")


def transformer() -> LlamaForCausalLM:
    sizes = dict(vocab_size=LETTERS, hidden_size=48, intermediate_size=96, num_hidden_layers=1, max_position_embeddings=LENGTH)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=None, bos_token_id=None, eos_token_id=None))


def texts() -> Tensor:
    """Pieces of the standard library, in numbers."""
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, json, statistics))
    letters = torch.tensor([ord(letter) for letter in source if ord(letter) < LETTERS])
    rows = letters[: len(letters) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows))]


@torch.no_grad()
def asked(model: LlamaForCausalLM, post: br.Posterior, rows: Tensor, draws: int = 8) -> tuple[float, float]:
    """Nats a letter of the averaged samples, and how far their probabilities of a letter are apart on average."""
    model.eval()
    found = []
    for draw in range(draws):
        with br.sampled(model, post, seed=0, draw=draw):
            found.append(model(input_ids=rows).logits[:, :-1].softmax(-1).gather(-1, rows[:, 1:, None]))
    probs = torch.stack(found)
    return -probs.mean(0).log().mean().item(), probs.log().std(0, correction=0).mean().item()


if __name__ == "__main__":
    main()
