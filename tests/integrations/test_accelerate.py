"""Accelerate beyond the matrix: what its wrapper passes on, odd numbers of micro-batches, skipped steps, states in a draw."""

from pathlib import Path

import pytest
import torch
from tests.integrations.matrix import HYPER, ROWS, SAVED, STEPS, Cell, Net, data, flat, micro_batches, net_reference, trained

import bayesrule as br

pytestmark = pytest.mark.hosts
pytest.importorskip("accelerate", reason="accelerate is not installed: make integrations installs it")

from safetensors.torch import load_file  # noqa: E402
from tests.integrations.host_accelerate import accelerator  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

ONE, FOUR = Cell(1, "fp32"), Cell(4, "fp32")


def saved_in(folder: Path) -> Tensor:
    state = load_file(folder / "model.safetensors")
    return torch.cat([state[name].reshape(-1) for name, _ in Net().named_parameters()])


class TestWrapper:
    def test_attached_it_needs_no_word(self):
        """The loop of any optimizer; what is attached is the model that it calls."""
        accelerate, net = accelerator(FOUR), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, optimizer = accelerate.prepare(net, inner)
        inner.attach(model)
        for step in range(STEPS):
            for x, y in micro_batches(FOUR, step):
                with accelerate.accumulate(model):
                    accelerate.backward(F.cross_entropy(model(x), y))
                    if accelerate.sync_gradients:
                        accelerate.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        assert torch.equal(flat(net), net_reference(Net(), FOUR).means[-1])

    def test_a_forgotten_draw_is_told(self):
        accelerate, net = accelerator(ONE), Net()
        model, optimizer = accelerate.prepare(net, br.IVON(trained(net), **HYPER))
        ((x, y),) = micro_batches(ONE, 0)
        accelerate.backward(F.cross_entropy(model(x), y))
        with pytest.warns(UserWarning, match=r"a step without a draw.*opt\.attach\(model\) once, or opt\.train\(\)"):
            optimizer.step()

    def test_a_loader_whose_end_cuts_a_step_short(self):
        """Accelerate steps at the end of the loader, on fewer micro-batches; the next step has a draw of its own."""
        accelerate, net = accelerator(FOUR), Net()
        loader = DataLoader(TensorDataset(*data(FOUR)), batch_size=8)  # six batches: a step of four and one of two
        model, optimizer, loader = accelerate.prepare(net, br.IVON(trained(net), **HYPER), loader)
        seen: list[Tensor] = []
        net.register_forward_hook(lambda *_: seen.append(flat(net)))
        for _ in range(2):
            for x, y in loader:
                with accelerate.accumulate(model):
                    optimizer.train()
                    accelerate.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        steps = [seen[:4], seen[4:6], seen[6:10], seen[10:]]
        assert all(torch.equal(one, step[0]) for step in steps for one in step)
        assert len({tuple(step[0].tolist()) for step in steps}) == 4
        assert int(optimizer.optimizer.state[net.layers[0].weight]["step"]) == 4

    def test_a_schedule_goes_along(self):
        accelerate, net = accelerator(FOUR), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, optimizer, schedule = accelerate.prepare(net, inner, lr_scheduler.ExponentialLR(inner, 0.5))
        for step in range(2):
            for x, y in micro_batches(FOUR, step):
                with accelerate.accumulate(model):
                    optimizer.train()
                    accelerate.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        assert inner.param_groups[0]["lr"] == pytest.approx(HYPER["lr"] / 4)

    def test_of_weights_that_are_unwrapped_or_gathered(self):
        """Both in the middle of a step."""
        accelerate, net = accelerator(FOUR), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, optimizer = accelerate.prepare(net, inner)
        inner.attach(model)
        start = flat(net)
        x, y = micro_batches(FOUR, 0)[0]
        accelerate.backward(F.cross_entropy(model(x), y))
        assert inner.draws.is_open
        assert torch.equal(torch.cat([v.reshape(-1) for v in accelerate.get_state_dict(model).values()]), start)
        model(x)
        assert inner.draws.is_open
        assert torch.equal(torch.cat([v.reshape(-1) for v in accelerate.unwrap_model(model).state_dict().values()]), start)
        posterior = optimizer.optimizer.posterior(accelerate.unwrap_model(model))
        assert set(posterior.mean) == {name for name, _ in net.named_parameters()}


