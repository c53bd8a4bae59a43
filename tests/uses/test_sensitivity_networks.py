"""What examples mean to networks."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tests.contracts import close, normal
from torch import nn
from torch.nn import functional as F

import bayesrule as br
from bayesrule.uses.scores import SCORES

CLASSES = 3


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES))


NETWORKS = {"perceptron": (perceptron, (4,)), "convolutional": (convolutional, (1, 4, 4))}


def network(name="perceptron", examples=12):
    make, shape = NETWORKS[name]
    model = make().double().eval()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(normal(number, *p.shape) / 2)
    return model, normal(50, examples, *shape), torch.arange(examples) % CLASSES


def posterior_of(model, structure="diag", ess=12.0, width=5.0):
    """Around the model's weights."""
    params = dict(model.named_parameters())
    names, size = list(params), sum(p.numel() for p in params.values())
    mean = torch.cat([p.detach().reshape(-1) for p in params.values()])
    precision = width * normal(60, size).exp() + 20.0
    if structure == "diag":
        parts = precision.split([p.numel() for p in params.values()])
        named = {name: s.view(params[name].shape) for name, s in zip(names, parts, strict=True)}
        return br.Posterior({n: p.detach().clone() for n, p in params.items()}, named, ess=ess, num_data=int(ess))
    factor = normal(61, size, 3)
    q = {
        "full": lambda: br.Full(mean, precision.diag() + factor @ factor.T),
        "low_rank": lambda: br.LowRank(mean, br.DiagonalPlusFactor(precision, factor)),
    }[structure]()
    return br.Posterior.of(q, params, ess=ess, num_data=int(ess))


