"""Lightning beyond the matrix: what comes between two micro-batches, skipped steps, interruptions, and misuse."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.integrations.matrix import CLIP, HYPER, STEPS, Cell, Net, Spy, data, flat, micro_batches, net_reference, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bayesrule as br

pytestmark = pytest.mark.hosts
pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: make integrations installs it")

from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402
from tests.integrations.host_lightning import Module, loaders, trainer  # noqa: E402

from bayesrule.integrations.lightning import DrawCallback, SensitivityCallback  # noqa: E402

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


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training:UserWarning")
@pytest.mark.parametrize("cell", [Cell(1, "fp32"), FOUR], ids=["1", "4"])
def test_what_is_left_in_eval_mode_trains_under_draws_too(tmp_path, cell):
    """Lightning keeps the mode that a network comes in, and pretrained ones come in eval mode."""
    net = Net().eval()
    module = Module(net)
    means, seen = [flat(net)], []
    net.layers[0].register_forward_pre_hook(lambda *_: seen.append(flat(net)) if torch.is_grad_enabled() else None)
    module.optimizer_step = lambda *a: (pl.LightningModule.optimizer_step(module, *a), means.append(flat(net)))
    trainer(tmp_path, cell, callbacks=[DrawCallback()], enable_checkpointing=False).fit(module, *loaders(cell))
    wanted = net_reference(Net(), cell)
    assert not net.training and all(map(torch.equal, means, wanted.means)) and len(means) == len(wanted.means)
    assert all(map(torch.equal, seen[:: cell.accumulation], wanted.draws)) and len(seen) == cell.accumulation * STEPS


def test_a_module_compiled_as_a_whole_is_compiled_once(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    net = Net()
    module = Module(net)
    means = [flat(net)]
    module.optimizer_step = lambda *a: (pl.LightningModule.optimizer_step(module, *a), means.append(flat(net)))
    module.net.compile(backend=backend, fullgraph=True)
    trainer(tmp_path, FOUR, callbacks=[DrawCallback()], enable_checkpointing=False, limit_val_batches=0).fit(module, *loaders(FOUR))
    assert all(map(torch.equal, means, net_reference(Net(), FOUR).means)) and len(graphs) == 1


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


# Manual optimization: two networks, each with an optimizer of its own, the second one taking several steps a batch


class Pair(pl.LightningModule):
    """What a user writes for an encoder and a head that are trained in turn."""

    def __init__(self, turns: int, explicit: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.encoder, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3)])
        self.turns, self.explicit = turns, explicit
        self.seen: list[Tensor] = []
        self.encoder.register_forward_hook(lambda *_: self.seen.append(self.encoder.weight.detach().clone()))

    def configure_optimizers(self):
        return br.IVON(self.encoder.parameters(), **HYPER), br.IVON(self.heads.parameters(), **HYPER)

    def loss(self, batch: tuple[Tensor, Tensor], through: bool = True) -> Tensor:
        x, y = batch
        hidden = self.encoder(x)
        return F.cross_entropy(self.heads[0](torch.tanh(hidden if through else hidden.detach())), y)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        first, second = self.optimizers()
        for _ in range(self.turns):
            self.one_step(second, batch, through=False)
        self.one_step(first, batch)

    def one_step(self, optimizer, batch: tuple[Tensor, Tensor], through: bool = True) -> None:
        if self.explicit:
            with optimizer.optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch, through))
        else:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, through))
        optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch))


def eights() -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(t.split(8) for t in data(FOUR)), strict=True)


def fit_pair(module: Pair, callbacks: list, **more) -> Pair:
    loader = DataLoader(TensorDataset(*data(FOUR)), batch_size=8)
    chosen = dict(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
    )
    pl.Trainer(max_epochs=2, callbacks=callbacks, **chosen, **more).fit(module, loader, loader)
    return module


class TestManualOptimization:
    @pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training:UserWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own compiler
    @pytest.mark.parametrize("mode", ["train", "eval", "compiled"])
    @pytest.mark.parametrize("turns", [1, 3])
    def test_every_step_of_every_optimizer_has_a_draw(self, turns, mode):
        module = Pair(turns)
        if mode == "compiled":
            module.heads[0].compile(backend="eager")
        else:
            module.train(mode == "train")
        fit_pair(module, [DrawCallback()], limit_val_batches=0)

        other = Pair(turns)
        first, second = other.configure_optimizers()
        for batch in itertools.chain(*itertools.repeat(list(eights()), 2)):
            first.train()
            for optimizer, through in [*[(second, False)] * turns, (first, True)]:
                second.train()  # the encoder, too, learns through a sample of the head
                optimizer.zero_grad()
                other.loss(batch, through).backward()
                optimizer.step()
        second.eval()
        assert all(map(torch.equal, module.seen, other.seen)) and len(module.seen) == len(other.seen)
        assert torch.equal(flat(module), flat(other))
        assert (
            len({tuple(seen.flatten().tolist()) for seen in module.seen}) == 2 * 6
        )  # of the encoder: one draw for each of its steps

    def test_a_context_of_ones_own_needs_no_callback(self):
        module = fit_pair(Pair(3, explicit=True), [], limit_val_batches=0)
        other = Pair(3)
        first, second = other.configure_optimizers()
        for batch in itertools.chain(*itertools.repeat(list(eights()), 2)):
            for optimizer, through in [*[(second, False)] * 3, (first, True)]:
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    other.loss(batch, through).backward()
                optimizer.step()
        assert torch.equal(flat(module), flat(other))

    def test_toggled_parts_and_closures_as_lightning_documents_them(self):
        class Toggled(Pair):
            def training_step(self, batch, _):
                for optimizer, through in zip(self.optimizers(), (True, False), strict=True):

                    def closure(optimizer=optimizer, through=through):
                        loss = self.loss(batch, through)
                        optimizer.zero_grad()
                        self.manual_backward(loss)

                    with optimizer.toggle_model():
                        optimizer.step(closure=closure)

        module = Toggled(1)
        fit_pair(module, [DrawCallback()], limit_val_batches=0)
        for optimizer in module.optimizers():
            (group,) = optimizer.param_groups
            assert all(int(optimizer.state[p]["step"]) == 12 and p.requires_grad for p in group["params"])
        start = Pair(1)
        assert (flat(module) != flat(start)).all()

    def test_validation_sees_the_mean_and_the_hooks_go(self):
        module = Pair(1)
        means: list[Tensor] = []
        looks: list[Tensor] = []
        module.on_train_batch_start = lambda *_: module.seen.clear()
        module.on_validation_epoch_start = lambda: module.seen.clear() or means.append(module.encoder.weight.detach().clone())
        module.on_validation_epoch_end = lambda: looks.extend(module.seen)
        fit_pair(module, [DrawCallback()], num_sanity_val_steps=0)
        for optimizer in module.optimizers():
            optimizer.eval()
        assert len(means) == 2 and torch.equal(means[1], module.encoder.weight)
        assert all(torch.equal(look, means[i >= len(looks) // 2]) for i, look in enumerate(looks)) and looks
        assert not any(hooks(each) for each in (module, module.encoder, module.heads, module.heads[0]))


class TestFabric:
    @pytest.mark.parametrize("cell", [Cell(1, "fp32"), FOUR], ids=["1", "4"])
    @pytest.mark.parametrize("draw", ["train", "attach"])
    def test_trains_as_the_plain_loop_does(self, cell, draw):
        model = Net()
        optimizer = br.IVON(trained(model), **HYPER)
        fabric = Fabric(accelerator="cpu", devices=1)
        wrapped, stepping = fabric.setup(model, optimizer)
        if draw == "attach":
            optimizer.attach(wrapped)
        means = [flat(model)]
        for step in range(STEPS):
            for x, y in micro_batches(cell, step):
                if draw == "train":
                    stepping.train()
                fabric.backward(F.cross_entropy(wrapped(x), y) / cell.accumulation)
            fabric.clip_gradients(wrapped, stepping, max_norm=CLIP)
            stepping.step()
            stepping.zero_grad()
            means.append(flat(model))
        assert all(map(torch.equal, means, net_reference(Net(), cell).means))


class TestOtherCallbacks:
    """What other callbacks read and write is the mean."""

    def test_averages_are_over_means(self, tmp_path):
        averaging = EMAWeightAveraging(decay=0.5)
        net = Net()
        spy = Spy(net, accumulation=4)
        module = Module(net, spy)
        pl_trainer = trainer(tmp_path, FOUR, callbacks=[DrawCallback(), averaging], enable_checkpointing=False, limit_val_batches=0)
        pl_trainer.fit(module, *loaders(FOUR))
        spy.remove()
        wanted = spy.means[1]
        for mean in spy.means[2:]:
            wanted = 0.5 * wanted + 0.5 * mean
        torch.testing.assert_close(flat(net), wanted, rtol=1e-5, atol=1e-6)

    def test_an_average_is_what_is_validated_in_the_middle_of_a_step(self, tmp_path):
        whole = run(tmp_path)
        net = Net()
        spy = Spy(net, accumulation=4)
        callbacks = [DrawCallback(), EMAWeightAveraging(decay=0.5)]
        trainer(tmp_path, FOUR, callbacks=callbacks, enable_checkpointing=False).fit(Module(net, spy), *loaders(FOUR))
        spy.remove()
        assert all(map(torch.equal, spy.means, whole.means))
        looks = [weights for step, weights in spy.looking if step == 4]
        assert looks and not any(
            torch.equal(weights, mean) for weights in looks for mean in [spy.means[4], *[w for _, w in spy.training]]
        )

    @pytest.mark.parametrize(
        "cell",
        [
            pytest.param(Cell(1, "fp32"), id="1"),
            pytest.param(FOUR, id="4", marks=pytest.mark.xfail(reason="Lightning searches without the callbacks of the Trainer")),
        ],
    )
    def test_a_search_for_a_rate_leaves_all_as_it_was(self, tmp_path, cell):
        net = Net()
        module = Module(net)
        module.lr = 0.1
        module.configure_optimizers = lambda: br.IVON(net.parameters(), **{**HYPER, "lr": module.lr})
        start = flat(net)
        searching = trainer(tmp_path, cell, callbacks=[DrawCallback()], enable_checkpointing=False, max_steps=-1)
        found = Tuner(searching).lr_find(module, *loaders(cell), num_training=5, update_attr=False)
        assert len(found.results["lr"]) >= 5 and torch.equal(flat(net), start) and hooks(module) == 0

    def test_a_checkpoint_of_an_exception_is_at_the_mean(self, tmp_path):
        net = Net()
        spy = Spy(net, accumulation=4)

        def fail(*_):
            raise RuntimeError("enough")

        saving = ModelCheckpoint(tmp_path, filename="last-{step}", save_on_exception=True)
        with pytest.raises(RuntimeError, match="enough"):
            trainer(tmp_path, FOUR, callbacks=[saving, Between(fail), DrawCallback()]).fit(Module(net, spy), *loaders(FOUR))
        spy.remove()
        (file,) = tmp_path.glob("*.ckpt")
        saved = torch.load(file)["state_dict"]
        assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), spy.means[1])

    def test_backbones_that_are_unfrozen_later_learn(self, tmp_path):
        class Thaws(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.net.layers[0])

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.net.layers[0], optimizer)

        net = Net()
        module = Module(net)
        module.configure_optimizers = lambda: br.IVON([p for p in net.parameters() if p.requires_grad], **HYPER)
        start = net.layers[0].weight.detach().clone()
        trainer(tmp_path, FOUR, callbacks=[DrawCallback(), Thaws()], enable_checkpointing=False).fit(module, *loaders(FOUR))
        assert not torch.equal(net.layers[0].weight, start)


@pytest.mark.filterwarnings("ignore:posterior was trained with ess=64")
def test_leave_one_out_estimates_are_logged_and_stop_the_training(tmp_path):
    net = Net()
    tracker = br.TrackSensitivity(loaders(FOUR)[0], subset=8)
    seen = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["loo_nll"].item())

    spy = Spy(net, accumulation=4)
    made = trainer(
        tmp_path,
        FOUR,
        callbacks=[DrawCallback(), SensitivityCallback(tracker, lambda module: module.net), Looks()],
        enable_checkpointing=False,
    )
    try:
        made.fit(Module(net, spy), *loaders(FOUR))
    finally:
        spy.remove()
    assert seen == pytest.approx([line["loo_nll"] for line in tracker.history])
    assert len(seen) == made.current_epoch >= 2
    tracker.history[:] = [{"loo_nll": float(i)} for i in range(3)]
    tracker.patience = 2
    again = trainer(
        tmp_path,
        FOUR,
        callbacks=[DrawCallback(), SensitivityCallback(tracker, lambda module: module.net)],
        enable_checkpointing=False,
    )
    again.fit(Module(net, Spy(net, accumulation=4)), *loaders(FOUR))
    assert again.current_epoch == 1
