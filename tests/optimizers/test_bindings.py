"""Three bindings of one core: the context, `step(closure)`, and draws that open by themselves (`train`, `eval`, `attach`).

All of them end at the same bits, whatever the host does in between.
"""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from tests.instances import SMALL_IVON, Network, flat
from tests.optimizers.conftest import everything, same_bits
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import bayesrule as br


def pair(dtype: torch.dtype = torch.float32, make: Callable[[], nn.Module] | None = None, **hyper: Any) -> tuple[Any, br.IVON]:
    model = make() if make else Network(dtype)
    return model, br.IVON(model.parameters(), **{**SMALL_IVON, **hyper})


def backward(model: Network, batch: int, share: float = 1.0) -> Tensor:
    loss = model.loss(batch) * share
    loss.backward()
    return loss


@pytest.fixture(autouse=True)
def warned() -> Iterator[list[warnings.WarningMessage]]:
    """What was warned about. Nothing may be, unless a test looks for it and clears the list."""
    MADE.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert [str(warning.message) for warning in caught] == []


# The bindings: each makes one step on the mean gradient of some micro-batches


def context(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    with optimizer.sampled_params(train=True):
        for batch in batches:
            backward(model, batch, 1 / len(batches))
    optimizer.step()


def closure(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    def look() -> Tensor:
        optimizer.zero_grad()
        return torch.stack([backward(model, batch, 1 / len(batches)).detach() for batch in batches]).sum()

    optimizer.step(look)


def switched(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """Told before every forward."""
    for batch in batches:
        optimizer.train()
        backward(model, batch, 1 / len(batches))
    optimizer.step()
    optimizer.eval()
    optimizer.zero_grad()


def ordinary(model: Network, optimizer: br.IVON, batches: Sequence[int]) -> None:
    """A loop for any optimizer; draws if it is attached."""
    optimizer.zero_grad()
    for batch in batches:
        backward(model, batch, 1 / len(batches))
    optimizer.step()


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


MADE: dict[str, tuple[Network, br.IVON, Any, Any]] = {}


def fresh(
    dtype: torch.dtype = torch.float32, groups: Callable[[Network], Any] | None = None, **hyper: Any
) -> tuple[Network, br.IVON]:
    """A model and its optimizer at the start; the same two each time, since to make them takes longer than to train them."""
    key = repr((dtype, groups, hyper))
    if key not in MADE:
        model = Network(dtype)
        optimizer = br.IVON(groups(model) if groups else model.parameters(), **{**SMALL_IVON, **hyper})
        MADE[key] = model, optimizer, *copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, weights, state = MADE[key]
    optimizer.load_state_dict(copy.deepcopy(state))
    model.load_state_dict(weights)
    model.train().zero_grad()
    return model, optimizer


def run(
    step: Callable[..., None],
    attached: bool = False,
    *,
    micro: int = 1,
    steps: int = 3,
    schedule: Callable[[Any], Any] | None = None,
    **made: Any,
) -> dict[str, Tensor]:
    """Train with one binding; all weights and state."""
    model, optimizer = fresh(**made)
    scheduler = schedule(optimizer) if schedule else None
    hooks = optimizer.attach(model) if attached else None
    for number in range(steps):
        step(model, optimizer, range(number * micro, (number + 1) * micro))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler:
            scheduler.step()
    if hooks:
        hooks.remove()
    return everything(optimizer)


@functools.cache
def by_context(**how: Any) -> dict[str, Tensor]:
    """What the context reaches: the measure of the others."""
    return run(context, **how)


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


class Wrapper(nn.Module):
    """As compilers and parallel wrappers are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Linear(nn.Linear):
    """A picklable model that may be given its input by name."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        nn.init.constant_(self.weight, 0.5)
        nn.init.constant_(self.bias, 0.1)


X = torch.linspace(-1, 2, 12).view(4, 3)


class TestAttach:
    def test_a_training_forward_sees_a_sample_and_one_in_eval_mode_the_mean(self):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        sampled = model(X)
        assert not torch.equal(sampled, mean)
        assert torch.equal(model(X), sampled)
        model.eval()
        assert torch.equal(model(X), mean)
        model.train()
        assert torch.equal(model(X), sampled)

    def test_arguments_by_name_do(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        model(input=X).sum().backward()
        optimizer.step()

    @pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
    def test_a_forward_without_gradients_opens_no_draw(self, grad):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        with grad():
            assert torch.equal(model(X), mean)

    def test_neither_keeps_the_other_alive(self):
        model, optimizer = pair(make=Linear)
        hooks = optimizer.attach(model)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
        model(X).sum().backward()
        model.state_dict()
        model, optimizer = pair(make=Linear)
        hooks = optimizer.attach(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        hooks.remove()

    def test_the_hooks_need_not_be_kept(self):
        model, optimizer = pair()
        optimizer.attach(model)
        gc.collect()
        ordinary(model, optimizer, [0])

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), lambda m: copy.deepcopy(copy.deepcopy(m))],
        ids=["deep copy", "shallow copy", "pickle", "copy of a copy"],
    )
    def test_copies_are_inert(self, duplicate):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        optimizer.attach(model)
        other = duplicate(model)
        assert torch.equal(other(X), mean) and not optimizer.draws.is_open
        other.state_dict()
        sampled = model(X)
        other.eval()
        other(X)
        other.state_dict()
        assert optimizer.draws.is_open and torch.equal(model(X), sampled)

    def test_a_copy_may_be_attached_itself(self):
        model, optimizer = pair()
        optimizer.attach(model)
        other, second = copy.deepcopy((model, optimizer))
        hooks = second.attach(other)
        for number in range(3):
            ordinary(model, optimizer, [number])
            ordinary(other, second, [number])
        same_bits(second, optimizer)
        hooks.remove()

    def test_an_average_of_the_weights_is_of_means(self):
        model, optimizer = pair()
        optimizer.attach(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        means = []
        for number in range(3):
            ordinary(model, optimizer, [number])
            average.update_parameters(model)
            means.append(flat(model.parameters()))
            average(model.x)
        torch.testing.assert_close(flat(average.module.parameters()), torch.stack(means).mean(0))

    def test_remove_ends_it_and_may_be_called_twice(self):
        model, optimizer = pair(make=Linear)
        mean = model(X)
        hooks = optimizer.attach(model)
        assert not torch.equal(model(X), mean)
        optimizer.eval()
        hooks.remove()
        hooks.remove()
        assert torch.equal(model(X), mean)
        assert not model._forward_pre_hooks and not model._state_dict_pre_hooks
        optimizer.attach(model)

    def test_model_state_dict_between_micro_batches_is_at_the_mean_and_the_draw_goes_on(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for number in range(3):
            mean = flat(model.parameters())
            backward(model, 2 * number, 0.5)
            assert torch.equal(flat(model.state_dict().values()), mean)
            assert torch.equal(flat(Wrapper(model).state_dict().values()), mean)
            backward(model, 2 * number + 1, 0.5)
            optimizer.step()
        same_bits(optimizer, by_context(steps=3, micro=2))

    def test_evaluation_between_micro_batches_is_at_the_mean_and_the_draw_goes_on(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for number in range(3):
            model.eval()
            before = model(model.x)
            model.train()
            backward(model, 2 * number, 0.5)
            model.eval()
            assert torch.equal(model(model.x), before)
            model.train()
            backward(model, 2 * number + 1, 0.5)
            model.eval()
            assert torch.equal(model(model.x), before)
            model.train()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3, micro=2))

    def test_a_look_sees_its_own_sample_whatever_the_mode(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        seen = [model(X)]
        for mode in (model.train, model.eval):
            mode()
            with optimizer.sampled_params(train=False), torch.no_grad():
                seen.append(model(X))
        model.eval()
        seen.append(model(X))
        model.train()
        assert torch.equal(model(X), seen[0])
        assert len({tuple(out.flatten().tolist()) for out in seen}) == 4

    @pytest.mark.parametrize("attaching", [[0, 1], [1, 0], [1]], ids=["inner first", "outer first", "outer alone"])
    def test_a_model_within_a_model_has_one_draw(self, attaching):
        model, optimizer = pair()
        parts = [model, Wrapper(model)]
        for index in attaching:
            optimizer.attach(parts[index])
        for number in range(3):
            rows = slice(number * 16, number * 16 + 16)
            nn.functional.cross_entropy(parts[1](model.x[rows]), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3))

    def test_two_optimizers_of_one_model_each_draw_their_own(self):
        made = []
        for attached in (True, False):
            model = Network(torch.float32)
            both = [br.IVON(part.parameters(), **SMALL_IVON, seed=i) for i, part in enumerate((model.inner, model.outer))]
            for optimizer in both if attached else ():
                optimizer.attach(model)
            for batch in range(4):
                with contextlib.ExitStack() as stack:
                    for optimizer in () if attached else both:
                        stack.enter_context(optimizer.sampled_params(train=True))
                    backward(model, batch)
                for optimizer in both:
                    optimizer.step()
                    optimizer.zero_grad()
            made.append(both)
        for found, wanted in zip(*made, strict=True):
            same_bits(found, wanted)

    def test_two_models_of_one_optimizer_share_a_draw(self):
        def made() -> tuple[Network, Network, br.IVON]:
            model, second = Network(torch.float32), Network(torch.float32)
            return model, second, br.IVON([*model.parameters(), *second.parameters()], **SMALL_IVON)

        one, two, optimizer = made()
        optimizer.attach(one)
        optimizer.attach(two)
        other, second, plain = made()
        for batch in range(3):
            (one.loss(batch) + two.loss(batch + 1)).backward()
            optimizer.step()
            with plain.sampled_params(train=True):
                (other.loss(batch) + second.loss(batch + 1)).backward()
            plain.step()
        same_bits(optimizer, plain)

    def test_evaluating_one_model_leaves_the_draw_of_another_optimizer(self):
        model, optimizer = pair(make=Linear)
        other, second = pair(make=Linear, seed=1)
        optimizer.attach(model)
        second.attach(other)
        sampled, also = model(X), other(X)
        model.eval()
        model(X)
        assert second.draws.is_open and torch.equal(other(X), also)
        model.train()
        assert torch.equal(model(X), sampled)

    def test_one_optimizer_a_parameter_stepping_in_backward(self):
        """Gradients are freed as they come; the draws of the other parameters stay open."""
        model = Network(torch.float32)
        optimizers = [br.IVON([p], **SMALL_IVON, seed=i) for i, p in enumerate(model.parameters())]
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):
            optimizer.attach(model) if p is not model.inner.weight else None
            p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        optimizers[0].attach(model)
        for batch in range(3):
            backward(model, batch)
        other = Network(torch.float32)
        plain = [br.IVON([p], **SMALL_IVON, seed=i) for i, p in enumerate(other.parameters())]
        for batch in range(3):
            with contextlib.ExitStack() as stack:
                for optimizer in plain:
                    stack.enter_context(optimizer.sampled_params(train=True))
                backward(other, batch)
            for optimizer in plain:
                optimizer.step()
        for found, wanted in zip(optimizers, plain, strict=True):
            same_bits(found, wanted)

    def test_an_explicit_context_closes_at_its_end_and_is_a_draw_of_its_own(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        for batch in range(2):
            with optimizer.sampled_params(train=True):
                backward(model, batch)
            assert torch.equal(flat(model.parameters()), mean)
        optimizer.step()
        other, plain = pair()
        for batch in range(2):
            with plain.sampled_params(train=True):
                backward(other, batch)
        plain.step()
        same_bits(optimizer, plain)

    def test_a_context_within_an_open_draw_joins_it_and_leaves_it_open(self):
        model, optimizer = pair()
        optimizer.train()
        sample = flat(model.parameters())
        with optimizer.sampled_params(train=True):
            assert torch.equal(flat(model.parameters()), sample)
            backward(model, 0, 0.5)
        assert torch.equal(flat(model.parameters()), sample)
        backward(model, 1, 0.5)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1, micro=2))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_within_the_model_recomputes_at_the_same_sample(self, reentrant):
        class Checkpointed(Network):
            def forward(self, x: Tensor) -> Tensor:
                hidden = torch.tanh(self.inner(x))
                return checkpoint(self.outer, hidden, use_reentrant=reentrant)

        model, optimizer = pair(make=lambda: Checkpointed(torch.float32))
        optimizer.attach(model)
        for batch in range(3):
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context(steps=3))

    def test_checkpointing_the_model_itself_recomputes_at_the_same_sample(self):
        model, optimizer = pair()
        optimizer.attach(model)
        for batch in range(3):
            rows = slice(batch * 16, batch * 16 + 16)
            nn.functional.cross_entropy(checkpoint(model, model.x[rows], use_reentrant=False), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context(steps=3))

    def test_forward_under_autocast_sees_the_sample(self):
        model, optimizer = pair(make=lambda: nn.Linear(64, 8))
        optimizer.attach(model)
        x = torch.linspace(-1, 1, 256).view(4, 64)
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()
            mean = model(x)
            model.train()
            sampled = model(x)
            sampled.sum().backward()
            optimizer.zero_grad()
            model.eval()
            assert torch.equal(model(x), mean) and not torch.equal(sampled, mean)

    def test_functional_calls_see_what_they_are_given(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        sampled = model(X)
        model.eval()
        assert (torch.func.functional_call(model, weights, (X,)) == 0).all()
        model.train()
        assert (torch.func.functional_call(model, weights, (X,)) == 0).all()
        assert torch.equal(model(X), sampled)

    def test_predictions_between_micro_batches_are_those_of_a_copy(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0, 0.5)
        model.eval()
        learned = optimizer.posterior(model)
        found = br.predict(model, learned, model.x, "mc", 4)
        wanted = br.predict(copy.deepcopy(model), learned, model.x, "mc", 4)
        assert torch.equal(found.probs, wanted.probs)
        model.train()
        backward(model, 1, 0.5)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1, micro=2))


