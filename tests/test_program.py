"""Programs: recorded once, run in place or compiled, and equal to the plain function that was recorded."""

import itertools
import random
from typing import ClassVar

import pytest
import torch
from tests.sweeps import sweep
from torch import Tensor
from torch.fx.proxy import TraceError

from bayesrule.lowering import Scratch
from bayesrule.noise import CounterNoise, Where
from bayesrule.program import Program, Runner, uncast
from bayesrule.vector import axpy, convert, head, lerp, rsqrt, whole_blocks

SIZES = [512, 777, 40_000, 1]


def positive(names, size=512, dtype=torch.float64, seed=0):
    """Flats between 0.5 and 1.5: no operation below leaves what it is defined for."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) + 0.5 for name in names}


def copied(flats):
    return {name: flat.clone() for name, flat in flats.items()}


def wanted(function, flats, numbers):
    """The flats as plain torch would leave them: everything computed first, then written."""
    values = {name: value.clone() for name, value in function(copied(flats), numbers).items()}
    return {name: values.get(name, flat) for name, flat in flats.items()}


def same(found, right, tolerance=0.0):
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def after(run, flats, numbers, *more):
    """The flats after a run, which must be the ones that were given."""
    given = copied(flats)
    places = {name: flat.data_ptr() for name, flat in given.items()}
    run(given, numbers, *more)
    assert {name: flat.data_ptr() for name, flat in given.items()} == places
    return given


def chain(f, n):
    x = f["x"]
    for _ in range(10):
        x = (x * n["a"] + f["y"]).sqrt()
    return {"x": x}


def fibonacci(f, n):
    a, b = f["x"], f["y"]
    for _ in range(10):
        a, b = b, a + b * 0.5
    return {"z": a, "y": b}


def adam(f, n):
    """What looks like a step: results that are read after they are written, and numbers of numbers."""
    average = lerp(f["y"], f["x"], 1 - n["a"] * 0.9)
    square = lerp(f["z"], f["x"].square(), n["b"] / 100)
    rate = n["a"] / (1 - 0.5 ** n["b"])
    return {"x": f["x"] - rate * average / (square.sqrt() + 1e-8), "y": average, "z": square}


def stacked(f, n):
    first, second = f["x"].view(-1, 1) * n["a"], f["y"].view(-1, 1).exp()
    return {"z": head(torch.stack([first, second], 1).view(-1), f["z"])}


def stacked_and_used(f, n):
    first, second = f["x"].view(-1, 1) * n["a"], f["y"].view(-1, 1).exp()
    return {"z": head(torch.stack([first, second], 1).view(-1), f["z"]), "x": (first + second).view(-1)}


def stacked_and_used_late(f, n):
    """When the memory of the stack has long been somebody else's."""
    first, second = f["x"].view(-1, 1) * n["a"], f["y"].view(-1, 1).exp()
    z = head(torch.stack([first, second], 1).view(-1), f["z"]) * 2
    return {"z": z, "x": (f["y"].cos() + f["z"].cos()).exp().view(-1) * z - (first * second).view(-1)}


def stacked_twice_the_same(f, n):
    part = f["x"].view(-1, 1) * n["a"]
    return {"z": head(torch.stack([part, part], 1).view(-1), f["z"]) + 0.0}


def bits(f, n):
    word = convert(f["x"] * 1e6, torch.int64)
    word = (word ^ (word >> 3)) & 0xFFFF | 1
    return {"x": convert(convert(word, torch.int32), f["x"].dtype if isinstance(f["x"], Tensor) else torch.float64) * n["a"]}


