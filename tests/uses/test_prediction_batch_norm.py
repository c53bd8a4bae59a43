"""Running statistics belong to the weights: each draw takes its own, and everything comes back as it was."""

import re

import pytest
import torch
from tests.instances import SMALL_IVON
from torch import nn
from torch.optim.swa_utils import update_bn

import bayesrule as br

X = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
TRAIN = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 + 1
BATCHES = TRAIN.split(25)  # of unequal sizes
LABELS = torch.arange(24) % 3


class Stateful(nn.Module):
    """Replaces one buffer in each forward pass and writes into another; may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("written", torch.zeros(1))
        self.fails_at, self.seen = float("inf"), 0

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.written += 1
        self.seen += 1
        if self.seen >= self.fails_at:
            raise KeyboardInterrupt
        return x


def made(*more: nn.Module) -> nn.Module:
    layers = [
        nn.Linear(5, 6),
        nn.BatchNorm1d(6, momentum=0.3),
        nn.ReLU(),
        *more,
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    ]
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model(TRAIN)  # statistics of some kind
    return model.eval()


def posterior(model: nn.Module, precision: float = 4.0) -> br.Posterior:
    mean = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    return br.Posterior(mean, {name: torch.full_like(m, precision) for name, m in mean.items()})


def state(model: nn.Module) -> list:
    norms = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    tensors = [t for each in (model.buffers(), model.parameters()) for t in each]
    return [norms, [m.training for m in model.modules()], [id(t) for t in tensors], [t.detach().clone() for t in tensors]]


def assert_same(found: list, expected: list) -> None:
    assert found[:3] == expected[:3]
    assert all(map(torch.equal, found[3], expected[3]))


@torch.no_grad()
def by_hand(model: nn.Module, post: br.Posterior, draws, **how) -> torch.Tensor:
    """The logits of each draw, or of the mean for None, on a copy of the model with statistics by ``update_bn``."""
    outputs = []
    for draw in draws:
        fresh = made()
        fresh.load_state_dict(model.state_dict())
        if draw is None:
            fresh.load_state_dict(post.mean, strict=False)
            update_bn(BATCHES, fresh)
            outputs.append(fresh(X))
        else:
            with br.sampled(fresh, post, seed=7, draw=draw):
                update_bn(BATCHES, fresh)
                outputs.append(fresh(X))
    return torch.stack(outputs)


@pytest.mark.parametrize("batches", [list, iter, lambda b: ((x, 0) for x in b)], ids=["list", "generator", "pairs"])
def test_each_draw_has_statistics_of_its_own(batches):
    model = made()
    post = posterior(model)
    expected = by_hand(model, post, range(5))
    found = br.predict(model, post, X, num_samples=5, seed=7, batch_size=10, batch_norm=batches(BATCHES))
    torch.testing.assert_close(found.probs, expected.softmax(-1).mean(0))
    torch.testing.assert_close(found.variance, expected.var(0, unbiased=False))
    stale = br.predict(model, post, X, num_samples=5, seed=7)
    assert (found.probs - stale.probs).abs().max() > 0.05


@pytest.mark.parametrize("given", ["mean", "no posterior"])
def test_the_mean_has_its_own_too(given):
    model = made()
    post = posterior(model) if given == "mean" else br.Posterior.point(model)
    found = br.predict(model, post if given == "mean" else None, X, "mean", batch_norm=BATCHES)
    torch.testing.assert_close(found.mean, by_hand(model, post, [None])[0])


def test_mirrored_draws_have_theirs():
    model = made()
    post = posterior(model)
    found = br.predict(model, post, X, num_samples=4, seed=7, antithetic=True, batch_norm=BATCHES)
    mirrored = []
    for draw in (0, 2):
        with br.sampled(model, post, seed=7, draw=draw):
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        mirrored.append(br.Posterior({n: 2 * post.mean[n] - w for n, w in weights.items()}, post.precision))
    expected = torch.cat([by_hand(model, post, (0, 2)), *(by_hand(model, m, [None]) for m in mirrored)])
    torch.testing.assert_close(found.mean, expected.mean(0))


def test_evaluate_measures_with_them():
    model = made()
    post = posterior(model)
    data, ood = list(zip(X.split(10), LABELS.split(10), strict=True)), [X[:4] + 3]
    figures = br.evaluate(model, post, data, num_samples=5, seed=7, ood=ood, batch_norm=iter(BATCHES))
    probs = by_hand(model, post, range(5)).softmax(-1).mean(0)
    assert figures["nll"] == pytest.approx(-probs.gather(1, LABELS[:, None]).log().mean().item(), rel=1e-9)
    assert figures["nll"] != pytest.approx(br.evaluate(model, post, data, num_samples=5, seed=7)["nll"], rel=1e-3)


class TestComesBack:
    @pytest.mark.parametrize("method", ["mean", "mc"])
    def test_after_success(self, method):
        model = made(Stateful(), nn.Dropout())
        model[4].train()
        before = state(model)
        br.predict(model, posterior(model), X, method, num_samples=4, batch_norm=BATCHES)
        assert model[3].seen > 0
        assert_same(state(model), before)

    @pytest.mark.parametrize("fails_at", [1, 2, 4, 6], ids=["first batch", "statistics", "forward", "second draw"])
    def test_after_failure(self, fails_at):
        model = made(Stateful(), nn.Dropout())
        model[4].train()
        model[3].seen, model[3].fails_at = 0, fails_at
        before = state(model)
        with pytest.raises(KeyboardInterrupt):
            br.predict(model, posterior(model), X, num_samples=4, batch_norm=BATCHES)
        assert model[3].seen == fails_at
        assert_same(state(model), before)

    def test_modes_are_those_found_when_the_outputs_are_made(self):
        model, modes = made(nn.Dropout()), []
        model[3].train()
        model.register_forward_hook(lambda *_: modes.append([m.training for m in model.modules()]))
        found = [m.training for m in model.modules()]
        br.predict(model, posterior(model), X, num_samples=4, batch_norm=BATCHES)
        assert modes == ([[True] * len(found)] * 3 + [found]) * 4

    def test_dropout_follows_the_seed_and_the_global_generator_stays(self):
        model, found = made(nn.Dropout()), []
        for place, seed in enumerate((0, 0, -3)):
            torch.manual_seed(place)
            before = torch.get_rng_state()
            found.append(br.predict(model, posterior(model), X, "mean", seed=seed, batch_norm=BATCHES).probs)
            assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("vmap", [None, 2])
def test_has_no_effect_and_no_cost_without_batch_norm(vmap):
    model, passes = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()[:1].eval(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    post = posterior(model)

    def unread():
        raise AssertionError("nobody needs these batches")
        yield

    found = br.predict(model, post, X, num_samples=4, vmap=vmap, batch_norm=unread())
    costs = len(passes)
    assert torch.equal(found.probs, br.predict(model, post, X, num_samples=4, vmap=vmap).probs)
    assert len(passes) == 2 * costs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(batch_norm=BATCHES, vmap=2), "batch_norm re-estimates statistics draw by draw, and vmap=2 evaluates draws at once"),
        (dict(batch_norm=TRAIN), "batch_norm takes batches of inputs, got one tensor (60, 5); pass x.split(batch_size)"),
        (dict(batch_norm=iter(())), "batch_norm has no batch to take statistics from"),
    ],
)
@pytest.mark.parametrize("ask", ["predict", "evaluate"])
def test_refuses_in_one_line(ask, given, message):
    model = made()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        if ask == "predict":
            br.predict(model, posterior(model), X, **given)
        else:
            br.evaluate(model, posterior(model), [(X, LABELS)], **given)
    assert "\n" not in str(caught.value)


def test_helps_what_was_learned_with_batch_norm():
    model = made().train()
    optimizer = br.IVON(model.parameters(), **{**SMALL_IVON, "ess": 60.0})
    labels = (TRAIN[:, 0] > 1).long()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TRAIN), labels)
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    post, data = optimizer.posterior(model.eval()), [(X, (X[:, 0] > 1).long())]
    own = br.evaluate(model, post, data, batch_norm=BATCHES)["nll"]
    assert own < br.evaluate(model, post, data)["nll"]
