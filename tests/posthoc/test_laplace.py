"""Laplace's approximation against closed forms, dense Hessians and laplace-torch, structure by structure."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.contracts import close, normal
from tests.estimators.architectures import NAMES, made
from tests.estimators.test_per_example import jacobians
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import bayesrule as br
from bayesrule.estimators.data_curvature import Matrix

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "laplace_torch.json").read_text())
STRUCTURES = ("diag", "kron", "last_layer", "full")
LOSSES = ("cross_entropy", "mse")
structures = pytest.mark.parametrize("structure", STRUCTURES)
losses = pytest.mark.parametrize("loss", LOSSES)
OTHERS = ("frozen", "no example")  # the dense matrices are of all parameters, and of some examples

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:no closed form for")


def targets(outputs, loss):
    if loss == "cross_entropy":
        return (torch.arange(outputs[..., 0].numel()) % outputs.shape[-1]).view(outputs.shape[:-1])
    return normal(5, *outputs.shape)


def row(model, named):
    return torch.cat([named[name].reshape(-1) for name, _ in model.named_parameters()])


def named(model, values):
    params = dict(model.named_parameters())
    pieces = values.split([p.numel() for p in params.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}


def covariance(post, model):
    size = sum(p.numel() for p in model.parameters())
    return torch.stack([row(model, post.matvec(named(model, e))) for e in torch.eye(size, dtype=torch.float64)])


def gauss_newton(model, x, loss, noise_variance=1.0):
    """Dense, of the sum: Jacobians row by row, second derivatives of the loss by hand."""
    J = torch.cat([j.flatten(2) for j in jacobians(model, x).values()], 2)
    if loss == "mse":
        return torch.einsum("nkp,nkq->pq", J, J) / noise_variance
    p = model(x).detach().softmax(-1)
    return torch.einsum("nkp,nkl,nlq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()


def data(model, x, loss="cross_entropy", size=4):
    return list(zip(x.split(size), targets(model(x).detach(), loss).split(size), strict=True))


X = normal(0, 9, 3)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(3, 3, 2).double()

    def forward(self, x):
        return self.pair(x, x)


# Closed forms


@pytest.mark.parametrize("structure", ["full", "last_layer"])
def test_of_a_linear_model_it_is_the_posterior(structure):
    """Ridge regression, whose curvature is exact."""
    model, y = nn.Linear(3, 1, bias=False).double(), normal(1, 9)
    exact = br.ridge(X, y, penalty=2.0, noise_variance=0.5)
    with torch.no_grad():
        model.weight.copy_(exact.mean[None])
    post = br.Posterior.laplace(model, [(X, y[:, None])], structure, 2.0 / 0.5, "mse", noise_variance=0.5)
    close(covariance(post, model), exact.covariance, 1e-9)
    assert (post.ess, post.num_data, post.method_hint, post.noise_variance) == (9.0, 9, "glm", (0.5,))


@structures
def test_of_logistic_regression_it_has_the_hessian(structure):
    """Of linear outputs the Gauss-Newton matrix is the Hessian."""
    model = nn.Linear(3, 4).double()
    y = torch.arange(9) % 4

    def loss(values):
        return F.cross_entropy(functional_call(model, named(model, values), (X,)), y, reduction="sum")

    exact = jacrev(jacrev(loss))(row(model, dict(model.named_parameters())).detach()) + 0.5 * torch.eye(16, dtype=torch.float64)
    post = br.Posterior.laplace(model, zip(X.split(4), y.split(4), strict=True), structure, 0.5)
    if structure in ("full", "last_layer"):
        close(covariance(post, model), exact.inverse(), 1e-9)
    else:
        close(row(model, post.precision)[12:], exact.diagonal()[12:], 1e-9)  # K-FAC's block of the bias is exact
    if structure == "diag":
        close(row(model, post.precision), exact.diagonal(), 1e-9)
        close(covariance(post, model), (1 / exact.diagonal()).diag(), 1e-9)


def test_kronecker_factors_are_exact_for_one_example_of_one_output():
    model, x = nn.Linear(3, 1).double(), X[:1]
    post = br.Posterior.laplace(model, [(x, torch.ones(1, 1, dtype=torch.float64))], "kron", 0.5, "mse")
    weight = x.T @ x + 0.5 * torch.eye(3, dtype=torch.float64)
    close(covariance(post, model)[:3, :3], weight.inverse(), 1e-9)
    close(covariance(post, model)[3:, 3:], torch.tensor([[1 / 1.5]], dtype=torch.float64), 1e-9)
    close(covariance(post, model)[:3, 3:], torch.zeros(3, 1, dtype=torch.float64), 1e-12)


@losses
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERS])
def test_diagonal_and_matrix_are_those_of_the_dense_gauss_newton_matrix(name, loss):
    """Every kind of layer, weights that are used twice, modules without a closed form."""
    model, x = made(name)
    model.eval()
    exact = gauss_newton(model, x, loss, 0.7)
    for structure in ("diag", "full"):
        post = br.Posterior.laplace(model, data(model, x, loss, 3), structure, 0.25, loss, noise_variance=0.7)
        close(row(model, post.precision), exact.diagonal() + 0.25, 1e-8)
    direction = normal(7, len(exact))
    found = row(model, post.matvec(named(model, direction)))
    close(found, torch.linalg.solve(exact + 0.25 * torch.eye(len(exact), dtype=torch.float64), direction), 1e-7)


@losses
def test_of_sequences_positions_of_one_example_belong_together(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = normal(3, 5, 3, 3)
    params = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    J = torch.cat([j.reshape(5, 3, 2, -1) for j in J.values()], 3)
    p = model(x).detach().softmax(-1)
    L = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    L = L if loss == "cross_entropy" else torch.eye(2, dtype=torch.float64).expand(L.shape)
    exact = torch.einsum("ntkp,ntkl,ntlq->pq", J, L, J)
    post = br.Posterior.laplace(model, data(model, x, loss, 2), "full", 1.0, loss)
    close(covariance(post, model), (exact + torch.eye(len(exact), dtype=torch.float64)).inverse(), 1e-8)


def test_a_loss_of_ones_own_is_the_named_one():
    def own(f, y):
        return F.cross_entropy(f, y, reduction="none")

    model = network()
    for structure, curvature in itertools.product(STRUCTURES, ("ggn", "empirical")):
        posts = [
            br.Posterior.laplace(model, data(model, X), structure, loss=f, curvature=curvature) for f in ("cross_entropy", own)
        ]
        close(row(model, posts[0].variance), row(model, posts[1].variance), 1e-8)


@losses
def test_empirical_curvature_is_the_sum_of_squared_gradients(loss):
    model = network()
    y = targets(model(X), loss).detach()
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, one in zip(X, y, strict=True):
        value = F.cross_entropy(model(x), one) if loss == "cross_entropy" else (model(x) - one).square().sum() / 2
        for square, g in zip(squares.values(), torch.autograd.grad(value, list(model.parameters())), strict=True):
            square += g**2
    post = br.Posterior.laplace(model, [(X, y)], "diag", 0.5, loss, curvature="empirical")
    close(row(model, post.precision), row(model, squares) + 0.5, 1e-10)


@losses
def test_labels_that_the_model_draws_give_the_gauss_newton_matrix_on_average(loss):
    """Within 5 standard errors of 300 draws of the labels."""
    model = network()
    exact = br.Posterior.laplace(model, data(model, X, loss), "diag", 1.0, loss)
    each = torch.stack(
        [
            row(model, br.Posterior.laplace(model, data(model, X, loss), "diag", 1.0, loss, curvature="fisher", seed=s).precision)
            for s in range(300)
        ]
    )
    gap = (each.mean(0) - row(model, exact.precision)) / (each.std(0) / 300**0.5)
    assert gap.abs().max() < 5
    assert each.std(0).min() > 0


@structures
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['net']}-{case['likelihood']}")
def test_it_is_laplace_torchs(case, structure):
    loss = {"classification": "cross_entropy", "regression": "mse"}[case["likelihood"]]
    nets = {
        "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        "cnn": lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
    }
    model = nets[case["net"]]().double().eval()
    with torch.no_grad():
        for p, value in zip(model.parameters(), named(model, torch.tensor(case["weights"]).double()).values(), strict=True):
            p.copy_(value)
    wide = torch.float64
    x = torch.tensor(case["inputs"], dtype=wide)
    y = torch.tensor(case["targets"]) if loss == "cross_entropy" else torch.tensor(case["targets"], dtype=wide)
    batches = list(zip(x.split(2), y.split(2), strict=True))
    post = br.Posterior.laplace(model, batches, structure, 2.0, loss)
    size = sum(p.numel() for p in model.parameters())
    expected = torch.tensor(case[structure]["covariance_times_direction"], dtype=wide)
    found = row(model, post.matvec(named(model, torch.linspace(-1, 1, size, dtype=wide))))[-len(expected) :]
    differs = structure == "kron" and case["net"] == "cnn"  # theirs has the bias's positions apart, ours its block exactly
    found, expected = (torch.cat([t[:8], t[10:]]) if differs else t for t in (found, expected))
    close(found, expected, 1e-7)
    if not differs:
        best = br.Posterior.laplace(model, batches, structure, "marglik", loss)
        assert float(best.prior_precision["0.bias"]) == pytest.approx(case[structure]["marglik"], rel=1e-6)


@structures
def test_the_evidence_is_largest_where_it_says(structure):
    model = network()
    best = br.Posterior.laplace(model, data(model, X), structure, "marglik")
    delta = float(best.prior_precision["0.weight"])
    own = [name for name in best.mean if not best.precision[name].isinf().any()]

    def evidence(prior):
        post = br.Posterior.laplace(model, data(model, X), structure, prior)
        size = sum(post.mean[name].numel() for name in own)
        square = sum(float((post.mean[name] ** 2).sum()) for name in own)
        wanted = [row(model, named(model, e)) for e in torch.eye(31, dtype=torch.float64)]
        block = torch.stack([row(model, post.matvec(named(model, e))) for e in wanted])
        kept = torch.cat([torch.full((post.mean[n].numel(),), n in own) for n in post.mean])
        log_det = -torch.linalg.slogdet(block[kept][:, kept])[1]
        return (size * math.log(prior) - float(log_det) - prior * square) / 2

    assert evidence(delta) > max(evidence(delta * 1.01), evidence(delta / 1.01))


# What is left alone, files, predictions


def test_frozen_weights_and_those_of_other_layers_are_known_exactly_everywhere(tmp_path):
    model = network()
    model[0].bias.requires_grad_(False)
    for structure in STRUCTURES:
        post = br.Posterior.laplace(model, data(model, X), structure)
        post.save(tmp_path / "p.safetensors")
        for p in (post, br.Posterior.load(tmp_path / "p.safetensors")):
            assert torch.equal(p.sample(0)["0.bias"], model[0].bias)
            assert not p.variance["0.bias"].any()
            assert p.variance["2.weight"].all()
            assert p.variance["0.weight"].any() == (structure != "last_layer")
            assert p.rescale(ess=90).precision["0.bias"].isinf().all()
            assert br.predict(model, p, X, "mc", 4).probs.isfinite().all()
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


@structures
def test_a_file_keeps_all_of_it(structure, tmp_path):
    model = network()
    post = br.Posterior.laplace(model, data(model, X), structure, 3.0)
    post.save(tmp_path / "p.safetensors")
    again = br.Posterior.load(tmp_path / "p.safetensors")
    assert (again.method_hint, again.ess, again.num_data, again.structure) == ("glm", 9.0, 9, post.structure)
    assert again.noise_variance is None
    assert set(map(float, again.prior_precision.values())) == {3.0}
    close(covariance(again, model), covariance(post, model), 1e-12)
    one, two = (br.predict(model, p, X, "mc", 4).probs for p in (post, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("hint", ["laplace", 3])
def test_a_file_with_another_hint_is_refused(hint, tmp_path):
    path = tmp_path / "p.safetensors"
    br.Posterior.laplace(network(), data(network(), X)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["bayesrule"])  # noqa: SIM118
    assert about["method_hint"] == "glm"
    save_file(tensors, path, {"bayesrule": json.dumps({**about, "method_hint": hint})})
    with pytest.raises(ValueError, match=rf"p\.safetensors.*method_hint.*{hint!r}"):
        br.Posterior.load(path)
    del about["method_hint"]
    save_file(tensors, path, {"bayesrule": json.dumps(about)})
    assert br.Posterior.load(path).method_hint is None


@structures
def test_batches_may_be_of_any_size_and_come_once(structure):
    model = network()
    whole, parts = (br.Posterior.laplace(model, iter(data(model, X, size=size)), structure) for size in (9, 2))
    close(row(model, whole.variance), row(model, parts.variance), 1e-10)


@structures
def test_a_sample_of_the_data_is_scaled_up(structure):
    model = network()
    some = br.Posterior.laplace(model, data(model, X), structure, num_data=90)
    often = br.Posterior.laplace(model, data(model, X) * 10, structure)
    assert (some.ess, some.num_data) == (90.0, 90)
    close(row(model, some.variance), row(model, often.variance), 1e-9)


def test_a_prior_by_name_is_each_parameters():
    model = network()
    prior = {name: 1.0 + number for number, (name, _) in enumerate(model.named_parameters())}
    for structure in ("diag", "kron", "full"):
        one, other = (br.Posterior.laplace(model, data(model, X), structure, p) for p in (prior, 1.0))
        for name, number in prior.items():
            assert float(one.prior_precision[name]) == number
            close(one.precision[name], other.precision[name] + number - 1, 1e-9)


def test_what_has_no_factors_keeps_its_exact_diagonal_beside_them():
    """Embeddings, norms, and a weight that nothing uses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)).double()
    model[1].spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    batches = [(torch.arange(12).view(6, 2) % 5, torch.arange(6) % 3)]
    kron, diag = (br.Posterior.laplace(model, batches, structure) for structure in ("kron", "diag"))
    assert kron.structure == "eigen+diag"
    for name in ("0.weight", "1.weight", "1.bias", "3.bias"):
        close(kron.precision[name], diag.precision[name], 1e-10)
    assert kron.precision["1.spare"].tolist() == [1.0, 1.0]
    assert kron.parts[0].names == ("3.weight", "3.bias")


