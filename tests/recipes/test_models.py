"""Models: the sizes of the papers, images of any shape, a start that the seed decides, and functions of the user's own."""

import os
import random
import re
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from bayesrule.recipes.models import MODELS, build, has_batch_norm
from bayesrule.recipes.residual import NORMS, RESIDUAL, FilterResponse, Pad, Threshold

NETS = [(name, "frn") for name in MODELS] + [(name, "batch") for name in RESIDUAL]


def count(model):
    return sum(p.numel() for p in model.parameters())


def spread(model):
    """Replace the weights of norms and thresholds, which all start alike, by different ones."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 20), (3, 100, 97)])
@pytest.mark.parametrize(("name", "norm"), NETS)
def test_gives_logits_of_each_example_by_itself(name, norm, shape):
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    model = build(name, shape, 7, norm=norm).eval()
    with torch.no_grad():
        outputs = model(images)
        assert outputs.shape == (3, 7) and outputs.isfinite().all()
        torch.testing.assert_close(outputs[:1], model(images[:1]), rtol=1e-4, atol=1e-4)
    assert has_batch_norm(model) == bool(list(model.buffers())) == (norm == "batch")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "norm", "size"),
    [
        ("mlp", (1, 8, 8), 10, "frn", 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("mlp", (14,), 2, "frn", 14 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2),
        ("lenet", (1, 28, 28), 10, "frn", 37_514),
        ("lenet", (1, 28, 28), 10, "batch", 37_514),
        ("lenet", (1, 16, 43), 10, "frn", 37_514 + 64 * (2 * 5 - 3 * 3) * 10),
        ("resnet20", (3, 32, 32), 10, "batch", 269_722),
        ("resnet20", (3, 32, 32), 10, "frn", 269_722 + 7 * 16 + 6 * 32 + 6 * 64),
        ("resnet20", (3, 224, 224), 10, "batch", 269_722),
        ("resnet18", (3, 224, 224), 1000, "batch", 11_689_512),
        ("resnet18", (3, 96, 128), 1000, "batch", 11_689_512),
        ("resnet18", (3, 95, 128), 1000, "batch", 11_689_512 - 3 * 64 * (49 - 9)),
        ("resnet50", (3, 224, 224), 1000, "batch", 25_557_032),
    ],
)
def test_has_the_size_of_the_paper(name, shape, classes, norm, size):
    assert count(build(name, shape, classes, norm=norm)) == size


@pytest.mark.parametrize(
    ("name", "side", "stages"),
    [
        ("resnet20", 32, [32, 16, 8]),
        ("resnet20", 112, [112, 56, 28]),
        ("resnet20", 4, [4, 2, 2]),
        ("resnet18", 224, [56, 28, 14, 7]),
        ("resnet18", 96, [24, 12, 6, 3]),
        ("resnet18", 28, [28, 14, 7, 4]),
        ("resnet50", 8, [8, 4, 2, 2]),
    ],
)
def test_halves_maps_of_more_than_two_pixels(name, side, stages):
    model, seen = build(name, (1, side, side), 2), []
    for module in model:
        if type(module).__name__ == "Block":
            module.register_forward_hook(lambda _, __, y: seen.append(y.shape[-1]))
    with torch.no_grad():
        model(torch.zeros(1, 1, side, side))
    assert seen == [size for size, depth in zip(stages, RESIDUAL[name].depths, strict=True) for _ in range(depth)]


def test_bottlenecks_stride_in_the_convolution_in_the_middle():
    strided = [m.kernel_size[0] for m in build("resnet50", (3, 32, 32), 2).modules() if getattr(m, "stride", 1) == (2, 2)]
    assert strided == [3, 1] * 3  # and in the shortcut beside it


@pytest.mark.parametrize("name", RESIDUAL)
def test_convolutions_start_after_he(name):
    for conv in (m for m in build(name, (3, 96, 96), 2).modules() if isinstance(m, nn.Conv2d)):
        target = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(target, rel=0.12) and conv.bias is None


class TestNorms:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
    def test_filter_response_and_threshold_are_the_formula(self, dtype, tolerance):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
        norm, rectify = spread(FilterResponse(3)).double(), spread(Threshold(3)).double()
        expected = torch.empty(2, 3, 4, 5, dtype=torch.float64)
        for n in range(2):
            for c in range(3):
                square = sum(v * v for v in x[n, c].flatten().tolist()) / 20
                y = norm.weight[c] * x[n, c].double() / (square + 1e-6) ** 0.5 + norm.bias[c]
                expected[n, c] = torch.where(y > rectify.tau[c], y, rectify.tau[c]).detach()
        got = rectify(norm.to(dtype)(x))
        assert got.dtype == dtype and (got == rectify.tau.to(dtype)[:, None, None]).any()
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)

    def test_starts_as_a_scale_and_a_rectifier(self):
        x = torch.tensor([3.0, -4.0]).reshape(1, 1, 1, 2)
        torch.testing.assert_close(Threshold(1)(FilterResponse(1)(x)).flatten(), torch.tensor([3 / 12.5**0.5, 0.0]))
        assert (FilterResponse(1)(torch.zeros(1, 1, 2, 2)) == 0).all()

    def test_the_square_does_not_overflow_in_half_precision(self):
        x = torch.full((1, 1, 2, 2), 1000.0, dtype=torch.float16)
        torch.testing.assert_close(FilterResponse(1)(x), torch.ones_like(x))

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_threshold_comes_after_the_sum(self, norm):
        block = spread(build("resnet20", (1, 8, 8), 2, norm=norm)).eval()[3]
        conv1, norm1, act1, conv2, norm2 = block.branch
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = block.rectify(x + norm2(conv2(act1(norm1(conv1(x))))))
        assert torch.equal(block(x), expected) and (norm2(conv2(x)) < 0).any()

    def test_the_shortcut_without_weights_averages_and_pads(self):
        x = torch.arange(6.0).reshape(1, 1, 2, 3)
        expected = torch.tensor([[2.0, 3.5], [0.0, 0.0]]).reshape(1, 2, 1, 2)
        assert torch.equal(Pad(1, 2, 2)(x), expected)
        assert torch.equal(Pad(1, 2, 1)(x)[:, :1], x)

    @pytest.mark.parametrize("name", RESIDUAL)
    @pytest.mark.parametrize("norm", NORMS)
    def test_bf16_autocast_and_channels_last_change_nothing_but_rounding(self, name, norm):
        model = spread(build(name, (3, 16, 16), 5, norm=norm)).eval()
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(x)
            scale = expected.abs().max().item()
            with torch.autocast("cpu", torch.bfloat16):
                inner = model[:3](x)
                half = model(x)
            assert inner.dtype == half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.15 * scale)
            model.to(memory_format=torch.channels_last)
            last = x.to(memory_format=torch.channels_last)
            assert model[:3](last).is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(model(last), expected, rtol=1e-3, atol=1e-4 * scale)

    def test_gradients_for_each_example_by_torch_func(self):
        model = spread(build("resnet20", (1, 4, 4), 3)).double()
        x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, x):
            return functional_call(model, weights, (x[None],)).square().sum()

        each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(2, 2)), False),
        (nn.Sequential(nn.GroupNorm(1, 2)), False),
        (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), False),
        (nn.Sequential(nn.Sequential(nn.BatchNorm1d(2))), True),
        (nn.BatchNorm3d(2), True),
    ],
)
def test_batch_norm_is_seen_where_it_keeps_statistics(model, expected):
    assert has_batch_norm(model) is expected


class TestStart:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_seed_decides_and_the_global_generator_stays(self, name):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, again, other = (next(build(name, (1, 8, 8), 2, seed).parameters()) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(("name", "size"), [("mlp", 8), ("lenet", 8), ("lenet", 28)])
    def test_mlp_and_lenet_start_as_a_row_of_layers_made_in_order(self, name, size):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            if name == "mlp":
                layers = [nn.Linear(size * size, 128), nn.Linear(128, 128), nn.Linear(128, 10)]
            else:
                layers = [nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5), nn.Conv2d(32, 64, 3), nn.Linear(64 * (size // 8) ** 2, 10)]
        expected = [p for layer in layers for p in layer.parameters()]
        got = list(build(name, (1, size, size), 10, seed=3).parameters())
        assert len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("name", "shape", "norm", "message"),
    [
        ("resnet", (1, 8, 8), "frn", "unknown model 'resnet'; did you mean 'resnet"),
        ("mlp", (4,), "group", "unknown norm 'group'; there are: batch, frn"),
        ("mlp", (4,), "bach", "unknown norm 'bach'; did you mean 'batch'?"),
        ("lenet", (3, 5, 7), "frn", "lenet needs images of at least 8 x 8 pixels, got 5 x 7; take mlp"),
        ("lenet", (3, 28, 7), "frn", "lenet needs images of at least 8 x 8 pixels, got 28 x 7; take mlp"),
        ("resnet18", (3, 1, 9), "frn", "resnet18 needs images of at least 2 x 2 pixels, got 1 x 9; take mlp"),
        *(
            (name, (14,), "frn", f"{name} needs images, and the data are rows of 14 numbers; take --model mlp")
            for name in MODELS
            if name != "mlp"
        ),
    ],
)
def test_refuses(name, shape, norm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, shape, 2, norm=norm)


OWN = """
import torch
from torch import nn