class TestHosts:
    """What hosts do around a draw that is open for a while: between micro-batches, or after a step that was skipped."""

    def test_a_model_frozen_for_anothers_step_still_draws_in_its_own(self):
        """As a discriminator is while its generator learns."""
        model, optimizer = pair()
        optimizer.attach(model)
        for batch in range(3):
            model.requires_grad_(False)
            model(model.x.clone().requires_grad_()).sum().backward()
            model.requires_grad_(True)
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context())

    def test_a_model_that_another_optimizer_learns_through_has_one_draw_for_both(self):
        model, optimizer = pair()
        other, second = pair(make=Linear)
        optimizer.attach(model)
        second.attach(other)
        for batch in range(3):
            fake = torch.cat([other(X), X, X[:, :1]], dim=1)
            model(fake).sum().backward()
            second.step()
            ordinary(model, optimizer, [batch])
        same_bits(optimizer, by_context())

    def test_a_layer_thawed_under_a_draw_stays_out_of_the_step_which_says_so(self, warned):
        model, optimizer = pair()
        optimizer.attach(model)
        before = model.inner.weight.detach().clone()
        model.inner.requires_grad_(False)
        backward(model, 0, 0.5)
        model.inner.requires_grad_(True)
        backward(model, 1, 0.5)
        optimizer.step()
        assert torch.equal(model.inner.weight, before)
        assert "2 parameters became trainable while a draw was open" in only(warned)

    def test_a_layer_frozen_under_a_draw_is_left_alone_and_at_its_mean(self):
        model, optimizer = pair()
        optimizer.attach(model)
        before = model.inner.weight.detach().clone()
        backward(model, 0, 0.5)
        model.inner.requires_grad_(False)
        backward(model, 1, 0.5)
        optimizer.step()
        assert torch.equal(model.inner.weight, before)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
    def test_copying_model_and_optimizer_under_a_draw_is_refused_or_at_the_mean(self, duplicate):
        model, optimizer = pair(make=Linear)
        mean = flat(model.parameters())
        optimizer.train()
        model(X).sum().backward()
        try:
            other, _ = duplicate((model, optimizer))
        except RuntimeError:
            return
        assert torch.equal(flat(other.parameters()), mean)

    def test_weights_loaded_into_an_attached_model_stay(self):
        """As the best ones so far are, after training was broken off within a step."""
        model, optimizer = pair()
        optimizer.attach(model)
        best = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
        backward(model, 0, 0.5)
        model.load_state_dict(best)
        model.eval()(model.x)
        assert all((p == 0.25).all() for p in model.parameters())

    def test_what_a_wrapper_wraps_is_saved_at_the_mean(self):
        """Hosts unwrap compiled and parallel models before they save."""
        model, optimizer = pair()
        wrapper = Wrapper(model)
        mean = flat(model.parameters())
        optimizer.attach(wrapper)
        wrapper(model.x).sum().backward()
        assert torch.equal(flat(wrapper.module.state_dict().values()), mean)

    def test_what_a_wrapper_wraps_is_evaluated_at_the_mean(self):
        model, optimizer = pair()
        wrapper = Wrapper(model)
        model.eval()
        mean = model(model.x)
        optimizer.attach(wrapper)
        wrapper.train()(model.x).sum().backward()
        model.eval()
        assert torch.equal(model(model.x), mean)

    def test_what_a_wrapper_wraps_in_eval_mode_trains_under_the_draw_of_the_wrapper(self):
        """As a network with frozen normalization does within a module in training mode."""
        model, optimizer = pair()
        wrapper = Wrapper(model)
        optimizer.attach(wrapper)
        model.eval()
        for batch in range(3):
            rows = slice(batch * 16, batch * 16 + 16)
            nn.functional.cross_entropy(wrapper(model.x[rows]), model.y[rows]).backward()
            optimizer.step()
        same_bits(optimizer, by_context())

    def test_an_attached_model_trained_in_eval_mode_is_told_to_call_train(self, warned):
        model, optimizer = pair()
        optimizer.attach(model)
        model.eval()
        ordinary(model, optimizer, [0])
        messages = [str(warning.message) for warning in warned]
        warned.clear()
        assert len(messages) == 1 and "model.train()" in messages[0]

    def test_remove_under_a_draw_brings_the_mean_back(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        hooks = optimizer.attach(model)
        backward(model, 0)
        hooks.remove()
        assert torch.equal(flat(model.parameters()), mean)

    def test_an_optimizer_that_is_dropped_under_its_draw_leaves_the_mean(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        optimizer.attach(model)
        backward(model, 0)
        del optimizer
        gc.collect()
        assert torch.equal(flat(model.parameters()), mean)

    @pytest.mark.parametrize("binding", [closure, context])
    @pytest.mark.parametrize("draws", [1, 2])
    def test_a_step_skipped_by_a_scaler_is_as_if_it_had_not_been(self, draws, binding):
        """The scaler does not call step(); the host clears the gradients, and the same noise is drawn again."""

        def contexts(model: Network, optimizer: br.IVON, share: float) -> None:
            for _ in range(draws):
                with optimizer.sampled_params(train=True):
                    backward(model, 0, share)

        model, optimizer = pair(mc_samples=draws)
        other, plain = pair(mc_samples=draws)
        if binding is context:
            contexts(model, optimizer, float("inf"))
            optimizer.zero_grad()
        else:
            optimizer.step(lambda: backward(model, 0, float("inf")))
        for each in ((model, optimizer), (other, plain)):
            contexts(*each, 1.0)
            each[1].step()
        same_bits(optimizer, plain)

    def test_a_reentrant_checkpoint_under_train_is_silent(self):
        model, optimizer = pair()
        optimizer.attach(model)
        optimizer.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint(model, model.x.clone().requires_grad_(), use_reentrant=True).sum().backward()
        optimizer.step()

    def test_gradients_of_examples_by_functional_calls_of_an_attached_model(self):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x,)).sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X)
        assert torch.equal(found["weight"].flatten(1), X)


