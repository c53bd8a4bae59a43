"""Optimizers over blocks: full Gaussians (IBLR) and a few directions (SLANG), against the rule and at their limits."""

import io
import math
import warnings

import pytest
import torch
from tests.instances import Network, flat, state, train
from torch import nn
from torch.nn.functional import cross_entropy

import bayesrule as br

WIDE = torch.float64
A = torch.tensor([[2.0, 0.9, -0.3], [0.9, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=WIDE)
C = torch.tensor([1.0, -2.0, 0.5], dtype=WIDE)
IBLR = dict(lr=0.2, ess=50.0, hess_init=0.5, betas=(0.9, 0.95), weight_decay=0.01)
SLANG = dict(lr=0.05, ess=50.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def losses(model, step):
    """Of every example of a minibatch."""
    rows = slice(step % 4 * 16, step % 4 * 16 + 16)
    return cross_entropy(model(model.x[rows]), model.y[rows], reduction="none")


def walk(model, optimizer, steps):
    if isinstance(optimizer, br.SLANG | br.VOGN) or optimizer.defaults.get("hess_approx") == "ggn":
        for step in steps if isinstance(steps, range) else range(steps):
            optimizer.step(lambda step=step: losses(model, step))
    else:
        train(model, optimizer, steps)
    return flat(model.parameters())


MAKERS = {
    "iblr": lambda params, **more: br.IBLR(params, **{**IBLR, **more}),
    "iblr-ggn": lambda params, **more: br.IBLR(params, **{**IBLR, "hess_approx": "ggn", **more}),
    "iblr-pairs": lambda params, **more: br.IBLR(params, **{**IBLR, "mc_samples": 4, "antithetic": True, **more}),
    "iblr-tensors": lambda params, **more: br.IBLR(params, **{**IBLR, "max_block": 40, **more}),
    "slang": lambda params, **more: br.SLANG(params, **{**SLANG, "rank": 3, **more}),
    "slang-two": lambda params, **more: br.SLANG(params, **{**SLANG, "rank": 2, "mc_samples": 2, **more}),
}
every = pytest.mark.parametrize("kind", MAKERS)


# What they are at their limits


def test_without_blocks_iblr_is_ivon():
    one, other = Network(), Network()
    ends = [
        walk(one, br.IBLR(one.parameters(), **IBLR, max_block=0), 12),
        walk(other, br.IVON(other.parameters(), **IBLR, rescale_lr=False), 12),
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_without_directions_slang_is_vogn():
    one, other = Network(), Network()
    ends = [
        walk(one, br.SLANG(one.parameters(), **SLANG, rank=0), 12),
        walk(other, br.VOGN(other.parameters(), **SLANG), 12),
    ]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_the_diagonal_of_slangs_precision_is_that_of_vogn_whatever_the_rank():
    for rank in (1, 3, 20):
        one, other = Network(), Network()
        hyper = {**SLANG, "lr": 0.0, "ess": math.inf}
        low, diagonal = br.SLANG(one.parameters(), **hyper, rank=rank), br.VOGN(other.parameters(), **hyper)
        walk(one, low, 6)
        walk(other, diagonal, 6)
        factor = torch.cat([low.state[p]["factor"][0] for p in one.parameters()])
        torch.testing.assert_close(state(low, "hess") + (factor**2).sum(1), state(diagonal, "hess"), rtol=1e-10, atol=1e-12)


def test_with_all_directions_slang_is_the_rule_over_a_full():
    """Without noise, whose roots differ."""
    model, size = Network(), sum(p.numel() for p in Network().parameters())
    optimizer = br.SLANG(model.parameters(), **{**SLANG, "ess": math.inf}, rank=size)
    start = flat(model.parameters())
    q, prior = br.Full(start, 0.5, 0.01), br.Isotropic(torch.zeros_like(start), torch.tensor(0.01, dtype=WIDE))
    rule = br.BayesRule(br.Delta(), br.EmpiricalFisherFactor(), br.Additive(), br.Momentum(0.9, over="loss+prior"))
    memory, mirror = None, Network()
    for step in range(6):
        nn.utils.vector_to_parameters(q.mean, mirror.parameters())
        weights = list(mirror.parameters())
        rows = [flat(torch.autograd.grad(loss, weights, retain_graph=True)) for loss in losses(mirror, step)]
        each = torch.stack(rows)
        curvature = each.T @ each / len(each)
        prior_ = br.Diagonal(prior.mean, 0.0, 0.01)
        q, memory = rule.move(q, prior_, br.Look(None, each.mean(0), curvature), br.Rates(0.05, 1 - 0.9, step + 1), memory)
        walk(model, optimizer, range(step, step + 1))
        torch.testing.assert_close(flat(model.parameters()), q.mean, rtol=1e-9, atol=1e-9)


def test_a_step_is_the_rule_over_a_full():
    w = nn.Parameter(C * 0)
    noise = [normal(seed, 3) for seed in range(10)]
    queue = iter(noise)
    optimizer = br.IBLR([w], **IBLR, noise=lambda p: next(queue))
    rule = br.BayesRule(br.MonteCarlo(), br.Reparameterized(), br.Riemannian(), br.Momentum(0.9))
    q, prior, memory = br.Full(w.detach().clone(), 0.5, 0.01, 50.0), br.Diagonal(C * 0, 0.0, 0.01, 50.0), None
    for step, eps in enumerate(noise):
        offset = q.root_solve(eps)
        gradient = A @ (q.mean + offset - C)
        curvature = q.outer(q.stretch(offset) * 50, gradient)
        q, memory = rule.move(q, prior, br.Look(None, gradient, curvature), br.Rates(0.2, 0.05, step + 1), memory)
        with optimizer.sampled_params(train=True):
            ((w - C) @ A @ (w - C) / 2).backward()
        optimizer.step()
        torch.testing.assert_close(w.detach(), q.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(optimizer.state[w]["matrix"][0], q.hess, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_iblr_finds_mean_and_covariance_of_a_quadratic():
    """Rows of a matrix that no diagonal has; the estimate's noise averages out at beta2 near 1."""
    w = nn.Parameter(C * 0)
    optimizer = br.IBLR([w], lr=0.5, ess=100.0, betas=(0.0, 0.99), weight_decay=0.1, mc_samples=8, antithetic=True, debias=False)
    for group_beta in (0.9, 0.99, 0.999):
        optimizer.param_groups[0]["betas"] = (0.0, group_beta)
        for _ in range(400):

            def closure():
                optimizer.zero_grad()
                loss = (w - C) @ A @ (w - C) / 2
                loss.backward()
                return loss

            optimizer.step(closure)
    exact = A + 0.1 * torch.eye(3, dtype=WIDE)
    found = optimizer.state[w]["matrix"][0] + 0.1 * torch.eye(3, dtype=WIDE)
    assert ((found - exact).norm() / exact.norm()) < 0.05
    assert (w.detach() - torch.linalg.solve(exact, A @ C)).norm() < 0.05
    assert (torch.diag(exact.diagonal()) - exact).norm() / exact.norm() > 0.4  # what a diagonal would miss


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_no_gradient_takes_more_than_half_of_the_precision(scale):
    w = nn.Parameter(torch.zeros(5, dtype=WIDE))
    optimizer = br.IBLR([w], **{**IBLR, "lr": 0.0, "betas": (0.9, 0.9)})
    eye = torch.eye(5, dtype=WIDE)
    before = 0.51 * eye
    for step in range(20):
        with optimizer.sampled_params(train=True):
            w.grad = scale * normal(step, 5)
        optimizer.step()
        now = optimizer.state[w]["matrix"][0] + 0.01 * eye
        assert torch.linalg.eigvalsh(now - before / 2).min() > -1e-9 * now.norm()
        torch.testing.assert_close(now, now.T, rtol=1e-12, atol=1e-12 * float(now.norm()))
        before = now


def test_where_numbers_do_not_suffice_it_says_what_to_do():
    w = nn.Parameter(torch.zeros(5))
    optimizer = br.IBLR([w], **{**IBLR, "lr": 0.0, "betas": (0.9, 0.5)})
    with pytest.raises(
        br.DomainError, match=r"IBLR: the precision of a block of 5 elements.*float32.*begin again with more hess_init"
    ):
        for step in range(20):
            with optimizer.sampled_params(train=True):
                w.grad = 1e6 * normal(step, 5).float()
            optimizer.step()


# Blocks


def test_a_group_for_each_layer_makes_a_block_of_each():
    model = Network()
    groups = [{"params": list(layer.parameters())} for layer in (model.inner, model.outer)]
    optimizer = br.IBLR(groups, **IBLR)
    walk(model, optimizer, 3)
    shapes = [tuple(optimizer.state[p]["matrix"][0].shape) for p in model.parameters()]
    assert shapes == [(35, 42), (7, 42), (21, 24), (3, 24)]
    post = optimizer.posterior(model)
    assert post.structure == "full" and [part.names for part in post.parts] == [
        ("inner.weight", "inner.bias"),
        ("outer.weight", "outer.bias"),
    ]


def test_tensors_that_are_too_large_keep_independent_weights_and_it_says_so():
    model = Network()
    with pytest.warns(UserWarning, match=r"IBLR: 1 of 4 tensors have more than max_block=30 elements, up to 35.*independent"):
        optimizer = br.IBLR(model.named_parameters(), **IBLR, max_block=30)
    walk(model, optimizer, 3)
    assert ["matrix" in optimizer.state[p] for p in model.parameters()] == [False, True, True, True]
    post = optimizer.posterior(model)
    assert post.structure == "full+diag"
    expected = 50.0 * (optimizer.state[model.inner.weight]["hess"] + 0.01)
    torch.testing.assert_close(post.precision["inner.weight"], expected)


@every
def test_what_is_kept_is_what_the_documentation_says(kind):
    model = Network()
    optimizer = MAKERS[kind](model.parameters())
    walk(model, optimizer, 2)
    numbers, size = 0, sum(p.numel() for p in model.parameters())
    for p in model.parameters():
        for value in optimizer.state[p].values():
            numbers += sum(t.numel() for t in value) if isinstance(value, list) else value.numel() if value.dim() else 0
    rows = {"iblr-tensors": sum(p.numel() ** 2 for p in model.parameters()), "slang": 3 * size, "slang-two": 2 * size}
    assert numbers == 2 * size + rows.get(kind, size**2)


# What holds for every optimizer


@every
def test_a_context_restores_the_mean_bit_by_bit(kind):
    model = Network()
    optimizer = MAKERS[kind](model.parameters())
    walk(model, optimizer, 3)
    before = flat(model.parameters())
    with optimizer.sampled_params(train=False):
        assert not torch.equal(flat(model.parameters()), before)
    assert torch.equal(flat(model.parameters()), before)
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    assert torch.equal(flat(model.parameters()), before)


@every
def test_a_run_goes_on_bit_by_bit(kind):
    whole, first, second = Network(), Network(), Network()
    expected = walk(whole, MAKERS[kind](whole.parameters()), 8)
    optimizer = MAKERS[kind](first.parameters())
    walk(first, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    again = MAKERS[kind](second.parameters())
    again.load_state_dict(saved["optimizer"])
    assert torch.equal(walk(second, again, range(5, 8)), expected)


@every
def test_the_posterior_draws_what_was_learned(kind, tmp_path):
    model = Network()
    optimizer = MAKERS[kind](model.parameters())
    walk(model, optimizer, 4)
    post = optimizer.posterior(model, num_data=64)
    post.save(tmp_path / "p.safetensors")
    again = br.Posterior.load(tmp_path / "p.safetensors")
    torch.testing.assert_close(flat(again.sample(0).values()), flat(post.sample(0).values()), rtol=1e-10, atol=1e-10)
    found = br.predict(model.eval(), again, model.x, num_samples=8)
    assert (found.mutual_information > 0).all()
    assert post.kl(post).abs() < 1e-8


@every
def test_without_noise_a_draw_is_the_mean(kind):
    model = Network()
    optimizer = MAKERS[kind](model.parameters(), ess=math.inf)
    walk(model, optimizer, 2)
    before = flat(model.parameters())
    with optimizer.sampled_params(train=False):
        assert torch.equal(flat(model.parameters()), before)
    assert all(s.isinf().all() for s in optimizer.posterior(model).precision.values())


@every
def test_a_posterior_may_be_the_prior(kind):
    """One with a precision for each weight pulls as its numbers say."""
    first = Network()
    ivon = br.IVON(first.named_parameters(), lr=0.1, ess=50.0)
    train(first, ivon, 3)
    prior, model = ivon.posterior(first), Network()
    optimizer = MAKERS[kind](model.named_parameters(), prior=prior)
    walk(model, optimizer, 2)
    found = optimizer.posterior(model)
    for name in prior.mean:
        torch.testing.assert_close(found.prior_mean[name], prior.mean[name])
        assert (found.precision[name] > prior.precision[name] * 0.5).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_have_a_state_of_32_bits(kind, dtype):
    model = Network(torch.float32)
    model.x = model.x.to(dtype)
    model.to(dtype)
    optimizer = MAKERS[kind](model.parameters())
    before = flat(model.parameters())
    walk(model, optimizer, 3)
    assert not torch.equal(before, flat(model.parameters()))
    for p in model.parameters():
        tensors = [t for v in optimizer.state[p].values() for t in (v if isinstance(v, list) else [v])]
        assert {t.dtype for t in tensors} == {torch.float32}


def test_clipping_a_mean_of_draws_acts_on_the_curvature_too():
    """Twice the gradients, halved by a clip: as if they had been that large from the start."""
    ends = []
    for factor in (1.0, 2.0):
        w = nn.Parameter(C.clone())
        optimizer = br.IBLR([w], **IBLR)
        for draw in range(2):
            with optimizer.sampled_params(train=True):
                w.grad = factor * normal(draw, 3)
        nn.utils.clip_grad_norm_([w], float((normal(0, 3) + normal(1, 3)).norm() / 2))
        optimizer.step()
        ends.append((w.detach().clone(), optimizer.state[w]["matrix"][0].clone()))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


BAD = {
    "max_block negative": (lambda p: br.IBLR(p, **IBLR, max_block=-1), "IBLR: parameter group 0: max_block must be"),
    "unknown curvature": (lambda p: br.IBLR(p, **IBLR, hess_approx="hessian"), "hess_approx must be one of 'price', 'ggn'"),
    "hess_init zero": (lambda p: br.IBLR(p, **{**IBLR, "hess_init": 0.0}), "IBLR: parameter group 0: hess_init must be"),
    "rank negative": (lambda p: br.SLANG(p, **SLANG, rank=-1), "SLANG: parameter group 0: rank must be"),
    "no decay": (lambda p: br.SLANG(p, **{**SLANG, "weight_decay": 0.0}), "SLANG: parameter group 0: weight_decay must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_hyperparameters_are_held_to_their_ranges(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("kind", ["iblr", "slang"])
def test_a_state_of_other_blocks_is_refused(kind):
    model, other = Network(), Network()
    optimizer = MAKERS[kind](model.parameters())
    walk(model, optimizer, 2)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = MAKERS[kind](other.parameters(), **({"rank": 2} if kind == "slang" else {"max_block": 40}))
    name = "factor" if kind == "slang" else "matrix"
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 has shapes .*another model or another setting"):
        again.load_state_dict(saved)


def test_slang_says_what_its_closure_must_return():
    model = Network()
    optimizer = MAKERS["slang"](model.parameters())
    with pytest.raises(TypeError, match=r"SLANG squares gradients example by example.*shape \(examples,\)"):
        optimizer.step(lambda: losses(model, 0).mean())


@every
@pytest.mark.filterwarnings("ignore:.*(no gradient arrived|acts in step|come in pairs)")
def test_a_parameter_that_has_no_gradient_once_keeps_its_mean(kind):
    """In one block with others it has the gradient zero; and whoever looks afterwards changes nothing."""
    model, mirror = Network(), Network()
    optimizer, other = MAKERS[kind](model.parameters()), MAKERS[kind](mirror.parameters())
    if kind.endswith("ggn") or kind.startswith("slang"):
        optimizer.step(lambda: losses(model, 0) * 0 + model.inner(model.x[:16]).sum(1))
        other.step(lambda: losses(mirror, 0) * 0 + mirror.inner(mirror.x[:16]).sum(1) + 0 * flat_sum(mirror.outer))
    else:
        for net, opt in ((model, optimizer), (mirror, other)):
            with opt.sampled_params(train=True):
                (net.inner(net.x).square().mean() + (0 * flat_sum(net.outer) if net is mirror else 0)).backward()
                if net is model:
                    net.outer.weight.grad = None
            opt.step()
    for p in model.parameters():
        assert p.isfinite().all()
    if kind != "iblr-tensors":  # whose tensors are blocks of their own: without a gradient they rest
        assert torch.equal(flat(model.parameters()), flat(mirror.parameters()))
    before = flat(model.parameters())
    for train_too in (False, True):
        with optimizer.sampled_params(train=train_too):
            pass
        assert torch.equal(flat(model.parameters()), before)
    assert walk(model, optimizer, 2).isfinite().all()
    if kind != "iblr-tensors":
        assert torch.equal(walk(mirror, other, 2), flat(model.parameters()))


def flat_sum(layer):
    return layer.weight.sum() + layer.bias.sum()


@pytest.mark.parametrize("kind", ["iblr", "slang"])
def test_a_block_that_loses_a_parameter_says_what_to_do(kind):
    model = Network()
    optimizer = MAKERS[kind](model.parameters())
    walk(model, optimizer, 2)
    model.inner.bias.requires_grad_(False)
    match = "give what is frozen or thawed a group of its own"
    if kind == "iblr":
        with pytest.raises(ValueError, match=match):
            walk(model, optimizer, 1)
    else:  # whose directions are of single elements, so that rows stay right
        walk(model, optimizer, 1)
        optimizer.param_groups[0]["rank"] = 2
        with pytest.raises(ValueError, match=match):
            walk(model, optimizer, 1)


@pytest.mark.parametrize("kind", ["slang", "iblr-ggn"])
def test_attached_alone_it_says_that_it_needs_a_closure(kind):
    model = Network()
    optimizer = MAKERS[kind](model.parameters())
    optimizer.attach(model)
    losses(model, 0).mean().backward()
    with pytest.raises(RuntimeError, match=r"takes gradients example by example, and saw none: pass step\(\) a closure"):
        optimizer.step()