def test_modules_without_a_closed_form_are_told_once_for_all_batches():
    with pytest.warns(UserWarning, match="^no closed form for Bilinear") as told:
        br.Posterior.laplace(Pair(), data(Pair(), X, size=2), "full")
    assert [(warning.filename, str(warning.message)[:30]) for warning in told] == [(__file__, "no closed form for Bilinear: t")]


def test_a_mixture_of_them_is_drawn_from():
    post = br.Posterior.laplace(network(), data(network(), X))
    assert br.Posterior.mixture([post, post]).method_hint == "mc"


def test_another_layer_by_name():
    model = network()
    post = br.Posterior.laplace(model, data(model, X), "last_layer", layer="0")
    assert [name for name in post.mean if not post.precision[name].isinf().any()] == ["0.weight", "0.bias"]


def test_weights_of_16_bits_have_a_posterior_of_32():
    model = network().to(torch.bfloat16)
    batches = [(X.bfloat16(), torch.arange(9) % 3)]
    for structure in STRUCTURES:
        post = br.Posterior.laplace(model, batches, structure)
        assert {t.dtype for t in (*post.mean.values(), *post.variance.values())} == {torch.float32}


def test_axes_that_are_too_long_keep_the_diagonal_of_their_factor(monkeypatch):
    monkeypatch.setattr("bayesrule.estimators.data_curvature.LONGEST", 3)
    model = network()
    post = br.Posterior.laplace(model, data(model, X), "kron")
    short = post.parts[0].q.basis.parts
    assert [[axis is not None for axis in basis.axes] for basis in short] == [[False, True], [False], [True, False], [True]]
    monkeypatch.undo()
    close(row(model, post.precision), row(model, br.Posterior.laplace(model, data(model, X), "kron").precision), 1e-9)


