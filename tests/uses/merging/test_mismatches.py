"""The mismatch of gradients: zero where losses are quadratic, and what it is by definition elsewhere."""

import pytest
import torch
from tests.contracts import close
from torch import nn

import bayesrule as br

WIDE = torch.float64


def data(seed, size=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=WIDE)
    return x, torch.randn(size, 1, generator=generator, dtype=WIDE)


def diagonal_ridge(x, y):
    """Of columns that are orthogonal, so that a diagonal knows all."""
    x = torch.linalg.qr(x)[0] * torch.arange(1, 4, dtype=WIDE)
    q = br.ridge(x, y[:, 0], 0.5)
    post = br.Posterior({"weight": q.mean[None]}, {"weight": q.precision.diagonal()[None].clone()})
    return post, [(x[:5], y[:5]), (x[5:], y[5:])]


PRIOR = br.Posterior({"weight": torch.zeros(1, 3, dtype=WIDE)}, {"weight": torch.full((1, 3), 0.5, dtype=WIDE)})


def linear():
    return nn.Linear(3, 1, bias=False).double()


@pytest.mark.parametrize("alphas", [1.0, [0.5, 2.0]])
def test_there_is_none_where_the_merger_is_exact(alphas):
    posts, loaders = zip(*(diagonal_ridge(*data(seed)) for seed in (0, 1)), strict=True)
    merged = br.merge(PRIOR, posts, alphas)
    found = br.gradient_mismatch(linear(), merged, posts, loaders, "mse", base=PRIOR, alphas=alphas)
    close(found.gradient["weight"], torch.zeros(1, 3, dtype=WIDE))
    assert found.distance == pytest.approx(0, abs=1e-6)


def test_is_what_the_merger_leaves_of_the_gradient():
    """At minima the gradient of all losses and the prior is the mismatch itself."""
    tasks = [data(seed) for seed in (2, 3)]
    posts = []
    for x, y in tasks:
        q = br.ridge(x, y[:, 0], 0.5)
        posts.append(
            br.Posterior({"weight": q.mean[None]}, {"weight": q.precision.diagonal()[None].clone()}, None, PRIOR.precision)
        )
    merged = br.merge(None, posts)
    found = br.gradient_mismatch(linear(), merged, posts, [[task] for task in tasks], "mse")
    theta = merged.mean["weight"]
    whole = theta * 0.5 + sum((theta @ x.mT - y.mT) @ x for x, y in tasks)
    close(found.gradient["weight"], whole, 1e-9)
    assert found.distance == pytest.approx((whole.square() / merged.precision["weight"]).sum().sqrt().item())


def test_the_model_comes_back():
    model, (post, loader) = linear(), diagonal_ridge(*data(4))
    before = model.weight.detach().clone()
    br.gradient_mismatch(model, post, [post], [loader], "mse", base=PRIOR)
    assert torch.equal(model.weight, before) and model.weight.grad is None


@pytest.mark.parametrize(
    ("loaders", "options", "message"),
    [
        ([], {"base": PRIOR}, "there are 1 posteriors, 0 loaders and 1 alphas; give one for each"),
        ([[]], {"base": PRIOR, "alphas": [1, 2]}, "there are 1 posteriors, 1 loaders and 2 alphas"),
        ([[]], {}, r"posteriors\[0\] does not know its prior; pass the base"),
    ],
)
def test_refusals(loaders, options, message):
    post, _ = diagonal_ridge(*data(4))
    with pytest.raises(ValueError, match=message):
        br.gradient_mismatch(linear(), post, [post], loaders, "mse", **options)
