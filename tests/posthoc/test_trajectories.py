"""Posteriors from Adam's second moments, from the weights of a trajectory, and from the ends of several runs."""

import copy
import math

import numpy as np
import pytest
import torch
from tests.contracts import close, normal
from tests.instances import Network, flat, state, train
from torch import nn
from torch.distributions import MultivariateNormal

import bayesrule as br

ADAMS = {
    "torch Adam": (torch.optim.Adam, {}, "exp_avg_sq"),
    "torch AdamW": (torch.optim.AdamW, {}, "exp_avg_sq"),
    "torch RMSprop": (torch.optim.RMSprop, {}, "square_avg"),
    "Adam": (br.Adam, {}, "exp_avg_sq"),
    "AdamW": (br.AdamW, {}, "exp_avg_sq"),
    "RMSprop": (br.RMSprop, {}, "square_avg"),
}


def trained(name, steps=5):
    make, how, key = ADAMS[name]
    net = Network()
    optimizer = make(net.parameters(), lr=0.01, **how)
    train(net, optimizer, steps)
    return net, optimizer, key


class TestFromAdam:
    @pytest.mark.parametrize("name", ADAMS)
    def test_precision_is_that_of_the_memory_perturbation_equation(self, name, tmp_path):
        net, optimizer, key = trained(name)
        post = br.Posterior.from_adam(optimizer, net, num_data=64, prior_precision=0.5)
        close(flat(post.precision.values()), 64 * state(optimizer, key).sqrt() + 0.5, 1e-14)
        assert torch.equal(flat(post.mean.values()), flat(net.parameters()))
        assert (post.ess, post.num_data, post.structure, post.method_hint) == (64.0, 64, "diag", "glm")
        post.save(tmp_path / "p.safetensors")
        assert torch.equal(flat(br.Posterior.load(tmp_path / "p.safetensors").variance.values()), flat(post.variance.values()))

    @pytest.mark.parametrize(("name", "beta"), [("torch Adam", 0.999), ("AdamW", 0.999), ("torch RMSprop", 0.99)])
    def test_debiased_it_is_the_average_of_the_squares(self, name, beta):
        net, optimizer, key = trained(name)
        post = br.Posterior.from_adam(optimizer, net, 64, debias=True)
        close(flat(post.precision.values()), 64 * (state(optimizer, key) / (1 - beta**5)).sqrt() + 1, 1e-12)

    def test_weights_that_it_does_not_train_are_known_exactly(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        optimizer = torch.optim.Adam(net[1].parameters())
        net(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        post = br.Posterior.from_adam(optimizer, net, 4)
        assert post.precision["0.weight"].isinf().all()
        assert post.precision["1.weight"].isfinite().all()

    @pytest.mark.parametrize(
        ("make", "how", "message"),
        [
            (torch.optim.SGD, {}, "SGD has no second moments"),
            (torch.optim.Adam, dict(steps=0), "Adam has no second moments .*: take steps before"),
            (torch.optim.Adam, dict(other=True), "trains 4 tensors that are no parameters of the model"),
            (torch.optim.Adam, dict(prior=0.0), "prior_precision must be a number > 0, got 0.0"),
            (torch.optim.Adam, dict(num_data=0), "num_data must be a whole number >= 1, got 0"),
            (torch.optim.Adam, dict(spoil=math.nan), "the second moment of '0.weight' has entries that are negative or not finite"),
            (torch.optim.Adam, dict(frozen=True), "'1.bias' has no second moment: it never had a gradient"),
        ],
    )
    def test_misuse_is_told(self, make, how, message):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        optimizer = make(net.parameters(), lr=0.1)
        if "frozen" in how:
            net[1].bias.requires_grad_(False)
        if how.get("steps", 1):
            net(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        if "spoil" in how:
            optimizer.state[net[0].weight]["exp_avg_sq"][0, 0] = how["spoil"]
        with pytest.raises(ValueError, match=message):
            br.Posterior.from_adam(
                optimizer, copy.deepcopy(net) if "other" in how else net, how.get("num_data", 10), how.get("prior", 1.0)
            )


def path(steps=7, dtype=torch.float64):
    """Weights at some moments, one of which never moves."""
    return [
        {"a": normal(t, 2, 3).to(dtype), "b": normal(100 + t, 4).to(dtype), "c": torch.ones(2, dtype=dtype)} for t in range(steps)
    ]


def dense(steps, rank, scale=0.5):
    """The paper's mean and covariance, by numpy."""
    rows = np.stack([torch.cat([w["a"].reshape(-1), w["b"]]).numpy() for w in steps])
    means = np.cumsum(rows, 0) / np.arange(1, len(rows) + 1)[:, None]
    columns = (rows - means)[-rank:].T
    covariance = np.diag((rows**2).mean(0) - rows.mean(0) ** 2)
    return rows.mean(0), scale * (covariance + columns @ columns.T / (columns.shape[1] - 1))


class TestSWAG:
    @pytest.mark.parametrize(("rank", "scale"), [(3, 0.5), (20, 0.5), (3, 1.0)])
    def test_it_is_the_papers_gaussian(self, rank, scale, tmp_path):
        mean, covariance = map(torch.from_numpy, dense(path(), rank, scale))
        exact = MultivariateNormal(mean, covariance)
        made = br.Posterior.from_swag(path(), rank=rank, scale=scale, num_data=30)
        made.save(tmp_path / "p.safetensors")
        for post in (made, br.Posterior.load(tmp_path / "p.safetensors")):
            close(torch.cat([post.mean["a"].reshape(-1), post.mean["b"]]), mean, 1e-12)
            eye = torch.eye(10, dtype=torch.float64)

            def along(e):
                return {"a": e[:6].view(2, 3), "b": e[6:], "c": torch.zeros(2, dtype=torch.float64)}

            def row(found):
                return torch.cat([found["a"].reshape(-1), found["b"]])

            close(torch.stack([row(post.matvec(along(e))) for e in eye]), covariance, 1e-10)
            root = torch.stack([row(post.sqrt_matvec(along(e))) for e in eye], 1)
            close(root @ root.T, covariance, 1e-9)
            close(row(post.precision), exact.precision_matrix.diagonal(), 1e-8)
            part = post.parts[0]
            close(part.log_prob(along(mean + 0.1)), exact.log_prob(mean + 0.1), 1e-9)
            assert post.precision["c"].isinf().all()
            assert (post.structure, post.method_hint, post.num_data) == ("deviations+diag", "mc", 30)

    def test_draws_have_its_covariance(self):
        """Within 5 standard errors of 500 draws."""
        moving = [{name: t for name, t in weights.items() if name != "c"} for weights in path()]
        post = br.Posterior.from_swag(moving, rank=3)
        draws = torch.stack([torch.cat([d["a"].reshape(-1), d["b"]]) for d in (post.sample(0, draw) for draw in range(500))])
        mean, covariance = map(torch.from_numpy, dense(path(), 3))
        gaps = draws - mean
        products = gaps[:, :, None] * gaps[:, None, :]
        assert ((products.mean(0) - covariance) / (products.std(0) / 500**0.5)).abs().max() < 5

    def test_collected_in_a_training_loop_it_is_the_same_as_of_snapshots(self):
        torch.manual_seed(0)
        model, swag, snapshots = nn.Linear(3, 2).double(), br.SWAG(rank=4), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(8):
            optimizer.zero_grad()
            (model(normal(1, 5, 3)) - normal(2, 5, 2)).square().mean().backward()
            optimizer.step()
            swag.collect(model)
            snapshots.append(copy.deepcopy(model.state_dict()))
        one = br.Posterior.from_swag(swag)
        for other in (br.Posterior.from_swag(snapshots, rank=4), br.Posterior.from_swag(snapshots, model, rank=4)):
            for name in one.mean:
                assert torch.equal(one.mean[name], other.mean[name])
                assert torch.equal(one.variance[name], other.variance[name])
        assert br.predict(model.eval(), one, normal(1, 5, 3), "mc", 4).probs.isfinite().all()

    def test_moments_hold_their_digits_far_from_zero_and_in_float32(self):
        far = [{"w": (1000 + 1e-2 * normal(t, 50)).to(torch.bfloat16 if t < 0 else torch.float32)} for t in range(40)]
        post = br.Posterior.from_swag(far, rank=0, scale=1.0)
        exact = torch.stack([w["w"].double() for w in far]).var(0, correction=0)
        close(post.variance["w"].double(), exact, 1e-2)
        narrow = br.SWAG()
        for w in far:
            narrow.collect({"w": w["w"].bfloat16()})
        assert {t.dtype for t in (narrow.mean["w"], narrow.squares["w"], narrow.deviations[0]["w"])} == {torch.float32}

    def test_memory_is_that_of_the_rank(self):
        swag = br.SWAG(rank=3)
        for weights in path(10):
            swag.collect(weights)
        assert len(swag.deviations) == 3
        assert swag.count == 10

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: br.Posterior.from_swag(path(1)), "needs the weights at 2 moments or more, got 1"),
            (lambda: br.Posterior.from_swag(br.SWAG()), "needs the weights at 2 moments or more, got 0"),
            (lambda: br.Posterior.from_swag(path(1) * 3), "the weights are the same at all moments"),
            (lambda: br.Posterior.from_swag(path(), scale=0), "scale must be a number > 0"),
            (lambda: br.SWAG(rank=-1), "rank must be a whole number >= 0"),
            (lambda: br.SWAG(rank=1), "rank 1 has no covariance"),
            (lambda: br.Posterior.from_swag([*path(), {"a": torch.zeros(1)}]), "other names than before: 'b'"),
            (lambda: br.Posterior.from_swag([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}]), r"has shape \(2,\), and had \(1,\)"),
            (lambda: br.Posterior.from_swag([{"a": torch.zeros(1)}, {"a": torch.ones(1) / 0}]), "'a' are not finite; .* diverged"),
            (lambda: br.Posterior.from_swag([nn.BatchNorm1d(2).state_dict()]), "'running_mean', which is no weight; pass model="),
            (lambda: br.Posterior.from_swag([{}], nn.Linear(1, 1)), "the state dict has no 'weight', which the model has"),
        ],
    )
    def test_misuse_is_told(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_what_was_collected_is_kept_over_a_restart(self, tmp_path):
        whole, first, second = br.SWAG(rank=3), br.SWAG(rank=3), br.SWAG(rank=3)
        walk = [{"w": normal(seed, 2, 3), "b": normal(seed + 50, 2)} for seed in range(7)]
        for weights in walk:
            whole.collect(weights)
        for weights in walk[:4]:
            first.collect(weights)
        torch.save(first.state_dict(), tmp_path / "swag.pt")
        second.load_state_dict(torch.load(tmp_path / "swag.pt", weights_only=True))
        for weights in walk[4:]:
            second.collect(weights)
            first.collect(weights)  # has tensors of its own
        one, two = (br.Posterior.from_swag(swag) for swag in (whole, second))
        probe = {name: torch.ones_like(m) for name, m in one.mean.items()}
        assert all(torch.equal(one.mean[name], two.mean[name]) for name in one.mean)
        assert all(torch.equal(t, two.matvec(probe)[name]) for name, t in one.matvec(probe).items())

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "this is no state of SWAG: it has no 'count'"),
            (br.SWAG(rank=4).state_dict(), "the state keeps 4 deviations, and rank is 3"),
        ],
        ids=["nothing", "another rank"],
    )
    def test_another_state_is_refused(self, state, message):
        with pytest.raises(ValueError, match=message):
            br.SWAG(rank=3).load_state_dict(state)


