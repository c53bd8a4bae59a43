"""Three bindings of one core, the context, `step(closure)` and draws that open by themselves, end at the same bits."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat
from tests.optimizers.conftest import everything, same_bits
from tests.optimizers.problems import backward, by_context, closure, context, fresh, ordinary, pair, run, switched
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bayesrule as br

pytestmark = pytest.mark.usefixtures("warned")


def last_in_closure(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """Forward and backward of all micro-batches but the last run outside the step."""
    optimizer.zero_grad()
    for batch in batches[:-1]:
        backward(model, batch, 1 / len(batches))
    optimizer.step(lambda: backward(model, batches[-1], 1 / len(batches)))


def context_inside(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """A loop written for the context, under a draw that is open already."""
    optimizer.train()
    context(model, optimizer, batches)


def stopped(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """Evaluates and saves after every micro-batch."""
    for batch in batches:
        optimizer.train()
        backward(model, batch, 1 / len(batches))
        optimizer.eval()
        optimizer.state_dict()
    optimizer.step()
    optimizer.zero_grad()


BINDINGS: dict[str, tuple[Callable[..., None], bool]] = {  # name -> (what makes a step, whether it is attached)
    "closure": (closure, False),
    "train and eval": (switched, False),
    "train and eval, stopped after every micro-batch": (stopped, False),
    "attached": (ordinary, True),
    "attached, closure": (closure, True),
    "attached, train and eval": (switched, True),
    "attached, context": (context, True),
    "train, context": (context_inside, False),
    "attached, last micro-batch in a closure": (last_in_closure, True),
}


def two_groups(model: Network) -> list[dict[str, Any]]:
    return [
        {"params": model.inner.parameters(), "lr": 0.2},
        {"params": [model.outer.bias], "noise_scale": 0, "weight_decay": 0.0},
        {"params": [model.outer.weight], "hess_init": 1.5, "betas": (0.5, 0.9)},
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": dict(dtype=torch.float64),
    "bfloat16 weights": dict(dtype=torch.bfloat16),
    "float16 weights": dict(dtype=torch.float16),
    "low memory": dict(memory="low"),
    "gradsq": dict(hess_approx="gradsq", gradsq_scale=16.0),
    "gradsq, low memory": dict(hess_approx="gradsq", memory="low"),
    "several groups": dict(groups=two_groups),
    "several groups, low memory": dict(groups=two_groups, memory="low"),
    "clipped, momentum in bfloat16": dict(clip_radius=0.1, momentum_dtype=torch.bfloat16),
    "no noise": dict(ess=float("inf")),
}


def differing(runs: dict[Any, dict[str, Tensor]], wanted: dict[str, Tensor]) -> list[str]:
    """The runs that end at other bits, and in what."""
    apart = []
    for name, found in runs.items():
        assert found.keys() == wanted.keys()
        apart += [f"{name}: {key}" for key, value in wanted.items() if not torch.equal(found[key], value)]
    return apart


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "cosine, restarted": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, 2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=6),
    "in sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 1, 0.9)], o),
}


class TestTheSameBits:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_in_every_binding(self, setting):
        runs = {name: run(*binding, micro=3, **SETTINGS[setting]) for name, binding in BINDINGS.items()}
        assert not differing(runs, by_context(micro=3, **SETTINGS[setting]))

    def test_under_every_schedule(self):
        for name, schedule in SCHEDULES.items():
            runs = {(name, which): run(*BINDINGS[which], schedule=schedule) for which in ("closure", "train and eval", "attached")}
            wanted = run(context, schedule=schedule)
            assert not differing(runs, wanted)
            assert differing({name: by_context()}, wanted), f"{name} changed nothing"

    @pytest.mark.parametrize("attached", [False, True])
    @pytest.mark.parametrize("memory", ["default", "low"])
    @pytest.mark.parametrize("pairs", [False, True], ids=["independent", "antithetic"])
    def test_of_several_draws(self, pairs, memory, attached):
        def contexts(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
            for _ in range(4):
                with optimizer.sampled_params(train=True):
                    backward(model, batches[0])
            optimizer.step()

        hyper = dict(mc_samples=4, antithetic=pairs, memory=memory)
        same_bits(run(closure, attached, **hyper), run(contexts, **hyper))

    @pytest.mark.parametrize("micro", [1, 3])
    def test_with_everything_clipped(self, micro):
        def clipped(step: Callable[..., None]) -> Callable[..., None]:
            def clip(optimizer: Any, *_: Any) -> None:
                nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)

            def made(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
                handle = optimizer.register_step_pre_hook(clip)
                step(model, optimizer, batches)
                handle.remove()

            return made

        wanted = run(clipped(context), micro=micro)
        same_bits(run(clipped(switched), micro=micro), wanted)
        same_bits(run(clipped(ordinary), True, micro=micro), wanted)
        assert not torch.equal(wanted["0"], by_context(micro=micro)["0"])

    def test_with_injected_noise_which_is_asked_once_a_draw(self):
        wanted, asked = None, []
        for binding, attached in [(context, False), (closure, False), (stopped, False), (ordinary, True)]:
            generator, calls = torch.Generator().manual_seed(0), []

            def noise(p: Tensor, generator: torch.Generator = generator, calls: list[int] = calls) -> Tensor:
                calls.append(p.numel())
                return torch.randn(p.shape, generator=generator)

            found = run(binding, attached, micro=3, noise=noise)
            wanted = wanted or found
            same_bits(found, wanted)
            asked.append(calls)
        assert asked[0] == [35, 7, 21, 3] * 3 and all(calls == asked[0] for calls in asked)

    def test_whatever_binding_takes_which_step(self):
        model, optimizer = pair()
        hooks = None
        for number, (binding, attached) in enumerate(BINDINGS.values()):
            hooks = optimizer.attach(model) if attached else None
            binding(model, optimizer, range(2 * number, 2 * number + 2))
            optimizer.zero_grad()
            if hooks:
                hooks.remove()
        same_bits(optimizer, by_context(steps=len(BINDINGS), micro=2))

    @pytest.mark.parametrize("make", [lambda p: br.SGD(p, 0.1, momentum=0.9), lambda p: br.AdamW(p, 0.1)], ids=["sgd", "adamw"])
    def test_of_optimizers_without_draws_which_see_only_the_mean(self, make):
        found = []
        for binding, attached in [(ordinary, False), (ordinary, True), (switched, True), (closure, True)]:
            model = Network(torch.float32)
            optimizer = make(model.parameters())
            if attached:
                optimizer.attach(model)
            for number in range(3):
                binding(model, optimizer, [number])
                assert not optimizer.draws.is_open
            found.append(everything(optimizer))
        for other in found[1:]:
            same_bits(other, found[0])


# What a host does between two micro-batches


def forward_in_eval_mode(model: Network, optimizer: br.IVON) -> None:
    optimizer.eval()
    model.eval()
    with torch.no_grad():
        model(model.x)
    model.train()


def look(model: Network, optimizer: br.IVON) -> None:
    with optimizer.sampled_params(train=False), torch.no_grad():
        model.inner(model.x)


PAUSES: dict[str, Callable[[Any, br.IVON], Any]] = {
    "nothing": lambda model, optimizer: None,
    "eval": lambda model, optimizer: optimizer.eval(),
    "eval twice": lambda model, optimizer: (optimizer.eval(), optimizer.eval()),
    "eval and train, many times": lambda model, optimizer: [(optimizer.eval(), optimizer.train()) for _ in range(20)],
    "optimizer.state_dict": lambda model, optimizer: optimizer.state_dict(),
    "a forward in eval mode": forward_in_eval_mode,
    "a look": look,
    "a posterior": lambda model, optimizer: optimizer.posterior(model),
    "noise_visibility": lambda model, optimizer: optimizer.noise_visibility(torch.bfloat16),
    "dropped_draws": lambda model, optimizer: optimizer.dropped_draws,
    "repr": lambda model, optimizer: repr(optimizer),
}


WORDS = ["train", "eval", "save", "zero"]


class TestPauses:
    """Between micro-batches a host evaluates, saves, looks; the draw of the step goes on bit by bit."""

    @pytest.mark.parametrize("setting", ["float32", "bfloat16 weights", "low memory", "several groups"])
    def test_change_nothing(self, setting):
        samples: dict[Any, list[Tensor]] = {(pause, attached): [] for pause in PAUSES for attached in (False, True)}

        def pausing(pause: str, attached: bool) -> Callable[..., None]:
            def step(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
                for batch in batches:
                    if not attached:
                        optimizer.train()
                    backward(model, batch, 1 / len(batches))
                    samples[pause, attached].append(flat(model.parameters()))
                    PAUSES[pause](model, optimizer)
                optimizer.step()

            return step

        runs = {which: run(pausing(*which), which[1], micro=3, steps=2, **SETTINGS[setting]) for which in samples}
        assert not differing(runs, by_context(micro=3, steps=2, **SETTINGS[setting]))
        for seen in samples.values():
            assert all(torch.equal(*pair) == (number != 2) for number, pair in enumerate(itertools.pairwise(seen)))

    @pytest.mark.parametrize(
        "before", ["train", "eval", "save", "zero", "train eval", "train save", "train zero", "train eval zero"]
    )
    def test_before_a_step_change_nothing(self, before):
        def step(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
            play(model, optimizer, before.split())
            switched(model, optimizer, batches)

        same_bits(run(step), by_context())

    @pytest.mark.parametrize("first", WORDS)
    def test_in_every_order_around_a_micro_batch(self, first):
        """Under a draw zero_grad() only clears; after a closed one it reads, and the next train() opens another draw."""
        for words in itertools.product([first], WORDS, WORDS):
            draws: list[list[int]] = [[0]]
            is_open = waiting = True
            for word in [*words, "train"]:
                if word == "train":
                    if not is_open and not waiting:
                        draws.append([])
                    is_open = waiting = True
                elif word == "zero" and is_open:
                    draws[-1] = []
                elif word == "zero":
                    waiting = False
                else:
                    is_open = False
            draws[-1].append(1)

            model, optimizer = fresh()
            play(model, optimizer, ["train", 0, *words, "train", 1, "step", "train", 2, "step"])
            found = everything(optimizer)
            model, optimizer = fresh()
            for batches in filter(None, draws):
                with optimizer.sampled_params(train=True):
                    for batch in batches:
                        backward(model, batch)
            optimizer.step()
            context(model, optimizer, [2])
            assert not differing({words: found}, everything(optimizer))


def play(model: Network, optimizer: br.IVON, words: Sequence[str | int]) -> None:
    """A number is forward and backward of that batch."""
    does = {
        "train": optimizer.train,
        "eval": optimizer.eval,
        "save": optimizer.state_dict,
        "zero": optimizer.zero_grad,
        "step": optimizer.step,
    }
    for word in words:
        backward(model, word) if isinstance(word, int) else does[word]()


def changing(step: Callable[..., None], change: str) -> Callable[..., None]:
    """A step under whose draw, after the first forward, hyper-parameters change until its end."""

    def made(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
        before = dict(optimizer.param_groups[0])
        handle = model.inner.register_forward_hook(lambda *_: optimizer.param_groups[0].update(CHANGES[change]))
        step(model, optimizer, batches)
        handle.remove()
        optimizer.param_groups[0].update(before)

    return made


CHANGES = {"rate": dict(lr=0.05), "decay": dict(weight_decay=0.3), "temperature": dict(ess=7.0), "clip": dict(clip_radius=0.01)}


class TestTrainAndEval:
    def test_train_puts_a_sample_where_the_mean_was_and_eval_brings_it_back(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        optimizer.train()
        assert (flat(model.parameters()) != mean).all()
        optimizer.eval()
        assert torch.equal(flat(model.parameters()), mean)

    def test_the_sample_is_that_of_the_context(self):
        model, optimizer = pair()
        with optimizer.sampled_params(train=True):
            wanted = flat(model.parameters())
        optimizer.zero_grad()
        optimizer.train()
        assert torch.equal(flat(model.parameters()), wanted)

    def test_eval_without_a_draw_and_train_under_one_do_nothing(self):
        model, optimizer = pair()
        optimizer.eval()
        with optimizer.sampled_params(train=True):
            inside = flat(model.parameters())
            optimizer.train()
            assert torch.equal(flat(model.parameters()), inside)
            backward(model, 0)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_step_brings_the_mean_back(self):
        model, optimizer = pair()
        optimizer.train()
        backward(model, 0)
        optimizer.step()
        after = flat(model.parameters())
        optimizer.eval()
        assert torch.equal(flat(model.parameters()), after)

    def test_a_checkpoint_between_micro_batches_is_at_the_mean_and_a_run_from_it_starts_the_step_anew(self):
        model, optimizer = pair()
        switched(model, optimizer, [0])
        mean = flat(model.parameters())
        optimizer.train()
        backward(model, 1, 0.5)
        saved = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
        assert torch.equal(flat(saved[1].values()), mean)
        optimizer.train()
        backward(model, 2, 0.5)
        optimizer.step()
        other, again = pair()
        other.load_state_dict(saved[1])
        again.load_state_dict(saved[0])
        switched(other, again, [1, 2])
        same_bits(again, optimizer)

    def test_loading_under_a_draw_brings_the_mean_back_first(self):
        model, optimizer = pair()
        saved = copy.deepcopy(optimizer.state_dict())
        mean = flat(model.parameters())
        optimizer.train()
        backward(model, 0)
        optimizer.load_state_dict(saved)
        assert torch.equal(flat(model.parameters()), mean) and all(p.grad is None for p in model.parameters())
        switched(model, optimizer, [1])
        other, plain = pair()
        context(other, plain, [1])
        same_bits(optimizer, plain)

    @pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
    def test_may_be_called_where_gradients_are_off(self, grad):
        model, optimizer = pair()
        for batch in range(3):
            with grad():
                optimizer.train()
            backward(model, batch)
            with grad():
                optimizer.eval()
                optimizer.step()
        same_bits(optimizer, by_context(steps=3))

    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_a_draw_that_is_not_finite_is_dropped_and_its_noise_drawn_again(self, memory):
        model, optimizer = pair(memory=memory)
        mean = flat(model.parameters())
        optimizer.train()
        sample = flat(model.parameters())
        backward(model, 0, float("inf"))
        optimizer.step()
        assert optimizer.dropped_draws == 1
        torch.testing.assert_close(flat(model.parameters()), mean, rtol=0, atol=0 if memory == "default" else 1e-6)
        optimizer.train()
        torch.testing.assert_close(flat(model.parameters()), sample, rtol=0, atol=0 if memory == "default" else 1e-6)

    def test_two_optimizers_of_one_model_each_have_their_own_draw(self):
        """Also bit by bit where only one of them is evaluated."""

        def made() -> tuple[Network, br.IVON, br.IVON]:
            model = Network(torch.float32)
            return model, *(br.IVON(part.parameters(), **SMALL_IVON, seed=i) for i, part in enumerate((model.inner, model.outer)))

        model, one, two = made()
        other, first, second = made()
        for batch in range(3):
            one.train()
            two.train()
            backward(model, batch, 0.5)
            one.eval()
            one.train()
            backward(model, batch + 1, 0.5)
            one.step()
            two.step()
            with first.sampled_params(train=True), second.sampled_params(train=True):
                backward(other, batch, 0.5)
                backward(other, batch + 1, 0.5)
            second.step()
            first.step()
        same_bits(one, first)
        same_bits(two, second)

    def test_a_skipped_step_leaves_the_draw_open_and_the_next_batch_is_seen_by_it(self):
        """As a scaler does that found gradients not finite."""
        model, optimizer = pair()
        optimizer.train()
        backward(model, 0, float("nan"))
        optimizer.zero_grad()
        switched(model, optimizer, [1])
        other, plain = pair()
        context(other, plain, [1])
        same_bits(optimizer, plain)

    @pytest.mark.parametrize("setting", ["float32", "bfloat16 weights", "low memory"])
    def test_hyper_parameters_changed_under_a_draw_act_as_in_a_context(self, setting):
        made = SETTINGS[setting]
        for change in CHANGES:
            wanted = run(changing(context, change), micro=2, **made)
            assert not differing({change: run(changing(switched, change), micro=2, **made)}, wanted)
            assert differing({change: by_context(micro=2, **made)}, wanted), f"{change} changed nothing"

    @pytest.mark.parametrize(
        "change",
        [
            "rate",
            "clip",
            pytest.param("decay"),
            pytest.param("temperature"),
        ],
    )
    def test_hyper_parameters_changed_before_a_pause_act_as_in_a_context(self, change):
        found = run(changing(stopped, change), micro=2)
        same_bits(found, run(changing(context, change), micro=2))
