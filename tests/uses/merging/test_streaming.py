"""Checkpoints merged on disk: bit for bit what is merged in memory, whatever the blocks and files; and what stops it."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.uses.merging.checkpoints import SHAPES, checkpoint, precisions, tensors

import bayesrule as br
from bayesrule.uses.merging import streaming, writing
from bayesrule.uses.merging.methods import METHODS
from bayesrule.uses.merging.streaming import merge_checkpoints

BASE = tensors(0)
MODELS = {"a": tensors(1, BASE, 0.1), "b": tensors(2, BASE, 0.1), "c": tensors(3, BASE, 0.1)}
SURE = {"base": precisions(4), "a": precisions(5, 1.1), "b": precisions(6, 1.1), "c": precisions(7, 1.1)}
WEIGHTS = [1.0, 0.3, 0.5]


@pytest.fixture
def root(tmp_path):
    """A base and three models."""
    for name, weights in {"base": BASE, **MODELS}.items():
        checkpoint(tmp_path / name, {**weights, "ids": torch.arange(4)}, SURE[name], shards=1 if name != "b" else 3)
    return tmp_path


def merged(root, out="out", models="abc", **how):
    merge_checkpoints(root / "base", [root / name for name in models], root / out, **how)
    return read(root / out)


def read(out):
    files = sorted(out.glob("model*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def in_memory(method, alphas, seed=0):
    posts = {n: br.Posterior(t, SURE[n]) for n, t in {"base": BASE, **MODELS}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return br.merge(posts.pop("base"), list(posts.values()), alphas, method, seed=seed)


@pytest.mark.parametrize("method", [name for name in METHODS])
def test_equals_memory_bit_by_bit(root, method, monkeypatch):
    shapes = {name: t for name, t in SHAPES.items() if 0 not in t}
    monkeypatch.setitem(BASE, "empty.weight", BASE["empty.weight"])
    wanted = {}
    with monkeypatch.context() as patch:
        for table in (BASE, *MODELS.values(), *SURE.values()):
            patch.delitem(table, "empty.weight")
        wanted = in_memory(method, WEIGHTS, seed=3)
    for blocks in (40, 2**20):
        found = merged(root, f"out{blocks}", alphas=WEIGHTS, method=method, seed=3, block_bytes=blocks, max_shard_size=900)
        assert all(found[name].equal(wanted.mean[name]) for name in shapes)
        assert found["ids"].equal(torch.arange(4)) and found["empty.weight"].shape == (0, 3)
    assert len(list((root / "out40").glob("model-*-of-*.safetensors"))) == 3
    if METHODS[method].needs_precision:
        sure = load_file(root / "out40" / "precision.safetensors")
        assert sure.keys() == shapes.keys() and all(sure[name].equal(wanted.precision[name]) for name in sure)
    else:
        assert not (root / "out40" / "precision.safetensors").exists()


def test_priors_of_models_give_way_to_that_of_the_base(tmp_path):
    """As in memory: posteriors of runs, whose ess is not their number of examples, and a base that is not known well."""
    generator = torch.Generator().manual_seed(0)
    near = torch.linspace(1, 2, 15).view(5, 3)
    weights = {name: {"w": near + torch.rand(5, 3, generator=generator)} for name in ("base", "a", "b")}
    posts = {}
    for name, prior, count in (("a", 0.5, 100), ("b", 0.7, 300)):
        sure = {"w": prior + torch.rand(5, 3, generator=generator)}
        posts[name] = br.Posterior(weights[name], sure, {"w": torch.zeros(())}, {"w": torch.tensor(prior)}, ess=1e3, num_data=count)
    for name, its in weights.items():
        checkpoint(tmp_path / name, its)
        if name in posts:
            posts[name].save(tmp_path / name / "posterior.safetensors")
    base = br.Posterior(weights["base"], {"w": torch.full((5, 3), torch.inf)})
    for given in (None, 0.05):
        found = merged(tmp_path, f"out {given}", "ab", prior_precision=given, block_bytes=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = br.merge(base, list(posts.values()), prior_precision=given)
        assert found["w"].equal(wanted.mean["w"])
        assert load_file(tmp_path / f"out {given}" / "precision.safetensors")["w"].equal(wanted.precision["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_in_float32_or_wider_and_the_result_in_the_dtype_of_the_base(tmp_path, dtype):
    base = tensors(0, dtype=dtype)
    models = {name: {n: t.to(dtype) for n, t in its.items()} for name, its in MODELS.items()}
    for name, its in {"base": base, **models}.items():
        checkpoint(tmp_path / name, its)
    found = merged(tmp_path, alphas=0.5, method="task_arithmetic")
    wide = torch.promote_types(dtype, torch.float32)
    for name, t in found.items():
        wanted = base[name].to(wide)
        for its in models.values():
            wanted = wanted + (its[name].to(wide) - base[name].to(wide)) * 0.5
        assert t.dtype == dtype and t.equal(wanted.to(dtype))
    assert {t.dtype for t in merged(tmp_path, "more", method="linear", dtype="float32").values()} == {torch.float32}


class TestAlgebra:
    def test_alpha_zero_is_the_base_and_one_model_is_itself(self, root):
        assert all(t.equal(BASE[name]) for name, t in merged(root, "zero", alphas=0.0).items() if name in BASE)
        for method in ("gradient_matching", "task_arithmetic", "linear", "fisher"):
            for name, t in merged(root, method, "a", method=method).items():
                assert name == "ids" or torch.allclose(t, MODELS["a"][name], rtol=0, atol=1e-6)

    def test_what_was_added_can_be_taken_out_again(self, root):
        merged(root, "both", "ab")
        back = merged(root, "back", ["both", "b"], alphas=[1.0, -1.0])
        assert all(torch.allclose(t, MODELS["a"][name], atol=1e-5) for name, t in back.items() if name in BASE)
        sure = load_file(root / "back" / "precision.safetensors")
        assert all(torch.allclose(s, SURE["a"][name], atol=1e-5) for name, s in sure.items())

    def test_order_does_not_matter(self, root):
        one, other = merged(root, "1", "abc"), merged(root, "2", "cab")
        assert all(torch.allclose(t, other[name], atol=1e-6) for name, t in one.items())


class TestFolder:
    def test_what_a_user_of_the_model_needs_and_nothing_else(self, root):
        (root / "base" / "vocab.txt").write_text("a")
        (root / "base" / "optimizer.pt").write_text("a")
        (root / "base" / "run.json").write_text("{}")
        (root / "base" / ".hidden.json").write_text("{}")
        merged(root)
        names = {path.name for path in (root / "out").iterdir()}
        wanted = {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "precision.safetensors", "merge.json"}
        assert names == wanted
        assert not [path for path in root.iterdir() if path.name.startswith(".")]

    def test_a_copied_file_is_no_link_that_leads_out(self, root):
        (root / "secret").write_text("key")
        (root / "base" / "added_tokens.json").symlink_to(root / "secret")
        with pytest.raises(ValueError, match="is a link that leads out of its folder"):
            merged(root)
        assert not (root / "out").exists()

    def test_the_record_says_what_was_merged(self, root):
        record = merge_checkpoints(
            root / "base", [root / "a", root / "b"], root / "out", alphas=[1, 0.5], method="dare_ties", seed=5
        )
        assert record == json.loads((root / "out" / "merge.json").read_text())
        assert (record["method"], record["alphas"], record["density"], record["seed"]) == ("dare_ties", [1.0, 0.5], 0.5, 5)
        assert len(record["sha256"]) == 5  # b has three files
        for file, digest in record["sha256"].items():
            assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == digest

    def test_the_same_again_does_nothing_and_another_is_refused(self, root):
        first = merge_checkpoints(root / "base", [root / "a"], root / "out")
        before = (root / "out" / "model.safetensors").stat().st_mtime_ns
        assert merge_checkpoints(root / "base", [root / "a"], root / "out", block_bytes=99) == first
        assert (root / "out" / "model.safetensors").stat().st_mtime_ns == before
        for how in ({"alphas": 0.5}, {"method": "linear"}, {"dtype": "bfloat16"}):
            with pytest.raises(FileExistsError, match="already exists"):
                merge_checkpoints(root / "base", [root / "a"], root / "out", **how)
        save_file(MODELS["c"] | {"ids": torch.arange(4)}, root / "a" / "model.safetensors")
        with pytest.raises(FileExistsError, match="already exists"):
            merge_checkpoints(root / "base", [root / "a"], root / "out")

    def test_a_result_that_was_damaged_is_not_called_done(self, root):
        merged(root, method="linear")
        (root / "out" / "model.safetensors").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            merged(root, method="linear")

    def test_a_link_to_nowhere_is_in_the_way(self, root):
        (root / "out").symlink_to(root / "nowhere")
        with pytest.raises(FileExistsError, match="already exists"):
            merged(root, method="linear")
        assert (root / "out").is_symlink() and not (root / "nowhere").exists()

    def test_precisions_can_be_merged_further(self, root):
        merged(root, "ab", "ab")
        merged(root, "more", ["ab", "c"])
        assert (root / "more" / "precision.safetensors").exists()


class Full:
    """A disk that is full after so many blocks."""

    def __init__(self, monkeypatch, blocks, failure):
        self.left, self.append, self.failure = blocks, writing.Writer.append, failure
        monkeypatch.setattr(writing.Writer, "append", lambda writer, block: self.block(writer, block))

    def block(self, writer, block):
        self.left -= 1
        if self.left < 0:
            raise self.failure
        self.append(writer, block)


class TestStopped:
    @pytest.mark.parametrize("blocks", [0, 1, 5, 8])
    def test_a_full_disk_leaves_nothing(self, root, monkeypatch, blocks):
        Full(monkeypatch, blocks, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        before = sorted(path.name for path in root.iterdir())
        with pytest.raises(OSError, match="No space left on device") as caught:
            merged(root)
        assert caught.value.filename == str(root / "out") and sorted(path.name for path in root.iterdir()) == before

    def test_a_file_that_is_too_large_for_the_disk(self, root):
        """By the system itself, in a process of its own."""
        code = (
            "import os, resource, signal, sys, bayesrule as br\n"
            "br.merge_checkpoints, os.chdir(sys.argv[1])\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))\n"
            "br.merge_checkpoints('base', ['a', 'b'], 'out')"
        )
        found = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
        assert "File too large: 'out'" in found.stderr.splitlines()[-1]
        assert {path.name for path in root.iterdir()} == {"base", "a", "b", "c"}

    @pytest.mark.parametrize("blocks", [0, 1, 4, 9, 13])
    def test_an_interruption_is_gone_on_with(self, root, monkeypatch, blocks):
        how = {"block_bytes": 400, "max_shard_size": 900, "alphas": WEIGHTS}
        wanted = merged(root, "wanted", **how)
        monkeypatch.setattr(streaming, "EVERY", -1.0)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Full(patch, blocks, KeyboardInterrupt())
            merged(root, **how)
        assert not (root / "out").exists() and (root / ".out.draft").is_dir()
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(writing.Writer, "append", lambda w, b, append=writing.Writer.append: (calls.append(1), append(w, b)))
            found = merged(root, **how)
        assert found.keys() == wanted.keys() and all(t.equal(found[name]) for name, t in wanted.items())
        sure = [load_file(root / out / "precision.safetensors") for out in ("out", "wanted")]
        assert all(s.equal(sure[1][name]) for name, s in sure[0].items())
        assert blocks < 9 or len(calls) < 18
        assert not (root / ".out.draft").exists()

    def test_killed(self, root):
        """At a moment of its own choosing, between two tensors."""
        code = (
            "import os, signal, sys, bayesrule as br\n"
            "from bayesrule.uses.merging import streaming\n"
            "streaming.EVERY = -1.0\n"
            "os.chdir(sys.argv[1])\n"
            "def progress(name, steps):\n"
            "    left = iter(range(steps))\n"
            "    return lambda: next(left) < 3 or os.kill(os.getpid(), signal.SIGKILL)\n"
            "br.merge_checkpoints('base', ['a', 'b'], 'out', progress=progress)"
        )
        found = subprocess.run([sys.executable, "-c", code, str(root)])
        assert found.returncode == -signal.SIGKILL and (root / ".out.draft").is_dir() and not (root / "out").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            ticks = []
            merge_checkpoints("base", ["a", "b"], "out", progress=lambda name, steps: lambda: ticks.append(steps))
        assert len(ticks) == 3 and ticks[0] == 6
        assert all(t.equal(merged(root, "whole", "ab")[name]) for name, t in read(root / "out").items())

    def test_what_was_seen_before_the_interruption_counts(self, root, monkeypatch):
        """A removal that went too far is refused, though the tensor at fault was written before."""
        monkeypatch.setattr(streaming, "EVERY", -1.0)
        how = {"models": "ab", "alphas": [1.0, -1.0], "block_bytes": 2**20}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Full(patch, 7, KeyboardInterrupt())
            merged(root, **how)
        with pytest.raises(ValueError, match=r"removing '.*b' leaves .* precisions non-positive") as whole:
            merged(root, "other", **how)
        with pytest.raises(ValueError, match=r"removing '.*b' leaves") as caught:
            merged(root, **how)
        assert str(caught.value) == str(whole.value)
        assert {path.name for path in root.iterdir()} == {"base", "a", "b", "c"}


def spoiled(root, model, weights):
    save_file({**weights, "ids": torch.arange(4)}, root / model / "model.safetensors")


FAULTS = {
    "no model": ({"models": ""}, ValueError, "there are no models to merge"),
    "unknown method": ({"method": "mean"}, ValueError, "unknown method 'mean'"),
    "unknown dtype": ({"dtype": "int8"}, ValueError, "unknown dtype 'int8'; take 'same', 'float64'"),
    "density": ({"density": 0.5}, ValueError, "takes no density"),
    "alphas": ({"alphas": [1.0]}, ValueError, "there are 3 models and 1 alphas"),
    "blocks": ({"block_bytes": 0}, ValueError, "block_bytes must be at least 1, got 0"),
    "shards": ({"max_shard_size": 0.5}, ValueError, "max_shard_size must be at least 1, got 0.5"),
    "too much taken out": ({"models": "ab", "alphas": [0.1, -1.0]}, ValueError, "non-positive"),
}


@pytest.mark.parametrize(("how", "kind", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_leaves_nothing(root, how, kind, words):
    with pytest.raises(kind) as caught:
        merged(root, **how)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in root.iterdir()} == {"base", "a", "b", "c"}


def test_what_is_not_finite_is_named(root):
    spoiled(root, "a", MODELS["a"] | {"conv.weight": torch.full((3, 5, 2), torch.nan)})
    with pytest.raises(ValueError, match=r"'conv.weight' would have 30 entries that are not finite in torch.float32"):
        merged(root)
    spoiled(root, "a", {name: t * 1e5 for name, t in MODELS["a"].items()})
    with pytest.raises(ValueError, match=r"entries that are not finite in torch.float16"):
        merged(root, method="linear", dtype="float16")


def test_an_input_that_changes_meanwhile(root):
    def progress(name, steps):
        return lambda: os.utime(root / "a" / "model.safetensors", (1, 1))

    with pytest.raises(ValueError, match=r"a/model.safetensors' changed while it was read; start again"):
        merged(root, progress=progress)
    assert not (root / "out").exists()


def test_models_of_another_base_and_precisions_of_another_scale_are_said(root):
    spoiled(root, "a", tensors(99))
    with pytest.warns(UserWarning, match="has little to do with the base"):
        merged(root, method="linear")
    (root / "c" / "precision.safetensors").unlink()
    scaled = br.Posterior(MODELS["c"], {name: s * 1e6 for name, s in SURE["c"].items()})
    br.save_precision(root / "c" / "precision.safetensors", scaled)
    with pytest.warns(UserWarning, match="were both multiplied by their dataset size"):
        merged(root, "other", "bc")
