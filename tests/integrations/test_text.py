"""Checkpoints of Hugging Face fine-tuned by the recipe: what it leaves, that transformers and PEFT read it, and that it goes on."""

import importlib.util
import json
import shutil

import pytest
import torch
from tests.recipes.formats.test_documents import table
from tests.recipes.stopped import Crash, at_step, crash

import bayesrule as br
from bayesrule import cli
from bayesrule.recipes import runs
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import train
from bayesrule.recipes.text import TextSettings

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
    LlamaModel,
)

from bayesrule.recipes import pretrained  # noqa: E402

WORDS = ["fine", "great", "happy", "lovely", "poor", "sad", "awful", "wrong", "the", "a", "was", "food", "film", "day"]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def weights(name):
    """A marker for tests that need the weights of a name."""
    package = pretrained.PACKAGES[name][0]
    there = importlib.util.find_spec(package.replace("-", "_")) is not None
    return pytest.mark.skipif(not there, reason=f"no {package}: make integrations installs it")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small BERT, a small Llama, and 60 sentences that are good or bad."""
    folder = tmp_path_factory.mktemp("world")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **SMALL))
        llama = LlamaModel(LlamaConfig(vocab_size=len(words), num_key_value_heads=1, pad_token_id=None, **SMALL))
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for i in range(60):
        said = [WORDS[4 * (i % 2) + (i // 2 + k) % 4] for k in range(1 + i % 5)]
        rows.append((f"the {WORDS[10 + i % 4]} was {' '.join(said)}", ["good", "bad"][i % 2]))
    table(folder / "a.csv", rows)
    return folder


@pytest.fixture
def settings(world):
    def settings(**changes):
        given = {"model": str(world / "bert"), "epochs": 3, "batch_size": 8, "rank": 2, **changes}
        return TextSettings(str(world / "a.csv"), **given)

    return settings


def logits(model, data, **more):
    with torch.no_grad():
        return model.eval()(**data.scale(data.test.source.read(data.test.indices)), **more).logits


class TestLora:
    def test_leaves_adapters_their_posterior_and_the_model_as_it_was(self, settings, world, tmp_path):
        before = (world / "bert" / "model.safetensors").read_bytes()
        train(settings(), tmp_path / "run")
        run = read(tmp_path / "run")
        learning = {name for name, p in run.model.named_parameters() if p.requires_grad}
        assert {name.split(".")[-3] for name in learning} <= {"lora_A", "lora_B", "modules_to_save"}
        assert run.posterior.mean.keys() == learning
        for name, p in run.model.named_parameters():
            assert name not in learning or run.posterior.mean[name].equal(p.detach())
        assert (world / "bert" / "model.safetensors").read_bytes() == before
        assert run.posterior.num_data == len(run.data.train) == 42
        names = {path.name for path in (tmp_path / "run").iterdir()}
        files = {"adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "run.json", "metrics.jsonl"}
        assert names == files | {"predictions.safetensors", "tokenizer.json", "tokenizer_config.json"}

    def test_peft_reads_it(self, settings, world, tmp_path):
        train(settings(optimizer="torch-adamw"), tmp_path / "run")
        run = read(tmp_path / "run")
        base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
        found = peft.PeftModel.from_pretrained(base, tmp_path / "run")
        assert logits(found, run.data).equal(logits(run.model, run.data))
        assert AutoTokenizer.from_pretrained(tmp_path / "run")("the food was sad")["input_ids"][:2] == [2, 13]

    def test_predicts_with_a_posterior_as_any_model_does(self, settings, world, tmp_path):
        train(settings(), tmp_path / "run")
        run = read(tmp_path / "run")
        base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
        posterior = br.Posterior.load(tmp_path / "run" / "posterior.safetensors")
        inputs = AutoTokenizer.from_pretrained(tmp_path / "run")(["the food was sad"], return_tensors="pt")
        probs = br.predict(
            model, posterior, {name: x for name, x in inputs.items() if name != "token_type_ids"}, num_samples=4
        ).probs
        assert probs.shape == (1, 2) and probs.sum().item() == pytest.approx(1)
        assert run.predictions(4)["averaged test"].shape == (len(run.data.test), 2)


class TestFull:
    @pytest.mark.parametrize("model", ["bert", "llama"])
    def test_transformers_reads_it(self, settings, world, tmp_path, model):
        train(settings(full=True, model=str(world / model)), tmp_path / "run")
        run = read(tmp_path / "run")
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
        assert logits(found, run.data).equal(logits(run.model, run.data))
        assert found.config.id2label == {0: "bad", 1: "good"}
        assert run.posterior.mean.keys() == {name for name, _ in found.named_parameters()}


class TestLearning:
    @pytest.mark.parametrize(
        "chosen", [{"optimizer": "torch-adamw", "hyperparameters": {"lr": 0.02}}, {"hyperparameters": {"lr": 5.0, "ess": 1e7}}]
    )
    def test_words_become_classes(self, settings, tmp_path, chosen):
        train(settings(epochs=15, rank=4, **chosen), tmp_path / "run")
        run = read(tmp_path / "run")
        probs = run.predictions()
        labels = run.data.test.labels
        assert (probs["test"].argmax(1) == labels).float().mean() == 1
        order = run.data.test.by_length()
        inputs = run.data.scale(run.data.test.source.read(run.data.test.indices[order[:1]]))
        alone = run.model(**inputs).logits.softmax(1)
        torch.testing.assert_close(alone[0], probs["test"][order[0]])  # each at its place, and padding is nothing

    def test_the_seed_decides_on_the_first_weights_and_nothing_outside_changes(self, settings):
        state = torch.get_rng_state()
        data = settings().load()
        first, again, other = (dict(settings(seed=seed).build(data).named_parameters()) for seed in (1, 1, 2))
        assert torch.get_rng_state().equal(state)
        assert all(p.equal(again[name]) for name, p in first.items())
        assert not first["base_model.model.classifier.modules_to_save.default.weight"].equal(
            other["base_model.model.classifier.modules_to_save.default.weight"]
        )

    @pytest.mark.parametrize("changes", [{}, {"full": True}, {"optimizer": "adamw", "patience": 2}])
    def test_a_run_that_was_stopped_ends_as_one_that_was_not(self, settings, tmp_path, monkeypatch, changes):
        monkeypatch.setattr(runs, "EVERY", 0.0)
        monkeypatch.setattr(runs, "EFFORT", float("inf"))
        chosen = settings(**changes)
        train(chosen, tmp_path / "whole")
        for number in (4, 5):
            with pytest.raises(Crash):
                train(chosen, tmp_path / "run", resume=True, bars=at_step(number + 4 * (number - 4), crash))
            if not chosen.full:
                size = (tmp_path / "run" / "checkpoint.safetensors").stat().st_size
                assert (
                    size < 2.5 * (tmp_path / "whole" / chosen.weights_file).stat().st_size * (2 if chosen.patience else 1) + 50_000
                )
        train(chosen, tmp_path / "run", resume=True)
        for path in (tmp_path / "whole").iterdir():
            if path.name != "run.json":
                assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes(), path.name


class TestCommands:
    @pytest.fixture
    def run(self, settings, tmp_path):
        train(settings(), tmp_path / "run")
        return tmp_path / "run"

    def test_train(self, world, tmp_path, capsys):
        asked = ["--data", str(world / "a.csv"), "--model", str(world / "bert"), "--epochs", "1", "--rank", "2", "--seeds", "2"]
        assert cli.main(["train", "text", *asked, "--lr", "1", "--out", str(tmp_path / "run"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [row["method"] for row in found["rows"]] == ["IVON, mean", "IVON, averaged"]
        assert {"accuracy", "nll", "ece"} <= {*found}
        page = (tmp_path / "run" / "report.html").read_text()
        assert "10 networks" in page and "of which" in page and "documents" in page
        assert json.loads((tmp_path / "run" / "seed-0" / "run.json").read_text())["settings"]["hyperparameters"]["lr"] == 1
        assert cli.main(["train", "text", "--resume", "--out", str(tmp_path / "run")]) == 0

    def test_hugging_face_says_nothing(self, world, tmp_path, capfd):
        asked = ["--data", str(world / "a.csv"), "--model", str(world / "bert"), "--epochs", "1", "--full"]
        assert cli.main(["train", "text", *asked, "--out", str(tmp_path / "run")]) == 0
        lines = capfd.readouterr().err.splitlines()
        assert lines and {line.split()[0] for line in lines} <= {"bayesrule:", "look", "IVON", "predict"}

    def test_evaluate_and_report(self, run, world, tmp_path, capsys):
        table(tmp_path / "other.csv", [("a day", ""), ("wrong wrong film", "")])
        assert cli.main(["evaluate", str(run), "--ood", str(tmp_path / "other.csv"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["auroc_ood"] is not None
        assert cli.main(["report", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"][1]["method"] == "IVON, averaged"

    def test_sensitivity_shows_the_texts(self, run, capsys):
        assert cli.main(["sensitivity", str(run), "--json"]) == 0
        assert "suspects" in json.loads(capsys.readouterr().out)
        assert "the food was" in (run / "sensitivity.html").read_text()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda run: (run / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
            (lambda run: (run / "adapter_model.safetensors").write_bytes(b"no"), "is damaged or of another model"),
            (
                lambda run: shutil.copy(run / "posterior.safetensors", run / "adapter_model.safetensors"),
                "is damaged or of another model",
            ),
        ],
    )
    def test_what_is_damaged_is_one_line(self, run, capsys, change, words):
        change(run)
        assert cli.main(["evaluate", str(run)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and words in said

    def test_a_run_of_another_kind(self, run, capsys):
        assert cli.main(["train", "image", "--resume", "--out", str(run)]) == 2
        assert "go on with it by: bayesrule train text --resume" in capsys.readouterr().err


class TestRefusals:
    @pytest.mark.parametrize(
        ("prepare", "words"),
        [
            (lambda folder: None, "there is no model"),
            (lambda folder: folder.mkdir(), "is no checkpoint of Hugging Face: it holds neither config.json nor a GGUF file"),
            (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "cannot load the checkpoint"),
            (lambda folder: (folder.mkdir(), (folder / "a.gguf").write_bytes(b"no")), "cannot load the checkpoint"),
        ],
    )
    def test_models_that_are_none(self, settings, tmp_path, prepare, words):
        prepare(tmp_path / "model")
        with pytest.raises(ValueError) as caught:
            train(settings(model=str(tmp_path / "model")), tmp_path / "run")
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    def test_weights_that_would_be_unpickled(self, settings, world, tmp_path):
        shutil.copytree(world / "bert", tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save({}, tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot load the checkpoint"):
            train(settings(model=str(tmp_path / "model")), tmp_path / "run")

    def test_labels_that_training_does_not_show(self, settings, tmp_path):
        new = table(tmp_path / "new.csv", [("the film was odd", "odd"), ("the day was fine", "good")])
        with pytest.raises(
            ValueError, match=r"^1 validation documents of a.csv are of classes without any training document \(odd\)"
        ):
            train(settings(validation=str(new)), tmp_path / "run")


@weights("minilm")
def test_minilm(tmp_path):
    rows = [(f"The {thing} was {word}.", "good" if i < 4 else "bad") for i, word in enumerate(WORDS[:8]) for thing in WORDS[11:]]
    chosen = TextSettings(str(table(tmp_path / "a.csv", rows)), optimizer="torch-adamw", epochs=2, batch_size=4, rank=2)
    train(chosen, tmp_path / "run")
    run = read(tmp_path / "run")
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert learning < 0.05 * sum(p.numel() for p in run.model.parameters())


@weights("smollm2")
def test_smollm2(tmp_path):
    pytest.importorskip("gguf", reason="no gguf: make integrations installs it")
    rows = [(f"The {word} {thing}.", word) for word in ("good", "bad") for thing in WORDS[8:]]
    chosen = TextSettings(str(table(tmp_path / "a.csv", rows)), "torch-adamw", "smollm2", epochs=1, batch_size=4, rank=2)
    data = chosen.load()
    model = chosen.build(data)
    before = logits(model, data)
    chosen.write_weights(model, tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    chosen.read_weights(model, tmp_path)
    assert logits(model, data).equal(before)
    whole = TextSettings(chosen.data, "torch-adamw", "smollm2", full=True)
    (tmp_path / "whole").mkdir()
    whole.write_weights(model.unload(), tmp_path / "whole")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert found.config.id2label == {0: "bad", 1: "good"}
