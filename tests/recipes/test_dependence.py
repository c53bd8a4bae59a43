"""The training examples of a run, scored: the right ones in the right order, kept and gone on from, written as a table."""

import csv
import json
import math
import shutil
import warnings
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bayesrule as br
from bayesrule.recipes import dependence
from bayesrule.recipes.dependence import COLUMNS, KEPT, NUMBERS, Ordered, examine, write_table
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import Paused, train
from bayesrule.recipes.settings import Settings
from bayesrule.uses import journal
from bayesrule.uses.scores import Scores


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run with a posterior, one without, and one on a table."""
    out = tmp_path_factory.mktemp("finished")
    for optimizer in ("ivon", "sgd"):
        train(Settings(str(world / "small.npz"), optimizer, "mlp", epochs=2, batch_size=36), out / optimizer)
    rows = [f"{i % 7},{i * i % 11},{'red' if i % 3 else 'blue, dark'}" for i in range(90)]
    (out / "table.csv").write_text("\n".join(["u,v,color", *(row.replace("blue, dark", '"blue, dark"') for row in rows)]))
    train(Settings(str(out / "table.csv"), "ivon", "mlp", epochs=2, batch_size=36), out / "rows")
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished / "ivon", tmp_path / "copy")


@pytest.fixture
def asked(monkeypatch):
    """How many examples were scored, batch by batch."""
    sizes, real = [], br.Sensitivity._of
    monkeypatch.setattr(br.Sensitivity, "_of", lambda self, x, y: sizes.append(len(y)) or real(self, x, y))
    return sizes


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(dependence, "BATCH", 50)


def directly(folder, **how):
    """Scores of the training data at once and in order."""
    run = read(folder)
    part = run.data.train
    inputs = run.data.scale(part.source.read(part.indices))
    return br.Sensitivity(run.model, run.posterior, **how).scores([(inputs, part.labels)])


def of_the_test(run):
    part = run.data.test
    return run.data.scale(part.source.read(part.indices)), part.labels


def alike(found, wanted, places=slice(None)):
    for one in fields(Scores):
        torch.testing.assert_close(getattr(found, one.name), getattr(wanted, one.name)[places], rtol=2e-3, atol=1e-5, msg=one.name)


@pytest.mark.parametrize(
    "how", [{}, {"estimator": "layerwise"}, {"estimator": "last_layer"}, {"estimator": "mc"}, {"correction": "first_order"}]
)
def test_all_examples_in_the_order_of_the_data(finished, tmp_path, how):
    found, run = examine(finished / "ivon", tmp_path, **how), read(finished / "ivon")
    assert found.indices.tolist() == list(range(len(run.data.train))) and torch.equal(found.labels, run.data.train.labels)
    alike(found.scores, directly(finished / "ivon", **how))
    assert found.names(3) == run.data.train.name(3) and torch.equal(found.images[3], run.data.train[3])
    assert found.total == len(run.data.train) and found.classes == ("0", "1", "2") and found.history == run.history


def test_predictions_with_and_without_an_example(finished, tmp_path):
    found, run = examine(finished / "ivon", tmp_path), read(finished / "ivon")
    assert torch.equal((found.predictions == found.labels).float(), found.scores.correct)
    assert torch.equal((found.without == found.labels).float(), found.scores.loo_correct)
    assert found.test["nll"] == pytest.approx(br.evaluate(run.model, None, [of_the_test(run)])["nll"], rel=1e-5)


class TestGoingOn:
    def test_a_subset_is_a_beginning_of_all(self, finished, copied, asked):
        wanted = directly(finished / "ivon")
        total, sizes = len(wanted), []
        for subset in (10, 60, 60, 25, None, 40, 10_000):
            asked.clear()
            found = examine(copied, subset=subset)
            sizes.append(sum(asked))
            assert len(found.scores) == min(subset or total, total) and found.total == total
            assert (found.indices.diff() > 0).all()
            alike(found.scores, wanted, found.indices)
        assert sizes == [10, 50, 0, 0, total - 60, 0, 0]  # nothing is scored twice

    def test_a_subset_is_of_all_classes_and_places(self, finished, tmp_path):
        found = examine(finished / "ivon", tmp_path, subset=60)
        assert set(found.labels.tolist()) == {0, 1, 2} and found.indices.max() > 120

    def test_an_interruption_keeps_what_was_scored(self, copied, asked, small_batches, monkeypatch):
        def stop(self, x, y):
            if sum(asked) >= 100:
                raise KeyboardInterrupt
            return counted(self, x, y)

        counted = br.Sensitivity._of
        monkeypatch.setattr(journal, "EVERY", -1.0)
        with monkeypatch.context() as patched, pytest.raises(Paused, match=f"kept in {copied}/{KEPT}; the same command goes on"):
            patched.setattr(br.Sensitivity, "_of", stop)
            examine(copied)
        assert load_file(copied / KEPT)["loss"].shape == (100,)
        found = examine(copied)
        assert sum(asked) == len(found.scores) == found.total
        alike(found.scores, directly(copied))

    def test_an_interruption_before_anything_was_scored(self, copied, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(br.Sensitivity, "_of", stop)
        with pytest.raises(KeyboardInterrupt):
            examine(copied)
        assert not (copied / KEPT).exists()

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"estimator": "mc"}, "holds scores of another estimator; remove it, or choose another --out"),
            ({"correction": "first_order"}, "holds scores of another correction; remove it, or choose another --out"),
        ],
    )
    def test_scores_of_another_kind_are_not_overwritten(self, copied, how, message):
        examine(copied, subset=5)
        before = (copied / KEPT).read_bytes()
        with pytest.raises(ValueError, match=message):
            examine(copied, **how)
        assert (copied / KEPT).read_bytes() == before


def spoil(change):
    def of(folder):
        tensors = load_file(folder / KEPT)
        with dependence.safe_open(str(folder / KEPT), "pt") as file:
            about = file.metadata()
        save_file(change(tensors), folder / KEPT, about)

    return of


DAMAGED = {
    "cut": (
        lambda at: (at / KEPT).write_bytes((at / KEPT).read_bytes()[:90]),
        "is no file of scores .*; remove it, or choose another --out",
    ),
    "something else": (lambda at: (at / KEPT).write_text("mine"), "is no file of scores"),
    "other labels": (spoil(lambda t: t | {"labels": (t["labels"] + 1) % 3}), "holds scores of other data"),
    "too many": (
        spoil(lambda t: {name: torch.cat([x] * 9) for name, x in t.items()}),
        "holds scores of other data",
    ),
    "a tensor less": (spoil(lambda t: {name: x for name, x in t.items() if name != "cook"}), "is no file of scores"),
    "weights": (lambda at: (at / "model.safetensors").write_text("x"), "model.safetensors is damaged"),
    "posterior": (lambda at: (at / "posterior.safetensors").write_text("x"), "posterior.safetensors' is damaged"),
    "unfinished": (lambda at: change_record(at, finished=False), "is not finished: go on with: bayesrule train image --resume"),
    "other data": (lambda at: change_record(at, data=("fingerprint", "0")), "are no longer those that it began with"),
    "data gone": (lambda at: change_record(at, settings=("data", "/nowhere.npz")), "nowhere.npz"),
}


def change_record(folder, **changes):
    record = json.loads((folder / "run.json").read_text())
    for key, change in changes.items():
        record[key] = {**record[key], change[0]: change[1]} if isinstance(change, tuple) else change
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused_in_one_line(name, copied):
    damage, message = DAMAGED[name]
    examine(copied, subset=30)
    damage(copied)
    before = (copied / KEPT).read_bytes()
    with pytest.raises((ValueError, OSError), match=message) as refusal:
        examine(copied)
    assert "\n" not in str(refusal.value) and (copied / KEPT).read_bytes() == before


@pytest.mark.parametrize(
    ("run", "how", "message"),
    [
        ("ivon", {"subset": 0}, "subset must be at least 1, got 0"),
        ("ivon", {"top": 0}, "top must be at least 1, got 0"),
        ("sgd", {"score": "loo_loss"}, "--score loo_loss needs a posterior, and .* has none that is taken"),
        ("sgd", {"classes": True}, "--classes needs a posterior"),
        ("ivon", {"posterior": "none", "score": "gap"}, "--score gap needs a posterior"),
        ("sgd", {"scale": "data"}, "--scale data needs a posterior"),
        ("sgd", {"estimator": "mc"}, "draws from a posterior, and there is none"),
        ("nothing", {}, "there is no run folder"),
    ],
)
def test_refusals(finished, tmp_path, run, how, message):
    with pytest.raises((ValueError, OSError), match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examine(finished / run, tmp_path, **how)
    assert not (tmp_path / KEPT).exists()


@pytest.mark.filterwarnings("ignore:.*posterior")
class TestWithoutAPosterior:
    def test_scores_are_those_of_sgd(self, finished, tmp_path):
        with pytest.warns(UserWarning, match="SGD leaves no posterior; scores are those of SGD"):
            found = examine(finished / "sgd", tmp_path)
        alike(found.scores, directly(finished / "sgd"))
        assert not found.estimates and found.score == "loss" and found.without is None and "SGD" in found.warnings[0]

    def test_a_posterior_need_not_be_taken(self, finished, tmp_path):
        assert not examine(finished / "ivon", tmp_path, posterior="none", score="self_influence").estimates

    def test_a_laplace_posterior_of_the_last_layer(self, finished, tmp_path):
        found, run = examine(finished / "sgd", tmp_path, posterior="laplace"), read(finished / "sgd")
        every = Ordered(run.data, torch.arange(found.total))
        post = br.Posterior.laplace(run.model, every, "last_layer", "marglik")
        wanted = br.Sensitivity(run.model, post).scores(every)
        assert found.estimates and found.score == "loo_loss" and not found.warnings
        torch.testing.assert_close(found.scores.loo_loss, wanted.loo_loss, rtol=1e-3, atol=1e-5)
        assert 1 < (found.figures["loo_nll"] / found.figures["train_nll"]) < 1.5

    def test_what_laplace_refuses_is_a_line(self, finished, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("it takes\nmuch")

        monkeypatch.setattr(br.Posterior, "laplace", fail)
        with pytest.raises(ValueError, match="sgd: it takes much"):
            examine(finished / "sgd", tmp_path, posterior="laplace")


def test_what_is_warned_of_is_said_and_stands_on_the_page(copied):
    post = br.Posterior.load(copied / "posterior.safetensors")
    post.rescale(ess=2.0 * post.num_data).save(copied / "posterior.safetensors")
    with pytest.warns(UserWarning, match="posterior was trained with ess=.* variances are scaled by 2") as heard:
        found = examine(copied)
    assert [str(each.message) for each in heard] == list(found.warnings)


def test_a_leverage_of_one_is_told_by_name(copied):
    post = br.Posterior.load(copied / "posterior.safetensors")
    wide = br.Posterior(post.mean, {name: s / 1e4 for name, s in post.precision.items()}, ess=post.ess, num_data=post.num_data)
    wide.save(copied / "posterior.safetensors")
    with pytest.warns(UserWarning, match="examples have a leverage of 1 or more") as heard:
        found = examine(copied, subset=60)
    first = int(found.indices[(found.scores.leverage >= 1).nonzero()[0]])
    assert first != 0
    assert f"(the first: {found.names(first)})" in str(heard[0].message) and len(heard) == 1
    assert not found.trusted


def test_variances_as_wide_as_the_data_allow(copied):
    run = read(copied)
    every = Ordered(run.data, torch.arange(len(run.data.train)))
    factor = br.Sensitivity(run.model, run.posterior).width(every)
    wanted = br.Sensitivity(run.model, run.posterior, scale=factor).scores(every)
    for subset in (30, None):  # the width is that of all
        with pytest.warns(UserWarning, match=f"variances are scaled by {factor:.3g}, "):
            found = examine(copied, scale="data", subset=subset)
        alike(found.scores, wanted, found.indices)
    assert factor != pytest.approx(1, rel=0.05)
    with pytest.raises(ValueError, match="holds scores of another scale; remove it, or choose another --out"):
        examine(copied)


def test_classes_that_are_left_out(finished, tmp_path):
    found = examine(finished / "ivon", tmp_path, classes=True)
    assert [row.name for row in found.class_losses] == ["0", "1", "2"]
    for k, row in enumerate(found.class_losses):
        members = found.labels == k
        assert row.examples == members.sum() and row.loss == pytest.approx(found.scores.loss[members].mean().item(), rel=1e-4)
        assert row.loss_without > row.loss


def test_rows_of_a_table(finished, tmp_path):
    found, run = examine(finished / "rows", tmp_path), read(finished / "rows")
    assert found.images is None and found.thing == "row" and [name for name, _ in found.words(0)] == ["u", "v"]
    assert [float(value) for _, value in found.words(2)] == run.data.train[2].tolist()


def test_many_classes_are_too_many(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(dependence, "HEAT", 2)
    with pytest.raises(ValueError, match="--classes tells of 2 classes at most, and"):
        examine(finished / "ivon", tmp_path, classes=True)


class TestTable:
    def test_every_example_has_a_line(self, finished, tmp_path):
        found = examine(finished / "rows", tmp_path)
        write_table(tmp_path / "t.csv", found)
        text = (tmp_path / "t.csv").read_bytes().decode()
        assert text.count("\r\n") == text.count("\n") == len(found.scores) + 1 and '"blue, dark"' in text
        with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        assert tuple(lines[0]) == COLUMNS
        for i, line in enumerate(lines):
            assert (line["index"], line["source"]) == (str(i), found.names(i))
            assert line["label"] == found.classes[found.labels[i]] and line["prediction"] == found.classes[found.predictions[i]]
            assert line["loo_prediction"] == found.classes[found.without[i]]
            for name in NUMBERS:
                assert float(line[name]) == pytest.approx(found.scores.by(name)[i].item(), rel=1e-7)

    @pytest.mark.filterwarnings("ignore:SGD")
    def test_what_has_no_scale_is_left_empty(self, finished, tmp_path):
        write_table(tmp_path / "t.csv", examine(finished / "sgd", tmp_path, subset=4))
        with (tmp_path / "t.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        empty = {"loo_loss", "gap", "leverage", "loo_prediction"}
        assert len(lines) == 4 and all({name for name, value in line.items() if value == ""} == empty for line in lines)

    def test_names_with_anything_in_them_come_back(self, finished, tmp_path):
        odd = 'a "quoted", name\r\nwith a break'
        found = replace(examine(finished / "ivon", tmp_path, subset=3), names=lambda i: odd)
        write_table(tmp_path / "t.csv", found)
        with (tmp_path / "t.csv").open(newline="") as file:
            assert [line["source"] for line in csv.DictReader(file, strict=True)] == [odd] * 3

    def test_it_is_written_whole_or_not_at_all(self, finished, tmp_path):
        def fail(i):
            raise OSError(5, "Input/output error")

        (tmp_path / "t.csv").write_text("before")
        found = replace(examine(finished / "ivon", tmp_path, subset=3), names=fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_table(tmp_path / "t.csv", found)
        assert (tmp_path / "t.csv").read_text() == "before"
        assert {path.name for path in tmp_path.iterdir()} == {"t.csv", KEPT}


def test_examples_come_batch_by_batch_in_their_order_and_are_counted(finished, small_batches):
    data, ticks = read(finished / "ivon").data, []
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3))
    loader = Ordered(data, order, lambda name, steps: lambda: ticks.append(steps))
    batches = list(loader)
    assert ticks == [len(batches)] * len(batches) and len(batches) == math.ceil(len(order) / 50)
    assert torch.equal(torch.cat([y for _, y in batches]), data.train.labels[order])
    torch.testing.assert_close(batches[0][0][7], data.scale(data.train[int(order[7])][None])[0])
    for _ in loader:
        break
    assert len(ticks) == len(batches) + 1