FUNCTIONS = {
    "sum": lambda f, n: {"x": f["x"] + f["y"]},
    "in place": lambda f, n: {"x": f["x"] - n["a"] * f["y"], "y": f["y"] * n["a"]},
    "all methods": lambda f, n: {"x": -f["x"].log().abs().cos().sin().exp().square().sqrt(), "y": rsqrt(f["y"]) / f["z"]},
    "powers": lambda f, n: {"x": f["x"] ** 2, "y": f["y"] ** n["a"], "z": f["z"] ** f["x"]},
    "a number first": lambda f, n: {"x": n["a"] + f["x"], "y": n["a"] * f["y"]},
    "a number first, in an order that counts": lambda f, n: {"x": 1 - f["x"], "y": n["a"] - f["y"], "z": n["b"] / f["z"]},
    "a base": lambda f, n: {"x": n["a"] ** f["x"]},
    "numbers of numbers": lambda f, n: {"x": f["x"] * (1 - n["a"] ** n["b"]) ** -0.5},
    "axpy": lambda f, n: {"x": axpy(f["x"], f["y"], n["a"]), "z": axpy(f["z"], f["y"], -0.5)},
    "axpy of a number": lambda f, n: {"x": axpy(f["x"], n["b"], 0.5), "y": axpy(n["a"], f["y"], n["a"])},
    "axpy by a flat": lambda f, n: {"x": axpy(f["x"], f["y"], f["z"])},
    "lerp": lambda f, n: {"x": lerp(f["x"], f["y"], n["a"]), "z": lerp(f["z"], f["y"], 0.9)},
    "lerp by a flat": lambda f, n: {"x": lerp(f["x"], f["y"], f["z"])},
    "clamp": lambda f, n: {"x": f["x"].clamp(-n["a"], n["a"]), "y": f["y"].clamp(0.9, 1.1)},
    "where": lambda f, n: {"x": torch.where(f["x"] > 1, f["y"], f["z"] * n["a"])},
    "maximum": lambda f, n: {"x": torch.maximum(f["x"], f["y"] * n["a"])},
    "head": lambda f, n: {"x": head(f["y"] * n["a"], f["x"])},
    "a value twice": lambda f, n: dict.fromkeys(("x", "y"), f["x"] * f["y"]),
    "a value that is used later": lambda f, n: (lambda v: {"x": v, "y": v * f["x"] + f["y"]})(f["x"] * n["a"]),
    "an old value that is used later": lambda f, n: (lambda v: {"x": v, "z": (v + f["z"]) * f["x"]})(f["x"] * n["a"]),
    "a stash": lambda f, n: {"z": f["x"], "x": f["x"] + f["y"]},
    "a stash that is read": lambda f, n: {"z": f["x"], "x": f["x"] + f["z"]},
    "a mean that returns": lambda f, n: {"x": f["z"], "z": f["x"] - f["z"]},
    "nothing": lambda f, n: {"x": f["x"]},
    "a part of a flat that is written": lambda f, n: {"y": f["x"] * 2, "x": head(f["y"], f["x"])},
    "a conversion that changes nothing": lambda f, n: (lambda v: {"x": v.to(torch.float64) + f["y"].exp() * f["z"]})(f["x"] * 2),
    "a slice": lambda f, n: (lambda v, rest: {"x": v * 1.0 + rest})((f["x"] * 2)[:], f["y"].exp() * f["z"]),
    "a reshape": lambda f, n: (lambda v, rest: {"x": v * 1.0 + rest})((f["x"] * 2).reshape(-1), f["y"].exp() * f["z"]),
    "chain": chain,
    "fibonacci": fibonacci,
    "adam": adam,
    "stacked": stacked,
    "stacked and used": stacked_and_used,
    "stacked and used late": stacked_and_used_late,
    "stacked twice the same": stacked_twice_the_same,
    "bits": bits,
}
NAMES, NUMBERS = ["x", "y", "z"], {"a": 0.75, "b": 3}
NUMBERS_AFTER = {"a": 0.125, "b": 7}
ALL = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