number = 3

class Late(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.one = nn.Linear(*shape, classes)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        self.made = torch.rand(())
        return self.one(x)

def small(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, classes))

def conv(shape, classes):
    c, h, w = shape
    return nn.Sequential(nn.Conv2d(c, 2, 3), nn.Flatten(), nn.Linear(2 * (h - 2) * (w - 2), classes))

def mixed(shape, classes):
    model = small(shape, classes).eval()
    model[1].train()
    return model

def lazy(shape, classes):
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(classes))

def nothing(shape):
    return small(shape, 2)

def fails(shape, classes):
    return inner(shape)

def inner(shape):
    raise KeyError("first\\n  second")

def numbers(shape, classes):
    return [1, 2]

def bare(shape, classes):
    return nn.ReLU()

def frozen(shape, classes):
    return small(shape, classes).requires_grad_(False)

def short(shape, classes):
    return small(shape, classes - 1)

def flat(shape, classes):
    return nn.Sequential(small(shape, classes), nn.Flatten(0))

def pair(shape, classes):
    return nn.LSTM(*shape, classes)

def narrow(shape, classes):
    return nn.Linear(1, classes)

class Raises(Late):
    def forward(self, x):
        raise RuntimeError("no way")

class Nan(Late):
    def forward(self, x):
        return self.one(x) / x.norm() * 0
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The name of a package of models in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    name = f"own_{random.Random(os.getpid()).getrandbits(40)}"
    sub = folder / name / "sub"
    sub.mkdir(parents=True)
    for path, text in {
        "__init__.py": "",
        "nets.py": OWN,
        "sub/__init__.py": "",
        "sub/deep.py": "from ..nets import small as again",
        "raises.py": "x = 1\nraise OSError('no\\ndisk')",
        "needs.py": "import surely_not_there",
        "leaves.py": "import sys\nsys.exit(2)",
        "syntax.py": "def f(:\n",
    }.items():
        (folder / name / path).write_text(text)
    before = sys.path.copy()
    yield folder, name
    sys.path[:] = before
    for each in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[each]


