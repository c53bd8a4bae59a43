"""One network, called by tensors or by names, answering with a tensor or with logits, is the same for every use of a posterior."""

import pytest
import torch
from torch import nn

import bayesrule as br

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 3, generator=GENERATOR, dtype=torch.float64), torch.randint(0, 3, (40,), generator=GENERATOR)
PAIRS = [(X[:25], Y[:25]), (X[25:], Y[25:])]
NAMED = [{"x": x, "scale": torch.ones((), dtype=torch.float64), "labels": y} for x, y in PAIRS]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


class Answer(dict):
    """Of a model of Hugging Face: a mapping with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Named(Network):
    def forward(self, *, x: torch.Tensor, scale: torch.Tensor):
        return Answer(logits=super().forward(x * scale))


def posterior() -> br.Posterior:
    mean = {name: p.detach().clone() for name, p in Network().named_parameters()}
    return br.Posterior(mean, {name: torch.full_like(m, 40.0) for name, m in mean.items()}, ess=40.0, num_data=40)


PREDICT = [
    {"method": "mean"},
    {"num_samples": 4},
    {"num_samples": 4, "vmap": 2},
    {"method": "glm"},
    {"method": "glm", "variance": "exact", "link_approx": "bridge"},
    {"method": "glm", "variance": "last_layer"},
    {"method": "glm", "variance": "sampled", "link_approx": "mc", "num_samples": 8},
]


def of_prediction(how):
    def use(model, data):
        found = [
            br.predict(
                model,
                posterior(),
                batch[0] if isinstance(batch, tuple) else {n: x for n, x in batch.items() if n != "labels"},
                **how,
            )
            for batch in data
        ]
        return torch.cat([torch.cat([one.probs, one.variance], 1) for one in found])

    return use


def of_laplace(structure):
    def use(model, data):
        post = br.Posterior.laplace(model, data, structure)
        noise = {name: torch.ones_like(m) for name, m in post.mean.items()}
        return torch.cat([t.flatten() for t in post.matvec(noise).values() if t.isfinite().all()])

    return use


def figures(found):
    return torch.tensor([found[name] for name in sorted(found)], dtype=torch.float64)


USES = {
    **{f"predict {how}": of_prediction(how) for how in PREDICT},
    **{
        f"evaluate {method}": lambda model, data, method=method: figures(
            br.evaluate(model, posterior(), data, method=method, num_samples=4, ood=data)
        )
        for method in ("mean", "mc", "glm")
    },
    **{
        f"calibrate {method}": lambda model, data, method=method: torch.tensor(
            [(found := br.calibrate(model, posterior(), data, "temperature", method=method, num_samples=4)).temperature, found.ess]
        )
        for method in ("mean", "mc", "glm")
    },
    **{f"laplace {structure}": of_laplace(structure) for structure in ("diag", "kron", "last_layer", "full")},
    "sensitivity": lambda model, data: br.Sensitivity(model, posterior()).scores(data).loo_loss,
    "self-influence": lambda model, data: br.Sensitivity(model, posterior()).self_scores(data),
    "removal": lambda model, data: br.Sensitivity(model, posterior()).remove([3], data).deviation,
    "pairs": lambda model, data: br.Sensitivity(model, posterior()).pairwise_scores(data, data),
}


@pytest.mark.parametrize("use", USES)
def test_forms_of_batches_agree(use):
    plain, named = USES[use](Network().eval(), PAIRS), USES[use](Named().eval(), NAMED)
    assert plain.numel() and plain.isfinite().all()
    torch.testing.assert_close(named, plain, rtol=1e-12, atol=1e-12)


def test_predict_splits_what_has_names():
    named = {"x": X, "scale": torch.ones((), dtype=torch.float64)}
    whole, parts = (br.predict(Named().eval(), posterior(), named, num_samples=4, batch_size=n).probs for n in (40, 7))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_statistics_of_batch_norm_are_taken_from_tensors():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
    with pytest.raises(TypeError, match="batch_norm takes batches of inputs that are tensors, got dict"):
        br.predict(model, br.Posterior.point(model), X, "mean", batch_norm=[{"x": X}])