class TestEager:
    @ALL
    def test_a_run_does_what_the_function_says_in_place(self, function):
        """To the bit, at every size, run after run, through one plan and one scratch."""
        program, scratch = Program.record(function, NAMES, list(NUMBERS)), Scratch()
        for seed, (size, numbers) in enumerate(itertools.product([*SIZES, SIZES[0]], [NUMBERS, NUMBERS_AFTER])):
            flats = positive(NAMES, size, seed=seed)
            same(after(program.run, flats, numbers, scratch), wanted(function, flats, numbers))

    @pytest.mark.parametrize("name", ["all methods", "lerp", "adam", "fibonacci", "stacked"])
    def test_every_dtype_has_its_plan(self, name):
        function, scratch = FUNCTIONS[name], Scratch()
        program = Program.record(function, NAMES, list(NUMBERS))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            flats = positive(NAMES, 777, dtype)
            same(after(program.run, flats, NUMBERS, scratch), wanted(function, flats, NUMBERS))

    def test_flats_may_differ_in_dtype_where_the_function_says_so(self):
        def function(f, n):
            return {"wide": f["wide"] + convert(f["narrow"], torch.float64) * n["a"], "narrow": convert(f["wide"], torch.float32)}

        flats = {"wide": positive(["wide"])["wide"], "narrow": positive(["narrow"], dtype=torch.float32)["narrow"]}
        program = Program.record(function, list(flats), ["a"])
        same(after(program.run, flats, {"a": 0.5}, Scratch()), wanted(function, flats, {"a": 0.5}))

    def test_whole_numbers_of_64_bits_arrive_whole(self):
        program = Program.record(lambda f, n: {"x": f["x"] + n["a"] * 3, "y": f["y"] * 1.0}, ["x", "y"], ["a"])
        for a in (2**53 + 1, -(2**60) - 1):
            flats = {"x": torch.zeros(512, dtype=torch.int64), "y": torch.ones(512)}
            program.run(flats, {"a": a}, Scratch())
            assert (flats["x"] == 3 * a).all()

    VALUES: ClassVar = {
        "x": lambda f: f["x"],
        "y": lambda f: f["y"],
        "z": lambda f: f["z"],
        "x * y": lambda f: f["x"] * f["y"],
        "y - z": lambda f: f["y"] - f["z"],
    }

    @pytest.mark.parametrize("order", [NAMES, NAMES[::-1]], ids=["in order", "in reverse"])
    @pytest.mark.parametrize("first", VALUES)
    def test_all_are_written_at_once(self, first, order):
        """Every way to write three flats from one another: copies, swaps, rotations and results."""
        flats = positive(NAMES)
        for rest in itertools.product(self.VALUES, repeat=2):
            chosen = dict(zip(order, (first, *rest), strict=True))

            def function(f, n, chosen=chosen):
                return {target: self.VALUES[value](f) for target, value in chosen.items()}

            found, right = after(Program.record(function, NAMES, []).run, flats, {}, Scratch()), wanted(function, flats, {})
            assert all(torch.equal(found[name], right[name]) for name in NAMES), chosen

    @pytest.mark.parametrize("seed", range(60))
    def test_random_programs(self, seed):
        function = random_function(seed)
        flats = positive(NAMES, 600, seed=seed)
        program, scratch = Program.record(function, NAMES, list(NUMBERS)), Scratch()
        for numbers in (NUMBERS, NUMBERS_AFTER):
            same(after(program.run, flats, numbers, scratch), wanted(function, flats, numbers))


def random_function(seed, length=25):
    """A straight line of operations on whatever came before, three of its values written: at random, but the same every time."""
    unary = [lambda a: a.cos(), lambda a: a.sin() * 0.5, lambda a: (a.square() + 1).sqrt(), lambda a: a.clamp(-2, 2), lambda a: -a]
    binary = [
        *(lambda a, b, n: a + b, lambda a, b, n: a - b, lambda a, b, n: a * b, lambda a, b, n: a / (b.abs() + 1)),
        *(lambda a, b, n: lerp(a, b, n["a"]), lambda a, b, n: axpy(a, b, -n["a"]), lambda a, b, n: n["b"] - a * b),
        *(lambda a, b, n: n["a"] * a + b * 2, lambda a, b, n: a.clamp(-n["a"], n["b"]) + b),
    ]

    def function(f, n):
        choose = random.Random(seed)
        values = [f[name] for name in NAMES]
        for _ in range(length):
            a, b = choose.choice(values[-6:]), choose.choice(values)
            values.append(choose.choice(unary)(a) if choose.random() < 0.3 else choose.choice(binary)(a, b, n))
        return dict(zip(choose.sample(NAMES, 3), choose.sample(values[3:], 3), strict=True))

    return function


