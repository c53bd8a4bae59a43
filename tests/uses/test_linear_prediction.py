"""Predictions linearized around the mean: moments against dense Jacobians, links against golden numbers and draws."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.contracts import close, normal, positive
from tests.estimators.architectures import MLP
from tests.estimators.test_per_example import jacobians
from torch import nn

import bayesrule as br
from bayesrule.estimators.quadrature import gauss_hermite
from bayesrule.uses import linear_prediction as module

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "predictive.json").read_text())
LAPLACE = json.loads((Path(__file__).parents[1] / "golden" / "laplace_links.json").read_text())
DOUBLE = torch.float64
X = normal(1, 5, 3)


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    )


def seeded(make):
    torch.manual_seed(0)
    return make().to(DOUBLE).eval()


def row(named):
    return torch.cat([t.reshape(-1) for t in named.values()])


def shaped(values, params):
    parts = values.split([p.numel() for p in params.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}


def mean_of(model):
    return row({name: p.detach() for name, p in model.named_parameters()})


def eigen(mean, params):
    turned = [[torch.linalg.qr(normal(9, n, n))[0] for n in p.shape] if p.dim() == 2 else [None] for p in params.values()]
    bases = br.bases.Bases([br.bases.Basis(tuple(p.shape), axes) for p, axes in zip(params.values(), turned, strict=True)])
    spread = shaped(normal(8, len(mean)).abs() + 0.5, params)
    return br.Eigen(br.Vector(list(shaped(mean, params).values())), bases, br.Vector(list(spread.values())), 0.5, ess=3.0)


def low_rank(mean, params):
    return br.LowRank(mean, br.DiagonalPlusFactor(normal(7, len(mean)).abs() + 0.5, normal(6, len(mean), 2)), 0.25, ess=3.0)


STRUCTURES = {
    "diag": lambda mean, params: br.Diagonal(mean, normal(5, len(mean)).abs() + 0.5, 0.5, ess=2.0),
    "eigen": eigen,
    "full": lambda mean, params: br.Full(mean, positive(4, len(mean)), 0.5, ess=2.0),
    "low_rank": low_rank,
}


def posterior(model, kind="diag"):
    params = dict(model.named_parameters())
    return br.Posterior.of(STRUCTURES[kind](mean_of(model), params), params)


def covariance(post):
    """Of all weights, from products with unit vectors."""
    size = len(row(post.mean))
    return torch.stack([row(post.matvec(shaped(unit, post.mean))) for unit in torch.eye(size, dtype=DOUBLE)], 1)


def dense(model, x, post):
    """J S J^T of every example."""
    found = jacobians(model, x)
    jacobian = torch.cat([found[name].flatten(2) for name in post.mean], 2)
    return jacobian @ covariance(post) @ jacobian.mT


def straight(variances, means):
    """A model, its posterior and inputs for which the outputs have these means and variances, of all inputs independent."""
    model = nn.Linear(2, 1, bias=False, dtype=DOUBLE).eval()
    precision = {"weight": torch.tensor([[math.inf, 1.0]], dtype=DOUBLE)}
    post = br.Posterior({"weight": torch.tensor([[1.0, 0.0]], dtype=DOUBLE)}, precision)
    return model, post, torch.stack([means, variances.sqrt()], 1)


def double(values):
    return torch.tensor(values, dtype=DOUBLE)


class TestGolden:
    @pytest.mark.parametrize("variance", ["layerwise", "exact", "last_layer"])
    def test_ridge(self, variance):
        golden = GOLDEN["ridge_glm"]
        model = nn.Linear(4, 1, bias=False, dtype=DOUBLE).eval()
        post = br.Posterior.of(br.Full(double(golden["theta"]), double(golden["precision"])), {"weight": (1, 4)})
        how = dict(link="identity", variance=variance, noise_variance=golden["noise_variance"])
        found = br.predict(model, post, double(golden["x_test"]), "glm", **how)
        close(found.mean[:, 0], double(golden["f_mean"]), 1e-9)
        close(found.variance[:, 0], double(golden["f_var"]), 1e-9)
        close(found.total_variance[:, 0], double(golden["y_var"]), 1e-9)

    @pytest.mark.parametrize("variance", ["layerwise", "exact", "last_layer"])
    @pytest.mark.parametrize(
        ("link_approx", "key", "tolerance"), [("quadrature", "prob_quadrature", 1e-6), ("probit", "prob_probit", 1e-9)]
    )
    def test_logistic(self, variance, link_approx, key, tolerance):
        golden = GOLDEN["logistic_glm"]
        model = nn.Linear(3, 1, bias=False, dtype=DOUBLE).eval()
        post = br.Posterior.of(br.Full(double(golden["theta"]), double(golden["precision"])), {"weight": (1, 3)})
        x, how = double(golden["x_test"]), dict(link="sigmoid", variance=variance, link_approx=link_approx)
        found = br.predict(model, post, x, "glm", **how)
        close(found.mean[:, 0], double(golden["f_mean"]), 1e-9)
        close(found.variance[:, 0], double(golden["f_var"]), 1e-9)
        close(found.probs[:, 0], double(golden[key]), tolerance)
        close(br.predict(model, post, x, "mean", link="sigmoid").probs[:, 0], double(golden["prob_mean_only"]), 1e-9)

    @pytest.mark.parametrize(("link_approx", "key", "tolerance"), [("quadrature", "quadrature", 1e-6), ("probit", "probit", 1e-12)])
    def test_sigmoid_of_a_gaussian(self, link_approx, key, tolerance):
        grid = GOLDEN["binary_sigmoid_gaussian"]
        means, variances, wanted = (double([case[name] for case in grid]) for name in ("mean", "variance", key))
        model, post, x = straight(variances, means)
        found = br.predict(model, post, x, "glm", link="sigmoid", link_approx=link_approx)
        close(found.variance[:, 0], variances, 1e-12)
        close(found.probs[:, 0], wanted, tolerance)
        close(found.log_probs.exp(), found.probs, 1e-12)

    @pytest.mark.parametrize("link_approx", ["probit", "bridge", "bridge_norm"])
    @pytest.mark.parametrize("number", range(len(LAPLACE)))
    def test_links_of_laplace_torch(self, number, link_approx):
        """Numbers that laplace-torch 0.2.2.2 gave for these moments."""
        case = LAPLACE[number]
        how = module.Linear("softmax", "exact", link_approx, 1.0, 1.0, 4, 0, False, False, None, print, print)
        mean, matrix = double(case["mean"]), double(case["covariance"])
        found = module._through_link(module.Moments(mean, matrix.diagonal(dim1=1, dim2=2), matrix), how)
        close(found.probs, double(case[link_approx]), 1e-6)


class TestMoments:
    @pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_of_every_structure_equal_those_of_the_jacobian(self, kind, loaded, tmp_path):
        model = seeded(MLP)
        post = posterior(model, kind)
        wanted = dense(model, X, post)
        if loaded:
            post.save(tmp_path / "posterior.safetensors")
            post = br.Posterior.load(tmp_path / "posterior.safetensors")
        found = br.predict(model, post, X, "glm", variance="exact", batch_size=2)
        close(found.mean, model(X).detach(), 1e-12)
        close(found.covariance, wanted, 1e-10)
        close(found.variance, wanted.diagonal(dim1=1, dim2=2), 1e-10)
        by_layer = br.predict(model, post, X, "glm")
        assert by_layer.covariance is None
        close(by_layer.variance, found.variance, 1e-10)
        close(by_layer.probs, found.probs, 1e-10)

    def test_of_convolutions(self):
        model, x = seeded(cnn), normal(2, 4, 2, 6, 6)
        post = posterior(model)
        wanted = dense(model, x, post)
        found = br.predict(model, post, x, "glm")
        close(found.variance, wanted.diagonal(dim1=1, dim2=2), 1e-10)
        close(br.predict(model, post, x, "glm", variance="exact").covariance, wanted, 1e-10)

    def test_of_a_kronecker_product(self):
        model = nn.Linear(3, 2, bias=False, dtype=DOUBLE).eval()
        q = br.Kronecker(model.weight.detach().clone(), br.KroneckerProduct(positive(1, 2), positive(2, 3)))
        post = br.Posterior.of(q, {"weight": (2, 3)})
        close(br.predict(model, post, X, "glm", variance="exact").covariance, dense(model, X, post), 1e-10)

    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_of_the_last_layer(self, kind):
        model = seeded(MLP)
        post = posterior(model, kind)
        jacobian = torch.cat([jacobians(model, X)[name].flatten(2) for name in post.mean], 2)
        own = torch.cat([torch.full((p.numel(),), name.startswith("4.")) for name, p in post.mean.items()])
        wanted = jacobian[:, :, own] @ covariance(post)[own][:, own] @ jacobian[:, :, own].mT
        for link_approx in ("probit", "mc"):
            found = br.predict(model, post, X, "glm", variance="last_layer", link_approx=link_approx)
            close(found.variance, wanted.diagonal(dim1=1, dim2=2), 1e-10)
        close(found.covariance, wanted, 1e-10)

    def test_weights_that_are_known_exactly_add_nothing(self):
        model = seeded(MLP)
        post = posterior(model)
        some = br.Posterior(
            post.mean, {n: s if n.startswith("4.") else torch.full_like(s, math.inf) for n, s in post.precision.items()}
        )
        close(br.predict(model, some, X, "glm").variance, br.predict(model, post, X, "glm", variance="last_layer").variance, 1e-12)

    def test_tied_weights_and_a_module_under_two_names(self):
        layer = nn.Linear(3, 3, dtype=DOUBLE)
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 3, dtype=DOUBLE)).eval()
        model[3].weight = layer.weight
        post = posterior(model)
        wanted = dense(model, X, post).diagonal(dim1=1, dim2=2)
        close(br.predict(model, post, X, "glm").variance, wanted, 1e-10)
        found = br.predict(model, post, X, "glm", variance="sampled", num_samples=2000).variance
        assert ((found / wanted - 1).abs() < 4.5 * math.sqrt(2 / 2000)).all()
        assert model[0] is model[2]
        assert model[3].weight is layer.weight

    @pytest.mark.filterwarnings("ignore:no closed form for Choosy")
    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_examples_that_layers_cannot_tell_apart_go_one_by_one_and_it_is_said_once(self, kind):
        class Choosy(nn.Linear):
            def forward(self, x):
                return super().forward(x) if x.sum() > 1e6 else super().forward(x).tanh()  # vmap takes no such choice

        torch.manual_seed(0)
        model, plain = nn.Sequential(Choosy(3, 2, dtype=DOUBLE)).eval(), seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
        plain.load_state_dict(model.state_dict())
        for how in (dict(), dict(variance="exact")):
            with pytest.warns(UserWarning, match="no per-example gradients.* one by one") as told:
                found = br.predict(model, posterior(model, kind), X, "glm", batch_size=2, **how)
            assert sum("one by one" in str(each.message) for each in told) == 1
            wanted = br.predict(plain, posterior(plain, kind), X, "glm", **how)
            close(found.mean, wanted.mean, 1e-12)
            close(found.variance, wanted.variance, 1e-10)
            close(found.probs, wanted.probs, 1e-10)

    def test_images_are_flattened_and_come_back_in_shape(self):
        model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)))
        x = normal(3, 2, 2, 9, 9)
        post = posterior(model)
        flat = nn.Sequential(model, nn.Flatten())
        renamed = br.Posterior({f"0.{n}": m for n, m in post.mean.items()}, {f"0.{n}": s for n, s in post.precision.items()})
        found = br.predict(model, post, x, "glm", link="identity")
        assert found.variance.shape == (2, 1, 9, 9)
        close(found.variance.flatten(1), dense(flat, x, renamed).diagonal(dim1=1, dim2=2), 1e-10)
        with pytest.raises(ValueError, match=r"a matrix of all 81 outputs .* take variance='sampled', or 'layerwise'"):
            br.predict(model, post, x, "glm", link="identity", variance="exact")


class TestSampled:
    def test_variances_are_off_by_the_share_that_is_promised(self):
        model, count = seeded(MLP), 1000
        post = posterior(model)
        wanted = dense(model, X, post).diagonal(dim1=1, dim2=2)
        few, many = (
            br.predict(model, post, X, "glm", variance="sampled", num_samples=n, link="identity").variance / wanted - 1
            for n in (10, count)
        )
        assert (many.abs() < 4.5 * math.sqrt(2 / count)).all()
        assert few.square().mean().sqrt() == pytest.approx(math.sqrt(2 / 10), rel=0.7)
        assert many.square().mean().sqrt() == pytest.approx(math.sqrt(2 / count), rel=0.7)

    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_draws_covary_across_inputs(self, kind):
        model, count = seeded(MLP), 2000
        post = posterior(model, kind)
        jacobian = torch.cat([jacobians(model, X)[name].flatten(2) for name in post.mean], 2).flatten(0, 1)
        wanted = jacobian @ covariance(post) @ jacobian.T
        found = br.predict(model, post, X, "glm", variance="sampled", num_samples=count, batch_size=2)
        offsets = (found.samples - found.mean).flatten(1)
        scale = (wanted.diagonal().outer(wanted.diagonal()) + wanted**2).sqrt()
        assert ((offsets.T @ offsets / count - wanted).abs() < 4.5 * scale / math.sqrt(count)).all()

    @pytest.mark.parametrize("antithetic", [False, True])
    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_of_a_linear_model_are_the_draws_of_mc(self, kind, antithetic):
        model = nn.Linear(3, 4, dtype=DOUBLE).eval()
        post = posterior(model, kind)
        how = dict(num_samples=6, seed=3, antithetic=antithetic)
        found = br.predict(model, post, X, "glm", variance="sampled", link_approx="mc", **how)
        wanted = br.predict(model, post, X, "mc", **how)
        rows = [torch.nn.functional.linear(X, **post.sample(3, draw)) for draw in range(0, 6, 1 + antithetic)]
        close(found.samples[:: 1 + antithetic], torch.stack(rows), 1e-10)
        for name in ("probs", "entropy", "mutual_information", "log_probs"):
            close(getattr(found, name), getattr(wanted, name), 1e-9)

    def test_the_mixed_link_takes_each_position_by_itself(self):
        model = nn.Linear(3, 4, dtype=DOUBLE).eval()
        post = posterior(model, "full")
        x = normal(2, 3, 2, 3)
        by_draws = br.predict(model, post, x, "glm", variance="sampled", link_approx="bridge", num_samples=4000)
        exact = br.predict(model, post, x, "glm", link_approx="bridge")
        apart = br.predict(model, post, x.flatten(0, 1), "glm", link_approx="bridge")
        close(exact.probs.flatten(0, 1), apart.probs, 1e-10)
        assert (by_draws.probs - exact.probs).abs().max() < 0.05

    def test_what_has_no_forward_derivative_takes_two_backwards_and_says_so_once(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                return 2 * ctx.saved_tensors[0] * grad

        class Odd(nn.Linear):
            def forward(self, x):
                return Square.apply(super().forward(x))

        odd, plain = Odd(3, 2, dtype=DOUBLE).eval(), nn.Linear(3, 2, dtype=DOUBLE).eval()
        plain.load_state_dict(odd.state_dict())
        with pytest.warns(UserWarning, match="Odd has no forward derivatives") as told:
            found = br.predict(odd, posterior(odd), X, "glm", variance="sampled", num_samples=4, batch_size=2)
        assert len(told) == 1
        inner = br.predict(plain, posterior(plain), X, "glm", variance="sampled", num_samples=4)
        close(found.samples - found.mean, (inner.samples - inner.mean) * 2 * inner.mean, 1e-10)

    def test_attention(self):
        class Attentive(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
                self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

            def forward(self, x):
                return self.layer(self.inner(x, x, x, need_weights=False)[0])

        model = seeded(Attentive)
        post = posterior(model).rescale(ess=1e16)
        x = normal(2, 3, 5, 4)
        how = dict(link="identity", num_samples=4)
        found = br.predict(model, post, x, "glm", variance="sampled", **how)
        wanted = br.predict(model, post, x, "mc", **how)  # with so little spread every model is linear
        offsets = (found.samples - found.mean) * 1e8
        close(offsets.var(0, correction=0), wanted.variance * 1e16, 1e-4 * offsets.square().max().item())


class TestLinks:
    def moments(self):
        model = nn.Linear(3, 4, dtype=DOUBLE).eval()
        return model, posterior(model, "full")

    def test_draws_of_logits_agree_with_draws_of_weights_in_distribution(self):
        model, post = self.moments()
        count = 4000
        one, two = (
            br.predict(model, post, X, method, num_samples=count, link_approx="mc", vmap=vmap)
            for method, vmap in (("glm", None), ("mc", 500))
        )
        error = (2 * one.probs * (1 - one.probs) / count).sqrt()  # at most
        assert ((one.probs - two.probs).abs() < 4.5 * error).all()
        assert (one.probs - br.predict(model, post, X, "mean").probs).abs().max() > 5 * error.max()

    def test_the_exact_integral_agrees_with_draws_of_weights_in_distribution(self):
        model, count = nn.Linear(3, 1, dtype=DOUBLE).eval(), 4000
        post = posterior(model, "full")
        exact = br.predict(model, post, X, "glm", link="sigmoid", link_approx="quadrature")
        drawn = br.predict(model, post, X, "mc", link="sigmoid", num_samples=count, vmap=500)
        assert ((exact.probs - drawn.probs).abs() < 4.5 * (exact.probs * (1 - exact.probs) / count).sqrt()).all()
        assert ((exact.mutual_information - drawn.mutual_information).abs() < 0.03).all()

    @pytest.mark.parametrize("std", [0.0, 0.3, 1.4, 1.6, 3.0])
    def test_the_exact_integral_and_its_entropy_are_those_of_many_nodes(self, std):
        means = torch.tensor([-4.0, 0.0, 0.7, 3.0], dtype=DOUBLE)
        model, post, x = straight(torch.full((4,), std**2, dtype=DOUBLE), means)
        found = br.predict(model, post, x, "glm", link="sigmoid", link_approx="quadrature")
        probs, own = torch.zeros(4, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
        for at, weight in gauss_hermite(200):
            p = (means + at * std).sigmoid()
            probs, own = probs + weight * p, own + weight * (torch.special.entr(p) + torch.special.entr(1 - p))
        close(found.probs[:, 0], probs, 1e-7)
        close((found.entropy - found.mutual_information)[:, 0], own, 1e-6)

    @pytest.mark.parametrize("antithetic", [False, True])
    @pytest.mark.parametrize("variance", ["layerwise", "exact", "last_layer", "sampled"])
    @pytest.mark.parametrize("link_approx", ["probit", "mc", "bridge", "bridge_norm"])
    def test_give_probabilities_and_uncertainty_that_is_split(self, link_approx, variance, antithetic):
        model, post = self.moments()
        found = br.predict(model, post, X, "glm", link_approx=link_approx, variance=variance, num_samples=16, antithetic=antithetic)
        close(found.probs.sum(-1), torch.ones(5, dtype=DOUBLE), 1e-10)
        close(found.entropy, -(found.probs * found.log_probs).sum(-1), 1e-10)
        assert (found.mutual_information is None) == (link_approx == "probit")
        if link_approx != "probit":
            assert (found.mutual_information >= 0).all()
            assert (found.mutual_information > 1e-3).any()
            assert (found.mutual_information <= found.entropy).all()

    def test_the_bridges_entropies_are_those_of_its_dirichlet(self):
        mean, matrix = normal(1, 3, 4), torch.stack([positive(n, 4) for n in range(3)])
        how = module.Linear("softmax", "exact", "bridge", 1.0, 1.0, 4, 0, False, False, None, print, print)
        f = module.Moments(mean, matrix.diagonal(dim1=1, dim2=2), matrix)
        log_probs, own = module._bridge(f, how, False)
        sums = matrix.sum(-1)
        f = mean - sums * mean.sum(-1, keepdim=True) / sums.sum(-1)[:, None]
        v = matrix.diagonal(dim1=1, dim2=2) - sums**2 / sums.sum(-1)[:, None]
        alpha = (1 - 2 / 4 + f.exp() * (-f).exp().sum(-1, keepdim=True) / 16) / v
        close(log_probs.exp(), alpha / alpha.sum(-1, keepdim=True), 1e-12)
        torch.manual_seed(0)
        drawn = torch.distributions.Dirichlet(alpha).sample((20000,))
        entropies = torch.special.entr(drawn).sum(-1)
        assert ((own - entropies.mean(0)).abs() < 4.5 * entropies.std(0) / math.sqrt(20000)).all()

    def test_large_logits_do_not_overflow(self):
        mean = torch.tensor([[200.0, -200.0, 0.0]])
        how = module.Linear("softmax", "exact", "bridge", 1.0, 1.0, 4, 0, False, False, None, print, print)
        found = module._through_link(module.Moments(mean, torch.ones(1, 3), torch.eye(3)[None]), how)
        close(found.probs, torch.tensor([[1.0, 0.0, 0.0]]), 1e-6)
        assert found.mutual_information.isfinite().all()

    @pytest.mark.parametrize(
        "how",
        [
            *(dict(method="glm", link_approx=each) for each in ("probit", "mc", "bridge", "bridge_norm")),
            dict(method="glm", link="sigmoid", link_approx="quadrature"),
            dict(method="glm", link_approx="mc", variance="sampled"),
            dict(method="mean"),
            dict(method="mc"),
            dict(method="mc", combine="logits"),
            dict(method="mc", link="sigmoid"),
        ],
        ids=str,
    )
    def test_a_temperature_divides_logits(self, how):
        class Cold(nn.Module):
            def forward(self, x):
                return x / 2.5

        model, cold = seeded(lambda: nn.Sequential(nn.Linear(3, 4))), seeded(lambda: nn.Sequential(nn.Linear(3, 4), Cold()))
        cold.load_state_dict(model.state_dict())
        found = br.predict(model, posterior(model), X, temperature=2.5, num_samples=8, **how)
        wanted = br.predict(cold, posterior(cold), X, num_samples=8, **how)
        close(found.probs, wanted.probs, 1e-10)
        close(found.mean, wanted.mean * 2.5, 1e-10)
        close(found.variance, wanted.variance * 2.5**2, 1e-10)


class TestTau:
    WAYS = (
        *(dict(method="glm", link_approx=each) for each in ("probit", "mc", "bridge", "bridge_norm")),
        dict(method="glm", variance="sampled"),
        dict(method="glm", variance="sampled", link_approx="mc"),
        dict(method="glm", variance="last_layer"),
        dict(method="glm", link="sigmoid", link_approx="quadrature"),
        dict(method="glm", link="identity"),
        dict(method="mc"),
    )

    @pytest.mark.parametrize("how", WAYS, ids=str)
    def test_infinite_is_the_mean(self, how):
        model = seeded(MLP)
        link = {"link": how.get("link", "softmax")}
        found = br.predict(model, posterior(model), X, tau=math.inf, num_samples=4, **how)
        wanted = br.predict(model, posterior(model), X, "mean", **link)
        assert torch.equal(found.mean, wanted.mean)
        assert not found.variance.any()
        if wanted.probs is not None:
            close(found.probs, wanted.probs, 1e-14)

    @pytest.mark.parametrize("how", [way for way in WAYS if "bridge" not in str(way)], ids=str)
    def test_large_is_close_to_the_mean(self, how):
        model = seeded(MLP)
        found = br.predict(model, posterior(model), X, tau=1e20, num_samples=4, **how)
        wanted = br.predict(model, posterior(model), X, "mean", link=how.get("link", "softmax"))
        close(found.mean, wanted.mean, 1e-8)
        if wanted.probs is not None:
            close(found.probs, wanted.probs, 1e-8)

    @pytest.mark.parametrize("kind", STRUCTURES)
    @pytest.mark.parametrize("how", WAYS, ids=str)
    def test_is_a_larger_ess(self, how, kind):
        model = seeded(MLP)
        post = posterior(model, kind)
        found = br.predict(model, post, X, tau=3.0, num_samples=4, **how)
        wanted = br.predict(model, post.rescale(ess=3 * post.ess), X, num_samples=4, **how)
        close(found.variance, wanted.variance, 1e-10)
        if wanted.probs is not None:
            close(found.probs, wanted.probs, 1e-10)


class TestMixtures:
    @pytest.mark.parametrize(
        "how", [dict(), dict(link_approx="mc"), dict(link="sigmoid", link_approx="quadrature"), dict(link="identity")]
    )
    def test_are_linearized_by_component_and_averaged(self, how, tmp_path):
        model = seeded(MLP)
        each = [posterior(model), posterior(seeded(lambda: (MLP(), MLP())[1]), "full")]
        mixture = br.Posterior.mixture(each, [3.0, 1.0])
        mixture.save(tmp_path / "posterior.safetensors")
        for post in (mixture, br.Posterior.load(tmp_path / "posterior.safetensors")):
            found = br.predict(model, post, X, "glm", **how)
            one, two = (br.predict(model, p, X, "glm", **how) for p in each)
            mean = 0.75 * one.mean + 0.25 * two.mean
            close(found.mean, mean, 1e-12)
            second = 0.75 * (one.variance + one.mean**2) + 0.25 * (two.variance + two.mean**2)
            close(found.variance, second - mean**2, 1e-10)
            if how.get("link") == "identity":
                assert found.probs is None
                continue
            probs = 0.75 * one.probs + 0.25 * two.probs
            close(found.probs, probs, 1e-12)
            total = torch.special.entr(probs)
            total = total + torch.special.entr(1 - probs) if "link" in how else total.sum(-1)
            close(found.entropy, total, 1e-12)
            if how:
                own = 0.75 * (one.entropy - one.mutual_information) + 0.25 * (two.entropy - two.mutual_information)
                close(found.mutual_information, total - own, 1e-12)
            else:
                assert found.mutual_information is None

    def test_of_one_matrix(self):
        model = nn.Linear(3, 2, bias=False, dtype=DOUBLE).eval()
        q = br.Mixture(normal(1, 3, 6), normal(2, 3, 6).abs() + 0.5, normal(3, 3))
        found = br.predict(model, br.Posterior.of(q, {"weight": (2, 3)}), X, "glm", link="identity")
        drawn = br.predict(model, br.Posterior.of(q, {"weight": (2, 3)}), X, "mc", link="identity", num_samples=4000)
        assert ((found.mean - drawn.mean).abs() < 4.5 * (found.variance / 4000).sqrt()).all()
        assert ((found.variance / drawn.variance - 1).abs() < 0.15).all()

    @pytest.mark.parametrize("q", [br.Signs(normal(1, 6), ess=3.0), br.SpikeAndSlab(normal(1, 6), 0.6, (3, 2))])
    def test_what_is_no_gaussian_is_refused(self, q):
        model = nn.Linear(3, 2, bias=False, dtype=DOUBLE).eval()
        with pytest.raises(ValueError, match="linearizes Gaussians and mixtures of them, and this posterior has the structure"):
            br.predict(model, br.Posterior.of(q, {"weight": (2, 3)}), X, "glm")


class TestOthers:
    def test_combine_logits_forgets_the_disagreement(self):
        model = nn.Linear(3, 4, dtype=DOUBLE).eval()
        post = posterior(model)
        rows = torch.stack([torch.nn.functional.linear(X, **post.sample(0, draw)) for draw in range(8)])
        found = br.predict(model, post, X, "mc", num_samples=8, combine="logits")
        close(found.probs, rows.mean(0).softmax(-1), 1e-10)
        assert found.mutual_information is None
        assert (found.probs - rows.softmax(-1).mean(0)).abs().max() > 1e-2

    @pytest.mark.parametrize("noise", [0.3, [0.1, 0.2, 0.3, 0.4]], ids=["number", "each"])
    @pytest.mark.parametrize("method", ["mean", "mc", "glm"])
    def test_noise_is_the_aleatoric_part(self, method, noise):
        model = nn.Linear(3, 4, dtype=DOUBLE).eval()
        noise = torch.tensor(noise, dtype=DOUBLE)
        found = br.predict(model, posterior(model), X, method, link="identity", noise_variance=noise, num_samples=4)
        close(found.noise_variance, noise.expand(5, 4), 0)
        close(found.total_variance, found.variance + noise, 1e-12)
        assert torch.equal(br.predict(model, None, X, link="identity").total_variance, torch.zeros(5, 4, dtype=DOUBLE))

    def test_the_posterior_says_how_to_predict(self):
        model = seeded(MLP)
        post = posterior(model)
        object.__setattr__(post, "method_hint", "glm")
        close(br.predict(model, post, X).probs, br.predict(model, post, X, "glm").probs, 1e-12)
        close(br.predict(model, post, X, "mc", num_samples=4).probs, br.predict(model, posterior(model), X, num_samples=4).probs, 0)

    @pytest.mark.parametrize(
        "how", [dict(), dict(variance="sampled"), dict(link_approx="mc"), dict(variance="last_layer")], ids=str
    )
    def test_leaves_everything_as_it_was_and_does_not_mind_batches(self, how):
        model = seeded(cnn)
        post = posterior(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        model[0].weight.requires_grad_(False)
        before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
        x = normal(2, 5, 2, 6, 6)
        with torch.inference_mode():
            found = br.predict(model, post, x.clone(), "glm", **how)
        for t, old in zip(model.state_dict().values(), before.values(), strict=True):
            assert torch.equal(t, old)
        assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
        assert torch.equal(torch.get_rng_state(), random)
        assert not found.probs.requires_grad
        parts = br.predict(model, post, x, "glm", batch_size=2, **how)
        for name in ("probs", "mean", "variance", "entropy"):
            close(getattr(parts, name), getattr(found, name), 1e-10)
        assert br.predict(model, post, x[:0], "glm", **how).probs.shape == (0, 3)

    def test_batch_norm_is_settled_at_the_mean(self):
        model, x = seeded(cnn), normal(2, 5, 2, 6, 6)
        post = posterior(model)
        found = br.predict(model, post, x, "glm", batch_norm=[x])
        close(found.mean, br.predict(model, post, x, "mean", batch_norm=[x]).mean, 1e-12)
        assert (found.mean - br.predict(model, post, x, "mean").mean).abs().max() > 1e-3

    def test_half_precision_and_float32(self):
        for dtype in (torch.bfloat16, torch.float32):
            model = seeded(MLP).to(dtype)
            for variance in ("layerwise", "exact", "last_layer", "sampled"):
                found = br.predict(model, posterior(model), X.to(dtype), "glm", variance=variance)
                assert {found.probs.dtype, found.variance.dtype, found.mean.dtype} == {torch.float32}
                assert found.variance.isfinite().all()


class Tokens(nn.Module):
    """Logits of the tokens that follow, linear in the weights."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 6, dtype=DOUBLE)
        self.eval()

    def forward(self, text):
        return self.table(text).cumsum(1)