def failing_forward(model: Network, optimizer: br.IVON) -> None:
    model(torch.ones(2, 99))


def failing_after_backward(model: Network, optimizer: br.IVON) -> None:
    backward(model, 7)
    raise RuntimeError("out of memory")


def failing_in_backward(model: Network, optimizer: br.IVON) -> None:
    loss = model.loss(7)
    handle = model.inner.weight.register_hook(lambda gradient: gradient.expand(99, 99))
    try:
        loss.backward()
    finally:
        handle.remove()


FAILURES = [failing_forward, failing_after_backward, failing_in_backward]


class TestExceptions:
    """A batch that fails and is given up is as if it had not been."""

    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.parametrize("binding", ["context", "closure", "train", "attached", "joined context", "attached closure"])
    def test_leave_no_trace(self, binding, failure):
        model, optimizer = pair()
        if binding.startswith("attached"):
            optimizer.attach(model)
        for batch in range(3):
            mean = flat(model.parameters())
            with pytest.raises(RuntimeError):
                if binding.endswith("closure"):
                    optimizer.step(lambda: failure(model, optimizer))
                elif binding == "context":
                    with optimizer.sampled_params(train=True):
                        failure(model, optimizer)
                else:
                    if not binding.startswith("attached"):
                        optimizer.train()
                    with optimizer.sampled_params(train=True) if binding == "joined context" else contextlib.nullcontext():
                        failure(model, optimizer)
            if binding in ("context", "closure", "attached closure"):
                assert torch.equal(flat(model.parameters()), mean)
            optimizer.zero_grad()
            if binding in ("train", "joined context"):
                optimizer.train()
            ordinary(model, optimizer, [batch]) if binding in ("train", "attached", "joined context") else context(
                model, optimizer, [batch]
            )
        same_bits(optimizer, by_context(steps=3))

    def test_in_a_closure_lose_the_micro_batches_before_it_too(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        backward(model, 0)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(lambda: failing_after_backward(model, optimizer))
        assert torch.equal(flat(model.parameters()), mean) and all(p.grad is None for p in model.parameters())
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    def test_eval_brings_the_mean_back_after_one(self):
        model, optimizer = pair()
        optimizer.attach(model)
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError):
            failing_forward(model, optimizer)
        optimizer.eval()
        assert torch.equal(flat(model.parameters()), mean)