class TestRecording:
    def test_the_function_is_called_once(self):
        calls = []

        def function(f, n):
            calls.append(1)
            return {"x": f["x"] * n["a"]}

        program, scratch = Program.record(function, ["x"], ["a"]), Scratch()
        for a in (1.0, 2.0):
            program.run(positive(["x"]), {"a": a}, scratch)
        assert calls == [1]

    @pytest.mark.parametrize(
        "function",
        [
            lambda f, n: {"x": f["x"] if n["a"] > 0 else -f["x"]},
            lambda f, n: {"x": f["x"] * max(n["a"], 1)},
            lambda f, n: {"x": f["x"] if n["a"] else f["y"]},
            lambda f, n: {"x": f["y"] if (f["x"] > 0).all() else f["x"]},
            lambda f, n: {"x": sum(f["x"])},
        ],
        ids=["number", "max", "truth", "tensor", "elements"],
    )
    def test_a_branch_on_what_is_not_known_raises(self, function):
        with pytest.raises(TraceError):
            Program.record(function, ["x", "y"], ["a"])

    def test_what_stays_as_it_is_is_no_target(self):
        program = Program.record(lambda f, n: {"x": f["x"], "y": f["x"] + f["y"], "z": f["z"]}, NAMES, [])
        assert program.targets == ("y",)

    def test_a_value_without_a_flat_is_an_error(self):
        with pytest.raises(KeyError, match="w"):
            Program.record(lambda f, n: {"w": f["x"] * 2}, ["x"], [])

    def test_flats_and_numbers_that_are_not_used_may_be_there(self):
        program = Program.record(lambda f, n: {"x": f["x"] + 1}, NAMES, ["a", "b"])
        flats = positive(NAMES)
        found = after(program.run, flats, NUMBERS, Scratch())
        same(found, {**flats, "x": flats["x"] + 1})

    def test_a_constant_that_the_function_branches_on_is_fixed_in_the_recording(self):
        for beta in (0.0, 0.9):
            program = Program.record(lambda f, n, beta=beta: {"x": f["x"] * (beta if beta else n["a"])}, ["x"], ["a"])
            assert after(program.run, {"x": torch.ones(512)}, {"a": 3.0}, Scratch())["x"][0].item() == pytest.approx(beta or 3.0)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without the slow part: what it captured is run as it is; the list grows by every graph."""
    made, real = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: real(function, **kwargs, backend=backend))
    yield made
    torch._dynamo.reset()


class TestCompiled:
    FEW = ("all methods", "numbers of numbers", "axpy", "lerp", "where", "an old value that is used later", "a mean that returns")
    FEW += ("adam", "stacked and used late", "bits")

    @pytest.mark.parametrize("function", sweep((pytest.param(f, id=name) for name, f in FUNCTIONS.items()), *FEW))
    def test_a_run_does_what_the_function_says_in_place(self, function, graphs):
        program = Program.record(function, NAMES, list(NUMBERS))
        for seed, numbers in enumerate((NUMBERS, NUMBERS_AFTER)):
            flats = positive(NAMES, 777, seed=seed)
            same(after(program.run_compiled, flats, numbers), wanted(function, flats, numbers), 1e-13)
        assert program.is_compiled
        assert len(graphs) == 1

    def test_numbers_and_sizes_compile_nothing_anew(self, graphs):
        program = Program.record(adam, NAMES, list(NUMBERS))
        for step, (size, lr) in enumerate(itertools.product([512, 777, 4096, 40_000, 700], [0.5, 0.0, 0.1, 1e-7, -1.0, 1.0])):
            flats, numbers = positive(NAMES, size, seed=step), {"a": lr, "b": step + 1}
            same(after(program.run_compiled, flats, numbers), wanted(adam, flats, numbers), 1e-12)
        assert len(graphs) == 1

    @pytest.mark.parametrize("values", [(1, 0.5, 2), (0.5, 1, 2.5), (True, 0.5, 3)], ids=str)
    def test_a_number_that_was_whole_stays_so_or_is_refused(self, values, graphs):
        program = Program.record(lambda f, n: {"x": f["x"] * n["a"] + n["b"]}, ["x"], ["a", "b"])
        for a in values:
            given = {"x": torch.full((512,), 2.0)}, {"a": a, "b": 0.25}
            if isinstance(values[0], int) and not isinstance(a, int):
                with pytest.raises(TypeError, match="whole when this was compiled"):
                    program.run_compiled(*given)
            else:
                assert after(program.run_compiled, *given)["x"].unique().tolist() == [2 * a + 0.25]

    def test_numbers_are_as_precise_as_the_widest_flat(self, graphs):
        """Whichever comes first."""

        def function(f, n):
            return {"x": f["x"] * n["a"]}

        program = Program.record(function, ["g", "x"], ["a"])
        flats = {"g": torch.ones(512), "x": torch.ones(512, dtype=torch.float64)}
        same(after(program.run_compiled, flats, {"a": 0.3}), wanted(function, flats, {"a": 0.3}), 1e-15)

    FAULTS: ClassVar = {
        "a wrong number": lambda *args: args[0].mul_(1.001),
        "nothing": lambda *args: None,
        "not a number": lambda *args: args[0].fill_(torch.nan),
        "one element": lambda *args: args[0].copy_(args[0] * 2).view(-1)[-1:].zero_(),
    }

    @pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
    def test_a_compiler_that_is_wrong_is_found_out_and_touches_nothing(self, fault, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fault)
        program = Program.record(lambda f, n: {"x": f["x"] * 2}, ["x"], [])
        flats = positive(["x"])
        given = copied(flats)
        with pytest.raises(RuntimeError, match=r"the compiled x is not what the eager step makes"):
            program.run_compiled(given, {})
        same(given, flats)
        assert not program.is_compiled
        same(after(program.run, flats, {}, Scratch()), {"x": flats["x"] * 2})

    def test_a_compiler_that_fails_touches_nothing(self, monkeypatch):
        def fail(*args):
            args[0].zero_()
            raise ValueError("no such instruction")

        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fail)
        program = Program.record(lambda f, n: {"x": f["x"] * 2}, ["x"], [])
        flats = positive(["x"])
        given = copied(flats)
        with pytest.raises(ValueError, match="no such instruction"):
            program.run_compiled(given, {})
        same(given, flats)
        assert not program.is_compiled

    def test_infinities_and_nans_that_belong_there_are_no_fault(self, graphs):
        program = Program.record(lambda f, n: {"x": f["x"].log()}, ["x"], [])
        x = torch.tensor([-1.0, 0.0, 1.0, torch.inf, torch.nan]).repeat(128)
        found = after(program.run_compiled, {"x": x}, {})
        assert torch.equal(found["x"].nan_to_num(7.0), x.log().nan_to_num(7.0))

    def test_the_first_run_counts_once(self, graphs):
        program = Program.record(lambda f, n: {"x": f["x"] + 1}, ["x"], [])
        flats = {"x": torch.zeros(512)}
        for step in range(3):
            program.run_compiled(flats, {})
            assert flats["x"].unique().tolist() == [step + 1]


class TestRunner:
    def test_a_compiler_that_fails_is_told_of_once_and_the_run_goes_on(self, monkeypatch):
        def fail(function, **kwargs):
            raise ValueError("no such\ncompiler")

        monkeypatch.setattr(torch, "compile", fail)
        runner, flats = Runner("Adam", compiled=True), {"x": torch.zeros(512)}
        program = Program.record(lambda f, n: {"x": f["x"] + n["a"]}, ["x"], ["a"])
        with pytest.warns(UserWarning, match=r"^Adam: torch.compile failed \(no such\); going on eagerly") as told:
            runner.run(program, flats, {"a": 1.0})
        assert len(told) == 1
        runner.run(program, flats, {"a": 1.0})
        assert flats["x"].unique().tolist() == [2]
        assert runner.failed and not runner.compiled

    @pytest.mark.parametrize(("compiled", "once", "expected"), [(True, False, 1), (True, True, 0), (False, False, 0)])
    def test_what_runs_once_is_not_compiled(self, compiled, once, expected, graphs):
        runner, flats = Runner("Adam", compiled), {"x": torch.zeros(512)}
        program = Program.record(lambda f, n: {"x": f["x"] + 1}, ["x"], [])
        for _ in range(2):
            runner.run(program, flats, {}, once)
        assert flats["x"].unique().tolist() == [2]
        assert len(graphs) == expected

    def test_an_error_after_a_good_compiled_run_is_raised(self, graphs):
        runner = Runner("Adam", compiled=True)
        program = Program.record(lambda f, n: {"x": f["x"] + 1}, ["x"], [])
        runner.run(program, {"x": torch.zeros(512)}, {})
        with pytest.raises(KeyError):
            runner.run(program, {}, {})


class TestCompiler:
    """The real compiler, which is slow: few programs, several sizes and numbers through each."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_draw_has_the_same_noise_and_stashes_the_old_mean(self):
        """The compiler (torch 2.13) writes the new mean into the stash, if it may: both are inputs of one graph."""

        def source(f, n, dtype):
            return CounterNoise(n["seed"], n["stream"], n["step"], n["draw"], Where(f["pairs"], n["first"], dtype))

        def draw(f, n):
            mean = f["mean"] + source(f, n, torch.float32).normal(f["mean"]) / n["root"]
            return {"offset": f["mean"], "mean": mean, "u": source(f, n, torch.float64).uniform(f["u"])}

        names = ["seed", "stream", "step", "draw", "first", "root"]
        program = Program.record(draw, ["mean", "offset", "u", "pairs"], names)
        for size, seed, step, first in [(700, 5, 0, 0), (5000, -(2**70), 1, 2**33), (512, 5, 2, 384), (70_001, 6, 10**9, 128)]:
            flats = positive(["mean", "offset"], size, torch.float32, seed=step % 10) | positive(["u"], size)
            flats["pairs"] = torch.arange(whole_blocks(size) // 2, dtype=torch.int32)
            numbers = dict(zip(names, (seed, 2, step, 3, first, 4.0), strict=True))
            found = after(program.run_compiled, flats, numbers)
            assert torch.equal(found["offset"], flats["mean"])
            assert torch.equal(found["u"], source(flats, numbers, torch.float64).uniform(flats["u"]))  # all bits of the words
            noise = source(flats, numbers, torch.float32).normal(flats["mean"])
            assert (found["mean"] - (flats["mean"] + noise / 4)).abs().max() < 2e-6
            alone = CounterNoise(seed, 2, step, 3).normal(torch.empty(size))
            assert torch.equal(noise, alone) is (first == 0)

    def test_a_mean_that_returns(self):
        def function(f, n):
            return {"mean": f["offset"], "offset": f["mean"] - f["offset"], "z": f["w"], "w": f["w"] * n["a"]}

        self.check(function, ["mean", "offset", "z", "w"])

    def test_a_swap(self):
        self.check(lambda f, n: {"x": f["y"], "y": f["x"], "z": f["z"] * n["a"]}, NAMES)

    @staticmethod
    def check(function, names):
        program = Program.record(function, names, ["a"])
        for seed, size in enumerate((512, 777)):
            flats = positive(names, size, torch.float32, seed)
            same(after(program.run_compiled, flats, {"a": 0.5}), wanted(function, flats, {"a": 0.5}))

    def test_many_programs_in_one(self):
        """Random lines of operations, compiled together, run on new numbers and sizes."""
        count = 6
        parts = [random_function(seed, length=15) for seed in range(100, 100 + count)]
        names = [f"{name}{k}" for k in range(count) for name in NAMES]

        def function(f, n):
            own = [part({name: f[f"{name}{k}"] for name in NAMES}, n) for k, part in enumerate(parts)]
            return {f"{name}{k}": value for k, values in enumerate(own) for name, value in values.items()}

        program = Program.record(function, names, list(NUMBERS))
        for seed, (size, numbers) in enumerate([(600, NUMBERS), (600, NUMBERS_AFTER), (4096, NUMBERS)]):
            flats = positive(names, size, seed=seed)
            same(after(program.run_compiled, flats, numbers), wanted(function, flats, numbers), 1e-12)


def test_uncast_is_without_autocast_and_gives_it_back():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with uncast():
            assert (a @ a).dtype == torch.float32
        assert uncast()(lambda: a @ a)().dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
