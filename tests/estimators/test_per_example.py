"""Quantities of single examples against gradients that are formed one by one."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import close, normal
from tests.estimators.architectures import DOUBLE, EXAMPLES, FORMLESS, MLP, NAMES, Twice, made
from torch import nn
from torch.nn import functional as F

from bayesrule.estimators.layers import layer_of
from bayesrule.estimators.per_example import Squares, inner_products, variances

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of even kernels


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def like(model, seed):
    return {name: normal(seed + number, *p.shape) for number, (name, p) in enumerate(trainable(model).items())}


def jacobians(model, x):
    """By name, (B, K, *S): backward for one output of one example after another."""
    params = trainable(model)
    found = {name: [p.new_zeros(0, model(x).shape[1], *p.shape)] for name, p in params.items()}
    for i in range(len(x)):
        f = model(x[i : i + 1])[0]
        rows = [torch.autograd.grad(out, list(params.values()), retain_graph=True, materialize_grads=True) for out in f]
        for name, *of in zip(params, *rows, strict=True):
            found[name].append(torch.stack(of)[None])
    return {name: torch.cat(parts).detach() for name, parts in found.items()}


def loss(f):
    return (f.sin() + f.square()).sum(1)


def loss_gradients(model, x):
    f = model(x).detach()
    return {name: torch.einsum("bk,bk...->b...", f.cos() + 2 * f, j) for name, j in jacobians(model, x).items()}


def quiet(name):
    """Expects the one warning, where there should be one."""
    if name not in FORMLESS:
        return warnings.catch_warnings()
    return pytest.warns(UserWarning, match=f"^no closed form for {FORMLESS[name][2]}: ")


def tight(found, expected):
    assert found.shape == expected.shape
    close(found, expected, 1e-10)


@pytest.mark.parametrize("chunk", [1, None])
@pytest.mark.parametrize("name", NAMES)
class TestAgainstGradientsOneByOne:
    def test_squares(self, name, chunk):
        model, x = made(name)
        squares = Squares(model, chunk=chunk)
        with quiet(name) as found, squares.recording():
            loss(model(x)).mean().backward()
        assert name not in FORMLESS or len(found) == 1
        with squares.recording(scale=0.5):  # warns no more, and adds up
            loss(model(x)).sum().mul(2).backward()
        assert squares.examples == 2 * len(x)
        gradients = loss_gradients(model, x)
        assert set(squares.sums) == set(trainable(model).values())
        for key, p in trainable(model).items():
            tight(squares.sums[p], 2 * gradients[key].square().sum(0))

    def test_inner_products(self, name, chunk):
        model, x = made(name)
        u, gradients = like(model, 20), loss_gradients(model, x)
        with quiet(name):
            found = inner_products(model, lambda: loss(model(x)), u, chunk=chunk)
        tight(found, sum((gradients[key] * u[key]).flatten(1).sum(1) for key in u))

    def test_variances(self, name, chunk):
        model, x = made(name)
        s, rows = {key: value.exp() for key, value in like(model, 20).items()}, jacobians(model, x)
        with quiet(name):
            found = variances(model, lambda: model(x), s, chunk=chunk)
        expected = sum((rows[key].square() * s[key]).flatten(2).sum(2) for key in s)
        tight(found, expected)
        with quiet(name):
            tight(variances(model, lambda: model(x)[:, 1], s, chunk=chunk), expected[:, 1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:no closed form")
def test_the_gradient_is_that_of_an_ordinary_backward(name):
    """To the last bit, in float32; and no hook is left."""
    model, x = made(name)
    model, x = model.float(), x if x.dtype == torch.int64 else x.float()
    found = []
    for record in (False, True):
        model.zero_grad()
        with Squares(model).recording() if record else warnings.catch_warnings():
            loss(model(x)).mean().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert all(a is b is None or torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*found, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def linear_case(outward, inward, places, bias):
    return nn.Linear(inward, outward, bias=bias), (*places, inward)


def convolution_case(groups, channels, kernel, stride, dilation, padding):
    if padding == "same":
        stride = 1
    layer = nn.Conv2d(groups * channels, 2 * groups, kernel, stride, padding, dilation, groups)
    return layer, (groups * channels, 7, 8)


SIZE, PAIR = st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDING = st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"]))
LAYERS = st.one_of(
    st.builds(linear_case, SIZE, SIZE, st.lists(st.integers(0, 3), max_size=3), st.booleans()),
    st.builds(convolution_case, SIZE, SIZE, PAIR, PAIR, PAIR, PADDING),
)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(1, 4), st.sampled_from([1, 400, 10**6]))
def test_any_shape(case, examples, chunk):
    layer, shape = case
    layer, x = layer.to(DOUBLE), normal(1, examples, *shape)
    model = nn.Sequential(nn.Tanh(), layer, nn.Tanh(), nn.Flatten())
    weights = normal(9, *model(x).shape[1:], 2) if x.numel() else torch.zeros(*model(x).shape[1:], 2, dtype=DOUBLE)
    rows = jacobians(nn.Sequential(model, Product(weights)), x)
    s = {name.removeprefix("0."): normal(3 + i, *p.shape[2:]).exp() for i, (name, p) in enumerate(rows.items())}
    expected = sum((rows[f"0.{name}"].square() * s[name]).flatten(2).sum(2) for name in s)
    tight(variances(model, lambda: model(x) @ weights, s, chunk=chunk), expected)


class Product(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x):
        return x @ self.weights


class TestRecordings:
    def test_calls_before_one_backward_are_of_the_same_examples(self):
        model, x = MLP().to(DOUBLE), normal(1, EXAMPLES, 3)
        pair, squares = nn.Sequential(Siamese(model)), Squares(model)
        with squares.recording():
            (loss(model(x)) + loss(model(-x))).mean().backward()
        for name, g in loss_gradients_of(pair, x).items():
            tight(squares.sums[dict(pair.named_parameters())[name]], g.square().sum(0))

    def test_calls_after_a_backward_are_of_others(self):
        model, x = MLP().to(DOUBLE), normal(1, EXAMPLES, 3)
        one, two = Squares(model), Squares(model)
        with one.recording():
            loss(model(x)).mean().backward()
        with two.recording():
            for part in (x[:2], x[2:]):
                loss(model(part)).mean().backward()
        assert one.examples == two.examples == EXAMPLES
        for p in model.parameters():
            tight(two.sums[p], one.sums[p])

    def test_an_exception_leaves_neither_sums_nor_hooks(self):
        model, x = MLP().to(DOUBLE), normal(1, EXAMPLES, 3)
        squares = Squares(model)
        with pytest.raises(KeyError), squares.recording():
            f = loss(model(x)).mean()
            f.backward(retain_graph=True)
            raise KeyError
        assert not squares.sums and squares.examples == 0
        f.backward()
        assert not squares.sums
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_forward_that_fails_and_is_caught_is_forgotten(self):
        model, x = MLP().to(DOUBLE), normal(1, EXAMPLES, 3)
        squares = Squares(model)
        with squares.recording():
            with pytest.raises(RuntimeError, match="shapes"):
                model(x.T)
            loss(model(x)).mean().backward()
        for name, p in model.named_parameters():
            tight(squares.sums[p], loss_gradients(model, x)[name].square().sum(0))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, reentrant):
        model, x = Twice(1).to(DOUBLE), normal(1, EXAMPLES, 4).requires_grad_()
        squares = Squares(model)
        with squares.recording():
            loss(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)).mean().backward()
        for name, p in model.named_parameters():
            tight(squares.sums[p], loss_gradients(model, x)[name].square().sum(0))

    def test_autocast_sums_in_float32(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(MLP(), Scale()), normal(1, 64, 3).float()
        exact, squares = Squares(model), Squares(model)
        with warnings.catch_warnings(action="ignore"), exact.recording():
            loss(model(x)).mean().backward()
        with warnings.catch_warnings(action="ignore"), squares.recording():
            with torch.autocast("cpu", torch.bfloat16):
                f = model(x)
            loss(f.float()).mean().backward()
        for p in model.parameters():
            assert squares.sums[p].dtype == torch.float32
            assert (squares.sums[p] - exact.sums[p]).norm() < 0.05 * exact.sums[p].norm()

    def test_clear(self):
        squares = Squares(nn.Linear(2, 1))
        with squares.recording():
            squares.model(torch.ones(3, 2)).mean().backward()
        squares.clear()
        assert not squares.sums and squares.examples == 0


class Siamese(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), self.model(-x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return F.linear(x, torch.eye(3)) * self.scale


def loss_gradients_of(pair, x):
    params = {name: p.detach() for name, p in pair.named_parameters()}
    single = lambda p, x: sum(map(loss, torch.func.functional_call(pair, p, x[None])))[0]  # noqa: E731
    return torch.func.vmap(torch.func.grad(single), (None, 0))(params, x)


class TestRefusals:
    x = normal(1, EXAMPLES, 3).float()

    def refuses(self, model, words, call=None, error=RuntimeError):
        with warnings.catch_warnings(action="ignore"), pytest.raises(error, match=words), Squares(model).recording():
            (call or model)(self.x).mean().backward()

    def test_norms_in_training_mode(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.refuses(model, r"BatchNorm1d in training mode mixes .* call eval\(\)")
        for p in model[1].parameters():
            p.requires_grad_(False)
        self.refuses(model, "BatchNorm1d")

    def test_parameters_outside_of_the_model(self):
        model = nn.Linear(3, 2)
        self.refuses(model, "'weight' is used outside", lambda x: model(x).mean() + model.weight.square().sum())

    def test_other_numbers_of_examples(self):
        model = nn.Linear(3, 2)
        self.refuses(model, "with 5 and with 2", lambda x: model(x).mean() + model(x[:2]).mean())
        with pytest.raises(ValueError, match="5 examples, and the numbers of 2"):
            variances(model, lambda: model(self.x)[:2], {"bias": torch.ones(2)})

    def test_randomness_where_there_is_no_form(self):
        model = nn.Sequential(Scale(), nn.Linear(3, 1))
        model[0].forward = lambda x: F.dropout(x * model[0].scale)
        self.refuses(model, "Scale has no per-example gradients: .*vmap fails")

    def test_inputs_that_are_written_to(self):
        model, x = nn.Linear(3, 2), self.x.clone()
        with pytest.raises(RuntimeError, match="input of Linear was written"):
            variances(model, lambda: (model(x), x.add_(1))[0], {"bias": torch.ones(2)})

    def test_two_backwards(self):
        model = nn.Linear(3, 2)
        self.refuses(model, "came back twice", lambda x: (f := model(x).mean(), f.backward(retain_graph=True))[0])

    @pytest.mark.parametrize(
        "weights, words",
        [
            ({"nobody": torch.ones(2)}, "'nobody', which the model does not have"),
            ({"bias": torch.ones(3)}, r"'bias' has shape \(3,\), and the parameter \(2,\)"),
            ({"weight": torch.ones(2, 3)}, "'weight', which is frozen"),
        ],
    )
    def test_weights_that_do_not_suit(self, weights, words):
        model = nn.Linear(3, 2)
        model.weight.requires_grad_(False)
        with pytest.raises(ValueError, match=words):
            inner_products(model, lambda: model(self.x).sum(1), weights)

    def test_outputs_of_another_shape(self):
        model = nn.Linear(3, 2)
        with pytest.raises(ValueError, match=r"shape \(B, K\); got \(\)"):
            variances(model, lambda: model(self.x).mean(), {"bias": torch.ones(2)})
        with pytest.raises(ValueError, match="at least 1 byte, got 0"):
            Squares(model, chunk=0)


def test_a_module_with_a_forward_of_its_own_is_no_layer():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    assert layer_of(nn.Linear(2, 1)) is not None
    assert layer_of(Own(2, 1)) is None
    assert layer_of(nn.Embedding(2, 1, scale_grad_by_freq=True)) is None


def test_prelu_whose_nested_vmap_is_wrong_has_right_squares():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = Squares(model)
    with pytest.warns(UserWarning, match="PReLU"), squares.recording():
        model(x).square().sum(1).mean().backward()
    for name, p in model.named_parameters():
        each = [torch.autograd.grad(model(row[None]).square().sum(), p)[0].square() for row in x]
        torch.testing.assert_close(squares.sums[p], torch.stack(each).sum(0), msg=name)


def test_a_parameter_that_a_layer_does_not_know_has_no_part():
    model, x = MLP().to(DOUBLE), normal(0, 4, 3)
    model[0].spare = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    variance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with_it = variances(model, lambda: model(x), variance)
    del variance["0.spare"]
    tight(variances(model, lambda: model(x), variance), with_it)
