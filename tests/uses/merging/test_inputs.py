"""What is merged with what: by names and shapes, with a new head, without a precision, with whole numbers."""

import pytest
import torch
from safetensors.torch import load_file
from tests.uses.merging.checkpoints import checkpoint

import bayesrule as br
from bayesrule.uses.merging.folders import open_checkpoint
from bayesrule.uses.merging.headers import Constant
from bayesrule.uses.merging.inputs import meet
from bayesrule.uses.merging.methods import METHODS
from bayesrule.uses.merging.streaming import merge_checkpoints

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SURE = {"w": 2.0}


def model(folder, weights, precision=None, prior=None):
    return checkpoint(
        folder, weights, precision and {name: torch.full_like(weights[name], s) for name, s in precision.items()}, prior
    )


def merged(tmp_path, base, models, method="gradient_matching", **how):
    given = [model(tmp_path / name, *each) for name, each in {"base": base, "a": models[0], "b": models[1]}.items()]
    merge_checkpoints(given[0], given[1:], tmp_path / "out", method=method, **how)
    return load_file(tmp_path / "out" / "model.safetensors")


class TestNames:
    def test_an_encoder_that_was_trained_further_in_a_classifier(self, tmp_path):
        base = ({"layer.weight": W},)
        models = [({"bert.layer.weight": W + 0.1 * k, "score.weight": W * k},) for k in (1, 2)]
        found = merged(tmp_path, base, models, "task_arithmetic")
        torch.testing.assert_close(found["bert.layer.weight"], W + 0.3)
        torch.testing.assert_close(found["score.weight"], W * 1.5)  # averaged: there is nothing to add it to

    def test_the_configuration_is_that_of_the_names(self, tmp_path):
        given = [model(tmp_path / "base", {"w": W}), model(tmp_path / "a", {"bert.w": W, "score": W})]
        (given[0] / "config.json").write_text('{"of": "base"}'), (given[1] / "config.json").write_text('{"of": "model"}')
        merge_checkpoints(given[0], given[1:], tmp_path / "out", method="linear")
        assert "model" in (tmp_path / "out" / "config.json").read_text()

    def test_a_new_head_has_the_prior_as_its_anchor(self, tmp_path):
        """S = S_1 + S_2 - delta, not the average of Fisher."""
        models = [({"w": W, "head": W * k}, {"w": 3.0, "head": s}, {"w": 0.5, "head": 0.5}) for k, s in ((1, 2.0), (2, 5.0))]
        found = merged(tmp_path, ({"w": W},), models)
        torch.testing.assert_close(found["head"], W * (2.0 * 1 + 5.0 * 2) / (2 + 5 - 0.5))
        assert (load_file(tmp_path / "out" / "precision.safetensors")["head"] == 6.5).all()

    def test_nothing_is_taken_out_of_what_the_base_lacks(self, tmp_path):
        with pytest.raises(ValueError, match="'head' is not in the base, so nothing can be taken out of it"):
            merged(tmp_path, ({"w": W},), [({"w": W, "head": W},)] * 2, "task_arithmetic", alphas=[1.0, -1.0])

    def test_what_no_model_has_is_left_out_with_a_word(self, tmp_path):
        with pytest.warns(UserWarning, match="1 tensors of '.*base' are in no model and are left out, such as 'pooler'"):
            found = merged(tmp_path, ({"w": W, "pooler": W, "ids": torch.arange(3)},), [({"w": W},)] * 2, "linear")
        assert found.keys() == {"w"}

    def test_models_that_differ(self, tmp_path):
        with pytest.raises(ValueError, match=r"'more' is in '.*/b' and not in '.*/a'; merge models of one architecture"):
            merged(tmp_path, ({"w": W},), [({"w": W},), ({"w": W, "more": W},)], "linear")

    @pytest.mark.parametrize(("base", "other", "words"), [(W[:1], W, r"is \[1, 2\] in '.*base' and \[2, 2\] in '.*/a'")])
    def test_shapes_that_differ(self, tmp_path, base, other, words):
        with pytest.raises(ValueError, match=f"'w' {words}"):
            merged(tmp_path, ({"w": base},), [({"w": other},)] * 2, "linear")

    def test_shapes_of_a_head_that_differ(self, tmp_path):
        with pytest.raises(ValueError, match=r"'head' is \[2, 2\] in '.*/a' and \[1, 2\] in '.*/b'"):
            merged(tmp_path, ({"w": W},), [({"w": W, "head": W},), ({"w": W, "head": W[:1]},)], "linear")

    def test_whole_numbers_beside_others(self, tmp_path):
        with pytest.raises(ValueError, match=r"'w' is torch.float32 in one checkpoint and torch.int64 in another"):
            merged(tmp_path, ({"w": W},), [({"w": W},), ({"w": W.long()},)], "linear")