def only(caught: list[warnings.WarningMessage]) -> str:
    """The one warning that there is, which points at a line of this file."""
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    warning = caught.pop()
    assert warning.filename == __file__ and warning.category is UserWarning
    return str(warning.message)


STALE = "gradients from before this draw"


class TestStaleGradients:
    """A gradient that was there before the draw belongs to other weights."""

    @staticmethod
    def leave(model: Network) -> None:
        model.loss(0).backward()

    @pytest.mark.parametrize("binding", ["context", "train", "eval", "save", "attached", "evaluated", "saved", "closure"])
    def test_raise_where_the_draw_closes_and_are_cleared(self, binding):
        model, optimizer = pair()
        mean = flat(model.parameters())
        self.leave(model)
        if binding in ("attached", "evaluated", "saved"):
            optimizer.attach(model)
        with pytest.raises(RuntimeError, match=STALE):
            if binding == "context":
                with optimizer.sampled_params(train=True):
                    backward(model, 1)
            elif binding == "closure":
                optimizer.step(lambda: backward(model, 1))
            else:
                if binding in ("train", "eval", "save"):
                    optimizer.train()
                backward(model, 1)
                {"eval": optimizer.eval, "save": optimizer.state_dict, "saved": model.state_dict}.get(
                    binding, lambda: model.eval()(model.x) if binding == "evaluated" else optimizer.step()
                )()
        assert torch.equal(flat(model.parameters()), mean) and all(p.grad is None for p in model.parameters())
        model.train()
        context(model, optimizer, [1])
        other, plain = pair()
        context(other, plain, [1])
        same_bits(optimizer, plain)

    @pytest.mark.parametrize("to_none", [True, False])
    @pytest.mark.parametrize("when", ["before the draw", "under the draw", "after the forward"])
    def test_that_are_cleared_first_are_none(self, when, to_none):
        model, optimizer = pair()
        self.leave(model)
        if when == "before the draw":
            optimizer.zero_grad(set_to_none=to_none)
        optimizer.train()
        if when == "under the draw":
            optimizer.zero_grad(set_to_none=to_none)
        loss = model.loss(0)
        if when == "after the forward":
            optimizer.zero_grad(set_to_none=to_none)
        loss.backward()
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_that_the_model_zeroes_in_place_under_the_draw_are_none(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        model.zero_grad(set_to_none=False)
        backward(model, 0)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_of_one_layer_raise_though_another_was_cleared(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        model.inner.zero_grad()
        backward(model, 1)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()

    def test_that_are_added_to_out_of_place_raise(self):
        model, optimizer = pair()
        self.leave(model)
        optimizer.train()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            model.loss(1).backward(create_graph=True)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()

    def test_that_nobody_adds_to_are_replaced_silently(self):
        model, optimizer = pair()
        self.leave(model)
        with optimizer.sampled_params(train=True):
            for p, gradient in zip(model.parameters(), torch.autograd.grad(model.loss(0), model.parameters()), strict=True):
                p.grad = gradient
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_of_a_step_without_a_draw_raise_in_the_next_one(self, warned):
        model, optimizer = pair()
        ordinary(model, optimizer, [0])
        assert "a step without a draw" in only(warned)
        optimizer.train()
        backward(model, 1)
        with pytest.raises(RuntimeError, match=STALE):
            optimizer.step()


class TestMisuse:
    """What could train silently wrong raises, or warns once with the remedy."""

    @pytest.mark.parametrize("wrong", [None, "model", [nn.Linear(1, 1)], lambda x: x], ids=["none", "name", "list", "function"])
    def test_attaching_what_is_no_module(self, wrong):
        _, optimizer = pair()
        with pytest.raises(TypeError, match=r"IVON\.attach: expected a torch\.nn\.Module, got"):
            optimizer.attach(wrong)

    @pytest.mark.parametrize("wrong", [Linear, nn.Identity])
    def test_attaching_a_model_of_others(self, wrong):
        _, optimizer = pair()
        model = wrong()
        with pytest.raises(ValueError, match=f"trains no parameter of this {wrong.__name__}; attach the model that it trains"):
            optimizer.attach(model)
        assert not model._forward_pre_hooks

    def test_attaching_twice(self):
        model, optimizer = pair()
        hooks = optimizer.attach(model)
        with pytest.raises(ValueError, match=r"attached already; remove\(\) what the first attach\(\) returned"):
            optimizer.attach(model)
        assert len(model._forward_pre_hooks) == 1
        hooks.remove()
        optimizer.attach(model)

    @pytest.mark.parametrize("step", [ordinary, closure])
    def test_a_training_forward_outside_a_draw(self, step, warned):
        model, optimizer = pair()
        for batch in range(2):
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
        message = only(warned)
        for remedy in ("opt.attach(model)", "opt.train()", "step(closure)", "sampled_params(train=True)"):
            assert remedy in message

    def test_evaluating_in_training_mode_under_a_draw(self, warned):
        model, optimizer = pair(make=Linear)
        optimizer.attach(model)
        model(X).sum().backward()
        for grad in (torch.no_grad, torch.inference_mode):
            with grad():
                model(X)
        message = only(warned)
        assert "sees the draw that is open, not the mean" in message and "model.eval()" in message

    def test_gradients_that_never_arrive(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        optimizer.attach(model)
        model.loss(0)
        with pytest.raises(RuntimeError, match=r"no parameter has a gradient; a draw was opened, but backward\(\) did not run"):
            optimizer.step()
        assert torch.equal(flat(model.parameters()), mean)
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    def test_gradients_that_never_arrive_in_a_closure(self):
        model, optimizer = pair()
        with pytest.raises(RuntimeError, match=r"backward\(\) did not run in it or reached no parameter"):
            optimizer.step(lambda: model.loss(0))

    def test_a_closure_where_the_scaler_forbids_it(self):
        model, optimizer = pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=lambda: backward(model, 0))

    def test_a_closure_inside_a_context(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError, match="a draw is open already"), optimizer.sampled_params(train=True):
            optimizer.step(lambda: backward(model, 0))
        assert torch.equal(flat(model.parameters()), mean)

    def test_train_inside_a_look(self):
        model, optimizer = pair()
        mean = flat(model.parameters())
        with pytest.raises(RuntimeError, match="leave its sampled_params"), optimizer.sampled_params(train=False):
            optimizer.train()
        assert torch.equal(flat(model.parameters()), mean)

    def test_a_weight_for_a_draw_that_is_joined(self):
        _, optimizer = pair()
        optimizer.train()
        with pytest.raises(RuntimeError, match=r"weight 2\.0 cannot join .*opt\.eval\(\)"), optimizer.sampled_params(weight=2.0):
            pytest.fail("the context opened")

    @pytest.mark.parametrize("binding", [switched, ordinary])
    def test_several_draws_where_a_step_has_one(self, binding, warned):
        run(binding, True, mc_samples=3)
        assert "mc_samples=3 acts in step(closure); this step had 1 draw:" in only(warned)

    @pytest.mark.parametrize("closed", [False, True])
    def test_several_draws_in_a_closure_under_a_draw_which_is_the_only_one(self, closed, warned):
        model, optimizer = pair(mc_samples=3)
        optimizer.attach(model)
        backward(model, 0, 0.5)
        if closed:
            optimizer.eval()
        calls = []
        optimizer.step(lambda: calls.append(backward(model, 1, 0.5)))
        assert len(calls) == 1 and "mc_samples=3 acts in step(closure); this step had 1 draw:" in only(warned)
        same_bits(optimizer, by_context(steps=1, micro=2))

    def test_half_an_antithetic_pair(self, warned):
        run(ordinary, True, antithetic=True)
        assert "antithetic draws come in pairs, but this step had 1" in only(warned)

    def test_a_reentrant_checkpoint_that_wants_a_draw_in_backward(self):
        model, optimizer = pair()
        optimizer.attach(model)
        out = checkpoint(model, model.x.clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"IVON: a model computed again in backward\(\).*use_reentrant=False"):
            out.sum().backward()
        optimizer.zero_grad()
        ordinary(model, optimizer, [0])
        same_bits(optimizer, by_context(steps=1))

    @pytest.mark.parametrize("then", ["eval", "train"])
    def test_backward_through_weights_that_were_exchanged_since_the_forward(self, then):
        model, optimizer = pair()
        if then == "eval":
            optimizer.train()
        loss = model.loss(0)
        getattr(optimizer, then)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_copying_an_optimizer_whose_draw_waits_for_its_step(self):
        model, optimizer = pair()
        optimizer.train()
        backward(model, 0)
        optimizer.eval()
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="copy it after the step"):
                duplicate(optimizer)


class TestInterruptions:
    """A draw that is closed before its time, by whoever, learns from nothing that comes at the mean."""

    CLOSERS: ClassVar = {
        "state_dict": lambda model, optimizer: optimizer.state_dict(),
        "eval": lambda model, optimizer: optimizer.eval(),
        "posterior": lambda model, optimizer: optimizer.posterior(model),
    }

    @pytest.mark.parametrize("close", CLOSERS.values(), ids=CLOSERS)
    def test_a_backward_after_a_close_within_a_context_raises(self, close):
        model, optimizer = pair()
        with pytest.raises(RuntimeError, match=r"backward\(\) ran at the mean"), optimizer.sampled_params(train=True):
            close(model, optimizer)
            backward(model, 0)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("close", CLOSERS.values(), ids=CLOSERS)
    def test_a_close_after_the_backward_of_a_context_does_no_harm(self, close):
        model, optimizer = pair()
        with optimizer.sampled_params(train=True):
            backward(model, 0)
            close(model, optimizer)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_a_backward_in_eval_mode_between_micro_batches_raises(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0, 0.5)
        model.eval()
        model.loss(0).backward()
        model.train()
        with pytest.raises(RuntimeError, match=r"backward\(\) ran at the mean"):
            backward(model, 1, 0.5)
        backward(model, 0)  # the step begins anew
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_gradients_by_autograd_grad_in_eval_mode_are_no_harm(self):
        model, optimizer = pair()
        optimizer.attach(model)
        backward(model, 0)
        model.eval()
        torch.autograd.grad(model.loss(0), list(model.parameters()))
        model.train()
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))

    def test_a_forward_after_the_contexts_of_a_step_opens_nothing(self):
        model, optimizer = pair()
        optimizer.attach(model)
        with optimizer.sampled_params(train=True):
            backward(model, 0)
        model.loss(0)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))


