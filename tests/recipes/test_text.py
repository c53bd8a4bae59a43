"""What decides a run on documents, and what needs no framework: lengths, padding, which weights learn."""

import math

import pytest
import torch
from tests.recipes.formats.test_documents import read, table
from torch import nn

from bayesrule import cli
from bayesrule.recipes import text
from bayesrule.recipes.data import arrange
from bayesrule.recipes.optimizers import settle
from bayesrule.recipes.scaling import Padding, Scale
from bayesrule.recipes.text import FULL_OPTIMIZERS, LORA_OPTIMIZERS, TextSettings, learned


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"alpha": math.nan}, "alpha must be above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"schedule": "line"}, "unknown schedule 'line'; did you mean 'linear'?"),
    ],
)
def test_settings_that_are_none(setting, words):
    with pytest.raises(ValueError) as caught:
        TextSettings("a.csv", **setting)
    assert str(caught.value).startswith(words)


def test_the_prior_and_ess_that_are_advised():
    chosen = settle("ivon", {}, 10_000, LORA_OPTIMIZERS)
    assert chosen["ess"] == 1e7 and chosen["weight_decay"] > 0 and not chosen["rescale_lr"]
    assert settle("ivon", {"ess": 7.0}, 10_000, LORA_OPTIMIZERS)["ess"] == 7.0
    assert TextSettings("a").optimizers is LORA_OPTIMIZERS and TextSettings("a", full=True).optimizers is FULL_OPTIMIZERS


def test_only_what_learns_has_an_optimizer():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    for name, choice in LORA_OPTIMIZERS.items():
        optimizer = choice.make(model, settle(name, {}, 10, LORA_OPTIMIZERS))
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model[1].parameters()]


@pytest.mark.parametrize("choice", [LORA_OPTIMIZERS["ivon"], FULL_OPTIMIZERS["torch-adamw"]])
def test_a_large_model_is_not_trained_whole_by_accident(choice):
    large = nn.Linear(82_000, 82_000, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"^6.7e9 trainable parameters found; did you mean only LoRA parameters\? \(pass params"):
        choice.make(large, {})
    assert learned(large.requires_grad_(False)) == []


def test_batches_are_as_long_as_their_longest():
    stored = torch.tensor([[3, -1, -1, -1], [4, 0, 5, -1]], dtype=torch.int32)
    found = Padding(token=9)(stored)
    assert found["input_ids"].tolist() == [[3, 9, 9], [4, 0, 5]] and found["input_ids"].dtype == torch.int64
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    padding = Padding(token=9)
    assert padding.kept(Scale((1.0,), (1.0,))) is padding and padding.fits((12,)) and not Scale((), ()).fits((1,))


@pytest.fixture
def part(tmp_path):
    """100 training texts of 1 to 50 words."""
    rows = [("w " * (1 + 7 * i % 50), "ab"[i % 2]) for i in range(150)]
    return arrange(read(table(tmp_path / "a.csv", rows)), split=(0.7, 0.15)).train


def test_texts_of_a_batch_are_about_as_long_as_one_another(part):
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        return part.batches(torch.randperm(len(part), generator=generator), 8, generator)

    found = batches(0)
    assert torch.cat(found).sort().values.equal(torch.arange(len(part))) and len(found) == -(-len(part) // 8)
    longest = [int(part.source.lengths(part.indices[batch]).max()) for batch in found]
    assert sum(n * len(b) for n, b in zip(longest, found, strict=True)) < 1.2 * part.source.lengths(part.indices).sum()
    assert longest != sorted(longest)
    assert all(map(torch.equal, found, batches(0))) and not all(map(torch.equal, found, batches(1)))


def test_the_shortest_come_first_where_order_does_not_matter(part):
    lengths = part.source.lengths(part.indices[part.by_length()])
    assert lengths.equal(lengths.sort().values)


def test_without_the_framework_a_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(text.importlib, "import_module", missing)
    path = table(tmp_path / "a.csv")
    assert cli.main(["train", "text", "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said == 'bayesrule: texts need transformers, which is not installed: pip install "bayesrule[cli,hf]"\n'
    assert not (tmp_path / "run").exists()


def test_lora_and_full_exclude_each_other(tmp_path, capsys):
    assert cli.main(["train", "text", "--data", "a.csv", "--lora", "--full", "--out", str(tmp_path / "run")]) == 2
    assert "--lora and --full exclude each other; drop one" in capsys.readouterr().err