def by_hand(model, post, x, y):
    """The equation with the whole Jacobian and the whole covariance."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in model(x).reshape(-1)]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).view(len(x), CLASSES, -1)
    names, sizes = list(post.mean), [m.numel() for m in post.mean.values()]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        v = {n: part.view(post.mean[n].shape) for n, part in zip(names, unit.split(sizes), strict=True)}
        columns.append(torch.cat([t.reshape(-1) for t in post.matvec(v).values()]))
    V = jacobian @ torch.stack(columns, 1) @ jacobian.mT
    p = model(x).detach().softmax(1)
    L = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    e = p - F.one_hot(y, CLASSES)
    return torch.linalg.solve(torch.eye(CLASSES, dtype=torch.float64) - V @ L, V @ e[:, :, None])[:, :, 0]


@pytest.mark.parametrize("structure", ["diag", "full", "low_rank"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("estimator", ["vjp_jvp", "layerwise"])
def test_equals_the_equation(name, structure, estimator):
    model, x, y = network(name)
    post = posterior_of(model, structure)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    found = br.Sensitivity(model, post, estimator=estimator).scores([(x[:5], y[:5]), (x[5:], y[5:])])
    close(found.deviation, by_hand(model, post, x, y), 1e-9)
    assert bool((found.leverage < 1).all())
    assert bool((found.loo_loss >= found.loss).all())  # who is left out is missed
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_in_32_bits_a_hundredth_of_it_may_be_missing():
    model, x, y = network()
    given = posterior_of(model, "full")
    mean, precision = (given.parts[0].q.mean, given.parts[0].q.precision / 5)
    post, short = (
        br.Posterior.of(br.Full(*q), given.mean, ess=12, num_data=12)
        for q in ((mean, precision), (mean.float(), precision.float()))
    )
    wanted = br.Sensitivity(model, post).scores([(x, y)])
    found = br.Sensitivity(model.float(), short).scores([(x.float(), y)])
    assert wanted.leverage.max() > 0.2  # so that there is something to correct
    off = (found.deviation - wanted.deviation).norm(dim=1) / wanted.deviation.norm(dim=1)
    assert 1e-6 < off.max() < 1e-2


@pytest.mark.parametrize("structure", ["diag", "full", "low_rank"])
def test_of_the_last_layer_it_is_that_of_a_posterior_over_the_last_layer(structure):
    model, x, y = network()
    post = posterior_of(model, structure)
    found = br.Sensitivity(model, post, estimator="last_layer", correction="first_order").scores([(x, y)])
    inner = {name: torch.full_like(s, math.inf) for name, s in post.precision.items() if name.startswith("0.")}
    if structure == "diag":
        alone = br.Posterior(post.mean, {**post.precision, **inner}, ess=12, num_data=12)
    else:  # the marginal of some weights
        last = ["2.weight", "2.bias"]
        names, sizes = list(post.mean), [m.numel() for m in post.mean.values()]
        units = torch.eye(sum(sizes), dtype=torch.float64)
        rows = [
            torch.cat([t.reshape(-1) for t in post.matvec({n: p.view(post.mean[n].shape) for n, p in parts}).values()])
            for parts in (list(zip(names, unit.split(sizes), strict=True)) for unit in units)
        ]
        first = sum(post.mean[n].numel() for n in names if n not in last)
        covariance = torch.stack(rows)[first:, first:]
        mean = torch.cat([post.mean[n].reshape(-1) for n in last])
        q = br.Full(mean, torch.linalg.inv(covariance))
        alone = br.Posterior.of(q, {n: post.mean[n].shape for n in last}, ess=12, num_data=12)
    wanted = br.Sensitivity(model, alone, estimator="layerwise", correction="first_order").scores([(x, y)])
    close(found.deviation, wanted.deviation, 1e-8)


def test_draws_converge_to_it():
    """As the root of their number, where the network is nearly linear within the posterior."""
    model, x, y = network()
    post = posterior_of(model, width=1e4)
    exact = br.Sensitivity(model, post).scores([(x, y)]).deviation
    found = [br.Sensitivity(model, post, estimator="mc", num_samples=count).scores([(x, y)]).deviation for count in (16, 1024)]
    few, many = ((deviation - exact).norm() / exact.norm() for deviation in found)
    assert many < 0.07
    assert many < few / 4


def test_of_sgd_it_is_the_squared_gradient_times_the_error():
    """Of one output: the norm of its gradient, squared, times the error."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double().eval()
    x, y = normal(1, 6, 4), normal(2, 6, 1)
    found = br.Sensitivity(model, None, "mse").scores([(x, y)])
    for i in range(6):
        gradients = torch.autograd.grad(model(x[i : i + 1]).sum(), list(model.parameters()))
        size = sum(g.square().sum() for g in gradients)
        close(found.deviation[i, 0], (size * (model(x[i : i + 1]) - y[i])[0, 0]).detach(), 1e-9)


def test_pairs_are_products_of_gradients():
    model, x, y = network()
    post = posterior_of(model)
    found = br.Sensitivity(model, post).pairwise_scores([(x[:2], y[:2])], [(x[:5], y[:5]), (x[5:], y[5:])])
    params = dict(model.named_parameters())
    losses = F.cross_entropy(model(x), y, reduction="none")
    each = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in each])
    variance = torch.cat([(1 / post.precision[n]).reshape(-1) for n in params])
    close(found, rows[:2] @ (variance * rows).T, 1e-9)
    close(found[:, :2].diagonal(), br.Sensitivity(model, post).self_scores([(x, y)])[:2], 1e-9)


