"""What torch itself puts around an optimizer: scalers, autocast, clipping, schedules, averages, checkpointing, compilers."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.integrations.matrix import CLIP, EPOCH, HYPER, STEPS, Cell, Net, Trace, flat, kept, micro_batches, same, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import bayesrule as br

pytestmark = pytest.mark.hosts
ONE, FOUR = Cell(1, "fp32"), Cell(4, "fp32")


def attached_loop(
    cell: Cell = ONE,
    net: nn.Module | None = None,
    *,
    clip: Callable[[list[Tensor]], Any] = lambda params: None,
    schedule: Callable[[Any], Any] | None = None,
    each: Callable[[nn.Module], Any] = lambda model: None,
    draw: str = "attach",
    resume_at: int | None = None,
) -> Trace:
    """The loop of any optimizer; draws by ``attach``, by ``train()`` or by the context. It may be cut, and goes on from a state."""
    model = Net() if net is None else net
    optimizer = br.IVON(trained(model), **HYPER)
    scheduler = schedule(optimizer) if schedule else None
    if draw == "attach":
        optimizer.attach(model)
    trace = Trace([flat(model)])
    for step in range(STEPS):
        if step == resume_at:
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), scheduler and scheduler.state_dict()], saved)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            model = Net(seed=1)
            optimizer = br.IVON(trained(model), **HYPER)
            scheduler = schedule(optimizer) if schedule else None
            for part, state in zip((model, optimizer, scheduler), states, strict=True):
                if part is not None:
                    part.load_state_dict(state)
            if draw == "attach":
                optimizer.attach(model)
        total = 0.0
        if draw == "context":
            with optimizer.sampled_params(train=True):
                total = backward(model, cell, step)
        else:
            if draw == "train":
                optimizer.train()
            total = backward(model, cell, step)
        clip(trained(model))
        optimizer.step()
        optimizer.zero_grad()
        each(model)
        if scheduler is not None:
            scheduler.step(*([total] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        trace.means.append(flat(model))
    trace.state = kept(optimizer)
    return trace


def backward(model: nn.Module, cell: Cell, step: int) -> float:
    total = 0.0
    for x, y in micro_batches(cell, step):
        with cell.autocast():
            loss = F.cross_entropy(model(x), y) / cell.accumulation
        loss.backward()
        total += loss.item()
    return total


class TestScaler:
    @pytest.mark.parametrize("draw", ["attach", "train"])
    def test_a_skipped_step_draws_the_same_noise_again(self, draw):
        model = Net()
        optimizer = br.IVON(trained(model), **HYPER)
        if draw == "attach":
            optimizer.attach(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        start, seen = flat(model), []
        ((x, y),) = micro_batches(ONE, 0)
        for factor in (math.inf, math.inf, 1.0):
            if draw == "train":
                optimizer.train()
            loss = F.cross_entropy(model(x), y)
            seen.append(flat(model))
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if factor == math.inf:
                if draw == "train":
                    optimizer.eval()
                saved = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
                assert torch.equal(saved, start)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
        assert not torch.equal(flat(model), start)

        other = Net()
        plain = br.IVON(trained(other), **HYPER)
        with plain.sampled_params(train=True):
            F.cross_entropy(other(x), y).backward()
        plain.step()
        assert torch.equal(flat(model), flat(other))

    def test_one_micro_batch_of_four_that_overflows_skips_all_four(self):
        model = Net()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        start = flat(model)
        for i, (x, y) in enumerate(micro_batches(FOUR, 0)):
            scaler.scale(F.cross_entropy(model(x), y) * (math.inf if i == 1 else 0.25)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        optimizer.eval()
        assert torch.equal(flat(model), start) and scaler.get_scale() == 2.0**7


class TestAutocast:
    @pytest.mark.parametrize("draw", ["attach", "train", "context"])
    def test_around_the_whole_training_sees_every_draw(self, draw):
        """Autocast keeps the weights that it has cast: of an earlier draw, if nobody clears them."""
        with torch.autocast("cpu", torch.bfloat16):
            around = attached_loop(FOUR, draw=draw)
        each = attached_loop(Cell(4, "bf16"), draw=draw)
        same(around, each)


class TestClipping:
    @pytest.mark.parametrize("cell", [ONE, FOUR], ids=["1", "4"])
    @pytest.mark.parametrize(
        "clip",
        [lambda params: nn.utils.clip_grad_norm_(params, CLIP), lambda params: nn.utils.clip_grad_value_(params, 0.01)],
        ids=["norm", "value"],
    )
    def test_acts_on_what_the_step_uses(self, clip, cell):
        by_context = attached_loop(cell, clip=clip, draw="context")
        for draw in ("attach", "train"):
            same(attached_loop(cell, clip=clip, draw=draw), by_context)
        assert not torch.equal(by_context.means[1], attached_loop(cell).means[1])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.3, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.3, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=4),
}


class TestSchedules:
    def test_all_of_torchs_are_here(self):
        assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULES)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_set_the_rate_of_every_binding_and_go_on(self, name):
        schedule = SCHEDULES[name]
        by_context = attached_loop(FOUR, schedule=schedule, draw="context")
        same(attached_loop(FOUR, schedule=schedule), by_context)
        same(attached_loop(FOUR, schedule=schedule, draw="train"), by_context)
        assert not torch.equal(by_context.means[-1], attached_loop(FOUR).means[-1])
        same(attached_loop(FOUR, schedule=schedule, resume_at=EPOCH), by_context)


class TestAverages:
    @pytest.mark.parametrize("multi", [None, get_ema_multi_avg_fn(0.5)], ids=["equal weights", "ema"])
    def test_are_over_means_and_draw_nothing_themselves(self, multi):
        model = Net()
        average = AveragedModel(model, multi_avg_fn=multi)
        seen = []

        def update(trained_model):
            average.update_parameters(trained_model)
            before = flat(average.module)
            average.train()
            average(micro_batches(ONE, 0)[0][0])  # a copy of an attached model has no draws
            assert torch.equal(flat(average.module), before)
            seen.append(before)

        trace = attached_loop(FOUR, model, each=update)
        wanted = trace.means[1]
        assert torch.equal(seen[0], wanted)
        for k, mean in enumerate(trace.means[2:], 2):
            wanted = 0.5 * wanted + 0.5 * mean if multi else wanted + (mean - wanted) / k
        torch.testing.assert_close(seen[-1], wanted, rtol=1e-6, atol=1e-7)

    def test_made_of_an_attached_model_in_a_draw_is_no_surprise(self):
        model = Net()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        start = flat(model)
        x, y = micro_batches(ONE, 0)[0]
        F.cross_entropy(model(x), y).backward()
        optimizer.eval()
        average = AveragedModel(model)
        assert torch.equal(flat(average.module), start)
        copy.deepcopy(average)


class Normed(nn.Module):
    """Keeps averages of its activations, of samples where samples pass through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TestBatchNorm:
    def test_update_bn_of_an_average_passes_the_average_and_leaves_the_draw_alone(self):
        model = Normed()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        average = AveragedModel(model, use_buffers=False)
        for step in range(3):
            backward(model, ONE, step)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        batches = [x for step in range(3) for x, _ in micro_batches(FOUR, step)]
        backward(model, ONE, 3)  # a draw is open
        sample = flat(model)
        update_bn(batches, average)
        assert optimizer.draws.is_open and torch.equal(flat(model), sample)
        hidden = average.module.layers[0](torch.cat(batches))
        torch.testing.assert_close(average.module.layers[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)

    def test_update_bn_after_training_passes_the_mean(self):
        model = Normed()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        for step in range(3):
            backward(model, ONE, step)
            optimizer.step()
            optimizer.zero_grad()
        batches = [x for step in range(3) for x, _ in micro_batches(FOUR, step)]
        mean = flat(model)
        model.train()
        update_bn(batches, model)
        assert not optimizer.draws.is_open and torch.equal(flat(model), mean)
        hidden = model.layers[0](torch.cat(batches))
        torch.testing.assert_close(model.layers[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)

    def test_update_bn_under_a_draw_passes_the_sample_and_says_so(self):
        model = Normed()
        optimizer = br.IVON(trained(model), **HYPER)
        optimizer.attach(model)
        backward(model, ONE, 0)
        with pytest.warns(UserWarning, match="sees the draw that is open, not the mean"):
            update_bn([x for x, _ in micro_batches(FOUR, 0)], model)


class Rechecked(nn.Module):
    """Its layers compute their activations again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = Net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if x.requires_grad else layer(x)
        return x


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("draw", ["attach", "train", "context"])
    @pytest.mark.parametrize("cell", [ONE, FOUR], ids=["1", "4"])
    def test_computes_again_under_the_same_draw(self, cell, draw, reentrant):
        same(attached_loop(cell, Rechecked(reentrant), draw=draw), attached_loop(cell, draw="context"))


class TestCompiled:
    def test_attached_it_is_compiled_once(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        model = torch.compile(Net(), backend=backend, fullgraph=True)
        same(attached_loop(FOUR, model), attached_loop(FOUR, draw="context"))
        assert len(graphs) == 1

    def test_attached_inside_it_still_trains(self):
        inner = Net()
        optimizer = br.IVON(trained(inner), **HYPER)
        optimizer.attach(inner)
        model = torch.compile(inner, backend="eager")
        start, seen = flat(inner), []
        inner.layers[0].register_forward_pre_hook(torch.compiler.disable(lambda *_: seen.append(flat(inner))))
        x, y = micro_batches(ONE, 0)[0]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert (seen[0] != start).all() and not torch.equal(flat(inner), start)
