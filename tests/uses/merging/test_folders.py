"""Folders of checkpoints: where weights and precisions are found, and which files and links are followed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.uses.merging.checkpoints import SHAPES, checkpoint, precisions, tensors

import bayesrule as br
from bayesrule.uses.merging.folders import ADAPTER, INDEX, inside, open_checkpoint, sidecar_metadata
from bayesrule.uses.merging.headers import Room


def read(stored):
    return stored.read(0, torch.Size(stored.shape).numel(), Room()).view(stored.shape)


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "model", tensors(0), precisions(1), {"scale": 0.5})


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_and_precisions(tmp_path, shards):
    found = open_checkpoint(checkpoint(tmp_path / "model", tensors(0), precisions(1), {"scale": 0.5}, shards=shards))
    assert all(read(found.tensors[name]).equal(t) for name, t in tensors(0).items()) and not found.is_adapter
    assert all(read(found.precision[name]).equal(s) for name, s in precisions(1).items())
    assert {name: read(s).item() for name, s in found.prior.items()} == {"scale": 0.5}
    assert len(found.files) == shards + 1 and str(found) == repr(str(tmp_path / "model"))


def test_a_posterior_is_scaled_to_all_examples_and_leaves_out_what_is_exact(folder):
    mean = {name: t for name, t in tensors(0).items() if name in ("scale", "norm.weight")}
    precision = {"scale": torch.tensor(8.0), "norm.weight": torch.full((7,), torch.inf)}
    post = br.Posterior(mean, precision, ess=1e6, num_data=500_000, prior_precision={n: torch.tensor(2.0) for n in mean})
    (folder / "precision.safetensors").unlink()
    post.save(folder / "posterior.safetensors")
    found = open_checkpoint(folder)
    assert {name: read(s).item() for name, s in found.precision.items()} == {"scale": 4.0}
    assert {name: read(s).item() for name, s in found.prior.items()} == {"scale": 1.0}
    assert not open_checkpoint(folder, precisions=False).precision


def test_names_of_adapters_lose_the_adapters_name(tmp_path):
    name, stored = "base_model.model.query.lora_A.default.weight", "base_model.model.query.lora_A.weight"
    (tmp_path / "a").mkdir()
    save_file({stored: torch.ones(2, 3)}, tmp_path / "a" / ADAPTER)
    post = br.Posterior({name: torch.ones(2, 3)}, {name: torch.full((2, 3), 2.0)})
    post.save(tmp_path / "a" / "posterior.safetensors")
    found = open_checkpoint(tmp_path / "a")
    assert found.is_adapter and found.precision.keys() == found.tensors.keys() == {stored}


class TestLinks:
    def test_the_folder_itself_may_be_one(self, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        assert open_checkpoint(tmp_path / "link").tensors.keys() == SHAPES.keys()

    def test_inside_of_the_folder(self, folder):
        (folder / "model.safetensors").rename(folder / "weights")
        (folder / "model.safetensors").symlink_to("weights")
        assert open_checkpoint(folder).tensors.keys() == SHAPES.keys()

    def test_a_snapshot_of_the_cache_of_hugging_face(self, tmp_path):
        """models--who--what/snapshots/<revision>/file -> ../../blobs/<hash>."""
        snapshot = checkpoint(tmp_path / "models--who--what" / "snapshots" / "0f0f", tensors(0))
        blobs = tmp_path / "models--who--what" / "blobs"
        blobs.mkdir()
        (snapshot / "model.safetensors").rename(blobs / "aabb")
        (snapshot / "model.safetensors").symlink_to("../../blobs/aabb")
        assert read(open_checkpoint(snapshot).tensors["scale"]).equal(tensors(0)["scale"])
        (tmp_path / "here").symlink_to(snapshot)
        assert open_checkpoint(tmp_path / "here").tensors.keys() == SHAPES.keys()

    @pytest.mark.parametrize("place", ["elsewhere", "model/../elsewhere", "blobs"])
    def test_none_leads_out(self, folder, tmp_path, place):
        (tmp_path / place).resolve().parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(tmp_path / place)
        (folder / "model.safetensors").symlink_to(tmp_path / place)
        with pytest.raises(ValueError, match="is a link that leads out of its folder"):
            open_checkpoint(folder)

    def test_to_nothing_or_itself(self, folder):
        for target in ("nothing", "model.safetensors"):
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors").symlink_to(target)
            with pytest.raises(FileNotFoundError, match="holds neither"):
                open_checkpoint(folder)


def rewritten(folder, **changes):
    """The index with something else in it."""
    found = {"weight_map": {name: "model.safetensors" for name in SHAPES}} | changes
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps(found))


def index(**files):
    return lambda folder: rewritten(folder, weight_map={**dict.fromkeys(SHAPES, "part.safetensors"), **files})


def sidecar(tensors_, metadata):
    return lambda folder: save_file(tensors_, folder / "precision.safetensors", metadata)


ABOUT = sidecar_metadata("test", {})
FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), FileNotFoundError, "there is no folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "holds neither model.safetensors nor"),
    "pickles alone": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "it holds pytorch_model.bin, which is not read",
    ),
    "both": (lambda f: (f / INDEX).write_text("{}"), ValueError, "holds both"),
    "index of no JSON": (lambda f: (rewritten(f), (f / INDEX).write_text("{"))[0], ValueError, "is no JSON"),
    "index of a list": (lambda f: (rewritten(f), (f / INDEX).write_text("[]"))[0], ValueError, "is no JSON object"),
    "index without a map": (lambda f: rewritten(f, weight_map=3), ValueError, "it has no weight_map"),
    "index of numbers": (lambda f: rewritten(f, weight_map={"scale": 3}), ValueError, "it has no weight_map"),
    "index up": (index(scale="../secret.safetensors"), ValueError, "an index that names '../secret.safetensors'"),
    "index away": (index(scale="/etc/passwd"), ValueError, "an index that names '/etc/passwd'"),
    "index elsewhere": (index(scale="a\\b"), ValueError, "an index that names"),
    "index of nothing": (index(scale=""), ValueError, "an index that names ''"),
    "index of the folder": (index(scale=".."), ValueError, "an index that names '..'"),
    "index of a zero byte": (index(scale="a\0"), ValueError, "an index that names"),
    "index of a missing file": (index(scale="b.safetensors"), FileNotFoundError, "holds no file 'b.safetensors'"),
    "index of more": (index(more="part.safetensors"), ValueError, "disagree on 'more'"),
    "index of less": (lambda f: rewritten(f, weight_map={"scale": "part.safetensors"}), ValueError, "disagree on"),
    "no sidecar": (sidecar({"scale": torch.tensor(1.0)}, {}), ValueError, "is no file of precisions"),
    "sidecar of another release": (
        sidecar({"scale": torch.tensor(1.0)}, {"bayesrule": ABOUT["bayesrule"].replace("1", "2")}),
        ValueError,
        "is no file of precisions that this release reads",
    ),
    "sidecar of other weights": (
        sidecar({"other": torch.tensor(1.0)}, ABOUT),
        ValueError,
        "'other', which is no weight of its folder",
    ),
    "sidecar of another shape": (sidecar({"scale": torch.ones(2)}, ABOUT), ValueError, "'scale' is [], and [2] in"),
    "sidecar of whole numbers": (sidecar({"scale": torch.tensor(1)}, ABOUT), ValueError, "which is no precision"),
}


@pytest.mark.parametrize(("spoil", "kind", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_one_line(folder, spoil, kind, words):
    spoil(folder)
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_tensor_in_two_shards(tmp_path):
    folder = checkpoint(tmp_path / "model", tensors(0), shards=2)
    save_file(load_file(folder / "model-00001-of-00002.safetensors") | {"scale": torch.tensor(1.0)}, folder / "more.safetensors")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    first = next(name for name, file in names.items() if file == "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names | {first: "more.safetensors"}}))
    with pytest.raises(ValueError, match=r"holds '.*' twice, in "):
        open_checkpoint(folder)


def test_a_posterior_whose_weights_vary_together(folder):
    (folder / "precision.safetensors").unlink()
    post = br.Posterior.of(br.Full(torch.zeros(1), torch.eye(1)), {"scale": ()})
    post.save(folder / "posterior.safetensors")
    with pytest.raises(
        ValueError, match=r"structure 'full', and weights of checkpoints count as independent; save its independent"
    ):
        open_checkpoint(folder)


def test_a_file_of_a_folder(folder):
    assert inside(folder, "config.json") == folder / "config.json"
    with pytest.raises(FileNotFoundError, match="holds no file 'none'"):
        inside(folder, "none")
