"""Runs side by side: the right rows for the right folders, on the same test data, and words that follow the numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import bayesrule as br
from bayesrule.recipes.comparison import compare, describe, listing
from bayesrule.recipes.repeats import train_seeds
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import train
from bayesrule.recipes.settings import Settings
from bayesrule.uses.report import render


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs on small data, some with a class held out."""
    folder = tmp_path_factory.mktemp("world")
    digits = load_digits(n_class=3)
    x, y = digits.images[:240].astype(np.uint8) * 15, digits.target[:240]
    x[100] = 7
    np.savez(folder / "small.npz", x=x, y=y)
    np.savez(folder / "noise.npz", x=np.random.default_rng(0).integers(0, 255, (50, 10, 10), np.uint8), y=np.arange(50) % 2)
    base = Settings(str(folder / "small.npz"), "ivon", "mlp", epochs=2, batch_size=40)
    train(base, folder / "ivon")
    train(replace(base, optimizer="sgd"), folder / "sgd")
    train_seeds(replace(base, optimizer="sgd", hyperparameters={"lr": 0.1}, epochs=1), folder / "seeds", 3)
    train(replace(base, held_out=("2",), epochs=1), folder / "held out")
    train(replace(base, split_seed=1, epochs=1), folder / "other split")
    return folder


def methods(world, *names, **options):
    return [row["method"] for row in compare([world / name for name in names], **options).rows]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ivon"], ["IVON, mean", "IVON, averaged"]),
        (["sgd"], ["SGD", "SGD, temperature"]),
        (["sgd", "ivon"], ["SGD", "SGD, temperature", "IVON, mean", "IVON, averaged"]),
        (["ivon", "sgd"], ["IVON, mean", "IVON, averaged", "SGD", "SGD, temperature"]),
        (["seeds"], ["SGD", "SGD, temperature"]),
    ],
)
def test_every_run_has_two_rows_in_the_order_of_the_folders(world, names, expected):
    assert methods(world, *names) == expected


def test_runs_of_one_optimizer_are_told_apart_by_their_folders(world):
    assert methods(world, "sgd", "seeds", "ivon") == [
        f"SGD ({world / 'sgd'})",
        f"SGD ({world / 'sgd'}), temperature",
        f"SGD ({world / 'seeds'})",
        f"SGD ({world / 'seeds'}), temperature",
        "IVON, mean",
        "IVON, averaged",
    ]


def test_figures_are_those_of_evaluate(world):
    run = read(world / "ivon")
    inputs = run.data.scale(run.data.test.source.read(run.data.test.indices))
    mean, averaged = compare([world / "ivon"], 8).rows
    for row, posterior in ((mean, None), (averaged, run.posterior)):
        measured = br.evaluate(run.model, posterior, [(inputs, run.data.test.labels)], num_samples=8)
        assert {key: row[key] for key in measured} == pytest.approx(measured, abs=1e-6)
    assert mean["nll"] != averaged["nll"]


def test_a_temperature_changes_no_answer(world):
    plain, tempered = compare([world / "sgd"]).rows
    assert plain["accuracy"] == tempered["accuracy"] and plain["nll"] != tempered["nll"]


def test_seeds_are_averaged(world):
    row = compare([world / "seeds"]).rows[0]
    single = [compare([world / "seeds" / f"seed-{seed}"]).rows[0] for seed in range(3)]
    assert row["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in single]))
    assert row["nll"] == pytest.approx(np.mean([one["nll"] for one in single]))
    assert "with 3 seeds each" in compare([world / "seeds"]).summary[0]


def test_classes_that_were_held_out_are_unknown(world):
    report = compare([world / "held out"])
    assert all(0 <= row["auroc_ood"] <= 1 for row in report.rows) and report.classes == ("0", "1")
    assert set(report.unknown_names) == {"2"} and "never learned" in report.unknown_title
    assert "auroc_ood" not in compare([world / "ivon"]).rows[0]


def test_other_data_take_the_place_of_held_out_classes(world):
    for name in ("ivon", "held out", "sgd"):
        report = compare([world / name], 8, str(world / "noise.npz"))
        assert len(report.unknown_names) == 50 and report.unknown_names[3] == "noise.npz x[3]"
        assert report.unknown_title.endswith("noise.npz") and len(report.unknown_images) == 50
        assert all(0 <= row["auroc_ood"] <= 1 for row in report.rows)


@pytest.mark.parametrize("other", ["held out", "other split"])
def test_runs_on_other_data_are_refused(world, other):
    with pytest.raises(ValueError, match=r"ivon and .* were tested on different data .*compare runs of the same"):
        compare([world / "ivon", world / other])


def test_nothing_is_predicted_twice_unless_it_is_asked_for(world, monkeypatch):
    asked = []
    compare([world / "ivon", world / "sgd"])
    monkeypatch.setattr(br, "predict", lambda *_, **__: asked.append(1) or pytest.fail("it was predicted"))
    compare([world / "ivon", world / "sgd"])
    assert not asked
    with pytest.raises(pytest.fail.Exception):
        compare([world / "sgd"], again=True)


def test_again_says_the_same(world):
    assert compare([world / "ivon"]).rows == compare([world / "ivon"], again=True).rows


def test_a_page_is_made_of_it(world):
    page = render(compare([world / "sgd", world / "ivon"]))
    assert page.startswith("<!doctype html>") and "IVON, averaged" in page and "of one color throughout" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_the_cost_is_counted(world):
    mean, averaged = compare([world / "ivon"]).methods
    assert mean.cost["weights"] == f"{64 * 128 + 128 + 128 * 128 + 128 + 128 * 3 + 3:,}" and mean.cost["epochs"] == "2"
    steps = -(-len(read(world / "ivon").data.train) // 40)
    assert mean.cost["gradients"] == f"{2 * steps}" and mean.cost["networks a prediction"] == "1"
    assert averaged.cost["networks a prediction"] == "32"


def test_settings_are_in_words():
    found = describe(
        Settings(
            "digits", "ivon", hyperparameters={"lr": 0.1, "debias": True}, held_out=("8", "9"), split=(0.5, 0.25), patience=None
        )
    )
    assert found["lr"] == "0.1" and found["debias"] == "yes" and found["held out"] == "8, 9" and found["split"] == "0.5, 0.25"
    assert found["patience"] == "none" and found["augment"] == "none" and found["epochs"] == 30 and "hyperparameters" not in found
    assert not any("_" in name for name in found)


@pytest.mark.parametrize(("names", "expected"), [(["a"], "a"), (["a", "b"], "a and b"), ([1, 2, 3], "1, 2 and 3")])
def test_a_listing_is_a_sentence(names, expected):
    assert listing(names) == expected


def test_the_threads_of_the_caller_stay(world):
    before = torch.get_num_threads()
    compare([world / "sgd"], again=True)
    assert torch.get_num_threads() == before