@structures
@losses
def test_little_room_changes_nothing(structure, loss, monkeypatch):
    """Columns one after the other, and rows."""
    model = network()
    whole = br.Posterior.laplace(model, data(model, X, loss), structure, 1.0, loss)
    monkeypatch.setattr("bayesrule.estimators.data_curvature.CHUNK", 1)
    monkeypatch.setattr("bayesrule.estimators.per_example.KEPT", 1)
    tight = br.Posterior.laplace(model, data(model, X, loss), structure, 1.0, loss)
    close(row(model, tight.precision), row(model, whole.precision), 1e-10)
    direction = named(model, normal(3, 31))
    close(row(model, tight.matvec(direction)), row(model, whole.matvec(direction)), 1e-10)


@losses
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (1,), (3,)])
def test_of_the_last_layer_the_closed_form_is_that_of_all(bias, positions, loss):
    """With the layers before it frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias)).double()
    x = normal(4, 6, *positions, 3)
    last = br.Posterior.laplace(model, data(model, x, loss), "last_layer", 1.0, loss)
    model[0].requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    J = jacrev(lambda p: functional_call(model, p, (x,)))({name: p.detach() for name, p in params.items()})
    J = torch.cat([j.reshape(6, -1, 3, p.numel()) for j, p in zip(J.values(), params.values(), strict=True)], 3)
    p = model(x).detach().softmax(-1).reshape(6, -1, 3)
    L = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    L = L if loss == "cross_entropy" else torch.eye(3, dtype=torch.float64).expand(L.shape)
    exact = torch.einsum("ntkp,ntkl,ntlq->pq", J, L, J) + torch.eye(J.shape[-1], dtype=torch.float64)
    close(last.parts[0].q.precision, exact, 1e-10)


def test_many_columns_of_curvature_go_in_smaller_pieces(monkeypatch):
    model = network()
    whole = br.Posterior.laplace(model, data(model, X, size=9), "full")
    monkeypatch.setattr("bayesrule.estimators.data_curvature.READY", 2000)
    pieces, begin = [], Matrix.begin
    monkeypatch.setattr(Matrix, "begin", lambda self, examples, columns: pieces.append(examples) or begin(self, examples, columns))
    close(row(model, br.Posterior.laplace(model, data(model, X, size=9), "full").variance), row(model, whole.variance), 1e-10)
    assert pieces == [2, 2, 2, 2, 1]
    monkeypatch.setattr("bayesrule.estimators.data_curvature.MOST", 100)
    with pytest.raises(RuntimeError, match=r"^3 columns of curvature take .* take curvature='fisher'"):
        br.Posterior.laplace(model, data(model, X, size=9), "full")


# Misuse


def in_training(module):
    def call():
        model = nn.Sequential(nn.Linear(3, 3), module).double()
        br.Posterior.laplace(model, [(X, torch.arange(9) % 3)])

    return call


def on(change=lambda model: None, batches=None, **how):
    def call():
        model = network()
        change(model)
        br.Posterior.laplace(model, [(X, torch.arange(9) % 3)] if batches is None else batches, **how)

    return call


def spoil(value):
    def change(model):
        with torch.no_grad():
            model[2].bias[0] = value

    return change


LABELS = torch.arange(9) % 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (in_training(nn.Dropout(0.1)), r"'1' \(Dropout\) is in training mode.*call model.eval\(\)"),
        (in_training(nn.BatchNorm1d(3)), r"'1' \(BatchNorm1d\) is in training mode"),
        (on(structure="diagonal"), "unknown structure 'diagonal'; take 'diag', 'kron', 'last_layer', 'full'"),
        (on(curvature="hessian"), "unknown curvature 'hessian'; take 'ggn', 'fisher', 'empirical'"),
        (on(loss="nll"), "unknown loss 'nll'; take 'cross_entropy', 'bce', 'mse' or a function"),
        (on(loss="mse"), "mse takes real numbers as targets, got torch.int64; classes have loss='cross_entropy'"),
        (on(loss="mse", noise_variance=0.0), "noise_variance must be a number > 0, got 0.0"),
        (on(prior_precision=0.0), "prior_precision must be a number > 0, .*'marglik', got 0.0"),
        (on(prior_precision="best"), "got 'best'"),
        (on(prior_precision=math.inf), "got inf"),
        (on(prior_precision={"0.weight": 1.0}), "prior_precision has no number for '0.bias'"),
        (on(layer="2"), "layer='2' goes with structure='last_layer' only"),
        (on(structure="last_layer", layer="head"), "the model has no layer 'head'"),
        (on(num_data=0), "num_data must be a whole number >= 1, got 0"),
        (on(batches=[]), "the loader gave no example"),
        (on(batches=[], structure="last_layer"), "the loader gave no example"),
        (on(batches=[(X, LABELS[:4])]), "a batch holds 9 inputs and 4 labels"),
        (on(batches=[(X, LABELS.double())]), "whole numbers of classes as labels, got torch.float64; numbers have loss='mse'"),
        (on(batches=[(X, LABELS + 1)]), "labels go from 1 to 3, and there are 3 classes"),
        (on(batches=[(X, LABELS[:, None])]), r"labels have shape \(9, 1\)"),
        (on(batches=[(X, normal(0, 9))], loss="mse"), r"targets have shape \(9,\) and the outputs \(9, 3\)"),
        (on(batches=[(X, normal(0, 9, 3) / 0)], loss="mse"), "27 of 27 targets are not finite"),
        (on(loss=lambda f, y: F.cross_entropy(f, y)), "one number for each of 9 examples.*reduction='none'"),
        (on(loss=lambda f, y: -F.cross_entropy(f, y, reduction="none")), "the loss is not convex in the outputs"),
        (on(loss=lambda f, y: f.sum(-1), curvature="fisher"), "does not say how; take 'ggn'"),
        (on(spoil(math.nan)), "the weights '2.bias' are not finite"),
        (on(lambda model: model.append(nn.Softmax(-1))), "outputs sum to 1 in every row; let the model give logits"),
        (on(lambda model: model.requires_grad_(False)), "no parameter requires a gradient"),
    ],
)
def test_misuse_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Apart(nn.Module):
    """Its outputs do not depend on its weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x