class TestEnsemble:
    def test_draws_are_its_members_and_predictions_their_average(self, tmp_path):
        torch.manual_seed(0)
        models = [nn.Linear(3, 2).eval() for _ in range(3)]
        x = torch.randn(5, 3)
        for given in (models, [model.state_dict() for model in models]):
            br.Posterior.ensemble(given).save(tmp_path / "p.safetensors")
            post = br.Posterior.load(tmp_path / "p.safetensors")
            assert (post.structure, post.method_hint) == ("mixture", "mc")
            average = torch.stack([model(x).softmax(-1) for model in models]).mean(0).detach()
            for seed in range(5):
                found = br.predict(models[0], post, x, num_samples=6, seed=seed).probs
                torch.testing.assert_close(found, average)

    def test_each_draw_is_any_member(self):
        """Over 400 seeds, within 5 standard errors; of a mixture of mixtures any pair of choices."""
        one, two = (br.Posterior.ensemble([{"w": torch.tensor(float(m))} for m in ms]) for ms in ((0, 1), (2, 3)))
        drawn = [int(one.sample(seed, 3)["w"]) for seed in range(400)]
        assert abs(sum(drawn) - 200) < 5 * 10
        both = br.Posterior.mixture([one, two])
        drawn = [int(both.sample(0, draw)["w"]) for draw in range(400)]
        assert all(abs(drawn.count(m) - 100) < 5 * 75**0.5 for m in range(4))

    def test_statistics_of_batch_norm_belong_to_members(self):
        models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
        models[1](torch.randn(8, 2))
        with pytest.warns(UserWarning, match="running statistics of batch norm that differ.*predict with batch_norm="):
            post = br.Posterior.ensemble(models)
        assert list(post.mean) == ["0.weight", "0.bias", "1.weight", "1.bias"]

    @pytest.mark.parametrize(
        ("models", "message"),
        [
            ([nn.Linear(1, 1)], "two models or state dicts at least"),
            (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "two models or state dicts at least"),
            ([nn.Linear(1, 1), nn.Linear(1, 1, bias=False)], "member 1 of the ensemble disagrees on the name 'bias'"),
            ([nn.Linear(1, 1), nn.Linear(2, 1)], r"member 1 of the ensemble has 'weight' of shape \(1, 2\), others do not"),
        ],
    )
    def test_misuse_is_told(self, models, message):
        with pytest.raises(ValueError, match=message):
            br.Posterior.ensemble(models)
