"""Adapters as changes of weights: what PEFT would compute, and what is refused because it means something else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.uses.merging.checkpoints import checkpoint

import bayesrule as br
from bayesrule.uses.merging.adapters import adapted
from bayesrule.uses.merging.folders import ADAPTER, ADAPTER_CONFIG, open_checkpoint
from bayesrule.uses.merging.headers import Room
from bayesrule.uses.merging.streaming import merge_checkpoints

GENERATOR = torch.Generator().manual_seed(0)
BASE = {
    name: torch.randn(shape, generator=GENERATOR)
    for name, shape in {
        "layer.query.weight": (6, 4),
        "layer.query.bias": (6,),
        "words.weight": (9, 4),
        "conv.weight": (4, 6),
    }.items()
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def factors(seed, module, a, b, ends=(".lora_A.weight", ".lora_B.weight")):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}{end}": torch.randn(shape, generator=generator) / 3
        for end, shape in zip(ends, (a, b), strict=True)
    }


def adapter(folder, weights, **config):
    folder.mkdir()
    save_file(weights, folder / ADAPTER, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | config))
    return folder


def whole(stored):
    return {name: each.read(0, torch.Size(each.shape).numel(), Room()).view(each.shape) for name, each in stored.items()}


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base", BASE)


def test_a_matrix_is_what_it_was_plus_scale_times_the_product(base, tmp_path):
    query = factors(1, "layer.query", (2, 4), (6, 2))
    words = factors(2, "words", (2, 9), (4, 2), (".lora_embedding_A", ".lora_embedding_B"))
    found = whole(adapted(open_checkpoint(base), open_checkpoint(adapter(tmp_path / "a", query | words))))
    (a, b), (wa, wb) = query.values(), words.values()
    torch.testing.assert_close(found["layer.query.weight"], BASE["layer.query.weight"] + 3 * b @ a)
    torch.testing.assert_close(found["words.weight"], BASE["words.weight"] + 3 * (wb @ wa).T)
    assert found["layer.query.bias"].equal(BASE["layer.query.bias"]) and found.keys() == BASE.keys()


@pytest.mark.parametrize(("config", "scale"), [({"use_rslora": True}, 6 / 2**0.5), ({"lora_alpha": 1}, 0.5), ({}, 3.0)])
def test_the_scale(base, tmp_path, config, scale):
    query = factors(1, "layer.query", (2, 4), (6, 2))
    found = whole(adapted(open_checkpoint(base), open_checkpoint(adapter(tmp_path / "a", query, **config))))
    a, b = query.values()
    torch.testing.assert_close(found["layer.query.weight"], BASE["layer.query.weight"] + scale * b @ a)


def test_a_layer_that_stores_its_weight_transposed(base, tmp_path):
    conv = factors(1, "conv", (2, 4), (6, 2))
    found = whole(adapted(open_checkpoint(base), open_checkpoint(adapter(tmp_path / "a", conv, fan_in_fan_out=True))))
    a, b = conv.values()
    torch.testing.assert_close(found["conv.weight"], BASE["conv.weight"] + 3 * (b @ a).T)


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 1), (3, 5), (5, 17), (23, 24)])
def test_any_block_is_read(base, tmp_path, start, stop):
    query = factors(1, "layer.query", (2, 4), (6, 2))
    stored = adapted(open_checkpoint(base), open_checkpoint(adapter(tmp_path / "a", query)))["layer.query.weight"]
    torch.testing.assert_close(stored.read(start, stop, Room()), stored.read(0, 24, Room())[start:stop])


def test_an_encoder_whose_adapters_were_trained_in_a_classifier(base, tmp_path):
    head = {"base_model.model.score.weight": torch.ones(2, 4)}
    folder = adapter(tmp_path / "a", factors(1, "bert.layer.query", (2, 4), (6, 2)) | head)
    found = adapted(open_checkpoint(base), open_checkpoint(folder))
    assert found.keys() == {f"bert.{name}" for name in BASE} | {"score.weight"}


def test_several_are_merged_as_the_weights_that_they_make(base, tmp_path):
    """The mean of the products, not the product of the means."""
    given = [factors(seed, "layer.query", (2, 4), (6, 2)) for seed in (1, 2)]
    folders = [adapter(tmp_path / f"a{k}", each) for k, each in enumerate(given)]
    merge_checkpoints(base, folders, tmp_path / "out", alphas=0.5, method="task_arithmetic", block_bytes=20)
    found = load_file(tmp_path / "out" / "model.safetensors")
    (a, b), (c, d) = (each.values() for each in given)
    torch.testing.assert_close(found["layer.query.weight"], BASE["layer.query.weight"] + 1.5 * (b @ a + d @ c))
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / ADAPTER_CONFIG).exists()


def test_those_of_one_initial_adapter_stay_adapters_with_their_precisions(tmp_path):
    start = factors(0, "layer.query", (2, 4), (6, 2))
    first = adapter(tmp_path / "start", start)
    posts, weights = [], []
    for k in (1, 2):
        near = {name: t + 0.1 * factors(k, "layer.query", (2, 4), (6, 2))[name] for name, t in start.items()}
        folder = adapter(tmp_path / f"a{k}", near)
        precision = {name: 1.5 + torch.rand(t.shape, generator=GENERATOR) for name, t in near.items()}
        posts.append(br.Posterior(near, precision))
        br.save_precision(folder / "precision.safetensors", posts[-1])
        weights.append(folder)
    merge_checkpoints(first, weights, tmp_path / "out", prior_precision=1.0)
    found = load_file(tmp_path / "out" / ADAPTER)
    wanted = br.merge(br.Posterior(start, {name: torch.ones_like(t) for name, t in start.items()}), posts)
    assert all(t.equal(wanted.mean[name]) for name, t in found.items())
    assert json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text()) == CONFIG


QUERY = factors(1, "layer.query", (2, 4), (6, 2))
FAULTS = {
    "another base": (factors(1, "layer.key", (2, 4), (6, 2)), {}, "adapts 'layer.key.weight', and .* holds no matrix that fits"),
    "another width": (factors(1, "layer.query", (2, 5), (6, 2)), {}, "holds no matrix that fits"),
    "ranks that differ": (factors(1, "layer.query", (3, 4), (6, 2)), {}, "holds no matrix that fits"),
    "a vector": (factors(1, "layer.query", (8,), (6, 2)), {}, "holds no matrix that fits"),
    "A alone": (dict(list(QUERY.items())[:1]), {}, "holds no matrix that fits"),
    "B alone": (dict(list(QUERY.items())[1:]), {}, "holds 'layer.query.lora_B.weight', which is no part of a plain LoRA"),
    "DoRA": (QUERY, {"use_dora": True}, "holds an adapter that is no plain LoRA"),
    "IA3": (QUERY, {"peft_type": "IA3"}, "holds an adapter that is no plain LoRA"),
    "alphas by layer": (QUERY, {"alpha_pattern": {"query": 3}}, "holds an adapter that is no plain LoRA"),
}


@pytest.mark.parametrize(("weights", "config", "words"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_merged(base, tmp_path, weights, config, words):
    folder = adapter(tmp_path / "a", weights, **config)
    with pytest.raises(ValueError, match=words) as caught:
        merge_checkpoints(base, [folder], tmp_path / "out", method="linear")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_precisions_of_factors_are_none_of_the_products(base, tmp_path):
    with pytest.raises(ValueError, match="or name as base the adapter that all were trained from"):
        merge_checkpoints(base, [adapter(tmp_path / "a", QUERY)], tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("r", 4), ("lora_alpha", 8), ("use_rslora", True)])
def test_adapters_whose_factors_mean_something_else(tmp_path, name, value):
    start, other = adapter(tmp_path / "start", QUERY), adapter(tmp_path / "a", QUERY, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is .* so that their A and B differ in meaning; name the full model as base"):
        merge_checkpoints(start, [other], tmp_path / "out", method="linear")


def test_a_full_model_beside_an_adapter(base, tmp_path):
    with pytest.raises(ValueError, match=r"is an adapter and .* is none; name a full model as base"):
        merge_checkpoints(adapter(tmp_path / "start", QUERY), [base], tmp_path / "out", method="linear")


def test_without_its_configuration(base, tmp_path):
    folder = adapter(tmp_path / "a", QUERY)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no file 'adapter_config.json'"):
        merge_checkpoints(base, [folder], tmp_path / "out", method="linear")