class Moody(nn.Module):
    """Uses its weight as a matrix alone, or as a table, too."""

    def __init__(self):
        super().__init__()
        self.table, self.matrix = nn.Embedding(3, 3), nn.Linear(3, 3, bias=False)
        self.matrix.weight = self.table.weight

    def forward(self, x):
        return self.matrix(x) if len(x) > 4 else self.matrix(x) + self.table(torch.zeros(len(x), dtype=torch.long))


def test_what_is_not_finite_or_too_large_is_told():
    with pytest.raises(TypeError, match="must return a tensor, or something with logits; got tuple"):
        br.Posterior.laplace(Several(3, 3).double(), [(X, LABELS)])
    with pytest.raises(TypeError, match=r"a batch is a pair \(inputs, labels\) or a mapping with 'labels', got Tensor"):
        br.Posterior.laplace(nn.Linear(3, 3).double(), [X])
    with pytest.raises(ValueError, match="no parameter that requires a gradient has a part in the outputs"):
        br.Posterior.laplace(Apart(), [(X, LABELS)])
    with pytest.raises(ValueError, match=r"cross_entropy takes outputs of shape \(n, ..., classes >= 2\), got \(9, 1\)"):
        br.Posterior.laplace(nn.Linear(3, 1).double(), [(X, LABELS * 0)])
    with pytest.raises(RuntimeError, match="the curvature of 'weight' has 9 entries that are not finite"):
        br.Posterior.laplace(nn.Linear(3, 3), [(X.float() * 1e25, X.float())], loss="mse")
    with pytest.raises(ValueError, match=r"not positive definite in torch\.float32: .*; pass model\.double"):
        br.Posterior.laplace(nn.Linear(3, 3), [(X.float()[:1] * 1e6, X.float()[:1])], "full", 1e-6, "mse")
    with pytest.raises(RuntimeError, match=r"'table\.weight' is used in other ways from batch to batch"):
        br.Posterior.laplace(Moody().double(), data(Moody().double(), X, size=5), "kron")
    with pytest.raises(RuntimeError, match="outputs that are not finite in 1 of 9 rows"):
        on(batches=[(torch.cat([X[:8], X[:1] / 0]), LABELS)])()
    for structure, cheaper in (("full", "'last_layer', 'kron' or 'diag'"), ("last_layer", "'kron' or 'diag'")):
        size = {"full": 31, "last_layer": 15}[structure]
        with pytest.raises(RuntimeError, match=f"needs .* GB for a matrix of {size} x {size}.*; take {cheaper}"):
            on(structure=structure, max_bytes=1000)()
    with pytest.raises(ValueError, match=r"no nn\.Linear ran"):
        br.Posterior.laplace(nn.Conv1d(1, 2, 3).double(), [(normal(0, 9, 1, 3), LABELS[:, None])], "last_layer")
    with pytest.raises(ValueError, match="the marginal likelihood has no maximum"):
        on(lambda model: [nn.init.zeros_(p) for p in model.parameters()], prior_precision="marglik")()
    with pytest.raises(ValueError, match="method_hint must be"):
        br.Posterior({"w": torch.zeros(1)}, {"w": torch.ones(1)}, method_hint="laplace")
