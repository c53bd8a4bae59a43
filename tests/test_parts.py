"""Posteriors whose weights vary together: every structure in memory, in a model, in a file, in a prediction."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.contracts import close, normal, positive
from torch import nn
from torch.distributions import MultivariateNormal

import bayesrule as br
from bayesrule.bases import Bases, Basis
from bayesrule.drawing import Draws

SHAPES = {"weight": (2, 3), "bias": (2,)}
SIZE = 8
WIDE = torch.float64


def deviation(seed, *shape):
    return normal(seed, *shape).abs() + 0.5


def row(named):
    return torch.cat([named[name].reshape(-1) for name in SHAPES])


def named(values):
    weight, bias = values.split([6, 2])
    return {"weight": weight.view(2, 3), "bias": bias}


def eigen(seed):
    def turn(at, size):
        return torch.linalg.qr(normal(at, size, size))[0]

    bases = Bases([Basis((2, 3), [turn(seed, 2), turn(seed + 1, 3)]), Basis((2,), [None])])
    mean = br.Vector([normal(seed + 2, 2, 3), normal(seed + 3, 2)])
    return br.Eigen(mean, bases, br.Vector([deviation(seed + 4, 2, 3), deviation(seed + 5, 2)]), 0.5, ess=3.0)


def low_rank(seed):
    hess = br.DiagonalPlusFactor(deviation(seed, SIZE), normal(seed + 1, SIZE, 2))
    return br.LowRank(normal(seed + 2, SIZE), hess, 0.25, ess=3.0)


def deviations(seed):
    return br.Deviations(normal(seed, SIZE), br.DiagonalPlusFactor(deviation(seed + 1, SIZE), normal(seed + 2, SIZE, 3)), ess=3.0)


GAUSSIANS = {
    "diag": lambda seed: br.Diagonal(normal(seed, SIZE), deviation(seed + 1, SIZE), 0.5, ess=2.0),
    "isotropic": lambda seed: br.Isotropic(normal(seed, SIZE), torch.tensor(2.0, dtype=WIDE)),
    "full": lambda seed: br.Full(normal(seed, SIZE), positive(seed + 1, SIZE), 0.5, ess=2.0),
    "low_rank": low_rank,
    "deviations": deviations,
    "eigen": eigen,
}
OTHERS = {
    "dropout": lambda seed: br.SpikeAndSlab(normal(seed, SIZE), 0.6, (4, 2)),
    "signs": lambda seed: br.Signs(normal(seed, SIZE), ess=30.0),
    "mixture": lambda seed: br.Mixture(normal(seed, 3, SIZE), deviation(seed + 1, 3, SIZE), normal(seed + 2, 3)),
    "mixture of fulls": lambda seed: br.Mixture(
        normal(seed, 2, SIZE), torch.stack([positive(seed + 1, SIZE), positive(seed + 2, SIZE)])
    ),
}
FAMILIES = {**GAUSSIANS, **OTHERS}
every = pytest.mark.parametrize("kind", FAMILIES)
every_gaussian = pytest.mark.parametrize("kind", GAUSSIANS)


def posterior(kind, seed=0):
    return br.Posterior.of(FAMILIES[kind](seed), SHAPES, ess=40.0, num_data=20)


def dense(kind, seed=0):
    """The same Gaussian, by torch.distributions."""
    q = GAUSSIANS[kind](seed)
    if kind != "eigen":
        made = q.to_torch()
        covariance = made.covariance_matrix if kind in ("full", "low_rank", "deviations") else torch.diag(made.variance)
        return MultivariateNormal(made.mean, covariance)
    root = torch.stack([row(dict(zip(SHAPES, q.root_solve(br.Vector(list(named(e).values()))), strict=True))) for e in eye()], 1)
    return MultivariateNormal(row(dict(zip(SHAPES, q.mean, strict=True))), root @ root.T)


def eye():
    return torch.eye(SIZE, dtype=WIDE)


# The Gaussians against dense ones


@every_gaussian
def test_a_gaussian_says_what_the_dense_one_says(kind):
    post, exact = posterior(kind), dense(kind)
    precision = exact.covariance_matrix.inverse()
    close(row(post.mean), exact.mean, 1e-9)
    close(row(post.variance), exact.covariance_matrix.diagonal(), 1e-9)
    close(row(post.precision), precision.diagonal(), 1e-9)
    close(torch.stack([row(post.matvec(named(e))) for e in eye()]), exact.covariance_matrix, 1e-9)
    root = torch.stack([row(post.sqrt_matvec(named(e))) for e in eye()], dim=1)
    close(root @ root.T, exact.covariance_matrix, 1e-9)
    theta = normal(9, SIZE)
    close(post.log_prob(named(theta)), exact.log_prob(theta), 1e-9)
    other = dense(kind, 1)
    close(post.kl(posterior(kind, 1)), torch.distributions.kl_divergence(exact, other), 1e-8)


@every_gaussian
def test_kl_from_independent_weights_is_that_of_the_dense_gaussians(kind):
    """Such as a prior."""
    close(posterior(kind).kl(posterior("diag", 1)), torch.distributions.kl_divergence(dense(kind), dense("diag", 1)), 1e-8)


@every_gaussian
def test_rescaling_raises_to_a_power(kind):
    post = posterior(kind).rescale(ess=80.0)
    assert post.ess == 80
    close(row(post.variance), dense(kind).covariance_matrix.diagonal() / 2, 1e-9)
    close(row(post.matvec(named(normal(0, SIZE)))), dense(kind).covariance_matrix @ normal(0, SIZE) / 2, 1e-9)


@every
def test_draws_have_mean_and_covariance(kind):
    """Within 5 standard errors of 500 draws."""
    post, count = posterior(kind), 500
    draws = torch.stack([row(post.sample(0, draw)) for draw in range(count)])
    covariance = torch.stack([row(post.matvec(named(e))) for e in eye()])
    variance = row(post.variance)
    close(covariance.diagonal(), variance, 1e-9)
    assert ((draws.mean(0) - row(post.mean)) / (variance / count).sqrt()).abs().max() < 5
    gaps = draws - row(post.mean)
    products = gaps[:, :, None] * gaps[:, None, :]
    assert ((products.mean(0) - covariance) / (products.std(0) / count**0.5 + 1e-12)).abs().max() < 5


# Every structure


@every
def test_a_structure_has_its_name(kind):
    expected = {"isotropic": "diag", "mixture of fulls": "mixture"}.get(kind, kind)
    assert posterior(kind).structure == expected


@every
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    post = posterior(kind)
    post.save(tmp_path / "p.safetensors")
    again = br.Posterior.load(tmp_path / "p.safetensors")
    assert (again.structure, again.ess, again.num_data, list(again.mean)) == (post.structure, 40.0, 20, list(SHAPES))
    for a, b in ((again.mean, post.mean), (again.precision, post.precision), (again.sample(3, 4), post.sample(3, 4))):
        for name in SHAPES:
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
    if kind != "dropout":  # which has no density
        theta = post.sample(0)
        close(again.log_prob(theta), post.log_prob(theta), 1e-9)


@every
def test_names_lose_a_prefix_everywhere(kind, tmp_path):
    shapes = {f"module.{name}": shape for name, shape in SHAPES.items()}
    br.Posterior.of(FAMILIES[kind](0), shapes).save(tmp_path / "p.safetensors")
    again = br.Posterior.load(tmp_path / "p.safetensors", strip_prefix="module")
    assert list(again.mean) == list(again.sample(0)) == list(SHAPES)
    close(row(again.sample(1)), row(br.Posterior.of(FAMILIES[kind](0), SHAPES).sample(1)), 1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_holds_draws_and_gets_its_weights_back(kind, dtype):
    model = nn.Linear(3, 2).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    post = posterior(kind)
    with br.sampled(model, post, seed=5, draw=1):
        held = {name: p.detach().to(WIDE) for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    place = torch.finfo(dtype).eps * 4
    for name, value in post.sample(5, 1).items():
        torch.testing.assert_close(held[name], value, rtol=place, atol=place)


@every
def test_predict_averages_over_draws(kind):
    model = nn.Linear(3, 2).double().eval()
    post, x = posterior(kind), normal(7, 5, 3)
    found = br.predict(model, post, x, num_samples=4, seed=2)
    probs = []
    for draw in range(4):
        with br.sampled(model, post, 2, draw):
            probs.append(model(x).softmax(-1))
    close(found.probs, torch.stack(probs).mean(0).detach(), 1e-9)
    assert (found.mutual_information > 0).all()


@every
def test_mirror_images_are_of_symmetric_structures_only(kind):
    model, post, x = nn.Linear(3, 2).double().eval(), posterior(kind), normal(7, 5, 3)
    if kind in OTHERS:
        with pytest.raises(ValueError, match=r"no mirror images; take antithetic=False"):
            br.predict(model, post, x, num_samples=4, antithetic=True)
        return
    found = br.predict(model, post, x, num_samples=4, antithetic=True, link="identity")
    at_mean = br.predict(model, post, x, "mean", link="identity")
    close(found.mean, at_mean.mean, 1e-9)  # what is linear in the weights has no noise left


@every
def test_a_prior_is_over_independent_weights(kind):
    model, post = nn.Linear(3, 2).double(), posterior(kind)
    if kind in ("diag", "isotropic"):
        br.IVON(model.named_parameters(), lr=0.1, ess=10, prior=post)
        return
    with pytest.raises(ValueError, match=rf"independent weights.*structure '{post.structure}'.*independent\(\)"):
        br.IVON(model.named_parameters(), lr=0.1, ess=10, prior=post)
    alone = post.independent()
    br.IVON(model.named_parameters(), lr=0.1, ess=10, prior=alone)
    assert alone.structure == "diag"
    close(row(alone.precision), row(post.precision), 0)
    assert post.exact().structure == "diag"


def test_draws_of_signs_are_signs():
    draws = torch.stack([row(posterior("signs").sample(0, draw)) for draw in range(20)])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}


# Mixtures of posteriors


def test_a_mixture_is_the_mixture_of_torch():
    q = OTHERS["mixture"](0)
    theta = normal(3, SIZE)
    close(posterior("mixture").log_prob(named(theta)), q.to_torch().log_prob(theta), 1e-9)
    close(row(posterior("mixture").mean), q.to_torch().mean, 1e-9)
    close(row(posterior("mixture").variance), q.to_torch().variance, 1e-9)


def test_a_mixture_of_posteriors_of_any_structure(tmp_path):
    kinds = ["diag", "full", "low_rank", "eigen", "signs"]
    members = [posterior(kind) for kind in kinds]
    mixed = br.Posterior.mixture(members, weights=[1, 2, 3, 4, 5])
    mean = sum(w * row(p.mean) for w, p in zip([1, 2, 3, 4, 5], members, strict=True)) / 15
    close(row(mixed.mean), mean)
    mixed.save(tmp_path / "p.safetensors")
    again = br.Posterior.load(tmp_path / "p.safetensors")
    assert again.structure == "mixture"
    close(row(again.sample(0, 3)), row(mixed.sample(0, 3)), 1e-12)
    nested = br.Posterior.mixture([mixed, members[0]])
    close(row(nested.mean), (mean + row(members[0].mean)) / 2)


def test_one_posterior_mixed_is_itself():
    alone = posterior("diag")
    mixed = br.Posterior.mixture([alone])
    close(row(mixed.variance), row(alone.variance))
    theta = alone.sample(0)
    close(mixed.log_prob(theta), alone.log_prob(theta))


def test_each_member_is_drawn_as_often_as_it_weighs():
    far = [br.Posterior({"w": torch.full((1,), m)}, {"w": torch.full((1,), 1e6)}) for m in (-1.0, 0.0, 1.0)]
    mixed = br.Posterior.mixture(far, [0.5, 0.2, 0.3])
    drawn = torch.stack([mixed.sample(0, draw)["w"] for draw in range(4000)]).round()
    for value, weight in zip((-1, 0, 1), (0.5, 0.2, 0.3), strict=True):
        assert abs((drawn == value).double().mean().item() - weight) < 5 * (weight * (1 - weight) / 4000) ** 0.5


REFUSED = {
    "no posteriors": (lambda: br.Posterior.mixture([]), ValueError, "one positive weight for each"),
    "weights too few": (lambda: br.Posterior.mixture([posterior("diag")], [1.0, 2.0]), ValueError, "got 1 and"),
    "weights negative": (lambda: br.Posterior.mixture([posterior("diag")], [-1.0]), ValueError, "positive weight"),
    "weights nan": (lambda: br.Posterior.mixture([posterior("diag")], [math.nan]), ValueError, "positive weight"),
    "other names": (
        lambda: br.Posterior.mixture([posterior("diag"), posterior("diag").of(br.Diagonal(normal(0, 1)), {"v": (1,)})]),
        ValueError,
        "disagree on the name",
    ),
    "other shapes": (
        lambda: br.Posterior.mixture(
            [posterior("diag"), br.Posterior.of(br.Diagonal(normal(0, 2)), {"weight": (1,), "bias": (1,)})]
        ),
        ValueError,
        "disagree on the shape",
    ),
    "kl of a mixture": (lambda: posterior("mixture").kl(posterior("mixture")), TypeError, "no closed form"),
    "kl of others": (lambda: posterior("full").kl(posterior("low_rank")), TypeError, "no KL is offered"),
    "kl of other parts": (lambda: posterior("diag").kl(posterior("full")), TypeError, "no KL is offered"),
    "kl of signs": (lambda: posterior("signs").kl(posterior("diag")), TypeError, "no KL from Gaussians"),
    "root of a mixture": (lambda: posterior("mixture").sqrt_matvec(named(normal(0, SIZE))), TypeError, "use sample"),
    "root of signs": (lambda: posterior("signs").sqrt_matvec(named(normal(0, SIZE))), TypeError, "use sample"),
    "power of a mixture": (lambda: posterior("mixture").rescale(ess=2.0), TypeError, "before they are mixed"),
    "another family": (lambda: br.Posterior.of(br.Gamma(torch.ones(2), torch.ones(2)), {"w": (2,)}), TypeError, "Gamma is no"),
    "sizes": (lambda: br.Posterior.of(br.Full(torch.zeros(3)), SHAPES), ValueError, r"theta has \[3\] elements"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line(case):
    action, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


# Files that must fail


def damaged(path, kind="eigen", *, without=None, reshaped=None, parts=None, changed=None):
    """A good file, less a tensor, with one of another shape or changed, or with something else said of its parts."""
    posterior(kind).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["bayesrule"])
    if without:
        tensors.pop(without)
    if changed:
        name, change = changed
        tensors[name] = change(tensors[name]).contiguous()
    if reshaped:
        tensors[reshaped] = torch.ones(7, 7)
    about["parts"] = parts(about["parts"]) if parts else about["parts"]
    save_file(tensors, path, {"bayesrule": json.dumps(about)})


HOSTILE = {
    "a basis missing": (dict(without="part0.axis0.weight"), "something is missing"),
    "a basis that stretches": (dict(changed=("part0.axis0.weight", lambda t: 5 * t)), "not orthonormal"),
    "a spectrum of another kind": (dict(changed=("part0.spectrum.weight", lambda t: t.float())), "spectrum of 'weight' must have"),
    "a spectrum negative": (dict(changed=("part0.spectrum.weight", lambda t: -t)), "positive entries"),
    "a matrix that is not symmetric": (dict(kind="full", changed=("part0.matrix", lambda t: t.triu())), "symmetric positive"),
    "an indefinite matrix": (dict(kind="full", changed=("part0.matrix", lambda t: -t)), "symmetric positive definite"),
    "a diagonal negative": (dict(kind="low_rank", changed=("part0.diagonal", lambda t: -t)), "positive entries"),
    "a factor too short": (dict(kind="low_rank", changed=("part0.factor", lambda t: t[1:])), "8 finite rows"),
    "odds too short": (dict(kind="signs", changed=("part0.natural.bias", lambda t: t[1:])), "odds of 'bias'"),
    "no axis of units": (dict(kind="dropout", parts=lambda parts: [{**parts[0], "axis": 7}]), "no axis 7"),
    "a probability of two": (
        dict(kind="dropout", parts=lambda parts: [{**parts[0], "keep": 2.0}]),
        r"probability must be in \(0, 1\]",
    ),
    "weights of a sum of three": (dict(kind="mixture", changed=("part0.log_weights", lambda t: 0 * t)), "sum to 1"),
    "no posteriors": (dict(kind="mixture", parts=lambda parts: [{**parts[0], "laws": []}]), "one for each posterior"),
    "a component negative": (dict(kind="mixture", changed=("part0.law1.precision.bias", lambda t: -t)), "'bias' is no such thing"),
    "a part twice": (dict(parts=lambda parts: [parts[0], {**parts[0]}]), "something is missing|belongs to two parts"),
    "a basis of another shape": (dict(reshaped="part0.axis0.weight"), "basis of 'weight' does not fit"),
    "a spectrum missing": (dict(without="part0.spectrum.weight"), "something is missing"),
    "a mean missing": (dict(without="mean.weight"), "something is missing|disagree"),
    "a structure of tomorrow": (dict(parts=lambda parts: [{**parts[0], "structure": "hyper"}]), "'hyper'.*upgrade"),
    "axes missing": (dict(parts=lambda parts: [{k: v for k, v in parts[0].items() if k != "axes"}]), "something is missing"),
    "parts no list": (dict(parts=lambda parts: 3), "a parts that this release cannot read"),
    "parts of numbers": (dict(parts=lambda parts: [1]), "a parts that this release cannot read"),
    "names of numbers": (dict(parts=lambda parts: [{**parts[0], "names": [1, 2]}]), "missing"),
    "axes of another product": (dict(parts=lambda parts: [{**parts[0], "axes": [[2, 2], [2]]}]), "does not fit"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_with_its_name(kind, tmp_path):
    changes, message = HOSTILE[kind]
    damaged(tmp_path / "p.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        br.Posterior.load(tmp_path / "p.safetensors")
    assert "p.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kronecker_is_kept_by_its_eigenvectors(tmp_path):
    q = br.Kronecker(normal(0, 2, 3), br.KroneckerProduct(positive(1, 2), positive(2, 3)), ess=5.0)
    br.Posterior.of(q, {"w": (2, 3)}).save(tmp_path / "p.safetensors")
    post = br.Posterior.load(tmp_path / "p.safetensors")
    assert post.structure == "eigen"
    theta = {"w": normal(3, 2, 3)}
    close(post.log_prob(theta), q.log_prob(theta["w"]), 1e-9)
    close(post.variance["w"], q.variance, 1e-9)
    close(post.matvec(theta)["w"], q.solve(theta["w"]), 1e-9)


@every_gaussian
def test_offsets_are_draws_less_the_mean(kind):
    post = posterior(kind)
    into = {name: torch.empty_like(m) for name, m in post.mean.items()}
    draws = Draws(post, into, seed=3, offsets=True)
    draws.write(2)
    offsets = row(into).clone()
    close(offsets, row(post.sample(3, 2)) - row(post.mean), 1e-12)
    draws.mirror()
    close(row(into), -offsets, 1e-12)
