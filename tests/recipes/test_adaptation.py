"""Finished runs, changed without training them again: what is left is a run, and a page says how near it comes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bayesrule as br
from bayesrule.cli import main
from bayesrule.recipes.adaptation import AGAIN, Request, adapt, places
from bayesrule.recipes.results import read
from bayesrule.recipes.runs import train


@pytest.fixture(scope="module")
def base(tmp_path_factory, world):
    from bayesrule.recipes.settings import Settings

    def base(optimizer):
        out = tmp_path_factory.getbasetemp() / f"adapted-{optimizer}"
        if not (out / "run.json").exists():
            train(Settings(str(world / "small.npz"), optimizer, model="mlp", epochs=6, batch_size=36), out)
        return out

    return base


@pytest.fixture
def more(world, tmp_path):
    with np.load(world / "small.npz") as found:
        np.savez(tmp_path / "more.npz", x=found["x"][-30:], y=found["y"][-30:])
    return str(tmp_path / "more.npz")


class TestPlaces:
    def test_numbers_ranges_and_files(self, base, tmp_path):
        (tmp_path / "some.csv").write_text("index,label\n9,1\n3,0\n")
        assert places(["4", "1-3", str(tmp_path / "some.csv")], read(base("adamw")).data) == [1, 2, 3, 4, 9]

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("nine", "nine is no number, no range such as 40-60, and no file"),
            ("9-3", "9-3 is no range"),
            ("99999", "has no training image 99999; they are 0 to"),
            ("0-99999", "has no training image 99999"),
            ("0-999999999999", "has no training image 999999999999"),
            ("-1", "-1 is no number"),
            ("bad.csv", "bad.csv is no CSV file with whole numbers in a column named index"),
        ],
    )
    def test_what_is_none_is_refused(self, base, word, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.csv").write_text("row\n3\n")
        with pytest.raises(ValueError, match=message):
            places([word], read(base("adamw")).data)


class TestAdapt:
    @pytest.mark.parametrize(
        ("optimizer", "request_"),
        [
            ("ivon", Request(remove=("0-9",))),
            ("ivon", Request(weight_decay=0.01)),
            ("ivon", Request(remove=("0-2",), method="deviation")),
            ("ivon", Request(remove=("0-2",), method="negation", epochs=5)),
            ("adamw", Request(remove_class=("2",), memory=20)),
            ("adamw", Request(remove=("5",), method="kprior", memory=0.9, memory_by="random")),
        ],
    )
    def test_leaves_a_run_with_the_settings_of_training_again(self, base, optimizer, request_, tmp_path):
        before, found = read(base(optimizer)), adapt(base(optimizer), tmp_path / "out", request_)
        after = read(tmp_path / "out")
        assert len(after.data.train) == len(before.data.train) - len(after.settings.without)
        assert [part.name for part in found.examples][:2] == ["test", "remaining"] and found.models == ["before", "adapted"]
        moved = any(not torch.equal(p, q) for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True))
        took = json.loads((tmp_path / "out" / "run.json").read_text())["adapted"]["took"]
        assert took["residual_gradient"]["before"] > 0 and took["residual_gradient"]["after"] > 0
        assert moved and br.Posterior.load(tmp_path / "out" / "posterior.safetensors").bind(after.model)
        if request_.weight_decay:
            assert after.settings.hyperparameters["weight_decay"] == 0.01

    def test_what_is_added_comes_behind_and_goes_away_again(self, base, more, tmp_path):
        first = adapt(base("ivon"), tmp_path / "one", Request(add=(more,), epochs=5))
        count, one = len(read(base("ivon")).data.train), read(tmp_path / "one")
        assert len(one.data.train) == count + 30 and one.settings.also == (more,)
        assert [part.name for part in first.examples] == ["test", "remaining", "added"]
        adapt(tmp_path / "one", tmp_path / "two", Request(remove=("0", str(count)), epochs=5))
        two = read(tmp_path / "two")
        adapt(tmp_path / "two", tmp_path / "three", Request(remove=("0",), epochs=5))
        assert two.settings.without == (0, count) and read(tmp_path / "three").settings.without == (0, 1, count)
        assert torch.equal(two.data.train[0], one.data.train[1])

    def test_training_again_is_training_with_these_settings(self, base, settings, tmp_path):
        found = adapt(base("ivon"), tmp_path / "out", Request(remove=("0-19",), epochs=5), retrain=True)
        train(settings("ivon", epochs=6, without=tuple(range(20))), tmp_path / "again")
        mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / AGAIN, tmp_path / "again"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and found.models[-1] == "trained again"

    def test_a_list_that_changed_is_another_request(self, base, tmp_path):
        (tmp_path / "some.csv").write_text("index\n3\n4\n")
        request = Request(remove=(str(tmp_path / "some.csv"),), method="deviation")
        adapt(base("ivon"), tmp_path / "out", request)
        (tmp_path / "some.csv").write_text("index\n9\n")
        with pytest.raises(FileExistsError, match="already holds another run"):
            adapt(base("ivon"), tmp_path / "out", request)

    def test_the_prior_is_that_of_training_again(self, base, tmp_path):
        adapt(base("ivon"), tmp_path / "out", Request(remove=("0-59",), epochs=2, damping=4.0), retrain=True)
        posts = [br.Posterior.load(folder / "posterior.safetensors") for folder in (tmp_path / "out", tmp_path / "out" / AGAIN)]
        mine, theirs = ({name: float(t.mean()) for name, t in post.prior_precision.items()} for post in posts)
        assert mine == pytest.approx(theirs)

    def test_the_same_again_does_nothing_and_another_is_refused(self, base, tmp_path):
        request = Request(remove=("0-9",), epochs=5)
        first = adapt(base("adamw"), tmp_path / "out", request)
        stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
        again = adapt(base("adamw"), tmp_path / "out", request)
        assert again.rows == first.rows and (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
        with pytest.raises(FileExistsError, match="already holds another run"):
            adapt(base("adamw"), tmp_path / "out", Request(remove=("0-8",), epochs=5))

    @pytest.mark.parametrize(
        ("optimizer", "changes", "message"),
        [
            ("adamw", {}, "nothing is to be changed"),
            ("adamw", {"remove": ("0",), "memory": 1.5}, "memory must be a whole number of examples, or a share"),
            ("adamw", {"remove": ("0",), "memory": 0.0}, "memory must be"),
            ("adamw", {"weight_decay": -1.0}, "weight_decay must be a number > 0, got -1"),
            ("adamw", {"weight_decay": 0.1}, "the weight decay of adamw is no prior that can be exchanged"),
            ("adamw", {"remove_class": ("7",)}, "there is no class '7'"),
            ("adamw", {"remove_class": ("0", "1", "2")}, "all .* training images are to be left out"),
            ("adamw", {"remove": ("0",), "posterior": "learned"}, "holds no posterior, as AdamW leaves none"),
            ("adamw", {"remove": ("0",), "method": "magic"}, "unknown method 'magic'"),
            ("adamw", {"add": ("x",), "method": "deviation"}, "deviation leaves examples out and does nothing else"),
            ("adamw", {"add": ("nowhere.npz",)}, "nowhere"),
        ],
    )
    def test_what_does_not_fit_leaves_nothing(self, base, optimizer, changes, message, tmp_path):
        with pytest.raises((ValueError, OSError), match=message):
            adapt(base(optimizer), tmp_path / "out", Request(**changes))
        assert not (tmp_path / "out").exists()


class TestCommand:
    def test_prints_and_writes_the_page(self, base, tmp_path, capsys):
        out = tmp_path / "out"
        asked = ["adapt", str(base("adamw")), "--remove-class", "2", "--epochs", "5", "--out", str(out)]
        assert main([*asked, "--retrain", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [row["method"] for row in found["rows"]] == ["before", "adapted", "trained again"] and "removed same" in found
        assert (out / "adaptation.html").exists() and main(["evaluate", str(out)]) == 0
        assert main(asked) == 0 and "Page:" in capsys.readouterr().out

    @pytest.mark.parametrize("flags", [[], ["--remove", "x"], ["--remove", "1", "--memory-by", "luck"]])
    def test_mistakes_are_one_line(self, base, flags, tmp_path, capsys):
        assert main(["adapt", str(base("adamw")), "--out", str(tmp_path / "out"), *flags]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