LOSSES = {
    "a function": (lambda f, y: F.cross_entropy(f, y, reduction="none"), {}, "cross_entropy", lambda y: y),
    "with its derivatives": (
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
        dict(
            error_fn=lambda f, y: f.softmax(1) - F.one_hot(y, CLASSES),
            hessian_fn=lambda f, y: torch.diag_embed(f.softmax(1)) - f.softmax(1)[:, :, None] * f.softmax(1)[:, None],
        ),
        "cross_entropy",
        lambda y: y,
    ),
    "of labels one by one": (
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1),
        {},
        "bce",
        lambda y: F.one_hot(y, CLASSES).double(),
    ),
    "of numbers": (
        lambda f, y: ((f - y) ** 2 + math.log(2 * math.pi)).sum(1) / 2,
        {},
        "mse",
        lambda y: F.one_hot(y, CLASSES).double(),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_any_function_is_a_loss(case):
    function, how, name, labels = LOSSES[case]
    model, x, y = network()
    post = posterior_of(model)
    mine = br.Sensitivity(model, post, function, **how).scores([(x, labels(y))])
    wanted = br.Sensitivity(model, post, name).scores([(x, labels(y))])
    for score in ("loss", "loo_loss", "self_influence", "cook", "deviation"):
        close(getattr(mine, score), getattr(wanted, score), 1e-8)


def test_sequences_are_examples_whose_losses_add_up():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).double().eval()
    text, labels = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(0)), torch.arange(20).view(5, 4) % 6
    labels[1, 2:] = -100
    post = posterior_of(model, ess=5.0)
    found = [br.Sensitivity(model, post, estimator=name).scores([(text, labels)]) for name in ("vjp_jvp", "layerwise")]
    close(found[0].deviation, found[1].deviation, 1e-8)
    wanted = F.cross_entropy(model(text).flatten(0, 1), labels.flatten(), reduction="none").view(5, 4).sum(1).detach()
    close(found[0].loss, wanted, 1e-12)
    assert found[0].deviation.shape == (5, 4, 6)