class TestState:
    @pytest.mark.parametrize("draw", ["train", "attach"])
    def test_that_is_saved_in_the_middle_of_a_step_is_the_mean(self, draw, tmp_path):
        accelerate, net = accelerator(FOUR), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, optimizer = accelerate.prepare(net, inner)
        if draw == "attach":
            inner.attach(model)
        for step in range(STEPS):
            before = flat(net)
            for i, (x, y) in enumerate(micro_batches(FOUR, step)):
                with accelerate.accumulate(model):
                    if draw == "train":
                        optimizer.train()
                    accelerate.backward(F.cross_entropy(model(x), y))
                    if accelerate.sync_gradients:
                        accelerate.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                if step == SAVED and i == 1:
                    if draw == "train":
                        optimizer.eval()
                    accelerate.save_state(tmp_path / "between")
                    assert torch.equal(saved_in(tmp_path / "between"), before)
        assert torch.equal(flat(net), net_reference(Net(), FOUR).means[-1])

    def test_a_model_that_is_saved_alone_in_a_draw_is_the_mean(self, tmp_path):
        accelerate, net = accelerator(ONE), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, _ = accelerate.prepare(net, inner)
        inner.attach(model)
        start = flat(net)
        ((x, _),) = micro_batches(ONE, 0)
        model(x)
        accelerate.save_model(model, tmp_path)
        assert torch.equal(saved_in(tmp_path), start)

    @pytest.mark.parametrize("draw", ["train", "attach"])
    def test_after_a_skipped_step_is_the_mean_and_the_noise_is_drawn_again(self, draw, tmp_path):
        cell = Cell(1, "scaler")
        accelerate, net = accelerator(cell), Net()
        inner = br.IVON(trained(net), **HYPER)
        model, optimizer = accelerate.prepare(net, inner)
        if draw == "attach":
            inner.attach(model)
        start, seen = flat(net), []
        net.register_forward_pre_hook(lambda *_: seen.append(flat(net)))
        ((x, y),) = micro_batches(cell, 0)
        for factor in (float("inf"), 1.0):
            if draw == "train":
                optimizer.train()
            accelerate.backward(F.cross_entropy(model(x), y) * factor)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.step_was_skipped == (factor != 1.0)
            if optimizer.step_was_skipped:
                accelerate.save_state(tmp_path / "skipped")
                assert torch.equal(saved_in(tmp_path / "skipped"), start)
        assert torch.equal(*seen) and not torch.equal(seen[0], start)
        assert not torch.equal(flat(net), start)


class TestTwo:
    def test_models_and_optimizers_take_turns(self):
        accelerate = accelerator(ONE)
        nets = [Net(seed) for seed in range(2)]
        inners = [br.IVON(trained(net), **HYPER) for net in nets]
        a, b, opt_a, opt_b = accelerate.prepare(*nets, *inners)
        for step in range(STEPS):
            for model, optimizer in ((a, opt_a), (b, opt_b)):
                optimizer.train()
                for x, y in micro_batches(ONE, step):
                    accelerate.backward(F.cross_entropy(model(x), y))
                    accelerate.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        for seed, net in enumerate(nets):
            assert torch.equal(flat(net), net_reference(Net(seed), ONE).means[-1])


def test_weights_of_16_bits_learn():
    accelerate = accelerator(FOUR)
    net = Net().to(torch.bfloat16)
    loader = DataLoader(TensorDataset(*data(FOUR)), batch_size=ROWS)
    model, optimizer, loader = accelerate.prepare(net, br.IVON(trained(net), **{**HYPER, "ess": 16.0}), loader)
    losses = []
    for _ in range(20):
        for x, y in loader:
            with accelerate.accumulate(model):
                optimizer.train()
                loss = F.cross_entropy(model(x.bfloat16()).float(), y)
                accelerate.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    optimizer.eval()
    assert sum(losses[-12:]) < 0.7 * sum(losses[:12])
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())
