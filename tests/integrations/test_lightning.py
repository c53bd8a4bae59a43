"""Lightning beyond the matrix: what comes between two micro-batches, skipped steps, interruptions, and misuse."""

import copy
from pathlib import Path

import pytest
import torch
from tests.integrations.matrix import HYPER, Cell, Net, Spy, flat
from torch import nn

import bayesrule as br

pytestmark = pytest.mark.hosts
pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: make integrations installs it")

from tests.integrations.host_lightning import Module, loaders, trainer  # noqa: E402

from bayesrule.integrations.lightning import DrawCallback  # noqa: E402

FOUR = Cell(4, "fp32")


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks)


class Between(pl.Callback):
    """Does something after the second of four micro-batches of the second step."""

    def __init__(self, act) -> None:
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == 0 and batch_idx == 5:
            self.act(trainer, pl_module)


def run(folder: Path, act=lambda *_: None, cell: Cell = FOUR, **more) -> Spy:
    net = Net()
    spy = Spy(net, accumulation=cell.accumulation)
    try:
        trainer(folder, cell, callbacks=[DrawCallback(), Between(act)], enable_checkpointing=False, **more).fit(
            Module(net, spy), *loaders(cell)
        )
    finally:
        spy.remove()
    return spy


def test_a_checkpoint_between_two_micro_batches_is_at_the_mean_and_changes_nothing(tmp_path):
    whole = run(tmp_path)
    seen = run(tmp_path, lambda t, _: t.save_checkpoint(tmp_path / "between.ckpt"))
    saved = torch.load(tmp_path / "between.ckpt")["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), seen.means[1])
    assert all(torch.equal(a, b) for a, b in zip(seen.means, whole.means, strict=True))
    seen.check()


def test_weights_alone_may_be_saved_in_a_draw(tmp_path):
    seen = run(tmp_path, lambda t, _: t.save_checkpoint(tmp_path / "between.ckpt", weights_only=True))
    saved = torch.load(tmp_path / "between.ckpt")["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), seen.means[1])
    seen.check()


def test_a_skipped_step_draws_the_same_noise_again_and_is_saved_at_the_mean(tmp_path):
    cell = Cell(1, "scaler")
    net = Net()
    spy = Spy(net)

    class Overflows(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * (float("inf") if self.trainer.current_epoch == 0 and index == 1 else 1.0)

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.current_epoch == 0 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "skipped.ckpt")

    trainer(tmp_path, cell, callbacks=[DrawCallback(), Saves()], enable_checkpointing=False).fit(
        Overflows(net, spy), *loaders(cell)
    )
    spy.remove()
    assert len(spy.means) == 6  # the start, and five steps of six
    again = [weights for step, weights in spy.training if step == 1]
    assert len(again) == 2 and torch.equal(*again)
    saved = torch.load(tmp_path / "skipped.ckpt")["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), spy.means[1])
    for step, weights in spy.looking:
        assert torch.equal(weights, spy.means[step])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_mean(tmp_path, error):
    net = Net()
    spy = Spy(net, accumulation=4)

    def interrupt(*_):
        raise error("enough")

    module = Module(net, spy)
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, FOUR, callbacks=[DrawCallback(), Between(interrupt)], enable_checkpointing=False).fit(
            module, *loaders(FOUR)
        )
    spy.remove()
    assert torch.equal(flat(net), spy.means[1])
    assert hooks(module) == 0


def test_the_hooks_go_when_training_ends_and_come_again(tmp_path):
    net = Net()
    module, callback = Module(net), DrawCallback()
    for _ in range(2):
        trainer(tmp_path, FOUR, callbacks=[callback], enable_checkpointing=False).fit(module, *loaders(FOUR))
        assert hooks(module) == 0
        copy.deepcopy(module)


def test_test_and_prediction_see_the_mean(tmp_path):
    net = Net()
    module = Module(net)
    module.test_step = module.validation_step
    module.predict_step = lambda batch: net(batch[0])
    spy = Spy(net, accumulation=4)
    module.spy = spy
    run = trainer(tmp_path, FOUR, callbacks=[DrawCallback()], enable_checkpointing=False)
    run.fit(module, *loaders(FOUR))
    before = len(spy.looking)
    run.test(module, loaders(FOUR)[1], verbose=False)
    run.predict(module, loaders(FOUR)[1])
    spy.remove()
    assert len(spy.looking) > before
    assert all(torch.equal(weights, spy.means[-1]) for _, weights in spy.looking[before:])


def test_clipping_by_value_gives_the_step_what_was_clipped(tmp_path):
    seen = run(tmp_path, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    seen.check()
    torch.manual_seed(0)
    other = run(tmp_path, gradient_clip_val=None)
    assert not torch.equal(seen.means[1], other.means[1])


def test_without_an_optimizer_of_ours_it_says_so(tmp_path):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"no optimizer of bayesrule is trained .*SGD"):
        trainer(tmp_path, FOUR, callbacks=[DrawCallback()], enable_checkpointing=False).fit(Plain(Net()), *loaders(FOUR))


def test_without_the_callback_micro_batches_are_refused_not_mixed(tmp_path):
    with pytest.raises(RuntimeError, match="gradients from before this draw"):
        trainer(tmp_path, FOUR, callbacks=[], enable_checkpointing=False).fit(Module(Net()), *loaders(FOUR))


def test_a_posterior_comes_out(tmp_path):
    net = Net()
    module = Module(net)
    run = trainer(tmp_path, FOUR, callbacks=[DrawCallback()], enable_checkpointing=False)
    run.fit(module, *loaders(FOUR))
    posterior = run.optimizers[0].posterior(module, num_data=48)
    assert all(name.startswith("net.") for name in posterior.mean) and posterior.ess == HYPER["ess"]
    assert isinstance(run.optimizers[0], br.IVON)