class TestTwoOptimizers:
    """Over the same parameters, one after the other: the first one's draw is over before the second one's begins."""

    @pytest.mark.parametrize("second", [br.IVON, br.SGD], ids=["draws", "does not"])
    def test_the_draw_of_another_is_no_mean(self, second):
        model, first = pair()
        mean = flat(model.parameters())
        first.attach(model)
        backward(model, 0)
        other = second(model.parameters(), lr=0.0, **({"ess": 10.0} if second is br.IVON else {}))
        model.zero_grad()
        model.loss(0).backward() if second is br.SGD else other.step(lambda: model.loss(0).backward())
        if second is br.SGD:
            other.step()
        assert torch.equal(flat(model.parameters()), mean)

    def test_two_cannot_be_attached(self):
        model, first = pair()
        hooks = first.attach(model)
        second = br.IVON(model.parameters(), lr=0.1, ess=10.0)
        with pytest.raises(ValueError, match="another optimizer of these parameters is attached"):
            second.attach(model)
        hooks.remove()
        second.attach(model)

    def test_an_old_one_that_is_collected_leaves_what_was_learned_since(self):
        model, first = pair()
        hooks = first.attach(model)
        backward(model, 0)
        hooks.remove()
        first.train()
        second = torch.optim.SGD(model.parameters(), lr=0.5)
        second.step()
        learned = flat(model.parameters())
        del first
        gc.collect()
        assert torch.equal(flat(model.parameters()), learned)

    def test_a_context_of_another_is_refused(self):
        model, first = pair()
        second = br.IVON(model.parameters(), lr=0.1, ess=10.0)
        with (
            first.sampled_params(train=True),
            pytest.raises(RuntimeError, match="another optimizer has a draw open in these parameters"),
            second.sampled_params(train=True),
        ):
            pass