class TestSequences:
    text = torch.tensor([[0, 3, 5, 1], [2, 2, 4, 0], [1, 5, 3, 3]])
    labels = torch.tensor([[3, 5, 1, 2], [2, 4, -100, -100], [5, 3, 3, -100]])

    def logits(self, model, post):
        rows = []
        for draw in range(8):
            with br.sampled(model, post, 0, draw), torch.no_grad():
                rows.append(model(self.text).log_softmax(-1))
        return torch.stack(rows)

    def test_tokens_are_averaged_one_by_one_and_sequences_as_wholes(self):
        model = Tokens()
        post = posterior(model)
        logs = self.logits(model, post)
        found = br.predict(model, post, self.text, "mc", num_samples=8, labels=self.labels)
        close(found.probs, logs.exp().mean(0), 1e-10)
        picked = logs.gather(-1, self.labels.clamp_min(0).expand(8, 3, 4)[..., None])[..., 0] * (self.labels >= 0)
        close(found.sequence_log_probs, picked.sum(-1).logsumexp(0) - math.log(8), 1e-10)
        tokens = (logs.logsumexp(0) - math.log(8)).gather(-1, self.labels.clamp_min(0)[..., None])[..., 0] * (self.labels >= 0)
        assert (found.sequence_log_probs - tokens.sum(-1)).abs().max() > 0.1  # another rule
        alone = br.predict(model, post, self.text, "mean", labels=self.labels)
        close(
            alone.sequence_log_probs,
            (alone.log_probs.gather(-1, self.labels.clamp_min(0)[..., None])[..., 0] * (self.labels >= 0)).sum(-1),
            1e-10,
        )

    def test_linearized_draws_serve_all_positions(self):
        model = Tokens()
        post = posterior(model)
        how = dict(num_samples=8, labels=self.labels)
        found = br.predict(model, post, self.text, "glm", variance="sampled", link_approx="mc", **how)
        close(found.sequence_log_probs, br.predict(model, post, self.text, "mc", **how).sequence_log_probs, 1e-9)
        mixture = br.Posterior.mixture([post, post], [1.0, 3.0])
        again = br.predict(model, mixture, self.text, "glm", variance="sampled", link_approx="mc", **how)
        close(again.sequence_log_probs, found.sequence_log_probs, 1e-9)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (dict(method="glm"), "take variance='sampled' and link_approx='mc', or method='mc'"),
            (dict(method="mc", combine="logits"), "link='softmax' and combine='probs'"),
            (dict(method="mean", link="identity"), "link='softmax' and combine='probs'"),
            (dict(method="mean", labels=torch.zeros(3, 3)), r"labels of shape \(3, 3\) do not fit outputs for \(3, 4\)"),
        ],
        ids=str,
    )
    def test_labels_that_do_not_fit_are_refused(self, how, message):
        model = Tokens()
        with pytest.raises(ValueError, match=message):
            br.predict(model, posterior(model), self.text, **{"labels": self.labels, **how})


