"""VON, VOGN and OGN: published trajectories, squares example by example, and what holds for any problem."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import nn

import bayesrule as br


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
        self.x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (12,), generator=generator)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))

    def losses(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self(self.x), self.y, reduction="none")

    def squares(self) -> list[torch.Tensor]:
        """By hand: a backward pass for each example."""
        each = [torch.autograd.grad(loss, self.parameters(), retain_graph=True) for loss in self.losses()]
        return [torch.stack(gradients).square().mean(0) for gradients in zip(*each, strict=True)]


class Shifted(nn.Module):
    """Uses a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.shift


class TestSquares:
    def test_ogn_keeps_the_mean_square_of_the_examples_and_steps_by_their_mean(self):
        model = Network()
        before = [p.detach().clone() for p in model.parameters()]
        squares, slopes = model.squares(), torch.autograd.grad(model.losses().mean(), model.parameters())
        optimizer = br.OGN(model.parameters(), 0.1, 12.0, betas=(0.0, 0.0), weight_decay=0.01, hess_init=0.7)
        optimizer.step(model.losses)
        for p, old, square, slope in zip(model.parameters(), before, squares, slopes, strict=True):
            torch.testing.assert_close(optimizer.state[p]["hess"], square)
            torch.testing.assert_close(p.detach(), old - 0.1 * (slope + 0.01 * old) / (square + 0.01))

    def test_however_many_are_held_at_a_time(self, monkeypatch):
        found = []
        for budget in (1, 400, 2**28):
            monkeypatch.setattr("bayesrule.optimizers.examples.BUDGET", budget)
            model = Network()
            optimizer = br.VOGN(model.parameters(), 0.1, 12.0)
            for _ in range(3):
                optimizer.step(model.losses)
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1], found[2], rtol=1e-12, atol=1e-14)

    def test_of_a_linear_regression_they_are_weighted_by_residuals_which_gauss_newton_is_not(self):
        generator = torch.Generator().manual_seed(2)
        x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((8, 3), (8,)))
        w = nn.Parameter(torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64))
        optimizer = br.OGN([w], 0.0, 8.0, betas=(0.0, 0.0))
        optimizer.step(lambda: (x @ w - y).square() / 2)
        residuals = (x @ w - y).detach()
        torch.testing.assert_close(optimizer.state[w]["hess"], (residuals[:, None] * x).square().mean(0))
        oracle = br.LinearLoss(x, br.likelihoods.Gaussian(), y)(w.detach())
        torch.testing.assert_close(oracle.gauss_newton(), x.T @ x)
        assert ((optimizer.state[w]["hess"] - x.square().mean(0)).abs() > 0.05).all()

    def test_at_the_mode_of_a_logistic_regression_it_is_the_gauss_newton_diagonal_on_average_over_labels(self):
        generator = torch.Generator().manual_seed(1)
        x, w = torch.randn(6, 3, generator=generator, dtype=torch.float64), nn.Parameter(torch.tensor([0.4, -0.3, 0.8]).double())
        p = torch.sigmoid(x @ w).detach()
        expected = torch.zeros(3, dtype=torch.float64)
        for labels in range(2**6):
            y = torch.tensor([float(labels >> i & 1) for i in range(6)], dtype=torch.float64)
            optimizer = br.OGN([w], 0.0, 6.0, betas=(0.0, 0.0))
            optimizer.step(lambda y=y: nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none"))
            expected += (p * y + (1 - p) * (1 - y)).prod() * optimizer.state[w]["hess"]
        torch.testing.assert_close(expected, (p * (1 - p)) @ x.square() / 6)

    @pytest.mark.parametrize("make", [br.OGN, br.VOGN])
    def test_a_closure_need_not_clear_gradients(self, make):
        found = []
        for clears in (True, False):
            model = Network()
            optimizer = make(model.parameters(), 0.1, 12.0)

            def closure(model=model, optimizer=optimizer, clears=clears):
                if clears:
                    optimizer.zero_grad()
                return model.losses()

            for _ in range(4):
                optimizer.step(closure)
            found.append(model.inner.weight.detach())
        assert torch.equal(*found)

    def test_parameters_that_no_loss_depends_on_stay(self):
        used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = br.VOGN([used, unused], 0.1, 10.0)
        optimizer.step(lambda: used * torch.tensor([1.0, 2.0]))
        assert not torch.equal(used, torch.ones(2)) and torch.equal(unused, torch.ones(2))


class TestAttached:
    """Layers tell what a backward for each example tells."""

    @staticmethod
    def by_hand(model: Network, optimizer: br.BayesOptimizer, steps: int = 4) -> list[torch.Tensor]:
        for _ in range(steps):
            optimizer.step(model.losses)
        return [*model.parameters(), *(optimizer.state[p]["hess"] for p in model.parameters())]

    @pytest.mark.parametrize("binding", ["loop", "context", "closure"])
    def test_vogn_takes_the_same_steps(self, binding):
        model, twin = Network(), Network()
        optimizer, other = (br.VOGN(m.parameters(), 0.1, 12.0) for m in (model, twin))
        wanted = self.by_hand(twin, other)
        optimizer.attach(model)
        for _ in range(4):
            if binding == "closure":
                optimizer.step(model.losses)
                continue
            with optimizer.sampled_params(train=True) if binding == "context" else nullcontext():
                model.losses().mean().backward()
            optimizer.step()
        found = [*model.parameters(), *(optimizer.state[p]["hess"] for p in model.parameters())]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:no closed form for Shifted")
    @pytest.mark.parametrize("shape", [nn.Linear(4, 3), Shifted()], ids=["a-layer", "parameters-of-its-own"])
    def test_the_forward_that_opens_a_draw_belongs_to_it(self, shape):
        """It is under way when layers begin to be watched: what the model itself does with parameters counts as well."""
        model, twin = copy.deepcopy(shape).double(), copy.deepcopy(shape).double()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        optimizer, other = (br.VOGN(m.parameters(), 0.1, 12.0) for m in (model, twin))
        optimizer.attach(model)
        for _ in range(3):
            model(x).square().sum(1).mean().backward()
            optimizer.step()
            other.step(lambda: twin(x).square().sum(1))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(optimizer.state[p]["hess"], other.state[q]["hess"], rtol=1e-10, atol=1e-12)

    def test_ogn_takes_the_same_steps(self):
        model, twin = Network(), Network()
        optimizer, other = (br.OGN(m.parameters(), 0.1, 12.0) for m in (model, twin))
        optimizer.attach(model)
        for a, b in zip(self.by_hand(model, optimizer), self.by_hand(twin, other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_several_draws_are_averaged(self):
        model, twin = Network(), Network()
        optimizer, other = (br.VOGN(m.parameters(), 0.1, 12.0, mc_samples=3) for m in (model, twin))
        optimizer.attach(model)
        for a, b in zip(self.by_hand(model, optimizer), self.by_hand(twin, other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_an_evaluation_within_a_draw_does_not_count(self):
        model, twin = Network(), Network()
        optimizer, other = (br.VOGN(m.parameters(), 0.1, 12.0) for m in (model, twin))
        optimizer.attach(model)
        wanted = self.by_hand(twin, other, 2)
        for _ in range(2):
            model.losses().mean().backward()
            model.eval()
            with torch.no_grad():
                model.losses()
            model.train()
            optimizer.step()
        torch.testing.assert_close(model.inner.weight, wanted[0], rtol=1e-10, atol=1e-12)

    def test_neither_keeps_the_other_alive_and_removed_it_tells_no_more(self):
        model = Network()
        optimizer = br.VOGN(model.parameters(), 0.1, 12.0)
        hooks = optimizer.attach(model)
        hooks.remove()
        with optimizer.sampled_params(train=True):
            model.losses().mean().backward()
        with pytest.raises(RuntimeError, match="saw none"):
            optimizer.step()
        optimizer.attach(model)
        gone = weakref.ref(model)
        del model, hooks
        gc.collect()
        assert gone() is None and optimizer.param_groups

    def test_a_draw_that_is_lost_leaves_nothing(self):
        model = Network()
        optimizer = br.VOGN(model.parameters(), 0.1, 12.0)
        optimizer.attach(model)
        before = model.inner.weight.detach().clone()
        with pytest.raises(KeyError), optimizer.sampled_params(train=True):
            model.losses().mean().backward()
            raise KeyError("in the data")
        assert torch.equal(model.inner.weight, before)
        twin = Network()
        wanted = self.by_hand(twin, br.VOGN(twin.parameters(), 0.1, 12.0), 1)
        model.losses().mean().backward()
        optimizer.step()
        torch.testing.assert_close(model.inner.weight, wanted[0], rtol=1e-10, atol=1e-12)


class TestVON:
    def test_without_the_second_order_term_it_is_ivon(self):
        """The same step but for rho^2 / 2 (f - h)^2 / (h + delta), which a rate of one in a thousand hides."""
        mine, ivon = (nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64)) for _ in range(2))
        shared = dict(ess=100.0, hess_init=0.5, weight_decay=0.01, betas=(0.0, 0.999), noise=torch.ones_like)
        von, other = br.VON([mine], 0.1, **shared), br.IVON([ivon], 0.1, rescale_lr=False, **shared)
        von.step(lambda: mine.pow(2).sum().backward())
        other.step(lambda: ivon.pow(2).sum().backward())
        f = (von.state[mine]["hess"] - 0.5) / 0.001 + 0.5
        torch.testing.assert_close(
            other.state[ivon]["hess"], von.state[mine]["hess"] + 0.5e-6 * (f - 0.5) ** 2 / 0.51, rtol=1e-12, atol=1e-12
        )

    def test_finds_the_curvature_of_a_quadratic(self):
        a = torch.tensor([2.0, 0.5], dtype=torch.float64)
        w = nn.Parameter(torch.ones(20, 2, dtype=torch.float64))  # twenty at once
        optimizer = br.VON([w], 0.05, 100.0, hess_init=1.0, betas=(0.9, 0.99), weight_decay=1e-3)
        found = []
        for step in range(1000):
            optimizer.step(lambda: (a * (w - 1) ** 2 / 2).sum().backward())
            if step >= 700:
                found.append(optimizer.state[w]["hess"].mean(0))
        torch.testing.assert_close(torch.stack(found).mean(0), a, rtol=0.1, atol=0.0)

    def test_its_precision_turns_negative_where_that_of_ivon_does_not(self):
        """Far from the minimum the estimate of the curvature is mostly noise."""
        least = {}
        for make in (br.VON, br.IVON):
            w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            optimizer = make([w], 0.0, 1e4, hess_init=1.0, betas=(0.9, 0.9), weight_decay=1e-3)
            seen = []
            for _ in range(5):
                optimizer.step(lambda w=w: ((w - 1) ** 2).sum().backward())
                seen.append(optimizer.state[w]["hess"].min().item())
            least[make] = min(seen)
        assert least[br.VON] < 0 < least[br.IVON] + 1e-3

    def test_with_infinite_ess_the_curvature_stays(self):
        w = nn.Parameter(torch.ones(2))
        optimizer = br.VON([w], 0.1, math.inf)
        w.sum().backward()
        optimizer.step()
        assert torch.equal(optimizer.state[w]["hess"], torch.ones(2))


class TestMisuse:
    @pytest.mark.parametrize("make", [br.VOGN, br.OGN])
    @pytest.mark.parametrize(
        ("closure", "got"),
        [
            (lambda w: (w**2).sum(), r"shape \(\)"),
            (lambda w: None, "None"),
            (lambda w: w[:, None], r"shape \(2, 1\)"),
            (lambda w: (w**2).detach(), r"shape \(2,\)"),
        ],
    )
    def test_what_is_no_loss_of_every_example_is_refused(self, make, closure, got):
        w = nn.Parameter(torch.ones(2))
        optimizer = make([w], 0.1, 10.0)
        with pytest.raises(TypeError, match=rf"{make.__name__} squares gradients example by example: .*got {got}"):
            optimizer.step(lambda: closure(w))
        assert torch.equal(w, torch.ones(2))

    def test_a_step_without_squares_is_refused(self):
        w = nn.Parameter(torch.ones(2))
        optimizer = br.VOGN([w], 0.1, 10.0)
        with optimizer.sampled_params(train=True):
            w.sum().backward()
        with pytest.raises(RuntimeError, match="VOGN squares gradients example by example, and saw none"):
            optimizer.step()

    @pytest.mark.parametrize(
        "bad", [dict(weight_decay=0.0), dict(damping=-1.0), dict(mean_precision="newest"), dict(betas=(1.0, 0.9))]
    )
    def test_hyperparameters_are_held_to_their_ranges(self, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"VOGN: parameter group 0: {name} must be .*, got"):
            br.VOGN([nn.Parameter(torch.ones(2))], **{"lr": 0.1, "ess": 10.0, **bad})


class TestHutchinson:
    """VON with second derivatives by random signs."""

    HYPER: ClassVar = dict(lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.1)

    def von(self, params, **more):
        return br.VON(params, **{**self.HYPER, "hess_approx": "hutchinson", **more})

    def test_it_finds_the_diagonal_of_a_diagonal_hessian_exactly(self):
        """Whatever the signs; the first step averages it in."""
        curve, w = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64), nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = self.von([w])
        optimizer.step(lambda: (curve * w.square()).sum() / 2)
        torch.testing.assert_close(optimizer.state[w]["hess"], 0.9 * 0.5 + 0.1 * curve)

    def test_on_average_it_finds_the_diagonal_of_any_hessian(self):
        """With one element across two parameters; the error of 4000 probes is known."""
        a, b = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 1))
        A, count = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64), 4000
        optimizer = self.von([a, b], betas=(0.0, 0.0), probes=count, ess=math.inf)
        optimizer.step(lambda: (x := torch.cat([a, b])) @ A @ x / 2)
        found = torch.cat([optimizer.state[p]["hess"] for p in (a, b)])
        error = ((A - torch.diag(A.diagonal())).square().sum(1) / count).sqrt()
        assert ((found - A.diagonal()).abs() < 5 * error).all()
        assert (found != A.diagonal()).all()

    def test_a_step_is_newtons_where_the_curvature_is_new(self):
        w, curve = nn.Parameter(torch.ones(3, dtype=torch.float64)), torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
        optimizer = self.von([w], lr=1.0, betas=(0.0, 0.0), ess=math.inf, weight_decay=1e-12)
        optimizer.step(lambda: (curve * (w - 3).square()).sum() / 2)
        torch.testing.assert_close(w.detach(), torch.full((3,), 3.0, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("draws", [1, 3])
    def test_a_run_goes_on_bit_by_bit(self, draws):
        def walk(model, optimizer, steps):
            for step in steps:
                rows = slice(step % 3 * 4, step % 3 * 4 + 4)
                optimizer.step(lambda rows=rows: nn.functional.cross_entropy(model(model.x[rows]), model.y[rows]))
            return torch.cat([p.detach().flatten() for p in model.parameters()])

        whole, first, second = Network(), Network(), Network()
        expected = walk(whole, self.von(whole.parameters(), mc_samples=draws), range(6))
        begun = self.von(first.parameters(), mc_samples=draws)
        walk(first, begun, range(4))
        second.load_state_dict(first.state_dict())
        again = self.von(second.parameters(), mc_samples=draws)
        again.load_state_dict(begun.state_dict())
        assert torch.equal(walk(second, again, range(4, 6)), expected)

    def test_a_parameter_that_the_loss_is_linear_in_has_no_curvature(self):
        w, bias = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
        optimizer = self.von([w, bias], betas=(0.0, 0.5))
        optimizer.step(lambda: w.pow(2).sum() + 3 * bias.sum())
        torch.testing.assert_close(optimizer.state[bias]["hess"], torch.full((2,), 0.25, dtype=torch.float64))
        only = self.von([bias], betas=(0.0, 0.5))
        only.step(lambda: 3 * bias.sum())
        torch.testing.assert_close(only.state[bias]["hess"], torch.full((2,), 0.25, dtype=torch.float64))

    def test_any_rule_may_have_it(self):
        w, curve = nn.Parameter(torch.ones(3, dtype=torch.float64)), torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
        rule = br.BayesRule(br.MonteCarlo(), br.Hutchinson(2), br.Riemannian(), br.Momentum(0.9))
        optimizer = br.BayesOptimizer([w], rule, 0.1, ess=50.0, hess_init=1.0, beta2=0.5)
        for _ in range(60):
            optimizer.step(lambda: (curve * w.square()).sum() / 2)
        torch.testing.assert_close(optimizer.state[w]["hess"], curve, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("closure", "message"),
        [
            (lambda w: w.sum().backward(), "returns the mean loss, shape \\(\\), with its graph.*got None"),
            (lambda w: w.square(), r"got shape \(2,\)"),
            (lambda w: w.sum().detach(), "with its graph"),
        ],
    )
    def test_it_says_what_its_closure_must_return(self, closure, message):
        w = nn.Parameter(torch.ones(2))
        with pytest.raises(TypeError, match=f"VON asks for second derivatives.*{message}"):
            self.von([w]).step(lambda: closure(w))

    def test_without_a_closure_it_says_that_it_needs_one(self):
        w = nn.Parameter(torch.ones(2))
        optimizer = self.von([w])
        with optimizer.sampled_params(train=True):
            w.sum().backward()
        with pytest.raises(RuntimeError, match=r"second derivatives, and saw none: pass step\(\) a closure"):
            optimizer.step()


class TestSquaresFollow:
    """What is done to gradients after a draw is done to the squares of the examples."""

    HYPER: ClassVar = dict(lr=0.1, ess=64.0, hess_init=0.5, betas=(0.9, 0.5), weight_decay=0.01)

    def learn(self, backward, after=lambda model: None, kind=br.VOGN):
        model = Network()
        optimizer = kind(model.parameters(), **{k: v for k, v in self.HYPER.items()})
        optimizer.attach(model)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            after(model)
            optimizer.step()
        return torch.cat([torch.cat([p.detach().flatten(), optimizer.state[p]["hess"].flatten()]) for p in model.parameters()])

    @staticmethod
    def plain(model, factor=1.0):
        (factor * nn.functional.cross_entropy(model(model.x), model.y)).backward()

    @staticmethod
    def divided(model):
        for p in model.parameters():
            p.grad.div_(1024)

    @pytest.mark.parametrize("kind", [br.VOGN, br.OGN])
    def test_unscaling(self, kind):
        scaled = self.learn(lambda model: self.plain(model, 1024.0), self.divided, kind)
        torch.testing.assert_close(scaled, self.learn(self.plain, kind=kind), rtol=1e-9, atol=1e-9)

    def test_unscaling_of_a_parameter_in_several_pieces(self):
        """A whole one has 131,072 elements at most."""

        def learn(factor):
            layer = nn.Linear(4, 40_000, bias=False, dtype=torch.float64)
            nn.init.constant_(layer.weight, 0.1)
            optimizer = br.VOGN(layer.parameters(), **self.HYPER)
            optimizer.attach(layer)
            x = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
            (factor * layer(x).square().sum(1).mean()).backward()
            layer.weight.grad.div_(factor)
            optimizer.step()
            return optimizer.state[layer.weight]["hess"]

        torch.testing.assert_close(learn(1024.0), learn(1.0), rtol=1e-9, atol=1e-9)

    def test_clipping_the_norm_of_one_draw(self):
        """By a tenth, of gradients ten times as large."""
        clipped = self.learn(lambda model: self.plain(model, 10.0), lambda model: [p.grad.mul_(0.1) for p in model.parameters()])
        torch.testing.assert_close(clipped, self.learn(self.plain), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", [br.VOGN, br.OGN])
    def test_parts_of_a_batch_in_one_draw(self, kind):
        """Each with its share of the mean."""

        def parts(model):
            for rows in (slice(0, 4), slice(4, 12)):
                share = (rows.stop - rows.start) / 12
                (share * nn.functional.cross_entropy(model(model.x[rows]), model.y[rows])).backward()

        torch.testing.assert_close(self.learn(parts, kind=kind), self.learn(self.plain, kind=kind), rtol=1e-9, atol=1e-9)

    def test_ogn_attached_is_ogn_by_closure(self):
        model = Network()
        optimizer = br.OGN(model.parameters(), **self.HYPER)
        for _ in range(3):
            optimizer.step(lambda: nn.functional.cross_entropy(model(model.x), model.y, reduction="none"))
        found = torch.cat([torch.cat([p.detach().flatten(), optimizer.state[p]["hess"].flatten()]) for p in model.parameters()])
        torch.testing.assert_close(self.learn(self.plain, kind=br.OGN), found, rtol=1e-9, atol=1e-9)

    def test_a_batch_of_nothing_is_refused(self):
        model = Network()
        with pytest.raises(ValueError, match="the losses of no example"):
            br.VOGN(model.parameters(), **self.HYPER).step(lambda: model(model.x[:0]).sum(1))

    def test_sparse_gradients_of_examples_are_refused(self):
        table = nn.Embedding(5, 2, sparse=True)
        optimizer = br.VOGN(table.parameters(), **self.HYPER)
        with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
            optimizer.step(lambda: table(torch.tensor([1, 2])).sum(1))
