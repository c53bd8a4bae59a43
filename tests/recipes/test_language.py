"""Folders of language models: whole, gone on with bit by bit, and measured."""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.stopped import Crash, at_step, crash
from torch.nn import functional as F

import bayesrule as br
from bayesrule import cli
from bayesrule.recipes import language, language_runs
from bayesrule.recipes.gpt import GPTSettings
from bayesrule.recipes.language import compare, is_text, measure, read, sample
from bayesrule.recipes.language_runs import train
from bayesrule.recipes.tokens import windows
from bayesrule.uses.language import render_language

SMALL = {"layers": 1, "heads": 2, "width": 16, "context": 12, "steps": 9, "batch_size": 4, "every": 4}
FILES = {"tokens", "run.json", "metrics.jsonl", "model.safetensors", "posterior.safetensors", "evaluation.json"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(500)))
    return path


@pytest.fixture(scope="module")
def settings(text):
    def settings(optimizer="ivon", **changes):
        return GPTSettings((str(text),), optimizer, **{**SMALL, **changes})

    return settings


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(), folder)
    return folder


def content(folder):
    """All files; the record without its times."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(found.pop("run.json"))
    return found | {"run.json": {key: value for key, value in record.items() if key != "seconds"}}


def assert_equal(folder, other):
    first, second = content(folder), content(other)
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []


class TestRuns:
    def test_a_run_leaves_its_folder(self, whole):
        assert {path.name for path in whole.iterdir()} == FILES and is_text(whole)
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [4, 8, 9]
        record = json.loads((whole / "run.json").read_text())
        assert (
            record["kind"] == "text"
            and record["finished"]
            and record["settings"]["hyperparameters"]["ess"] == pytest.approx(10 * record["text"]["tokens"]["train"])
        )
        tensors, post = load_file(whole / "model.safetensors"), br.Posterior.load(whole / "posterior.safetensors")
        assert all(torch.equal(tensors[name], mean) for name, mean in post.mean.items()) and len(tensors) == len(post.mean) == 16

    @pytest.mark.usefixtures("each_step")
    @pytest.mark.parametrize("steps", [(1,), (4,), (2, 8), (9,)])
    def test_crashed_at_any_step_it_goes_on_and_ends_bit_equal(self, steps, settings, whole, tmp_path):
        out = tmp_path / "run"
        for number in steps:
            with pytest.raises(Crash):
                train(settings(), out, resume=True, bars=at_step(number, crash))
            assert {path.name for path in out.iterdir()} <= FILES | {"checkpoint.safetensors"}
        train(settings(), out, resume=True)
        assert_equal(out, whole)

    def test_what_a_process_left_that_died_among_the_tokens_is_swept(self, settings, whole, tmp_path):
        draft = tmp_path / "run" / f".tokens.{'0' * 32}"
        draft.mkdir(parents=True)
        (draft / "train.bin").write_bytes(b"half")
        train(settings(), tmp_path / "run")
        assert_equal(tmp_path / "run", whole)

    def test_a_finished_run_is_left_alone(self, whole, settings):
        before = content(whole)
        train(settings(), whole, resume=True, bars=at_step(1, crash))
        assert content(whole) == before

    def test_tokens_that_were_deleted_are_made_again_from_the_same_text_only(self, settings, whole, text, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(whole, out)
        shutil.rmtree(out / "tokens")
        assert read(out).tokens.fingerprint == read(whole).tokens.fingerprint
        assert_equal(out, whole)
        shutil.rmtree(out / "tokens")
        before = text.read_text()
        try:
            text.write_text(before + "and more\n")
            with pytest.raises(ValueError, match=r"the text of .* is no longer the one that it began with; bring it back"):
                read(out)
        finally:
            text.write_text(before)
        assert not (out / "tokens").exists() and {path.name for path in out.iterdir()} == FILES - {"tokens"}

    @pytest.mark.usefixtures("each_step")
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"context": 8}, r"began with context 12, not 8; give the same settings, or --resume and --out alone"),
            ({"seed": 1}, "began with seed 0, not 1"),
            ({"optimizer": "evon"}, "began with optimizer ivon, not evon"),
            ({"hyperparameters": {"lr": 0.5}}, "began with lr 0.005, not 0.5"),
        ],
    )
    def test_another_run_is_not_gone_on_with(self, changes, message, settings, tmp_path):
        out = tmp_path / "run"
        with pytest.raises(Crash):
            train(settings(), out, bars=at_step(5, crash))
        before = content(out)
        with pytest.raises(ValueError, match=message):
            train(settings(**changes), out, resume=True)
        with pytest.raises(FileExistsError, match="already holds another run; go on with it by --resume"):
            train(settings(), out)
        assert content(out) == before

    @pytest.mark.usefixtures("each_step")
    def test_a_damaged_checkpoint_is_said(self, settings, whole, tmp_path):
        out = tmp_path / "run"
        with pytest.raises(Crash):
            train(settings(), out, bars=at_step(5, crash))
        path = out / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged"):
            train(settings(), out, resume=True)
        path.unlink()
        train(settings(), out, resume=True)
        assert_equal(out, whole)

    def test_another_number_of_threads_is_warned_of(self, settings, tmp_path, each_step):
        out = tmp_path / "run"
        with pytest.raises(Crash):
            train(settings(), out, bars=at_step(5, crash))
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps(record | {"threads": 77}))
        with pytest.warns(UserWarning, match="began with 77 threads and goes on with"):
            train(settings(), out, resume=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "ivan"}, "unknown optimizer 'ivan'; did you mean 'ivon'"),
            ({"hyperparameters": {"lrr": 1.0}}, "ivon has no setting lrr"),
            ({"hyperparameters": {"lr": -1.0}}, "lr must be"),
            (
                {"optimizer": "torch-adamw", "fresh_draws": True},
                "fresh_draws is for optimizers that draw weights, and torch-adamw draws none",
            ),
            ({"optimizer": "evon", "hyperparameters": {"max_precond_dim": 8, "merge_dims": "maybe"}}, "merge_dims"),
            ({"device": "tpu9"}, "there is no device 'tpu9' here"),
            ({"data": ("nowhere.txt",)}, "there is no text 'nowhere.txt'"),
            ({"context": 5000}, "the validation part of the text has .* tokens, and a window takes 5001"),
            ({"tokenizer": "bpe", "vocabulary": 12}, "vocabulary must be at least 257"),
            ({"tokenizer": "bytes", "vocabulary": 300}, "vocabulary is that of --tokenizer bpe"),
            ({"hyperparameters": {"noise_per_rank": True}}, "--fresh-draws gives each micro-batch and process"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_is_kept(self, changes, message, settings, tmp_path):
        from dataclasses import replace

        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(replace(settings(), **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_what_only_the_model_shows_leaves_nothing_either(self, settings, tmp_path, monkeypatch):
        def built(*_):
            raise ValueError("needs whole tensors")

        monkeypatch.setattr(language_runs, "built", built)
        with pytest.raises(ValueError, match="needs whole tensors"):
            train(settings(tokenizer="bpe", vocabulary=300), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_divergence_is_remembered(self, settings, tmp_path):
        broken = settings("torch-adamw", hyperparameters={"lr": 1e30})
        for message in (
            "training diverged before step 4",
            r"cannot go on: training diverged before step 4 .* train into another --out",
        ):
            with pytest.raises(ValueError, match=message):
                train(broken, tmp_path / "run", resume=True)

    def test_pairs_as_tokens(self, settings, tmp_path):
        out = tmp_path / "run"
        train(settings(tokenizer="bpe", vocabulary=300), out)
        found = measure(read(out))
        assert (out / "tokenizer.json").exists() and load_file(out / "model.safetensors")["tokens.weight"].shape == (300, 16)
        x, y = windows(read(out).tokens.validation, range(0, len(read(out).tokens.validation) - 12, 12), 12)
        assert found["bits_per_byte"] < found["nll"] / math.log(2) / 1.5
        assert x.shape == y.shape


class TestFigures:
    def test_the_average_is_over_draws_token_by_token(self, whole, monkeypatch, tmp_path):
        monkeypatch.setattr(language, "FINAL", 9)
        shutil.copytree(whole, tmp_path / "run")
        run = read(tmp_path / "run")
        found = measure(run, 5, again=True)
        x, y = windows(run.tokens.validation, language.spaced(run.tokens.validation, 9, 12), 12)
        with torch.no_grad():
            mean = F.cross_entropy(run.model(x).flatten(0, 1), y.flatten()).item()
            logs = []
            for draw in range(5):
                with br.sampled(run.model, run.posterior, 0, draw):
                    logs.append(run.model(x).log_softmax(-1).gather(-1, y[..., None]))
        nll = -(torch.stack(logs).double().logsumexp(0) - math.log(5)).mean().item()
        assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert found["perplexity_mc"] == pytest.approx(math.exp(nll), rel=1e-5) != pytest.approx(math.exp(mean), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
        assert 0 < found["ece"] < 1 and 0 < found["ece_mc"] < 1

    def test_figures_are_kept_beside_the_weights(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        run, path = read(tmp_path / "run"), tmp_path / "run" / "evaluation.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"figures": {"perplexity": 1.0}}))
        assert measure(run) == {"perplexity": 1.0} and measure(run, again=True) == kept["figures"] == measure(run)

    def test_text_is_written_at_the_mean_or_by_one_draw(self, whole, monkeypatch):
        run, seen = read(whole), []
        real = language.write
        monkeypatch.setattr(
            language, "write", lambda model, *rest: seen.append(model.norm.weight.detach().clone()) or real(model, *rest)
        )
        texts = [sample(run, 20, prompt="1 plus", draw=draw) for draw in (None, 0, 0, 1)]
        assert texts[0].startswith("1 plus") and texts[1] == texts[2]
        assert torch.equal(seen[0], run.model.norm.weight) and torch.equal(seen[1], seen[2])
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[3])

    @pytest.mark.parametrize(
        ("asked", "message"),
        [({"length": -1}, "at least 0"), ({"temperature": math.nan}, "at least 0"), ({"prompt": ""}, "prompt must not be empty")],
    )
    def test_what_cannot_be_written_is_refused(self, asked, message, whole):
        with pytest.raises(ValueError, match=message):
            sample(read(whole), **{"length": 3, **asked})

    def test_runs_side_by_side(self, settings, whole, tmp_path):
        for name, changes in {"a": {"optimizer": "torch-adamw"}, "b": {"seed": 1}}.items():
            train(settings(**changes), tmp_path / name)
        report = compare([tmp_path / "a", whole, tmp_path / "b"])
        first, second = report.rows
        assert (
            first["method"] == "AdamW"
            and "perplexity_mc" not in first
            and second["seeds"] == 2
            and second["spread"]["perplexity"] > 0
        )
        page = render_language(report)
        assert page.count("<figure>") == 5 and "IVON, averaged" in page and "± " in page and "http" not in page.split("</style>")[1]
        train(settings(width=8), tmp_path / "c")
        assert [row["method"] for row in compare([whole, tmp_path / "c"]).rows] == [f"IVON ({whole})", f"IVON ({tmp_path / 'c'})"]
        with pytest.raises(ValueError, match="has no posterior to draw from; leave --draw out"):
            sample(read(tmp_path / "a"), 3, draw=0)
        train(settings(tokenizer="bpe", vocabulary=300), tmp_path / "d")
        with pytest.raises(ValueError, match="are of different texts or tokens; compare runs of the same"):
            compare([whole, tmp_path / "d"])

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("model.safetensors", b"x", "model.safetensors is damaged or of another model"),
            ("posterior.safetensors", b"x", "posterior.safetensors"),
            ("run.json", b"{", "run.json is damaged"),
            ("run.json", None, "holds no run.json"),
            ("metrics.jsonl", b"[]", "metrics.jsonl is damaged"),
        ],
    )
    def test_damage_is_said(self, name, change, message, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        if change is not None:
            (tmp_path / "run" / name).write_bytes(change)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            compare([tmp_path / "run"])


class TestCommand:
    @pytest.fixture
    def call(self, text, tmp_path, capsys):
        places = {"text": text, "new": tmp_path / "new"}
        small = "--layers 1 --heads 2 --width 16 --context 12 --steps 4 --batch-size 4 --every 2"

        def call(command):
            words = [word.format(**places) for word in command.replace("SMALL", small).split()]
            with warnings.catch_warnings():
                return cli.main(words), *capsys.readouterr()

        return call

    def test_the_same_command_with_a_switch_goes_on(self, call):
        command = "train gpt --data {text} --optimizer ivon --fresh-draws --out {new} SMALL --resume"
        assert [call(command)[0] for _ in range(2)] == [0, 0]

    def test_trains_writes_and_is_measured_again(self, call, tmp_path):
        code, out, _ = call("train gpt --data {text} --optimizer ivon --out {new} SMALL --sample 9 --draw 0 --json")
        found = json.loads(out)
        assert code == 0 and len(out.splitlines()) == 1 and (tmp_path / "new" / "sample.txt").read_text() == found["sample"] + "\n"
        assert {"perplexity", "perplexity_mc", "nll", "nll_mc", "bits_per_byte", "ece", "ece_mc", "seconds"} <= found.keys()
        assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")
        code, out, _ = call("evaluate {new} --json")
        assert code == 0 and {**json.loads(out), "sample": found["sample"]} == found
        code, out, _ = call("report {new}")
        assert code == 0 and "perplexity" in out and out.endswith(f"Report: {tmp_path / 'new' / 'report.html'}\n")
        code, out, _ = call("report {new} {new} --json --out {new}/both.html --num-samples 4")
        assert code == 0 and json.loads(out)["rows"][0]["seeds"] == 2
        code, out, _ = call("train gpt --resume --out {new}")
        assert code == 0 and "IVON" in out
        code, _, err = call("train gpt --resume --out {new} --lr 3")
        assert code == 2 and "began with lr 0.005, not 3.0" in err
        code, _, err = call("sensitivity {new}")
        assert code == 2 and err.splitlines()[-1].endswith("holds a language model, and this is for classifiers")
        code, _, err = call("train image --resume --out {new}")
        assert code == 2 and len([line for line in err.splitlines() if line.startswith("bayesrule:")]) == 1

    @pytest.mark.parametrize("optimizer", ["ivon", "evon"])
    def test_autocast_is_for_all_figures(self, optimizer, call):
        code, out, err = call(f"train gpt --data {{text}} --optimizer {optimizer} --precision bf16 --out {{new}} SMALL --json")
        found = json.loads(out)
        assert code == 0 and found["perplexity_mc"] == pytest.approx(found["perplexity"], rel=0.2), err

    def test_without_a_posterior_there_is_no_average(self, call, tmp_path):
        (tmp_path / "run.toml").write_text("steps = 2\nlr = 0.01\nset = {beta1 = 0.8}\n")
        code, out, _ = call(f"train gpt --data {{text}} --optimizer adamw --out {{new}} SMALL --json --config {tmp_path}/run.toml")
        settings = json.loads((tmp_path / "new" / "run.json").read_text())["settings"]
        assert code == 0 and json.loads(out)["perplexity_mc"] is None and settings["steps"] == 4
        assert settings["hyperparameters"] == {"lr": 0.01, "weight_decay": 0.1, "beta2": 0.99, "beta1": 0.8}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("--data nowhere", "there is no text 'nowhere'"),
            ("--data {text} --context 9999", "take more text or a smaller --context"),
            ("--data {text} --lr 1 --set lr=1", "--lr and --set both give lr; drop one"),
            ("--data {text} --sample -1", "sample and temperature must be at least 0"),
            ("--data {text} --epochs 3", "Unrecognized or misplaced options: --epochs"),
            ("--data {text} --steps 0", "steps must be at least 1"),
        ],
    )
    def test_a_refusal_is_one_line(self, more, message, call, tmp_path):
        code, out, err = call(f"train gpt --out {{new}} {more}")
        (line,) = err.splitlines()
        assert code == 2 and not out and message in line and not (tmp_path / "new").exists()

    def test_classifiers_are_no_text(self, tmp_path):
        assert not is_text(tmp_path) and not is_text(tmp_path / "none")