class TestComplaints:
    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (dict(variance="jacobian"), "unknown variance 'jacobian'; take one of 'layerwise', 'exact', 'last_layer', 'sampled'"),
            (dict(link_approx="sum"), "unknown link_approx 'sum' for link='softmax'; take one of 'probit', 'mc', 'bridge'"),
            (dict(link_approx="quadrature"), "unknown link_approx 'quadrature' for link='softmax'"),
            (dict(link="sigmoid", link_approx="bridge"), "unknown link_approx 'bridge' for link='sigmoid'"),
            (dict(tau=0), "tau must be a number > 0, or inf for the mean, got 0"),
            (dict(tau=math.nan), "tau must be a number > 0, or inf for the mean, got nan"),
            (dict(temperature=0), "temperature must be a number > 0, got 0"),
            (dict(temperature=math.inf), "temperature must be a number > 0, got inf"),
            (dict(combine="votes"), "unknown combine 'votes'; take 'probs' or 'logits'"),
            (dict(combine="logits"), "combine='logits' of linearized outputs is the mean"),
            (dict(vmap=4), "take vmap=None for 'glm'"),
            (dict(noise_variance=1.0), "noise_variance is that of a regression"),
            (dict(noise_variance=-1.0, link="identity"), "noise_variance must be >= 0, got -1.0"),
            (dict(num_samples=0), "num_samples must be a whole number >= 1"),
            (dict(posterior=None), "method 'glm' linearizes under a posterior, and there is none"),
        ],
        ids=str,
    )
    def test_settings_that_do_not_fit_are_refused(self, how, message):
        model = seeded(MLP)
        with pytest.raises(ValueError, match=message):
            br.predict(model, **{"posterior": posterior(model), "x": X, "method": "glm", **how})

    def test_a_model_in_training_mode(self):
        model = seeded(MLP)
        with pytest.warns(UserWarning, match="model is in training mode"):
            br.predict(model.train(), posterior(model), X, "glm")

    @pytest.mark.parametrize("how", [dict(variance="sampled"), dict(link_approx="mc")], ids=str)
    def test_few_draws(self, how):
        model = seeded(MLP)
        with pytest.warns(UserWarning, match="an average over 2 draws"):
            br.predict(model, posterior(model), X, "glm", num_samples=2, **how)

    @pytest.mark.parametrize("variance", ["layerwise", "sampled"])
    def test_outputs_and_variances_that_are_not_finite(self, variance):
        model = seeded(MLP)
        with pytest.raises(RuntimeError, match="draw 0 gave non-finite outputs in 1 of 5 rows"):
            br.predict(model, posterior(model), torch.where(torch.arange(5)[:, None] == 0, math.inf, X), "glm", variance=variance)
        wide = br.Posterior(posterior(model).mean, {n: torch.full_like(s, 1e-308) for n, s in posterior(model).precision.items()})
        with pytest.raises(RuntimeError, match=r"no finite variance in 5 of 5 rows; .* try rescale\(ess=...\)"):
            br.predict(model, wide, X * 1e3, "glm", variance=variance)

    def test_probabilities_for_logits(self):
        model = nn.Sequential(seeded(MLP), nn.Softmax(-1)).eval()
        with pytest.raises(ValueError, match="outputs sum to 1 in every row"):
            br.predict(model, posterior(model), X, "glm")

    def test_names_of_another_model(self):
        model = seeded(MLP)
        with pytest.raises(
            KeyError, match=r"posterior holds 'module.0.weight' but the model has '0.weight'; pass strip_prefix='module.'"
        ):
            br.predict(model, posterior(nn.ModuleDict({"module": model})), X, "glm")

    def test_no_linear_layer_at_the_end(self):
        model = nn.Sequential(seeded(MLP), nn.Tanh()).eval()
        with pytest.raises(ValueError, match="outputs come from no linear layer"):
            br.predict(model, posterior(model), X, "glm", variance="last_layer")

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (dict(link_approx="mc"), r"needs 4.0 GB .*\(N=1000, K=1000\); use variance='sampled' or link_approx='probit'"),
            (dict(variance="exact"), "use variance='sampled' or variance='layerwise'"),
            (dict(variance="sampled", link_approx="bridge"), "needs 4.0 GB .* use link_approx='mc'"),
        ],
        ids=str,
    )
    def test_matrices_that_do_not_fit_are_refused_before_they_are_formed(self, how, message, monkeypatch):
        monkeypatch.setattr(module, "LIMIT", 10**9)
        model = nn.Linear(2, 1000).eval()
        with pytest.raises(RuntimeError, match=message):
            br.predict(model, br.Posterior.point(model), torch.zeros(1000, 2), "glm", **how)

    def test_gradients_that_do_not_fit_are_refused(self, monkeypatch):
        monkeypatch.setattr("bayesrule.uses.products.LIMIT", 100)
        model = seeded(MLP)
        for how in (dict(), dict(link_approx="mc")):
            with pytest.raises(RuntimeError, match="GiB an example; take variance='sampled' or variance='last_layer'"):
                br.predict(model, posterior(model, "full"), X, "glm", **how)

    @pytest.mark.parametrize(("count", "words"), [(999, "999.0 bytes"), (7.0e12, "7.0 TB"), (7e17, "700000.0 TB"), (2e6, "2.0 MB")])
    def test_sizes_in_words(self, count, words):
        assert module._bytes(count) == words
