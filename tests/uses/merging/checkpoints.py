"""Small checkpoints on disk."""

import json

import torch
from safetensors.torch import save_file

from bayesrule.uses.merging.folders import INDEX, PRECISION, sidecar_metadata

SHAPES = {"embed.weight": (50, 7), "norm.weight": (7,), "scale": (), "empty.weight": (0, 3), "conv.weight": (3, 5, 2)}


def tensors(seed, around=None, scale=1.0, dtype=torch.float32):
    """Of a model, near another one."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (t + (around[name] if around else 0)).to(dtype) for name, t in found.items()}


def precisions(seed, least=0.1):
    """Of a model, every one at least so large."""
    generator = torch.Generator().manual_seed(seed)
    return {name: least + torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def checkpoint(folder, weights, precision=None, prior=None, shards=1):
    """Write a folder as Hugging Face lays it out."""
    folder.mkdir(parents=True)
    weights = {name: t.detach().clone() for name, t in weights.items()}
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        files = {f"model-{k + 1:05}-of-{shards:05}.safetensors": sorted(weights)[k::shards] for k in range(shards)}
        for file, names in files.items():
            save_file({name: weights[name] for name in names}, folder / file)
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: file for file, names in files.items() for name in names}}))
    if precision is not None:
        save_file(precision, folder / PRECISION, sidecar_metadata("test", prior or {}))
    return folder


def raw(path, header, body=b"", length=None):
    """Write a file of bytes that says it is safetensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path
