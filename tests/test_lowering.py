"""Lowering: scratch that is used again, plans that need little of it, runs that allocate nothing."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayesrule.lowering import Line, Scratch, planned
from bayesrule.noise import CounterNoise, Where
from bayesrule.program import Program
from bayesrule.vector import axpy, convert, head, lerp, whole_blocks

CPU = torch.device("cpu")
SIZE = 4096


class Fresh(TorchDispatchMode):
    """Remembers the calls that made new storages of some size."""

    def __init__(self, least):
        super().__init__()
        self.least, self.made = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, new = (
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((args, kwargs), out)
        )
        self.made += [str(func) for place, size in new.items() if place not in given and size >= self.least]
        return out


def flats_of(names, size=SIZE, dtype=torch.float32):
    made = {name: torch.full((size,), 1.0 + k / 8, dtype=dtype) for k, name in enumerate(names) if name != "pairs"}
    return made | ({"pairs": torch.arange(whole_blocks(size) // 2, dtype=torch.int32)} if "pairs" in names else {})


def plan_of(program, flats, numbers):
    line = Line(program.graph, program.flats, program.targets)
    return planned(line, [flats[name] for name in program.flats], [numbers[name] for name in program.numbers])


def chain(f, n):
    """Thirty operations, each on the result of the one before."""
    x = f["x"]
    for _ in range(15):
        x = (x * n["a"] + f["y"]).sqrt()
    return {"z": x * 2, "y": x + f["x"]}


def fibonacci(f, n):
    """Thirty operations, each on the results of the two before: both must be held."""
    a, b = f["x"] * 1.5, f["y"] * 0.5
    for _ in range(30):
        a, b = b, axpy(b, a, n["a"])
    return {"z": a * b}


def one_operation(f, n):
    return {"x": f["x"] - f["y"] * n["a"]}


def results_only(f, n):
    return {"x": f["x"] * n["a"], "y": f["y"] + 1}


def draw(f, n):
    noise = CounterNoise(n["seed"], 0, n["step"], where=Where(f["pairs"], n["first"], torch.float32))
    return {"offset": f["x"], "x": f["x"] + noise.normal(f["x"]) / (n["a"] * (f["y"] + 0.1)).sqrt()}


def move(f, n):
    average, square = lerp(f["y"], f["x"], 1 - n["a"]), lerp(f["z"], f["x"].square(), 1 - n["a"] ** 2)
    scale = n["a"] / (1 - 0.5 ** n["step"])
    return {"x": f["x"] - (average / (square.sqrt() + 1e-8)).clamp(-n["a"], n["a"]) * scale, "y": average, "z": square}


def both(f, n):
    return draw(f, n) | {"y": f["y"] * n["a"]}


NAMES, NUMBERS = ["x", "y", "z", "offset", "pairs"], {"a": 0.5, "seed": 3, "step": 4, "first": 128}
# function -> bytes of scratch an element of the flats takes, at most: a slot of float32 takes 4, the words of noise 8 for two
FUNCTIONS = {chain: 4, fibonacci: 8, one_operation: 4, results_only: 0, draw: 16, move: 12, both: 16}
ALL = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


class TestPlans:
    @ALL
    def test_slots_are_as_few_as_lifetimes_allow(self, function):
        program, scratch = Program.record(function, NAMES, list(NUMBERS)), Scratch()
        program.run(flats_of(NAMES), NUMBERS, scratch)
        assert scratch.nbytes <= FUNCTIONS[function] * SIZE

    @pytest.mark.parametrize(("function", "slots"), [(chain, 1), (fibonacci, 2)])
    def test_a_chain_of_thirty_operations_takes_one_or_two(self, function, slots):
        plan = plan_of(Program.record(function, NAMES, list(NUMBERS)), flats_of(NAMES), NUMBERS)
        assert len({place.slot for place in plan.places}) == slots

    @ALL
    def test_a_second_run_allocates_nothing_of_the_size_of_flats(self, function):
        program, scratch = Program.record(function, NAMES, list(NUMBERS)), Scratch()
        program.run(flats_of(NAMES), NUMBERS, scratch)
        flats, held, version = flats_of(NAMES), scratch.nbytes, scratch.version
        for step in (5, 6):
            with Fresh(1024) as fresh:
                program.run(flats, {**NUMBERS, "step": step, "a": 0.75}, scratch)
            assert fresh.made == []
        assert (scratch.nbytes, scratch.version) == (held, version)

    def test_what_the_last_test_looks_for_is_seen(self):
        flats = flats_of(NAMES)
        with Fresh(1024) as fresh:
            one_operation(flats, NUMBERS)
        assert fresh.made == ["aten.mul.Tensor", "aten.sub.Tensor"]

    @ALL
    def test_plans_of_the_same_function_are_the_same(self, function):
        one, two = (plan_of(Program.record(function, NAMES, list(NUMBERS)), flats_of(NAMES), NUMBERS) for _ in range(2))
        assert one.places == two.places
        assert one.module.code == two.module.code

    def test_a_result_goes_straight_to_its_target_if_nobody_reads_that_later(self):
        plan = plan_of(Program.record(results_only, NAMES, list(NUMBERS)), flats_of(NAMES), NUMBERS)
        assert plan.places == []
        assert ".copy_(" not in plan.module.code

    def test_a_result_waits_if_somebody_reads_its_target_later(self):
        def late(f, n):
            return {"x": f["x"] * 2, "y": (f["y"] + 1).sqrt() * f["x"]}

        plan = plan_of(Program.record(late, ["x", "y"], []), flats_of(["x", "y"]), {})
        assert plan.module.code.count(".copy_(") == 1

    @ALL
    def test_sizes_and_dtypes_share_a_program_and_a_scratch(self, function):
        """Scratch grows to the largest and stays; smaller ones are right before and after."""
        scratch, held = Scratch(), []
        program = Program.record(function, NAMES, list(NUMBERS))
        for size in (512, 40_000, 777, 512, 40_000):
            flats = flats_of(NAMES, size)
            right = function({name: flat.clone() for name, flat in flats.items()}, NUMBERS)
            program.run(flats, NUMBERS, scratch)
            held.append(scratch.nbytes)
            assert all(torch.equal(flats[name], value) for name, value in right.items())
        assert held[0] <= held[1] == held[2] == held[3] == held[4]

    def test_a_slot_that_grows_within_a_plan_leaves_nothing_in_the_memory_that_it_had(self):
        def growing(f, n):
            wide = convert(f["x"] * 2, torch.float64) + 1
            return {"x": convert((wide.cos() * wide + convert(f["y"].cos(), torch.float64)) * wide, torch.float32)}

        program, flats, scratch = Program.record(growing, ["x", "y"], []), flats_of(["x", "y"]), Scratch()
        plan = plan_of(program, flats, {})
        tensors = plan.tensors(scratch, program.graph, list(flats.values()), [])
        memory = {(place.slot, t.untyped_storage().data_ptr()) for place, t in zip(plan.places, tensors, strict=True)}
        assert len(memory) == len({place.slot for place in plan.places})
        assert len({t.dtype for place, t in zip(plan.places, tensors, strict=True) if place.slot == 0}) == 2

    def test_programs_share_a_scratch_in_turn(self):
        programs, scratch = {f: Program.record(f, NAMES, list(NUMBERS)) for f in FUNCTIONS}, Scratch()
        for size in (512, 9000, 777):
            for function, program in programs.items():
                flats = flats_of(NAMES, size)
                right = function({name: flat.clone() for name, flat in flats.items()}, NUMBERS)
                program.run(flats, NUMBERS, scratch)
                assert all(torch.equal(flats[name], value) for name, value in right.items())
        assert scratch.nbytes <= max(FUNCTIONS.values()) * whole_blocks(9000)

    def test_a_program_that_is_run_in_inference_mode_first_runs_outside_too(self):
        program, scratch = Program.record(chain, NAMES, list(NUMBERS)), Scratch()
        with torch.inference_mode():
            program.run(flats_of(NAMES), NUMBERS, scratch)
        flats = flats_of(NAMES)
        program.run(flats, NUMBERS, scratch)
        assert torch.equal(flats["z"], chain(flats_of(NAMES), NUMBERS)["z"])


class TestScratch:
    def test_a_slot_is_the_same_memory_whatever_it_is_seen_as(self):
        scratch = Scratch()
        wide = scratch.flat("a", (4, 128), torch.float64, CPU)
        assert (wide == 0).all()
        narrow = scratch.flat("a", (100,), torch.int32, CPU)
        assert wide.shape == (4, 128) and narrow.shape == (100,)
        assert wide.data_ptr() == narrow.data_ptr()
        assert scratch.flat("b", (100,), torch.int32, CPU).data_ptr() != narrow.data_ptr()
        assert scratch.nbytes == 4 * 128 * 8 + 400

    def test_the_version_tells_whether_memory_was_replaced(self):
        scratch = Scratch()
        versions = [scratch.version]
        for size in (512, 100, 512, 513, 512):
            scratch.flat("a", (size,), torch.float32, CPU)
            versions.append(scratch.version)
        assert len(set(versions)) == 3
        assert versions[1] == versions[3] and versions[4] == versions[5]

    def test_two_share_neither_memory_nor_a_version(self):
        one, two = Scratch(), Scratch()
        seen = [(s.flat("a", (512,), torch.float32, CPU).data_ptr(), s.version) for s in (one, two, one, two)]
        assert seen[0] == seen[2] and seen[1] == seen[3]
        assert not set(seen[0]) & set(seen[1])

    def test_a_program_in_two_scratches_in_turn_keeps_them_apart(self):
        program, scratches = Program.record(fibonacci, NAMES, list(NUMBERS)), [Scratch(), Scratch()]
        right = fibonacci(flats_of(NAMES), NUMBERS)["z"]
        places = []
        for scratch in (*scratches, *scratches):
            flats = flats_of(NAMES)
            program.run(flats, NUMBERS, scratch)
            assert torch.equal(flats["z"], right)
            places.append({scratch.flat(slot, (SIZE,), torch.float32, CPU).data_ptr() for slot in range(2)})
        assert places[0] == places[2] and places[1] == places[3]
        assert not places[0] & places[1]

    def test_counts_are_made_once(self):
        scratch = Scratch()
        first = scratch.count(1000, CPU)
        assert torch.equal(first, torch.arange(1000, dtype=torch.int32))
        assert scratch.count(10, CPU).data_ptr() == first.data_ptr()
        assert scratch.count(10, CPU).tolist() == list(range(10))
        assert scratch.nbytes == 4 << 16  # replaced seldom: older views keep what they were cut from

    def test_memory_made_in_inference_mode_outlives_it(self):
        scratch = Scratch()
        with torch.inference_mode():
            scratch.flat("a", (8,), torch.float32, CPU)
        assert not scratch.flat("a", (8,), torch.float32, CPU).is_inference()


class TestLine:
    def test_what_is_made_of_numbers_alone_is_a_number(self):
        program = Program.record(lambda f, n: {"x": f["x"] * (1 - n["a"] ** n["b"]) + n["a"]}, ["x"], ["a", "b"])
        line = Line(program.graph, program.flats, program.targets)
        assert [line.is_tensor(call) for call in line.calls] == [False, False, True, True]
        assert not line.is_tensor(1.0)

    def test_copies_of_flats_are_told_from_results(self):
        def function(f, n):
            return {"offset": f["x"], "x": convert(head(f["y"] * 2, f["x"]), torch.float32)}

        program = Program.record(function, ["x", "y", "offset"], [])
        line = Line(program.graph, program.flats, program.targets)
        assert [(value.name, target.name) for value, target in line.copies] == [("flat_x", "flat_offset")]
        assert [target.name for _, target in line.results] == ["flat_x"]
