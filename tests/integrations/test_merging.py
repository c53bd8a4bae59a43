"""Classifiers of texts that were fine-tuned apart, merged from the command line; transformers and PEFT read what comes out."""

import json
from pathlib import Path

import pytest
import torch
from tests.recipes.formats.test_documents import table

from bayesrule import cli
from bayesrule.recipes.classifiers import open_classifier

pytestmark = pytest.mark.hosts
for framework in ("transformers", "peft"):
    pytest.importorskip(framework, reason=f"{framework} is not installed: make integrations installs it")

import peft  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

WORDS = ["fine", "great", "happy", "lovely", "poor", "sad", "awful", "wrong", "the", "a", "was", "food", "film", "day"]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small BERT, and two models of each kind fine-tuned from it, one on food and one on films."""
    folder = tmp_path_factory.mktemp("world")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **SMALL)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for thing in ("food", "film"):
        said = [[WORDS[4 * (i % 2) + (i // 2 + k) % 4] for k in range(1 + i % 5)] for i in range(60)]
        table(folder / f"{thing}.csv", [(f"the {thing} was {' '.join(s)}", ["good", "bad"][i % 2]) for i, s in enumerate(said)])
        how = {
            "whole": ["--full", "--optimizer", "torch-adamw", "--lr", "0.005"],
            "ivon": ["--full"],
            "lora": ["--optimizer", "torch-adamw", "--lr", "0.01"],
        }
        for kind, more in how.items():
            asked = ["--data", folder / f"{thing}.csv", "--model", folder / "base", "--epochs", "6", "--batch-size", "8", *more]
            assert cli.main([str(word) for word in ["train", "text", *asked, "--out", folder / f"{kind} {thing}", "--json"]]) == 0
    return folder


@pytest.fixture
def bayesrule(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def bayesrule(*words):
        capsys.readouterr()
        assert cli.main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return bayesrule


def logits(model, folder):
    inputs = AutoTokenizer.from_pretrained(folder)(["the food was sad", "the film was lovely"], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def test_precisions_of_adamw_and_none_of_ivon(bayesrule):
    for thing in ("food", "film"):
        bayesrule("precision", f"whole {thing}")
        again = bayesrule("precision", f"whole {thing}", "--data", f"{thing}.csv", "--method", "ggn", "--subset", "20")
        assert (again["examples"], again["num_data"]) == (20, 60)
    for kind in ("whole", "ivon"):
        bayesrule("merge", "base", f"{kind} food", f"{kind} film", "--out", f"{kind} both")
        found, about = AutoModelForSequenceClassification.from_pretrained(f"{kind} both", output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"] and found.config.id2label == {0: "bad", 1: "good"}
    for thing in ("food", "film"):
        assert bayesrule("evaluate", "whole both", "--data", f"{thing}.csv")["accuracy"] > 0.9


def test_adapters_become_what_peft_makes_of_them(bayesrule):
    bayesrule("merge", "base", "lora food", "--out", "one", "--method", "linear")
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    whole = peft.PeftModel.from_pretrained(base, "lora food").merge_and_unload()
    found = AutoModelForSequenceClassification.from_pretrained("one")
    torch.testing.assert_close(logits(found, "one"), logits(whole, "lora food"))
    assert found.config.id2label == {0: "bad", 1: "good"}
    bayesrule("merge", "base", "lora food", "lora film", "--out", "both", "--method", "task_arithmetic", "--weights", "0.5")
    for thing in ("food", "film"):
        assert bayesrule("evaluate", "both", "--data", f"{thing}.csv")["accuracy"] > 0.8


def test_adapters_beside_one_that_is_their_base_stay_adapters(bayesrule):
    bayesrule("precision", "lora food")
    bayesrule("merge", "lora film", "lora food", "--out", "out", "--method", "linear")
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    found = peft.PeftModel.from_pretrained(base, "out")
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    torch.testing.assert_close(logits(found, "base"), logits(peft.PeftModel.from_pretrained(base, "lora food"), "base"))


@pytest.mark.parametrize("folder", ["whole food", "ivon food", "lora food"])
def test_evaluate_on_other_data(bayesrule, folder):
    own, other = (bayesrule("evaluate", folder, "--data", f"{thing}.csv") for thing in ("food", "film"))
    assert {"accuracy", "nll", "ece"} <= own.keys() and own["nll"] != other["nll"]


def test_what_cannot_be_measured_is_one_line(bayesrule, tmp_path, capsys):
    table(tmp_path / "odd.csv", [("the day was fine", "odd"), ("the day was odd", "good")])
    for words, reason in [
        (
            ("evaluate", "whole food", "--data", "odd.csv"),
            "odd.csv has classes that whole food does not know: odd; it knows bad, good",
        ),
        (
            ("evaluate", "base", "--data", "food.csv"),
            "base holds no trained classifier: it lacks classifier.bias, classifier.weight",
        ),
        (("precision", "base", "--data", "food.csv"), "base holds no trained classifier"),
        (("evaluate", ".", "--data", "food.csv"), ". holds neither config.json nor run.json"),
        (("evaluate", "whole food", "--data", "none.csv"), "none.csv: No such file or directory"),
    ]:
        capsys.readouterr()
        assert cli.main(list(words)) == 2
        assert reason in capsys.readouterr().err


def test_texts_of_any_order_are_predicted_as_one_by_one(bayesrule):
    found = open_classifier(Path("whole food"), "food.csv")
    probs = found.report("a").methods[0].trials[0].test
    for i in (0, 7, 33):
        (inputs, _), *_ = found.batches(torch.tensor([i]))
        with torch.no_grad():
            torch.testing.assert_close(found.model(**inputs).logits.softmax(1)[0], probs[i])


def test_shards_of_a_language_model_with_tied_weights(tmp_path):
    """As transformers splits them, and as it loads them again."""
    config = LlamaConfig(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=True, **SMALL)
    models = []
    for seed, name in enumerate(("base", "one", "two")):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            models.append(LlamaForCausalLM(config))
        models[-1].save_pretrained(tmp_path / name, max_shard_size="8KB")
    words = ["merge", tmp_path / "base", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out", "--method", "linear"]
    assert cli.main([str(word) for word in [*words, "--max-shard-size", "9000"]]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for (_, p), (_, one), (_, two) in zip(*(model.named_parameters() for model in (found, *models[1:])), strict=True):
        torch.testing.assert_close(p, (one + two) / 2)
