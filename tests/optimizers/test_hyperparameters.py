"""Hyper-parameters are held to their ranges, in every group, and the message says which, what and where."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.instances import ALGORITHMS, named
from torch import nn

import bayesrule as br
from bayesrule.optimizers.hyperparameters import Count, OneOf, OrNone, Pair, Range, validate

IVON = dict(lr=0.1, ess=10.0)


def weights(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


class TestRanges:
    @pytest.mark.parametrize(
        ("text", "inside", "outside"),
        [
            ("[0, 1)", [0, 0.5, 0.999999], [1, -1e-9, math.inf, math.nan]),
            ("(0, inf]", [1e-300, 5, math.inf], [0, -1, -math.inf, math.nan]),
            ("[0, inf)", [0, 1e300], [math.inf, -1e-300, math.nan]),
            ("(0, 1]", [1, 1e-9], [0, 1 + 1e-9]),
        ],
    )
    def test_bounds_are_in_or_out_as_written(self, text, inside, outside):
        assert all(value in Range(text) for value in inside)
        assert all(value not in Range(text) for value in outside)
        assert str(Range(text)) == f"a number in {text}"

    @pytest.mark.parametrize("value", [None, "a", [], (0.1,), {}, 1j], ids=repr)
    def test_what_is_no_number_is_in_no_range(self, value):
        assert value not in Range("[0, inf)")

    def test_a_number_in_quotes_is_no_number(self):
        assert "0.5" not in Range("[0, 1)")

    def test_a_tensor_of_one_element_is_a_number_as_in_torch(self):
        assert torch.tensor(0.5) in Range("[0, 1)")
        assert torch.tensor(2.0) not in Range("[0, 1)")
        assert torch.ones(2) not in Range("[0, inf)")

    @settings(derandomize=True, deadline=None)
    @given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6), value=st.floats(-3e6, 3e6))
    def test_open_and_closed_ranges_differ_only_in_their_bounds(self, low, size, value):
        high = low + size
        inner, outer = Range(f"({low!r}, {high!r})"), Range(f"[{low!r}, {high!r}]")
        assert low in outer and high in outer
        assert low not in inner and high not in inner
        if value not in (low, high):
            assert (value in inner) == (value in outer) == (low < value < high)

    def test_pair_takes_two_numbers_each_in_its_range(self):
        pair = Pair(Range("[0, 1)"), Range("[0, 1]"))
        assert (0.9, 1.0) in pair
        assert [0.9, 1.0] in pair
        for wrong in ((1.0, 1.0), (0.9, 1.1), (0.9,), (0.9, 0.9, 0.9), 0.9, None, "ab"):
            assert wrong not in pair

    def test_count_takes_whole_numbers_and_no_switches(self):
        assert 3 in Count(1)
        for wrong in (0, -1, 1.0, True, "1", None):
            assert wrong not in Count(1)

    def test_one_of_takes_its_values_and_not_their_look_alikes(self):
        assert "price" in OneOf(("price", "gradsq"))
        assert "Price" not in OneOf(("price", "gradsq"))
        assert True in OneOf((True, False))
        assert 1 not in OneOf((True, False))
        assert torch.ones(2) not in OneOf((True, False))

    def test_optional_takes_none_too(self):
        assert None in OrNone(Range("(0, inf)"))
        assert 3.0 in OrNone(Range("(0, inf)"))
        assert 0.0 not in OrNone(Range("(0, inf)"))

    def test_validate_names_optimizer_group_hyper_parameter_range_and_value(self):
        validate("Some", 0, {"lr": 0.5}, {"lr": Range("[0, 1)")})
        with pytest.raises(ValueError) as caught:
            validate("Some", 3, {"lr": -2.5}, {"lr": Range("[0, 1)")})
        assert str(caught.value) == "Some: parameter group 3: lr must be a number in [0, 1), got -2.5"


# hyper-parameter of IVON, values that are outside, what the message says is inside
BAD: list[tuple[str, Any, str]] = [
    ("lr", -0.1, "[0, inf)"),
    ("lr", math.nan, "[0, inf)"),
    ("lr", None, "[0, inf)"),
    ("ess", 0.0, "(0, inf]"),
    ("ess", -3, "(0, inf]"),
    ("ess", math.nan, "(0, inf]"),
    ("hess_init", 0.0, "(0, inf)"),
    ("hess_init", math.inf, "(0, inf)"),
    ("betas", (1.0, 0.99), "[0, 1) and [0, 1]"),
    ("betas", (-0.1, 0.99), "[0, 1) and [0, 1]"),
    ("betas", (0.9, 1.01), "[0, 1) and [0, 1]"),
    ("betas", 0.9, "[0, 1) and [0, 1]"),
    ("weight_decay", -1e-4, "[0, inf)"),
    ("mc_samples", 0, ">= 1"),
    ("mc_samples", 1.5, ">= 1"),
    ("hess_approx", "Price", "'price', 'gradsq'"),
    ("gradsq_scale", 0.0, "(0, inf)"),
    ("clip_radius", 0.0, "(0, inf]"),
    ("debias", "no", "True, False"),
    ("rescale_lr", None, "True, False"),
    ("antithetic", 2, "True, False"),
    ("seed", 0.5, "whole number"),
    ("noise_scale", -1, "0, 1"),
]
OVER_ARGUMENTS = [row for row in BAD if row[0] != "noise_scale"]


def complains(name: str, value: Any, allowed: str, group: int) -> Any:
    return pytest.raises(
        ValueError,
        check=lambda error: (
            all(part in str(error) for part in (f"IVON: parameter group {group}: {name} must be", allowed, f"got {value!r}"))
            and "\n" not in str(error)
        ),
    )


class TestIVON:
    """Fault 14: messages named the wrong value, beta1 = 1 gave NaN, overrides of a group were never looked at."""

    @pytest.mark.parametrize(("name", "value", "allowed"), OVER_ARGUMENTS, ids=lambda v: repr(v))
    def test_refuses_bad_arguments(self, name, value, allowed):
        with complains(name, value, allowed, group=0):
            br.IVON(weights(), **{**IVON, name: value})

    @pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda v: repr(v))
    def test_refuses_bad_overrides_of_a_group_by_its_number(self, name, value, allowed):
        first, second = weights(2)
        with complains(name, value, allowed, group=1):
            br.IVON([{"params": [first]}, {"params": [second], name: value}], **IVON)

    @pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda v: repr(v))
    def test_refuses_bad_groups_added_later_and_stays_as_it_was(self, name, value, allowed):
        first, second = weights(2)
        optimizer = br.IVON([first], **IVON)
        with complains(name, value, allowed, group=1):
            optimizer.add_param_group({"params": [second], name: value})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [second]})

    @pytest.mark.parametrize(
        "good",
        [
            dict(lr=0.0),
            dict(ess=math.inf),
            dict(betas=(0.0, 0.0)),
            dict(betas=[0.9, 1.0]),
            dict(weight_decay=0.0),
            dict(mc_samples=7),
            dict(hess_approx="gradsq", gradsq_scale=64),
            dict(clip_radius=1e-3),
            dict(seed=-5),
            dict(seed=2**60),
        ],
        ids=str,
    )
    def test_takes_the_bounds_that_are_inside(self, good):
        optimizer = br.IVON(weights(), **{**IVON, **good})
        for name, value in good.items():
            assert optimizer.param_groups[0][name] == value

    def test_every_switch_lives_in_the_groups(self):
        group = br.IVON(weights(), **IVON).param_groups[0]
        expected = (
            "lr ess hess_init betas weight_decay mc_samples hess_approx gradsq_scale clip_radius debias rescale_lr "
            "antithetic seed noise_scale"
        )
        assert set(expected.split()) <= set(group)

    def test_misspelt_arguments_are_refused(self):
        with pytest.raises(TypeError, match="beta1"):
            br.IVON(weights(), **IVON, beta1=0.9)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (br.SGD, dict(lr=-1)),
        (br.SGD, dict(momentum=1.0)),
        (br.SGD, dict(dampening=-0.1)),
        (br.SGD, dict(weight_decay=-1)),
        (br.SGD, dict(nesterov="yes")),
        (br.RMSprop, dict(lr=-1)),
        (br.RMSprop, dict(alpha=1.0)),
        (br.RMSprop, dict(eps=-1e-8)),
        (br.RMSprop, dict(momentum=-0.5)),
        (br.Adam, dict(lr=math.nan)),
        (br.Adam, dict(betas=(0.9, 1.0))),
        (br.Adam, dict(eps=-1)),
        (br.AdamW, dict(betas=(0.9,))),
        (br.AdamW, dict(weight_decay=-0.1)),
    ],
    ids=str,
)
def test_first_order_optimizers_refuse_what_torch_refuses(make, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{make.__name__}: parameter group 0: {name} must be .*, got"):
        make(weights(), **bad)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_every_row_keeps_what_it_was_given(algorithm):
    optimizer = algorithm(weights())
    for name, value in {**algorithm.hyper, **(algorithm.alone or {})}.items():
        assert optimizer.param_groups[0][name] == value


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="parameter group 0 has complex parameters"):
        br.IVON([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], **IVON)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("make", [br.IVON, br.Adam], ids=lambda make: make.__name__)
def test_a_group_with_the_betas_of_another_package_is_refused(make, name):
    group = {"params": weights(), name: 0.5}
    hyper = IVON if make is br.IVON else dict(lr=0.1)
    with pytest.raises(ValueError, match=rf"parameter group 0: {name} is not read; write betas=\(beta1, beta2\)"):
        make([group], **hyper)