class Named(nn.Module):
    """Takes named inputs, gives something with logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features, scale):
        return type("Output", (), {"logits": self.inner(features) * scale})()


def test_batches_may_be_mappings():
    inner, x, y = network()
    post = posterior_of(inner)
    wanted = br.Sensitivity(inner, post).scores([(x, y)])
    renamed = br.Posterior(
        {f"inner.{n}": m for n, m in post.mean.items()}, {f"inner.{n}": s for n, s in post.precision.items()}, ess=12, num_data=12
    )
    batch = {"features": x, "scale": torch.ones(()), "labels": y}
    found = br.Sensitivity(Named(inner).eval(), renamed).scores([batch])
    close(found.deviation, wanted.deviation, 1e-12)


class TestResuming:
    def test_goes_on_where_it_was(self, tmp_path):
        model, x, y = network()
        post, path = posterior_of(model), tmp_path / "scores.safetensors"
        wanted = br.Sensitivity(model, post).scores([(x, y)])

        def dying():
            yield x[:5], y[:5]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayesrule.uses.journal.EVERY", 0.0)
            br.Sensitivity(model, post).scores(dying(), path=path)
        forwards = []
        model.register_forward_hook(lambda _, inputs, __: forwards.append(len(inputs[0])))
        found = br.Sensitivity(model, post).scores([(x[:7], y[:7]), (x[7:], y[7:])], path=path)
        assert max(forwards) <= 5  # two of the first batch are left
        for score in SCORES:
            close(getattr(found, score), getattr(wanted, score), 1e-12)
        forwards.clear()
        again = br.Sensitivity(model, post).scores([(x, y)], path=path)
        assert not forwards
        close(again.loo_loss, wanted.loo_loss, 1e-12)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.write_bytes(b"nonsense"), "is no file of scores"),
            (lambda p: p.write_bytes(p.read_bytes()[:-40]), "is no file of scores"),
            (None, "holds scores of another model"),
            ("labels", "holds scores of other data"),
            ("inputs", "holds scores of other data"),
            ("fewer", "holds scores of 12 examples, and the data have 6"),
        ],
        ids=["nonsense", "cut", "another-model", "other-labels", "other-inputs", "fewer"],
    )
    def test_files_of_something_else_are_refused(self, tmp_path, change, message):
        model, x, y = network()
        post, path = posterior_of(model), tmp_path / "scores.safetensors"
        br.Sensitivity(model, post).scores([(x, y)], path=path)
        if callable(change):
            change(path)
        elif change is None:
            post = br.Posterior({n: m + 1 for n, m in post.mean.items()}, post.precision, ess=12, num_data=12)
        kept = path.read_bytes()
        data = {"labels": [(x, y.flip(0))], "inputs": [(x.roll(1, 1), y)], "fewer": [(x[:6], y[:6])]}.get(
            change if isinstance(change, str) else "", [(x, y)]
        )
        with pytest.raises(ValueError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            br.Sensitivity(model, post).scores(data, path=path)
        assert path.read_bytes() == kept


def test_ranks_by_any_score():
    model, x, y = network()
    found = br.Sensitivity(model, posterior_of(model), scale=1.0)
    for score in SCORES:
        ranked = found.mislabelled([(x, y)], 4, score=score)
        values = found.scores([(x, y)]).by(score)
        close(ranked.scores, values.sort(descending=True).values[:4], 0)
        close(values[ranked.indices], ranked.scores, 0)
        close(found.top(4, score).scores, ranked.scores, 0)
    estimate = found.loo([(x, y)])
    assert estimate.nll == pytest.approx(estimate.per_example.mean().item())
    assert 0 <= estimate.accuracy <= 1


def test_a_posterior_that_is_too_wide_does_not_spoil_the_ranking():
    """Of labels, which is by the width that the data allow unless another is given."""
    model, x, y = network()
    post = posterior_of(model)
    wide = br.Posterior(post.mean, {n: s / 1000 for n, s in post.precision.items()}, ess=12, num_data=12)
    wanted = br.Sensitivity(model, post, scale="data").mislabelled([(x, y)])
    found = br.Sensitivity(model, wide)
    close(found.mislabelled([(x, y)]).scores, wanted.scores, 1e-9)
    assert found.scale is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(br.Sensitivity(model, wide, scale=1.0).mislabelled([(x, y)]).indices, wanted.indices)


def test_examples_may_be_named_by_a_mask():
    model, x, y = network()
    sensitivity, mask = br.Sensitivity(model, posterior_of(model)), torch.arange(len(y)) == 3
    assert torch.equal(sensitivity.remove(mask, [(x, y)]).deviation, sensitivity.remove([3], [(x, y)]).deviation)
    sensitivity.scores([(x, y)])
    with pytest.raises(ValueError, match="k must be a whole number >= 0, got -1; it is how many examples to name"):
        sensitivity.top(-1)


def test_random_augmentation_is_averaged_over_passes():
    model, x, y = network()
    copies = [x, x.flip(-1), x + 0.1]

    class Augmented:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(copies[self.passes - 1], y)])

    sensitivity = br.Sensitivity(model, posterior_of(model))
    found = sensitivity.scores(Augmented(), passes=3)
    each = [br.Sensitivity(model, posterior_of(model)).scores([(copy, y)]) for copy in copies]
    torch.testing.assert_close(found.loo_loss, torch.stack([one.loo_loss for one in each]).mean(0))
    assert torch.equal(sensitivity.top(3, "loo_loss").indices, found.loo_loss.argsort(descending=True, stable=True)[:3])
    with pytest.raises(ValueError, match="a file keeps the scores of one pass, and passes is 2; take path=None"):
        sensitivity.scores([(x, y)], passes=2, path="scores.safetensors")
    with pytest.raises(ValueError, match="one pass gave 12 examples and another 5"):
        sensitivity.scores(iter_of_sizes(x, y, 12, 5), passes=2, subset=12)


def iter_of_sizes(x, y, *sizes):
    turns = iter(sizes)

    class Shrinking:
        def __iter__(self):
            n = next(turns)
            return iter([(x[:n], y[:n])])

    return Shrinking()


@pytest.mark.filterwarnings("ignore:no closed form for Choosy", "ignore:Choosy has no forward derivatives")
@pytest.mark.parametrize("structure", ["diag", "full", "low_rank"])
@pytest.mark.parametrize("correction", ["newton", "first_order"])
def test_examples_that_layers_cannot_tell_apart_go_one_by_one(structure, correction):
    class Choosy(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 1e6 else super().forward(x).tanh()  # vmap takes no such choice

    plain, x, y = network()
    model = nn.Sequential(Choosy(4, 5), nn.Identity(), plain[2]).double().eval()
    model.load_state_dict(plain.state_dict())
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    with pytest.warns(UserWarning, match="no per-example gradients.* one by one") as told:
        found = br.Sensitivity(model, posterior_of(model, structure), correction=correction).scores(data)
    assert sum("one by one" in str(each.message) for each in told) == 1
    wanted = br.Sensitivity(plain, posterior_of(plain, structure), correction=correction).scores(data)
    for name in SCORES:
        close(found.by(name), wanted.by(name), 1e-9)


def test_a_large_batch_is_halved(monkeypatch):
    model, x, y = network()
    wanted = br.Sensitivity(model, posterior_of(model), estimator="layerwise").scores([(x, y)])
    monkeypatch.setattr("bayesrule.uses.products.HELD", 1000)
    found = br.Sensitivity(model, posterior_of(model), estimator="layerwise").scores([(x, y)])
    close(found.deviation, wanted.deviation, 1e-12)


def test_it_does_not_matter_who_asked_for_no_gradients():
    model, x, y = network()
    post = posterior_of(model)
    wanted = br.Sensitivity(model, post).scores([(x, y)])
    with torch.inference_mode():
        found = br.Sensitivity(model, post).scores([(x.clone(), y)])
        alone = br.Sensitivity(model, post).self_scores([(x.clone(), y)])
    close(found.deviation, wanted.deviation, 1e-12)
    close(alone, wanted.self_influence, 1e-9)


def test_the_scale_holds_for_everything_and_a_ranking_changes_nothing():
    model, x, y = network()
    post, data = posterior_of(model), [(x, y)]
    plain, wide = br.Sensitivity(model, post), br.Sensitivity(model, post, scale=2.0)
    before = plain.self_scores(data)
    plain.mislabelled(data)
    close(plain.self_scores(data), before, 0)
    close(wide.self_scores(data), 2 * before, 1e-12)
    close(wide.pairwise_scores(data, data), 2 * plain.pairwise_scores(data, data), 1e-12)
    first = [br.Sensitivity(model, post, correction="first_order", scale=s).remove([0], data).deviation for s in (1.0, 2.0)]
    close(first[1], 2 * first[0], 1e-12)


def test_a_class_of_tokens_takes_each_text_away_once():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).double().eval()
    text = torch.randint(6, (20, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(20, 4, dtype=torch.long)
    labels[0] = torch.tensor([2, 2, 0, 2])
    found = br.Sensitivity(model, posterior_of(model, ess=20.0))
    one, other = found.leave_class_out(2, [(text, labels)]), found.remove([0], [(text, labels)])
    assert one.indices.tolist() == [0]
    close(one.deviation, other.deviation, 1e-12)


def test_the_noise_of_a_regression_is_the_posteriors():
    model, x, _ = network()
    data = [(x, normal(70, 12, CLASSES))]
    post = posterior_of(model)
    known = replace(post, noise_variance=(0.3,))
    how = dict(correction="first_order")
    wanted = br.Sensitivity(model, post, "mse", noise_variance=0.3, **how).loo(data)
    assert br.Sensitivity(model, known, "mse", **how).loo(data).nll == wanted.nll
    with pytest.raises(ValueError, match="another noise for each output"):
        br.Sensitivity(model, replace(post, noise_variance=(0.3, 0.4, 0.5)), "mse")


@pytest.mark.parametrize("estimator", ["vjp_jvp", "layerwise", "last_layer", "mc"])
def test_models_of_16_bits_give_scores_in_32(estimator):
    model, x, y = network()
    model, x = model.bfloat16(), x.bfloat16()
    post = posterior_of(model.float())
    post = br.Posterior(
        {n: m.float() for n, m in post.mean.items()}, {n: s.float() for n, s in post.precision.items()}, ess=12, num_data=12
    )
    found = br.Sensitivity(model.bfloat16(), post, estimator=estimator)
    scores = found.scores([(x, y)])
    assert scores.deviation.dtype == torch.float32
    assert bool(scores.deviation.isfinite().all())
    assert found.remove([0], [(x, y)]).deviation.dtype == torch.float32
    assert bool(found.mislabelled([(x, y)]).scores.isfinite().all())