class TestHooks:
    def test_of_dropped_optimizers_do_not_pile_up(self):
        model, _ = pair()
        for _ in range(5):
            br.IVON(model.parameters(), lr=0.1, ess=10.0).attach(model)
            gc.collect()
        assert not model._forward_pre_hooks and not model._forward_hooks and not model._state_dict_pre_hooks
        assert not any(part._forward_pre_hooks for part in model.modules())

    def test_on_stale_gradients_go_with_a_discarded_draw(self):
        model, optimizer = pair()
        for _ in range(3):
            backward(model, 0)
            with contextlib.suppress(KeyError), optimizer.sampled_params(train=True):
                raise KeyError
        assert not any(p._backward_hooks for p in model.parameters())

    def test_of_a_part_alone_are_told_of_once(self, warned):
        model, optimizer = pair()
        optimizer.attach(model.outer)
        for batch in range(2):
            backward(model, batch)
            optimizer.step()
        messages = [str(warning.message) for warning in warned]
        warned.clear()
        assert len(messages) == 1 and "2 of 4 parameters are in no attached model" in messages[0]

    def test_of_all_parts_are_not_told_of(self):
        model, optimizer = pair()
        for part in (model.inner, model.outer):
            optimizer.attach(part)
        backward(model, 0)
        optimizer.step()
        same_bits(optimizer, by_context(steps=1))


class TestLoadingRefuses:
    def test_another_order_of_the_same_names(self):
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        saved = br.IVON([("a", a), ("b", b)], lr=0.1, ess=10.0).state_dict()
        with pytest.raises(ValueError, match="in group 0 'a' was saved where 'b' stands"):
            br.IVON([("b", b), ("a", a)], lr=0.1, ess=10.0).load_state_dict(saved)

    def test_a_state_without_the_prior(self):
        w = nn.Parameter(torch.ones(3))
        plain = br.IVON([("w", w)], lr=0.1, ess=10.0)
        plain.step(lambda: w.square().sum().backward())
        prior = br.Posterior({"w": torch.zeros(3)}, {"w": torch.ones(3)})
        with pytest.raises(ValueError, match="saved without a posterior as the prior"):
            br.IVON([("w", w)], lr=0.1, ess=10.0, prior=prior).load_state_dict(plain.state_dict())


def test_ten_steps_that_change_nothing_are_told(warned):
    model, optimizer = pair()
    for _ in range(12):
        optimizer.step(lambda: backward(model, 0, float("nan")))
    assert "ten steps in a row changed nothing" in only(warned)