@pytest.fixture
def here(package, monkeypatch):
    monkeypatch.chdir(package[0])
    return package[1]


class TestOwn:
    @pytest.mark.parametrize("place", ["nets:small", "sub.deep:again"])
    def test_is_made_with_the_seed_and_left_as_it_was_made(self, here, place):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, again, other = (build(f"{here}.{place}", (5,), 3, seed) for seed in (0, 0, 1))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)
        assert first(torch.zeros(2, 5)).shape == (2, 3)
        assert os.getcwd() in sys.path and sys.path.count(os.getcwd()) == 1

    @pytest.mark.parametrize(
        ("make", "modes"), [("small", [True, True, True, True, True]), ("mixed", [False, False, True, False, False])]
    )
    def test_keeps_its_modes(self, here, make, modes):
        assert [m.training for m in build(f"{here}.nets:{make}", (5,), 3).modules()] == modes

    def test_may_be_a_class_and_keeps_its_buffers_and_torchs_generator(self, here):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model = build(f"{here}.nets:Late", (5,), 3)
        assert hasattr(model, "made") and model.calls == 0
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_may_be_lazy(self, here):
        model = build(f"{here}.nets:lazy", (5,), 3)
        assert count(model) == 5 * 4 + 4 + 4 + 4 + 4 * 3 + 3
        assert torch.equal(model[0].weight, build(f"{here}.nets:lazy", (5,), 3)[0].weight)

    def test_is_given_shape_and_classes_of_images(self, here):
        assert build(f"{here}.nets:conv", (3, 6, 9), 4)(torch.zeros(5, 3, 6, 9)).shape == (5, 4)

    @pytest.mark.parametrize(
        ("place", "parts"),
        [
            (".nets:", ["names no function; write package.module:function"]),
            (".nets:a:b", ["names no function"]),
            ("..nets:small", ["names no function"]),
            (".nts:small", ["there is no module '{p}.nts'", "looked in {here}"]),
            ("x.nets:small", ["there is no module '{p}x.nets'"]),
            (".nets.py:small", ["there is no module '{p}.nets.py'", "name the module, not its file: {p}.nets:small"]),
            (".raises:f", ["the module of {p}.raises:f cannot be imported: OSError: no disk", "raises.py:2"]),
            (".needs:f", ["cannot be imported: ModuleNotFoundError: No module named 'surely_not_there'", "needs.py:1"]),
            (".leaves:f", ["cannot be imported: SystemExit: 2", "leaves.py:2"]),
            (".syntax:f", ["cannot be imported: SyntaxError", "syntax.py, line 1"]),
            (".nets:smal", ["{p}.nets has no function 'smal'; did you mean 'small'?"]),
            (".nets:qqqqqqq", ["{p}.nets has no function 'qqqqqqq'; there are: Late, Nan, Raises, bare,"]),
            (".sub:f", ["{p}.sub has no function 'f'; there are: none"]),
            (".nets:number", ["{p}.nets:number is no function but of type int"]),
            (".nets:nothing", ["called with ((5,), 3), failed: TypeError: nothing() takes 1 positional argument but 2 were given"]),
            (
                ".nets:fails",
                [
                    "called with ((5,), 3), failed: KeyError: 'first\\n second'",
                    f"nets.py:{OWN.split('raise KeyError')[0].count(chr(10)) + 1}",
                ],
            ),
            (".nets:numbers", ["{p}.nets:numbers returned list, not a model", "must return a torch.nn.Module"]),
            (".nets:bare", ["{p}.nets:bare returned a ReLU without parameters to learn"]),
            (".nets:frozen", ["returned a Sequential without parameters to learn; give it some that require gradients"]),
            (".nets:short", ["gave outputs of shape (2, 2) for inputs of shape (2, 5), not (2, 3)"]),
            (".nets:flat", ["gave outputs of shape (6,) for inputs of shape (2, 5), not (2, 3)"]),
            (".nets:pair", ["gave tuple for inputs of shape (2, 5), not a tensor"]),
            (".nets:narrow", ["failed on inputs of shape (2, 5): RuntimeError: mat1 and mat2"]),
            (".nets:Raises", ["failed on inputs of shape (2, 5): RuntimeError: no way", "nets.py:"]),
            (".nets:Nan", ["gave outputs that are not finite for inputs of zeros, shape (2, 5)"]),
        ],
    )
    def test_says_in_one_line_what_is_wrong(self, here, place, parts):
        with pytest.raises(ValueError) as caught:
            build(f"{here}{place}", (5,), 3)
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part.replace("{p}", here).replace("{here}", os.getcwd()) in message.replace("\\\\n", "\\n")

    def test_a_wrong_call_is_not_blamed_on_this_library(self, here):
        with pytest.raises(ValueError) as caught:
            build(f"{here}.nets:nothing", (5,), 3)
        assert ".py:" not in str(caught.value)


def test_probabilities_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "soft_nets.py").write_text(
        "from torch import nn\ndef soft(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Softmax(1))\n"
    )
    with pytest.raises(ValueError, match=r"soft_nets:soft gave outputs that sum to 1 .* drop the softmax"):
        build("soft_nets:soft", (1, 8, 8), 3)