class TestWithoutPrecision:
    def test_what_is_no_number_is_that_of_the_base(self, tmp_path):
        kept = {"count": torch.tensor(7), "mask": torch.tensor([True, False])}
        other = {"count": torch.tensor(9), "mask": torch.tensor([False, False])}
        found = merged(tmp_path, ({"w": W, **kept},), [({"w": W, **other}, SURE)] * 2, prior_precision=1.0)
        assert all(found[name].equal(t) for name, t in kept.items())

    @pytest.mark.parametrize(("method", "wanted"), [("gradient_matching", 0.3), ("fisher", 0.15)])
    def test_running_averages_count_as_equally_sure(self, tmp_path, method, wanted):
        models = [({"w": W, "mean": W + 0.1 * k}, SURE) for k in (1, 2)]
        found = merged(tmp_path, ({"w": W, "mean": W},), models, method, prior_precision=1.0)
        torch.testing.assert_close(found["mean"], W + wanted)
        assert load_file(tmp_path / "out" / "precision.safetensors").keys() == {"w"}

    def test_a_model_without_any(self, tmp_path):
        words = r"no precision for model '.*/b'; run bayesrule precision .*/b --data ... or choose method='task_arithmetic'"
        with pytest.raises(FileNotFoundError, match=words):
            merged(tmp_path, ({"w": W},), [({"w": W}, SURE), ({"w": W},)])

    def test_a_model_without_some(self, tmp_path):
        with pytest.raises(ValueError, match=r"no precision of 'v' for model '.*/b', and one for others"):
            merged(tmp_path, ({"w": W, "v": W},), [({"w": W, "v": W}, {"w": 1.0, "v": 1.0}), ({"w": W, "v": W}, SURE)])

    def test_a_base_without_and_no_prior(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no precision for the base '.*', and the models do not say which prior"):
            merged(tmp_path, ({"w": W},), [({"w": W}, SURE)] * 2)

    def test_fisher_needs_none_of_the_base(self, tmp_path):
        found = merged(tmp_path, ({"w": W},), [({"w": W}, {"w": 1.0}), ({"w": W + 1}, {"w": 3.0})], "fisher")
        torch.testing.assert_close(found["w"], W + 0.75)


def test_the_prior_of_what_was_merged_is_kept_for_the_next_time(tmp_path):
    models = [({"w": W}, {"w": 3.0}, {"w": s}) for s in (0.5, 0.75)]
    merged(tmp_path, ({"w": W},), models)
    found = open_checkpoint(tmp_path / "out").prior["w"]
    assert found == Constant((2, 2), 0.625)
    post = [br.Posterior({"w": W}, {"w": torch.full_like(W, 3.0)}, {"w": W[0, 0] * 0}, {"w": W[0, 0] * 0 + s}) for s in (0.5, 0.75)]
    wanted = br.merge(br.Posterior({"w": W}, {"w": torch.full_like(W, torch.inf)}), post)
    assert load_file(tmp_path / "out" / "precision.safetensors")["w"].equal(wanted.precision["w"])


def test_names_come_sorted(tmp_path):
    folders = [open_checkpoint(model(tmp_path / name, {"b": W, "a": W, "c": W})) for name in ("base", "one")]
    assert list(meet(folders[0], folders[1:], METHODS["linear"], None)) == ["a", "b", "c"]
